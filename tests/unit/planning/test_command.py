"""`simcse-trainer plan`."""

import json

import pytest
from helpers.checks import fails
from typer.testing import CliRunner

from simcse_trainer.cli import app
from simcse_trainer.cli.plan import _bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("24", 24 * 2**30), ("1.5 gb", 15 * 10**8), ("800MiB", 800 * 2**20)],
)
def test_sizes(text, size):
    assert _bytes(text) == size


def test_a_size_that_is_none():
    fails(lambda: _bytes("much"), "memory is 'much'", "24GiB")


def test_it_takes_what_training_takes_and_the_command_line_wins(tmp_path):
    facts = {"model_type": "bert", "vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4}
    facts |= {"num_hidden_layers": 2, "intermediate_size": 48}
    (tmp_path / "config.json").write_text(json.dumps(facts), encoding="utf-8")
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "model_name_or_path: me/far-away\nmax_seq_length: 16\nbf16: true\nnli_triplets: true\n"
        "per_device_train_batch_size: 8\nmini_batch_size: 12\n",
        encoding="utf-8",
    )
    words = ["plan", str(recipe), "--backbone_config", str(tmp_path / "config.json")]
    words += ["--mini_batch_size", "6", "--tokens", "10", "--memory", "2GiB"]
    words += ["--output", str(tmp_path / "plan.json")]
    run = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "me/far-away on a GPU" in run.stdout
    assert "8 rows of 3 texts a step, 6 texts at a time, 10 tokens on average" in run.stdout
    assert "2.00 GiB: fits" in run.stdout
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["workload"]["chunk"] == 6
    assert written["plan"]["trained"] == written["plan"]["parameters"] > 0
    assert f"{written['plan']['parameters']:,} parameters" in run.stdout
