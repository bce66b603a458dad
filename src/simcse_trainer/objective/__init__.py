"""The training objective: pure tensor code that knows no Trainer, no data set and no file."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "ContrastiveObjective": "contrastive",
        "LogitRules": "logits",
        "MaskedTokens": "mlm",
        "contrastive_logits": "loss",
        "find_false_negatives": "loss",
        "info_nce": "loss",
        "label_position_before": "mlm",
        "mask_tokens": "mlm",
        "mlm_loss": "mlm",
    },
)
