"""Search is exact, bounded, and what an index folder says it is."""

import json
import shutil
import threading

import pytest
import torch
from helpers.checks import fails, full_disk
from helpers.tiny import WORDS, tiny_backbone, tiny_tokenizer
from torch.nn.functional import normalize

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.inference import index
from simcse_trainer.inference.index import STORAGES, Vectors

TEXTS = [" ".join(WORDS[(i * 5 + k * k) % 17] for k in range(1 + i % 7)) for i in range(40)]


def make_model(folder, seed=0, **options):
    backbone = tiny_backbone(**options)
    torch.manual_seed(seed)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean", max_seq_length=40)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def tool(folder):
    found = SimCSE(folder)
    found.build_index(TEXTS)
    return found


def brute_force(queries, rows, top_k):
    """The definition, one query at a time."""
    found = []
    for query in queries:
        scores = [float(query @ row) for row in rows]
        found.append(sorted(range(len(rows)), key=lambda i: (-scores[i], i))[:top_k])
    return found


@pytest.mark.parametrize("block", [1, 7, 2**24])
@pytest.mark.parametrize("top_k", [1, 4, 100])
def test_the_search_is_exact_whatever_the_blocks(monkeypatch, block, top_k):
    monkeypatch.setattr(index, "_BLOCK_VALUES", block * 12)
    monkeypatch.setattr(index, "_BLOCK_QUERIES", 2)
    rows = normalize(torch.randn(33, 12), dim=1)
    queries = normalize(torch.randn(5, 12), dim=1)
    scores, found = Vectors.pack(rows).search(queries, top_k)
    assert found.tolist() == brute_force(queries, rows, top_k)
    torch.testing.assert_close(scores, (queries @ rows.T).gather(1, found))


def test_equal_scores_come_in_the_order_of_the_rows(monkeypatch):
    monkeypatch.setattr(index, "_BLOCK_VALUES", 3 * 12)
    rows = normalize(torch.randn(1, 12), dim=1).expand(20, 12)
    assert Vectors.pack(rows).search(rows[:2], 20)[1].tolist() == [[*range(20)]] * 2


def test_memory_follows_the_block_and_not_the_product(monkeypatch):
    """512 queries against 40,000 rows: all scores would be 82 MB, a block of them is 4 MiB."""
    monkeypatch.setattr(index, "_BLOCK_VALUES", 2**20)
    rows = Vectors.pack(normalize(torch.randn(40_000, 16), dim=1))
    queries = normalize(torch.randn(512, 16), dim=1)
    largest = 0
    topk = torch.Tensor.topk

    def watched(self, *args, **kwargs):
        nonlocal largest
        largest = max(largest, self.numel())
        return topk(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "topk", watched)
    rows.search(queries, 5)
    assert 0 < largest <= 2**20


# Signs: the root of pi / 2 - 1 over that of D, which is 0.094 here.
@pytest.mark.parametrize(("storage", "size", "error"), [("int8", 68, 0.002), ("binary", 12, 0.105)])
def test_smaller_storages(storage, size, error):
    rows = normalize(torch.randn(500, 64), dim=1)
    packed = Vectors.pack(rows, storage)
    assert packed.codes.nbytes + packed.scales.nbytes == 500 * size
    queries = normalize(rows[:50] + 0.1 * normalize(torch.randn(50, 64), dim=1), dim=1)
    scores, found = packed.search(queries, 3)
    assert found[:, 0].tolist() == list(range(50))
    estimates = queries @ packed.rows(0, 500).T
    torch.testing.assert_close(scores, estimates.gather(1, found).clamp(max=1))
    errors = estimates - queries @ rows.T
    assert errors.square().mean().sqrt() < error
    assert errors.mean().abs() < error / 10
    # A vector's product with itself is its length.
    own, _ = packed.search(rows[:50], 1)
    torch.testing.assert_close(own[:, 0], torch.ones(50), atol=0.005, rtol=0)


def test_dimensions_that_fill_no_byte():
    rows = normalize(torch.randn(30, 13), dim=1)
    packed = Vectors.pack(rows, "binary")
    assert torch.equal(packed.rows(3, 9) > 0, rows[3:9] > 0)
    assert packed.search(rows, 1)[1][:, 0].tolist() == list(range(30))


def test_hits(tool):
    found = tool.search(TEXTS[:3], threshold=0.9, top_k=3)
    cosines = tool.similarity(TEXTS[:3], TEXTS)
    for hits, row in zip(found, cosines, strict=True):
        wanted = sorted((score for score in row if score >= 0.9), reverse=True)[:3]
        assert [score for _, score in hits] == pytest.approx(wanted, abs=1e-5)
        for sentence, score in hits:
            assert row[TEXTS.index(sentence)] == pytest.approx(score, abs=1e-5)
    one = tool.search(TEXTS[0], threshold=0.9, top_k=3)
    assert [s for _, s in one] == pytest.approx([s for _, s in found[0]], abs=1e-5)
    assert tool.search(TEXTS[0], None, 2.0) == []
    assert tool.search([]) == []
    assert len(tool.search(TEXTS[0], threshold=-1, top_k=1000)) == len(TEXTS)


