"""A trained folder as other tools read it: each by its own rules, written down here.

Their rules, and which versions they were found in, are in the issue that asked for these tests:
transformers.js takes a template token's id for its text; llama.cpp and text-embeddings-inference
read config.json by themselves; fastembed and infinity read tokenizer.json without transformers 5.
"""

from __future__ import annotations

import json
import os
import stat

import pytest
import torch
from helpers.folders import KINDS, TEXTS, make
from helpers.tiny import save_tiny, tiny_config, tiny_decoder_tokenizer, tiny_tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.model.lora import lora_config

field = pytest.mark.field
PROMPTS = [kind for kind in KINDS if "prompt" in kind or "last" in kind]


def known(kind):
    """Options that main 3655698 had: its tests have to fail by what they assert."""
    _, how = KINDS[kind]
    return {name: value for name, value in how.items() if name != "normalize_embeddings"}


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_our_embedding(kind, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model, folder = make(tmp_path, kind)
    expected = model.encode(TEXTS)
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    found = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert theirs.max_seq_length == 24
    again = SimCSEModel.from_pretrained(folder)
    torch.testing.assert_close(again.encode(TEXTS), expected, rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "twice")
    twice = SimCSEModel.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(twice.encode(TEXTS), expected, rtol=1e-5, atol=1e-5)


@field("33a")
@pytest.mark.parametrize("kind", PROMPTS)
def test_a_token_of_the_template_is_called_by_its_text(kind, tmp_path):
    """transformers.js looks a template's token up in the vocabulary by its id."""
    model, folder = make(tmp_path, kind)
    said = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    template = said["post_processor"]
    assert template["type"] == "TemplateProcessing"
    ids = []
    for piece in template["single"]:
        if "Sequence" in piece:
            ids += tokenizer.encode("red cat", add_special_tokens=False).ids
        else:
            ids.append(tokenizer.token_to_id(piece["SpecialToken"]["id"]))
    assert ids == model.tokenizer("red cat")["input_ids"]
    for name, token in template["special_tokens"].items():
        assert name == token["id"] == token["tokens"][0]
        assert len(token["ids"]) == 1


@field("33b")
def test_a_template_may_have_a_token_that_is_punctuation(tmp_path):
    """`query:` has the token `:`, which TemplateProcessing's own notation could not say."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([":", "query"])
    base = save_tiny(tmp_path / "base", tokenizer=tokenizer, vocab_size=80)
    model = SimCSEModel.from_pretrained(base, pooling_mode="mean", prompt="query: {text}")
    ids = model.tokenizer("a dog")["input_ids"]
    assert model.tokenizer.convert_ids_to_tokens(ids)[:3] == ["[CLS]", "query", ":"]
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved/tokenizer.json").read_text(encoding="utf-8"))
    names = [
        p["SpecialToken"]["id"] for p in said["post_processor"]["single"] if "Sequence" not in p
    ]
    assert names == ["[CLS]", "query", ":", "[SEP]"]


@field("33c")
@pytest.mark.parametrize("kind", PROMPTS)
def test_tokenizers_alone_give_the_ids_of_transformers(kind, tmp_path):
    """Long texts too: what is cut is cut at the length that the folder says."""
    model, folder = make(tmp_path, kind)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*TEXTS, "big small " * 40]:
        ids = model.tokenizer(text, truncation=True, max_length=24)["input_ids"]
        assert tokenizer.encode(text).ids == ids


@field("34a")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "both sides" in kind])
def test_both_keys_say_that_a_decoder_attends_to_both_sides(kind, tmp_path):
    _, folder = make(tmp_path, kind)
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert said.get("is_causal") is False
    assert said.get("use_bidirectional_attention") is True


@field("34b")
@pytest.mark.parametrize("padding_free", [True, False])
def test_the_window_of_a_gemma_comes_out_right(padding_free, tmp_path):
    """transformers halves it when it reads the key; the text is longer than the window."""
    base = save_tiny(tmp_path / "base", "gemma3_text")
    options = {"bidirectional_attention": True, "padding_free": padding_free}
    model = SimCSEModel.from_pretrained(base, **options)
    text = "the big red cat runs on the small mat a man is eating food the dog sleeps"
    assert len(model.tokenizer(text)["input_ids"]) > 2 * model.config.sliding_window
    expected = model.encode([text, "a dog"])
    folder = tmp_path / "0"
    model.save_pretrained(folder)
    for turn in (1, 2, 3):
        loaded = SimCSEModel.from_pretrained(folder, padding_free=padding_free)
        assert loaded.padding_free is padding_free
        assert loaded.config.use_bidirectional_attention is True
        assert loaded.config.sliding_window == 6
        torch.testing.assert_close(loaded.encode([text, "a dog"]), expected, rtol=1e-5, atol=1e-5)
        folder = tmp_path / str(turn)
        loaded.save_pretrained(folder)
    plain = AutoModel.from_pretrained(folder).eval()
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        found = plain(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.mean(1)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@field("34c")
def test_a_decoder_that_says_it_by_its_own_key_is_read_as_such(tmp_path):
    """As EmbeddingGemma is: its window is kept, however often it is saved."""
    config = tiny_config("gemma3_text", use_bidirectional_attention=True, sliding_window=10)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "0")
    tiny_decoder_tokenizer().save_pretrained(tmp_path / "0")
    window = AutoConfig.from_pretrained(tmp_path / "0").sliding_window
    for turn in range(3):
        model = SimCSEModel.from_pretrained(tmp_path / str(turn))
        assert model.pooling_mode == "mean"
        assert model.config.sliding_window == window
        model.save_pretrained(tmp_path / str(turn + 1))


@field("35")
@pytest.mark.parametrize("kind", KINDS)
def test_the_class_of_the_tokenizer_is_one_that_older_versions_have(kind, tmp_path):
    base = save_tiny(tmp_path / "base", KINDS[kind][0])
    model = SimCSEModel.from_pretrained(base, **known(kind))
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved/tokenizer_config.json").read_text(encoding="utf-8"))
    assert said["tokenizer_class"] != "TokenizersBackend"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in TEXTS:
        assert loaded(text)["input_ids"] == model.tokenizer(text)["input_ids"]


@field("36")
@pytest.mark.parametrize("kind", ["bert, mean", "qwen3, last", "qwen3, prompt"])
def test_a_folder_says_one_length(kind, tmp_path):
    """The base's tokenizer.json cuts and pads at a length of its own, as all-MiniLM's does."""
    family, _ = KINDS[kind]
    tokenizer = tiny_decoder_tokenizer(pad_token="[PAD]") if family == "qwen3" else tiny_tokenizer()
    base = save_tiny(tmp_path / "base", family, tokenizer=tokenizer)
    path = tmp_path / "base/tokenizer.json"
    backend = Tokenizer.from_file(str(path))
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(path))
    config = tmp_path / "base/tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_length": 8}))
    model = SimCSEModel.from_pretrained(base, max_seq_length=24, **known(kind))
    model.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved"
    said = {name: json.loads((folder / name).read_text()) for name in (
        "tokenizer.json", "tokenizer_config.json", "sentence_bert_config.json"
    )}  # fmt: skip
    assert (said["tokenizer.json"]["truncation"] or {}).get("max_length") == 24
    assert said["tokenizer.json"]["padding"] is None
    assert said["tokenizer_config.json"]["model_max_length"] == 24
    assert said["tokenizer_config.json"].get("max_length", 24) == 24
    assert said["sentence_bert_config.json"]["max_seq_length"] == 24


@field("37")
def test_embeddings_of_length_1_stay_so(tmp_path):
    """all-MiniLM's last module: a store that compares by inner product relies on it."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    base = save_tiny(tmp_path / "base")
    SimCSEModel.from_pretrained(base, pooling_mode="mean").save_pretrained(tmp_path / "0")
    modules = json.loads((tmp_path / "0/modules.json").read_text())
    kind = "sentence_transformers.models.Normalize"
    modules.append({"idx": 2, "name": "2", "path": "2_Normalize", "type": kind})
    (tmp_path / "0/modules.json").write_text(json.dumps(modules))
    model = SimCSEModel.from_pretrained(tmp_path / "0")
    torch.testing.assert_close(model.encode(TEXTS).norm(dim=1), torch.ones(len(TEXTS)))
    model.save_pretrained(tmp_path / "1")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "1"), device="cpu")
    found = theirs.encode(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)))
    torch.testing.assert_close(found, model.encode(TEXTS), rtol=1e-5, atol=1e-5)


