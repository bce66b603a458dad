"""`simcse-trainer evaluate`, from the command line to the table and the JSON."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from helpers.retrieval import random_texts, write_beir
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer
from typer.testing import CliRunner

from simcse_trainer import SimCSEModel
from simcse_trainer.cli import app, main
from simcse_trainer.data.retrieval import pairs_to_retrieval
from simcse_trainer.evaluation import encoders, published
from simcse_trainer.evaluation.retrieval import evaluate_retrieval
from simcse_trainer.evaluation.sts import evaluate_sts, load_sts_tasks
from simcse_trainer.evaluation.tasks import RETRIEVAL_METRICS
from simcse_trainer.model.heads import ProjectionHead


def texts(count, start=0):
    return [
        " ".join(WORDS[(i * 5 + k) % 17] for k in range(2 + i % 5)) for i in range(start, count)
    ]


def write(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "data"
    for task, shift in (("stsb", 3), ("mine", 5)):
        rows = [
            (a, b, i % 6)
            for i, (a, b) in enumerate(zip(texts(20), texts(20 + shift, shift), strict=True))
        ]
        write(folder / task / "test.csv", ("sentence1", "sentence2", "score"), rows)
    rows = [(a, b, i % 2) for i, (a, b) in enumerate(zip(texts(40), texts(41, 1), strict=True))]
    write(folder / "mrpc" / "train.csv", ("sentence1", "sentence2", "label"), rows)
    write(folder / "mrpc" / "test.csv", ("sentence1", "sentence2", "label"), rows[:10])
    write(folder / "x.csv", ("a", "b"), [("c", "d")])
    return folder


def model_folder(path, **options):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer(), max_seq_length=40, **options)
    model.save_pretrained(path)
    return model


def run(*words):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def error(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["simcse-trainer", "evaluate", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith("error: ")
    return err[-1]


def test_the_tables_and_the_json_say_the_same(tmp_path, data_dir):
    model = model_folder(tmp_path / "model", pooling_mode="mean")
    # Both spellings, and values as training's options take them.
    words = (tmp_path / "model", "--tasks", "mine", "stsb", "mrpc", "--data-dir", data_dir)
    words += ("--device", "cpu")
    out = run(*words, "--output", tmp_path / "out" / "results.json")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    (row,) = found["rows"]
    tasks = load_sts_tasks(["stsb", "mine"], split="test", data_dir=str(data_dir))
    expected = evaluate_sts(model.encode, tasks)
    for name in ("stsb_spearman", "mine_spearman", "avg_sts"):
        assert row["scores"][name] == pytest.approx(expected[name], abs=1e-3)
    lines = out.splitlines()
    assert lines[2].split() == ["Spearman", "x", "100", "STS-B", "MINE", "Avg."]
    scores = [f"{row['scores'][n]:.2f}" for n in ("stsb_spearman", "mine_spearman", "avg_sts")]
    assert lines[3].split() == ["mean", *scores]
    assert lines[5].split() == ["Accuracy", "MRPC", "Avg."]
    assert lines[6].split()[1] == f"{row['scores']['mrpc_accuracy']:.2f}"
    assert lines[8].startswith("Lower is better")
    assert set(row["space"]) == {"alignment", "uniformity", "anisotropy"}
    assert found["examples"]["mrpc"] == {"train": 40, "test": 10}
    assert found["sentences"]["different"] < found["sentences"]["all"] == 20 * 4 + 50 * 2
    assert {"torch", "transformers", "scikit-learn"} <= set(found["versions"])


def test_every_sentence_is_encoded_once_over_all_tasks(tmp_path, data_dir, monkeypatch):
    model_folder(tmp_path / "model", pooling_mode="mean")
    seen = []
    encode = SimCSEModel.encode
    monkeypatch.setattr(
        SimCSEModel, "encode", lambda self, x, **kw: (seen.extend(x), encode(self, x, **kw))[1]
    )
    run(tmp_path / "model", "--data_dir", data_dir)
    assert len(seen) == len(set(seen)) > 20


def test_a_plain_backbone_by_every_pooling_mode_and_whitened(tmp_path, data_dir):
    model_folder(tmp_path / "model", pooling_mode="mean")
    (tmp_path / "model" / "modules.json").unlink()
    modes = ["cls", "mean", "max", "lasttoken", "weightedmean", "avg_top2", "avg_first_last"]
    words = ["--tasks", "stsb", "--data_dir", data_dir, "--whitening"]
    words += ["--whitening_file", data_dir / "mrpc" / "train.csv", "--output", tmp_path / "r.json"]
    out = run(tmp_path / "model", *words, "--pooling_mode", *modes)
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["pooling"] for row in rows] == [mode for mode in modes for _ in range(3)]
    scores = {row["pooling"]: row["scores"]["stsb_spearman"] for row in rows[::3]}
    # Ranks of a few pairs may tie, the space does not.
    assert len({row["space"]["anisotropy"] for row in rows[::3]}) == len(modes)
    for i, mode in enumerate(modes):
        model = SimCSEModel.from_pretrained(
            tmp_path / "model", pooling_mode=mode, projection_head="none"
        )
        tasks = load_sts_tasks(["stsb"], split="test", data_dir=str(data_dir))
        expected = evaluate_sts(model.encode, tasks)["stsb_spearman"]
        assert scores[mode] == pytest.approx(expected, abs=1e-3)
        plain, own, other = rows[3 * i : 3 * i + 3]
        assert plain["space"]
        assert not own["space"]  # a map per task is no one space
        assert other["whitening"] == "whitened on train.csv"
        assert "avg_first_last, whitened on train.csv" in out


def test_the_head_of_a_folder_is_used_unless_pooling_is_asked_for(tmp_path, data_dir):
    model_folder(tmp_path / "model", head=ProjectionHead(32, std=0.5), mlp_only_train=False)
    words = (tmp_path / "model", "--tasks", "stsb", "--data_dir", data_dir)
    headed, bare = (run(*words, *more).splitlines()[3] for more in ([], ["--pooling_mode", "cls"]))
    assert headed.startswith("cls + head ")
    assert bare.startswith("cls ")
    assert headed.split()[-1] != bare.split()[-1]


def test_what_only_sentence_transformers_can_compute(tmp_path, data_dir, monkeypatch, capsys):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import LayerNorm

    model_folder(tmp_path / "ours", pooling_mode="mean")
    theirs = SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    norm = LayerNorm(32)
    torch.nn.init.normal_(norm.norm.weight)
    theirs.append(norm)
    theirs.save(str(tmp_path / "theirs"))
    words = (tmp_path / "theirs", "--tasks", "stsb", "--data_dir", data_dir)
    out = run(*words, "--output", tmp_path / "r.json")
    assert "sentence-transformers" in out
    tasks = load_sts_tasks(["stsb"], split="test", data_dir=str(data_dir))
    expected = evaluate_sts(lambda x: theirs.encode(x, convert_to_tensor=True), tasks)
    row = json.loads((tmp_path / "r.json").read_text())["rows"][0]
    assert row["scores"]["stsb_spearman"] == pytest.approx(expected["stsb_spearman"], abs=1e-3)
    said = error(monkeypatch, capsys, *words, "--pooling_mode", "cls")
    assert "Leave out --pooling_mode" in said
    monkeypatch.setattr(encoders, "find_spec", lambda name: None)
    said = error(monkeypatch, capsys, *words)
    assert "3_LayerNorm" in said or "2_LayerNorm" in said
    assert said.endswith("Run: pip install sentence-transformers")


def test_the_papers_rows_of_the_same_backbone(tmp_path, data_dir, monkeypatch):
    model_folder(tmp_path / "model", pooling_mode="cls")
    monkeypatch.setitem(published._BACKBONES, ("bert", 32, 3, 64), "BERT-base")
    out = run(tmp_path / "model", "--tasks", "stsb", "mrpc", "--data_dir", data_dir).splitlines()
    assert out[4] == "BERT-base (Gao et al. 2021, table 5)"
    assert out[7].split() == ["unsup.", "SimCSE", "76.85", "76.85"]
    assert ["sup.", "SimCSE", "73.51", "73.51"] in [line.split() for line in out]
    # KorSTS and one's own tasks have no figure there, and the mean over them is none.
    out = run(tmp_path / "model", "--tasks", "stsb", "mine", "--data_dir", data_dir).splitlines()
    assert out[7].split() == ["unsup.", "SimCSE", "76.85", "-", "-"]


def test_retrieval_from_pairs_and_from_a_folder(tmp_path, data_dir):
    model = model_folder(tmp_path / "model", pooling_mode="mean")
    found = random_texts(70, 4)
    write(
        tmp_path / "faq.csv",
        ("id", "frage", "antwort"),
        zip("x" * 20, found, found[20:], strict=False),
    )
    (tmp_path / "more.txt").write_text("\n".join(found[40:]))
    corpus = dict(zip([f"{i:02}" for i in range(50)], found[20:], strict=True))
    queries = dict(zip("abc", found, strict=False))
    write_beir(data_dir / "beir", corpus, queries, [("a", "20", 1), ("b", "07", 2), ("c", "41", 1)])
    words = [tmp_path / "model", "--tasks", tmp_path / "faq.csv", "beir", "--data_dir", data_dir]
    words += ["--columns", "frage", "antwort", "--corpus", tmp_path / "more.txt"]
    out = run(*words, "--output", tmp_path / "r.json").splitlines()
    assert out[0].endswith("model: faq: 20 queries, 50 passages; beir: 3 queries, 50 passages")
    assert out[2].split() == ["Retrieval", "x", "100", *RETRIEVAL_METRICS.values()]
    assert [line.split()[:2] for line in out[3:6]] == [
        ["mean,", n] for n in ("faq", "beir", "mean")
    ]
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["examples"]["faq"] == {"queries": 20, "passages": 50}
    (row,) = written["rows"]
    pairs = pairs_to_retrieval(
        zip(found[:20], found[20:], strict=False), source="x", corpus=tmp_path / "more.txt"
    )
    expected = evaluate_retrieval(model.encode, model.encode, {"faq": pairs})
    assert row["scores"]["faq_ndcg_at_10"] == pytest.approx(expected["faq_ndcg_at_10"])
    assert 0 < expected["faq_recall_at_10"] < 100
    assert out[3].split()[2:] == [f"{row['scores'][f'faq_{n}']:.2f}" for n in RETRIEVAL_METRICS]
    mean = (row["scores"]["faq_ndcg_at_10"] + row["scores"]["beir_ndcg_at_10"]) / 2
    assert row["scores"]["ndcg_at_10"] == pytest.approx(mean)


def test_scored_pairs_and_retrieval_in_one_table_each(tmp_path, data_dir):
    model_folder(tmp_path / "model", pooling_mode="mean")
    found = random_texts(30, 4)
    write(data_dir / "faq" / "test.csv", ("sent0", "sent1"), zip(found, found[15:], strict=False))
    out = run(tmp_path / "model", "--data_dir", data_dir).splitlines()
    assert [
        line.split("  ")[0] for line in out if "  " in line and not line.startswith("mean")
    ] == ["Spearman x 100", "Accuracy", "Retrieval x 100", "Lower is better"]
    assert "; faq: 15 queries, 15 passages" in out[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "{data}/faq.csv", "--whitening"], "leave out --whitening"),
        (["--tasks", "stsb", "--data_dir", "{data}", "--corpus", "{data}/x.csv"], "--corpus adds"),
        (["--tasks", "{data}/faq.csv", "--columns", "nothing", "b"], "no column 'nothing'"),
        (["--tasks", "{data}/faq.csv", "--corpus", "{data}/gone.txt"], "gone.txt: no such file"),
        (["--tasks", "{data}/x.csv"], "found 1 rows with 1 different queries"),
    ],
)
def test_mistakes_with_retrieval_are_one_line(words, said, tmp_path, data_dir, monkeypatch, capsys):
    model_folder(tmp_path / "model")
    write(data_dir / "faq.csv", ("a", "b"), [("q", "x"), ("r", "y")])
    words = [word.format(data=data_dir) for word in words]
    assert said in error(monkeypatch, capsys, tmp_path / "model", *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "nonsense"], "'nonsense' is no known task; expected one of sts12"),
        (["--tasks", "sts12", "--data_dir", "{data}"], "Check --data_dir, --tasks, --split."),
        (["--split", "validation", "--data_dir", "{data}", "--tasks", "stsb"], "validation.csv is"),
        (["--data_dir", "{data}/stsb"], "found no <task>/test.csv"),
        (["--tasks", "stsb", "stsb", "--data_dir", "{data}"], "Two tasks are called 'stsb'"),
        (
            ["--tasks", "stsb", "--data_dir", "{data}", "--pooling_mode", "sum"],
            "is 'sum'; expected",
        ),
        (["--task", "stsb"], "--task"),
        (
            ["--tasks", "stsb", "--data_dir", "{data}", "--whitening_file", "{data}/x.csv"],
            "of texts",
        ),
    ],
)
def test_mistakes_are_one_line(words, said, tmp_path, data_dir, monkeypatch, capsys):
    model_folder(tmp_path / "model")
    words = [word.format(data=data_dir) for word in words]
    assert said in error(monkeypatch, capsys, tmp_path / "model", *words)


def test_help_waits_for_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from simcse_trainer.cli import app; "
        "CliRunner().invoke(app, ['evaluate', '--help']); print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False"]


@pytest.mark.real_weights
@pytest.mark.slow
def test_published_scores_through_the_command(minilm, sts_dir, tmp_path):
    wanted = {"sts12": 72.37, "sts13": 80.60, "sts15": 85.39, "stsb": 82.03}
    words = (minilm, "--tasks", *wanted, "--data_dir", sts_dir, "--output", tmp_path / "r.json")
    run(*words)
    scores = json.loads((tmp_path / "r.json").read_text())["rows"][0]["scores"]
    for task, score in wanted.items():
        assert scores[f"{task}_spearman"] == pytest.approx(score, abs=0.02), task
