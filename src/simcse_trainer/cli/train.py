"""`simcse-trainer train`."""

from __future__ import annotations

import typer

EXAMPLE = "simcse-trainer train configs/unsup_bert_base.yaml --learning_rate 1e-5"
# All words, --help among them, are those of train_simcse.py.
CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def train(context: typer.Context) -> int:
    """Train a model, as `python train_simcse.py` does: CONFIG.yaml, --option value ..."""
    from simcse_trainer.entry import main

    return main(context.args)
