"""Texts to token ids: the one place that calls a tokenizer on them, and what it needs for that."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Prepend
from tokenizers.normalizers import Sequence as Normalizers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from simcse_trainer.errors import InputError
from simcse_trainer.files import TOKENIZER_CONFIG
from simcse_trainer.model.decoders import is_decoder


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    max_seq_length: int | None,
    *,
    vocab_size: int | None = None,
) -> list[list[int]]:
    """Turn each text into token ids, special ones included.

    Args:
        tokenizer: A tokenizer of transformers, fast or slow.
        texts: Any number of texts, an empty one among them.
        max_seq_length: Longer texts are cut, in tokens, special ones included; None: none is.
        vocab_size: From `count_word_embeddings`; None: not checked.

    Returns:
        A list for each text, never empty.

    Raises:
        InputError: A token that the model has no embedding for.
    """
    if not texts:
        return []
    options: dict[str, Any] = {"truncation": True, "max_length": max_seq_length}
    if max_seq_length is None:  # without a warning of texts that no model reads
        options = {"truncation": False, "verbose": False}
    ids: list[list[int]] = tokenizer(list(texts), **options)["input_ids"]
    if vocab_size is not None:
        for text, row in zip(texts, ids, strict=True):
            if row and max(row) >= vocab_size:
                raise _no_embedding(tokenizer, max(row), text, vocab_size)
    # Some tokenizers give no token for a text of characters they drop.
    filler = [tokenizer.pad_token_id or 0]
    return [row or filler for row in ids]


def check_sequence(given: Any) -> None:
    """Raise InputError for what holds no texts in an order, such as a table or a set.

    Lists, tuples, arrays, Series, columns of a data set and generators do.
    """
    kind = type(given).__name__
    if hasattr(given, "columns") or hasattr(given, "column_names"):
        raise InputError(f"sentences is a {kind}, a table. Pass one column of it: table['text'].")
    unordered = isinstance(given, bytes | Mapping | Set) or getattr(given, "ndim", 1) == 0
    if unordered or not isinstance(given, Iterable):
        raise InputError(
            f"sentences is a {kind} ({reprlib.repr(given)}), expected a text or several in an "
            "order. Give a str, or a list of str."
        )


def check_texts(texts: Sequence[Any], start: int = 0) -> None:
    """Raise InputError for the first of some texts that is none, or holds half of a character.

    Args:
        texts: What is to be texts.
        start: The number of the first one in errors.
    """
    for number, text in enumerate(texts, start):
        if not isinstance(text, str):
            raise InputError(
                f"Sentence {number} is {type(text).__name__} ({reprlib.repr(text)}), expected a "
                "text. Give a str, or leave it out."
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"Sentence {number} holds U+{ord(text[error.start]):04X} at position "
                f"{error.start}, half of a character. Decode it as UTF-8, or take it out."
            ) from None


def count_word_embeddings(backbone: Any) -> int | None:
    """Count the token ids that a backbone has an embedding for; None where it has no such table."""
    try:
        layer = backbone.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    layers = [m for m in layer.modules() if isinstance(m, nn.Embedding)] if layer else []
    # An adapter wraps the table; its number stays where an engine takes the weights apart.
    return layers[0].num_embeddings if layers else None


def find_unknown_token(tokenizer: Any) -> int | None:
    """Return the token of what is not in the vocabulary, if it stands for nothing else."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")
    unknown: int | None = tokenizer.unk_token_id
    return None if unknown in [getattr(tokenizer, name) for name in names] else unknown


def count_pieces(tokenizer: Any, words: Sequence[str]) -> int:
    """Count the tokens that words are split into, each by itself and without special tokens."""
    if not words:
        return 0
    return sum(map(len, tokenizer(list(words), add_special_tokens=False)["input_ids"]))


def find_mask_token(tokenizer: Any, backbone: Any) -> int | None:
    """Return the token that is put in place of a masked one; None: there is none.

    Of a decoder it is `_`, as in LLM2Vec: of a mask token, if its tokenizer has one, it has learned
    nothing.
    """
    if is_decoder(backbone.config):
        found = tokenizer.convert_tokens_to_ids("_")
        if found is not None and found != tokenizer.unk_token_id:
            return int(found)
    mask: int | None = tokenizer.mask_token_id
    return mask


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


