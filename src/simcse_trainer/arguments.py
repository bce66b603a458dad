"""All options: `ModelArguments`, `DataArguments`, `SimCSETrainingArguments`.

An option's text exists once, in `metadata["help"]`, where --help finds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from simcse_trainer.data.augmentation import AUGMENTATIONS, DEFAULT_RATE
from simcse_trainer.data.lines import FileOptions, check_encoding
from simcse_trainer.errors import InputError, check_bounds
from simcse_trainer.hub.card_data import check_language, check_license
from simcse_trainer.model.choices import DTYPES, LORA_SAVES, PROJECTION_HEADS
from simcse_trainer.model.pooling import POOLING_MODES
from simcse_trainer.objective import logits
from simcse_trainer.objective.contrastive import ContrastiveObjective, objective_bounds

if TYPE_CHECKING:
    from peft import LoraConfig


_SCORED_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


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
    base_model: str | None = _option(
        None, "The base model of an adapter, where it is not where it was: a folder, or a name."
    )
    model_revision: str | None = _option(None, "Branch, tag or commit of the Hub model.")
    pooling_mode: str | None = _option(
        None,
        "How tokens become a sentence embedding. Default: what the folder says; else cls, for "
        "decoders lasttoken, and mean where they attend to both sides.",
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
    normalize_embeddings: bool | None = _option(
        None,
        "Give embeddings the length 1, as the last module of the folder. Default: as the folder "
        "says; a plain backbone then not, so that AutoModel and pooling give the same embedding.",
    )
    max_seq_length: int | None = _option(
        None,
        "Longer texts are cut, in tokens; saved with the model. Default: what the folder says, "
        "else the most that the backbone can take.",
    )
    padding_free: bool = _option(
        True, "Compute nothing on padding, where the backbone then computes exactly the same."
    )
    prompt: str | None = _option(
        None,
        'Template around every text, such as \'This sentence: "{text}" means in one word: "\'. It '
        "becomes part of the tokenizer, so that every loader applies it.",
    )
    append_eos_token: bool | None = _option(
        None,
        "End every text with the end-of-text token, in the tokenizer. Default: for plain decoders.",
    )
    bidirectional_attention: bool | None = _option(
        None,
        "Let a decoder attend to both sides. Default: what the folder's configuration says.",
    )
    attention_dropout: float | None = _option(
        None,
        "Dropout of the attention weights in training. Default: what the folder's configuration "
        "says, for most decoders none, and unsupervised training needs some.",
    )
    attn_implementation: str | None = _option(
        None,
        "How padded batches compute attention, such as sdpa or eager. Default: what the folder's "
        "configuration says.",
    )
    dtype: str | None = _option(
        None,
        "Type of the backbone's weights. Default: float32, the optimizer's; for the frozen "
        "backbone under LoRA that of the checkpoint.",
        choices=list(DTYPES),
    )
    load_in_4bit: bool = _option(
        False, "Keep the frozen backbone in 4 bits (NF4, bitsandbytes), with use_lora."
    )
    load_in_8bit: bool = _option(
        False, "Keep the frozen backbone in 8 bits (bitsandbytes), with use_lora."
    )
    use_lora: bool = _option(
        False, "Train a LoRA adapter and the projection head instead of the backbone."
    )
    lora_r: int = _option(16, "Rank of the adapter.")
    lora_alpha: float = _option(32, "The adapter's output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.05, "Dropout on the adapter's input in training.")
    lora_target_modules: list[str] = _option(
        ["all-linear"],
        "Layers that get an adapter, by the end of their names; all-linear: every linear layer.",
    )
    use_dora: bool = _option(False, "Also train the length of the adapted weights (DoRA).")
    use_rslora: bool = _option(
        False, "Multiply the adapter's output by lora_alpha / sqrt(lora_r) instead (rsLoRA)."
    )
    trust_remote_code: bool = _option(False, "Run model code that comes with a Hub repository.")

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            InputError: A value out of its range, or options that do not go together.
        """
        dropout = 0.0 if self.attention_dropout is None else self.attention_dropout
        check_bounds(
            self,
            {
                "lora_r": (self.lora_r > 0, "1 or more"),
                "lora_alpha": (self.lora_alpha > 0, "more than 0"),
                "lora_dropout": (0 <= self.lora_dropout < 1, "0 or more, and less than 1"),
                "attention_dropout": (0 <= dropout < 1, "0 or more, and less than 1"),
            },
        )
        for name in ("load_in_4bit", "load_in_8bit"):
            if getattr(self, name) and not self.use_lora:
                raise InputError(
                    f"{name} is set without use_lora: weights of a few bits cannot be trained. "
                    "Add --use_lora true."
                )
        if self.load_in_4bit and self.load_in_8bit:
            raise InputError("load_in_4bit and load_in_8bit are both set; choose one.")

    @property
    def weights_dtype(self) -> str:
        """What the backbone is loaded in: float32, and where it is frozen the checkpoint's type."""
        return self.dtype or ("auto" if self.use_lora else "float32")

    def new_adapter(self) -> LoraConfig | None:
        """Return the settings of the adapter; None without `use_lora`."""
        if not self.use_lora:
            return None
        from simcse_trainer.model.lora import lora_config

        return lora_config(
            r=self.lora_r,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            target_modules=self.lora_target_modules,
            use_dora=self.use_dora,
            use_rslora=self.use_rslora,
        )


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
    encoding: str | None = _option(
        None, "Encoding of the training files, such as cp949 or utf-16. Default: utf-8."
    )
    delimiter: str | None = _option(
        None,
        "What separates the cells of the training files: one character, or tab. Default: commas "
        "in csv and tabs in tsv, or what the header is separated by.",
    )
    column_names: list[str] = _option(
        [],
        "Names of the columns, in order, of training files without a header line, such as sent0 "
        "sent1.",
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
        "Tasks to evaluate on: names (stsb, sickr, sts12 ... sts16, korsts), folders of "
        "sts_data_dir, files of sentence1, sentence2, score. For retrieval: files of queries and "
        "relevant passages (sent0, sent1, or what columns names), or folders as BEIR's.",
    )
    eval_split: str = _option("validation", "Split of the evaluation tasks.")
    sts_data_dir: str | None = _option(
        None, "Folder of <task>/<split>.csv files to use instead of the Hub's data sets."
    )
    eval_corpus: str | None = _option(
        None, "Further passages among which evaluation pairs have to find theirs: a text a line."
    )
    neighbor_queries: list[str] = _option(
        [],
        "At the end show each query's nearest sentences of the evaluation data, before and after.",
    )

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            InputError: An encoding or a delimiter that cannot be.
        """
        if self.encoding is not None:
            check_encoding(self.encoding)
        if self.delimiter is not None:
            self.delimiter = {"\\t": "\t", "tab": "\t"}.get(self.delimiter, self.delimiter)
            if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
                raise InputError(
                    f"delimiter is {self.delimiter!r}; expected one character such as ';', or tab."
                )
        if len(set(self.column_names)) < len(self.column_names) or "" in self.column_names:
            raise InputError(
                f"column_names are {' '.join(self.column_names)}; expected a name of its own for "
                "each column."
            )

    @property
    def file_options(self) -> FileOptions:
        """How the training files are read."""
        return FileOptions(self.encoding, self.delimiter, tuple(self.column_names), True)


@dataclass(repr=False)  # the inherited one blanks tokens
class SimCSETrainingArguments(TrainingArguments):
    """All of transformers' `TrainingArguments`, and those of the SimCSE objective."""

    output_dir: str = _option("outputs/simcse", "Where checkpoints and the final model go.")
    overwrite_output_dir: bool = _option(
        False,
        "Replace the models and checkpoints that earlier runs have written into output_dir; other "
        "files where the run has to write are kept as NAME.before. Without it such a folder is "
        "refused.",
    )
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
    contrastive_directions: list[str] = _option(
        ["query_to_doc"],
        "What meets what: query_to_doc, anchors and all documents (positives and hard negatives); "
        "doc_to_query, positives and anchors; query_to_query; doc_to_doc. All four is the loss of "
        "GTE.",
        choices=list(logits.DIRECTIONS),
    )
    contrastive_partition: str = _option(
        "joint",
        "Whether all directions have one partition sum, or each its own (per_direction: "
        "query_to_doc and doc_to_query are the symmetric loss).",
        choices=list(logits.PARTITIONS),
    )
    hardness_strength: float = _option(
        0.0,
        "Times its cosine, without a gradient, is added to the logit of a negative: the nearer it "
        "is, the more it counts. EmbeddingGemma has 5 on hard negatives; 0 is off.",
    )
    hardness_mode: str = _option(
        "all_negatives",
        "Which negatives hardness_strength is for: those of other rows, a row's own hard "
        "negatives, or both.",
        choices=list(logits.HARDNESS_MODES),
    )
    false_negative_margin: float | None = _option(
        None,
        "Do not count as a negative what the model itself finds nearer to an anchor than the "
        "positive less this (GISTEmbed without a guide). Default: count it.",
    )
    false_negative_margin_type: str = _option(
        "absolute",
        "Whether the margin is a cosine, or a share of the positive's (relative).",
        choices=list(logits.MARGIN_TYPES),
    )
    num_hard_negatives: int = _option(
        1,
        "Of data with lists of negatives: how many are drawn per row and epoch. One positive is "
        "drawn likewise.",
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
    use_cpu_kernels: bool = _option(
        True,
        "On a CPU compute linear layers, dropout and attention by faster code of our own; not with "
        "torch_compile, which cannot see into it.",
    )
    contrastive_weight: float = _option(
        1.0,
        "Weight of the contrastive loss; 0 trains the other terms alone: that of mlm_weight, as "
        "LLM2Vec does before SimCSE, or those of the space.",
    )
    alignment_weight: float = _option(
        0.0, "Weight of the mean squared distance of an anchor and its positive, itself; 0 is off."
    )
    uniformity_weight: float = _option(
        0.0, "Weight of the uniformity of the batch's anchors, itself (Wang and Isola); 0 is off."
    )
    orthogonality_weights: list[float] = _option(
        [0.0, 0.0],
        "Weights of the global orthogonal regulariser: of the squared mean cosine of two texts, "
        "and of what their mean squared cosine has more than 1 / dimensions.",
    )
    matryoshka_dims: list[int] = _option(
        [],
        "Sizes to which embeddings are cut, such as 384 192 96: each term is computed for each, so "
        "that the first dimensions can be used alone. Name the whole size as well.",
    )
    matryoshka_weights: list[float] = _option(
        [], "The weight of each of matryoshka_dims. Default: 1 each."
    )
    mlm_weight: float = _option(
        0.0,
        "Weight of the auxiliary masked-language-model loss; the paper's is 0.1, 0 is off. A "
        "decoder that attends to both sides predicts a token from the position before it.",
    )
    mlm_probability: float = _option(0.15, "Share of tokens that the auxiliary loss masks.")
    lora_save: str | None = _option(
        None,
        "With LoRA, what the trained folder holds: adapter (megabytes; loading needs the base "
        "model), merged (a model like any other), or both (merged, and adapter in adapter/). "
        "Default: adapter; merged for decoders that attend to both sides, whose adapters only "
        "SimCSEModel can load.",
        choices=list(LORA_SAVES),
    )
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
        None,
        "License of the trained model, for the model card: an identifier such as apache-2.0, or "
        "other: and a name of its own.",
    )
    model_card_template: str | None = _option(
        None, "Jinja file to render the model card with, instead of the project's own."
    )

    def __post_init__(self) -> None:
        """Check what argparse cannot.

        Raises:
            InputError: A value out of its range.
        """
        bounds: dict[str, tuple[bool, str]] = {
            "mlm_weight": (self.mlm_weight >= 0, "0 or more"),
            "contrastive_weight": (
                self.contrastive_weight >= 0 and (self.uses_embeddings or self.mlm_weight > 0),
                "more than 0, or 0 with another weight above 0, such as mlm_weight",
            ),
            "augmentation": (
                self.augmentation in AUGMENTATIONS,
                f"one of {', '.join(AUGMENTATIONS)}",
            ),
            "num_hard_negatives": (self.num_hard_negatives >= 0, "0 or more"),
            "augmentation_rate": (0 < self.augmentation_rate < 1, "between 0 and 1"),
            "mlm_probability": (0 < self.mlm_probability < 1, "between 0 and 1"),
            "per_device_train_batch_size": (
                2 <= self.per_device_train_batch_size < 2**31,
                "2 or more, and less than 2^31",
            ),
            "learning_rate": (self.learning_rate >= 0, "0 or more"),
            "hub_timeout_s": (self.hub_timeout_s > 0, "more than 0"),
            "hub_final_timeout_s": (self.hub_final_timeout_s >= 0, "0 or more"),
            "gradient_accumulation_steps": (self.gradient_accumulation_steps > 0, "1 or more"),
        }
        check_bounds(self, logits.rule_bounds(self) | bounds | objective_bounds(self))
        if self.mini_batch_size not in (None, "auto") and not self.chunk_size:
            raise InputError(
                f"mini_batch_size is '{self.mini_batch_size}'; expected a number from 1, or auto."
            )
        for code in self.language:
            check_language(code)
        if self.license is not None:
            check_license(self.license)
        if self.uses_scores and self.metric_for_best_model is None:
            self.metric_for_best_model = "avg_sts"
        super().__post_init__()
        if self.lr_scheduler_type in _SCORED_SCHEDULES:
            # The Trainer leaves it at "min": more of a correlation would count as worse.
            mode = "max" if self.greater_is_better else "min"
            given: Any = self.lr_scheduler_kwargs or {}
            self.lr_scheduler_kwargs = {"mode": mode, **given}

    @property
    def uses_embeddings(self) -> bool:
        """Whether a term of the loss is one of embeddings."""
        weights = (self.contrastive_weight, self.alignment_weight, self.uniformity_weight)
        return any(weights) or any(self.orthogonality_weights)

    def build_objective(self) -> ContrastiveObjective:
        """Return the terms of the loss that are of embeddings."""
        return ContrastiveObjective(
            logits.LogitRules(**{o.name: getattr(self, o.name) for o in fields(logits.LogitRules)}),
            **{o.name: getattr(self, o.name) for o in fields(ContrastiveObjective)[1:]},
        )

    @property
    def uses_scores(self) -> bool:
        """Whether training needs a metric of the evaluation: which model, which learning rate."""
        return bool(
            self.load_best_model_at_end
            or self.save_strategy == "best"
            or self.lr_scheduler_type in _SCORED_SCHEDULES
        )

    @property
    def chunk_size(self) -> int | None:
        """`mini_batch_size` as a number; None if it is `auto` or not set."""
        text = str(self.mini_batch_size)
        return int(text) if text.isdecimal() and int(text) > 0 else None
