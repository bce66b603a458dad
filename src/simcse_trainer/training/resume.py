"""Resuming: which checkpoint a run resumes from, whether it is of this run, and where in the data.

Where a checkpoint is on the Hub, it is fetched first, and checked as what it is: a stranger's file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset
from transformers import TrainerState

from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    BEST_MODEL,
    CHECKPOINT_PREFIX,
    MANIFEST,
    OLD_CHECKSUMS,
    OLD_MANIFEST,
    RUN,
    STATE,
    get_step,
)
from simcse_trainer.hub.client import HubClient, HubSettings
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.hub.stage import TRAINING_STATE, make_target, read_state, remove_uploads
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.io.checkpoints import (
    finalize,
    find_checkpoint,
    list_checkpoints,
    validate_checkpoint,
    why_not_resumable,
)
from simcse_trainer.model.io.manifest import read_manifest
from simcse_trainer.model.lora import describe_adapter, get_base_model
from simcse_trainer.model.quantization import quantization_bits

logger = logging.getLogger(__name__)

# In `training_run.json`: the step after which a run was interrupted was one to evaluate at.
EVALUATION_IS_DUE = "evaluation_is_due"
# Where in a stream a checkpoint is: the pass, and the batches of it that were taken.
STREAM_POSITION = "stream_position"


def find_resume_checkpoint(
    asked: str | bool | None, folder: Path, *, hub: Any = None
) -> Path | None:
    """Return the checkpoint that a run resumes from; None where it begins. Decided only here.

    Args:
        asked: `resume_from_checkpoint`: a checkpoint; or True, or "true", for the newest one in the
            run's folder. A machine that is taken away and started again always says so: without
            any the run begins.
        folder: The run's folder, its `output_dir`.
        hub: The training's arguments, where `resume_from_hub` of them counts: the state is fetched
            unless `asked` is set and there is a checkpoint to go on from already.

    Raises:
        InputError: It cannot be resumed from, there are some and none of them can, or the Hub has
            none.
    """
    if hub is not None and hub.resume_from_hub:
        newest = find_checkpoint(folder, resumable=True) if folder.is_dir() else None
        if newest is None or asked is None:
            return _fetch_checkpoint(hub, folder, newest)
    if not asked or str(asked).lower() == "false":
        return None
    if str(asked).lower() != "true":
        return _check_resumable(Path(str(asked)))
    found = find_checkpoint(folder, resumable=True) if folder.is_dir() else None
    if found is not None:
        return found
    if folder.is_dir() and (there := list_checkpoints(folder)):
        raise InputError(
            f"There is no complete checkpoint in {folder} to resume from: {there[-1].name} cannot "
            f"be ({why_not_resumable(there[-1])}). Pass another --output_dir to begin anew."
        )
    logger.warning("There is no checkpoint in %s: training starts anew.", folder)
    return None


def _check_resumable(checkpoint: Path) -> Path:
    if not checkpoint.is_dir():
        raise InputError(f"resume_from_checkpoint: there is no folder {checkpoint}.")
    lacking = why_not_resumable(checkpoint)
    if lacking is not None:
        raise InputError(
            f"{checkpoint} cannot be resumed from: {lacking}. Pass --resume_from_checkpoint true "
            "for the newest one that can, or begin anew with its weights: "
            f"--model_name_or_path {checkpoint}"
        )
    return checkpoint


def _fetch_checkpoint(args: Any, folder: Path, newest: Path | None) -> Path:
    if newest is not None:
        raise InputError(
            f"{folder} holds {newest.name}. Pass --resume_from_checkpoint true beside "
            "--resume_from_hub to go on with what is here, or another --output_dir."
        )
    # One that looked later would take the state that the first process is fetching for its own.
    args.distributed_state.wait_for_everyone()
    with args.main_process_first(desc="fetching the training state"):
        found = find_checkpoint(folder) if args.local_process_index and folder.is_dir() else None
        return found or download_training_state(
            str(args.resume_from_hub),
            folder,
            token=args.hub_token,
            timeout_s=args.hub_timeout_s,
            patience_s=args.hub_final_timeout_s,
        )


class StreamPosition:
    """Where in its data a run is: the Trainer (5.23) takes a stream for one pass without an end.

    Args:
        is_stream: Of other data the Trainer knows by itself.
        batches_per_step: Batches of an update, `gradient_accumulation_steps`.
    """

    def __init__(self, is_stream: bool, batches_per_step: int):
        self._is_stream = is_stream
        self._batches_per_step = batches_per_step
        self._resumed: Sequence[int] | None = None
        self._pass = self._began_at = 0

    def read(self, said: Any) -> None:
        """Take what `as_json` has written into the checkpoint that the run resumes from."""
        if isinstance(said, list) and [type(one) for one in said] == [int, int]:
            self._resumed = said

    def begin(self, found: tuple[int, int], step: int, *, skip: bool) -> tuple[int, int]:
        """Return the pass and the batch to go on with.

        Args:
            found: What the Trainer would go on with.
            step: How many optimizer steps were done.
            skip: Batches that were taken are passed over.
        """
        passes, batches = found
        if self._resumed is not None and step > 0:
            passes, batches = self._resumed
            batches = batches if skip else 0
        self._resumed = None
        self._pass, self._began_at = passes, step - batches // self._batches_per_step
        return passes, batches

    def enter_pass(self, number: int, step: int) -> None:
        """Remember which pass over the data this is, and where it began."""
        if number != self._pass:
            self._pass, self._began_at = number, step

    def as_json(self, step: int) -> dict[str, list[int]]:
        """Return what a checkpoint says of it."""
        if not self._is_stream:
            return {}
        return {STREAM_POSITION: [self._pass, (step - self._began_at) * self._batches_per_step]}


def find_own_best(state: Any, folder: Path) -> None:
    """Let a resumed run's best checkpoint be the one in its own folder.

    Its state names the folder that the run began in: it may have moved, or be another run's now.

    Args:
        state: The `TrainerState`, changed in place.
        folder: The run's folder, its `output_dir`.
    """
    step = state.best_global_step
    if not step:
        return
    own = folder / f"{CHECKPOINT_PREFIX}-{step}"
    incomplete = validate_checkpoint(own)
    state.best_model_checkpoint = str(own) if incomplete is None else None
    if incomplete is not None:
        logger.warning("The best model so far, %s, cannot be loaded: %s.", own, incomplete)
        state.best_metric = state.best_global_step = None


# Of a stream, the rows by which it is known again.
_FIRST_ROWS = 32

# Options that change what the same data, batches and model are trained to.
_OPTIONS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps
    weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed
    bf16 fp16 temperature hard_negative_weight mask_duplicate_negatives gather_across_devices
    contrastive_directions contrastive_partition hardness_strength hardness_mode
    false_negative_margin false_negative_margin_type alignment_weight uniformity_weight
    orthogonality_weights matryoshka_dims matryoshka_weights
    mini_batch_size contrastive_weight mlm_weight mlm_probability dataloader_drop_last augmentation
    augmentation_rate num_hard_negatives
""".split()  # noqa: SIM905


