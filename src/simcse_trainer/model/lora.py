"""Adapters, new ones and those from elsewhere, through peft; the only importer of it.

An adapted backbone is a `PeftModel` around the backbone, whose weights are frozen. Its adapter
alone is what checkpoints hold; merged, it is a backbone like any other. What is saved and merged is
the adapter that computes: the active one, whatever its name.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from simcse_trainer.errors import InputError
from simcse_trainer.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from simcse_trainer.model.io.layout import read_tensors
from simcse_trainer.model.io.lookup import find_file
from simcse_trainer.model.progress import bar

if TYPE_CHECKING:
    from peft import LoraConfig


logger = logging.getLogger(__name__)

ALL_LINEAR = "all-linear"

# Kinds of peft 0.21 that are read; the others put tokens before a text, choose between experts, or
# need a model of one family. docs/large_backbones.md has the table, and a test tries each row.
_READ = """
ADALORA ADAMSS BEFT BOFT C3A DEFT DELORA FOURIERFT FROD GLORA GRALORA HIRA HRA IA3 LN_TUNING
LOHA LOKR LORA MISS OFT PEANUT PSOFT PVERA RANDLORA ROAD SHIRA SUPERTUNING TINYLORA TRAINABLE_TOKENS
UNILORA VBLORA VERA WAVEFT
"""
READ = frozenset(_READ.split())

_ROOT = "base_model.model."
# Attribute of an adapted backbone: the tensors that its adapter's file has beside the adapter, such
# as resized word embeddings, and has to have again.
_WHOLE = "simcse_whole_tensors"


class MergeError(InputError):
    """An adapter cannot be merged, or the merged model computes something else."""


def lora_config(
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    use_dora: bool = False,
    use_rslora: bool = False,
) -> LoraConfig:
    """Return the settings of a new adapter (Hu et al. 2021), as peft has them.

    Args:
        r: The rank of the adapter.
        alpha: The adapter's output is multiplied by alpha / r.
        dropout: On the adapter's input.
        target_modules: Ends of the names of layers that get one, or `all-linear`.
        use_dora: Also train the length of the weights (Liu et al. 2024).
        use_rslora: Multiply by alpha / sqrt(r) instead (Kalajdzievski 2023).
    """
    from peft import LoraConfig

    targets: Any = ALL_LINEAR if ALL_LINEAR in target_modules else list(target_modules)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets,
        use_dora=use_dora,
        use_rslora=use_rslora,
    )


def has_adapter(backbone: nn.Module) -> bool:
    """Return whether a backbone is adapted."""
    return hasattr(backbone, "get_base_model")


def describe_adapter(backbone: Any) -> dict[str, Any] | None:
    """Describe what an adapter's weights do not tell of it; None without one."""
    if not has_adapter(backbone):
        return None
    config = backbone.peft_config[active_adapter(backbone)]
    names = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    return {name: getattr(config, name, None) for name in names}


def active_adapter(backbone: Any) -> str:
    """Return the name of the adapter that computes.

    Raises:
        InputError: Several do, or it is switched off or merged in memory: what is saved would
            compute otherwise.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = getattr(backbone, "active_adapters", None) or [backbone.active_adapter]
    names = [found] if isinstance(found, str) else list(found)
    if len(names) != 1:
        raise InputError(
            f"{len(names)} adapters are active ({', '.join(names)}), and a folder holds one. "
            "Choose it: model.backbone.set_adapter(name)."
        )
    layers = [m for m in backbone.modules() if isinstance(m, BaseTunerLayer)]
    if any(layer.disable_adapters for layer in layers):
        raise InputError(
            f"The adapter {names[0]} is switched off. Call "
            "model.backbone.base_model.enable_adapter_layers() first."
        )
    if any(layer.merged for layer in layers):
        raise InputError(
            f"The adapter {names[0]} is merged into its base in memory. Call "
            "model.backbone.unmerge_adapter() first."
        )
    return str(names[0])


def has_adapter_dropout(backbone: nn.Module) -> bool:
    """Return whether an adapter's input has dropout."""
    dropouts = (m for n, m in backbone.named_modules() if ".lora_dropout." in n)
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in dropouts)


def get_base_model(backbone: Any) -> PreTrainedModel:
    """Return the backbone itself, without the adapter around it."""
    base: PreTrainedModel = backbone.get_base_model() if has_adapter(backbone) else backbone
    return base


