"""The one exception for everything a user can correct."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ContextDecorator
from typing import Any


class InputError(ValueError):
    """What was expected, what was found (value, file, column, row) and what to do, in one line.

    The command line prints it without a traceback and ends with status 2. Messages are written
    with its options, `--streaming false`; outside of `at_command_line` they name the parameters of
    Python, `streaming=False`.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(for_caller(message))


class _CommandLine(ContextDecorator):
    """Within it, and for all threads, messages name the options of the command line."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


at_command_line = _CommandLine()

# Options that have another name in Python.
_PARAMETERS = {
    "eval_tasks": "eval_dataset",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "use_lora": "lora",
}
# What stays as it is, a command to run; or an option, with its value where that is a constant.
_OPTIONS = re.compile(
    r"(?:Run: |simcse-trainer |torchrun |accelerate |llama-gguf-split ).*?(?=(?<!\.)[.;,]\s|\.?$|`)"
    r"|(?<![\w-])--(?P<name>[a-z]\w+)(?:[ =](?P<value>(?:true|false|none|no|mlp|lasttoken|sdpa|"
    r"merged|float32|bfloat16)\b|\d[\d.]*(?:e-?\d+)?(?<!\.)))?"
)


def for_caller(message: str) -> str:
    """Return a message, of an error or a warning, with the names that its reader passes."""
    return message if at_command_line.depth else name_parameters(message)


def name_parameters(message: str) -> str:
    """Put the parameters of Python in place of the options of the command line."""

    def rewrite(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name is None:
            return match[0]
        name = _PARAMETERS.get(name, name)
        if value is None:
            return name
        if name == "lora":
            return "lora=lora_config()"
        constants = {"true": "True", "false": "False"}
        return f"{name}={value if value[0].isdigit() else constants.get(value, repr(value))}"

    return _OPTIONS.sub(rewrite, message)


class CollectedErrors:
    """Input errors of checks that do not need each other, to be said together, once.

    Each check is made in a `with` block of its own, and `raise_all` ends them.
    """

    def __init__(self) -> None:
        self._found: list[InputError] = []

    def __enter__(self) -> None:
        """Begin a check."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Keep an InputError for later; let everything else pass."""
        if isinstance(error, InputError):
            self._found.append(error)
        return isinstance(error, InputError)

    def raise_all(self) -> None:
        """Raise what was found.

        Raises:
            InputError: The only one as it is; several in one line, numbered.
        """
        texts = list(dict.fromkeys(map(str, self._found)))
        if len(texts) == 1:
            raise self._found[0]
        if texts:
            numbered = (f"({number}) {text}" for number, text in enumerate(texts, 1))
            raise InputError(f"{len(texts)} things to correct: {' '.join(numbered)}")


def check_bounds(options: Any, bounds: Mapping[str, tuple[bool, str]]) -> None:
    """Raise InputError for all options whose condition does not hold."""
    wrong = [
        f"{name} is {getattr(options, name)}; expected {expected}."
        for name, (holds, expected) in bounds.items()
        if not holds
    ]
    if wrong:
        raise InputError(" ".join(wrong))
