"""Any encoder or decoder of transformers as a backbone, padding-free where that is exact."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from simcse_trainer.errors import InputError
from simcse_trainer.model.attention import ATTENTION_NAME
from simcse_trainer.model.decoders import (
    check_bidirectional,
    is_bidirectional,
    is_decoder,
    set_attention,
)
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.io.tensors import check_files
from simcse_trainer.model.packing import packing_indices
from simcse_trainer.model.quantization import is_quantized, keep_differentiable, quantized_loading

if TYPE_CHECKING:
    pass


logger = logging.getLogger(__name__)

# How far packed and padded hidden states may differ, relative to the largest: round-off stays
# below this, a wrong mask or a wrong position is far above it.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def load_backbone(
    name_or_path: str,
    *,
    pooling_layer: bool = False,
    bidirectional_attention: bool | None = None,
    attention_dropout: float | None = None,
    bits: int | None = None,
    dequantize: bool = False,
    device: torch.device | str | None = None,
    refuse_parts: bool = False,
    **options: Any,
) -> PreTrainedModel:
    """Load an `AutoModel` without the pooling layer that some families add on top.

    Args:
        name_or_path: A folder, or a name on the Hub.
        pooling_layer: Keep the family's own pooling layer, for checkpoints that trained it.
        bidirectional_attention: Let a decoder attend to both sides; by default as its
            configuration says.
        attention_dropout: In training; by default as the configuration says.
        bits: 4 or 8: quantise the weights.
        dequantize: Turn them back, to what the few bits stand for.
        device: Of quantised weights; by default the accelerator, else the CPU.
        refuse_parts: Refuse a model of which only the language model is used, as with images.
        options: For `from_pretrained`: revision, token, dtype, trust_remote_code, ...

    Raises:
        InputError: transformers finds no model there, or it is an encoder-decoder.
    """
    if Path(name_or_path).is_file():
        raise InputError(f"'{name_or_path}' is a file; pass the folder of the model.")
    check_files(Path(name_or_path))
    # Left out, transformers would ask on the terminal.
    options["trust_remote_code"] = bool(options.get("trust_remote_code"))
    hub = {k: options[k] for k in ("revision", "token", "trust_remote_code") if k in options}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **hub)
        text_config = _check_family(name_or_path, config, refuse_parts)
        on_disk = getattr(config, "quantization_config", None) is not None
        proof = bidirectional_attention and is_decoder(text_config)
        proof = proof and not is_bidirectional(text_config)
        set_attention(text_config, bidirectional=bidirectional_attention, dropout=attention_dropout)
        if not pooling_layer and _has_pooling_layer(config):
            options["add_pooling_layer"] = False
        if bits is not None:
            options |= quantized_loading(bits, config, device)
        backbone: Any = load_quietly(AutoModel, name_or_path, config=config, **options)
    except _LOADING_ERRORS as error:
        raise _explain_loading(name_or_path, error) from error
    if text_config is not config:
        backbone = _take_language_model(backbone, name_or_path)
    if is_quantized(backbone):
        backbone.quantized_on_disk = on_disk
        keep_differentiable(backbone)
        if dequantize:
            backbone = backbone.dequantize()
            # What undoes the conversions of loading; of those of few bits there is no undoing.
            backbone._weight_conversions = None
    if proof:
        check_bidirectional(backbone)
    loaded: PreTrainedModel = backbone
    return loaded


# What transformers raises about a model, a package that is missing, or a file.
_LOADING_ERRORS = (
    *(OSError, ValueError, ImportError, RuntimeError, KeyError, UnpicklingError),
    StrictDataclassError,
)


def _explain_loading(name: str, error: Exception) -> InputError:
    if isinstance(error, InputError):
        return error
    if explained := explain_code(name, error):
        return InputError(explained)
    reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    reason = f"No model could be loaded from '{name}': {reason.rstrip('.')}."
    if "attn_implementation" in str(error) or "flash" in str(error).lower():
        return InputError(f"{reason} Pass --attn_implementation sdpa, or install what it asks for.")
    if isinstance(error, ImportError):
        return InputError(f"{reason} Install it, or use a model that does without.")
    return InputError(
        f"{reason} Check --model_name_or_path: a folder with config.json, or a name on the Hub."
    )


def _check_family(name: str, config: PreTrainedConfig, refuse_parts: bool) -> PreTrainedConfig:
    """Return the configuration of the part that reads texts, if it can be an encoder."""
    # Also where only the encoder was saved: AutoModel makes the whole of it.
    if config.is_encoder_decoder or type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
        raise InputError(
            f"'{name}' is an encoder-decoder ({config.model_type}), or a part of one; SimCSE needs "
            "an encoder or a decoder. Choose a backbone such as bert-base-uncased."
        )
    text_config = config.get_text_config()
    if text_config is not config:
        _check_language_model(name, config, refuse_parts)
    return text_config


def _check_language_model(name: str, config: PreTrainedConfig, refuse_parts: bool) -> None:
    text_config = config.get_text_config()
    if not is_decoder(text_config) or type(text_config) not in MODEL_MAPPING:
        raise InputError(
            f"'{name}' is a {config.model_type}, whose part for text ({text_config.model_type}) "
            "AutoModel cannot load by itself. Choose a model of text, such as bert-base-uncased."
        )
    if refuse_parts:
        raise InputError(
            f"'{name}' is a {config.model_type}, of which only the language model is used, and an "
            "adapter on a part of it would be loaded wrongly elsewhere. Save that part, and use "
            f"its folder: SimCSEModel.from_pretrained('{name}').save_pretrained(folder)."
        )


def _take_language_model(backbone: Any, name: str) -> PreTrainedModel:
    """Take the part of a model of texts and images that reads texts."""
    part = getattr(backbone, "language_model", None)
    if not isinstance(part, PreTrainedModel):
        raise InputError(
            f"'{name}' is a {backbone.config.model_type} without a language model by itself. "
            "Choose a model of text, such as bert-base-uncased."
        )
    logger.info("%s: only the language model is used, a %s.", name, part.config.model_type)
    part.config._name_or_path = name
    return part


def explain_code(name: str, error: Exception) -> str:
    """Return what to do about a model that comes with code of its own; empty for other errors."""
    if "trust_remote_code" not in str(error):
        return ""
    return (
        f"'{name}' comes with code of its own, which runs only where you say so. Read it, then "
        "pass --trust_remote_code true, and a revision to pin it."
    )


def load_quietly(auto_class: Any, name_or_path: str, **options: Any) -> PreTrainedModel:
    """Call `from_pretrained`, and say in one line which weights are missing.

    Weights that a checkpoint has and the model does not, such as a pooling layer, are no news.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        model, info = auto_class.from_pretrained(name_or_path, output_loading_info=True, **options)
    finally:
        transformers_logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        logger.warning(
            "%s has no weights for %d parameters of %s, which start anew: %s%s",
            name_or_path,
            len(missing),
            type(model).__name__,
            ", ".join(missing[:3]),
            " ..." if len(missing) > 3 else "",
        )
    loaded: PreTrainedModel = model
    return loaded


