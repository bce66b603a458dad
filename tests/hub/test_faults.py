"""A Hub that fails, at every stage of an exchange and in every way: training does not notice."""

import logging
import time
from pathlib import Path

import pytest
import torch
from hub_fixture import OUTCOME
from hub_runs import TOKEN, build, train, weights
from loopback import LoopbackHub
from loopback_faults import KINDS, OTHER_STAGES, STAGES, Fault
from transformers import TrainerCallback

from simcse_trainer import InputError
from simcse_trainer.hub.process import HubSettings
from simcse_trainer.hub.pushing import push
from simcse_trainer.hub.resume import download_training_state

TIMES = ("once", "always")
CELLS = [
    *((stage, kind, t) for stage in STAGES if stage != "download" for kind in KINDS for t in TIMES),
    # Three kinds stand for the rest.
    *((stage, kind, "once") for stage in OTHER_STAGES for kind in ("503", "reset", "malformed")),
]
# Before the first step a definite no is an error, and nothing has been trained to be lost.
REFUSED_AT_START = {("create", "401"), ("create", "403")}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Checkpoint and weights of the run without a Hub."""
    out = tmp_path_factory.mktemp("untouched")
    trainer = train(out, push_to_hub=False, **SHORT)
    return out / "checkpoint-2", weights(trainer)


class Met(TrainerCallback):
    """However slow the machine is: patience begins when the fault has been met."""

    def __init__(self, fault: Fault):
        self.fault = fault

    def on_train_end(self, args, state, control, **kwargs):
        deadline = time.monotonic() + 60
        while not self.fault.hits:
            assert time.monotonic() < deadline, "the fault was not met"
            time.sleep(0.02)


SHORT = {"max_steps": 2, "hub_timeout_s": 0.5}


@pytest.mark.parametrize(("stage", "kind", "times"), CELLS)
def test_whatever_fails_training_completes_and_the_outcome_is_known(
    stage, kind, times, untouched, hub: LoopbackHub, tmp_path, caplog, record_property
):
    out = tmp_path / "out"
    hub.stall = 2.0
    fault = hub.inject(stage, kind, None if times == "always" else 1)
    patience = 30.0 if times == "once" else 1.0
    if times == "always" and (stage, kind) in REFUSED_AT_START:
        with pytest.raises(InputError, match=rf"^push_to_hub: me/tiny .*{kind}"):
            build(out, **SHORT)
        record_property(OUTCOME, [stage, kind, times, "refused"])
        return
    trainer = build(out, hub_final_timeout_s=patience, callbacks=[Met(fault)], **SHORT)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    expected, tensors = untouched
    for name, tensor in tensors.items():
        assert torch.equal(tensor, weights(trainer)[name]), name
    checkpoint = out / "checkpoint-2"
    assert not {path.name for path in expected.iterdir()} - {p.name for p in checkpoint.iterdir()}
    model = (checkpoint / "model.safetensors").read_bytes()
    assert model == (expected / "model.safetensors").read_bytes()
    assert not (out / ".simcse-uploads").exists()
    command = f"simcse-trainer push {out} me/tiny"
    repo = hub.repos.get("me/tiny")
    pushed = repo is not None and "step-2" in repo.tags and "training-state" in repo.branches
    pushed = pushed and "optimizer.pt" in repo.files("training-state")
    reported = command in caplog.text
    if reported:
        assert times == "always", caplog.text
        hub.clear_faults()
        push(out, HubSettings("me/tiny", token=TOKEN, timeout_s=5.0), show_progress=False)
        repo = hub.repos["me/tiny"]
    else:
        assert pushed, caplog.text
    assert repo.files("step-2")["model.safetensors"] == model
    assert [commit.title for commit in repo.commits()].count("step 2") == 1
    states = [commit for commit in repo.commits("training-state") if "optimizer.pt" in commit.files]
    assert len(states) == 1
    record_property(OUTCOME, [stage, kind, times, "reported" if reported else "pushed"])
    if kind == "429" and stage != "lfs_upload":  # several of those are under way at a time
        # The check of the card, before training, does not wait for the one of the repository.
        asked = [request for request in hub.requests if request.stage != "validate"]
        index = next(i for i, request in enumerate(asked) if request.stage == stage)
        assert asked[index + 1].time - asked[index].time >= 1.0, "Retry-After"


@pytest.fixture(scope="module")
def pushed_run(tmp_path_factory):
    """A run's folder, pushed to a Hub of its own for each test that fetches it."""
    out = tmp_path_factory.mktemp("pushed") / "out"
    trainer = build(out, push_to_hub=False, **SHORT)
    trainer.train()
    return out


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lost_answer"])
def test_a_failing_download_is_repeated_or_refused_and_never_believed(
    kind, times, pushed_run, hub: LoopbackHub, tmp_path, record_property
):
    push(pushed_run, HubSettings("me/tiny", token=TOKEN), show_progress=False)
    hub.stall = 2.0
    fault = hub.inject("download", kind, None if times == "always" else 1)
    out = tmp_path / "elsewhere"
    start = time.monotonic()
    options = {"token": TOKEN, "timeout_s": 0.5, "patience_s": 30.0 if times == "once" else 6.0}
    reported = times == "always" and kind != "slow"
    if reported:
        with pytest.raises(InputError, match=r"^resume_from_hub: me/tiny cannot be resumed from: "):
            download_training_state("me/tiny", out, **options)
        assert time.monotonic() - start < 10
        assert not list(out.glob("checkpoint-*"))
        hub.clear_faults()
    options["patience_s"] = 30.0
    checkpoint = download_training_state("me/tiny", out, **options)
    assert fault.hits, "the fault was met"
    for path in (pushed_run / "checkpoint-2").rglob("*.*"):
        # These hold paths and sizes, of which the Hub does not hear.
        if path.name not in ("simcse_manifest.json", "trainer_state.json", "training_args.json"):
            fetched = checkpoint / path.relative_to(pushed_run / "checkpoint-2")
            assert fetched.read_bytes() == path.read_bytes(), path.name
    record_property(OUTCOME, ["download", kind, times, "reported" if reported else "fetched"])