def run_fingerprint(
    model: Any, dataset: Dataset | IterableDataset | None, args: Any
) -> dict[str, Any]:
    """Return what has to be equal for a run to resume as if it had never stopped.

    Args:
        model: The model in training, a `SimCSEModel`.
        dataset: Its tokenized training data.
        args: The training options, `SimCSETrainingArguments`.
    """
    config = model.config
    name = str(config._name_or_path or "")
    return {
        "backbone": {
            # A folder may be elsewhere on the next machine.
            "name": "" if Path(name).exists() else name.rsplit("/", 1)[-1],
            "type": config.model_type,
            "layers": config.num_hidden_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "pooling_mode": model.pooling_mode,
            "projection_head": model.head is not None,
            "bidirectional_attention": is_bidirectional(config) or None,
            "bits": quantization_bits(get_base_model(model.backbone)),
            "adapter": describe_adapter(model.backbone),
        },
        "data": _fingerprint_data(dataset),
        "batch": {
            # None: the Trainer finds it, and on resuming takes the checkpoint's.
            "per_device_train_batch_size": None
            if args.auto_find_batch_size
            else args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "processes": args.world_size,
        },
        "options": {name: getattr(args, name, None) for name in _OPTIONS},
    }


def write_fingerprint(run: dict[str, Any], folder: Path, *, batch_size: int) -> None:
    """Write it beside a checkpoint's other files, with the batch that the Trainer has found."""
    batch = run["batch"] | {"per_device_train_batch_size": batch_size}
    text = json.dumps(run | {"batch": batch}, indent=2, default=str) + "\n"
    (folder / RUN).write_text(text, encoding="utf-8")


def check_fingerprint(
    run: dict[str, Any], checkpoint: Path, *, allow_mismatch: bool
) -> dict[str, Any]:
    """Compare with what the checkpoint says of its run; one that says nothing passes.

    Returns:
        What it says.

    Raises:
        InputError: Another backbone, other data or another batch.
    """
    try:
        saved = json.loads((checkpoint / RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(part, {}), dict) for part in ("backbone", "data", "batch", "options")
    ):
        raise InputError(
            f"{checkpoint / RUN} is malformed: expected a table of tables. Resume from "
            "another checkpoint."
        )
    current = json.loads(json.dumps(run, default=str))
    differences = [
        f"{part} {name}: {theirs} then, {ours} now"
        for part in ("backbone", "data", "batch")
        for name, ours in current[part].items()
        if (theirs := saved.get(part, {}).get(name)) != ours
        and _is_known(name, theirs, ours)
        and (name != "sha256" or theirs)  # of a stream, version 0.1.0 said nothing
        and (name != "per_device_train_batch_size" or ours)
    ]
    if differences and not allow_mismatch:
        raise InputError(
            f"{checkpoint.name} is of another run ({'; '.join(differences)}). Resume with the "
            "options and data it was trained with, or pass --allow_resume_mismatch true."
        )
    options = saved.get("options", {})
    changed = [n for n, ours in current["options"].items() if n in options and options[n] != ours]
    for text in [
        *differences,
        *(f"{n}: {options[n]} then, {current['options'][n]} now" for n in changed),
    ]:
        logger.warning("Resuming with a change: %s.", text)
    return saved


