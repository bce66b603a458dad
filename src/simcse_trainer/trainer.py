"""SimCSETrainer: transformers' Trainer with the in-batch contrastive objective."""

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
from transformers.trainer_utils import TrainOutput, speed_metrics

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.cached_step import CachedStep
from simcse_trainer.checkpoints import what_is_torn
from simcse_trainer.data.schema import ANCHOR
from simcse_trainer.describing import RunDescription, take_examples
from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.sts import evaluate_sts
from simcse_trainer.files import CARD, TRAINING_ARGS, TRAINING_CURVE, step_of
from simcse_trainer.hub.model_card import read_template
from simcse_trainer.model.cpu_layers import use_cpu_kernels
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.modeling import SimCSEModel, SimCSEOutput
from simcse_trainer.model.saving import (
    choose_lora_save,
    list_model_files,
    restore_model,
    save_model,
)
from simcse_trainer.model.tokenizer import count_word_embeddings
from simcse_trainer.objective import ContrastiveObjective, mask_tokens
from simcse_trainer.objective.mlm import IGNORED
from simcse_trainer.preparation import (
    build_collator,
    check_engine,
    check_evaluation,
    check_model,
    check_noise,
    check_size,
    count_views,
    decide_head,
    group_by_length,
    prepare_stream,
    set_up_augmentation,
    tasks_by_name,
    tokenize_if_text,
    warn_of_settings,
)
from simcse_trainer.pushing_trainer import PushingTrainer
from simcse_trainer.refusals import (
    REFUSED_METHODS,
    check_arguments,
    check_options,
    refuse_method,
)
from simcse_trainer.same_run import (
    EVALUATION_IS_DUE,
    STREAM_POSITION,
    check_same_run,
    identify_run,
    write_run,
)

logger = logging.getLogger(__name__)


