"""Where a run happened: the code's commit, the machine, and the energy it took."""

from __future__ import annotations

import csv
import os
import platform
from functools import cache
from pathlib import Path
from subprocess import DEVNULL, SubprocessError, check_output

import torch
from transformers import TrainingArguments


def describe_hardware(args: TrainingArguments) -> str:
    """Such as "8 x NVIDIA H100 80GB HBM3"."""
    count = args.world_size
    device = args.device
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        machine = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
        return machine if count == 1 else f"{machine}, {count} processes"
    return f"{count} x {device.type}"


def read_emissions(folder: Path, since: float) -> tuple[float | None, float | None]:
    """Energy in kWh and grams of CO2 equivalent that codecarbon measured.

    Args:
        folder: Where it writes `emissions.csv`, a row per run.
        since: When this run began, in seconds of `time.time`; an older file is of another.
    """
    try:
        if (folder / "emissions.csv").stat().st_mtime < since:
            return None, None
        with open(folder / "emissions.csv", encoding="utf-8", newline="") as file:
            last = list(csv.DictReader(file))[-1]
        return float(last["energy_consumed"]), 1000 * float(last["emissions"])
    except (OSError, IndexError, KeyError, ValueError, TypeError):
        return None, None


@cache
def find_commit() -> str:
    """Of the checkout that this package runs from; empty where it is installed."""
    package = Path(__file__).resolve().parent
    git = ["git", "-C", str(package)]
    try:
        top, commit = _run([*git, "rev-parse", "--show-toplevel", "HEAD"]).split("\n")
        if Path(top).resolve() != package.parents[1]:
            return ""  # somebody's repository with our package in it
        changed = _run([*git, "status", "--porcelain", "--untracked-files=no"])
    except (OSError, SubprocessError, ValueError):
        return ""
    return f"{commit} (with local changes)" if changed else commit


def _run(command: list[str]) -> str:
    return check_output(command, stderr=DEVNULL, text=True, timeout=10).strip()
