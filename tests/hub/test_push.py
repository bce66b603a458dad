"""From training to the Hub and back, over HTTP, with the real client."""

import json
import re

import pytest
import torch
from hub_runs import TOKEN, build, run_python, train, weights
from loopback import LoopbackHub
from test_trainer import PAIRS, TRIPLETS

from simcse_trainer import InputError, SimCSEModel

LOADERS = {
    "SimCSEModel": """
from simcse_trainer import SimCSEModel
embed = SimCSEModel.from_pretrained(name, revision=revision).encode(texts)
""",
    "SentenceTransformer": """
from sentence_transformers import SentenceTransformer
embed = SentenceTransformer(name, revision=revision).encode(texts)
""",
    "AutoModel": """
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
model = AutoModel.from_pretrained(name, revision=revision).eval()
with torch.no_grad():
    embed = model(**tokenizer(texts, padding=True, return_tensors="pt")).pooler_output
""",
}
LOAD = """
import json, sys
name, revision, texts = json.loads(sys.argv[1])
{loader}
print(json.dumps([[float(x) for x in row] for row in embed]))
"""
TEXTS = ["the cat sat", "a dog ran far away"]


def load(loader: str, name: str, revision: str | None, **environment: str) -> torch.Tensor:
    arguments = json.dumps([name, revision, TEXTS])
    done = run_python(LOAD.format(loader=LOADERS[loader]), arguments, **environment)
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("loader", LOADERS)
def test_a_trained_model_loads_by_its_name_with_the_embeddings_of_its_folder(
    loader, hub: LoopbackHub, tmp_path
):
    trainer = train(tmp_path / "out", hub_private_repo=True, train_dataset=TRIPLETS)
    trainer.save_model()
    trainer.hub.finish()
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert sorted(repo.tags) == ["step-2", "step-4", "step-6"]
    for revision, folder in ((None, "."), ("step-4", "checkpoint-4"), ("step-6", "checkpoint-6")):
        local = SimCSEModel.from_pretrained(str(tmp_path / "out" / folder)).encode(TEXTS)
        home = str(tmp_path / f"empty-{revision}")
        found = load(loader, "me/tiny", revision, HF_HOME=home, HF_TOKEN=TOKEN)
        torch.testing.assert_close(found, local, atol=1e-6, rtol=0)


def test_a_private_repository_is_refused_without_a_token(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out", hub_private_repo=True)
    code = (
        "import sys; from simcse_trainer import SimCSEModel; SimCSEModel.from_pretrained('me/tiny')"
    )
    done = run_python(code)
    assert done.returncode != 0
    assert "me/tiny" in done.stderr


def test_each_save_is_one_commit_with_its_score_and_the_training_state_beside_it(
    hub: LoopbackHub, tmp_path
):
    train(tmp_path / "out", eval_strategy="steps", eval_steps=2, eval_dataset={"stsb": PAIRS})
    repo = hub.repos["me/tiny"]
    titles = [commit.title for commit in repo.commits()]
    assert [re.sub(r"-?\d+\.\d+", "X", title) for title in titles] == [
        "step 6: stsb_spearman X",
        "step 4: stsb_spearman X",
        "step 2: stsb_spearman X",
        "initial commit",
    ]
    model, state = repo.files(), repo.files("training-state")
    assert {"model.safetensors", "modules.json", "README.md", "tokenizer.json"} <= set(model)
    assert {"optimizer.pt", "rng_state.pth", "training_heads.safetensors"} <= set(state)
    assert not {"optimizer.pt", "training_heads.safetensors", "trainer_state.json"} & set(model)
    assert not any(name.endswith(".bin") for name in {*model, *state})
    assert b'"me/tiny"' in model["README.md"]


def test_main_keeps_the_best_model_and_every_tag_its_own(hub: LoopbackHub, tmp_path):
    out = tmp_path / "out"
    trainer = train(
        out,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset={"stsb": PAIRS},
        load_best_model_at_end=True,
        greater_is_better=False,  # so that the best is not simply the last
        max_steps=8,
    )
    trainer.save_model()
    trainer.hub.finish()
    best = trainer.state.best_global_step
    repo = hub.repos["me/tiny"]
    assert repo.files()["model.safetensors"] == (out / "model.safetensors").read_bytes()
    for step in (2, 4, 6, 8):
        local = (out / f"checkpoint-{step}/model.safetensors").read_bytes()
        assert repo.files(f"step-{step}")["model.safetensors"] == local, step
    assert best != 8, "the case this test is about"


def test_without_the_training_state_there_is_no_branch_for_it(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out", hub_push_training_state=False)
    assert list(hub.repos["me/tiny"].branches) == ["main"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hub_token": "hf_unknown0123456789"}, "does not know the token"),
        ({"hub_token": "hf_readTokenOfMe0123456789"}, "rights"),
        ({"hub_model_id": "other/tiny"}, "rights"),
        ({"hub_model_id": "me/no spaces"}, "me/no spaces"),
        ({"hub_token": None}, "there is no Hub token"),
    ],
)
def test_what_cannot_be_pushed_is_one_line_before_the_first_step(
    options, expected, hub: LoopbackHub, tmp_path
):
    with pytest.raises(InputError, match=expected) as error:
        train(tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("out/checkpoint-*"))


def test_a_card_that_the_hub_refuses_is_one_line_too(hub: LoopbackHub, tmp_path):
    trainer = build(tmp_path / "out")
    with pytest.raises(InputError, match=r'metadata: .*"license" must be a str'):
        trainer.hub.check_card("license: 5")


def test_the_hub_offline_by_setting_is_said_at_once(hub: LoopbackHub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        build(tmp_path / "out")


def test_the_hub_does_not_change_what_is_trained(hub: LoopbackHub, tmp_path):
    with_hub = train(tmp_path / "with")
    without = train(tmp_path / "without", push_to_hub=False)
    for name, tensor in weights(without).items():
        assert torch.equal(tensor, weights(with_hub)[name]), name
