"""Make token shards and tokenizers: what `train_gpt.py` reads, from text or from the published exports.

    python data/prepare.py embedded                         Python's own documentation: small, offline
    python data/prepare.py text FILE... --tokenizer MODEL   your own .txt, .jsonl (also .zst compressed), .parquet files
    python data/prepare.py fineweb --vocab-size 8192        the published FineWeb shards of a vocabulary
    python data/prepare.py check DATASET                    whether a data set is whole, canonical, free of leaks

Every command but the last writes `<out>/datasets/<name>/fineweb_{train,val}_%06d.bin` and `<out>/tokenizers/*.model`,
notes in `dataset.json` beside the shards where they come from, and ends by printing the settings that
`train_gpt.py` needs.

A shard is 256 little-endian int32 (20240520, 1, number of tokens, zeros) followed by the tokens as
little-endian uint16. A document is the BOS token followed by its pieces; there is no EOS. A tokenizer is a
SentencePiece model like the published ones: byte-pair pieces, byte fallback, NFKC, pad 0, BOS 1, EOS 2,
unknown 3. Where the text was transformed (`text --transform`, see transforms.py), fineweb_val_bytes_%06d.bin
tells in the same format how many bytes of original text each validation token stands for.
"""
from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import io
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
from array import array
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple

import numpy as np
import transforms

SHARD_MAGIC, SHARD_VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_SHARD_TOKENS = 2**31 - 1  # the header counts tokens in an int32
MAX_VOCAB = 2**16  # tokens are stored as uint16
MAX_SHARDS = 10**6  # a shard's number has six digits
MAX_PATH = 200  # characters of a path in a manifest
BOS = 1  # of the published tokenizers
OPENING_TOKENS = 512  # of a document, which it is recognised by: pages of a site share up to 200 of navigation
SHARD_TOKENS = 100_000_000  # as published

SPACE = "\u2581"  # SentencePiece's visible space
TOKENIZER_TEXT_CHARS = 64_000_000  # more hardly changes a BPE vocabulary, and all of it has to sit in memory
ROUGH_VAL_BYTES = 50_000  # of text: below, a score depends by about a percent on which text it is
PARQUET_ROWS = 64  # read at once: a document may have megabytes, and a row group thousands of documents
BATCH_CHARS = 8_000_000  # text encoded at once: enough to keep all threads busy, small enough to hold twice

EMBEDDED_RECIPE = 1  # raise it when the choice or cleaning of embedded text changes: builds are then remade
EMBEDDED_VAL_FRACTION = 0.05
EMBEDDED_MIN_CHARS = 200_000  # below this there is nothing to learn from: part of this Python is missing
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages",
                   "ensurepip", "encodings", "pydoc_data", "__pycache__"}

PUBLISHER = "willdepueoai/parameter-golf"  # of the variants that are not in this table
PUBLISHERS = {"sp4096": "kevclark/parameter-golf", "sp8192": "kevclark/parameter-golf",
              "sp8192_lossless_caps_caseops_v1_reserved": "romeerp/parameter-golf-caseops-v1"}

Document = tuple[str, str]  # ("train" or "val", text)


class UserError(Exception):
    """Something the user can put right; printed as one line `error: ...`, exit code 2."""


# ---- helpers -----------------------------------------------------------------------------------------------

def need(module: str, package: str) -> Any:
    """Import an optional package where it is used, so that each command needs only its own packages."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        python = shlex.quote(sys.executable or "python")
        raise UserError(f"this command needs {package} ({e}): {python} -m pip install {package}") from None


def first_line(error: BaseException) -> str:
    """The first line of an exception's message (its class name if it has none)."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def cpu_count() -> int:
    """Cores this process may use, which in a container is often fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def counted(number: int, word: str) -> str:
    """A number with its noun: "1 document", "2,000 documents"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def stable_fraction(name: str) -> float:
    """A number in [0, 1) that depends on `name` alone: the same on every machine, run and Python."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears as `path` when the block ends well; otherwise what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # same folder: a rename stays on one file system
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # the name must never outlive a power cut that the bytes did not
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def settle_swap(path: Path, old: Path) -> None:
    """Finish or undo the exchange of a folder, whichever its state calls for."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes the place of `path` when the block ends well and disappears otherwise."""
    stage, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    settle_swap(path, old)  # an earlier run may have been killed at any point
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    try:
        yield stage
        if path.exists():
            path.rename(old)  # a folder cannot be replaced in one step unless it is empty
        stage.rename(path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        settle_swap(path, old)


def install(source: Path, path: Path) -> None:
    """Copy a small file to its final name, atomically, also across file systems."""
    with atomic_file(path) as file:
        file.write(source.read_bytes())


def write_json(path: Path, value: dict) -> None:
    """Write `value` as readable JSON, atomically; equal values give equal bytes."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> dict:
    """The object in `path`, or {} when there is none that can be read."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


# ---- shards ------------------------------------------------------------------------------------------------

def write_shard(path: str | Path, tokens: np.ndarray) -> None:
    """Write one shard atomically: after a failure (a full disk) `path` is as before, nothing else is left.

    tokens: integers [count], each in 0..65535. ValueError for anything else; OSError when the disk refuses.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise ValueError(f"tokens must be a vector of integers, not {tokens.dtype}{list(tokens.shape)}")
    if tokens.size > MAX_SHARD_TOKENS:
        raise ValueError(f"a shard holds at most {MAX_SHARD_TOKENS:,} tokens, not {tokens.size:,}")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < MAX_VOCAB:
        raise ValueError(f"token ids must be in 0..{MAX_VOCAB - 1}, not {tokens.min()}..{tokens.max()}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, tokens.size
    with atomic_file(Path(path)) as file:
        file.write(header.tobytes())
        file.write(np.ascontiguousarray(tokens, "<u2").data)


def check_shard(path: Path) -> int:
    """Number of tokens in a shard, from its header. UserError when header and file size do not agree."""
    with open(path, "rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES), np.uint8)
        size = file.seek(0, os.SEEK_END)
    if header.size < HEADER_BYTES:
        raise UserError(f"{path}: not a token shard ({size:,} bytes, shorter than a header)")
    magic, version, count = (int(x) for x in header.view("<i4")[:3])
    if (magic, version) != (SHARD_MAGIC, SHARD_VERSION):
        raise UserError(f"{path}: not a token shard (magic {magic}, version {version})")
    if size != HEADER_BYTES + 2 * count:
        raise UserError(f"{path}: the header promises {count:,} tokens, {HEADER_BYTES + 2 * count:,} bytes; "
                        f"the file has {size:,} bytes")
    return count


class ShardWriter:
    """Collects one split's documents and writes a shard each time `shard_tokens` tokens are there."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, sidecar: bool = False):
        self.folder, self.split = folder, split
        self.kinds = [split, f"{split}_bytes"] if sidecar else [split]
        self.buffer = np.empty((len(self.kinds), shard_tokens), np.uint16)  # untouched pages cost no memory
        self.filled = self.shards = 0
        self.files: dict[str, str] = {}  # name -> sha256
        self.documents = self.tokens = self.text_bytes = self.counted_bytes = 0
        self.openings = array("Q")

    def add(self, ids: np.ndarray, text_bytes: int, sizes: np.ndarray | None = None) -> None:
        """Append one document's token ids and, for the side-car, the bytes of text each stands for.  # [count]"""
        self.documents += 1
        self.tokens += ids.size
        self.text_bytes += text_bytes
        self.openings.append(opening(ids))
        rows = np.stack([ids] if len(self.kinds) == 1 else [ids, sizes])
        self.counted_bytes += int(rows[1:].sum())
        if rows.max(initial=0) >= MAX_VOCAB:
            raise UserError(f"one token stands for {rows.max():,} bytes of text; a side-car holds {MAX_VOCAB - 1:,}")
        while rows.size:
            part = rows[:, : self.buffer.shape[1] - self.filled]
            self.buffer[:, self.filled : self.filled + part.shape[1]] = part
            self.filled += part.shape[1]
            rows = rows[:, part.shape[1] :]
            if self.filled == self.buffer.shape[1]:
                self.flush()

    def flush(self) -> None:
        """Write what is collected as the next shard."""
        if self.filled:
            for kind, row in zip(self.kinds, self.buffer):
                path = self.folder / f"fineweb_{kind}_{self.shards:06d}.bin"
                write_shard(path, row[: self.filled])
                self.files[path.name] = sha256_file(path)
            self.shards, self.filled = self.shards + 1, 0

    def summary(self) -> dict:
        """What `dataset.json` says about this split."""
        counted = {"counted_bytes": self.counted_bytes} if len(self.kinds) > 1 else {}
        return {"documents": self.documents, "tokens": self.tokens, "text_bytes": self.text_bytes, **counted,
                "files": self.files}


def opening(ids: np.ndarray) -> int:
    """A 64-bit hash of a document's first tokens: equal in two documents that are the same, or begin the same."""
    first = np.ascontiguousarray(ids[:OPENING_TOKENS], "<u2")
    return int.from_bytes(hashlib.blake2b(first.data, digest_size=8).digest(), "little")


def copies(train: array, val: array) -> int:
    """How many validation documents begin as some training document does, by the openings of both."""
    return int(np.isin(np.array(val, np.uint64), np.array(train, np.uint64)).sum())


# ---- tokenizers --------------------------------------------------------------------------------------------

def sample_evenly(texts: Iterable[str], limit: int) -> list[str]:
    """At most about `limit` characters: every text, or every 2nd, 4th, 8th ... when there are more."""
    kept: list[str] = []
    size, stride = 0, 1
    for i, text in enumerate(texts):
        if i % stride:
            continue
        kept.append(text)
        size += len(text)
        while size > limit and len(kept) > 1:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def sentences(texts: Iterable[str], length: int = 16_384) -> Iterator[str]:
    """Texts on one line each, as the normaliser sees them, in parts: SentencePiece skips overlong lines."""
    for text in texts:
        line = " ".join(text.split())
        for start in range(0, len(line), length):
            yield line[start : start + length]


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int, symbols: Iterable[str] = ()) -> None:
    """Train a SentencePiece model with exactly `vocab_size` pieces on `texts` and write it to `path`.

    The settings are those of the published tokenizers; `symbols` are pieces of their own. Equal texts in equal
    order give equal bytes.
    UserError when the text is empty, or has too little variety (or too much) for that many pieces.
    """
    spm = need("sentencepiece", "sentencepiece")
    sample = sample_evenly(texts, TOKENIZER_TEXT_CHARS)
    if not any(text.strip() for text in sample):
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()  # a model written by SentencePiece itself would carry the path it was written to
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=sentences(sample), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, byte_fallback=True, split_digits=True,
            character_coverage=0.999, required_chars=SPACE, normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False, max_sentence_length=1 << 17, user_defined_symbols=list(symbols),
            num_threads=1,  # the result must not depend on how threads interleave
            minloglevel=3)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(refusal(first_line(e), vocab_size)) from None
    load_tokenizer_bytes(model.getvalue(), Path(path))
    with atomic_file(Path(path)) as file:
        file.write(model.getvalue())


