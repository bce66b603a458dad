"""A Trainer whose saves reach the Hub; the Trainer's own uploads are off."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from huggingface_hub import get_token
from transformers.trainer_utils import TrainOutput

from simcse_trainer.describing import Examples, RunDescription, collect_facts
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.plots import draw_training_curve
from simcse_trainer.files import CARD, TRAINING_CURVE, step_of
from simcse_trainer.hub.callback import HubCheckpointCallback
from simcse_trainer.hub.contents import is_local
from simcse_trainer.hub.metadata import card_data
from simcse_trainer.hub.model_card import render_card
from simcse_trainer.interruptions import SafeTrainer
from simcse_trainer.manifest import read_manifest
from simcse_trainer.model.saving import choose_lora_save

logger = logging.getLogger(__name__)


class PushingTrainer(SafeTrainer):
    """Pushes through a `HubCheckpointCallback`, with `push_to_hub`.

    The Trainer's own push copies a fixed list of files, swallows what fails, skips saves while one
    is under way, never pushes the last, and reads folders that rotation deletes.

    Attributes:
        hub: The callback; None without `push_to_hub`.
        hub_model_id: Where to, once that is known.
        description: What the model card can say only if it is told; see `RunDescription`.
        card_template: Of the model card.
        views: Texts per row of the training data.
        examples: Its first rows, for the model card.
        resumed: Training went on from a checkpoint.
    """

    hub: HubCheckpointCallback | None = None
    hub_model_id: Any
    description: RunDescription
    card_template: str
    views = 0
    examples = Examples([], [])
    resumed = False

    def set_up_hub(self, args: Any, callbacks: list[Any] | None) -> list[Any]:
        """Find or make the callback; to be called first of all, before hours of preparation.

        Raises:
            InputError: It is certain now that nothing could be pushed.
        """
        callbacks = list(callbacks or [])
        found = [one for one in callbacks if isinstance(one, HubCheckpointCallback)]
        if args.push_to_hub and not found:
            found = [HubCheckpointCallback(args)]
            callbacks += found
        if found:
            self.hub = found[0]
            self.hub.write_card = lambda folder, name, step: self.create_model_card(
                folder, model_id=name, figure=False, step=step
            )
        return callbacks

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The callback has asked for the repository already."""
        uploader = self.hub.uploader if self.hub else None
        self.hub_model_id = uploader.repository if uploader else self.args.hub_model_id

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `SafeTrainer.train`; the Hub sees the card's metadata first.

        Raises:
            InputError: The Hub refuses it.
        """
        if self.hub is not None and self.is_world_process_zero():
            self.hub.check_card(self.card_metadata())
            self._warn_of_base()
        return super().train(*args, **kwargs)

    def create_model_card(  # type: ignore[override]
        self,
        folder: str | Path | None = None,
        *,
        model_id: str | None = None,
        figure: bool = True,
        step: int | None = None,
        **ignored: Any,
    ) -> None:
        """Write `README.md`, and the training curve where it can be drawn, at any time.

        Args:
            folder: By default `output_dir`.
            model_id: What the card says to load; by default `hub_model_id`, else `output_dir`.
            figure: Draw `training_curve.png`; else only refer to it, for who draws it elsewhere.
            step: Of the weights that the folder holds; by default as it says itself.
            ignored: What `Trainer.push_to_hub` passes for its own card.

        Raises:
            InputError: The user's template fails.
        """
        if not self.is_world_process_zero():
            return
        path = Path(folder or str(self.args.output_dir))
        facts = collect_facts(
            self,
            model_id,
            # While training adapters are saved as they are.
            in_checkpoint=step is not None or step_of(path) is not None,
            step=self._find_step(path) if step is None else step,
        )
        text = render_card(facts, self.card_template)
        token = str(self.args.hub_token or get_token() or "")
        if len(token) > 7:  # wherever it slipped in; a shorter one is none, and may be a word
            text = text.replace(token, "***")
        drawn = [TRAINING_CURVE] if figure and facts.figure else []
        with self._documents(path, CARD, *drawn):
            if drawn:
                draw_training_curve(self.state.log_history, path / TRAINING_CURVE)
            (path / CARD).write_text(text, encoding="utf-8")

    def _warn_of_base(self) -> None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        base = model.base_weights.name if model.base_weights else ""
        args: Any = self.args
        if choose_lora_save(model, args.lora_save) == "adapter" and is_local(base):
            logger.warning(
                "The adapter will be on the Hub without its base, which is the folder %s: nobody "
                "could load it. Pass --lora_save merged, or give the base's name on the Hub "
                "afterwards: simcse-trainer push %s REPO --base_model user/name.",
                base,
                args.output_dir,
            )

    def _find_step(self, folder: Path) -> int:
        """The step of the weights in a folder, as it says itself; else of those in memory."""
        manifest = read_manifest(folder)
        if manifest is None or not manifest.holds_model or manifest.step is None:
            return self.weights_step
        return manifest.step

    def card_metadata(self, model_id: str | None = None) -> str:
        """The YAML at the top of the card, as far as it is known now, to check it with the Hub."""
        return card_data(collect_facts(self, model_id)).to_yaml()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `SafeTrainer.save_model`; the model is then pushed in the background."""
        super().save_model(output_dir, _internal_call)
        if not _internal_call and self.hub is not None and self.hub.pushes_models:
            self._push(Path(output_dir or str(self.args.output_dir)))

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str | None = None, blocking: bool = True, **kwargs: Any
    ) -> str:
        """Save the model and its card in `output_dir`, and push that folder.

        Args:
            commit_message: Not used: commits are named by step and score.
            blocking: Wait until it is done, for `hub_final_timeout_s` at most.
            kwargs: For `create_model_card`.

        Returns:
            The repository, `namespace/name`.

        Raises:
            InputError: It could not be pushed; the message says how to finish.
        """
        folder = Path(str(self.args.output_dir))
        super().save_model(str(folder))
        if self.hub is None:
            self.hub = HubCheckpointCallback(self.args)
        uploader = self.hub.uploader
        if uploader is None:
            return ""
        self.create_model_card(folder, model_id=uploader.repository, **kwargs)
        self.hub.push_folder(folder)
        if blocking and not self.hub.finish():
            raise InputError(
                f"{folder} is saved and not on the Hub. Finish with: simcse-trainer push {folder} "
                f"{uploader.repository}"
            )
        return uploader.repository

    def _push(self, folder: Path) -> None:
        assert self.hub is not None
        if self.hub.uploader is not None:
            self.create_model_card(folder, model_id=self.hub.uploader.repository)
            self.hub.push_folder(folder)

    def _finish_current_push(self) -> None:
        """There is none of the Trainer's own."""
