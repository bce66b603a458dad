"""All options: `ModelArguments`, `DataArguments`, `SimCSETrainingArguments`.

An option's text exists once, in `metadata["help"]`, where --help finds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from simcse_trainer.data.augmentation import AUGMENTATIONS, DEFAULT_RATE
from simcse_trainer.errors import InputError
from simcse_trainer.hub.metadata import check_language, check_license
from simcse_trainer.model.pooling import POOLING_MODES
from simcse_trainer.model.saving import PROJECTION_HEADS


def _option(default: Any, text: str, **metadata: Any) -> Any:
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": text, **metadata})
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class ModelArguments:
    """Which model to train, and how it turns tokens into an embedding."""

    model_name_or_path: str = _option(
        "bert-base-uncased",
        "Backbone or trained model: a folder, a name on the Hub, or an installed model package.",
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of the Hub model.")
    pooling_mode: str | None = _option(
        None,
        "How tokens become a sentence embedding. Default: what the folder says, else cls.",
        choices=list(POOLING_MODES),
    )
    projection_head: str | None = _option(
        None,
        "What stands on the pooled embedding: mlp (linear + tanh), none, or pooler (the "
        "backbone's own trained pooling layer). Default: what the folder says; for a plain "
        "backbone with cls pooling mlp, else none.",
        choices=list(PROJECTION_HEADS),
    )
    mlp_only_train: bool | None = _option(
        None,
        "Use the projection head in training only. Default: true for unsupervised data (one "
        "column), false for supervised, as in the paper.",
    )
    max_seq_length: int | None = _option(
        None,
        "Longer texts are cut, in tokens; saved with the model. Default: what the folder says, "
        "else all that the backbone has room for.",
    )
    padding_free: bool = _option(
        True, "Compute nothing on padding, where the backbone then computes exactly the same."
    )
    trust_remote_code: bool = _option(False, "Run model code that comes with a Hub repository.")


@dataclass
class DataArguments:
    """What to train on, and what to evaluate on."""

    train_file: list[str] = _option(
        [],
        "Training files or globs: txt, csv, tsv, json, jsonl or parquet, compressed or not. One "
        "column: unsupervised; two: pairs; more: hard negatives. With dataset_name: files of it.",
    )
    dataset_name: str | None = _option(None, "Hub data set to train on.")
    dataset_config_name: str | None = _option(None, "Subset of the Hub data set.")
    dataset_split: str = _option("train", "Split of the Hub data set.")
    columns: list[str] = _option(
        [],
        "Text columns in order: anchor, positive, hard negatives. Default: sent0, sent1, "
        "hard_neg*, or the only column.",
    )
    nli_triplets: bool = _option(
        False,
        "Build triplets from rows of premise, hypothesis and label: entailments become "
        "positives, contradictions hard negatives.",
    )
    drop_invalid_rows: bool = _option(
        False, "Skip and count rows that cannot be used, instead of stopping at the first."
    )
    streaming: bool = _option(
        False, "Read while training instead of beforehand, for data larger than the disk cache."
    )
    shuffle_buffer_size: int = _option(
        10_000, "Rows of streamed data that are shuffled among each other; 0 keeps their order."
    )
    preprocessing_num_workers: int | None = _option(
        None, "Processes that tokenize; only slow tokenizers gain from more than one."
    )
    eval_tasks: list[str] = _option(
        [],
        "STS tasks to evaluate on: names (stsb, sickr, sts12 ... sts16, korsts), folders of "
        "sts_data_dir, or files of sentence1, sentence2, score.",
    )
    eval_split: str = _option("validation", "Split of the evaluation tasks.")
    sts_data_dir: str | None = _option(
        None, "Folder of <task>/<split>.csv files to use instead of the Hub's data sets."
    )
    neighbor_queries: list[str] = _option(
        [],
        "At the end show each query's nearest sentences of the evaluation data, before and after.",
    )


@dataclass(repr=False)  # the inherited one blanks tokens
class SimCSETrainingArguments(TrainingArguments):
    """All of transformers' `TrainingArguments`, and those of the SimCSE objective."""

    output_dir: str = _option("outputs/simcse", "Where checkpoints and the final model go.")
    per_device_train_batch_size: int = _option(
        64, "Sentences (or pairs, or triplets) per step and device; the others are the negatives."
    )
    learning_rate: float = _option(3e-5, "The initial learning rate for AdamW.")
    temperature: float = _option(0.05, "Divides the cosine similarities (tau in the paper).")
    hard_negative_weight: float = _option(
        0.0, "A logit added to an anchor's own hard negatives; 0 gives them no extra weight."
    )
    mask_duplicate_negatives: bool = _option(
        True, "Do not count a text as negative of an anchor that it equals or belongs to."
    )
    augmentation: str = _option(
        "dropout",
        "What tells the two views of a sentence apart, in unsupervised training: dropout alone; "
        "beside it crop, word_deletion or word_shuffle, which change the words of the second view "
        "(words are what spaces separate); or none, which switches all dropout off.",
        choices=list(AUGMENTATIONS),
    )
    augmentation_rate: float = _option(
        DEFAULT_RATE,
        "Share of a sentence's words that crop cuts off, word_deletion deletes or word_shuffle "
        "moves; at least one word (word_shuffle: two), as far as there are others.",
    )
    gather_across_devices: bool = _option(
        True, "Count the sentences of all processes as negatives, not only those of one's own."
    )
    mini_batch_size: str | None = _option(
        None,
        "Sentences per forward pass (GradCache): memory follows this, not the batch, at the price "
        "of a second forward pass. A number, or auto: halved when memory runs out (one process).",
    )
    mlm_weight: float = _option(
        0.0, "Weight of the auxiliary masked-language-model loss; the paper's is 0.1, 0 is off."
    )
    mlm_probability: float = _option(0.15, "Share of tokens that the auxiliary loss masks.")
    hub_push_training_state: bool = _option(
        True,
        "With push_to_hub: also push what resuming needs, to the branch training-state.",
    )
    hub_timeout_s: float = _option(
        60.0, "Seconds without an answer after which a request to the Hub is made again."
    )
    hub_final_timeout_s: float = _option(
        600.0, "Seconds that the end of training waits for the last upload, at most."
    )
    resume_from_hub: str | None = _option(
        None,
        "Go on from the newest training state of this Hub repository: user/repo, or "
        "user/repo@revision for an earlier one.",
    )
    allow_resume_mismatch: bool = _option(
        False, "Resume although the backbone, the data or the batch are not the checkpoint's."
    )
    language: list[str] = _option(
        [], "Languages of the training texts, for the model card: ISO 639 codes such as en or ko."
    )
    license: str | None = _option(
        None, "License of the trained model, for the model card: an identifier such as apache-2.0."
    )
    model_card_template: str | None = _option(
        None, "Jinja file to render the model card with, instead of the project's own."
    )

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            InputError: A value out of its range.
        """
        bounds = {
            "temperature": (self.temperature > 0, "more than 0"),
            "mlm_weight": (self.mlm_weight >= 0, "0 or more"),
            "augmentation": (
                self.augmentation in AUGMENTATIONS,
                f"one of {', '.join(AUGMENTATIONS)}",
            ),
            "augmentation_rate": (0 < self.augmentation_rate < 1, "between 0 and 1"),
            "mlm_probability": (0 < self.mlm_probability < 1, "between 0 and 1"),
            "per_device_train_batch_size": (self.per_device_train_batch_size > 1, "2 or more"),
            "learning_rate": (self.learning_rate >= 0, "0 or more"),
            "hub_timeout_s": (self.hub_timeout_s > 0, "more than 0"),
            "hub_final_timeout_s": (self.hub_final_timeout_s >= 0, "0 or more"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps > 0, "1 or more"),
        }
        for name, (holds, expected) in bounds.items():
            if not holds:
                raise InputError(f"{name} is {getattr(self, name)}; expected {expected}.")
        if self.mini_batch_size not in (None, "auto") and not self.chunk_size:
            raise InputError(
                f"mini_batch_size is '{self.mini_batch_size}'; expected a number from 1, or auto."
            )
        for code in self.language:
            check_language(code)
        if self.license is not None:
            check_license(self.license)
        if self.load_best_model_at_end and self.metric_for_best_model is None:
            self.metric_for_best_model = "avg_sts"
        super().__post_init__()

    @property
    def chunk_size(self) -> int | None:
        """`mini_batch_size` as a number; None if it is `auto` or not set."""
        text = str(self.mini_batch_size)
        return int(text) if text.isdecimal() and int(text) > 0 else None
