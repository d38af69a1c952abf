"""Our script and a published one, side by side on this machine's CPU.

    python tools/bench.py --peer PR_1092.py                          # embedded text, 3 pairs of runs
    python tools/bench.py --peer PR_1092.py --steps 100 --data FOLDER --tokenizer MODEL --out bench.json
    python tools/bench.py --peer PR_1092.py NUM_LAYERS=6 EVAL_STRIDE=32   # settings for both sides
    python tools/bench.py --gpu --peer PR_1092.py --profile          # the real model on a GPU: see gpu_bench.py

Both programs run as they are, eager, in fp32, with the same settings, data and seeds, in alternating order,
each run a process of its own. All numbers come from their own log lines and from the system's account of the
process: speeds are medians over steps, ratios medians over pairs. Published scripts demand CUDA; a shim runs
them that replaces device names and the like in memory (`on_cpu`); nothing of them is stored.

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
# One dictionary for both sides; it names every setting whose default is not the same in both.
SETTINGS = dict(
    VOCAB_SIZE=1024, NUM_LAYERS=4, MODEL_DIM=128, NUM_HEADS=4, NUM_KV_HEADS=2, MLP_MULT=3, XSA_LAST_N=4,
    VE_LAYERS="2,3", TRAIN_SEQ_LEN=256, EVAL_SEQ_LEN=256, TRAIN_BATCH_TOKENS=8192, VAL_BATCH_SIZE=65536,
    EVAL_STRIDE=64, WARMUP_STEPS=0, MAX_WALLCLOCK_SECONDS=0, TRAIN_LOG_EVERY=1, VAL_LOSS_EVERY=0,
    SWA_ENABLED=0, TTT_ENABLED=1, TTT_OPTIMIZER="sgd", TTT_LR=0.03, TTT_MOMENTUM=0.9, TTT_EPOCHS=3,
    TTT_CHUNK_TOKENS=32768, TTT_BATCH_SEQS=32, TTT_GRAD_CLIP=1.0, TTT_FREEZE_BLOCKS=0,
    DEVICE="cpu", DTYPE="fp32", COMPILE=0, COMPRESS="lzma")
ROWS = {  # what the table shows: key -> (label, format, whether more is better)
    "train_tokens_per_s": ("training, tokens/s", ",.0f", True),
    "sliding_tokens_per_s": ("sliding evaluation, tokens/s", ",.0f", True),
    "ttt_tokens_per_s": ("SGD TTT, tokens/s", ",.0f", True),
    "cpu_s": ("processor time of the whole run, s", ",.1f", False),
    "peak_rss_mib": ("peak memory, MiB", ",.0f", False),
    "roundtrip_bpb": ("bpb after the round trip", ".4f", False),
    "sliding_bpb": ("bpb, sliding", ".4f", False),
    "ttt_bpb": ("bpb, TTT", ".4f", False)}
TRAIN_LINE = r"^step:\d+/\d+ train_loss:\S+ train_time:([\d.]+)ms"
SCORES = {"roundtrip": r"final_\S+_roundtrip", "sliding": r"final_\S+_sliding_window", "ttt": r"legal_ttt"}


class BenchError(Exception):
    """Printed as one line; exit code 2."""


def read_log(text: str, batch_tokens: int) -> dict[str, float]:
    """Speeds and scores from the log lines published scripts share. Raises BenchError: what is missing."""
    def first(what: str, pattern: str) -> re.Match:
        match = re.search(pattern, text, re.MULTILINE)
        if match is None:
            raise BenchError(f"its log has no {what}")
        return match

    times = [float(ms) for ms in re.findall(TRAIN_LINE, text, re.MULTILINE)]
    steps_ms = [late - early for early, late in zip(times, times[1:])][SETTLING_STEPS - 1:]
    if not steps_ms:
        raise BenchError(f"its log has {len(times)} lines `step:N/M train_loss:X train_time:Yms`, "
                         f"fewer than {SETTLING_STEPS + 1}")
    tokens = int(first("line `val_loader:… tokens:N`", r"^val_loader:.* tokens:(\d+)")[1])
    found = {"train_tokens_per_s": 1000 * batch_tokens / max(statistics.median(steps_ms), 1e-3)}
    for key, label in SCORES.items():
        line = first(f"line `{label} … eval_time:Nms`",
                     rf"^({label}) val_loss:\S+ val_bpb:(\S+) (?:stride:\d+ )?eval_time:(\d+)ms")
        exact = re.search(rf"^{re.escape(line[1])}_exact val_loss:\S+ val_bpb:(\S+)", text, re.MULTILINE)
        found[f"{key}_bpb"] = float(exact[1] if exact else line[2])
        found[f"{key}_tokens_per_s"] = 1000 * tokens / max(int(line[3]), 1)
    return found


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


def run_once(name: str, command: list[str], settings: dict[str, str], threads: int) -> dict[str, float]:
    """One run of a program: its log's numbers, processor time, peak memory. Raises BenchError."""
    env = {"OMP_WAIT_POLICY": "passive",  # threads that spin while they wait measure the machine's other work
           **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **settings}
    code, text, usage = run_program(command, env)
    if code:
        last = (text.strip().splitlines() or ["no output"])[-1]
        raise BenchError(f"{name} ended with code {code}: {last}")
    try:
        found = read_log(text, int(settings["TRAIN_BATCH_TOKENS"]))
    except BenchError as error:
        raise BenchError(f"{name}: {error}") from None
    found["cpu_s"] = usage.ru_utime + usage.ru_stime
    found["peak_rss_mib"] = usage.ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)
    return found


