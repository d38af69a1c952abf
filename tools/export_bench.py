"""What an export costs: bytes of the whole artifact against what rounding adds to the loss, rule by rule; or the packers.

    python tools/export_bench.py FLOAT_MODEL [KEY=VALUE...] [--tokens N] [--only TEXT] [--picture FILE.png]
    python tools/export_bench.py FLOAT_MODEL [KEY=VALUE...] --packers [--synthetic 27e6]

FLOAT_MODEL is a final_model.pt or a checkpoint (its EMA is taken); KEY=VALUE are the settings it was trained with. Every
rule rounds the same weights with the same Hessians and gradients, and our range coder writes them; artifacts are counted
without the script. Below the table: bytes at equal loss and nats at equal bytes, interpolated between a rule's rows.
--packers compares the packers on the codes of CLIP_RULE; --synthetic repeats the banks up to so many weights, for seconds.
"""
from __future__ import annotations

import contextlib
import copy
import lzma
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

# Name, settings, those that grow with the factor, factors. The first rule is what the others are held against.
PR_1855 = {"CLIP_RULE": "sdclip", "MATRIX_BITS": 6, "EMBED_BITS": 7, "BIGRAM_BITS": 7, "VE_BITS": 7}
RULES = (
    ("PR 1855, sigmas", PR_1855, {"ATTN_CLIP_SIGMAS": 13, "MLP_CLIP_SIGMAS": 11.5, "EMBED_CLIP_SIGMAS": 14},
     (1.0, 0.75, 0.55, 0.45)),
    ("percentile, banks widened", {"CLIP_RULE": "percentile"}, {"CLIP_WIDEN": 1},
     (8, 6, 4, 3, 2)),
    ("percentile, nearest", {"CLIP_RULE": "percentile", "GPTQ_ENABLED": 0},
     {"CLIP_WIDEN": 1}, (4, 2)),
    *((f"water-filling, a={a}, nats", {"CLIP_RULE": "waterfill", "WATERFILL_EXPONENT": a}, {"WATERFILL_NATS": 1},
       (0.06, 0.03, 0.015, 0.0075)) for a in (0.5, 0.75, 1.0)),
    ("water-filling, tuned, nats", {"CLIP_RULE": "waterfill", "TUNE_STEPS": 120}, {"WATERFILL_NATS": 1},
     (0.06, 0.03, 0.015, 0.0075)))
CODECS = {"zstd-22": "zstd", "lzma-9e": "lzma", "range": "range"}


