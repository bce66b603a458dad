"""A run that is lost goes on from its training state on the Hub, if that is whole."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.hub_runs import TOKEN, build, train
from helpers.loopback import LoopbackHub
from helpers.training import PAIRS
from safetensors.torch import load_file

from simcse_trainer import InputError
from simcse_trainer.training.resume import download_training_state

pytestmark = pytest.mark.usefixtures("client_here")

RUN = """
import os, sys
sys.path[:0] = {paths!r}
from pathlib import Path
from helpers.hub_runs import build
from transformers import TrainerCallback

os.environ["HF_HUB_OFFLINE"] = "0"  # the tests' own setting

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            trainer.hub.uploader.finish(60, show_progress=False)
            os.kill(os.getpid(), 9)

trainer = build(Path(sys.argv[1]), callbacks=[Kill()], max_steps=10, **{options!r})
trainer.train()
"""


@pytest.mark.parametrize("best", [False, True])
@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere_from_the_hub_to_the_same_weights(
    best, hub: LoopbackHub, tmp_path
):
    options = {"mlm_weight": 0.0}
    if best:
        options |= {
            "eval_strategy": "steps",
            "eval_steps": 2,
            "eval_dataset": {"stsb": PAIRS},
            "load_best_model_at_end": True,
            "greater_is_better": False,
        }
    complete = train(tmp_path / "whole", push_to_hub=False, max_steps=10, **options)
    out = tmp_path / "killed"
    paths = [str(ROOT / "tests")]
    told = {name: value for name, value in options.items() if name != "eval_dataset"}
    code = RUN.format(paths=paths, options=told)
    if best:
        code = code.replace("max_steps=10", "max_steps=10, eval_dataset={'stsb': PAIRS}")
        code = (
            "import sys; sys.path[:0] = "
            + repr(paths)
            + "\nfrom helpers.training import PAIRS\n"
            + code
        )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    killed = subprocess.run([sys.executable, "-c", code, str(out)], env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    shutil.rmtree(out)
    checkpoint = download_training_state("me/tiny", tmp_path / "resumed", token=TOKEN)
    assert checkpoint == tmp_path / "resumed/checkpoint-4"
    resumed = build(tmp_path / "resumed", push_to_hub=False, max_steps=10, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 10
    for name, tensor in complete.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    if best:
        assert complete.state.best_global_step == resumed.state.best_global_step


@pytest.mark.parametrize("path", ["optimizer.pt", "model.safetensors", "trainer_state.json"])
@pytest.mark.slow
def test_an_altered_training_state_is_refused(path, hub: LoopbackHub, tmp_path):
    train(tmp_path / "out")
    repo = hub.repos["me/tiny"]
    data = repo.files("training-state")[path]
    repo.corrupt(path, "training-state", data[:-9] + b"x" + data[-8:])
    with pytest.raises(InputError, match=f"{path} differs from its checksum"):
        download_training_state("me/tiny", tmp_path / "new", token=TOKEN)
    assert not list((tmp_path / "new").glob("checkpoint-*"))


@pytest.mark.slow
def test_an_incomplete_training_state_is_refused(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out")
    repo = hub.repos["me/tiny"]
    complete = dict(repo.by_sha[repo.branches["training-state"]].files)
    incomplete = {path: blob for path, blob in complete.items() if path != "optimizer.pt"}
    repo.commit("training-state", "torn", incomplete)
    with pytest.raises(InputError, match=r"incomplete: optimizer\.pt is listed"):
        download_training_state("me/tiny", tmp_path / "new", token=TOKEN)
    assert not list((tmp_path / "new").glob("checkpoint-*"))


@pytest.mark.slow
def test_a_repository_without_a_training_state_says_so(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out", hub_push_training_state=False)
    with pytest.raises(InputError, match="resume_from_hub: me/tiny cannot be resumed from"):
        download_training_state("me/tiny", tmp_path / "new", token=TOKEN)
    with pytest.raises(InputError, match="'main' of me/tiny holds no training state"):
        download_training_state("me/tiny@main", tmp_path / "new", token=TOKEN)


@pytest.mark.slow
def test_an_earlier_state_can_be_asked_for(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out")
    earlier = hub.repos["me/tiny"].commits("training-state")[1]
    assert earlier.title == "step 4"
    source = f"me/tiny@{earlier.sha}"
    checkpoint = download_training_state(source, tmp_path / "new", token=TOKEN)
    assert checkpoint.name == "checkpoint-4"
    first = load_file(checkpoint / "model.safetensors")
    local = load_file(Path(tmp_path / "out/checkpoint-4/model.safetensors"))
    assert all(torch.equal(first[name], local[name]) for name in local)
