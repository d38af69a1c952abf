"""Our script and a published one, side by side on this machine's CPU.

    python tools/bench.py --peer PR_1092.py                          # embedded text, 3 pairs of runs
    python tools/bench.py --peer PR_1092.py --steps 100 --data FOLDER --tokenizer MODEL --out bench.json
    python tools/bench.py --peer PR_1092.py NUM_LAYERS=6 EVAL_STRIDE=32   # settings for both sides

Both programs run as they are, eager, in fp32, with the same settings, data and seeds, in alternating order, each run a
process of its own; all numbers are read from their own log lines and from the system's account of the process. Speeds
are medians over steps, the ratios medians over pairs. Published scripts demand CUDA: they are started through a shim
that replaces device names and the like in memory (`on_cpu`); nothing of them is stored.

This file imports no torch: a child's peak memory would start at its parent's.
"""
from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import struct
import subprocess
import sys
import tempfile
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETTLING_STEPS = 3     # steps left out of the median: first allocations, caches
SHARD_HEADER_BYTES = 1024
# One dictionary for both sides: it names every setting whose defaults differ between published scripts and ours.
SETTINGS = dict(
    VOCAB_SIZE=1024, NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=3, XSA_LAST_N=4, VE_LAYERS="2,3",
    TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, TRAIN_BATCH_TOKENS=8192, VAL_BATCH_SIZE=65536, EVAL_STRIDE=64,
    WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0, SWA_ENABLED=0,
    TTT_ENABLED=1, TTT_OPTIMIZER="sgd", TTT_LR=0.03, TTT_MOMENTUM=0.9, TTT_EPOCHS=3, TTT_CHUNK_TOKENS=32768,
    TTT_BATCH_SEQS=32, TTT_GRAD_CLIP=1.0, TTT_FREEZE_BLOCKS=0, DEVICE="cpu", DTYPE="fp32", COMPILE=0, COMPRESS="lzma")
ROWS = {  # what the table shows: key -> (label, format, whether more is better)
    "train_tokens_per_s": ("training, tokens/s", ",.0f", True),
    "sliding_tokens_per_s": ("sliding evaluation, tokens/s", ",.0f", True),
    "ttt_tokens_per_s": ("SGD TTT, tokens/s", ",.0f", True),
    "peak_rss_mib": ("peak memory, MiB", ",.0f", False),
    "roundtrip_bpb": ("bpb after the round trip", ".4f", False),
    "sliding_bpb": ("bpb, sliding", ".4f", False),
    "ttt_bpb": ("bpb, TTT", ".4f", False)}


class BenchError(Exception):
    """Printed as one line; exit code 2."""


def read_log(text: str, batch_tokens: int) -> dict[str, float]:
    """Speeds and scores from the log lines the published scripts share. Raises BenchError naming what is missing."""
    def first(what: str, pattern: str) -> re.Match:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise BenchError(f"its log has no {what}")
        return match

    times = [float(ms) for ms in re.findall(r"^step:\d+/\d+ train_loss:\S+ train_time:([\d.]+)ms", text, re.MULTILINE)]
    steps_ms = [late - early for early, late in zip(times, times[1:])][SETTLING_STEPS - 1:]
    if not steps_ms:
        raise BenchError(f"its log has {len(times)} lines `step:N/M train_loss:X train_time:Yms`, "
                         f"fewer than {SETTLING_STEPS + 1}")
    tokens = int(first("line `val_loader:… tokens:N`", r"^val_loader:.* tokens:(\d+)")[1])
    found = {"train_tokens_per_s": 1000 * batch_tokens / max(statistics.median(steps_ms), 1e-3)}
    for key, label in {"roundtrip": r"final_\S+_roundtrip", "sliding": r"final_\S+_sliding_window",
                       "ttt": r"legal_ttt"}.items():
        line = first(f"score `{label} … eval_time:Nms`",
                     rf"^({label}) val_loss:\S+ val_bpb:(\S+) (?:stride:\d+ )?eval_time:(\d+)ms")
        exact = re.search(rf"^{re.escape(line[1])}_exact val_loss:\S+ val_bpb:(\S+)", text, re.MULTILINE)
        found[f"{key}_bpb"] = float(exact[1] if exact else line[2])
        found[f"{key}_tokens_per_s"] = 1000 * tokens / max(int(line[3]), 1)
    return found


