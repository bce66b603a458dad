"""A step on fake tensors takes the memory of the same step on real ones, to the byte."""

import pytest
import torch
from helpers import ROOT
from helpers.checks import fails, mostly_slow
from helpers.published import PARAMETERS, PUBLISHED
from helpers.tiny import tiny_backbone, tiny_tokenizer
from transformers import AutoConfig

from simcse_trainer import SimCSEModel, SimCSETrainingArguments
from simcse_trainer.arguments import ModelArguments
from simcse_trainer.cli.config import parse_for_another_machine
from simcse_trainer.cli.plan import plan_words
from simcse_trainer.planning.fake_model import Source, read_source
from simcse_trainer.planning.plan import (
    RESERVE,
    Planner,
    Workload,
    format_bytes,
    format_plan,
    make_chunk,
    plan_run,
)
from simcse_trainer.planning.step import Batch, MemoryTracker, Step, state_bytes

RECIPES = sorted(ROOT.glob("configs/*lora*.yaml"))


@pytest.fixture
def folder(tmp_path):
    def write(family, **changes):
        if family == "qwen3":
            changes |= {"num_key_value_heads": 2, "head_dim": 8}
        tiny_backbone(family, **changes).save_pretrained(tmp_path)
        tiny_tokenizer().save_pretrained(tmp_path)
        return str(tmp_path)

    return write


def arguments(tmp_path, **options):
    return SimCSETrainingArguments(output_dir=str(tmp_path / "out"), use_cpu=True, **options)


def load(model_args, args):
    """The model as training loads it."""
    model = SimCSEModel.from_pretrained(
        model_args.model_name_or_path,
        pooling_mode=model_args.pooling_mode,
        padding_free=model_args.padding_free,
        bidirectional_attention=model_args.bidirectional_attention,
        dtype="auto" if model_args.use_lora else "float32",
        append_eos_token=False,
        lora=model_args.new_adapter(),
        load_in_4bit=model_args.load_in_4bit,
        mlm_head=args.mlm_weight > 0,
    )
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def run_real(model, args, workload):
    """The same step with values."""
    chunk = make_chunk(workload, packed=model.padding_free)
    if args.mlm_weight:
        chunk |= {f"mlm_{name}": chunk["input_ids"].clone() for name in ("input_ids", "labels")}
    text_ids = torch.arange(workload.texts).view(workload.views, workload.batch)
    tracker = MemoryTracker([*model.parameters(), *model.buffers()])
    with tracker:
        return Step(model, args, tracker).run(Batch(chunk, workload.size, text_ids))


ADAPTED = {"use_lora": True, "lora_r": 4}
BOTH_SIDES = {"bidirectional_attention": True}


