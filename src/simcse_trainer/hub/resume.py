"""A training state from the Hub, as a checkpoint that training goes on from."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from simcse_trainer.checkpoints import publish, what_is_torn
from simcse_trainer.errors import InputError
from simcse_trainer.files import MANIFEST, OLD_MANIFEST
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.hub.process import HubProcess, HubSettings
from simcse_trainer.hub.repository import SHA256, TRAINING_STATE
from simcse_trainer.hub.snapshot import BEST_MODEL, STATE, UPLOADS, read_state, step_of
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
        source: `user/repo`, or `user/repo@revision` with a branch, tag or commit.
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
    staged = output_dir / UPLOADS / "download"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    request = {"action": "download", "revision": revision or TRAINING_STATE, "folder": str(staged)}
    logger.info("Fetching the training state of %s.", source)
    try:
        process.call_until(request, time.monotonic() + patience_s)
        return _install(staged, output_dir)
    except HubFailure as failure:
        raise InputError(
            f"resume_from_hub: {source} cannot be resumed from: {failure.text}. Nothing was "
            "changed here; pass user/repo@commit for an earlier state, or try again."
        ) from None
    finally:
        process.end()
        shutil.rmtree(staged.parent, ignore_errors=True)


def _install(staged: Path, output_dir: Path) -> Path:
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # the client's notes
    (staged / SHA256).unlink()
    state = read_state(staged)
    if "global_step" not in state:
        raise HubFailure(f"its {STATE} is missing or unreadable", refused=True)
    manifest = read_manifest(staged)
    run = manifest.run if manifest else ""
    best_step = step_of(state.get("best_model_checkpoint"))
    if best_step is not None:
        # The path is of the machine that the run began on.
        best = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        state["best_model_checkpoint"] = str(best)
        if (staged / BEST_MODEL).is_dir() and not best.exists():
            publish(staged / BEST_MODEL, best, run=run, step=best_step)
    shutil.rmtree(staged / BEST_MODEL, ignore_errors=True)
    torn = what_is_torn(staged)
    if torn is not None:
        raise HubFailure(f"the training state is torn: {torn}", refused=True)
    for name in (MANIFEST, OLD_MANIFEST):
        (staged / name).unlink(missing_ok=True)
    (staged / STATE).write_text(
        json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    checkpoint = output_dir / f"{PREFIX_CHECKPOINT_DIR}-{state['global_step']}"
    publish(staged, checkpoint, run=run, step=state["global_step"])
    return checkpoint
