"""Files and Hub data sets to a data set with canonical text columns."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

from huggingface_hub import hf_hub_download

from simcse_trainer.data import foreign, nli, readers, schema
from simcse_trainer.data.delimited import is_table
from simcse_trainer.data.kinds import (
    holds_text,
    looks_like_a_row,
    name_columns,
    suggest_columns,
)
from simcse_trainer.data.lines import FileOptions, file_format
from simcse_trainer.data.lists import ExampleCheck, TextColumns
from simcse_trainer.data.schema import ANCHOR
from simcse_trainer.errors import InputError
from simcse_trainer.model.io.tensors import hash_file
from simcse_trainer.version import __version__

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset


logger = logging.getLogger(__name__)

_IN_TRAINING = FileOptions(in_training=True)

# Path, SHA-256 of the content, and our version: with any of them the rows may change.
_File = tuple[str, str, str]


def load_training_data(
    train_file: Sequence[str] = (),
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    columns: Sequence[str] | None = None,
    file_options: FileOptions = _IN_TRAINING,
    nli_triplets: bool = False,
    drop_invalid_rows: bool = False,
    streaming: bool = False,
    cache_dir: str | None = None,
) -> Dataset | IterableDataset:
    """Load files, or a data set of the Hub, as canonical text columns.

    Args:
        train_file: Files and globs: txt, csv, tsv, json, jsonl, parquet, also compressed.
        dataset_name: Name on the Hub, or folder, for `datasets.load_dataset`; together with
            `train_file` the repository that these files are in.
        dataset_config_name: Name of the data set's subset.
        dataset_split: Its split, slices such as `train[:1000]` included.
        columns: Text columns by position: anchor, positive, hard negatives; with
            `nli_triplets` premise, hypothesis, label.
        file_options: Encoding, delimiter and names of the columns, where files do not tell.
        nli_triplets: Build triplets, see `build_triplets`.
        drop_invalid_rows: Leave out rows that cannot be used, and log how many.
        streaming: Read while training. Each file is a shard; bad rows show at their turn.
        cache_dir: Where datasets keeps its Arrow files.

    Returns:
        String columns `sent0[, sent1[, hard_neg...]]`.

    Raises:
        InputError: Options that clash, files that cannot be read, rows that cannot be used.
    """
    _check_options(train_file, dataset_name, nli_triplets, streaming)
    folder = _find_saved(train_file, dataset_name)
    if folder is not None:
        train_file, dataset_name = (), folder
    if dataset_name and train_file:
        train_file, dataset_name = download_files(dataset_name, train_file), None
    if not dataset_name:
        files = readers.expand_files(train_file)
        if streaming:
            return _stream_files(files, file_options, columns, drop_invalid_rows)
        return _load_files(files, file_options, columns, nli_triplets, drop_invalid_rows, cache_dir)
    options = {"split": dataset_split, "streaming": streaming, "cache_dir": cache_dir}
    if folder is not None:
        dataset = _load_saved(Path(folder), dataset_split, streaming)
    else:
        dataset = load_hub_dataset(dataset_name, dataset_config_name, **options)
    if nli_triplets:
        return _convert_to_triplets(dataset, columns, drop_invalid_rows, cache_dir, dataset_name)
    return prepare_dataset(
        dataset, columns=columns, drop_invalid_rows=drop_invalid_rows, source=dataset_name
    )


def _find_saved(train_file: Sequence[str], dataset_name: str | None) -> str | None:
    """Return the folder that `save_to_disk` has written, if one is named."""
    names = [train_file] if isinstance(train_file, str) else list(train_file)
    named = [name for name in [*names, dataset_name] if name]
    if len(named) != 1:
        return None
    folder = Path(named[0]).expanduser()
    saved = any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))
    return str(folder) if saved else None


def _load_saved(folder: Path, split: str, streaming: bool) -> Any:
    from datasets import load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # of datasets, pyarrow and json
        raise _explain(str(folder), "the folder could not be loaded", error) from error
    if isinstance(data, dict):
        if split not in data:
            raise InputError(
                f"{folder} has no split '{split}'; found {schema.quote_names(data)}. Pass "
                f"--dataset_split {next(iter(data), split)}"
            )
        data = data[split]
    return data.to_iterable_dataset() if streaming else data


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    *,
    columns: Sequence[str] | None = None,
    drop_invalid_rows: bool = False,
    source: str = "train_dataset",
) -> Dataset | IterableDataset:
    """Keep the text columns of any data set, under their canonical names, and check them.

    Args:
        dataset: Text columns, and others, which are left out.
        columns: The text columns by position, see `resolve_text_columns`.
        drop_invalid_rows: Leave out rows that cannot be used, and log how many.
        source: Name of the data set in errors, where rows are counted from 1.

    Raises:
        InputError: See `load_training_data`; for bad rows of an `IterableDataset` on iteration.
    """
    import datasets

    if isinstance(dataset, dict):
        raise InputError(
            f"{source} has the splits {schema.quote_names(dataset)}; pass one of them."
        )
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise InputError(f"{source} is {schema.describe(dataset)}, expected a datasets.Dataset.")
    check_format(dataset, source=source)
    if isinstance(dataset, datasets.Dataset) and any(
        isinstance(feature, dict) for feature in dataset.features.values()
    ):
        dataset = dataset.flatten()
    first = readers.sample_dataset(dataset)
    names = dataset.column_names or list(next(iter(first), {}))
    mapping = schema.resolve_text_columns(names, columns, source=source, rows=first)
    foreign.warn_of_judgement(source, names, first, list(mapping.values()))
    found = TextColumns.find(mapping, first)
    _check_types(dataset.features or {}, found, source)
    features = found.features()
    if isinstance(dataset, datasets.IterableDataset):
        check = ExampleCheck(found, drop_invalid_rows, source)
        options: dict[str, Any] = {"with_indices": True, "batched": True, "batch_size": 1}
        return dataset.map(check, remove_columns=names, features=features, **options)
    dataset = dataset.with_format(None).select_columns(list(found.names.values()))
    rows = (row for batch in dataset.with_format("arrow").iter(1000) for row in batch.to_pylist())
    problems = {
        index: f"{source} row {index + 1}: {problem}"
        for index, row in enumerate(rows)
        if (problem := found.read(row)[1])
    }
    given = dataset.rename_columns({name: role for role, name in found.names.items()})
    if given.features.keys() == features.keys() and _are_plain(given.features):
        dataset = given if given.features == features else given.cast(features)
    else:
        dataset = dataset.map(
            found.read_texts, remove_columns=dataset.column_names, features=features
        )
    return schema.drop_or_raise_invalid_rows(
        dataset, problems, drop=drop_invalid_rows, source=source
    )


def check_format(dataset: Any, *, source: str) -> None:
    """Raise InputError for a data set that makes other rows of what it holds when it is read."""
    if (getattr(dataset, "format", None) or {}).get("type") == "custom":
        raise InputError(
            f"{source} has a transform (with_transform or set_transform), but rows are checked and "
            "tokenized as they are stored, without it. Apply it first: "
            "dataset.with_format(None).map(transform, batched=True)."
        )


def _check_types(features: Mapping[str, Any], columns: TextColumns, source: str) -> None:
    import datasets

    for role, name in columns.names.items():
        feature = features.get(name)
        is_list = isinstance(feature, list | datasets.List | datasets.LargeList)
        if is_list and (role != ANCHOR or isinstance(getattr(feature, "feature", None), dict)):
            continue  # of texts or of turns of a chat, which the rows tell
        dtype = getattr(feature, "dtype", None) or type(feature).__name__
        if feature is not None and dtype not in ("string", "large_string", "null"):
            raise InputError(
                f"{source}: column {name!r} holds {dtype}, expected text. Found "
                f"{schema.quote_names(features)}; name the text columns with --columns."
            )


def _are_plain(features: Mapping[str, Any]) -> bool:
    """Return whether no column has chats: columns of texts and of lists can be cast."""
    kinds = [getattr(feature, "feature", feature) for feature in features.values()]
    return all(hasattr(kind, "dtype") and kind.dtype is not None for kind in kinds)


def _check_options(
    train_file: Sequence[str], dataset_name: str | None, nli_triplets: bool, streaming: bool
) -> None:
    if not train_file and not dataset_name:
        raise InputError("Nothing to train on. Pass --train_file or --dataset_name.")
    if nli_triplets and streaming:
        raise InputError(
            "--nli_triplets groups all rows by premise and cannot stream. Pass --streaming false."
        )


def _load_files(
    files: list[Path],
    options: FileOptions,
    columns: Sequence[str] | None,
    nli_triplets: bool,
    drop: bool,
    cache_dir: str | None,
) -> Dataset:
    source = f"{files[0]} and {len(files) - 1} more" if len(files) > 1 else str(files[0])
    keys = [_identify(file) for file in files]
    if nli_triplets:
        names = _common_columns(files, options, columns or nli.NLI_COLUMNS)
        mapping = nli.resolve_nli_columns(names, columns, source=str(files[0]))
        # A tuple: the files of a list are shards, and each would be grouped by itself.
        given = {"files": tuple(keys), "columns": mapping, "options": options}
        built = _build(nli.file_triplets, nli.TRIPLETS, cache_dir, **given)
        return schema.drop_or_raise_invalid_rows(
            *built, needs=nli.NLI_NEEDS, drop=drop, source=source
        )
    found = _resolve_files(files, options, columns)
    given = {"files": keys, "columns": found, "options": options}
    built = _build(_generate_rows, found, cache_dir, **given)
    return schema.drop_or_raise_invalid_rows(*built, drop=drop, source=source)


def _convert_to_triplets(
    dataset: Dataset, columns: Sequence[str] | None, drop: bool, cache_dir: str | None, source: str
) -> Dataset:
    check_format(dataset, source=source)
    mapping = nli.resolve_nli_columns(dataset.column_names, columns, source=source)
    options = {"dataset": dataset, "columns": mapping, "source": source}
    built = _build(nli.dataset_triplets, nli.TRIPLETS, cache_dir, **options)
    return schema.drop_or_raise_invalid_rows(*built, needs=nli.NLI_NEEDS, drop=drop, source=source)


def _stream_files(
    files: list[Path], options: FileOptions, columns: Sequence[str] | None, drop: bool
) -> IterableDataset:
    from datasets import IterableDataset

    found = _resolve_files(files, options, columns)
    for file in files if not drop else ():
        rows = [(row, row.problem or found.read(row.values)[1]) for row in
                readers.sample_rows(file, options)]  # fmt: skip
        if rows and all(problem for _, problem in rows):
            first, problem = rows[0]
            text = f"{file} row {first.number}: {problem}"
            raise schema.no_row_can_be_used(str(file), f"the first {len(rows)} rows", text)
    kwargs: dict[str, Any] = {"files": [str(file) for file in files], "columns": found}
    kwargs |= {"drop": drop, "options": options}
    return IterableDataset.from_generator(
        _stream_rows, features=found.features(), gen_kwargs=kwargs
    )


def _resolve_files(
    files: list[Path], options: FileOptions, columns: Sequence[str] | None
) -> TextColumns:
    names = _common_columns(files, options, columns)
    samples = {file: readers.sample_rows(file, options) for file in files}
    first = readers.sample_labelled(files[0], names, options)
    if not samples[files[0]]:
        raise InputError(f"{files[0]} has no rows. Add texts, or leave the file out.")
    for file, rows in samples.items():
        if file_format(file) == ".txt" and not options.delimiter:
            _refuse(foreign.describe_lines(file, [row.values for row in rows]))
    table = is_table(files[0], options) and not options.column_names
    if table and ANCHOR not in names and not set(columns or ()) & set(names):
        _check_header(files[0], names, first)
    if not columns and not {ANCHOR, "positive_messages"} & {*names}:
        _refuse(foreign.describe_chats(files[0], names, first))
        _refuse(foreign.describe_judged_pairs(files[0], names, first))
    mapping = schema.resolve_text_columns(
        names, columns, source=str(files[0]), rows=first, has_header=not table
    )
    foreign.warn_of_judgement(files[0], names, first, list(mapping.values()))
    _refuse(foreign.describe_groups(files[0], mapping[ANCHOR], first))
    if table:
        _refuse(foreign.describe_written_lists(files[0], list(mapping.values()), first))
    for file, rows in samples.items():
        if is_table(file, options):
            _check_cells(file, [row.values for row in rows], mapping, chosen=bool(columns))
    return TextColumns.find(mapping, (row.values for rows in samples.values() for row in rows))


def _refuse(problem: str | None) -> None:
    if problem is not None:
        raise InputError(problem)


def _check_header(file: Path, names: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    """Raise InputError where the first line of a table reads like a row."""
    if not looks_like_a_row(names):
        return
    given = name_columns([dict(zip(names, names, strict=True)), *rows], names)
    raise InputError(
        f"{file}: has this file no header? Its first line is {schema.quote_names(names)}. If so, "
        f"name its columns: --column_names {shlex.join(given)}; if these are the names, pass "
        f"--columns {shlex.join(suggest_columns(rows, names) or names[:1])}"
    )


def _check_cells(
    file: Path, rows: Sequence[Mapping[str, object]], mapping: Mapping[str, str], *, chosen: bool
) -> None:
    """Raise InputError for a column without texts; cells of a table have no types that tell."""
    name = schema.find_numeric_column(rows, mapping)
    what = "numbers"
    if name is None and not chosen and len(mapping) == 1:
        (only,) = mapping.values()
        cells = [row.get(only) for row in rows]
        name, what = (None if holds_text(cells) or not any(cells) else only), "numbers or ids"
    if name is None:
        return
    names = list(rows[0])
    found = suggest_columns(rows, names)
    raise InputError(
        f"{file}: column {name!r} holds only {what} in the first {len(rows)} rows, expected text. "
        + (
            f"Name the text columns with --columns, such as --columns {shlex.join(found)}"
            if found
            else "Add a column of texts."
        )
    )


def _common_columns(
    files: list[Path], options: FileOptions, wanted: Sequence[str] | None
) -> list[str]:
    """Return the first file's columns; the others must have them, or at least the wanted ones."""
    first, *others = [readers.column_names(file, options) for file in files]
    for file, names in zip(files[1:], others, strict=True):
        enough = wanted and set(wanted) <= {*first} & {*names}
        if set(names) != set(first) and not enough:
            raise InputError(
                f"{files[0]} has the columns {schema.quote_names(first)}, but {file} has "
                f"{schema.quote_names(names)}. Make them the same, or pass --columns with names "
                "that all files have."
            )
    return first


