"""What is shown while it works, and what Ctrl-C does."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.checks import fails
from helpers.runs import LINES
from helpers.terminal import BAR, environment
from helpers.training import UNSUPERVISED, build_args, build_model
from transformers import TrainerCallback

from simcse_trainer import SimCSETrainer
from simcse_trainer.cli.train import main
from simcse_trainer.training.callbacks import PreemptionCallback
from simcse_trainer.training.run import evaluate_model

terminal = pytest.importorskip("helpers.terminal", reason="no pseudo-terminals on this system")
CTRL_C = b"\x03"


def write_config(folder, options) -> None:
    (folder / "run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")


@pytest.mark.slow
def test_in_a_terminal_every_step_is_shown_and_ctrl_c_saves(run, tmp_path):
    write_config(tmp_path, run | {"max_steps": 5000, "disable_tqdm": False})
    seen = terminal.Terminal(["train", "run.yaml"], tmp_path)
    seen.read_until(r"[2-9]\d/5000 \[")
    seen.press(CTRL_C)
    seen.read_until("")
    assert seen.status == 130, seen.shown[-2000:]
    assert (
        "Ctrl-C: the step is finished and a checkpoint saved. Again: leave at once." in seen.shown
    )
    stopped = re.search(r"Stopped at step (\d+)\. Go on with --resume_from_checkpoint", seen.shown)
    assert (tmp_path / f"out/checkpoint-{stopped[1]}").is_dir()
    steps = ("Loading libraries ...", "Reading the data ...", "Loading base ...")
    places = [seen.shown.index(step) for step in (*steps, "Evaluating before training: ")]
    assert places == sorted(places)
    assert seen.unlabelled(2.0) == []
    write_config(tmp_path, run | {"max_steps": int(stopped[1]) + 2})
    again = terminal.Terminal(["train", "run.yaml", "--resume_from_checkpoint", "true"], tmp_path)
    again.read_until("")
    assert again.status == 0
    assert "The model after" in again.shown
    assert again.unlabelled(2.0) == []


@pytest.mark.slow
def test_ctrl_c_before_training_leaves_in_one_line(run, tmp_path):
    write_config(tmp_path, run)
    seen = terminal.Terminal(["train", "run.yaml"], tmp_path)
    seen.read_until(r"Loading libraries \.\.\.")
    seen.press(CTRL_C)
    seen.read_until("")
    assert seen.status == 130
    assert seen.shown.strip().endswith("Stopped by Ctrl-C.")
    assert "Traceback" not in seen.shown


COMMANDS = {
    ("encode", "base", "train.txt", "--output", "x.npy"): ["Encoding: 100%"],
    ("search", "base", "--corpus", "train.txt", LINES[3]): ["Indexing: 100%"],
    ("evaluate", "base", "--tasks", "pairs.csv"): ["Encoding: 100%"],
    ("report", "base", "--tasks", "pairs.csv"): [
        "Encoding: 100%",
        "Reading hidden states: 100%",
        "Measuring layers: 100%",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_commands_show_bars_in_a_terminal(run, tmp_path, words):
    seen = terminal.Terminal(words, tmp_path)
    seen.read_until("")
    assert seen.status == 0, seen.shown
    assert "Loading libraries ..." in seen.shown
    assert "Loading base ..." in seen.shown
    for bar in COMMANDS[words]:
        assert bar in seen.shown
    assert seen.unlabelled(2.0) == []


ONE_AFTER_ANOTHER = """
import json, sys
from simcse_trainer.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    try:
        status = main()
    except SystemExit as ended:
        status = ended.code
    assert not status, words
"""


@pytest.mark.slow
def test_commands_show_no_bar_in_a_pipe(run, tmp_path):
    write_config(tmp_path, run | {"disable_tqdm": False})
    words = json.dumps([*COMMANDS, ("train", "run.yaml")])
    piped = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_ANOTHER, words],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert piped.returncode == 0, piped.stderr
    kinds = ("Better:", "Worse:", "Neither", "Not enough data", "Collapsed:", "Nothing was")
    assert any(f"\n{kind}" in piped.stdout for kind in kinds)
    assert not BAR.search(piped.stderr + piped.stdout)
    assert "\r" not in piped.stderr
    assert "..." not in piped.stderr


class Press(TrainerCallback):
    """Ctrl-C in the second step, so many times."""

    def __init__(self, times: int, pause_s: float):
        self.times = times
        self.pause_s = pause_s

    def on_step_begin(self, args, state, control, **kwargs):
        for _ in range(self.times if state.global_step == 1 else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(self.pause_s)


@pytest.mark.parametrize(("times", "pause_s"), [(1, 0), (2, 0)], ids=["once", "by a launcher too"])
def test_the_first_ctrl_c_saves_a_checkpoint(tmp_path, capfd, times, pause_s):
    trainer = SimCSETrainer(
        build_model(), build_args(tmp_path), UNSUPERVISED, callbacks=[Press(times, pause_s)]
    )
    before = signal.getsignal(signal.SIGINT)
    trainer.train()
    assert trainer.interrupted
    assert trainer.preemption.signal == signal.SIGINT
    assert (tmp_path / "checkpoint-2").is_dir()
    assert capfd.readouterr().err.count("Again: leave at once") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_leaves(tmp_path):
    trainer = SimCSETrainer(
        build_model(), build_args(tmp_path), UNSUPERVISED, callbacks=[Press(2, 0.6)]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()


def test_a_background_job_that_ignores_ctrl_c_still_does():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionCallback(processes=None).listening():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("name", "said"), [("wandb", "not installed. Run: pip install wandb")])
def test_a_logger_that_is_missing_is_said_before_the_data_is_read(
    run, capsys, monkeypatch, name, said
):
    monkeypatch.setattr("simcse_trainer.training.validation.find_spec", lambda package: None)
    write = run | {"report_to": name, "train_file": "none.csv"}
    with open("run.yaml", "w", encoding="utf-8") as file:
        yaml.safe_dump(write, file)
    assert main(["run.yaml"]) == 2
    assert said in capsys.readouterr().err
    options = {"report_to": [name]}
    fails(lambda: SimCSETrainer(build_model(), build_args("out", **options), UNSUPERVISED), said)
    fails(
        lambda: SimCSETrainer(build_model(), build_args("out", report_to=["wandbe"]), UNSUPERVISED),
        "report_to is 'wandbe'; expected none, all, or some of",
    )


def test_evaluation_sentences_are_encoded_once():
    asked = []
    model = build_model()

    def encode(sentences):
        asked.append(list(sentences))
        return model.encode(sentences)

    tasks = {"pairs": {"sentence1": LINES[:8], "sentence2": LINES[3:11], "score": [*range(8)]}}
    found = evaluate_model(encode, tasks, ["a man sleeps", LINES[0]])
    assert len(asked) == 1
    assert sorted(asked[0]) == sorted({*LINES[:11], "a man sleeps"})
    assert found.metrics["alignment"] >= 0
    alone = evaluate_model(model.encode, tasks, [])
    assert found.metrics == pytest.approx(alone.metrics, abs=1e-3)
    assert LINES[0] not in [sentence for _, sentence in found.neighbors[LINES[0]]]
