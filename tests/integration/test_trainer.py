"""SimCSETrainer as a user writes it: texts in, a trained and saved model out."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from datasets import Dataset
from helpers.checks import mostly_slow
from helpers.retrieval import random_texts
from helpers.training import (
    NO_DROPOUT,
    PAIRS,
    TRIPLETS,
    UNSUPERVISED,
    build_args,
    build_model,
    texts,
)
from transformers import TrainerCallback

from simcse_trainer import InputError, SimCSEModel, SimCSETrainer
from simcse_trainer.data.retrieval import pairs_to_retrieval
from simcse_trainer.data.tokenization import tokenize_dataset
from simcse_trainer.evaluation.retrieval import evaluate_retrieval


class TestData:
    def test_text_columns_are_tokenized_and_packed(self, tmp_path):
        trainer = SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["text_ids"].shape == (3, 8)
        assert batch["input_ids"].shape[0] == 1
        assert trainer.train().global_step == 6

    def test_a_single_column_of_any_name(self, tmp_path):
        data = UNSUPERVISED.rename_column("sent0", "sentence")
        assert SimCSETrainer(build_model(), build_args(tmp_path), data).train().global_step == 6

    def test_tokenized_data_is_taken_as_it_is(self, tmp_path):
        model = build_model()
        tokenized = tokenize_dataset(TRIPLETS, model.tokenizer, max_seq_length=20)
        trainer = SimCSETrainer(model, build_args(tmp_path), tokenized)
        assert trainer.train_dataset is tokenized
        assert trainer.train().global_step == 6

    def test_streamed_data(self, tmp_path):
        streamed = TRIPLETS.to_iterable_dataset()
        first = SimCSETrainer(build_model(), build_args(tmp_path), streamed).train()
        second = SimCSETrainer(
            build_model(), build_args(tmp_path, dataloader_num_workers=1), streamed
        ).train()
        assert first.global_step == second.global_step == 6

    def test_streamed_data_needs_max_steps(self, tmp_path):
        with pytest.raises(InputError, match="max_steps"):
            SimCSETrainer(
                build_model(), build_args(tmp_path, max_steps=-1), TRIPLETS.to_iterable_dataset()
            )

    def test_one_row_is_too_few(self, tmp_path):
        with pytest.raises(InputError, match=r"1 row\(s\).*at least 2"):
            SimCSETrainer(build_model(), build_args(tmp_path), UNSUPERVISED.select([0]))

    def test_a_batch_larger_than_the_data_is_said(self, tmp_path, caplog):
        args = build_args(tmp_path, per_device_train_batch_size=64, max_steps=2)
        with caplog.at_level(logging.WARNING):
            trainer = SimCSETrainer(build_model(), args, UNSUPERVISED)
        assert "larger than the data set (40 rows)" in caplog.text
        assert trainer.train().global_step == 2

    def test_empty_texts_are_refused(self, tmp_path):
        data = Dataset.from_dict({"sent0": ["a man", ""], "sent1": ["a dog", "a cat"]})
        with pytest.raises(InputError, match="'sent0' is empty"):
            SimCSETrainer(build_model(), build_args(tmp_path), data)


class TestObjective:
    @pytest.mark.parametrize("data", [UNSUPERVISED, TRIPLETS], ids=["unsupervised", "triplets"])
    def test_the_loss_falls(self, data, tmp_path):
        args = build_args(tmp_path, max_steps=40, learning_rate=5e-3)
        trainer = SimCSETrainer(build_model(head=False), args, data)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert sum(losses[-5:]) < 0.7 * sum(losses[:5])

    def test_packed_and_padded_train_the_same_way(self, tmp_path):
        losses = []
        for padding_free in (True, False):
            model = build_model(padding_free=padding_free, **NO_DROPOUT)
            trainer = SimCSETrainer(model, build_args(tmp_path), TRIPLETS)
            assert trainer.data_collator.padding_free is padding_free
            trainer.train()
            losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_gradient_accumulation_averages(self, tmp_path):
        model = build_model(**NO_DROPOUT)
        gradients = []
        for steps in (1, 4):
            args = build_args(tmp_path, gradient_accumulation_steps=steps)
            trainer = SimCSETrainer(model, args, TRIPLETS)
            batch = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
            trainer.current_gradient_accumulation_steps = steps
            model.zero_grad()
            for _ in range(steps):
                trainer.training_step(model, dict(batch))
            gradients.append(model.backbone.embeddings.word_embeddings.weight.grad.clone())
        torch.testing.assert_close(*gradients)

    def test_the_auxiliary_loss_is_added_with_its_weight(self, tmp_path):
        model = build_model(mlm=True)
        args = build_args(tmp_path, mlm_weight=0.1)
        trainer = SimCSETrainer(model, args, TRIPLETS)
        batch = trainer.data_collator(list(trainer.train_dataset.select(range(8))))
        torch.manual_seed(5)
        total, output = trainer.compute_loss(model, batch, return_outputs=True)
        args.mlm_weight = 0.3
        torch.manual_seed(5)
        more = trainer.compute_loss(model, batch)
        torch.testing.assert_close(more - total, 0.2 * output.mlm_loss, rtol=1e-4, atol=1e-5)

    def test_mlm_without_its_head_says_how_to_load_it(self, tmp_path):
        with pytest.raises(InputError, match=r"mlm_head=True"):
            SimCSETrainer(build_model(), build_args(tmp_path, mlm_weight=0.1), TRIPLETS)


class TestHead:
    @pytest.mark.parametrize(("data", "only_train"), [(UNSUPERVISED, True), (TRIPLETS, False)])
    def test_its_use_follows_the_data(self, data, only_train, tmp_path):
        model = build_model()
        SimCSETrainer(model, build_args(tmp_path), data)
        assert model.mlp_only_train is only_train

    def test_the_users_choice_stays(self, tmp_path):
        model = build_model()
        model.mlp_only_train = False
        SimCSETrainer(model, build_args(tmp_path), UNSUPERVISED)
        assert model.mlp_only_train is False


class TestEvaluation:
    def test_metrics_of_a_dictionary_of_tasks(self, tmp_path):
        pairs = Dataset.from_dict(PAIRS)
        trainer = SimCSETrainer(
            build_model(), build_args(tmp_path), TRIPLETS, {"stsb": pairs, "sickr": pairs}
        )
        metrics = trainer.evaluate()
        assert metrics["eval_stsb_spearman"] == metrics["eval_sickr_spearman"]
        assert metrics["eval_avg_sts"] == pytest.approx(metrics["eval_stsb_spearman"])
        assert trainer.state.log_history[-1]["eval_avg_sts"] == metrics["eval_avg_sts"]

    def test_the_best_model_is_loaded_at_the_end(self, tmp_path):
        args = build_args(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            learning_rate=0.05,
        )
        assert args.metric_for_best_model == "avg_sts"
        assert args.greater_is_better
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, Dataset.from_dict(PAIRS))
        trainer.train()
        scores = [e["eval_sts_spearman"] for e in trainer.state.log_history if "eval_avg_sts" in e]
        assert trainer.state.best_metric == max(scores)
        assert trainer.evaluate()["eval_sts_spearman"] == pytest.approx(max(scores))

    def test_pairs_without_a_score_are_retrieval(self, tmp_path):
        texts = random_texts(40, 1)
        pairs = {"sent0": texts[:20], "sent1": texts[20:]}
        trainer = SimCSETrainer(
            build_model(), build_args(tmp_path), TRIPLETS, Dataset.from_dict(pairs)
        )
        found = trainer.evaluate()
        assert found["eval_retrieval_recall_at_10"] == found["eval_recall_at_10"]
        data = pairs_to_retrieval(zip(*pairs.values(), strict=True), source="x")
        expected = evaluate_retrieval(trainer.encode, trainer.encode, {"retrieval": data})
        assert 0 < expected["ndcg_at_10"] < 100
        assert found["eval_ndcg_at_10"] == pytest.approx(expected["ndcg_at_10"])
        both = trainer.evaluate({"faq": data, "stsb": Dataset.from_dict(PAIRS)})
        assert both["eval_faq_mrr_at_10"] == found["eval_mrr_at_10"]
        assert "eval_stsb_spearman" in both
        with pytest.raises(InputError, match=r"eval_dataset row 2: column 'sent1' is empty"):
            trainer.evaluate(Dataset.from_dict({"sent0": ["a", "b"], "sent1": ["c", " "]}))

    @pytest.mark.parametrize("metric", [None, "recall_at_10", "eval_faq_mrr_at_10"])
    def test_the_best_model_by_retrieval(self, metric, tmp_path):
        texts = random_texts(60, 1)
        args = build_args(
            tmp_path,
            eval_strategy="steps",
            eval_steps=2,
            save_strategy="steps",
            save_steps=2,
            load_best_model_at_end=True,
            learning_rate=0.05,
            metric_for_best_model=metric,
        )
        pairs = {"query": texts[:30], "passage": texts[30:]}
        trainer = SimCSETrainer(build_model(), args, TRIPLETS, {"faq": Dataset.from_dict(pairs)})
        trainer.train()
        key = f"eval_{(metric or 'ndcg_at_10').removeprefix('eval_')}"
        scores = [e[key] for e in trainer.state.log_history if key in e]
        assert len(set(scores)) > 1
        assert trainer.state.best_metric == max(scores)
        assert trainer.evaluate()[key] == pytest.approx(max(scores))

    def test_a_metric_that_no_task_gives_is_refused_at_the_start(self, tmp_path):
        args = build_args(
            tmp_path,
            eval_strategy="steps",
            save_strategy="steps",
            load_best_model_at_end=True,
            metric_for_best_model="stsb_spearmann",
        )
        with pytest.raises(InputError, match=r"'stsb_spearmann'.*stsb_spearman"):
            SimCSETrainer(build_model(), args, TRIPLETS, {"stsb": Dataset.from_dict(PAIRS)})


class StopAfter(TrainerCallback):
    """Ends the run right after a checkpoint, as a kill would."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


