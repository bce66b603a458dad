"""What of transformers' Trainer has no meaning here: refused by name, instead of ignored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from simcse_trainer.errors import InputError

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
        args: `TrainingArguments`.

    Raises:
        InputError: Naming the first one.
    """
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
            raise InputError(f"{field.name} is {found}; expected {default}: {reason}.")
    if args.train_sampling_strategy == "batch_rebalance":
        raise InputError(
            "train_sampling_strategy is batch_rebalance; expected random, sequential or "
            "group_by_length: packed batches need no balance. Leave it out."
        )


def check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of the constructor that would do nothing.

    Raises:
        InputError: Naming the first one.
    """
    for name, reason in REFUSED_ARGUMENTS.items():
        if given.get(name) is not None:
            raise InputError(f"SimCSETrainer takes no {name}: {reason}.")


def refuse_method(name: str) -> Any:
    """Return a method that says what to call instead."""

    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        raise InputError(f"SimCSETrainer has no {name}. {REFUSED_METHODS[name]}.")

    method.__name__ = name
    method.__doc__ = f"Raise InputError: {REFUSED_METHODS[name]}."
    return method
