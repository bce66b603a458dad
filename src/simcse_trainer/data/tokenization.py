"""Text columns to token ids, once, cached and in parallel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from simcse_trainer.data.schema import POSITIVE, POSITIVES
from simcse_trainer.model.tokenizer import tokenize

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

INPUT_IDS = "input_ids"


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    vocab_size: int | None = None,
    num_proc: int | None = None,
    keep_texts: bool = False,
) -> Dataset | IterableDataset:
    """Replace the text columns of each row by `input_ids`, one list of token ids per text.

    Of a row with lists they are those of the anchor, of its positives, and of its negatives, and
    `positives` says how many the positives are.

    Raises InputError for a token that the model has no embedding for.

    Args:
        dataset: Canonical text columns, as `prepare_dataset` gives them, in view order.
        tokenizer: Fast tokenizers use all cores by themselves.
        max_seq_length: Longer texts are cut, in tokens, special ones included.
        vocab_size: How many token ids the model has an embedding for.
        num_proc: Processes; more than one is for slow tokenizers.
        keep_texts: Leave the text columns beside `input_ids`, for augmentation.
    """
    from datasets import Dataset

    # A call sets the tokenizer's truncation. Doing so beforehand keeps its fingerprint, by which
    # datasets finds its cache, the same in every run.
    tokenizer("", truncation=True, max_length=max_seq_length)
    options: dict[str, Any] = {}
    if isinstance(dataset, Dataset):
        options = {"num_proc": num_proc, "desc": "Tokenizing"}
        asked = [max_seq_length, vocab_size, keep_texts, dataset.column_names]
        options["new_fingerprint"] = _fingerprint(dataset, tokenizer, asked)
    return dataset.map(
        _tokenize_rows,
        batched=True,
        fn_kwargs={
            "tokenizer": tokenizer,
            "max_seq_length": max_seq_length,
            "vocab_size": vocab_size,
            "columns": list(dataset.column_names),
        },
        remove_columns=[] if keep_texts else list(dataset.column_names),
        **options,
    )


def _fingerprint(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, asked: list[Any]) -> str:
    """Return what datasets is to find its cache by.

    Its own would hash the words of a vocabulary one by one, which for a large one takes seconds.
    """
    from datasets.fingerprint import Hasher

    state = vars(tokenizer)
    if "_tokenizer" in state:  # holds these words too, and is hashed as one text
        state = {n: x for n, x in state.items() if n not in ("_vocab", "_merges")}
    # Of both, what was called before would be part of the hash.
    state = {n: x for n, x in state.items() if n not in ("cache", "deprecation_warnings")}
    hashed = [dataset._fingerprint, _tokenize_rows, tokenize, type(tokenizer), state, asked]
    return str(Hasher.hash(hashed))


def _tokenize_rows(
    rows: Mapping[str, list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int,
    vocab_size: int | None,
    columns: Sequence[str],
) -> dict[str, list[Any]]:
    lists = [
        [texts if isinstance(texts, list) else [texts] for texts in rows[column]]
        for column in columns
    ]
    views = [
        _split(
            tokenize(
                tokenizer,
                [text for texts in column for text in texts],
                max_seq_length,
                vocab_size=vocab_size,
            ),
            [len(texts) for texts in column],
        )
        for column in lists
    ]
    rows_of_ids = [list(chain.from_iterable(row)) for row in zip(*views, strict=True)]
    made: dict[str, list[Any]] = {INPUT_IDS: rows_of_ids}
    if any(isinstance(texts, list) for texts in rows.get(POSITIVE, ())):
        made[POSITIVES] = [len(texts) for texts in rows[POSITIVE]]
    return made


def _split(ids: list[list[int]], lengths: Sequence[int]) -> list[list[list[int]]]:
    rest = iter(ids)
    return [[next(rest) for _ in range(length)] for length in lengths]
