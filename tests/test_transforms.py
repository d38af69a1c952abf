"""data/transforms.py: lossless transforms of text and tokens, and the bytes that transformed tokens stand for."""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import prepare
import pytest
import sentencepiece
import train_gpt as tg
import transforms
from conftest import ROOT
from hypothesis import example, given, settings, strategies as st
from test_prepare import fails, note, read_tokens, works

sys.path.append(str(ROOT / "tools"))
import sample  # noqa: E402

TEXTS = [f"The NASA iPhone number {i} by OpenAI met McDonald's in LaTeX, and Bob said HELLO to the world of É." +
         " Plain words follow here, and then some more of them." * (i % 3) for i in range(60)]
PIECES = [*transforms.MARKERS, "a", "Zz", "AB", "aB", " ", "é", "É", "ſ", "K", "İ", "\0", "\ue000", "\ue005", "\n"]
texts = st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join),
                  st.text(alphabet="abAB" + "".join(transforms.MARKERS)))
T, A, C, E = transforms.MARKERS


@pytest.mark.parametrize("text, wanted", [
    ("The NASA iPhone OpenAI met Bob.", f"{T}the {A}nasa i{C}phone {T}open{C}a{C}i met {T}bob."),
    ("A AB Ab aB ABc", f"{T}a {A}ab {T}ab a{C}b {T}a{C}bc"), ("É ÉCOLE A1B2", f"É É{A}cole {T}a1{T}b2"),
    (f"x{T}Y {E}", f"x{E}{T}{T}y {E}{E}"), ("", ""), ("plain é", "plain é")])
def test_capitals_become_markers_as_published(text, wanted):
    assert transforms.encode_case(text) == wanted and transforms.decode_case(wanted) == text


@given(texts)
@example("".join(transforms.MARKERS) * 2)
@settings(max_examples=400, deadline=None)
def test_any_text_comes_back(text):
    encoded = transforms.encode_case(text)
    assert transforms.decode_case(encoded) == text
    assert not any(letter.isascii() and letter.isupper() for letter in encoded)


@given(texts, st.lists(st.integers(0, 10 ** 6), max_size=5))
@settings(max_examples=200, deadline=None)
def test_a_sample_is_readable_as_it_comes(text, cuts):
    encoded = transforms.encode_case(text)
    edges = [0, *sorted(cut % (len(encoded) + 1) for cut in cuts), len(encoded)]
    pieces = [encoded[a:b] for a, b in zip(edges, edges[1:])]
    assert "".join(transforms.readable(pieces)) == text
    assert "".join(transforms.readable([f"{T}{C}a{A}", "b ", T, "."])) == "AB ."  # what a model may write


@given(texts)
@settings(max_examples=200, deadline=None)
def test_transformed_text_is_recognised(text):
    """Whatever has a capital is known once it is transformed; text with capitals is no transformed text."""
    capital = any(letter.isascii() and letter.isupper() for letter in text)
    assert transforms.is_encoded_case(transforms.encode_case(text)) == capital
    assert not (capital and transforms.is_encoded_case(text))


@pytest.mark.parametrize("broken", [T, f"{T}A", f"{A} a", f"{C}{T}a", f"a{E}"])
def test_what_no_text_transforms_to_is_refused(broken):
    with pytest.raises(ValueError, match="U\\+E00"):
        transforms.decode_case(broken)


@given(texts, st.lists(st.integers(0, 10 ** 6), max_size=6))
@settings(max_examples=200, deadline=None)
def test_parts_stand_for_the_bytes_of_original_text(text, cuts):
    """Against a walk over the characters: letters count one byte, markers none, one behind ESC its own three."""
    encoded, slow, escaped = transforms.encode_case(text), [], False
    for letter in encoded:
        marker = letter in transforms.MARKERS and not escaped
        slow.append(0 if marker else len(letter.encode()))
        escaped = marker and letter == E
    edges = sorted({0, len(encoded), *(cut % (len(encoded) + 1) for cut in cuts)})
    offsets = np.array([len(encoded[:edge].encode()) for edge in edges])
    found = transforms.original_bytes(encoded, offsets[:-1], offsets[1:])
    assert found.tolist() == [sum(slow[a:b]) for a, b in zip(edges, edges[1:])]
    assert sum(slow) == len(text.encode())


