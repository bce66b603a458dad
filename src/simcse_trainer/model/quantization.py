"""Frozen backbones in 4 or 8 bits, through transformers and bitsandbytes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import BitsAndBytesConfig, PreTrainedConfig
from transformers.utils.import_utils import is_bitsandbytes_available

from simcse_trainer.errors import InputError


def quantized_loading(
    bits: int, config: PreTrainedConfig, device: torch.device | str | None
) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` loads weights in few bits.

    Args:
        bits: 4 (NF4, with quantised constants: Dettmers et al. 2023) or 8 (LLM.int8, 2022).
        config: Of the backbone, whose type the weights are computed in.
        device: Where they go; by default the accelerator, else the CPU.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise InputError(
            f"load_in_{bits}bit needs bitsandbytes. Run: pip install simcse-trainer[quantization]"
        )
    if device is None:
        device = torch.accelerator.current_accelerator() or torch.device("cpu")
    # It says at every layer of every step that it computes in float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == 8:
        quantized = BitsAndBytesConfig(load_in_8bit=True)
    else:
        quantized = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=config.dtype or torch.float32,
        )
    return {"quantization_config": quantized, "device_map": {"": device}}


def quantization_bits(backbone: Any) -> int | None:
    """Return in how many bits a backbone was loaded; None: not quantised."""
    config = getattr(backbone.config, "quantization_config", None)
    if not isinstance(config, BitsAndBytesConfig):
        return None
    return 4 if config.load_in_4bit else 8


def is_quantized(backbone: Any) -> bool:
    """Return whether weights are quantised by any method: they cannot be trained or merged."""
    return getattr(backbone, "hf_quantizer", None) is not None


def describe_quantization(backbone: Any) -> dict[str, Any] | None:
    """Describe it as JSON, for other loaders; None: not quantised, or its folder says it."""
    if quantization_bits(backbone) is None or getattr(backbone, "quantized_on_disk", False):
        return None
    described: dict[str, Any] = backbone.config.quantization_config.to_dict()
    return described


def keep_differentiable(backbone: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for one kind of CPU.

    With AVX512-BF16 a forward pass in evaluation mode changes the weights' form for good, to one
    through which no gradient flows: training after an evaluation would go wrong without a word.
    """
    for module in backbone.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
