"""What a configuration will take, from its settings alone: parameters, artifact bytes, FLOPs, memory.

Tools put the repository's root on sys.path before they import this.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import profiles
import train_gpt as tg

LIMIT = 16_000_000        # bytes of code and artifact, decimal: the competition's
CODE_BYTES = 50_000       # of the built script, rounded up (records/built_code): README's table does not follow it
GPUS, GPU_FLOPS = 8, 989e12   # the competition's machine; dense bf16 of an H100 SXM
MFU = 0.24                # PR 1092: 93.97 ms per step of 786,432 tokens on 8xH100, by the FLOPs counted here
TRAIN_SECONDS = 600.0     # the competition's

# Bits per code after the range coder over the order-0 entropy of Gaussian weights rounded by the same rule: the mean
# of the two trained models of records/estimates, which lie within ERROR of it.
BITS_OVER_GAUSSIAN = {"attn": 0.985, "mlp": 0.953, "embed": 0.925, "ngram": 0.99, "value": 1.008, "head": 0.925}
CODEC_OVER_RANGE = {"auto": 1.0, "range": 1.0, "zstd": 1.025, "lzma": 1.037}  # records/packing
FLOAT_BITS = {"half": 13.4, "float": 26.9, "scales": 10.9}  # after LZMA
WATERFILL_BITS, WATERFILL_SLOPE = 3.27, -0.47  # per code at 0.015 nats, and by each doubling of them (records/export)
STEP_BITS = 5.0           # per row and column of water-filling
HEADER_BYTES = 800
ERROR = 0.05


def parameters(cfg: tg.Hyperparameters) -> dict[str, int]:
    """Number of parameters by family (train_gpt.FAMILIES); "mtp" is trained but not exported."""
    shapes, counts = tg.parameter_shapes(cfg), {}
    for name, family in tg.route(cfg, shapes).items():
        counts[family.name] = counts.get(family.name, 0) + math.prod(shapes[name])
    return counts


@functools.cache
def gaussian_bits(columns: int, spec: tg.QuantSpec, pruned: float) -> float:
    """Order-0 entropy in bits of the codes of Gaussian weights in rows of `columns`. Trained weights come close:
    PR 1394 (36 M weights, 12.85 standard deviations, brotli) has 1.01 times as many."""
    weights = torch.from_numpy(np.random.RandomState(0).standard_normal((max(2 ** 18 // columns, 64), columns))).float()
    if pruned:
        weights[weights.abs() < weights.abs().flatten().kthvalue(max(int(pruned * weights.numel()), 1)).values] = 0.0
    return 8 * tg.order0_bytes(tg.quantise(weights, spec)[0].numpy()) / weights.numel()


class Stream(NamedTuple):
    """Part of an artifact: so many values, and the bytes they are expected to take."""

    name: str
    values: int
    bytes: float


def streams(cfg: tg.Hyperparameters) -> list[Stream]:
    """The streams of the artifact, as train_gpt.py packs them: codes by family, their scales, floats, the header."""
    shapes = tg.parameter_shapes(cfg)
    specs, values, bits = tg.quant_specs(cfg, shapes), {}, {}

    def add(stream: str, count: int, each: float) -> None:
        values[stream] = values.get(stream, 0) + count
        bits[stream] = bits.get(stream, 0.0) + count * each
    for name, family in tg.route(cfg, shapes).items():
        shape, count = shapes[name], math.prod(shapes[name])
        if not family.exported or not count:
            continue
        if name in specs and cfg.clip_rule == "waterfill":  # a rough guess; SIZE_FIT makes it what the limit says
            each = WATERFILL_BITS + WATERFILL_SLOPE * math.log2(cfg.waterfill_nats / 0.015)
            add(family.name, count, max(each, 0.3) * CODEC_OVER_RANGE[cfg.compress])
            columns = 0 if name == "kv_bank" else count // shape[-2]  # keys and values have those of the queries
            add("steps", count // shape[-1] + columns, STEP_BITS)
        elif name in specs:
            factor = BITS_OVER_GAUSSIAN[family.name] * CODEC_OVER_RANGE[cfg.compress]
            add(family.name, count, factor * gaussian_bits(shape[-1], specs[name], cfg.prune_frac))
            add("scales", count // shape[-1], FLOAT_BITS["scales"])
        else:
            kind = "float" if tg.named_in(cfg.int8_keep_float_fp32_name_patterns, name) else "half"
            add(kind, count, FLOAT_BITS[kind])
    return [*(Stream(name, values[name], bits[name] / 8) for name in sorted(values)), Stream("header", 0, HEADER_BYTES)]


def artifact_bytes(cfg: tg.Hyperparameters) -> int:
    """Bytes of the artifact without the code, before SIZE_FIT."""
    return round(sum(stream.bytes for stream in streams(cfg)))


def fitted(cfg: tg.Hyperparameters, code_bytes: int = CODE_BYTES) -> tg.Hyperparameters:
    """The settings with the nats that SIZE_FIT will give water-filling's steps, so that they fill the limit."""
    if not (cfg.size_fit and cfg.clip_rule == "waterfill"):
        return cfg
    shapes = tg.parameter_shapes(cfg)
    coded = sum(math.prod(shapes[name]) for name in tg.quant_specs(cfg, shapes))
    spare = min(cfg.artifact_limit_bytes, LIMIT) - code_bytes - artifact_bytes(cfg)
    doublings = 8 * spare / coded / CODEC_OVER_RANGE[cfg.compress] / WATERFILL_SLOPE
    return dataclasses.replace(cfg, waterfill_nats=cfg.waterfill_nats * 2 ** doublings)


