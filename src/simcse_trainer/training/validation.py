"""What is checked before the first step: refused by name instead of ignored, or warned about."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from simcse_trainer.arguments import SimCSETrainingArguments
from simcse_trainer.data.augmentation import DEFAULT_RATE, DISCRETE
from simcse_trainer.data.schema import POSITIVES
from simcse_trainer.data.tokenization import INPUT_IDS
from simcse_trainer.errors import InputError, for_caller
from simcse_trainer.hub.published_files import is_local
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.io.saving import choose_lora_save
from simcse_trainer.model.lora import has_adapter, has_adapter_dropout
from simcse_trainer.model.modeling import SimCSEModel
from simcse_trainer.model.packing import build_batch
from simcse_trainer.model.quantization import is_quantized
from simcse_trainer.model.tokenizer import count_word_embeddings, find_mask_token

logger = logging.getLogger(__name__)

_NO_LABELS = "there are no labels here: the loss is contrastive, and scores are correlations"
_NO_LOOP = "evaluation embeds sentences and compares cosines, without a loop over batches of labels"

# Field of TrainingArguments -> why it would do nothing, and what does.
REFUSED_OPTIONS = {
    "average_tokens_across_devices": "the loss is a mean over sentences; leave it out",
    "label_smoothing_factor": f"{_NO_LABELS}; leave it out",
    "label_names": f"{_NO_LABELS}; leave it out",
    "include_for_metrics": f"{_NO_LABELS}; leave it out",
    "bf16_full_eval": "embeddings are scored as the saved folder gives them; leave it out",
    "fp16_full_eval": "embeddings are scored as the saved folder gives them; leave it out",
    "prediction_loss_only": f"{_NO_LOOP}; leave it out",
    "eval_do_concat_batches": f"{_NO_LOOP}; leave it out",
    "eval_use_gather_object": f"{_NO_LOOP}; leave it out",
    "eval_accumulation_steps": f"{_NO_LOOP}; leave it out, or pass --per_device_eval_batch_size",
    "batch_eval_metrics": f"{_NO_LOOP}; leave it out",
    "do_predict": "a model is scored on other data by `simcse-trainer evaluate`; leave it out",
    "use_liger_kernel": "its kernels are for the logits of language models; leave it out",
    "liger_kernel_config": "its kernels are for the logits of language models; leave it out",
    "use_cache": "keys and values for tokens to come are of no use to embeddings; leave it out",
    "logging_nan_inf_filter": "a loss that is not finite ends the run; leave it out",
    "parallelism_config": "sequences and tensors are not split here; leave it out, or use FSDP2",
    "debug": "its hooks fail on the masks of attention; leave it out, and use "
    "torch.autograd.set_detect_anomaly",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint anyway, between two steps; leave it out",
    "save_on_each_node": "the first process writes for all; leave it out, and share the folder",
    "dataloader_persistent_workers": "a checkpoint does not hold the workers' random states, so "
    "that a resumed run would train otherwise; pass --dataloader_persistent_workers false",
}

# Argument of Trainer's constructor -> the same.
REFUSED_ARGUMENTS = {
    "compute_metrics": f"{_NO_LABELS}. Pass scored pairs as eval_dataset, or a callback",
    "preprocess_logits_for_metrics": f"{_NO_LABELS}. Leave it out",
    "compute_loss_func": "the loss is what this trainer is for. Override compute_loss instead",
    "model_init": "a model is prepared for its data once. Make a SimCSETrainer for each trial",
}

# Method of Trainer -> the same.
REFUSED_METHODS = {
    "predict": "Embed texts with trainer.encode(texts); score pairs with trainer.evaluate(pairs)",
    "evaluation_loop": "Score pairs with trainer.evaluate(pairs)",
    "prediction_step": "Embed texts with trainer.encode(texts)",
    "get_eval_dataloader": "Score pairs with trainer.evaluate(pairs)",
    "get_test_dataloader": "Score pairs with trainer.evaluate(pairs)",
    "hyperparameter_search": "Make a SimCSETrainer for each trial, and compare "
    "trainer.evaluate()['eval_avg_sts']",
}


def check_options(args: Any) -> None:
    """Refuse options that differ from their default and would do nothing.

    Args:
        args: The training options, `TrainingArguments`.

    Raises:
        InputError: Naming them.
    """
    wrong = []
    if not isinstance(args, SimCSETrainingArguments):
        raise InputError(f"args is a {type(args).__name__}; pass SimCSETrainingArguments.")
    for field in dataclasses.fields(args):
        reason, found = REFUSED_OPTIONS.get(field.name), getattr(args, field.name)
        default = (
            field.default_factory()
            if field.default_factory is not dataclasses.MISSING
            else field.default
        )
        # transformers turns unset options into empty ones.
        is_unset = found == default or (not default and not found and found != 0.0)
        if reason is not None and not is_unset:
            wrong.append(f"{field.name} is {found}; expected {default}: {reason}.")
    if args.train_sampling_strategy == "batch_rebalance":
        wrong.append(
            "train_sampling_strategy is batch_rebalance; expected random, sequential or "
            "group_by_length: packed batches need no balance. Leave it out."
        )
    if wrong:
        raise InputError(" ".join(wrong))
    _check_reports(args)


# What writes logs, and is a package of that name.
_REPORTS = "clearml codecarbon comet_ml dvclive mlflow neptune swanlab tensorboard trackio wandb"


def _check_reports(args: SimCSETrainingArguments) -> None:
    """Refuse a logger that is unknown or not installed, before the data is read."""
    for name in args.report_to or ():
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise InputError(f"report_to is '{name}'; expected none, all, or some of {known}.")
        packages = [name, *(["tensorboardX"] if name == "tensorboard" else [])]
        if name in _REPORTS.split() and not any(map(find_spec, packages)):
            raise InputError(
                f"report_to is '{name}', which is not installed. Run: pip install {name}, or pass "
                "--report_to none."
            )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the constructor that would do nothing.

    Raises:
        InputError: Naming the first one.
    """
    for name, reason in REFUSED_ARGUMENTS.items():
        if given.get(name) is not None:
            raise InputError(f"SimCSETrainer takes no {name}: {reason}.")