def run_pairs(commands: dict, settings: dict[str, str], repeat: int, threads: int) -> list[dict]:
    """`repeat` pairs of runs, ours first in every other one, each pair with its own seed."""
    pairs, seed = [], int(settings.get("SEED", 1337))
    for i in range(repeat):
        pair = {"seed": seed + i}
        for name in sorted(commands, reverse=i % 2 == 1):
            pair[name] = run_once(name, commands[name], {**settings, "SEED": str(seed + i)}, threads)
            numbers = ", ".join(f"{label} {pair[name][key]:{form}}" for key, (label, form, _) in ROWS.items())
            print(f"pair {i + 1}/{repeat} {name}: {numbers}", file=sys.stderr, flush=True)
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
        raise BenchError(f"data/prepare.py: {(made.stderr.strip().splitlines() or ['failed'])[-1]}")
    tokenizer = args.tokenizer if given else next((folder / "tokenizers").glob("*.model"))
    return next((folder / "datasets").iterdir()), tokenizer


def cut_validation(data: Path, folder: Path, tokens: int, window: int) -> Path:
    """A data set with the same training shards and the first whole windows of the validation text: both sides
    then score the same tokens, for the published scripts leave out what does not fill a window."""
    body = b"".join(path.read_bytes()[SHARD_HEADER_BYTES:] for path in sorted(data.glob("fineweb_val_*.bin")))
    windows = (min(tokens, len(body) // 2) - 1) // window
    if windows < 1:
        raise BenchError(f"{data} holds no window of {window} validation tokens (fineweb_val_*.bin)")
    folder.mkdir()
    for path in data.glob("fineweb_train_*.bin"):
        (folder / path.name).symlink_to(path.resolve())
    count = windows * window + 1
    header = struct.pack("<256i", 20240520, 1, count, *[0] * 253)
    (folder / "fineweb_val_000000.bin").write_bytes(header + body[:2 * count])
    return folder


def on_cpu(path: str) -> None:
    """Run a script written for CUDA on the CPU, in fp32 and eager: its source is changed in memory only."""
    import torch  # in the child only

    source = Path(path).read_text(encoding="utf-8")
    for pattern, new in ((r"torch\.cuda\.is_available\(\)", "True"),
                         (r"\.bfloat16\(\)", ".float()"), (r"torch\.bfloat16", "torch.float32"),
                         (r"torch\.device\(\s*(['\"])cuda\1[^)]*\)", "torch.device('cpu')"),
                         (r"(['\"])cuda(?::\d+)?\1", "'cpu'"),
                         (r"torch\.inference_mode\(", "torch.no_grad(")):  # rotary tables outlive it
        source = re.sub(pattern, new, source)
    for name in ("set_device synchronize manual_seed_all empty_cache reset_peak_memory_stats max_memory_allocated "
                 "max_memory_reserved").split():
        setattr(torch.cuda, name, lambda *_, **__: 0)  # one object each: dynamo tells them apart
    for name in ("cudnn", "flash", "math", "mem_efficient"):  # meant for CUDA, they turn kernels off here
        setattr(torch.backends.cuda, f"enable_{name}_sdp", lambda *_: None)
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
    parser = argparse.ArgumentParser(prog=os.environ.get("RUN_SH_COMMAND"), description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--gpu", action="store_true", help="measure on a GPU; `--gpu --help` tells of its options")
    add("--peer", type=Path, metavar="FILE", help="the published train_gpt.py")
    add("--ours", type=Path, default=ROOT / "train_gpt.py", metavar="FILE", help="another version of ours")
    add("--steps", type=int, default=60, metavar="N", help="optimiser steps (default: %(default)s)")
    add("--repeat", type=int, default=3, metavar="N", help="pairs of runs (default: %(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="threads of each run (default: %(default)s)")
    add("--data", type=Path, metavar="FOLDER", help="folder with fineweb_{train,val}_*.bin")
    add("--text", action="append", metavar="FILE", help="instead: text to make shards of; may be given again")
    add("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model (default: a new one)")
    add("--val-tokens", type=int, default=131_072, metavar="N", help="most validation tokens (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write all numbers there as JSON")
    add("settings", nargs="*", metavar="KEY=VALUE", help="settings for both sides")
    return parser


def given_settings(args: argparse.Namespace) -> dict[str, str]:
    """KEY=VALUE arguments as a dictionary, after a look at the files that were named. Raises BenchError."""
    odd = [text for text in args.settings if not re.fullmatch(r"[A-Z]\w*=.*", text)]
    if odd:
        raise BenchError(f"{odd[0]} is not KEY=VALUE")
    for path in (args.peer, args.ours):
        if not path or not path.is_file():
            raise BenchError(f"there is no file {path}" if path else
                             "--peer FILE is missing: the script to compare with")
    return dict(text.split("=", 1) for text in args.settings)


def measure(args: argparse.Namespace) -> dict:
    """Prepare the data, run the pairs; everything that is worth keeping. Raises BenchError."""
    given = given_settings(args)
    if args.repeat < 1:
        raise BenchError("--repeat must be 1 or more")
    settings = {**SETTINGS, "ITERATIONS": args.steps, "WARMDOWN_ITERS": max(args.steps // 3, 1),
                **given}
    commands = {"ours": [sys.executable, str(args.ours.resolve())],
                "peer": [sys.executable, str(Path(__file__).resolve()), "--on-cpu", str(args.peer.resolve())]}
    with tempfile.TemporaryDirectory() as scratch:
        data, tokenizer = prepare_data(args, Path(scratch, "made"))
        data = cut_validation(data, Path(scratch, "data"), args.val_tokens, int(settings["EVAL_SEQ_LEN"]))
        paths = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer.resolve())}
        env = {key: str(value) for key, value in (settings | paths).items()}
        pairs = run_pairs(commands, env, args.repeat, args.threads)
    rows = summarise(pairs)
    ratios = {f"{what}_ratio": rows[f"{what}_tokens_per_s"]["ratio"] for what in ("train", "sliding", "ttt")}
    return {"device": "cpu", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": args.threads, "python": platform.python_version(), "peer": args.peer.name, **ratios,
            "rows": rows, "settings": settings, "pairs": pairs}


def main(argv: list[str]) -> int:
    if argv[:1] == ["--on-cpu"]:
        on_cpu(argv[1])
        return 0
    if "--gpu" in argv:
        import gpu_bench
        return gpu_bench.main(argv)
    args = build_parser().parse_intermixed_args(argv)
    try:
        result = measure(args)
        print(table(result["rows"], args.peer.stem))
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (BenchError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
