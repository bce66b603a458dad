"""Hard negatives for pairs: passages that a model finds near a query and that do not answer it.

Passages are encoded once and kept on disk, and compared with a block of rows at a time: of a
passage only its place and its key stay in memory. The command is its only user, and keeps to words.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from simcse_trainer.data.retrieval import read_pairs
from simcse_trainer.data.schema import ANCHOR, NEGATIVE, POSITIVE
from simcse_trainer.data.texts import read_texts
from simcse_trainer.errors import InputError, check_bounds
from simcse_trainer.evaluation.retrieval import Block, find_nearest
from simcse_trainer.evaluation.sts import Encoder
from simcse_trainer.inference.export import check_place, open_replacing
from simcse_trainer.model.progress import bar

# Rows that are mined, passages that are encoded, and passages that are compared, at a time.
_BLOCK_ROWS = 8192
_BLOCK_TEXTS = 4096
_BLOCK_PASSAGES = 16_384
# Rows whose candidates the guide model scores at a time.
_BLOCK_GUIDED = 128
# Passages that are drawn for the rows of a block with too few negatives.
_DRAWN = 256

FORMATS = (".csv", ".jsonl")
SHORT_ROWS = ("random", "drop")


@dataclass(frozen=True)
class MiningOptions:
    """Which of the nearest passages become negatives.

    Attributes:
        num_negatives: How many a row gets.
        rank_min: First rank of the window, from 1; a row's own positives have no rank.
        rank_max: Last rank of the window.
        margin: A candidate whose cosine is above the positive's minus this is left out.
        relative_margin: The same for this share of the positive's cosine.
        short_rows: A row with too few negatives is filled up with passages drawn at random, which
            keep the same distance to the positive (`random`), or left out (`drop`).
        seed: The seed of the random draw: the same, every time.
    """

    num_negatives: int = 1
    rank_min: int = 1
    rank_max: int = 30
    margin: float = 0.0
    relative_margin: float = 0.05
    short_rows: str = "random"
    seed: int = 42

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            InputError: One is out of its range.
        """
        need = self.rank_min + self.num_negatives - 1
        bounds = {
            "num_negatives": (self.num_negatives > 0, "1 or more"),
            "rank_min": (self.rank_min > 0, "1 or more"),
            "rank_max": (
                self.rank_max >= need,
                f"{need} or more, for {self.num_negatives} passages from rank {self.rank_min} on",
            ),
            "margin": (self.margin >= 0, "0 or more"),
            "relative_margin": (0 <= self.relative_margin < 1, "0 or more, and less than 1"),
            "short_rows": (self.short_rows in SHORT_ROWS, " or ".join(SHORT_ROWS)),
        }
        check_bounds(self, bounds)


@dataclass
class MiningResult:
    """What came of it.

    Attributes:
        columns: Of the texts in the file.
        passages: Different ones that were searched.
        rows: Written to the file.
        filled: Rows of these with negatives drawn at random.
        dropped: Rows that were left out.
        positive_score: Mean cosine of the rows' queries and positives.
        negative_score: Mean cosine of their queries and negatives.
    """

    columns: list[str]
    passages: int = 0
    rows: int = 0
    filled: int = 0
    dropped: int = 0
    positive_score: float = 0.0
    negative_score: float = 0.0


def mine_hard_negatives(
    pairs: Path,
    output: Path,
    encode_queries: Encoder,
    encode_passages: Encoder,
    *,
    corpus: Path | None = None,
    columns: Sequence[str] | None = None,
    options: MiningOptions | None = None,
    guide: tuple[Encoder, Encoder] | None = None,
) -> MiningResult:
    """Write the pairs with hard negatives to a file that training takes.

    No row gets a passage that is a positive of its query in any row, nor the query itself; texts
    are equal if they differ in white space only.

    Args:
        pairs: A file of queries and relevant passages.
        output: A csv or jsonl file: `sent0`, `sent1`, `hard_neg` (or `hard_neg_1`, ...), and for
            each but the first a cosine with the query: `score_sent1`, ... Embeddings are kept
            beside it meanwhile, 4 bytes a number.
        encode_queries: Queries to embeddings [n, D].
        encode_passages: Passages to embeddings [n, D].
        corpus: A file of passages, see `read_texts`; by default the passages of the pairs.
        columns: Names of the columns, see `find_pair_columns`.
        options: Which passages become negatives.
        guide: Encoders of queries and passages of another model: a candidate that it finds as near
            to the query as the positive, or nearer, is left out.

    Raises:
        InputError: A file cannot be read or written, or no row has negatives.
    """
    options = options or MiningOptions()
    check_files(pairs, output, corpus, columns)
    count = options.num_negatives
    negatives = [NEGATIVE] if count == 1 else [f"{NEGATIVE}_{i}" for i in range(1, count + 1)]
    result = MiningResult([ANCHOR, POSITIVE, *negatives])
    with open_replacing(output) as file, ExitStack() as opened:

        def open_file() -> IO[bytes]:
            # Not in /tmp, which may be memory; nameless, so that a kill leaves nothing.
            return opened.enter_context(tempfile.TemporaryFile(dir=output.parent))

        passages = _Passages(open_file(), open_file(), encode_passages)
        judged = _read_judged(pairs, columns, passages if corpus is None else None)
        for text in () if corpus is None else read_texts(corpus):
            passages.add(text)
        result.passages = len(passages)
        passages.encode_all()
        guiding = None if guide is None else _Guide(*guide, passages, open_file())
        miner = _Miner(encode_queries, passages, judged, options, guiding)
        write = _open_writer(file, output.suffix, result.columns)
        rows = iter(bar(read_pairs(pairs, columns), "Mining", total=len(judged), unit="row"))
        while block := list(islice(rows, _BLOCK_ROWS)):
            for row in miner.mine(block):
                _write_row(row, write, passages, result)
        if not result.rows:
            raise InputError(
                f"{pairs}: none of the {result.dropped} rows has a negative among "
                f"{result.passages} passages. Pass a larger --rank_max, smaller margins, or a "
                "--corpus of more passages."
            )
        for name in ("positive_score", "negative_score"):
            setattr(result, name, getattr(result, name) / result.rows)
    return result


