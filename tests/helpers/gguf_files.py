"""Small `.gguf` files, written as llama.cpp's converter writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.tiny import WORDS

HIDDEN, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 32, 4, 2, 64, 2
TOKENS = ["<unk>", "<s>", "</s>", *(f"▁{word}" for word in WORDS), *"▁abcdefghijklmnopqrstuvwxyz"]


def write_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    tied: bool = False,
    kind: str = "Q8_0",
    parts: int = 1,
    without: str = "",
    **metadata: str,
) -> Path:
    """Write a decoder of two layers.

    Args:
        path: The file.
        architecture: The family; the tensors are llama's.
        seed: Of the weights.
        tied: Without an output layer of its own.
        kind: Of the weights, Q8_0 or F32.
        parts: How many files it says to be one of.
        without: A tensor that is left out.
        metadata: `license`, `base_model` (its address).
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    said = {"Q8_0": "MOSTLY_Q8_0", "F32": "ALL_F32"}[kind]
    writer.add_file_type(gguf.LlamaFileType[said])
    if parts > 1:
        writer.add_uint16("split.count", parts)
    if "license" in metadata:
        writer.add_license(metadata["license"])
    if "base_model" in metadata:
        writer.add_base_model_count(1)
        writer.add_base_model_repo_url(0, metadata["base_model"])
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([-float(i) for i in range(len(TOKENS))])
    kinds = gguf.TokenType
    writer.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.NORMAL] * (len(TOKENS) - 3)
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    random = np.random.default_rng(seed)
    kv = HIDDEN // HEADS * KV_HEADS
    shapes = {"token_embd": (len(TOKENS), HIDDEN)}
    if not tied:
        shapes["output"] = shapes["token_embd"]
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        shapes |= {
            f"{block}attn_q": (HIDDEN, HIDDEN),
            f"{block}attn_k": (kv, HIDDEN),
            f"{block}attn_v": (kv, HIDDEN),
            f"{block}attn_output": (HIDDEN, HIDDEN),
            f"{block}ffn_gate": (FEED_FORWARD, HIDDEN),
            f"{block}ffn_up": (FEED_FORWARD, HIDDEN),
            f"{block}ffn_down": (HIDDEN, FEED_FORWARD),
        }
    stored = gguf.GGMLQuantizationType[kind]
    for name, shape in shapes.items():
        weights = random.normal(0, 0.2, shape).astype(np.float32)
        if name != without:
            values = gguf.quants.quantize(weights, stored)
            writer.add_tensor(f"{name}.weight", values, raw_dtype=stored)
    norms = [f"blk.{layer}.{which}_norm" for layer in range(LAYERS) for which in ("attn", "ffn")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
