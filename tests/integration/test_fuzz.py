"""Whatever a config or a data file holds: success, or one line and status 2.

`SIMCSE_FUZZ_CASES=2000 pytest tests/integration/test_fuzz.py` runs that many of each; a case is
run again by its number: `-k "config-17]"`.
"""

import os
import signal
import sys

import numpy as np
import pytest
import yaml
from helpers.fuzzing import random_config, random_data
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel, cli
from simcse_trainer.cli import train as script

CASES = int(os.environ.get("SIMCSE_FUZZ_CASES", "60"))
LIMIT_S = 120

LINES = [" ".join(WORDS[(i * k) % 16] for k in range(1, 3 + i % 6)) for i in range(24)]
GOOD = {
    "model_name_or_path": "base",
    "train_file": "triplets.csv",
    "output_dir": "out",
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "hub_final_timeout_s": 1,
}


class Hang(BaseException):
    """No Exception, so that nothing between here and there takes it for its own."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and good data, which every case finds beside its own."""
    folder = tmp_path_factory.mktemp("made")
    backbone = tiny_backbone(num_hidden_layers=2)
    for parameter in backbone.parameters():
        parameter.data *= 0.3
    SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean").save_pretrained(folder / "base")
    (folder / "train.txt").write_text("\n".join(LINES), encoding="utf-8")
    rows = [f"{a},{b},{c}" for a, b, c in zip(LINES, LINES[1:], LINES[5:], strict=False)]
    (folder / "triplets.csv").write_text("sent0,sent1,hard_neg\n" + "\n".join(rows))
    pairs = [f"{a},{b},{i % 6}" for i, (a, b) in enumerate(zip(LINES, LINES[3:], strict=False))]
    (folder / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(pairs))
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    before = os.environ.copy()
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _limit():
    def stop(*_):
        raise Hang(f"after {LIMIT_S} seconds")

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def check_training(words, capsys, folder):
    status = script.main(words)
    said = capsys.readouterr().err.strip().splitlines()
    written = [*folder.glob("out/model.safetensors"), *folder.glob("out/adapter_model.safetensors")]
    if status == 0:
        # What is claimed as written is there, and a model.
        assert SimCSEModel.from_pretrained("out").encode(["a dog"]).shape[0] == 1
    else:
        check_error(status, said)
        assert not written


def check_error(status, said):
    assert status == 2
    assert said[-1].startswith("error: ")
    assert len(said[-1]) > len("error: ")
    assert not any("Traceback" in line for line in said)


@pytest.mark.parametrize("number", range(CASES), ids=lambda number: f"config-{number}")
def test_configs(number, folder, capsys):
    config = random_config(number)
    print(config)
    with open("run.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(GOOD | config, file)
    check_training(["run.yaml"], capsys, folder)


@pytest.mark.parametrize("number", range(CASES), ids=lambda number: f"data-{number}")
def test_data_files(number, folder, capsys, monkeypatch):
    case = random_data(number, folder)
    print(case)
    if case.entry in ("train", "eval"):
        key = "train_file" if case.entry == "train" else "eval_tasks"
        with open("run.yaml", "w", encoding="utf-8") as file:
            yaml.safe_dump(GOOD | {key: str(case.path.name)} | case.options, file)
        check_training(["run.yaml"], capsys, folder)
        return
    words = {
        "encode": ["encode", "base", case.path.name, "--output", "v.npy"],
        "search": ["search", "base", "a dog", "--corpus", case.path.name, "--save_index", "index"],
        "evaluate": ["evaluate", "base", "--tasks", case.path.name, "--output", "r.json"],
    }[case.entry]
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    status = ended.value.code or 0
    said = capsys.readouterr()
    written = folder / {"encode": "v.npy", "search": "index", "evaluate": "r.json"}[case.entry]
    assert written.exists() == (status == 0)
    if status != 0:
        check_error(status, said.err.strip().splitlines())
    elif case.entry == "encode":
        count = int(said.out.splitlines()[-1].split()[0])
        assert np.load("v.npy", allow_pickle=False).shape == (count, 32)
