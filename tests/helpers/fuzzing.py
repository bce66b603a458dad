"""Random configs and damaged data files, each known by its number."""

import bz2
import codecs
import dataclasses
import gzip
import inspect
import io
import json
import lzma
import random
import zlib
from pathlib import Path

from helpers.tiny import WORDS
from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments

# What no config sets here: what would take minutes however it were answered (compiling, other
# libraries' tuning), leave the machine (trackers), or is the machine's and not the config's.
_LEFT_OUT = {
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "auto_find_batch_size",
    "report_to",
    "trackio_space_id",
    "use_cpu",
    "output_dir",
    "logging_dir",
    "full_determinism",
    "resume_from_hub",
    "hub_final_timeout_s",
    "log_level",
    "log_level_replica",
}
# Numbers of steps, processes or seconds: of those only small ones.
_COUNTS = {"max_steps", "num_train_epochs", "dataloader_num_workers", "preprocessing_num_workers"}

_ODD = [None, "", " ", "abc", "true", "no", [], {}, [1, 2], {"a": 1}, ["x", None], "é\u2028", "-"]
_NUMBERS = [0, 1, -1, 2, 3, 0.5, -0.5, 1e-9, 1e9, 10**20, float("nan"), float("inf"), "1e-4", "1_0"]
_SMALL = [0, 1, -1, 2, 0.5, -0.5, float("nan"), "1", "x", None]
_NAMES = ["base", "train.txt", "triplets.csv", "pairs.csv", "nowhere", ".", "/", "base/config.json"]

_OPTIONS = {
    field.name: field
    for kind in (ModelArguments, DataArguments, SimCSETrainingArguments)
    for field in dataclasses.fields(kind)
    if field.init and field.name not in _LEFT_OUT
}


def random_config(number: int) -> dict:
    """Options that differ from those of a good run: mostly ours, with good and bad values."""
    draw = random.Random(f"config {number}")
    ours = [name for name in _OPTIONS if name not in _inherited()]
    config = {}
    for _ in range(draw.choice([1, 1, 2, 3, 5])):
        name = draw.choice(ours if draw.random() < 0.6 else list(_OPTIONS))
        config[name] = _value(draw, name)
    if draw.random() < 0.05:
        config[draw.choice(["temprature", "", "learning rate", "1", "help", "a=b"])] = 1
    return config


def _inherited() -> set[str]:
    from transformers import TrainingArguments

    changed = inspect.get_annotations(SimCSETrainingArguments)
    return {field.name for field in dataclasses.fields(TrainingArguments)} - set(changed)


def _value(draw: random.Random, name: str):
    if name in _COUNTS:
        return draw.choice(_SMALL)
    field = _OPTIONS[name]
    kinds = str(field.type)
    choices = field.metadata.get("choices")
    fitting = []
    if choices:
        fitting += choices
    if "bool" in kinds:
        fitting += [True, False]
    if "int" in kinds or "float" in kinds:
        fitting += _NUMBERS
    if "str" in kinds and not choices:
        fitting += _NAMES
    if draw.random() < 0.25 or not fitting:
        return draw.choice(_ODD + _NUMBERS)
    if "list" in kinds and draw.random() < 0.7:
        return [draw.choice(fitting) for _ in range(draw.choice([1, 1, 2]))]
    return draw.choice(fitting)


@dataclasses.dataclass
class DataCase:
    """A file, and the command line that reads it.

    Attributes:
        path: Of the file.
        entry: `train`, `eval`, `encode`, `search` or `evaluate`.
        options: For training.
    """

    path: Path
    entry: str
    options: dict


def random_data(number: int, folder: Path) -> DataCase:
    """Write a file with one to three things wrong; sometimes it is still good."""
    draw = random.Random(f"data {number}")
    entry = draw.choice(["train"] * 5 + ["eval", "encode", "search", "evaluate"])
    scored = entry in ("eval", "evaluate")
    suffix = draw.choice([".txt", ".csv", ".tsv", ".json", ".jsonl", ".parquet"])
    rows = _rows(draw, scored, columns=draw.choice([1, 2, 3]))
    for _ in range(draw.choice([0, 1, 2])):
        _damage_rows(draw, rows)
    content = _FORMATS[suffix](rows)
    for _ in range(draw.choice([0, 1, 2])):
        content = draw.choice(_DAMAGES)(draw, content)
    if draw.random() < 0.1:
        suffix = draw.choice([".txt", ".csv", ".jsonl", ".parquet", ".doc", "", ".csv.zip"])
    if draw.random() < 0.15:
        kind, compress = draw.choice(list(_COMPRESSIONS.items()))
        suffix += kind
        content = compress(content)
        if draw.random() < 0.5:
            content = draw.choice([_cut, _flip])(draw, content)
    path = folder / f"data{suffix}"
    if draw.random() < 0.02:
        path.mkdir()
    else:
        path.write_bytes(content)
    options = {}
    for name, values in {
        "drop_invalid_rows": [True],
        "streaming": [True],
        "nli_triplets": [True],
        "columns": [["sent0", "sent1"], ["sent0"], ["label"], ["sent0", "sent0"], [""]],
    }.items():
        if draw.random() < 0.2:
            options[name] = draw.choice(values)
    return DataCase(path, entry, options)


