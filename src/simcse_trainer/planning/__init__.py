"""How much memory a training run will need, computed without weights and without data.

A step is carried out on fake tensors, which have shapes and types and nothing in them, while every
tensor's memory is counted as it is made and freed.
"""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "format_plan": "plan",
        "plan_run": "plan",
    },
)
