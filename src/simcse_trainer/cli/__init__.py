"""The command `simcse-trainer`: what there is to do before and after training.

A command is a file here with a function of its name and an `EXAMPLE`, and stands in the list below.
What it needs is imported inside the function: `--help` waits for no torch.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from simcse_trainer.cli import (
    check,
    demo,
    encode,
    evaluate,
    export,
    init,
    merge,
    mine,
    plan,
    push,
    report,
    search,
    train,
)
from simcse_trainer.cli.help import HELP, asked_for_help, search_words
from simcse_trainer.cli.train import (
    hide_bars_where_nobody_watches,
    print_error,
    quiet_imports,
    write_to_any_console,
)
from simcse_trainer.errors import InputError, at_command_line
from simcse_trainer.model.progress import announce
from simcse_trainer.version import __version__

# Hidden: what training, and the class SimCSE, call an option of the other commands.
ALIASES = {
    "eval_split": "split",
    "eval_tasks": "tasks",
    "max_length": "max_seq_length",
    "model_name_or_path": "model",
    "model_revision": "revision",
    "output_dir": "output",
    "per_device_eval_batch_size": "batch_size",
    "pooling": "pooling_mode",
    "sts_data_dir": "data_dir",
}


def _underscores(name: str) -> str:
    return name.replace("-", "_")


def _one_name(name: str) -> str:
    """Return the name that an option is declared by, without dashes in front."""
    return ALIASES.get(_underscores(name), _underscores(name))


class _Group(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--help COMMAND` as `COMMAND --help`."""
        if args[:1] and args[0] in HELP and args[1:2] and args[1] in self.commands:
            args = [args[1], HELP[-1], *args[2:]]
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="simcse-trainer",
    help="Train sentence embeddings with SimCSE, and use them.",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # --data_dir, as training's options are written, and --data-dir are one.
    context_settings={"token_normalize_func": _underscores, "help_option_names": [*HELP]},
)


class _Command(TyperCommand):
    """Options of several values take them as training's do: --tasks stsb sickr."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat such an option before every further value, which is how typer takes them."""
        wanted, searched = asked_for_help(args) if ctx.help_option_names else (False, "")
        if wanted and searched:
            self.params = self._search(searched)
            typer.echo(ctx.get_help())
            ctx.exit()
        several = {
            _underscores(o).lstrip("_")
            for p in self.params
            if getattr(p, "multiple", False)
            for o in p.opts
        }
        words, option, values = [], "", 0
        for word in args:
            if word.startswith("-"):
                option, values = word, 0
            elif _one_name(option.lstrip("-")) in several:
                words += [option] if values else []
                values += 1
            words.append(word)
        return super().parse_args(ctx, words)

    @at_command_line
    def invoke(self, ctx: Any) -> Any:
        """Say that it begins: what a command needs takes seconds to import."""
        if self.name not in ("train", "push"):
            announce("Loading libraries")
        return super().invoke(ctx)

    def _search(self, word: str) -> list[Any]:
        """Return the options whose name or text has the word.

        Raises:
            InputError: There is none.
        """
        options = {p.name: p for p in self.params if p.opts and p.opts[0].startswith("-")}
        found = search_words(word, {n: getattr(p, "help", "") or "" for n, p in options.items()})
        return [options[name] for name in found]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"simcse-trainer {__version__}")
        raise typer.Exit


@app.callback()
def _callback(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", help="Print the version.", is_eager=True, callback=_print_version
        ),
    ] = False,
) -> None:
    """Train sentence embeddings with SimCSE, and use them."""


_commands: tuple[Any, ...] = (
    init,
    check,
    train,
    evaluate,
    mine,
    encode,
    export,
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
        # Options of training keep their names, where a command takes those as well.
        context_settings=getattr(_command, "CONTEXT", {"token_normalize_func": _one_name}),
    )(getattr(_command, _name))


@at_command_line
def main() -> None:
    """Exit status 2 and one line on stderr for what the user can correct."""
    quiet_imports()
    write_to_any_console()
    hide_bars_where_nobody_watches()
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