RESUMED = {
    "unsupervised": (UNSUPERVISED, {}),
    "triplets": (TRIPLETS, {"hard_negative_weight": 1.0}),
    "mlm": (UNSUPERVISED, {"mlm_weight": 0.1}),
    "accumulation": (TRIPLETS, {"gradient_accumulation_steps": 2}),
    "bf16": (TRIPLETS, {"bf16": True}),
    "worker": (TRIPLETS, {"dataloader_num_workers": 1}),
    "augmentation": (UNSUPERVISED, {"augmentation": "word_deletion"}),
    "augmentation-worker": (
        UNSUPERVISED,
        {"augmentation": "crop", "augmentation_rate": 0.4, "dataloader_num_workers": 2},
    ),
}


@pytest.mark.parametrize(
    "kind", mostly_slow(RESUMED, ["unsupervised", "mlm", "accumulation", "augmentation-worker"])
)
@pytest.mark.parametrize("stop", [2, 6], ids=["mid-epoch", "second-epoch"])
def test_a_resumed_run_is_bit_identical(kind, stop, tmp_path):
    data, options = RESUMED[kind]
    mlm = "mlm_weight" in options

    def run(name, *, resume=None, callbacks=(), seed=0):
        args = build_args(
            tmp_path / name, max_steps=8, save_strategy="steps", save_steps=2, **options
        )
        trainer = SimCSETrainer(
            build_model(mlm=mlm, seed=seed), args, data, callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.state_dict()

    complete = run("whole")
    run("stopped", callbacks=[StopAfter(stop)])
    # Another initialisation: everything has to come from the checkpoint.
    resumed = run("stopped", resume=str(tmp_path / f"stopped/checkpoint-{stop}"), seed=9)
    assert complete.keys() == resumed.keys()
    for name, tensor in complete.items():
        assert torch.equal(tensor, resumed[name]), name


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    args = build_args(tmp_path, save_strategy="steps", save_steps=6)
    SimCSETrainer(build_model(), args, TRIPLETS).train()
    trainer = SimCSETrainer(build_model(mlm=True), build_args(tmp_path, mlm_weight=0.1), TRIPLETS)
    with pytest.raises(InputError, match=r"checkpoint-6 holds another model"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_checkpoints_hold_no_pickled_arguments_and_no_token(tmp_path):
    args = build_args(tmp_path, save_strategy="steps", save_steps=6, hub_token="hf_SECRET")
    trainer = SimCSETrainer(build_model(), args, TRIPLETS)
    trainer.train()
    trainer.save_model()
    saved = json.loads((tmp_path / "checkpoint-6/training_args.json").read_text())
    assert saved["temperature"] == 0.05
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if path.name == "training_args.bin"]
    assert not [path for path in files if b"hf_SECRET" in path.read_bytes()]


class TestWhatPythonUsersGetWrong:
    @pytest.mark.parametrize(
        ("pairs", "message"),
        [
            ({"a": ["x"], "b": ["y"], "score": [1.0]}, r"no column 'sentence1'"),
            (PAIRS | {"score": [None, *PAIRS["score"][1:]]}, r"row 1: column 'score' is"),
            (PAIRS | {"sentence2": [None, *PAIRS["sentence2"][1:]]}, r"row 1: column 'sentence2'"),
            (PAIRS | {"score": [1.0] * 12}, r"12 rows with 1 different scores"),
        ],
    )
    def test_evaluation_data(self, pairs, message, tmp_path):
        with pytest.raises(InputError, match=message):
            SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS, Dataset.from_dict(pairs))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([[2, 7, 3], [2, 3]], r"expected a list of token id lists in every row"),
            ([[[2, 3], [2, 3]], [[2, 3]]], r"rows with 1 to 2 texts; expected 2 in every row"),
            ([[[2, 3]], [[]]], r"rows with 0 to 2 tokens in a text; expected 1 to 20"),
            ([[[2] * 30], [[2, 3]]], r"rows with 2 to 30 tokens in a text; expected 1 to 20"),
        ],
    )
    def test_tokenized_data(self, rows, message, tmp_path):
        data = Dataset.from_dict({"input_ids": rows})
        with pytest.raises(InputError, match=message):
            SimCSETrainer(build_model(), build_args(tmp_path), data)

    def test_other_things(self, tmp_path):
        from transformers import TrainingArguments

        args = build_args(tmp_path)
        with pytest.raises(InputError, match=r"is a list; expected a datasets\.Dataset"):
            SimCSETrainer(build_model(), args, ["a", "b"])
        with pytest.raises(InputError, match="pass SimCSETrainingArguments"):
            SimCSETrainer(build_model(), TrainingArguments(str(tmp_path), use_cpu=True), TRIPLETS)
        drop = build_args(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=64)
        with pytest.raises(InputError, match="nothing is left"):
            SimCSETrainer(build_model(), drop, TRIPLETS)

    def test_one_text_is_one_vector(self):
        model = build_model()
        assert model.encode("a man").shape == (32,)
        assert torch.equal(model.encode("a man"), model.encode(["a man"])[0])


