"""Files that are there when all of them is, or not at all; embeddings to one, block by block."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TypeAlias

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch import Tensor

from simcse_trainer.errors import InputError

# b texts and their embeddings [b, D].
Block: TypeAlias = tuple[Sequence[str], Tensor]
# Writes blocks, D being given, and returns how many rows they were.
Writer: TypeAlias = Callable[[Iterable[Block], int], int]


@contextmanager
def open_embeddings(path: Path) -> Iterator[Writer]:
    """Open a writer of `path`: of .npy, or of .jsonl or .parquet with `text` and `embedding`.

    Raises:
        InputError: Another kind of file, or one that `open_replacing` refuses.
    """
    if path.suffix not in _FORMATS:
        raise InputError(
            f"{path} is none of {', '.join(_FORMATS)}; name the file by what it is to be."
        )
    with open_replacing(path) as file:
        yield partial(_FORMATS[path.suffix], file)


@contextmanager
def open_replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a file beside `path`, which takes its name at the end, if nothing failed until then.

    Raises:
        InputError: `path` is a folder, or in a folder that is not there.
    """
    check_place(path)
    unfinished = path.with_name(f".{path.name}-{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """Raise InputError where no file could be written."""
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: expected a file name in a folder that exists.")


def _write_npy(file: IO[bytes], blocks: Iterable[Block], dimension: int) -> int:
    """Write an array [N, D] of float32. numpy's headers leave space for the rows to become more."""
    _write_header(file, 0, dimension)
    start, count = file.tell(), 0
    for texts, embeddings in blocks:
        file.write(np.ascontiguousarray(embeddings.numpy(), dtype="<f4").data)
        count += len(texts)
    file.seek(0)
    _write_header(file, count, dimension)
    assert file.tell() == start
    return count


def _write_header(file: IO[bytes], rows: int, dimension: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(file, header)


def _write_jsonl(file: IO[bytes], blocks: Iterable[Block], _: int) -> int:
    count = 0
    for texts, embeddings in blocks:
        for text, row in zip(texts, embeddings.float().numpy(), strict=True):
            # The shortest decimals that are the same float32.
            record = {"text": text, "embedding": [float(str(x)) for x in row]}
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        count += len(texts)
    return count


def _write_parquet(file: IO[bytes], blocks: Iterable[Block], dimension: int) -> int:
    """Write a row group a block, whose texts and embeddings are all that is in memory."""
    embedding = pa.list_(pa.float32(), dimension)
    schema = pa.schema([("text", pa.string()), ("embedding", embedding)])
    count = 0
    # Floats repeat no values that a dictionary would hold once.
    with parquet.ParquetWriter(file, schema, use_dictionary=False) as writer:
        for texts, embeddings in blocks:
            values = pa.array(embeddings.float().numpy().reshape(-1))
            rows = pa.FixedSizeListArray.from_arrays(values, type=embedding)
            table = pa.table([pa.array(texts, pa.string()), rows], schema)
            writer.write_table(table, row_group_size=len(texts))
            count += len(texts)
    return count


_FORMATS: dict[str, Callable[[IO[bytes], Iterable[Block], int], int]] = {
    ".npy": _write_npy,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}
