"""Files and Hub data sets to checked text columns, to token ids, to batches."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "RetrievalData": "retrieval",
        "load_beir": "retrieval",
        "load_training_data": "loading",
        "tokenize_dataset": "tokenization",
    },
)