TEXT = "{text}"
# In tokenizer_config.json, where a later training run and the model card find it.
PROMPT_KEY = "simcse_prompt"
# A text that stands for any; the other is for tokenizers that drop it.
_WORDS = ("a", "가")


def get_prompt(tokenizer: Any) -> str | None:
    """Return the template that a tokenizer applies, if `apply_prompt` gave it one."""
    found = tokenizer.init_kwargs.get(PROMPT_KEY) if tokenizer is not None else None
    return str(found) if found else None


def ends_by_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer ends texts with a special token, whichever it is."""
    return bool(_special_ids(tokenizer, _find_word(tokenizer))[1])


def lower_case(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that puts texts into small letters first, as `do_lower_case` asks for it.

    Raises:
        InputError: A tokenizer that cannot do it.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"do_lower_case is true, but this {type(tokenizer).__name__} has no tokenizer.json, "
            "in which it could be said. Use another checkpoint."
        )
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    rest = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = Normalizers([Lowercase(), *rest])
    return _rebuild(tokenizer, backend, get_prompt(tokenizer))


def apply_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | None, *, append_eos: bool
) -> PreTrainedTokenizerBase:
    """Return a tokenizer that puts every text into a template, and can end it with a token.

    Args:
        tokenizer: The tokenizer, which stays as it is.
        prompt: With `{text}` once, or None.
        append_eos: End with `eos_token`, unless the tokenizer does already.

    Returns:
        The same tokenizer where there is nothing to change.

    Raises:
        InputError: A template without `{text}`, a second one, or a tokenizer that cannot do it.
    """
    if prompt is not None and prompt == get_prompt(tokenizer):
        prompt = None
    _check(tokenizer, prompt, append_eos)
    word = _find_word(tokenizer)
    before, after = _special_ids(tokenizer, word)
    eos = [tokenizer.eos_token_id] if append_eos else []
    if after[-1:] == eos:
        eos = []
    if prompt is None and not eos and not _has_invented_ids(tokenizer):
        return tokenizer
    prefix, _, suffix = (prompt or TEXT).partition(TEXT)
    prefix_ids, space = _prefix_ids(tokenizer, prefix, word)
    before, after = before + prefix_ids, _suffix_ids(tokenizer, suffix, word) + after + eos
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["post_processor"] = _template(tokenizer, before, after)
    backend = Tokenizer.from_str(json.dumps(said))
    if space:
        # Bytes follow the prompt's last word as they would in running text.
        rest = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = Normalizers([Prepend(" "), *rest])
    return _rebuild(tokenizer, backend, prompt or get_prompt(tokenizer))


def _check(tokenizer: PreTrainedTokenizerBase, prompt: str | None, append_eos: bool) -> None:
    if prompt is not None and prompt.count(TEXT) != 1:
        raise InputError(
            f"prompt is '{prompt}'; expected {TEXT} in it once, where the text is put, such as "
            f"'query: {TEXT}'."
        )
    if prompt is not None and get_prompt(tokenizer):
        raise InputError(
            f"prompt is '{prompt}', but this model was trained with '{get_prompt(tokenizer)}', "
            "which its tokenizer applies already. Leave the option out."
        )
    if (prompt is not None or append_eos) and not tokenizer.is_fast:
        raise InputError(
            f"prompt and append_eos_token need a tokenizer with a tokenizer.json; this "
            f"{type(tokenizer).__name__} has none. Leave the options out."
        )
    if append_eos and tokenizer.eos_token_id is None:
        raise InputError(
            "append_eos_token is true, but the tokenizer has no end-of-text token. Pass "
            "--append_eos_token false."
        )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _find_word(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a short text of which the tokenizer makes tokens.

    Raises:
        InputError: It makes none of any.
    """
    special = set(tokenizer.all_special_tokens)
    tokens = (token for token in tokenizer.get_vocab() if token not in special)
    texts = (tokenizer.convert_tokens_to_string([token]).strip() for token in tokens)
    word = next((text for text in (*_WORDS, *islice(texts, 1000)) if _ids(tokenizer, text)), None)
    if word is None:
        raise InputError("The tokenizer makes no tokens of any text. Use another one.")
    return word


