"""The one exception for everything a user can correct."""

from __future__ import annotations


class InputError(ValueError):
    """What was expected, what was found (value, file, column, row) and what to do, in one line.

    The command line prints it without a traceback and ends with status 2.
    """


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
