"""Adapters that were trained elsewhere: every tensor is loaded, or it is an error."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from helpers.checks import attempt, fails, mostly_slow, run_command
from helpers.tiny import save_tiny, tiny_config, tiny_decoder_tokenizer
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from simcse_trainer import InputError, SimCSEModel

field = pytest.mark.field
TEXTS = ["a man is eating food", "the dog sleeps", "a", "big red cat runs on the small mat"]
TARGETS = ["q_proj", "v_proj"]


def far(one, other):
    return float((one - other).abs().max() / other.abs().max())


def randomize(model, seed=1):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_adapter(folder, base, auto=AutoModel, **options):
    """An adapter as peft writes it, with its tokenizer; and the model that it is."""
    config = LoraConfig(**({"r": 4, "target_modules": TARGETS} | options))
    model = randomize(get_peft_model(auto.from_pretrained(base), config))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return model.eval()


def last_states(backbone, tokenizer):
    with torch.no_grad():
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]
        return torch.stack([backbone(input_ids=one).last_hidden_state[0, -1] for one in ids])


def causal(folder, family):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    tiny_decoder_tokenizer().save_pretrained(folder)
    return str(folder)


@field("40")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_an_adapter_of_a_causal_language_model_is_loaded(tmp_path, family, task):
    """With its task, and without: then its layers have another prefix (41)."""
    base = causal(tmp_path / "base", family)
    targets = ["c_attn"] if family == "gpt2" else TARGETS
    options = {"task_type": task, "target_modules": targets}
    theirs = save_adapter(tmp_path / "adapter", base, AutoModelForCausalLM, **options)
    model, error = attempt(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"))
    assert error is None, repr(error)
    merged = theirs.merge_and_unload()
    expected = last_states(merged.base_model, model.tokenizer)
    assert far(model.encode(TEXTS), expected) < 1e-5
    plain = SimCSEModel.from_pretrained(base)
    assert far(plain.encode(TEXTS), expected) > 0.01


@field("41")
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_merging_such_an_adapter_writes_what_it_computes(tmp_path, task, capsys):
    base = causal(tmp_path / "base", "llama")
    theirs = save_adapter(tmp_path / "adapter", base, AutoModelForCausalLM, task_type=task)
    status, error = attempt(lambda: run_command("merge", tmp_path / "adapter", tmp_path / "merged"))
    assert (status, error) == (0, None)
    model = SimCSEModel.from_pretrained(tmp_path / "merged")
    expected = last_states(theirs.merge_and_unload().base_model, model.tokenizer)
    assert far(model.encode(TEXTS), expected) < 1e-5


@field("41")
@pytest.mark.parametrize("change", ["renamed", "extra", "missing", "head"])
def test_a_tensor_without_a_place_or_a_place_without_a_tensor_is_an_error(tmp_path, change):
    base = causal(tmp_path / "base", "llama")
    if change == "head":
        options = {"task_type": "CAUSAL_LM", "target_modules": [*TARGETS, "lm_head"]}
        save_adapter(tmp_path / "adapter", base, AutoModelForCausalLM, **options)
    else:
        save_adapter(tmp_path / "adapter", base)
        path = tmp_path / "adapter/adapter_model.safetensors"
        tensors = load_file(path)
        name = next(iter(tensors))
        if change == "renamed":
            tensors = {key.replace("layers.", "blocks."): x for key, x in tensors.items()}
        elif change == "extra":
            tensors[name.replace("layers.0", "layers.7")] = tensors[name].clone()
        else:
            del tensors[name]
        save_file(tensors, path)
    model, error = attempt(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"))
    assert isinstance(error, InputError), (model, error)
    assert "does not fit its base model" in str(error)
    assert "base_model" in str(error)


@field("41")
def test_patterns_of_ranks_and_scales_follow_the_names(tmp_path):
    base = causal(tmp_path / "base", "llama")
    patterns = {
        "rank_pattern": {"model.layers.1.self_attn.q_proj": 2},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 64},
    }
    theirs = save_adapter(tmp_path / "adapter", base, AutoModelForCausalLM, **patterns)
    model, error = attempt(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"))
    assert error is None, repr(error)
    expected = last_states(theirs.merge_and_unload().base_model, model.tokenizer)
    assert far(model.encode(TEXTS), expected) < 1e-5


@field("28")
@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["norm"]},
        {"trainable_token_indices": [5, 6, 7]},
        {"trainable_token_indices": {"embed_tokens": [5, 8]}},
        {"use_dora": True},
        {"bias": "all"},
    ],
)
def test_a_merged_adapter_computes_what_it_did_before(tmp_path, options, capsys):
    base = save_tiny(tmp_path / "base", "llama")
    theirs = save_adapter(tmp_path / "adapter", base, **options)
    status, error = attempt(lambda: run_command("merge", tmp_path / "adapter", tmp_path / "merged"))
    assert (status, error) == (0, None)
    assert "The merged model is in" in capsys.readouterr().out
    model = SimCSEModel.from_pretrained(tmp_path / "merged")
    assert far(model.encode(TEXTS), last_states(theirs, model.tokenizer)) < 1e-5
    names = {*AutoModel.from_pretrained(base).state_dict()}
    assert {*load_file(tmp_path / "merged/model.safetensors")} == names


def test_a_merge_that_goes_wrong_is_not_kept(tmp_path, monkeypatch):
    """What was written is read again, and compared, before anything is said."""
    from simcse_trainer.model.io import saving

    base = save_tiny(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapter", base)

    def unmerged(backbone):
        yield from AutoModel.from_pretrained(base).state_dict().items()

    monkeypatch.setattr(saving, "merged_state", unmerged)
    model = SimCSEModel.from_pretrained(tmp_path / "adapter")
    fails(lambda: model.save_pretrained(tmp_path / "out", lora_save="merged"), "something else")
    assert not list(tmp_path.glob("out/*.safetensors"))


# Options of a kind, beside `target_modules`, with which it fits the tiny model.
OPTIONS = {
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]},
    "LN_TUNING": {"target_modules": ["norm"]},
    "VBLORA": {"vector_length": 16, "num_vectors": 16},
    "FOURIERFT": {"n_frequency": 10},
    "WAVEFT": {"n_frequency": 10},
    "BOFT": {"boft_block_size": 4},
    "OFT": {"oft_block_size": 4},
    "C3A": {"block_size": 8},
    "ADALORA": {"total_step": 10},
    "MISS": {"r": 4},
    "SHIRA": {"r": 4},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 4},
}


def table() -> dict[str, tuple[str, str]]:
    """The rows of the documented table: kind -> read, merged."""
    text = (ROOT / "docs/large_backbones.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ((?:`[A-Z0-9_]+`(?:, )?)+) \| (\w+) \| (\w+)", text, re.M)
    return {kind: (one, two) for kinds, one, two in rows for kind in re.findall("`(.+?)`", kinds)}


QUICK = ["LORA", "IA3", "LN_TUNING", "VERA", "TRAINABLE_TOKENS", "OFT", "PREFIX_TUNING", "XLORA"]


def test_the_table_has_every_kind_of_peft():
    assert {*table()} == {kind.value for kind in PeftType}


@field("42")
@pytest.mark.parametrize("kind", mostly_slow([kind.value for kind in PeftType], QUICK))
def test_each_kind_of_adapter_is_read_and_merged_as_the_table_says(tmp_path, kind):
    """Where it says `refused`, that is one line, and nothing is written."""
    read, merged = table()[kind]
    base = save_tiny(tmp_path / "base", "llama")
    folder = tmp_path / "adapter"
    if read == "refused":
        folder.mkdir()
        said = {"peft_type": kind, "base_model_name_or_path": base, "task_type": None}
        (folder / "adapter_config.json").write_text(json.dumps(said))
        save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        model, error = attempt(lambda: SimCSEModel.from_pretrained(folder))
        assert isinstance(error, InputError), (model, error)
        return
    make = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)]
    options = {"target_modules": TARGETS} | OPTIONS.get(kind, {})
    known = inspect.signature(make).parameters
    theirs = get_peft_model(
        AutoModel.from_pretrained(base), make(**{k: v for k, v in options.items() if k in known})
    )
    randomize(theirs).save_pretrained(folder)
    theirs.eval()
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    model, error = attempt(lambda: SimCSEModel.from_pretrained(folder))
    assert error is None, repr(error)
    expected = last_states(theirs, model.tokenizer)
    assert far(model.encode(TEXTS), expected) < 1e-5
    assert far(SimCSEModel.from_pretrained(base).encode(TEXTS), expected) > 1e-3
    model.save_pretrained(tmp_path / "again", lora_save="adapter")
    again = SimCSEModel.from_pretrained(tmp_path / "again")
    assert far(again.encode(TEXTS), expected) < 1e-5
    _, error = attempt(lambda: model.save_pretrained(tmp_path / "merged", lora_save="merged"))
    if merged == "yes":
        assert error is None, repr(error)
        found = SimCSEModel.from_pretrained(tmp_path / "merged").encode(TEXTS)
        assert far(found, expected) < 1e-4
    else:
        assert isinstance(error, InputError), repr(error)
        assert not list((tmp_path / "merged").glob("*.safetensors"))


def two_adapters(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    for seed, name in enumerate("AB"):
        config = LoraConfig(r=4, target_modules=TARGETS)
        model = get_peft_model(AutoModel.from_pretrained(base), config)
        randomize(model, seed).save_pretrained(tmp_path / name)
        AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / name)
    return [SimCSEModel.from_pretrained(tmp_path / name).encode(TEXTS) for name in "AB"]


@field("46")
@pytest.mark.parametrize("form", ["adapter", "merged", "both"])
def test_the_adapter_that_computes_is_the_one_that_is_saved(tmp_path, form):
    first, second = two_adapters(tmp_path)
    model = SimCSEModel.from_pretrained(tmp_path / "A")
    model.backbone.load_adapter(str(tmp_path / "B"), adapter_name="b")
    model.backbone.set_adapter("b")
    assert far(model.encode(TEXTS), second) < 1e-6
    model.save_pretrained(tmp_path / "saved", lora_save=form)
    for folder in ("saved", *(["saved/adapter"] if form == "both" else [])):
        found = SimCSEModel.from_pretrained(tmp_path / folder).encode(TEXTS)
        assert far(found, second) < 1e-5
        assert far(found, first) > 0.01


@field("46")
@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_an_adapter_of_another_name_is_saved(tmp_path, form):
    base = save_tiny(tmp_path / "base", "llama")
    config = LoraConfig(r=4, target_modules=["q_proj"])
    adapted = get_peft_model(AutoModel.from_pretrained(base), config, adapter_name="query")
    tokenizer = SimCSEModel.from_pretrained(base).tokenizer
    model = SimCSEModel(
        randomize(adapted).eval(), tokenizer, pooling_mode="lasttoken", max_seq_length=40
    )
    _, error = attempt(lambda: model.save_pretrained(tmp_path / "saved", lora_save=form))
    assert error is None, repr(error)
    found = SimCSEModel.from_pretrained(tmp_path / "saved").encode(TEXTS)
    assert far(found, model.encode(TEXTS)) < 1e-5


@pytest.mark.parametrize("change", ["off", "merged", "two"])
def test_an_adapter_that_does_not_compute_as_it_is_saved_is_refused(tmp_path, change):
    two_adapters(tmp_path)
    model = SimCSEModel.from_pretrained(tmp_path / "A")
    backbone = model.backbone
    if change == "off":
        backbone.base_model.disable_adapter_layers()
    elif change == "merged":
        backbone.merge_adapter()
    else:
        backbone.load_adapter(str(tmp_path / "B"), adapter_name="b")
        backbone.base_model.set_adapter(["default", "b"])
    advice = {"off": "enable_adapter_layers()", "merged": "unmerge_adapter()", "two": "set_adapter"}
    fails(lambda: model.save_pretrained(tmp_path / "out"), advice[change])
    assert not list(tmp_path.glob("out/*"))


@field("45d")
@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 2}])
def test_an_adapter_that_does_not_fit_its_base_is_one_line(tmp_path, change, capsys):
    base = save_tiny(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapter", base)
    save_tiny(tmp_path / "base", "llama", **change)
    (tmp_path / "texts.txt").write_text("a dog\n")
    output = ["--output", tmp_path / "x.npy"]
    status, error = attempt(
        lambda: run_command("encode", tmp_path / "adapter", tmp_path / "texts.txt", *output)
    )
    assert (status, error) == (2, None)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("error: The adapter in")
    assert "base_model" in said


@field("45e")
def test_a_target_that_no_layer_has_is_refused(tmp_path):
    from simcse_trainer.model.lora import lora_config

    base = save_tiny(tmp_path / "base", "llama")
    config = lora_config(r=2, target_modules=["q_proj", "nope"])
    model, error = attempt(lambda: SimCSEModel.from_pretrained(base, lora=config))
    assert isinstance(error, InputError), (model, error)
    assert "nope" in str(error)
    assert "q_proj" in str(error)


@field("45f")
@pytest.mark.parametrize("command", ["encode", "search", "evaluate"])
def test_the_base_of_an_adapter_can_be_said_where_it_has_moved(tmp_path, command, capsys):
    base = save_tiny(tmp_path / "base", "llama")
    save_adapter(tmp_path / "adapter", base)
    Path(base).rename(tmp_path / "moved")
    (tmp_path / "texts.txt").write_text("a dog\nthe cat\n")
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\na,dog,1\ncat,mat,2\n")
    words = {
        "encode": [tmp_path / "texts.txt", "--output", tmp_path / "x.npy"],
        "search": ["--corpus", tmp_path / "texts.txt", "a dog"],
        "evaluate": ["--tasks", tmp_path / "pairs.csv"],
    }[command]
    assert attempt(lambda: run_command(command, tmp_path / "adapter", *words)) == (2, None)
    said = capsys.readouterr().err
    assert "base_model" in said
    moved = ["--base_model", tmp_path / "moved"]
    status, error = attempt(lambda: run_command(command, tmp_path / "adapter", *words, *moved))
    assert (status, error) == (0, None), capsys.readouterr().err


def test_a_pickled_adapter_is_refused(tmp_path):
    base = save_tiny(tmp_path / "base", "llama")
    model = save_adapter(tmp_path / "adapter", base)
    model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    fails(lambda: SimCSEModel.from_pretrained(tmp_path / "adapter"), "run code", "safetensors")
    assert PeftModel  # what reads it
