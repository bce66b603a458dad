"""Every option and public method of transformers' Trainer 5.23: it works, or is refused by name.

A row that works names the test that shows its effect: one of this file's `EFFECTS` and `CALLS`, or
`file::test`. A row that is refused is in `simcse_trainer.training.validation`.
"""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from helpers import ROOT
from helpers.checks import mostly_slow, refusal
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from simcse_trainer import SimCSEModel, SimCSETrainer
from simcse_trainer.training import grad_cache_step


def started(folder: Path, **options) -> SimCSETrainer:
    scored = bool(options.get("eval_strategy") or options.get("eval_on_start"))
    data = {"stsb": Dataset.from_dict(PAIRS)} if scored else None
    args = build_args(folder, **({"max_steps": 2} | options))
    trainer = SimCSETrainer(build_model(), args, TRIPLETS, data)
    trainer.train()
    return trainer


def group(trainer, name):
    return trainer.optimizer.param_groups[0][name]


def losses(trainer) -> list[dict]:
    return [one for one in trainer.state.log_history if "loss" in one]


def evaluations(trainer) -> list[int]:
    return [one["step"] for one in trainer.state.log_history if "eval_avg_sts" in one]


def checkpoints(trainer) -> list[int]:
    folder = Path(trainer.args.output_dir)
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def batches(trainer, count: int = 2) -> list[list[int]]:
    """Lengths of the sentences of the first batches."""
    return [
        batch["lengths"].tolist()
        for _, batch in zip(range(count), trainer.get_train_dataloader(), strict=False)
    ]


def get_best_checkpoint(trainer, choose) -> bool:
    log = trainer.state.log_history
    found = [one["eval_avg_sts"] for one in log if "eval_avg_sts" in one]
    return trainer.state.best_metric == choose(found)


def moved(trainer) -> float:
    """The largest change of a weight since the start."""
    start = build_model().state_dict()
    return max(float((x - start[n]).abs().max()) for n, x in trainer.model.state_dict().items())


def get_checkpointing(trainer) -> dict:
    layer = vars(trainer.model.backbone.encoder.layer[0])
    return next(x for n, x in layer.items() if n.endswith("checkpointing_func")).keywords


def lengths_of_rows(trainer, count: int) -> list[int]:
    rows = trainer.train_dataset[:count]["input_ids"]
    return [len(ids) for view in zip(*rows, strict=True) for ids in view]


def dtype_seen(trainer) -> torch.dtype:
    seen = []
    linear = trainer.model.backbone.encoder.layer[0].output.dense
    handle = linear.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    trainer.training_step(trainer.model_wrapped, next(iter(trainer.get_train_dataloader())))
    handle.remove()
    return seen[0]


