"""`simcse-trainer mine`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcse_trainer.cli.models import (
    BaseModel,
    BatchSize,
    Device,
    Dtype,
    MaxSeqLength,
    PairColumns,
    Revision,
    TrustRemoteCode,
)

if TYPE_CHECKING:
    from simcse_trainer.inference.mining import MiningOptions, MiningResult

EXAMPLE = "simcse-trainer mine pairs.csv triplets.csv --model outputs/unsup_bert_base"


def mine(
    pairs: Annotated[
        Path, typer.Argument(help="A file of queries and relevant passages: sent0, sent1.")
    ],
    output: Annotated[
        Path, typer.Argument(help="x.csv or x.jsonl, which train takes; with scores beside.")
    ],
    model: Annotated[
        str, typer.Option(help="The model that looks for negatives: a folder or a name on the Hub.")
    ],
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Passages to take negatives from: a text a line, or the column of csv, tsv, json, "
            "jsonl or parquet. Default: the passages of the pairs."
        ),
    ] = None,
    columns: PairColumns = None,
    num_negatives: Annotated[
        int, typer.Option("--num_negatives", help="Hard negatives of a row.")
    ] = 1,
    rank_min: Annotated[
        int, typer.Option("--rank_min", help="First rank to take, from 1; positives have none.")
    ] = 1,
    rank_max: Annotated[int, typer.Option("--rank_max", help="Last rank to take.")] = 30,
    margin: Annotated[
        float, typer.Option(help="Leave out what scores above the positive's cosine minus this.")
    ] = 0.0,
    relative_margin: Annotated[
        float,
        typer.Option("--relative_margin", help="The same for a share of the positive's cosine."),
    ] = 0.05,
    guide_model: Annotated[
        str | None,
        typer.Option(
            "--guide_model",
            help="Another model: leave out what it finds as near to the query as the positive.",
        ),
    ] = None,
    short_rows: Annotated[
        str,
        typer.Option(
            "--short_rows",
            help="Rows with too few negatives: random fills them up with random passages, drop "
            "leaves them out.",
        ),
    ] = "random",
    seed: Annotated[int, typer.Option(help="Of random passages.")] = 42,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT.")] = False,
    max_seq_length: MaxSeqLength = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
    base_model: BaseModel = None,
    dtype: Dtype = None,
) -> None:
    """Find hard negatives for pairs: passages near a query that are no answer to it."""
    from simcse_trainer.cli.models import load_simcse, loading_options
    from simcse_trainer.inference.mining import MiningOptions, check_files, mine_hard_negatives

    options = MiningOptions(
        num_negatives, rank_min, rank_max, margin, relative_margin, short_rows, seed
    )
    _check_output(pairs, output, corpus, overwrite)
    chosen = loading_options(revision, trust_remote_code, base_model, dtype)
    chosen["max_seq_length"] = max_seq_length
    check_files(pairs, output, corpus, columns)
    encode: Any = partial(load_simcse(model, device, **chosen).encode, batch_size=batch_size)
    guide = None
    if guide_model is not None:
        other: Any = partial(load_simcse(guide_model, device).encode, batch_size=batch_size)
        guide = (other, other)
    result = mine_hard_negatives(
        pairs, output, encode, encode, corpus=corpus, columns=columns, options=options, guide=guide
    )
    typer.echo(_describe(result, output, options))


def _check_output(pairs: Path, output: Path, corpus: Path | None, overwrite: bool) -> None:
    from simcse_trainer.errors import InputError

    if output.exists():
        sources = [path for path in (pairs, corpus) if path is not None and path.exists()]
        if any(output.samefile(path) for path in sources):
            raise InputError(f"{output} is what is read; name another file for the result.")
        if not overwrite:
            raise InputError(f"{output} is there already; name another file, or pass --overwrite.")


def _describe(result: MiningResult, output: Path, options: MiningOptions) -> str:
    lines = [
        f"{output} has {result.rows} rows of {', '.join(result.columns)}, with negatives from "
        f"{result.passages} passages.",
        f"Mean cosine with the query: positives {result.positive_score:.3f}, negatives "
        f"{result.negative_score:.3f}.",
    ]
    fewer = f"had fewer than {options.num_negatives} in the ranks {options.rank_min} to "
    fewer += f"{options.rank_max} beyond the margin"
    if result.filled:
        lines.append(f"{result.filled} rows {fewer}: filled up with random passages.")
    if result.dropped:
        lines.append(f"{result.dropped} rows {fewer}: left out.")
    return "\n".join(lines)
