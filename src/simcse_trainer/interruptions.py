"""A Trainer that no interruption hurts: kills, pre-empted machines, full disks."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from simcse_trainer.checkpoints import (
    choose_checkpoint,
    delete_old_checkpoints,
    find_checkpoint,
    publish,
    read_checkpoint,
    what_is_torn,
)
from simcse_trainer.errors import InputError
from simcse_trainer.files import CHECKPOINT_PREFIX, STATE, TMP_PREFIX, step_of
from simcse_trainer.output_check import check_output_dir
from simcse_trainer.output_folder import (
    ForeignFilesError,
    add_documents,
    find_foreign,
    list_files,
    make_tmp,
    make_way,
    move_aside,
    remove_tmp,
    replace_files,
)
from simcse_trainer.run_lock import hold_folder

logger = logging.getLogger(__name__)

# What a full disk looks like to Python, to safetensors and to torch.save.
_SAVING_ERRORS = (OSError, SafetensorError, RuntimeError, ForeignFilesError)
# With several processes, within how many seconds they ask each other whether one was told to stop,
# and after how many steps at most: torchrun kills 30 seconds after SIGTERM.
_AGREE_WITHIN_S, _AGREE_WITHIN_STEPS = 5.0, 8


class SafeTrainer(Trainer):
    """Saves checkpoints whole, resumes from whole ones, and saves one before it is terminated.

    Attributes:
        interrupted: Training ended early because of SIGTERM, after saving a checkpoint.
        run_id: Of the run that the weights are of; a resumed run keeps it.
        weights_step: The optimizer steps that the weights in memory have seen.
        evaluation_is_due: The step after which training stopped was one to evaluate at.
    """

    interrupted = False
    evaluation_is_due = False
    run_id = ""
    _loaded_step: int | None = None
    # Other people's files in the way are renamed, not refused.
    _set_aside = False

    @property
    def weights_step(self) -> int:
        """The last step, or that of the best model once it is loaded."""
        last = int(self.state.global_step)
        return last if self._loaded_step is None else self._loaded_step

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """As `Trainer.train`.

        Args:
            resume_from_checkpoint: See `choose_checkpoint`.
            args: As for `Trainer.train`.
            kwargs: As for `Trainer.train`.

        Raises:
            InputError: The checkpoint is torn, or there is none; `output_dir` holds other people's
                files where the run would write, or another run is at work there.
        """
        folder = Path(str(self.args.output_dir))
        with self._holding(folder):
            checkpoint = choose_checkpoint(resume_from_checkpoint, folder)
            if checkpoint is not None:
                self._check_resumable(checkpoint)
            self._enter(folder, checkpoint)
            callbacks: list[TrainerCallback] = [_StopOnTermination(self), _OwnBestModel(self)]
            for callback in callbacks:
                self.add_callback(callback)
            try:
                with callbacks[0].listening():  # type: ignore[attr-defined]
                    return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)
            finally:
                for callback in callbacks:
                    self.remove_callback(callback)

    def _check_resumable(self, checkpoint: Path) -> None:
        """For subclasses: refuse a checkpoint of another run."""

    def _planned_files(self) -> list[str]:
        """For subclasses: the files that the run will write into `output_dir`."""
        return []

    @contextlib.contextmanager
    def _holding(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of a folder; the first process does."""
        with contextlib.ExitStack() as stack:
            self._on_main(lambda: stack.enter_context(hold_folder(folder)) and None)
            yield

    def _enter(self, folder: Path, checkpoint: Path | None) -> None:
        """Decide which run this is, and whether it may write into its folder."""

        def decide() -> tuple[str, bool]:
            remove_tmp(folder)
            found = read_checkpoint(checkpoint).run if checkpoint else ""
            run = found or self.run_id or _new_id()
            # A run that version 0.1.0 began left files that stand in no manifest.
            old = checkpoint is not None and not found and checkpoint.parent == folder
            overwrite = bool(getattr(self.args, "overwrite_output_dir", False))
            check_output_dir(
                folder,
                self._planned_files(),
                run=run,
                resumed=checkpoint is not None,
                overwrite=overwrite,
                set_aside=overwrite or old,
            )
            return run, overwrite or old

        self.run_id, self._set_aside = self._on_main(decide)
        self._loaded_step = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`; a folder that holds a model keeps it until all is written.

        Raises:
            InputError: The model could not be written, or other people's files are in its way.
        """
        if _internal_call:
            return self._save_part_of_checkpoint(output_dir)
        folder = Path(output_dir or str(self.args.output_dir))
        self.run_id = self.run_id or self._on_main(_new_id)
        with self._holding(folder):
            tmp = folder / self._tmp_name
            staged = tmp / "model"
            try:
                self._on_main(lambda: make_tmp(folder, self.run_id) and None)
                super().save_model(str(staged), _internal_call=True)
                self._on_main(lambda: self._move_model(staged, folder))
            except ForeignFilesError:
                raise  # which says what is in the way
            except _SAVING_ERRORS as error:
                last = find_checkpoint(folder) if folder.is_dir() else None
                raise InputError(
                    f"The model could not be saved in {folder}: {_in_one_line(error)}. Free some "
                    "space"
                    + (
                        f"; {last.name} is complete: --resume_from_checkpoint true."
                        if last
                        else "."
                    )
                ) from error
            finally:
                if self.args.should_save:
                    shutil.rmtree(tmp, ignore_errors=True)

    def _move_model(self, staged: Path, folder: Path) -> None:
        if self._set_aside:
            move_aside(folder, find_foreign(folder, list_files(staged)))
        try:
            replace_files(staged, folder, run=self.run_id, step=self.weights_step)
        except ForeignFilesError as error:
            # They came while it trained. The model is not given up for them.
            elsewhere = _find_free(folder / f"model-{self.weights_step}")
            replace_files(staged, elsewhere, run=self.run_id, step=self.weights_step)
            raise ForeignFilesError(
                f"{error} The model is in {elsewhere} instead. Move the file away to save it there."
            ) from None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside and rename; where that fails, training goes on and the last one stays."""
        run = Path(super()._get_output_dir(trial))
        name = f"{CHECKPOINT_PREFIX}-{self.state.global_step}"
        best = self._saved_best
        self._staging, self._failure = run / self._tmp_name, None
        only_model = self.args.save_only_model
        # What an interrupted run leaves is there to go on from.
        self.args.save_only_model = only_model and not self.interrupted
        try:
            if self.args.should_save:
                make_tmp(run, self.run_id)
            super()._save_checkpoint(model, trial)
        except _SAVING_ERRORS as error:
            self._failure = self._failure or error
        finally:
            self.args.save_only_model = only_model
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
        if saved:
            self._saved_best = self._best_so_far()
            return
        # The best model is the best that can be loaded.
        state = self.state
        state.best_metric, state.best_global_step, state.best_model_checkpoint = best
        logger.warning(
            "%s could not be saved (%s). Training goes on, and earlier checkpoints stay; free "
            "some space before the next one.",
            name,
            _in_one_line(failure) if failure else "in another process",
        )

    def _publish(self, staged: Path, final: Path) -> None:
        state = self.state
        is_best = state.best_model_checkpoint == str(staged)
        if is_best:
            state.best_model_checkpoint = str(final)
        if not self.args.should_save:
            return
        if is_best:
            state.save_to_json(str(staged / STATE))
        step = int(state.global_step)
        publish(staged, final, run=self.run_id, step=step, set_aside=self._set_aside)
        if self.args.save_total_limit and self.args.save_total_limit > 0:
            self._delete_checkpoints(final.parent, self.args.save_total_limit, {step})

    def _delete_checkpoints(self, folder: Path, keep: int, protected: set[int]) -> None:
        best = step_of(self.state.best_model_checkpoint)
        protected = protected if best is None else protected | {best}
        delete_old_checkpoints(folder, run=self.run_id, keep=keep, protected=protected)

    _staging: Path | None = None
    _failure: BaseException | None = None
    _saved_best: tuple[Any, Any, Any] = (None, None, None)

    def _best_so_far(self) -> tuple[Any, Any, Any]:
        state = self.state
        return state.best_metric, state.best_global_step, state.best_model_checkpoint

    @property
    def _tmp_name(self) -> str:
        return f"{TMP_PREFIX}{self.run_id}"

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
        # The Trainer deletes folders by their names here.
        limit, best = self.args.save_total_limit, self.args.load_best_model_at_end
        self.args.save_total_limit = None
        # An interrupted run is not at its end: the best model is chosen when all have been seen.
        self.args.load_best_model_at_end = best and not self.interrupted
        try:
            result = super()._finalize_training(trial, *args, **kwargs)
        finally:
            self.args.save_total_limit, self.args.load_best_model_at_end = limit, best
        # Its last checkpoint is what an interrupted run goes on from, whatever the limit says.
        only_best = limit == 1 and self.state.best_model_checkpoint and not self.interrupted
        if only_best and self.args.should_save:
            self._delete_checkpoints(Path(super()._get_output_dir(trial)), 1, set())
        return result

    def save_state(self) -> None:
        """As `Trainer.save_state`; the file is recorded as ours."""
        with self._documents(Path(str(self.args.output_dir)), STATE):
            super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As `Trainer.save_metrics`; the files are recorded as ours."""
        names = [f"{split}_results.json", *(["all_results.json"] if combined else [])]
        with self._documents(Path(str(self.args.output_dir)), *names):
            super().save_metrics(split, metrics, combined)

    @contextlib.contextmanager
    def _documents(self, folder: Path, *names: str) -> Iterator[None]:
        """While files are written beside a model, in the first process.

        Raises:
            InputError: Somebody else's files have these names.
        """
        if not self.is_world_process_zero():
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            make_way(folder, name, set_aside=self._set_aside)
        yield
        add_documents(folder, names)

    def _on_main(self, call: Callable[[], Any]) -> Any:
        """Return in every process what the first one finds; all raise what it raises."""
        result, error = None, None
        if self.args.should_save:
            try:
                result = call()
            except (*_SAVING_ERRORS, InputError) as found:
                error = found
        if int(self.args.world_size) > 1:
            box = [(result, error and str(error))]
            broadcast_object_list(box, from_process=0)
            result, told = box[0]
            error = error or (InputError(told) if told else None)
        if error is not None:
            raise error
        return result

    def _all_processes(self, holds: bool) -> bool:
        return self._largest(float(not holds))[0] == 0.0

    def _largest(self, *values: float) -> list[float]:
        """Return of each value the largest that a process has."""
        if int(self.args.world_size) == 1:
            return [*values]
        own = torch.tensor([values], dtype=torch.float32, device=self.args.device)
        largest: list[float] = self.accelerator.gather(own).amax(0).tolist()
        return largest


class _OwnBestModel(TrainerCallback):
    """The best checkpoint of a resumed run is the one in its own folder.

    Its state names the folder that the run began in: it may have moved, or be another run's now.
    """

    def __init__(self, trainer: SafeTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find it by its step."""
        step = state.best_global_step
        if step:
            own = Path(str(args.output_dir)) / f"{CHECKPOINT_PREFIX}-{step}"
            torn = what_is_torn(own)
            state.best_model_checkpoint = str(own) if torn is None else None
            if torn is not None:
                logger.warning("The best model so far, %s, cannot be loaded: %s.", own, torn)
                state.best_metric = state.best_global_step = None
        self._evaluate_if_due(state)
        self.trainer._saved_best = self.trainer._best_so_far()

    def _evaluate_if_due(self, state: Any) -> None:
        trainer = self.trainer
        if not trainer.evaluation_is_due or trainer.eval_dataset is None:
            return
        trainer.evaluation_is_due = False
        folder = Path(str(trainer.args.output_dir))
        if trainer._determine_best_metric(trainer._evaluate(None, None), None):
            own = folder / f"{CHECKPOINT_PREFIX}-{state.global_step}"
            state.best_model_checkpoint = str(own)


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

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree at the first step: how long one takes is not known yet."""
        self.next_agreement = state.global_step + 1
        self.last = (state.global_step, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop here, in all processes at the same step."""
        if args.world_size > 1:
            if state.global_step < self.next_agreement:
                return
            self._agree(state.global_step)
        if self.told:
            if state.is_world_process_zero:
                logger.warning("SIGTERM: a checkpoint is saved after step %d.", state.global_step)
            self.trainer.interrupted = True
            control.should_save = control.should_training_stop = True
            self._put_off(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An epoch that ends because of the stop is not over; one that is over is evaluated."""
        if self.trainer.interrupted:
            if control.should_evaluate and round(state.epoch, 9).is_integer():
                control.should_save = True
                self._put_off(control)
            control.should_evaluate = False

    def _put_off(self, control: Any) -> None:
        """Evaluate when training goes on: there may not be the time for it now."""
        self.trainer.evaluation_is_due |= control.should_evaluate
        control.should_evaluate = False

    def _agree(self, step: int) -> None:
        """Ask all processes, and compute alike in all of them when to ask again.

        From the slowest one's time of a step: by their own, some would wait for others that do not
        come.
        """
        last_step, last_time = self.last
        now = time.monotonic()
        told, seconds = self.trainer._largest(
            float(self.told), (now - last_time) / max(step - last_step, 1)
        )
        self.told = told > 0
        steps = int(_AGREE_WITHIN_S / max(seconds, 1e-9))
        self.next_agreement = step + min(max(steps, 1), _AGREE_WITHIN_STEPS)
        self.last = (step, now)


def _new_id() -> str:
    return uuid4().hex[:16]


def _find_free(path: Path) -> Path:
    count, found = 1, path
    while found.exists():
        count += 1
        found = path.with_name(f"{path.name}-{count}")
    return found


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