STEPS = {"save_strategy": "steps", "save_steps": 1}
EVERY = {"eval_strategy": "steps", "eval_steps": 1}
# Option -> options of a run of two steps, and what is true of it then, and not by default.
EFFECTS = {
    "learning_rate": (
        {"learning_rate": 0.5, "lr_scheduler_type": "constant"},
        lambda t: group(t, "lr") == 0.5,
    ),
    "per_device_train_batch_size": (
        {"per_device_train_batch_size": 5},
        lambda t: len(batches(t)[0]) == 15,
    ),
    "num_train_epochs": (
        {"num_train_epochs": 1.0, "max_steps": -1},
        lambda t: t.state.global_step == 5,
    ),
    "max_steps": ({"max_steps": 3}, lambda t: t.state.global_step == 3),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, lambda t: group(t, "lr") == 1e-3),
    "lr_scheduler_kwargs": (
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 7e-4}},
        lambda t: group(t, "lr") == pytest.approx(7e-4),
    ),
    "warmup_steps": ({"warmup_steps": 2}, lambda t: losses(t)[0]["learning_rate"] == 0.0),
    "optim": ({"optim": "sgd"}, lambda t: type(t.optimizer.optimizer).__name__ == "SGD"),
    "optim_args": (
        {"optim": "sgd", "optim_args": "momentum=0.3"},
        lambda t: group(t, "momentum") == 0.3,
    ),
    "weight_decay": ({"weight_decay": 0.3}, lambda t: group(t, "weight_decay") == 0.3),
    "adam_beta1": ({"adam_beta1": 0.3}, lambda t: group(t, "betas")[0] == 0.3),
    "adam_beta2": ({"adam_beta2": 0.3}, lambda t: group(t, "betas")[1] == 0.3),
    "adam_epsilon": ({"adam_epsilon": 0.3}, lambda t: group(t, "eps") == 0.3),
    "gradient_accumulation_steps": (
        {"gradient_accumulation_steps": 2},
        lambda t: t.state.epoch == pytest.approx(0.8),
    ),
    "max_grad_norm": (
        {"max_grad_norm": 1e-12, "optim": "sgd", "learning_rate": 1.0},
        lambda t: moved(t) < 1e-6,
    ),
    "bf16": ({"bf16": True}, lambda t: dtype_seen(t) == torch.bfloat16),
    "activation_checkpointing": (
        {"activation_checkpointing": True},
        lambda t: t.model.backbone.is_activation_checkpointing,
    ),
    "activation_checkpointing_kwargs": (
        {
            "activation_checkpointing": True,
            "activation_checkpointing_kwargs": {"use_reentrant": True},
        },
        lambda t: get_checkpointing(t)["use_reentrant"] is True,
    ),
    "logging_strategy": ({"logging_strategy": "no"}, lambda t: not losses(t)),
    "logging_steps": ({"logging_steps": 2}, lambda t: [one["step"] for one in losses(t)] == [2]),
    "logging_first_step": (
        {"logging_steps": 50, "logging_first_step": True},
        lambda t: losses(t)[0]["step"] == 1,
    ),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "all"},
        lambda t: t.state.num_input_tokens_seen == sum(map(sum, batches(t))),
    ),
    "eval_strategy": (EVERY, lambda t: evaluations(t) == [1, 2]),
    "eval_steps": (EVERY | {"eval_steps": 2}, lambda t: evaluations(t) == [2]),
    "eval_delay": (EVERY | {"eval_delay": 2}, lambda t: evaluations(t) == [2]),
    "eval_on_start": ({"eval_on_start": True}, lambda t: evaluations(t) == [0]),
    "save_strategy": (STEPS, lambda t: checkpoints(t) == [1, 2]),
    "save_steps": (STEPS | {"save_steps": 2}, lambda t: checkpoints(t) == [2]),
    "save_total_limit": (STEPS | {"save_total_limit": 1}, lambda t: checkpoints(t) == [2]),
    "save_only_model": (
        STEPS | {"save_only_model": True},
        lambda t: not list(Path(t.args.output_dir).rglob("optimizer.pt")),
    ),
    "load_best_model_at_end": (
        STEPS | EVERY | {"load_best_model_at_end": True},
        lambda t: t.weights_step == t.state.best_global_step,
    ),
    "metric_for_best_model": (
        STEPS | EVERY | {"metric_for_best_model": "avg_sts", "load_best_model_at_end": True},
        lambda t: get_best_checkpoint(t, max),
    ),
    "greater_is_better": (
        STEPS | EVERY | {"metric_for_best_model": "avg_sts", "greater_is_better": False},
        lambda t: get_best_checkpoint(t, min),
    ),
    "full_determinism": (
        {"full_determinism": True},
        lambda t: torch.are_deterministic_algorithms_enabled(),
    ),
    "dataloader_drop_last": (
        {"per_device_train_batch_size": 16, "dataloader_drop_last": True},
        lambda t: len(t.get_train_dataloader()) == 2,
    ),
    "dataloader_num_workers": (
        {"dataloader_num_workers": 1},
        lambda t: t.get_train_dataloader().num_workers == 1,
    ),
    "dataloader_pin_memory": (
        {"dataloader_pin_memory": False},
        lambda t: not t.get_train_dataloader().pin_memory,
    ),
    "dataloader_prefetch_factor": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3},
        lambda t: t.get_train_dataloader().prefetch_factor == 3,
    ),
    "dataloader_multiprocessing_context": (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"},
        lambda t: t.get_train_dataloader().multiprocessing_context.get_start_method() == "fork",
    ),
    "dataloader_in_order": (
        {"dataloader_num_workers": 1, "dataloader_in_order": False},
        lambda t: not t.get_train_dataloader().base_dataloader.in_order,
    ),
    "skip_memory_metrics": (
        EVERY | {"skip_memory_metrics": False},
        lambda t: any("eval_mem_cpu_alloc_delta" in t.evaluate() for _ in [0]),
    ),
    "train_sampling_strategy": (
        {"train_sampling_strategy": "sequential"},
        lambda t: (
            batches(t, 1)[0]
            == [
                len(ids)
                for view in zip(*t.train_dataset[:8]["input_ids"], strict=True)
                for ids in view
            ]
        ),
    ),
    "accelerator_config": (
        {"accelerator_config": {"use_seedable_sampler": False}},
        lambda t: t.accelerator.use_seedable_sampler is False,
    ),
    "disable_tqdm": (
        {"disable_tqdm": False},
        lambda t: any(
            type(one).__name__ == "ProgressCallback" for one in t.callback_handler.callbacks
        ),
    ),
}

