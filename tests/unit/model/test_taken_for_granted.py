"""Tables, configurations and tokenizers that are not as most are: computed right, or refused."""

import json

import pytest
import torch
from datasets import Dataset
from helpers.checks import attempt, fails
from helpers.tiny import (
    save_tiny,
    tiny_backbone,
    tiny_config,
    tiny_decoder_tokenizer,
    tiny_tokenizer,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    T5EncoderModel,
)

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.model.packing import build_batch

field = pytest.mark.field
TEXTS = ["a man is eating food", "the dog sleeps", "a", "big red cat runs on the small mat"]


def train(model, folder, data=None, **options):
    args = SimCSETrainingArguments(
        output_dir=str(folder), report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, **({"max_steps": 2} | options),
    )  # fmt: skip
    trainer = SimCSETrainer(model, args, Dataset.from_dict(data or {"sent0": TEXTS * 4}))
    trainer.train()
    return trainer


def caught(call):
    """What a call raises, whatever it is: an assertion says whether it is what it should be."""
    return attempt(call)[1]


def noise(folder, padding_free, **options):
    """The largest noise that NEFTune puts on word embeddings of a long and many short texts."""
    model = SimCSEModel(
        tiny_backbone(), tiny_tokenizer(), pooling_mode="mean", padding_free=padding_free
    )
    embeddings, found = model.backbone.get_input_embeddings(), []

    def probe(module, inputs, output):
        if getattr(module, "neftune_noise_alpha", None):
            clean = torch.nn.functional.embedding(inputs[0], module.weight)
            found.append(float((output - clean).abs().max()))

    def late(trainer):  # behind the hook that draws the noise
        embeddings.register_forward_hook(probe)

    from transformers import TrainerCallback

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            late(None) if not found else None

    args = SimCSETrainingArguments(
        output_dir=str(folder), max_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=20, neftune_noise_alpha=5.0, **options,
    )  # fmt: skip
    texts = ["a dog"] * 9 + ["a cat"] * 10 + ["the big red cat runs on the small mat"]
    data = Dataset.from_dict({"sent0": texts, "sent1": texts})
    SimCSETrainer(model, args, data, callbacks=[Look()]).train()
    return max(found)


@field("24a")
@pytest.mark.parametrize("options", [{}, {"mini_batch_size": "5"}])
def test_neftune_noise_of_a_packed_batch_is_that_of_the_padded_one(tmp_path, options):
    packed, padded = (noise(tmp_path / str(free), free, **options) for free in (True, False))
    # 5 / sqrt(L * D), drawn so often that the largest is near it.
    longest = 5 / (11 * 32) ** 0.5
    assert padded == pytest.approx(longest, rel=0.02 if not options else 1.5)
    assert packed == pytest.approx(padded, rel=0.05)


@field("24c")
@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "bert", "electra"])
def test_a_text_that_contains_the_padding_token_has_the_same_positions(family):
    config = tiny_config(family, **({"pad_token_id": 1} if "berta" in family else {}))
    backbone = tiny_backbone(family, **({"pad_token_id": 1} if "berta" in family else {}))
    pad = config.pad_token_id
    rows = [[2, 5, pad, 6, 3], [2, pad, pad, 7, 8, 3], [pad, 9, 3], [2, 5, 3]]
    model = SimCSEModel(backbone, None, pooling_mode="mean").eval()
    assert model.padding_free
    with torch.no_grad():
        found = model(**build_batch(rows, padding_free=True, pad_token_id=pad)).embeddings
        for row, embedding in zip(rows, found, strict=True):
            alone = backbone(
                input_ids=torch.tensor([row]), attention_mask=torch.ones(1, len(row), dtype=int)
            ).last_hidden_state.mean(1)[0]
            torch.testing.assert_close(embedding, alone, rtol=1e-5, atol=1e-5)


