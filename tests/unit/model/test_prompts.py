"""Prompts and end-of-text tokens, in the tokenizer that every loader reads."""

import json

import pytest
import torch
from helpers.checks import fails
from helpers.tiny import save_tiny, tiny_decoder_tokenizer, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from simcse_trainer import SimCSEModel
from simcse_trainer.model.tokenizer import apply_prompt, ends_by_itself, get_prompt

PROMPT = 'This sentence: "{text}" means in one word: "'
TEXTS = ["a man is eating", "a", "", "big small " * 30]


def trained(pre_tokenizer, special, **options):
    """Vocabulary and merges of a byte-pair encoding, learned from a few sentences."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not options else []
    corpus = ["This sentence means in one word: query: a man is eating big small food"] * 20
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    return {"vocab": learned["vocab"], "merges": [tuple(pair) for pair in learned["merges"]]}


def get_bytes(family):
    return family(**trained(pre_tokenizers.ByteLevel(add_prefix_space=False), ["<|endoftext|>"]))


def get_pieces(family):
    metaspace = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    special = ["<unk>", "<s>", "</s>"]
    learned = trained(metaspace, special, unk_token="<unk>", byte_fallback=True)
    return family(**learned, add_bos_token=True)


TOKENIZERS = {
    "bytes, Qwen": lambda: get_bytes(Qwen2Tokenizer),
    "bytes, GPT-2": lambda: get_bytes(GPT2Tokenizer),
    "pieces, Llama": lambda: get_pieces(LlamaTokenizer),
    "words, BERT": tiny_tokenizer,
    "words, decoder": tiny_decoder_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", [None, "query: {text}", PROMPT])
def test_template_and_end_are_read_back_from_the_folder(kind, prompt, tmp_path):
    plain = TOKENIZERS[kind]()
    plain.eos_token = plain.eos_token or "[SEP]"
    tokenizer = apply_prompt(plain, prompt, append_eos=True)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert get_prompt(loaded) == prompt
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=36)["input_ids"]
        assert loaded(text, truncation=True, max_length=36)["input_ids"] == ids
        assert ids[-1] == plain.eos_token_id
        assert ids.count(plain.eos_token_id) == 1
        assert len(ids) <= 36


@pytest.mark.parametrize("kind", ["bytes, Qwen", "bytes, GPT-2", "words, BERT", "words, decoder"])
@pytest.mark.parametrize("prompt", ["query: {text}", "query:{text}", PROMPT, "{text} in one word:"])
def test_tokens_are_those_of_the_whole_text(kind, prompt):
    plain = TOKENIZERS[kind]()
    tokenizer = apply_prompt(plain, prompt, append_eos=False)
    text = "a man is eating"
    assert tokenizer(text)["input_ids"] == plain(prompt.replace("{text}", text))["input_ids"]


@pytest.mark.parametrize("letters", ["가나다", "กขค"])
def test_a_tokenizer_that_has_no_latin_letters(letters):
    """Without an unknown token it drops them: no text of them stands for any."""
    vocab = {token: i for i, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *letters, ":"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert ends_by_itself(tokenizer)
    prompted = apply_prompt(tokenizer, f"{letters[0]}:{{text}}", append_eos=False)
    expected = ["[CLS]", letters[0], ":", letters[1], "[SEP]"]
    assert prompted.convert_ids_to_tokens(prompted(letters[1])["input_ids"]) == expected


def test_a_text_that_is_cut_keeps_the_end_of_the_prompt():
    tokenizer = apply_prompt(get_bytes(Qwen2Tokenizer), PROMPT, append_eos=True)
    ids = tokenizer("a man is eating " * 20, truncation=True, max_length=32)["input_ids"]
    assert len(ids) == 32
    assert tokenizer.decode(ids).startswith('This sentence: "a man')
    assert tokenizer.decode(ids).endswith('" means in one word: "<|endoftext|>')


def test_nothing_to_do_changes_nothing():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = "[SEP]"
    assert apply_prompt(tokenizer, None, append_eos=True) is tokenizer  # ends with it already


@pytest.mark.parametrize("prompt", ["query: ", "{text} {text}", "{texts}"])
def test_a_prompt_without_its_place_is_refused(prompt):
    fails(lambda: apply_prompt(tiny_tokenizer(), prompt, append_eos=False), prompt, "{text}")


def test_a_second_prompt_is_refused_and_the_same_is_taken_once():
    tokenizer = apply_prompt(tiny_tokenizer(), "big {text}", append_eos=False)
    assert apply_prompt(tokenizer, "big {text}", append_eos=False) is tokenizer
    fails(
        lambda: apply_prompt(tokenizer, "red {text}", append_eos=False), "red {text}", "big {text}"
    )


def test_a_model_without_an_end_token_is_refused():
    fails(lambda: apply_prompt(tiny_tokenizer(), None, append_eos=True), "append_eos_token")


def test_all_loaders_apply_the_prompt(tmp_path, sentences):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = save_tiny(tmp_path / "base", "qwen3")
    plain = SimCSEModel.from_pretrained(source, append_eos_token=False)
    model = SimCSEModel.from_pretrained(source, prompt="the {text} sleeps")
    assert plain.tokenizer("dog")["input_ids"] != model.tokenizer("dog")["input_ids"]
    by_hand = [f"the {text} sleeps [SEP]" for text in sentences]
    torch.testing.assert_close(model.encode(sentences), plain.encode(by_hand))
    model.save_pretrained(tmp_path / "saved")
    loaded = SimCSEModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(loaded.encode(sentences), model.encode(sentences))
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    found = theirs.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(found, model.encode(sentences), rtol=1e-5, atol=1e-5)


def test_prompts_of_sentence_transformers(tmp_path, sentences):
    """The one that it applies by itself becomes part of the tokenizer, the others pass through."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    SimCSEModel.from_pretrained(save_tiny(tmp_path / "base"), pooling_mode="mean").save_pretrained(
        tmp_path / "theirs"
    )
    path = tmp_path / "theirs/config_sentence_transformers.json"
    config = json.loads(path.read_text())
    config |= {"prompts": {"big": "big ", "red": "red "}, "default_prompt_name": "red"}
    path.write_text(json.dumps(config))
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "theirs"), device="cpu")
    expected = theirs.encode(sentences, convert_to_tensor=True)
    model = SimCSEModel.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(model.encode(sentences), expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "ours")
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "ours"), device="cpu")
    found = again.encode(sentences, convert_to_tensor=True)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert again.prompts["big"] == "big "


