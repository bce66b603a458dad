"""Models and tokenizers as small as they can be, made in memory."""

from __future__ import annotations

from pathlib import Path

import torch

TEXT = "a man is eating the food dog cat runs sleeps on mat big small red child plays"
WORDS = TEXT.split()
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 40,
}

# Some with local attention (Mistral, Gemma), one with absolute positions (GPT-2).
DECODERS = ("llama", "qwen3", "mistral", "gemma3_text", "phi3", "phi", "gpt2")


def tiny_decoder_tokenizer(**options):
    """As of most decoders: nothing around a text, padding on the left."""
    tokenizer = tiny_tokenizer()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = None
    return type(tokenizer)(
        tokenizer_object=backend,
        model_max_length=40,
        eos_token="[SEP]",
        unk_token="[UNK]",
        padding_side="left",
        **options,
    )


def tiny_tokenizer():
    """Word-level, with BERT's special tokens at the places that tiny configurations expect."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = dict(zip(["pad", "unk", "cls", "sep", "mask"], special, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=40,
        **{f"{name}_token": token for name, token in names.items()},
    )


def tiny_config(family: str, **changes):
    """A configuration of a family, as small as it can be."""
    from transformers import AutoConfig

    options = dict(TINY)
    if family in ("roberta", "xlm-roberta", "mpnet"):
        options |= {"pad_token_id": 0, "max_position_embeddings": 42}
    if family == "distilbert":
        options = {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
        options |= {"vocab_size": 64, "max_position_embeddings": 40}
    if family == "electra":
        options |= {"embedding_size": 16}
    if family == "deberta-v2":
        options |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    if family == "modernbert":
        special = {"pad": 0, "cls": 2, "bos": 2, "sep": 3, "eos": 3}
        options |= {f"{name}_token_id": token for name, token in special.items()}
        options |= {"local_attention": 8, "global_attn_every_n_layers": 2}
    if family in DECODERS:
        special = {"pad": 0, "bos": 2, "eos": 3}
        options |= {f"{name}_token_id": token for name, token in special.items()}
        options |= {"num_key_value_heads": 2, "head_dim": 8}
    if family in ("mistral", "gemma3_text"):
        options |= {"sliding_window": 6}
    if family == "gpt2":
        options = {
            k: options[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        }
        options |= {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 40}
    return AutoConfig.for_model(family, **(options | changes))


def tiny_backbone(family: str = "bert", **changes):
    """A backbone with weights large enough that any mistake shows."""
    from transformers import AutoModel

    model = AutoModel.from_config(tiny_config(family, **changes))
    if hasattr(model, "pooler"):
        model.pooler = None
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def save_tiny(folder: Path, family: str = "bert", tokenizer=None, **changes) -> str:
    """A plain pretrained model, as one that is downloaded."""
    tiny_backbone(family, **changes).save_pretrained(folder)
    default = tiny_decoder_tokenizer() if family in DECODERS else tiny_tokenizer()
    (tokenizer or default).save_pretrained(folder)
    return str(folder)
