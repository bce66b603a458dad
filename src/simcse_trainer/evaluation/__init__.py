"""Scores of embeddings: similarity, transfer, and how they are spread in space."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "alignment": "space",
        "anisotropy": "space",
        "evaluate_retrieval": "retrieval",
        "evaluate_sts": "sts",
        "load_sts_tasks": "sts",
        "uniformity": "space",
    },
)