def enable_packing(backbone: PreTrainedModel) -> int | None:
    """Switch a backbone to padding-free batches, if it then computes the same as padded.

    Whether a family uses the attention interface, and from where it counts positions
    (RoBERTa starts after its padding token's number), is found out by trying with a few tokens
    rather than from a list of names.

    Returns:
        What to add to positions counted from 0, or None if batches have to be padded.
    """
    usual, was_training = backbone.config._attn_implementation, backbone.training
    backbone.eval()
    try:
        if not backbone._can_set_attn_implementation():
            return None
        expected = _probe_padded(backbone)
        if not is_finite(expected):
            raise not_finite(f"What {type(backbone).__name__} computes", expected.dtype)
        backbone.set_attn_implementation(ATTENTION_NAME)
        for offset in _position_offsets(backbone.config):
            if _is_close(_probe_packed(backbone, offset), expected):
                return offset
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        logger.debug("packed probe of %s: %s", type(backbone).__name__, error)
    finally:
        backbone.train(was_training)
    backbone.set_attn_implementation(usual)
    return None


def first_position(backbone: Any) -> int:
    """Return the first position: RoBERTa's relatives start behind their padding token."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else padding + 1


def _has_pooling_layer(config: PreTrainedConfig) -> bool:
    model_class: Any = MODEL_MAPPING.get(type(config), None)
    if not isinstance(model_class, type):  # unknown, or a choice of several
        return False
    return "add_pooling_layer" in inspect.signature(model_class).parameters


def _position_offsets(config: PreTrainedConfig) -> list[int]:
    padding = getattr(config, "pad_token_id", None)
    return [0] if padding is None else [0, padding + 1]


def _probe_sentences(backbone: PreTrainedModel) -> list[Tensor]:
    """Return two sentences, one of them longer than the window of local attention, if any."""
    config = backbone.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    available = getattr(config, "max_position_embeddings", None) or 512
    # Windows of thousands of tokens are beyond what sentences reach, and dear to try.
    longest = window + 4 if 0 < window <= min(256, available - 8) else 5
    start = (getattr(config, "pad_token_id", None) or 0) + 1
    ids = (torch.arange(longest + 3) + start) % config.vocab_size
    return [ids[:longest].to(backbone.device), ids[longest:].to(backbone.device)]


@torch.no_grad()
def _probe_padded(backbone: PreTrainedModel) -> Tensor:
    sentences = _probe_sentences(backbone)
    padding = backbone.config.get_text_config().pad_token_id or 0
    ids = torch.nn.utils.rnn.pad_sequence(sentences, batch_first=True, padding_value=padding)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones_like(s) for s in sentences], batch_first=True
    )
    hidden: Tensor = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    return hidden[mask.bool()]


@torch.no_grad()
def _probe_packed(backbone: PreTrainedModel, offset: int) -> Tensor:
    sentences = _probe_sentences(backbone)
    indices = packing_indices(torch.tensor([len(s) for s in sentences]))
    on_device = {name: index.to(backbone.device) for name, index in indices.items()}
    out = run_packed(backbone, torch.cat(sentences)[None], on_device, offset)
    hidden: Tensor = out.last_hidden_state[0]
    return hidden


def run_packed(
    backbone: Any, input_ids: Tensor, indices: dict[str, Tensor], offset: int, **kwargs: Any
) -> Any:
    """Call a backbone on a packed batch.

    Args:
        backbone: One that `enable_packing` accepted.
        input_ids: [1, T], token ids sentence by sentence.
        indices: The indices that `packing_indices` has made.
        offset: The first position, from `enable_packing`.
        kwargs: For the backbone's forward.
    """
    indices = dict(indices)
    positions = indices.pop("position_ids")
    if offset:
        positions = _count_behind_padding(input_ids, positions, offset - 1)
    # A four-dimensional mask is handed to the attention as it is: no [T, T] mask is built.
    marker = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=input_ids.device)
    return backbone(
        input_ids=input_ids, attention_mask=marker, position_ids=positions, **indices, **kwargs
    )


def _count_behind_padding(input_ids: Tensor, positions: Tensor, padding: int) -> Tensor:
    """Count positions as RoBERTa does: from behind its padding token's number, passing over it.

    A text can hold the padding token; that one stands at its own number, and the next one where it
    would have stood.

    Args:
        input_ids: [1, T], token ids sentence by sentence.
        positions: [1, T], counted from 0 in every sentence.
        padding: The number of the padding token.
    """
    counted = (input_ids != padding).long()
    up_to_here = counted.cumsum(1)
    # What was counted before each sentence, carried on to its end.
    before = ((up_to_here - counted) * (positions == 0)).cummax(1).values
    return (up_to_here - before) * counted + padding


def _is_close(found: Tensor, expected: Tensor) -> bool:
    tolerance = _TOLERANCE.get(expected.dtype, 1e-4)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def scaled_noise(embeddings: Any, input_ids: Tensor, indices: dict[str, Any]) -> Iterator[None]:
    """Let the Trainer's NEFTune draw the noise that the padded batch would get.

    Its size is alpha / sqrt(L * D) (Jain et al. 2023, algorithm 1), where transformers takes for L
    the second dimension of its input: of a packed batch the tokens of all sentences.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    if alpha is None:
        yield
        return
    shapes = indices.get("group_shapes") or (indices["pad_index"].shape,)
    longest = max(length for _, length in shapes)
    embeddings.neftune_noise_alpha = alpha * (input_ids.shape[1] / longest) ** 0.5
    try:
        yield
    finally:
        embeddings.neftune_noise_alpha = alpha
