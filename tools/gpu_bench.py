"""Our script and a published one on this machine's GPU.

    python tools/bench.py --gpu --peer PR_1092.py                            # the real model, embedded text
    python tools/bench.py --gpu --peer PR_1092.py --data FOLDER --tokenizer MODEL --repeat 3 --profile
    python tools/bench.py --gpu --peer PR_1092.py --attention fa3,cudnn,flash
    python tools/bench.py --gpu --profile                                    # the profile of ours alone
    python tools/bench.py --gpu --device cpu --peer PR_1092.py --steps 6     # try the bench out: tiny, on the CPU

Both programs run unmodified under this Python, each run a process of its own with fresh compiler caches, with the
same settings, data and seeds, in alternating order. One GPU takes a step as one of eight does, eight times over:
786,432 tokens in 8 micro-batches of 98,304, and the whole of an optimiser step that eight share. All numbers come
from the programs' own log lines:

    training      median over steps; the first ones and the compilation are left out
    evaluation    every program scores the validation slice, and once more, untrained, a quarter of it: the speed is
                  the difference in tokens over the difference in time, so that compilation cancels out
    MFU           tokens/s * FLOPs of a token (tools/estimate.py: 6 N + 12 layers dim keys) over the speed of a square
                  matmul measured at the start. Muon's own products are not counted. For the peer the same number is
                  taken: it holds for a peer that trains the same model
    memory        what PyTorch allocated at most while training (on a CPU: what was resident)

Ratios are ours / peer in tokens/s, pair by pair, for the first back end of --attention; by default that is the one
the peer takes (fa3 where the package is there, flash otherwise), and then whatever `auto` finds best.
"""
from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import benchlib
from benchlib import LABELS, BenchError
from shell import Parser, one_line_errors

# fresh weights may not fit the budget, and a clock would measure while it is measured
SHARED = benchlib.SETTINGS | dict(LATE_QAT_THRESHOLD=0, CHECKPOINT_EVERY=0, ARTIFACT_LIMIT_BYTES=100_000_000,
                                  EVAL_MAX_SECONDS=0)
SETTINGS = {
    "cuda": SHARED | dict(
        NUM_LAYERS=11, MODEL_DIM=512, NUM_HEADS=8, NUM_KV_HEADS=4, XSA_LAST_N=11, VE_LAYERS="9,10", TRAIN_SEQ_LEN=2048,
        EVAL_SEQ_LEN=2048, TRAIN_BATCH_TOKENS=786_432, MICRO_BATCH_TOKENS=98_304, VAL_BATCH_SIZE=524_288,
        WARMUP_STEPS=4, DEVICE="cuda", DTYPE="bf16", COMPILE="1"),
    "cpu": SHARED | dict(NUM_LAYERS=2, MODEL_DIM=64, VE_LAYERS="1", TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, EVAL_STRIDE=16,
                         TRAIN_BATCH_TOKENS=2048, TTT_CHUNK_TOKENS=512)}
PROBE_SIZES = {"cuda": 8192, "cpu": 512}  # of the square matmul
TOP_KERNELS = 10
ROWS = ("step_ms", "train_tokens_per_s", "mfu", "peak_mib", "sliding_tokens_per_s", "ttt_tokens_per_s", "sliding_s",
        "ttt_s", "roundtrip_bpb", "sliding_bpb", "ttt_bpb", "total_bytes")  # of the table


# ---- runs --------------------------------------------------------------------------------------------------
def combine(whole: dict, quarter: dict, about: dict) -> dict:
    """The numbers of a side: those of the whole run, evaluation speeds from what it did beyond the short one, MFU.
    about: what `probe` found."""
    found = dict(whole)
    for key in ("sliding", "ttt"):
        if {f"{key}_s", "val_tokens"} <= whole.keys() & quarter.keys():
            seconds, tokens = (whole[k] - quarter[k] for k in (f"{key}_s", "val_tokens"))
            if seconds > 0 and tokens > 0:
                found[f"{key}_tokens_per_s"] = tokens / seconds
    if "train_tokens_per_s" in found:
        found["mfu"] = found["train_tokens_per_s"] * about["flops_per_token"] / (about["ceiling_tflops"] * 1e12)
    return found


