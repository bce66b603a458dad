"""A Hub that fails, at every stage of an exchange and in every way: training does not notice.

Every cell of the matrix goes through the callback, the uploader and what the child process does, in
this process, for a checkpoint that was trained once. Some go the whole way: a run that trains, and
a child process for every command.
"""

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from helpers.hub_fixture import OUTCOME
from helpers.hub_runs import TOKEN, build, train, weights
from helpers.loopback import LoopbackHub
from helpers.loopback_faults import KINDS, OTHER_STAGES, STAGES, Fault
from helpers.training import build_args
from transformers import TrainerCallback

from simcse_trainer import InputError
from simcse_trainer.hub.client import HubSettings, push_folder
from simcse_trainer.training.callbacks import HubCheckpointCallback
from simcse_trainer.training.resume import download_training_state

TIMES = ("once", "always")
CELLS = [
    *((stage, kind, t) for stage in STAGES if stage != "download" for kind in KINDS for t in TIMES),
    # Three kinds stand for the rest.
    *((stage, kind, "once") for stage in OTHER_STAGES for kind in ("503", "reset", "malformed")),
]
# One for each stage and each way of failing that needs the processes, or the time, of a real run.
END_TO_END = [
    ("whoami", "503", "once"),
    ("create", "403", "always"),
    ("create", "timeout", "always"),
    ("preupload", "429", "once"),
    ("lfs_batch", "refused", "always"),
    ("lfs_upload", "reset", "once"),
    ("lfs_upload", "slow", "always"),
    ("commit", "lost_answer", "once"),
    ("commit", "403", "always"),
    ("tag", "malformed", "always"),
]
# Before the first step a definite no is an error, and nothing has been trained to be lost.
REFUSED_AT_START = {("create", "401"), ("create", "403")}
SHORT = {"max_steps": 2, "hub_timeout_s": 0.5}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Checkpoint and weights of the run without a Hub."""
    out = tmp_path_factory.mktemp("untouched")
    trainer = train(out, push_to_hub=False, **SHORT)
    return out / "checkpoint-2", weights(trainer)


def check_outcome(hub: LoopbackHub, out: Path, times: str, said: str, model: bytes) -> str:
    """All is on the Hub, or the command that brings it there is said and does; nothing twice."""
    assert not (out / ".simcse-uploads").exists()
    repo = hub.repos.get("me/tiny")
    pushed = repo is not None and "step-2" in repo.tags and "training-state" in repo.branches
    pushed = pushed and "optimizer.pt" in repo.files("training-state")
    reported = f"simcse-trainer push {out} me/tiny" in said
    if reported:
        assert times == "always", said
        hub.clear_faults()
        settings = HubSettings("me/tiny", token=TOKEN, timeout_s=5.0)
        push_folder(out, settings, show_progress=False)
        repo = hub.repos["me/tiny"]
    else:
        assert pushed, said
    assert repo.files("step-2")["model.safetensors"] == model
    assert [commit.title for commit in repo.commits()].count("step 2") == 1
    states = [commit for commit in repo.commits("training-state") if "optimizer.pt" in commit.files]
    assert len(states) == 1
    return "reported" if reported else "pushed"


def check_wait(hub: LoopbackHub, stage: str) -> None:
    """After a 429 the next request came no sooner than the Hub had asked for."""
    # The check of the card, before training, does not wait for the one of the repository.
    asked = [request for request in hub.requests if request.stage != "validate"]
    index = next(i for i, request in enumerate(asked) if request.stage == stage)
    assert asked[index + 1].time - asked[index].time >= 1.0, "Retry-After"


def wait_until_met(fault: Fault) -> None:
    """However slow the machine is: patience begins when the fault has been met."""
    deadline = time.monotonic() + 60
    while not fault.hits:
        assert time.monotonic() < deadline, "the fault was not met"
        time.sleep(0.02)


def mark(stage: str, kind: str, times: str):
    """In the quick run two ways of failing stand for the others."""
    quick = times == "once" and kind in ("503", "reset")
    return pytest.param(stage, kind, times, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize(("stage", "kind", "times"), [mark(*cell) for cell in CELLS])
def test_whatever_fails_the_outcome_is_known_and_nothing_is_pushed_twice(
    stage, kind, times, untouched, hub: LoopbackHub, client_here, tmp_path, caplog, record_property
):
    out = tmp_path / "out"
    shutil.copytree(untouched[0], out / "checkpoint-2", copy_function=os.link)
    hub.stall = 2.0
    fault = hub.inject(stage, kind, None if times == "always" else 1)
    patience = 30.0 if times == "once" else 1.0
    trainer = build(out, push_to_hub=False, hub_final_timeout_s=patience, **SHORT)
    trainer.state.global_step = 2
    if times == "always" and (stage, kind) in REFUSED_AT_START:
        with pytest.raises(InputError, match=rf"^push_to_hub: me/tiny .*{kind}"):
            HubCheckpointCallback(trainer.args)
        record_property(OUTCOME, [stage, kind, times, "refused"])
        return
    with caplog.at_level(logging.WARNING):
        callback = HubCheckpointCallback(trainer.args)
        callback.check_card("license: mit")
        callback.on_save(trainer.args, trainer.state, trainer.control)
        wait_until_met(fault)
        if not callback.finish():
            client_here()  # a child process would have ended at once
    model = (untouched[0] / "model.safetensors").read_bytes()
    outcome = check_outcome(hub, out, times, caplog.text, model)
    for path in untouched[0].rglob("*.*"):
        name = path.relative_to(untouched[0])
        assert (out / "checkpoint-2" / name).read_bytes() == path.read_bytes(), name
    record_property(OUTCOME, [stage, kind, times, outcome])
    if kind == "429" and stage != "lfs_upload":  # several of those are under way at a time
        check_wait(hub, stage)


class Met(TrainerCallback):
    def __init__(self, fault: Fault):
        self.fault = fault

    def on_train_end(self, args, state, control, **kwargs):
        wait_until_met(self.fault)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "kind", "times"), END_TO_END)
def test_whatever_fails_training_completes(
    stage, kind, times, untouched, hub: LoopbackHub, tmp_path, caplog
):
    out = tmp_path / "out"
    hub.stall = 2.0
    fault = hub.inject(stage, kind, None if times == "always" else 1)
    patience = 30.0 if times == "once" else 1.0
    if times == "always" and (stage, kind) in REFUSED_AT_START:
        with pytest.raises(InputError, match=rf"^push_to_hub: me/tiny .*{kind}"):
            build(out, **SHORT)
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
    check_outcome(hub, out, times, caplog.text, model)
    if kind == "429":
        check_wait(hub, stage)


@pytest.mark.slow
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lost_answer"])
def test_a_failing_download_is_repeated_or_refused_and_never_believed(
    kind, times, untouched, hub: LoopbackHub, request, tmp_path, record_property
):
    pushed = untouched[0].parent
    if times == "once":  # else it is the end of a child process that ends it in time
        request.getfixturevalue("client_here")
    push_folder(pushed, HubSettings("me/tiny", token=TOKEN), show_progress=False)
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
    for path in (pushed / "checkpoint-2").rglob("*.*"):
        # These hold paths and sizes, of which the Hub does not hear.
        if path.name not in ("simcse_manifest.json", "trainer_state.json", "training_args.json"):
            fetched = checkpoint / path.relative_to(pushed / "checkpoint-2")
            assert fetched.read_bytes() == path.read_bytes(), path.name
    record_property(OUTCOME, ["download", kind, times, "reported" if reported else "fetched"])


@pytest.mark.slow
def test_a_slow_hub_costs_less_than_ten_seconds_and_a_late_no_is_said(
    hub: LoopbackHub, tmp_path, caplog
):
    hub.delay = 4.0
    args = build_args(
        tmp_path / "out", push_to_hub=True, hub_model_id="other/tiny", hub_token=TOKEN
    )
    start = time.monotonic()
    callback = HubCheckpointCallback(args)
    callback.check_card("license: mit")
    assert time.monotonic() - start < 10
    assert caplog.text.count("Training starts, and every save is tried anew") == 2
    hub.delay = 0.0  # the answers are late by now
    while (
        time.monotonic() - start < 30 and "is not pushed until that is corrected" not in caplog.text
    ):
        time.sleep(0.1)
    assert "other/tiny cannot be pushed to: 403" in caplog.text
    callback.uploader.end()


@pytest.mark.slow
def test_a_definite_no_of_a_slow_hub_is_still_an_error(hub: LoopbackHub, tmp_path):
    hub.delay = 1.5
    start = time.monotonic()
    with pytest.raises(InputError, match="rights"):
        build(tmp_path / "out", hub_model_id="other/tiny", hub_timeout_s=60.0)
    assert time.monotonic() - start < 10


def test_the_hub_offline_by_setting_is_said_at_once(hub: LoopbackHub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        build(tmp_path / "out")
