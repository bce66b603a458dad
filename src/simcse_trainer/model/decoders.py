"""Decoder language models as sentence encoders: which they are, and attention to both sides."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)

from simcse_trainer.errors import InputError

# What families call the dropout of their attention weights.
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def is_decoder(config: PreTrainedConfig) -> bool:
    """Return whether the family predicts the next token, and only that."""
    kind = type(config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and kind not in MODEL_FOR_MASKED_LM_MAPPING


def is_bidirectional(config: PreTrainedConfig) -> bool:
    """Return whether a decoder's configuration lets it attend to both sides."""
    return (
        getattr(config, "is_causal", True) is False
        or getattr(config, "use_bidirectional_attention", False) is True
    )


def set_attention(
    config: PreTrainedConfig, *, bidirectional: bool | None, dropout: float | None
) -> None:
    """Change the attention of a backbone that is still to be loaded.

    transformers' attention and masks follow `config.is_causal`, and configurations keep it when
    saved: `AutoModel` and sentence-transformers then attend to both sides as well.

    Args:
        config: The backbone's configuration, from transformers.
        bidirectional: Attend to both sides; None: as the configuration says.
        dropout: Of the attention weights in training; None: as the configuration says.

    Raises:
        InputError: An encoder that is not to attend to both sides, or no such dropout.
    """
    if bidirectional is not None and is_decoder(config):
        if bidirectional or is_bidirectional(config):
            config.is_causal = not bidirectional
            # Gemma 3's own key, which other tools read of Llama, Mistral and Qwen too. transformers
            # writes the window of a Gemma so that reading, which halves it, gives it back.
            config.use_bidirectional_attention = bidirectional
    elif bidirectional is False:
        raise InputError(
            f"bidirectional_attention is false, but {config.model_type} is an encoder and always "
            "attends to both sides. Leave the option out."
        )
    if getattr(config, "is_causal", True) is False:  # as folders of version 0.1.0 say it
        config.use_bidirectional_attention = True
    if dropout is not None:
        name = next((name for name in _ATTENTION_DROPOUT if hasattr(config, name)), None)
        if name is None:
            raise InputError(
                f"attention_dropout is {dropout}, but {config.model_type} has none in "
                "transformers. Use --use_lora with --lora_dropout as the source of noise."
            )
        setattr(config, name, dropout)


def default_pooling(layout: Any, config: PreTrainedConfig) -> str:
    """Return the folder's pooling mode, else the one that suits the attention.

    The first token of a decoder sees nothing but itself: only its last one has seen the text,
    unless it attends to both sides.
    """
    if layout is not None:
        return str(layout.pooling_mode)
    if not is_decoder(config):
        return "cls"
    return "mean" if is_bidirectional(config) else "lasttoken"


def check_pooling(config: PreTrainedConfig, pooling_mode: str) -> None:
    """Raise InputError where all embeddings would be equal."""
    if pooling_mode == "cls" and is_decoder(config) and not is_bidirectional(config):
        raise InputError(
            f"pooling_mode is 'cls', but the first token of a {config.model_type} sees nothing of "
            "the text behind it. Pass --pooling_mode lasttoken, or --bidirectional_attention true."
        )


def pad_on_the_right(
    tokenizer: Any, backbone: PreTrainedModel, source: str, *, trained: bool
) -> None:
    """Make every loader pad as this package does, where that changes no embedding.

    Args:
        tokenizer: The tokenizer, changed in place.
        backbone: The backbone that reads the tokens.
        source: Its name in errors.
        trained: The folder is of a trained sentence encoder, whose embeddings must stay.

    Raises:
        InputError: Padding on the left moves the tokens of a trained model to other positions.
    """
    if tokenizer.padding_side == "left" and trained and _has_position_table(backbone):
        raise InputError(
            f"The tokenizer of '{source}' pads on the left, which moves the tokens of a "
            f"{backbone.config.model_type} to other positions: its embeddings, with lasttoken as "
            'with any pooling, depend on the rest of the batch. Set "padding_side": "right" in its '
            "tokenizer_config.json."
        )
    tokenizer.padding_side = "right"


def _has_position_table(backbone: PreTrainedModel) -> bool:
    """Return whether positions are absolute: looked up in a table, not turning queries and keys."""
    available = getattr(backbone.config, "max_position_embeddings", None)
    tables = [m for m in backbone.modules() if isinstance(m, torch.nn.Embedding)]
    words = backbone.get_input_embeddings()
    return any(
        table is not words and available and table.num_embeddings >= available for table in tables
    )


def check_bidirectional(backbone: PreTrainedModel) -> None:
    """Prove that a backbone attends to both sides.

    Raises:
        InputError: A later token changes nothing at an earlier one.
    """
    if not looks_ahead(backbone):
        raise InputError(
            f"bidirectional_attention is true, but {backbone.config.model_type} attends to earlier "
            "tokens only, whatever its configuration says. Leave the option out, and use "
            "--pooling_mode lasttoken."
        )


@torch.no_grad()
def looks_ahead(backbone: Any) -> bool:
    """Return whether changing the last of three tokens changes the hidden state of the first."""
    was_training = backbone.training
    backbone.eval()
    try:
        size = backbone.config.get_text_config().vocab_size
        ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=backbone.device) % size
        hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    finally:
        backbone.train(was_training)
    return not torch.equal(hidden[0, 0], hidden[1, 0])
