"""Files and columns that are not trained on as they are, and the line that makes data of them."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simcse_trainer.data.kinds import find_judgement, is_chat, is_number

logger = logging.getLogger(__name__)

# How each begins, and what it is.
_BEGINNINGS = (
    (b"PK\x03\x04", ".zip"),
    (b"\xd0\xcf\x11\xe0", ".xls"),
    (b"\x1f\x8b", ".gz"),
    (b"BZh", ".bz2"),
    (b"\xfd7zXZ\0", ".xz"),
    (b"\x28\xb5\x2f\xfd", ".zst"),
    (b"PAR1", ".parquet"),
)
# Of a workbook: the packages that pandas reads it with.
_SHEETS = {".xlsx": "openpyxl", ".xlsm": "openpyxl", ".xls": "xlrd", ".ods": "odfpy"}
_FRAMES = {".feather": "read_feather", ".orc": "read_orc", ".pkl": "read_pickle"}


def describe_kind(path: Path) -> str | None:
    """Return what to do with a file of a known kind that is not read; None if it is unknown."""
    suffix = path.suffix.lower()
    if suffix in _SHEETS:
        return _describe_workbook(path, suffix)
    if suffix in _FRAMES:
        new = path.stem + ".jsonl"
        line = (
            f"import pandas; pandas.{_FRAMES[suffix]}({str(path)!r}).to_json({new!r}, "
            "orient='records', lines=True, force_ascii=False)"
        )
        return f'{path} is not read. Write it as .jsonl: python -c "{line}", and pass {new}.'
    if suffix == ".zip":
        return _describe_archive(path)
    if ".tar" in [part.lower() for part in path.suffixes[-2:]] or suffix == ".tgz":
        return f"{path} is an archive. Unpack it (tar -xf {path}), and name the files in it."
    return None


def describe_content(path: Path, head: bytes) -> str | None:
    """Return what to do with a file that is not what its name says; None if nothing tells.

    Args:
        path: The file that the errors name and that is read.
        head: The first bytes of the file, as they are.
    """
    suffix = next((suffix for mark, suffix in _BEGINNINGS if head.startswith(mark)), None)
    if suffix is None:
        return None
    if suffix == ".zip" and b"[Content_Types]" in head:
        suffix = ".xlsx"
    if suffix in _SHEETS:
        return _describe_workbook(path, suffix)
    if suffix == ".zip":
        return _describe_archive(path)
    new = path.with_suffix(suffix) if suffix == ".parquet" else path.with_name(path.name + suffix)
    return f"{path} is no text: its content is that of {suffix}. Rename it to {new}"


def _describe_workbook(path: Path, suffix: str) -> str:
    new = path.stem + ".csv"
    return (
        f"{path} is a workbook ({suffix}), not a text file. Save it as 'CSV UTF-8' in the program "
        f'that made it, or: pip install pandas {_SHEETS[suffix]}; python -c "import pandas; '
        f'pandas.read_excel({str(path)!r}).to_csv({new!r}, index=False)"; then pass {new}'
    )


def _describe_archive(path: Path) -> str:
    return (
        f"{path} is a zip archive. Unpack it: python -m zipfile -e {path} {path.stem}; then name "
        f"the files in {path.stem}"
    )


def describe_chats(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> str | None:
    """Return how to make pairs of chats, where the rows hold some; None if not.

    Args:
        path: The file that the errors name and that is read.
        columns: The names of all columns of the data.
        rows: The first rows of the data: column -> value.
    """
    name = next((name for name in columns if _has_chats([row.get(name) for row in rows])), None)
    if name is None:
        return None
    chats: list[Any] = [row[name] for row in rows if row.get(name)]
    turn = chats[0][0]
    role, said = ("role", "content") if "role" in turn else ("from", "value")
    new = f"{path.name.split('.')[0]}-pairs.csv"
    text, parts = "{}[{!r}]", ""
    if any(not isinstance(turn[said], str) for chat in chats for turn in chat):
        text = "say({}[{!r}])"
        parts = (
            "say = lambda x: x if isinstance(x, str) else "
            "' '.join(part.get('text') or '' for part in x or []); "
        )
    return (
        f"{path}: column {name!r} holds chats, and what is trained on are pairs: a text and one "
        "that belongs to it, such as a question and its answer. Make them of turns that follow "
        f'each other: python -c "{_read(path)}; {parts}'
        f"turns = [two for chat in table[{name!r}].dropna() for two in zip(chat, chat[1:]) "
        f"if two[0][{role!r}] in ('user', 'human') and two[1][{role!r}] in ('assistant', 'gpt')]; "
        f"pandas.DataFrame([({text.format('a', said)}, {text.format('b', said)}) "
        "for a, b in turns], "
        f"columns=['sent0', 'sent1']).to_csv({new!r}, index=False)\"; then pass {new}"
    )


def describe_groups(path: Path, name: str, rows: Sequence[Mapping[str, object]]) -> str | None:
    """Return how to make pairs of lists of texts that mean the same; None if it has no lists.

    Args:
        path: The file that the errors name and that is read.
        name: The column that would be the anchor.
        rows: The first rows of the data: column -> value.
    """
    cells = [row.get(name) for row in rows]
    if not cells or not all(isinstance(cell, list) and not is_chat(cell) for cell in cells):
        return None
    items = [item for cell in cells for item in cell]  # type: ignore[attr-defined]
    stem = path.name.split(".")[0]
    write = "orient='records', lines=True, force_ascii=False"
    if not all(isinstance(item, str) for item in items):
        if not items or not all(isinstance(item, dict) for item in items):
            return None
        new = f"{stem}-rows.jsonl"
        return (
            f"{path}: column {name!r} holds lists of objects, expected an object a row. Write them "
            f'so: python -c "{_read(path)}; rows = table[{name!r}].explode().dropna().tolist(); '
            f'pandas.json_normalize(rows).to_json({new!r}, {write})"; then pass {new}'
        )
    if all(len(cell) == 1 for cell in cells):  # type: ignore[arg-type]
        new = f"{stem}-texts.jsonl"
        return (
            f"{path}: column {name!r} holds lists of one text, expected texts. Take them out: "
            f'python -c "{_read(path)}; table[{name!r}] = table[{name!r}].str[0]; '
            f'table.to_json({new!r}, {write})"; then pass {new}'
        )
    new = f"{stem}-pairs.csv"
    return (
        f"{path}: column {name!r} holds lists, expected one text a row. If the texts of a list "
        f'mean the same, make pairs of them: python -c "{_read(path)}; '
        f"pairs = [(texts[0], text) for texts in table[{name!r}] for text in texts[1:]]; "
        f"pandas.DataFrame(pairs, columns=['sent0', 'sent1']).to_csv({new!r}, index=False)\"; "
        f"then pass {new}"
    )


def _has_chats(cells: Sequence[object]) -> bool:
    """Return whether there are chats, and nothing else but empty ones."""
    return any(map(is_chat, cells)) and all(is_chat(cell) for cell in cells if cell)


def describe_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> str | None:
    """Return what to do with lines of a text file that are rows of a table, or JSON; None if not.

    Args:
        path: The file that the errors name and that is read.
        rows: The first rows, of the column `text`.
    """
    lines = [str(row["text"]) for row in rows]
    if lines and all(line.lstrip()[:1] == "{" and line.rstrip()[-1:] == "}" for line in lines):
        at = path.name.lower().rindex(".txt")
        new = path.with_name(f"{path.name[:at]}.jsonl{path.name[at + 4 :]}")
        return f"{path}: its lines are objects of JSON, expected a text a line. Rename it to {new}"
    if lines and "sent0" in lines[0].split(","):
        new = path.with_name(path.name.replace(".txt", ".csv"))
        return f"{path}: its first line is the header of a table. Rename it to {new}"
    tabs = {line.count("\t") for line in lines}
    if len(lines) > 1 and len(tabs) == 1 and tabs != {0}:
        return (
            f"{path}: each line has {tabs.pop()} tabs, as rows of a table have, expected a text a "
            "line. If each is one text, put spaces in place of the tabs; if not, pass "
            "--delimiter tab"
        )
    return None


def describe_judged_pairs(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> str | None:
    """Return how to train on pairs of which a column says which belong together; None if none does.

    Args:
        path: The file that the errors name and that is read.
        columns: The names of all columns of the data.
        rows: The first rows of the data: column -> value.
    """
    found = find_judgement(columns, rows)
    if not found:
        return None
    first, second, label = found
    values = {str(row.get(label)).strip().lower() for row in rows}
    said = f"{path}: column {label!r} says which pairs of {first!r} and {second!r} belong together"
    if {"entailment", "contradiction"} <= values or (
        first.lower() == "premise" and values <= {"0", "1", "2", "-1"}
    ):
        return (
            f"{said}. Contradictions are no positives: pass --nli_triplets true --columns "
            f"{shlex.join(found)}"
        )
    if not all(map(is_number, values)):
        return f"{said}. Only those that do are to be trained on: leave out the others"
    most = max(map(float, values))
    least = 1 if most == 1 else 0.8 * most
    new = f"{path.name.split('.')[0]}-positives.csv"
    return (
        f"{said}. Only those that do are to be trained on, such as those of at least {least:g}: "
        f'python -c "{_read(path)}; table = table[table[{label!r}] >= {least:g}]; '
        f"table.rename(columns={{{first!r}: 'sent0', {second!r}: 'sent1'}})[['sent0', 'sent1']]"
        f'.to_csv({new!r}, index=False)"; then pass {new}'
    )


def warn_of_judgement(
    path: Path | str,
    columns: Sequence[str],
    rows: Sequence[Mapping[str, object]],
    used: Sequence[str],
) -> None:
    """Warn where pairs are trained on whichever a column says that they are.

    Args:
        path: The file that the errors name and that is read.
        columns: The names of all columns of the data.
        rows: The first rows of the data: column -> value.
        used: Those that are trained on.
    """
    judged = find_judgement(columns, rows)
    if judged and {*judged[:2]} <= {*used}:
        logger.warning(
            "%s: column %r is not read: all pairs are trained on as texts that belong together. "
            "Leave out the rows of those that do not.",
            path,
            judged[-1],
        )


def describe_written_lists(
    path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> str | None:
    """Return how to read lists that a table has as text, "['a', 'b']"; None if there are none.

    Args:
        path: A table of separated cells.
        columns: The names of the columns of texts.
        rows: The first rows of the data: column -> value.
    """
    for name in columns:
        cells = [str(row.get(name) or "").strip() for row in rows]
        if cells and all(c.startswith(("['", '["', "[]")) and c.endswith("]") for c in cells):
            new = path.name.split(".")[0] + ".jsonl"
            return (
                f"{path}: column {name!r} holds lists that were written as text. Make lists of "
                f'them: python -c "import ast; {_read(path)}; table[{name!r}] = '
                f"table[{name!r}].map(ast.literal_eval); table.to_json({new!r}, orient='records', "
                f'lines=True, force_ascii=False)"; then pass {new}'
            )
    return None


def _read(path: Path) -> str:
    """Return the Python that reads a file as `table`."""
    kinds = [suffix.lower() for suffix in path.suffixes]
    if ".parquet" in kinds:
        call = f"read_parquet({str(path)!r})"
    elif ".csv" in kinds or ".tsv" in kinds:
        call = f"read_csv({str(path)!r}, sep=None, engine='python')"
    else:
        lines = ", lines=True" if ".json" not in kinds else ""
        call = f"read_json({str(path)!r}{lines})"
    return f"import pandas; table = pandas.{call}"
