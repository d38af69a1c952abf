"""data/prepare.py: shards, tokenizers, embedded corpus, own text, the downloader against a loopback hub."""
from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import unicodedata
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

os.environ.update(HF_HUB_OFFLINE="0", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")  # before imports

SCRIPT = Path(__file__).resolve().parents[1] / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
sys.modules["prepare"] = prepare
spec.loader.exec_module(prepare)

spm = pytest.importorskip("sentencepiece")
BOS = 1


# ---- helpers -----------------------------------------------------------------------------------------------

def read_tokens(path: Path) -> np.ndarray:
    """Tokens of a shard, read without the code under test; asserts the layout."""
    raw = path.read_bytes()
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, (len(raw) - 1024) // 2] and not header[3:].any()
    return np.frombuffer(raw[1024:], "<u2")


def split_documents(tokens: np.ndarray) -> list[list[int]]:
    """Documents of a token stream, without their BOS."""
    assert tokens[0] == BOS
    return [part[1:].tolist() for part in np.split(tokens, np.flatnonzero(tokens == BOS))[1:]]


def normalised(text: str) -> str:
    """What the tokenizers' normalisation leaves of ordinary text."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def folder_bytes(root: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def note(out: Path, name: str) -> dict:
    """What the `dataset.json` of a dataset says."""
    return json.loads((out / "datasets" / name / "dataset.json").read_text())


def fails(capsys, *argv: object) -> str:
    """The message of a command that must fail: one line `error: ...`, exit code 2."""
    capsys.readouterr()
    assert prepare.main([str(a) for a in argv]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    return err


def works(capsys, *argv: object) -> str:
    """The output of a command that must succeed."""
    capsys.readouterr()
    code = prepare.main([str(a) for a in argv])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


# ---- shards ------------------------------------------------------------------------------------------------

@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 65535), max_size=200), st.sampled_from(["<u2", ">u2", "i4", "i8"]))
def test_shard_round_trip(tmp_path_factory, tokens, dtype):
    path = tmp_path_factory.mktemp("shard") / "fineweb_train_000000.bin"
    prepare.write_shard(path, np.array(tokens, dtype))
    assert read_tokens(path).tolist() == tokens and prepare.check_shard(path) == len(tokens)
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("tokens", [np.array([65536]), np.array([-1]), np.array([1.0]), np.array([[1]])])
def test_shard_refuses_what_uint16_cannot_hold(tmp_path, tokens):
    with pytest.raises(ValueError):
        prepare.write_shard(tmp_path / "x.bin", tokens)
    assert not os.listdir(tmp_path)


def test_shard_survives_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.bin"
    prepare.write_shard(path, np.arange(5))
    before = path.read_bytes()

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        prepare.write_shard(path, np.arange(9))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.bin"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b[:100], lambda b: b"",
                                    lambda b: b"\0" + b[1:]])
def test_check_shard_finds_damage(tmp_path, damage):
    path = tmp_path / "x.bin"
    prepare.write_shard(path, np.arange(7))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(prepare.UserError, match="x.bin"):
        prepare.check_shard(path)


def test_shard_writer_fills_shards_in_order(tmp_path):
    writer = prepare.ShardWriter(tmp_path, "train", 10)
    for start in range(0, 27, 9):
        writer.add(np.arange(start, start + 9), 1)
    writer.flush()
    parts = [read_tokens(tmp_path / f"fineweb_train_{i:06d}.bin") for i in range(3)]
    assert [len(part) for part in parts] == [10, 10, 7]
    assert np.concatenate(parts).tolist() == list(range(27))
    assert writer.summary()["tokens"] == 27 and writer.summary()["documents"] == 3


def test_failed_rebuild_keeps_the_old_folder(tmp_path):
    with prepare.atomic_folder(tmp_path / "set") as stage:
        (stage / "a").write_text("old")
    with pytest.raises(RuntimeError):
        with prepare.atomic_folder(tmp_path / "set") as stage:
            (stage / "a").write_text("new")
            raise RuntimeError
    assert folder_bytes(tmp_path) == {"set/a": b"old"}
    (tmp_path / "set").rename(tmp_path / ".set.old")  # killed between the two renames
    with prepare.atomic_folder(tmp_path / "set") as stage:
        assert (tmp_path / "set" / "a").read_text() == "old"
        (stage / "a").write_text("new")
    assert folder_bytes(tmp_path) == {"set/a": b"new"}


# ---- embedded ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("embedded")
    prepare.build_embedded(out)
    return out


@pytest.fixture(scope="module")
def embedded_texts() -> dict[str, list[str]]:
    """The documents of each split, in order."""
    documents = prepare.embedded_documents(Path(sysconfig.get_paths()["stdlib"]))
    order = sorted(documents, key=prepare.stable_fraction)
    is_val = [prepare.stable_fraction(name) < 0.05 for name in order]
    return {"val": [documents[n] for n, v in zip(order, is_val) if v],
            "train": [documents[n] for n, v in zip(order, is_val) if not v]}


@pytest.fixture(scope="module")
def model(embedded) -> Path:
    return embedded / "tokenizers" / "embedded_1024_bpe.model"


@pytest.fixture(scope="module")
def tokenizer(model):
    return spm.SentencePieceProcessor(model_file=str(model))


def shard(out: Path, split: str, name: str = "embedded_sp1024") -> Path:
    return out / "datasets" / name / f"fineweb_{split}_000000.bin"


def test_embedded_is_deterministic(embedded, tmp_path):
    command = [sys.executable, str(SCRIPT), "embedded", "--out", str(tmp_path)]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""
    assert folder_bytes(tmp_path) == folder_bytes(embedded)
    data = tmp_path / "datasets" / "embedded_sp1024"
    model = tmp_path / "tokenizers" / "embedded_1024_bpe.model"
    assert result.stdout.splitlines()[-1] == f"DATA_PATH={data} TOKENIZER_PATH={model} VOCAB_SIZE=1024"


def test_embedded_documents_round_trip(embedded, embedded_texts, tokenizer):
    for split in ("train", "val"):
        documents = split_documents(read_tokens(shard(embedded, split)))
        assert [tokenizer.decode(ids) for ids in documents] == list(map(normalised, embedded_texts[split]))


def test_embedded_tokens_are_pieces_of_text(embedded, tokenizer):
    control = [i for i in range(1024) if tokenizer.is_control(i) or tokenizer.is_unknown(i)]
    assert control == [0, 1, 2, 3] and tokenizer.vocab_size() == 1024  # as in the published ones
    assert tokenizer.piece_to_id("\u2581") != tokenizer.unk_id()
    for split in ("train", "val"):
        tokens = read_tokens(shard(embedded, split))
        assert tokens.max() < 1024 and set(np.unique(tokens[tokens < 4]).tolist()) == {BOS}
    assert tokenizer.decode(tokenizer.encode("snow ☃ 雪")) == "snow ☃ 雪"  # spelt in bytes, not unknown


def test_embedded_validation_is_unseen(embedded, embedded_texts, model, tmp_path):
    train, val = (split_documents(read_tokens(shard(embedded, split))) for split in ("train", "val"))
    assert not set(map(tuple, train)) & set(map(tuple, val))
    seen, unseen = ({text for document in embedded_texts[split] for text in document.split("\n\n")
                     if len(text) > 300} for split in ("train", "val"))
    assert unseen and not seen & unseen
    prepare.train_tokenizer(embedded_texts["train"], tmp_path / "again.model", 1024)
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()  # trained on the training part alone


def test_embedded_size_and_note(embedded):
    info = json.loads((embedded / "datasets" / "embedded_sp1024" / "dataset.json").read_text())
    for split, least in (("train", 300_000), ("val", 15_000)):
        assert info[split]["tokens"] == len(read_tokens(shard(embedded, split))) > least
        name, digest = next(iter(info[split]["files"].items()))
        assert digest == hashlib.sha256(shard(embedded, split).read_bytes()).hexdigest() and name
    assert str(embedded) not in json.dumps(info)


def test_embedded_second_run_does_nothing(embedded, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in embedded.rglob("*")}
    monkeypatch.setattr(prepare, "embedded_documents", lambda *a: pytest.fail("rebuilt"))
    assert "already complete" in works(capsys, "embedded", "--out", embedded)
    assert {path: path.stat().st_mtime_ns for path in embedded.rglob("*")} == before


@pytest.mark.parametrize("damage", ["shard", "model", "note"])
def test_embedded_is_rebuilt_when_damaged(embedded, model, tmp_path, damage):
    for name, content in folder_bytes(embedded).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    folder, copy = tmp_path / "datasets" / "embedded_sp1024", tmp_path / "tokenizers" / model.name
    assert prepare.embedded_is_complete(folder, copy, 1024)
    if damage == "shard":
        shard(tmp_path, "val").write_bytes(shard(tmp_path, "val").read_bytes()[:-2])
    elif damage == "model":
        copy.unlink()
    else:
        (folder / "dataset.json").write_text('{"kind": "embedded", "recipe": 1, "vocab_size": 1024}')
    assert not prepare.embedded_is_complete(folder, copy, 1024)


def test_embedded_without_sources(tmp_path, capsys, monkeypatch):
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "lib.py").write_text('"""' + "One sentence of documentation, long enough. " * 20 + '"""')
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)  # as when it was not installed
    assert list(prepare.embedded_documents(tmp_path)) == ["module lib.py"]
    monkeypatch.setattr(prepare.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "nowhere")})
    assert "almost no documentation" in fails(capsys, "embedded", "--out", tmp_path / "out")


def test_prose_drops_doctests_and_rules():
    text = "Add two numbers.\n\n>>> add(1, 2)\n3\n\n======\n\n  | a | b |\n\nIt never fails."
    assert prepare.prose(text) == "Add two numbers.\n\nIt never fails."


# ---- text --------------------------------------------------------------------------------------------------

TEXTS = [f"Document {i}, about the number {i}, a naïve café №{i}.\nIts second line." for i in range(120)]


@pytest.fixture
def jsonl(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_text_jsonl_becomes_shards(jsonl, tmp_path, model, tokenizer, capsys):
    out = tmp_path / "my data"
    printed = works(capsys, "text", jsonl, "--out", out, "--tokenizer", model, "--val-fraction", 0.1,
                    "--shard-tokens", 1000)
    folder = out / "datasets" / "docs_sp1024"
    assert printed.splitlines()[-1] == f"DATA_PATH='{folder}' TOKENIZER_PATH={model} VOCAB_SIZE=1024"
    found = {}
    for split in ("train", "val"):
        shards = sorted(folder.glob(f"fineweb_{split}_*.bin"))
        parts = [read_tokens(path) for path in shards]
        assert all(len(part) == 1000 for part in parts[:-1])
        found[split] = [tokenizer.decode(ids) for ids in split_documents(np.concatenate(parts))]
    assert len(list(folder.glob("fineweb_train_*"))) > 1
    assert sorted(found["train"] + found["val"]) == sorted(map(normalised, TEXTS))
    assert 2 <= len(found["val"]) <= 30
    info = json.loads((folder / "dataset.json").read_text())
    assert info["train"]["text_bytes"] + info["val"]["text_bytes"] == sum(len(t.encode()) for t in TEXTS)


@pytest.mark.parametrize("frames", [1, 3])
def test_text_zst_equals_plain(jsonl, tmp_path, model, capsys, frames):
    zstandard = pytest.importorskip("zstandard")
    raw, packed = jsonl.read_bytes(), b""
    for i in range(frames):
        part = raw[len(raw) * i // frames : len(raw) * (i + 1) // frames]
        packed += zstandard.ZstdCompressor().compress(part)
    (tmp_path / "docs.jsonl.zst").write_bytes(packed)
    works(capsys, "text", jsonl, "--out", tmp_path / "a", "--tokenizer", model)
    works(capsys, "text", f"{jsonl}.zst", "--out", tmp_path / "b", "--tokenizer", model)
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a if name.endswith(".bin"))


def test_text_reads_a_large_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    settings_ = zstandard.ZstdCompressionParameters.from_level(1, window_log=27)
    packed = zstandard.ZstdCompressor(compression_params=settings_).compressobj()  # writes the window's size
    (tmp_path / "a.txt.zst").write_bytes(packed.compress(b"hello") + packed.flush())
    assert list(prepare.read_documents([tmp_path / "a.txt.zst"])) == ["hello"]


def test_text_new_tokenizer_and_val_file(jsonl, tmp_path, capsys):
    (tmp_path / "held.txt").write_text("\ufeffHeld-out text with zebras.\r\n")
    out = tmp_path / "out"
    args = ["text", jsonl, "--val-file", tmp_path / "held.txt", "--vocab-size", 350, "--out", out,
            "--name", "mine"]
    printed = works(capsys, *args)
    assert "VOCAB_SIZE=350" in printed
    tokenizer = spm.SentencePieceProcessor(model_file=str(out / "tokenizers" / "mine_350_bpe.model"))
    assert tokenizer.vocab_size() == 350 and tokenizer.bos_id() == BOS
    val = split_documents(read_tokens(shard(out, "val", "mine_sp350")))
    assert [tokenizer.decode(ids) for ids in val] == ["Held-out text with zebras."]
    assert len(split_documents(read_tokens(shard(out, "train", "mine_sp350")))) == len(TEXTS)
    before = folder_bytes(out)
    works(capsys, *args)  # replaces its own work, with the same bytes
    assert folder_bytes(out) == before


def test_text_single_file_is_cut_in_two(tmp_path, model, tokenizer, capsys):
    text = " ".join(f"word{i}" for i in range(1000))
    (tmp_path / "book.txt").write_text(text)
    works(capsys, "text", tmp_path / "book.txt", "--out", tmp_path, "--tokenizer", model)
    train, val = (split_documents(read_tokens(shard(tmp_path, s, "book_sp1024"))) for s in ("train", "val"))
    assert len(train) == len(val) == 1
    assert tokenizer.decode(train[0]) + " " + tokenizer.decode(val[0]) == text
    assert 0.01 < len(val[0]) / (len(val[0]) + len(train[0])) < 0.03


def test_text_says_what_was_held_out(jsonl, tmp_path, model, capsys):
    """A single file is one document: its end is held out, and one is told; so is who has little to score on."""
    book = tmp_path / "book.txt"
    book.write_text(" ".join(f"word{i}" for i in range(20000)))
    few = "bytes of validation text are rough"
    for arguments, told in (((book,), ["cut in two", few]), ((book, "--val-fraction", 0.5), ["cut in two"]),
                            ((book, "--val-file", jsonl), [few]), ((jsonl, "--val-file", book), [])):
        printed = works(capsys, "text", *arguments, "--out", tmp_path, "--name", "d", "--tokenizer", model)
        notes = [line for line in printed.splitlines() if line.startswith("note: ")]
        assert len(notes) == len(told) and all(text in line for text, line in zip(told, notes))
        assert re.search(r"^train .* \d+ document" + ("s" if arguments[0] == jsonl else "") + " ", printed, re.M)
        assert printed.splitlines()[-1].startswith("DATA_PATH=")


def test_text_that_begins_with_spaces_has_the_bytes_that_its_tokens_decode_to(tmp_path, capsys):
    """Under a tokenizer that keeps every space; it is kept beside the data, where `dataset.json` leads to it."""
    texts = [" " * (i % 4) + f"indented line {i}\n\n  and another " for i in range(200)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "own"), model_type="bpe", vocab_size=300, bos_id=1,
        eos_id=2, unk_id=0, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
        normalization_rule_name="identity", required_chars="\u2581", minloglevel=3)
    model = tmp_path / "own.model"
    for taken in (b"", b"another"):
        out = tmp_path / f"out{taken.decode()}"
        if taken:
            (out / "tokenizers").mkdir(parents=True)
            (out / "tokenizers" / "own.model").write_bytes(taken)
        works(capsys, "text", tmp_path / "d.jsonl", "--out", out, "--tokenizer", model, "--val-fraction", 0.3)
        info = note(out, "d_sp300")
        beside = out / "datasets" / "d_sp300" / ".." / ".." / "tokenizers" / info["tokenizer"]["name"]
        assert beside.read_bytes() == model.read_bytes()
        assert (out / "tokenizers" / "own.model").read_bytes() == (taken or model.read_bytes())
        assert hashlib.sha256(beside.read_bytes()).hexdigest() == info["tokenizer"]["sha256"]
    tokenizer = spm.SentencePieceProcessor(model_file=str(model))
    for split in ("train", "val"):
        decoded = [tokenizer.decode(ids) for ids in split_documents(read_tokens(shard(out, split, "d_sp300")))]
        assert sum(len(text.encode()) for text in decoded) == info[split]["text_bytes"]
        assert any(text.startswith("  ") for text in decoded)


def test_text_limit_documents(jsonl, tmp_path, model, capsys):
    works(capsys, "text", jsonl, "--out", tmp_path, "--tokenizer", model, "--limit-documents", 7)
    info = note(tmp_path, "docs_sp1024")
    assert info["train"]["documents"] == 7 and info["val"]["documents"] == 1 and info["document_cut"]


def divide(texts: list[str], fraction: float) -> list[tuple[str, str]]:
    held = prepare.choose_held(iter(texts), fraction)
    return [part for text in texts for part in held.split(text)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1, max_size=30), st.floats(0.01, 0.9))
def test_splits_lose_nothing_and_validation_is_never_empty(texts, fraction):
    found = divide(texts, fraction)
    assert "".join(text for _, text in found) == "".join(texts)
    assert any(split == "val" for split, _ in found)
    assert len(found) <= len(texts) + max(map(texts.count, texts))  # one document is cut, with its copies


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=60), st.sampled_from([0.02, 0.1, 0.3]),
       st.sampled_from(["xy", "x y ", "xxxxxxxx\n", "\u4e00\u4e8c"]))
def test_the_share_held_out_is_the_one_asked_for(lengths, fraction, words):
    """Whatever the sizes: one large file, two books, a header and then a genome, many small documents."""
    texts = [(f"{i}:" + words * size)[:size + 4].strip() for i, size in enumerate(lengths)]
    held = sum(len(text) for split, text in divide(texts, fraction) if split == "val")
    total = sum(map(len, texts))
    assert 0.6 * fraction * total - 9 <= held <= 1.6 * fraction * total + 9


def test_copies_stay_on_one_side():
    texts = [f"document {i % 40} " * 5 for i in range(400)]
    sides = {}
    for split, text in divide(texts, 0.2):
        sides.setdefault(text, set()).add(split)
    assert len(sides) == 40 and all(len(side) == 1 for side in sides.values())


@pytest.mark.parametrize("text, cut", [
    ("a b c d e\n\nf g h i j k l m n o p\nq r s t u v w x", "q r s"), ("aaaa " * 40, "aaaa aaaa"),
    (">chr1\n" + "ACGT" * 100, "GTAC"), ("\u4e00" * 300, "\u4e00"), ("x" * 70 + " " * 30 + "y" * 70, "y"),
    ("x" * 106 + " " * 8 + "y" * 46, "y")])
def test_a_document_is_cut_where_something_ends(text, cut):
    (_, train), (_, val) = prepare.cut_in_two(text, 0.3)
    assert train + val == text.strip() and val.startswith(cut) and 0.28 <= len(val) / len(text.strip()) <= 0.46


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=6).map(lambda b: b.replace(b"a", b"\n")), max_size=8))
def test_lines_do_not_depend_on_chunks(chunks):
    whole = b"".join(chunks).split(b"\n")
    assert list(prepare.read_lines(chunks)) == (whole if whole[-1] else whole[:-1])


@given(st.lists(st.text("x", min_size=1, max_size=5), max_size=50), st.integers(5, 60))
def test_sample_is_evenly_spread_and_bounded(texts, limit):
    texts = [f"{i}{text}" for i, text in enumerate(texts)]
    sample = prepare.sample_evenly(texts, limit)
    strides = np.diff([texts.index(text) for text in sample])
    assert sum(map(len, sample)) <= limit or len(sample) == 1
    assert len(set(strides.tolist())) <= 1 and sample[:1] == texts[:1]


def test_text_jsonl_key(tmp_path, model, capsys):
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(TEXTS)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    arguments = ("text", tmp_path / "d.jsonl", "--out", tmp_path, "--tokenizer", model)
    works(capsys, *arguments, "--column", "body")
    info = note(tmp_path, "d_sp1024")
    assert info["column"] == "body" and info["train"]["documents"] + info["val"]["documents"] >= len(TEXTS)
    assert 'd.jsonl:1: expected an object with a "text" string' in fails(capsys, *arguments)
    assert 'd.jsonl:1: expected an object with a "id" string' in fails(capsys, *arguments, "--column", "id")


# ---- parquet: skipped where pyarrow is not installed -------------------------------------------------------

PARQUET_TYPES = {"string": lambda pa: pa.string(), "large_string": lambda pa: pa.large_string(),
                 "dictionary": lambda pa: pa.dictionary(pa.int32(), pa.string())}


def write_parquet(path: Path, texts: list[str | None], rows: int = 50, kind: str = "string", **columns) -> Path:
    """A parquet file with a column `text`, others before it, and row groups of `rows` rows."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    text = pa.array(texts, pa.string()).cast(PARQUET_TYPES[kind](pa))
    parquet.write_table(pa.table({**columns, "text": text}), path, row_group_size=rows)
    return path


@settings(max_examples=60, deadline=None)
@given(st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=12), max_size=200),
       st.integers(1, 250), st.sampled_from(sorted(PARQUET_TYPES)), st.integers(1, 200))
