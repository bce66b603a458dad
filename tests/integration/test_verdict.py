"""Runs end with what happened to the model: in the summary and in the card."""

import csv
import random

import pytest
from helpers.tiny import WORDS, save_tiny

from simcse_trainer.cli.train import main

TOPICS = [WORDS[i * 4 : i * 4 + 4] for i in range(4)]


def sentence(topic, rng):
    return " ".join(rng.choices(TOPICS[topic], k=rng.randint(4, 9)))


def write(path, header, rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.fixture
def train(tmp_path, capsys):
    rng = random.Random(0)
    rows = [(sentence(i % 4, rng), sentence(i % 4, rng)) for i in range(200)]

    def train(*words, rows=rows, evaluated=150, at_random=False, searched=()):
        pairs = []
        for i in range(evaluated):
            first, second = i % 4, (i + i // 4 % 2) % 4
            score = rng.random() if at_random else float(first == second)
            pairs.append((sentence(first, rng), sentence(second, rng), score))
        data = write(tmp_path / "train.csv", ("sent0", "sent1"), rows)
        eval_file = write(tmp_path / "eval.csv", ("sentence1", "sentence2", "score"), pairs)
        if searched:
            eval_file = write(tmp_path / "faq.csv", ("query", "passage"), searched)
        out = tmp_path / "out"
        options = {
            "model_name_or_path": save_tiny(tmp_path / "model"),
            "train_file": data,
            "eval_tasks": eval_file,
            "output_dir": out,
            "max_steps": 30,
            "per_device_train_batch_size": 4,
            "pooling_mode": "mean",
            "learning_rate": "3e-3",
            "logging_steps": 5,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": "true",
            "disable_tqdm": "true",
        } | dict(zip(words[::2], words[1::2], strict=True))
        assert main([f"--{name}={value}" for name, value in options.items()]) == 0
        card = (out / "README.md").read_text(encoding="utf-8")
        return capsys.readouterr().out, card

    return train


def assert_said(out, card, words):
    (line,) = [line for line in out.splitlines() if line.startswith(words)]
    evaluation = card.split("## Evaluation")[1].split("## Training")[0]
    assert words in evaluation
    return line


def test_a_run_that_helps(train):
    line = assert_said(*train(), "Better: the score rose by")
    assert "95 % interval +" in line
    assert "over 150 pairs" in line


@pytest.mark.parametrize("max_grad_norm", ["0", "1.0"])
def test_a_learning_rate_of_100(train, max_grad_norm):
    out, card = train("learning_rate", "100", "max_grad_norm", max_grad_norm)
    line = assert_said(out, card, "Collapsed: all embeddings point the same way (anisotropy 1.00")
    assert "smaller --learning_rate" in line


def test_one_repeated_answer(train):
    rng = random.Random(1)
    rows = [(sentence(i % 4, rng), "the answer") for i in range(80)]
    line = assert_said(*train(rows=rows), "Nothing was learned: the loss was 0")
    assert "simcse-trainer check" in line


def test_a_gain_within_noise(train):
    # People who rate at random: no model gets better at that.
    line = assert_said(*train(evaluated=24, at_random=True), "Not enough data to tell")
    assert "Evaluate on more pairs" in line


def test_retrieval_that_training_cannot_help(train):
    # Answers drawn at random: no model finds them better than another.
    rng = random.Random(2)
    pairs = [(sentence(i % 4, rng), sentence(rng.randrange(4), rng)) for i in range(40)]
    line = assert_said(*train(searched=pairs), "Not enough data to tell")
    assert "over 40 queries)" in line
    assert "Evaluate on more queries" in line
