"""Runs a short training in children that are killed, and resumes it until it is done.

    python kills.py FOLDER SIGNAL COUNT [SIGNAL COUNT ...]

A process of its own, because it forks: children start where the imports are done. Prints a line of
JSON for each signal: how many children were killed, how many while a checkpoint was being written,
how many runs came to their end, and how many of them with the uninterrupted run's weights.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers.training import UNSUPERVISED, build_args, build_model
from simcse_trainer import SimCSETrainer
from simcse_trainer.files import TMP_PREFIX
from simcse_trainer.model.io.checkpoints import find_checkpoint

STEPS = 30


def train(folder: Path) -> int:
    """One life of the run: from the newest complete checkpoint to the end, or to its death."""
    args = build_args(
        folder,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        logging_steps=50,
    )
    last = find_checkpoint(folder) if folder.is_dir() else None
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
    trainer.train(resume_from_checkpoint=last is not None)
    if trainer.interrupted:
        return 143
    trainer.save_model()
    return 0


def live(folder: Path) -> int:
    """Start a child that trains."""
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        status = 1
        try:
            status = train(folder)
        finally:
            os._exit(status)
    return child


def main(root: Path, *words: str) -> None:
    started = time.monotonic()
    assert os.waitpid(live(root / "whole"), 0)[1] == 0
    duration = time.monotonic() - started
    for how, count in zip(words[::2], words[1::2], strict=True):
        kill(root, signal.Signals[how], int(count), duration)


def kill(root: Path, how: signal.Signals, count: int, duration: float) -> None:
    random.seed(count)
    expected = load_file(root / "whole/model.safetensors")
    tally = {"killed": 0, "while saving": 0, "finished": 0, "identical": 0}
    run = 0
    while tally["killed"] < count or tally["finished"] == 0:
        folder = root / f"{how.name}{run}"
        child = live(folder)
        if tally["killed"] < count:
            time.sleep(random.uniform(0.1, 0.6) * duration)
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, how)
                saving = any(folder.glob(f"{TMP_PREFIX}*/checkpoint-*"))
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert status in (-how, 143, 0), status
                tally["killed"] += 1
                tally["while saving"] += saving
                if status != 0:
                    continue
        else:
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = load_file(folder / "model.safetensors")
        tally["finished"] += 1
        tally["identical"] += all(torch.equal(found[name], expected[name]) for name in expected)
        run += 1
    print(json.dumps(tally))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), *sys.argv[2:])