def check_files(
    pairs: Path, output: Path, corpus: Path | None, columns: Sequence[str] | None
) -> None:
    """Look at what will be read and written, before a model is loaded.

    Args:
        pairs: See `mine_hard_negatives`, as for all others.
        output: The file to write.
        corpus: A file of passages.
        columns: Names of the columns.

    Raises:
        InputError: A file cannot be read, has no rows, or could not be written.
    """
    if output.suffix not in FORMATS:
        raise InputError(f"{output} is neither .csv nor .jsonl; name the file by what it is to be.")
    check_place(output)
    if next(read_pairs(pairs, columns), None) is None:
        raise InputError(f"{pairs} has no rows. Add pairs.")
    if corpus is not None and next(read_texts(corpus), None) is None:
        raise InputError(f"{corpus} has no texts. Add passages.")


def _key(text: str) -> int:
    """Return eight bytes that stand for a text, whatever white space it has."""
    return hash(" ".join(text.split()))


def _read_judged(
    pairs: Path, columns: Sequence[str] | None, passages: _Passages | None
) -> np.ndarray:
    """Read keys of queries and their passages [N, 2], sorted; and collect the passages."""
    keys = array("q")
    for query, passage in read_pairs(pairs, columns):
        keys.extend((_key(query), _key(passage)))
        if passages is not None:
            passages.add(passage)
    found = np.frombuffer(keys, dtype=np.int64).reshape(-1, 2)
    return found[found[:, 0].argsort(kind="stable")]


class _Vectors:
    """Embeddings of length 1 on disk, float32; read by blocks, as a memory map fills the memory."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.dimension = 0

    def write(self, numbers: Sequence[int], embeddings: Tensor) -> None:
        rows = np.ascontiguousarray(embeddings.float().cpu().numpy())
        self.dimension = rows.shape[1]
        for number, row in zip(numbers, rows, strict=True):
            self.file.seek(4 * self.dimension * number)
            self.file.write(row.data)

    def read(self, numbers: Sequence[int]) -> Tensor:
        found = np.empty((len(numbers), self.dimension), dtype=np.float32)
        for row, number in zip(found, numbers, strict=True):
            self.file.seek(4 * self.dimension * int(number))
            self.file.readinto(row.data)  # type: ignore[attr-defined]
        return torch.from_numpy(found)

    def blocks(self, count: int) -> Iterator[Block]:
        for start in range(0, count, _BLOCK_PASSAGES):
            found = np.empty((min(_BLOCK_PASSAGES, count - start), self.dimension), np.float32)
            self.file.seek(4 * self.dimension * start)
            self.file.readinto(found.data)  # type: ignore[attr-defined]
            yield torch.arange(start, start + len(found)), torch.from_numpy(found)


class _Passages:
    """Different passages on disk, by number: texts and embeddings."""

    def __init__(self, texts: IO[bytes], vectors: IO[bytes], encode: Encoder) -> None:
        self.texts = texts
        self.vectors = _Vectors(vectors)
        self.encode = encode
        self.ends = array("q", [0])
        self.numbers: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def add(self, text: str) -> None:
        key = _key(text)
        if key not in self.numbers:
            self.numbers[key] = len(self.numbers)
            self.ends.append(self.ends[-1] + self.texts.write(text.encode()))

    def read(self, number: int) -> str:
        start = self.ends[number]
        self.texts.seek(start)
        return self.texts.read(self.ends[number + 1] - start).decode()

    def encode_all(self) -> None:
        with bar(label="Encoding passages", total=len(self), unit="passage") as progress:
            for start in range(0, len(self), _BLOCK_TEXTS):
                numbers = range(start, min(start + _BLOCK_TEXTS, len(self)))
                texts = [self.read(number) for number in numbers]
                self.vectors.write(numbers, normalize(self.encode(texts), dim=-1))
                progress.update(len(texts))

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings [n, D]: those that are there, and of other texts new ones."""
        numbers = [self.numbers.get(_key(text), -1) for text in texts]
        there = [row for row, number in enumerate(numbers) if number >= 0]
        other = [row for row, number in enumerate(numbers) if number < 0]
        found = torch.empty(len(texts), self.vectors.dimension)
        found[there] = self.vectors.read([numbers[row] for row in there])
        if other:
            found[other] = normalize(self.encode([texts[row] for row in other]), dim=-1).float()
        return found