def refuse_methods(trainer: type) -> type:
    """Class decorator: let the methods of `REFUSED_METHODS` say what to call instead."""
    for name in REFUSED_METHODS:
        setattr(trainer, name, _refuse_method(name))
    return trainer


def _refuse_method(name: str) -> Any:
    """Return a method that says what to call instead."""

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise InputError(f"SimCSETrainer has no {name}. {REFUSED_METHODS[name]}.")

    method.__name__ = name
    method.__doc__ = f"Raise InputError: {REFUSED_METHODS[name]}."
    return method


_MOST_IDS = 2**31
# Of a stream, those that tell whether there are negatives.
_FIRST_ROWS = 100


def check_tokenized(dataset: Dataset | IterableDataset, model: SimCSEModel) -> None:
    """Check that `input_ids` are lists of token id lists, equally many, none empty or too long."""
    if isinstance(dataset, IterableDataset):
        return
    # Formatted, for the rows of a filtered data set; what it has left out is still stored.
    batches = dataset.select_columns([INPUT_IDS]).with_format("arrow").iter(10_000)
    columns = [batch.column(INPUT_IDS) for batch in batches]
    if not columns:
        return
    rows = pa.chunked_array([chunk for column in columns for chunk in column.chunks])
    if not (pa.types.is_list(rows.type) and pa.types.is_list(rows.type.value_type)):
        raise InputError(
            f"train_dataset: column '{INPUT_IDS}' holds {rows.type}; expected a list of token id "
            "lists in every row: [[ids of the anchor], [ids of the positive], ...]."
        )
    views, texts = pc.list_value_length(rows), pc.list_flatten(rows)
    lengths, ids = pc.list_value_length(texts), pc.list_flatten(texts)
    most_id = (count_word_embeddings(model.backbone) or _MOST_IDS) - 1
    for found, least, most, what in (
        (views, *_expect_views(dataset, views), "texts"),
        (lengths, 1, model.max_seq_length, "tokens in a text"),
        (ids, 0, most_id, "as token ids"),
    ):
        low, high = pc.min(found).as_py(), pc.max(found).as_py()
        if low < least or high > most:
            raise InputError(
                f"train_dataset: column '{INPUT_IDS}' has rows with {low} to {high} {what}; "
                f"expected {least}" + (f" to {most}." if most > least else " in every row.")
            )


