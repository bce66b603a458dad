"""HubCheckpointCallback: every save goes to the Hub, and no Hub goes into training's way."""

from __future__ import annotations

import atexit
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy

from simcse_trainer.checkpoints import read_checkpoint, what_is_torn
from simcse_trainer.errors import InputError
from simcse_trainer.files import CARD, UPLOADS, step_of
from simcse_trainer.hub.contents import link_files, list_published
from simcse_trainer.hub.failures import HubFailure
from simcse_trainer.hub.process import HubProcess, HubSettings
from simcse_trainer.hub.pushing import remove_uploads, stage_folder
from simcse_trainer.hub.snapshot import (
    best_of,
    figure_of,
    link_state,
    make_target,
    message_of,
    pushes_of,
)
from simcse_trainer.hub.uploader import Upload, Uploader, push_words
from simcse_trainer.output_folder import remove_own

logger = logging.getLogger(__name__)

# How long the checks before training may take, with the start of the process that makes them.
_CHECK_S, _CHECK_CARD_S = 7.0, 2.0


class HubCheckpointCallback(TrainerCallback):
    """Pushes each checkpoint, its card and its training state, in the background.

    The options are the Trainer's: `hub_model_id` (by default the name of `output_dir`),
    `hub_token`, `hub_private_repo`, `hub_revision` (the branch), `hub_strategy` (`end`: only the
    final model; `all_checkpoints`, or `hub_always_push`: no save is left out; else a newer save
    replaces one that waits), `hub_push_training_state`, `hub_timeout_s`, `hub_final_timeout_s`.

    Args:
        args: Of the Trainer.

    Attributes:
        write_card: Writes `README.md` into a folder, for the repository named and the weights of
            a step; set by the Trainer.
        pushes_models: Each call of `save_model` is pushed. Unset where more is still to follow.
        waits_at_train_end: In a single process the end of training waits for the last upload.
            Unset where something is still to follow; `finish` waits then.

    Raises:
        InputError: Token, permission, repository name or card metadata are no good.
    """

    def __init__(self, args: Any):
        self.args = args
        self.write_card: Callable[[Path, str, int], None] | None = None
        self.pushes_models = True
        self.waits_at_train_end = int(args.world_size) == 1
        self.uploader: Uploader | None = None
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
        self._check({"action": "check"}, _CHECK_S)
        atexit.register(self.finish)

    def _uploader(self, settings: HubSettings) -> Uploader:
        args = self.args
        keep_all = args.hub_always_push or args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
        return Uploader(HubProcess(settings), keep_all=keep_all)

    def check_card(self, metadata: str) -> None:
        """Ask the Hub whether it takes a card's metadata.

        Args:
            metadata: The YAML, without its dashes.

        Raises:
            InputError: It does not.
        """
        request = {"action": "check_card", "content": f"---\n{metadata}\n---\n"}
        self._check(request, _CHECK_CARD_S)

    def _check(self, request: dict[str, str], patience_s: float) -> None:
        if self.uploader is None:
            return
        try:
            self.uploader.check(request, patience_s=patience_s)
        except HubFailure as failure:
            self.uploader.end()
            raise InputError(
                f"push_to_hub: {self.uploader.repository} cannot be pushed to: {failure}. Mend it, "
                "or pass --push_to_hub false."
            ) from None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Queue the checkpoint just written; whatever goes wrong here, training goes on."""
        if self.uploader is None or args.hub_strategy == HubStrategy.END:
            return
        checkpoint = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if what_is_torn(checkpoint) is not None:
            return  # it could not be saved, which has been said
        try:
            self.uploader.submit(self._stage(checkpoint, state))
        except Exception as error:
            logger.warning("%s is not pushed: %s. Training goes on.", checkpoint.name, error)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wait for the last upload; with several processes not here, where the others would too."""
        if self.waits_at_train_end:
            self.finish()

    def push_folder(self, folder: Path) -> None:
        """Queue a finished model's folder, with the training state of its last checkpoint."""
        if self.uploader is not None:
            upload = stage_folder(
                folder,
                branch=self.args.hub_revision or "main",
                training_state=self.args.hub_push_training_state,
            )
            self.uploader.submit(upload)

    def finish(self) -> bool:
        """Wait for what is under way, `hub_final_timeout_s` at most, and say how it ended.

        Returns:
            Whether the newest upload is on the Hub.
        """
        if self.uploader is None or (self.uploader.is_idle and self.uploader.failure is None):
            return True
        args = self.args
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
            push_words(args.output_dir, self.uploader.repository, failure),
        )
        settings = replace(self.uploader.settings, name=self.uploader.repository)
        self.uploader = self._uploader(settings)
        return False

    def _stage(self, checkpoint: Path, state: Any) -> Upload:
        assert self.uploader is not None
        repository, step = self.uploader.repository, int(state.global_step)
        best = best_of(checkpoint)
        model = best if best is not None and best.is_dir() else checkpoint
        target = make_target(checkpoint.parent)
        names = list_published(model)
        if self.write_card is not None:
            self.write_card(checkpoint, repository, step)
            # That of the best model tells of its weights, as what is known now does.
            names = [name for name in names if name != CARD]
            link_files(model, target / "model", names)
            self.write_card(target / "model", repository, step_of(model) or step)
        else:
            link_files(model, target / "model", names)
        if self.args.hub_push_training_state and not link_state(checkpoint, best, target / "state"):
            logger.warning(
                "The training state of %s is not pushed: DeepSpeed would execute what it reads of "
                "it. Keep the checkpoint to go on from.",
                checkpoint.name,
            )
        pushes = pushes_of(
            target,
            step=step_of(model),
            run=read_checkpoint(checkpoint).run,
            message=message_of(vars(state), step, self.args.metric_for_best_model),
            branch=self.args.hub_revision or "main",
            state_step=step,
        )
        return Upload(f"step {step}", target, pushes, figure_of(target, checkpoint))
