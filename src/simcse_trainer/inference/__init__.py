"""A trained model in use: embeddings, similarities, search, files, a page."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "SimCSE": "simcse",
        "Vectors": "index",
    },
)