@pytest.mark.parametrize("storage", ["int8", "binary"])
def test_rescored_hits_have_exact_cosines(folder, storage):
    exact, small = SimCSE(folder), SimCSE(folder)
    exact.build_index(TEXTS)
    small.build_index(TEXTS, storage=storage)
    expected = exact.search(TEXTS[:4], threshold=-1)
    found = small.search(TEXTS[:4], threshold=-1, rescore=8)  # all 40 are candidates
    for hits, wanted in zip(found, expected, strict=True):
        assert [score for _, score in hits] == pytest.approx([s for _, s in wanted], abs=1e-5)
    # Signs alone are rescored without being asked.
    by_default = small.search(TEXTS[5], threshold=-1)
    cosines = [exact.similarity(TEXTS[5], sentence) for sentence, _ in by_default]
    error = 1e-5 if storage == "binary" else 0.01
    assert [score for _, score in by_default] == pytest.approx(cosines, abs=error)


def test_adding_is_seen_by_the_next_search_and_not_by_a_running_one(tool):
    before = tool.index
    tool.add_to_index(["child child child"])
    assert len(before.sentences) == len(before.vectors) == 40
    assert tool.search("child child child")[0][0] == "child child child"
    fails(lambda: SimCSE(tool.name).add_to_index(["a"]), "There is no index yet")


def test_sentences_of_files(tool, tmp_path):
    (tmp_path / "a.txt").write_text("a dog\n\na cat\n", encoding="utf-8")
    (tmp_path / "b").write_text("a dog\na cat", encoding="utf-8")
    (tmp_path / "c.csv").write_text('id,text\n1,a dog\n2,"a\ncat"\n', encoding="utf-8")
    for name, second in (("a.txt", "a cat"), ("b", "a cat"), ("c.csv", "a\ncat")):
        tool.build_index(str(tmp_path / name))
        assert tool.index.sentences == ["a dog", second]
    (tmp_path / "d.csv").write_text("id,sentence\n1,a dog\n", encoding="utf-8")
    (tmp_path / "e.txt").write_bytes(b"a dog\nc\xff\n")
    fails(lambda: tool.build_index(tmp_path / "d.csv"), "which column are the texts?", "'id'")
    fails(lambda: tool.build_index(tmp_path / "e.txt"), "e.txt row 2", "not UTF-8")
    fails(lambda: tool.build_index(tmp_path / "none.txt"), "none.txt: no such file")
    fails(lambda: tool.build_index([]), "There are no sentences")
    fails(lambda: tool.build_index(TEXTS, storage="int4"), "storage is 'int4'; expected one of")
    fails(lambda: tool.build_index(TEXTS, faiss_fast=True), "use_faiss=True")
    fails(lambda: tool.build_index(TEXTS, True, storage="int8"), "faiss keeps float32")
    fails(lambda: tool.search("a", top_k=0), "top_k is 0")
    fails(lambda: SimCSE(tool.name).search("a"), "There is no index yet; call build_index")


@pytest.mark.parametrize("storage", STORAGES)
def test_an_index_is_read_back(folder, tmp_path, storage):
    tool = SimCSE(folder)
    sentences = [*TEXTS, "a\nline", "\u2028", ""]
    tool.build_index(sentences, storage=storage)
    tool.save_index(tmp_path / "new" / "index")
    tool.save_index(tmp_path / "new" / "index")  # replaced
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["index"]
    shutil.copytree(folder, tmp_path / "renamed")
    other = SimCSE(tmp_path / "renamed")
    other.load_index(tmp_path / "new" / "index")
    assert other.index.sentences == sentences
    found = [x.search(TEXTS, threshold=-1, top_k=7) for x in (tool, other)]
    assert found[0] == found[1]
    fails(lambda: SimCSE(folder).save_index(tmp_path / "x"), "There is no index yet")
    fails(lambda: tool.save_index(folder), "is there already and is no index")


def test_an_index_of_another_model_is_refused(tool, tmp_path, folder):
    tool.save_index(tmp_path / "index")
    for other in (
        SimCSE(make_model(tmp_path / "other", seed=1)),
        SimCSE(make_model(tmp_path / "wider", hidden_size=64)),
        SimCSE(folder, pooling_mode="cls"),
        SimCSE(folder, prompt="big {text}"),
    ):
        fails(lambda m=other: m.load_index(tmp_path / "index"), "was made by another model")
        assert other.index is None
    short = SimCSE(folder, truncate_dim=8)
    fails(lambda: short.load_index(tmp_path / "index"), "truncate_dim None", "with 8")
    short.build_index(TEXTS)
    short.save_index(tmp_path / "short")
    SimCSE(folder, truncate_dim=8).load_index(tmp_path / "short")
    fails(lambda: tool.load_index(tmp_path / "short"), "Pass truncate_dim 8")