def test_parquet_gives_the_documents_that_jsonl_gives(tmp_path_factory, texts, rows, kind, limit):
    folder, told = tmp_path_factory.mktemp("parquet"), []
    packed = write_parquet(folder / "d.parquet", texts, rows, kind, id=list(range(len(texts))))
    plain = folder / "d.jsonl"
    plain.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text is not None))
    assert list(prepare.read_documents([packed], None, told.append)) == list(prepare.read_documents([plain]))
    assert sum(told) == (packed.stat().st_size if texts else 0)  # the progress bar ends at its end
    both = [text for text in texts if text and text.strip()] * 2
    assert list(prepare.read_documents([packed, plain], limit)) == both[:limit]


def test_text_parquet_becomes_the_same_shards(jsonl, tmp_path, model, capsys):
    packed = write_parquet(tmp_path / "docs.parquet", TEXTS, rows=7)
    for path, out in ((jsonl, "a"), (packed, "b")):
        works(capsys, "text", path, "--out", tmp_path / out, "--tokenizer", model, "--shard-tokens", 1000)
    a, b = folder_bytes(tmp_path / "a"), folder_bytes(tmp_path / "b")
    assert a.keys() == b.keys() and all(a[name] == b[name] for name in a if name.endswith(".bin"))
    held = write_parquet(tmp_path / "held.parquet", ["Held out."])
    works(capsys, "text", jsonl, packed, "--val-file", held, "--out", tmp_path / "c", "--vocab-size", 350)
    info = note(tmp_path / "c", "docs_sp350")
    assert info["train"]["documents"] == 2 * len(TEXTS) and info["val"]["documents"] == 1


