"""Prompts and end-of-text tokens as part of the tokenizer.

sentence-transformers knows prompts that stand before a text. A template may go on behind it, and
must stay whole when a long text is cut. Both are what a tokenizer does with special tokens, so the
template's tokens become some: whoever loads `tokenizer.json` applies it.
"""

from __future__ import annotations

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.normalizers import Lowercase, Prepend
from tokenizers.normalizers import Sequence as Normalizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from simcse_trainer.errors import InputError

TEXT = "{text}"
# In tokenizer_config.json, where a later training run and the model card find it.
PROMPT_KEY = "simcse_prompt"
_WORD = "a"


def prompt_of(tokenizer: Any) -> str | None:
    """The template that a tokenizer applies, if `apply_prompt` gave it one."""
    found = tokenizer.init_kwargs.get(PROMPT_KEY) if tokenizer is not None else None
    return str(found) if found else None


def ends_by_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer ends texts with a special token, whichever it is."""
    return bool(_special_ids(tokenizer)[1])


def lower_case(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A tokenizer that puts texts into small letters first, as `do_lower_case` asks for it.

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
    return _rebuild(tokenizer, backend, prompt_of(tokenizer))


def apply_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | None, *, append_eos: bool
) -> PreTrainedTokenizerBase:
    """A tokenizer that puts every text into a template, and ends it with the end-of-text token.

    Args:
        tokenizer: Unchanged.
        prompt: With `{text}` once, or None.
        append_eos: End with `eos_token`, unless the tokenizer does already.

    Returns:
        The same tokenizer where there is nothing to change.

    Raises:
        InputError: A template without `{text}`, a second one, or a tokenizer that cannot do it.
    """
    if prompt is not None and prompt == prompt_of(tokenizer):
        prompt = None
    _check(tokenizer, prompt, append_eos)
    before, after = _special_ids(tokenizer)
    eos = [tokenizer.eos_token_id] if append_eos else []
    if after[-1:] == eos:
        eos = []
    if prompt is None and not eos and not _has_invented_ids(tokenizer):
        return tokenizer
    prefix, _, suffix = (prompt or TEXT).partition(TEXT)
    prefix_ids, space = _prefix_ids(tokenizer, prefix)
    before, after = before + prefix_ids, _suffix_ids(tokenizer, suffix) + after + eos
    said = json.loads(tokenizer.backend_tokenizer.to_str())
    said["post_processor"] = _template(tokenizer, before, after)
    backend = Tokenizer.from_str(json.dumps(said))
    if space:
        # Bytes follow the prompt's last word as they would in running text.
        rest = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = Normalizers([Prepend(" "), *rest])
    return _rebuild(tokenizer, backend, prompt or prompt_of(tokenizer))


def _check(tokenizer: PreTrainedTokenizerBase, prompt: str | None, append_eos: bool) -> None:
    if prompt is not None and prompt.count(TEXT) != 1:
        raise InputError(
            f"prompt is '{prompt}'; expected {TEXT} in it once, where the text goes, such as "
            f"'query: {TEXT}'."
        )
    if prompt is not None and prompt_of(tokenizer):
        raise InputError(
            f"prompt is '{prompt}', but this model was trained with '{prompt_of(tokenizer)}', "
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


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text so far."""
    inside, whole = _ids(tokenizer, _WORD), tokenizer(_WORD)["input_ids"]
    starts = range(len(whole) - len(inside) + 1)
    start = next(i for i in starts if whole[i : i + len(inside)] == inside)
    return list(whole[:start]), list(whole[start + len(inside) :])


def _prefix_ids(tokenizer: PreTrainedTokenizerBase, prefix: str) -> tuple[list[int], bool]:
    """Tokens of the part before the text, and whether the text then begins with a space.

    As when both are tokenized together: "query: word" is "query", ":", " word" to most decoders.
    """
    joint = _ids(tokenizer, prefix + _WORD)
    for space in ("", " "):
        rest = _ids(tokenizer, space + _WORD)
        if joint[len(joint) - len(rest) :] == rest and prefix.endswith(space):
            return joint[: len(joint) - len(rest)], bool(space)
    return _ids(tokenizer, prefix), False


def _suffix_ids(tokenizer: PreTrainedTokenizerBase, suffix: str) -> list[int]:
    """Tokens of the part behind the text, as they are behind a word."""
    joint, word = _ids(tokenizer, _WORD + suffix), _ids(tokenizer, _WORD)
    return joint[len(word) :] if joint[: len(word)] == word else _ids(tokenizer, suffix)


def _has_invented_ids(tokenizer: Any) -> bool:
    """Whether a template calls its tokens by other names, as version 0.1.0 did once."""
    if prompt_of(tokenizer) is None or not tokenizer.is_fast:
        return False
    said = json.loads(tokenizer.backend_tokenizer.to_str())["post_processor"] or {}
    tokens = said.get("special_tokens", {}) if said.get("type") == "TemplateProcessing" else {}
    return any([name] != token["tokens"] for name, token in tokens.items())


def _template(tokenizer: Any, before: list[int], after: list[int]) -> dict[str, Any]:
    """`TemplateProcessing` as JSON, in which a token may be called `:`.

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
    """A tokenizer of no family: those of some rebuild what `tokenizer.json` says otherwise."""
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