def _expect_views(dataset: Dataset, views: Any) -> tuple[int, int]:
    """Return the least and the most texts in a row: as many as in the first, unless of lists."""
    if POSITIVES in dataset.column_names:
        return 2, _MOST_IDS
    first: int = views[0].as_py()
    return first, first


def check_model(model: SimCSEModel, args: SimCSETrainingArguments) -> None:
    """Refuse a model without a needed head, or with nothing to train; log what trains.

    Raises:
        InputError: Training could not begin, or its end could not be saved.
    """
    if args.mlm_weight and model.mlm_head is None:
        raise InputError(
            f"mlm_weight is {args.mlm_weight}, but the model has no masked-language-model "
            "head. Load it with SimCSEModel.from_pretrained(..., mlm_head=True)."
        )
    if args.mlm_weight:
        _check_prediction(model, args)
    largest = max(args.matryoshka_dims, default=0)
    if largest > model.embedding_dimension:
        raise InputError(
            f"matryoshka_dims has {largest}, but embeddings have {model.embedding_dimension} "
            f"dimensions; expected at most that. Pass --matryoshka_dims with smaller numbers."
        )
    choose_lora_save(model, args.lora_save)
    if is_quantized(model.backbone) and not has_adapter(model.backbone):
        raise InputError(
            f"The weights of '{model.config._name_or_path}' are quantised, and cannot be trained "
            "nor saved in training. Pass --use_lora true to train an adapter on them, or use the "
            "model that they were made of."
        )
    if not has_adapter(model.backbone):
        return
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    frozen = sum(x.numel() for x in model.parameters()) - trained
    if not any(x.requires_grad for x in model.backbone.parameters()):
        raise InputError(
            "The model's adapter is frozen. Load it with --use_lora true to go on training it."
        )
    logger.info(
        "LoRA: %s of %s parameters train (%.2f percent). Gradients and two moments of the others, "
        "%s MiB in float32, are not needed.",
        f"{trained:,}",
        f"{trained + frozen:,}",
        100 * trained / (trained + frozen),
        f"{12 * frozen / 2**20:,.0f}",
    )


def _check_prediction(model: Any, args: SimCSETrainingArguments) -> None:
    """Refuse what cannot predict masked tokens."""
    next_token = model.mlm_head is not None and model.mlm_head.predicts_next
    # Alone it cannot be left out.
    without = ", or --mlm_weight 0" if args.uses_embeddings else ""
    advice = "Pass --mlm_weight 0." if without else "Use another backbone, or another tokenizer."
    if next_token and not is_bidirectional(model.config):
        raise InputError(
            f"mlm_weight is {args.mlm_weight}, but {model.config.model_type} attends to earlier "
            "tokens only, and what a masked token is its later ones tell as well. Pass "
            f"--bidirectional_attention true{without}."
        )
    if model.tokenizer and find_mask_token(model.tokenizer, model.backbone) is None:
        raise InputError(
            f"mlm_weight is {args.mlm_weight}, but the tokenizer has no token to put in place of "
            f"a masked one. {advice}"
        )
    if next_token and has_adapter(model.backbone):  # frozen as the backbone, whose layer it is
        model.mlm_head.requires_grad_(False)


