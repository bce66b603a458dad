"""What other tools read of a saved folder, in the forms that they know.

transformers 5 writes some things in a form that older versions, and tools that read the files by
themselves, do not know; they then fall back to something else without a word. Both forms are kept.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Where the layers of a family have two frequencies: its older names of the two.
_THETAS = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def add_older_keys(path: Path) -> None:
    """Write the rotary positions of a `config.json` under their older names too.

    Older readers take 10,000 for a frequency that they do not find. A key that transformers itself
    would read otherwise is left out.

    Args:
        path: As transformers has just written it.
    """
    said = json.loads(path.read_text(encoding="utf-8"))
    older = _older_rope(said.get("model_type"), said.get("rope_parameters"))
    if not older:
        return
    expected, found = (_read(one) for one in (said, said | older))
    if any(found.get(name) != value for name, value in expected.items()):
        logger.warning(
            "%s: rope_parameters cannot be said under their older names; readers before "
            "transformers 5 compute other positions.",
            path,
        )
        return
    path.write_text(json.dumps(said | older, indent=2) + "\n", encoding="utf-8")


def _older_rope(family: Any, rope: Any) -> dict[str, Any]:
    if not isinstance(rope, dict):
        return {}
    if all(isinstance(one, dict) for one in rope.values()):
        if family not in _THETAS or {*rope} != {"full_attention", "sliding_attention"}:
            logger.warning(
                "The layers of a %s have rope_parameters of their own, which readers before "
                "transformers 5 do not know.",
                family,
            )
            return {}
        far, near = _THETAS[family]
        full, sliding = rope["full_attention"], rope["sliding_attention"]
        return {far: full["rope_theta"], near: sliding["rope_theta"], **_scaling(full)}
    older = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older | _scaling(rope)


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {k: v for k, v in rope.items() if k not in apart}}


def _read(said: dict[str, Any]) -> dict[str, Any]:
    """What transformers makes of a configuration."""
    from transformers import AutoConfig

    said = dict(said)
    config: PreTrainedConfig = AutoConfig.for_model(said.pop("model_type"), **said)
    return config.to_dict()


def save_tokenizer(tokenizer: Any, folder: Path, max_seq_length: int) -> None:
    """Write a tokenizer that says one length everywhere, by a class that all versions know.

    Args:
        tokenizer: Its length becomes `max_seq_length`.
        folder: An existing one.
        max_seq_length: In tokens.
    """
    tokenizer.model_max_length = max_seq_length
    if tokenizer.is_fast:
        # What tokenizer.json says by itself: of the base model it may be another length.
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(max_seq_length, direction=tokenizer.truncation_side)
        backend.no_padding()
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    if said.get("tokenizer_class") == "TokenizersBackend":
        said["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("max_length", "truncation_max_length"):
        if key in said:
            said[key] = max_seq_length
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
