"""Texts to token ids: the one place that calls a tokenizer on them, and what it needs for that."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from simcse_trainer.errors import InputError


def tokenize(
    tokenizer: Any, texts: Sequence[str], max_seq_length: int, *, vocab_size: int | None = None
) -> list[list[int]]:
    """Token ids of each text, special ones included.

    Args:
        tokenizer: Of transformers.
        texts: Any number of texts, an empty one among them.
        max_seq_length: Longer texts are cut, in tokens, special ones included.
        vocab_size: From `count_word_embeddings`; None: not checked.

    Returns:
        A list for each text, never empty.

    Raises:
        InputError: A token that the model has no embedding for.
    """
    if not texts:
        return []
    ids: list[list[int]] = tokenizer(list(texts), truncation=True, max_length=max_seq_length)[
        "input_ids"
    ]
    if vocab_size is not None:
        for text, row in zip(texts, ids, strict=True):
            if row and max(row) >= vocab_size:
                raise _no_embedding(tokenizer, max(row), text, vocab_size)
    # Some tokenizers give no token for a text of characters they drop.
    filler = [tokenizer.pad_token_id or 0]
    return [row or filler for row in ids]


def check_texts(texts: Sequence[Any], start: int = 0) -> None:
    """Raise InputError for the first of some texts that is none, or holds half of a character.

    Args:
        texts: What is to be texts.
        start: The number of the first one in errors.
    """
    for number, text in enumerate(texts, start):
        if not isinstance(text, str):
            raise InputError(
                f"Sentence {number} is {type(text).__name__}, expected a text. Give a str or a "
                "list of str."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"Sentence {number} holds U+{ord(text[error.start]):04X} at position "
                f"{error.start}, half of a character. Decode it as UTF-8, or take it out."
            ) from None


def count_word_embeddings(backbone: Any) -> int | None:
    """How many token ids a backbone has an embedding for; None where it has no such table."""
    try:
        layer = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    layers = [m for m in layer.modules() if isinstance(m, nn.Embedding)] if layer else []
    # An adapter wraps the table; its number stays where an engine takes the weights apart.
    return layers[0].num_embeddings if layers else None


def choose_padding_token(tokenizer: Any, config: PreTrainedConfig) -> None:
    """Give a tokenizer that has no padding token one of its special tokens, in place.

    Padding is masked, so that any would do; but families that count positions from their padding
    token's number need that one, and a word would be split off wherever a text contains it.

    Raises:
        InputError: It has no special token.
    """
    if tokenizer.pad_token is not None:
        return
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    own = getattr(config.get_text_config(), "pad_token_id", None)
    found = special.get(own) or tokenizer.eos_token or next(iter(special.values()), None)
    if found is None:
        raise InputError(
            "The tokenizer has no special token that batches could be padded with. Set pad_token "
            "in its tokenizer_config.json."
        )
    tokenizer.pad_token = found


def _no_embedding(tokenizer: Any, token: int, text: str, vocab_size: int) -> InputError:
    word = tokenizer.convert_ids_to_tokens(token)
    return InputError(
        f"The text {shorten(text, 60)!r} holds the token {word!r} with the id {token}, but the "
        f"model has {vocab_size} word embeddings. Give it more, and use that folder: "
        "model = AutoModel.from_pretrained(name); "
        f"model.resize_token_embeddings({len(tokenizer)}); model.save_pretrained(folder); "
        "AutoTokenizer.from_pretrained(name).save_pretrained(folder)."
    )
