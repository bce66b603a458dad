"""The command `simcse-trainer`: what there is to do before and after training.

A command is a file here with a function of its name and an `EXAMPLE`, and stands in the list below.
What it needs is imported inside the function: `--help` waits for no torch.
"""

from __future__ import annotations

import sys
from typing import Any

import typer
from typer.core import TyperCommand

from simcse_trainer.cli import (
    check,
    demo,
    encode,
    evaluate,
    merge,
    plan,
    push,
    report,
    search,
    train,
)
from simcse_trainer.cli.train import print_error, quiet_imports, write_to_any_console
from simcse_trainer.errors import InputError


def _underscores(name: str) -> str:
    return name.replace("-", "_")


app = typer.Typer(
    name="simcse-trainer",
    help="Train sentence embeddings with SimCSE, and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --data_dir, as training's options are written, and --data-dir are one.
    context_settings={"token_normalize_func": _underscores},
)


class _Command(TyperCommand):
    """Options of several values take them as training's do: --tasks stsb sickr."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat such an option before every further value, which is how typer takes them."""
        several = {
            _underscores(o) for p in self.params if getattr(p, "multiple", False) for o in p.opts
        }
        words, option, values = [], "", 0
        for word in args:
            if word.startswith("-"):
                option, values = word, 0
            elif _underscores(option) in several:
                words += [option] if values else []
                values += 1
            words.append(word)
        return super().parse_args(ctx, words)


@app.callback()
def _callback() -> None:
    """Train sentence embeddings with SimCSE, and use them."""


_commands: tuple[Any, ...] = (
    check,
    train,
    evaluate,
    encode,
    search,
    report,
    push,
    merge,
    plan,
    demo,
)
for _command in _commands:
    _name = _command.__name__.rsplit(".", 1)[-1]
    app.command(
        cls=_Command,
        epilog=f"Example: {_command.EXAMPLE}",
        context_settings=getattr(_command, "CONTEXT", None),
    )(getattr(_command, _name))


def main() -> None:
    """Exit status 2 and one line on stderr for what the user can correct."""
    quiet_imports()
    write_to_any_console()
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except (InputError, OSError) as error:
        message = str(error)
    except Exception as error:
        # How typer refuses a command line; anything else is a bug and shows where.
        if not hasattr(error, "format_message"):
            raise
        message = error.format_message()
    print_error(message)
    sys.exit(2)