def test_a_prompt_that_leaves_no_room_is_refused(tmp_path):
    source = save_tiny(tmp_path)
    fails(
        lambda: SimCSEModel.from_pretrained(
            source, prompt="the big red cat runs on {text}", max_seq_length=8
        ),
        "max_seq_length is 8",
        "take 8",
    )


def test_a_template_of_version_0_1_0_is_saved_as_others_read_it(tmp_path):
    """Its tokens were called `before` and `after`, which only transformers resolved."""
    model = SimCSEModel.from_pretrained(
        save_tiny(tmp_path / "base", "qwen3"), prompt=PROMPT_OF_WORDS
    )
    model.save_pretrained(tmp_path / "old")
    path = tmp_path / "old/tokenizer.json"
    said = json.loads(path.read_text(encoding="utf-8"))
    ids = model.tokenizer("a")["input_ids"]
    names = [model.tokenizer.convert_ids_to_tokens(i) for i in ids]
    place = names.index("a")
    parts = {"before": slice(None, place), "after": slice(place + 1, None)}
    single = [{"SpecialToken": {"id": name, "type_id": 0}} for name in parts]
    single.insert(1, {"Sequence": {"id": "A", "type_id": 0}})
    said["post_processor"] |= {
        "single": single,
        "special_tokens": {
            name: {"id": name, "ids": ids[part], "tokens": names[part]}
            for name, part in parts.items()
        },
    }
    path.write_text(json.dumps(said), encoding="utf-8")
    (tmp_path / "old/simcse_manifest.json").unlink(missing_ok=True)
    old = SimCSEModel.from_pretrained(tmp_path / "old")
    assert old.tokenizer("a")["input_ids"] == ids
    old.save_pretrained(tmp_path / "new")
    said = json.loads((tmp_path / "new/tokenizer.json").read_text(encoding="utf-8"))
    assert "before" not in said["post_processor"]["special_tokens"]
    new = SimCSEModel.from_pretrained(tmp_path / "new")
    assert new.tokenizer("a")["input_ids"] == ids


PROMPT_OF_WORDS = "the big {text} sleeps"
