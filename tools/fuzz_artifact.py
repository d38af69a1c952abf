"""Attack the reader of artifacts: files damaged at random, and well-formed ones with odd contents and right checksums.

    python tools/fuzz_artifact.py 10000        # so many mutants of small artifacts, of every codec and two clip rules

Each must be refused in one line or be an artifact whose weights are finite and in range; the first that is not ends it.
"""
from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

TINY = {"vocab_size": 64, "num_layers": 2, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 2,
        "ve_layers": "1", "ve_dim": 8, "bigram_vocab_size": 32, "bigram_dim": 8}


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
    parser.add_argument("count", type=int, metavar="N", help="mutants")
    fuzz(parser.parse_args(argv).count)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