class _Guide:
    """Another model's embeddings, of the candidates alone, kept once they are there."""

    def __init__(
        self, encode_queries: Encoder, encode: Encoder, passages: _Passages, vectors: IO[bytes]
    ) -> None:
        self.encode_queries = encode_queries
        self.encode = encode
        self.passages = passages
        self.vectors = _Vectors(vectors)
        self.done = np.zeros(len(passages), dtype=bool)

    def prepare(self, numbers: np.ndarray) -> None:
        missing = np.unique(numbers[~self.done[numbers]])
        for start in range(0, len(missing), _BLOCK_TEXTS):
            part = missing[start : start + _BLOCK_TEXTS].tolist()
            texts = [self.passages.read(number) for number in part]
            self.vectors.write(part, normalize(self.encode(texts), dim=-1))
        self.done[missing] = True

    def allows(
        self, queries: Tensor, positives: Tensor, candidates: Tensor, wanted: Tensor
    ) -> Tensor:
        """Return which wanted candidates [R, W] are farther from the query than the positive."""
        allowed = wanted.clone()
        self.prepare(candidates[wanted].numpy())
        limits = (queries * positives).sum(-1)
        for start in range(0, len(queries), _BLOCK_GUIDED):
            rows, places = wanted[start : start + _BLOCK_GUIDED].nonzero(as_tuple=True)
            if not len(rows):
                continue
            rows += start
            numbers, column = candidates[rows, places].unique(return_inverse=True)
            vectors = self.vectors.read(numbers.tolist())
            scores = (queries[rows] * vectors[column]).sum(-1)
            allowed[rows, places] = scores < limits[rows]
        return allowed


@dataclass(frozen=True)
class _Mined:
    """A row: its texts, and negatives as (number, cosine); fewer than wanted if it is left out."""

    query: str
    positive: str
    score: float
    negatives: list[tuple[int, float]]
    filled: bool


