"""Settings of test-time training over one model and a slice of the validation text, as a table.

    python tools/ttt_bench.py final_model.ptz --tokens 200000 TTT_MODE=lora TTT_LORA_RANK=1,2,4,8 TTT_LORA_LR=0.003,0.01
    python tools/ttt_bench.py final_model.pt --tokens 200000 TTT_LR=0.01,0.03 SEED=1,2,3 --out sweep.json
    python tools/ttt_bench.py final_model.ptz --tokens 20000 --speed TTT_BATCH_DOCS=16

Every combination of the values is scored from the same weights; alternatives stand between commas, those of settings
that are lists themselves between slashes (TTT_LORA_TARGETS=q,v/q,k,v,o). The gain is bits per byte against sliding
evaluation without adaptation. Only settings of the evaluation and SEED can vary; all others - data, tokenizer, device,
and for a float model (.pt) its shape - have one value, as KEY=VALUE or from the environment. Seconds are those of the
process on a CPU (which others may be using too). --speed: documents side by side against one at a time, in tokens per
second; --doc-tokens makes them alike.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pickle
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import shell  # noqa: E402
import study  # noqa: E402

VARIES = {"SEED", *(name for f in tg.settings_by_section()["Evaluation"] for name in tg.env_names(f))}


def load(path: Path, rt: tg.Runtime, val: tg.ValData, cfg: tg.Hyperparameters) -> tg.GPT:
    """The model of an artifact (.ptz, which knows its shape) or of a float state (.pt). Raises UserError."""
    try:
        blob = path.read_bytes()
    except OSError as error:
        raise tg.UserError(f"cannot read {path}: {error.strerror}") from None
    if path.suffix == ".ptz":
        return tg.load_model(blob, rt, val.tokenizer_sha256)
    model = tg.GPT(dataclasses.replace(cfg, mtp_num_heads=0), rt.attend, rt.dtype)
    try:
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, LookupError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or ["it is no state of a model"])[-1].strip()
        raise tg.UserError(f"{path} does not fit the settings of the environment: {reason}") from None
    return model.to(rt.device).eval()


def cut_documents(val: tg.ValData, most: int) -> tg.ValData:
    """The text with all but the first `most` tokens of each document left out, and shorter documents altogether."""
    starts = (val.tokens == val.bos_id).nonzero().flatten().tolist()
    spans = [(first, stop) for first, stop in zip(starts, starts[1:]) if stop - first >= most]
    if not spans:
        raise tg.UserError(f"--doc-tokens {most}: no document is that long")
    return val.take(torch.cat([torch.arange(first, first + most) for first, _ in spans]))


class Bench:
    """One model, one slice of text, and a score for each set of settings."""

    def __init__(self, args: argparse.Namespace):
        # an artifact knows its shape and its tokenizer; the float weights of a run do not
        self.environ = {**os.environ, **({"EVAL_ARTIFACT": str(args.model)} if args.model.suffix == ".ptz" else {})}
        self.base = tg.settings_from({**self.environ, "TTT_ENABLED": "0"})
        self.rt = dataclasses.replace(tg.Runtime.open(self.base), log=tg.RunLog(Path("."), "", active=False))
        val = tg.ValData.open(self.base, self.rt)
        text = cut_documents(val, args.doc_tokens) if args.doc_tokens else val
        self.val = text.take(slice(args.start, args.start + args.tokens + 1))
        self.model = load(args.model, self.rt, val, self.base)
        self.weights = {name: p.detach().clone() for name, p in self.model.state_dict().items()}
        self.plain = {}  # (window, stride) -> bpb without adaptation

    def settings(self, changes: dict[str, str]) -> tg.Hyperparameters:
        cfg = tg.settings_from({**self.environ, **changes, "EVAL_MAX_SECONDS": "0", "TTT_ENABLED": "1"})
        if len(self.val.tokens) <= cfg.window:
            raise tg.UserError(f"--tokens {len(self.val.tokens) - 1} is less than a window of {cfg.window}")
        return cfg

    def score(self, cfg: tg.Hyperparameters, adapts: bool) -> tg.EvalResult:
        self.model.load_state_dict(self.weights)
        adapter = tg.adapter_for(self.model, cfg, self.rt) if adapts else None
        begun, score_fn = self.now(), tg.scorer(self.model, self.rt, adapter)
        plan = tg.plan_evaluation(self.val, cfg, self.rt, cfg.eval_stride or cfg.window, cfg.eval_batch_seqs, adapts)
        r = tg.evaluate("bench", score_fn, self.val, cfg, self.rt, plan, adapter)
        return dataclasses.replace(r, seconds=self.now() - begun)

    def now(self) -> float:
        """Seconds of this process on a CPU, which others may be using too; else of the clock."""
        return time.process_time() if self.rt.device.type == "cpu" else time.perf_counter()

    def row(self, changes: dict[str, str]) -> dict:
        cfg = self.settings(changes)
        key = cfg.window, cfg.eval_stride
        if key not in self.plain:
            self.plain[key] = self.score(cfg, False)
        r = self.score(cfg, True)
        plain = self.plain[key]
        return {"settings": changes, "bpb": r.bpb, "gain": plain.bpb - r.bpb, "loss": r.loss, "tokens": r.tokens,
                "bytes": r.bytes, "seconds": r.seconds, "plain_bpb": plain.bpb, "plain_seconds": plain.seconds}

    def speed(self, changes: dict[str, str]) -> dict:
        """Tokens per second of documents side by side and one at a time, of the same code on the same text."""
        cfg = self.settings({"TTT_MODE": "lora", "TTT_RESET": "document", **changes})
        speeds = []
        for rows in (cfg.ttt_batch_docs, 1):
            r = self.score(dataclasses.replace(cfg, ttt_batch_docs=rows), True)
            speeds.append(r.tokens / r.seconds)
        return {"settings": changes, "side_by_side": cfg.ttt_batch_docs, "tokens_per_s": speeds[0],
                "tokens_per_s_alone": speeds[1], "ratio": speeds[0] / speeds[1]}


def line(row: dict, keys: list[str]) -> str:
    """A row of the Markdown table."""
    if "ratio" in row:
        cells = [f"{row['side_by_side']}", f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_s_alone']:,.0f}",
                 f"{row['ratio']:.2f}"]
    else:
        cells = [f"{row['bpb']:.5f}", f"{row['gain']:+.5f}", f"{row['seconds']:.1f}"]
    return "| " + " | ".join([row["settings"].get(key, "") for key in keys] + cells) + " |"


def build_parser() -> shell.Parser:
    parser = shell.Parser(__doc__, epilog="KEY=a,b,c: settings and their values")
    parser.add_argument("model", type=Path, metavar="MODEL", help="final_model.ptz or final_model.pt")
    parser.add_argument("--tokens", type=int, default=100_000, metavar="N",
                        help="targets to score (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first token of the text to use")
    parser.add_argument("--speed", action="store_true", help="documents side by side against one at a time")
    parser.add_argument("--doc-tokens", type=int, default=0, metavar="N",
                        help="cut documents to N tokens, drop shorter ones")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write all numbers there as JSON, after every row")
    return parser


@shell.one_line_errors
def main(argv: list[str]) -> int:
    args, settings = build_parser().split(argv)
    for name, least in (("tokens", 1), ("start", 0), ("doc_tokens", 0)):
        if getattr(args, name) < least:
            raise tg.UserError(f"--{name.replace('_', '-')} {getattr(args, name)} is out of range: {least} or more")
    os.environ.update({key: value for key, value in settings.items() if key not in VARIES})
    axes = {key: study.read_axis(key, values) for key, values in settings.items() if key in VARIES}
    if any(isinstance(axis, study.Range) for axis in axes.values()):
        raise tg.UserError("a range of values is for sweeps of whole runs; name the values: a,b,c")
    grid = study.grid(axes)
    bench = Bench(args)
    for changes in grid:
        bench.settings(changes)  # a bad combination is refused before anything is scored
    keys = list(grid[0])
    measured = ["side by side", "tokens/s", "tokens/s alone", "ratio"] if args.speed else ["bpb", "gain", "seconds"]
    heads = keys + measured
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads), flush=True)
    rows, begun = [], time.time()
    for changes in grid:
        rows.append(bench.speed(changes) if args.speed else bench.row(changes))
        print(line(rows[-1], keys), flush=True)
        if args.out:
            tg.write_atomically(args.out, json.dumps({
                "model": args.model.name, "device": str(bench.rt.device), "threads": torch.get_num_threads(),
                "torch": torch.__version__, "first_token": args.start, "seconds": time.time() - begun,
                "rows": rows}, indent=1).encode())
    for (window, stride), r in bench.plain.items():
        print(f"without adaptation, windows of {window} every {stride}: {r.bpb:.5f} bpb, {r.tokens:,} tokens, "
              f"{r.seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
