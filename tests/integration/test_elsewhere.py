"""Windows, other consoles, schedules that need a score, a Hub that says no: it works, or a line."""

import ast
import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers import ROOT
from helpers.checks import attempt, run_command
from helpers.folders import TEXTS, make
from helpers.hub_runs import READ_TOKEN, TOKEN
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments

field = pytest.mark.field
PACKAGE = ROOT / "src/simcse_trainer"
PAIRS = {
    "sentence1": ["a dog", "a man", "big"],
    "sentence2": ["cat", "food", "red"],
    "score": [1.0, 2.0, 3.0],
}


def trainer(folder, **options):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean")
    args = SimCSETrainingArguments(
        output_dir=str(folder), max_steps=3, report_to=[], use_cpu=True, eval_strategy="steps",
        eval_steps=1, per_device_train_batch_size=4, **({"save_strategy": "no"} | options),
    )  # fmt: skip
    data = Dataset.from_dict({"sent0": TEXTS})
    return SimCSETrainer(model, args, data, Dataset.from_dict(PAIRS))


@field("31b")
@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
        {"lr_scheduler_type": "greedy"},
        {"save_strategy": "best"},
    ],
)
def test_what_follows_a_score_follows_ours(tmp_path, options):
    made, error = attempt(lambda: trainer(tmp_path, **options))
    assert error is None, repr(error)
    _, error = attempt(made.train)
    assert error is None, repr(error)
    assert made.args.metric_for_best_model == "avg_sts"
    if "lr_scheduler_type" in options:
        # A correlation that rises is no reason to learn more slowly.
        assert made.lr_scheduler.mode == "max"
    else:
        assert list(Path(tmp_path).glob("checkpoint-*"))


@field("31b")
@pytest.mark.parametrize(
    "options", [{"lr_scheduler_type": "reduce_lr_on_plateau"}, {"save_strategy": "best"}]
)
def test_a_metric_that_is_not_there_is_refused_before_the_first_step(tmp_path, options):
    from simcse_trainer import InputError

    def start():
        trainer(tmp_path, metric_for_best_model="loss", **options).train()

    _, error = attempt(start)
    assert isinstance(error, InputError), repr(error)
    assert "avg_sts" in str(error)


@field("31d")
def test_a_refusal_of_the_hub_is_an_answer_at_once(hub, tmp_path, capsys, monkeypatch):
    """And what the line says to do is there for this command."""
    _, folder = make(tmp_path, "bert, mean")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    assert attempt(lambda: run_command("push", folder, "me/tiny", "--timeout_s", 20)) == (2, None)
    assert hub.count("create") <= 1
    monkeypatch.delenv("HF_TOKEN")
    assert attempt(lambda: run_command("push", folder, "me/tiny", "--timeout_s", 20)) == (2, None)
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    before = len(hub.requests)
    assert attempt(lambda: run_command("push", folder, "me/tiny", "--timeout_s", 20)) == (2, None)
    assert len(hub.requests) - before <= 2
    said = capsys.readouterr().err
    assert "--hub_token" not in said
    assert "Next try" not in said
    for line in said.strip().splitlines():
        assert line.count("(") == line.count(")"), line
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert attempt(lambda: run_command("push", folder, "me/tiny", "--timeout_s", 20)) == (0, None)


@field("31d")
def test_a_hint_is_whole_however_long_the_answer_was():
    from simcse_trainer.hub.errors import explain

    class Response:
        status_code = 401
        headers: dict = {}  # noqa: RUF012

    error = OSError("Invalid credentials " * 40)
    error.response = Response()
    text = explain(error).text
    assert text.endswith("gives one)")
    assert "--hub_token" not in text


@pytest.fixture
def windows(monkeypatch):
    """`os.open` and `os.fsync` as they are on Windows: no folders, and a flush needs writing."""
    opened, real_open, real_sync = {}, os.open, os.fsync

    def open_(path, flags, *args, **kwargs):
        ours = sys._getframe(1).f_globals["__name__"].startswith("simcse_trainer")
        if ours and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        descriptor = real_open(path, flags, *args, **kwargs)
        opened[descriptor] = flags
        return descriptor

    def fsync(descriptor):
        writable = opened.get(descriptor, os.O_RDWR) & (os.O_RDWR | os.O_WRONLY)
        if not writable:
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real_sync(descriptor)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "fsync", fsync)


@field("32a")
def test_windows_can_save(windows, tmp_path):
    made = trainer(tmp_path / "run", save_strategy="steps", save_steps=1)
    _, error = attempt(made.train)
    assert error is None, repr(error)
    _, error = attempt(lambda: made.save_model())
    assert error is None, repr(error)
    _, error = attempt(lambda: made.model.save_pretrained(tmp_path / "model"))
    assert error is None, repr(error)
    found = SimCSEModel.from_pretrained(tmp_path / "model").encode(TEXTS)
    torch.testing.assert_close(found, made.model.encode(TEXTS))


@field("32b")
def test_nothing_in_the_repository_is_a_link():
    source = Path(os.environ.get("PYTHONPATH", "").split(os.pathsep)[0] or ROOT / "src")
    links = [path for path in source.parent.glob("src/**/*") if path.is_symlink()]
    assert links == []
    assert len((ROOT / "model_card_template.md").read_text(encoding="utf-8")) > 100


def get_calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            yield name, node


@field("32c")
def test_every_text_file_is_opened_as_utf_8():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, call in get_calls(path):
            given = {keyword.arg for keyword in call.keywords}
            words = [a.value for a in call.args if isinstance(a, ast.Constant)]
            binary = any(isinstance(word, str) and "b" in word for word in words[:2])
            modes = [k.value.value for k in call.keywords if k.arg == "mode"]
            plain_open = name == "open" and isinstance(call.func, ast.Name)
            if plain_open and not binary and "encoding" not in given and "rb" not in modes:
                found.append(f"{path.name}:{call.lineno}")
            needs = {"read_text": 0, "write_text": 1}
            if name in needs and "encoding" not in given and len(call.args) <= needs[name]:
                found.append(f"{path.name}:{call.lineno}")
    assert [one for one in found if not one.startswith("readers.py")] == []


@field("32d")
@pytest.mark.parametrize("words", [["--json"], []])
@pytest.mark.slow
def test_what_is_printed_survives_another_console(tmp_path, words):
    """A sentence that cp949, the console of a Korean Windows, cannot show."""
    name = save_tiny(tmp_path / "model")
    texts = ["the dog — café 😀", "개가 잔다"]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    code = "from simcse_trainer.cli import main; main()"
    command = [sys.executable, "-c", code, "search", name, "--corpus", str(tmp_path / "texts.txt")]
    command += ["the dog 😀", "--threshold", "-1", *words]
    console = os.environ | {"PYTHONIOENCODING": "cp949"}
    done = subprocess.run(command, capture_output=True, check=False, timeout=120, env=console)
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-500:]
    out = done.stdout.decode("cp949")
    if words:
        found = json.loads(out.splitlines()[0])
        assert {one["sentence"] for one in found["results"]} == set(texts)
    else:
        assert "개가 잔다" in out
        assert "dog" in out


def test_a_line_is_in_the_file_once_it_is_printed(monkeypatch):
    from simcse_trainer.cli.train import write_to_any_console

    file = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(file, encoding="utf-8"))
    write_to_any_console()
    print("{'loss': 0.5}")
    assert file.getvalue().split() == [b"{'loss':", b"0.5}"]


def test_a_stream_that_cannot_be_changed_is_left(monkeypatch):
    from simcse_trainer.cli.train import write_to_any_console

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    write_to_any_console()