def refusal(reason: str, vocab_size: int) -> str:
    """SentencePiece's reason not to train, in terms of the option that we have."""
    if few := re.search(r"required_chars\. \d+ vs (\d+)", reason):
        return (f"--vocab-size {vocab_size} is too small for this text: its characters, with 256 bytes and 4 control "
                f"tokens, need at least {few[1]}")
    if many := re.search(r"too high \(\d+\)\..* <= (\d+)", reason):
        return f"--vocab-size {vocab_size} is too large for this text, which gives at most {many[1]} pieces"
    reason = re.sub(r"^.*\)\] ", "", reason)  # without the C++ condition that failed
    return f"cannot train {vocab_size:,} pieces on this text: {reason}"


def load_tokenizer_bytes(model: bytes, path: Path) -> Any:
    """A SentencePieceProcessor from a model's bytes, checked for what `train_gpt.py` relies on."""
    spm = need("sentencepiece", "sentencepiece")
    try:
        tokenizer = spm.SentencePieceProcessor(model_proto=model) if model else None
    except (RuntimeError, ValueError, OSError):
        tokenizer = None
    if tokenizer is None or not tokenizer.vocab_size():
        raise UserError(f"{path}: not a SentencePiece model")
    if tokenizer.vocab_size() > MAX_VOCAB:
        raise UserError(f"{path}: {tokenizer.vocab_size():,} pieces, but shards hold ids below {MAX_VOCAB:,}")
    if tokenizer.piece_to_id(SPACE) == tokenizer.unk_id():
        # bits per byte count a leading space as one byte, which is only right if a space can always be spelt
        raise UserError(f"{path}: this tokenizer has no piece for a single space (U+2581)")
    return tokenizer


def load_tokenizer(path: str | Path) -> Any:
    """A SentencePieceProcessor from a file; UserError when it is missing or unfit to encode documents."""
    try:
        tokenizer = load_tokenizer_bytes(Path(path).read_bytes(), Path(path))
    except OSError as e:
        raise UserError(f"tokenizer {path}: {e.strerror}") from None
    if tokenizer.bos_id() < 0:
        raise UserError(f"{path}: this tokenizer has no BOS token, which separates documents")
    return tokenizer