EFFECTS |= {
    "use_cpu": ({}, lambda t: t.args.device.type == "cpu"),
    "torch_compile": (
        {"torch_compile": True, "torch_compile_backend": "eager"},
        lambda t: hasattr(t.model_wrapped, "_orig_mod"),
    ),
    "torch_compile_backend": (
        {"torch_compile": True, "torch_compile_backend": "eager"},
        lambda t: t.accelerator.state.dynamo_plugin.backend.value == "EAGER",
    ),
    "torch_compile_mode": (
        {"torch_compile_backend": "eager", "torch_compile_mode": "default"},
        lambda t: t.accelerator.state.dynamo_plugin.mode == "default",
    ),
    "per_device_eval_batch_size": (
        EVERY | {"per_device_eval_batch_size": 1},
        lambda t: get_calls(t) == len({*PAIRS["sentence1"], *PAIRS["sentence2"]}),
    ),
    "log_level": ({"log_level": "error"}, lambda t: t.args.get_process_log_level() == 40),
    "ddp_find_unused_parameters": (
        {"ddp_find_unused_parameters": False},
        lambda t: t.accelerator.ddp_handler.find_unused_parameters is False,
    ),
    "ddp_bucket_cap_mb": (
        {"ddp_bucket_cap_mb": 7},
        lambda t: t.accelerator.ddp_handler.bucket_cap_mb == 7,
    ),
    "ddp_broadcast_buffers": (
        {"ddp_broadcast_buffers": False},
        lambda t: t.accelerator.ddp_handler.broadcast_buffers is False,
    ),
    "ddp_static_graph": (
        {"ddp_static_graph": True},
        lambda t: t.accelerator.ddp_handler.static_graph is True,
    ),
}