def _identify(file: Path) -> _File:
    # Not by size and time: an archive, or another project, may hold other rows of the same ones.
    return str(file), hash_file(file), __version__


def _check_rows(
    path: str, columns: TextColumns, options: FileOptions
) -> Iterator[tuple[dict[str, Any], str | None]]:
    """Check each row, under canonical names, and note what is wrong with it."""
    row = None
    for row in readers.read_rows(Path(path), options):
        texts, problem = columns.read(row.values)
        problem = row.problem or problem
        yield texts, f"{path} row {row.number}: {problem}" if problem else None
    if row is None:
        raise InputError(f"{path} has no rows. Add texts, or leave the file out.")


def _generate_rows(
    files: list[_File], columns: TextColumns, options: FileOptions
) -> Iterator[dict[str, Any]]:
    for path, *_ in files:
        for texts, problem in _check_rows(path, columns, options):
            yield {**texts, schema.PROBLEM: problem}


def _stream_rows(
    files: list[str], columns: TextColumns, drop: bool, options: FileOptions
) -> Iterator[dict[str, Any]]:
    for path in files:
        count, problems = 0, 0
        first = ""
        for texts, problem in _check_rows(path, columns, options):
            count += 1
            if problem is None:
                yield texts
            elif drop:
                problems, first = problems + 1, first or problem
            else:
                needs = schema.count_texts(columns.roles)
                raise InputError(f"{problem}. {schema.suggest_fix(needs, 'such rows')}")
        if problems:
            logger.warning(schema.DROPPED, path, problems, count - problems, first)
        if problems == count:
            raise InputError(f"{path}: no row is left without {count} bad ones; {first}.")


