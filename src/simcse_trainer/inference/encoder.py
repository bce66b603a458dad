"""The model's side of `SimCSE`: sentences to embeddings and similarities, from any thread."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from simcse_trainer.errors import InputError
from simcse_trainer.model.layout import read_layout
from simcse_trainer.model.loading import choose_max_length
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packaged import resolve_packaged
from simcse_trainer.model.tokenizer import check_texts

# The original's poolers: a pooling mode, and what follows it.
_POOLERS = {
    "cls": ("cls", "pooler"),
    "cls_before_pooler": ("cls", "none"),
    "avg": ("mean", "none"),
    "avg_top2": ("avg_top2", "none"),
    "avg_first_last": ("avg_first_last", "none"),
}
# What the original cuts texts to; a trained folder says its own length.
_ORIGINAL_LENGTH = 128
# Sentences that are tokenized, sorted by length and embedded at a time.
_BLOCK_SENTENCES = 4096

# Sentences, or embeddings of them.
Texts: TypeAlias = str | Sequence[str] | np.ndarray | Tensor


class Encoder:
    """A trained model, in evaluation mode; the arguments are those of `SimCSE`.

    Attributes:
        name: What it was loaded by.
        model: The `SimCSEModel`.
        device: Where it computes.
        truncate_dim: The first so many dimensions of embeddings are kept; None: all.
    """

    def __init__(
        self,
        name_or_path: str | Path,
        device: str | torch.device | None,
        pooler: str | None,
        truncate_dim: int | None,
        **options: Any,
    ) -> None:
        self.name = str(name_or_path)
        if pooler is not None:
            options |= _read_pooler(pooler)
        self.model = SimCSEModel.from_pretrained(self.name, **options).eval()
        if options.get("max_seq_length") is None:
            hub = {name: options.get(name) for name in ("revision", "token")}
            said = {"pooling_mode", "projection_head"} <= {*options}
            layout = read_layout(resolve_packaged(self.name), assume_absent=said, **hub)
            if layout is None:
                self.model.max_seq_length = min(self.model.max_seq_length, _ORIGINAL_LENGTH)
        full = self.model.embedding_dimension
        if truncate_dim is not None and not 1 <= truncate_dim <= full:
            raise InputError(f"truncate_dim is {truncate_dim}; expected 1 to {full}.")
        self.truncate_dim = truncate_dim
        default = torch.accelerator.current_accelerator() or torch.device("cpu")
        self.device = default if device is None else _check_device(device)
        # A tokenizer keeps how it cuts texts, a model where it is: one block at a time.
        self._lock = threading.Lock()

    @property
    def embedding_dimension(self) -> int:
        """D."""
        return self.truncate_dim or self.model.embedding_dimension

    def encode(
        self,
        sentence: str | Sequence[str],
        device: str | torch.device | None = None,
        return_numpy: bool = False,
        normalize_to_unit: bool = True,
        keepdim: bool = False,
        batch_size: int = 64,
        max_length: int | None = None,
        *,
        show_progress_bar: bool = False,
    ) -> Tensor | np.ndarray:
        """Embed sentences, in the order given.

        An empty text is embedded as its special tokens alone. A text over `max_length` tokens is
        cut to its beginning.

        Args:
            sentence: One text, or n.
            device: Where the model goes, for this call and from now on; by default where it is.
            return_numpy: An array instead of a tensor.
            normalize_to_unit: To length 1.
            keepdim: [1, D] for one text too.
            batch_size: Sentences per forward pass, at most.
            max_length: In tokens, special ones included; by default as the folder says, and of
                plain backbones and the original's checkpoints 128.
            show_progress_bar: On stderr.

        Returns:
            [n, D], or [D] for one text, on the CPU; float32 (float64 of a float64 model).

        Raises:
            InputError: Something that is no text, or a length that the model has no room for.
        """
        texts = [sentence] if isinstance(sentence, str) else sentence
        blocks = self.encode_stream(
            tqdm(texts, desc="Encoding", disable=not show_progress_bar),
            device=device,
            normalize_to_unit=normalize_to_unit,
            batch_size=batch_size,
            max_length=max_length,
        )
        found = self._join(blocks)
        found = found[0] if isinstance(sentence, str) and not keepdim else found
        return found.numpy() if return_numpy else found

    def encode_stream(
        self,
        sentences: Iterable[str],
        *,
        device: str | torch.device | None = None,
        normalize_to_unit: bool = True,
        batch_size: int = 64,
        max_length: int | None = None,
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Embed sentences as they come, in bounded memory; the arguments are those of `encode`.

        Yields:
            b texts and their embeddings [b, D], in order; b is 4096 but for the last block.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; expected 1 or more.")
        numbered = enumerate(sentences)
        while block := list(islice(numbered, _BLOCK_SENTENCES)):
            texts = [text for _, text in block]
            check_texts(texts, start=block[0][0])
            found = self._embed(texts, device, batch_size, max_length)[:, : self.truncate_dim]
            yield texts, normalize(found, dim=1) if normalize_to_unit else found

    def similarity(
        self, queries: Texts, keys: Texts, device: str | torch.device | None = None
    ) -> float | np.ndarray:
        """Cosines of sentences, or of embeddings that are already there.

        Args:
            queries: N texts or embeddings [N, D]; or one text, or one embedding [D].
            keys: M texts or embeddings [M, D]; or one text, or one embedding [D].
            device: See `encode`.

        Returns:
            An array [N, M]; [M] for one query; a float for one pair.

        Raises:
            InputError: Embeddings of different dimensions.
        """
        from sklearn.metrics.pairwise import cosine_similarity

        ours, theirs = (self._to_numpy(given, device) for given in (queries, keys))
        if ours.shape[-1] != theirs.shape[-1]:
            raise InputError(
                f"The queries have {ours.shape[-1]} dimensions and the keys {theirs.shape[-1]}; "
                "embed both by the same model."
            )
        found: np.ndarray = cosine_similarity(np.atleast_2d(ours), np.atleast_2d(theirs))
        if ours.ndim == 1:
            return float(found[0, 0]) if theirs.ndim == 1 else found[0]
        return found

    def _join(self, blocks: Iterable[tuple[list[str], Tensor]]) -> Tensor:
        empty = torch.empty(0, self.embedding_dimension)
        return torch.cat([empty, *(embeddings for _, embeddings in blocks)])

    def _to_numpy(self, given: Texts, device: str | torch.device | None) -> np.ndarray:
        if isinstance(given, Tensor):
            return given.detach().cpu().numpy()
        if isinstance(given, np.ndarray) and given.dtype.kind not in "OU":
            return given
        return np.asarray(self.encode(given if isinstance(given, str) else list(given), device))

    def _embed(
        self,
        texts: list[str],
        device: str | torch.device | None,
        batch_size: int,
        max_length: int | None,
    ) -> Tensor:
        with self._lock:
            self.device = self.device if device is None else _check_device(device)
            if self.model.device != torch.device(self.device):
                self.model.to(self.device)
            usual = self.model.max_seq_length
            try:
                if max_length is not None:
                    self.model.max_seq_length = choose_max_length(max_length, None, self.model)
                return self.model.encode(texts, batch_size=batch_size)
            finally:
                self.model.max_seq_length = usual


def _read_pooler(pooler: str) -> dict[str, str]:
    if pooler not in _POOLERS:
        raise InputError(f"pooler is '{pooler}'; expected one of {', '.join(_POOLERS)}.")
    pooling_mode, head = _POOLERS[pooler]
    return {"pooling_mode": pooling_mode, "projection_head": head}


def _check_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device is '{device}', which is not there ({str(error).splitlines()[0]}). "
            "Use one such as cpu, cuda or cuda:1."
        ) from error
    return found
