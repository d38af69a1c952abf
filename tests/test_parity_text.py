"""tools/parity.py on text fixtures: a transform, its tokens and the bytes they stand for."""
from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import prepare
import pytest
import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
import parity  # noqa: E402
from test_transforms import TEXTS  # noqa: E402

PUBLISHED = Path(__file__).resolve().parents[2] / "shared" / "reference" / "caseops"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model") / "case.model"
    prepare.train_tokenizer(map(transforms.encode_case, TEXTS), path, 400, transforms.MARKERS)
    return path


@pytest.fixture
def fixture(model, tmp_path) -> Path:
    """Some cases and the totals of docs.jsonl; what a token stands for is found by decoding one token more each time,
    so the texts have no white space that the tokenizer folds."""
    tokenizer, stream, sizes, cases = prepare.load_tokenizer(model), [], [], []
    for text in TEXTS[:20]:
        ids = tokenizer.encode(transforms.encode_case(text))
        heads = [tokenizer.decode(ids[:end]) for end in range(len(ids) + 1)]
        heads = [head.rstrip("".join(transforms.MARKERS) + "\ufffd") for head in heads]  # what is not whole yet
        counted = np.diff([len(transforms.decode_case(head).encode()) for head in heads]).tolist()
        cases.append({"text": text, "transformed": transforms.encode_case(text), "ids": ids, "bytes": counted})
        stream, sizes = stream + [1, *ids], sizes + [0, *counted]
    folder = tmp_path / "fixture"
    folder.mkdir()
    (folder / "case.model").write_bytes(model.read_bytes())
    (folder / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    digest = lambda numbers: hashlib.sha256(np.array(numbers, "<u2").tobytes()).hexdigest()
    size = sum(len(text.encode()) for text in TEXTS[:20])
    (folder / "docs_expected.json").write_text(json.dumps(
        {"documents": 20, "utf8_bytes": size, "tokens": len(stream), "counted_bytes": size,
         "sha256_tokens": digest(stream), "sha256_bytes": digest(sizes)}))
    return folder


def check(capsys, *arguments) -> tuple[int, str]:
    code = parity.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return code, printed.err if code == 2 and printed.err else printed.out


def test_a_fixture_agrees(fixture, tmp_path, capsys):
    code, out = check(capsys, fixture, "--text", tmp_path / "docs.jsonl")
    assert code == 0 and out.splitlines()[-1] == "CaseOps: 86 of 86 agree" and "FAIL" not in out
    code, out = check(capsys, "--all", tmp_path)
    assert code == 0 and out.split() == ["fixture", "ok", "CaseOps:", "80", "of", "80", "agree"]


def test_what_differs_is_named(fixture, tmp_path, capsys):
    cases = json.loads((fixture / "cases.json").read_text())
    cases[3]["bytes"][1] += 1
    (fixture / "cases.json").write_text(json.dumps(cases))
    (tmp_path / "docs.jsonl").write_text(json.dumps({"text": "Another text."}))
    code, out = check(capsys, fixture, "--text", tmp_path / "docs.jsonl")
    assert code == 1 and f"19 of 20 agree   FAIL   first: {TEXTS[3]!a}" in out and "documents" in out.split("not:")[1]
    code, out = check(capsys, "--all", tmp_path)
    assert code == 1 and "FAIL  CaseOps: 79 of 80 agree; not: bytes" in out


@pytest.mark.parametrize("name, content, said", [
    ("cases.json", "[{}]", "lacks 'text'"), ("cases.json", "{}", "holds no list"), ("cases.json", "[1", "not a whole"),
    ("cases.json", '[{"text": 1}]', "not a whole"), ("case.model", "", "not a SentencePiece model"),
    ("other.model", "x", "has 2 tokenizers")])
def test_a_damaged_fixture_is_one_line(fixture, capsys, name, content, said):
    (fixture / name).write_text(content)
    code, err = check(capsys, fixture)
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_other_mistakes_are_one_line(fixture, tmp_path, capsys):
    assert "no cases.json" in check(capsys, tmp_path, "--text", tmp_path / "docs.jsonl")[1]
    (fixture / "more_expected.json").write_text("{}")
    code, err = check(capsys, fixture, "--text", tmp_path / "none.jsonl")
    assert code == 2 and "no none_expected.json" in err
    (fixture / "none_expected.json").write_text("{}")
    code, err = check(capsys, fixture, "--text", tmp_path / "none.jsonl")
    assert code == 2 and err.count("\n") == 1
    code, err = check(capsys, fixture, "--text", tmp_path / "docs.jsonl")
    assert code == 0


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published numbers are not here")
def test_the_transform_is_the_published_one(capsys):
    assert check(capsys, PUBLISHED)[0] == 0
