"""Every file name of a model folder, a checkpoint and a training state, as data; needs no torch."""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath, PureWindowsPath

# Lists the files that a save has written, and which model they are.
MANIFEST = "simcse_manifest.json"
# The list in checkpoints of version 0.1.0: names and sizes, no run.
OLD_MANIFEST = "checkpoint_files.json"
# The list in training states of that version, on the Hub.
OLD_CHECKSUMS = "sha256.json"
# Marks a folder of ours for files that are being written. What is in such a folder is ours.
TMP_PREFIX, TMP_MARKER = ".simcse-tmp-", "made_by_simcse_trainer"
LOCK = ".simcse-lock"
# Links to what is on its way to the Hub; marked as ours like the above.
UPLOADS = ".simcse-uploads"
# In each of them: what becomes of it.
STAGED_PUSHES = "push.json"

# A model: its backbone, tokenizer, and the layout of sentence-transformers.
CONFIG = "config.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
MODULES = "modules.json"
SENTENCE_BERT = "sentence_bert_config.json"
SENTENCE_TRANSFORMERS = "config_sentence_transformers.json"

# An adapter as peft has it; which model it is for; where it is that other loaders would put on a
# model that attends otherwise; and where it is beside its merged model.
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_BASE = "simcse_adapter.json"
HIDDEN_ADAPTER = "lora"
ADAPTER_BESIDE = "adapter"

CARD = "README.md"
# What the licence of a base model asks for, in every folder that is made from it.
NOTICE = "NOTICE"
TRAINING_CURVE = "training_curve.png"
TRAINING_ARGS = "training_args.json"
STATE = "trainer_state.json"
RUN = "training_run.json"
TRAINING_HEADS = "training_heads.safetensors"
# Of a training state on the Hub: the best model so far, where that is another one.
BEST_MODEL = "best_model"
RESULTS = ("train_results.json", "eval_results.json", "all_results.json")

# What people may edit in a folder: no part of the model.
DOCUMENTS = (CARD, TRAINING_CURVE, TRAINING_ARGS, *RESULTS)

# What only going on with a run needs; patterns of the first part of a name.
_TRAINING_STATE = (
    STATE,
    RUN,
    TRAINING_HEADS,
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "pytorch_model_fsdp*",
    "global_step*",
    "latest",
    "zero_to_fp32.py",
    "training_args.bin",
)

# Files in the root of a folder that change what a loader makes of the files beside them.
_READ_BY_LOADERS = (
    CONFIG,
    ADAPTER_CONFIG,
    "*.index.json",
    MODULES,
    "sentence_*_config.json",
    SENTENCE_TRANSFORMERS,
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
)

CHECKPOINT_PREFIX = "checkpoint"
_CHECKPOINT = re.compile(rf"{CHECKPOINT_PREFIX}-(\d+)")


def is_training_state(name: str) -> bool:
    """Return whether a file of a checkpoint is there for going on, and not for the model."""
    first = name.split("/", 1)[0]
    return any(fnmatchcase(first, pattern) for pattern in _TRAINING_STATE)


def is_read_by_loaders(name: str) -> bool:
    """Return whether a file changes what a loader makes of the model beside it."""
    return any(fnmatchcase(name, pattern) and "/" not in name for pattern in _READ_BY_LOADERS)


def get_step(checkpoint: str | Path | None) -> int | None:
    """Return 500 for `.../checkpoint-500`, and None for any other name."""
    found = _CHECKPOINT.fullmatch(Path(checkpoint or "").name)
    return int(found[1]) if found else None


def is_inside(name: object) -> bool:
    """Return whether a name from elsewhere is a relative path that stays in its folder.

    It has to stay there on every system: a backslash or a drive is refused on Linux too.
    """
    if not isinstance(name, str) or not name or "\\" in name or "\0" in name:
        return False
    path = PurePosixPath(name)
    return (
        not path.is_absolute()
        and not PureWindowsPath(name).drive
        and not {"..", "."} & {*name.split("/")}
        and "" not in name.split("/")
    )