def _is_known(name: str, theirs: Any, ours: Any) -> bool:
    return name != "name" or bool(theirs and ours)


def _fingerprint_data(dataset: Dataset | IterableDataset | None) -> dict[str, Any]:
    # Apart, for how the rows are cut into chunks is no matter of the data.
    all_lengths, all_ids = hashlib.sha256(), hashlib.sha256()
    if dataset is None:
        return {"streamed": False}
    if not isinstance(dataset, Dataset):
        # What comes first tells other data, and another order of the same.
        first = [row[INPUT_IDS] for row in dataset.take(_FIRST_ROWS)]
        digest = hashlib.sha256(json.dumps(first).encode()).hexdigest()
        return {"streamed": True, "sha256": digest[:16]}
    columns = dataset.select_columns([INPUT_IDS]).with_format("arrow")
    for table in columns.iter(10_000):
        for chunk in table.column(INPUT_IDS).chunks:
            texts = chunk.flatten()
            lengths = texts.value_lengths().to_numpy(zero_copy_only=False)
            ids = texts.flatten().to_numpy(zero_copy_only=False)
            all_lengths.update(lengths.astype(np.int32).tobytes())
            all_ids.update(ids.astype(np.int32).tobytes())
    digest = hashlib.sha256(all_lengths.digest() + all_ids.digest()).hexdigest()
    return {"rows": len(dataset), "sha256": digest[:16]}


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
        token: The token that the Hub is asked with.
        timeout_s: Seconds without an answer after which a request is made again.
        patience_s: Failures are retried for so long.

    Returns:
        `output_dir/checkpoint-N`.

    Raises:
        InputError: No training state, an altered or incomplete one, or the Hub did not give it.
    """
    name, _, revision = source.partition("@")
    client = HubClient(HubSettings(name, token=token, timeout_s=timeout_s))
    staged = make_target(output_dir)
    logger.info("Fetching the training state of %s.", source)
    try:
        deadline = time.monotonic() + patience_s
        client.run_until(deadline, "download", revision or TRAINING_STATE, str(staged))
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
        client.end()
        shutil.rmtree(staged, ignore_errors=True)
        remove_uploads(output_dir)


def _install(staged: Path, output_dir: Path) -> Path:
    shutil.rmtree(staged / ".cache", ignore_errors=True)  # the client's notes
    (staged / OLD_CHECKSUMS).unlink(missing_ok=True)
    state = _check_state(read_state(staged))
    step, best_step = state["global_step"], get_step(state["best_model_checkpoint"])
    incomplete = validate_checkpoint(staged)
    if incomplete is not None:
        raise HubFailure(f"the training state is incomplete: {incomplete}", refused=True)
    manifest = read_manifest(staged)
    run = manifest.run if manifest else ""
    if best_step is not None:
        # The path is of the machine that the run began on.
        best = output_dir / f"{CHECKPOINT_PREFIX}-{best_step}"
        state["best_model_checkpoint"] = str(best)
        if (staged / BEST_MODEL).is_dir() and not best.exists():
            finalize(staged / BEST_MODEL, best, run=run, step=best_step)
    shutil.rmtree(staged / BEST_MODEL, ignore_errors=True)
    for name in (MANIFEST, OLD_MANIFEST):
        (staged / name).unlink(missing_ok=True)
    (staged / STATE).write_text(
        json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    checkpoint = output_dir / f"{CHECKPOINT_PREFIX}-{step}"
    finalize(staged, checkpoint, run=run, step=step)
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
        expected = kind or _get_kinds(getattr(default, name))
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


def _get_kinds(default: Any) -> tuple[type, ...]:
    return (
        () if default is None else (int, float) if isinstance(default, float) else (type(default),)
    )


def _log(state: dict[str, Any]) -> list[Any]:
    return state.get("log_history") or []


def _malformed(name: str, value: Any) -> HubFailure:
    shown = repr(value)
    shown = shown if len(shown) < 80 else f"{shown[:80]}..."
    return HubFailure(f"its {STATE} is malformed: {name} is {shown}", refused=True)
