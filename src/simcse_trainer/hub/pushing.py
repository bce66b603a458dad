"""A trained folder to the Hub, at the end of a run or by `simcse-trainer push`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from simcse_trainer.checkpoints import find_checkpoint
from simcse_trainer.errors import InputError
from simcse_trainer.files import CARD, STATE, TRAINING_ARGS, UPLOADS, step_of
from simcse_trainer.hub.contents import find_local_base, find_record, link_files, list_published
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.hub.process import HubProcess, HubSettings
from simcse_trainer.hub.snapshot import (
    best_of,
    figure_of,
    find_model,
    link_state,
    make_target,
    message_of,
    pushes_of,
    read_json,
    read_state,
)
from simcse_trainer.hub.uploader import Upload, push_words
from simcse_trainer.output_folder import remove_own
from simcse_trainer.tensor_files import find_not_finite


@dataclass(frozen=True)
class Pushed:
    """How a push ended.

    Attributes:
        repository: `namespace/name`.
        commits: How many it took.
        notes: What the user should know: other people's changes.
    """

    repository: str
    commits: int
    notes: list[str]


def push(
    folder: Path,
    settings: HubSettings,
    *,
    branch: str = "main",
    training_state: bool = True,
    include: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
    patience_s: float = 600.0,
    show_progress: bool = True,
    tell: Callable[[str], None] = lambda line: None,
) -> Pushed:
    """Bring a repository to what a folder holds; a second time there is nothing to do.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        settings: Which repository, as whom.
        branch: For the model.
        training_state: Also push the newest checkpoint, where there is one.
        include: Patterns of files to push beside those of the model.
        base_model: The name on the Hub of an adapter's base, where that is a folder here.
        overwrite: Replace what somebody else has changed there.
        patience_s: Failures are retried for so long.
        show_progress: Whether to show a bar.
        tell: Gets the names of the files before anything is sent, where no run recorded them.

    Raises:
        InputError: There is no model, nobody could load it, or the Hub did not take it.
    """
    model = find_model(folder)
    names = list_published(model, include)
    _check_base(model, names, base_model)
    _check_finite(model, names)
    if find_record(model) is None or include:
        tell(f"From {model} go to the Hub: {', '.join(names)}.")
    process, deadline = HubProcess(settings), time.monotonic() + patience_s
    target = None
    try:
        # Somebody waits for the answer: a refusal is one at once.
        name = process.call_until({"action": "name"}, deadline, refusals=1)["repository"]
        upload = stage_folder(
            folder,
            branch=branch,
            training_state=training_state,
            repository=name,
            include=include,
            base_model=base_model,
            overwrite=overwrite,
        )
        target = upload.folder
        with tqdm(
            desc=f"Pushing to {name}", unit="B", unit_scale=True, disable=not show_progress
        ) as bar:

            def progress(done: int, total: int) -> None:
                bar.n, bar.total = done, total
                bar.refresh()

            done = process.call_until(upload.request(), deadline, progress, refusals=1)
    except HubFailure as failure:
        advice = "the same command goes on where this one stopped."
        if failure.options:
            words = push_words(folder, settings.name, failure)
            advice = f"to push it: simcse-trainer push {words}."
        elif failure.is_final:
            advice = "Correct that first."
        raise InputError(
            f"{folder} could not be pushed to {settings.name}: {failure.text}. It is unchanged; "
            f"{advice}"
        ) from None
    finally:
        process.end()
        if target is not None:
            shutil.rmtree(target, ignore_errors=True)
            remove_uploads(folder)
    return Pushed(done["repository"], done["commits"], done["notes"])


def stage_folder(
    folder: Path,
    *,
    branch: str,
    training_state: bool,
    repository: str | None = None,
    include: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
) -> Upload:
    """Links to what of a folder is to be pushed.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        branch: For the model.
        training_state: Whether the newest checkpoint goes too.
        repository: The card's snippets load from it, instead of from where the model was trained.
        include: As for `push`.
        base_model: As for `push`.
        overwrite: As for `push`.

    Raises:
        InputError: There is no model.
    """
    model, checkpoint = find_model(folder), find_checkpoint(folder)
    record = find_record(model)
    names = list_published(model, include)
    target = make_target(folder)
    link_files(model, target / "model", names, base_model=base_model)
    arguments = read_json(model / TRAINING_ARGS)
    if repository and CARD in names:
        _rename_in_card(target / "model" / CARD, arguments, repository)
    state = read_state(model) or (read_state(checkpoint) if checkpoint else {})
    step = record.step if record is not None else None
    if step is None:
        step = _guess_step(model, state, arguments)
    if training_state and checkpoint is not None:
        link_state(checkpoint, best_of(checkpoint), target / "state")
    pushes = pushes_of(
        target,
        step=step,
        run=record.run if record is not None else "",
        message="A trained model" if step is None else message_of(state, step),
        branch=branch,
        state_step=step_of(checkpoint),
        overwrite=overwrite,
    )
    figure = figure_of(target, model if (model / STATE).is_file() else checkpoint or model)
    return Upload(f"the model in {folder}", target, pushes, figure)


def remove_uploads(folder: Path) -> None:
    """Delete the folder of uploads, where nothing is on its way any more."""
    uploads = folder / UPLOADS
    if uploads.is_dir() and not any(path.is_dir() for path in uploads.iterdir()):
        remove_own(uploads)


def _guess_step(model: Path, state: dict[str, Any], arguments: dict[str, Any]) -> int | None:
    """The step of a model that version 0.1.0 has saved: its folder does not say."""
    best, last = state.get("best_model_checkpoint"), state.get("global_step")
    step = step_of(model)
    if step is None and arguments.get("load_best_model_at_end") and isinstance(best, str):
        step = step_of(best)
    if step is None and isinstance(last, int):
        step = last
    return step


def _check_finite(model: Path, names: Sequence[str]) -> None:
    for name in names:
        found = find_not_finite(model / name) if name.endswith(".safetensors") else None
        if found is not None:
            raise InputError(
                f"{model / name}: the tensor {found[0]} ({found[1]}) holds numbers that are not "
                "finite, so that every embedding is none. Push an earlier checkpoint, or train "
                "again with --dtype float32 or a smaller --learning_rate."
            )


def _check_base(model: Path, names: Sequence[str], base_model: str | None) -> None:
    base = find_local_base(model, names)
    if base is not None and base_model is None:
        raise InputError(
            f"{model} holds an adapter for the model in {base}, a folder of this machine: nobody "
            "could load it. Pass --base_model user/name with that model's name on the Hub, or push "
            f"a merged model: simcse-trainer merge {model} NEW_DIR."
        )


def _rename_in_card(card: Path, arguments: dict[str, Any], repository: str) -> None:
    """Snippets load from the repository, not from the folder or repository of the training run."""
    text = card.read_text(encoding="utf-8")
    for name in (arguments.get("hub_model_id"), arguments.get("output_dir")):
        if name:
            text = text.replace(json.dumps(name), json.dumps(repository))
    card.unlink()  # a link: the folder keeps its own
    card.write_text(text, encoding="utf-8")
