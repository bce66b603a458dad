"""A Trainer that no interruption hurts: kills, pre-empted machines, full disks."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from simcse_trainer.checkpoints import (
    STAGING,
    find_checkpoint,
    move_files,
    publish,
    what_is_torn,
)
from simcse_trainer.errors import InputError

logger = logging.getLogger(__name__)

# What a full disk looks like to Python, to safetensors and to torch.save.
_SAVING_ERRORS = (OSError, SafetensorError, RuntimeError)
# With several processes, how often they ask each other whether one was told to stop.
_AGREE_EVERY = 8


class SafeTrainer(Trainer):
    """Saves checkpoints whole, resumes from whole ones, and saves one before it is terminated.

    Attributes:
        interrupted: Training ended early because of SIGTERM, after saving a checkpoint.
    """

    interrupted = False

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest complete one.
            args: As for `Trainer.train`.
            kwargs: As for `Trainer.train`.

        Raises:
            InputError: The checkpoint is torn, or there is none.
        """
        folder = Path(str(self.args.output_dir))
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        checkpoint = _choose_checkpoint(resume_from_checkpoint, folder)
        if checkpoint is not None:
            self._check_resumable(Path(checkpoint))
        stop = _StopOnTermination(self)
        self.add_callback(stop)
        try:
            with stop.listening():
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(stop)

    def _check_resumable(self, checkpoint: Path) -> None:
        """For subclasses: refuse a checkpoint of another run."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a folder that holds a model keeps it until all is written.

        Raises:
            InputError: The model could not be written.
        """
        if _internal_call:
            return self._save_part_of_checkpoint(output_dir)
        folder = Path(output_dir or str(self.args.output_dir))
        staged = folder / STAGING
        try:
            super().save_model(str(staged), _internal_call=True)
            if self.args.should_save:
                move_files(staged, folder)
        except _SAVING_ERRORS as error:
            shutil.rmtree(staged, ignore_errors=True)
            last = find_checkpoint(folder) if folder.is_dir() else None
            raise InputError(
                f"The model could not be saved in {folder}: {_in_one_line(error)}. Free some space"
                + (f"; {last.name} is complete: --resume_from_checkpoint true." if last else ".")
            ) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside and rename; where that fails, training goes on and the last one stays."""
        run = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        self._staging, self._failure = run / STAGING, None
        try:
            super()._save_checkpoint(model, trial)
        except _SAVING_ERRORS as error:
            self._failure = self._failure or error
        failure = self._failure
        staged, self._staging = self._staging / name, None
        if self._all_processes(failure is None):
            try:
                self._publish(staged, run / name)
            except _SAVING_ERRORS as error:
                failure = error
        saved = self._all_processes(failure is None)
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        if not saved:
            self.state.best_model_checkpoint = best
            logger.warning(
                "%s could not be saved (%s). Training goes on, and earlier checkpoints stay; free "
                "some space before the next one.",
                name,
                _in_one_line(failure) if failure else "in another process",
            )

    def _publish(self, staged: Path, final: Path) -> None:
        is_best = self.state.best_model_checkpoint == str(staged)
        if is_best:
            self.state.best_model_checkpoint = str(final)
        if not self.args.should_save:
            return
        if is_best:
            self.state.save_to_json(str(staged / "trainer_state.json"))
        publish(staged, final)
        rotate_checkpoints(
            output_dir=str(final.parent),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    _staging: Path | None = None
    _failure: BaseException | None = None

    def _save_part_of_checkpoint(self, output_dir: str | None) -> None:
        try:
            super().save_model(output_dir, _internal_call=True)
        except _SAVING_ERRORS as error:
            # The Trainer has a barrier behind this: all processes have to arrive there.
            self._failure = error

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else str(super()._get_output_dir(trial))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not here, where the folder has still to be renamed: `HubCheckpointCallback` pushes."""

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.interrupted:
            return super()._finalize_training(trial, *args, **kwargs)
        # The run is not at its end: its last checkpoint is what it goes on from, whatever the
        # limit says, and the best model is chosen when all have been seen.
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit, self.args.load_best_model_at_end = None, False
        try:
            return super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best

    def _all_processes(self, holds: bool) -> bool:
        if int(self.args.world_size) == 1:
            return holds
        count = torch.tensor(int(holds), device=self.args.device)
        return int(self.accelerator.reduce(count, reduction="sum")) == int(self.args.world_size)


class _StopOnTermination(TrainerCallback):
    """On SIGTERM: finish the step, save a checkpoint, end training.

    transformers' own just-in-time checkpoint may save between a step's gradients and its update,
    where a resumed run draws other dropout masks than the uninterrupted one.
    """

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer
        self.told = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """While training; only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _hear(self, *_: Any) -> None:
        self.told = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here, in all processes at the same step."""
        if args.world_size > 1:
            if state.global_step % _AGREE_EVERY:
                return
            self.told = not self.trainer._all_processes(not self.told)
        if self.told:
            if state.is_world_process_zero:
                logger.warning("SIGTERM: a checkpoint is saved after step %d.", state.global_step)
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


def _choose_checkpoint(asked: str | bool | None, folder: Path) -> str | None:
    if not asked:
        return None
    if asked is True:
        found = find_checkpoint(folder) if folder.is_dir() else None
        if found is None:
            raise InputError(f"There is no complete checkpoint in {folder} to resume from.")
        return str(found)
    torn = what_is_torn(Path(asked))
    if torn is not None:
        raise InputError(
            f"{asked} cannot be resumed from: {torn}. Pass --resume_from_checkpoint true for the "
            "newest complete checkpoint."
        )
    return asked


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