def add_adapter(backbone: PreTrainedModel, config: LoraConfig) -> Any:
    """Freeze a backbone and give it a new adapter, whose output is zero at first.

    Raises:
        InputError: It has no such layers.
    """
    from peft import get_peft_model

    try:
        adapted: Any = get_peft_model(backbone, copy.deepcopy(config))
        _check_targets(adapted, config)
        return adapted
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"No adapter could be added to {type(backbone).__name__}: {reason}. Check "
            "--lora_target_modules: ends of the names of its linear layers, or all-linear."
        ) from error


def _check_targets(adapted: Any, config: LoraConfig) -> None:
    """Refuse a name that no layer has: the others would be trained without it."""
    wanted = config.target_modules
    found = adapted.base_model.targeted_module_names
    for name in [] if isinstance(wanted, str) or wanted is None else sorted(wanted):
        if not any(layer == name or layer.endswith(f".{name}") for layer in found):
            ends = sorted({layer.rsplit(".", 1)[-1] for layer in _linear_layers(adapted)})
            raise InputError(
                f"--lora_target_modules has {name}, and no layer's name ends so. Expected some of "
                f"{', '.join(ends)}, or {ALL_LINEAR}."
            )


def _linear_layers(adapted: Any) -> list[str]:
    base = adapted.get_base_model()
    names = (n.removesuffix(".base_layer") for n, m in base.named_modules() if _is_linear(m))
    return [name for name in names if ".lora_" not in name]


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's are called Conv1D; quantized ones are subclasses.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def save_adapter(
    backbone: Any, folder: Path, state: Mapping[str, Tensor], *, base: str, revision: str | None
) -> None:
    """Write an adapter as every reader of peft's files expects it, byte-identical each time.

    Args:
        backbone: The backbone with its adapter, a `PeftModel`.
        folder: Made if it is not there.
        state: The backbone's state dict, by the names of its own parameters.
        base: What readers are to load the backbone from.
        revision: Revision of the base on the Hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = active_adapter(backbone)
    weights = adapter_state(backbone, state)
    # Copies, for some kinds share tensors between layers.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(backbone.peft_config[name])
    config.base_model_name_or_path, config.revision = base, revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in another order in every process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def restore_adapter(backbone: Any, folder: Path) -> None:
    """Load weights of a saved adapter into one of the same settings.

    Raises:
        RuntimeError: They do not fit.
    """
    saved = load_file(folder / ADAPTER_WEIGHTS)
    own = adapter_state(backbone)
    if {n: x.shape for n, x in saved.items()} != {n: x.shape for n, x in own.items()}:
        raise RuntimeError("its adapter has other layers or another rank")
    fill(own, saved)
    if any(
        not torch.equal(x.cpu(), saved[n].to(x.dtype))
        for n, x in _unsharded(adapter_state(backbone))
    ):
        raise RuntimeError("its adapter is of a kind that cannot be written in place")


def _unsharded(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Return the tensors that are not spread over processes."""
    return ((n, x) for n, x in tensors.items() if not hasattr(x, "device_mesh"))