def check_dropout(model: SimCSEModel) -> None:
    """Check that two embeddings of one text differ: unsupervised training needs it (section 3).

    Found out by trying, in training mode, with the random state put back.

    Raises:
        InputError: The two embeddings are equal.
    """
    # An adapter's output is zero at first, and its noise with it.
    if has_adapter_dropout(model.backbone):
        return
    was_training = model.training
    model.train()
    ids = [min(7, model.config.get_text_config().vocab_size - 1)] * 8
    batch = build_batch([ids, ids], padding_free=model.padding_free, pad_token_id=0)
    try:
        with torch.random.fork_rng(), torch.no_grad():
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            one, two = model(**inputs).embeddings
    finally:
        model.train(was_training)
    if torch.equal(one, two):
        raise InputError(
            f"The model has no dropout ({model.config.model_type}), so that the two views of a "
            "sentence would be identical and there would be nothing to learn. Pass "
            "--attention_dropout 0.1, or --use_lora true with a --lora_dropout above 0."
        )


def check_size(dataset: Dataset | IterableDataset, args: SimCSETrainingArguments) -> None:
    """Refuse too few rows for a contrastive loss, or an unknown number without `max_steps`."""
    if isinstance(dataset, IterableDataset):
        if args.max_steps <= 0:
            raise InputError(
                "Streamed data has no known length, so training needs --max_steps; found "
                f"{args.max_steps}."
            )
        return
    rows, batch = len(dataset), args.per_device_train_batch_size
    if rows < 2:
        raise InputError(
            f"train_dataset has {rows} row(s); a contrastive loss needs at least 2, and many "
            "more to learn from."
        )
    if rows < batch * args.world_size and args.dataloader_drop_last:
        processes = f" in each of {args.world_size} processes" if args.world_size > 1 else ""
        raise InputError(
            f"train_dataset has {rows} rows and dataloader_drop_last drops what does not fill a "
            f"batch of {batch}{processes}: nothing is left. Pass a smaller "
            "--per_device_train_batch_size."
        )
    if rows % (batch * args.world_size) == 1 and not args.dataloader_drop_last:
        logger.warning(
            for_caller(
                "The last batch of each epoch has a single row, and no negatives to learn from. "
                "Add or leave out a row, or pass --dataloader_drop_last true."
            )
        )
    if rows < batch:
        logger.warning(
            "The batch (%d) is larger than the data set (%d rows): each step sees all of it, "
            "with %d negatives per sentence.",
            batch,
            rows,
            rows - 1,
        )


def check_engine(state: Any, args: SimCSETrainingArguments, model: SimCSEModel) -> None:
    """Refuse settings of FSDP and DeepSpeed with which training would go wrong.

    Args:
        state: The engine, an `AcceleratorState`.
        args: The training options, `SimCSETrainingArguments`.
        model: The model in training.

    Raises:
        InputError: A setting does harm; the message names it.
    """
    fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
    if fsdp is not None and fsdp.activation_checkpointing:
        raise InputError(
            "fsdp_activation_checkpointing draws other dropout masks when it computes again, so "
            "that gradients are wrong. Set it to false, and pass --activation_checkpointing true."
        )
    stage = getattr(deepspeed, "zero_stage", 0) if deepspeed is not None else 0
    if stage == 3 and args.load_best_model_at_end:
        raise InputError(
            "load_best_model_at_end cannot be used with DeepSpeed's ZeRO 3, which spreads the "
            "weights. Pass --load_best_model_at_end false, or use ZeRO 2 or "
            "configs/accelerate/fsdp2.yaml."
        )
    tied = args.mlm_weight and getattr(model.mlm_head, "is_tied", False)
    if tied and (stage == 3 or (fsdp is not None and not has_adapter(model.backbone))):
        raise InputError(
            "mlm_weight computes with the word embeddings, which FSDP and ZeRO 3 shard for "
            "themselves. Use DDP or ZeRO 2, with FSDP also --use_lora true; or --mlm_weight 0."
        )
    if args.n_gpu > 1:
        raise InputError(
            f"{args.n_gpu} GPUs in one process would split each batch (DataParallel). Start "
            "with `accelerate launch train_simcse.py ...`, or set CUDA_VISIBLE_DEVICES=0."
        )
    if args.fp16 and args.device.type == "cpu":
        raise InputError(
            "fp16 needs an accelerator: on a CPU training would be in float32. Pass --bf16 true, "
            "or leave fp16 out."
        )


