import pytest
import torch
from helpers.tiny import tiny_backbone, tiny_tokenizer

from simcse_trainer import SimCSEModel
from simcse_trainer.analysis.space import encode_tokens


@pytest.mark.parametrize("padding_free", [True, False], ids=["packed", "padded"])
def test_every_layer_of_the_words_alone(padding_free, sentences):
    tokenizer = tiny_tokenizer()
    model = SimCSEModel(tiny_backbone(), tokenizer, padding_free=padding_free).train()
    found = encode_tokens(model, [*sentences, ""], batch_size=2)
    assert model.training
    assert len(found.layers) == 4
    plain, start = SimCSEModel(tiny_backbone(), tokenizer, padding_free=False).backbone.eval(), 0
    for sentence in sorted(sentences, key=lambda text: len(text.split())):
        ids = tokenizer(sentence, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = plain(input_ids=ids, output_hidden_states=True).hidden_states
        end = start + len(sentence.split())
        assert found.token_ids[start:end].tolist() == ids[0, 1:-1].tolist()
        for layer, state in zip(found.layers, states, strict=True):
            assert torch.allclose(layer[start:end], state[0, 1:-1], atol=1e-5)
        start = end
    assert start == len(found.token_ids) == int(found.lengths.sum())
    assert found.lengths.tolist() == [1, 3, 5, 18]


def test_of_many_sentences_some_are_kept(sentences):
    model = SimCSEModel(tiny_backbone(), tiny_tokenizer())
    all_of_them = encode_tokens(model, sentences * 20)
    some = encode_tokens(model, sentences * 20, max_values=4 * 32 * 300)
    assert len(all_of_them.lengths) == 80
    assert 300 / 2 < len(some.token_ids) <= 300
    assert set(some.lengths.tolist()) == {1, 3, 5, 18}
