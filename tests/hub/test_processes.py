"""Real processes: several that train, and one that is killed at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from helpers import ROOT
from helpers.hub_runs import TOKEN
from helpers.loopback import LoopbackHub
from safetensors.torch import load_file

# Processes, seconds each.
pytestmark = pytest.mark.slow

PUSH = {
    "push_to_hub": True,
    "hub_model_id": "me/tiny",
    "hub_timeout_s": 3,
    "save_strategy": "steps",
}
# Says when each process has ended, which is when it has left the Hub to the first one.
SCRIPT = """
import os, sys, time
from pathlib import Path
from simcse_trainer.cli.train import main

status = main(sys.argv[1:])
Path("ended-" + os.environ.get("RANK", "0")).write_text(str(time.time()))
sys.exit(status)
"""


@pytest.fixture
def start(run, hub: LoopbackHub, monkeypatch):
    """Starts `main` in processes of its own, one or several."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    Path("script.py").write_text(SCRIPT)

    def start(count: int = 1, **options) -> subprocess.Popen:
        path = Path(f"{len(list(Path.cwd().glob('*.yaml')))}.yaml")
        path.write_text(yaml.safe_dump(run | PUSH | options), encoding="utf-8")
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        command = [sys.executable, *(torchrun if count > 1 else ()), "script.py", str(path)]
        # A group of its own, as a terminal's job is one.
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def test_of_two_processes_only_the_main_one_talks_to_the_hub(start, hub: LoopbackHub):
    options = {"max_steps": 8, "save_steps": 4, "hub_always_push": True}
    said = (first := start(2, **options)).communicate(timeout=300)[1]
    assert first.returncode == 0, said
    assert "Training in 2 processes." in said
    repo = hub.repos["me/tiny"]
    titles = [commit.title.split(":")[0] for commit in repo.commits()]
    assert titles == ["step 8", "step 8", "step 4", "initial commit"]
    assert "optimizer.pt" in repo.files("training-state")
    assert hub.count("whoami") == hub.count("create") == 1
    pushed = hub.count("commit")

    # The other process leaves while the main one waits for a Hub that does not answer.
    hub.stall = 60
    hub.inject("commit", "timeout", None)
    more = {"output_dir": "elsewhere", "resume_from_hub": "me/tiny", "max_steps": 12}
    more |= {"hub_timeout_s": 60, "hub_final_timeout_s": 8, "allow_resume_mismatch": True}
    said = (second := start(2, **(options | more))).communicate(timeout=300)[1]
    assert second.returncode == 0, said
    assert "Finish with: simcse-trainer push elsewhere me/tiny" in said
    states = [r for r in hub.requests if r.stage == "download" and "optimizer.pt" in r.path]
    assert len(states) == 1, "one of two fetched the training state"
    assert hub.count("commit") > pushed
    main_ended, other_ended = (float(Path(f"ended-{rank}").read_text()) for rank in (0, 1))
    assert main_ended - other_ended > 5


def test_a_refusal_ends_all_processes(start, hub: LoopbackHub):
    refused = start(2, max_steps=8, save_steps=4, hub_model_id="other/tiny")
    said = refused.communicate(timeout=300)[1]
    assert refused.returncode != 0
    assert said.count("error: push_to_hub: other/tiny cannot be pushed to") == 1
    assert not hub.count("commit")


def test_a_run_that_is_killed_at_any_moment_goes_on_from_the_hub(start, hub: LoopbackHub):
    """Killed, its folder deleted, and resumed from the rest, pushing on to the same repository."""
    options = {"max_steps": 200, "save_steps": 10, "save_total_limit": 1}
    complete = start(**options, push_to_hub=False, output_dir="whole")
    killed = start(**options)
    while not _states(hub):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    shutil.rmtree("out")
    step = int(_states(hub)[0].title.split(":")[0].removeprefix("step "))
    assert 0 < step < 200
    resumed = start(**options, resume_from_hub="me/tiny")
    assert complete.wait(300) == 0
    out, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert "The model after 200 steps" in out
    there, here = load_file("whole/model.safetensors"), load_file("out/model.safetensors")
    assert all(torch.equal(there[name], here[name]) for name in there)
    repo = hub.repos["me/tiny"]
    assert repo.files("step-200")["model.safetensors"] == Path("out/model.safetensors").read_bytes()


def test_ctrl_c_while_a_push_begins_reaches_the_run_alone(start, hub: LoopbackHub):
    """A terminal signals the whole group, also a child that cannot ignore it yet."""
    # A process that a shell has put into the background ignores it, and so do its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped = start(max_steps=100_000, save_steps=10)
    signal.signal(signal.SIGINT, before)
    try:
        process = psutil.Process(stopped.pid)
        while not (Path("out/checkpoint-10").exists() and process.children()):
            assert stopped.poll() is None, stopped.communicate()[1]
            time.sleep(0.02)
        os.killpg(stopped.pid, signal.SIGINT)
        said = stopped.communicate(timeout=300)[1]
    finally:
        stopped.kill()
    assert stopped.returncode == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    assert "Next try" not in said
    last = max(int(path.name.split("-")[1]) for path in Path("out").glob("checkpoint-*"))
    assert _states(hub)[0].title.split(":")[0] == f"step {last}"


def _states(hub: LoopbackHub) -> list:
    repo = hub.repos.get("me/tiny")
    commits = repo.commits("training-state") if repo and "training-state" in repo.branches else []
    return [commit for commit in commits if "optimizer.pt" in commit.files]
