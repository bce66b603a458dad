"""Staging: links to what is pushed of a run's folder, which outlive rotation.

A staged folder holds `model/`, where there is one `state/`, and `push.json`, which says what
becomes of them. `hub.push` reads it in a process of its own. Needs no torch.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    ADAPTER_CONFIG,
    BEST_MODEL,
    CARD,
    CHECKPOINT_PREFIX,
    CONFIG,
    MODULES,
    STAGED_PUSHES,
    STATE,
    TRAINING_ARGS,
    TRAINING_CURVE,
    TRAINING_HEADS,
    UPLOADS,
    get_step,
)
from simcse_trainer.hub.published_files import (
    find_local_base,
    find_record,
    is_deepspeed,
    link_files,
    list_published,
)
from simcse_trainer.model.io.checkpoints import find_checkpoint
from simcse_trainer.model.io.folder import list_files, make_own, remove_own
from simcse_trainer.model.io.tensors import find_not_finite

# The branch for what going on needs; of a model on another branch, with that one's name behind it.
TRAINING_STATE = "training-state"
# Folders in a staged one, and of the best model in a training state.
MODEL, TRAINING_STATE_FOLDER = "model", "state"


@dataclass(frozen=True)
class FolderPush:
    """A folder that becomes one commit on a branch.

    Attributes:
        folder: Of the staged folder.
        message: The message of the commit.
        branch: Made where it is missing.
        tags: Tags that the commit gets.
        run: Of which run it is.
        step: The optimizer steps that the weights have seen.
        is_state: It is for going on with a run.
        overwrite: Also replace what somebody else has changed.
        files: Names in `folder`, with forward slashes; what else the branch has of ours is
            deleted.
    """

    folder: str
    message: str
    branch: str = "main"
    tags: list[str] = field(default_factory=list)
    run: str = ""
    step: int | None = None
    is_state: bool = False
    overwrite: bool = False
    files: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class StagedPush:
    """What becomes of a staged folder.

    Attributes:
        pushes: The commits to make, in order.
        names_in_card: What the card's snippets load, to be replaced by the repository.
    """

    pushes: list[FolderPush]
    names_in_card: list[str] = field(default_factory=list)


def make_target(folder: Path) -> Path:
    """Make a folder for links to what is to be pushed; a rename stays on one file system."""
    target = make_own(folder / UPLOADS) / f"{time.time_ns()}-{uuid4().hex[:8]}"
    target.mkdir()
    return target


def write_staged(target: Path, staged: StagedPush) -> None:
    """Say what becomes of a staged folder."""
    text = json.dumps(asdict(staged), indent=2) + "\n"
    (target / STAGED_PUSHES).write_text(text, encoding="utf-8")


def read_staged(target: Path) -> StagedPush:
    """Read what `write_staged` has written."""
    said = json.loads((target / STAGED_PUSHES).read_text(encoding="utf-8"))
    return StagedPush([FolderPush(**one) for one in said["pushes"]], said["names_in_card"])


def stage_folder(
    folder: Path,
    *,
    branch: str,
    training_state: bool,
    rename: bool = False,
    include: Sequence[str] = (),
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Stage what of a folder is to be pushed.

    Args:
        folder: The `output_dir` of a run, or any trained model.
        branch: The branch that the model is pushed to.
        training_state: Whether the newest checkpoint is pushed too.
        rename: The card's snippets load from the repository, instead of from where the model was
            trained.
        include: Patterns of files to push beside those of the model.
        base_model: The name on the Hub of an adapter's base, where that is a folder here.
        overwrite: Replace what somebody else has changed there.

    Returns:
        The staged folder.

    Raises:
        InputError: There is no model.
    """
    model, checkpoint = find_model(folder), find_checkpoint(folder)
    record = find_record(model)
    target = make_target(folder)
    link_files(model, target / MODEL, list_published(model, include), base_model=base_model)
    arguments = read_json(model / TRAINING_ARGS)
    state = read_state(model) or (read_state(checkpoint) if checkpoint else {})
    step = record.step if record is not None else None
    if step is None:
        step = _guess_step(model, state, arguments)
    if training_state and checkpoint is not None:
        link_state(checkpoint, get_best_checkpoint(checkpoint), target / TRAINING_STATE_FOLDER)
    link_log(target, model if (model / STATE).is_file() else checkpoint or model)
    stage_pushes(
        target,
        step=step,
        run=record.run if record is not None else "",
        message="A trained model" if step is None else get_commit_message(state, step),
        branch=branch,
        state_step=get_step(checkpoint),
        overwrite=overwrite,
        names_in_card=[
            str(name) for key in ("hub_model_id", "output_dir") if (name := arguments.get(key))
        ]
        if rename
        else [],
    )
    return target


