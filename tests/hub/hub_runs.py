"""Short training runs that push."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from test_trainer import UNSUPERVISED, build_args, build_model

import simcse_trainer
from simcse_trainer import SimCSETrainer

TOKEN = "hf_writeTokenOfMe0123456789"
READ_TOKEN = "hf_readTokenOfMe0123456789"
OTHER_TOKEN = "hf_writeTokenOfOther012345"


def build(
    folder: Path,
    *,
    model=None,
    train_dataset=UNSUPERVISED,
    eval_dataset=None,
    callbacks=None,
    **options,
):
    defaults = {
        "push_to_hub": True,
        "hub_model_id": "me/tiny",
        "hub_token": TOKEN,
        "hub_always_push": True,
        "hub_timeout_s": 3.0,
        "hub_final_timeout_s": 60.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_tqdm": True,
    }
    args = build_args(folder, **(defaults | options))
    return SimCSETrainer(
        model or build_model(),
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
    )


def train(folder: Path, **options) -> SimCSETrainer:
    trainer = build(folder, **options)
    trainer.train()
    return trainer


def weights(trainer: SimCSETrainer) -> dict[str, torch.Tensor]:
    return trainer.model.state_dict()


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """A snippet in a process of its own, where the client reads the environment anew."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ
        | {"PYTHONPATH": str(Path(simcse_trainer.__file__).parents[1])}
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
