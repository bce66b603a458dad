"""What a model card says, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# What a model can be loaded with, as its card calls them.
LOADERS = ("sentence-transformers", "simcse-trainer", "transformers")


@dataclass(frozen=True)
class EvaluatedOn:
    """Where the scored pairs of a task come from; empty where it is not known.

    Attributes:
        dataset: Name on the Hub.
        config: Its subset.
        split: Its split.
    """

    dataset: str = ""
    config: str = ""
    split: str = ""


@dataclass(frozen=True)
class CardFacts:
    """What a card says. A fact that is not known keeps its default, and drops what it is told in.

    Attributes:
        model_id: What users load: a name on the Hub, or a folder.
        pooling_mode: How tokens become a sentence embedding.
        dimensions: D of the embeddings.
        max_seq_length: In tokens.
        normalized: Embeddings have the length 1.
        projection_head: In words.
        head_folder: Folder of the head in the model's, where inference uses it.
        pooler_output: `AutoModel` gives the embedding under this name.
        pads_left: The tokenizer pads on the left.
        prompt: The template around every text, which the tokenizer applies.
        loaders: Of `LOADERS`, those that give the model's embeddings.
        base_model: Name on the Hub of the model that training started from.
        base_model_relation: finetune, adapter or merge.
        objective: Such as "supervised, with hard negatives".
        language: ISO 639 codes of the training texts.
        license: Identifier, as the Hub's, or a name of its own.
        datasets: Names on the Hub of the training data.
        sources: Data sets or files of the training data, in words.
        rows: Of the training data.
        columns: Of the training data, in the order of their roles.
        examples: A few rows, a text per column.
        steps: Optimizer steps done.
        best_step: The step that the saved model and its scores are from, if not the last.
        figure: What `training_curve.png`, which is beside the card, shows.
        scores: Task -> Spearman correlation times 100, after training.
        scores_before: The same before training.
        evaluated_on: Task -> its data.
        space: alignment, uniformity and anisotropy after training, those that exist.
        space_before: The same before training.
        options: Option -> value.
        command: The words of the command that trains this model again.
        seed: Of the run.
        versions: Package -> version.
        commit: Of the project's checkout.
        hardware: In words.
        training_time: In seconds.
        energy: In kWh.
        emissions: In grams of CO2 equivalent.
    """

    model_id: str
    pooling_mode: str
    dimensions: int
    max_seq_length: int
    normalized: bool = False
    projection_head: str = ""
    head_folder: str = ""
    pooler_output: bool = False
    pads_left: bool = False
    prompt: str = ""
    loaders: Sequence[str] = LOADERS
    base_model: str = ""
    base_model_relation: str = "finetune"
    objective: str = ""
    language: Sequence[str] = ()
    license: str = ""
    datasets: Sequence[str] = ()
    sources: str = ""
    rows: int | None = None
    columns: Sequence[str] = ()
    examples: Sequence[Sequence[str]] = ()
    steps: int = 0
    best_step: int | None = None
    figure: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    scores_before: Mapping[str, float] = field(default_factory=dict)
    evaluated_on: Mapping[str, EvaluatedOn] = field(default_factory=dict)
    space: Mapping[str, float] = field(default_factory=dict)
    space_before: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    command: Sequence[str] = ()
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    commit: str = ""
    hardware: str = ""
    training_time: float | None = None
    energy: float | None = None
    emissions: float | None = None

    @property
    def title(self) -> str:
        """The model's name without its owner or the folder above it."""
        return self.model_id.rstrip("/").rsplit("/", 1)[-1]