_HUB, _HERE = "tests/hub", "tests/integration"
# Option -> the test that shows its effect.
ELSEWHERE = {
    "output_dir": f"{_HERE}/test_train.py::test_a_run_ends_with_scores_neighbours_and_a_folder",
    "optim_target_modules": f"{_HERE}/test_trainer_table.py::test_target_modules_of_an_optimizer",
    "torch_empty_cache_steps": f"{_HERE}/test_trainer_table.py::test_a_cache_that_is_emptied",
    "remove_unused_columns": f"{_HERE}/test_trainer_table.py::test_columns_that_are_not_removed",
    "restore_callback_states_from_checkpoint": (
        f"{_HERE}/test_trainer_table.py::test_callbacks_that_are_restored"
    ),
    "fp16": f"{_HERE}/test_one_fact.py::test_half_precision_that_a_cpu_does_not_have_is_refused",
    "gradient_checkpointing": (
        f"{_HERE}/test_grad_cache.py::test_gradient_checkpointing_draws_the_same_masks"
    ),
    "gradient_checkpointing_kwargs": (
        f"{_HERE}/test_grad_cache.py::test_gradient_checkpointing_draws_the_same_masks"
    ),
    "auto_find_batch_size": (
        f"{_HERE}/test_one_fact.py::test_the_card_and_the_run_file_say_the_batch_that_was_found"
    ),
    "report_to": f"{_HERE}/test_train.py::test_options_that_do_not_go_together",
    "push_to_hub": f"{_HUB}/test_push.py::test_the_hub_does_not_change_what_is_trained",
    "hub_token": f"{_HUB}/test_nothing_lost.py::test_the_token_appears_nowhere",
    "hub_private_repo": (
        f"{_HUB}/test_push.py::test_a_private_repository_is_refused_without_a_token"
    ),
    "hub_model_id": (
        f"{_HUB}/test_push.py::test_what_cannot_be_pushed_is_one_line_before_the_first_step"
    ),
    "hub_strategy": (
        f"{_HUB}/test_command_line.py::test_only_the_final_model_where_that_is_asked_for"
    ),
    "hub_always_push": (
        f"{_HUB}/test_nothing_lost.py::test_a_save_during_an_upload_is_pushed_afterwards"
    ),
    "hub_revision": (
        f"{_HUB}/test_other_peoples_files.py::test_a_run_on_another_branch_leaves_the_tags_of_main"
    ),
    "resume_from_checkpoint": (
        f"{_HERE}/test_train.py::test_a_finished_run_is_resumed_or_refused_never_overwritten"
    ),
    "fsdp": "tests/distributed/test_engines.py::test_fsdp2",
    "fsdp_config": "tests/distributed/test_engines.py::test_fsdp2",
    "deepspeed": "tests/distributed/test_engines.py::test_zero2",
    "seed": f"{_HERE}/test_trainer_table.py::test_seeds",
    "data_seed": f"{_HERE}/test_trainer_table.py::test_seeds",
    "ignore_data_skip": f"{_HERE}/test_trainer_table.py::test_data_that_is_not_skipped",
    "length_column_name": f"{_HERE}/test_trainer_table.py::test_rows_of_like_length_come_together",
    "neftune_noise_alpha": "tests/unit/model/test_taken_for_granted.py::"
    "test_neftune_noise_of_a_packed_batch_is_that_of_the_padded_one",
}
# Option -> who reads it: nothing of ours stands between.
PASSED_ON = {
    "tf32": "torch, on GPUs",
    "log_level_replica": "the launcher's other processes",
    "log_on_each_node": "the launcher's other machines",
    "ddp_backend": "torch.distributed, when the processes meet",
    "ddp_timeout": "torch.distributed, when the processes meet",
    "run_name": "a tracker",
    "project": "a tracker",
    "trackio_space_id": "a tracker",
    "trackio_bucket_id": "a tracker",
    "trackio_static_space_id": "a tracker",
    "do_train": "scripts that do not always train; this one does",
    "do_eval": "set by eval_strategy",
    "local_rank": "the launcher",
}

