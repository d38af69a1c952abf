"""Systems trained on the same tokens at a size that two CPU cores train in minutes: what each loses, keeps and weighs.

    python tools/bench.py --quality --data FOLDER --tokenizer MODEL frontier pr1092
    python tools/bench.py --quality --data FOLDER --tokenizer MODEL --seeds 7,8,9 frontier frontier:LEAKY_SLOPE=0.5
    python tools/bench.py --quality ... frontier --log "PR 1855=FOLDER/log"      # a published script's log beside them

A system is a profile, with changes behind a colon where it has some: NAME:KEY=VALUE,KEY=VALUE. All are run at the sizes
in SIZES, with the batches, the steps and the seed of one another; everything else is the profile's. The table has
medians over seeds, and the ratio of bits per byte before quantisation to that of the first system.
"""
from __future__ import annotations

import json
import os
import re
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # profiles.py looks at train_gpt.py
import benchlib  # noqa: E402
import profiles  # noqa: E402
import runlog  # noqa: E402
from benchlib import BenchError  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

SIZES = dict(
    NUM_LAYERS=5, MODEL_DIM=160, NUM_HEADS=5, NUM_KV_HEADS=1, XSA_LAST_N=5, ROPE_DIMS=8, TRAIN_SEQ_LEN=256,
    TRAIN_SEQ_SCHEDULE="", EVAL_SEQ_LEN=256, EVAL_STRIDE=64, TRAIN_BATCH_TOKENS=8192, VAL_BATCH_SIZE=16384,
    ITERATIONS=400, MAX_WALLCLOCK_SECONDS=0, WARMUP_STEPS=0, MUON_MOMENTUM_WARMUP_STEPS=150, EVAL_MAX_SECONDS=0,
    VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=50, CHECKPOINT_EVERY=0, CHECKPOINT_SECONDS=0,
    GPTQ_RESERVE_SECONDS=0, SIZE_FIT=0, TTT_LORA_RANK=8, TTT_BATCH_DOCS=4, TTT_CHUNK_TOKENS=8192, TTT_BATCH_SEQS=8,
    DEVICE="cpu", DTYPE="fp32", COMPILE=0)
WHERE_ON = {"NUM_LOOPS": dict(LOOP_START=1, LOOP_END=2), "PARALLEL_START_LAYER": dict(PARALLEL_START_LAYER=3),
            "VE_ENABLED": dict(VE_LAYERS="3,4"), "WARMDOWN_ITERS": dict(WARMDOWN_ITERS=200)}  # if a profile has it
COLUMNS = {"pre_quant_bpb": ".4f", "roundtrip_bpb": ".4f", "ttt_bpb": ".4f", "ngram_bpb": ".4f",
           "bytes": ",.0f", "train_tokens_per_s": ",.0f"}


def settings_of(system: str, given: dict[str, str]) -> dict[str, str]:
    """The environment of a run: profile, sizes, changes of the system, settings for all."""
    name, _, changes = system.partition(":")
    odd = [pair for pair in filter(None, changes.split(",")) if not re.fullmatch(r"[A-Z]\w*=[^=]*", pair)]
    if odd:
        raise BenchError(f"{system}: {odd[0]} is not KEY=VALUE")
    own = profiles.load(name).values
    where = {key: value for on, sizes in WHERE_ON.items() if own.get(on, "0") != "0" for key, value in sizes.items()}
    where |= {"EMA_DECAY": 0.958} if own.get("EMA_RAMP") == "0" else {}  # an average of 24 steps of 400, as 290 of 4,900
    changed = dict(pair.split("=", 1) for pair in filter(None, changes.split(",")))
    return {key: str(value) for key, value in (own | SIZES | where | given | changed).items()}


def run(system: str, environ: dict[str, str], seed: int) -> dict[str, float]:
    """One run of ours. Raises BenchError."""
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, **environ, "SEED": str(seed), "RUN_ID": "quality", "ARTIFACT_DIR": folder}
        code, text, _ = benchlib.run_program(benchlib.program(benchlib.ROOT / "train_gpt.py"), env)
        if code:
            raise BenchError(f"{system} ended with code {code}: {benchlib.last_line(text)}")
        summary = json.loads(Path(folder, "runs/quality/summary.json").read_text())
    found = {f"{key}_bpb": summary[f"val_bpb_{key}"] for key in ("pre_quant", "roundtrip", "ttt", "ngram")}
    return found | {"bytes": summary["artifact_bytes"],
                    "train_tokens_per_s": summary["tokens"] / summary["seconds"]["train"]}


def read_published(name: str, path: Path) -> dict[str, float]:
    """The same numbers from the log of a published script. Raises BenchError."""
    text = runlog.read_text(path)
    run, found = runlog.parse(text), benchlib.read_log(text, int(SIZES["TRAIN_BATCH_TOKENS"]))
    if "pre_quant" not in run.bpb or not run.artifact_bytes:
        raise BenchError(f"{name}: {path} has no line with bits per byte before quantisation, or none with the bytes")
    found |= {"pre_quant_bpb": run.bpb["pre_quant"], "bytes": run.artifact_bytes}
    return {key: found.get(key) for key in COLUMNS}


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown: a system a line."""
    middle = {name: {key: statistics.median(run[key] for run in runs) if runs[0][key] is not None else None
                     for key in COLUMNS} for name, runs in rows.items()}
    first = next(iter(middle.values()))["pre_quant_bpb"]
    lines = ["| system | seeds | bpb before quantisation | ratio | after | after TTT | with counts | bytes | training, tokens/s |",
             "|---|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, row in middle.items():
        cells = [format(row[key], form) if row[key] is not None else "-" for key, form in COLUMNS.items()]
        cells.insert(1, f"{row['pre_quant_bpb'] / first:.4f}")
        lines.append(f"| {name} | {len(rows[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def build_parser() -> Parser:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--quality", action="store_true", help="this bench")
    benchlib.add_files(parser)
    add("--seeds", default="7", metavar="N,N", help="a run each (default: %(default)s)")
    add("--log", action="append", default=[], metavar="NAME=FILE", help="a published script's log; again for a seed")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every system")
    add("systems", nargs="+", metavar="PROFILE[:KEY=VALUE,...]", help="what to train")
    return parser


@one_line_errors
def main(argv: list[str]) -> int:
    args = build_parser().parse_intermixed_args(argv)
    pairs = [text.split("=", 1) for text in (*args.set, *args.log)]
    if any(len(pair) < 2 for pair in pairs) or not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        raise BenchError("--set takes KEY=VALUE, --log NAME=FILE, --seeds numbers with commas between them")
    given, rows = dict(pairs[:len(args.set)]), {}
    environs = {system: settings_of(system, given) for system in args.systems}
    with tempfile.TemporaryDirectory() as scratch:
        data, tokenizer = benchlib.prepare_data(args, Path(scratch))
        where = {"DATA_PATH": str(data.resolve()), "TOKENIZER_PATH": str(tokenizer.resolve())}
        vocab = re.search(r"_(?:sp)?(\d+)(?=_|$)", data.name)
        where |= {"VOCAB_SIZE": vocab[1]} if vocab else {}
        for seed in map(int, args.seeds.split(",")):
            for system, environ in environs.items():
                rows.setdefault(system, []).append(run(system, {**environ, **where}, seed))
                print(f"{system}, seed {seed}: {json.dumps(rows[system][-1])}", file=sys.stderr, flush=True)
    for name, path in pairs[len(args.set):]:
        rows.setdefault(name, []).append(read_published(name, Path(path)))
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