def test_parquet_is_read_a_few_rows_at_a_time(tmp_path):
    """Its one row group takes 48 MB; what Arrow holds meanwhile does not depend on that, but on the pages in it."""
    pa = pytest.importorskip("pyarrow")
    random = np.random.default_rng(0)
    texts = [random.bytes(3000).hex() for _ in range(8000)]
    packed = write_parquet(tmp_path / "d.parquet", texts, rows=len(texts))
    assert packed.stat().st_size > 40_000_000
    before, most = pa.total_allocated_bytes(), 0
    for number, text in enumerate(prepare.read_documents([packed])):
        most = max(most, pa.total_allocated_bytes() - before)
        assert text == texts[number]
    assert number + 1 == len(texts) and most < 20_000_000


def test_bad_parquet_is_one_line(jsonl, tmp_path, model, capsys):
    pa = pytest.importorskip("pyarrow")
    sizes = list(range(len(TEXTS)))
    whole = write_parquet(tmp_path / "whole.parquet", TEXTS, url=[f"http://{i}" for i in sizes], size=sizes)
    arguments = ("--out", tmp_path / "out", "--tokenizer", model)
    raw = whole.read_bytes()
    for name, content in (("noise", b"not parquet"), ("empty", b""), ("cut", raw[:-20]), ("hole", raw[:4] + raw[9:])):
        (tmp_path / f"{name}.parquet").write_bytes(content)
        # told before any other file is read
        assert f"{name}.parquet: not valid parquet" in fails(
            capsys, "text", jsonl, tmp_path / f"{name}.parquet", *arguments)
    message = fails(capsys, "text", whole, "--column", "body", *arguments)
    assert "no column is called 'body'; --column names the one with the text, out of: url, size, text" in message
    assert "column 'size' holds int64, not text" in fails(capsys, "text", whole, "--column", "size", *arguments)
    works(capsys, "text", whole, "--column", "url", *arguments)
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pa.parquet.write_table(twice, tmp_path / "twice.parquet")
    assert "two columns are called 'text'" in fails(capsys, "text", tmp_path / "twice.parquet", *arguments)
    latin = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    pa.parquet.write_table(pa.table({"text": latin}), tmp_path / "latin.parquet")
    assert "latin.parquet: not UTF-8 (in row 2)" in fails(capsys, "text", tmp_path / "latin.parquet", *arguments)
    assert "no document is left" in fails(
        capsys, "text", write_parquet(tmp_path / "none.parquet", [None, " "]), *arguments)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_parquet_is_read_or_refused(tmp_path_factory, data):
    path = write_parquet(tmp_path_factory.mktemp("damage") / "d.parquet", TEXTS, 30)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    try:
        list(prepare.read_documents([path]))
    except prepare.UserError as error:
        assert "d.parquet: " in str(error) and "\n" not in str(error)


