"""Tasks of MTEB by the package mteb, offline: made-up data in its own classes of tasks."""

import json
import random
import sys

import pytest
from datasets import Dataset
from helpers.checks import fails
from helpers.retrieval import random_texts
from helpers.tiny import tiny_backbone, tiny_tokenizer
from typer.testing import CliRunner

from simcse_trainer import SimCSEModel
from simcse_trainer.cli import app
from simcse_trainer.data.retrieval import pairs_to_retrieval
from simcse_trainer.evaluation import mteb_tasks
from simcse_trainer.evaluation.mteb_tasks import evaluate_mteb, load_mteb_tasks
from simcse_trainer.evaluation.retrieval import evaluate_retrieval
from simcse_trainer.evaluation.sts import evaluate_sts

mteb = pytest.importorskip("mteb", reason="pip install mteb")

TEXTS = random_texts(120, 1)
DRAW = random.Random(2)
SCORED = {
    "sentence1": TEXTS[:60],
    "sentence2": TEXTS[60:],
    "score": [DRAW.randint(0, 5) for _ in range(60)],
}
PAIRS = list(zip(TEXTS[:40], TEXTS[80:], strict=True))


def describe(name, kind, main_score, **others):
    from mteb.abstasks.task_metadata import TaskMetadata

    options = {"eval_splits": ["test"], "eval_langs": ["eng-Latn"]} | others
    return TaskMetadata(
        name=name,
        description="Data that is here.",
        dataset={"path": "here", "revision": "1"},
        type=kind,
        main_score=main_score,
        **options,
    )


@pytest.fixture
def tasks(monkeypatch):
    """Tasks that mteb knows by name: of STS, of retrieval, of pictures, and without its data."""
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
    from mteb.abstasks.aggregated_task import AbsTaskAggregate
    from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData

    class OurPairs(AbsTaskSTS):
        metadata = describe("OurPairs", "STS", "cosine_spearman")

        def load_data(self, **_):
            self.dataset = {"test": Dataset.from_dict(SCORED)}
            self.data_loaded = True

    class OurAnswers(AbsTaskRetrieval):
        metadata = describe("OurAnswers", "Retrieval", "ndcg_at_10")

        def load_data(self, **_):
            queries, passages = (
                Dataset.from_list([{"id": f"{i:02}", "text": pair[side]} for i, pair in rows])
                for side in (0, 1)
                for rows in [list(enumerate(PAIRS))]
            )
            relevant = {f"{i:02}": {f"{i:02}": 1} for i in range(len(PAIRS))}
            split = RetrievalSplitData(
                queries=queries, corpus=passages, relevant_docs=relevant, top_ranked=None
            )
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    class OurPictures(AbsTaskSTS):
        metadata = describe("OurPictures", "STS", "cosine_spearman", modalities=["image"])

    class Absent(AbsTaskSTS):
        metadata = describe("Absent", "STS", "cosine_spearman")

    class OurMean(AbsTaskAggregate):
        metadata = AggregateTaskMetadata(
            name="OurMean",
            description="Both.",
            tasks=[OurPairs(), OurAnswers()],
            type="Retrieval",
            eval_splits=["test"],
            main_score="ndcg_at_10",
        )

    known = sys.modules["mteb.get_tasks"]._TASKS_REGISTRY
    for task in (OurPairs, OurAnswers, OurMean, OurPictures, Absent):
        monkeypatch.setitem(known, task.metadata.name, task)


@pytest.fixture(scope="module")
def model():
    return SimCSEModel(tiny_backbone(), tiny_tokenizer(), max_seq_length=40, pooling_mode="mean")


def test_mteb_computes_what_we_compute_on_the_same_data(tasks, model):
    loaded = load_mteb_tasks(["OurPairs", "OurAnswers", "OurPairs"])
    centre = model.encode(TEXTS).mean(0)

    def encode(texts):
        """Spread the narrow cone of a model without training: mteb ranks in float32."""
        return model.encode(texts) - centre

    scored = evaluate_sts(encode, {"x": SCORED})["x_spearman"]
    pairs = pairs_to_retrieval(PAIRS, source="pairs")
    searched = evaluate_retrieval(encode, encode, {"x": pairs})["ndcg_at_10"]
    assert 0 < searched < 100
    for _ in range(2):  # again with the data that was loaded
        found = evaluate_mteb(encode, loaded)
        # mteb rounds the latter to five digits.
        assert found["mteb/OurPairs"] == pytest.approx(scored, abs=1e-6)
        assert found["mteb/OurAnswers"] == pytest.approx(searched, abs=5e-4)


