"""Facts of a run to the text of its model card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from simcse_trainer.version import __version__


@dataclass(frozen=True)
class CardFacts:
    """What a card says; an empty fact drops its section.

    Attributes:
        model_id: What users load: a name on the Hub, or a folder.
        base_model: Name on the Hub of the model that training started from.
        pooling_mode: How tokens become a sentence embedding.
        projection_head: In words.
        dimensions: D of the embeddings.
        max_seq_length: In tokens.
        objective: Such as "supervised, with hard negatives".
        rows: Such as "1,368 triplets".
        sources: Data sets or files, in words.
        steps: Optimizer steps.
        options: Option -> value.
        scores: Task -> Spearman correlation times 100, after training.
        scores_before: The same before training.
    """

    model_id: str
    base_model: str
    pooling_mode: str
    projection_head: str
    dimensions: int
    max_seq_length: int
    objective: str
    rows: str
    sources: str
    steps: int
    options: Mapping[str, Any]
    scores: Mapping[str, float] = field(default_factory=dict)
    scores_before: Mapping[str, float] = field(default_factory=dict)


def render_card(facts: CardFacts) -> str:
    """The whole text of `README.md`, with the metadata that the Hub reads."""
    name = facts.model_id.rstrip("/").rsplit("/", 1)[-1]
    data = ModelCardData(
        model_name=name,
        base_model=facts.base_model or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "simcse", "feature-extraction", "sentence-similarity"],
        eval_results=[
            EvalResult(
                task_type="semantic-similarity",
                dataset_type=task,
                dataset_name=task,
                metric_type="spearman_cosine",
                metric_name="Spearman of cosine x 100",
                metric_value=round(score, 2),
            )
            for task, score in facts.scores.items()
        ]
        or None,
    )
    versions = f"simcse-trainer {__version__}, transformers {transformers.__version__}"
    card = ModelCard.from_template(
        card_data=data,
        title=name,
        template_str=files("simcse_trainer").joinpath("model_card_template.md").read_text("utf-8"),
        versions=f"{versions}, torch {torch.__version__}",
        # ModelCard renders the metadata's own fields from card_data.
        **{k: v for k, v in asdict(facts).items() if k != "base_model"},
    )
    return str(card)
