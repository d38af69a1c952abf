"""Speed and memory of our script and a published one, side by side on this machine's CPU (--gpu: GPU).

    python tools/bench.py --peer PR_1092.py                          # embedded text, 3 pairs of runs
    python tools/bench.py --peer PR_1092.py --steps 100 --data FOLDER --tokenizer MODEL --out bench.json
    python tools/bench.py --peer PR_1092.py NUM_LAYERS=6 EVAL_STRIDE=32   # settings for both sides
    python tools/bench.py --gpu --peer PR_1092.py --profile          # the real model on a GPU: see gpu_bench.py
    python tools/bench.py --quality frontier pr1092                  # what systems reach: see quality_bench.py

Both programs run as they are, eager, in fp32, with the same settings, data and seeds, in alternating order,
each run a process of its own. All numbers come from their own log lines and from the system's account of the
process: speeds are medians over steps, ratios medians over pairs. Published scripts need CUDA; on_cpu.py runs
them with device names and the like replaced in memory.
"""
from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import benchlib
import runlog
from benchlib import LABELS, BenchError
from shell import one_line_errors

ROWS = ("train_tokens_per_s", "sliding_tokens_per_s", "ttt_tokens_per_s", "cpu_s", "peak_rss_mib", "roundtrip_bpb",
        "sliding_bpb", "ttt_bpb")  # of the table
NEEDED = {  # number -> the line of a log that has it
    "step_ms": f"`step:N/M train_loss:X train_time:Yms` of {benchlib.SETTLING_STEPS + 1} steps",
    "val_tokens": "`val_loader:… tokens:N`",
    **{f"{key}_s": f"`{runlog.PHASES[key]} … eval_time:Nms`" for key in benchlib.SCORES}}


def read_log(text: str, batch_tokens: int) -> dict[str, float]:
    """Speeds and scores in a log. Raises BenchError: what is missing."""
    found = benchlib.read_log(text, batch_tokens)
    for key, line in NEEDED.items():
        if key not in found:
            raise BenchError(f"its log has no line {line}")
    return found | {f"{key}_tokens_per_s": found["val_tokens"] / max(found[f"{key}_s"], 1e-3)
                    for key in benchlib.SCORES}


def run_once(name: str, command: list[str], settings: dict[str, str], threads: int) -> dict[str, float]:
    """One run of a program: its log's numbers, processor time, peak memory. Raises BenchError."""
    env = {"OMP_WAIT_POLICY": "passive",  # threads that spin while they wait measure the machine's other work
           **os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **settings}
    code, text, usage = benchlib.run_program(command, env)
    if code:
        raise BenchError(f"{name} ended with code {code}: {benchlib.last_line(text)}")
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
            numbers = ", ".join(f"{LABELS[key][0]} {pair[name][key]:{LABELS[key][1]}}" for key in ROWS)
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
    for key in ROWS:
        (label, form), row, better = LABELS[key], rows[key], "more" if key.endswith("tokens_per_s") else "less"
        lines.append(f"| {label} | {row['ours']:{form}} | {row['peer']:{form}} | {row['ratio']:.3f} | "
                     f"{row['lowest']:.3f} … {row['highest']:.3f} | {better} |")
    return "\n".join(lines)


def measure(args: argparse.Namespace) -> dict:
    """Prepare the data, run the pairs; all numbers and what they depend on. Raises BenchError."""
    settings = benchlib.run_settings(args, benchlib.SETTINGS)
    commands = {"ours": benchlib.program(args.ours), "peer": benchlib.program(args.peer, on_cpu=True)}
    with tempfile.TemporaryDirectory() as scratch:
        data, tokenizer = benchlib.prepare_data(args, Path(scratch, "made"))
        data = benchlib.cut_validation(data, Path(scratch, "data"), args.val_tokens, int(settings["EVAL_SEQ_LEN"]))
        paths = {"DATA_PATH": str(data), "TOKENIZER_PATH": str(tokenizer.resolve())}
        env = {key: str(value) for key, value in (settings | paths).items()}
        pairs = run_pairs(commands, env, args.repeat, args.threads)
    rows = summarise(pairs)
    ratios = {f"{what}_ratio": rows[f"{what}_tokens_per_s"]["ratio"] for what in ("train", "sliding", "ttt")}
    return {"device": "cpu", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
            "threads": args.threads, "python": platform.python_version(), "peer": args.peer.name, **ratios,
            "rows": rows, "settings": settings, "pairs": pairs}


@one_line_errors
def main(argv: list[str]) -> int:
    for kind in ("gpu", "quality"):
        if f"--{kind}" in argv:
            os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name(f"{kind}_bench.py")), *argv])
    args = benchlib.build_parser(__doc__).parse_intermixed_args(argv)
    result = measure(args)
    print(table(result["rows"], args.peer.stem))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
