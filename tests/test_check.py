"""data/prepare.py check: is a data set whole, is it the published one, does it train on validation text."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_prepare import fails, prepare, works

DRAW = np.random.default_rng(0)
DOCUMENTS = [np.concatenate(([1], DRAW.integers(2, 500, DRAW.integers(3, 900)))) for _ in range(120)]


def write(folder: Path, split: str, documents: list, shard_tokens: int = 10 ** 9, sizes: bool = False) -> None:
    tokens = np.concatenate(documents)
    for i, start in enumerate(range(0, len(tokens), shard_tokens)):
        part = tokens[start:start + shard_tokens]
        prepare.write_shard(folder / f"fineweb_{split}_{i:06d}.bin", part)
        if sizes:
            prepare.write_shard(folder / f"fineweb_{split}_bytes_{i:06d}.bin", (part != 1) * 2)


@pytest.mark.parametrize("shard_tokens", [10 ** 9, 700, 150])
def test_clean_data_passes_and_every_document_is_seen(tmp_path, capsys, shard_tokens):
    write(tmp_path, "train", DOCUMENTS[50:], shard_tokens)
    write(tmp_path, "val", DOCUMENTS[:50], shard_tokens)
    printed = works(capsys, "check", tmp_path)
    assert "70 documents" in printed and "50 documents" in printed and "0 of 50 validation documents" in printed
    found = prepare.read_split(sorted(tmp_path.glob("fineweb_train_*.bin")), 1, 500)
    assert list(found.openings) == [prepare.opening(document) for document in DOCUMENTS[50:]]
    assert found.tokens == sum(map(len, DOCUMENTS[50:]))


@pytest.mark.parametrize("shard_tokens", [10 ** 9, 700])
def test_the_split_error_of_pr_2018_is_caught(tmp_path, capsys, shard_tokens):
    """Training shards from document 10 on beside validation text of documents 0 to 49; theirs: 10,000 and 50,000."""
    write(tmp_path, "train", DOCUMENTS[10:], shard_tokens)
    write(tmp_path, "val", DOCUMENTS[:50])
    message = fails(capsys, "check", tmp_path)
    assert "40 of 50 validation documents are in the training text" in message
    assert "40 of 50" in fails(capsys, "check", tmp_path, "--allow-copies", 0.7)
    assert "40 of 50 validation documents in" in works(capsys, "check", tmp_path, "--allow-copies", 0.9)


def test_one_document_is_enough_even_if_its_end_differs(tmp_path, capsys):
    longest = max(DOCUMENTS[:50], key=len)
    write(tmp_path, "train", [*DOCUMENTS[50:], longest[:600]])
    write(tmp_path, "val", DOCUMENTS[:50])
    assert "1 of 50 validation documents is in the training text" in fails(capsys, "check", tmp_path)


def canonical(folder: Path, monkeypatch, **changes) -> Path:
    """A data set of the published name, with numbers that fit in a test."""
    val, train = sum(map(len, DOCUMENTS[:50])), sum(map(len, DOCUMENTS[50:]))
    scored = (val - 1) // 2048 * 2048
    sizes = (np.concatenate(DOCUMENTS[:50]) != 1) * 2
    facts = {"scored": scored, "scored_bytes": int(sizes[1:scored + 1].sum()), "tokens": val, "train_tokens": train}
    monkeypatch.setattr(prepare, "CANONICAL", {"sp500": prepare.Canonical(**{**facts, **changes})})
    monkeypatch.setattr(prepare, "CANONICAL_DOCUMENTS", 50)
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 700)
    folder = folder / "fineweb10B_sp500"
    folder.mkdir()
    write(folder, "train", DOCUMENTS[50:], 700)
    write(folder, "val", DOCUMENTS[:50], sizes=True)
    return folder


def test_the_published_data_set_is_known_by_its_numbers(tmp_path, capsys, monkeypatch):
    folder = canonical(tmp_path, monkeypatch)
    assert "the validation text is the published one" in works(capsys, "check", folder)
    write(folder, "train", DOCUMENTS[50:], 300)
    assert "a training shard of 300 tokens, not 700" in fails(capsys, "check", folder)


@pytest.mark.parametrize("fact, said", [
    ("scored", "validation tokens in whole windows of 2048"), ("scored_bytes", "bytes of scored text"),
    ("tokens", "validation tokens, not"), ("train_tokens", "training tokens, more than")])
def test_another_data_set_of_that_name_is_refused(tmp_path, capsys, monkeypatch, fact, said):
    message = fails(capsys, "check", canonical(tmp_path, monkeypatch, **{fact: 5000}))
    assert "is not the published data set of that name" in message and said in message


def test_too_few_validation_documents_are_not_the_published_ones(tmp_path, capsys, monkeypatch):
    folder = canonical(tmp_path, monkeypatch)
    write(folder, "val", DOCUMENTS[:10], sizes=True)
    assert "10 validation documents, not 50" in fails(capsys, "check", folder)


def test_fingerprints_are_the_reference_s():
    case = prepare.CANONICAL["sp8192_lossless_caps_caseops_v1_reserved"]
    assert case.scored == (case.tokens - 1) // 2048 * 2048 == 47_851_520
    assert np.log(2) * case.scored_bytes / case.scored == pytest.approx(2.188371, abs=1e-6)  # loss over bits per byte


def test_what_is_broken_is_one_line(tmp_path, capsys):
    assert "has no fineweb_train" in fails(capsys, "check", tmp_path)
    write(tmp_path, "train", DOCUMENTS[50:])
    assert "has no fineweb_val" in fails(capsys, "check", tmp_path)
    write(tmp_path, "val", DOCUMENTS[:50], 700, sizes=True)
    works(capsys, "check", tmp_path)
    (tmp_path / "fineweb_val_bytes_000001.bin").unlink()
    assert "fineweb_val_bytes_000001.bin is missing" in fails(capsys, "check", tmp_path)
    prepare.write_shard(tmp_path / "fineweb_val_bytes_000001.bin", np.ones(3, int))
    assert "holds the bytes of 3 tokens, but fineweb_val_000001.bin has 700" in fails(capsys, "check", tmp_path)
    for path in tmp_path.glob("*_bytes_*"):
        path.unlink()
    (tmp_path / "fineweb_train_000001.bin").write_bytes(b"no shard")
    assert "not a token shard" in fails(capsys, "check", tmp_path)
    prepare.write_shard(tmp_path / "fineweb_train_000001.bin", np.array([600]))
    prepare.train_tokenizer(["some words and some more words to learn from"] * 20, tmp_path / "small.model", 290)
    assert "holds token" in fails(capsys, "check", tmp_path, "--tokenizer", tmp_path / "small.model")
    for path in tmp_path.glob("fineweb_*.bin"):
        path.unlink()
    write(tmp_path, "train", [np.arange(2, 9)])
    write(tmp_path, "val", [np.arange(2, 9)])
    assert "no document" in fails(capsys, "check", tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"tokenizer": ["x"]}))
    assert "no document" in fails(capsys, "check", tmp_path)


def test_built_data_is_clean(tmp_path, capsys):
    """Copies stay on one side of a split; files given as validation text must not be in the training files."""
    texts = [f"Document {i} has these words, " * 9 for i in range(40)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 2))
    works(capsys, "text", tmp_path / "docs.jsonl", "--out", tmp_path, "--vocab-size", 300, "--val-fraction", 0.3)
    assert "0 of" in works(capsys, "check", tmp_path / "datasets" / "docs_sp300")
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": texts[7]}))
    message = fails(capsys, "text", tmp_path / "docs.jsonl", "--out", tmp_path, "--vocab-size", 300, "--name", "leaky",
                    "--val-file", tmp_path / "held.jsonl")
    assert "1 of 1 validation document is in the training text" in message and "--allow-copies" in message
    assert not (tmp_path / "datasets" / "leaky_sp300").exists()
    held = "".join(json.dumps({"text": text}) + "\n" for text in (texts[7], "New words"))
    (tmp_path / "held.jsonl").write_text(held)
    assert "note: 1 of 2 validation documents" in works(
        capsys, "text", tmp_path / "docs.jsonl", "--out", tmp_path, "--vocab-size", 300, "--name", "leaky",
        "--val-file", tmp_path / "held.jsonl", "--allow-copies", 0.5)
