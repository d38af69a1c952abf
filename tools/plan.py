"""What a run will take, before eight GPUs are paid for: parameters, bytes, FLOPs, memory, time.

    bash run.sh plan pr1092
    bash run.sh plan pr1092 NUM_LAYERS=10 MLP_QUANT_BITS=5
    bash run.sh plan default --mfu 0.3 --gpus 1

All estimates come from the settings alone (tools/estimate.py has the formulas). The parameter count is exact. The
artifact is within 5 % on the models it was compared with (records/estimates). The step time follows from --mfu, the
share of the GPUs' peak that PR 1092's script reached; compilation, validation and evaluation come on top. A batch of a few
thousand tokens per GPU waits for kernels to be launched, not for FLOPs: it reaches far less (PR 1254: 0.02).
"""
from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import estimate  # noqa: E402
import profiles  # noqa: E402
import shell  # noqa: E402


def size_lines(cfg: tg.Hyperparameters) -> list[str]:
    """Parameters by family, the artifact by stream, and whether it fits."""
    counts, code = estimate.parameters(cfg), cfg.code_bytes or estimate.CODE_BYTES
    cfg = estimate.fitted(cfg, code)
    artifact, fits = estimate.artifact_bytes(cfg), estimate.fits(cfg, code)
    limit = min(cfg.artifact_limit_bytes, estimate.LIMIT)
    lines = [f"parameters      {sum(counts.values()):,}: " + ", ".join(f"{name} {n:,}" for name, n in counts.items()),
             f"artifact        {artifact:,} bytes (±{estimate.ERROR:.0%}) and {code:,} of code, "
             f"{(artifact + code) / limit:.1%} of {limit:,}: "
             + {"yes": "fits", "no": "does not fit", "perhaps": "may fit", "SIZE_FIT": "SIZE_FIT makes it fit"}[fits]]
    doublings = 8 * (artifact + code - limit) / (counts["attn"] + counts["mlp"])  # each saves about a bit per weight
    if doublings > 0:
        lines.append(f"                to fit, the steps of the banks have to be {2 ** doublings:.2f} times as wide"
                     + ("" if fits == "SIZE_FIT" else " (SIZE_FIT=1 sees to it), or parameters fewer"))
    if cfg.size_fit and cfg.clip_rule == "waterfill":
        lines.append(f"                SIZE_FIT fills the limit; rounding then costs about {cfg.waterfill_nats:.1g} nats")
    if cfg.artifact_limit_bytes > limit:
        lines.append(f"                ARTIFACT_LIMIT_BYTES={cfg.artifact_limit_bytes:,} lets it pass, the competition "
                     "does not")
    return lines + [f"  {name:<13} {values:>12,} values {8 * size / values:>6.2f} bits each {size:>12,.0f} bytes"
                    for name, values, size in estimate.streams(cfg) if values]


def time_lines(cfg: tg.Hyperparameters, args: argparse.Namespace, published: profiles.Published) -> list[str]:
    """Memory, FLOPs, step time, steps."""
    matrices, attention = estimate.flops_per_token(cfg)
    flops = (matrices + attention) * cfg.train_batch_tokens
    lines = [f"FLOPs per token {(matrices + attention) / 1e6:,.1f} million: matrices {matrices / 1e6:,.1f}, "
             f"attention {attention / 1e6:,.1f}; per step {flops / 1e12:,.2f}e12"]
    if cfg.device == "cpu":
        return lines + ["step time       not estimated for DEVICE=cpu"]
    memory = estimate.memory_bytes(cfg, args.gpus)
    lines.append(f"memory per rank at most {sum(memory.values()) / 1e9:.1f} GB: "
                 + ", ".join(f"{what} {size / 1e9:.2f}" for what, size in memory.items() if size))
    seconds = estimate.step_seconds(cfg, args.mfu, args.gpus, args.tflops * 1e12)
    told = ""
    if published.step_ms:
        mfu = estimate.step_seconds(cfg, 1.0, published.gpus) / published.step_ms * 1000
        told = f" (published: {published.step_ms:g} ms on {published.gpus}xH100, MFU {mfu:.3f})"
    limit = cfg.train_seconds or estimate.TRAIN_SECONDS
    steps = min(int(limit / seconds), cfg.iterations)
    tokens = steps * cfg.train_batch_tokens
    return lines + [
        f"step time       {1000 * seconds:,.2f} ms at MFU {args.mfu:g} of {args.gpus} x {args.tflops:g} TFLOP/s{told}",
        f"steps           {steps:,} in {min(steps * seconds, limit):,.0f} s"
        + (", ITERATIONS reached" if steps == cfg.iterations else ""),
        f"tokens          {tokens:,} read, {tokens / sum(estimate.parameters(cfg).values()):,.0f} per parameter; "
        + data_line(cfg, tokens)]


def data_line(cfg: tg.Hyperparameters, tokens: int) -> str:
    try:
        there = len(tg.TokenStream(cfg.train_files, cfg.vocab_size))
    except tg.UserError:
        return f"{cfg.data_path} holds none yet"
    return f"{cfg.data_path} holds {there:,}: {tokens / there:,.2f} passes"


def positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value
    parse.__name__ = kind.__name__
    return parse


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    parser.add_argument("profile", help=", ".join(profiles.names()))
    parser.add_argument("--mfu", type=positive(float), default=estimate.MFU,
                        help="model FLOPs utilisation (default: %(default)s, PR 1092's)")
    parser.add_argument("--gpus", type=positive(int), default=estimate.GPUS, help="default: %(default)s")
    parser.add_argument("--tflops", type=positive(float), default=estimate.GPU_FLOPS / 1e12,
                        help="peak of one GPU (default: %(default)g, an H100's in dense bf16)")
    args, given = parser.split(argv)
    profile = profiles.load(args.profile)
    cfg = profiles.settings(profile, {**os.environ, **given})
    print(f"{profile.name}: {profile.summary}")
    print("\n".join(size_lines(cfg) + time_lines(cfg, args, profile.published)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
