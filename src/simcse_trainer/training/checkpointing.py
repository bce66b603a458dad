"""AtomicCheckpoints: what a run writes is complete or absent, and overwrites nobody else's files.

The Trainer writes in place, file by file. Here everything is written into a folder aside, gets a
manifest, and is renamed into place when all of it is on the disk (`model.io.checkpoints`).
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    CARD,
    CHECKPOINT_PREFIX,
    STATE,
    TMP_PREFIX,
    TRAINING_ARGS,
    TRAINING_CURVE,
    get_step,
)
from simcse_trainer.model.io.checkpoints import (
    delete_old_checkpoints,
    finalize,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from simcse_trainer.model.io.folder import (
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
from simcse_trainer.model.io.saving import choose_lora_save, find_source, list_model_files
from simcse_trainer.model.lora import has_adapter
from simcse_trainer.training.output_dir import check_output_dir, hold_folder
from simcse_trainer.training.processes import WRITING_ERRORS, Processes

logger = logging.getLogger(__name__)

_SAVING_ERRORS = (*WRITING_ERRORS, ForeignFilesError)


class AtomicCheckpoints:
    """The files of one run: its checkpoints, its model and the documents beside it.

    Args:
        args: The training options, `SimCSETrainingArguments`.
        processes: The processes of the run, which have to agree.

    Attributes:
        run_id: Of the run that the weights are of; a resumed run keeps it.
        tmp_dir: Where the checkpoint is written that is being saved; None at other times.
    """

    def __init__(self, args: Any, processes: Processes):
        self.args = args
        self.processes = processes
        self.run_id = ""
        self.tmp_dir: Path | None = None
        self._set_aside = False
        self._failure: BaseException | None = None
        self._saved_best: tuple[Any, Any, Any] = (None, None, None)

    @contextlib.contextmanager
    def hold(self, folder: Path) -> Iterator[None]:
        """Keep other runs out of a folder; the first process does, and all raise if it cannot."""
        with contextlib.ExitStack() as stack:
            self.processes.on_first(lambda: stack.enter_context(hold_folder(folder)) and None)
            yield

    def begin(self, checkpoint: Path | None, model: Any, *, with_card: bool) -> None:
        """Decide of which run the files are, and refuse a folder with other work in it.

        Args:
            checkpoint: The checkpoint that the run resumes from.
            model: The model that the run trains.
            with_card: It will write a card beside the model.

        Raises:
            InputError: Something is in the way.
        """
        folder = Path(str(self.args.output_dir))
        form = choose_lora_save(model, self.args.lora_save)
        planned_files = [*list_model_files(model, form), TRAINING_ARGS]
        planned_files += [CARD, TRAINING_CURVE] if with_card else []
        overwrite = bool(getattr(self.args, "overwrite_output_dir", False))

        def decide() -> tuple[str, bool]:
            remove_tmp(folder)
            # A resumed run keeps its checkpoints.
            _check_source_stays(model, folder, overwrite=overwrite and checkpoint is None)
            found = read_checkpoint(checkpoint).run if checkpoint else ""
            run = found or self.run_id or _new_id()
            # A run that version 0.1.0 began left files that stand in no manifest.
            old = checkpoint is not None and not found and checkpoint.parent == folder
            check_output_dir(
                folder,
                planned_files,
                run=run,
                resumed=checkpoint is not None,
                overwrite=overwrite,
                set_aside=overwrite or old,
            )
            return run, overwrite or old

        self.run_id, self._set_aside = self.processes.on_first(decide)

    def save_model(self, folder: Path, write: Callable[[str], None], *, step: int) -> None:
        """Write a model; a folder that holds one keeps it until the new one is complete.

        Args:
            folder: The folder that is written into.
            write: Writes the files, into the folder it is given; called in every process.
            step: The optimizer steps that the weights have seen.

        Raises:
            InputError: The model could not be written, or other people's files are in its way.
        """
        self.run_id = self.run_id or self.processes.on_first(_new_id)
        tmp = folder / self._tmp_name
        with self.hold(folder):
            try:
                self.processes.on_first(lambda: make_tmp(folder, self.run_id) and None)
                write(str(tmp / "model"))
                self.processes.on_first(lambda: self._move_model(tmp / "model", folder, step))
            except ForeignFilesError:
                raise  # which says what is in the way
            except _SAVING_ERRORS as error:
                last = find_checkpoint(folder) if folder.is_dir() else None
                hint = f"; {last.name} is complete: --resume_from_checkpoint true." if last else "."
                raise InputError(
                    f"The model could not be saved in {folder}: {_in_one_line(error)}. Free some "
                    f"space{hint}"
                ) from error
            finally:
                if self.processes.is_first:
                    shutil.rmtree(tmp, ignore_errors=True)

    def save_checkpoint(self, folder: Path, write: Callable[[], None], state: Any) -> None:
        """Write a checkpoint aside and rename it; where that fails, training continues without it.

        Args:
            folder: The run's folder, its `output_dir`.
            write: Writes `checkpoint-N` into `tmp_dir`; called in every process.
            state: The state of the training, a `TrainerState`.
        """
        name = f"{CHECKPOINT_PREFIX}-{state.global_step}"
        tmp = self.tmp_dir = folder / self._tmp_name
        self._failure = None
        try:
            if self.processes.is_first:
                make_tmp(folder, self.run_id)
            write()
        except _SAVING_ERRORS as error:
            self._failure = self._failure or error
        finally:
            self.tmp_dir = None
        failure = self._failure
        if self.processes.all_hold(failure is None):
            try:
                self._finalize(tmp / name, folder / name, state)
            except _SAVING_ERRORS as error:
                failure = error
        saved = self.processes.all_hold(failure is None)
        if self.processes.is_first:
            shutil.rmtree(tmp, ignore_errors=True)
        if saved:
            self.remember_best(state)
            return
        # The best model is the best that can be loaded.
        state.best_metric, state.best_global_step, state.best_model_checkpoint = self._saved_best
        logger.warning(
            "%s could not be saved (%s). Training continues, and earlier checkpoints stay; free "
            "some space before the next one.",
            name,
            _in_one_line(failure) if failure else "in another process",
        )

    def write_part(self, write: Callable[[], None]) -> None:
        """Write a part of a checkpoint; a failure is kept for `save_checkpoint`.

        The Trainer has a barrier behind this: all processes have to arrive there.
        """
        try:
            write()
        except _SAVING_ERRORS as error:
            self._failure = error

    def remember_best(self, state: Any) -> None:
        """Note which model is the best of those that are saved."""
        self._saved_best = (state.best_metric, state.best_global_step, state.best_model_checkpoint)

    def delete_all_but(self, folder: Path, keep: int, state: Any, *also: int) -> None:
        """Delete the oldest checkpoints of this run.

        Args:
            folder: The run's folder, its `output_dir`.
            keep: How many stay, at least; the best model does beside them.
            state: The state of the training, a `TrainerState`.
            also: Steps whose checkpoints stay.
        """
        best = get_step(state.best_model_checkpoint)
        protected = {*also} if best is None else {*also, best}
        delete_old_checkpoints(folder, run=self.run_id, keep=keep, protected=protected)

    @contextlib.contextmanager
    def documents(self, folder: Path, *names: str) -> Iterator[None]:
        """Record files that are written beside a model meanwhile, in the first process.

        Raises:
            InputError: Somebody else's files have these names.
        """
        if not self.processes.is_first:
            yield
            return
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            make_way(folder, name, set_aside=self._set_aside)
        yield
        add_documents(folder, names)

    @property
    def _tmp_name(self) -> str:
        return f"{TMP_PREFIX}{self.run_id}"

    def _move_model(self, staged: Path, folder: Path, step: int) -> None:
        if self._set_aside:
            move_aside(folder, find_foreign(folder, list_files(staged)))
        try:
            replace_files(staged, folder, run=self.run_id, step=step)
        except ForeignFilesError as error:
            # They came while it trained. The model is not given up for them.
            elsewhere = _find_free(folder / f"model-{step}")
            replace_files(staged, elsewhere, run=self.run_id, step=step)
            raise ForeignFilesError(
                f"{error} The model is in {elsewhere} instead. Move the file away to save it there."
            ) from None

    def _finalize(self, staged: Path, final: Path, state: Any) -> None:
        is_best = state.best_model_checkpoint == str(staged)
        if is_best:
            state.best_model_checkpoint = str(final)
        if not self.processes.is_first:
            return
        if is_best:
            state.save_to_json(str(staged / STATE))
        step, limit = int(state.global_step), self.args.save_total_limit
        finalize(staged, final, run=self.run_id, step=step, set_aside=self._set_aside)
        if limit and limit > 0:
            self.delete_all_but(final.parent, limit, state, step)


def _check_source_stays(model: Any, folder: Path, *, overwrite: bool) -> None:
    """Refuse to replace or delete the weights that a run begins with while they are needed."""
    source = find_source(model)
    if source == folder.resolve() and has_adapter(model.backbone):
        raise InputError(
            f"output_dir {folder} holds the base model of the adapter, and checkpoints of an "
            "adapter are nothing without it. Pass another --output_dir."
        )
    if overwrite and source in [path.resolve() for path in list_checkpoints(folder)]:
        raise InputError(
            f"--overwrite_output_dir true would delete {source}, which the run begins with. Pass "
            "another --output_dir."
        )


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
