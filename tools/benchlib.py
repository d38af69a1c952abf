"""What the two benches share: settings, data, child processes, the log lines of published scripts.

Nothing here imports PyTorch: a child's peak memory would start at its parent's.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import runlog
from shell import Parser, UsageError

ROOT = Path(__file__).resolve().parents[1]
SETTLING_STEPS = 3     # steps left out of the median: first allocations, caches
SHARD_HEADER_BYTES = 1024
# One dictionary for both sides; it names every setting whose default is not the same in both.
SETTINGS = dict(
    VOCAB_SIZE=1024, NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=3, XSA_LAST_N=4,
    VE_LAYERS="2,3", TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, TRAIN_BATCH_TOKENS=8192, VAL_BATCH_SIZE=65536,
    EVAL_STRIDE=64, WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0,
    SWA_ENABLED=0, TTT_ENABLED=1, TTT_OPTIMIZER="sgd", TTT_LR=0.03, TTT_MOMENTUM=0.9, TTT_EPOCHS=3,
    TTT_CHUNK_TOKENS=32768, TTT_BATCH_SEQS=32, TTT_GRAD_CLIP=1.0, TTT_FREEZE_BLOCKS=0,
    DEVICE="cpu", DTYPE="fp32", COMPILE=0, COMPRESS="lzma")
LABELS = {  # number -> (what tables call it, format)
    "step_ms": ("median step, ms", ",.1f"),
    "train_tokens_per_s": ("training, tokens/s", ",.0f"),
    "mfu": ("MFU of the measured ceiling", ".3f"),
    "peak_mib": ("peak memory of training, MiB", ",.0f"),
    "sliding_tokens_per_s": ("sliding evaluation, tokens/s", ",.0f"),
    "ttt_tokens_per_s": ("TTT, tokens/s", ",.0f"),
    "sliding_s": ("sliding with compilation, s", ",.1f"),
    "ttt_s": ("TTT with compilation, s", ",.1f"),
    "cpu_s": ("processor time of the whole run, s", ",.1f"),
    "peak_rss_mib": ("peak memory, MiB", ",.0f"),
    "roundtrip_bpb": ("bpb after the round trip", ".4f"),
    "sliding_bpb": ("bpb, sliding", ".4f"),
    "ttt_bpb": ("bpb, TTT", ".4f"),
    "total_bytes": ("code and artifact, bytes", ",.0f")}
SCORES = ("roundtrip", "sliding", "ttt")  # phases that both sides have


class BenchError(UsageError):
    """What was asked for cannot be measured."""


# ---- command line ------------------------------------------------------------------------------------------
def build_parser(description: str) -> Parser:
    """The options that both benches have."""
    parser = Parser(description)
    add = parser.add_argument
    add("--gpu", action="store_true", help="measure on a GPU; --gpu --help lists the options of that bench")
    add("--peer", type=Path, metavar="FILE", help="the published train_gpt.py")
    add("--ours", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="another version of ours")
    add("--steps", type=int, default=60, metavar="N", help="optimiser steps (default: %(default)s)")
    add("--repeat", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="threads of each run on a CPU (default: %(default)s)")
    add("--val-tokens", type=int, default=131_072, metavar="N", help="most validation tokens (%(default)s)")
    add_files(parser)
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings for both sides")
    return parser


def add_files(parser: Parser) -> None:
    """The options of `prepare_data`, and where the result goes."""
    add = parser.add_argument
    add("--data", type=Path, metavar="FOLDER", help="folder with fineweb_{train,val}_*.bin")
    add("--text", action="append", metavar="FILE", help="instead: text to make shards of; may be given again")
    add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model (default: a new one)")
    add("--out", type=Path, metavar="FILE", help="write all numbers there as JSON")


def run_settings(args: argparse.Namespace, defaults: dict) -> dict:
    """`defaults`, the schedule for --steps, and KEY=VALUE arguments over both. Raises BenchError on bad arguments."""
    odd = [text for text in args.settings if not re.fullmatch(r"[A-Z]\w*=.*", text)]
    if odd:
        raise BenchError(f"{odd[0]} is not KEY=VALUE")
    for path in (args.peer, args.ours):
        if not path or not path.is_file():
            raise BenchError(f"there is no file {path}" if path else
                             "--peer FILE is missing: the script to compare with")
    if args.repeat < 1:
        raise BenchError("--repeat must be 1 or more")
    return {**defaults, "ITERATIONS": args.steps, "WARMDOWN_ITERS": max(args.steps // 3, 1),
            **dict(text.split("=", 1) for text in args.settings)}


# ---- data --------------------------------------------------------------------------------------------------
def prepare_data(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(data set, tokenizer): the given ones, or new ones made of --text or of the embedded corpus."""
    if args.data:
        if not args.tokenizer:
            raise BenchError("--data needs the --tokenizer it was made with")
        return args.data, args.tokenizer
    what = ["text", *args.text] if args.text else ["embedded"]
    given = ["--tokenizer", str(args.tokenizer)] if args.text and args.tokenizer else []
    command = [sys.executable, str(ROOT / "data" / "prepare.py"), *what, *given, "--out", str(folder)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise BenchError(f"data/prepare.py: {last_line(made.stderr)}")
    tokenizer = args.tokenizer if given else next((folder / "tokenizers").glob("*.model"))
    return next((folder / "datasets").iterdir()), tokenizer


def cut_validation(data: Path, folder: Path, tokens: int, window: int = 1, start: int = 0) -> Path:
    """A data set with the same training shards and the first whole windows of the validation text from a token on: two
    scripts then score the same tokens, for the published ones leave out what does not fill a window."""
    kinds = {"": [], "bytes_": []}  # tokens; of transformed text, the bytes of each
    for path in sorted(data.glob("fineweb_val_*.bin")):
        kinds["bytes_" * path.name.startswith("fineweb_val_bytes_")].append(path.read_bytes()[SHARD_HEADER_BYTES:])
    bodies = {kind: b"".join(parts)[2 * start:] for kind, parts in kinds.items() if parts}
    windows = (min(tokens, len(bodies.get("", b"")) // 2) - 1) // window
    if windows < 1:
        raise BenchError(f"{data} holds no window of {window} validation tokens from token {start} on "
                         "(fineweb_val_*.bin)")
    folder.mkdir()
    for path in data.glob("fineweb_train_*.bin"):
        (folder / path.name).symlink_to(path.resolve())
    if (data / "dataset.json").is_file():
        shutil.copy(data / "dataset.json", folder)
    count = windows * window + 1
    header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
    for kind, body in bodies.items():
        (folder / f"fineweb_val_{kind}000000.bin").write_bytes(header + body[:2 * count])
    return folder


# ---- runs --------------------------------------------------------------------------------------------------
def program(script: Path, on_cpu: bool = False) -> list[str]:
    """The command that runs a script; on_cpu: one that was written for CUDA."""
    return [sys.executable, *([str(ROOT / "tools" / "on_cpu.py")] if on_cpu else []), str(script.resolve())]


def run_program(command: list[str], env: dict[str, str]):
    """Run a program in an empty folder: (exit code, what it printed, the system's account of it)."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "out"), "w+", encoding="utf-8") as out:
        child = subprocess.Popen(command, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=out,
                                 stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        return child.returncode, out.read(), usage


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1]


# ---- logs --------------------------------------------------------------------------------------------------
def read_log(text: str, batch_tokens: int) -> dict[str, float]:
    """The numbers in a log; a line it lacks is a key less.

    step_ms (median), train_tokens_per_s, peak_mib, total_bytes, val_tokens; for roundtrip, sliding and ttt: ..._bpb and
    ..._s, the seconds of that evaluation.
    """
    run = runlog.parse(text, batch_tokens)
    found = {key: getattr(run, key) for key in ("peak_mib", "total_bytes", "val_tokens") if getattr(run, key)}
    steps = [ms for _, _, ms in run.step_times][SETTLING_STEPS - 1:]
    if steps:
        found["step_ms"] = max(statistics.median(steps), 1e-3)
        found["train_tokens_per_s"] = 1000 * batch_tokens / found["step_ms"]
    for phase in SCORES:
        if phase in run.seconds:
            found[f"{phase}_bpb"], found[f"{phase}_s"] = run.bpb[phase], run.seconds[phase]
    return found
