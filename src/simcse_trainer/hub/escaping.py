"""Names, paths and texts of data, made safe for a Markdown page."""

from __future__ import annotations

import json
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any
from urllib.parse import quote

# Longer texts of the data are cut.
MAX_CHARACTERS = 200

_HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
# An underscore inside a word emphasises nothing.
_MARKDOWN = re.compile(r"([\\`*\[\]|~$#!]|(?<!\w)_|_(?!\w))")
# Controls, surrogates, line and paragraph separators, and invisible marks that turn the direction
# of writing; not the two joiners that words and emoji are made with.
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
_JOINERS = "\u200c\u200d"

# From the root, a home or a drive on; not what stands in an address.
_PATH = re.compile(r"(?<![\w.:/\\~-])(file://)?(~?/|~?\\\\|[A-Za-z]:[\\/])[^\s\"',;]*")

# Of a launcher or a tracker; our own options are known by their names.
_SECRET = re.compile(r"--[\w-]*(token|secret|password|api[_-]?key)", re.IGNORECASE)
_NO_SECRETS = ("--append_eos_token",)


def escape(text: object) -> str:
    """One line that Markdown, tables of it, HTML and mathematics on the Hub show as it is."""
    return _MARKDOWN.sub(r"\\\1", _one_line(str(text))).translate(_HTML)


def escape_example(text: str) -> str:
    """A text of the data: cut, and escaped."""
    line = _one_line(text)
    if len(line) > MAX_CHARACTERS:
        line = line[: MAX_CHARACTERS - 4].rstrip() + " ..."
    return escape(line)


def escape_url(name: str) -> str:
    """A name on the Hub as part of an address."""
    return quote(name, safe="/")


def python_string(text: str) -> str:
    """A text as a Python literal, on one line."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


def cut_paths(value: Any) -> Any:
    """JSON's values with the last name of each absolute path in place of the path."""
    if isinstance(value, str):
        if value[:1] == "/" or PureWindowsPath(value).is_absolute():  # spaces are part of it
            return _last_name(value)
        return _PATH.sub(lambda found: _last_name(found[0]), value)
    if isinstance(value, dict):
        return {cut_paths(name): cut_paths(one) for name, one in value.items()}
    return [cut_paths(one) for one in value] if isinstance(value, list) else value


def fence(code: str, language: str) -> str:
    """A code block that its own content cannot end."""
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"`{3,}", code))])
    return f"{ticks}{language}\n{code}\n{ticks}"


def shell_command(words: Sequence[str]) -> str:
    """A command as one types it, without options that hold secrets."""
    kept: list[str] = []
    secret = False
    for word in words:
        if word.startswith("--"):
            name, equals, _ = word.partition("=")
            known = name.replace("-", "_").replace("__", "--", 1) in _NO_SECRETS
            secret = _SECRET.fullmatch(name) is not None and not known
            if secret:
                # In `--hub_token=VALUE` nothing follows; in `--hub_token VALUE` the value does.
                secret = not equals
                continue
        elif secret:
            continue
        kept.append(word)
    return shlex.join(kept)


def _last_name(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _one_line(text: str) -> str:
    shown = "".join(
        " " if unicodedata.category(c) in _HIDDEN and c not in _JOINERS else c for c in text
    )
    return " ".join(shown.split())