ROPE = {
    "theta": ("qwen3", {"rope_parameters": {"rope_theta": 1_000_000.0, "rope_type": "default"}}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 4.0}},
    ),
    "yarn": (
        "qwen3",
        {
            "rope_parameters": {
                "rope_theta": 1e6,
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 20,
            }
        },
    ),
    "llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_theta": 5e5,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 20,
            }
        },
    ),
    "gemma": ("gemma3_text", {}),
    "modernbert": ("modernbert", {}),
}


@field("38")
@pytest.mark.parametrize("kind", ROPE)
def test_rotary_positions_are_said_under_their_older_names_too(kind, tmp_path):
    family, changes = ROPE[kind]
    base = save_tiny(tmp_path / "base", family, **changes)
    model = SimCSEModel.from_pretrained(base, pooling_mode="mean", bidirectional_attention=None)
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved/config.json").read_text(encoding="utf-8"))
    rope = said["rope_parameters"]
    if kind == "gemma":
        assert said.get("rope_theta") == rope["full_attention"]["rope_theta"]
        assert said.get("rope_local_base_freq") == rope["sliding_attention"]["rope_theta"]
    elif kind == "modernbert":
        assert said.get("global_rope_theta") == rope["full_attention"]["rope_theta"]
        assert said.get("local_rope_theta") == rope["sliding_attention"]["rope_theta"]
    else:
        assert said.get("rope_theta") == rope["rope_theta"]
        scaling = said.get("rope_scaling") or {"rope_type": "default"}
        assert scaling["rope_type"] == rope["rope_type"]
        assert scaling.get("factor") == rope.get("factor")
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == (
        AutoConfig.from_pretrained(base).rope_parameters
    )
    found = SimCSEModel.from_pretrained(tmp_path / "saved").encode(TEXTS)
    torch.testing.assert_close(found, model.encode(TEXTS))