class _Miner:
    """Finds the negatives of a block of rows."""

    def __init__(
        self,
        encode_queries: Encoder,
        passages: _Passages,
        judged: np.ndarray,
        options: MiningOptions,
        guide: _Guide | None,
    ) -> None:
        self.encode_queries = encode_queries
        self.passages = passages
        self.judged = judged
        self.options = options
        self.guide = guide
        self.draw = np.random.default_rng(options.seed)

    def mine(self, rows: Sequence[tuple[str, str]]) -> Iterator[_Mined | None]:
        """Yield what is found for each row; None where too few negatives are."""
        o = self.options
        distinct = list(dict.fromkeys(query for query, _ in rows))
        place = {query: row for row, query in enumerate(distinct)}
        of_row = torch.tensor([place[query] for query, _ in rows])
        queries = normalize(self.encode_queries(distinct), dim=-1).float()
        exclude = self._find_own(distinct)
        blocks = self.passages.vectors.blocks(len(self.passages))
        scores, numbers = find_nearest(queries, blocks, o.rank_max, exclude)
        scores, numbers = (x[of_row, o.rank_min - 1 :] for x in (scores, numbers))
        own = self.passages.embed([passage for _, passage in rows])
        positive = (queries[of_row] * own).sum(-1)
        limit = torch.minimum(positive - o.margin, positive - o.relative_margin * positive.abs())
        guided = self._guide_rows(distinct, of_row, rows)
        wanted = guided(numbers, (scores <= limit[:, None]) & scores.isfinite())
        order = (~wanted).to(torch.int8).argsort(dim=1, stable=True)[:, : o.num_negatives]
        found = [
            [(number, score) for number, score, allowed in zip(*row, strict=True) if allowed]
            for row in zip(
                *(x.gather(1, order).tolist() for x in (numbers, scores, wanted)), strict=True
            )
        ]
        short = [i for i, row in enumerate(found) if len(row) < o.num_negatives]
        if short and o.short_rows == "random":
            self._fill(found, short, queries[of_row], limit, of_row, exclude, guided)
        filled = set(short)
        for i, ((query, passage), negatives) in enumerate(zip(rows, found, strict=True)):
            row = _Mined(query, passage, float(positive[i]), negatives, i in filled)
            yield row if len(negatives) == o.num_negatives else None

    def _find_own(self, queries: Sequence[str]) -> Tensor:
        """Return (row of the query, number) of all positives of each query, and of itself."""
        found: list[tuple[int, int]] = []
        for row, query in enumerate(queries):
            key = _key(query)
            first = np.searchsorted(self.judged[:, 0], key)
            last = np.searchsorted(self.judged[:, 0], key, "right")
            for other in (key, *self.judged[first:last, 1].tolist()):
                number = self.passages.numbers.get(other)
                if number is not None:
                    found.append((row, number))
        return torch.tensor(sorted(set(found)), dtype=torch.long).reshape(-1, 2)

    def _guide_rows(
        self, distinct: Sequence[str], of_row: Tensor, rows: Sequence[tuple[str, str]]
    ) -> Callable[..., Tensor]:
        """Return what keeps those of the wanted candidates [R, W] that the guide agrees on."""
        guide = self.guide
        if guide is None:
            return lambda _, wanted, chosen=None: wanted
        queries = normalize(guide.encode_queries(distinct), dim=-1).float()[of_row]
        texts = list(dict.fromkeys(passage for _, passage in rows))
        place = {text: row for row, text in enumerate(texts)}
        embeddings = normalize(guide.encode(texts), dim=-1).float()
        positives = embeddings[torch.tensor([place[passage] for _, passage in rows])]

        def keep(numbers: Tensor, wanted: Tensor, chosen: Tensor | None = None) -> Tensor:
            part = slice(None) if chosen is None else chosen
            return guide.allows(queries[part], positives[part], numbers, wanted)

        return keep

    def _fill(
        self,
        found: list[list[tuple[int, float]]],
        short: list[int],
        queries: Tensor,
        limit: Tensor,
        of_row: Tensor,
        exclude: Tensor,
        guided: Callable[..., Tensor],
    ) -> None:
        """Add passages drawn at random to the rows that have too few negatives."""
        count = min(_DRAWN, len(self.passages))
        drawn = np.sort(self.draw.choice(len(self.passages), count, replace=False))
        vectors = self.passages.vectors.read(drawn.tolist())
        own: dict[int, set[int]] = {}
        for query, number in exclude.tolist():
            own.setdefault(query, set()).add(number)
        for start in range(0, len(short), _BLOCK_GUIDED):
            rows = torch.tensor(short[start : start + _BLOCK_GUIDED])
            scores = queries[rows] @ vectors.T
            numbers = torch.from_numpy(drawn).expand(len(rows), -1)
            wanted = guided(numbers, scores <= limit[rows, None], rows)
            for row, score, allowed in zip(rows.tolist(), scores, wanted, strict=True):
                taken = own.get(int(of_row[row]), set()) | {number for number, _ in found[row]}
                for i in self.draw.permutation(count).tolist():
                    if len(found[row]) == self.options.num_negatives:
                        break
                    if allowed[i] and int(drawn[i]) not in taken:
                        found[row].append((int(drawn[i]), float(score[i])))


def _write_row(
    row: _Mined | None,
    write: Callable[[Sequence[str], Sequence[float]], None],
    passages: _Passages,
    result: MiningResult,
) -> None:
    if row is None:
        result.dropped += 1
        return
    scores = [score for _, score in row.negatives]
    texts = [passages.read(number) for number, _ in row.negatives]
    write([row.query, row.positive, *texts], [row.score, *scores])
    result.rows += 1
    result.filled += row.filled
    result.positive_score += row.score
    result.negative_score += sum(scores) / len(scores)


def _open_writer(
    file: IO[bytes], suffix: str, columns: Sequence[str]
) -> Callable[[Sequence[str], Sequence[float]], None]:
    """Return what writes texts and their scores; the scores' columns are none that train knows."""
    names = [*columns, *(f"score_{name}" for name in columns[1:])]

    def write_line(cells: Sequence[object]) -> None:
        line = io.StringIO()
        if suffix == ".jsonl":
            json.dump(dict(zip(names, cells, strict=True)), line, ensure_ascii=False)
            line.write("\n")
        else:
            csv.writer(line, lineterminator="\n").writerow(cells)
        file.write(line.getvalue().encode())

    if suffix == ".csv":
        write_line(names)
    return lambda texts, scores: write_line([*texts, *(round(score, 6) for score in scores)])
