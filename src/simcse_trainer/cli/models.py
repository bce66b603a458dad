"""What the commands that use a trained model have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from simcse_trainer.errors import InputError
from simcse_trainer.model.choices import DTYPES
from simcse_trainer.model.progress import announce, is_watched

# Headings of --help.
LOADING, COMPUTING, CORPUS, TASKS = (
    "Loading the model",
    "Computing embeddings",
    "The corpus",
    "The evaluation data",
)

if TYPE_CHECKING:
    from simcse_trainer.data.lines import FileOptions
    from simcse_trainer.inference.simcse import SimCSE

Model: TypeAlias = Annotated[
    str, typer.Argument(help="The output_dir of a run, any model folder, or a name on the Hub.")
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Such as cpu or cuda:1. Default: the accelerator.",
        show_default=False,
        rich_help_panel=COMPUTING,
    ),
]
BatchSize: TypeAlias = Annotated[
    int,
    typer.Option(
        "--batch_size",
        min=1,
        help="Sentences per forward pass, at most.",
        rich_help_panel=COMPUTING,
    ),
]
TruncateDim: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--truncate_dim",
        min=1,
        help="Keep only the first dimensions of embeddings.",
        rich_help_panel=COMPUTING,
    ),
]
MaxSeqLength: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--max_seq_length",
        help="In tokens. Default: as the folder says.",
        rich_help_panel=COMPUTING,
    ),
]
Revision: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Of a model on the Hub: branch, tag or commit.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
TrustRemoteCode: TypeAlias = Annotated[
    str,
    typer.Option(
        "--trust_remote_code",
        help="true: run the code that comes with the model. Read it first, and pin --revision.",
        metavar="true|false",
        callback=lambda value: _read_flag(value),
        rich_help_panel=LOADING,
    ),
]
BaseModel: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--base_model",
        help="The base model of an adapter, where it is not where it was.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
Dtype: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Of the weights: float32, bfloat16 or float16. Default: as the folder says.",
        show_default=False,
        callback=lambda value: _read_dtype(value),
        rich_help_panel=LOADING,
    ),
]
AttnImplementation: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--attn_implementation",
        help="How padded batches compute attention, such as sdpa or eager. Default: as the folder "
        "says.",
        show_default=False,
        rich_help_panel=LOADING,
    ),
]
Corpus: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="The sentences: a text a line, or the column of csv, tsv, json, jsonl or parquet.",
        rich_help_panel=CORPUS,
    ),
]
Encoding: TypeAlias = Annotated[
    str | None, typer.Option(help="As training takes it, such as cp949.", show_default=False)
]
Delimiter: TypeAlias = Annotated[
    str | None, typer.Option(help="As training takes it: a character, or tab.", show_default=False)
]
ColumnNames: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--column_names",
        help="As training takes them, where there is no header line.",
        show_default=False,
    ),
]
TrainColumns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option("--columns", help="As training takes them: anchor, positive, hard negatives."),
]
DatasetSplit: TypeAlias = Annotated[
    str,
    typer.Option(
        "--dataset_split", help="Of a folder that save_to_disk has written, as training takes it."
    ),
]
DropInvalidRows: TypeAlias = Annotated[
    str,
    typer.Option(
        "--drop_invalid_rows",
        help="As training takes it.",
        metavar="true|false",
        callback=lambda value: _read_flag(value),
    ),
]
NliTriplets: TypeAlias = Annotated[
    str,
    typer.Option(
        "--nli_triplets",
        help="As training takes it.",
        metavar="true|false",
        callback=lambda value: _read_flag(value),
    ),
]
PairColumns: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--columns",
        help="Of pairs for retrieval: the column of queries, and that of relevant passages. "
        "Default: sent0, sent1, or query, passage, or the two that there are.",
        show_default=False,
    ),
]
PairCorpus: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        help="For pairs: further passages to find theirs among, a text a line, or the column of "
        "csv, tsv, json, jsonl or parquet."
    ),
]
IndexFolder: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--index",
        help="Instead of --corpus: the folder of --save_index.",
        rich_help_panel=CORPUS,
    ),
]
Split: TypeAlias = Annotated[
    str, typer.Option(help="Of the tasks that are named.", rich_help_panel=TASKS)
]
DataDir: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--data_dir",
        help="Folder of <task>/<split>.csv to use instead of the Hub's data sets.",
        rich_help_panel=TASKS,
    ),
]


def _read_flag(value: str) -> str:
    if value.lower() not in ("true", "false"):
        raise typer.BadParameter(f"expected true or false, got {value!r}.")
    return value.lower()


def _read_dtype(value: str | None) -> str | None:
    if value is not None and value not in DTYPES:
        raise typer.BadParameter(f"expected {', '.join(DTYPES)}, got {value!r}.")
    return value


def loading_options(
    revision: str | None,
    trust_remote_code: str,
    base_model: str | None = None,
    dtype: str | None = None,
    attn_implementation: str | None = None,
) -> dict[str, Any]:
    """Turn the commands' options into those of `SimCSEModel.from_pretrained`."""
    given = {"base_model": base_model, "dtype": dtype, "attn_implementation": attn_implementation}
    return {
        "revision": revision,
        "trust_remote_code": trust_remote_code == "true",
        **{name: value for name, value in given.items() if value is not None},
    }


def find_place(name: str) -> str | Path:
    """Find the model: of a run that was stopped, its best or newest checkpoint."""
    from simcse_trainer.hub.stage import find_model

    return find_model(Path(name)) if Path(name).is_dir() else name


def load_simcse(name: str, device: str | None, **options: Any) -> SimCSE:
    """Load the model; of a run that was stopped, that of its best or newest checkpoint."""
    from simcse_trainer.inference.simcse import SimCSE

    announce(f"Loading {name}")
    return SimCSE(find_place(name), device, **options)


def warn_of_servers(folder: Path) -> None:
    """Say which servers would read the folder just made wrongly, or refuse it."""
    from simcse_trainer.model.io.servers import list_server_warnings

    for warning in list_server_warnings(folder):
        typer.echo(f"warning: {warning}", err=True)


def load_with_index(
    name: str,
    corpus: str | None,
    index: Path | None,
    *,
    device: str | None,
    batch_size: int,
    truncate_dim: int | None = None,
    max_seq_length: int | None = None,
    storage: str = "float32",
    **options: Any,
) -> SimCSE:
    """Load the model with an index of a corpus, or with one that is saved.

    Raises:
        InputError: Neither is given, or both.
    """
    if (corpus is None) == (index is None):
        raise InputError("Pass either --corpus, a file of sentences, or --index, a saved one.")
    simcse = load_simcse(
        name, device, truncate_dim=truncate_dim, max_seq_length=max_seq_length, **options
    )
    if index is not None:
        simcse.load_index(index)
    elif corpus is not None:
        announce(f"Reading {corpus}")
        simcse.build_index(
            corpus, storage=storage, batch_size=batch_size, show_progress_bar=is_watched()
        )
    return simcse


def read_file_options(
    encoding: str | None, delimiter: str | None, column_names: list[str] | None
) -> FileOptions:
    """Check how training files are to be read, as training does.

    Raises:
        InputError: An encoding, a delimiter or names that cannot be.
    """
    from simcse_trainer.arguments import DataArguments

    return DataArguments(
        encoding=encoding, delimiter=delimiter, column_names=column_names or []
    ).file_options
