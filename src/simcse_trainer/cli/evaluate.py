"""`simcse-trainer evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

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
from simcse_trainer.model.progress import announce

if TYPE_CHECKING:
    from simcse_trainer.evaluation.suite import Suite

EXAMPLE = "simcse-trainer evaluate outputs/unsup_bert_base --tasks stsb sickr --output results.json"


Tasks: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        help="sts12 ... sts16, stsb, sickr, korsts; mr, cr, subj, mpqa, sst2, trec, mrpc; "
        "folders of --data_dir; files of sentence1, sentence2, score. For retrieval: files of "
        "queries and relevant passages, and folders as BEIR's. Default: the seven STS tasks of the "
        "paper, or all of --data_dir.",
        show_default=False,
        rich_help_panel=TASKS,
    ),
]
MtebTasks: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--mteb",
        help="Tasks or benchmarks of the package mteb, as it calls them, such as STS12 or SciFact; "
        "it takes their data from the Hub. Without --tasks and --data_dir nothing else is "
        "evaluated.",
        show_default=False,
        rich_help_panel=TASKS,
    ),
]
PoolingModes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--pooling_mode",
        help="Read the backbone by these, without a head, a row each: cls, mean, max, lasttoken, "
        "weightedmean, avg_top2, avg_first_last. Default: as the folder says.",
        show_default=False,
    ),
]


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="The output_dir of a run, a folder or a name on the Hub, trained or plain."
        ),
    ],
    tasks: Tasks = None,
    split: Split = "test",
    data_dir: DataDir = None,
    columns: PairColumns = None,
    corpus: PairCorpus = None,
    mteb: MtebTasks = None,
    output: Annotated[
        Path | None, typer.Option(help="Also write the results here, as JSON.")
    ] = None,
    pooling_mode: PoolingModes = None,
    whitening: Annotated[
        bool, typer.Option("--whitening", help="Also a row after whitening on each task's texts.")
    ] = False,
    whitening_file: Annotated[
        Path | None,
        typer.Option("--whitening_file", help="Also a row after whitening on these texts."),
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
    """Print a model's scores: STS and transfer beside the paper's, retrieval, space, MTEB."""
    from simcse_trainer.cli.models import find_place, loading_options
    from simcse_trainer.evaluation.encoders import evaluate_model, write_results
    from simcse_trainer.evaluation.mteb_tasks import load_mteb_tasks
    from simcse_trainer.evaluation.published import format_tables
    from simcse_trainer.evaluation.suite import default_tasks, load_suite

    folder = None if data_dir is None else str(data_dir)
    announce("Reading the evaluation data")
    asked = load_mteb_tasks(mteb) if mteb else {}
    alone = mteb and folder is None
    suite = load_suite(
        tasks or ([] if alone else default_tasks(split, folder)),
        split=split,
        data_dir=folder,
        columns=columns or (),
        corpus=corpus,
    )
    suite.mteb.update(asked)
    announce(f"Loading {model}")
    rows = list(
        evaluate_model(
            str(find_place(model)),
            suite,
            pooling_modes=pooling_mode or (),
            whitening=whitening,
            whitening_file=whitening_file,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            device=device,
            **loading_options(revision, trust_remote_code, base_model, dtype, attn_implementation),
        )
    )
    typer.echo(f"{model}: {_count(suite)}\n")
    typer.echo(format_tables({row.label: row.results for row in rows}, rows[0].backbone))
    if output is not None:
        write_results(output, model, split, suite, rows)
        typer.echo(f"\nWritten to {output}.")


def _count(suite: Suite) -> str:
    from simcse_trainer.evaluation.encoders import count_sentences

    count = count_sentences(suite)
    said = [f"{count['all']} sentences, {count['different']} different"] if count["all"] else []
    for name, data in suite.retrieval.items():
        said.append(f"{name}: {len(data.queries)} queries, {data.passages} passages")
    if suite.mteb:
        said.append(f"MTEB: {', '.join(suite.mteb)}")
    return "; ".join(said)
