"""A run goes on only as itself."""

import json
import logging

import pytest
from datasets import Dataset
from helpers.checks import fails
from helpers.tiny import tiny_backbone, tiny_tokenizer

from simcse_trainer import InputError, SimCSEModel, SimCSETrainingArguments
from simcse_trainer.files import RUN
from simcse_trainer.model.lora import add_adapter, lora_config
from simcse_trainer.training.resume import (
    check_fingerprint,
    run_fingerprint,
    write_fingerprint,
)

ROWS = [[[2, 5, 3], [2, 6, 7, 3]], [[2, 8, 3], [2, 9, 3]], [[2, 5, 3], [2, 5, 3]]]


def identify(tmp_path, rows=ROWS, model=None, **options):
    args = SimCSETrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    model = model or SimCSEModel(tiny_backbone("bert"), tiny_tokenizer(), pooling_mode="mean")
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_dict({"input_ids": rows})
    return run_fingerprint(model, dataset, args)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write_fingerprint(identify(tmp_path), folder, batch_size=64)
    return folder


def test_the_same_run_passes_however_its_data_is_stored(checkpoint, tmp_path, caplog):
    shuffled = Dataset.from_dict({"input_ids": [ROWS[2], ROWS[0], ROWS[1]], "other": [1, 2, 3]})
    for rows in (ROWS, shuffled.select([1, 2, 0])):
        check_fingerprint(identify(tmp_path, rows), checkpoint, allow_mismatch=False)
    assert not caplog.records


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[:2],
        [ROWS[1], ROWS[0], ROWS[2]],
        # the same tokens, in other texts
        [[[2, 5, 3, 2], [6, 7, 3]], ROWS[1], ROWS[2]],
    ],
    ids=["rows", "order", "boundaries"],
)
def test_other_data_is_refused(rows, checkpoint, tmp_path):
    run = identify(tmp_path, rows)
    with pytest.raises(InputError, match=r"checkpoint-3 is of another run \(data "):
        check_fingerprint(run, checkpoint, allow_mismatch=False)
    check_fingerprint(run, checkpoint, allow_mismatch=True)


def test_another_batch_or_backbone_is_refused_with_both_values(checkpoint, tmp_path):
    run = identify(tmp_path, per_device_train_batch_size=16)
    with pytest.raises(InputError, match="per_device_train_batch_size: 64 then, 16 now"):
        check_fingerprint(run, checkpoint, allow_mismatch=False)
    other = SimCSEModel(tiny_backbone("roberta"), tiny_tokenizer(), pooling_mode="mean")
    with pytest.raises(InputError, match="backbone type: bert then, roberta now"):
        check_fingerprint(identify(tmp_path, model=other), checkpoint, allow_mismatch=False)


def test_other_options_are_named(checkpoint, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run = identify(tmp_path, seed=7, augmentation="crop")
        check_fingerprint(run, checkpoint, allow_mismatch=False)
    assert [r.message for r in caplog.records] == [
        "Resuming with a change: seed: 42 then, 7 now.",
        "Resuming with a change: augmentation: dropout then, crop now.",
    ]


def test_a_checkpoint_that_says_nothing_passes(checkpoint, tmp_path):
    (checkpoint / RUN).write_text(json.dumps({})[:1], encoding="utf-8")
    check_fingerprint(identify(tmp_path, ROWS[:2]), checkpoint, allow_mismatch=False)


def test_an_adapter_of_other_strength_is_refused(tmp_path):
    """Its weights are of the same shapes."""

    def adapted(alpha):
        backbone = add_adapter(tiny_backbone("bert"), lora_config(r=2, alpha=alpha))
        model = SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean")
        return identify(tmp_path, model=model)

    write_fingerprint(adapted(4), tmp_path, batch_size=64)
    check_fingerprint(adapted(4), tmp_path, allow_mismatch=False)
    fails(
        lambda: check_fingerprint(adapted(8), tmp_path, allow_mismatch=False),
        "backbone adapter",
        "'lora_alpha': 4",
        "'lora_alpha': 8",
    )