def _build(
    generator: Callable[..., Iterator[dict[str, Any]]],
    made: TextColumns,
    cache_dir: str | None,
    **gen_kwargs: object,
) -> tuple[Dataset, dict[int, str]]:
    """Write what the generator yields to the Arrow cache, or find it there; apart the problems."""
    from datasets import Dataset
    from datasets.exceptions import DatasetGenerationError

    features = made.features(schema.PROBLEM)
    try:
        dataset = Dataset.from_generator(
            generator, features=features, gen_kwargs=gen_kwargs, cache_dir=cache_dir
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, InputError | OSError):
            raise error.__cause__ from None
        raise
    column = dataset.data.column(schema.PROBLEM)
    found = column.is_valid().to_numpy().nonzero()[0].tolist()
    return dataset.remove_columns(schema.PROBLEM), {index: column[index].as_py() for index in found}


_REMEDIES = {
    "split": "Pass another --dataset_split.",
    "config": "Pass another --dataset_config_name.",
    "offline": "Unset HF_HUB_OFFLINE and HF_DATASETS_OFFLINE, or pass files with --train_file.",
    "reach": "Check the connection, or pass files with --train_file.",
    "connection": "Check the connection, or pass local files with --train_file alone.",
}


def load_hub_dataset(name: str, config: str | None, **options: Any) -> Any:
    """Call `datasets.load_dataset`, with its failures in one line.

    Raises:
        InputError: It cannot be loaded.
    """
    from datasets import load_dataset

    if Path(name).is_file():
        raise InputError(f"--dataset_name {name} is a file. Pass it with --train_file {name}")
    try:
        return load_dataset(name, config, **options)
    except Exception as error:
        # Each layer below has its own exceptions: datasets, huggingface_hub, httpx.
        raise _explain(name, "the data set could not be loaded", error) from error


def download_files(name: str, filenames: Sequence[str]) -> list[str]:
    """Return files of a data set's repository as local paths; files that are here stay as they are.

    Args:
        name: Name on the Hub, or a folder.
        filenames: Paths inside it, or local files, as where a command line replaces the files of
            a recipe.

    Raises:
        InputError: One of them cannot be had.
    """
    if Path(name).is_dir():
        return [str(Path(name, filename)) for filename in filenames]
    paths = []
    for filename in filenames:
        if Path(filename).is_file():
            paths.append(filename)
            continue
        try:
            paths.append(hf_hub_download(name, filename, repo_type="dataset"))
        except Exception as error:
            raise _explain(name, f"{filename} could not be downloaded", error) from error
    return paths


def _explain(name: str, what: str, error: Exception) -> InputError:
    reason = shorten(str(error) or type(error).__name__, 300).rstrip(".")
    found = (remedy for word, remedy in _REMEDIES.items() if word in reason.lower())
    remedy = next(found, "Check --dataset_name; a private one needs `hf auth login`.")
    return InputError(f"{name}: {what}: {reason}. {remedy}")
