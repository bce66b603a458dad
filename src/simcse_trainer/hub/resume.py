"""A training state from the Hub, as a checkpoint that training goes on from."""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

from transformers import TrainerState

from simcse_trainer.checkpoints import publish, what_is_torn
from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    CHECKPOINT_PREFIX,
    MANIFEST,
    OLD_MANIFEST,
    STATE,
    step_of,
)
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.hub.process import HubProcess, HubSettings
from simcse_trainer.hub.pushing import remove_uploads
from simcse_trainer.hub.repository import SHA256, TRAINING_STATE
from simcse_trainer.hub.snapshot import BEST_MODEL, make_target, read_state
from simcse_trainer.manifest import read_manifest

logger = logging.getLogger(__name__)


def download_training_state(
    source: str,
    output_dir: Path,
    *,
    token: str | None = None,
    timeout_s: float = 60.0,
    patience_s: float = 600.0,
) -> Path:
    """Fetch the newest training state of a repository into a run's folder.

    Args:
        source: `user/repo`, or `user/repo@revision`: a branch, commit, or tag such as `step-500`.
        output_dir: The checkpoint appears here when all of it is there and right.
        token: For the Hub.
        timeout_s: Seconds without an answer after which a request is made again.
        patience_s: Failures are retried for so long.

    Returns:
        `output_dir/checkpoint-N`.

    Raises:
        InputError: No training state, an altered or torn one, or the Hub did not give it.
    """
    name, _, revision = source.partition("@")
    process = HubProcess(HubSettings(name, token=token, timeout_s=timeout_s))
    staged = make_target(output_dir)
    request = {"action": "download", "revision": revision or TRAINING_STATE, "folder": str(staged)}
    logger.info("Fetching the training state of %s.", source)
    try:
        process.call_until(request, time.monotonic() + patience_s)
        return _install(staged, output_dir)
    except InputError as error:
        raise InputError(
            f"resume_from_hub: {source} cannot be resumed from: {error} Pass user/repo@commit for "
            "an earlier state."
        ) from None
    except HubFailure as failure:
        raise InputError(
            f"resume_from_hub: {source} cannot be resumed from: {failure.text}. Nothing was "
            "changed here; pass user/repo@commit for an earlier state"
            f"{'' if failure.is_final else ', or try again'}."
        ) from None
    finally:
        process.end()
        shutil.rmtree(staged, ignore_errors=True)
        remove_uploads(output_dir)


def _install(staged: Path, output_dir: Path) -> Path:
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # the client's notes
    (staged / SHA256).unlink(missing_ok=True)
    state = _check_state(read_state(staged))
    step, best_step = state["global_step"], step_of(state["best_model_checkpoint"])
    torn = what_is_torn(staged)
    if torn is not None:
        raise HubFailure(f"the training state is torn: {torn}", refused=True)
    manifest = read_manifest(staged)
    run = manifest.run if manifest else ""
    if best_step is not None:
        # The path is of the machine that the run began on.
        best = output_dir / f"{CHECKPOINT_PREFIX}-{best_step}"
        state["best_model_checkpoint"] = str(best)
        if (staged / BEST_MODEL).is_dir() and not best.exists():
            publish(staged / BEST_MODEL, best, run=run, step=best_step)
    shutil.rmtree(staged / BEST_MODEL, ignore_errors=True)
    for name in (MANIFEST, OLD_MANIFEST):
        (staged / name).unlink(missing_ok=True)
    (staged / STATE).write_text(
        json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    checkpoint = output_dir / f"{CHECKPOINT_PREFIX}-{step}"
    publish(staged, checkpoint, run=run, step=step)
    return checkpoint


def _check_state(state: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that the Trainer would stumble over, or that would lead out of the folder."""
    if "global_step" not in state:
        raise HubFailure(f"its {STATE} is missing or unreadable", refused=True)
    known = {one.name: one for one in fields(TrainerState)}
    default = TrainerState()
    for name, value in state.items():
        if name not in known:
            raise _malformed(name, value)
        kind = _KINDS.get(name)
        expected = kind or _kinds_of(getattr(default, name))
        right = isinstance(value, expected) if expected else True
        if not right or (isinstance(value, bool) and bool not in expected):
            raise _malformed(name, value)
    if state["global_step"] < 0 or not all(isinstance(one, dict) for one in _log(state)):
        raise _malformed("global_step or log_history", state["global_step"])
    state.setdefault("best_model_checkpoint", None)
    return state


# Of fields whose default does not tell.
_KINDS: dict[str, tuple[type, ...]] = {
    "global_step": (int,),
    "epoch": (int, float, NoneType),
    "total_flos": (int, float),
    "best_metric": (int, float, NoneType),
    "best_global_step": (int, NoneType),
    "best_model_checkpoint": (str, NoneType),
    "trial_name": (str, NoneType),
    "trial_params": (dict, NoneType),
    "train_batch_size": (int, NoneType),
    "log_history": (list, NoneType),
    "stateful_callbacks": (dict, list, NoneType),
}


def _kinds_of(default: Any) -> tuple[type, ...]:
    return (
        () if default is None else (int, float) if isinstance(default, float) else (type(default),)
    )


def _log(state: dict[str, Any]) -> list[Any]:
    return state.get("log_history") or []


def _malformed(name: str, value: Any) -> HubFailure:
    shown = repr(value)
    shown = shown if len(shown) < 80 else f"{shown[:80]}..."
    return HubFailure(f"its {STATE} is malformed: {name} is {shown}", refused=True)
