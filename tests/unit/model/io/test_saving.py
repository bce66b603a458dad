"""One folder, loaded by everyone, with the same embedding and the same bytes."""

import json
from pathlib import Path

import pytest
import torch
from helpers.checks import fails, full_disk
from helpers.tiny import save_tiny, tiny_backbone, tiny_tokenizer
from transformers import AutoModel, AutoTokenizer

from simcse_trainer import InputError, SimCSEModel, lora_config
from simcse_trainer.files import TRAINING_HEADS
from simcse_trainer.model.heads import MLMHead, ProjectionHead
from simcse_trainer.model.pooling import LAYER_PAIRS, POOLING_MODES


def build(family="bert", *, head=None, mlp_only_train=None, **options) -> SimCSEModel:
    projection = ProjectionHead(32, std=0.3) if head else None
    return SimCSEModel(
        tiny_backbone(family),
        tiny_tokenizer(),
        head=projection,
        mlp_only_train=mlp_only_train,
        max_seq_length=20,
        **options,
    ).eval()


KINDS = {
    "supervised": {"head": True, "mlp_only_train": False},
    "unsupervised": {"head": True, "mlp_only_train": True},
    "mean": {"pooling_mode": "mean"},
    "roberta-supervised": {"family": "roberta", "head": True, "mlp_only_train": False},
    "roberta-mean": {"family": "roberta", "pooling_mode": "mean"},
}


