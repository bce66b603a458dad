"""`simcse-trainer train` and `train_simcse.py`: mistakes are named before torch is busy."""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer

from simcse_trainer.cli.help import asked_for_help, training_help
from simcse_trainer.errors import InputError, at_command_line
from simcse_trainer.model.progress import announce, is_watched

EXAMPLE = "simcse-trainer train configs/unsup_bert_base.yaml --learning_rate 1e-5"
# All words, --help among them, are those of train_simcse.py.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> int:
    """Train a model, as `python train_simcse.py` does: CONFIG.yaml, --option value ..."""
    return main(context.args)


@at_command_line
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, and train.

    Returns:
        The exit status: 0; 2 after one line on stderr about what the user can correct; 143 after
        SIGTERM and 130 after Ctrl-C, with a checkpoint saved if training had begun.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    quiet_imports()
    write_to_any_console()
    hide_bars_where_nobody_watches()
    wanted, word = asked_for_help(words)
    if wanted:
        _forget_peft()
    try:
        # Models, data sets and the Trainer take seconds to import: only once the options are right.
        from simcse_trainer.cli.config import build_parser, parse_arguments

        if wanted:
            print(training_help(build_parser(), word))
            return 0
        announce("Loading libraries")
        parsed = parse_arguments(words)
        from simcse_trainer.training.processes import find_command
        from simcse_trainer.training.run import run_training

        trainer = run_training(*parsed, command=find_command(words))
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return 128 + signal.SIGINT
    except (InputError, OSError) as error:
        # A DataLoader's worker sends its whole traceback along.
        print_error(str(error).rsplit("InputError: ", 1)[-1])
        return 2
    if trainer.interrupted:
        step = trainer.state.global_step
        if trainer.is_world_process_zero():
            hint = "Go on with --resume_from_checkpoint true"
            print(f"Stopped at step {step}. {hint}", file=sys.stderr)
        return 128 + (trainer.preemption.signal or signal.SIGTERM)
    return 0


def print_error(message: str) -> None:
    """Print what the user can correct, in one line."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)


def write_to_any_console() -> None:
    """Escape what a console cannot show, such as one in cp949, instead of failing on it.

    Each line is written at once: a file that a long run writes into shows how far it is.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)


def hide_bars_where_nobody_watches() -> None:
    """Let libraries write no bars into a file or a pipe; they ask the environment once."""
    if not is_watched():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(name, "1")


def quiet_imports() -> None:
    """Keep to itself what libraries say to each other, and no user can change.

    bitsandbytes, which peft imports, misses kernels that it might have; peft asks transformers for
    a property by its old name; and memory is not pinned where there is no accelerator.
    """
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true", UserWarning)


def _forget_peft() -> None:
    """Hide peft from a process that only prints the options: transformers imports it beside them.

    That takes longer than all the rest, and the text does not depend on it.
    """
    from transformers import utils

    available: Any = utils
    available.is_peft_available = lambda: False
