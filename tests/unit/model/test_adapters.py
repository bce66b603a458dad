"""LoRA adapters: saved small, merged or both, on the weights they were trained on."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.checks import fails, mostly_slow
from helpers.tiny import DECODERS, save_tiny, tiny_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from simcse_trainer import SimCSEModel
from simcse_trainer.cli import main
from simcse_trainer.files import TRAINING_HEADS
from simcse_trainer.model.io import adapter
from simcse_trainer.model.lora import get_base_model, lora_config

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def adapted(source: str, **options) -> SimCSEModel:
    """With an adapter that changes something, as after training."""
    lora = options.pop("lora", None) or lora_config(r=4)
    model = SimCSEModel.from_pretrained(source, lora=lora, **options).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    if model.head is not None:
        model.mlp_only_train = False
    return model


@pytest.mark.parametrize(
    ("family", "bidirectional"),
    mostly_slow(
        [(family, None) for family in ("bert", "roberta", "modernbert", *DECODERS)]
        + [(family, True) for family in DECODERS],
        [("bert", None), ("llama", None), ("qwen3", True), ("gemma3_text", True)],
    ),
)
def test_adapter_merged_and_memory_agree(family, bidirectional, tmp_path, sentences):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = save_tiny(tmp_path / "base", family)
    model = adapted(source, bidirectional_attention=bidirectional)
    plain = SimCSEModel.from_pretrained(source, bidirectional_attention=bidirectional)
    expected = model.encode(sentences)
    assert (expected - plain.encode(sentences)).abs().max() > 1e-2
    before = {name: x.clone() for name, x in get_base_model(model.backbone).state_dict().items()}
    for form in ("adapter", "merged", "both"):
        folder = tmp_path / form
        model.save_pretrained(folder, lora_save=form)
        found = SimCSEModel.from_pretrained(folder).encode(sentences)
        torch.testing.assert_close(found, expected, **CLOSE)
        if form == "adapter" and bidirectional:
            continue  # refused, below
        theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
        found = theirs.encode(sentences, convert_to_tensor=True)
        torch.testing.assert_close(found, expected, **CLOSE)
    beside = SimCSEModel.from_pretrained(tmp_path / "both/adapter").encode(sentences)
    torch.testing.assert_close(beside, expected, **CLOSE)
    # Merging leaves the model as it was, to the bit.
    after = get_base_model(model.backbone).state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert torch.equal(model.encode(sentences), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_merged_in_float32_and_rounded_once(dtype, tmp_path):
    model = adapted(save_tiny(tmp_path / "base", "llama"), dtype=dtype)
    base = get_base_model(model.backbone)
    before = {name: x.clone() for name, x in base.state_dict().items()}
    layer = base.layers[0].self_attn.q_proj
    a, b = (part["default"].weight.detach() for part in (layer.lora_A, layer.lora_B))
    assert a.dtype == torch.float32
    exact = layer.base_layer.weight.detach().float() + layer.scaling["default"] * b @ a
    model.save_pretrained(tmp_path / "merged", lora_save="merged")
    saved = load_file(tmp_path / "merged/model.safetensors")
    assert {x.dtype for x in saved.values()} == {dtype}
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == str(dtype)[6:]
    assert torch.equal(saved["layers.0.self_attn.q_proj.weight"], exact.to(dtype))
    after = base.state_dict()
    assert all(torch.equal(x, after[name]) for name, x in before.items())
    assert all(x.dtype == after[name].dtype for name, x in before.items())


def test_auto_model_loads_adapter_and_merged(tmp_path):
    model = adapted(save_tiny(tmp_path / "base", "qwen3"))
    ids = torch.arange(5, 12)[None]
    expected = model.backbone(input_ids=ids).last_hidden_state
    for form in ("adapter", "merged"):
        model.save_pretrained(tmp_path / form, lora_save=form)
        loaded = AutoModel.from_pretrained(tmp_path / form).eval()
        torch.testing.assert_close(loaded(input_ids=ids).last_hidden_state, expected, **CLOSE)


def test_an_adapter_that_others_would_load_wrongly_is_refused_by_them(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model = adapted(save_tiny(tmp_path / "base", "llama"), bidirectional_attention=True)
    model.save_pretrained(tmp_path / "default")
    assert (tmp_path / "default/config.json").is_file()  # merged
    model.save_pretrained(tmp_path / "adapter", lora_save="adapter")
    for trust in (False, True):
        with pytest.raises((ValueError, ImportError), match="ToBeMergedFirst"):
            sentence_transformers.SentenceTransformer(
                str(tmp_path / "adapter"), device="cpu", trust_remote_code=trust
            )
    with pytest.raises((OSError, ValueError)):
        AutoModel.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["dora", "rslora", "some layers"])
def test_kinds_of_adapters(kind, tmp_path, sentences):
    lora = lora_config(
        r=4,
        use_dora=kind == "dora",
        use_rslora=kind == "rslora",
        target_modules=["query", "value"] if kind == "some layers" else ["all-linear"],
    )
    model = adapted(save_tiny(tmp_path / "base"), lora=lora)
    for form in ("adapter", "merged"):
        model.save_pretrained(tmp_path / form, lora_save=form)
        found = SimCSEModel.from_pretrained(tmp_path / form).encode(sentences)
        torch.testing.assert_close(found, model.encode(sentences), **CLOSE)
    layers = {
        name.split(".lora_")[0]
        for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    }
    assert len(layers) == (6 if kind == "some layers" else 18)


def test_an_adapter_is_small_and_saved_byte_by_byte(tmp_path):
    model = adapted(save_tiny(tmp_path / "base", vocab_size=2000, hidden_size=64))
    files = {}
    for name in ("one", "two"):
        model.save_pretrained(tmp_path / name, training_heads=True)
        found = [path for path in sorted((tmp_path / name).rglob("*")) if path.is_file()]
        files[name] = {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in found}
    assert files["one"] == files["two"]
    assert "config.json" not in files["one"]
    assert "README.md" not in files["one"]  # peft's own card says nothing of the model
    weights = len(files["one"]["adapter_model.safetensors"])
    assert weights < (tmp_path / "base/model.safetensors").stat().st_size / 5
    assert TRAINING_HEADS not in files["one"]


def test_layers_that_are_not_there_are_refused(tmp_path):
    source = save_tiny(tmp_path)
    lora = lora_config(target_modules=["nonsense"])
    fails(lambda: SimCSEModel.from_pretrained(source, lora=lora), "nonsense", "lora_target_modules")


class TestBase:
    def test_a_base_that_is_gone(self, tmp_path):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        (tmp_path / "base").rename(tmp_path / "elsewhere")
        fails(
            lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"),
            tmp_path / "adapter",
            "base",
            "base_model",
        )
        found = SimCSEModel.from_pretrained(
            tmp_path / "adapter", base_model=str(tmp_path / "elsewhere")
        )
        assert found.base_weights.name == str(tmp_path / "elsewhere")

    def test_other_weights_are_refused(self, tmp_path):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        path = tmp_path / "base/model.safetensors"
        weights = load_file(path)
        name = sorted(weights)[3]
        weights[name].view(-1)[0] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})
        fails(
            lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"),
            "was trained on weights",
            "sha256",
        )

    def test_the_same_weights_in_other_files_are_taken(self, tmp_path, sentences):
        model = adapted(save_tiny(tmp_path / "base"))
        model.save_pretrained(tmp_path / "adapter")
        base = AutoModel.from_pretrained(tmp_path / "base", add_pooling_layer=False)
        (tmp_path / "base/model.safetensors").unlink()
        base.save_pretrained(tmp_path / "base", max_shard_size="20KB")
        assert (tmp_path / "base/model.safetensors.index.json").is_file()
        found = SimCSEModel.from_pretrained(tmp_path / "adapter").encode(sentences)
        torch.testing.assert_close(found, model.encode(sentences), **CLOSE)

    def test_an_adapter_of_peft_alone(self, tmp_path, sentences):
        from peft import get_peft_model

        source = save_tiny(tmp_path / "base")
        plain = AutoModel.from_pretrained(source, add_pooling_layer=False)
        get_peft_model(plain, lora_config(r=2)).save_pretrained(str(tmp_path / "peft"))
        found = SimCSEModel.from_pretrained(tmp_path / "peft", pooling_mode="mean")
        expected = SimCSEModel.from_pretrained(source, pooling_mode="mean").encode(sentences)
        torch.testing.assert_close(found.encode(sentences), expected, **CLOSE)  # B is zero

    def test_no_base_at_all(self, tmp_path):
        model = adapted(save_tiny(tmp_path / "base"))
        model.save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter/simcse_adapter.json").unlink()
        path = tmp_path / "adapter/adapter_config.json"
        config = json.loads(path.read_text()) | {"base_model_name_or_path": None}
        path.write_text(json.dumps(config))
        fails(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"), "base_model_name_or_path")

    @pytest.mark.real_weights
    def test_a_packaged_base_has_its_name_on_the_hub(self, minilm, tmp_path):
        model = adapted(minilm)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "sentence-transformers/all-MiniLM-L6-v2"
        found = SimCSEModel.from_pretrained(tmp_path)  # offline
        torch.testing.assert_close(found.encode("a man"), model.encode("a man"), **CLOSE)

    @pytest.mark.parametrize("text", ["{", "[]", '{"name": null}', '{"name": "x", "later": 1}'])
    def test_what_an_adapter_is_for_in_another_form(self, text, tmp_path):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter/simcse_adapter.json").write_text(text, encoding="utf-8")
        fails(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"), "simcse_adapter.json")

    def test_a_configuration_of_peft_that_is_damaged(self, tmp_path):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        (tmp_path / "adapter/adapter_config.json").write_text("{", encoding="utf-8")
        fails(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"), "adapter_config.json")

    def test_a_model_and_an_adapter_in_one_folder(self, tmp_path, sentences):
        base = save_tiny(tmp_path / "base")
        model = adapted(base)
        model.save_pretrained(tmp_path / "adapter")
        config = (tmp_path / "base/config.json").read_text("utf-8")
        (tmp_path / "adapter/config.json").write_text(config, encoding="utf-8")
        found = SimCSEModel.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(found.encode(sentences), model.encode(sentences), **CLOSE)
        shutil.copy(tmp_path / "base/model.safetensors", tmp_path / "adapter")
        fails(
            lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"),
            "a whole model (model.safetensors) and an adapter (adapter_config.json)",
        )

    def save_with_peft(self, tmp_path, **saving):
        """An adapter on all linear layers, the pooling layer's too, and on new word embeddings."""
        from peft import LoraConfig, get_peft_model

        base = save_tiny(tmp_path / "base")
        torch.manual_seed(1)
        theirs = get_peft_model(
            AutoModel.from_pretrained(base),
            LoraConfig(r=2, target_modules=["query", "dense"], init_lora_weights=False),
        )
        if saving:
            torch.nn.init.normal_(theirs.get_input_embeddings().weight, std=0.3)
        theirs.save_pretrained(str(tmp_path / "theirs"), **saving)
        return theirs.eval()

    def embed(self, theirs, sentences):
        batch = tiny_tokenizer()(sentences, padding=True, return_tensors="pt")
        with torch.no_grad():
            return theirs(**batch).last_hidden_state[:, 0]

    def test_the_pooling_layer_that_others_train_along(self, tmp_path, sentences):
        expected = self.embed(self.save_with_peft(tmp_path), sentences)
        folder = tmp_path / "theirs"
        found = SimCSEModel.from_pretrained(folder, projection_head="none")
        torch.testing.assert_close(found.encode(sentences), expected, **CLOSE)
        message = fails(
            lambda: SimCSEModel.from_pretrained(folder, projection_head="pooler"), "pooling layer"
        )
        assert str(message).endswith("Pass projection_head='none'.")

    def test_word_embeddings_in_an_adapters_file_are_saved_again(self, tmp_path, sentences):
        expected = self.embed(self.save_with_peft(tmp_path, save_embedding_layers=True), sentences)
        model = SimCSEModel.from_pretrained(tmp_path / "theirs", projection_head="none")
        model.save_pretrained(tmp_path / "again")
        model.save_pretrained(tmp_path / "merged", lora_save="merged")
        for folder in ("theirs", "again", "merged"):
            found = SimCSEModel.from_pretrained(tmp_path / folder, projection_head="none")
            torch.testing.assert_close(found.encode(sentences), expected, **CLOSE)


