"""What rounding costs: bits x clip rule x (nearest or GPTQ), on a trained model.

    python tools/quant_bench.py FLOAT_MODEL [KEY=VALUE...] [--tokens N] [--what banks|tables|all]
    python tools/quant_bench.py FLOAT_MODEL [KEY=VALUE...] [--tokens N] --over 0.2     # SIZE_FIT, 20 % over the limit
    python tools/quant_bench.py FLOAT_MODEL [KEY=VALUE...] [--tokens N] --export       # bytes of artifacts against loss

FLOAT_MODEL is a final_model.pt or a checkpoint (its EMA is taken); KEY=VALUE are the settings it was trained with.
Each row rounds the weights by one rule and leaves the rest as floats. Columns: nats per token added to the loss on the
first N validation tokens, the same in percent (of nats, so of bits per byte), bytes of order-0 entropy of the codes,
and the sum over matrices of trace(error hessian error^T), which GPTQ lowers, relative to what rounding to nearest
leaves.
"""
import contextlib
import dataclasses
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt as tg  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

RULES = [("percentile", 0.0), ("amax", 0.0)]
SIGMAS = {4: (2.5, 3.0, 4.0), 5: (4.0, 6.0), 6: (4.0, 6.0, 8.0, 12.85), 7: (8.0, 15.0), 8: (8.0, 20.0)}
PR_1855 = {"CLIP_RULE": "sdclip", "MATRIX_BITS": 6, "EMBED_BITS": 7, "BIGRAM_BITS": 7, "VE_BITS": 7}
EXPORTS = (  # name, settings, those that grow with the factor, factors
    ("PR 1855, sigmas x{:g}", PR_1855, {"ATTN_CLIP_SIGMAS": 13, "MLP_CLIP_SIGMAS": 11.5, "EMBED_CLIP_SIGMAS": 14},
     (1.0, 0.75, 0.55, 0.45)),
    ("percentile, banks x{:g}", {"CLIP_RULE": "percentile"}, {"ATTN_CLIP_WIDEN": 1, "MLP_CLIP_WIDEN": 1}, (8, 6, 4, 3, 2)),
    *((f"water-filling, a={a}, {{:g}} nats", {"CLIP_RULE": "waterfill", "WATERFILL_EXPONENT": a},
       {"WATERFILL_NATS": 1}, (0.06, 0.03, 0.015, 0.0075)) for a in (0.5, 0.75, 1.0)))
TABLES = ("tok_emb.weight", "lm_head.weight", "bigram.embed.weight", "trigram.embed.weight", "ve_shared.embed.weight")


def parse(argv: list[str]):
    parser = Parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--tokens", type=int, default=65_536, help="validation tokens")
    parser.add_argument("--bits", default="4,6", help="with commas")
    parser.add_argument("--over", type=float, help="instead: let SIZE_FIT bring the artifact under a limit it exceeds "
                        "by this share")
    parser.add_argument("--export", action="store_true", help="instead: artifacts by each rule at several sizes")
    parser.add_argument("--what", choices=("banks", "tables", "all"), default="banks", help="which weights to round")
    return parser.parse_intermixed_args(argv)


