"""Lossless transforms of text and of token streams, which `prepare.py text --transform NAME` applies.

`caseops`, on text before it is tokenised: every run of ASCII letters becomes lower case behind a marker that tells its
capitals (PR 1729; the published exports call it lossless_caps_caseops_v1). `mp3`: caseops, and then, on token ids, a
space and the marker behind it become one token (PR 2109). Both have an exact inverse here.

Bits per byte count the bytes of the text as it was. A transformed stream cannot tell them by its tokens alone, so its
validation shards get a side-car: a shard of the bytes of original text that each token stands for.
"""
from __future__ import annotations

import re
from typing import Any, Iterable, Iterator

import numpy as np

TITLE, ALLCAPS, CAPNEXT, ESC = MARKERS = "\ue001", "\ue002", "\ue003", "\ue004"
MARKER_BYTES = 3  # of each, in UTF-8
TRANSFORMS = ("caseops", "mp3")
ALIASES = ("<0x00>", "<0x01>", "<0x02>")  # byte pieces that text does not use: space + TITLE, ALLCAPS, CAPNEXT

HAS_CAPITALS = re.compile(rf"(?<![A-Za-z])[a-z]*[A-Z][A-Za-z]*|[{TITLE}-{ESC}]")  # whole runs, or a literal marker
MARKED = re.compile(rf"{ESC}([{TITLE}-{ESC}])|[{TITLE}{CAPNEXT}]([a-z])|{ALLCAPS}([a-z]+)|[{TITLE}-{ESC}]")
MARKED_BYTES = re.compile(rb"(?:\xee\x80\x84)?\xee\x80[\x81-\x84]")  # a marker, or ESC and what it protects, in UTF-8


def encode_case(text: str) -> str:
    """Text without ASCII capitals: AB -> ALLCAPS ab, Ab and A -> TITLE ab, TITLE a; any other run has CAPNEXT before
    each capital behind its first letter. A marker in the text itself is written behind ESC."""
    def marked(found: re.Match) -> str:
        run = found[0]
        if run in MARKERS:
            return ESC + run
        if len(run) > 1 and run.isupper():
            return ALLCAPS + run.lower()
        rest = re.sub("[A-Z]", lambda capital: CAPNEXT + capital[0].lower(), run[1:])
        return (TITLE if run[0].isupper() else "") + run[0].lower() + rest

    return HAS_CAPITALS.sub(marked, text)


def decode_case(text: str) -> str:
    """The text that encode_case made this of. ValueError where a marker has no letter that it could stand for."""
    def original(found: re.Match) -> str:
        if found[1] is None and found[2] is None and found[3] is None:
            raise ValueError(f"marker U+{ord(found[0]):04X} at character {found.start():,} stands before no letter")
        return found[1] or (found[2] or found[3]).upper()

    return MARKED.sub(original, text)


def readable(pieces: Iterable[str]) -> Iterator[str]:
    """Encoded text as it comes, piece by piece, with its capitals; unlike decode_case it forgives misplaced markers."""
    mark = ""
    for piece in pieces:
        text = ""
        for letter in piece:
            if letter in MARKERS and mark != ESC:
                mark = letter
                continue
            small = "a" <= letter <= "z" and mark not in ("", ESC)
            text += letter.upper() if small else letter
            mark = mark if small and mark == ALLCAPS else ""
        yield text


def is_encoded_case(text: str) -> bool:
    """Whether a text looks like one that encode_case has made already: what it decodes to has capitals and gives it."""
    try:
        return not re.search("[A-Z]", text) and text != (plain := decode_case(text)) \
            and bool(re.search("[A-Z]", plain)) and encode_case(plain) == text
    except ValueError:
        return False


def original_bytes(transformed: str, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Bytes of original text in parts of a text from encode_case: markers count nothing, one behind ESC its own bytes.

    begins, ends: byte offsets of the parts in the UTF-8 of `transformed`, [count] each, at characters.
    """
    marks = np.array([found.start() for found in MARKED_BYTES.finditer(transformed.encode())], np.int64)
    return ends - begins - MARKER_BYTES * (np.searchsorted(marks, ends) - np.searchsorted(marks, begins))


def encode(tokenizer: Any, texts: list[str], num_threads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each original text, by caseops: token ids and the bytes of it that each stands for.  # int64 [count] each

    White space that the tokenizer drops at the ends of a text is in no token's bytes, as in the published side-cars.
    """
    transformed = [encode_case(text) for text in texts]
    found = tokenizer.encode(transformed, return_type="offset_mapping", return_bytes=True, num_threads=num_threads)
    documents = []
    for text, pieces in zip(transformed, found):
        begins, ends = np.array(pieces["offsets"], np.int64).reshape(-1, 2).T
        documents.append((np.array(pieces["ids"], np.int64), original_bytes(text, begins, ends)))
    return documents


def fusions(tokenizer: Any) -> tuple[int, dict[int, int]]:
    """What mp3 fuses: the id of a space, and for each marker that may follow it the id of both together."""
    space, *ids = (tokenizer.piece_to_id(piece) for piece in ("\u2581", *MARKERS[:3], *ALIASES))
    return space, dict(zip(ids[:3], ids[3:]))


def fuse(tokenizer: Any, ids: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids with each (space, marker) as one token, which stands for the bytes of both.  # [count] -> [fewer] each

    ValueError if an alias is among the ids already: the text has the control character, or it is fused already.
    """
    space, aliases = fusions(tokenizer)
    for piece, alias in zip(ALIASES, aliases.values()):
        if (ids == alias).any():
            raise ValueError(f"token {alias} ({piece}), which mp3 reserves, is in it already")
    pairs = np.flatnonzero((ids[:-1] == space) & np.isin(ids[1:], list(aliases)))
    ids, sizes = ids.copy(), sizes.copy()
    ids[pairs + 1] = [aliases[marker] for marker in ids[pairs + 1].tolist()]
    sizes[pairs + 1] += sizes[pairs]
    return np.delete(ids, pairs), np.delete(sizes, pairs)


def split(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """The ids that `fuse` made these of.  # [count] -> [more]"""
    space, aliases = fusions(tokenizer)
    markers = {alias: marker for marker, alias in aliases.items()}
    fused = np.flatnonzero(np.isin(ids, list(markers)))
    plain = ids.copy()
    plain[fused] = [markers[alias] for alias in ids[fused].tolist()]
    return np.insert(plain, fused, space)