def test_one_training_step_makes_another_model(tool, tmp_path, folder):
    tool.save_index(tmp_path / "index")
    model = SimCSEModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained")
    fails(lambda: SimCSE(tmp_path / "trained").load_index(tmp_path / "index"), "another model")


def test_an_index_may_be_read_in_other_precision(tool, tmp_path, folder):
    tool.save_index(tmp_path / "index")
    half = SimCSE(folder, dtype="bfloat16")
    half.load_index(tmp_path / "index")
    assert half.search(TEXTS[3])[0][1] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "index.json").unlink(), "holds no index: expected index.json"),
        (
            lambda f: (f / "vectors.safetensors").unlink(),
            "is incomplete: vectors.safetensors is missing",
        ),
        (lambda f: cut(f / "vectors.safetensors"), "vectors.safetensors is not as it was written"),
        (lambda f: cut(f / "sentences.jsonl"), "sentences.jsonl is not as it was written"),
        (lambda f: cut(f / "index.json"), "is no index of this version"),
        (lambda f: (f / "index.json").write_text("[]"), "is no index of this version"),
        (lambda f: (f / "index.json").write_bytes(b"\xff"), "is no index of this version"),
        (lambda f: change(f, format="faiss"), "its format is 'faiss'"),
        (lambda f: change(f, storage="int8"), "is no index of this version"),
        (lambda f: change(f, storage=None), "is no index of this version"),
        (lambda f: change(f, dimension=-1), "is no index of this version"),
        (lambda f: change(f, count=3), "40 sentences and 40 vectors"),
        (lambda f: change(f, sha256={}), "it lacks a SHA-256"),
        (lambda f: change(f, probe="x"), "is no index of this version"),
        (lambda f: change(f, faiss="hnsw"), "faiss is 'hnsw'"),
    ],
)
def test_incomplete_altered_and_foreign_folders(tool, tmp_path, harm, said):
    tool.save_index(tmp_path / "index")
    harm(tmp_path / "index")
    fails(lambda: tool.load_index(tmp_path / "index"), said, tmp_path / "index")


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def change(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_searching_while_others_add(tool):
    expected = tool.search(TEXTS, threshold=0.999, top_k=1)
    found, done = [], threading.Event()

    def read():
        while not done.is_set():
            found.append(tool.search(TEXTS, threshold=0.999, top_k=1) == expected)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(15):
        tool.add_to_index([f"big mat {'big ' * i}"])
    done.set()
    for thread in threads:
        thread.join()
    assert len(found) > 3
    assert all(found)
    assert len(tool.index.sentences) == 55


@pytest.mark.parametrize("fast", [False, True])
def test_faiss_finds_the_same(tool, tmp_path, folder, fast):
    pytest.importorskip("faiss", reason="pip install faiss-cpu")
    expected = tool.search(TEXTS, threshold=0.5)
    # As many cells are looked into as there are: exact.
    other = SimCSE(folder, num_cells=4, num_cells_in_search=4)
    other.build_index(TEXTS[:30], use_faiss=True, faiss_fast=fast)
    assert len(other.search("dog", threshold=-2, top_k=50)) == 30
    other.add_to_index(TEXTS[30:])
    again = SimCSE(folder, num_cells=4, num_cells_in_search=4)
    other.save_index(tmp_path / "index")
    again.load_index(tmp_path / "index")
    for one in (other, again):
        assert isinstance(one.index.vectors, index.FaissVectors)
        assert one.index.vectors.fast is fast
        found = one.search(TEXTS, threshold=0.5)
        for hits, wanted in zip(found, expected, strict=True):
            assert [s for _, s in hits] == pytest.approx([s for _, s in wanted], abs=1e-5)


def test_faiss_is_only_used_where_asked_for_and_there(tool, monkeypatch):
    monkeypatch.setattr(index, "find_spec", lambda name: None)
    tool.build_index(TEXTS)
    assert isinstance(tool.index.vectors, Vectors)
    fails(lambda: tool.build_index(TEXTS, use_faiss=True), "Run: pip install faiss-cpu")


@pytest.mark.field("1h")
def test_a_full_disk_leaves_the_index_that_was_there(tool, tmp_path):
    tool.save_index(tmp_path / "index")
    with full_disk(100), pytest.raises(OSError, match="cannot be written"):
        tool.save_index(tmp_path / "index")
    tool.load_index(tmp_path / "index")
    assert not list(tmp_path.glob(".*")), "nothing is left aside"


def test_other_files_in_the_folder_of_an_index_stay(tool, tmp_path):
    tool.build_index(["a dog", "a cat"])
    for _ in range(2):
        tool.save_index(tmp_path / "index")
        (tmp_path / "index/notes.md").write_text("mine", encoding="utf-8")
    tool.save_index(tmp_path / "index")
    assert (tmp_path / "index/notes.md").is_file()
    assert not list(tmp_path.glob(".*")), "nothing is left aside"
