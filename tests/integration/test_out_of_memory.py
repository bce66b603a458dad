"""Memory runs out in the middle of a step: the step is repeated in smaller chunks."""

import logging
import random

import pytest
import torch
from helpers.training import NO_DROPOUT, TRIPLETS, UNSUPERVISED, build_args, build_model
from transformers import TrainerCallback

from simcse_trainer import InputError, SimCSETrainer

STEPS = 4


class OutOfMemory:
    """A forward hook that fails at given calls, as CUDA does."""

    def __init__(self, calls: set[int]):
        self.calls = calls
        self.count = 0

    def __call__(self, *_):
        self.count += 1
        if self.count in self.calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Chunks(TrainerCallback):
    """Records the chunk of each micro-batch, or prescribes it."""

    def __init__(self, prescribed=None):
        self.prescribed = prescribed
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.prescribe()

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.grad_cache_step.chunk)
        self.prescribe()

    on_substep_end = on_step_end

    def prescribe(self):
        if self.prescribed and len(self.seen) < len(self.prescribed):
            self.trainer.grad_cache_step.chunk = self.prescribed[len(self.seen)]


def train(folder, *, fail_at=(), prescribed=None, data=TRIPLETS, dropout=True, **options):
    model = build_model(mlm="mlm_weight" in options, **({} if dropout else NO_DROPOUT)).double()
    if not dropout and data is UNSUPERVISED:
        options["augmentation"] = "none"  # asked for, or identical views would be refused
    args = build_args(folder, max_steps=STEPS, mini_batch_size="auto", **options)
    chunks = Chunks(prescribed)
    trainer = SimCSETrainer(model, args, data, callbacks=[chunks])
    chunks.trainer = trainer
    hook = OutOfMemory(set(fail_at))
    model.register_forward_hook(hook)
    trainer.train()
    return model.state_dict(), chunks.seen, hook.count


KINDS = [
    {"data": TRIPLETS},
    {"data": UNSUPERVISED},
    {"data": TRIPLETS, "gradient_accumulation_steps": 2},
    {"data": UNSUPERVISED, "mlm_weight": 0.1},
]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.slow
def test_the_weights_are_those_of_a_run_that_had_the_memory(seed, tmp_path):
    chance = random.Random(seed)
    kind = KINDS[seed % len(KINDS)]
    # At first a step is one call; later failures fall among the smaller chunks.
    first = chance.randint(1, STEPS)
    fail_at = [first, *(first + i for i in chance.sample(range(1, 10), chance.choice([0, 1, 2])))]
    # Dropout draws masks by chunk: with it, the truth is a run that has had the same chunks.
    failed, chunks, _ = train(tmp_path, fail_at=fail_at, **kind)
    had_memory, same, _ = train(tmp_path, prescribed=chunks, **kind)
    assert chunks == same
    assert chunks[-1] is not None
    for name, weight in failed.items():
        assert torch.equal(weight, had_memory[name]), (fail_at, name)
    # Without dropout it is the run that never failed.
    failed, _, calls = train(tmp_path, fail_at=fail_at, dropout=False, **kind)
    never, untouched, fewer = train(tmp_path, dropout=False, **kind)
    assert calls > fewer
    assert set(untouched) == {None}
    for name, weight in never.items():
        torch.testing.assert_close(failed[name], weight, rtol=1e-7, atol=1e-7, msg=name)


def test_it_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        train(tmp_path, fail_at=[2])
    assert caplog.text.count("Out of memory") == 1
    assert "with 12 sentences at a time instead of 24" in caplog.text


def test_a_fixed_chunk_says_what_to_set(tmp_path):
    trainer = SimCSETrainer(build_model(), build_args(tmp_path, mini_batch_size="8"), TRIPLETS)
    trainer.model.register_forward_hook(OutOfMemory({2}))
    with pytest.raises(InputError, match=r"mini_batch_size 8\. Pass mini_batch_size=4, or auto"):
        trainer.train()


def test_one_sentence_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(InputError, match=r"single sentence at a time.*max_seq_length"):
        train(tmp_path, fail_at=range(1, 1000))


def test_other_errors_are_not_swallowed(tmp_path):
    trainer = SimCSETrainer(build_model(), build_args(tmp_path, mini_batch_size="8"), TRIPLETS)

    def fail(*_):
        raise RuntimeError("shapes do not match")

    trainer.model.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()
