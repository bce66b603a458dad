"""The command `simcse-trainer`: what there is to do with a trained folder.

A command is a file here with a function of its name and an `EXAMPLE`, and stands in the list below.
What it needs is imported inside the function: `--help` waits for no torch.
"""

from __future__ import annotations

import sys

import typer

from simcse_trainer.cli import push, report
from simcse_trainer.errors import InputError

app = typer.Typer(
    name="simcse-trainer",
    help="Train sentence embeddings with SimCSE, and use them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Train sentence embeddings with SimCSE, and use them."""


for _command in (push, report):
    _name = _command.__name__.rsplit(".", 1)[-1]
    app.command(epilog=f"Example: {_command.EXAMPLE}")(getattr(_command, _name))


def main() -> None:
    """Exit status 2 and one line on stderr for what the user can put right."""
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
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
