"""Measure the packers on the codes of a trained model, or attack the reader of artifacts.

    python tools/pack_bench.py final_model.pt                        # or a checkpoint of a run (its EMA is taken)
    python tools/pack_bench.py final_model.pt --clip sdclip          # another clip rule than the default
    python tools/pack_bench.py final_model.pt --synthetic 27e6       # its banks repeated up to so many weights: seconds
    python tools/pack_bench.py --fuzz 10000                          # mutated artifacts of a tiny model
"""
from __future__ import annotations

import hashlib
import json
import lzma
import os
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

TINY = {"vocab_size": 64, "num_layers": 2, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 2,
        "ve_layers": "1", "ve_dim": 8, "bigram_vocab_size": 32, "bigram_dim": 8}


def lzma6(parts: tg.Parts) -> bytes:
    """What PR 1092 does: an xz container, preset 6."""
    return lzma.compress(b"".join(tg.byte_planes(array).tobytes() for array, _ in parts), preset=6)


CODECS = {"zstd-22": "zstd", "lzma-9e": "lzma", "range": "range"}


def load_streams(path: Path, cfg: tg.Hyperparameters) -> dict[str, tg.Parts]:
    """The code streams of a float model on disk, rounded as `cfg` says."""
    held = torch.load(path, map_location="cpu", weights_only=True)
    if "averager" in held and held["averager"]["ema"]:  # a checkpoint; the EMA is in the model's order
        held = dict(zip(held["model"], held["averager"]["ema"]))
    weights = held.get("model", held)
    stored = []
    for name, spec in tg.quant_specs(cfg, weights).items():
        codes, scales = tg.quantise(weights[name], spec)
        family = tg.route(cfg, [name])[name].name
        stored.append(tg.Stored(name, family, spec.bits, codes.numpy(), scales.numpy()))
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


def bench(streams: dict[str, tg.Parts]) -> None:
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


def time_packing(wanted: str, streams: dict[str, tg.Parts]) -> None:
    """Seconds of COMPRESS=`wanted` and of reading the result, on the cores this machine has free."""
    begun, cpu = time.perf_counter(), time.process_time()
    packed = tg.pack_streams(wanted, streams)
    middle, cpu_middle = time.perf_counter(), time.process_time()
    for name, (codec, data) in packed.items():
        blank = [(np.zeros_like(array), bits) for array, bits in streams[name]]
        tg.unpack_stream(codec, data, blank)
        assert np.array_equal(tg.joined(blank), tg.joined(streams[name])), name
    print(f"COMPRESS={wanted} takes {', '.join(f'{name} {codec}' for name, (codec, _) in packed.items())}: packed in "
          f"{middle - begun:.1f} s (cpu {cpu_middle - cpu:.1f} s), unpacked in {time.perf_counter() - middle:.1f} s "
          f"(cpu {time.process_time() - cpu_middle:.1f} s)", flush=True)


def tiny_artifact(compress: str = "auto", seed: int = 0, clip: str = "percentile") -> bytes:
    torch.manual_seed(seed)
    cfg = tg.Hyperparameters(**TINY, compress=compress, clip_rule=clip)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape)
        if clip != "waterfill":
            return tg.pack(cfg, model, "0" * 64).blob
        params = dict(model.named_parameters())
        factors = {name: tg.curvature(params[name].square(), None, []) for name in tg.quant_specs(cfg, params)}
        return tg.pack(cfg, model, "0" * 64, tg.round_model(cfg, model, {}, factors)).blob


NASTY = (None, True, -1, 0, 1, 2, 9, 2 ** 31, 2 ** 63, 10 ** 30, 0.5, float("nan"), float("inf"), "", "half", "range",
         "float", "16", "1_6", "qo_bank", "é\x00", [], [[]], {}, [-1, 5], [0], [2 ** 40, 2 ** 40], ["range", 5, 5])