def load(path: str, cfg: tg.Hyperparameters, rt: tg.Runtime) -> tg.GPT:
    """The float model: of a final_model.pt, or the EMA of a checkpoint. Raises UserError."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise tg.UserError(f"cannot read {path}: {error.strerror}") from None
    model = tg.GPT(cfg, rt.attend, rt.dtype)
    model.load_state_dict(state["model"] if "model" in state else state)
    if state.get("averager", {}).get("ema"):
        with torch.no_grad():
            for p, mean in zip(model.parameters(), state["averager"]["ema"]):
                p.copy_(mean)
    return model.to(rt.device).eval()


@torch.no_grad()
def loss_on(model: tg.GPT, ids: torch.Tensor, seq_len: int) -> float:
    inputs, targets = ids[:-1].view(-1, seq_len), ids[1:].view(-1, seq_len)
    parts = [model.nll(x, y).double().sum() for x, y in zip(inputs.split(16), targets.split(16))]
    return float(sum(parts)) / targets.numel()


@torch.no_grad()
def divergence_on(model: tg.GPT, wanted: tg.GPT, ids: torch.Tensor, seq_len: int) -> float:
    """From the wanted model, in nats per token: what is added to the loss, but for the chance of which tokens follow."""
    costs = [tg.rounding_cost(model, wanted, batch, batch, hard=0.0) * len(batch)  # no part of which are targets
             for batch in ids[:-1].view(-1, seq_len).split(16)]
    return float(sum(costs)) * seq_len / (len(ids) - 1)


@contextlib.contextmanager
def using_rounded_weights(model: tg.GPT, rounded: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """The model with rounded weights in place of its own."""
    params = dict(model.named_parameters())
    own = {name: params[name].detach().clone() for name in rounded}
    try:
        for name, (codes, scales) in rounded.items():
            params[name].data.copy_(tg.dequantise(codes, scales))
        yield
    finally:
        for name, weight in own.items():
            params[name].data.copy_(weight)


# ---- rules -------------------------------------------------------------------------------------------------
def measure(environ: dict, rt: tg.Runtime, model: tg.GPT, data: tg.TrainData, ids: torch.Tensor,
            only: str) -> dict[str, list[tuple[float, int]]]:
    """(nats added, bytes) of each rule whose name has `only` in it at its factors, printed as they come."""
    cfg = tg.Hyperparameters.from_env(environ | {"CLIP_RULE": "waterfill"})
    step = len(data.stream) // cfg.train_batch_tokens // 2  # calibration reads from the middle of the data
    hessians = tg.calibrate(cfg, rt, model, data, step, math.inf)
    factors = tg.loss_curvature(cfg, rt, model, data, step, hessians, math.inf)
    float_loss, weights = loss_on(model, ids, cfg.train_seq_len), sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, float loss {float_loss:.5f} nats on {len(ids) - 1:,} tokens\n"
          f"{'rule':<38} added nats  KL nats  artifact bytes  bits a weight  seconds")
    found: dict[str, list[tuple[float, int]]] = {}
    for name, fixed, growing, sizes in [rule for rule in RULES if only in rule[0]]:
        for size in sizes:
            changes = fixed | {key: size * value for key, value in growing.items()}
            changed = tg.Hyperparameters.from_env(environ | {key: str(value) for key, value in changes.items()})
            begun, tried = time.perf_counter(), copy.deepcopy(model)
            rounded = tg.round_model(changed, tried, hessians if changed.gptq_enabled else {},
                                     factors if changed.clip_rule == "waterfill" else None)
            if changed.tune_steps:
                rounded = tg.fine_tune(changed, rounded, rt, model, data, step + cfg.gptq_calibration_batches, math.inf)
            size_bytes = len(tg.pack(changed, tried, "0" * 64, rounded).blob)
            seconds = time.perf_counter() - begun
            with using_rounded_weights(tried, rounded):
                added = loss_on(tried, ids, cfg.train_seq_len) - float_loss
                kl = divergence_on(tried, model, ids, cfg.train_seq_len)
            found.setdefault(name, []).append((added, size_bytes))
            print(f"{f'{name} {size:g}':<38} {added:10.5f}  {kl:7.5f}  {size_bytes:14,}  "
                  f"{8 * size_bytes / weights:13.3f}  {seconds:7.1f}", flush=True)
    return found


def between(x: float, xs: list[float], ys: list[float]) -> float | None:
    """y at x on the line through the points, or None outside of them. `xs` in any order."""
    order = np.argsort(xs)
    inside = min(xs) <= x <= max(xs)
    return float(np.interp(x, np.array(xs)[order], np.array(ys)[order])) if inside else None


def compare(found: dict[str, list[tuple[float, int]]]) -> list[str]:
    """At the rows of the first rule: bytes at its loss and nats at its bytes, in the logarithm of the nats."""
    points = {name: [(math.log(nats), size) for nats, size in rows if nats > 0] for name, rows in found.items()}
    first, *others = points
    lines = [f"{'against ' + first:<38} added nats  bytes at equal loss  nats at equal bytes"]
    for name in others:
        logs, sizes = zip(*points[name])
        for log, size in points[first]:
            bytes_here, log_here = between(log, logs, sizes), between(size, sizes, logs)
            cells = [f"x{bytes_here / size:.3f}" if bytes_here else "-",
                     f"x{math.exp(log_here - log):.3f}" if log_here else "-"]
            lines.append(f"{name:<38} {math.exp(log):10.5f}  {cells[0]:>19}  {cells[1]:>19}")
    return lines


def draw(found: dict[str, list[tuple[float, int]]], path: str) -> None:
    """Bytes against nats, a line a rule. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise tg.UserError("--picture needs matplotlib: pip install matplotlib") from None
    axes = (figure := Figure(figsize=(7, 4.5), layout="constrained")).subplots()
    for name, rows in found.items():
        axes.plot([size / 1000 for _, size in rows], [nats for nats, _ in rows], marker="o", label=name)
    axes.set(xlabel="artifact, kB", ylabel="nats added by rounding", yscale="log")
    axes.grid(alpha=0.3), axes.legend()
    figure.savefig(path, dpi=120)


# ---- packers -----------------------------------------------------------------------------------------------
def code_streams(cfg: tg.Hyperparameters, model: tg.GPT) -> dict[str, tg.Parts]:
    """The code streams of a float model, rounded to the nearest by the rule of `cfg`."""
    stored = []
    for name, spec in tg.quant_specs(cfg, weights := dict(model.named_parameters())).items():
        codes, scales = tg.quantise(weights[name].detach(), spec)
        stored.append(tg.Stored(name, tg.route(cfg, [name])[name].name, spec.bits, codes.numpy(), scales.numpy()))
    return tg.streams_of(stored)


def grown(streams: dict[str, tg.Parts], weights: float) -> dict[str, tg.Parts]:
    """The banks repeated up to so many weights; rows and columns of each copy are shuffled to hide it from LZ."""
    banks = {name: parts for name, parts in streams.items() if name != "scales" and parts[0][0].ndim == 3}
    copies = max(round(weights / sum(array.size for parts in banks.values() for array, _ in parts)), 1)
    rng = np.random.default_rng(0)

    def copy(array: np.ndarray) -> np.ndarray:
        return array[:, rng.permutation(array.shape[1])][..., rng.permutation(array.shape[2])]
    return streams | {name: [(np.concatenate([copy(array) for _ in range(copies)]), bits) for array, bits in parts]
                      for name, parts in banks.items()}


