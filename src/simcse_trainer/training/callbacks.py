"""What happens beside training, in this order: preemption, model card, Hub push."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers import TrainerCallback
from transformers.trainer_utils import HubStrategy

from simcse_trainer.analysis.figures import draw_training_curve
from simcse_trainer.errors import InputError
from simcse_trainer.files import CARD, CHECKPOINT_PREFIX, TRAINING_CURVE, UPLOADS, get_step
from simcse_trainer.hub.card_data import hub_metadata
from simcse_trainer.hub.client import HubClient, HubSettings
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.hub.model_card import render_card
from simcse_trainer.hub.published_files import link_files, list_published
from simcse_trainer.hub.run_info import RunInfo, make_card_data
from simcse_trainer.hub.stage import (
    MODEL,
    TRAINING_STATE_FOLDER,
    get_best_checkpoint,
    get_commit_message,
    link_log,
    link_state,
    make_target,
    push_words,
    remove_uploads,
    stage_folder,
    stage_pushes,
)
from simcse_trainer.hub.uploader import Upload, Uploader
from simcse_trainer.model.io.checkpoints import read_checkpoint, validate_checkpoint
from simcse_trainer.model.io.folder import remove_own
from simcse_trainer.model.io.manifest import read_manifest
from simcse_trainer.training.checkpointing import AtomicCheckpoints
from simcse_trainer.training.processes import Processes
from simcse_trainer.training.resume import find_own_best

logger = logging.getLogger(__name__)

# With several processes, within how many seconds they ask each other whether one was told to stop,
# and after how many steps at most: torchrun kills 30 seconds after SIGTERM.
_AGREE_WITHIN_S, _AGREE_WITHIN_STEPS = 5.0, 8
# Within how many seconds two Ctrl-C are one.
_ONE_CTRL_C_S = 0.5
_STOPPING = "Ctrl-C: the step is finished and a checkpoint saved. Again: leave at once."
# How long the checks before training may take together, with the start of their processes; and
# what of it the first leaves for the card's. A Hub that used up the rest will hardly answer in it,
# and what it says later is told.
_CHECKS_S, _CHECK_CARD_S = 9.0, 1.0


class PreemptionCallback(TrainerCallback):
    """On SIGTERM or the first Ctrl-C: finish the step, save a checkpoint, end training.

    A second Ctrl-C leaves at once.

    transformers' own just-in-time checkpoint may save between a step's gradients and its update,
    where a resumed run draws other dropout masks than the uninterrupted one.

    Args:
        processes: The processes of the run, which have to agree.

    Attributes:
        interrupted: Training ended early because of a signal, after saving a checkpoint.
        signal: The number of the signal that this process got; 0 before.
        evaluation_is_due: The step after which training stopped was one to evaluate at.
    """

    def __init__(self, processes: Processes):
        self.processes = processes
        self.interrupted = False
        self.signal = 0
        self.evaluation_is_due = False
        self._told = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while training; only the main thread can."""
        self.interrupted = self._told = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.signal, self._pid, self._heard = 0, os.getpid(), 0.0
        before = {which: signal.getsignal(which) for which in (signal.SIGTERM, signal.SIGINT)}
        if before[signal.SIGINT] is signal.SIG_IGN:  # a job in the background
            del before[signal.SIGINT]
        for which in before:
            signal.signal(which, self._hear)
        try:
            yield
        finally:
            for which, handler in before.items():
                if handler is not None:  # not set from Python
                    signal.signal(which, handler)

    def _hear(self, number: int, *_: Any) -> None:
        if os.getpid() != self._pid:
            return  # a worker that reads data, which ends when training does
        now = time.monotonic()
        if number == signal.SIGINT:
            # Of a launcher that passes on what the terminal has sent already.
            again = self.signal == signal.SIGINT and now - self._heard > _ONE_CTRL_C_S
            if again:
                raise KeyboardInterrupt
            # Nothing that is buffered may be written to in a signal's handler.
            if not self._told:
                os.write(2, f"\n{_STOPPING}\n".encode())
        self._told, self.signal, self._heard = True, number, now

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
        if self._told:
            if state.is_world_process_zero:
                name = signal.Signals(self.signal or signal.SIGTERM).name
                logger.warning("%s: a checkpoint is saved after step %d.", name, state.global_step)
            self.interrupted = True
            control.should_save = control.should_training_stop = True
            self._put_off(control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate an epoch that is over; one that the stop ends is not."""
        if self.interrupted:
            if control.should_evaluate and round(state.epoch, 9).is_integer():
                control.should_save = True
                self._put_off(control)
            control.should_evaluate = False

    def _put_off(self, control: Any) -> None:
        """Evaluate when training continues: there may not be the time for it now."""
        self.evaluation_is_due |= control.should_evaluate
        control.should_evaluate = False

    def _agree(self, step: int) -> None:
        """Ask all processes, and compute alike in all of them when to ask again.

        From the slowest one's time of a step: by their own, some would wait for others that do not
        come.
        """
        last_step, last_time = self.last
        now = time.monotonic()
        told, seconds = self.processes.largest(
            float(self._told), (now - last_time) / max(step - last_step, 1)
        )
        self._told = told > 0
        steps = int(_AGREE_WITHIN_S / max(seconds, 1e-9))
        self.next_agreement = step + min(max(steps, 1), _AGREE_WITHIN_STEPS)
        self.last = (step, now)


class ResumeCallback(TrainerCallback):
    """What a resumed run does before its first step.

    Args:
        trainer: The `SimCSETrainer` that it belongs to.
    """

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the best model so far, and make up for an evaluation that was put off."""
        trainer, folder = self.trainer, Path(str(args.output_dir))
        find_own_best(state, folder)
        if trainer.preemption.evaluation_is_due and trainer.eval_dataset is not None:
            trainer.preemption.evaluation_is_due = False
            if trainer._determine_best_metric(trainer._evaluate(None, None), None):
                state.best_model_checkpoint = str(checkpoint_folder(args, state))
        trainer.checkpoints.remember_best(state)


class ModelCardCallback(TrainerCallback):
    """Writes `README.md` of what `run_info` says, as a callback into each checkpoint.

    Args:
        args: The training options, `SimCSETrainingArguments`.
        run_info: What is known of the run.
        checkpoints: Of the run; they record the card as ours.
        template: The card's template, from `read_template`.
    """

    def __init__(self, args: Any, run_info: RunInfo, checkpoints: AtomicCheckpoints, template: str):
        self.args = args
        self.run_info = run_info
        self.checkpoints = checkpoints
        self.template = template

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the card of the checkpoint that was just saved; training continues without one."""
        checkpoint = checkpoint_folder(args, state)
        if not state.is_world_process_zero or validate_checkpoint(checkpoint) is not None:
            return  # it could not be saved, which has been said
        self.run_info.steps, self.run_info.log_history = state.global_step, state.log_history
        self.run_info.weights_step = state.global_step
        try:
            self.write(checkpoint, figure=False, step=state.global_step)
        except Exception as error:
            logger.warning("The card of %s is not written: %s.", checkpoint.name, error)

    def metadata(self) -> str:
        """Return the YAML at the top of the card, as far as it is known now."""
        return hub_metadata(make_card_data(self.run_info)).to_yaml()

    def write(
        self,
        folder: Path,
        *,
        model_id: str | None = None,
        figure: bool = True,
        step: int | None = None,
    ) -> None:
        """Write `README.md`, and the training curve where it can be drawn.

        Args:
            folder: The folder that is written into.
            model_id: What the card says to load; by default the repository, else `output_dir`.
            figure: Draw `training_curve.png`; else only refer to it, for who draws it elsewhere.
            step: Of the weights that the folder holds; by default as it says itself.

        Raises:
            InputError: The user's template fails, or the card would replace a stranger's.
        """
        data = make_card_data(
            self.run_info,
            model_id,
            # While training adapters are saved as they are.
            in_checkpoint=step is not None or get_step(folder) is not None,
            step=self._find_step(folder) if step is None else step,
        )
        text = render_card(data, self.template)
        token = str(self.args.hub_token or get_token() or "")
        if len(token) > 7:  # wherever it slipped in; a shorter one is none, and may be a word
            text = text.replace(token, "***")
        drawn = [TRAINING_CURVE] if figure and data.figure else []
        with self.checkpoints.documents(folder, CARD, *drawn):
            if drawn:
                draw_training_curve(self.run_info.log_history, folder / TRAINING_CURVE)
            (folder / CARD).write_text(text, encoding="utf-8")

    def _find_step(self, folder: Path) -> int:
        """Find the step of the weights in a folder, as it says itself; else of those in memory."""
        manifest = read_manifest(folder)
        if manifest is None or not manifest.holds_model or manifest.step is None:
            return self.run_info.weights_step
        return manifest.step


class HubCheckpointCallback(TrainerCallback):
    """Pushes each checkpoint, its card and its training state, in the background.

    The options are the Trainer's: `hub_model_id` (by default the name of `output_dir`),
    `hub_token`, `hub_private_repo`, `hub_revision` (the branch), `hub_strategy` (`end`: only the
    final model; `all_checkpoints`, or `hub_always_push`: no save is left out; else a newer save
    replaces one that waits), `hub_push_training_state`, `hub_timeout_s`, `hub_final_timeout_s`.

    Args:
        args: The training options, `SimCSETrainingArguments`.
        pushes_final_model: Each call of `save_model` is pushed, and in a single process the end of
            training waits for it. False where the caller has more to add to the final model, then
            calls `push_folder` and `finish`.

    Attributes:
        card: Writes the card; set by the trainer.

    Raises:
        InputError: Token, permission, repository name or card metadata are no good.
    """

    def __init__(self, args: Any, *, pushes_final_model: bool = True):
        self.args = args
        self.pushes_final_model = pushes_final_model
        self.card: ModelCardCallback | None = None
        self.uploader: Uploader | None = None
        self._patience_s = _CHECKS_S
        if args.process_index == 0:
            self._connect()

    def _connect(self) -> None:
        args = self.args
        remove_own(Path(str(args.output_dir)) / UPLOADS)  # of a run that was killed
        settings = HubSettings(
            name=args.hub_model_id or Path(str(args.output_dir)).absolute().name,
            token=args.hub_token,
            private=args.hub_private_repo,
            timeout_s=args.hub_timeout_s,
        )
        self.uploader = self._uploader(settings)
        self._check("check", patience_s=_CHECKS_S - _CHECK_CARD_S)
        atexit.register(self.finish)

    def _uploader(self, settings: HubSettings) -> Uploader:
        args = self.args
        keep_all = args.hub_always_push or args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        return Uploader(HubClient(settings), keep_all=keep_all)

    def check_card(self, metadata: str) -> None:
        """Ask the Hub whether it takes a card's metadata.

        Args:
            metadata: The YAML, without its dashes.

        Raises:
            InputError: The Hub refuses the metadata.
        """
        self._check("check_card", f"---\n{metadata}\n---\n", patience_s=self._patience_s)

    def _check(self, command: str, content: str = "", *, patience_s: float) -> None:
        if self.uploader is None:
            return
        began = time.monotonic()
        try:
            self.uploader.check(command, content=content, patience_s=patience_s)
        except HubFailure as failure:
            self.uploader.end()
            raise InputError(
                f"push_to_hub: {self.uploader.repository} cannot be pushed to: {failure}. Correct "
                "it, or pass --push_to_hub false."
            ) from None
        left = self._patience_s - (time.monotonic() - began)
        self._patience_s = max(left, _CHECK_CARD_S)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Queue the checkpoint just written; whatever fails here, training continues."""
        if self.uploader is None or args.hub_strategy == HubStrategy.END:
            return
        checkpoint = checkpoint_folder(args, state)
        if validate_checkpoint(checkpoint) is not None:
            return  # it could not be saved, which has been said
        try:
            target = self._stage(checkpoint, state)
            self.uploader.submit(Upload(f"step {state.global_step}", target))
        except Exception as error:
            logger.warning("%s is not pushed: %s. Training continues.", checkpoint.name, error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the last upload; with several processes not here, where the others would too."""
        if self.pushes_final_model and int(args.world_size) == 1:
            self.finish()

    def push_folder(self, folder: Path, *, blocking: bool = False) -> str:
        """Queue a finished model's folder, with the training state of its last checkpoint.

        Args:
            folder: Of the run, or any trained model.
            blocking: Wait until it is on the Hub, for `hub_final_timeout_s` at most.

        Returns:
            The repository; empty in other processes than the first.

        Raises:
            InputError: With `blocking`: it is not there; the message says how to finish.
        """
        if self.uploader is None:
            return ""
        target = stage_folder(
            folder,
            branch=self.args.hub_revision or "main",
            training_state=self.args.hub_push_training_state,
        )
        repository = self.uploader.repository
        self.uploader.submit(Upload(f"the model in {folder}", target))
        if blocking and not self.finish():
            raise InputError(
                f"{folder} is saved and not on the Hub. Finish with: simcse-trainer push {folder} "
                f"{repository}"
            )
        return repository

    def finish(self) -> bool:
        """Wait for what is under way, `hub_final_timeout_s` at most, and say how it ended.

        Returns:
            Whether the newest upload is on the Hub.
        """
        args = self.args
        if self.uploader is None:
            return True
        if self.uploader.is_idle and self.uploader.failure is None:
            remove_uploads(Path(str(args.output_dir)))
            return True
        bar = not args.disable_tqdm
        try:
            failure = self.uploader.finish(args.hub_final_timeout_s, show_progress=bar)
        except KeyboardInterrupt:
            self.uploader.end()
            failure = HubFailure("interrupted")
        remove_uploads(Path(str(args.output_dir)))
        if failure is None:
            logger.info("%s is on the Hub.", self.uploader.repository)
            return True
        logger.warning(
            "All is safe in %s, but not all of it is on the Hub: %s. Finish with: "
            "simcse-trainer push %s",
            args.output_dir,
            failure.text,
            push_words(args.output_dir, self.uploader.repository, failure.options),
        )
        settings = replace(self.uploader.settings, name=self.uploader.repository)
        self.uploader = self._uploader(settings)
        return False

    def _stage(self, checkpoint: Path, state: Any) -> Path:
        """Stage a checkpoint, and the best model where that is another one."""
        assert self.uploader is not None
        step, best = int(state.global_step), get_best_checkpoint(checkpoint)
        model = best if best is not None and best.is_dir() else checkpoint
        target = make_target(checkpoint.parent)
        names = list_published(model)
        if self.card is not None:
            # That of the best model tells of its weights, as what is known now does.
            names = [name for name in names if name != CARD]
            link_files(model, target / MODEL, names)
            model_step = get_step(model) or step
            repository = self.uploader.repository
            self.card.write(target / MODEL, model_id=repository, figure=False, step=model_step)
        else:
            link_files(model, target / MODEL, names)
        state_folder = target / TRAINING_STATE_FOLDER
        if self.args.hub_push_training_state and not link_state(checkpoint, best, state_folder):
            logger.warning(
                "The training state of %s is not pushed: DeepSpeed would execute what it reads of "
                "it. Keep the checkpoint to go on from.",
                checkpoint.name,
            )
        link_log(target, checkpoint)
        stage_pushes(
            target,
            step=get_step(model),
            run=read_checkpoint(checkpoint).run,
            message=get_commit_message(vars(state), step, self.args.metric_for_best_model),
            branch=self.args.hub_revision or "main",
            state_step=step,
        )
        return target


def checkpoint_folder(args: Any, state: Any) -> Path:
    """Return where the Trainer has just saved."""
    return Path(str(args.output_dir)) / f"{CHECKPOINT_PREFIX}-{state.global_step}"


def take_hub_callback(callbacks: list[Any], args: Any) -> HubCheckpointCallback | None:
    """Take the callback that pushes out of a trainer's, or make it with `push_to_hub`.

    Raises:
        InputError: It is certain now that nothing could be pushed.
    """
    found = [one for one in callbacks if isinstance(one, HubCheckpointCallback)]
    for one in found:
        callbacks.remove(one)
    if found or not args.push_to_hub:
        return found[0] if found else None
    return HubCheckpointCallback(args)