def test_bf16_training_is_evaluated_as_the_saved_model_is(tmp_path):
    trainer = SimCSETrainer(build_model(), build_args(tmp_path, bf16=True), TRIPLETS)
    trainer.train()
    trainer.save_model()
    saved = SimCSEModel.from_pretrained(tmp_path)
    assert torch.equal(trainer.model.encode(texts(0)), saved.encode(texts(0)))


def test_a_guess_about_the_head_is_not_taken_for_the_users_word(tmp_path):
    model = build_model()
    SimCSETrainer(model, build_args(tmp_path), UNSUPERVISED)
    SimCSETrainer(model, build_args(tmp_path), TRIPLETS)
    assert model.mlp_only_train is False


def test_a_model_saved_over_another_leaves_no_module_of_it(tmp_path):
    SimCSETrainer(build_model(), build_args(tmp_path), TRIPLETS).save_model()
    assert (tmp_path / "2_Dense").is_dir()
    SimCSETrainer(build_model(head=False), build_args(tmp_path), TRIPLETS).save_model()
    assert not (tmp_path / "2_Dense").exists()
    assert SimCSEModel.from_pretrained(tmp_path).head is None


def test_settings_that_do_less_than_they_seem_are_named(tmp_path, caplog):
    args = build_args(tmp_path, gradient_accumulation_steps=4, hard_negative_weight=1.0)
    with caplog.at_level(logging.WARNING):
        SimCSETrainer(build_model(), args, UNSUPERVISED)
    assert "Gradient accumulation does not add negatives" in caplog.text
    said = "gradient_accumulation_steps=1 per_device_train_batch_size=32 mini_batch_size=8"
    assert said in caplog.text
    assert "hard_negative_weight has no effect" in caplog.text
    caplog.clear()
    args = build_args(tmp_path, gradient_accumulation_steps=4, mini_batch_size="8")
    with caplog.at_level(logging.WARNING):
        SimCSETrainer(build_model(), args, TRIPLETS)
    assert "does not add negatives" not in caplog.text


def test_columns_are_named_as_at_the_command_line(tmp_path):
    rows = {"id": [1, 2, 3], "answer": ["a dog", "a cat", "red"], "q": ["dog", "cat", "a red"]}
    data = Dataset.from_dict(rows)
    args = build_args(tmp_path)
    trainer = SimCSETrainer(build_model(), args, data, columns=["q", "answer"])
    renamed = Dataset.from_dict({"sent0": rows["q"], "sent1": rows["answer"]})
    expected = SimCSETrainer(build_model(), args, renamed)
    assert trainer.train_dataset["input_ids"][:] == expected.train_dataset["input_ids"][:]
    assert trainer.views == 2
    assert f"views=2, step=0, {str(tmp_path)!r})" in repr(trainer)
    with pytest.raises(InputError, match=r"train_dataset: .*'question'.*found 'id', 'answer', 'q'"):
        SimCSETrainer(build_model(), args, data, columns=["question"])
    with pytest.raises(InputError, match=r"train_dataset is a list; expected a datasets\.Dataset"):
        SimCSETrainer(build_model(), args, ["a"], columns=["q"])