# Method -> a call of it, and what is true then.
CALLS = {
    "add_callback": lambda t: t.add_callback(Note()) is None and has_note(t),
    "pop_callback": lambda t: (
        t.add_callback(Note) is None and isinstance(t.pop_callback(Note), Note)
    ),
    "remove_callback": lambda t: (
        t.add_callback(Note) is None and t.remove_callback(Note) is None and not has_note(t)
    ),
    "autocast_smart_context_manager": lambda t: t.autocast_smart_context_manager() is not None,
    "compute_loss": lambda t: t.compute_loss(t.model, get_batch(t)) > 0,
    "compute_loss_context_manager": lambda t: t.compute_loss_context_manager() is not None,
    "create_accelerator_and_postprocess": lambda t: t.create_accelerator_and_postprocess() is None,
    "create_model_card": lambda t: (
        t.create_model_card() is None and (Path(t.args.output_dir) / "README.md").is_file()
    ),
    "create_optimizer": lambda t: t.create_optimizer() is not None,
    "create_optimizer_and_scheduler": lambda t: t.create_optimizer_and_scheduler(5) is None,
    "create_scheduler": lambda t: t.create_scheduler(5, t.create_optimizer()) is not None,
    "evaluate": lambda t: "eval_avg_sts" in t.evaluate(Dataset.from_dict(PAIRS)),
    "floating_point_ops": lambda t: t.floating_point_ops(get_batch(t)) >= 0,
    "get_batch_samples": lambda t: (
        len(t.get_batch_samples(iter(t.get_train_dataloader()), 2, t.args.device)[0]) == 2
    ),
    "get_cp_size": lambda t: t.get_cp_size() == 1,
    "get_sp_size": lambda t: t.get_sp_size() == 1,
    "get_tp_size": lambda t: t.get_tp_size() == 1,
    "get_decay_parameter_names": lambda t: any(
        name.startswith("backbone.") for name in t.get_decay_parameter_names(t.model)
    ),
    "get_learning_rates": lambda t: len(t.get_learning_rates()) == 2,
    "get_num_trainable_parameters": lambda t: (
        t.get_num_trainable_parameters() == sum(one.numel() for one in t.model.parameters())
    ),
    "get_optimizer_cls_and_kwargs": lambda t: issubclass(
        t.get_optimizer_cls_and_kwargs(t.args)[0], torch.optim.Optimizer
    ),
    "get_optimizer_group": lambda t: len(t.get_optimizer_group()) == 2,
    "get_total_train_batch_size": lambda t: t.get_total_train_batch_size(t.args) == 8,
    "get_train_dataloader": lambda t: len(t.get_train_dataloader()) == 5,
    "is_local_process_zero": lambda t: t.is_local_process_zero(),
    "is_world_process_zero": lambda t: t.is_world_process_zero(),
    "log": lambda t: t.log({"mine": 1.0}) is None and t.state.log_history[-1]["mine"] == 1.0,
    "log_metrics": lambda t: t.log_metrics("train", {"loss": 1.0}) is None,
    "loss_is_scaled_for_ga": lambda t: t.loss_is_scaled_for_ga is False,
    "metrics_format": lambda t: "loss" in type(t).metrics_format({"loss": 1.0}),
    "num_examples": lambda t: t.num_examples(t.get_train_dataloader()) == 40,
    "save_metrics": lambda t: (
        t.save_metrics("train", {"loss": 1.0}) is None
        and (Path(t.args.output_dir) / "train_results.json").is_file()
    ),
    "save_model": lambda t: (
        t.save_model() is None
        and SimCSEModel.from_pretrained(t.args.output_dir).encode("a dog").isfinite().all()
    ),
    "save_state": lambda t: (
        t.save_state() is None and (Path(t.args.output_dir) / "trainer_state.json").is_file()
    ),
    "set_initial_training_values": lambda t: (
        t.set_initial_training_values(t.args, t.get_train_dataloader())[-1] == 2
    ),
    "store_flos": lambda t: t.store_flos() is None and t.current_flos == 0,
    "train": lambda t: t.train().global_step == 2,
    "training_step": lambda t: t.training_step(t.model, get_batch(t)) > 0,
    "end": lambda t: callable(t.end),
}
CALLED_ELSEWHERE = {
    "push_to_hub": f"{_HUB}/test_nothing_lost.py::test_the_trainer_can_push_once_the_hub_is_back",
    "init_hf_repo": f"{_HUB}/test_push.py::test_the_hub_does_not_change_what_is_trained",
    # Only with model_init, which is refused.
    "call_model_init": (
        f"{_HERE}/test_trainer_table.py::test_an_argument_without_meaning_is_refused"
    ),
}


class Note(TrainerCallback):
    pass


def has_note(trainer) -> bool:
    return any(isinstance(one, Note) for one in trainer.callback_handler.callbacks)


def get_batch(trainer) -> dict:
    return trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))


def get_calls(trainer) -> int:
    calls = []
    handle = trainer.model.register_forward_hook(lambda *_: calls.append(1))
    trainer.evaluate()
    handle.remove()
    return len(calls)


def public(owner: type) -> set[str]:
    return {name for name in dir(owner) if not name.startswith("_")}


def test_the_table_has_every_option_and_every_method_once():
    from simcse_trainer.training.validation import REFUSED_METHODS, REFUSED_OPTIONS

    tables = [EFFECTS, ELSEWHERE, PASSED_ON, REFUSED_OPTIONS]
    named = [name for table in tables for name in table]
    assert sorted(named) == sorted({*named}), "a row twice"
    assert {*named} == {field.name for field in dataclasses.fields(TrainingArguments)}
    methods = [name for table in (CALLS, CALLED_ELSEWHERE, REFUSED_METHODS) for name in table]
    assert sorted(methods) == sorted(public(Trainer))


