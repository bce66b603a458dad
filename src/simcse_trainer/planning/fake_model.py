"""The model of a run on fake tensors: as `load_model` would make it, without its weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from simcse_trainer.arguments import ModelArguments
from simcse_trainer.errors import InputError
from simcse_trainer.model.attention import ATTENTION_NAME
from simcse_trainer.model.backbone import first_position
from simcse_trainer.model.decoders import default_pooling, set_attention
from simcse_trainer.model.heads import ProjectionHead, build_mlm_head, head_sizes
from simcse_trainer.model.io.adapter import read_adapter
from simcse_trainer.model.io.layout import Layout, read_layout
from simcse_trainer.model.io.resolve import resolve_model
from simcse_trainer.model.lora import add_adapter
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.planning.fake_kernels import quantize_fake


@dataclass(frozen=True)
class Source:
    """What is read of a model: never its backbone's weights.

    Attributes:
        config: The backbone's configuration, from transformers.
        layout: What a trained folder says.
    """

    config: PreTrainedConfig
    layout: Layout | None = None

    @property
    def max_seq_length(self) -> int:
        """What the folder says, else the most that the backbone can take, 512 at most."""
        said = self.layout.max_seq_length if self.layout else None
        available = getattr(self.config, "max_position_embeddings", None) or 512
        return min(said or 512, available)


def read_source(model_args: ModelArguments, backbone_config: str | None = None) -> Source:
    """Read the configuration of a folder, a packaged model or a name on the Hub.

    Args:
        model_args: The options of the model, `ModelArguments`.
        backbone_config: A config.json instead, where the model is out of reach.

    Raises:
        InputError: There is none, or it is an adapter's.
    """
    if backbone_config is not None:
        return Source(_read_config(backbone_config))
    hub: dict[str, Any] = {"revision": model_args.model_revision}
    path = resolve_model(model_args.model_name_or_path)
    if (adapter := read_adapter(path, hub | {"token": None})) is not None:
        raise InputError(
            f"'{model_args.model_name_or_path}' is an adapter. Plan with its base model: "
            f"--model_name_or_path {adapter.base.name}."
        )
    config = _read_config(path, trust_remote_code=model_args.trust_remote_code, **hub)
    return Source(config, read_layout(path, **hub))


def _read_config(path: str, **options: Any) -> PreTrainedConfig:
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, **options)
        return config
    except (OSError, ValueError) as error:
        raise InputError(
            f"No configuration could be read from '{path}': {str(error).strip().splitlines()[0]} "
            "Where the Hub is out of reach, download the model's config.json (a few lines) and "
            "pass --backbone_config FILE."
        ) from error


def build_fake_model(
    model_args: ModelArguments, source: Source, mode: FakeTensorMode, *, mlm_head: bool
) -> SimCSEModel:
    """Build the model of a run.

    Batches are packed where the family's attention can be replaced; whether it then computes the
    same, which only weights can tell, is taken for granted.

    Args:
        model_args: The options of the model, `ModelArguments`.
        source: What `read_source` has read of the model.
        mode: The `FakeTensorMode` of the tensors.
        mlm_head: With the head of the auxiliary objective.
    """
    with torch.device("meta"):
        model = _build(model_args, source, mlm_head)
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = _as_fake(tensor, mode)
    return model


def _build(model_args: ModelArguments, source: Source, mlm_head: bool) -> SimCSEModel:
    config = copy.deepcopy(source.config)
    set_attention(
        config,
        bidirectional=model_args.bidirectional_attention,
        dropout=model_args.attention_dropout,
    )
    named: Any = model_args.weights_dtype
    named = (config.dtype or torch.float32) if named == "auto" else named
    dtype = getattr(torch, named) if isinstance(named, str) else named
    backbone = AutoModel.from_config(
        config, dtype=dtype, trust_remote_code=model_args.trust_remote_code
    )
    if getattr(backbone, "pooler", None) is not None:
        backbone.pooler = None
    pooling_mode = model_args.pooling_mode or default_pooling(source.layout, config)
    packed = model_args.padding_free and backbone._can_set_attn_implementation()
    if packed:
        backbone.set_attn_implementation(ATTENTION_NAME)
    bits = 4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else None
    if bits is not None:
        quantize_fake(backbone, bits, dtype)
    lora = model_args.new_adapter()
    sizes = head_sizes(source.layout, model_args.projection_head, pooling_mode, config.hidden_size)
    model = SimCSEModel(
        backbone if lora is None else _adapt(backbone, lora, quantized=bits is not None),
        pooling_mode=pooling_mode,
        head=None if sizes is None else ProjectionHead(*sizes),
        mlm_head=build_mlm_head(config) if mlm_head else None,
        max_seq_length=model_args.max_seq_length or source.max_seq_length,
        padding_free=False,  # which would be tried with values
    )
    model.position_offset = first_position(model.backbone) if packed else None
    return model


def _as_fake(tensor: Any, mode: FakeTensorMode) -> Any:
    fake = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _adapt(backbone: Any, lora: Any, *, quantized: bool) -> Any:
    adapted = add_adapter(backbone, lora)
    if quantized:
        for module in adapted.modules():
            # peft's layers over bitsandbytes' leave the cast to autocast.
            if hasattr(module, "lora_A"):
                module.cast_input_dtype_enabled = False
    return adapted
