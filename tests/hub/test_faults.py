"""A Hub that fails, at every stage of an exchange and in every way: training does not notice."""

import logging
import time

import pytest
import torch
from hub_runs import TOKEN, build, train, weights
from loopback import LoopbackHub
from loopback_faults import KINDS

from simcse_trainer import InputError
from simcse_trainer.hub.process import HubSettings
from simcse_trainer.hub.pushing import push
from simcse_trainer.hub.resume import download_training_state

STAGES = ("create", "preupload", "lfs_batch", "lfs_upload", "commit", "tag")
# Before the first step a definite no is an error, and nothing has been trained to be lost.
REFUSED_AT_START = {("create", "401"), ("create", "403")}
MATRIX: dict[tuple[str, str], str] = {}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The weights of the run without a Hub."""
    return weights(train(tmp_path_factory.mktemp("untouched"), push_to_hub=False, **SHORT))


@pytest.fixture(scope="module", autouse=True)
def _print_matrix():
    yield
    stages = (*STAGES, "download")
    print("\n" + " ".join([f"{'fault, once / always':<22}", *(f"{s:<18}" for s in stages)]))
    for kind in KINDS:
        cells = [
            " / ".join(MATRIX.get((stage, f"{kind} {times}"), "-") for times in ("once", "always"))
            for stage in stages
        ]
        print(" ".join([f"{kind:<22}", *(f"{cell:<18}" for cell in cells)]))


SHORT = {"max_steps": 2, "hub_timeout_s": 0.5}


@pytest.mark.parametrize("times", ["once", "always"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", STAGES)
def test_whatever_fails_training_completes_and_the_outcome_is_known(
    stage, kind, times, untouched, hub: LoopbackHub, tmp_path, caplog
):
    out = tmp_path / "out"
    hub.stall = 2.0
    hub.inject(stage, kind, None if times == "always" else 1)
    patience = 20.0 if times == "once" else 1.0
    if times == "always" and (stage, kind) in REFUSED_AT_START:
        MATRIX[stage, f"{kind} {times}"] = "refused"
        with pytest.raises(InputError, match=rf"^push_to_hub: me/tiny .*{kind}"):
            build(out, **SHORT)
        return
    trainer = build(out, hub_final_timeout_s=patience, **SHORT)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    for name, tensor in untouched.items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name
    assert (out / "checkpoint-2/model.safetensors").is_file()
    assert not (out / ".hub-uploads").exists()
    command = f"simcse-trainer push {out} me/tiny"
    repo = hub.repos.get("me/tiny")
    pushed = repo is not None and "step-2" in repo.tags and "training-state" in repo.branches
    pushed = pushed and "optimizer.pt" in repo.files("training-state")
    MATRIX[stage, f"{kind} {times}"] = "pushed" if command not in caplog.text else "reported"
    if command in caplog.text:
        assert times == "always", caplog.text
        hub.clear_faults()
        push(out, HubSettings("me/tiny", token=TOKEN, timeout_s=5.0), show_progress=False)
        repo = hub.repos["me/tiny"]
    else:
        assert pushed, caplog.text
    local = (out / "checkpoint-2/model.safetensors").read_bytes()
    assert repo.files("step-2")["model.safetensors"] == local
    assert [commit.title for commit in repo.commits()].count("step 2") == 1


@pytest.fixture(scope="module")
def pushed_run(tmp_path_factory):
    """A run's folder, pushed to a Hub of its own for each test that fetches it."""
    out = tmp_path_factory.mktemp("pushed") / "out"
    trainer = build(out, push_to_hub=False, **SHORT)
    trainer.train()
    return out


@pytest.mark.parametrize("times", ["once", "always"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "lost_answer"])
def test_a_failing_download_is_repeated_or_refused_and_never_believed(
    kind, times, pushed_run, hub: LoopbackHub, tmp_path
):
    push(pushed_run, HubSettings("me/tiny", token=TOKEN), show_progress=False)
    hub.stall = 2.0
    hub.inject("download", kind, None if times == "always" else 1)
    out = tmp_path / "elsewhere"
    start = time.monotonic()
    options = {"token": TOKEN, "timeout_s": 0.5, "patience_s": 20.0 if times == "once" else 2.0}
    if times == "always" and kind != "slow":
        MATRIX["download", f"{kind} {times}"] = "reported"
        with pytest.raises(InputError, match=r"^resume_from_hub: me/tiny cannot be resumed from: "):
            download_training_state("me/tiny", out, **options)
        assert time.monotonic() - start < 6
        assert not list(out.glob("checkpoint-*"))
        hub.clear_faults()
    MATRIX.setdefault(("download", f"{kind} {times}"), "fetched")
    options["patience_s"] = 20.0
    checkpoint = download_training_state("me/tiny", out, **options)
    for path in (pushed_run / "checkpoint-2").rglob("*.*"):
        if path.name not in ("checkpoint_files.json", "trainer_state.json"):
            fetched = checkpoint / path.relative_to(pushed_run / "checkpoint-2")
            assert fetched.read_bytes() == path.read_bytes(), path.name