def _special_ids(tokenizer: PreTrainedTokenizerBase, word: str) -> tuple[list[int], list[int]]:
    """Return the ids that the tokenizer puts before and behind a text so far."""
    inside, complete = _ids(tokenizer, word), tokenizer(word)["input_ids"]
    starts = range(len(complete) - len(inside) + 1)
    start = next(i for i in starts if complete[i : i + len(inside)] == inside)
    return list(complete[:start]), list(complete[start + len(inside) :])


def _prefix_ids(
    tokenizer: PreTrainedTokenizerBase, prefix: str, word: str
) -> tuple[list[int], bool]:
    """Return tokens of the part before the text, and whether the text then begins with a space.

    As when both are tokenized together: "query: word" is "query", ":", " word" to most decoders.
    """
    joint = _ids(tokenizer, prefix + word)
    for space in ("", " "):
        rest = _ids(tokenizer, space + word)
        if joint[len(joint) - len(rest) :] == rest and prefix.endswith(space):
            return joint[: len(joint) - len(rest)], bool(space)
    return _ids(tokenizer, prefix), False


def _suffix_ids(tokenizer: PreTrainedTokenizerBase, suffix: str, word: str) -> list[int]:
    """Return tokens of the part behind the text, as they are behind a word."""
    joint, ids = _ids(tokenizer, word + suffix), _ids(tokenizer, word)
    return joint[len(ids) :] if joint[: len(ids)] == ids else _ids(tokenizer, suffix)


def _has_invented_ids(tokenizer: Any) -> bool:
    """Return whether a template calls its tokens by other names, as version 0.1.0 did once."""
    if get_prompt(tokenizer) is None or not tokenizer.is_fast:
        return False
    said = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] or {}
    tokens = said.get("special_tokens", {}) if said.get("type") == "TemplateProcessing" else {}
    return any([name] != token["tokens"] for name, token in tokens.items())


def _template(tokenizer: Any, before: list[int], after: list[int]) -> dict[str, Any]:
    """Return a `TemplateProcessing` as JSON, in which a token may be called `:`.

    Each token has an entry of its own, whose id is the token's text: some readers take the one for
    the other.
    """
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in (*before, *after)}

    def piece(name: str, kind: str = "SpecialToken", part: int = 0) -> dict[str, Any]:
        return {kind: {"id": name, "type_id": part}}

    start, end = ([piece(names[i]) for i in ids] for ids in (before, after))
    text, second = piece("A", "Sequence"), piece("B", "Sequence", 1)
    return {
        "type": "TemplateProcessing",
        "single": [*start, text, *end],
        "pair": [*start, text, second, *end],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()
        },
    }


def _rebuild(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, prompt: str | None
) -> PreTrainedTokenizerFast:
    """Make a tokenizer of no family: those of some rebuild what `tokenizer.json` says otherwise."""
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=tokenizer.name_or_path,
        model_max_length=tokenizer.model_max_length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        model_input_names=list(tokenizer.model_input_names),
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
        **({PROMPT_KEY: prompt} if prompt else {}),
    )


def save_tokenizer(tokenizer: Any, folder: Path, max_seq_length: int) -> None:
    """Write a tokenizer that says one length everywhere, by a class that all versions know.

    Args:
        tokenizer: Its length becomes `max_seq_length`.
        folder: A folder that exists already.
        max_seq_length: The length at which texts are cut, in tokens.
    """
    tokenizer.model_max_length = max_seq_length
    if tokenizer.is_fast:
        # What tokenizer.json says by itself: of the base model it may be another length.
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(max_seq_length, direction=tokenizer.truncation_side)
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / TOKENIZER_CONFIG
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("max_length", "truncation_max_length"):
        if key in said:
            said[key] = max_seq_length
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
