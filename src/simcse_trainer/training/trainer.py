"""SimCSETrainer: transformers' Trainer with the in-batch contrastive objective.

Every override of the Trainer is in this file. What they do at length is done by what the trainer
has: `objective`, `checkpoints` (AtomicCheckpoints), `run_info` (RunInfo), `grad_cache_step`, and
callbacks in order: preemption, model card, Hub push.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput, speed_metrics

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.schema import ANCHOR, POSITIVES
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.suite import count_examples, evaluate_tasks
from simcse_trainer.files import STATE, TRAINING_ARGS, get_step
from simcse_trainer.hub.model_card import read_template
from simcse_trainer.hub.run_info import RunInfo
from simcse_trainer.model.cpu.layers import use_cpu_kernels
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.io.checkpoints import validate_checkpoint
from simcse_trainer.model.io.saving import restore_model, save_trained_model
from simcse_trainer.model.modeling import SimCSEModel, SimCSEOutput
from simcse_trainer.objective.contrastive import ContrastiveObjective
from simcse_trainer.training import dataset, resume, validation
from simcse_trainer.training.callbacks import (
    HubCheckpointCallback,
    ModelCardCallback,
    PreemptionCallback,
    ResumeCallback,
    take_hub_callback,
)
from simcse_trainer.training.checkpointing import AtomicCheckpoints
from simcse_trainer.training.evaluation_data import check_evaluation, tasks_by_name
from simcse_trainer.training.grad_cache_step import GradCacheStep, set_optimizer_mode
from simcse_trainer.training.processes import Processes

logger = logging.getLogger(__name__)


@validation.refuse_methods
class SimCSETrainer(Trainer):
    """Trains a `SimCSEModel` as `Trainer` trains any model.

    Args:
        model: The model, or what `SimCSEModel.from_pretrained` loads.
        args: Options; the defaults train for three epochs at batch 64.
        train_dataset: A `datasets.Dataset` or `IterableDataset` of text columns (`sent0`,
            `sent1`, `hard_neg`..., or a single column), tokenized here; or one that has
            `input_ids`, a list of token id lists per row.
        eval_dataset: Scored pairs (`sentence1`, `sentence2`, `score`), pairs of queries and
            relevant passages (`sent0`, `sent1`), `RetrievalData`, or a dictionary of them by task:
            metrics are `eval_<task>_spearman`, `eval_avg_sts`, `eval_<task>_recall_at_10`, ...
        preprocessing_num_workers: Number of processes that tokenize.
        columns: Text columns of `train_dataset` in order: anchor, positive, hard negatives.
        kwargs: As for `Trainer`: callbacks, optimizers, ...

    Attributes:
        views: Texts per row of the training data.
        run_info: What the model card can say; who starts the run may add to it.
        checkpoints: Writes what the run writes; its `run_id` is that of the weights.
        hub: The callback that pushes; None without `push_to_hub`.

    Raises:
        InputError: The data or the options cannot be used.
    """

    # The objective is a mean over the micro-batch: the Trainer has to divide it by the number of
    # accumulated micro-batches, whatever it concludes from the model's signature.
    loss_is_scaled_for_ga = False

    args: SimCSETrainingArguments
    objective: ContrastiveObjective
    hub_model_id: Any
    views = 0

    def __init__(
        self,
        model: SimCSEModel | str,
        args: SimCSETrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        *,
        preprocessing_num_workers: int | None = None,
        columns: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        args = args or SimCSETrainingArguments()
        validation.check_options(args)
        validation.check_arguments(kwargs)
        callbacks = list(kwargs.pop("callbacks", None) or ())
        # First of all, before hours of preparation: it may be certain that nothing can be pushed.
        self.hub = take_hub_callback(callbacks, args)
        template = read_template(args.model_card_template)
        if isinstance(model, str):
            model = SimCSEModel.from_pretrained(
                model, mlm_head=args.mlm_weight > 0, dtype=torch.float32
            )
        validation.check_model(model, args)
        eval_dataset = check_evaluation(args, eval_dataset)
        # What compiles a model cannot see into them.
        model.use_cpu_kernels &= args.use_cpu_kernels and not args.torch_compile
        self.run_info = RunInfo()
        if train_dataset is not None:
            given = (train_dataset, model, args, preprocessing_num_workers, columns, eval_dataset)
            prepared = dataset.prepare_training_data(*given)
            train_dataset, self.views = prepared.dataset, prepared.views
            self.run_info.examples = prepared.examples
        kwargs.setdefault("processing_class", model.tokenizer)
        kwargs.setdefault("data_collator", dataset.build_collator(model, args, self.views))
        datasets: Any = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(model, args, callbacks=callbacks, **datasets, **kwargs)
        self.objective = args.build_objective()
        self.mlm = dataset.MLMInputs(self)
        self.grad_cache_step = GradCacheStep(self) if args.mini_batch_size is not None else None
        validation.check_engine(self.accelerator.state, args, self._model)
        self._set_up_files_and_callbacks(template)
        if train_dataset is not None and not isinstance(train_dataset, Dataset):
            _ = self._fingerprint  # read now, in the order of the first pass

    def _set_up_files_and_callbacks(self, template: str) -> None:
        processes = Processes(self.args, self.accelerator)
        self.checkpoints = AtomicCheckpoints(self.args, processes)
        self.stream_position = resume.StreamPosition(
            not isinstance(self.train_dataset, Dataset), self.args.gradient_accumulation_steps
        )
        self.preemption = PreemptionCallback(processes)
        self.card = ModelCardCallback(self.args, self.run_info, self.checkpoints, template)
        callbacks = [self.preemption, ResumeCallback(self)]
        if self.hub is not None:
            self.hub.card = self.card
            callbacks += [self.card, self.hub]
        for callback in callbacks:
            self.add_callback(callback)

    # --- The objective -----------------------------------------------------------------------

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Compute forward and backward of a batch: at once, or in chunks of `mini_batch_size`."""
        if self.grad_cache_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.grad_cache_step(model, inputs)
        if not is_finite(loss):
            raise self._not_finite("The loss")
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the contrastive loss of one batch from `SimCSECollator`, a mean over anchors.

        With `mlm_weight` the weighted auxiliary loss is added. `model` is as the engine wraps it:
        DDP and FSDP have to see the call.
        """
        features, text_ids = self.mlm.split_inputs(inputs)
        weight = self.mlm.count_masked([features])[0] if self.args.mlm_weight else None
        output: SimCSEOutput = model(**self.mlm.drop_unused(features))
        loss: Any = 0.0
        if output.embeddings is not None:
            views = output.embeddings.unflatten(0, (-1, text_ids.shape[1]))
            loss = self.objective(views, text_ids)
        if weight is not None and output.mlm_loss is not None:
            loss = loss + self.args.mlm_weight * output.mlm_loss * weight[0] / weight[1]
        return (loss, output) if return_outputs else loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse a step on gradients that are not finite; a loss scaler passes over those itself.

        `Trainer` (5.23) calls it between the last backward pass and the optimizer's step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise self._not_finite("The gradient")
        return norm

    def _not_finite(self, what: str) -> InputError:
        step = self.state.global_step + 1
        return not_finite(f"{what} of step {step}", self._model.backbone.dtype)

    def _set_signature_columns_if_needed(self) -> None:
        """Name the columns that are kept: of texts for the collator, of lengths for the sampler."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        kept = (ANCHOR, POSITIVES, self.args.length_column_name)
        columns += [name for name in kept if name not in columns]

    # --- Evaluation --------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return correlations and the space of scored pairs, and how well passages are found.

        By default on what was given at construction. Keys of `evaluate_tasks` get the prefix.
        """
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        tasks = tasks_by_name(given)
        start = time.time()
        self._memory_tracker.start()
        found = evaluate_tasks(self.encode, tasks)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=count_examples(tasks))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def encode(self, sentences: Sequence[str], label: str = "Evaluating") -> Tensor:
        """Embed n sentences with the model in training, each process some of them.

        All processes have to call with the same sentences, and each gets [n, D]; see
        `SimCSEModel.encode`.
        """
        args = self.args
        set_optimizer_mode(self.optimizer, "eval")
        embeddings: Tensor = self._model.encode(
            sentences,
            batch_size=args.per_device_eval_batch_size,
            show_progress_bar=not args.disable_tqdm and self.is_local_process_zero() and label,
            shard=(args.process_index, args.world_size),
        )
        if args.world_size > 1:
            embeddings = self.accelerator.reduce(embeddings.to(args.device), "sum").cpu()
        return embeddings

    # --- The run: from where, under what name ------------------------------------------------

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train as `Trainer.train`, from the checkpoint that `find_resume_checkpoint` decides on.

        Raises:
            InputError: The checkpoint is incomplete or of another run, `output_dir` holds other
                work or another run is at work there, or the Hub refuses the card's metadata.
        """
        self._update_run_info()
        if self.hub is not None and self.is_world_process_zero():
            self.hub.check_card(self.card.metadata())
            validation.warn_about_local_base(self._model, self.args)
        on_cpu = self.args.device.type == "cpu" and self._model.use_cpu_kernels
        with self.checkpoints.hold(self._folder), use_cpu_kernels(self._model, on_cpu):
            checkpoint = resume.find_resume_checkpoint(resume_from_checkpoint, self._folder)
            if checkpoint is not None:
                self._check_fingerprint(checkpoint)
            self.checkpoints.begin(checkpoint, self._model, with_card=self.hub is not None)
            self._loaded_step = None
            with self.preemption.listening():
                return super().train(str(checkpoint) if checkpoint else None, *args, **kwargs)

    def __repr__(self) -> str:
        step, name = self.state.global_step, self._model.config._name_or_path
        return f"SimCSETrainer({name!r}, views={self.views}, step={step}, {str(self._folder)!r})"

    @property
    def interrupted(self) -> bool:
        """Whether SIGTERM or Ctrl-C ended training early, after saving a checkpoint."""
        return self.preemption.interrupted

    @property
    def weights_step(self) -> int:
        """The optimizer steps that the weights in memory have seen."""
        last = int(self.state.global_step)
        return last if self._loaded_step is None else self._loaded_step

    # Of the best model, once it is loaded.
    _loaded_step: int | None = None

    def _check_fingerprint(self, checkpoint: Path) -> None:
        allow = self.args.allow_resume_mismatch
        said = resume.check_fingerprint(self._fingerprint, checkpoint, allow_mismatch=allow)
        self.preemption.evaluation_is_due = said.get(resume.EVALUATION_IS_DUE) is True
        self.stream_position.read(said.get(resume.STREAM_POSITION))

    @cached_property
    def _fingerprint(self) -> dict[str, Any]:
        return resume.run_fingerprint(self._model, self.train_dataset, self.args)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Set where to resume, also in a stream."""
        found = super()._init_training_state(*args, **kwargs)
        step = int(self.state.global_step)
        return self.stream_position.begin(found, step, skip=not self.args.ignore_data_skip)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Remember which pass over the data this is."""
        self.stream_position.enter_pass(kwargs["epoch"], int(self.state.global_step))
        dataset.begin_epoch(self.data_collator, kwargs["epoch"])
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load weights of a checkpoint into the model, the training-only heads among them."""
        target: Any = self.model if model is None else model
        self.run_info.resumed |= self.state.global_step == 0  # later on it is the best model's
        restore_model(target, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Load it by our own reader, if it is complete."""
        best = Path(str(self.state.best_model_checkpoint))
        incomplete = validate_checkpoint(best)
        if incomplete is not None:
            logger.warning(
                "The best model, %s, cannot be loaded: %s. The last is kept.", best, incomplete
            )
            return
        logger.info("Loading the best model, %s.", best)
        self._load_from_checkpoint(str(best))
        self._loaded_step = get_step(best)

    # --- What is written: complete or absent, see AtomicCheckpoints --------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as `Trainer.save_model`; with `push_to_hub` it is then pushed in the background.

        Raises:
            InputError: The model could not be written, or other people's files are in its way.
        """
        if _internal_call:
            write = super().save_model
            return self.checkpoints.write_part(lambda: write(output_dir, _internal_call=True))
        self._save_model(folder := Path(output_dir or self._folder))
        if self.hub is not None and self.hub.pushes_final_model:
            self.create_model_card(folder)
            self.hub.push_folder(folder)

    def _save_model(self, folder: Path) -> None:
        write = super().save_model
        self.checkpoints.save_model(folder, lambda tmp: write(tmp, True), step=self.weights_step)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the folder that every loader reads; in checkpoints with the training-only heads.

        `Trainer.save_model` (transformers 5.23) calls it in every process, of which only the first
        has the whole state.
        """
        set_optimizer_mode(self.optimizer, "eval")
        if not self.args.should_save:
            return
        folder = Path(output_dir or self._folder)
        in_checkpoint = get_step(folder) is not None
        save_trained_model(
            self._model,
            folder,
            in_checkpoint=in_checkpoint,
            state_dict=state_dict,
            lora_save=self.args.lora_save,
        )
        # JSON, in which the Hub token is blanked: the Trainer's own pickle holds it in clear.
        arguments = self.args.to_json_string() + "\n"
        (folder / TRAINING_ARGS).write_text(arguments, encoding="utf-8")
        if in_checkpoint:
            due = {resume.EVALUATION_IS_DUE: True} if self.preemption.evaluation_is_due else {}
            position = self.stream_position.as_json(int(self.state.global_step))
            resume.write_fingerprint(
                self._fingerprint | due | position, folder, batch_size=self.train_batch_size
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write aside and rename; where that fails, training continues and the last one stays."""
        write = super()._save_checkpoint
        only_model = self.args.save_only_model
        # What an interrupted run leaves is there to go on from.
        self.args.save_only_model = only_model and not self.interrupted
        try:
            folder = Path(super()._get_output_dir(trial))
            self.checkpoints.save_checkpoint(folder, lambda: write(model, trial), self.state)
        finally:
            self.args.save_only_model = only_model

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.tmp_dir or super()._get_output_dir(trial))

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
        # Its last checkpoint is what an interrupted run resumes from, whatever the limit says.
        only_best = limit == 1 and self.state.best_model_checkpoint and not self.interrupted
        if only_best and self.args.should_save:
            self.checkpoints.delete_all_but(Path(super()._get_output_dir(trial)), 1, self.state)
        return result

    def save_state(self) -> None:
        """Save as `Trainer.save_state`; the file is recorded as ours."""
        with self.checkpoints.documents(self._folder, STATE):
            super().save_state()

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Save as `Trainer.save_metrics`; the files are recorded as ours."""
        names = [f"{split}_results.json", *(["all_results.json"] if combined else [])]
        with self.checkpoints.documents(self._folder, *names):
            super().save_metrics(split, metrics, combined)

    # --- The Hub: the Trainer's own uploads are off ------------------------------------------

    def create_model_card(  # type: ignore[override]
        self, folder: str | Path | None = None, *, model_id: str | None = None, **ignored: Any
    ) -> None:
        """Write `README.md`, and the training curve where it can be drawn, at any time.

        By default into `output_dir`. `model_id` is what the card says to load: by default the
        repository, else `output_dir`. What else `Trainer` passes for its own card is ignored.
        """
        if self.is_world_process_zero():
            self._update_run_info()
            self.card.write(Path(folder or self._folder), model_id=model_id)

    def push_to_hub(  # type: ignore[override]
        self, commit_message: str | None = None, blocking: bool = True, **kwargs: Any
    ) -> str:
        """Save the model and its card in `output_dir`, push that folder, return the repository.

        Commits are named by step and score, not by `commit_message`. With `blocking`, wait until it
        is done, for `hub_final_timeout_s` at most.

        Raises:
            InputError: It could not be pushed; the message says how to finish.
        """
        self._save_model(self._folder)
        self.hub = self.hub or HubCheckpointCallback(self.args)
        if self.hub.uploader is None:
            return ""
        self.create_model_card(**kwargs)
        return self.hub.push_folder(self._folder, blocking=blocking)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Do nothing: the callback has asked for the repository already."""

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing: the folder has still to be renamed, and `HubCheckpointCallback` pushes."""

    def _finish_current_push(self) -> None:
        """Do nothing: there is none of the Trainer's own."""

    # --- Small things ------------------------------------------------------------------------

    def _update_run_info(self) -> None:
        info = self.run_info
        info.update(self._model, self.args, self.state)
        info.views, info.weights_step = self.views, self.weights_step
        info.training_options["per_device_train_batch_size"] = self.train_batch_size
        data: Any = self.train_dataset
        info.rows = len(data) if hasattr(data, "__len__") else None
        uploader = self.hub.uploader if self.hub else None
        info.hub_model_id = uploader.repository if uploader else str(self.args.hub_model_id or "")

    @property
    def _model(self) -> Any:
        """The `SimCSEModel`, whatever an engine has put around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    @property
    def train_batch_size(self) -> int:
        """Sentences or rows per step and device, also where `auto_find_batch_size` has found it."""
        found: int = self._train_batch_size or self.args.per_device_train_batch_size
        return found // max(1, int(self.args.n_gpu))
