import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="pip install simcse-trainer[plots]")

from simcse_trainer.analysis.report import (
    Measured,
    find_differences,
    find_query_differences,
    write_report,
)
from simcse_trainer.analysis.space import EmbeddingSpaceStats
from simcse_trainer.data.retrieval import RetrievalData
from simcse_trainer.evaluation.retrieval import score_queries

GRID = [i / 10 for i in range(-10, 11)]
DENSITY = [max(0.0, 1 - abs(c - 0.5)) for c in GRID]
SPACE = EmbeddingSpaceStats(
    metrics={
        "stsb_spearman": 82.031,
        "avg_sts": 82.031,
        "alignment": 0.25,
        "uniformity": -3.5,
        "anisotropy": 0.01,
    },
    singular_values=[3.0, 2.0, 1.0],
    effective_rank=2.75,
    dimensions=3,
    densities=[DENSITY] * 5,
    pairs=[1000, 1, 1, 1, 1],
    grid=GRID,
    layers={"anisotropy": [0.1, 0.2], "intra_sentence_similarity": [0.3, 0.4]},
)
EVIL = '<script>alert(1)</script>"&$x$'
TASK = {
    "sentence1": ["a", "b", "c", EVIL],
    "sentence2": ["w", "x", "y", "z"],
    "score": [0.0, 1.0, 2.0, 5.0],
}
FIGURES = {
    "alignment_uniformity.png",
    "cosine_by_score.png",
    "layer_similarity.png",
    "singular_values.png",
}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data.strip())


def write(folder, model=SPACE, baseline=SPACE, name="me/model", **options):
    given = {"data": "stsb (test)", "tasks": {"stsb": TASK}} | options
    other = Measured("me/base", "cls", baseline) if baseline else None
    page = write_report(folder, Measured(name, "mean", model), other, **given)
    return page.read_text(encoding="utf-8")


def test_the_page_needs_nothing_else(tmp_path):
    text = write(tmp_path, path=[(0, 0.1, -1.0), (10, 0.2, -2.0)])
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", *FIGURES}
    page = Page(text)
    names = [name for name, _ in page.tags]
    assert names.count("svg") == 6  # four figures and the two lines of the key
    assert not {"script", "link", "img", "iframe", "object"} & set(names)
    links = [attrs["href"] for name, attrs in page.tags if name == "a"]
    assert all(link.startswith(("https://arxiv.org/abs/", "#")) for link in links)
    assert "url(http" not in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert "@import" not in text
    words = " ".join(page.words)
    for shown in (
        "82.03",
        "0.250",
        "−3.500",
        "0.010",
        "2.8",
        "4 scored pairs of 8 different sentences: stsb (test).",
        "me/base",
    ):
        assert shown in words, shown
    assert "The line is the training run" in words


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for one in (tmp_path / "a").iterdir():
        assert one.read_bytes() == (tmp_path / "b" / one.name).read_bytes(), one.name


def test_names_and_data_are_text(tmp_path):
    text = write(tmp_path, name=EVIL, data=EVIL)
    page = Page(text)
    assert "script" not in [name for name, _ in page.tags]
    assert f"The embedding space of {EVIL}" in " ".join(page.words)


def test_what_is_not_known_is_left_out(tmp_path):
    metrics = {"stsb_spearman": float("nan"), "avg_sts": float("nan"), "anisotropy": 1.0}
    bare = EmbeddingSpaceStats(
        metrics,
        [1.0],
        1.0,
        3,
        [[], [], DENSITY, [], []],
        [0, 0, 2, 0, 0],
        GRID,
        {"anisotropy": [1.0, 1.0]},
    )
    text = write(tmp_path, bare, None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.html",
        *(FIGURES - {"alignment_uniformity.png"}),
    }
    assert "baseline</strong>" not in text
    assert not re.search(r"\bnan\b|None", re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL))
    assert "<td>–</td>" in text
    write(tmp_path / "wordless", replace(SPACE, layers={}))
    assert not (tmp_path / "wordless/layer_similarity.png").exists()


