"""What the Trainer's own push loses without a word, a Hub that is down, and the token."""

import logging
import os
import re
import subprocess
import sys
import time

import pytest
from helpers import ROOT
from helpers.hub_runs import READ_TOKEN, TOKEN, build, train
from helpers.loopback import LoopbackHub
from helpers.training import PAIRS, UNSUPERVISED
from transformers import TrainerCallback

from simcse_trainer import InputError

COMMAND = "from simcse_trainer.cli import main; main()"


def push_command(*words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", COMMAND, "push", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


class Pause(TrainerCallback):
    """Between steps, so that uploads and training overlap as they do in long runs."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


@pytest.mark.slow
def test_a_failed_push_is_said_with_the_command_that_finishes_it(
    hub: LoopbackHub, tmp_path, caplog
):
    hub.inject("commit", "403", None)
    train(tmp_path / "out")
    assert re.search(
        r"not all of it is on the Hub: .*403.*simcse-trainer push .* me/tiny", caplog.text
    )


@pytest.mark.slow
def test_a_save_during_an_upload_is_pushed_afterwards(hub: LoopbackHub, tmp_path):
    hub.delay = 0.1
    train(tmp_path / "out", hub_always_push=False, max_steps=8)
    titles = [commit.title for commit in hub.repos["me/tiny"].commits()]
    assert titles[0] == "step 8"
    assert len(titles) < 5, "saves that waited were replaced, or there was nothing to test"


@pytest.mark.slow
def test_the_last_save_is_pushed(hub: LoopbackHub, tmp_path):
    out = tmp_path / "out"
    train(out, save_steps=5, max_steps=7)
    repo = hub.repos["me/tiny"]
    local = (out / "checkpoint-7/model.safetensors").read_bytes()
    assert repo.files()["model.safetensors"] == local


@pytest.mark.slow
def test_rotation_does_not_take_away_what_is_being_pushed(hub: LoopbackHub, tmp_path):
    hub.delay = 0.1
    out = tmp_path / "out"
    trainer = train(out, save_total_limit=1, max_steps=8)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-8"]
    repo = hub.repos["me/tiny"]
    assert sorted(repo.tags) == ["step-2", "step-4", "step-6", "step-8"]
    weights = {repo.files(tag)["model.safetensors"] for tag in repo.tags}
    assert len(weights) == 4, "each tag has the weights of its own step"
    assert trainer.hub.uploader.failure is None


@pytest.mark.slow
def test_what_the_hub_asks_to_wait_holds_for_newer_saves_too(hub: LoopbackHub, tmp_path):
    hub.inject("commit", "429")  # Retry-After: 1
    train(tmp_path / "out", hub_always_push=False, max_steps=12, callbacks=[Pause(0.1)])
    commits = [request.time for request in hub.requests if request.stage == "commit"]
    assert commits[1] - commits[0] >= 1.0
    titles = [commit.title for commit in hub.repos["me/tiny"].commits()]
    assert titles[0] == "step 12"
    assert "step 2" not in titles, "a newer save took its place meanwhile"


@pytest.mark.slow
def test_the_end_waits_as_long_as_it_may_and_shows_it(hub: LoopbackHub, tmp_path, capfd, caplog):
    hub.stall = 30.0
    hub.inject("commit", "timeout", None)
    ended = []
    trainer = build(tmp_path / "out", disable_tqdm=False, hub_timeout_s=60, hub_final_timeout_s=3)
    trainer.hub.finish = lambda finish=trainer.hub.finish: ended.append(
        (time.monotonic(), finish(), time.monotonic())
    )
    trainer.train()
    start, on_hub, end = ended[0]
    assert not on_hub
    assert 2.9 < end - start < 6
    assert "Pushing to me/tiny" in capfd.readouterr().err
    assert "not finished in 3 s. Finish with: simcse-trainer push" in caplog.text


@pytest.mark.slow
def test_a_figure_that_cannot_be_drawn_keeps_no_model_from_the_hub(
    hub: LoopbackHub, tmp_path, monkeypatch
):
    (tmp_path / "broken/matplotlib").mkdir(parents=True)
    (tmp_path / "broken/matplotlib/__init__.py").write_text("raise RuntimeError('no fonts')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    train(tmp_path / "out", eval_strategy="steps", eval_steps=2, eval_dataset={"stsb": PAIRS})
    files = hub.repos["me/tiny"].files("step-6")
    assert "model.safetensors" in files
    assert "training_curve.png" not in files


@pytest.mark.slow
def test_a_hub_that_was_down_all_the_time_is_brought_up_to_date_by_one_command(
    hub: LoopbackHub, tmp_path, caplog
):
    out = tmp_path / "out"
    hub.down()
    trainer = train(out, hub_final_timeout_s=0.5)
    assert f"simcse-trainer push {out} me/tiny" in caplog.text
    trainer.hub = None  # or it would push what is saved now
    trainer.save_model()
    hub.up()
    for commits in ("2 commits", "nothing to do"):
        done = push_command(str(out), "me/tiny", "--token", TOKEN)
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{out} is on the Hub: me/tiny ({commits}).\n"
        repo = hub.repos["me/tiny"]
        assert [commit.title for commit in repo.commits()] == ["step 6", "initial commit"]
        assert list(repo.tags) == ["step-6"]
    local = (out / "model.safetensors").read_bytes()
    assert repo.files()["model.safetensors"] == local
    assert "optimizer.pt" in repo.files("training-state")


@pytest.mark.slow
def test_the_trainer_can_push_once_the_hub_is_back(hub: LoopbackHub, tmp_path, caplog):
    hub.down()
    trainer = train(tmp_path / "out", hub_final_timeout_s=0.5)
    assert "simcse-trainer push" in caplog.text
    hub.up()
    trainer.args.hub_final_timeout_s = 60.0
    assert trainer.push_to_hub() == "me/tiny"
    assert hub.repos["me/tiny"].commits()[0].title == "step 6"


def test_any_trained_folder_can_be_pushed(hub: LoopbackHub, tmp_path):
    folder = tmp_path / "some-model"
    build(tmp_path / "out", push_to_hub=False).model.save_pretrained(folder)
    (folder / "README.md").write_text("# Mine\n", encoding="utf-8")
    done = push_command(str(folder), "our-lab/some-model", "--private", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    repo = hub.repos["our-lab/some-model"]
    assert repo.private
    assert set(repo.files()) - {".gitattributes"} == {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    }
    assert not repo.tags


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{tmp}/nowhere", "me/tiny"], "There is no folder"),
        (["{tmp}", "me/tiny"], "holds no model"),
        (["{model}", "me/tiny", "--token", READ_TOKEN], "rights"),
        (["{model}", "me/ti ny", "--token", TOKEN], "me/ti ny"),
        (["{model}", "me/tiny", "--token", "hf_unknown"], "401|Invalid credentials"),
        (["{model}"], "Missing argument 'REPO'"),
        (["{model}", "me/tiny", "--timeout-s", "soon"], "timeout-s"),
    ],
)
def test_what_the_command_refuses_is_one_line(words, expected, hub: LoopbackHub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}", encoding="utf-8")
    places = {"tmp": tmp_path, "model": tmp_path / "model"}
    done = push_command(*(word.format(**places) for word in words))
    assert done.returncode == 2
    assert re.search(expected, done.stderr)
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_folder_that_holds_the_token_is_not_pushed(by, hub: LoopbackHub, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    build(tmp_path / "out", push_to_hub=False).model.save_pretrained(folder)
    (folder / "notes.txt").write_text(f"export HF_TOKEN={TOKEN}\n", encoding="utf-8")
    if by == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    words = ["--token", TOKEN] if by == "option" else []
    done = push_command(str(folder), "me/tiny", "--include", "notes.*", *words)
    assert done.returncode == 2
    assert "notes.txt contains the Hub token" in done.stderr
    assert hub.count("commit") == 0


@pytest.mark.parametrize("by", ["option", "environment"])
@pytest.mark.slow
def test_the_token_appears_nowhere(by, hub: LoopbackHub, tmp_path, capfd, caplog, monkeypatch):
    """Not in logs at debug level, files, the card, the repository or an exception."""
    logging.getLogger("simcse_trainer").setLevel(logging.DEBUG)
    if by == "environment":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    data = UNSUPERVISED.map(
        lambda row, i: {"sent0": TOKEN if i == 1 else row["sent0"]}, with_indices=True
    )
    try:
        with caplog.at_level(logging.DEBUG):
            trainer = train(
                tmp_path / "out",
                train_dataset=data,  # of which the card shows the first rows
                log_level="debug",
                eval_dataset={"stsb": PAIRS},
                hub_token=TOKEN if by == "option" else None,
            )
            trainer.save_model()
            trainer.hub.finish()
            hub.inject("commit", "500", None)
            trainer.args.hub_final_timeout_s = 0.5
            trainer.create_model_card(language="en")
            (tmp_path / "out/extra.txt").write_text("new", encoding="utf-8")
            with pytest.raises(InputError) as error:
                trainer.push_to_hub()
            hub.clear_faults()
    finally:
        logging.getLogger("simcse_trainer").setLevel(logging.NOTSET)
    said = capfd.readouterr()
    spoken = [said.out, said.err, caplog.text, repr(error.value), repr(trainer.args)]
    spoken += [repr(trainer.hub.uploader._client.settings)]
    assert "HTTP Request" in said.err + caplog.text or "DEBUG" in said.err, "debugging was on"
    assert not [text for text in spoken if TOKEN in text]
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) > 20
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    repo = hub.repos["me/tiny"]
    for sha in repo.by_sha:
        assert not [path for path, data in repo.files(sha).items() if TOKEN.encode() in data]