# ---- data sets ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "docs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def made(jsonl, tmp_path_factory) -> Path:
    """The texts with a tokenizer of their own, by caseops and, with the same tokenizer, by mp3."""
    out = tmp_path_factory.mktemp("made")
    common = ("text", jsonl, "--out", out, "--val-fraction", 0.3, "--transform")
    assert prepare.main([str(a) for a in (*common, "caseops", "--vocab-size", 400)]) == 0
    assert prepare.main([str(a) for a in (*common, "mp3", "--tokenizer", model_of(out))]) == 0
    return out


def model_of(out: Path) -> Path:
    return out / "tokenizers" / "docs_400_bpe_caseops.model"


def stream(out: Path, transform: str, kind: str) -> np.ndarray:
    return read_tokens(out / "datasets" / f"docs_sp400_{transform}" / f"fineweb_{kind}_000000.bin")


def test_shards_decode_to_the_text_and_the_sidecar_counts_it(made):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_of(made)))
    assert [tokenizer.piece_to_id(mark) for mark in transforms.MARKERS] == [4, 5, 6, 7]  # as in the published one
    documents, counted = [], []
    for kind in ("val", "train"):
        tokens = stream(made, "caseops", kind)
        assert tokens[0] == 1
        for part in np.split(tokens, np.flatnonzero(tokens == 1))[1:]:
            documents.append(transforms.decode_case(tokenizer.decode(part[1:].tolist())))
    tokens, sizes = stream(made, "caseops", "val"), stream(made, "caseops", "val_bytes")
    assert sorted(documents) == sorted(TEXTS) and len(sizes) == len(tokens)
    for size in np.split(sizes, np.flatnonzero(tokens == 1))[1:]:
        assert size[0] == 0
        counted.append(int(size.sum()))
    assert counted == [len(text.encode()) for text in documents[:len(counted)]]
    info = note(made, "docs_sp400_caseops")
    assert info["transform"] == "caseops" and info["val"]["counted_bytes"] == info["val"]["text_bytes"] == sum(counted)
    assert not any("train_bytes" in path.name for path in (made / "datasets").rglob("*.bin"))


def test_fused_shards_are_shorter_and_split_into_the_same_tokens(made):
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model_of(made)))
    for kind in ("train", "val"):
        plain, fused = stream(made, "caseops", kind), stream(made, "mp3", kind)
        assert len(fused) < len(plain) and transforms.split(tokenizer, fused).tolist() == plain.tolist()
        space = tokenizer.piece_to_id("\u2581")
        pairs = (plain[:-1] == space) & np.isin(plain[1:], [4, 5, 6])
        assert len(plain) - len(fused) == pairs.sum() and not np.isin(plain, [8, 9, 10]).any()
    sizes, fused_sizes = stream(made, "caseops", "val_bytes"), stream(made, "mp3", "val_bytes")
    assert fused_sizes.sum() == sizes.sum() and len(fused_sizes) == len(stream(made, "mp3", "val"))
    assert (fused_sizes[np.isin(stream(made, "mp3", "val"), [8, 9])] == 1).all()  # the space's byte


def test_published_fusion(made):
    """frontier.md 5.9's vector, with the published ids of space and markers."""
    class Published:
        def piece_to_id(self, piece):
            return {"\u2581": 8133, T: 4, A: 5, C: 6, "<0x00>": 8, "<0x01>": 9, "<0x02>": 10}[piece]
    ids = np.array([4, 320, 8133, 5, 5566, 8136, 1103, 6, 2087, 8133, 4, 3094, 6, 8136, 6, 8138, 1165, 8133, 4, 4769])
    fused, sizes = transforms.fuse(Published(), ids, np.arange(20))
    assert fused.tolist() == [4, 320, 9, 5566, 8136, 1103, 6, 2087, 8, 3094, 6, 8136, 6, 8138, 1165, 8, 4769]
    assert sizes.tolist() == [0, 1, 5, 4, 5, 6, 7, 8, 19, 11, 12, 13, 14, 15, 16, 35, 19]


