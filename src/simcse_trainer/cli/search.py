"""`simcse-trainer search`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcse_trainer.cli.models import (
    CORPUS,
    AttnImplementation,
    BaseModel,
    BatchSize,
    Corpus,
    Device,
    Dtype,
    IndexFolder,
    MaxSeqLength,
    Model,
    Revision,
    TruncateDim,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from simcse_trainer.inference.simcse import Hits

EXAMPLE = 'simcse-trainer search outputs/quickstart --corpus sentences.txt "where is my parcel?"'

# Queries of standard input that are searched at a time, where nobody waits for each.
_BLOCK_QUERIES = 256


def search(
    model: Model,
    queries: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[QUERY]...",
            help="Default: standard input, a query a line.",
            show_default=False,
        ),
    ] = None,
    corpus: Corpus = None,
    index: IndexFolder = None,
    top_k: Annotated[int, typer.Option("--top_k", min=1, help="Hits of a query, at most.")] = 5,
    threshold: Annotated[float, typer.Option(help="The smallest cosine of a hit.")] = 0.6,
    storage: Annotated[
        str,
        typer.Option(
            help="Of the index: float32, int8 or binary, 4, 1 or 1/8 bytes a number.",
            rich_help_panel=CORPUS,
        ),
    ] = "float32",
    save_index: Annotated[
        Path | None,
        typer.Option("--save_index", help="Keep the index in this folder.", rich_help_panel=CORPUS),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="An object a line: query, results of sentence, score.")
    ] = False,
    truncate_dim: TruncateDim = None,
    max_seq_length: MaxSeqLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
    base_model: BaseModel = None,
    dtype: Dtype = None,
    attn_implementation: AttnImplementation = None,
) -> None:
    """Find the sentences of a corpus that are nearest in meaning to each query."""
    from simcse_trainer.cli.models import load_with_index, loading_options

    simcse = load_with_index(
        model,
        corpus,
        index,
        device=device,
        batch_size=batch_size,
        truncate_dim=truncate_dim,
        max_seq_length=max_seq_length,
        storage=storage,
        **loading_options(revision, trust_remote_code, base_model, dtype, attn_implementation),
    )
    if save_index is not None:
        simcse.save_index(save_index)
    show = _show_json if as_json else _show
    for block in _blocks(queries):
        # All of them, so that the nearest can be shown where none reaches the threshold.
        found: Any = simcse.search(block, top_k=top_k, threshold=-math.inf)
        for query, nearest in zip(block, found, strict=True):
            hits = [hit for hit in nearest if hit[1] >= threshold]
            typer.echo(show(query, hits, threshold, nearest[:1]))


def _blocks(queries: Iterable[str] | None) -> Iterator[list[str]]:
    from simcse_trainer.data.texts import STANDARD_INPUT, read_texts

    lines = iter(queries or read_texts(STANDARD_INPUT))
    size = 1 if sys.stdin.isatty() else _BLOCK_QUERIES
    while block := list(islice(lines, size)):
        yield block


def _show(query: str, hits: Hits, threshold: float, nearest: Hits) -> str:
    lines = [_line(hit) for hit in hits]
    if not hits:
        lines = [f"  nothing at {threshold} or above"]
        lines += [f"  the nearest: {_line(hit).strip()}" for hit in nearest]
    return "\n".join([query, *lines]) + "\n"


def _line(hit: tuple[str, float]) -> str:
    sentence, score = hit
    return f"  {score:.2f}  {' '.join(sentence.split())}"


def _show_json(query: str, hits: Hits, _: float, nearest: Hits) -> str:
    found: dict[str, Any] = {"query": query, "results": _as_json(hits)}
    if not hits:
        found["nearest"] = _as_json(nearest)
    # Where the output is another encoding, JSON has escapes of its own.
    readable = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(found, ensure_ascii=not readable)


def _as_json(hits: Hits) -> list[dict[str, Any]]:
    return [{"sentence": sentence, "score": round(score, 6)} for sentence, score in hits]