def test_a_verdict_changes_and_the_pairs_that_differ_most(tmp_path):
    cosines = {"stsb": [0.9, 0.2, 0.3, 0.4]}
    neighbors = {"a": [(0.91, "b"), (0.5, "c")]}
    model = replace(SPACE, cosines=cosines, neighbors=neighbors)
    metrics = SPACE.metrics | {"stsb_spearman": 90.0, "avg_sts": 90.0}
    base = replace(model, metrics=metrics, cosines={"stsb": [0.1, 0.2, 0.3, 0.4]})
    page = Page(write(tmp_path, model, base))
    words = " ".join(word for word in page.words if word)
    assert "script" not in [name for name, _ in page.tags]
    assert "90.00 82.03 −7.97" in words
    assert "Not enough data to tell: the score changed by -7.97" in words
    assert words.index("0.90 ↑") < words.index("0.20 ↓")
    assert "model 0.91 b" in words
    first, *_ = find_differences({"stsb": TASK}, {"model": model, "baseline": base})
    assert (first.first, first.closer, first.cosines["baseline"]) == ("a", True, "0.10")
    # Without a baseline there is nothing to judge, and the pairs are there.
    alone = Page(write(tmp_path / "alone", model, None))
    assert "Verdict" not in alone.words
    assert "Where model and people differ most" in alone.words


FOUND = ["전액 환불해 주세요", "긴 문장 " * 60]
RETRIEVAL = RetrievalData(
    ["환불", "배송", "쿠폰"],
    [frozenset({0}), frozenset({1}), frozenset({-1})],
    2,
    lambda: iter(enumerate(FOUND)),
)


def searched(rankings):
    gains = score_queries(rankings, RETRIEVAL.relevant)
    metrics = {f"faq_{n}": 100 * sum(x) / len(x) for n, x in gains.items()}
    metrics |= {n.removeprefix("faq_"): x for n, x in metrics.items()}
    return replace(
        SPACE,
        metrics=metrics | {"anisotropy": 0.1},
        densities=[],
        pairs=[],
        gains={"faq": gains["ndcg_at_10"]},
        rankings={"faq": rankings},
    )


def test_retrieval_has_its_measures_their_change_and_the_queries_that_differ(tmp_path):
    base, model = searched([[1, 0], [1, 0], [0, 1]]), searched([[0, 1], [1, 0], [0, 1]])
    page = Page(write(tmp_path, model, base, tasks={"faq": RETRIEVAL}))
    words = " ".join(word for word in page.words if word)
    assert "3 queries among 2 passages" in words
    assert "faq recall@1 × 100; higher is better 33.33 66.67 +33.33" in words
    for measure in ("recall@5", "recall@10", "MRR@10", "nDCG@10"):
        assert f"faq {measure}" in words
    assert words.count("recall@1 ") == 1, "the means are the same"
    assert "the score changed by +12.30" in words
    assert "over 3 queries" in words
    # The only query that differs: its passage, what the baseline found instead, and by how much.
    assert f"환불 relevant: {FOUND[0]} baseline finds: 긴 문장" in words
    assert "… 63.1 100.0 +36.9" in words
    assert "relevant: 긴 문장" not in words
    assert "queries and a relevant passage of each" in words
    assert not (tmp_path / "cosine_by_score.png").exists()


def test_of_a_model_alone_the_worst_queries_are_shown(tmp_path):
    model = searched([[0, 1], [0, 1], [0, 1]])
    worst = find_query_differences({"faq": RETRIEVAL}, {"model": model})
    assert [(one.query, one.relevant) for one in worst] == [("쿠폰", ""), ("배송", FOUND[1])]
    assert worst[0].instead == {"model": FOUND[0]}
    page = Page(write(tmp_path, model, None, tasks={"faq": RETRIEVAL}))
    assert "Queries found worst" in page.words
    assert "Verdict" not in page.words


def test_each_dot_of_the_map_has_its_text_for_pointer_and_keyboard(tmp_path):
    places = {"가": (0.0, 0.0), EVIL: (1.0, 0.5), "다 " * 200: (0.5, 1.0)}
    model = replace(SPACE, places=places)
    page = Page(write(tmp_path, model, replace(model, places=places | {"라": (0, 0)})))
    dots = [attrs for name, attrs in page.tags if name == "i"]
    assert len(dots) == 6
    parts = [re.findall(r"[\d.]+", attrs["style"]) for attrs in dots]
    assert all(0 < float(part) < 1 for both in parts for part in both)
    assert [attrs for name, attrs in page.tags if name == "span" and "tabindex" in attrs] == [
        {"tabindex": "0"}
    ] * 3
    assert EVIL in page.words
    assert max(len(word) for word in page.words if word.startswith("다 ")) <= 160
    assert "script" not in [name for name, _ in page.tags]
    assert "tabindex" not in write(tmp_path / "without")
