"""What options about models can be, apart from the modules that carry them out: for --help."""

DTYPES = ("float32", "bfloat16", "float16")

# pooler: the backbone's own trained pooling layer.
PROJECTION_HEADS = ("mlp", "none", "pooler")

LORA_SAVES = ("adapter", "merged", "both")
