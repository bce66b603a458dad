"""The training objective: pure tensor code that knows no Trainer, no data set and no file."""

from simcse_trainer.objective.contrastive import ContrastiveObjective
from simcse_trainer.objective.info_nce import contrastive_logits, find_false_negatives, info_nce
from simcse_trainer.objective.mlm import MaskedTokens, mask_tokens, mlm_loss

__all__ = [
    "ContrastiveObjective",
    "MaskedTokens",
    "contrastive_logits",
    "find_false_negatives",
    "info_nce",
    "mask_tokens",
    "mlm_loss",
]