@field("39")
@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("kind", ["bert, cls and head", "roberta, two layers", "llama, adapter"])
def test_files_have_the_mode_that_the_umask_gives(kind, mask, tmp_path):
    base = save_tiny(tmp_path / "base", KINDS[kind][0])
    model = SimCSEModel.from_pretrained(base, **known(kind))
    before = os.umask(mask)
    try:
        model.save_pretrained(tmp_path / "saved")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path
    for path in (path for path in (tmp_path / "saved").rglob("*") if path.is_dir()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask, path


@field("39")
def test_an_index_and_a_checkpoint_have_it_too(tmp_path):
    from datasets import Dataset

    from simcse_trainer import SimCSE, SimCSETrainer, SimCSETrainingArguments

    base = save_tiny(tmp_path / "base")
    args = SimCSETrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, report_to=[], use_cpu=True, save_steps=1,
        per_device_train_batch_size=4,
    )  # fmt: skip
    before = os.umask(0o022)
    try:
        simcse = SimCSE(base)
        simcse.build_index(TEXTS)
        simcse.save_index(tmp_path / "index")
        data = Dataset.from_dict({"sent0": TEXTS})
        SimCSETrainer(SimCSEModel.from_pretrained(base), args, data).train()
    finally:
        os.umask(before)
    files = [p for folder in ("index", "run") for p in (tmp_path / folder).rglob("*")]
    found = [path for path in files if path.suffix == ".safetensors"]
    assert len(found) > 2
    for path in found:
        assert stat.S_IMODE(path.stat().st_mode) == 0o644, path
    assert stat.S_IMODE((tmp_path / "index").stat().st_mode) == 0o755


