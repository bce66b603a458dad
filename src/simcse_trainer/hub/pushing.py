"""A trained folder to the Hub, at the end of a run or by `simcse-trainer push`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from simcse_trainer.checkpoints import find_checkpoint
from simcse_trainer.errors import InputError
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.hub.process import HubProcess, HubSettings
from simcse_trainer.hub.snapshot import (
    CARD,
    STATE,
    UPLOADS,
    figure_of,
    find_model,
    link_model,
    link_state,
    message_of,
    pushes_of,
    read_json,
    read_state,
    step_of,
)
from simcse_trainer.hub.uploader import Upload


def push(
    folder: Path,
    settings: HubSettings,
    *,
    branch: str = "main",
    training_state: bool = True,
    patience_s: float = 600.0,
    show_progress: bool = True,
) -> tuple[str, int]:
    """Bring a repository to what a folder holds; a second time there is nothing to do.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        settings: Which repository, as whom.
        branch: For the model.
        training_state: Also push the newest checkpoint, where there is one.
        patience_s: Failures are retried for so long.
        show_progress: Whether to show a bar.

    Returns:
        `namespace/name`, and how many commits it took.

    Raises:
        InputError: There is no model, or the Hub did not take it.
    """
    find_model(folder)
    process, deadline = HubProcess(settings), time.monotonic() + patience_s
    target = folder / UPLOADS
    try:
        name = process.call_until({"action": "name"}, deadline)["repository"]
        upload = stage_folder(folder, branch=branch, training_state=training_state, repository=name)
        request = upload.request()
        with tqdm(
            desc=f"Pushing to {name}", unit="B", unit_scale=True, disable=not show_progress
        ) as bar:

            def progress(done: int, total: int) -> None:
                bar.n, bar.total = done, total
                bar.refresh()

            done = process.call_until(request, deadline, progress)
    except HubFailure as failure:
        raise InputError(
            f"{folder} could not be pushed to {settings.name}: {failure.text}. It is unchanged; "
            "the same command goes on where this one stopped."
        ) from None
    finally:
        process.end()
        shutil.rmtree(target, ignore_errors=True)
    return done["repository"], done["commits"]


def stage_folder(
    folder: Path, *, branch: str, training_state: bool, repository: str | None = None
) -> Upload:
    """Links to what of a folder is to be pushed.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        branch: For the model.
        training_state: Whether the newest checkpoint goes too.
        repository: The card's snippets load from it, instead of from where the model was trained.

    Raises:
        InputError: There is no model.
    """
    model = find_model(folder)
    target = folder / UPLOADS / f"final-{time.time_ns()}"
    checkpoint = find_checkpoint(folder)
    state = read_state(model) or (read_state(checkpoint) if checkpoint else {})
    arguments = read_json(model / "training_args.json")
    best = state.get("best_model_checkpoint")
    step = step_of(model) or (step_of(best) if arguments.get("load_best_model_at_end") else None)
    step = step or state.get("global_step")
    link_model(model, target / "model")
    card = target / "model" / CARD
    if repository and card.is_file():
        _rename_in_card(card, arguments, repository)
    if training_state and checkpoint is not None:
        link_state(
            checkpoint, checkpoint.with_name(Path(best or checkpoint).name), target / "state"
        )
    message = "A trained model" if step is None else message_of(state, step)
    pushes = pushes_of(target, step=step, message=message, branch=branch)
    figure = figure_of(target, model if (model / STATE).is_file() else checkpoint or model)
    return Upload(f"the model in {folder}", target, pushes, figure)


def _rename_in_card(card: Path, arguments: dict[str, Any], repository: str) -> None:
    """Snippets load from the repository, not from the folder or repository of the training run."""
    text = card.read_text(encoding="utf-8")
    for name in (arguments.get("hub_model_id"), arguments.get("output_dir")):
        if name:
            text = text.replace(json.dumps(name), json.dumps(repository))
    card.unlink()  # a link: the folder keeps its own
    card.write_text(text, encoding="utf-8")