def mutate_json(value, rng: random.Random):
    """The same tree with one node replaced, dropped, doubled or swapped."""
    if not isinstance(value, (list, dict)) or not value or rng.random() < 0.1:
        near = [value - 1, value + 1, -value, 2 * value, float(value)] if type(value) is int else []
        return rng.choice([*NASTY, *near])
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key, copy = rng.choice(keys), value.copy()
    act = rng.random()
    if act < 0.1:
        del copy[key]
    elif act < 0.2 and isinstance(copy, list):
        copy.insert(rng.randrange(len(copy) + 1), copy[key])
    elif act < 0.3:
        other = rng.choice(keys)
        copy[key], copy[other] = copy[other], copy[key]
    else:
        copy[key] = mutate_json(value[key], rng)
    return copy


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes cut, lengthened, zeroed or overwritten somewhere, with random bytes or a copy of another piece."""
    at, length = rng.randrange(len(data) + 1), rng.choice([1, 1, 1, 2, 4, 16, 300])
    act = rng.randrange(6)
    if act == 0:
        return data[:at]
    if act == 1:
        return data[:at] + rng.randbytes(length) + data[at:]
    if act == 2:
        return data[:at] + data[at + length:]
    if act == 3:
        start = rng.randrange(len(data) + 1)
        return data[:at] + data[start:start + length] + data[at + length:]
    new = bytes(length) if act == 4 else rng.randbytes(length)
    return (data[:at] + new + data[at + length:])[:len(data)]


def json_bytes(value) -> bytes:
    """As the header is written."""
    return json.dumps(value, separators=(",", ":")).encode()


def mutant(blob: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(kind, file): damaged at random, or changed with its checksums made right again."""
    text, payload = tg.open_container(blob)
    kind = rng.choice(["damage", "payload", "header", "header", "text", "numbers"])
    if kind == "damage":
        return kind, mutate_bytes(blob, rng)
    if kind == "payload":
        return kind, tg.make_container(text, mutate_bytes(payload, rng))
    if kind == "header":
        header = json.loads(text)
        for _ in range(rng.choice([1, 1, 2])):
            header = mutate_json(header, rng)
        return kind, tg.make_container(json_bytes(header), payload)
    if kind == "text":
        return kind, tg.make_container(mutate_bytes(text, rng), payload)
    start, numbers = len(tg.ARTIFACT_MAGIC), [len(blob), len(tg.compress("lzma", text)), len(text)]
    i = rng.randrange(3)
    numbers[i] = rng.choice([0, 1, numbers[i] - 1, numbers[i] + 1, 2 ** 20, 2 ** 31, 2 ** 32 - 1])
    rest = blob[start + tg.ARTIFACT_NUMBERS.size:-tg.ARTIFACT_DIGEST_BYTES]
    body = blob[:start] + tg.ARTIFACT_NUMBERS.pack(*numbers) + rest
    return kind, body + hashlib.sha256(body).digest()[:tg.ARTIFACT_DIGEST_BYTES]


def attack(blob: bytes, rng: random.Random) -> tuple[str, str]:
    """(kind, what came of it) for one mutant. Fails unless it was refused in one line or is a well-formed artifact."""
    kind, bad = mutant(blob, rng)
    if bad == blob:
        return kind, "unchanged"
    try:
        cfg, _, stored = tg.read_artifact(bad)
    except tg.UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 300, error
        return kind, "refused"
    assert kind not in ("damage", "numbers"), f"a damaged file was read: {kind}"
    assert tg.parameter_shapes(cfg) == {s.name: s.values.shape for s in stored}
    for s in stored:
        assert s.weight().isfinite().all(), s.name
        assert not s.bits or np.abs(s.values.astype(int)).max() < 2 ** (s.bits - 1), s.name
    return kind, "read"


def fuzz(count: int, seed: int = 0) -> dict[str, int]:
    """Attack `count` times; returns how often which kind ended how, and prints the slowest and the memory."""
    outcomes, slowest = {}, 0.0
    blobs = [tiny_artifact(codec, clip=clip) for clip in ("percentile", "waterfill") for codec in tg.CODECS]
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(count):
        begun = time.perf_counter()
        outcome = " ".join(attack(blobs[i % len(blobs)], random.Random(f"{seed} {i}")))
        slowest = max(slowest, time.perf_counter() - begun)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    grew = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"{count} mutants: {outcomes}; the slowest took {slowest:.2f} s, memory grew by {grew // 1024} MiB")
    return outcomes


@one_line_errors
def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("model", nargs="?", type=Path, help="float weights: final_model.pt or a checkpoint")
    parser.add_argument("--clip", help="clip rule (default: that of the settings)")
    parser.add_argument("--synthetic", type=float, default=0, metavar="WEIGHTS", help="tile the banks to so many")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="read N mutated artifacts instead")
    args = parser.parse_args(argv)
    if args.fuzz:
        fuzz(args.fuzz)
        return 0
    if args.model is None or not args.model.is_file():
        parser.error("no such file" if args.model else "needs a model file, or --fuzz N")
    environ = {**os.environ, **({"CLIP_RULE": args.clip} if args.clip else {})}
    streams = load_streams(args.model, tg.Hyperparameters.from_env(environ))
    if args.synthetic:
        streams = grown(streams, args.synthetic)
    time_packing("range", streams)
    bench(streams)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
