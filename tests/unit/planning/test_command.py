"""`simcse-trainer plan`."""

import json
import warnings

import pytest
from helpers.checks import fails
from helpers.command_line import run
from helpers.tiny import save_tiny
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
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "me/far-away on a GPU" in result.stdout
    assert "8 rows of 3 texts a step, 6 texts at a time, 10 tokens on average" in result.stdout
    assert "2.00 GiB: fits" in result.stdout
    written = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert written["workload"]["chunk"] == 6
    assert written["plan"]["trained"] == written["plan"]["parameters"] > 0
    assert f"{written['plan']['parameters']:,} parameters" in result.stdout


def test_nothing_is_said_that_only_peft_could_change(tmp_path, monkeypatch):
    words = ["--model_name_or_path", save_tiny(tmp_path / "model"), "--use_lora", "true"]
    (tmp_path / "train.txt").write_text("the cat\nthe mat\n", encoding="utf-8")
    words += ["--train_file", tmp_path / "train.txt", "--output_dir", tmp_path / "out"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert run(monkeypatch, "plan", *words) == 0
    assert not [one for one in said if one.category is FutureWarning]
