"""The launchers people use, and the configurations for them."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from helpers import ROOT

from simcse_trainer import InputError
from simcse_trainer.training.processes import _asked_of_accelerate, check_processes, find_command

CONFIGS = sorted((ROOT / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_config(path):
    config = load_config_from_file(str(path))
    kind = {"multi_gpu": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}
    assert str(config.distributed_type).rsplit(".", 1)[-1] == kind.get(path.stem, "NO")
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if path.stem == "deepspeed_zero2":
        assert config.deepspeed_config["zero_stage"] == 2


def test_all_configs_are_there():
    names = {"single_gpu", "multi_gpu", "fsdp2", "deepspeed_zero2", "cpu"}
    assert {path.stem for path in CONFIGS} == names


def launch(options: dict, *argv: str) -> subprocess.CompletedProcess:
    Path("run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command = [*(accelerate if argv else []), *argv, str(ROOT / "train_simcse.py"), "run.yaml"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.slow
def test_one_process_on_the_cpu(run):
    cpu = str(ROOT / "configs/accelerate/cpu.yaml")
    found = launch(run, "--config_file", cpu)
    assert found.returncode == 0, found.stderr
    assert "Training in 1 process." in found.stderr
    assert "The model after 4 steps is in out" in found.stdout


@pytest.mark.slow
def test_two_processes_that_the_launcher_does_not_start(run):
    found = launch(run, "--cpu", "--num_processes", "2")
    assert found.returncode != 0
    assert "asked for 2 processes and started 1" in found.stderr
    assert "torchrun --nproc_per_node 2" in found.stderr
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        (["python", "train_simcse.py"], None),
        (["python", "/bin/accelerate", "launch", "--num_processes", "3", "x.py"], 3),
        (["/bin/accelerate", "launch", "--num_processes=2", "x.py", "--seed", "9"], 2),
        (["torchrun", "--nproc_per_node", "2", "x.py"], None),
    ],
)
def test_what_the_launcher_was_asked_for(command, asked, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    assert _asked_of_accelerate(command) == asked


def test_the_config_file_counts_too(monkeypatch):
    path = str(ROOT / "configs/accelerate/multi_gpu.yaml")
    command = ["accelerate", "launch", "--config_file", path, "x.py"]
    monkeypatch.setattr("simcse_trainer.training.processes._parent_command", lambda: command)
    with pytest.raises(InputError, match="asked for 4 processes and started 1"):
        check_processes(1)
    check_processes(4)


def test_one_core_of_several_is_named(monkeypatch, caplog):
    # `accelerate launch` without a config leaves one thread, which is also what the tests have.
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    with caplog.at_level(logging.WARNING):
        check_processes(1)
    assert "Computing with 1 of 4 CPU cores; set OMP_NUM_THREADS=4" in caplog.text
    caplog.clear()
    check_processes(4)
    assert "Computing with" not in caplog.text


@pytest.mark.parametrize(
    ("parent", "command"),
    [
        ([], "python train_simcse.py run.yaml --seed 1"),
        (["bash", "x.sh", "run.yaml", "--seed", "1"], "python train_simcse.py run.yaml --seed 1"),
        (
            ["/v/python", "/v/bin/accelerate", "launch", "t.py", "run.yaml", "--seed", "1"],
            "accelerate launch t.py run.yaml --seed 1",
        ),
        (
            ["python", "-m", "torch.distributed.run", "-n", "t.py", "run.yaml", "--seed", "1"],
            "torchrun -n t.py run.yaml --seed 1",
        ),
        (
            ["/v/python", "/v/bin/torchrun", "other.py"],
            "python train_simcse.py run.yaml --seed 1",
        ),
    ],
)
def test_the_command_that_the_card_names(parent, command, monkeypatch):
    monkeypatch.setattr("simcse_trainer.training.processes._parent_command", lambda: parent)
    assert " ".join(find_command(["run.yaml", "--seed", "1"])) == command
