"""Cards of the four kinds, as they are read by people and by the Hub."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from helpers.checks import fails
from huggingface_hub import ModelCard, ModelCardData

from simcse_trainer.hub.card_data import (
    CardData,
    EvaluatedOn,
    check_language,
    check_license,
    hub_metadata,
)
from simcse_trainer.hub.model_card import duration, read_template, render_card, show

GOLDEN = Path(__file__).with_name("golden")

UNSUPERVISED = CardData(
    model_id="me/unsup-bert",
    pooling_mode="cls",
    dimensions=768,
    max_seq_length=32,
    projection_head="in training only",
    base_model="google-bert/bert-base-uncased",
    objective="unsupervised: each sentence is its own positive, under dropout",
    language=["en"],
    license="apache-2.0",
    datasets=["princeton-nlp/datasets-for-simcse"],
    sources="princeton-nlp/datasets-for-simcse, wiki1m_for_simcse.txt",
    rows=1_000_000,
    columns=["sent0"],
    examples=[["YMCA in South Australia"], ["South Australia (SA)  unfolds | as a state"]],
    steps=15_625,
    best_step=12_500,
    figure="Training loss and evaluation score over the steps",
    scores={"stsb": 82.456, "avg_sts": 82.456},
    scores_before={"stsb": 31.7, "avg_sts": 31.7},
    evaluated_on={"stsb": EvaluatedOn("mteb/stsbenchmark-sts", split="validation")},
    space={"alignment": 0.2, "uniformity": -2.5, "anisotropy": 0.1},
    space_before={"alignment": 0.1, "uniformity": -0.5, "anisotropy": 0.7},
    options={"learning_rate": 3e-5, "temperature": 0.05, "bf16": True},
    command=["python", "train_simcse.py", "configs/unsup_bert_base.yaml", "--seed", "1"],
    seed=1,
    versions={"simcse-trainer": "0.1.0", "torch": "2.13.0"},
    commit="1234567890abcdef1234567890abcdef12345678",
    hardware="1 x NVIDIA H100 80GB HBM3",
    training_time=3725.0,
    energy=0.4321,
    emissions=123.456,
)
SUPERVISED = replace(
    UNSUPERVISED,
    model_id="me/sup-bert",
    projection_head="linear and tanh",
    head_folder="2_Dense",
    pooler_output=True,
    objective="supervised, with hard negatives",
    columns=["sent0", "sent1", "hard_neg"],
    examples=[["A man eats.", "Someone is eating.", "Nobody eats."]],
    rows=275_601,
    best_step=None,
    scores={"stsb": 86.5, "sickr": 81.0, "avg_sts": 83.75},
    scores_before={"stsb": 31.7, "sickr": 50.0, "avg_sts": 40.85},
    verdict="Better: the score rose by 42.90 points (95 % interval +41.02 to +44.71 over 6,306 "
    "pairs).",
    evaluated_on={
        "stsb": EvaluatedOn("mteb/stsbenchmark-sts", split="test"),
        "sickr": EvaluatedOn("mteb/sickr-sts", split="test"),
    },
    energy=None,
    emissions=None,
)
LORA = CardData(
    model_id="me/qwen-lora",
    pooling_mode="lasttoken",
    dimensions=1024,
    max_seq_length=128,
    projection_head="none",
    pads_left=True,
    base_model="Qwen/Qwen3-0.6B",
    base_model_relation="adapter",
    objective="supervised, on pairs",
    license="other:my-license",
    rows=10,
    columns=["sent0", "sent1"],
    steps=3,
    options={"lora_r": 16, "lora_target_modules": ["q_proj", "v_proj"]},
)
KOREAN = replace(
    SUPERVISED,
    verdict="",
    command=["python", "train_simcse.py", "configs/sup_klue_roberta_base_ko.yaml"],
    model_id="me/ko-sup",
    base_model="klue/roberta-base",
    weights_dtype="bfloat16",
    language=["ko"],
    license="",
    datasets=["kakaobrain/kor_nli"],
    sources="kakaobrain/kor_nli",
    examples=[["한 남자가 음식을 먹는다.", "누군가 먹고 있다.", "아무도 먹지 않는다."]],
    scores={"korsts": 84.2},
    scores_before={},
    space_before={},
    evaluated_on={"korsts": EvaluatedOn("dkoterwa/kor-sts", split="validation")},
)
KINDS = {"unsupervised": UNSUPERVISED, "supervised": SUPERVISED, "lora": LORA, "korean": KOREAN}
BARE = CardData(model_id="out", pooling_mode="mean", dimensions=8, max_seq_length=16)


@pytest.mark.parametrize("kind", KINDS)
def test_the_card_is_the_golden_one(kind):
    """After a wanted change: SIMCSE_WRITE_GOLDEN=1 pytest tests/unit/hub, and read the diff."""
    text, path = render_card(KINDS[kind]), GOLDEN / f"{kind}.md"
    if os.environ.get("SIMCSE_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_reads_the_metadata(kind):
    facts, text = KINDS[kind], render_card(KINDS[kind])
    data = ModelCard(text).data
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict() == data.to_dict()
    assert data.library_name == "sentence-transformers"
    assert data.pipeline_tag == "sentence-similarity"
    assert {"sentence-transformers", "simcse", "sentence-similarity"} <= set(data.tags)
    assert data.base_model == facts.base_model
    assert data.base_model_relation == ("adapter" if kind == "lora" else "finetune")
    assert data.language == (list(facts.language) or None)
    assert data.datasets == (list(facts.datasets) or None)
    results = {result.dataset_name: result for result in data.eval_results or []}
    assert set(results) == set(facts.scores) - {"avg_sts"}
    for task, result in results.items():
        assert result.dataset_type == facts.evaluated_on[task].dataset
        assert result.dataset_split == facts.evaluated_on[task].split
        assert result.metric_value == round(facts.scores[task], 2)
        assert result.task_type == "semantic-similarity"


def test_retrieval_has_a_table_and_results_of_its_own():
    found = {f"{task}ndcg_at_10": x for task, x in (("faq_", 90.0), ("wiki_", 80.0), ("", 85.0))}
    found |= {f"{task}recall_at_1": x for task, x in (("faq_", 50.0), ("wiki_", 40.0), ("", 45.0))}
    facts = replace(UNSUPERVISED, retrieval=found, retrieval_before={"faq_ndcg_at_10": 70.0})
    text = render_card(facts)
    assert "| faq nDCG@10 | 70.00 | 90.00 |" in text
    assert "| wiki recall@1 |  | 40.00 |" in text
    results = [r for r in ModelCard(text).data.eval_results if r.task_type != "semantic-similarity"]
    assert {(r.dataset_name, r.metric_type, r.metric_value) for r in results} == {
        ("faq", "cosine_ndcg@10", 90.0),
        ("wiki", "cosine_ndcg@10", 80.0),
        ("faq", "cosine_recall@1", 50.0),
        ("wiki", "cosine_recall@1", 40.0),
    }
    assert {r.task_type for r in results} == {"information-retrieval"}


def test_licenses_of_the_hub_and_others():
    assert hub_metadata(UNSUPERVISED).license == "apache-2.0"
    other = hub_metadata(LORA).to_dict()
    assert (other["license"], other["license_name"]) == ("other", "my-license")
    assert "license" not in hub_metadata(KOREAN).to_dict()
    for name in ("mit", "openrail++", "other:my-license"):
        check_license(name)
    for name in ("MIT License", "other", "other:", "", "Apache 2"):
        fails(lambda name=name: check_license(name), f"'{name}'", "such as apache-2.0")
    for code in ("en", "kor", "zh-TW", "multilingual"):
        check_language(code)
    for code in ("Korean", "english", ""):
        fails(lambda code=code: check_language(code), f"'{code}'", "ISO 639")


def test_yaml_keeps_norwegian_a_language():
    assert ModelCard(render_card(replace(BARE, language=["no"]))).data.language == ["no"]


def test_emissions_are_grams_for_the_hub():
    data = hub_metadata(UNSUPERVISED).to_dict()["co2_eq_emissions"]
    assert data["emissions"] == 123.456
    assert data["source"] == "codecarbon"
    assert "co2_eq_emissions" not in hub_metadata(SUPERVISED).to_dict()


def prose(card: str) -> str:
    """Without metadata and code blocks."""
    body = card.split("\n---\n", 1)[1]
    return re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.MULTILINE)


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.MULTILINE)


ALL = ["Usage", "Evaluation", "Training", "Hyper-parameters", "Reproduction", "Resources"]


def test_missing_facts_drop_their_sections():
    assert sections(render_card(UNSUPERVISED)) == [*ALL, "Limits", "Citation"]
    text = render_card(BARE)
    assert sections(text) == ["Usage", "Limits", "Citation"]
    assert set(ModelCard(text).data.to_dict()) == {"library_name", "pipeline_tag", "tags"}


@pytest.mark.parametrize(
    "missing",
    [name for name in CardData.__dataclass_fields__ if hasattr(BARE, name)],
)
def test_without_any_single_fact_nothing_is_empty(missing):
    if missing in ("model_id", "pooling_mode", "dimensions", "max_seq_length"):
        return
    for facts in (
        replace(UNSUPERVISED, **{missing: getattr(BARE, missing)}),
        replace(BARE, **{missing: getattr(UNSUPERVISED, missing)}),
    ):
        text = render_card(facts)
        assert "None" not in text
        assert "nan" not in text
        assert not re.search(r"^#+ .*\n+(?=#|\Z)", text, flags=re.MULTILINE), "an empty section"
        # A table's head without rows, a row without its table, a row of empty cells.
        assert not re.search(r"^\|[-:|]+\|\n(?!\|)", text, flags=re.MULTILINE)
        assert not re.search(r"(?<!\|)\n\n?\|(?![^\n]*\|\n\|[-:|]+\|\n)(?![^\n]*\n\|)", text)
        assert not re.search(r"[ (,]\.$|\(\)|, ,|  of | from [.,]", prose(text), re.MULTILINE)


def test_scores_that_do_not_exist_are_left_out():
    facts = replace(SUPERVISED, scores={"stsb": float("nan"), "sickr": 80.0}, scores_before={})
    text = render_card(facts)
    assert "nan" not in text.lower().replace("finance", "")
    assert "| sickr | 80.00 |" in text
    assert [r.dataset_name for r in ModelCard(text).data.eval_results] == ["sickr"]


NASTY = [
    "a | b\n| c |\r\n---\n# Heading",
    "{{ 7*7 }} {% raw %} {{ card_data }}",
    "<script>alert(1)</script> &amp; <!-- x",
    "`code` **bold** [link](http://x) ![i](y) $x^2$ ~~s~~ \\",
    "\u202egnp.exe \x00\x07 \ud800",
    "None",
]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize(
    "place", ["examples", "columns", "sources", "hardware", "options", "model_id", "scores"]
)
def test_data_is_shown_and_never_obeyed(text, place):
    value = {
        "examples": [["good", text]],
        "columns": ["sent0", text],
        "options": {"train_file": [text]},
        "scores": {text: 50.0},
    }.get(place, text)
    plain = replace(SUPERVISED, columns=["sent0", "b"], examples=[["good", "x"]], model_id="me/x")
    card = render_card(replace(plain, **{place: value}))
    card.encode("utf-8")
    expected = render_card(plain)
    assert sections(card) == sections(expected)
    assert "49" not in card.replace("275,601", "")
    body = prose(card)
    assert "<script" not in body
    assert "\n# Heading" not in card
    assert "\u202e" not in body
    for line in body.splitlines():
        if line.startswith("| ") and "sent0" in line:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line
    if text == "None" and place == "examples":
        assert "| good | None |" in card
    assert ModelCard(card).data.library_name == "sentence-transformers"


def test_long_texts_are_cut_and_escaped_afterwards():
    card = render_card(replace(SUPERVISED, columns=["sent0"], examples=[["|" * 500]]))
    row = next(line for line in card.splitlines() if line.startswith("| \\|"))
    assert row == "| " + "\\|" * 196 + " ... |"


def test_a_command_holds_no_secret_and_stays_in_its_block():
    words = ["python", "train_simcse.py", "--hub_token", "hf_A", "--hub-token=hf_B", "--seed", "1"]
    words += ["--wandb_api_key", "hf_C", "--columns", "a b", "x\n```\n# out", "--my_token", "hf_D"]
    card = render_card(replace(UNSUPERVISED, command=words))
    assert "hf_" not in card
    assert "token" not in re.search(r"````bash\n(.*?)\n````\n", card, re.DOTALL)[1]
    assert "python train_simcse.py --seed 1 --columns 'a b' 'x\n```\n# out'\n````" in card


def test_the_users_own_template(tmp_path):
    own = tmp_path / "own.md"
    own.write_text("---\n{{ card_data }}\n---\n# {{ title }} pools by {{ pooling_mode }}\n")
    text = render_card(UNSUPERVISED, read_template(str(own)))
    assert text.endswith("---\n\n# unsup-bert pools by cls\n")
    assert ModelCard(text).data.base_model == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["cannot be read: No such file"]),
        ("# {{ title }}", ["does not begin with", "{{ card_data }}"]),
        ("---\n{{ card_data }}\n---\n{% if %}", ["TemplateSyntaxError", "Correct it"]),
        ("---\n{{ card_data }}\n---\n{{ a.b.c }}", ["UndefinedError", "'a' is undefined"]),
        ("---\n{{ card_data }}\n---\n{{ '%d' % title }}", ["TypeError"]),
    ],
)
def test_a_broken_template_is_one_line(content, words, tmp_path):
    path = tmp_path / "own.md"
    if content is not None:
        path.write_text(content)
    fails(lambda: read_template(str(path)), "model_card_template", path, *words)


def test_the_template_is_the_one_at_the_top():
    assert read_template(None) == (ROOT / "model_card_template.md").read_text(encoding="utf-8")


def test_small_words():
    assert [duration(s) for s in (8.6, 69, 3600, 3965)] == [
        "9 s",
        "1 min 9 s",
        "1 h 0 min",
        "1 h 6 min",
    ]
    assert show([True, 3e-05, "a"]) == "true, 3e-05, a"
