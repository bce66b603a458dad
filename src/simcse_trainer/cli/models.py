"""What the commands that use a trained model have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

if TYPE_CHECKING:
    from simcse_trainer.inference.simcse import SimCSE

Model: TypeAlias = Annotated[
    str, typer.Argument(help="The output_dir of a run, any model folder, or a name on the Hub.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(help="Such as cpu or cuda:1. Default: the accelerator.", show_default=False),
]
BatchSize: TypeAlias = Annotated[
    int, typer.Option("--batch_size", min=1, help="Sentences per forward pass, at most.")
]
TruncateDim: TypeAlias = Annotated[
    int | None,
    typer.Option("--truncate_dim", min=1, help="Keep only the first dimensions of embeddings."),
]
MaxSeqLength: TypeAlias = Annotated[
    int | None,
    typer.Option("--max_seq_length", help="In tokens. Default: as the folder says."),
]
Corpus: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The sentences: a text a line, or the column of csv, tsv, json, jsonl or parquet."
    ),
]


def load_simcse(name: str, device: str | None, **options: Any) -> SimCSE:
    """The model; of a run that was stopped, that of its best or newest checkpoint."""
    from simcse_trainer.hub.snapshot import find_model
    from simcse_trainer.inference.simcse import SimCSE

    place = find_model(Path(name)) if Path(name).is_dir() else name
    return SimCSE(place, device, **options)
