"""What a commit is called."""

import pytest

from simcse_trainer.hub.stage import get_commit_message


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        (None, "step 5: faq_ndcg_at_10 61.00"),
        ("eval_recall_at_10", "step 5: recall_at_10 82.00"),
        ("faq_mrr_at_10", "step 5: faq_mrr_at_10 43.00"),
    ],
)
def test_a_commit_is_named_by_retrieval(metric, said):
    scores = {"eval_faq_ndcg_at_10": 61.0, "eval_faq_mrr_at_10": 43.0, "eval_recall_at_10": 82.0}
    state = {"log_history": [{"step": 5, "loss": 1.0}, {"step": 5, **scores}]}
    assert get_commit_message(state, 5, metric) == said
