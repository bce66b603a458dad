"""The Trainer: data, checks, checkpoints, resuming, callbacks, a whole run."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "AtomicCheckpoints": "checkpointing",
        "HubCheckpointCallback": "callbacks",
        "SimCSECollator": "dataset",
        "SimCSETrainer": "trainer",
        "find_resume_checkpoint": "resume",
        "run_training": "run",
    },
)
