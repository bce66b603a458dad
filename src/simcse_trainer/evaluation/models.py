"""Any folder or Hub model as an encoder of texts, with what is to be said of it.

A trained folder says how it is read. A plain backbone is read by any pooling mode, as a baseline,
and what only sentence-transformers can compute is computed by it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.sts import Encoder
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.layout import UnsupportedModulesError
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.pooling import POOLING_MODES


@dataclass(frozen=True)
class Reading:
    """A way to read a model.

    Attributes:
        pooling: A pooling mode, and whether a head follows; or who computes it instead.
        encode: Texts to embeddings [n, D].
        max_seq_length: In tokens, special ones included.
        config: The backbone's, where there is one.
    """

    pooling: str
    encode: Encoder
    max_seq_length: int | None
    config: Any


def load_readings(
    name_or_path: str,
    *,
    pooling_modes: Sequence[str] = (),
    batch_size: int = 128,
    **options: Any,
) -> Iterator[Reading]:
    """Load a model once, and read it in one way or several.

    Args:
        name_or_path: A folder, or a name on the Hub.
        pooling_modes: Read the backbone by each of these, without a head. By default as the
            folder says; a plain backbone then by `cls`.
        batch_size: Sentences per forward pass.
        options: For `SimCSEModel.from_pretrained`: max_seq_length, revision, ...

    Raises:
        InputError: An unknown mode, no model there, or one that needs sentence-transformers.
    """
    for mode in pooling_modes:
        if mode not in POOLING_MODES:
            raise InputError(
                f"pooling_mode is '{mode}'; expected one of {', '.join(POOLING_MODES)}."
            )
    plain = {"pooling_mode": pooling_modes[0], "projection_head": "none"} if pooling_modes else {}
    try:
        model = SimCSEModel.from_pretrained(name_or_path, **options, **plain)
    except UnsupportedModulesError as error:
        if pooling_modes:
            raise InputError(
                f"{_cause(error)} Leave out --pooling_mode to read it as its folder says."
            ) from error
        yield _through_sentence_transformers(name_or_path, error, batch_size, **options)
        return
    model.to(_device())
    for mode in dict.fromkeys(pooling_modes or [model.pooling_mode]):
        model.pooling_mode = mode
        headed = model.head is not None and model.mlp_only_train is False
        yield Reading(
            mode + (" + head" if headed else ""),
            partial(model.encode, batch_size=batch_size, show_progress_bar=_is_watched()),
            model.max_seq_length,
            model.config,
        )


def _through_sentence_transformers(
    name_or_path: str,
    error: UnsupportedModulesError,
    batch_size: int,
    max_seq_length: int | None = None,
    **options: Any,
) -> Reading:
    if find_spec("sentence_transformers") is None:
        raise InputError(
            f"{_cause(error)} sentence-transformers can read it. "
            "Run: pip install sentence-transformers"
        ) from error
    from sentence_transformers import SentenceTransformer

    names = ("dtype", "attn_implementation", "base_model")
    given = {name: options.pop(name) for name in names if name in options}
    if "base_model" in given:
        raise InputError(f"{_cause(error)} Leave out --base_model.") from error
    options |= {"model_kwargs": given} if given else {}
    try:
        model = SentenceTransformer(name_or_path, device=str(_device()), **options)
    except (OSError, ValueError, ImportError) as failure:
        reason = str(failure).strip().splitlines()[0]
        raise InputError(f"{_cause(error)} Nor does sentence-transformers: {reason}") from failure
    if max_seq_length is not None:
        model.max_seq_length = max_seq_length

    def encode(texts: Sequence[str]) -> Tensor:
        found: Tensor = model.encode(
            list(texts),
            batch_size=batch_size,
            convert_to_tensor=True,
            show_progress_bar=_is_watched(),
        )
        if not is_finite(found):
            raise not_finite("An embedding", found.dtype)
        return found.cpu().float()

    config = getattr(model[0], "config", None)
    return Reading("sentence-transformers", encode, model.max_seq_length, config)


def _cause(error: UnsupportedModulesError) -> str:
    return str(error).removesuffix(" Use another checkpoint.")


def _is_watched() -> bool:
    return sys.stderr.isatty()


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