def adapter_state(backbone: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the tensors of the active adapter, by the names that its file gives them."""
    from peft import get_peft_model_state_dict

    state = dict(backbone.state_dict() if state is None else state)
    found: dict[str, Tensor] = get_peft_model_state_dict(
        backbone, state, adapter_name=active_adapter(backbone), save_embedding_layers=False
    )
    return found | {name: state[name] for name in getattr(backbone, _WHOLE, ())}


def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors in place, into those too that are spread over processes.

    Args:
        tensors: Of a state dict: they share the memory of the model's.
        values: The whole values, in every process, by the same names.

    Raises:
        RuntimeError: The shape of a tensor differs.
    """
    with torch.no_grad():
        for name in sorted(tensors):
            tensor: Any = tensors[name]
            value = values[name]
            if tensor.shape != value.shape:
                raise RuntimeError(f"{name} is {list(value.shape)}, not {list(tensor.shape)}")
            if hasattr(tensor, "device_mesh"):  # a DTensor, of FSDP2
                from torch.distributed.tensor import distribute_tensor

                mesh, placements = tensor.device_mesh, tensor.placements
                value = distribute_tensor(value.to(tensor.device), mesh, placements)
            tensor.copy_(value)


@contextmanager
def in_float32(module: nn.Module) -> Iterator[None]:
    """Hold weights of 16 bits in float32 for a while; then they are what they were, to the bit."""
    tensors = (*module.parameters(), *module.buffers())
    narrow = [(x, x.dtype) for x in tensors if x.dtype in (torch.bfloat16, torch.float16)]
    for tensor, _ in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in narrow:
            tensor.data = tensor.data.to(dtype)


def merged_state(backbone: Any) -> Iterator[tuple[str, Tensor]]:
    """Compute the state dict of the backbone with its adapter added to the weights.

    Layer by layer, in the memory of one layer, and on the CPU; the backbone's own weights are put
    back as they were, to the bit, which peft's unmerging does not promise. Weights of 16 bits are
    added to in float32 and rounded once; docs/large_backbones.md has what that costs.

    Raises:
        MergeError: An adapter that is more than another value of the weights.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base, name = get_base_model(backbone), active_adapter(backbone)
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    adapted: dict[str, Any] = {}
    for path, module in base.named_modules():
        if isinstance(module, kinds) and not path.startswith(tuple(f"{n}." for n in adapted)):
            adapted[path] = module
    with torch.no_grad():
        for path, layer in bar(adapted.items(), "Merging", unit="layer"):
            for part, tensor in _merged_layer(layer, name):
                yield f"{path}.{part}", tensor
        inside = tuple(f"{path}." for path in adapted)
        for path, tensor in base.state_dict().items():
            if not path.startswith(inside):
                yield path, tensor.detach()


def _kind(layer: Any) -> str:
    return f"{type(layer).__module__.split('.')[-2]} {type(layer).__name__}"


def _merged_layer(layer: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if hasattr(layer, "modules_to_save"):  # trained whole, beside the original
        own = layer.modules_to_save
        complete = own[name] if name in own else layer.original_module  # noqa: SIM401
        yield from (
            (part, x.detach().to("cpu", copy=True)) for part, x in complete.state_dict().items()
        )
        return
    layer = getattr(layer, "token_adapter", layer)  # some rows of a table
    own = layer.get_base_layer()
    kept = {part: tensor.detach().clone() for part, tensor in own.state_dict().items()}
    try:
        with in_float32(own):
            layer.merge(adapter_names=[name])
            state = layer.get_base_layer().state_dict()  # of some kinds another layer by now
            merged = {
                part: tensor.detach().to(
                    "cpu", kept[part].dtype if part in kept else None, copy=True
                )
                for part, tensor in state.items()
            }
            layer.unmerge()
    except (NotImplementedError, AttributeError, ValueError) as error:
        raise MergeError(
            f"The adapter {name} cannot be merged: one of its layers is a {_kind(layer)}, whose "
            f"sum with the weights is not to be had ({error}). Use the adapter as it is."
        ) from error
    finally:
        own.load_state_dict(kept)
    yield from merged.items()


def load_adapter(
    backbone: PreTrainedModel,
    name_or_path: str,
    *,
    is_trainable: bool,
    without_pooler: bool = False,
    subfolder: str | None = None,
    **hub: Any,
) -> Any:
    """Put a saved adapter on its backbone.

    Args:
        backbone: With the weights it was trained on.
        name_or_path: A folder, or a name on the Hub.
        is_trainable: Go on training it.
        without_pooler: The embedding is read without the backbone's pooling layer, which other
            tools train along; what the file has for that is left.
        subfolder: Where in the folder it is.
        hub: What the Hub is asked with: `revision` and `token`.

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
    # Others train it along, where its layer is of those that are adapted.
    pooler = {name for name in renamed if name.startswith(f"{_ROOT}pooler.")}
    if pooler and not without_pooler:
        raise InputError(
            f"projection_head is 'pooler', but the adapter in '{name_or_path}' changes the pooling "
            "layer, which is read from the base without it. Pass --projection_head none."
        )
    renamed = {name: x for name, x in renamed.items() if name not in pooler}
    problem = _compare(renamed, adapted)
    if problem:
        raise _misfit(name_or_path, backbone, problem)
    setattr(adapted, _WHOLE, sorted(renamed.keys() - adapter_state(adapted).keys()))
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
    """Find what stands before a backbone's own names in those of a file, such as `model.`."""
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
    """Say in what a file and a model differ; empty where they do not."""
    own, complete = adapter_state(adapted), adapted.state_dict()
    missing = sorted(own.keys() - saved.keys())
    if missing:
        return f"it lacks {_some(missing)}"
    for name, tensor in saved.items():
        found = own.get(name, complete.get(name))
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