def stage_pushes(
    target: Path,
    *,
    step: int | None,
    run: str,
    message: str,
    branch: str,
    state_step: int | None = None,
    overwrite: bool = False,
    names_in_card: Sequence[str] = (),
) -> None:
    """Say which commits become of what is in `model/` and `state/`.

    A tag `step-N` is for the commit that holds the weights of step N: where `main` keeps an
    earlier, better model, that is the training state's. On other branches it begins with the
    branch's name.

    Args:
        target: The staged folder, from `make_target`.
        step: Of the model; None where it is not known.
        run: Of which run the model is.
        message: The message of the commits.
        branch: The branch that the model is pushed to.
        state_step: Of the training state.
        overwrite: Also what somebody else has changed there.
        names_in_card: As `StagedPush` takes it.
    """
    prefix = "" if branch == "main" else f"{branch}-"
    tags = [] if step is None else [f"{prefix}step-{step}"]
    model = FolderPush(
        MODEL,
        message,
        branch,
        tags,
        run,
        step,
        overwrite=overwrite,
        files=list_files(target / MODEL),
    )
    pushes = [model]
    if (target / TRAINING_STATE_FOLDER).is_dir():
        name = TRAINING_STATE if branch == "main" else f"{TRAINING_STATE}-{branch}"
        tags = [] if step in (None, state_step) else [f"{prefix}step-{state_step}"]
        state = replace(
            model,
            folder=TRAINING_STATE_FOLDER,
            branch=name,
            tags=tags,
            step=state_step,
            is_state=True,
            files=list_files(target / TRAINING_STATE_FOLDER),
        )
        # First, so that the model's commit can say where the state is.
        pushes.insert(0, state)
    write_staged(target, StagedPush(pushes, list(names_in_card)))


def link_state(checkpoint: Path, best: Path | None, target: Path) -> bool:
    """Link all of a checkpoint, and the best model so far where that is another one.

    Returns:
        Whether there is a state that may be fetched again: one of DeepSpeed may not.
    """
    record = find_record(checkpoint)
    names = [name for name in record.files if (checkpoint / name).is_file()] if record else []
    if not names or any(is_deepspeed(name) for name in names):
        return False
    link_files(checkpoint, target, names)
    if best is not None and best.name != checkpoint.name and best.is_dir():
        heads = [TRAINING_HEADS] if (best / TRAINING_HEADS).is_file() else []
        link_files(best, target / BEST_MODEL, [*list_published(best), *heads])
    return True


def link_log(target: Path, run: Path) -> None:
    """Stage the log to draw the training curve of, where the card shows one that is not there.

    Args:
        target: The staged folder, from `make_target`.
        run: The checkpoint or the run's folder with the log.
    """
    card, curve = target / MODEL / CARD, target / MODEL / TRAINING_CURVE
    wanted = card.is_file() and TRAINING_CURVE in card.read_text(encoding="utf-8")
    if wanted and not curve.exists() and (run / STATE).is_file():
        shutil.copyfile(run / STATE, target / STATE)


