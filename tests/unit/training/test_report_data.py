"""What a run says of its data before the first step."""

import logging

import pytest
from datasets import Dataset
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model

from simcse_trainer import SimCSETrainer

STREAM = UNSUPERVISED.to_iterable_dataset()


@pytest.fixture
def said(tmp_path, caplog):
    def said(data, evaluation=None, **options):
        with caplog.at_level(logging.INFO, "simcse_trainer"):
            caplog.clear()
            SimCSETrainer(build_model(), build_args(tmp_path, **options), data, evaluation)
        return [r for r in caplog.records if r.name == "simcse_trainer.training.dataset"]

    return said


def test_facts_in_a_few_lines(said):
    lines = [record.getMessage() for record in said(TRIPLETS) if record.levelname == "INFO"]
    assert "40 rows of sent0, sent1, hard_neg (supervised, on triplets" in lines[0]
    assert "(cut at 20)" in lines[1]
    assert len(lines) == 2


def test_one_answer_is_warned_of(said):
    data = Dataset.from_dict({"sent0": UNSUPERVISED["sent0"], "sent1": ["the answer"] * 40})
    warnings = [r.getMessage() for r in said(data) if r.levelname == "WARNING"]
    assert any("the loss is 0" in warning for warning in warnings)


def test_evaluation_pairs_in_the_data_are_warned_of(said):
    data = Dataset.from_dict({"sent0": PAIRS["sentence1"], "sent1": PAIRS["sentence2"]})
    warnings = [r.getMessage() for r in said(data, {"a": PAIRS}) if r.levelname == "WARNING"]
    assert any("12 of 12 evaluation pairs" in warning for warning in warnings)


def test_a_stream_is_not_looked_at(said):
    assert not any("Data:" in record.getMessage() for record in said(STREAM))
