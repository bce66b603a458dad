"""The processes of a run: how many there are, what started them, and how they agree."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)


# What a full disk looks like to Python, to safetensors and to torch.save.
WRITING_ERRORS = (OSError, SafetensorError, RuntimeError)


class Processes:
    """How the processes of a run agree; with a single one nothing is exchanged.

    Args:
        args: The training options, `SimCSETrainingArguments`.
        accelerator: The trainer's `Accelerator`, which gathers.
    """

    def __init__(self, args: Any, accelerator: Any):
        self._args = args
        self._accelerator = accelerator

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return bool(self._args.should_save)

    def on_first(self, call: Callable[[], Any]) -> Any:
        """Return in every process what the first one finds; all raise what it raises."""
        result, error = None, None
        if self.is_first:
            try:
                result = call()
            except (*WRITING_ERRORS, InputError) as found:
                error = found
        if int(self._args.world_size) > 1:
            box = [(result, error and str(error))]
            broadcast_object_list(box, from_process=0)
            result, told = box[0]
            error = error or (InputError(told) if told else None)
        if error is not None:
            raise error
        return result

    def all_hold(self, holds: bool) -> bool:
        """Return whether something holds in every process."""
        return self.largest(float(not holds))[0] == 0.0

    def largest(self, *values: float) -> list[float]:
        """Return of each value the largest that a process has."""
        if int(self._args.world_size) == 1:
            return [*values]
        own = torch.tensor([values], dtype=torch.float32, device=self._args.device)
        largest: list[float] = self._accelerator.gather(own).amax(0).tolist()
        return largest


def check_processes(world_size: int) -> None:
    """Say how many processes train, and stop where the launcher was asked for more.

    `accelerate launch --cpu --num_processes 2` starts one process without a word, and gives it one
    core unless OMP_NUM_THREADS is set.

    Raises:
        InputError: Fewer processes than asked for.
    """
    logger.info("Training in %d process%s.", world_size, "" if world_size == 1 else "es")
    cores = os.cpu_count() or 1
    if not torch.accelerator.is_available() and torch.get_num_threads() == 1 < cores // world_size:
        logger.warning(
            "Computing with 1 of %d CPU cores; set OMP_NUM_THREADS=%d before the command.",
            cores,
            cores // world_size,
        )
    asked = _asked_of_accelerate(_parent_command())
    if asked is not None and asked > world_size:
        raise InputError(
            f"accelerate was asked for {asked} processes and started {world_size}. On CPUs use "
            f"torchrun --nproc_per_node {asked} train_simcse.py ... --use_cpu true; with GPUs a "
            "config such as configs/accelerate/multi_gpu.yaml."
        )


def find_command(words: Sequence[str]) -> list[str]:
    """Find the command line that started this run, launcher included.

    Args:
        words: What the script was given.
    """
    parent = _parent_command()
    if parent[len(parent) - len(words) :] == [*words]:
        for place, part in enumerate(parent[:3]):  # python, -m, the launcher
            if launcher := _LAUNCHERS.get(Path(part).name):
                return [launcher, *parent[place + 1 :]]
    return ["python", "train_simcse.py", *words]


_LAUNCHERS = {
    "accelerate": "accelerate",
    "accelerate.commands.accelerate_cli": "accelerate",
    "torchrun": "torchrun",
    "torch.distributed.run": "torchrun",
}


def _parent_command() -> list[str]:
    try:
        return list(psutil.Process(os.getppid()).cmdline())
    except psutil.Error:
        return []


def _asked_of_accelerate(command: list[str]) -> int | None:
    """Find `num_processes` of an `accelerate launch` command or of its configuration."""
    if "launch" not in command:
        return None
    place = command.index("launch")
    if not any(Path(part).name.startswith("accelerate") for part in command[:place]):
        return None
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    parser = launch_command_parser()
    args: Any = parser.parse_args(command[place + 1 :])
    if args.num_processes:
        return int(args.num_processes)
    path = args.config_file or (default_config_file if Path(default_config_file).is_file() else "")
    if not path:
        return None
    found = load_config_from_file(path)
    return int(found.num_processes) if found.num_processes else None