def test_mistakes_are_one_line(made, jsonl, tmp_path, capsys):
    other, twice, control = tmp_path / "plain.model", tmp_path / "twice.jsonl", tmp_path / "control.txt"
    prepare.train_tokenizer(TEXTS, other, 400)
    twice.write_text("".join(json.dumps({"text": transforms.encode_case(text)}) + "\n" for text in TEXTS))
    control.write_text("Words with a \0 among them. " * 40)
    run = lambda file, model, *more: fails(capsys, "text", file, "--out", tmp_path, "--tokenizer", model, *more)
    assert "no piece for U+E001, U+E002, U+E003, U+E004" in run(jsonl, other, "--transform", "caseops")
    assert "add --transform caseops" in run(jsonl, model_of(made))
    assert "transformed already" in run(twice, model_of(made), "--transform", "caseops")
    assert "token 8 (<0x00>), which mp3 reserves" in run(control, model_of(made), "--transform", "mp3")
    assert "--transform" in run(jsonl, model_of(made), "--transform", "casefold")
    copied = tmp_path / "copied.jsonl"
    copied.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:3]))
    message = run(jsonl, model_of(made), "--transform", "caseops", "--val-file", copied)
    assert "3 of 3 validation documents are in the training text" in message
    assert not list((tmp_path / "datasets").rglob("*.bin"))


def test_a_token_of_more_bytes_than_a_sidecar_holds_is_refused(tmp_path):
    writer = prepare.ShardWriter(tmp_path, "val", 10, sidecar=True)
    with pytest.raises(prepare.UserError, match="65,536 bytes"):
        writer.add(np.array([1, 2]), 0, np.array([0, 65536]))


def test_published_cases(tmp_path):
    """Transform, ids and bytes of the published exporter, where its numbers are at hand."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "reference" / "caseops"
    if not folder.is_dir():
        pytest.skip("the published numbers are not here")
    tokenizer = prepare.load_tokenizer(next(folder.glob("*.model")))
    cases = json.loads((folder / "cases.json").read_text())
    for case, (ids, sizes) in zip(cases, transforms.encode(tokenizer, [case["text"] for case in cases], 1)):
        assert transforms.encode_case(case["text"]) == case["transformed"]
        assert (ids.tolist(), sizes.tolist()) == (case["ids"], case["bytes"]), case["text"]


# ---- the metric --------------------------------------------------------------------------------------------

def case_data(config, made, folder: Path, **changes):
    return config(vocab_size=400, tokenizer_path=str(model_of(made)), data_path=str(folder), **changes)


@pytest.mark.parametrize("transform", transforms.TRANSFORMS)
def test_bits_per_byte_count_original_bytes(made, config, rt, transform):
    folder = made / "datasets" / f"docs_sp400_{transform}"
    cfg = case_data(config, made, folder)
    val = tg.ValData.open(cfg, rt)
    result = tg.evaluate("test", tg.GPT(cfg).nll, val, cfg, rt, tg.plan_evaluation(val, cfg, rt, 32, 16))
    info = note(made, folder.name)["val"]
    assert result.bytes == info["text_bytes"] == info["counted_bytes"] and result.tokens == info["tokens"] - 1


def test_transformed_text_without_its_sidecar_is_refused(made, config, rt, tmp_path):
    """PR 2071 counted three bytes for each marker: 1.0066 instead of 1.0964 bits per byte."""
    folder = made / "datasets" / "docs_sp400_caseops"
    shutil.copy(folder / "fineweb_val_000000.bin", tmp_path)
    with pytest.raises(tg.UserError, match="lacks fineweb_val_bytes_.*CaseOps"):
        tg.ValData.open(case_data(config, made, tmp_path), rt)
    shutil.copy(made / "datasets" / "docs_sp400_mp3" / "fineweb_val_bytes_000000.bin", tmp_path)
    with pytest.raises(tg.UserError, match="holds the bytes of .* tokens, but"):
        tg.ValData.open(case_data(config, made, tmp_path), rt)


def test_a_run_on_transformed_text_and_a_sample_of_it(made, run, capsys):
    """Packed documents of tokens that came from text with markers; what is sampled has capitals, not markers."""
    folder = made / "datasets" / "docs_sp400_mp3"
    settings = {"DATA_PATH": folder, "TOKENIZER_PATH": model_of(made), "VOCAB_SIZE": 400, "PACK": "documents",
                "TTT_ENABLED": 0, "ITERATIONS": 4, "COMPRESS": "lzma"}
    done = run(**settings)
    assert done.code == 0, done.err
    text = works_sample(capsys, done.folder / "final_model.ptz", "Hello LaTeX", "--length", 30)
    assert text.startswith("Hello LaTeX") and not any(mark in text for mark in (*transforms.MARKERS, *"\0\1\2"))


def works_sample(capsys, *arguments) -> str:
    code = sample.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    return printed.out