@field("25a")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"bf16": True}, {"mini_batch_size": "2"}])
def test_the_mlm_head_of_a_16_bit_checkpoint_trains(tmp_path, dtype, options):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(tiny_config("bert")).to(dtype)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    loaded = SimCSEModel.from_pretrained(tmp_path / "base", dtype="float32", mlm_head=True)
    assert {p.dtype for p in loaded.mlm_head.parameters()} == {torch.float32}
    before = {n: p.clone() for n, p in loaded.mlm_head.named_parameters()}
    error = caught(
        lambda: train(loaded, tmp_path / "out", mlm_weight=0.1, learning_rate=3e-5, **options)
    )
    assert error is None, repr(error)
    # In 16 bits most of so small steps are lost.
    moved = sum(int((before[n] != p).sum()) for n, p in loaded.mlm_head.named_parameters())
    assert moved > 0.5 * sum(p.numel() for p in loaded.mlm_head.parameters())


@field("25b")
def test_random_tokens_of_the_mlm_loss_have_an_embedding(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(4000)])
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(tiny_config("bert")).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model = SimCSEModel.from_pretrained(tmp_path / "base", mlm_head=True, dtype="float32")
    error = caught(lambda: train(model, tmp_path / "out", mlm_weight=0.1, mlm_probability=0.9))
    assert error is None, repr(error)


def save_multimodal(folder, family):
    """A model of texts and images, as small as it can be."""
    text = {
        "gemma3": "gemma3_text",
        "mistral3": "mistral",
        "llava": "llama",
    }[family]
    config = AutoConfig.for_model(family, text_config=tiny_config(text).to_dict())
    vision = config.vision_config
    for name, value in {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "image_size": 28,
        "num_attention_heads": 2, "patch_size": 14, "head_dim": 8,
    }.items():  # fmt: skip
        if hasattr(vision, name):
            setattr(vision, name, value)
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    tiny_decoder_tokenizer().save_pretrained(folder)
    return str(folder)


@field("27b")
@pytest.mark.parametrize("family", ["gemma3", "mistral3", "llava"])
def test_the_language_model_of_a_multimodal_one_is_a_backbone(tmp_path, family):
    name = save_multimodal(tmp_path / "base", family)
    complete = AutoModel.from_pretrained(name).eval()
    found = []
    error = caught(lambda: found.append(SimCSEModel.from_pretrained(name, attention_dropout=0.1)))
    assert error is None, repr(error)
    model = found[0]
    ids = model.tokenizer(TEXTS[0])["input_ids"]
    with torch.no_grad():
        expected = complete.language_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(model.encode(TEXTS)[0], expected, rtol=1e-4, atol=1e-4)
    train(model, tmp_path / "out").save_model()
    again = SimCSEModel.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))


@field("27b")
def test_an_adapter_on_a_part_of_a_model_is_refused_and_the_advice_works(tmp_path):
    from simcse_trainer.model.lora import lora_config

    name = save_multimodal(tmp_path / "base", "gemma3")
    error = caught(lambda: SimCSEModel.from_pretrained(name, lora=lora_config(r=2)))
    assert isinstance(error, InputError), repr(error)
    assert "save_pretrained(folder)" in str(error)
    SimCSEModel.from_pretrained(name).save_pretrained(tmp_path / "folder")
    assert SimCSEModel.from_pretrained(tmp_path / "folder", lora=lora_config(r=2))