def test_an_aggregate_is_the_mean_of_its_tasks(tasks, model):
    found = evaluate_mteb(model.encode, load_mteb_tasks(["OurPairs", "OurAnswers", "OurMean"]))
    mean = (found["mteb/OurPairs"] + found["mteb/OurAnswers"]) / 2
    assert found["mteb/OurMean"] == pytest.approx(mean, abs=5e-4)


@pytest.mark.slow
def test_a_benchmark_stands_for_its_tasks(tasks, monkeypatch):
    known = sys.modules["mteb.benchmarks.get_benchmark"]._build_registry()
    ours = mteb.Benchmark(name="MTEB(ours, v1)", tasks=mteb.get_tasks(["OurPairs", "OurAnswers"]))
    monkeypatch.setitem(known, ours.name, ours)
    assert [*load_mteb_tasks(["OurAnswers", ours.name])] == ["OurAnswers", "OurPairs"]


def run(*words):
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_command_prints_and_writes_main_scores(tasks, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = evaluate_mteb(model.encode, load_mteb_tasks(["OurPairs", "OurAnswers"]))
    file = tmp_path / "r.json"
    words = [tmp_path / "model", "--mteb", "OurPairs", "OurAnswers", "--output", file]
    lines = run(*words).splitlines()
    assert lines[0].endswith("model: MTEB: OurPairs, OurAnswers")
    assert lines[2:5] == [
        "MTEB, main score x 100    mean",
        f"OurPairs                {expected['mteb/OurPairs']:6.2f}",
        f"OurAnswers              {expected['mteb/OurAnswers']:6.2f}",
    ]
    written = json.loads(file.read_text())
    assert written["rows"][0]["scores"] == pytest.approx(expected, abs=1e-6)
    assert written["mteb"]["OurAnswers"] == {
        "main_score": "ndcg_at_10",
        "splits": ["test"],
        "revision": "1",
    }
    assert written["versions"]["mteb"]


def test_under_the_other_tables_a_column_for_each_pooling_mode(tasks, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "faq.csv").write_text("sent0,sent1\n" + "".join(f"{a},{b}\n" for a, b in PAIRS))
    words = [tmp_path / "model", "--tasks", tmp_path / "faq.csv", "--mteb", "OurAnswers"]
    out = run(*words, "--pooling_mode", "mean", "cls").split("\n\n")
    assert out[0].endswith("model: faq: 40 queries, 40 passages; MTEB: OurAnswers")
    ours = [line.split()[-1] for line in out[1].splitlines()[1:]]
    theirs = out[2].splitlines()
    assert theirs[0].split()[-2:] == ["mean", "cls"]
    assert theirs[1].split() == ["OurAnswers", *ours]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("STS1", "'STS1' not found. Did you mean: 'STS"),
        ("MTEB(ours,v1)", "'MTEB(ours,v1)' not found"),
        ("OurPictures", "OurPictures is a task of image; expected one of text alone."),
        ("Absent", "The data of the MTEB task Absent could not be loaded from the Hub (here):"),
    ],
)
def test_a_task_that_cannot_be_evaluated_is_one_line(name, said, tasks):
    fails(lambda: load_mteb_tasks(["OurPairs", name]), said)


def test_without_mteb_or_with_an_older_one(monkeypatch):
    monkeypatch.delattr(mteb, "evaluate")
    fails(lambda: load_mteb_tasks(["STS12"]), "pip install -U 'mteb>=2'")
    monkeypatch.setattr(mteb_tasks, "find_spec", lambda _: None)
    fails(lambda: load_mteb_tasks(["STS12"]), "not installed. Run: pip install 'mteb>=2'")


def test_whitening_has_no_texts_of_mteb(tasks, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    words = ["evaluate", str(tmp_path / "model"), "--mteb", "OurPairs", "--whitening"]
    with pytest.raises(Exception, match=r"or the tasks of retrieval and of --mteb: OurPairs\."):
        CliRunner().invoke(app, words, catch_exceptions=False)
