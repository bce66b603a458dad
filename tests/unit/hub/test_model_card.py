from dataclasses import replace

import yaml
from conftest import ROOT

from simcse_trainer.hub.model_card import CardFacts, render_card

FACTS = CardFacts(
    model_id="me/my-model",
    base_model="google-bert/bert-base-uncased",
    pooling_mode="cls",
    projection_head="linear and tanh",
    dimensions=768,
    max_seq_length=32,
    objective="supervised, with hard negatives",
    rows="1,368 triplets",
    sources="train.csv",
    steps=66,
    options={"temperature": 0.05},
    scores={"stsb": 83.456},
    scores_before={"stsb": 82.0},
)


def test_metadata_is_what_the_hub_reads():
    text = render_card(FACTS)
    data = yaml.safe_load(text.split("---")[1])
    assert data["library_name"] == "sentence-transformers"
    assert data["pipeline_tag"] == "sentence-similarity"
    assert data["base_model"] == "google-bert/bert-base-uncased"
    result = data["model-index"][0]["results"][0]
    assert result["metrics"][0]["value"] == 83.46


def test_facts_arrive():
    text = render_card(FACTS)
    for fact in (
        "# my-model",
        "](https://huggingface.co/google-bert/bert-base-uncased)",
        'SentenceTransformer("me/my-model")',
        "| stsb | 82.00 | 83.46 |",
        "| `temperature` | 0.05 |",
        "1,368 triplets from train.csv, 66 steps.",
        "title = {{SimCSE}: Simple",
    ):
        assert fact in text, fact


def test_missing_facts_drop_their_sections():
    text = render_card(replace(FACTS, base_model="", scores={}, scores_before={}, sources=""))
    assert "None" not in text
    assert "## Evaluation" not in text
    assert "fine-tuned from" not in text
    assert "1,368 triplets, 66 steps." in text
    assert "model-index" not in text


def test_the_template_in_the_package_is_the_one_at_the_top():
    inside = ROOT / "src/simcse_trainer/model_card_template.md"
    assert inside.resolve() == ROOT / "model_card_template.md"
