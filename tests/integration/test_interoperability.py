"""A trained folder in other people's tools, each of which has to give the model's own embedding."""

import pytest
import torch
from datasets import Dataset
from helpers.tiny import WORDS, tiny_config, tiny_tokenizer
from torch.nn.functional import normalize
from transformers import AutoModel

from simcse_trainer import SimCSEModel
from simcse_trainer.evaluation.sts import evaluate_sts, load_sts_tasks
from simcse_trainer.model.heads import ProjectionHead

TEXTS = [" ".join(WORDS[(i + k * k) % 17] for k in range(2 + i % 5)) for i in range(24)]
PAIRS = Dataset.from_dict(
    {
        "sentence1": TEXTS[:20],
        "sentence2": TEXTS[4:],
        "score": [float(i * 7 % 6) for i in range(20)],
    }
)


@pytest.fixture(params=["supervised, cls and head", "unsupervised, mean"])
def trained(request, tmp_path):
    """A model as training leaves it, and its folder."""
    supervised = request.param.startswith("sup")
    # With random normalisation layers, as of tiny_backbone, all texts would be embedded alike.
    backbone = AutoModel.from_config(tiny_config("bert", initializer_range=0.2))
    backbone.pooler = None
    model = SimCSEModel(
        backbone,
        tiny_tokenizer(),
        pooling_mode="cls" if supervised else "mean",
        head=ProjectionHead(32, 32, std=0.2) if supervised else None,
        mlp_only_train=False if supervised else None,
        max_seq_length=16,
    )
    model.save_pretrained(tmp_path / "trained")
    return model.eval(), str(tmp_path / "trained")


def test_sentence_transformers_encodes(trained):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, folder = trained
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    found = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, model.encode(TEXTS), atol=1e-5, rtol=1e-5)
    assert theirs.get_max_seq_length() == 16
    assert theirs.similarity_fn_name == "cosine"


def test_its_evaluator_gives_our_score(trained, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    model, folder = trained
    evaluator = evaluation.EmbeddingSimilarityEvaluator(
        PAIRS["sentence1"], PAIRS["sentence2"], PAIRS["score"], write_csv=False
    )
    theirs = evaluator(sentence_transformers.SentenceTransformer(folder, device="cpu"))
    PAIRS.to_csv(tmp_path / "pairs.csv")
    tasks = load_sts_tasks([str(tmp_path / "pairs.csv")], split="test", data_dir=None)
    ours = evaluate_sts(model.encode, tasks)["pairs_spearman"]
    assert 100 * theirs["spearman_cosine"] == pytest.approx(ours, abs=1e-3)


def test_its_trainer_goes_on_and_we_read_what_it_wrote(trained, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    losses = pytest.importorskip("sentence_transformers.losses")
    model, folder = trained
    theirs = sentence_transformers.SentenceTransformer(folder, device="cpu")
    trainer = sentence_transformers.SentenceTransformerTrainer(
        model=theirs,
        args=sentence_transformers.SentenceTransformerTrainingArguments(
            output_dir=str(tmp_path / "runs"),
            max_steps=3,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=PAIRS.select_columns(["sentence1", "sentence2"]),
        loss=losses.MultipleNegativesRankingLoss(theirs),
    )
    trainer.train()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    again = SimCSEModel.from_pretrained(tmp_path / "theirs")
    expected = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(again.encode(TEXTS), expected, atol=1e-5, rtol=1e-5)
    assert (expected - model.encode(TEXTS)).abs().max() > 0.01  # it has learnt something
    assert again.max_seq_length == 16


def test_the_pipeline_of_transformers(trained):
    from transformers import pipeline

    model, folder = trained
    extract = pipeline("feature-extraction", model=folder, device="cpu")
    for text in TEXTS[:3]:
        tokens = torch.tensor(extract(text)[0])
        found = tokens[0] if model.pooling_mode == "cls" else tokens.mean(0)
        if model.head is not None:
            found = model.head(found)
        torch.testing.assert_close(found, model.encode(text), atol=1e-5, rtol=1e-5)


def test_langchain(trained):
    langchain = pytest.importorskip(
        "langchain_huggingface", reason="its releases want huggingface_hub below 2"
    )
    model, folder = trained
    theirs = langchain.HuggingFaceEmbeddings(model_name=folder, model_kwargs={"device": "cpu"})
    expected = model.encode(TEXTS)
    found = torch.tensor(theirs.embed_documents(TEXTS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    query = torch.tensor(theirs.embed_query(TEXTS[0]))
    torch.testing.assert_close(query, expected[0], atol=1e-5, rtol=1e-5)


def test_mteb_on_local_data(trained, tmp_path):
    mteb = pytest.importorskip("mteb", reason="pip install mteb")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from mteb.abstasks import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    class OurPairs(AbsTaskSTS):
        metadata = TaskMetadata(
            name="OurPairs",
            description="Pairs that are here.",
            dataset={"path": "here", "revision": "1"},
            type="STS",
            eval_splits=["test"],
            eval_langs=["eng-Latn"],
            main_score="cosine_spearman",
        )

        def load_data(self, **_):
            self.dataset = {"test": PAIRS}
            self.data_loaded = True

    model, folder = trained
    result = mteb.evaluate(
        sentence_transformers.SentenceTransformer(folder, device="cpu"),
        [OurPairs()],
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    ((scores,),) = (task.scores["test"] for task in result.task_results)
    PAIRS.to_csv(tmp_path / "pairs.csv")
    tasks = load_sts_tasks([str(tmp_path / "pairs.csv")], split="test", data_dir=None)
    ours = evaluate_sts(model.encode, tasks)["pairs_spearman"]
    assert 100 * scores["cosine_spearman"] == pytest.approx(ours, abs=1e-3)
    unit = normalize(model.encode(PAIRS["sentence1"]), dim=1)
    assert unit.std(0).max() > 0.05  # texts that are told apart, or any score would do
