"""Finds the concentrations of NGRAM_ORDERS for a model on training text, never on validation text.

    python tools/ngram.py final_model.ptz --tokens 200000 NGRAM_ORDERS=d1,d2,d3,2,3,4,5,6,8,12
    python tools/ngram.py final_model.ptz --val --tokens 100000 NGRAM_ORDERS=2,3,4 NGRAM_CONCENTRATIONS=8   # measures

The text is the end of the training shards, which a run reads last or never: a model knows what it has read too well. It
is scored by the last of a run's evaluations. The first half of the scores picks the concentrations, one length after
another in steps of a fourth root of two; the second half, with the first one's counts, tells what they gain. With --val
nothing is picked: the gain of the settings' own concentrations on the first tokens of the validation text. Settings are
those of train_gpt.py, from the environment or as KEY=VALUE.
"""
from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import shell  # noqa: E402

RANGE, STEP = (2.0 ** -10, 2.0 ** 20), 2 ** 0.25


def read_text(cfg: tg.Hyperparameters, rt: tg.Runtime, targets: int, validation: bool) -> tg.ValData:
    """The first tokens of the validation text, or the last ones of the training text."""
    val = tg.ValData.open(cfg, rt)
    if validation:
        return val.take(slice(targets + 1))
    stream = tg.TokenStream(cfg.train_files, cfg.vocab_size)
    tokens = stream.read(max(len(stream) - targets - 1, 0), min(targets + 1, len(stream)))
    sizes = torch.ones(len(tokens), dtype=torch.int32)  # bytes do not matter here
    return dataclasses.replace(val, tokens=torch.from_numpy(tokens).to(rt.device), sizes=sizes.to(rt.device))


def scores(path: str, cfg: tg.Hyperparameters, rt: tg.Runtime, text: tg.ValData) -> tuple[str, torch.Tensor, float]:
    """(which evaluation was the last one, its scores, its seconds)"""
    model = tg.load_model(tg.read_file(path), rt, text.tokenizer_sha256)
    key, stride = list(tg.final_evaluations(cfg).items())[-1]
    adapter = tg.adapter_for(model, cfg, rt) if key == "ttt" else None
    nll = torch.zeros(len(text.tokens) - 1, device=rt.device)
    plan = tg.plan_evaluation(text, cfg, rt, stride, cfg.eval_batch_seqs, adapter is not None)
    result = tg.evaluate(key, tg.scorer(model, rt, adapter), text, cfg, rt, plan, adapter,
                         observe=functools.partial(nll.index_copy_, 0))
    return key, nll.double(), result.seconds


def pick(counts: list, nll: torch.Tensor, start: float = 8.0) -> list[float]:
    """The concentrations that make the mean score lowest, each in turn until none helps any more."""
    def loss(tried: list[float]) -> float:
        logp = -nll
        for seen, concentration in zip(counts, tried):
            logp = tg.back_off(logp, seen, concentration)
        return -logp.mean().item()
    chosen = [start] * len(counts)
    best, before = loss(chosen), math.inf
    while before - best > 1e-6:
        before = best
        for i in range(len(chosen)):
            for factor in (STEP ** 8, STEP ** -8, STEP ** 2, STEP ** -2, STEP, 1 / STEP):
                while True:
                    tried = [*chosen[:i], chosen[i] * factor, *chosen[i + 1:]]
                    lower = loss(tried) if RANGE[0] <= tried[i] <= RANGE[1] else math.inf
                    if lower >= best:
                        break
                    chosen, best = tried, lower
    return chosen


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__, epilog="KEY=VALUE: settings")
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--tokens", type=int, default=200_000, metavar="N", help="targets (default: %(default)s)")
    parser.add_argument("--val", action="store_true", help="measure on validation text instead")
    args, settings = parser.split(argv)
    if args.tokens < 2:
        raise tg.UserError(f"--tokens {args.tokens} is out of range: 2 or more")
    cfg = tg.settings_from({**os.environ, **settings, "EVAL_ARTIFACT": args.artifact, "EVAL_MAX_SECONDS": "0"})
    if not cfg.ngrams:
        raise tg.UserError("NGRAM_ORDERS is empty: name the lengths of contexts, like NGRAM_ORDERS=d1,d2,2,3,4,5,6,8")
    rt = tg.Runtime.open(cfg)
    rt = dataclasses.replace(rt, log=tg.RunLog(rt.folder, rt.run_id, active=False))
    text = read_text(cfg, rt, args.tokens, args.val)
    if len(text.tokens) <= cfg.window:
        raise tg.UserError(f"--tokens {args.tokens} is less than a window of {cfg.window}")
    key, nll, seconds = scores(args.artifact, cfg, rt, text)
    begun, half, orders = time.perf_counter(), 0 if args.val else len(nll) // 2, [order for order, _ in cfg.ngrams]
    counts = list(tg.count_contexts(text.tokens, orders, text.bos_id))
    counting = time.perf_counter() - begun
    chosen = [weight for _, weight in cfg.ngrams] if args.val else pick(
        [[count[:half] for count in each] for each in counts], nll[:half])
    mixed = tg.mixture_nll(text.tokens, nll, list(zip(orders, chosen)), text.bos_id)
    before, after = nll[half:].mean().item(), mixed[half:].mean().item()
    print(f"{key}: {before:.5f} nats a token, with counts {after:.5f}, {after / before - 1:+.2%}, on "
          f"{len(nll) - half:,} targets of the {'validation' if args.val else 'training'} text; {seconds:.1f} s to score, {counting:.2f} s "
          "to count")
    print(f"NGRAM_ORDERS={cfg.ngram_orders} NGRAM_CONCENTRATIONS={','.join(f'{c:.3g}' for c in chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
