"""From training to the Hub and back, over HTTP, with the real client."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from helpers.cards import RUNNER
from helpers.hub_runs import LOADERS, TEXTS, TOKEN, build, load, run_python, train, weights
from helpers.loopback import LoopbackHub
from helpers.training import PAIRS, TRIPLETS, UNSUPERVISED

from simcse_trainer import InputError, SimCSEModel

pytestmark = pytest.mark.usefixtures("client_here")


@pytest.mark.slow
def test_a_trained_model_loads_by_its_name_with_the_embeddings_of_its_folder(
    hub: LoopbackHub, tmp_path
):
    trainer = train(tmp_path / "out", hub_private_repo=True, train_dataset=TRIPLETS)
    trainer.save_model()
    trainer.hub.finish()
    repo = hub.repos["me/tiny"]
    assert repo.private
    assert sorted(repo.tags) == ["step-2", "step-4", "step-6"]
    revisions = {None: ".", "step-4": "checkpoint-4", "step-6": "checkpoint-6"}
    local = [
        SimCSEModel.from_pretrained(tmp_path / "out" / x).encode(TEXTS) for x in revisions.values()
    ]
    for loader in LOADERS:
        home = str(tmp_path / f"empty-{loader}")
        found = load(loader, "me/tiny", *revisions, HF_HOME=home, HF_TOKEN=TOKEN)
        torch.testing.assert_close(found, torch.stack(local), atol=1e-6, rtol=0)


REFUSE = """
import json, sys
name, revision, texts = "me/tiny", None, ["a"]
for code in json.loads(sys.argv[1]):
    try:
        exec(code)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
    else:
        print("loaded")
"""


@pytest.mark.slow
def test_a_private_repository_is_refused_without_a_token(hub: LoopbackHub, tmp_path):
    train(tmp_path / "out", hub_private_repo=True, max_steps=2)
    before = len(hub.requests)
    home = tmp_path / "empty"
    done = run_python(REFUSE, json.dumps(list(LOADERS.values())), HF_HOME=str(home))
    said = done.stdout.splitlines()
    assert len(said) == len(LOADERS), done.stderr
    assert all("me/tiny" in line for line in said), said
    assert hub.requests[before:], "it was asked"
    assert not any(request.authorized for request in hub.requests[before:])
    assert not list(home.rglob("*.safetensors"))


KOREAN = Dataset.from_dict(
    {
        "sent0": ["한 남자가 밥을 먹는다", "개가 달린다", "아이가 논다", "고양이가 잔다"] * 4,
        "sent1": ["남자가 식사한다", "개 한 마리가 뛴다", "아이가 놀고 있다", "고양이는 잔다"] * 4,
    }
)
KINDS = {
    "unsupervised": (UNSUPERVISED, "en"),
    "supervised": (TRIPLETS, "en"),
    "korean": (KOREAN, "ko"),
}


@pytest.mark.slow
def test_the_snippets_of_pushed_cards_run_as_printed(hub: LoopbackHub, tmp_path):
    models = {}
    for kind, (data, language) in KINDS.items():
        out, name = tmp_path / "out" / kind, f"me/{kind}"
        options = {"max_steps": 2, "language": [language], "hub_model_id": name}
        models[kind] = train(out, train_dataset=data, **options).model
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "README.md").write_bytes(hub.repos[name].files()["README.md"])
    assert hub.count("validate") >= 2 * len(KINDS), "the Hub was asked about the metadata"
    found = tmp_path / "found.json"
    code = RUNNER.replace("found.json", str(found))
    home = str(tmp_path / "empty")
    done = run_python(code, *(str(tmp_path / kind) for kind in KINDS), HF_HOME=home)
    assert done.returncode == 0, done.stderr
    rows = {Path(folder).name: rows for folder, rows in json.loads(found.read_text()).items()}
    for kind, model in models.items():
        card = (tmp_path / kind / "README.md").read_text(encoding="utf-8")
        texts = json.loads(re.search(r"^texts = (\[.*\])$", card, re.MULTILINE)[1])
        assert ("남자" in texts[0]) == (kind == "korean")
        expected = torch.nn.functional.normalize(model.encode(texts), dim=-1)
        assert len(rows[kind]) == 3
        for loaded in rows[kind]:
            torch.testing.assert_close(torch.tensor(loaded), expected, rtol=1e-4, atol=1e-5)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_hub_does_not_change_what_is_trained(hub: LoopbackHub, tmp_path):
    with_hub = train(tmp_path / "with")
    without = train(tmp_path / "without", push_to_hub=False)
    for name, tensor in weights(without).items():
        assert torch.equal(tensor, weights(with_hub)[name]), name