@pytest.mark.parametrize("where", sorted({*ELSEWHERE.values(), *CALLED_ELSEWHERE.values()}))
def test_the_tests_that_the_table_names_are_there(where):
    path, name = where.split("::")
    assert re.search(rf"^ *def {name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture
def undo():
    """What some options set for the whole process."""
    yield
    torch.use_deterministic_algorithms(False)
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


COMPILED = {"torch_compile", "torch_compile_mode", "torch_compile_backend"}  # seconds each


@pytest.mark.parametrize("name", mostly_slow(EFFECTS, {*EFFECTS} - COMPILED))
def test_an_option_has_its_effect(name, tmp_path, undo):
    options, holds = EFFECTS[name]
    assert holds(started(tmp_path, **options))


@pytest.mark.parametrize("name", CALLS)
def test_a_method_does_what_it_is_for(name, tmp_path):
    assert CALLS[name](started(tmp_path))


def get_value(name: str) -> object:
    """Something else than the default of an option."""
    given = {
        "label_names": ["labels"],
        "include_for_metrics": ["loss"],
        "liger_kernel_config": {"rope": True},
        "eval_accumulation_steps": 3,
        "label_smoothing_factor": 0.1,
        "parallelism_config": object(),
        "debug": ["underflow_overflow"],
    }
    if name in given:
        return given[name]
    default = next(f.default for f in dataclasses.fields(TrainingArguments) if f.name == name)
    assert isinstance(default, bool), name
    return not default


REFUSED = [
    "average_tokens_across_devices",
    "label_smoothing_factor",
    "label_names",
    "include_for_metrics",
    "bf16_full_eval",
    "fp16_full_eval",
    "prediction_loss_only",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "eval_accumulation_steps",
    "batch_eval_metrics",
    "do_predict",
    "use_liger_kernel",
    "liger_kernel_config",
    "use_cache",
    "logging_nan_inf_filter",
    "parallelism_config",
    "enable_jit_checkpoint",
    "save_on_each_node",
    "dataloader_persistent_workers",
    "debug",
]


@pytest.mark.field("20a")
@pytest.mark.parametrize("name", REFUSED)
def test_an_option_without_meaning_is_refused_by_its_name(name, tmp_path):
    args = build_args(tmp_path, dataloader_num_workers=1)
    setattr(args, name, get_value(name))  # some need a GPU, or another package, to be made
    said = refusal(lambda: SimCSETrainer(build_model(), args, TRIPLETS))
    assert said.startswith(f"{name} is ")
    assert "\n" not in said


@pytest.mark.field("20b")
@pytest.mark.parametrize(
    "name", ["compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func", "model_init"]
)
def test_an_argument_without_meaning_is_refused(name, tmp_path):
    given = {name: lambda *args, **kwargs: None}
    said = ""
    try:
        SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS, **given)
    except Exception as error:
        said = str(error)
    assert said.startswith(f"SimCSETrainer takes no {name}: ")


@pytest.mark.field("20c")
@pytest.mark.parametrize(
    "name",
    [
        "predict",
        "evaluation_loop",
        "prediction_step",
        "get_eval_dataloader",
        "get_test_dataloader",
        "hyperparameter_search",
    ],
)
def test_a_method_without_meaning_says_what_to_call(name, tmp_path):
    trainer = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS)
    said = ""
    try:
        getattr(trainer, name)(Dataset.from_dict(PAIRS))
    except Exception as error:
        said = str(error)
    assert said.startswith(f"SimCSETrainer has no {name}. ")
    assert "trainer.e" in said


@pytest.mark.field("20d")
@pytest.mark.field("24b")
def test_rows_of_like_length_come_together(tmp_path):
    both = {"seed": 3, "per_device_train_batch_size": 2}
    args = build_args(tmp_path, train_sampling_strategy="group_by_length", **both)
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
    spread = [max(one) - min(one) for one in batches(trainer, 20)]
    plain = SimCSETrainer(build_model(), build_args(tmp_path, **both), UNSUPERVISED)
    assert sum(spread) < sum(max(one) - min(one) for one in batches(plain, 20)) / 2
    own = build_args(tmp_path, train_sampling_strategy="group_by_length", length_column_name="n")
    data = trainer.train_dataset.rename_column("length", "n")
    trainer = SimCSETrainer(build_model(), own, data)
    assert trainer.train().global_step == 6
    said = refusal(lambda: SimCSETrainer(build_model(), args, UNSUPERVISED.to_iterable_dataset()))
    assert "train_sampling_strategy" in said