def test_without_pyarrow_one_is_told_how_to_install_it(jsonl, tmp_path, model, capsys, monkeypatch):
    (tmp_path / "d.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "-m pip install pyarrow" in fails(capsys, "text", jsonl, tmp_path / "d.parquet", "--out", tmp_path)
    works(capsys, "text", jsonl, "--out", tmp_path, "--tokenizer", model)  # others do without it


BAD_FILES = {
    "missing.txt": (None, "no such file"),
    "a.pdf": (b"x", "expected a name ending in"),
    "a.parquet.zst": (b"x", "expected a name ending in"),
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8 (at byte 3)"),
    "latin.jsonl": (b'{"text": "ok"}\n{"text": "caf\xe9"}\n', ":2: not UTF-8"),
    "cut.jsonl": (b'{"text": "ok"}\n\n{"text": "o\n', ":3: not JSON"),
    "number.jsonl": (b'{"text": "ok"}\n{"text": 7}\n', ":2: expected an object"),
    "list.jsonl": (b'["text"]\n', ":1: expected an object"),
    "half.jsonl": (b'{"text": "\\ud800"}\n', ":1: an unpaired surrogate"),
    "empty.txt": (b" \n\n", "no document is left"),
    "noise.txt.zst": (b"not zstd data at all", "not valid zstd data"),
    "empty.jsonl.zst": (b"", "ends too early"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_text_bad_input_is_one_line(tmp_path, model, capsys, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert message in fails(capsys, "text", tmp_path / name, "--out", tmp_path / "out", "--tokenizer", model)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() or path.name.startswith(".")]


def test_text_cut_off_zst(jsonl, tmp_path, model, capsys):
    zstandard = pytest.importorskip("zstandard")
    packed = zstandard.ZstdCompressor().compress(jsonl.read_bytes())
    (tmp_path / "cut.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    message = fails(capsys, "text", tmp_path / "cut.jsonl.zst", "--out", tmp_path, "--tokenizer", model)
    assert "cut off" in message


def test_text_bad_settings_are_one_line(jsonl, tmp_path, model, capsys, monkeypatch):
    out = ("--out", tmp_path / "out")
    (tmp_path / "folder.txt").mkdir()
    noise, empty = tmp_path / "noise.model", tmp_path / "empty.model"
    noise.write_bytes(b"\x00\x01 not a model")
    empty.write_bytes(b"")
    assert "not a SentencePiece model" in fails(capsys, "text", jsonl, *out, "--tokenizer", noise)
    assert "not a SentencePiece model" in fails(capsys, "text", jsonl, *out, "--tokenizer", empty)
    assert "No such file" in fails(capsys, "text", jsonl, *out, "--tokenizer", tmp_path / "none.model")
    for given, reason in ((30000, "too large for this text, which gives at most"), (100, "too small for this text")):
        message = fails(capsys, "text", jsonl, *out, "--vocab-size", given)
        assert f"--vocab-size {given} is {reason}" in message and "coverage" not in message
        right = re.search(r"at (?:most|least) (\d+)", message)[1]
        works(capsys, "text", jsonl, *out, "--vocab-size", right)
    assert "--vocab-size" in fails(capsys, "text", jsonl, *out, "--vocab-size", 70000)
    assert "--val-fraction" in fails(capsys, "text", jsonl, *out, "--val-fraction", 1)
    assert "not allowed with" in fails(capsys, "text", jsonl, *out, "--vocab-size", 300, "--tokenizer", model)
    assert "--name" in fails(capsys, "text", jsonl, *out, "--name", "../up")
    assert "not a file" in fails(capsys, "text", tmp_path / "folder.txt", *out)
    assert "both" in fails(capsys, "text", jsonl, *out, "--val-file", jsonl)
    assert "required" in fails(capsys, "text") and "COMMAND" in fails(capsys)
    (tmp_path / "file").write_text("")
    assert "Not a directory" in fails(capsys, "text", jsonl, "--out", tmp_path / "file", "--tokenizer", model)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert "pip install tqdm" in fails(capsys, "text", jsonl, *out, "--tokenizer", model)


def test_text_disk_full_is_one_line_and_leaves_nothing(jsonl, tmp_path, model, capsys, monkeypatch):
    out = tmp_path / "out"
    works(capsys, "text", jsonl, "--out", out, "--tokenizer", model)
    before = folder_bytes(out)

    def full(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in fails(capsys, "text", jsonl, "--out", out, "--tokenizer", model)
    assert folder_bytes(out) == before and not list(out.rglob(".*"))


def test_text_does_not_replace_foreign_data(jsonl, tmp_path, model, capsys):
    precious = tmp_path / "datasets" / "docs_sp1024" / "fineweb_train_000000.bin"
    precious.parent.mkdir(parents=True)
    precious.write_bytes(b"precious")
    assert "--name" in fails(capsys, "text", jsonl, "--out", tmp_path, "--tokenizer", model)
    assert precious.read_bytes() == b"precious"


def test_text_refuses_unknown_characters(tmp_path, capsys):
    def train(path: Path, **options) -> Path:
        with open(path, "wb") as file:
            spm.SentencePieceTrainer.train(sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe",
                                           vocab_size=120, minloglevel=3, **options)
        return path

    (tmp_path / "a.txt").write_text("plain words and snow ☃ and more plain words")
    no_bos, no_bytes = train(tmp_path / "a.model", bos_id=-1), train(tmp_path / "b.model")
    args = ("text", tmp_path / "a.txt", "--val-fraction", 0.5, "--out", tmp_path, "--tokenizer")
    assert "no BOS" in fails(capsys, *args, no_bos)
    assert "no byte fallback" in fails(capsys, *args, no_bytes)


@pytest.mark.parametrize("vocab_size", [1024, 8192])
def test_published_tokenizers_work(jsonl, tmp_path, capsys, vocab_size):
    published = SCRIPT.parents[2] / "shared" / "data" / f"fineweb_{vocab_size}_bpe.model"
    if not published.is_file():
        pytest.skip("the published tokenizers are not here")
    works(capsys, "text", jsonl, "--out", tmp_path, "--tokenizer", published)
    tokenizer = spm.SentencePieceProcessor(model_file=str(published))
    documents = split_documents(read_tokens(shard(tmp_path, "train", f"docs_sp{vocab_size}")))
    assert {tokenizer.decode(ids) for ids in documents} <= set(map(normalised, TEXTS))


# ---- fineweb -----------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PREFIX = "/datasets/someone/shards/resolve/main/"


class LoopbackHub(BaseHTTPRequestHandler):
    """As much of the hub as a file download needs: HEAD and GET of /datasets/REPO/resolve/REVISION/PATH."""

    def answer(self, send_body: bool) -> None:
        files, log, cut = self.server.files, self.server.log, self.server.cut
        body = files.get(self.path.removeprefix(PREFIX)) if self.path.startswith(PREFIX) else None
        self.send_response(200 if body is not None else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if body is None:
            known = self.path.startswith(PREFIX)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            body = b""
        self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if send_body:
            name = self.path.rpartition("/")[2]
            log.append(name)
            self.wfile.write(body[: len(body) // 2] if name in cut else body)
            self.close_connection = True

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def log_message(self, *args):
        pass


def shard_bytes(count: int, seed: int) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, count
    return header.tobytes() + np.random.default_rng(seed).integers(4, 300, count).astype("<u2").tobytes()


def publish(server) -> None:
    """Put the manifest as it now is among the files."""
    server.files["datasets/manifest.json"] = json.dumps(server.manifest).encode()


@pytest.fixture(scope="module")
def published_model(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("published") / "x.model"
    prepare.train_tokenizer([f"some words to learn from, number {i} of many" for i in range(50)], path, 300)
    return path.read_bytes()


@pytest.fixture
def hub(monkeypatch, published_model):
    """A running server with one published variant: three training shards, one validation shard."""
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library waits between its retries
    server = ThreadingHTTPServer(("127.0.0.1", 0), LoopbackHub)
    data = "datasets/datasets/fineweb10B_sp300/"
    server.files = {f"{data}fineweb_train_{i:06d}.bin": shard_bytes(1000 + i, i) for i in range(3)}
    server.files[f"{data}fineweb_val_000000.bin"] = shard_bytes(500, 9)
    server.files["datasets/tokenizers/fineweb_300_bpe.model"] = published_model
    server.files["datasets/tokenizers/fineweb_300_bpe.vocab"] = b"a list"
    server.manifest = {
        "datasets": [{"name": "fineweb10B_sp300", "tokenizer_name": "sp_bpe_300", "vocab_size": 300,
                      "stats": {"files_train": 3, "files_val": 1}}],
        "tokenizers": [{"name": "sp_bpe_300", "model_path": "tokenizers/fineweb_300_bpe.model",
                        "vocab_path": "tokenizers/fineweb_300_bpe.vocab"}]}
    publish(server)
    server.log, server.cut = [], set()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def fineweb(hub, out: Path, *more: object) -> tuple:
    return ("fineweb", "--variant", "sp300", "--train-shards", 2, "--repo-id", "someone/shards",
            "--endpoint", hub.url, "--out", out, *more)


def test_fineweb_brings_what_the_manifest_names(hub, tmp_path, capsys):
    printed = works(capsys, *fineweb(hub, tmp_path))
    data = tmp_path / "datasets" / "fineweb10B_sp300"
    model = tmp_path / "tokenizers" / "fineweb_300_bpe.model"
    assert printed.splitlines()[-1] == f"DATA_PATH={data} TOKENIZER_PATH={model} VOCAB_SIZE=300"
    names = ["fineweb_train_000000.bin", "fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    assert sorted(os.listdir(data)) == ["dataset.json", *names]
    for name in names:
        assert (data / name).read_bytes() == hub.files[f"datasets/datasets/fineweb10B_sp300/{name}"]
    packed = hub.files["datasets/tokenizers/fineweb_300_bpe.model"]
    assert model.read_bytes() == packed and model.with_suffix(".vocab").read_bytes() == b"a list"
    info = note(tmp_path, "fineweb10B_sp300")
    assert info["tokens"] == dict(zip(names, (1000, 1001, 500))) and info["vocab_size"] == 300
    assert info["tokenizer"] == {"name": model.name, "sha256": hashlib.sha256(packed).hexdigest()}


def test_fineweb_of_a_vocabulary_comes_from_who_publishes_it(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(prepare.PUBLISHERS, "sp300", "someone/shards")
    rest = ("--train-shards", 1, "--endpoint", hub.url, "--out", tmp_path)
    printed = works(capsys, "fineweb", "--vocab-size", 300, *rest)
    assert printed.splitlines()[-1].endswith("VOCAB_SIZE=300")
    assert note(tmp_path, "fineweb10B_sp300")["repo_id"] == "someone/shards"
    message = fails(capsys, "fineweb", "--vocab-size", 999, "--repo-id", "someone/shards", *rest)
    assert "available: sp300; to make it from text: bash run.sh data text FILE... --vocab-size 999" in message
    assert "not allowed with" in fails(capsys, "fineweb", "--vocab-size", 300, "--variant", "sp300", *rest)


@pytest.mark.parametrize("arguments, variant, repo_id", [
    ((), "sp1024", "willdepueoai/parameter-golf"), (("--vocab-size", 4096), "sp4096", "kevclark/parameter-golf"),
    (("--variant", "sp8192"), "sp8192", "kevclark/parameter-golf"),
    (("--vocab-size", 8192, "--repo-id", "a/b"), "sp8192", "a/b")])
def test_fineweb_repositories(capsys, monkeypatch, arguments, variant, repo_id):
    asked = []
    monkeypatch.setattr(prepare, "build_fineweb", lambda hub, out, name, shards: asked.append((name, hub.repo_id)))
    works(capsys, "fineweb", *arguments)
    assert asked == [(variant, repo_id)]


def test_fineweb_fetches_only_what_is_missing_or_broken(hub, tmp_path, capsys):
    works(capsys, *fineweb(hub, tmp_path))
    data = tmp_path / "datasets" / "fineweb10B_sp300"
    whole = folder_bytes(tmp_path)
    for damaged, keep in (("fineweb_train_000000.bin", -7), ("fineweb_val_000000.bin", 0)):
        (data / damaged).write_bytes((data / damaged).read_bytes()[:keep])
        hub.log.clear()
        works(capsys, *fineweb(hub, tmp_path))
        assert [name for name in hub.log if name.endswith(".bin")] == [damaged]
        assert folder_bytes(tmp_path) == whole
    hub.log.clear()
    works(capsys, *fineweb(hub, tmp_path, "--train-shards", 3))
    assert [name for name in hub.log if name.endswith(".bin")] == ["fineweb_train_000002.bin"]


def test_fineweb_interrupted_download_continues(hub, tmp_path, capsys):
    data = tmp_path / "datasets" / "fineweb10B_sp300"
    hub.cut.add("fineweb_train_000001.bin")  # the connection breaks in the middle, again and again
    assert "fineweb_train_000001.bin failed" in fails(capsys, *fineweb(hub, tmp_path))
    assert sorted(os.listdir(data)) == ["dataset.json", "fineweb_train_000000.bin", "fineweb_val_000000.bin"]
    hub.cut.clear()
    hub.log.clear()
    works(capsys, *fineweb(hub, tmp_path))
    assert [name for name in hub.log if name.endswith(".bin")] == ["fineweb_train_000001.bin"]


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b"<html>" + b, lambda b: b"\0" * len(b)])
def test_fineweb_refuses_a_broken_shard(hub, tmp_path, capsys, damage):
    name = "datasets/datasets/fineweb10B_sp300/fineweb_val_000000.bin"
    hub.files[name] = damage(hub.files[name])
    assert "sent a broken shard" in fails(capsys, *fineweb(hub, tmp_path))
    assert not list(tmp_path.rglob("*.bin"))


def test_fineweb_errors_are_one_line(hub, tmp_path, capsys):
    assert "available: sp300" in fails(capsys, *fineweb(hub, tmp_path, "--variant", "sp999"))
    assert not list((tmp_path / "datasets").iterdir())
    assert "only 3 training shards" in fails(capsys, *fineweb(hub, tmp_path, "--train-shards", 4))
    assert "--train-shards" in fails(capsys, *fineweb(hub, tmp_path, "--train-shards", -1))
    assert "no dataset repository" in fails(capsys, *fineweb(hub, tmp_path, "--repo-id", "someone/else"))
    assert "cannot be a repository" in fails(capsys, *fineweb(hub, tmp_path, "--repo-id", "a/b/c"))
    assert "has no file elsewhere/manifest.json" in fails(
        capsys, *fineweb(hub, tmp_path, "--remote-prefix", "elsewhere"))
    del hub.files["datasets/datasets/fineweb10B_sp300/fineweb_train_000001.bin"]
    assert "has no file" in fails(capsys, *fineweb(hub, tmp_path))


def test_fineweb_without_network(hub, tmp_path, capsys):
    hub.shutdown()
    hub.server_close()
    assert "is there a network?" in fails(capsys, *fineweb(hub, tmp_path))


@pytest.mark.parametrize("change", [
    lambda m: m.clear(), lambda m: m.update(datasets=3), lambda m: m["datasets"][0].pop("stats"),
    lambda m: m["datasets"][0].update(tokenizer_name="other"), lambda m: m["tokenizers"][0].pop("name"),
    lambda m: m["datasets"][0].pop("vocab_size"), lambda m: m["tokenizers"][0].update(model_path=[1]),
    lambda m: m["tokenizers"][0].update(model_path="tokenizers/../../outside"),
    lambda m: m["tokenizers"][0].update(model_path="prepare.py"),
    lambda m: m["tokenizers"][0].update(model_path="datasets/other/fineweb_train_000000.bin"),
    lambda m: m["tokenizers"][0].update(vocab_path="tokenizers/\0.vocab"),
    lambda m: m["tokenizers"][0].update(model_path=f"tokenizers/{'x' * 1000}.model"),
    lambda m: m["datasets"][0]["stats"].update(files_val=1e308), lambda m: m["datasets"][0]["stats"].update(files_val=0),
    lambda m: m["datasets"][0]["stats"].update(files_val=float("inf")), lambda m: m["datasets"][0].update(vocab_size=-1),
    lambda m: m["datasets"][0].update(vocab_size=299)])
def test_fineweb_bad_manifest(hub, tmp_path, capsys, change):
    change(hub.manifest)
    publish(hub)
    assert "bad manifest" in fails(capsys, *fineweb(hub, tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("change, said", [
    (lambda m: m.update(tokenizers=[{"name": "sp_bpe_300", "path": "tokenizers/x.json"}]), "no SentencePiece model"),
    (lambda m: m["datasets"][0].update(vocab_size=65537), "has 65,537 tokens"),
    (lambda m: m["tokenizers"][0].update(model_path="tokenizers/fineweb_300_bpe.vocab"), "not a SentencePiece model")])
def test_fineweb_fetches_no_shard_that_could_not_be_used(hub, tmp_path, capsys, change, said):
    change(hub.manifest)
    publish(hub)
    assert said in fails(capsys, *fineweb(hub, tmp_path))
    assert not [name for name in hub.log if name.endswith(".bin")] and not list(tmp_path.rglob("tokenizers"))


def test_fineweb_manifest_is_not_json(hub, tmp_path, capsys):
    for text in (b"<html>", b"[" * 200_000):
        hub.files["datasets/manifest.json"] = text
        assert "bad manifest: not JSON" in fails(capsys, *fineweb(hub, tmp_path))


def test_fineweb_does_not_mix_repositories(hub, tmp_path, capsys):
    works(capsys, *fineweb(hub, tmp_path))
    note = tmp_path / "datasets" / "fineweb10B_sp300" / "dataset.json"
    note.write_text(note.read_text().replace("someone/shards", "another/export"))
    assert "comes from another/export" in fails(capsys, *fineweb(hub, tmp_path))


def test_fineweb_brings_byte_sidecars(hub, tmp_path, capsys):
    hub.manifest["datasets"][0]["val_bytes_glob"] = "fineweb_val_bytes_*.bin"
    publish(hub)
    hub.files["datasets/datasets/fineweb10B_sp300/fineweb_val_bytes_000000.bin"] = shard_bytes(500, 5)
    printed = works(capsys, *fineweb(hub, tmp_path))
    assert (tmp_path / "datasets" / "fineweb10B_sp300" / "fineweb_val_bytes_000000.bin").is_file()
    assert re.search(r"val +500 tokens, shards: 1", printed)  # bytes are not tokens


# ---- the script --------------------------------------------------------------------------------------------

def test_import_does_nothing_and_needs_only_numpy():
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); sys.argv = ['x', '--bogus']\n"
            "for name in ('sentencepiece', 'zstandard', 'tqdm', 'huggingface_hub', 'pyarrow', 'torch'):\n"
            "    sys.modules[name] = None\n"
            "before = dict(os.environ); import prepare; assert os.environ == before")
    command = [sys.executable, "-B", "-c", code, str(SCRIPT.parent)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stdout + result.stderr, result.stderr


def test_a_missing_package_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub.utils", None)
    assert "pip install huggingface_hub" in fails(capsys, "fineweb", "--out", tmp_path)
