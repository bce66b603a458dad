"""What of a run's folder goes to the Hub, and a copy of it that outlives rotation."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from simcse_trainer.checkpoints import find_checkpoint
from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    CARD,
    CHECKPOINT_PREFIX,
    STATE,
    TRAINING_CURVE,
    TRAINING_HEADS,
    UPLOADS,
    step_of,
)
from simcse_trainer.hub.contents import find_record, is_deepspeed, link_files, list_published
from simcse_trainer.hub.repository import TRAINING_STATE, FolderPush
from simcse_trainer.output_folder import make_own

BEST_MODEL = "best_model"


def make_target(folder: Path) -> Path:
    """Make a folder for links to what is to be pushed; a rename stays on one file system."""
    target = make_own(folder / UPLOADS) / f"{time.time_ns()}-{uuid4().hex[:8]}"
    target.mkdir()
    return target


def link_state(checkpoint: Path, best: Path | None, target: Path) -> bool:
    """All of a checkpoint, and the best model so far where that is another one.

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


def pushes_of(
    target: Path,
    *,
    step: int | None,
    run: str,
    message: str,
    branch: str,
    state_step: int | None = None,
    overwrite: bool = False,
) -> tuple[FolderPush, ...]:
    """The commits for what is in `model` and `state`.

    A tag `step-N` is for the commit that holds the weights of step N: where `main` keeps an
    earlier, better model, that is the training state's. On other branches it begins with the
    branch's name.

    Args:
        target: Holds what is to be pushed.
        step: Of the model; None where it is not known.
        run: Of which run the model is.
        message: Of the commits.
        branch: For the model.
        state_step: Of the training state.
        overwrite: Also what somebody else has changed there.
    """
    prefix = "" if branch == "main" else f"{branch}-"
    tags = [] if step is None else [f"{prefix}step-{step}"]
    model = FolderPush(str(target / "model"), message, branch, tags, run, step, overwrite=overwrite)
    if not (target / "state").is_dir():
        return (model,)
    name = TRAINING_STATE if branch == "main" else f"{TRAINING_STATE}-{branch}"
    tags = [] if step in (None, state_step) else [f"{prefix}step-{state_step}"]
    state = replace(model, folder=str(target / "state"), branch=name, tags=tags, is_state=True)
    # First, so that the model's commit can say where the state is.
    return replace(state, step=state_step), model


def message_of(state: Mapping[str, Any], step: int, metric: str | None = None) -> str:
    """Such as `step 500: stsb_spearman 78.31`, from a `trainer_state.json`."""
    entries = [entry for entry in state.get("log_history") or () if isinstance(entry, dict)]
    found = [entry for entry in entries if entry.get("step") == step]
    scores = {
        key.removeprefix("eval_"): value
        for entry in found
        for key, value in entry.items()
        if (key.endswith("_spearman") or key == f"eval_{(metric or '').removeprefix('eval_')}")
        and isinstance(value, int | float)
    }
    name = (metric or "").removeprefix("eval_")
    name = name if name in scores else next(iter(scores), "")
    return f"step {step}: {name} {scores[name]:.2f}" if name else f"step {step}"


def figure_of(target: Path, run: Path) -> tuple[str, str] | None:
    """The log and the figure to draw of it, where the card shows one that is not there.

    Args:
        target: Holds the model, in `model`.
        run: The checkpoint or the run's folder with the log.
    """
    model, log = target / "model", target / STATE
    card, curve = model / CARD, model / TRAINING_CURVE
    wanted = card.is_file() and TRAINING_CURVE in card.read_text(encoding="utf-8")
    if not wanted or curve.exists() or not (run / STATE).is_file():
        return None
    shutil.copyfile(run / STATE, log)
    return str(log), str(curve)


def read_state(folder: Path) -> dict[str, Any]:
    """`trainer_state.json`; empty where there is none."""
    return read_json(folder / STATE)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def find_model(folder: Path) -> Path:
    """The model to push of a folder: itself, else its run's best or newest checkpoint.

    Raises:
        InputError: There is none.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; pass the output_dir of a run or a model.")
    if any(
        (folder / name).is_file() for name in ("config.json", "adapter_config.json", "modules.json")
    ):
        return folder
    newest = find_checkpoint(folder)
    if newest is None:
        raise InputError(
            f"{folder} holds no model: expected config.json or modules.json, or a complete "
            f"{CHECKPOINT_PREFIX}-* folder."
        )
    best = best_of(newest)
    return best if best is not None and best.is_dir() else newest


def best_of(checkpoint: Path) -> Path | None:
    """Return the checkpoint beside one that its state calls the best; None if it knows none."""
    best = read_state(checkpoint).get("best_model_checkpoint")
    step = step_of(best) if isinstance(best, str) else None
    return None if step is None else checkpoint.with_name(f"{CHECKPOINT_PREFIX}-{step}")
