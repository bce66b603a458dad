"""What a model card says, as data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from simcse_trainer.errors import InputError
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS, split_retrieval_metric

# What a model can be loaded with, as its card calls them.
LOADERS = ("sentence-transformers", "simcse-trainer", "transformers")


@dataclass(frozen=True)
class EvaluatedOn:
    """Where the scored pairs of a task come from; empty where it is not known.

    Attributes:
        dataset: Name on the Hub.
        config: Name of the data set's subset.
        split: Name of the data set's split.
    """

    dataset: str = ""
    config: str = ""
    split: str = ""


@dataclass(frozen=True)
class CardData:
    """What a card says. A fact that is not known keeps its default, and drops what it is told in.

    Attributes:
        model_id: What users load: a name on the Hub, or a folder.
        pooling_mode: How tokens become a sentence embedding.
        dimensions: D of the embeddings.
        max_seq_length: The length at which texts are cut, in tokens.
        weights_dtype: The type of the weights that the folder holds, where it has 16 bits.
        normalized: Embeddings have the length 1.
        projection_head: The use of the head, in words.
        head_folder: Folder of the head in the model's, where inference uses it.
        pooler_output: `AutoModel` gives the embedding under this name.
        pads_left: The tokenizer pads on the left.
        prompt: The template around every text, which the tokenizer applies.
        loaders: Of `LOADERS`, those that give the model's embeddings.
        base_model: Name on the Hub of the model that training started from.
        base_model_relation: finetune, adapter or merge.
        origin: How the weights were made from that model's before training, if they are not its.
        notice: What the licence of that model asks to say.
        objective: Such as "supervised, with hard negatives".
        language: ISO 639 codes of the training texts.
        license: Identifier of the Hub's list, or `other:` and a name of its own.
        datasets: Names on the Hub of the training data.
        sources: Data sets or files of the training data, in words.
        rows: Of the training data.
        columns: Of the training data, in the order of their roles.
        examples: A few rows, a text per column.
        steps: How many optimizer steps were done.
        best_step: The step that the saved model and its scores are from, if not the last.
        figure: What `training_curve.png`, which is beside the card, shows.
        scores: Task -> Spearman correlation times 100, after training.
        scores_before: The same before training.
        retrieval: `faq_recall_at_10` and so on, from `evaluate_retrieval`, after training.
        retrieval_before: The same before training.
        verdict: What happened to the model, in a sentence, and what to try.
        evaluated_on: Task -> its data.
        space: alignment, uniformity and anisotropy after training, those that exist.
        space_before: The same before training.
        options: Name of each option told -> its value.
        command: The words of the command that trains this model again.
        seed: The seed of the run.
        versions: Name of each package -> its version.
        commit: Of the project's checkout.
        hardware: What the run computed on, in words.
        training_time: How long training took, in seconds.
        energy: The energy it took, in kWh.
        emissions: In grams of CO2 equivalent.
    """

    model_id: str
    pooling_mode: str
    dimensions: int
    max_seq_length: int
    weights_dtype: str = ""
    normalized: bool = False
    projection_head: str = ""
    head_folder: str = ""
    pooler_output: bool = False
    pads_left: bool = False
    prompt: str = ""
    loaders: Sequence[str] = LOADERS
    base_model: str = ""
    base_model_relation: str = "finetune"
    origin: str = ""
    notice: str = ""
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
    retrieval: Mapping[str, float] = field(default_factory=dict)
    retrieval_before: Mapping[str, float] = field(default_factory=dict)
    verdict: str = ""
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


TAGS = ["sentence-transformers", "simcse", "feature-extraction", "sentence-similarity"]

# Before the name of a licence that is not among the Hub's identifiers.
_OTHER = "other:"


def check_license(name: str) -> None:
    """Raise InputError where a licence is no identifier; which there are, the Hub knows."""
    if name == "other" or not re.fullmatch(rf"({_OTHER})?[a-z0-9][a-z0-9.+-]*", name):
        raise InputError(
            f"license is '{name}'; expected an identifier in lower case such as apache-2.0, mit or "
            "cc-by-4.0 (https://huggingface.co/docs/hub/repositories-licenses), or a name of your "
            f"own such as {_OTHER}my-license."
        )


def check_language(code: str) -> None:
    """Raise InputError where a language is no code."""
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code", code):
        raise InputError(
            f"language is '{code}'; expected an ISO 639 code such as en or ko, or multilingual."
        )


def is_repo_id(name: str) -> bool:
    """Return whether this could be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def hub_metadata(facts: CardData) -> ModelCardData:
    """Make the metadata, checked by huggingface_hub; a missing fact has no key."""
    results = _eval_results(facts)
    other: dict[str, Any] = {}
    if facts.base_model:
        other["base_model_relation"] = facts.base_model_relation
    if facts.license.startswith(_OTHER):
        other["license_name"] = facts.license.removeprefix(_OTHER)
    if facts.emissions is not None:
        other["co2_eq_emissions"] = _emissions(facts.emissions, facts.hardware)
    return ModelCardData(
        # Without results it would be a key of its own.
        model_name=facts.title if results else None,
        base_model=facts.base_model or None,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
        license=("other" if "license_name" in other else facts.license) or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        eval_results=results or None,
        **other,
    )


def finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Leave out correlations that do not exist."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _eval_results(facts: CardData) -> list[EvalResult]:
    results = []
    for task, score in finite(facts.scores).items():
        if task == "avg_sts":  # no data set's
            continue
        source = facts.evaluated_on.get(task)
        results.append(
            EvalResult(
                task_type="semantic-similarity",
                task_name="Semantic Textual Similarity",
                dataset_type=source.dataset if source and source.dataset else task,
                dataset_name=task,
                dataset_config=source.config or None if source else None,
                dataset_split=source.split or None if source else None,
                metric_type="spearman_cosine",
                metric_name="Spearman of cosine x 100",
                metric_value=round(score, 2),
            )
        )
    return results + _retrieval_results(facts)


def _retrieval_results(facts: CardData) -> list[EvalResult]:
    """Name task and metrics as sentence-transformers' cards do, for the Hub to put together."""
    results = []
    for name, score in finite(facts.retrieval).items():
        task, metric = split_retrieval_metric(name) or ("", "")
        if not task:  # a mean, no data set's
            continue
        shown = RETRIEVAL_METRICS[metric]
        results.append(
            EvalResult(
                task_type="information-retrieval",
                task_name="Information Retrieval",
                dataset_type=task,
                dataset_name=task,
                metric_type=f"cosine_{shown.lower()}",
                metric_name=f"Cosine {shown} x 100",
                metric_value=round(score, 2),
            )
        )
    return results


def _emissions(grams: float, hardware: str) -> dict[str, Any]:
    known = {"emissions": round(grams, 4), "source": "codecarbon", "training_type": "fine-tuning"}
    return known | ({"hardware_used": hardware} if hardware else {})