@pytest.mark.parametrize("chunk", mostly_slow([None, 5], [5]), ids=["at once", "in chunks"])
@pytest.mark.parametrize(
    ("family", "model", "training"),
    [
        ("bert", {}, {}),
        ("bert", {"pooling_mode": "mean"}, {"bf16": True}),
        ("bert", {}, {"activation_checkpointing": True}),
        ("bert", ADAPTED, {"gradient_accumulation_steps": 2}),
        ("roberta", {"pooling_mode": "avg_first_last"}, {}),
        ("modernbert", {}, {}),
        ("gpt2", ADAPTED, {"bf16": True}),
        ("qwen3", ADAPTED | BOTH_SIDES, {}),
        ("qwen3", ADAPTED, {"bf16": True, "activation_checkpointing": True}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_fake_is_real(folder, tmp_path, family, model, training, chunk):
    model_args = ModelArguments(folder(family), **model)
    args = arguments(tmp_path, **training)
    workload = Workload(views=3, batch=6, chunk=chunk, longest=12, tokens=7, gpu=False)
    plan = Planner(model_args, args, read_source(model_args), workload).plan()
    real = load(model_args, args)
    assert real.padding_free
    assert plan.parameters == sum(x.numel() for x in real.parameters())
    trained = [x for x in real.parameters() if x.requires_grad]
    assert plan.trained == sum(x.numel() for x in trained)
    assert plan.gradients == sum(x.nbytes for x in trained)
    assert plan.weights == sum(x.nbytes for x in [*real.parameters(), *real.buffers()])
    assert plan.step == run_real(real, args, workload)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    state = [x for kept in optimizer.state.values() for x in kept.values() if x.ndim]
    assert plan.optimizer == sum(x.nbytes for x in state)
    assert plan.peak >= plan.weights + plan.optimizer + plan.step.peak


@pytest.mark.parametrize(
    ("model", "training"), [({"padding_free": False}, {}), ({}, {"mlm_weight": 0.1})]
)
def test_where_sizes_depend_on_values_it_is_close(folder, tmp_path, model, training):
    # Which tokens are real, and which are masked, is then looked up in a tensor of the real step.
    model_args = ModelArguments(folder("bert"), **model)
    args = arguments(tmp_path, mlm_probability=0.999, **training)
    workload = Workload(views=2, batch=16, chunk=8, longest=12, tokens=7, gpu=False)
    plan = Planner(model_args, args, read_source(model_args), workload).plan()
    real = run_real(load(model_args, args), args, workload)
    assert plan.step.peak == pytest.approx(real.peak, rel=0.02)
    assert plan.step.kept == pytest.approx(real.kept, rel=0.02)


def test_four_bits_weigh_what_bitsandbytes_keeps(folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    model_args = ModelArguments(folder("qwen3"), load_in_4bit=True, **ADAPTED)
    args = arguments(tmp_path)
    workload = Workload(views=3, batch=6, chunk=None, longest=12, tokens=7, gpu=False)
    plan = Planner(model_args, args, read_source(model_args), workload).plan()
    real = load(model_args, args)
    size = sum(x.nbytes for x in [*real.parameters(), *real.buffers()])
    for parameter in real.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            tensors = [state.absmax, state.code, state.offset, state.state2.absmax]
            size += sum(x.nbytes for x in [*tensors, state.state2.code])
    assert plan.weights == size
    assert plan.trained == sum(x.numel() for x in real.parameters() if x.requires_grad)
    wide = Planner(
        ModelArguments(model_args.model_name_or_path, **ADAPTED),
        args,
        read_source(model_args),
        workload,
    )
    assert plan.parameters == wide.plan().parameters


def test_a_gpu_keeps_less_of_dropout_and_attention(folder, tmp_path):
    model_args = ModelArguments(folder("bert"))
    args = arguments(tmp_path)
    source = read_source(model_args)
    cpu, gpu = (
        Planner(model_args, args, source, Workload(2, 8, None, 12, 12, gpu=on)).plan()
        for on in (False, True)
    )
    tokens, width, layers, heads = 2 * 8 * 12, 32, 3, 4
    dropouts = (1 + 2 * layers) * tokens * width
    # The mask of a dropout has one byte an element instead of four.
    assert cpu.step.kept - gpu.step.kept > 3 * dropouts
    # Of attention the probabilities and their dropout mask, where a GPU keeps the output.
    attention = 2 * 4 * layers * heads * tokens * 12 - 4 * layers * tokens * width
    assert cpu.step.kept - gpu.step.kept > 3 * dropouts + attention
    assert cpu.weights == gpu.weights


def test_the_tracker_counts_what_lives():
    with MemoryTracker() as tracker:
        x = torch.ones(256)
        y = x.view(16, 16) + 1
        assert tracker.live == 2048
        del x
        assert tracker.live == 1024
        y.add_(1)
        tracker.restart()
        assert tracker.peak == tracker.live == 1024
        z = y * 2
        del z
    assert (tracker.live, tracker.peak) == (1024, 2048)


def test_the_largest_chunk_fits_and_the_next_does_not(folder, tmp_path):
    model_args = ModelArguments(folder("bert"))
    workload = Workload(views=2, batch=24, chunk=None, longest=12, tokens=9, gpu=True)
    planner = Planner(model_args, arguments(tmp_path), read_source(model_args), workload)
    memory = (planner.plan(1).peak + planner.plan().peak) // 2
    chunk = planner.largest_chunk(memory)
    assert 1 < chunk < workload.texts
    assert planner.plan(chunk).peak <= memory < planner.plan(chunk + 1).peak
    assert planner.largest_chunk(planner.plan().peak) == workload.texts
    assert planner.largest_chunk(planner.plan(1).peak - 1) is None


def test_optimizers():
    parameters = [torch.empty(64, 64), torch.empty(8)]
    assert state_bytes("sgd", parameters) == 0
    assert state_bytes("adamw_torch", parameters) == 8 * (4096 + 8)
    assert state_bytes("adamw_torch", [parameters[0].bfloat16()]) == 4 * 4096
    assert state_bytes("adamw_bnb_8bit", parameters) == 2 * (4096 + 4 * 16) + 2 * 4 * 8
    assert state_bytes("adafactor", parameters) == 4 * (64 + 64) + 4 * 8


@pytest.mark.slow
def test_what_to_change_where_it_does_not_fit(folder, tmp_path):
    words = ["--model_name_or_path", folder("bert", num_hidden_layers=1), "--bf16", "true"]
    words += ["--per_device_train_batch_size", "4", "--max_seq_length", "36"]
    words += ["--output_dir", str(tmp_path / "out")]
    bare = plan_words(words, views=2)
    assert bare.workload.gpu
    assert bare.choices == []
    roomy = plan_words(words, views=2, memory=RESERVE[True] + bare.plan.peak)
    assert roomy.fits
    assert "fits, also with the whole batch" in format_plan(roomy)
    tight = plan_words(words, views=2, memory=RESERVE[True] + bare.plan.peak * 6 // 10)
    assert not tight.fits
    options = [choice.options for choice in tight.choices]
    first = "--activation_checkpointing true"
    assert options[:3] == ["", first, f"{first} --use_lora true"]
    assert f"--mini_batch_size {tight.choices[0].chunk}:" in format_plan(tight)
    none = plan_words(words, memory=RESERVE[True] + 10)
    assert all(choice.chunk is None for choice in none.choices)
    assert "not enough" in format_plan(none)
    assert "3 texts a row are taken for granted" in format_plan(none)


def test_errors(folder, tmp_path):
    words = ["--model_name_or_path", folder("bert"), "--max_seq_length", "12"]
    fails(lambda: plan_words(words, tokens=13), "tokens is 13", "1 to 12")
    nowhere = ["--model_name_or_path", str(tmp_path / "nowhere")]
    fails(lambda: plan_words(nowhere), "nowhere", "--backbone_config")
    adapter = tmp_path / "adapter"
    load(ModelArguments(words[1], **ADAPTED), arguments(tmp_path)).save_pretrained(adapter)
    fails(lambda: plan_words(["--model_name_or_path", str(adapter)]), "is an adapter", words[1])
    config = str(tmp_path / "config.json")
    assert plan_words([*nowhere, "--max_seq_length", "8"], backbone_config=config).plan.trained


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    source = Source(AutoConfig.for_model(**PUBLISHED[name]))
    model_args = ModelArguments(name, projection_head="none")
    planner = Planner(model_args, arguments(tmp_path), source, Workload(2, 2, None, 4, 4, True))
    assert sum(x.numel() for x in planner._model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
@pytest.mark.slow
def test_recipes_state_the_memory_they_need(recipe):
    (model_args, data_args, args), on_cpu = parse_for_another_machine([str(recipe)])
    source = Source(AutoConfig.for_model(**PUBLISHED[model_args.model_name_or_path]))
    run = plan_run(
        model_args,
        data_args,
        args,
        source,
        gpu=not on_cpu,
        views={"unsup": 2, "mntp": 1}.get(recipe.stem.split("_")[0], 3),
    )
    assert run.packed
    text = recipe.read_text(encoding="utf-8")
    needed = (
        f"{format_bytes(run.plan.peak + RESERVE[True])}, of which {format_bytes(run.plan.peak)}"
    )
    assert f"# GPU memory: {needed} are tensors" in text
