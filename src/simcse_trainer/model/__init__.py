"""The sentence encoder: backbone, pooling, heads, and the folder they live in."""

from simcse_trainer.model.modeling import SimCSEModel, SimCSEOutput

__all__ = ["SimCSEModel", "SimCSEOutput"]
