"""The embedding space looked at: layers, figures, a model against its baseline, a report."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "draw_training_curve": "figures",
        "measure_space": "space",
        "write_report": "report",
    },
)