class SimCSETrainer(PushingTrainer):
    """Trains a `SimCSEModel` as `Trainer` trains any model.

    Args:
        model: The model, or what `SimCSEModel.from_pretrained` loads.
        args: Options; the defaults train for three epochs at batch 64.
        train_dataset: A `datasets.Dataset` or `IterableDataset` of text columns (`sent0`,
            `sent1`, `hard_neg`..., or a single column), tokenized here; or one that has
            `input_ids`, a list of token id lists per row.
        eval_dataset: Scored pairs (`sentence1`, `sentence2`, `score`), or a dictionary of such
            data sets by task: metrics are named `eval_<task>_spearman` and `eval_avg_sts`.
        preprocessing_num_workers: Processes that tokenize.
        kwargs: As for `Trainer`: callbacks, optimizers, ...

    Attributes:
        views: Texts per row of the training data.

    Raises:
        InputError: The data or the options cannot be used.
    """

    # The objective is a mean over the micro-batch: the Trainer has to divide it by the number of
    # accumulated micro-batches, whatever it concludes from the model's signature.
    loss_is_scaled_for_ga = False

    args: SimCSETrainingArguments
    objective: ContrastiveObjective
    views = 0

    def __init__(
        self,
        model: SimCSEModel | str,
        args: SimCSETrainingArguments | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        *,
        preprocessing_num_workers: int | None = None,
        **kwargs: Any,
    ):
        args = args or SimCSETrainingArguments()
        if not isinstance(args, SimCSETrainingArguments):
            raise InputError(f"args is a {type(args).__name__}; pass SimCSETrainingArguments.")
        check_options(args)
        check_arguments(kwargs)
        kwargs["callbacks"] = self.set_up_hub(args, kwargs.get("callbacks"))
        if isinstance(model, str):
            model = SimCSEModel.from_pretrained(
                model, mlm_head=args.mlm_weight > 0, dtype=torch.float32
            )
        check_model(model, args)
        # What compiles a model cannot see into them.
        model.use_cpu_kernels &= args.use_cpu_kernels and not args.torch_compile
        self.description = RunDescription()
        self.card_template = read_template(args.model_card_template)
        if train_dataset is not None:
            texts = train_dataset
            train_dataset = tokenize_if_text(train_dataset, model, args, preprocessing_num_workers)
            check_size(train_dataset, args)
            train_dataset = group_by_length(train_dataset, args)
            self.views = count_views(train_dataset)
            if args.should_save:
                self.examples = take_examples(texts, model)
            set_up_augmentation(model, args, self.views)
            if self.views == 1 and args.augmentation == "dropout":
                check_noise(model)
            decide_head(model, self.views)
            warn_of_settings(args, self.views)
        check_evaluation(args, eval_dataset)
        if isinstance(train_dataset, IterableDataset):
            train_dataset = prepare_stream(train_dataset, args)
        kwargs.setdefault("processing_class", model.tokenizer)
        kwargs.setdefault("data_collator", build_collator(model, args))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        self.objective = ContrastiveObjective(
            temperature=args.temperature,
            hard_negative_weight=args.hard_negative_weight,
            mask_duplicate_negatives=args.mask_duplicate_negatives,
            gather_across_devices=args.gather_across_devices,
        )
        self.cached_step: CachedStep | None = (
            CachedStep(self) if args.mini_batch_size is not None else None
        )
        check_engine(self.accelerator.state, args)
        if train_dataset is not None and not isinstance(train_dataset, Dataset):
            _ = self._run  # read now, in the order of the first pass

    predict, evaluation_loop, prediction_step, get_eval_dataloader, get_test_dataloader = map(
        refuse_method, list(REFUSED_METHODS)[:5]
    )
    hyperparameter_search = refuse_method("hyperparameter_search")

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `SafeTrainer.train`."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        on_cpu = self.args.device.type == "cpu"
        with use_cpu_kernels(model, on_cpu and model.use_cpu_kernels):
            return super().train(*args, **kwargs)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Forward and backward of one batch: at once, or in chunks with `mini_batch_size`."""
        if self.cached_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.cached_step(model, inputs)
        if not is_finite(loss):
            raise self._not_finite("The loss")
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Refuse a step on gradients that are not finite; a loss scaler passes over those itself.

        `Trainer` (5.23) calls it between the last backward pass and the optimizer's step.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if norm is not None and not self.args.fp16 and not math.isfinite(float(norm)):
            raise self._not_finite("The gradient")
        return norm

    def _not_finite(self, what: str) -> InputError:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return not_finite(f"{what} of step {self.state.global_step + 1}", model.backbone.dtype)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The contrastive loss of one batch, with the weighted auxiliary loss where asked for.

        Args:
            model: The model as the engine wraps it: DDP and FSDP have to see the call.
            inputs: From `SimCSECollator`.
            return_outputs: Also return the `SimCSEOutput`.
            num_items_in_batch: Not used: the loss is a mean over anchors.
        """
        features, text_ids = self.split_inputs(inputs)
        share = self.count_masked([features])[0] if self.args.mlm_weight else None
        output: SimCSEOutput = model(**features)
        assert output.embeddings is not None
        loss = self.objective(output.embeddings.unflatten(0, text_ids.shape), text_ids)
        if share is not None and output.mlm_loss is not None:
            loss = loss + self.args.mlm_weight * output.mlm_loss * share[0] / share[1]
        return (loss, output) if return_outputs else loss

    def split_inputs(self, inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model takes, masked tokens included, and the `text_ids` for the objective."""
        features = {name: tensor for name, tensor in inputs.items() if name != "text_ids"}
        if self.args.mlm_weight:
            features |= self._mask(features["input_ids"])
        return features, inputs["text_ids"]

    def count_masked(self, chunks: Sequence[Mapping[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The share that each chunk's auxiliary loss, a mean over its masked tokens, has.

        Returns:
            Per chunk a numerator and a denominator: the sum over chunks of loss * numerator /
            denominator, averaged over processes, is the mean over all masked tokens of the whole
            batch. Integers, so that the quotient has the precision of the loss.
        """
        counts = torch.stack([(chunk["mlm_labels"] != IGNORED).sum() for chunk in chunks])
        total = counts.sum()
        if self.args.gather_across_devices and self.args.world_size > 1:
            total = self.accelerator.reduce(total, reduction="sum")
            counts = counts * self.args.world_size
        return [(count, total.clamp(min=1)) for count in counts]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Spearman correlations, times 100, on one or more sets of scored pairs.

        Args:
            eval_dataset: Instead of the one given at construction.
            ignore_keys: Not used.
            metric_key_prefix: Before every key.

        Returns:
            `eval_<task>_spearman` for each task, their mean `eval_avg_sts`, and where they exist
            `eval_alignment`, `eval_uniformity` and `eval_anisotropy`; see `evaluate_sts`.
        """
        tasks = tasks_by_name(self.eval_dataset if eval_dataset is None else eval_dataset)
        start = time.time()
        self._memory_tracker.start()
        found = evaluate_sts(self.encode, tasks)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        pairs = sum(len(task["score"]) for task in tasks.values())
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=pairs)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def use_point_of(self, mode: str) -> None:
        """Let a schedule-free optimizer hold the weights it trains at, or those that it is about.

        Args:
            mode: `train` or `eval`, as its methods are called; other optimizers have none.
        """
        change = getattr(self.optimizer, mode, None)
        if callable(change):
            change()

    def encode(self, sentences: Sequence[str]) -> Tensor:
        """Embed sentences with the model in training, each process a share of them.

        Args:
            sentences: n texts, the same in every process; all processes have to call.

        Returns:
            [n, D], in every process; see `encoding.encode`.
        """
        args = self.args
        self.use_point_of("eval")
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        embeddings: Tensor = model.encode(
            sentences,
            batch_size=args.per_device_eval_batch_size,
            show_progress_bar=not args.disable_tqdm and self.is_local_process_zero(),
            share=(args.process_index, args.world_size),
        )
        if args.world_size > 1:
            embeddings = self.accelerator.reduce(embeddings.to(args.device), "sum").cpu()
        return embeddings

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are kept: of texts for the collator, of lengths for the sampler."""
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [n for n in (ANCHOR, self.args.length_column_name) if n not in columns]

    @cached_property
    def _vocab_size(self) -> int | None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return count_word_embeddings(model.backbone)

    def _mask(self, input_ids: Tensor) -> dict[str, Tensor]:
        tokenizer: Any = self.processing_class
        masked = mask_tokens(
            input_ids,
            special_ids=torch.tensor(tokenizer.all_special_ids, device=input_ids.device),
            mask_token_id=tokenizer.mask_token_id,
            vocab_size=min(len(tokenizer), self._vocab_size or len(tokenizer)),
            probability=self.args.mlm_probability,
        )
        return {"mlm_input_ids": masked.input_ids, "mlm_labels": masked.labels}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the folder that every loader reads; in checkpoints with the training-only heads.

        `Trainer.save_model` (transformers 5.23) calls it in every process, of which only the first
        has the whole state.
        """
        self.use_point_of("eval")
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        in_checkpoint = step_of(folder) is not None
        adapted = choose_lora_save(model, self.args.lora_save)
        save_model(
            model,
            folder,
            training_heads=in_checkpoint,
            state_dict=state_dict,
            # A checkpoint is for going on, and for little space.
            lora_save=adapted and ("adapter" if in_checkpoint else adapted),
        )
        # JSON, in which the Hub token is blanked: the Trainer's own pickle holds it in clear.
        arguments = self.args.to_json_string() + "\n"
        (folder / TRAINING_ARGS).write_text(arguments, encoding="utf-8")
        if in_checkpoint:
            due = {EVALUATION_IS_DUE: True} if self.evaluation_is_due else {}
            batch = self._run["batch"] | {"per_device_train_batch_size": self.train_batch_size}
            write_run(self._run | {"batch": batch} | due | self._stream_position(), folder)

    @property
    def train_batch_size(self) -> int:
        """Sentences or rows per step and device, also where `auto_find_batch_size` has found it."""
        found: int = self._train_batch_size or self.args.per_device_train_batch_size
        return found // max(1, int(self.args.n_gpu))

    @cached_property
    def _run(self) -> dict[str, Any]:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return identify_run(model, self.train_dataset, self.args)

    def _planned_files(self) -> list[str]:
        """What `save_model` writes, and with a Hub the card; all that `run_training` writes."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        form = choose_lora_save(model, self.args.lora_save)
        names = [*list_model_files(model, form), TRAINING_ARGS]
        return [*names, CARD, TRAINING_CURVE] if self.hub is not None else names

    def _check_resumable(self, checkpoint: Path) -> None:
        said = check_same_run(self._run, checkpoint, allow_mismatch=self.args.allow_resume_mismatch)
        self.evaluation_is_due = said.get(EVALUATION_IS_DUE) is True
        position = said.get(STREAM_POSITION)
        if isinstance(position, list) and [type(one) for one in position] == [int, int]:
            self._resumed_position = position

    _resumed_position: Sequence[int] | None = None

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """Where to go on: the Trainer (5.23) takes a stream for one pass without an end."""
        passes, batches = super()._init_training_state(*args, **kwargs)
        if self._resumed_position is not None and self.state.global_step > 0:
            passes, batches = self._resumed_position
            batches = 0 if self.args.ignore_data_skip else batches
        self._resumed_position = None
        done = batches // self.args.gradient_accumulation_steps
        self._pass, self._pass_began_at = passes, self.state.global_step - done
        return passes, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Remember which pass over the data this is, and where it began."""
        if kwargs["epoch"] != self._pass:
            self._pass, self._pass_began_at = kwargs["epoch"], self.state.global_step
        super()._run_epoch(*args, **kwargs)

    def _stream_position(self) -> dict[str, list[int]]:
        if isinstance(self.train_dataset, Dataset):
            return {}
        steps = int(self.state.global_step) - self._pass_began_at
        return {STREAM_POSITION: [self._pass, steps * self.args.gradient_accumulation_steps]}

    _pass = _pass_began_at = 0

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Weights of a checkpoint into the model, the training-only heads among them."""
        target: Any = self.model if model is None else model
        self.resumed |= self.state.global_step == 0  # later on it is the best model's
        restore_model(target, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        best = Path(str(self.state.best_model_checkpoint))
        torn = what_is_torn(best)
        if torn is not None:
            logger.warning(
                "The best model, %s, cannot be loaded: %s. The last is kept.", best, torn
            )
            return
        logger.info("Loading the best model, %s.", best)
        self._load_from_checkpoint(str(best))
        self._loaded_step = step_of(best)