@pytest.mark.field("20e")
@pytest.mark.parametrize("chunk", [None, 3])
def test_schedule_free_optimizers_are_evaluated_and_saved_at_what_they_are_about(chunk, tmp_path):
    pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "steps", "save_steps": 4, "max_steps": 4, "mini_batch_size": chunk}
    args = build_args(tmp_path, **options)
    trainer = SimCSETrainer(build_model(), args, TRIPLETS, {"stsb": Dataset.from_dict(PAIRS)})
    try:
        trainer.train()
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    trainer.optimizer.train()
    scored = trainer.evaluate()["eval_avg_sts"]
    trainer.optimizer.train()
    trainer.save_model(str(tmp_path / "final"))
    trainer.optimizer.eval()
    averaged = trainer.model.eval().encode(PAIRS["sentence1"])
    assert trainer.evaluate()["eval_avg_sts"] == scored
    for folder in ("final", "checkpoint-4"):
        saved = SimCSEModel.from_pretrained(tmp_path / folder)
        torch.testing.assert_close(saved.encode(PAIRS["sentence1"]), averaged, msg=folder)


def test_seeds(tmp_path):
    def order(**options) -> list:
        args = build_args(tmp_path, **options)
        return batches(SimCSETrainer(build_model(), args, UNSUPERVISED), 5)

    assert order(seed=1) == order(seed=1) != order(seed=2)
    assert order(seed=1, data_seed=2) == order(seed=2)


def test_data_that_is_not_skipped(tmp_path):
    def run(seen: list, **options) -> SimCSETrainer:
        args = build_args(tmp_path, save_strategy="steps", save_steps=3, **options)
        trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
        original = trainer.training_step
        trainer.training_step = lambda model, inputs, *more: (
            seen.append(inputs["lengths"].tolist()),
            original(model, inputs, *more),
        )[1]
        return trainer

    complete, again = [], []
    run(complete, max_steps=3).train()
    resumed = run(again, max_steps=4, ignore_data_skip=True)
    resumed.train(resume_from_checkpoint=True)
    assert again[0] == complete[0]


def test_target_modules_of_an_optimizer(tmp_path):
    """GaLore and its like, which are packages of their own: transformers asks for them by name."""
    args = build_args(tmp_path, optim="galore_adamw", optim_target_modules=["attention"])
    trainer = SimCSETrainer(build_model(), args, TRIPLETS)
    with pytest.raises(ImportError, match="galore"):
        trainer.train()


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_cache_that_is_emptied(chunk, tmp_path, monkeypatch):

    calls = []
    for module in (grad_cache_step, transformers.trainer):
        monkeypatch.setattr(module, "clear_device_cache", lambda *_, **__: calls.append(1))
    started(tmp_path, max_steps=4, mini_batch_size=chunk)
    before = len(calls)
    calls.clear()
    started(tmp_path, max_steps=4, mini_batch_size=chunk, torch_empty_cache_steps=2)
    assert len(calls) == before + 2


@pytest.mark.parametrize("removed", [True, False])
def test_columns_that_are_not_removed(removed, tmp_path):
    tokenized = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS).train_dataset
    data = tokenized.add_column("extra", [0] * len(tokenized))
    args = build_args(tmp_path, remove_unused_columns=removed, max_steps=1)
    trainer = SimCSETrainer(build_model(), args, data)
    assert ("extra" in trainer.get_train_dataloader().dataset.column_names) is not removed
    assert trainer.train().global_step == 1


@pytest.mark.parametrize("restored", [True, False])
def test_callbacks_that_are_restored(restored, tmp_path):
    def run(patience: int, steps: int, **options) -> EarlyStoppingCallback:
        best = {"load_best_model_at_end": True, "metric_for_best_model": "avg_sts"}
        args = build_args(tmp_path, **STEPS, **EVERY, **best, max_steps=steps, **options)
        data = {"stsb": Dataset.from_dict(PAIRS)}
        callbacks = [EarlyStoppingCallback(early_stopping_patience=patience)]
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, data, callbacks=callbacks)
        trainer.train(resume_from_checkpoint=steps > 2)
        kept = trainer.callback_handler.callbacks
        return next(one for one in kept if isinstance(one, EarlyStoppingCallback))

    run(7, 2)
    found = run(9, 3, restore_callback_states_from_checkpoint=restored)
    assert found.early_stopping_patience == (7 if restored else 9)


@pytest.mark.parametrize("name", ["lomo", "adalomo"])
def test_optimizers_that_update_at_each_backward_pass_are_refused_with_chunks(name, tmp_path):
    args = build_args(tmp_path, optim=name, mini_batch_size=3)
    said = refusal(lambda: SimCSETrainer(build_model(), args, TRIPLETS))
    assert said.startswith(f"mini_batch_size cannot be used with {name}")
