"""All that is wrong with options, data, evaluation data and metric is said together, once."""

from pathlib import Path

import pytest
from helpers.checks import fails
from helpers.runs import run, train

from simcse_trainer.cli.config import parse_arguments
from simcse_trainer.errors import CollectedErrors, InputError

assert run


def test_everything_wrong_is_one_line(run, capsys):
    Path("triplets.csv").write_bytes("sent0,sent1\n책,책이 언제 오나요\n".encode("cp949"))
    Path("pairs.csv").write_text("sentence1,sentence2,score\na,b,high\n")
    wrong = {
        "label_smoothing_factor": 0.1,
        "use_liger_kernel": True,
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "stsb",
    }
    assert train(run | wrong) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    for words in (
        "4 things to correct: (1) label_smoothing_factor is 0.1",
        "use_liger_kernel is True",
        "(2) pairs.csv row 2: column 'score' is 'high'",
        "(3) metric_for_best_model is 'stsb'; the evaluation gives pairs_spearman, avg_sts",
        "(4) triplets.csv is not UTF-8",
        "--encoding cp949",
    ):
        assert words in line


def test_options_that_cannot_be_are_said_together():
    fails(
        lambda: parse_arguments(["--temperature=0", "--mlm_weight=-1"]),
        "temperature is 0.0; expected more than 0. mlm_weight is -1.0; expected 0 or more.",
    )
    fails(
        lambda: parse_arguments(["--temprature", "1", "--lerning_rate", "2"]),
        "'temprature'. Did you mean 'temperature'?",
        "'lerning_rate'. Did you mean 'learning_rate'?",
    )


def test_one_error_is_itself_and_others_pass():
    problems = CollectedErrors()
    problems.raise_all()
    error = InputError("x")
    with problems:
        raise error
    with pytest.raises(InputError) as found:
        problems.raise_all()
    assert found.value is error
    with pytest.raises(KeyError), problems:
        raise KeyError
