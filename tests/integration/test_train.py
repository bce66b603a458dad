"""The command line from a config file to a folder that every loader reads."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT
from helpers.retrieval import random_texts
from helpers.runs import LINES, train
from huggingface_hub import ModelCard

from simcse_trainer import SimCSEModel


def test_a_run_ends_with_scores_neighbours_and_a_folder(run, capsys, tmp_path):
    assert train(run | {"neighbor_queries": ["a man sleeps"]}) == 0
    out = capsys.readouterr().out
    table = next(line for line in out.splitlines() if line.startswith("pairs"))
    assert len(table.split()) == 4
    assert "a man sleeps" in out
    assert "before    after   change\n" in out
    assert "\n    before  " in out
    assert "The model after 4 steps is in out" in out
    for loader in ("SimCSEModel", "SentenceTransformer", "AutoModel"):
        assert f"{loader}.from_pretrained('out')" in out or f"{loader}('out')" in out
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["eval_pairs_spearman"] == pytest.approx(float(table.split()[2]), abs=0.01)
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "35 rows of sent0, sent1, hard_neg from triplets.csv, 4 steps." in card
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    curve = {e["step"]: e["eval_pairs_spearman"] for e in log if "eval_avg_sts" in e}
    assert list(curve) == [0, 4]
    assert curve[4] == results["eval_pairs_spearman"]
    assert SimCSEModel.from_pretrained("out").encode(["a man"]).shape == (1, 32)


def test_a_run_on_ones_own_pairs_chooses_by_retrieval(run, capsys, tmp_path):
    texts = random_texts(60, 2)
    rows = [f"{a},{b}" for a, b in zip(texts[:40], texts[20:], strict=False)]
    for name, part in (("faq.csv", rows[:20]), ("held out.csv", rows[20:])):
        (tmp_path / name).write_text("\n".join(["frage,antwort", *part]))
    (tmp_path / "more.txt").write_text("\n".join(LINES))
    options = {"train_file": "faq.csv", "columns": ["frage", "antwort"], "eval_corpus": "more.txt"}
    options |= {"eval_tasks": "held out.csv", "eval_strategy": "steps", "eval_steps": 2}
    options |= {"save_strategy": "best", "metric_for_best_model": "recall_at_10"}
    assert train(run | options | {"neighbor_queries": ["a man sleeps"]}) == 0
    out = capsys.readouterr().out
    table = next(line for line in out.splitlines() if line.startswith("held out nDCG@10"))
    assert "Retrieval x 100" in out
    assert "Spearman" not in out
    assert any(word in out for word in ("Better: ", "Worse: ", "Neither better"))
    assert "a man sleeps" in out
    results = json.loads((tmp_path / "out/all_results.json").read_text())
    assert results["eval_held out_ndcg_at_10"] == pytest.approx(float(table.split()[4]), abs=0.01)
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    scores = {
        e["step"]: e["eval_recall_at_10"] for e in state["log_history"] if "eval_recall_at_10" in e
    }
    assert list(scores) == [0, 2, 4]
    assert state["best_metric"] == max(scores[2], scores[4])
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert "| Task | Before | After |" in card
    (shown,) = [line for line in card.splitlines() if line.startswith("| held out nDCG@10 |")]
    assert shown.split(" | ")[2].rstrip(" |") == table.split()[4]
    (result,) = [r for r in ModelCard(card).data.eval_results if r.metric_type == "cosine_ndcg@10"]
    assert result.task_type == "information-retrieval"
    assert result.metric_value == pytest.approx(float(table.split()[4]))
    assert "was not compared with human judgements" in card


def test_a_corpus_without_pairs_is_refused(run, capsys):
    assert train(run | {"eval_corpus": "train.txt"}) == 2
    assert "--eval_corpus adds passages" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "options",
    [
        {"train_file": "train.txt", "pooling_mode": "cls", "projection_head": "mlp"},
        {"train_file": "train.txt", "streaming": True},
        {"padding_free": False},
        {"eval_tasks": []},
    ],
    ids=["unsupervised", "streaming", "padded", "no evaluation"],
)
def test_kinds_of_runs(run, options, tmp_path):
    assert train(run | options) == 0
    assert (tmp_path / "out/model.safetensors").is_file()


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_the_end_names_servers_that_refuse_the_folder(run, mode, capsys):
    assert train(run | {"pooling_mode": mode, "eval_tasks": [], "max_steps": 1}) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning: ")]
    assert len(warnings) == (mode == "max")
    assert all("is refused by text-embeddings-inference and vLLM" in x for x in warnings)


def test_a_finished_run_is_resumed_or_refused_never_overwritten(run, capsys):
    saving = {"save_strategy": "steps", "save_steps": 2}
    assert train(run | saving) == 0
    assert train(run | saving) == 2
    assert "out holds checkpoint-4 of an earlier run" in capsys.readouterr().err
    assert train(run | saving, "--resume_from_checkpoint", "true", "--max_steps", "6") == 0
    assert "after 6 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "none.csv"}, "none.csv"),
        ({"train_file": []}, "--train_file"),
        ({"eval_tasks": "none.csv"}, "none.csv"),
        ({"model_name_or_path": "nowhere"}, "nowhere"),
        ({"output_dir": "train.txt"}, "train.txt is a file"),
        ({"resume_from_checkpoint": "gone"}, "no folder gone"),
        ({"eval_strategy": "steps", "eval_tasks": []}, "nothing to evaluate on"),
        ({"streaming": True, "max_steps": -1}, "--max_steps"),
        ({"mlm_weight": 0.1, "model_name_or_path": "nowhere"}, "nowhere"),
        ({"temprature": 1}, "Did you mean 'temperature'?"),
    ],
)
def test_what_a_user_can_put_right_is_one_line_and_status_2(run, options, message, capsys):
    assert train(run | options) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ")
    assert message in err


@pytest.mark.slow
def test_the_script_prints_no_traceback(tmp_path):
    found = subprocess.run(
        [sys.executable, ROOT / "train_simcse.py", "no_such.yaml"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert found.returncode == 2
    assert len(found.stderr.splitlines()) == 1
    assert "no_such.yaml does not exist" in found.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_on_start": True, "eval_tasks": []}, "nothing to evaluate on"),
        ({"learning_rate": -1}, "learning_rate is -1.0; expected 0 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected 1"),
        ({"report_to": "wandb"}, "wandb"),
        ({"neighbor_queries": "a man", "eval_tasks": []}, "pass --eval_tasks"),
        ({"eval_tasks": ["pairs.csv", "../pairs.csv"]}, "Two evaluation tasks are called 'pairs'"),
        ({"max_seq_length": 41}, "max_seq_length is 41; this backbone takes 2 to 40"),
    ],
)
def test_options_that_do_not_go_together(run, options, message, capsys):
    assert train(run | options) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_worker_that_meets_a_bad_row_says_only_that(run, tmp_path, capsys):
    rows = [f"man {i},a dog" for i in range(1500)] + ["broken,"]
    (tmp_path / "bad.csv").write_text("sent0,sent1\n" + "\n".join(rows))
    options = {"streaming": True, "train_file": "bad.csv", "dataloader_num_workers": 1}
    options |= {"max_steps": 300, "shuffle_buffer_size": 0}
    assert train(run | options) == 2
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: bad.csv row 1502: column 'sent1' is empty")


def test_streamed_rows_are_shuffled_and_yaml_no_is_no(run, tmp_path):
    (tmp_path / "run.yaml").write_text("save_strategy: no\n")
    from simcse_trainer.cli.config import parse_arguments

    _, data, args = parse_arguments(["run.yaml", "--use_cpu", "--streaming", "true"])
    assert args.save_strategy == "no"
    from simcse_trainer.training.run import _load_train_dataset

    data.train_file = ["train.txt"]
    first = [row["sent0"] for row in _load_train_dataset(data, 3)]
    data.shuffle_buffer_size = 0
    assert sorted(first) == sorted(LINES)
    assert [row["sent0"] for row in _load_train_dataset(data, 3)] == LINES != first