def theirs_and_ours(folder, texts=TEXTS):
    """sentence-transformers' embedding of a folder, and ours or what we say instead."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu")
    try:
        ours = SimCSEModel.from_pretrained(folder).encode(texts)
    except Exception as error:
        return theirs.encode(texts, convert_to_tensor=True), error
    return theirs.encode(texts, convert_to_tensor=True), ours


def write_folder(folder, changes):
    """A folder of sentence-transformers with other settings: file -> keys."""
    SimCSEModel.from_pretrained(save_tiny(folder / "base"), pooling_mode="mean").save_pretrained(
        folder / "theirs"
    )
    for name, keys in changes.items():
        path = folder / "theirs" / name
        said = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(said | keys))
    return folder / "theirs"


@field("30a")
def test_small_letters_are_made_where_a_folder_asks_for_them(tmp_path):
    folder = write_folder(tmp_path, {"sentence_bert_config.json": {"do_lower_case": True}})
    texts = ["A MAN is Eating", "The Dog"]
    theirs, ours = theirs_and_ours(folder, texts)
    assert torch.is_tensor(ours), ours
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    model = SimCSEModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = theirs_and_ours(tmp_path / "ours", texts)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, model.encode(texts))


@field("30b")
def test_a_prompt_that_is_not_pooled_is_not_taken_for_one_that_is(tmp_path):
    from simcse_trainer import InputError

    changes = {
        "1_Pooling/config.json": {"include_prompt": False},
        "config_sentence_transformers.json": {
            "prompts": {"q": "big red "},
            "default_prompt_name": "q",
        },
    }
    _, ours = theirs_and_ours(write_folder(tmp_path, changes))
    assert isinstance(ours, InputError), ours
    assert "include_prompt" in str(ours)


@field("30b")
def test_a_named_prompt_that_is_not_pooled_stays_so(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    changes = {
        "1_Pooling/config.json": {"include_prompt": False},
        "config_sentence_transformers.json": {"prompts": {"q": "big red "}},
    }
    folder = write_folder(tmp_path, changes)
    SimCSEModel.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    found = [
        sentence_transformers.SentenceTransformer(str(one), device="cpu").encode(
            TEXTS, prompt_name="q", convert_to_tensor=True
        )
        for one in (folder, tmp_path / "ours")
    ]
    torch.testing.assert_close(*found)


@field("30c")
@pytest.mark.parametrize("family", ["roberta", "distilbert", "xlm-roberta", "camembert", "albert"])
def test_the_length_of_an_older_folder_is_read(family, tmp_path):
    folder = write_folder(tmp_path, {})
    (folder / "sentence_bert_config.json").unlink()
    (folder / f"sentence_{family}_config.json").write_text('{"max_seq_length": 7}')
    texts = ["the big red cat runs on the small mat"]
    theirs, ours = theirs_and_ours(folder, texts)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert SimCSEModel.from_pretrained(folder).max_seq_length == 7


@field("30d")
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("sentence_bert_config.json", {"module_output_name": "other"}),
        ("sentence_bert_config.json", {"a_setting_to_come": 3}),
        ("1_Pooling/config.json", {"a_setting_to_come": True}),
        ("config_sentence_transformers.json", {"truncate_dim": 8}),
        ("sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}}),
    ],
)
def test_a_setting_that_is_not_understood_is_not_dropped(name, keys, tmp_path):
    from simcse_trainer import InputError

    folder = write_folder(tmp_path, {name: keys})
    try:
        found = SimCSEModel.from_pretrained(folder)
    except Exception as error:
        found = error
    assert isinstance(found, InputError), found
    assert next(iter(keys)) in str(found)


@field("30e")
def test_layers_of_other_weights_are_not_averaged_as_equal(tmp_path):
    from simcse_trainer import InputError

    base = save_tiny(tmp_path / "base")
    SimCSEModel.from_pretrained(base, pooling_mode="avg_first_last").save_pretrained(tmp_path / "x")
    path = tmp_path / "x/1_WeightedLayerPooling/model.safetensors"
    weights = load_file(path)["layer_weights"]
    weights[-1] *= 3
    save_file({"layer_weights": weights}, path)
    try:
        found = SimCSEModel.from_pretrained(tmp_path / "x")
    except Exception as error:
        found = error
    assert isinstance(found, InputError), found


@pytest.mark.parametrize("normalized", [True, False])
def test_the_card_says_the_length_of_embeddings(normalized, tmp_path):
    from simcse_trainer.files import CARD
    from simcse_trainer.hub.run_info import write_merged_card

    base = save_tiny(tmp_path / "base", "llama")
    model = SimCSEModel.from_pretrained(
        base, lora=lora_config(r=2), normalize_embeddings=normalized
    )
    model.save_pretrained(tmp_path / "merged", lora_save="merged")
    write_merged_card(model, tmp_path / "merged")
    text = (tmp_path / "merged" / CARD).read_text(encoding="utf-8")
    assert f"| Length of an embedding | {'1 |' if normalized else 'any: '}" in text
