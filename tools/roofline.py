#!/usr/bin/env python3
"""What a training step must compute and move at least, by operation, and how long an H100 takes for it: a roofline.

usage: python tools/roofline.py [KEY=VALUE ...]        (the table of records/gpu_not_run/roofline.md)

Counted from the code, forward and backward, for one GPU's share of the batch in bf16. An operation reads its inputs
from memory and writes its outputs; what stands between two products or attention is fused as torch.compile fuses it at
best, in which sums over tokens are kernels of their own. An own kernel saves these, or what it keeps from memory.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import estimate
import shell
import train_gpt as tg

BYTES_PER_S, LINK_BYTES_PER_S = 3.35e12, 450e9  # HBM3 of an H100 SXM; NVLink in one direction


class Row(NamedTuple):
    """An operation of a step on one GPU: floating-point operations, bytes as it is, bytes with a kernel of our own."""

    name: str
    flops: float
    bytes: float
    fused: float
    link: float = 0.0  # bytes each GPU sends

    def ms(self, fused: bool = False) -> float:
        moved = self.fused if fused else self.bytes
        return 1e3 * max(self.flops / estimate.GPU_FLOPS, moved / BYTES_PER_S, self.link / LINK_BYTES_PER_S)


def newton_schulz(cfg: tg.Hyperparameters, gpus: int) -> Row:
    """Muon's products on one GPU: x x^T, its square, and that times x, for each step."""
    flops = moved = 0.0
    for name, shape in tg.parameter_shapes(cfg).items():
        if name.endswith("_bank"):
            n, (short, long) = -(-shape[0] // gpus), sorted(shape[1:])
            flops += cfg.muon_backend_steps * n * (4 * short ** 2 * long + 2 * short ** 3)
            moved += cfg.muon_backend_steps * n * 2 * (4 * short * long + 4 * short ** 2)
    return Row("Newton-Schulz of this GPU's slices", flops, moved, moved)


def rows(cfg: tg.Hyperparameters, gpus: int = estimate.GPUS) -> list[Row]:
    """The step of a configuration: its operations in the order of the forward pass, then those of the weights."""
    n, dim, mlp, kv = cfg.train_batch_tokens // gpus, cfg.model_dim, cfg.mlp_dim, cfg.num_kv_heads * cfg.head_dim
    visits = n * estimate.passes(cfg)
    deep, own, counts = visits * cfg.num_layers, visits * cfg.xsa_last_n, estimate.parameters(cfg)
    bank, weights = counts["attn"] + counts["mlp"], sum(counts.values())

    def product(name, tokens, *sizes, fused=()):
        """y = x w^T and both gradients: three products, each reads or writes x and y in bf16."""
        moved = lambda pairs: sum(6 * tokens * (into + out) for into, out in pairs)
        return Row(name, sum(6 * tokens * into * out for into, out in sizes), moved(sizes), moved(fused or sizes))

    values = lambda name, moved, fused: Row(name, 0, 2 * moved, 2 * fused)
    return [
        values("embeddings, hashed tables, smear gate", 12 * n * dim, 8 * n * dim),
        # forward 9: one kernel from MLP to attention, one from attention to MLP; backward 16, and 8 once more for the
        # sums over tokens that are the gradients of the learnt vectors
        values("norms, residual mix and scales", 33 * deep * dim, 25 * deep * dim),
        product("products of query, key, value, out", deep, (dim, dim), (dim, kv), (dim, kv), (dim, dim),
                fused=((dim, dim + 2 * kv), (dim, dim))),
        # forward 2, backward 3, and 2 for the gradient of the gain
        values("QK norm, rotation, gain", deep * (5 * (dim + kv) + 2 * dim), deep * 5 * (dim + kv)),
        values("attention", deep * 8 * (dim + kv), deep * 8 * (dim + kv))._replace(
            flops=n * estimate.flops_per_token(cfg)[1]),
        values("exclusive attention (XSA)", own * (5 * dim + 3 * kv), own * (5 * dim + 3 * kv)),
        product("products of the MLP", deep, (dim, mlp), (mlp, dim)),
        values("LeakyReLU²", 6 * deep * mlp, 2 * deep * mlp),  # KERNELS=triton: the products read or write 1 more
        product("product of the logits", n, (dim, cfg.vocab_size)),
        # logits read twice, gradient written in fp32, scattered into, read, written in bf16; triton: read, written
        values("soft cap and cross-entropy", 7 * n * cfg.vocab_size, 2 * n * cfg.vocab_size),
        Row("cast of weights and of their gradients", 0, weights * 12, weights * 12),
        Row("rounding of weights (QAT only)", 0, bank * 6, bank * 6),
        # not compiled: magnitudes and their top-k, then seven operations for each of five errors; own kernel: one pass
        Row("refresh_scales (QAT only)", 0, bank * (12 + 5 * 56), bank * 4),
        Row("clipping, momentum, update, EMA", 0, weights * (12 + 14 + 12), weights * (12 + 14)),
        newton_schulz(cfg, gpus),
        Row("reduce-scatter (fp32), all-gather (bf16)", 0, 0, 0, link=bank * (4 + 2) * (gpus - 1) / gpus),
    ]


def table(cfg: tg.Hyperparameters, gpus: int = estimate.GPUS) -> str:
    """The rows as Markdown, and their sum."""
    found = rows(cfg, gpus)
    total = sum(row.ms() for row in found)
    lines = ["| operation | GFLOP | GB | bound by | ms at least | share | own kernel saves ms |",
             "|---|---|---|---|---|---|---|"]
    for row in found:
        computes = row.flops / estimate.GPU_FLOPS > row.bytes / BYTES_PER_S
        bound = "link" if row.link else "FLOPs" if computes else "memory"
        lines.append(f"| {row.name} | {row.flops / 1e9:,.0f} | {(row.link or row.bytes) / 1e9:.2f} | {bound} | "
                     f"{row.ms():.2f} | {row.ms() / total:.1%} | {row.ms() - row.ms(fused=True):.2f} |")
    flops, moved, saved = (sum(part) for part in zip(*((r.flops, r.bytes, r.ms() - r.ms(fused=True)) for r in found)))
    return "\n".join([*lines, f"| all | {flops / 1e9:,.0f} | {moved / 1e9:.2f} | | {total:.2f} | | {saved:.2f} |"])


@shell.one_line_errors
def main(argv: list[str]) -> int:
    _, settings = shell.Parser(__doc__).split(argv)
    print(table(tg.Hyperparameters.from_env(settings)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
