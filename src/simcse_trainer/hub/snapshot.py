"""What of a run's folder goes to the Hub, and a copy of it that outlives rotation."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simcse_trainer.checkpoints import find_checkpoint
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.plots import TRAINING_CURVE
from simcse_trainer.files import MANIFEST, OLD_MANIFEST
from simcse_trainer.hub.repository import TRAINING_STATE, FolderPush

UPLOADS = ".hub-uploads"
BEST_MODEL = "best_model"
CARD = "README.md"
STATE = "trainer_state.json"

# What is beside a model in a checkpoint, and in a run's folder: not part of the model.
_NOT_MODEL = (
    MANIFEST,
    OLD_MANIFEST,
    STATE,
    "training_run.json",
    "training_heads.safetensors",
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
    "training_args.bin",
    f"{PREFIX_CHECKPOINT_DIR}-*",
    ".*",
    "_*",
    "*.log",
    "nohup.out",
    "events.out.tfevents*",
    "runs",
    "wandb",
    "mlruns",
)


def link_model(
    folder: Path, target: Path, *, training_heads: bool = False, card_of: Path | None = None
) -> None:
    """The model's files in a folder that training may delete at any time.

    Args:
        folder: A checkpoint or a trained model.
        target: New; hard links, so that it costs neither time nor space.
        training_heads: Also what only training uses of it.
        card_of: The checkpoint with the newest card, where the model is of an earlier one.
    """

    def beside(_: str, names: list[str]) -> list[str]:
        left_out = [n for n in names if any(fnmatch(n, pattern) for pattern in _NOT_MODEL)]
        kept = {"training_heads.safetensors"} if training_heads else set()
        return [name for name in left_out if name not in kept]

    shutil.copytree(folder, target, ignore=beside, copy_function=_link)
    if card_of is not None and (card_of / CARD).is_file():
        (target / CARD).unlink(missing_ok=True)
        _link(str(card_of / CARD), str(target / CARD))


def link_state(checkpoint: Path, best: Path | None, target: Path) -> None:
    """All of a checkpoint, and the best model so far where that is another one."""
    shutil.copytree(checkpoint, target, copy_function=_link)
    if best is not None and best.name != checkpoint.name and best.is_dir():
        link_model(best, target / BEST_MODEL, training_heads=True)


def pushes_of(
    target: Path, *, step: int | None, message: str, branch: str, is_latest: bool = True
) -> tuple[FolderPush, ...]:
    """The commits for what `link_model` and `link_state` left in `model` and `state`.

    A tag `step-N` is for the commit that holds the weights of step N: where `main` keeps an
    earlier, better model, that is the training state's.
    """
    tag = None if step is None else f"step-{step}"
    pushes = [FolderPush(str(target / "model"), message, branch, tag if is_latest else None)]
    if (target / "state").is_dir():
        name = TRAINING_STATE if branch == "main" else f"{TRAINING_STATE}-{branch}"
        state_tag = None if is_latest else tag
        pushes.append(FolderPush(str(target / "state"), message, name, state_tag, True))
    return tuple(pushes)


def message_of(state: Mapping[str, Any], step: int, metric: str | None = None) -> str:
    """Such as `step 500: stsb_spearman 78.31`, from a `trainer_state.json`."""
    found = [entry for entry in state.get("log_history", ()) if entry.get("step") == step]
    scores = {
        key.removeprefix("eval_"): value
        for entry in found
        for key, value in entry.items()
        if key.endswith("_spearman") or key == f"eval_{(metric or '').removeprefix('eval_')}"
    }
    name = (metric or "").removeprefix("eval_")
    name = name if name in scores else next(iter(scores), "")
    return f"step {step}: {name} {scores[name]:.2f}" if name else f"step {step}"


def figure_of(target: Path, run: Path) -> tuple[str, str] | None:
    """The log and the figure to draw of it, where the card shows one that is not there.

    Args:
        target: Holds what `link_model` left in `model`.
        run: The checkpoint or the run's folder with the log.
    """
    model, log = target / "model", target / STATE
    card, curve = model / CARD, model / TRAINING_CURVE
    wanted = card.is_file() and TRAINING_CURVE in card.read_text(encoding="utf-8")
    if not wanted or curve.exists() or not (run / STATE).is_file():
        return None
    _link(str(run / STATE), str(log))
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


def step_of(checkpoint: str | Path | None) -> int | None:
    """500 for `.../checkpoint-500`."""
    found = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", Path(checkpoint or "").name)
    return int(found[1]) if found else None


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
            f"{PREFIX_CHECKPOINT_DIR}-* folder."
        )
    best = folder / Path(read_state(newest).get("best_model_checkpoint") or newest).name
    return best if best.is_dir() else newest


def _link(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # file systems without links
        shutil.copy2(source, target)
    return target