def lzma6(parts: tg.Parts) -> bytes:
    """What PR 1092 does: an xz container, preset 6."""
    return lzma.compress(b"".join(tg.byte_planes(array).tobytes() for array, _ in parts), preset=6)


def show_packers(streams: dict[str, tg.Parts]) -> None:
    """Prints bytes of each packer for each stream, their sums and ratios, and seconds."""
    columns = ["lzma-6", *CODECS]
    print(f"{'stream':<8} {'values':>11} {'entropy':>11} " + " ".join(f"{c:>11}" for c in columns), flush=True)
    totals, seconds = np.zeros(2 + len(columns)), dict.fromkeys(columns, 0.0)
    for name, parts in streams.items():
        row = [sum(a.size for a, _ in parts), tg.order0_bytes(tg.joined(parts))]
        for column in columns:
            begun = time.process_time()
            codec = CODECS.get(column)
            packed = b"" if codec == "range" and not parts[0][1] else \
                tg.pack_stream(codec, parts) if codec else lzma6(parts)
            seconds[column] += time.process_time() - begun
            row.append(len(packed) or min(row[3:]))  # floats are not for the range coder
        print(f"{name:<8} " + " ".join(f"{int(v):>11,}" for v in row), flush=True)
        totals += row * np.array(name != "scales")
    print(f"{'codes':<8} " + " ".join(f"{int(v):>11,}" for v in totals))
    print(f"{'cpu s':<8} {'':>23} " + " ".join(f"{seconds[c]:>11.1f}" for c in columns))
    best = min(totals[3:5])
    print(f"range / best of zstd and LZMA: {totals[5] / best:.4f}   range / lzma-6: {totals[5] / totals[2]:.4f}   "
          f"range / order-0 entropy: {totals[5] / totals[1]:.4f}")


def time_packing(streams: dict[str, tg.Parts]) -> None:
    """Seconds of COMPRESS=range and of reading the result, on the cores this machine has free."""
    begun, cpu = time.perf_counter(), time.process_time()
    packed = tg.pack_streams("range", streams)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    for name, (codec, data) in packed.items():
        blank = [(np.zeros_like(array), bits) for array, bits in streams[name]]
        tg.unpack_stream(codec, data, blank)
        assert np.array_equal(tg.joined(blank), tg.joined(streams[name])), name
    print(f"COMPRESS=range takes {', '.join(f'{name} {codec}' for name, (codec, _) in packed.items())}: packed in "
          f"{middle - begun:.1f} s (cpu {cpu_middle - cpu:.1f} s), unpacked in {time.perf_counter() - middle:.1f} s "
          f"(cpu {time.process_time() - cpu_middle:.1f} s)", flush=True)


@one_line_errors
def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("model", metavar="FLOAT_MODEL")
    add("settings", nargs="*", metavar="KEY=VALUE")
    add("--tokens", type=int, default=131_072, help="validation tokens (default: %(default)s)")
    add("--only", default="", metavar="TEXT", help="only rules whose names have this in them")
    add("--picture", metavar="FILE", help="draw the table (needs matplotlib)")
    add("--packers", action="store_true", help="compare the packers instead")
    add("--synthetic", type=float, default=0, metavar="WEIGHTS", help="with --packers: repeat the banks to so many")
    args = parser.parse_intermixed_args(argv)
    if odd := [pair for pair in args.settings if "=" not in pair]:
        parser.error(f"{odd[0]} is not KEY=VALUE")
    own = dict(pair.split("=", 1) for pair in args.settings)
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "ARTIFACT_DIR": folder, "RUN_ID": "export_bench", **own}
        if not args.packers:
            environ |= {"GPTQ_ENABLED": "1", "LATE_QAT": "0", "SIZE_FIT": "0", "TUNE_STEPS": "0"}
        cfg = tg.Hyperparameters.from_env(environ)
        if args.packers and cfg.clip_rule == "waterfill":
            raise tg.UserError("--packers rounds to the nearest code: CLIP_RULE=waterfill needs Hessians; name another")
        rt = tg.Runtime.open(cfg)
        model = load(args.model, cfg, rt)
        if args.packers:
            streams = code_streams(cfg, model)
            streams = grown(streams, args.synthetic) if args.synthetic else streams
            time_packing(streams)
            show_packers(streams)
            return 0
        count = args.tokens // cfg.train_seq_len * cfg.train_seq_len
        ids = torch.from_numpy(tg.TokenStream(cfg.val_files, cfg.vocab_size).read(0, count + 1)).long().to(rt.device)
        found = measure(environ, rt, model, tg.TrainData.open(cfg, rt), ids, args.only)
    print("\n".join(compare(found)))
    if args.picture:
        draw(found, args.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