def load(path: str, cfg: tg.Hyperparameters, rt: tg.Runtime) -> tg.GPT:
    """The float model: of a final_model.pt, or the EMA of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
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
def output_change(model: tg.GPT, rounded: dict, hessians: dict) -> float:
    """Sum over the matrices with a Hessian of trace(error hessian error^T)."""
    params, total = dict(model.named_parameters()), 0.0
    for name in set(rounded) & set(hessians):
        error = (tg.dequantise(*rounded[name]) - params[name]).view(-1, *params[name].shape[-2:])
        total += float(((error @ hessians[name]) * error).sum())
    return total


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


def measured(cfg, model, names: set, hessians: dict, used: dict,
             ids: torch.Tensor) -> tuple[float, float, float, float]:
    """(loss, order-0 bytes, output change, seconds) with `names` rounded by the settings."""
    start = time.perf_counter()
    rounded = {n: pair for n, pair in tg.round_model(cfg, model, used).items() if n in names}
    seconds = time.perf_counter() - start
    with using_rounded_weights(model, rounded):
        loss = loss_on(model, ids, cfg.train_seq_len)
    size = sum(tg.entropy_bytes(codes) for codes, _ in rounded.values())
    return loss, size, output_change(model, rounded, hessians), seconds


def show_fit(cfg, rt, model, data, ids: torch.Tensor, step: int, over: float) -> None:
    """Fit the model to the limit it exceeds by the share `over`; the losses around it."""
    hessians = tg.calibrate(cfg, rt, model, data, step, float("inf"))
    code_bytes = os.path.getsize(tg.__file__)

    def make(settings):
        return tg.pack(settings, model, "0" * 64, tg.round_model(settings, model, hessians))

    def loss(settings):
        with using_rounded_weights(model, tg.round_model(settings, model, hessians)):
            return loss_on(model, ids, cfg.train_seq_len)

    total = len(make(cfg).blob) + code_bytes
    cfg = dataclasses.replace(cfg, artifact_limit_bytes=int(total / (1 + over)))
    banks = sum(p.numel() for name, p in model.named_parameters() if name.endswith("_bank"))
    fitted, artifact = tg.fit_size(cfg, rt, banks, make, total, code_bytes)
    print(f"loss: float {loss_on(model, ids, cfg.train_seq_len):.5f}, "
          f"before the fit {loss(cfg):.5f} in {total:,} bytes, "
          f"after it {loss(fitted):.5f} in {len(artifact.blob) + code_bytes:,} bytes")


def show_exports(environ: dict, rt, model, data, ids: torch.Tensor, step: int) -> None:
    """Bytes of whole artifacts (without code) and nats added, by each rule at several factors; all rounded by GPTQ."""
    cfg = tg.Hyperparameters.from_env(environ | {"CLIP_RULE": "waterfill"})
    hessians = tg.calibrate(cfg, rt, model, data, step, float("inf"))
    factors = tg.loss_curvature(cfg, rt, model, data, step, hessians, float("inf"))
    float_loss, weights = loss_on(model, ids, cfg.train_seq_len), sum(p.numel() for p in model.parameters())
    print(f"{weights:,} weights, float loss {float_loss:.5f} nats on {len(ids) - 1:,} tokens\n"
          f"{'rule':<36} added nats  artifact bytes")
    for name, fixed, growing, sizes in EXPORTS:
        for size in sizes:
            changes = fixed | {key: size * value for key, value in growing.items()}
            changed = tg.Hyperparameters.from_env(environ | {key: str(value) for key, value in changes.items()})
            rounded = tg.round_model(changed, model, hessians, factors if "WATERFILL_NATS" in growing else None)
            with using_rounded_weights(model, rounded):
                loss = loss_on(model, ids, cfg.train_seq_len)
            size_bytes = len(tg.pack(changed, model, "0" * 64, rounded).blob)
            print(f"{name.format(size):<36} {loss - float_loss:10.5f}  {size_bytes:14,}", flush=True)


@one_line_errors
def main(argv: list[str]) -> int:
    args = parse(argv)
    environ = dict(os.environ) | {"SIZE_FIT": "1", "GPTQ_ENABLED": "0" if args.over else "1"}
    environ |= dict(pair.split("=", 1) for pair in args.settings)
    environ.setdefault("ARTIFACT_DIR", "/tmp")
    cfg = tg.Hyperparameters.from_env(environ | {"RUN_ID": "quant_bench"})
    rt = tg.Runtime.open(cfg)
    model, data = load(args.model, cfg, rt), tg.TrainData.open(cfg, rt)
    count = args.tokens // cfg.train_seq_len * cfg.train_seq_len
    ids = torch.from_numpy(tg.TokenStream(cfg.val_files, cfg.vocab_size).read(0, count + 1)).long().to(rt.device)
    step = len(data.stream) // cfg.train_batch_tokens // 2
    if args.export:
        show_exports(environ | {"GPTQ_ENABLED": "1", "LATE_QAT": "0"}, rt, model, data, ids, step)
        return 0
    if args.over:
        show_fit(cfg, rt, model, data, ids, step, args.over)
        return 0
    hessians = tg.calibrate(cfg, rt, model, data, step, float("inf"))
    everything = set(tg.quant_specs(cfg, dict(model.named_parameters())))
    names = {n for n in everything if args.what == "all" or (n in TABLES) == (args.what == "tables")}
    float_loss = loss_on(model, ids, cfg.train_seq_len)
    weights = sum(p.numel() for n, p in model.named_parameters() if n in names)
    print(f"{args.what} of {args.model}: {weights:,} weights, float loss {float_loss:.5f} nats on {count:,} tokens\n"
          f"bits  rule             rounding  added nats  added %   order-0 bytes  output change  seconds")
    for bits in map(int, args.bits.split(",")):
        for clip, sigmas in [*RULES, *(("sdclip", k) for k in SIGMAS.get(bits, (6.0, 12.0)))]:
            env = {"CLIP_RULE": clip, "MATRIX_BITS": bits, "EMBED_BITS": bits, "BIGRAM_BITS": bits, "VE_BITS": bits}
            if sigmas:
                env |= {"MATRIX_CLIP_SIGMAS": sigmas, "EMBED_CLIP_SIGMAS": sigmas}
            changed = tg.Hyperparameters.from_env(environ | {k: str(v) for k, v in env.items()})
            base = None
            for rounding, used in (("nearest", {}), ("gptq", hessians)):
                loss, size, change, seconds = measured(changed, model, names, hessians, used, ids)
                base = base or change
                print(f"{bits:4}  {clip + (f' {sigmas:g}' if sigmas else ''):<15}  {rounding:<8}  "
                      f"{loss - float_loss:10.5f}  {100 * (loss / float_loss - 1):7.3f}  {size:14,.0f}  "
                      f"{change / base:13.3f}  {seconds:7.1f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
