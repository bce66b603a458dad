"""Whether a checkpoint is of the run that wants to go on from it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.errors import InputError
from simcse_trainer.model.adapters import base_of, describe_adapter
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.quantization import bits_of

logger = logging.getLogger(__name__)

RUN_FILE = "training_run.json"
# The step after which a run was interrupted was one to evaluate at.
EVALUATION_IS_DUE = "evaluation_is_due"
# Where in a stream a checkpoint is: the pass, and the batches of it that were taken.
STREAM_POSITION = "stream_position"

# Of a stream, the rows by which it is known again.
_FIRST_ROWS = 32

# Options that change what the same data, batches and model are trained to.
_OPTIONS = """
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps
    weight_decay optim optim_args adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed
    bf16 fp16 temperature hard_negative_weight mask_duplicate_negatives gather_across_devices
    mini_batch_size mlm_weight mlm_probability dataloader_drop_last augmentation augmentation_rate
""".split()  # noqa: SIM905


def identify_run(
    model: Any, dataset: Dataset | IterableDataset | None, args: Any
) -> dict[str, Any]:
    """What has to be equal for a run to go on as if it had never stopped.

    Args:
        model: The `SimCSEModel`.
        dataset: Its tokenized training data.
        args: Of the trainer.
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
            "bits": bits_of(base_of(model.backbone)),
            "adapter": describe_adapter(model.backbone),
        },
        "data": _identify_data(dataset),
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


def write_run(run: dict[str, Any], folder: Path) -> None:
    """Beside a checkpoint's other files."""
    text = json.dumps(run, indent=2, default=str) + "\n"
    (folder / RUN_FILE).write_text(text, encoding="utf-8")


def check_same_run(
    run: dict[str, Any], checkpoint: Path, *, allow_mismatch: bool
) -> dict[str, Any]:
    """Compare with what the checkpoint says of its run; one that says nothing passes.

    Returns:
        What it says.

    Raises:
        InputError: Another backbone, other data or another batch.
    """
    try:
        saved = json.loads((checkpoint / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(saved, dict) or not all(
        isinstance(saved.get(part, {}), dict) for part in ("backbone", "data", "batch", "options")
    ):
        raise InputError(
            f"{checkpoint / RUN_FILE} is malformed: expected a table of tables. Resume from "
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


def _identify_data(dataset: Dataset | IterableDataset | None) -> dict[str, Any]:
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
