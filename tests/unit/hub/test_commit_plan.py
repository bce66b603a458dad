"""What a push does to a branch that others may have changed: pure decisions."""

import pytest

from simcse_trainer.hub.commit_plan import plan_commit
from simcse_trainer.hub.errors import HubFailure
from simcse_trainer.model.io.manifest import FileRecord, Manifest

MODEL, CARD, OLD = "model.safetensors", "README.md", "2_Dense/model.safetensors"


def record(text: str) -> FileRecord:
    return FileRecord(len(text), text, text)


def plan(local: dict, remote: dict, known: dict | None, **options):
    """Contents stand for checksums."""
    manifest = None if known is None else Manifest({n: record(x) for n, x in known.items()})
    return plan_commit(
        {name: record(text) for name, text in local.items()},
        remote,
        lambda name, one: remote.get(name) == one.sha256,
        known=manifest,
        **options,
    )


def test_ours_is_replaced_and_what_the_new_model_lacks_goes():
    was = {MODEL: "1", OLD: "1", CARD: "1"}
    found = plan({MODEL: "2", CARD: "2"}, was | {"data.csv": "x"}, was)
    assert sorted(found.add) == [CARD, MODEL]
    assert found.delete == [OLD]
    assert found.foreign == ["data.csv"]
    assert {*found.records} == {MODEL, CARD}


def test_what_is_there_already_is_not_sent():
    same = {MODEL: "1", CARD: "1"}
    found = plan(same, same, same)
    assert (found.add, found.delete, found.kept, found.foreign) == ([], [], [], [])


def test_a_text_of_somebody_else_stays_and_its_record_is_the_old_one():
    was, there = {MODEL: "1", CARD: "1"}, {MODEL: "1", CARD: "theirs"}
    found = plan({MODEL: "2", CARD: "2"}, there, was)
    assert (found.add, found.kept) == ([MODEL], [CARD])
    assert found.records[CARD] == record("1")
    assert plan({MODEL: "2", CARD: "2"}, there, was, overwrite=True).add == [MODEL, CARD]
    assert plan({MODEL: "2"}, there, was).delete == [], "nor is it deleted"


@pytest.mark.parametrize("known", [None, {MODEL: "1"}, {}])
def test_a_model_of_somebody_else_ends_the_push_and_says_how_to_go_on(known):
    there = {MODEL: "theirs"}
    with pytest.raises(HubFailure, match=r"model\.safetensors") as refused:
        plan({MODEL: "2"}, there, known)
    assert refused.value.is_final
    assert refused.value.options == "--overwrite"
    assert plan({MODEL: "2"}, there, known, overwrite=True).add == [MODEL]


def test_a_changed_file_that_the_new_model_lacks_ends_it_too():
    was = {MODEL: "1", OLD: "1"}
    with pytest.raises(HubFailure, match="2_Dense"):
        plan({MODEL: "2"}, was | {OLD: "theirs"}, was)
    assert plan({MODEL: "2"}, was | {OLD: "theirs"}, was, overwrite=True).delete == [OLD]


@pytest.mark.parametrize("name", ["adapter_config.json", "modules.json", "x.index.json"])
def test_what_would_be_loaded_with_it_is_refused_and_never_deleted(name):
    there = {MODEL: "1", name: "theirs"}
    for overwrite in (False, True):
        with pytest.raises(HubFailure, match=name):
            plan({MODEL: "2"}, there, {MODEL: "1"}, overwrite=overwrite)
    assert plan({MODEL: "2"}, there, {MODEL: "1"}, is_state=True).add == [MODEL]
    deeper = {MODEL: "1", f"other/{name}": "theirs"}
    assert plan({MODEL: "2"}, deeper, {MODEL: "1"}).delete == []


def test_what_the_old_version_pushed_is_replaced_by_name_and_nothing_is_deleted():
    found = plan({MODEL: "2"}, {MODEL: "1", OLD: "1"}, None, by_old_version=True)
    assert (found.add, found.delete) == ([MODEL], [])


def test_what_somebody_has_deleted_is_said_and_written_again():
    found = plan({MODEL: "1"}, {}, {MODEL: "1"})
    assert found.add == [MODEL]
    assert found.foreign == [f"{MODEL} (deleted)"]
