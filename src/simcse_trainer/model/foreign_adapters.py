"""Adapters from a file, whoever has trained them: read in full, or refused by name.

Most public ones were trained on a causal language model, whose backbone is one level deeper: their
layers have a prefix that a backbone's do not have. Which one is seen from the names in the file.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from simcse_trainer.errors import InputError
from simcse_trainer.model.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_state
from simcse_trainer.model.layout import find_file, read_tensors

logger = logging.getLogger(__name__)

# Kinds of peft 0.21 that are read; the others put tokens before a text, choose between experts, or
# need a model of one family. docs/large_backbones.md has the table, and a test tries each row.
_READ = """
ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING
LOHA LOKR LORA MISS OFT PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS
UNILORA VBLORA VERA WAVEFT
"""
READ = frozenset(_READ.split())

_ROOT = "base_model.model."


def load_adapter(
    backbone: PreTrainedModel,
    name_or_path: str,
    *,
    is_trainable: bool,
    subfolder: str | None = None,
    **hub: Any,
) -> Any:
    """Put a saved adapter on its backbone.

    Args:
        backbone: With the weights it was trained on.
        name_or_path: A folder, or a name on the Hub.
        is_trainable: Go on training it.
        subfolder: Of the folder.
        hub: `revision` and `token`.

    Raises:
        InputError: A kind that is not read, a tensor that has no place in the backbone, or a place
            that the file has no tensor for.
    """
    from peft import PeftConfig, PeftModel

    hub = {name: value for name, value in hub.items() if value is not None}
    where: dict[str, Any] = {"subfolder": subfolder} if subfolder else {}
    try:
        config: Any = PeftConfig.from_pretrained(name_or_path, **where, **hub)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise InputError(
            f"The {ADAPTER_CONFIG} of '{name_or_path}' cannot be read by peft ({_first(error)}). "
            "Save the adapter again, or use a newer peft: pip install -U peft"
        ) from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in READ:
        raise InputError(
            f"The adapter in '{name_or_path}' is of the kind {kind}, which is not read here. Merge "
            "it where it was trained, if it can be, and use that model; or train a LoRA adapter."
        )
    saved = _read_weights(name_or_path, f"{subfolder}/" if subfolder else "", hub)
    prefix = _find_prefix(saved, backbone)
    if prefix:
        logger.info("%s: its layers are those behind '%s'.", name_or_path, prefix)
    _take_prefix_off(config, prefix)
    config.task_type = "FEATURE_EXTRACTION"  # others want a language model's methods
    config.inference_mode = not is_trainable
    try:
        adapted = PeftModel.from_pretrained(
            backbone,
            name_or_path,
            config=config,
            is_trainable=is_trainable,
            key_mapping={rf"^{re.escape(prefix)}": ""} if prefix else None,
            **where,
            **hub,
        )
    except (RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        raise _misfit(name_or_path, backbone, _first(error)) from error
    renamed = {_ROOT + n.removeprefix(_ROOT + prefix) if prefix else n: x for n, x in saved.items()}
    problem = _compare(renamed, adapted)
    if problem:
        raise _misfit(name_or_path, backbone, problem)
    return adapted


def _read_weights(name: str, prefix: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    path = find_file(name, prefix + ADAPTER_WEIGHTS, **hub)
    if path is None:
        raise InputError(
            f"'{name}' has no {prefix}{ADAPTER_WEIGHTS}; other files of weights run code when they "
            "are read. Save the adapter again as safetensors, with peft's save_pretrained."
        )
    return read_tensors(path)


def _find_prefix(names: Iterable[str], backbone: PreTrainedModel) -> str:
    """What stands before a backbone's own names in those of a file, such as `model.`."""
    own = {name for name, _ in backbone.named_children()}
    paths = [n.removeprefix(_ROOT).split(".") for n in names if n.startswith(_ROOT)]
    for depth in range(3):
        heads = {tuple(path[:depth]) for path in paths if len(path) > depth and path[depth] in own}
        if heads:
            return "".join(f"{part}." for part in min(heads))
    return ""


def _take_prefix_off(config: Any, prefix: str) -> None:
    """Let a configuration name layers as the backbone does."""

    def own(name: str) -> str:
        return name.removeprefix(prefix)

    for field in ("rank_pattern", "alpha_pattern"):
        found = getattr(config, field, None)
        if isinstance(found, dict):
            setattr(config, field, {own(name.removeprefix("^")): x for name, x in found.items()})
    for field in ("target_modules", "exclude_modules", "modules_to_save", "feedforward_modules"):
        found = getattr(config, field, None)
        if isinstance(found, list | set):
            setattr(config, field, type(found)(own(name) for name in found))
        elif isinstance(found, str) and prefix:
            setattr(config, field, found.replace(re.escape(prefix), "").replace(prefix, ""))


def _compare(saved: Mapping[str, Tensor], adapted: Any) -> str:
    """What a file and a model differ in; empty where they do not."""
    own, whole = adapter_state(adapted), adapted.state_dict()
    missing = sorted(own.keys() - saved.keys())
    if missing:
        return f"it lacks {_some(missing)}"
    for name, tensor in saved.items():
        found = own.get(name, whole.get(name))
        if found is None:
            return f"its {name} has no place there"
        if found.shape != tensor.shape:
            return f"its {name} is {list(tensor.shape)}, not {list(found.shape)}"
        if not torch.equal(found.detach().cpu().to(tensor.dtype), tensor):
            return f"its {name} was not loaded"
    return ""


def _misfit(name: str, backbone: PreTrainedModel, problem: str) -> InputError:
    return InputError(
        f"The adapter in '{name}' does not fit its base model '{backbone.config._name_or_path}', a "
        f"{type(backbone).__name__}: {problem.rstrip('.')}. Pass the model it was trained on as "
        "--base_model."
    )


def _first(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The first line of a mismatch only says that there is one.
    return next((line for line in lines if "size mismatch" in line), lines[0] if lines else "")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