def fits(cfg: tg.Hyperparameters, code_bytes: int = CODE_BYTES) -> str:
    """Whether code and artifact stay below the competition's limit, or a lower one of the configuration: "yes", "no",
    "SIZE_FIT" if that will make them, or "perhaps" if the estimate's error decides."""
    artifact, room = artifact_bytes(cfg), min(cfg.artifact_limit_bytes, LIMIT) - code_bytes
    if artifact * (1 + ERROR) <= room:
        return "yes"
    if cfg.size_fit and cfg.artifact_limit_bytes <= LIMIT:
        return "SIZE_FIT"
    return "no" if artifact * (1 - ERROR) > room else "perhaps"


def table_of_systems(markdown: bool = False) -> str:
    """What each profile is, what was published of it, what its artifact is expected to take, and the largest difference
    of its arithmetic from the published script's own numbers (records/parity)."""
    held = json.loads((Path(tg.__file__).parent / "records/parity/held.json").read_text())
    rows = [("profile", "what it is", "published bpb", "bytes", "estimate of the artifact", "fits",
             "arithmetic held to")]
    for name in profiles.names():
        profile = profiles.load(name)
        cfg, told = fitted(profiles.settings(profile)), profile.published
        bpb = told.bpb + ", not valid" * (told.valid is False and bool(told.bpb))
        size = "-" if told.bytes is None else f"{told.bytes:,}"
        rows.append((f"`{name}`" if markdown else name, profile.summary, bpb or "-", size,
                     f"{artifact_bytes(cfg) / 1e6:.2f} MB", fits(cfg), held.get(name, "-")))
    if markdown:
        return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]])
    order = (0, 2, 3, 4, 5, 6, 1)  # the long column last
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(row[column].ljust(widths[column]) for column in order).rstrip() for row in rows)


def passes(cfg: tg.Hyperparameters) -> float:
    """How often a layer is applied, on average over the layers and the training."""
    plain, looped = (len(cfg.visits(on)) / cfg.num_layers for on in (False, True))
    return plain + (looped - plain) * (1 - cfg.enable_looping_at)


def flops_per_token(cfg: tg.Hyperparameters) -> tuple[float, float]:
    """FLOPs of training per token, (matrices, attention), forward and backward:

        6 N + 12 layers model_dim keys

    N: weights that are multiplied with - banks, as often as a loop applies them, projections, output layer (a tied
    table counts once) and MTP heads, but no table that is looked up. keys: how many a token sees on average, half a sequence, or less with a window.
    Rounding, norms, hashing and the optimiser are not counted. (PaLM's formula, with the causal half of attention.)
    """
    counts = parameters(cfg)
    multiplied = passes(cfg) * (counts["attn"] + counts["mlp"])
    multiplied += sum(counts.get(name, 0) for name in ("proj", "head", "mtp"))
    multiplied += counts["embed"] if cfg.tie_embeddings else 0
    length, window = cfg.train_seq_len, cfg.attention_window
    seen = min(window + 1, length) if window else length
    keys = (seen * (seen + 1) / 2 + (length - seen) * seen) / length
    return 6.0 * multiplied, 12.0 * passes(cfg) * cfg.num_layers * cfg.model_dim * keys


def step_seconds(cfg: tg.Hyperparameters, mfu: float = MFU, gpus: int = GPUS, flops: float = GPU_FLOPS) -> float:
    """Seconds per training step where `mfu` of the machine's FLOPs count (model FLOPs utilisation)."""
    return sum(flops_per_token(cfg)) * cfg.train_batch_tokens / (mfu * gpus * flops)


class KeepsInputs(torch.autograd.Function):
    """Attention as far as memory goes: like FlashAttention it keeps its inputs and output for the backward pass."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v, out := torch.empty_like(q))
        return out


def activation_bytes_per_token(cfg: tg.Hyperparameters) -> float:
    """Bytes that an eager bf16 forward pass keeps for the backward pass. A compiled graph keeps less: published runs of
    the kind of PR 1092 took 20.6 GiB in all, about 0.8 of the estimate."""
    def kept(tokens: int) -> int:
        storages = {}

        def note(tensor):
            storages[id(tensor.untyped_storage())] = tensor.untyped_storage()
            return tensor
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model, ids = tg.GPT(cfg, lambda q, k, v, *_, **__: KeepsInputs.apply(q, k, v), torch.bfloat16), \
                torch.zeros(1, tokens, dtype=torch.int64)
            model.loss(ids, ids)
        return sum(storage.nbytes() for storage in storages.values())
    return (kept(512) - kept(256)) / 256


def memory_bytes(cfg: tg.Hyperparameters, gpus: int = GPUS) -> dict[str, float]:
    """Bytes on each rank while training on CUDA."""
    counts = parameters(cfg)
    banks = counts["attn"] + counts["mlp"]
    rest = sum(counts.values()) - banks
    snapshots = cfg.lawa_k if cfg.lawa_enabled else int(cfg.swa_enabled)
    cuda = types.SimpleNamespace(on_cuda=True)
    forward = min(tg.Runtime.forward_tokens(cuda, cfg), cfg.train_batch_tokens / gpus)
    by_muon = cfg.matrix_optimizer == "muon"  # one moment, of a rank's share
    return {"weights in fp32 and bf16": 6.0 * (banks + rest),
            "gradients": 4.0 * (banks + rest) + (4.0 * banks * (1 + 1 / gpus) if by_muon and gpus > 1 else 0.0),
            "optimiser": (4.0 * banks / gpus if by_muon else 8.0 * banks) + 8.0 * rest,
            "averages": 4.0 * (banks + rest) * (cfg.ema_enabled + snapshots),
            "bigram counts": 4.0 * cfg.vocab_size ** 2 * (cfg.complement_alpha > 0),
            "activations": activation_bytes_per_token(cfg) * forward}
