"""Short training runs that push."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

import simcse_trainer
from helpers.training import UNSUPERVISED, build_args, build_model
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


LOADERS = {
    "SimCSEModel": """
from simcse_trainer import SimCSEModel
embed = SimCSEModel.from_pretrained(name, revision=revision).encode(texts)
""",
    "SentenceTransformer": """
from sentence_transformers import SentenceTransformer
embed = SentenceTransformer(name, revision=revision).encode(texts)
""",
    "AutoModel": """
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
model = AutoModel.from_pretrained(name, revision=revision).eval()
with torch.no_grad():
    embed = model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
""",
}
LOAD = """
import json, sys
name, revisions, texts = json.loads(sys.argv[1])
found = []
for revision in revisions:
    {loader}
    found.append([[float(x) for x in row] for row in embed])
print(json.dumps(found))
"""
TEXTS = ["the cat sat", "a dog ran far away"]


def load(
    loader: str, name: str, *revisions: str | None, options: str = "", **environment: str
) -> torch.Tensor:
    """[revisions, texts, D], loaded by name in another process with an empty cache."""
    code = LOADERS[loader].replace("revision=revision", f"revision=revision{options}").strip()
    code = LOAD.format(loader=code.replace("\n", "\n    "))
    done = run_python(code, json.dumps([name, revisions, TEXTS]), **environment)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))