class Bench:
    """The sides, where their data lies, and what has been measured; `result` is complete after every run."""

    def __init__(self, args: argparse.Namespace, settings: dict, about: dict, scratch: Path):
        self.args, self.settings, self.about, self.scratch = args, settings, about, scratch
        self.logs = args.out.parent / f"{args.out.stem}_logs"
        self.runs = []  # {"pair", "side", "seed", numbers...}
        ours = benchlib.program(args.ours)
        self.sides = {f"ours {name}": (ours, {"ATTENTION": name}) for name in about["attention"]}
        self.sides["peer"] = benchlib.program(args.peer, on_cpu=args.device == "cpu"), {}

    def prepare(self) -> None:
        """Two data sets with the same training shards: the slice and the first quarter of it, laid out as every
        published script looks for them (DATA_PATH, or DATA_DIR with folders named after the vocabulary)."""
        data, tokenizer = benchlib.prepare_data(self.args, self.scratch / "made")
        vocab, self.paths = self.settings["VOCAB_SIZE"], {}
        for part, tokens in (("whole", self.args.val_tokens), ("quarter", self.args.val_tokens // 4)):
            home = self.scratch / part
            folder = home / "datasets" / f"fineweb10B_sp{vocab}"
            model = home / "tokenizers" / f"fineweb_{vocab}_bpe.model"
            for path in (folder, model):
                path.parent.mkdir(parents=True, exist_ok=True)
            benchlib.cut_validation(data, folder, tokens, int(self.settings["EVAL_SEQ_LEN"]))
            model.symlink_to(tokenizer.resolve())
            self.paths[part] = {"DATA_DIR": f"{home}/", "DATA_PATH": str(folder), "TOKENIZER_PATH": str(model)}

    def program(self, side: str, part: str, seed: int, pair: int) -> dict[str, float]:
        """One run: on the whole slice with training, on the quarter without. Raises BenchError."""
        command, own = self.sides[side]
        settings = self.settings | self.paths[part] | own | {"SEED": seed}
        if part == "quarter":
            settings |= {"ITERATIONS": 0, "WARMUP_STEPS": 0}
        with tempfile.TemporaryDirectory(dir=self.scratch) as caches:
            env = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor",
                   "TRITON_CACHE_DIR": f"{caches}/triton", **{key: str(value) for key, value in settings.items()}}
            if self.args.device == "cpu":
                env |= {"OMP_NUM_THREADS": str(self.args.threads), "OMP_WAIT_POLICY": "passive"}
            began = time.perf_counter()
            code, text, _ = benchlib.run_program(command, env)
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{pair}-{side.replace(' ', '-')}-{part}.txt"
        log.write_text(text, encoding="utf-8")
        print(f"{log.stem}: {time.perf_counter() - began:.0f} s, code {code}", file=sys.stderr, flush=True)
        if code:
            raise BenchError(f"ended with code {code}: {benchlib.last_line(text)} (see {log})")
        return benchlib.read_log(text, int(self.settings["TRAIN_BATCH_TOKENS"]))

    def measure(self) -> dict:
        """All runs; a side that fails is reported and left out, so that the others' numbers are kept."""
        self.prepare()
        for pair in range(self.args.repeat):
            seed, order = int(self.settings.get("SEED", 1337)) + pair, list(self.sides)
            for side in order[::-1] if pair % 2 else order:
                run = {"pair": pair, "side": side, "seed": seed}
                try:
                    parts = [self.program(side, part, seed, pair) for part in ("whole", "quarter")]
                    run |= combine(*parts, self.about)
                except BenchError as error:
                    run["error"] = str(error)
                    print(f"{side}: {error}", file=sys.stderr, flush=True)
                self.runs.append(run)
                result = summarise(self.runs, list(self.sides)) | self.about | {
                    "peer": self.args.peer.name, "settings": self.settings, "runs": self.runs}
                write_json(self.args.out, result)
        return result


def summarise(runs: list[dict], sides: list[str]) -> dict:
    """Medians of each side, paired ratios in tokens/s; None where a number is missing. The last side is the peer."""
    numbers = {side: {key: middle([run[key] for run in runs if run["side"] == side and key in run]) for key in ROWS}
               for side in sides}
    *ours, peer = sides

    def ratio(side: str, what: str):
        key = f"{what}_tokens_per_s"
        by_pair = {(run["pair"], run["side"]): run[key] for run in runs if key in run}
        return middle([by_pair[i, side] / by_pair[i, peer] for i, name in by_pair
                       if name == side and (i, peer) in by_pair])

    ratios = {side: {f"{what}_ratio": ratio(side, what) for what in ("train", "sliding", "ttt")} for side in ours}
    best = {key: max((row[key] for row in ratios.values() if row[key] is not None), default=None)
            for key in ratios[ours[0]]}
    return {**ratios[ours[0]], "best": best, "ratios": ratios, "sides": numbers}


def middle(values: list[float]) -> float | None:
    return statistics.median(values) if values else None


def table(result: dict) -> str:
    """The result as a Markdown table, ratios beside each of our columns."""
    show = lambda value, form: "-" if value is None else f"{value:{form}}"
    *ours, peer = result["sides"]
    heads = [head for side in ours for head in (side, "/ peer")]
    lines = ["| | " + " | ".join([*heads, Path(result["peer"]).stem]) + " |", "|---|" + "---:|" * (len(heads) + 1)]
    for key in ROWS:
        (label, form), cells, theirs = LABELS[key], [], result["sides"][peer][key]
        for side in ours:
            value = result["sides"][side][key]
            paired = result["ratios"][side].get(f"{key.removesuffix('_tokens_per_s')}_ratio")
            plain = value / theirs if value is not None and theirs else None
            cells += [show(value, form), show(plain if paired is None else paired, ".3f")]
        lines.append(f"| {label} | " + " | ".join([*cells, show(theirs, form)]) + " |")
    about = (f"{result['device']}, torch {result['torch']}; ceiling {result['ceiling_tflops']:,.2f} TFLOP/s "
             f"({result['ceiling_of']}); {result['flops_per_token']:,.0f} FLOPs a training token")
    failed = [f"{run['side']}, pair {run['pair']}: {run['error']}" for run in result["runs"] if "error" in run]
    return "\n".join([about, "", *lines, *failed])


def write_json(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


# ---- in a child: what needs torch --------------------------------------------------------------------------
def probe(device: str, settings: dict) -> dict:
    """The device's name, its matmul speed, the back ends to compare, the work of a token. {} without such a device."""
    sys.path.insert(0, str(benchlib.ROOT))
    import estimate
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return {}
    dtype, size = {"cuda": torch.bfloat16, "cpu": torch.float32}[device], PROBE_SIZES[device]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    seconds = []
    for _ in range(30):
        synchronize()
        began = time.perf_counter()
        left @ right
        synchronize()
        seconds.append(time.perf_counter() - began)
    fa3 = importlib.util.find_spec("flash_attn_interface") is not None
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "python": sys.version.split()[0],
            "flops_per_token": sum(estimate.flops_per_token(estimate.tg.Hyperparameters.from_env(settings))),
            "attention": ["flash"] if device == "cpu" else ["fa3"] if fa3 else ["flash", "auto"],
            "ceiling_tflops": 2 * size ** 3 / statistics.median(seconds[5:]) / 1e12,
            "ceiling_of": f"{str(dtype).removeprefix('torch.')} matmul of {size} x {size}, median of 25"}


def profile_step(script: str, environ: dict) -> dict:
    """Where the time of one training step goes: {"step_ms", "kernels": [{"name", "ms", "share", "calls"}]}.

    On a GPU the kernels on the device, on a CPU the operators by their own time.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    spec = importlib.util.spec_from_file_location("profiled", script)
    tg = sys.modules["profiled"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tg)
    cfg = tg.Hyperparameters.from_env(environ)
    rt = tg.Runtime.open(cfg)
    torch.manual_seed(cfg.seed)
    data = tg.TrainData.open(cfg, rt)
    model = tg.GPT(cfg, rt.attend, rt.dtype, kernels=rt.kernels).to(rt.device)
    state = tg.TrainState.initial(model, cfg, rt)
    step_fn = functools.partial(tg.train_step, state, data, tg.plan_step(cfg, 0, 0.0, 0.0), rt.compiled(model.loss))
    on_gpu = rt.device.type == "cuda"
    for _ in range(3):
        step_fn()
    rt.synchronize()
    began = time.perf_counter()
    step_fn()
    rt.synchronize()
    seconds = time.perf_counter() - began
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu) as record:
        step_fn()
        rt.synchronize()
    rt.close()
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    rows = [(event.key, (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000, event.count)
            for event in record.key_averages()
            if event.device_type == wanted and not getattr(event, "is_user_annotation", False)]
    total = sum(ms for _, ms, _ in rows) or 1.0
    rows.sort(key=lambda row: -row[1])
    return {"step_ms": 1000 * seconds, "busy_ms": total,
            "kernels": [{"name": name, "ms": ms, "share": ms / total, "calls": calls} for name, ms, calls in rows]}


def profile_table(found: dict) -> str:
    """The largest kernels with their share of all kernels' time, as a Markdown table."""
    lines = [f"one training step: {found['step_ms']:,.1f} ms, kernels {found['busy_ms']:,.1f} ms in all", "",
             "| kernel | ms | share | calls |", "|---|---:|---:|---:|"]
    lines += [f"| `{row['name'][:90]}` | {row['ms']:,.2f} | {row['share']:.1%} | {row['calls']} |"
              for row in found["kernels"][:TOP_KERNELS]]
    return "\n".join(lines)


def in_child(what: str, *arguments: str, env: dict | None = None) -> dict:
    """A function of this file in a process of its own, so that no GPU memory stays taken. Raises BenchError."""
    command = [sys.executable, str(Path(__file__).resolve()), what, *arguments]
    code, text, _ = benchlib.run_program(command, {**os.environ, **(env or {})})
    if code:
        raise BenchError(f"{what} ended with code {code}: {benchlib.last_line(text)}")
    return json.loads(benchlib.last_line(text))


# ---- command line ------------------------------------------------------------------------------------------
def build_parser() -> Parser:
    parser = benchlib.build_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a tiny model, to try the bench out")
    add("--attention", metavar="NAMES", help="back ends of ours to measure, with commas; the first gives the ratios")
    add("--profile", action="store_true", help=f"also the {TOP_KERNELS} largest kernels of one training step of ours")
    parser.set_defaults(repeat=1, val_tokens=1_048_577, out=Path("bench.json"))
    return parser


def profile_ours(args: argparse.Namespace, settings: dict, scratch: Path) -> dict:
    data, tokenizer = benchlib.prepare_data(args, scratch / "for_profile")
    env = settings | {"DATA_PATH": data.resolve(), "TOKENIZER_PATH": tokenizer.resolve(), "ARTIFACT_DIR": scratch,
                      "ATTENTION": (args.attention or "auto").split(",")[0]}
    return in_child("--profile-step", str(args.ours.resolve()), env={key: str(value) for key, value in env.items()})


def measure(args: argparse.Namespace) -> int:
    compares = args.peer is not None or not args.profile
    if not compares:
        args.peer = args.ours  # it takes no part
    settings = benchlib.run_settings(args, SETTINGS[args.device])
    result = in_child("--probe", args.device, json.dumps({key: str(value) for key, value in settings.items()}))
    if not result:
        raise BenchError("--gpu needs a CUDA device, and this Python's PyTorch sees none "
                         "(--device cpu tries the bench out on a tiny model)")
    if args.attention:
        result["attention"] = args.attention.split(",")
    with tempfile.TemporaryDirectory() as scratch:
        if compares:
            result = Bench(args, settings, result, Path(scratch)).measure()
        if args.profile:
            result["profile"] = profile_ours(args, settings, Path(scratch))
            write_json(args.out, result)
            print(profile_table(result["profile"]), end="\n\n")
    if compares:
        print(table(result))
    return 1 if any("error" in run for run in result.get("runs", ())) else 0


@one_line_errors
def main(argv: list[str]) -> int:
    """0: done; 1: done, but a run failed; 2: it could not be started."""
    if argv[:1] in (["--probe"], ["--profile-step"]):
        print(json.dumps(probe(argv[1], json.loads(argv[2])) if argv[0] == "--probe"
                         else profile_step(argv[1], dict(os.environ))))
        return 0
    return measure(build_parser().parse_intermixed_args(argv))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
