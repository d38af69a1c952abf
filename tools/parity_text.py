"""Hold data/transforms.py against what a published exporter made of texts. `tools/parity.py` is the way in.

A fixture is `cases.json`, a list of {text, transformed, ids, bytes, utf8_bytes}, beside the exporter's SentencePiece
model. `NAME_expected.json` beside them has totals and hashes of NAME.jsonl as one stream of documents, each behind BOS.
"""
from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))
import prepare  # noqa: E402
import transforms  # noqa: E402


class Line(NamedTuple):
    """How many of several comparisons of one kind agree."""

    name: str
    agree: int
    of: int
    first: str = ""   # what differs first

    def text(self) -> str:
        return f"{self.name:<20} {self.agree:3} of {self.of} agree   {'ok' if self.agree == self.of else 'FAIL'}" \
               f"{'   ' * bool(self.first)}{self.first}"


def compare_cases(folder: Path, tokenizer) -> Iterator[Line]:
    """The transform, its inverse, the ids and the bytes of each case."""
    cases = read(folder / "cases.json", list)
    encoded = transforms.encode(tokenizer, [case["text"] for case in cases], 1)
    got = [{"transformed": transforms.encode_case(case["text"]), "ids": ids.tolist(), "bytes": sizes.tolist(),
            "text": transforms.decode_case(case["transformed"])} for case, (ids, sizes) in zip(cases, encoded)]
    for name, key in (("transform", "transformed"), ("back to the text", "text"), ("ids", "ids"), ("bytes", "bytes")):
        unlike = [case["text"] for case, ours in zip(cases, got) if ours[key] != case[key]]
        yield Line(name, len(cases) - len(unlike), len(cases), f"first: {unlike[0]!a}" if unlike else "")


def compare_stream(folder: Path, tokenizer, documents: Path) -> Iterator[Line]:
    """The totals and hashes of a file of documents."""
    known = {path.name.removesuffix("_expected.json"): path for path in sorted(folder.glob("*_expected.json"))}
    name = documents.name.split(".")[0]
    if name not in known and len(known) != 1:
        raise prepare.UserError(f"{folder} has no {name}_expected.json for {documents.name}")
    expected = read(known.get(name) or next(iter(known.values())), dict)
    texts = [("val", text) for text in prepare.read_documents([documents])]
    parts = list(prepare.encode(tokenizer, texts, "caseops"))
    ids, sizes = (np.concatenate([np.empty(0, "<u2"), *(part[i] for part in parts)]).astype("<u2") for i in (1, 3))
    got = {"documents": len(parts), "utf8_bytes": sum(part[2] for part in parts), "tokens": len(ids),
           "counted_bytes": int(sizes.sum(dtype=np.int64)), "sha256_tokens": hashlib.sha256(ids.tobytes()).hexdigest(),
           "sha256_bytes": hashlib.sha256(sizes.tobytes()).hexdigest()}
    for key, value in got.items():
        agrees = value == expected[key]
        yield Line(key.replace("_", " "), int(agrees), 1, "" if agrees else f"{value}, not {expected[key]}")


def compare(folder: Path, documents: Path | None = None) -> list[Line]:
    """All comparisons of a fixture. Raises prepare.UserError if it is not whole."""
    if not (folder / "cases.json").is_file():
        raise prepare.UserError(f"{folder} has no cases.json: it is no text fixture")
    models = sorted(folder.glob("*.model"))
    if len(models) != 1:
        raise prepare.UserError(f"{folder} has {len(models)} tokenizers (*.model), not one")
    tokenizer = prepare.load_tokenizer(models[0])
    prepare.require_markers(tokenizer, models[0], "caseops")
    try:
        lines = list(compare_cases(folder, tokenizer))
        return lines + list(compare_stream(folder, tokenizer, documents)) if documents else lines
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise prepare.UserError(f"{folder} is not a whole fixture: {reason}") from None


def summary(lines: list[Line]) -> str:
    """In one line, how many of all comparisons agree."""
    wrong = [line.name for line in lines if line.agree < line.of]
    return f"{sum(line.agree for line in lines)} of {sum(line.of for line in lines)} agree" + \
        f"; not: {', '.join(wrong)}" * bool(wrong)


def read(path: Path, kind: type):
    """The JSON value of a file, of one kind. Raises ValueError."""
    value = json.loads(path.read_bytes())
    if not isinstance(value, kind) or not value:
        raise ValueError(f"{path.name} holds no {kind.__name__} with anything in it")
    return value
