"""Runs of the command line in a folder of their own."""

from __future__ import annotations

import pytest
import yaml

from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer
from simcse_trainer import SimCSEModel
from simcse_trainer.cli.train import main

LINES = [" ".join(WORDS[(i * k) % 16] for k in range(1, 3 + i % 6)) for i in range(40)]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A working folder with a tiny model, data, and options for a short run."""
    monkeypatch.chdir(tmp_path)
    # Weights as of a fresh model: with larger ones a tiny network does not train.
    backbone = tiny_backbone("bert")
    for parameter in backbone.parameters():
        parameter.data *= 0.3
    SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean").save_pretrained("base")
    (tmp_path / "train.txt").write_text("\n".join(LINES), encoding="utf-8")
    rows = [f"{a},{b},{c}" for a, b, c in zip(LINES, LINES[1:], LINES[5:], strict=False)]
    (tmp_path / "triplets.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join(rows))
    pairs = [f"{a},{b},{i % 6}" for i, (a, b) in enumerate(zip(LINES, LINES[3:], strict=False))]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(pairs))
    return {
        "model_name_or_path": "base",
        "train_file": "triplets.csv",
        "eval_tasks": "pairs.csv",
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(options, *argv) -> int:
    with open("run.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(options, file)
    return main(["run.yaml", *argv])
