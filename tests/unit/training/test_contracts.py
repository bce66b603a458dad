"""What our overrides of transformers' Trainer rely on, as it is in transformers 5.23.

A newer version may move it: these tests then say which override to look at, and what for.
"""

import inspect

import pytest
import transformers
from transformers import Trainer

from simcse_trainer.training.trainer import SimCSETrainer

# Override -> what its reason stands on, in the source of the original or of its caller.
RELIES_ON = {
    "_save": {
        # Called in every process; the check for the first one is inside.
        "save_model": ["state_dict = self.accelerator.get_state_dict(self.model)"],
        "_save": ["if not self.args.should_save and not self.is_distributed_loading"],
    },
    "_save_checkpoint": {
        "_save_checkpoint": [
            "self.save_model(output_dir, _internal_call=True)",
            "run_dir = self._get_output_dir(trial=trial)",
            "best_model_checkpoint",
            "if self.args.push_to_hub:",
        ],
        "_maybe_log_save_evaluate": ["self._save_checkpoint(model, trial)"],
    },
    "_get_output_dir": {"_get_output_dir": ["run_dir = self.args.output_dir"]},
    "_push_from_checkpoint": {"_save_checkpoint": ["self._push_from_checkpoint(output_dir)"]},
    "_finish_current_push": {"_finalize_training": ["self._finish_current_push()"]},
    "_finalize_training": {
        "_finalize_training": [
            "if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:",
            "self.args.save_total_limit == 1",
        ]
    },
    "_load_best_model": {"_finalize_training": ["self._load_best_model()"]},
    "_load_from_checkpoint": {
        "_prepare_for_training": ["self._load_from_checkpoint(resume_from_checkpoint,"],
        "train": ["self._load_from_checkpoint(resume_from_checkpoint)"],
    },
    "_init_training_state": {
        "_inner_training_loop": ["self._init_training_state("],
        "_init_training_state": [
            "epochs_trained = int(self.state.global_step // num_update_steps_per_epoch)",
            "return epochs_trained, steps_trained_in_current_epoch",
        ],
    },
    "_run_epoch": {
        "_inner_training_loop": ["self._run_epoch(", "epoch=epoch,"],
        "_run_epoch": ["skip_first_batches(train_dataloader, steps_trained_in_current_epoch)"],
    },
    "_get_grad_norm": {
        # Called before the optimizer's step, with or without clipping.
        "_inner_training_loop": [],
        "_run_epoch": ["grad_norm = self._get_grad_norm(model, grad_norm=grad_norm)"],
    },
    "_set_signature_columns_if_needed": {
        "_set_signature_columns_if_needed": ["self._signature_columns"]
    },
}
# Methods of the original that we call without overriding them.
CALLED = {
    "_evaluate": ["self.evaluate(ignore_keys=ignore_keys_for_eval)", "self.lr_scheduler.step("],
    "_determine_best_metric": ["best_global_step", "return is_new_best_metric"],
}


def overrides() -> set[str]:
    """Private methods of Trainer that our classes replace."""
    ours = SimCSETrainer.__mro__[: SimCSETrainer.__mro__.index(Trainer)]
    names = {name for one in ours for name in vars(one)}
    return {
        n for n in names if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n)
    }


def source(name: str) -> str:
    return inspect.getsource(getattr(Trainer, name))


def test_every_override_of_a_private_method_says_what_it_relies_on():
    assert overrides() == {*RELIES_ON}


@pytest.mark.parametrize("override", RELIES_ON)
def test_transformers_does_what_an_override_relies_on(override):
    for method, fragments in RELIES_ON[override].items():
        for fragment in fragments:
            assert fragment in source(method), (
                f"transformers {transformers.__version__} changed Trainer.{method} since 5.23: "
                f"look at our {override}"
            )


@pytest.mark.parametrize("name", CALLED)
def test_transformers_has_what_we_call(name):
    assert all(fragment in source(name) for fragment in CALLED[name])


@pytest.mark.parametrize("name", sorted(overrides()))
def test_an_override_takes_what_the_original_takes(name):
    original = inspect.signature(getattr(Trainer, name)).parameters
    ours = inspect.signature(getattr(SimCSETrainer, name)).parameters
    kinds = {parameter.kind for parameter in ours.values()}
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        assert [*original] == [*ours][: len(original)]