def through_auto_model(folder: Path, sentences: list[str]):
    """What a reader does by hand, following the files of the folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
    out = AutoModel.from_pretrained(folder).eval()(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    )
    if (folder / "2_Dense").is_dir():
        return out.pooler_output
    if json.loads((folder / "1_Pooling/config.json").read_text())["pooling_mode_cls_token"]:
        return out.last_hidden_state[:, 0]
    mask = batch["attention_mask"][:, :, None]
    return (out.last_hidden_state * mask).sum(1) / mask.sum(1)


@pytest.mark.parametrize("kind", KINDS)
def test_three_loaders_give_one_embedding(kind, tmp_path, sentences):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = build(**KINDS[kind])
    model.save_pretrained(tmp_path)
    expected = model.encode(sentences)
    ours = SimCSEModel.from_pretrained(tmp_path)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    assert theirs.max_seq_length == ours.max_seq_length == 20
    assert theirs.similarity_fn_name == "cosine"
    found = {
        "SimCSEModel": ours.encode(sentences),
        "SentenceTransformer": theirs.encode(sentences, convert_to_tensor=True),
        "AutoModel": through_auto_model(tmp_path, sentences).detach(),
    }
    for name, embeddings in found.items():
        assert (embeddings - expected).abs().max() <= 1e-6 * expected.abs().max(), name


@pytest.mark.parametrize("pooling_mode", POOLING_MODES)
def test_every_pooling_mode_travels(pooling_mode, tmp_path, sentences):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = build(pooling_mode=pooling_mode)
    model.save_pretrained(tmp_path)
    loaded = SimCSEModel.from_pretrained(tmp_path)
    assert loaded.pooling_mode == pooling_mode
    assert loaded.head is None
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")
    expected = model.encode(sentences)
    torch.testing.assert_close(loaded.encode(sentences), expected)
    found = theirs.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert model.config.output_hidden_states is False
    assert AutoModel.from_pretrained(tmp_path).config.output_hidden_states is (
        pooling_mode in LAYER_PAIRS
    )


@pytest.mark.parametrize("kind", KINDS)
def test_two_saves_are_byte_identical(kind, tmp_path):
    model = build(**KINDS[kind])
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name, training_heads=True)
    files = sorted(p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_training_only_head_is_kept_for_resuming_and_absent_from_the_export(tmp_path):
    model = build(head=True, mlp_only_train=True)
    model.save_pretrained(tmp_path / "checkpoint", training_heads=True)
    model.save_pretrained(tmp_path / "final")
    resumed = SimCSEModel.from_pretrained(tmp_path / "checkpoint")
    assert resumed.mlp_only_train is True
    torch.testing.assert_close(resumed.head.dense.weight, model.head.dense.weight)
    assert not (tmp_path / "final" / TRAINING_HEADS).exists()
    assert SimCSEModel.from_pretrained(tmp_path / "final").head is None


def test_the_mlm_head_is_kept_for_resuming(tmp_path):
    from transformers import AutoModelForMaskedLM

    model = build()
    model.mlm_head = MLMHead(AutoModelForMaskedLM.from_config(model.config)).eval()
    model.save_pretrained(tmp_path, training_heads=True)
    resumed = SimCSEModel.from_pretrained(tmp_path)
    hidden = torch.randn(4, 32)
    torch.testing.assert_close(resumed.mlm_head.eval()(hidden), model.mlm_head(hidden))


def test_an_undecided_head_is_not_used_at_inference(sentences):
    model = build(head=True)
    without = build()
    torch.testing.assert_close(model.encode(sentences), without.encode(sentences))


class TestPlainBackbones:
    @pytest.fixture
    def folder(self, tmp_path):
        from helpers.tiny import tiny_config
        from transformers import BertModel

        torch.manual_seed(3)
        self.bert = BertModel(tiny_config("bert")).eval()
        path = tmp_path / "plain"
        self.bert.save_pretrained(path)
        tiny_tokenizer().save_pretrained(path)
        return path

    def test_default_is_cls_with_a_new_head(self, folder):
        model = SimCSEModel.from_pretrained(folder)
        assert (model.pooling_mode, model.mlp_only_train) == ("cls", None)
        assert model.head is not None
        assert model.max_seq_length == 40

    def test_mean_pooling_has_no_head_unless_asked_for(self, folder):
        assert SimCSEModel.from_pretrained(folder, pooling_mode="mean").head is None
        asked = SimCSEModel.from_pretrained(folder, pooling_mode="mean", projection_head="mlp")
        assert asked.head is not None

    def test_the_trained_pooler_as_head(self, folder, sentences):
        model = SimCSEModel.from_pretrained(folder, projection_head="pooler")
        batch = model.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        expected = self.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
        torch.testing.assert_close(model.encode(sentences), expected.detach())

    @pytest.mark.parametrize(
        ("name", "output"),
        [
            ("sup-simcse-bert-base-uncased", "pooler_output"),
            ("unsup-simcse-bert-base-uncased", "last_hidden_state"),
        ],
    )
    def test_released_checkpoints_are_known_by_name(self, folder, name, output, sentences):
        path = folder.rename(folder.parent / name)
        model = SimCSEModel.from_pretrained(path)
        batch = model.tokenizer(sentences, padding=True, truncation=True, return_tensors="pt")
        expected = self.bert(batch["input_ids"], batch["attention_mask"])[output]
        expected = expected if output == "pooler_output" else expected[:, 0]
        assert model.pooling_mode == "cls"
        torch.testing.assert_close(model.encode(sentences), expected.detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling_mode": "median"}, "pooling_mode is 'median'; expected one of cls, mean"),
        ({"projection_head": "gpt"}, "projection_head is 'gpt'; expected one of mlp, none"),
        ({"max_seq_length": 4000}, "max_seq_length is 4000; this backbone takes 2 to 40"),
    ],
)
def test_bad_options_say_what_is_expected(options, message, tmp_path):
    build().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=message):
        SimCSEModel.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize("adapter", [False, True])
def test_a_full_disk_is_an_error_of_the_system(adapter, tmp_path):
    base = save_tiny(tmp_path / "base")
    lora = lora_config(r=8) if adapter else None
    model = SimCSEModel.from_pretrained(base, lora=lora)
    with full_disk(), pytest.raises(OSError, match=r"out.* cannot be written: .*File too large"):
        model.save_pretrained(tmp_path / "out")


MALFORMED = {
    "modules.json": ['{"a": 1}', '["x"]', '[{"type": "sentence_transformers.models.Pooling"}]'],
    "1_Pooling/config.json": ["[1]", '{"pooling_mode": 3}', '{"pooling_mode": [[]]}'],
    "sentence_bert_config.json": ["[1]", '{"max_seq_length": "32"}', '{"max_seq_length": -1}'],
    "config_sentence_transformers.json": ['{"prompts": ["a"]}', '{"prompts": {"query": 3}}'],
    "2_Dense/config.json": ['{"activation_function": null}', "3"],
    "config.json": ['{"model_type": "bert", "hidden_size": "32"}', "[]"],
    "tokenizer_config.json": ["[]"],
}


@pytest.mark.parametrize(("name", "text"), [(n, t) for n, ts in MALFORMED.items() for t in ts])
def test_a_malformed_file_is_one_line(name, text, tmp_path):
    build(head=True, mlp_only_train=False).save_pretrained(tmp_path)
    (tmp_path / name).write_text(text, encoding="utf-8")
    fails(lambda: SimCSEModel.from_pretrained(tmp_path), tmp_path)


def test_modules_of_others_are_not_taken_for_those_of_sentence_transformers(tmp_path):
    build(pooling_mode="mean").save_pretrained(tmp_path)
    path = tmp_path / "modules.json"
    path.write_text(
        path.read_text("utf-8").replace("sentence_transformers.models.P", "my.P"), "utf-8"
    )
    fails(
        lambda: SimCSEModel.from_pretrained(tmp_path), "modules", "my.Pooling", "another checkpoint"
    )


def test_a_head_of_another_size_is_read_by_everyone(tmp_path, sentences):
    st = pytest.importorskip("sentence_transformers")
    model = build()
    model.head, model.mlp_only_train = ProjectionHead(32, 16), False
    expected = model.eval().encode(sentences)
    assert expected.shape == (4, 16)
    model.save_pretrained(tmp_path / "model")
    for embed in (
        SimCSEModel.from_pretrained(tmp_path / "model").encode(sentences),
        torch.from_numpy(
            st.SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(sentences)
        ),
    ):
        torch.testing.assert_close(embed, expected, rtol=1e-5, atol=1e-5)
    AutoModel.from_pretrained(tmp_path / "model")
    model.mlp_only_train = True
    model.save_pretrained(tmp_path / "training", training_heads=True)
    head = SimCSEModel.from_pretrained(tmp_path / "training").head
    assert torch.equal(head.dense.weight, model.head.dense.weight)


def test_a_folder_that_is_none():
    with pytest.raises(InputError, match=r"No model could be loaded from 'no/such'.*config.json"):
        SimCSEModel.from_pretrained("no/such")


@pytest.mark.parametrize("kinds", [["LSTM"], ["Dense", "Dense"], ["Normalize", "Dense"]])
def test_modules_that_simcse_cannot_represent(kinds, tmp_path):
    build().save_pretrained(tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    modules += [
        {"idx": 2, "name": "2", "path": f"{i}_{kind}", "type": f"x.models.{kind}"}
        for i, kind in enumerate(kinds, 2)
    ]
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(InputError, match=rf"modules .*2_{kinds[0]}.*Use another checkpoint"):
        SimCSEModel.from_pretrained(tmp_path)


def test_the_layout_of_the_newest_sentence_transformers_is_read(tmp_path, sentences):
    st = pytest.importorskip("sentence_transformers")
    model = build(head=True, mlp_only_train=False)
    model.save_pretrained(tmp_path / "ours")
    theirs = st.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    theirs.save(str(tmp_path / "theirs"))
    back = SimCSEModel.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(back.encode(sentences), model.encode(sentences))
    assert back.max_seq_length == 20