def run_once(name: str, command: list[str], settings: dict[str, str], threads: int) -> dict[str, float]:
    """Run a program in an empty folder; what its log says, and its peak memory. Raises BenchError."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "console", "w+", encoding="utf-8") as console:
        env = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **settings}
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=console, stderr=subprocess.STDOUT,
                                 stdin=subprocess.DEVNULL)
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            child.kill()
            raise
        child.returncode = os.waitstatus_to_exitcode(status)
        console.seek(0)
        text = console.read()
    if child.returncode:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"{name} ended with code {child.returncode}: {last}")
    try:
        found = read_log(text, int(settings["TRAIN_BATCH_TOKENS"]))
    except BenchError as error:
        raise BenchError(f"{name}: {error}") from None
    return {**found, "peak_rss_mib": usage.ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)}


def run_pairs(ours: Path, peer: Path, settings: dict[str, str], repeat: int, threads: int) -> list[dict]:
    """`repeat` pairs of runs, ours first in every other one, each pair with its own seed."""
    commands = {"ours": [sys.executable, str(ours)],
                "peer": [sys.executable, str(Path(__file__).resolve()), "--on-cpu", str(peer)]}
    pairs, seed = [], int(settings.pop("SEED", 1337))
    for i in range(repeat):
        pair = {"seed": seed + i}
        for name in sorted(commands, reverse=i % 2 == 1):
            pair[name] = run_once(name, commands[name], {**settings, "SEED": str(seed + i)}, threads)
            print(f"pair {i + 1}/{repeat} {name:<5}" + "".join(
                f"  {label} {pair[name][key]:{form}}" for key, (label, form, _) in ROWS.items()), file=sys.stderr)
        pairs.append(pair)
    return pairs


def summarise(pairs: list[dict]) -> dict[str, dict]:
    """Per row: medians of both sides, median of the paired ratios and their range."""
    rows = {}
    for key in ROWS:
        ratios = [pair["ours"][key] / pair["peer"][key] for pair in pairs]
        rows[key] = {side: statistics.median(pair[side][key] for pair in pairs) for side in ("ours", "peer")}
        rows[key] |= {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
    return rows


def table(rows: dict[str, dict], peer: str) -> str:
    """The result as a Markdown table."""
    lines = [f"| | ours | {peer} | ours / {peer} | range | better is |", "|---|---:|---:|---:|---|---|"]
    for key, (label, form, more) in ROWS.items():
        row = rows[key]
        lines.append(f"| {label} | {row['ours']:{form}} | {row['peer']:{form}} | {row['ratio']:.3f} | "
                     f"{row['lowest']:.3f} … {row['highest']:.3f} | {'more' if more else 'less'} |")
    return "\n".join(lines)


def prepare_data(args: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """(data set, tokenizer): the given ones, or new ones made from --text or the embedded corpus."""
    if args.data:
        if not args.tokenizer:
            raise BenchError("--data needs the --tokenizer it was made with")
        return args.data, args.tokenizer
    what = ["text", *map(str, args.text)] if args.text else ["embedded"]
    given = ["--tokenizer", str(args.tokenizer)] if args.text and args.tokenizer else []
    made = subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), *what, *given, "--out", str(folder)],
                          capture_output=True, text=True)
    if made.returncode:
        raise BenchError(f"data/prepare.py: {(made.stderr.strip().splitlines() or ['failed'])[-1]}")
    return next((folder / "datasets").iterdir()), args.tokenizer or next((folder / "tokenizers").glob("*.model"))


def cut_validation(data: Path, folder: Path, tokens: int, window: int) -> Path:
    """A data set with the same training shards and the first whole windows of the validation text, so that both
    sides score the same tokens: the published scripts leave out what does not fill a window."""
    body = b"".join(path.read_bytes()[SHARD_HEADER_BYTES:] for path in sorted(data.glob("fineweb_val_*.bin")))
    windows = (min(tokens, len(body) // 2) - 1) // window
    if windows < 1:
        raise BenchError(f"{data} holds no validation text of a window of {window} tokens (fineweb_val_*.bin)")
    folder.mkdir()
    for path in data.glob("fineweb_train_*.bin"):
        (folder / path.name).symlink_to(path.resolve())
    count = windows * window + 1
    header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
    (folder / "fineweb_val_000000.bin").write_bytes(header + body[:2 * count])
    return folder


def on_cpu(path: str) -> None:
    """Run a published script, written for CUDA, on the CPU in fp32 and eager: its source is changed in memory only."""
    import torch  # in the child only

    source = Path(path).read_text(encoding="utf-8")
    for pattern, new in ((r"torch\.cuda\.is_available\(\)", "True"), (r"\.bfloat16\(\)", ".float()"),
                         (r"torch\.bfloat16", "torch.float32"),
                         (r"torch\.device\(\s*(['\"])cuda\1[^)]*\)", "torch.device('cpu')"),
                         (r"(['\"])cuda(?::\d+)?\1", "'cpu'"),
                         (r"torch\.inference_mode\(", "torch.no_grad(")):  # rotary tables cached there train later
        source = re.sub(pattern, new, source)
    nothing = lambda *_, **__: None
    for name in ("set_device", "synchronize", "manual_seed_all", "empty_cache", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, nothing)
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda *_, **__: 0
    for name in ("cudnn", "flash", "math", "mem_efficient"):  # one kernel is as good as another's absence here
        setattr(torch.backends.cuda, f"enable_{name}_sdp", nothing)
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    if re.search(r"^from flash_attn_interface import", source, re.MULTILINE):  # demanded, not tried
        attend = torch.nn.functional.scaled_dot_product_attention
        sys.modules["flash_attn_interface"] = types.SimpleNamespace(
            flash_attn_func=lambda q, k, v, causal=True, **_: attend(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True).transpose(1, 2))
    really_run = subprocess.run
    subprocess.run = lambda command, *a, **k: types.SimpleNamespace(stdout="", stderr="", returncode=0) \
        if command[0] == "nvidia-smi" else really_run(command, *a, **k)
    sys.argv = [path]
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": path})


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, required=True, metavar="FILE", help="the published train_gpt.py")
    parser.add_argument("--ours", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="another version of ours")
    parser.add_argument("--steps", type=int, default=60, metavar="N", help="optimiser steps (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="CPU threads (default: %(default)s)")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="folder with fineweb_{train,val}_*.bin")
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="instead: text to make shards of")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model (default: a new one)")
    parser.add_argument("--val-tokens", type=int, default=131_072, metavar="N",
                        help="most validation tokens (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there as JSON")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings for both sides")
    return parser


def main(argv: list[str]) -> int:
    if argv[:1] == ["--on-cpu"]:
        on_cpu(argv[1])
        return 0
    args = build_parser().parse_intermixed_args(argv)
    given = dict(pair.partition("=")[::2] for pair in args.settings)
    try:
        if not args.peer.is_file():
            raise BenchError(f"there is no file {args.peer}")
        with tempfile.TemporaryDirectory() as scratch:
            data, tokenizer = prepare_data(args, Path(scratch) / "made")
            settings = {key: str(value) for key, value in {
                **SETTINGS, "ITERATIONS": args.steps, "WARMDOWN_ITERS": max(args.steps // 3, 1), **given}.items()}
            data = cut_validation(data, Path(scratch) / "data", args.val_tokens, int(settings["EVAL_SEQ_LEN"]))
            settings |= {"DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer.resolve())}
            pairs = run_pairs(args.ours.resolve(), args.peer.resolve(), settings, args.repeat, args.threads)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = summarise(pairs)
    print(table(rows, args.peer.stem))
    if args.out:
        kept = {key: value for key, value in settings.items() if not key.endswith("_PATH")}
        args.out.write_text(json.dumps({
            "device": "cpu", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": args.threads, "python": platform.python_version(), "peer": args.peer.name,
            "train_ratio": rows["train_tokens_per_s"]["ratio"], "sliding_ratio": rows["sliding_tokens_per_s"]["ratio"],
            "ttt_ratio": rows["ttt_tokens_per_s"]["ratio"], "rows": rows, "settings": kept, "pairs": pairs}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
