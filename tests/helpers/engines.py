"""All that an engine has to do, by one of its two processes: trains, saves, resumes, evaluates.

    torchrun --nproc_per_node 2 engines.py ENGINE FOLDER

The first process writes to FOLDER/found.json how each cell ended: "right", or what was wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

ENGINE, ROOT = sys.argv[1], Path(sys.argv[2])
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1]))
if ENGINE == "fsdp2":
    # accelerate allows FSDP on accelerators only; its own code for it runs on gloo all the same.
    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_OFFLOAD_PARAMS="false",
        FSDP_STATE_DICT_TYPE="FULL_STATE_DICT",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
if ENGINE == "zero2":
    os.environ.update(
        DS_ACCELERATOR="cpu", ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_ZERO_STAGE="2"
    )
    from deepspeed import ops

    # Exchange through shared memory would be compiled first, which takes a minute.
    ops.__compatible_ops__["deepspeed_shm_comm"] = False

import torch  # noqa: E402
from accelerate import state as accelerate_state  # noqa: E402
from accelerate.utils import DistributedType  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from helpers.tiny import WORDS, save_tiny, tiny_tokenizer  # noqa: E402
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model  # noqa: E402
from simcse_trainer import InputError, SimCSEModel, SimCSETrainer  # noqa: E402
from simcse_trainer.data.loading import load_training_data  # noqa: E402
from simcse_trainer.model.heads import ProjectionHead  # noqa: E402
from simcse_trainer.model.lora import lora_config  # noqa: E402

RANK = int(os.environ.get("RANK", "0"))
KINDS = ("full", "lora", "lora and head", "unsupervised head", "mlm")
CELLS = ("save", "resume", "load_best", "evaluate", "chunks")
FAMILIES = ("roberta", "xlm-roberta", "modernbert", "qwen3")


def let_fsdp_run_on_cpus() -> None:
    original = accelerate_state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **options):
        original(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            shared = accelerate_state.PartialState._shared_state
            shared["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    accelerate_state.AcceleratorState.__init__ = init


def make(kind: str, *, dropout: bool = True):
    """Model and data of a kind; the same weights each time."""
    if kind.startswith("lora"):
        torch.manual_seed(0)
        lora = lora_config(r=2, dropout=0.2)
        model = SimCSEModel.from_pretrained(str(ROOT / "base"), lora=lora, max_seq_length=20)
        torch.manual_seed(0)
        model.head = ProjectionHead(32) if kind == "lora and head" else None
    else:
        model = build_model(mlm=kind == "mlm", head=kind != "full")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and not dropout:
            module.p = 0.0
    return model, UNSUPERVISED if kind == "unsupervised head" else TRIPLETS


def build_trainer(kind: str, folder: Path, *, dropout: bool = True, **options) -> SimCSETrainer:
    model, data = make(kind, dropout=dropout)
    args = build_args(
        folder,
        per_device_train_batch_size=4,
        **{"max_steps": 4, "mlm_weight": 0.1 if kind == "mlm" else 0.0} | options,
    )
    return SimCSETrainer(model, args, data, {"stsb": Dataset.from_dict(PAIRS)})


BEST = {
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "stsb_spearman",
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All weights that a folder holds."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        if not any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts):
            with safe_open(path, "pt") as file:
                named = {
                    f"{path.relative_to(folder)}:{n}": file.get_tensor(n) for n in [*file.keys()]
                }
                assert named, f"{path.relative_to(folder)} is empty"
                found |= named
    assert found, f"no weights in {folder.name}"
    return found


def compare(found: Path, expected: Path, *, atol: float = 1e-6) -> None:
    ours, theirs = tensors(found), tensors(expected)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=atol, msg=name)


class Kind:
    """The cells of one kind of model, in the order in which they build on each other."""

    def __init__(self, kind: str):
        self.kind = kind
        self.out = ROOT / kind.replace(" ", "-")
        self.complete = build_trainer(kind, self.out / "whole", **BEST)

    def check(self) -> dict[str, str]:
        checks = {
            "save": self.save,
            "load_best": self.load_best,
            "evaluate": self.evaluate,
            "resume": self.resume,
            "chunks": refused_chunks if ENGINE == "zero2" else self.chunks,
        }
        return {name: outcome(call) for name, call in checks.items()}

    def save(self) -> None:
        self.complete.train()
        self.complete.save_model()
        self.complete.accelerator.wait_for_everyone()
        if RANK > 0:
            return
        folder = self.out / "whole"
        first, last = (tensors(folder / f"checkpoint-{step}") for step in (2, 4))
        assert any(not torch.equal(first[name], last[name]) for name in first), "no training"
        assert not list(folder.glob(".simcse-tmp*")), "files that were being written"
        found = SimCSEModel.from_pretrained(folder).encode(PAIRS["sentence1"][:4])
        assert found.isfinite().all()

    def load_best(self) -> None:
        if RANK > 0:
            return
        best = Path(str(self.complete.state.best_model_checkpoint))
        assert best.parent == self.out / "whole", best
        final, chosen = (SimCSEModel.from_pretrained(path) for path in (best.parent, best))
        texts = PAIRS["sentence1"]
        torch.testing.assert_close(final.encode(texts), chosen.encode(texts))

    def evaluate(self) -> None:
        metrics = self.complete.evaluate()
        assert abs(metrics["eval_stsb_spearman"] - self.complete.state.best_metric) < 1e-3, metrics

    def resume(self) -> None:
        resumed = build_trainer(self.kind, self.out / "resumed", **BEST)
        checkpoint = self.out / "resumed/checkpoint-2"
        if RANK == 0:
            checkpoint.parent.mkdir(exist_ok=True)
            (self.out / "whole/checkpoint-2").rename(checkpoint)
        resumed.accelerator.wait_for_everyone()
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert resumed.state.global_step == 4
        resumed.accelerator.wait_for_everyone()
        if RANK == 0:
            compare(self.out / "resumed/checkpoint-4", self.out / "whole/checkpoint-4")

    def chunks(self) -> None:
        # Plain gradient steps: Adam's are as large where a gradient is nothing but round-off.
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "mlm_weight": 0.0}
        options |= {"optim": "sgd", "learning_rate": 0.1}
        if self.kind == "unsupervised head":
            options["augmentation"] = "crop"  # without dropout, what tells the views apart
        for name, size in (("plain", None), ("chunked", 3)):
            folder = self.out / name
            trainer = build_trainer(
                self.kind, folder, dropout=False, mini_batch_size=size, **options
            )
            trainer.train()
            trainer.accelerator.wait_for_everyone()
        if RANK == 0:
            compare(self.out / "chunked/checkpoint-2", self.out / "plain/checkpoint-2", atol=2e-5)


def outcome(call) -> str:
    """How a cell ended."""
    try:
        call()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "right"


def refused_chunks() -> None:
    """DeepSpeed updates at each backward pass."""
    try:
        build_trainer("full", ROOT / "refused", mini_batch_size=3)
    except InputError as error:
        assert "mini_batch_size cannot be used with DeepSpeed" in str(error)  # noqa: PT017
    else:
        raise AssertionError("it was not refused")


def check_family(family: str) -> None:
    """A step and a save of another family: embeddings and layers are wrapped in other ways."""
    model = SimCSEModel.from_pretrained(str(ROOT / family), max_seq_length=20)
    args = build_args(ROOT / f"out-{family}", max_steps=1, per_device_train_batch_size=4)
    trainer = SimCSETrainer(model, args, TRIPLETS)
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    if RANK == 0:
        assert tensors(ROOT / f"out-{family}")


def refuse_checkpointing() -> None:
    """accelerate's own forgets the random state of the dropout that it computes again."""
    os.environ["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    try:
        build_trainer("full", ROOT / "refused")
    except InputError as error:
        assert "activation_checkpointing" in str(error)  # noqa: PT017
    else:
        raise AssertionError("it was not refused")
    finally:
        os.environ.pop("FSDP_ACTIVATION_CHECKPOINTING")


def stream(folder: Path, seen: list | None = None, **options) -> SimCSETrainer:
    files = []
    for name, rows in (("a", 32), ("b", 12)):
        path = ROOT / f"{name}.txt"
        if RANK == 0 and not path.exists():
            words = [f"{name} {WORDS[i % 17]} {WORDS[(3 * i + 1) % 17]}" for i in range(rows)]
            path.write_text("\n".join(words), encoding="utf-8")
        files.append(str(path))
    torch.distributed.barrier() if torch.distributed.is_initialized() else time.sleep(1)
    data = load_training_data(files, streaming=True).shuffle(seed=1, buffer_size=8)
    defaults = {"max_steps": 14, "per_device_train_batch_size": 4}
    args = build_args(folder, **(defaults | options))
    trainer = SimCSETrainer(build_model(), args, data)
    if seen is not None:
        original = trainer.training_step

        def step(model, inputs, *more):
            seen.append([int(trainer.state.global_step), inputs["input_ids"].flatten().tolist()])
            return original(model, inputs, *more)

        trainer.training_step = step
    return trainer


def check_streams() -> None:
    """Two files of different lengths: all processes come to the end of a pass together."""
    found = {}

    def cell(name: str, check) -> None:
        found[name] = outcome(check)
        write({"streams": found})

    def ends(name: str, **options):
        def check() -> None:
            trainer = stream(ROOT / name.replace(" ", "-"), **options)
            assert trainer.train().global_step == trainer.args.max_steps

        return check

    def resumed() -> None:
        # 44 rows are 6 batches of two processes: step 9 is in the second pass.
        options = {"save_strategy": "steps", "save_steps": 9}
        complete: list = []
        stream(ROOT / "whole", complete, **options).train()
        again: list = []
        trainer = stream(ROOT / "whole", again, **options)
        trainer.train(resume_from_checkpoint=str(ROOT / "whole/checkpoint-9"))
        assert again == complete[9:], f"{len(again)} steps"

    cell("SIGTERM", terminate)
    cell("resumed in the second pass", resumed)
    cell("accumulated", ends("accumulated", gradient_accumulation_steps=2))
    cell("saved by epoch", ends("saved by epoch", save_strategy="epoch"))


def terminate() -> None:
    """One of two processes is told to end while steps are slow."""

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(1.5)
            if RANK == 1 and state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    args = build_args(ROOT / "terminated", max_steps=9, save_strategy="steps", save_steps=50)
    trainer = SimCSETrainer(build_model(), args, UNSUPERVISED, callbacks=[Slow()])
    trainer.train()
    assert trainer.interrupted
    # 5 seconds after step 3 at the latest.
    assert trainer.state.global_step <= 7, trainer.state.global_step
    assert (ROOT / f"terminated/checkpoint-{trainer.state.global_step}").is_dir()


def main() -> None:
    torch.set_num_threads(1)
    if ENGINE == "fsdp2":
        let_fsdp_run_on_cpus()
    if RANK == 0:
        save_tiny(ROOT / "base", "bert")
        for family in FAMILIES:
            save_tiny(ROOT / family, family)
        assert tiny_tokenizer()
        (ROOT / "ready").touch()
    while not (ROOT / "ready").exists():
        time.sleep(0.05)
    found: dict[str, dict[str, str]] = {}
    if ENGINE == "streams":
        check_streams()
        return
    for kind in KINDS:
        found[kind] = Kind(kind).check()
        write(found)
    if ENGINE == "fsdp2":
        found["families"] = {name: outcome(partial(check_family, name)) for name in FAMILIES}
        found["refusals"] = {"activation checkpointing": outcome(refuse_checkpointing)}
        write(found)


def write(found: dict) -> None:
    (ROOT / f"found{RANK}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