@field("27c")
def test_the_encoder_of_an_encoder_decoder_is_refused(tmp_path):
    config = AutoConfig.for_model(
        "t5", d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64
    )
    T5EncoderModel(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    error = caught(lambda: SimCSEModel.from_pretrained(str(tmp_path)).encode(TEXTS))
    assert isinstance(error, InputError), repr(error)
    assert "encoder-decoder (t5)" in str(error)


def without(tokenizer, *names):
    backend = tokenizer.backend_tokenizer
    kept = {
        name: token for name, token in tokenizer.special_tokens_map.items() if name not in names
    }
    return type(tokenizer)(tokenizer_object=backend, model_max_length=40, **kept)


@field("27d")
@pytest.mark.parametrize("missing", [["pad_token"], ["pad_token", "eos_token"]])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_a_tokenizer_without_a_padding_token_is_given_one(tmp_path, missing, family):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    tokenizer = without(tiny_tokenizer(), *missing)
    assert tokenizer.pad_token is None
    name = save_tiny(tmp_path / "base", family, tokenizer=tokenizer)
    model = SimCSEModel.from_pretrained(name, append_eos_token=False)
    model.save_pretrained(tmp_path / "saved")
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = []
    error = caught(lambda: found.append(theirs.encode(TEXTS, convert_to_tensor=True)))
    assert error is None, repr(error)
    torch.testing.assert_close(found[0], model.encode(TEXTS), rtol=1e-5, atol=1e-5)
    # No word has become a special token that texts would be split at.
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert loaded.pad_token in tokenizer.all_special_tokens


@field("27d")
def test_the_padding_token_is_that_of_the_positions(tmp_path):
    """RoBERTa's table has a row for it, that no other token is at."""
    tokenizer = without(tiny_tokenizer(), "pad_token")
    name = save_tiny(tmp_path, "roberta", tokenizer=tokenizer, pad_token_id=3)
    assert SimCSEModel.from_pretrained(name).tokenizer.pad_token_id == 3


def test_a_tokenizer_without_any_special_token_is_refused(tmp_path):
    tokenizer = without(tiny_tokenizer(), "pad_token", "eos_token", "unk_token", "sep_token")
    tokenizer = without(tokenizer, "cls_token", "mask_token")
    if tokenizer.all_special_tokens:
        pytest.skip("this tokenizer keeps some")
    name = save_tiny(tmp_path, tokenizer=tokenizer)
    fails(lambda: SimCSEModel.from_pretrained(name), "no special token")


def ends_with(token, number):
    """A tokenizer that ends texts with a token, as Qwen3-Embedding's does with its padding."""
    from tokenizers import processors

    plain = tiny_decoder_tokenizer(pad_token="[PAD]")
    backend = plain.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {token}", special_tokens=[(token, number)]
    )
    return type(plain)(
        tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
        padding_side="left", model_max_length=40,
    )  # fmt: skip


@field("47")
@pytest.mark.parametrize("last", ["[PAD]", "[SEP]", "[MASK]", None])
def test_a_text_that_ends_with_a_special_token_is_given_no_second_one(tmp_path, last):
    tokenizer = (
        ends_with(last, tiny_tokenizer().convert_tokens_to_ids(last))
        if last
        else tiny_decoder_tokenizer(pad_token="[PAD]")
    )
    name = save_tiny(tmp_path / "base", "qwen3", tokenizer=tokenizer)
    model = SimCSEModel.from_pretrained(name)
    ids = model.tokenizer("a dog")["input_ids"]
    words = [model.tokenizer.convert_tokens_to_ids(word) for word in ("a", "dog")]
    end = model.tokenizer.convert_tokens_to_ids(last or "[SEP]")
    assert ids == [*words, end]
    plain = AutoModel.from_pretrained(name).eval()
    with torch.no_grad():
        expected = plain(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(model.encode("a dog"), expected, rtol=1e-4, atol=1e-4)
    asked = SimCSEModel.from_pretrained(name, append_eos_token=True).tokenizer("a dog")
    assert asked["input_ids"][-1] == model.tokenizer.eos_token_id


@field("27e")
def test_an_adapter_on_resized_word_embeddings_is_refused_before_training(tmp_path):
    """Its file holds no word embeddings: the new rows would be other ones at the next load."""
    from simcse_trainer.model.lora import lora_config

    name = save_tiny(tmp_path / "base")
    model = SimCSEModel.from_pretrained(name, pooling_mode="mean", lora=lora_config(r=2))
    model.backbone.get_base_model().resize_token_embeddings(70)
    error = caught(lambda: train(model, tmp_path / "out", max_steps=1).save_model())
    assert isinstance(error, InputError), repr(error)
    assert "70 word embeddings" in str(error)
    assert not list((tmp_path / "out").glob("*.safetensors"))
    plain = AutoModel.from_pretrained(name)
    plain.resize_token_embeddings(70)
    plain.save_pretrained(tmp_path / "resized")
    AutoTokenizer.from_pretrained(name).save_pretrained(tmp_path / "resized")
    model = SimCSEModel.from_pretrained(
        tmp_path / "resized", pooling_mode="mean", lora=lora_config(r=2)
    )
    train(model, tmp_path / "out2", max_steps=1).save_model()
    again = SimCSEModel.from_pretrained(tmp_path / "out2")
    torch.testing.assert_close(again.encode(TEXTS), model.encode(TEXTS))
    assert json.loads((tmp_path / "resized/config.json").read_text())["vocab_size"] == 70
