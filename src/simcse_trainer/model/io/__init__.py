"""Folders of models: found, read, written; checkpoints that are complete or absent."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "Layout": "layout",
        "ModelComponents": "loading",
        "find_checkpoint": "checkpoints",
        "find_file": "lookup",
        "load_components": "loading",
        "read_layout": "layout",
        "read_manifest": "manifest",
        "restore_model": "saving",
        "save_model": "saving",
    },
)