def _rows(draw: random.Random, scored: bool, columns: int) -> list[dict]:
    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 6)))

    count = draw.choice([0, 1, 2, 3, 12, 12, 12])
    if scored:
        return [
            {"sentence1": text(), "sentence2": text(), "score": draw.randint(0, 5)}
            for _ in range(count)
        ]
    names = draw.choice([["sent0", "sent1", "hard_neg"], ["premise", "hypothesis", "label"]])
    return [{name: text() for name in names[:columns]} for _ in range(count)]


_CELLS = [
    *("", " ", "\n", "\t", '"', "a,b", '"a', "\x00", "\ufeff", "\u2028", "\ud800", "\U0001f600"),
    *("x" * 200_000, "5", "nan", "entailment", "=1+1"),
    *(None, True, 7, 2.5, float("nan"), 10**30, [], ["a"], {"a": "b"}, {}),
]


def _damage_rows(draw: random.Random, rows: list[dict]) -> None:
    if not rows:
        return
    row = draw.choice(rows)
    what = draw.random()
    if what < 0.6:
        row[draw.choice(list(row) or ["sent0"])] = draw.choice(_CELLS)
    elif what < 0.75:
        row.pop(draw.choice(list(row) or ["sent0"]), None)
    elif what < 0.9:
        row[draw.choice(["extra", "", "sent0", "score"])] = "a dog"
    else:
        for each in rows:
            each["sent 0"] = each.pop("sent0", "a")


def _names(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _txt(rows: list[dict]) -> bytes:
    return _encoded("".join(" ".join(map(str, row.values())) + "\n" for row in rows))


def _separated(rows: list[dict], separator: str) -> bytes:
    lines = [_names(rows), *([str(cell) for cell in row.values()] for row in rows)]
    return _encoded("".join(separator.join(line) + "\n" for line in lines))


def _json(rows: list[dict]) -> bytes:
    return json.dumps(rows).encode()


def _jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _parquet(rows: list[dict]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    file = io.BytesIO()
    names = _names(rows) or ["sent0"]
    try:
        table = pyarrow.table({name: [row.get(name) for row in rows] for name in names})
        parquet.write_table(table, file)
    except (pyarrow.ArrowException, OverflowError, UnicodeError):
        # Parquet itself has no such cells.
        table = pyarrow.table({name: [str(len(row)) for row in rows] for name in names})
        parquet.write_table(table, file)
    return file.getvalue()


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


_FORMATS = {
    ".txt": _txt,
    ".csv": lambda rows: _separated(rows, ","),
    ".tsv": lambda rows: _separated(rows, "\t"),
    ".json": _json,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
_COMPRESSIONS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zlib.compress,  # no zstd at all
}


def _place(draw: random.Random, content: bytes) -> int:
    return draw.randrange(len(content) + 1)


def _cut(draw: random.Random, content: bytes) -> bytes:
    return content[: _place(draw, content)]


def _flip(draw: random.Random, content: bytes) -> bytes:
    place = _place(draw, content)
    return content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :]


def _insert(draw: random.Random, content: bytes) -> bytes:
    place = _place(draw, content)
    what = draw.choice(
        [b"\xff", b"\x00", b'"', b"\r", b"\n\n", b",", b"\t", b"\xed\xa0\x80", b"[" * 5000, b"\\"]
    )
    return content[:place] + what + content[place:]


def _repeat(draw: random.Random, content: bytes) -> bytes:
    return content + content[_place(draw, content) :]


def _recode(draw: random.Random, content: bytes) -> bytes:
    text = content.decode(errors="replace")
    mark, encoding = draw.choice(
        [(codecs.BOM_UTF8, "utf-8"), (b"", "utf-16"), (b"", "utf-16-le"), (b"", "latin-1")]
    )
    return mark + text.encode(encoding, errors="replace")


def _replace(draw: random.Random, content: bytes) -> bytes:
    return draw.choice([b"", b"\n", b"{}", b"null", b"PAR1", b"\x1f\x8b", draw.randbytes(300)])


_DAMAGES = [_cut, _flip, _flip, _insert, _insert, _repeat, _recode, _replace]
