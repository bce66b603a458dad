"""The model: a backbone, pooling and heads; packed batches; the folder it is kept in (`io`)."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "MLMHead": "heads",
        "POOLING_MODES": "pooling",
        "ProjectionHead": "heads",
        "SimCSEModel": "modeling",
        "SimCSEOutput": "modeling",
        "build_batch": "packing",
        "lora_config": "lora",
    },
)