def batches(documents: Iterable[Document], chars: int) -> Iterator[list[Document]]:
    """Consecutive documents in lists of about `chars` characters."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if size >= chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_texts(tokenizer: Any, texts: list[str], transform: str, with_sizes: bool) -> list[tuple]:
    """Of each text: its token ids [count] and, if wanted and the text is transformed, the bytes each stands for."""
    threads = cpu_count()
    if not transform:
        return [(np.array(ids, np.int64), None) for ids in tokenizer.encode(texts, num_threads=threads)]
    for text in texts:
        if transforms.is_encoded_case(text):
            raise UserError(f"the document that begins {text[:40]!r} is transformed already: give the original text, "
                            "or leave --transform out")
    if with_sizes:
        found = transforms.encode(tokenizer, texts, threads)
    else:
        encoded = tokenizer.encode(list(map(transforms.encode_case, texts)), num_threads=threads)
        found = [(np.array(ids, np.int64), np.zeros(len(ids), np.int64)) for ids in encoded]
    return [fuse(tokenizer, *pair, text) for pair, text in zip(found, texts)] if transform == "mp3" else found


def fuse(tokenizer: Any, ids: np.ndarray, sizes: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray]:
    """transforms.fuse, with a complaint that names the document."""
    try:
        return transforms.fuse(tokenizer, ids, sizes)
    except ValueError as e:
        raise UserError(f"the document that begins {text[:40]!r}: {e}; take the control character out, or use "
                        "--transform caseops") from None


def encode(tokenizer: Any, documents: Iterable[Document], transform: str = "") -> Iterator[tuple]:
    """(split, ids [count] beginning with BOS, UTF-8 bytes of the text, for validation text that is transformed the
    bytes of each token [count]) for each document, in order within each split."""
    for batch in batches(documents, BATCH_CHARS // 8 if transform else BATCH_CHARS):  # bytes of tokens take much memory
        for split in ("train", "val"):
            texts = [text for of, text in batch if of == split]
            for text, (ids, sizes) in zip(texts, encode_texts(tokenizer, texts, transform, split == "val")):
                if (ids == tokenizer.unk_id()).any():
                    raise UserError("the tokenizer has no byte fallback and the text has characters it does not "
                                    "know: their bytes could not be counted")
                tokens = np.concatenate(([tokenizer.bos_id()], ids)).astype(np.uint16)
                yield split, tokens, len(text.encode()), None if sizes is None else np.concatenate(([0], sizes))


def write_dataset(folder: Path, tokenizer: Any, documents: Iterable[Document], shard_tokens: int,
                  transform: str = "") -> tuple[dict, int]:
    """Encode documents into shards in `folder`. Returns {"train": ..., "val": ...}, see ShardWriter.summary, and how
    many validation documents are in the training text too.

    UserError when one of the two splits stays empty.
    """
    writers = {split: ShardWriter(folder, split, shard_tokens, bool(transform) and split == "val")
               for split in ("train", "val")}
    for split, ids, text_bytes, sizes in encode(tokenizer, documents, transform):
        writers[split].add(ids, text_bytes, sizes)
    for split, writer in writers.items():
        writer.flush()
        if not writer.files:
            raise UserError(f"no document is left for the {split} split: give more text")
    return ({split: writer.summary() for split, writer in writers.items()},
            copies(writers["train"].openings, writers["val"].openings))


def build_dataset(folder: Path, model: Path, documents: Callable[[str], Iterable[Document]], train_new: bool,
                  vocab_size: int, shard_tokens: int, facts: dict, allowed: float = 0.0) -> dict:
    """Make the whole of `folder`, and the tokenizer `model` too if `train_new`; neither appears half-made.

    documents: called with a word for the progress bar, gives all documents; called once for each pass.
    facts: where the text comes from, and how it is transformed. Returns what `dataset.json` holds. UserError where
    files were given as validation text and the training text has more than a share `allowed` of their documents.
    """
    transform = facts.get("transform", "")
    with atomic_folder(folder) as stage:
        source = stage / "tokenizer.model" if train_new else model
        if train_new:
            texts = (transforms.encode_case(text) if transform else text
                     for split, text in documents("tokenizer") if split == "train")
            train_tokenizer(texts, source, vocab_size, transforms.MARKERS if transform else ())
        kept = model if train_new else place_beside(folder, model)
        splits, copied = write_dataset(stage, load_tokenizer(source), documents("encode"), shard_tokens, transform)
        if copied > allowed * splits["val"]["documents"] and facts.get("val_sources"):
            raise UserError(leak_line(copied, splits["val"]["documents"]) + ": take them out of the training files, or "
                            "--allow-copies a share")
        info = {**facts, "vocab_size": vocab_size, "tokenizer": tokenizer_note(folder, kept, source), **splits}
        if train_new or not kept.exists():
            install(source, kept)
        if train_new:
            source.unlink()
        write_json(stage / "dataset.json", info)
    report(folder, model, info)
    if copied:
        print(f"note: {leak_line(copied, info['val']['documents'])}")
    return info


def leak_line(copied: int, documents: int) -> str:
    """What is wrong when training text has validation documents."""
    return (f"{copied:,} of {counted(documents, 'validation document')} {'is' if copied == 1 else 'are'} in the "
            f"training text too, or begin as one there does for {OPENING_TOKENS} tokens")


def missing_markers(tokenizer: Any) -> list[str]:
    """The markers of transformed text that a tokenizer has no pieces for."""
    return [f"U+{ord(mark):04X}" for mark in transforms.MARKERS if tokenizer.is_unknown(tokenizer.piece_to_id(mark))]


def require_markers(tokenizer: Any, path: Path, transform: str) -> None:
    """UserError unless a tokenizer has pieces for the markers of transformed text just where the text has them."""
    missing = missing_markers(tokenizer)
    if transform and missing:
        raise UserError(f"{path}: no piece for {', '.join(missing)}, which --transform {transform} writes: use a "
                        "tokenizer made for it, or --vocab-size to make one")
    if not transform and not missing:
        raise UserError(f"{path}: this tokenizer is made for transformed text: add --transform caseops")


def place_beside(folder: Path, model: Path) -> Path:
    """Where `<out>/tokenizers` keeps a tokenizer of the dataset in `folder`: `train_gpt.py` looks for it there."""
    shelf, digest = folder.parents[1] / "tokenizers", sha256_file(model)
    taken = shelf / model.name
    if not taken.exists() or sha256_file(taken) == digest:
        return taken
    return shelf / f"{model.stem}_{digest[:8]}{model.suffix}"  # another one of that name


def tokenizer_note(folder: Path, kept: Path, source: Path) -> dict:
    """The tokenizer in `dataset.json`: its name in `<out>/tokenizers`, and the digest of its bytes, now in `source`."""
    name = os.path.relpath(kept, folder.parents[1] / "tokenizers")
    return {"name": Path(name).as_posix(), "sha256": sha256_file(source)}


def report(folder: Path, tokenizer: Path, info: dict) -> None:
    """Print what there is, what one should know about it, and the settings that use it."""
    for split in ("train", "val"):
        part = info[split]
        shards = sum("_bytes_" not in name for name in part["files"])  # a side-car has no tokens
        print(f"{split:5} {part['tokens']:>13,} tokens {counted(part['documents'], 'document'):>19} "
              f"{part['text_bytes']:>13,} bytes of text, shards: {shards}")
    if info.get("document_cut"):
        print("note: a document was cut in two and its end held out, since no choice of whole ones comes near "
              f"--val-fraction {info['val_fraction']} (a .txt file is one document, and so is a line of a .jsonl file)")
    if info["kind"] == "text" and info["val"]["text_bytes"] < ROUGH_VAL_BYTES:
        print(f"note: scores on {info['val']['text_bytes']:,} bytes of validation text are rough; a larger "
              "--val-fraction or --val-file makes them surer")
    print_settings(folder, tokenizer, info["vocab_size"])


def print_settings(folder: Path, tokenizer: Path, vocab_size: int) -> None:
    """The last line of every command: what to put before `train_gpt.py`."""
    data, model = shlex.quote(str(folder)), shlex.quote(str(tokenizer))
    print(f"DATA_PATH={data} TOKENIZER_PATH={model} VOCAB_SIZE={vocab_size}")


# ---- embedded: a corpus out of Python's own documentation --------------------------------------------------

def prose(text: str) -> str:
    """The paragraphs of a docstring that read as English: no doctests, rules or tables of symbols."""
    def reads_well(paragraph: str) -> bool:
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        return letters >= 0.8 * len(paragraph) and not re.search(r"^\s*>>>", paragraph, re.MULTILINE)

    return "\n\n".join(p for p in re.split(r"\n\s*\n", text) if p.strip() and reads_well(p))


def python_files(root: Path) -> Iterator[Path]:
    """The .py files below `root` in a fixed order, without tests, bundled packages and generated tables."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED_FOLDERS)
        for name in sorted(names):
            # _sysconfigdata*.py is written by the build of each Python: its name differs between machines
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def docstrings(path: Path) -> Iterator[str]:
    """The docstrings of one source file in source order; nothing when it cannot be read or parsed."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        if text := ast.get_docstring(node):
            yield text


def embedded_documents(stdlib: Path) -> dict[str, str]:
    """name -> text: one document a source file of the standard library and one a topic of `help()`."""
    try:
        from pydoc_data.topics import topics  # plain data, nothing runs
    except ImportError:
        topics = {}
    sources = [(f"topic {name}", [text]) for name, text in sorted(topics.items())]
    for path in python_files(stdlib):
        sources.append((f"module {path.relative_to(stdlib).as_posix()}", docstrings(path)))
    documents, seen = {}, set()
    for name, texts in sources:
        kept = []
        for text in map(prose, texts):
            if len(text) >= 60 and text not in seen:  # one-liners and inherited copies teach nothing
                seen.add(text)
                kept.append(text)
        if sum(map(len, kept)) >= 200:
            documents[name] = "\n\n".join(kept)
    return documents


def embedded_is_complete(folder: Path, tokenizer: Path, vocab_size: int) -> dict:
    """The `dataset.json` of an earlier build when every file is still what it says, else {}."""
    info = read_json(folder / "dataset.json")
    found = [info.get(key) for key in ("kind", "recipe", "vocab_size")]
    if found != ["embedded", EMBEDDED_RECIPE, vocab_size]:
        return {}
    try:
        expected = {tokenizer: info["tokenizer"]["sha256"]}
        for split in ("train", "val"):
            expected.update((folder / name, digest) for name, digest in info[split]["files"].items())
        return info if all(sha256_file(path) == digest for path, digest in expected.items()) else {}
    except (OSError, KeyError, TypeError, AttributeError):
        return {}


def build_embedded(out: Path, vocab_size: int = 1024, force: bool = False,
                   stdlib: Path | None = None) -> dict:
    """Build `<out>/datasets/embedded_sp<V>` and its tokenizer; returns the contents of `dataset.json`.

    Deterministic for a given Python version. `stdlib` is the folder whose docstrings are used (default: this
    Python's). UserError when there is almost no text.
    """
    folder = out / "datasets" / f"embedded_sp{vocab_size}"
    model = out / "tokenizers" / f"embedded_{vocab_size}_bpe.model"
    if not force and (info := embedded_is_complete(folder, model, vocab_size)):
        print(f"{folder} is already complete (built from Python {info['python']}); --force builds it again")
        report(folder, model, info)
        return info
    documents = embedded_documents(stdlib or Path(sysconfig.get_paths()["stdlib"]))
    chars = sum(map(len, documents.values()))
    if chars < EMBEDDED_MIN_CHARS:
        raise UserError(f"this Python ships almost no documentation ({chars:,} characters of docstrings and "
                        "help topics): use another Python, or your own text with: prepare.py text FILE...")
    # one hash shuffles and splits: documents in order of their fraction, the lowest 5 % are validation
    order = sorted(documents, key=stable_fraction)
    chosen = [("val" if stable_fraction(name) < EMBEDDED_VAL_FRACTION else "train", documents[name])
              for name in order]
    facts = {"kind": "embedded", "recipe": EMBEDDED_RECIPE, "python": platform.python_version()}
    return build_dataset(folder, model, lambda purpose: chosen, True, vocab_size, SHARD_TOKENS, facts)


# ---- text: anyone's files ----------------------------------------------------------------------------------

def read_chunks(path: Path, advance: Callable[[int], Any]) -> Iterator[bytes]:
    """The bytes of a file, decompressed if it is a .zst; `advance` is told how many were read from disk."""
    def raw() -> Iterator[bytes]:
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                advance(len(chunk))
                yield chunk

    yield from decompressed(raw(), path) if path.suffix == ".zst" else raw()


def decompressed(chunks: Iterable[bytes], path: Path) -> Iterator[bytes]:
    """Zstandard frames, one after another, decompressed. UserError when they are broken or cut off."""
    zstandard = need("zstandard", "zstandard")
    decoder = zstandard.ZstdDecompressor(max_window_size=2**27)  # `zstd --long` writes windows up to this
    frame = decoder.decompressobj()
    started = False
    try:
        for chunk in chunks:
            while chunk:
                if frame.eof:
                    frame = decoder.decompressobj()
                yield frame.decompress(chunk)
                started, chunk = True, frame.unused_data if frame.eof else b""
    except zstandard.ZstdError as e:
        raise UserError(f"{path}: not valid zstd data ({first_line(e)})") from None
    if not (started and frame.eof):
        raise UserError(f"{path}: the zstd data ends too early; the file is cut off")


def read_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a byte stream, without their line ends."""
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def jsonl_text(line: bytes, where: str, key: str) -> str:
    """The text that one line of a .jsonl file has under `key`. UserError naming the line when there is none."""
    try:
        text = json.loads(line.decode("utf-8-sig"))[key]
        text.encode()  # an escaped lone surrogate is legal JSON but not text
        return text
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8") from None
    except UnicodeEncodeError:
        raise UserError(f"{where}: an unpaired surrogate escape is not a character") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not JSON ({first_line(e)})") from None
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: expected an object with a \"{key}\" string, {{\"{key}\": ...}}") from None


