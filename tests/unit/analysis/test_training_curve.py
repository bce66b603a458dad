"""The training curve: same input, same bytes; no torch, no pyplot."""

import subprocess
import sys

import pytest
from helpers.checks import fails

from simcse_trainer.analysis.figures import (
    _score,
    can_draw_training_curve,
    describe_training_curve,
    draw_training_curve,
    shorten_label,
)

LOG = [
    {"step": 0, "eval_stsb_spearman": 60.0, "eval_avg_sts": 60.0},
    {"step": 5, "loss": 2.0, "learning_rate": 1e-5},
    {"step": 10, "loss": 1.5},
    {"step": 10, "eval_stsb_spearman": 70.0, "eval_avg_sts": 70.0},
    {"step": 15, "loss": float("nan")},
    {"step": 20, "train_loss": 1.7, "train_runtime": 3.0},
]


@pytest.fixture(autouse=True)
def _matplotlib():
    pytest.importorskip("matplotlib", reason="pip install simcse-trainer[plots]")


def test_the_same_input_gives_the_same_bytes_in_any_process(tmp_path):
    import matplotlib

    draw_training_curve(LOG, tmp_path / "a.png")
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 20, "axes.facecolor": "red"}):
        draw_training_curve(LOG, tmp_path / "b.png")
        assert matplotlib.rcParams["font.size"] == 20
    code = (
        "import json, sys\n"
        "from simcse_trainer.analysis.figures import draw_training_curve\n"
        "draw_training_curve(json.load(sys.stdin), sys.argv[1])\n"
        "print('torch' in sys.modules, 'matplotlib.pyplot' in sys.modules)\n"
    )
    import json

    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "c.png"],
        input=json.dumps(LOG),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == ["False", "False"]
    first = (tmp_path / "a.png").read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "b.png").read_bytes() == first
    assert (tmp_path / "c.png").read_bytes() == first


def test_retrieval_alone_is_drawn_by_its_ndcg():
    scores = [
        {"step": step, "eval_faq_ndcg_at_10": value, "eval_ndcg_at_10": value}
        for step, value in ((0, 50.0), (10, 60.0))
    ]
    assert _score(scores) == ("faq\n(nDCG@10 x 100)", ([0, 10], [50.0, 60.0]))
    several = [entry | {"eval_wiki_ndcg_at_10": 1.0} for entry in scores]
    assert _score(several)[0] == "mean\n(nDCG@10 x 100)"
    assert _score([*scores, *LOG])[0] == "stsb\n(Spearman x 100)"


def test_it_is_grey_and_follows_the_log(tmp_path):
    from PIL import Image

    draw_training_curve(LOG, tmp_path / "both.png")
    with Image.open(tmp_path / "both.png") as image:
        assert all(
            red == green == blue for _, (red, green, blue) in image.convert("RGB").getcolors(10**6)
        )
        tall = image.height
    draw_training_curve(LOG[1:3], tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.height < tall
    other = [*LOG[:1], {"step": 5, "loss": 9.0}, *LOG[2:]]
    draw_training_curve(other, tmp_path / "other.png")
    assert (tmp_path / "other.png").read_bytes() != (tmp_path / "both.png").read_bytes()


@pytest.mark.parametrize("log", [[], LOG[1:2], LOG[:2], [LOG[1], LOG[4]]])
def test_fewer_than_two_points_are_no_curve(log, tmp_path):
    assert not can_draw_training_curve(log)
    fails(lambda: draw_training_curve(log, tmp_path / "x.png"), "fewer than two points")
    assert not list(tmp_path.glob("*.png"))
    assert can_draw_training_curve(LOG)


def test_the_path_through_the_space_is_beside_it_where_it_was_logged(tmp_path):
    from PIL import Image

    space = [{"eval_alignment": 0.1, "eval_uniformity": -1.0}, {}, {}]
    space += [{"eval_alignment": 0.2, "eval_uniformity": -2.0}, {}, {}]
    log = [entry | more for entry, more in zip(LOG, space, strict=True)]
    both = "Training loss and evaluation score over the steps"
    assert describe_training_curve(LOG) == both
    assert (
        describe_training_curve(log)
        == f"{both}, and the path in the plane of alignment and uniformity"
    )
    assert describe_training_curve(LOG[1:3]) == "Training loss over the steps"
    assert describe_training_curve(LOG[1:2]) == ""
    draw_training_curve(log, tmp_path / "path.png")
    draw_training_curve(LOG, tmp_path / "curve.png")
    with Image.open(tmp_path / "path.png") as path, Image.open(tmp_path / "curve.png") as curve:
        assert path.width > curve.width
        assert all(r == g == b for _, (r, g, b) in path.convert("RGB").getcolors(10**6))


def test_a_long_name_is_cut_to_the_height_of_its_panel():
    assert shorten_label("customer_support_1") == "customer_support_1"
    assert shorten_label("customer_support_ko") == "customer_support_…"
    assert shorten_label("고객문의평가데이터") == "고객문의평가데이터"
    assert shorten_label("고객문의평가데이터세트") == "고객문의평가데이…"