def count_views(dataset: Dataset | IterableDataset, args: SimCSETrainingArguments) -> int:
    """Count the texts per row of tokenized data: 1 is unsupervised, 2 pairs, more hard negatives.

    Raises:
        InputError: There is no row, or lists would be negatives of their own anchors.
    """
    rows = list(dataset.take(_FIRST_ROWS))
    if not rows:
        raise InputError("train_dataset has no rows.")
    if POSITIVES not in rows[0]:
        return len(rows[0][INPUT_IDS])
    if not args.mask_duplicate_negatives:
        raise InputError(
            "mask_duplicate_negatives is false, but the data has lists: a row's other positives "
            "would count as its negatives. Leave it out."
        )
    has_negatives = any(len(row[INPUT_IDS]) > 1 + row[POSITIVES] for row in rows)
    if not has_negatives and isinstance(dataset, Dataset):
        columns = dataset.select_columns([INPUT_IDS, POSITIVES]).with_format("arrow")
        has_negatives = any(
            pc.any(pc.greater(pc.list_value_length(t[INPUT_IDS]), pc.add(t[POSITIVES], 1))).as_py()
            for t in columns.iter(10_000)
        )
    return 2 + (args.num_hard_negatives if has_negatives else 0)


def choose_head(model: SimCSEModel, views: int) -> None:
    """Choose the paper's use of the head: unsupervised in training only, supervised always."""
    decided = model.mlp_only_train is not None and not model.head_use_is_a_guess
    if model.head is None or decided:
        return
    model.mlp_only_train, model.head_use_is_a_guess = views == 1, True
    logger.info(
        "The data is %s: the projection head is used %s.",
        "unsupervised" if views == 1 else "supervised",
        "in training only" if views == 1 else "at inference too",
    )


def warn_about_settings(
    args: SimCSETrainingArguments, views: int, *, has_lists: bool = False
) -> None:
    """Warn about settings that do less than they seem to."""
    if args.hard_negative_weight and views < 3:
        logger.warning("hard_negative_weight has no effect: the data has no hard negatives.")
    hard_alone = args.hardness_mode == "hard_negatives"
    if args.hardness_strength and hard_alone and views < 3:
        logger.warning("hardness_strength has no effect: the data has no hard negatives.")
    if args.num_hard_negatives != 1 and not has_lists:
        logger.warning("num_hard_negatives has no effect: the data has no lists of negatives.")
    if args.augmentation == "none" and args.activation_checkpointing:
        logger.warning(
            "activation_checkpointing has no effect with augmentation none: transformers "
            "recomputes activations only where dropout is on."
        )
    if args.augmentation_rate != DEFAULT_RATE and args.augmentation not in DISCRETE:
        logger.warning("augmentation_rate has no effect with augmentation %s.", args.augmentation)
    steps, batch = args.gradient_accumulation_steps, args.per_device_train_batch_size
    if steps > 1 and args.mini_batch_size is None:
        logger.warning(
            for_caller(
                f"Gradient accumulation does not add negatives: each of the {steps} micro-batches "
                "of a step has its own. For more negatives in the same memory pass "
                f"--gradient_accumulation_steps 1 --per_device_train_batch_size {steps * batch} "
                f"--mini_batch_size {batch}"
            )
        )


def warn_about_local_base(model: SimCSEModel, args: SimCSETrainingArguments) -> None:
    """Say that nobody could load an adapter from the Hub whose base is a folder here."""
    base = model.base_weights.name if model.base_weights else ""
    if choose_lora_save(model, args.lora_save) == "adapter" and is_local(base):
        advice = for_caller(
            "Pass --lora_save merged, or give the base's name on the Hub afterwards: "
            f"simcse-trainer push {args.output_dir} REPO --base_model user/name."
        )
        logger.warning(
            "The adapter will be on the Hub without its base, which is the folder %s: nobody "
            "could load it. %s",
            base,
            advice,
        )
