"""LoRA adapters through peft; the only importer of peft.

An adapted backbone is a `PeftModel` around the backbone, whose weights are frozen. Its adapter
alone is what checkpoints hold; merged, it is a backbone like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ALL_LINEAR = "all-linear"


def lora_config(
    *,
    r: int = 16,
    alpha: float = 32,
    dropout: float = 0.05,
    target_modules: Sequence[str] = (ALL_LINEAR,),
    use_dora: bool = False,
    use_rslora: bool = False,
) -> LoraConfig:
    """The settings of a new adapter (Hu et al. 2021), as peft has them.

    Args:
        r: Rank.
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
    """Whether a backbone is adapted."""
    return hasattr(backbone, "get_base_model")


def describe_adapter(backbone: Any) -> dict[str, Any] | None:
    """What an adapter's weights do not tell of it; None without one."""
    if not has_adapter(backbone):
        return None
    config = backbone.peft_config["default"]
    names = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora")
    return {name: getattr(config, name) for name in names}


def has_adapter_dropout(backbone: nn.Module) -> bool:
    """Whether an adapter's input has dropout."""
    dropouts = (m for n, m in backbone.named_modules() if ".lora_dropout." in n)
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in dropouts)


def base_of(backbone: Any) -> PreTrainedModel:
    """The backbone itself, without the adapter around it."""
    base: PreTrainedModel = backbone.get_base_model() if has_adapter(backbone) else backbone
    return base


def add_adapter(backbone: PreTrainedModel, config: LoraConfig) -> Any:
    """Freeze a backbone and give it a new adapter, whose output is zero at first.

    Raises:
        InputError: It has no such layers.
    """
    from peft import get_peft_model

    try:
        return get_peft_model(backbone, copy.deepcopy(config))
    except ValueError as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(
            f"No adapter could be added to {type(backbone).__name__}: {reason}. Check "
            "--lora_target_modules: ends of the names of its linear layers, or all-linear."
        ) from error


def load_adapter(
    backbone: PreTrainedModel, name_or_path: str, *, is_trainable: bool, **options: Any
) -> Any:
    """Put a saved adapter on its backbone.

    Args:
        backbone: With the weights it was trained on.
        name_or_path: A folder, or a name on the Hub.
        is_trainable: Go on training it.
        options: `subfolder`, `revision`, `token`.
    """
    from peft import PeftModel

    options = {name: value for name, value in options.items() if value is not None}
    return PeftModel.from_pretrained(backbone, name_or_path, is_trainable=is_trainable, **options)


def save_adapter(
    backbone: Any, folder: Path, state: Mapping[str, Tensor], *, base: str, revision: str | None
) -> None:
    """Write an adapter as every reader of peft's files expects it, byte-identical each time.

    Args:
        backbone: Adapted.
        folder: Made if it is not there.
        state: The backbone's state dict, by the names of its own parameters.
        base: What readers are to load the backbone from.
        revision: Of that.
    """
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(
        backbone, state_dict=dict(state), save_embedding_layers=False
    )
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(backbone.peft_config["default"])
    config.base_model_name_or_path, config.revision = base, revision
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # in another order in every process
        config.target_modules = sorted(config.target_modules)
    config.save_pretrained(str(folder))


def restore_adapter(backbone: Any, folder: Path) -> None:
    """Weights of a saved adapter into one of the same settings.

    Raises:
        RuntimeError: They do not fit.
    """
    from peft import get_peft_model_state_dict

    saved = load_file(folder / ADAPTER_WEIGHTS)
    own = get_peft_model_state_dict(backbone, save_embedding_layers=False)
    if {n: x.shape for n, x in saved.items()} != {n: x.shape for n, x in own.items()}:
        raise RuntimeError("its adapter has other layers or another rank")
    fill(own, saved)


def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write values into tensors in place, into those too that are spread over processes.

    Args:
        tensors: Of a state dict: they share the memory of the model's.
        values: The whole values, in every process, by the same names.

    Raises:
        RuntimeError: A shape differs.
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


def merged_state(backbone: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of the backbone with its adapter added to the weights.

    Layer by layer, in the memory of one layer, and on the CPU; the backbone's own weights are put
    back as they were, to the bit, which peft's unmerging does not promise.
    """
    from peft.tuners.lora import LoraLayer

    base = base_of(backbone)
    adapted = {n: m for n, m in base.named_modules() if isinstance(m, LoraLayer)}
    with torch.no_grad():
        for name, layer in adapted.items():
            for part, tensor in _merged_layer(layer):
                yield f"{name}.{part}", tensor
        inside = tuple(f"{name}." for name in adapted)
        for name, tensor in base.state_dict().items():
            if not name.startswith(inside):
                yield name, tensor.detach()


def _merged_layer(layer: Any) -> Iterator[tuple[str, Tensor]]:
    own = layer.get_base_layer()
    kept = {name: tensor.detach().clone() for name, tensor in own.state_dict().items()}
    layer.merge()
    merged = {
        name: tensor.detach().to("cpu", copy=True) for name, tensor in own.state_dict().items()
    }
    layer.unmerge()
    own.load_state_dict(kept)
    yield from merged.items()