def get_commit_message(state: Mapping[str, Any], step: int, metric: str | None = None) -> str:
    """Write a message such as `step 500: stsb_spearman 78.31`, from a `trainer_state.json`."""
    entries = [entry for entry in state.get("log_history") or () if isinstance(entry, dict)]
    found = [entry for entry in entries if entry.get("step") == step]
    scores = {
        key.removeprefix("eval_"): value
        for entry in found
        for key, value in entry.items()
        if (
            key.endswith(("_spearman", "_ndcg_at_10"))
            or key == f"eval_{(metric or '').removeprefix('eval_')}"
        )
        and isinstance(value, int | float)
    }
    name = (metric or "").removeprefix("eval_")
    name = name if name in scores else next(iter(scores), "")
    return f"step {step}: {name} {scores[name]:.2f}" if name else f"step {step}"


def rename_in_card(target: Path, staged: StagedPush, repository: str) -> None:
    """Let the snippets of a staged card load from the repository."""
    card = target / MODEL / CARD
    if not card.is_file():
        return
    text = card.read_text(encoding="utf-8")
    for name in staged.names_in_card:
        text = text.replace(json.dumps(name), json.dumps(repository))
    card.unlink()  # a link: the folder keeps its own
    card.write_text(text, encoding="utf-8")


def check_pushable(folder: Path, include: Sequence[str], base_model: str | None) -> str:
    """Refuse a folder that nobody could use.

    Args:
        folder: As `stage_folder` takes it.
        include: As `stage_folder` takes it.
        base_model: As `stage_folder` takes it.

    Returns:
        What will be pushed, in words, where no run has recorded it; else nothing.

    Raises:
        InputError: There is no model, it holds numbers that are none, or its base is a folder here.
    """
    model = find_model(folder)
    names = list_published(model, include)
    _check_base(model, names, base_model)
    _check_finite(model, names)
    if find_record(model) is None or include:
        return f"From {model} go to the Hub: {', '.join(names)}."
    return ""


def remove_uploads(folder: Path) -> None:
    """Delete the folder of uploads, where nothing is on its way any more."""
    uploads = folder / UPLOADS
    if uploads.is_dir() and not any(path.is_dir() for path in uploads.iterdir()):
        remove_own(uploads)


def push_words(folder: Path | str, repository: str, options: str) -> str:
    """Return what to give `simcse-trainer push` so that it brings to the Hub what is not there.

    Args:
        folder: The run's folder, its `output_dir`.
        repository: The repository that is pushed to.
        options: Options that help, of the `HubFailure`.
    """
    command = f"{folder} {repository}"
    if not options:
        return command
    other = "" if "--revision" in options else ", or with --revision NAME to another branch"
    return f"{command} {options}{other}"


def read_state(folder: Path) -> dict[str, Any]:
    """Read `trainer_state.json`; empty where there is none."""
    return read_json(folder / STATE)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file's mapping; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_model(folder: Path) -> Path:
    """Find the model of a folder to push: itself, else its run's best or newest checkpoint.

    Raises:
        InputError: There is no model in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; pass the output_dir of a run or a model.")
    if any((folder / name).is_file() for name in (CONFIG, ADAPTER_CONFIG, MODULES)):
        return folder
    newest = find_checkpoint(folder)
    if newest is None:
        raise InputError(
            f"{folder} holds no model: expected config.json or modules.json, or a complete "
            f"{CHECKPOINT_PREFIX}-* folder."
        )
    best = get_best_checkpoint(newest)
    return best if best is not None and best.is_dir() else newest


def get_best_checkpoint(checkpoint: Path) -> Path | None:
    """Return the checkpoint beside one that its state calls the best; None if it knows none."""
    best = read_state(checkpoint).get("best_model_checkpoint")
    step = get_step(best) if isinstance(best, str) else None
    return None if step is None else checkpoint.with_name(f"{CHECKPOINT_PREFIX}-{step}")


def _guess_step(model: Path, state: dict[str, Any], arguments: dict[str, Any]) -> int | None:
    """Guess the step of a model that version 0.1.0 has saved: its folder does not say."""
    best, last = state.get("best_model_checkpoint"), state.get("global_step")
    step = get_step(model)
    if step is None and arguments.get("load_best_model_at_end") and isinstance(best, str):
        step = get_step(best)
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