@contextmanager
def open_parquet(path: Path, column: str) -> Iterator[Any]:
    """A pyarrow.parquet.ParquetFile whose `column` holds strings.

    UserError without such a column, and when the file turns out to be damaged while it is open.
    """
    pyarrow, parquet = need("pyarrow", "pyarrow"), need("pyarrow.parquet", "pyarrow")
    try:
        # a buffer of its own for each column: otherwise pyarrow holds all bytes that a column has in a row group
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            kinds = [field.type for field in file.schema_arrow if field.name == column]
            if len(kinds) != 1:
                names = ", ".join(file.schema_arrow.names[:20]) or "none"
                raise UserError(f"{path}: {'two columns are' if kinds else 'no column is'} called {column!r}; "
                                f"--column names the one with the text, out of: {names}")
            kind = kinds[0].value_type if pyarrow.types.is_dictionary(kinds[0]) else kinds[0]
            if str(kind) not in ("string", "large_string", "string_view"):
                raise UserError(f"{path}: column {column!r} holds {kinds[0]}, not text; --column names another")
            yield file
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:  # the last one: a damaged name of a column
        if getattr(e, "errno", None):  # the system's: no permission, ...
            raise
        raise UserError(f"{path}: not valid parquet data ({first_line(e)})") from None


def parquet_texts(path: Path, column: str, advance: Callable[[int], Any]) -> Iterator[str]:
    """The strings of a column, a few rows in memory at a time; rows without a value are left out."""
    size, row = path.stat().st_size, 0
    with open_parquet(path, column) as file:
        for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
            before = row
            for row, value in enumerate(batch.column(0), before + 1):
                try:
                    text = value.as_py()
                except UnicodeDecodeError:
                    raise UserError(f"{path}: not UTF-8 (in row {row:,})") from None
                if text is not None:
                    yield text
            rows = file.metadata.num_rows
            advance(size * row // rows - size * before // rows)


def file_kind(path: Path) -> str:
    """".txt", ".jsonl" or ".parquet", from the name. UserError for any other."""
    kind = Path(path.name.removesuffix(".zst")).suffix
    if kind not in (".txt", ".jsonl") and (kind, path.suffix) != (".parquet", ".parquet"):
        raise UserError(f"{path}: expected a name ending in .txt, .jsonl, .txt.zst, .jsonl.zst or .parquet")
    return kind


def read_documents(paths: Iterable[Path], limit: int | None = None,
                   advance: Callable[[int], Any] = lambda read: None, column: str = "text") -> Iterator[str]:
    """The first `limit` documents that are not blank: a .txt file is one, and so is a line of a .jsonl file or a row
    of a .parquet file, whose text is under the key or in the column `column`."""
    def texts() -> Iterator[str]:
        for path in paths:
            if file_kind(path) == ".parquet":
                yield from parquet_texts(path, column, advance)
            elif file_kind(path) == ".txt":
                try:
                    yield b"".join(read_chunks(path, advance)).decode("utf-8-sig")
                except UnicodeDecodeError as e:
                    raise UserError(f"{path}: not UTF-8 (at byte {e.start:,})") from None
            else:
                for number, line in enumerate(read_lines(read_chunks(path, advance)), 1):
                    if line.strip():
                        yield jsonl_text(line, f"{path}:{number}", column)

    return itertools.islice((text for text in texts() if text.strip()), limit)


def cut_in_two(text: str, share: float) -> list[Document]:
    """A document as training text and, its last `share`, validation text.

    The cut is where a paragraph ends, else a line, else a word, unless that would hold out more than half as much
    again; text without any spaces is cut all the same.
    """
    if share <= 0 or share >= 1:
        return [("train" if share <= 0 else "val", text)]
    text = text.strip()
    held = max(1, round(len(text) * share))
    cut = len(text) - held
    start = max(cut - held // 2, 0)
    for gap in (r"\n\s*\n", r"\n", r"\s"):
        ends = [found.end() for found in re.finditer(gap, text[start:cut])]
        if ends:
            cut = start + ends[-1]
            break
    while text[cut].isspace():  # the gap stays with the training text
        cut += 1
    return [(split, part) for split, part in (("train", text[:cut]), ("val", text[cut:])) if part.strip()]


class Held(NamedTuple):
    """What is validation text: documents whose hash is below `below`, and the last `share` of one where it is equal."""
    below: float
    share: float

    def split(self, text: str) -> list[Document]:
        """One document, or the two parts of one."""
        fraction = stable_fraction(text)
        return cut_in_two(text, self.share if fraction == self.below else float(fraction < self.below))


def choose_held(texts: Iterable[str], val_fraction: float) -> Held:
    """Hold out `val_fraction` of all characters: documents in the order of a hash of their text, so that copies stay
    on one side. The document that crosses the line is cut where it is too large a part to be rounded up or down."""
    rows = np.fromiter(((stable_fraction(text), len(text)) for text in texts), [("hash", "f8"), ("chars", "i8")])
    if not rows.size:
        return Held(0.0, 0.0)
    hashes, which = np.unique(rows["hash"], return_inverse=True)
    until = np.bincount(which, rows["chars"]).cumsum()  # characters of all documents up to each hash
    wanted = val_fraction * until[-1]
    edge = int(np.searchsorted(until, wanted))
    chars = until[edge] - (until[edge - 1] if edge else 0)
    share = 1 - (until[edge] - wanted) / chars
    rounds = chars <= wanted / 2 and edge + 1 < len(until)
    return Held(float(hashes[edge]), float(round(share) if rounds else share))


class TextSource(NamedTuple):
    """What `text` reads: files, and how they are divided."""
    files: list[Path]
    val_files: list[Path]
    val_fraction: float
    limit: int | None
    column: str

    def read(self, purpose: str, files: list[Path], limit: int | None) -> Iterator[str]:
        """The documents of some files in their order, with a progress bar on a terminal."""
        tqdm = need("tqdm", "tqdm").tqdm
        total, quiet = sum(path.stat().st_size for path in files), not sys.stderr.isatty()
        with tqdm(total=total, desc=purpose, unit="B", unit_scale=True, disable=quiet) as bar:
            yield from read_documents(files, limit, bar.update, self.column)

    def choose(self) -> Held | None:
        """Which documents are held out; None where files are."""
        if self.val_files:
            return None
        return choose_held(self.read("split", self.files, self.limit), self.val_fraction)

    def documents(self, purpose: str, held: Held | None) -> Iterator[Document]:
        """Every document with its split."""
        for text in self.read(purpose, self.files, self.limit):
            yield from held.split(text) if held else [("train", text)]
        for text in self.read(f"{purpose} val", self.val_files, None) if self.val_files else ():
            yield "val", text


def build_text(source: TextSource, out: Path, name: str, tokenizer: Path | None, vocab_size: int,
               shard_tokens: int, transform: str = "", allowed: float = 0.0) -> dict:
    """Build `<out>/datasets/<name>_sp<V>`, with a new tokenizer when none is given; see build_dataset. The name of
    transformed data ends in `_<transform>`."""
    for path in source.files + source.val_files:
        kind = file_kind(path)
        if not path.is_file():
            raise UserError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
        if path in source.files and path in source.val_files:
            raise UserError(f"{path}: cannot be both training and validation text")
        if kind == ".parquet":
            with open_parquet(path, source.column):
                pass  # a missing column or package is told before hours of work on the files before it
    if tokenizer:
        loaded = load_tokenizer(tokenizer)
        vocab_size = loaded.vocab_size()
        require_markers(loaded, tokenizer, transform)
    model = tokenizer or out / "tokenizers" / f"{name}_{vocab_size}_bpe{'_caseops' if transform else ''}.model"
    folder = out / "datasets" / "_".join([name, f"sp{vocab_size}", *filter(None, [transform])])
    if folder.exists() and read_json(folder / "dataset.json").get("kind") != "text":
        raise UserError(f"{folder} was not made by this command, so it stays: choose another --name")
    held = source.choose()
    facts = {"kind": "text", "sources": [path.name for path in source.files],
             "val_sources": [path.name for path in source.val_files], "limit_documents": source.limit,
             "column": source.column,
             "document_cut": held is not None and 0 < held.share < 1,
             "val_fraction": None if source.val_files else source.val_fraction,
             **({"transform": transform} if transform else {})}
    return build_dataset(folder, model, lambda purpose: source.documents(purpose, held), tokenizer is None, vocab_size,
                         shard_tokens, facts, allowed)


# ---- fineweb: the published shards -------------------------------------------------------------------------

class Hub(NamedTuple):
    """Where published files are: a dataset repository, its folder with manifest.json, perhaps a mirror."""
    repo_id: str
    prefix: str
    endpoint: str | None

    def fetch(self, path: str, stage: Path) -> Path:
        """Download one file, named relative to the prefix, to somewhere below `stage`, or UserError."""
        hub = need("huggingface_hub", "huggingface_hub")
        errors = need("huggingface_hub.errors", "huggingface_hub")
        remote = f"{self.prefix}/{path}" if self.prefix else path
        # without the network the library falls back on an earlier copy, silently; there must be none
        (stage / remote).unlink(missing_ok=True)
        try:
            return Path(hub.hf_hub_download(self.repo_id, remote, repo_type="dataset", local_dir=stage,
                                            endpoint=self.endpoint))
        except errors.LocalEntryNotFoundError as e:
            reason = first_line(e.__cause__ or e)
            raise UserError(f"cannot reach {self.repo_id} ({reason}): is there a network?") from None
        except errors.RepositoryNotFoundError:
            raise UserError(f"there is no dataset repository {self.repo_id}, or it is private") from None
        except errors.EntryNotFoundError:
            raise UserError(f"{self.repo_id} has no file {remote}") from None
        except errors.HFValidationError as e:
            raise UserError(f"{self.repo_id!r} cannot be a repository: {first_line(e)}") from None
        except Exception as e:  # the HTTP library, and with it the exceptions, changes between hub versions
            raise UserError(f"{self.repo_id}: download of {remote} failed ({first_line(e)}); "
                            "the same command continues where it stopped") from None


class Published(NamedTuple):
    """One variant as its manifest describes it."""
    shards: list[str]  # file names, validation first
    tokenizer_files: list[str]  # paths relative to the prefix, and to the data folder; the model first
    vocab_size: int


def local_path(path: str) -> str:
    """A tokenizer's path out of a manifest. Others write manifests: it must lead to no other place, and to no shard."""
    parts, suffix = PurePosixPath(path).parts, PurePosixPath(path).suffix
    if not parts or parts[0] not in ("tokenizers", "datasets") or ".." in parts or "\\" in path:
        raise UserError(f"bad manifest: {path!r} is not a path below tokenizers/ or datasets/")
    if suffix not in (".model", ".vocab") or len(path) > MAX_PATH or not path.isprintable():
        raise UserError(f"bad manifest: {path[:MAX_PATH]!r} is not the name of a tokenizer's file")
    return path


def read_manifest(manifest: object, variant: str, train_shards: int) -> Published:
    """Find what `variant` needs in a manifest. UserError when it is not there or the manifest is unusable."""
    name = f"fineweb10B_{variant}"
    try:
        datasets = {entry["name"]: entry for entry in manifest["datasets"]}
        tokenizers = {entry["name"]: entry for entry in manifest["tokenizers"]}
        if name not in datasets:
            known = ", ".join(sorted(key.removeprefix("fineweb10B_") for key in datasets)) or "none"
            size = re.fullmatch(r"sp(\d+)", variant)
            make = f"; to make it from text: bash run.sh data text FILE... --vocab-size {size[1]}" if size else ""
            raise UserError(f"variant {variant!r} is not published there; available: {known}{make}")
        entry = datasets[name]
        files = {"train": int(entry["stats"]["files_train"]), "val": int(entry["stats"]["files_val"])}
        tokenizer = tokenizers[entry["tokenizer_name"]]
        paths = [local_path(tokenizer[key]) for key in ("model_path", "vocab_path") if tokenizer.get(key)]
        vocab_size = int(entry["vocab_size"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
        raise UserError(f"bad manifest: {type(e).__name__} {first_line(e)}") from None
    if not tokenizer.get("model_path"):
        raise UserError(f"variant {variant!r} has no SentencePiece model, and train_gpt.py reads no other tokenizer")
    if vocab_size < 2 or not (0 < files["val"] <= MAX_SHARDS and 0 <= files["train"] <= MAX_SHARDS):
        raise UserError(f"bad manifest: {vocab_size:,} tokens in the vocabulary, {files['train']:,} training and "
                        f"{files['val']:,} validation shards")
    if vocab_size > MAX_VOCAB:
        raise UserError(f"variant {variant!r} has {vocab_size:,} tokens; train_gpt.py reads ids below {MAX_VOCAB:,}")
    if train_shards > files["train"]:
        raise UserError(f"--train-shards {train_shards}: {variant} has only "
                        f"{counted(files['train'], 'training shard')}")
    # exports with a case transform tell in a second file per shard the original bytes behind each token
    kinds = ["val", "val_bytes"] if entry.get("val_bytes_glob") else ["val"]
    shards = [f"fineweb_{kind}_{i:06d}.bin" for kind in kinds for i in range(files["val"])]
    shards += [f"fineweb_train_{i:06d}.bin" for i in range(train_shards)]
    return Published(shards, paths, vocab_size)


def shard_is_there(path: Path) -> bool:
    """Whether `path` is a whole shard."""
    try:
        return path.is_file() and check_shard(path) >= 0
    except UserError:
        return False


def fetch_tokenizer(hub: Hub, published: Published, out: Path, stage: Path) -> None:
    """Bring the tokenizer's files below `out`. UserError when `train_gpt.py` could not use it with these shards."""
    fetched = [hub.fetch(path, stage) for path in published.tokenizer_files]
    size = load_tokenizer_bytes(fetched[0].read_bytes(), Path(published.tokenizer_files[0])).vocab_size()
    if size != published.vocab_size:
        raise UserError(f"bad manifest: {published.tokenizer_files[0]} has {size:,} pieces, "
                        f"not {published.vocab_size:,}")
    for path, source in zip(published.tokenizer_files, fetched):
        install(source, out / path)


def fetch_shards(hub: Hub, names: list[str], folder: Path, stage: Path) -> None:
    """Bring those shards into `folder` that are not there yet, each checked before it gets its name."""
    for number, name in enumerate(names, 1):
        if not shard_is_there(folder / name):
            fetched = hub.fetch(f"datasets/{folder.name}/{name}", stage)
            try:
                count = check_shard(fetched)
            except UserError as e:
                fetched.unlink()
                raise UserError(f"{hub.repo_id} sent a broken shard: {e}") from None
            os.replace(fetched, folder / name)
            print(f"[{number}/{len(names)}] {name}  {count:,} tokens", flush=True)


def quiet_hub(endpoint: str | None) -> None:
    """Keep the hub library to its job: no usage reports, bars on a terminal only, the given server only."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if endpoint:
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its chunks come from other hosts
    hub_utils = need("huggingface_hub.utils", "huggingface_hub")
    hub_utils.logging.set_verbosity_error()
    if not sys.stderr.isatty() and not hub_utils.are_progress_bars_disabled():
        hub_utils.disable_progress_bars()


def fetch_manifest(hub: Hub, stage: Path) -> object:
    """The manifest, asked for every time: one kept from another repository would name the wrong shards."""
    print(f"asking {hub.repo_id} what it has", flush=True)  # without a network the library tries for a while
    try:
        return json.loads(hub.fetch("manifest.json", stage).read_bytes())
    except (ValueError, RecursionError) as e:
        raise UserError(f"bad manifest: not JSON ({first_line(e)})") from None


def build_fineweb(hub: Hub, out: Path, variant: str, train_shards: int) -> dict:
    """Bring a published variant to `<out>`, keeping what is whole; returns what `dataset.json` holds."""
    quiet_hub(hub.endpoint)
    folder = out / "datasets" / f"fineweb10B_{variant}"
    stage = folder / ".download"  # inside it, so that a shard moves into place without being copied
    stage.mkdir(parents=True, exist_ok=True)
    try:
        published = read_manifest(fetch_manifest(hub, stage), variant, train_shards)
        origin = {"kind": "fineweb", "repo_id": hub.repo_id, "remote_prefix": hub.prefix}
        known = read_json(folder / "dataset.json")
        if known and {key: known.get(key) for key in origin} != origin:
            raise UserError(f"{folder} comes from {known.get('repo_id', 'another source')}: "
                            "delete it, or choose another --out")
        fetch_tokenizer(hub, published, out, stage)  # small, and where it is unfit the shards are of no use
        write_json(folder / "dataset.json", {**known, **origin})  # before them: tells whose parts these are
        fetch_shards(hub, published.shards, folder, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)  # the library cannot continue a partial download
        if not any(folder.iterdir()):
            folder.rmdir()
    tokens = {path.name: check_shard(path) for path in sorted(folder.glob("fineweb_*.bin"))}
    model = out / published.tokenizer_files[0]
    info = {**origin, "vocab_size": published.vocab_size, "tokenizer": tokenizer_note(folder, model, model),
            "tokens": tokens}
    write_json(folder / "dataset.json", info)
    for split in ("train", "val"):
        counts = [count for name, count in tokens.items() if re.match(rf"fineweb_{split}_\d", name)]
        print(f"{split:5} {sum(counts):>14,} tokens, shards: {len(counts)}")
    print_settings(folder, model, published.vocab_size)
    return info


# ---- check: what a data set is -----------------------------------------------------------------------------

class Canonical(NamedTuple):
    """The published validation text under one tokenizer, by what the competition's logs say of it.

    Tokens that are scored count in whole windows of 2048, as most systems score them; 0: not known.
    """
    scored: int
    scored_bytes: int = 0
    tokens: int = 0
    train_tokens: int = 0


CANONICAL_DOCUMENTS, CANONICAL_WINDOW = 50_000, 2048
CANONICAL_COPIES = 0.01  # share of its documents that the web repeats in the training text, too; more is a mistake
CANONICAL = {
    "sp1024": Canonical(62_021_632), "sp8192": Canonical(40_540_160),
    "sp8192_lossless_caps_caseops_v1_reserved": Canonical(47_851_520, 151_074_499, 47_853_344, 8_000_000_058),
    "sp8192_lossless_caps_caseops_v1_reserved_mp3": Canonical(43_767_808, 151_079_389)}


class Found(NamedTuple):
    """What the shards of one split hold."""
    shard_tokens: list[int]
    openings: array  # of every document

    @property
    def tokens(self) -> int:
        return sum(self.shard_tokens)


def read_split(paths: list[Path], bos: int, vocab_size: int) -> Found:
    """Read all shards of a split as one stream. UserError when one is broken, or a token is beyond the vocabulary."""
    counts, openings, rest = [], array("Q"), np.empty(0, "<u2")
    for path in paths:
        counts.append(check_shard(path))
        tokens = np.concatenate((rest, np.fromfile(path, "<u2", offset=HEADER_BYTES)))
        if tokens.size and tokens.max() >= vocab_size:
            raise UserError(f"{path} holds token {tokens.max()}, but the vocabulary has {vocab_size:,}")
        starts = np.flatnonzero(tokens == bos)
        ends = np.append(starts[1:], tokens.size)
        whole = starts.size if path == paths[-1] else starts.size - 1  # the last document may go on in the next shard
        openings.extend(opening(tokens[start:end]) for start, end in zip(starts[:whole], ends))
        rest = tokens[starts[whole] :] if whole < starts.size else np.empty(0, "<u2")
    return Found(counts, openings)


def read_sidecars(val: list[Path]) -> np.ndarray | None:
    """The bytes of text of every validation token; None without side-cars. UserError when one does not fit."""
    paths = [path.with_name(path.name.replace("_val_", "_val_bytes_")) for path in val]
    if not any(path.exists() for path in paths):
        return None
    for path, shard in zip(paths, val):
        if not path.exists():
            raise UserError(f"{path} is missing: the bytes of {shard.name}")
        if check_shard(path) != check_shard(shard):
            raise UserError(f"{path} holds the bytes of {check_shard(path):,} tokens, but {shard.name} has "
                            f"{check_shard(shard):,}")
    return np.concatenate([np.fromfile(path, "<u2", offset=HEADER_BYTES) for path in paths])


def not_canonical(known: Canonical, train: Found, val: Found, sizes: np.ndarray | None) -> list[str]:
    """What tells a data set from the published one of its name, each in a few words."""
    scored = max(val.tokens - 1, 0) // CANONICAL_WINDOW * CANONICAL_WINDOW
    pairs = [("validation documents", len(val.openings), CANONICAL_DOCUMENTS),
             (f"validation tokens in whole windows of {CANONICAL_WINDOW}", scored, known.scored),
             ("validation tokens", val.tokens, known.tokens),
             ("bytes of scored text", 0 if sizes is None else int(sizes[1 : scored + 1].sum(dtype=np.int64)),
              known.scored_bytes)]
    wrong = [f"{has:,} {what}, not {wanted:,}" for what, has, wanted in pairs if wanted and has != wanted]
    odd = [count for count in train.shard_tokens[:-1] if count != SHARD_TOKENS]
    if odd:
        wrong.append(f"a training shard of {odd[0]:,} tokens, not {SHARD_TOKENS:,}")
    if known.train_tokens and train.tokens > known.train_tokens:
        wrong.append(f"{train.tokens:,} training tokens, more than {known.train_tokens:,}")
    return wrong


def tokenizer_of(folder: Path, info: dict, given: Path | None) -> Any:
    """The tokenizer given, else the one `dataset.json` names, where it can be read; None if there is none."""
    noted = info.get("tokenizer")
    name = noted.get("name") if isinstance(noted, dict) else None
    path = given or (folder.absolute().parents[1] / "tokenizers" / str(name) if name else None)
    return load_tokenizer(path) if path and (given or path.is_file()) else None


def check_dataset(folder: Path, tokenizer_path: Path | None, allowed: float | None) -> None:
    """Print what a data set holds. UserError when it is not whole, is not the published one whose name it has, or when
    more than a share `allowed` of its validation documents are in its training text (None: none; published: 1 %)."""
    shards = {split: sorted(folder.glob(f"fineweb_{split}_[0-9]*.bin")) for split in ("train", "val")}
    for split, paths in shards.items():
        if not paths:
            raise UserError(f"{folder} has no fineweb_{split}_*.bin")
    info = read_json(folder / "dataset.json")
    tokenizer = tokenizer_of(folder, info, tokenizer_path)
    bos = tokenizer.bos_id() if tokenizer else BOS
    vocab_size = tokenizer.vocab_size() if tokenizer else MAX_VOCAB
    sizes = read_sidecars(shards["val"])
    train, val = (read_split(shards[split], bos, vocab_size) for split in ("train", "val"))
    for split, found in (("train", train), ("val", val)):
        if not found.openings:
            raise UserError(f"no document of {folder} begins in the {split} shards (token {bos}); --tokenizer names "
                            "the model that tells the token")
        print(f"{split:5} {found.tokens:>14,} tokens {counted(len(found.openings), 'document'):>20} in "
              f"{counted(len(found.shard_tokens), 'shard')}", flush=True)
    if sizes is None and tokenizer and not missing_markers(tokenizer):
        raise UserError(f"{folder} lacks fineweb_val_bytes_*.bin: its tokenizer is made for transformed text")
    known = CANONICAL.get(folder.absolute().name.removeprefix("fineweb10B_"))
    if known and (wrong := not_canonical(known, train, val, sizes)):
        raise UserError(f"{folder} is not the published data set of that name: {'; '.join(wrong)}")
    copied, documents = copies(train.openings, val.openings), len(val.openings)
    share = allowed if allowed is not None else CANONICAL_COPIES if known else 0.0
    if copied > share * documents:
        raise UserError(f"{folder}: {leak_line(copied, documents)}; train on other text, or --allow-copies a share")
    print(f"{copied:,} of {counted(documents, 'validation document')} in the training text too"
          f"{'; the validation text is the published one' if known else ''}")


# ---- command line ------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one line, like every other error here."""

    def error(self, message: str):
        raise UserError(f"{message} ({self.prog} --help says more)")


def whole_number(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: an integer in low..high."""
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low:,} to {high:,}")
        return value

    return parse


def fraction(text: str) -> float:
    """An argparse type: a number between 0 and 1, neither included."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction between 0 and 1")
    return value


def dataset_name(text: str) -> str:
    """An argparse type: a name that can be part of a file name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: use letters, digits, '.', '_' and '-' only")
    return text


def run_embedded(args: argparse.Namespace) -> None:
    build_embedded(args.out, args.vocab_size, args.force)


def run_text(args: argparse.Namespace) -> None:
    source = TextSource(args.files, args.val_file or [], args.val_fraction, args.limit_documents, args.column)
    # the default name is the first file's: "my notes.jsonl.zst" -> "my_notes"
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", args.files[0].name.split(".")[0])
    name = args.name or stem.lstrip("_-") or "text"
    build_text(source, args.out, name, args.tokenizer, args.vocab_size, args.shard_tokens, args.transform,
               args.allow_copies or 0.0)


def run_check(args: argparse.Namespace) -> None:
    check_dataset(args.folder, args.tokenizer, args.allow_copies)


def run_fineweb(args: argparse.Namespace) -> None:
    variant = f"sp{args.vocab_size}" if args.vocab_size else args.variant
    repo_id = args.repo_id or PUBLISHERS.get(variant, PUBLISHER)
    build_fineweb(Hub(repo_id, args.remote_prefix.strip("/"), args.endpoint), args.out, variant, args.train_shards)


def build_parser() -> argparse.ArgumentParser:
    """The command line; its help texts are the reference."""
    parser = Parser(prog=os.environ.get("RUN_SH_COMMAND"),  # None: the name of this file
                    description="Make token shards and tokenizers for train_gpt.py.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    def command(name: str, run: Callable, summary: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.set_defaults(run=run)
        sub.add_argument("--out", type=Path, default=Path("data"), help="data folder (default: %(default)s)")
        return sub

    vocab = dict(type=whole_number(2, MAX_VOCAB), default=1024, metavar="V")
    sub = command("embedded", run_embedded, "A small corpus out of Python's own documentation; no network.")
    sub.add_argument("--vocab-size", **vocab, help="pieces of the tokenizer (default: %(default)s)")
    sub.add_argument("--force", action="store_true", help="build again even when it is already there")

    sub = command("text", run_text, "Your own text: each .txt file, .jsonl line or .parquet row is a document.")
    sub.add_argument("files", nargs="+", type=Path, metavar="FILE",
                     help=".txt or .jsonl, also compressed as .zst, or .parquet (needs pyarrow)")
    sub.add_argument("--column", default="text", metavar="NAME",
                     help="key of a .jsonl line, column of a .parquet file with the text (default: %(default)s)")
    sub.add_argument("--name", type=dataset_name, help="name of the dataset (default: the first file's)")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to use")
    which.add_argument("--vocab-size", **vocab, help="or train one with V pieces (default: %(default)s)")
    held = sub.add_mutually_exclusive_group()
    held.add_argument("--val-fraction", type=fraction, default=0.02, metavar="F",
                      help="share of the documents held out for validation (default: %(default)s)")
    held.add_argument("--val-file", type=Path, nargs="+", metavar="FILE", help="or files that are held out")
    allow = dict(type=fraction, metavar="F")
    sub.add_argument("--allow-copies", **allow, help="with --val-file: share of its documents that may begin as a "
                     "training document does (default: none)")
    sub.add_argument("--shard-tokens", type=whole_number(1, MAX_SHARD_TOKENS), default=SHARD_TOKENS,
                     metavar="N", help="tokens in a shard (default: %(default)s)")
    sub.add_argument("--transform", choices=transforms.TRANSFORMS, default="",
                     help="caseops: capitals become markers before lower-case words; mp3: a marker and the space "
                          "before it are one token, too; the bytes of validation text go to a side-car")
    sub.add_argument("--limit-documents", type=whole_number(1, 2**62), metavar="N",
                     help="use only the first N documents of FILE...")

    sub = command("fineweb", run_fineweb, "The published FineWeb shards and tokenizer.")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--vocab-size", **{**vocab, "default": None}, help="the export with V pieces, --variant spV")
    which.add_argument("--variant", default="sp1024", type=dataset_name,
                       help=f"export: %(default)s (the default), {', '.join(PUBLISHERS)}, or another of --repo-id")
    sub.add_argument("--train-shards", type=whole_number(0, 999_999), default=80, metavar="N",
                     help="training shards of 200 MB each (default: %(default)s); validation comes whole")
    sub.add_argument("--repo-id", help="Hugging Face dataset repository (default: the one that publishes the variant)")
    sub.add_argument("--remote-prefix", default="datasets",
                     help="folder in it that holds manifest.json (default: %(default)s)")
    sub.add_argument("--endpoint", metavar="URL", help="another hub server, such as a mirror")

    sub = command("check", run_check, "Whether a data set is whole, the published one, free of validation text.")
    sub.add_argument("folder", type=Path, metavar="DATASET", help="folder of fineweb_{train,val}_*.bin")
    sub.add_argument("--tokenizer", type=Path, metavar="MODEL", help="its model (default: what dataset.json names)")
    sub.add_argument("--allow-copies", **allow, help="share of the validation documents that may begin as a training "
                     f"document does (default: none; {CANONICAL_COPIES} in the published data sets)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 after a user's error, 130 when interrupted."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
        return 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:  # not writable, disk full, ...: the system's own words are clear enough
        where = f"{e.filename}: " if e.filename else ""
        print(f"error: {where}{e.strerror or first_line(e)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; nothing half-made is left under its final name", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
