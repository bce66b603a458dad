"""`simcse-trainer report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcse_trainer.cli.models import (
    TASKS,
    AttnImplementation,
    BaseModel,
    BatchSize,
    DataDir,
    Device,
    Dtype,
    MaxSeqLength,
    PairColumns,
    PairCorpus,
    Revision,
    Split,
    TrustRemoteCode,
)
from simcse_trainer.model.progress import announce, is_watched

if TYPE_CHECKING:
    from simcse_trainer.analysis.report import Measured
    from simcse_trainer.model.modeling import SimCSEModel

EXAMPLE = (
    "simcse-trainer report outputs/unsup_bert_base --baseline bert-base-uncased "
    "--baseline_pooling_mode cls"
)


def report(
    model: Annotated[
        str, typer.Argument(help="The output_dir of a run, any model folder, or a name on the Hub.")
    ],
    baseline: Annotated[
        str | None, typer.Option(help="What to compare it with, such as its backbone.")
    ] = None,
    baseline_pooling_mode: Annotated[
        str | None,
        typer.Option(
            "--baseline_pooling_mode", help="How to read the baseline. Default: as it says, or cls."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The folder for the page and the figures.")] = Path(
        "report"
    ),
    tasks: Annotated[
        list[str],
        typer.Option(
            help="Tasks' names, or files: scored pairs, or pairs of queries and passages; or "
            "folders as BEIR's. Several are put together.",
            rich_help_panel=TASKS,
        ),
    ] = ["stsb"],  # noqa: B006 - typer copies it
    split: Split = "test",
    data_dir: DataDir = None,
    columns: PairColumns = None,
    corpus: PairCorpus = None,
    run: Annotated[
        Path | None,
        typer.Option(
            help="The output_dir of the training run whose path is drawn. Default: MODEL."
        ),
    ] = None,
    max_seq_length: MaxSeqLength = None,
    batch_size: BatchSize = 128,
    device: Device = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = "false",
    base_model: BaseModel = None,
    dtype: Dtype = None,
    attn_implementation: AttnImplementation = None,
) -> None:
    """Show a model's scores and how its embeddings are spread: an HTML page, figures as PNG."""
    from simcse_trainer.analysis.figures import require_matplotlib
    from simcse_trainer.analysis.report import write_report
    from simcse_trainer.cli.models import loading_options

    require_matplotlib()
    announce("Reading the evaluation data")
    path = _read_path(run, model)
    loaded = _load_tasks(tasks, split, data_dir, columns, corpus)
    options = loading_options(revision, trust_remote_code, base_model, dtype, attn_implementation)
    options["device"] = device
    read = _load(model, None, max_seq_length=max_seq_length, **options)
    length, other = read.max_seq_length, None
    if baseline:
        options["revision"] = None
        compared = _load(baseline, baseline_pooling_mode, **options)
        # Of one length, or a difference of the two would be one of what they have seen.
        length = min(length, _most(compared))
        compared.max_seq_length = length
        other = _measure(baseline, compared, loaded, batch_size)
        del compared
    read.max_seq_length = length
    measured = _measure(model, read, loaded, batch_size)
    announce("Drawing")
    page = write_report(
        output,
        measured,
        other,
        data=", ".join(
            _show(task) + ("" if Path(task).is_file() else f" ({split})") for task in tasks
        ),
        tasks=loaded,
        path=path,
    )
    typer.echo(f"The report is {page}; its figures are beside it.")


def _load_tasks(
    tasks: list[str],
    split: str,
    data_dir: Path | None,
    columns: list[str] | None,
    corpus: Path | None,
) -> dict[str, Any]:
    from simcse_trainer.errors import InputError
    from simcse_trainer.evaluation.suite import load_suite

    suite = load_suite(
        tasks,
        split=split,
        data_dir=None if data_dir is None else str(data_dir),
        columns=columns or (),
        corpus=corpus,
    )
    if suite.transfer:
        raise InputError(
            f"The report is of scored pairs and of retrieval; {', '.join(suite.transfer)} has "
            "labels. Leave it out of --tasks, or use `simcse-trainer evaluate`."
        )
    return suite.sts | suite.retrieval


def _load(
    name: str, pooling_mode: str | None, *, device: str | None, **options: Any
) -> SimCSEModel:
    import torch

    from simcse_trainer.cli.models import find_place
    from simcse_trainer.model.encoding import check_device
    from simcse_trainer.model.modeling import SimCSEModel

    announce(f"Loading {name}")
    model = SimCSEModel.from_pretrained(find_place(name), pooling_mode=pooling_mode, **options)
    model.to(check_device(device or torch.accelerator.current_accelerator() or "cpu"))
    return model


def _most(model: SimCSEModel) -> int:
    """Return the longest text that a backbone can take, in tokens, whatever its folder says."""
    from simcse_trainer.model.io.loading import choose_max_length

    tokenizer: Any = model.tokenizer
    return choose_max_length(None, None, model.backbone, tokenizer)


def _measure(name: str, model: SimCSEModel, tasks: Any, batch_size: int) -> Measured:
    from simcse_trainer.analysis.report import Measured
    from simcse_trainer.analysis.space import measure_space

    space = measure_space(model, tasks, batch_size=batch_size, show_progress_bar=is_watched())
    return Measured(_show(name), model.pooling_mode, space)


def _show(name: str) -> str:
    """Shorten a path: an absolute one is of one machine."""
    return Path(name).name if Path(name).is_absolute() else name


def _read_path(run: Path | None, model: str) -> list[Any]:
    from simcse_trainer.analysis.figures import read_path
    from simcse_trainer.errors import InputError
    from simcse_trainer.hub.stage import read_state
    from simcse_trainer.model.io.checkpoints import find_checkpoint

    folder = run or Path(model)
    if not folder.is_dir():
        if run is not None:
            raise InputError(f"There is no folder {run}; pass the output_dir of a training run.")
        return []
    checkpoint = find_checkpoint(folder)
    state = read_state(folder) or (read_state(checkpoint) if checkpoint else {})
    path = read_path(state.get("log_history", []))
    if run is not None and not path:
        raise InputError(
            f"{run} has no trainer_state.json with eval_alignment and eval_uniformity. Pass the "
            "output_dir of a run with scored pairs as --eval_tasks, or leave out --run."
        )
    return path