class TestMerge:
    def run(self, capsys, *words) -> tuple[int, str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["simcse-trainer", "merge", *map(str, words)])
            with pytest.raises(SystemExit) as end:
                main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out + out.err

    @pytest.mark.parametrize("bidirectional", [None, True])
    def test_later(self, bidirectional, tmp_path, sentences, capsys):
        model = adapted(
            save_tiny(tmp_path / "base", "qwen3"), bidirectional_attention=bidirectional
        )
        model.save_pretrained(tmp_path / "adapter", lora_save="adapter")
        status, said = self.run(capsys, tmp_path / "adapter", tmp_path / "merged")
        assert (status, said) == (0, f"The merged model is in {tmp_path / 'merged'}.\n")
        found = SimCSEModel.from_pretrained(tmp_path / "merged").encode(sentences)
        torch.testing.assert_close(found, model.encode(sentences), **CLOSE)
        card = (tmp_path / "merged/README.md").read_text()
        assert "All three give the same embeddings" in card

    def test_into_a_folder_that_is_there(self, tmp_path, capsys):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        status, said = self.run(capsys, tmp_path / "adapter", tmp_path / "base")
        assert status == 2
        assert (
            said == f"error: {tmp_path / 'base'} is there already; pass the name of a new folder.\n"
        )

    def test_what_is_no_adapter(self, tmp_path, capsys):
        source = save_tiny(tmp_path / "base")
        status, said = self.run(capsys, source, tmp_path / "merged")
        assert status == 2
        assert "holds no adapter" in said
        assert not (tmp_path / "merged").exists()

    def test_other_base_weights(self, tmp_path, capsys):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        other = save_tiny(tmp_path / "other", hidden_act="relu", hidden_dropout_prob=0.2)
        weights = load_file(tmp_path / "other/model.safetensors")
        save_file({k: x * 1.01 for k, x in weights.items()}, tmp_path / "other/model.safetensors")
        words = (tmp_path / "adapter", tmp_path / "merged", "--base-model", other)
        status, said = self.run(capsys, *words)
        assert status == 2
        assert "was trained on weights" in said
        assert said.count("\n") == 1
        assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_no_peft_is_imported_without_an_adapter(tmp_path):
    source = save_tiny(tmp_path)
    code = (
        "import sys; from simcse_trainer import SimCSEModel; "
        f"SimCSEModel.from_pretrained({source!r}); print('peft.tuners' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "False"


class TestHashing:
    """Of weights of gigabytes that is a minute, for every process that loads an adapter."""

    def test_a_base_is_hashed_once_in_a_process(self, tmp_path):
        adapted(save_tiny(tmp_path / "base")).save_pretrained(tmp_path / "adapter")
        before = adapter._digest.cache_info().misses
        for _ in range(3):
            SimCSEModel.from_pretrained(tmp_path / "adapter")
        assert adapter._digest.cache_info().misses == before

    def test_changed_weights_are_hashed_again(self, tmp_path):
        base = save_tiny(tmp_path / "base")
        first = adapter.fingerprint(base)
        weights = load_file(f"{base}/model.safetensors")
        save_file({n: x + 1 for n, x in weights.items()}, f"{base}/model.safetensors")
        assert adapter.fingerprint(base) not in (None, first)

    def test_the_commit_of_the_hub_says_which_base_it_is(self, monkeypatch, tmp_path):
        monkeypatch.setattr(adapter, "_find_commit", lambda path, hub: "c0ffee")
        monkeypatch.setattr(adapter, "fingerprint", lambda *_, **__: pytest.fail("hashed"))
        base = adapter.BaseWeights("me/base", sha256="0" * 64, commit="c0ffee")
        adapter.check_base(base, "me/base", "folder", {})
        assert json.loads(base.as_json())["commit"] == "c0ffee"
        assert "commit" not in json.loads(adapter.BaseWeights("here").as_json())
