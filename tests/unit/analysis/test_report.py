import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib", reason="pip install simcse-trainer[plots]")

from simcse_trainer.analysis.report import Measured, find_differences, write_report
from simcse_trainer.analysis.space import EmbeddingSpaceStats

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
BANDS = ["0–1", "1–2", "2–3", "3–4", "4–5"]
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
    given = {"data": "stsb (test)", "sentences": 1990, "bands": BANDS} | options
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
    assert all(link.startswith("https://arxiv.org/abs/") for link in links)
    assert "url(http" not in text
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    assert "@import" not in text
    words = " ".join(page.words)
    for shown in ("82.03", "0.250", "−3.500", "0.010", "2.8", "1,004 scored pairs", "me/base"):
        assert shown in words, shown
    assert "The line is the training run" in words


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


TASK = {
    "sentence1": ["a", "b", "c", EVIL],
    "sentence2": ["w", "x", "y", "z"],
    "score": [0.0, 1.0, 2.0, 5.0],
}


def test_a_verdict_changes_and_the_pairs_that_differ_most(tmp_path):
    cosines = {"stsb": [0.9, 0.2, 0.3, 0.4]}
    neighbors = {"a": [(0.91, "b"), (0.5, "c")]}
    model = replace(SPACE, cosines=cosines, neighbors=neighbors)
    metrics = SPACE.metrics | {"stsb_spearman": 90.0, "avg_sts": 90.0}
    base = replace(model, metrics=metrics, cosines={"stsb": [0.1, 0.2, 0.3, 0.4]})
    page = Page(write(tmp_path, model, base, tasks={"stsb": TASK}))
    words = " ".join(word for word in page.words if word)
    assert "script" not in [name for name, _ in page.tags]
    assert "90.00 82.03 −7.97" in words
    assert "Not enough data to tell: the score changed by -7.97" in words
    assert words.index("0.90 ↑") < words.index("0.20 ↓")
    assert "model 0.91 b" in words
    first, *_ = find_differences({"stsb": TASK}, {"model": model, "baseline": base})
    assert (first.first, first.closer, first.cosines["baseline"]) == ("a", True, "0.10")
    # Without a baseline there is nothing to judge, and the pairs are there.
    alone = Page(write(tmp_path / "alone", model, None, tasks={"stsb": TASK}))
    assert "Verdict" not in alone.words
    assert "Where model and people differ most" in alone.words
