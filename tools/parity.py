"""Compare train_gpt.py with numbers from PR 1092's own script.

    python tools/parity.py FOLDER [--tokenizer MODEL]

FOLDER holds a fixture: `fixture.json` (settings, expected scores) and `fixture.npz` (weights, logits,
gradients, weights after optimiser steps and after test-time training). One line per quantity: its largest
difference, the tolerance, ok or FAIL. Exit code 0: all agree, 1: something does not, 2: not a fixture.

Tolerances: 2e-5 on logits, nats and bits per byte, 1e-4 on weights after updates; a gradient may be off by
1e-4 of its tensor's largest entry (fp32 sums in another order, over gradients of very unlike sizes). AdamW
divides by the gradient's size plus 1e-8: where a gradient is of that size, rounding alone decides the step. A
weight after the optimiser steps may therefore be off by the tolerance plus four times what noise of rounding
size in the gradients does to it; the line gives the number of weights that needed that.
"""
from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as ours  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

CLOSE, CLOSE_WEIGHTS, CLOSE_GRADIENTS = 2e-5, 1e-4, 1e-4
ROUNDING = 1e-6  # of the largest gradient in a row: what fp32 sums of a few hundred terms leave open
STEP_STRIDE = 1000  # step s of the optimiser reads steps/tokens from this many times s
# What PR 1092's GPT takes when its caller does not say; the settings of a run have other defaults.
PEER_DEFAULTS = dict(
    bigram_vocab_size=0, bigram_dim=128, xsa_last_n=0, rope_dims=0, ln_scale=False, dtg=False,
    ve_enabled=False, ve_dim=128, ve_layers="9,10", gated_attention=False, value_residual=False,
    mtp_num_heads=0, mtp_loss_weight=0.1)
UNREAD = "blocks.0.attn.vr_lambda"  # a parameter that PR 1092 has and never reads; ours has no such thing


class Fixture:
    """A fixture's settings and arrays; raises UserError where the folder does not hold one."""

    def __init__(self, folder: Path):
        try:
            stored = json.loads((folder / "fixture.json").read_text(encoding="utf-8"))
            self.config, self.expected = stored["config"], stored["expected"]
            with np.load(folder / "fixture.npz", allow_pickle=False) as arrays:
                self.arrays = {name: arrays[name] for name in arrays.files}
        except OSError as error:
            raise ours.UserError(f"cannot read {error.filename}: {error.strerror}") from None
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            reason = f"{type(error).__name__}: {error}"
            raise ours.UserError(f"{folder} holds no parity fixture ({reason})") from None

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The arrays PREFIX/NAME by NAME."""
        return {name[len(prefix) + 1:]: torch.from_numpy(array) for name, array in self.arrays.items()
                if name.startswith(prefix + "/") and not name.endswith("/" + UNREAD)}

    def ids(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].astype(np.int64))

    def settings(self) -> ours.Hyperparameters:
        """Our settings for the fixture's model, optimiser and evaluation."""
        optim, evaluation = self.config["optim"], self.config["eval"]
        model = {**PEER_DEFAULTS, **self.config["model"]}
        model["dtg_enabled"] = model.pop("dtg")
        env = {name: str(value) for name, value in self.config.get("env", {}).items()}
        cfg = dataclasses.replace(
            ours.Hyperparameters.from_env(env),
            rope_train_seq_len=1024, leaky_slope=0.75, device="cpu", dtype="fp32",
            matrix_lr=optim["matrix_lr"], muon_wd=optim["wd"], grad_clip_norm=optim["clip"],
            train_seq_len=evaluation["seq_len"], eval_seq_len=evaluation["seq_len"], eval_stride=evaluation["stride"],
            ttt_optimizer="sgd", ttt_lr=evaluation["lr"], ttt_momentum=0.9, ttt_epochs=evaluation["epochs"],
            ttt_chunk_tokens=evaluation["chunk"], ttt_batch_seqs=evaluation["batch_seqs"], ttt_grad_clip=1.0,
            ttt_freeze_blocks=0, ttt_temp=1.0)
        try:
            return dataclasses.replace(cfg, **model)
        except TypeError as error:
            raise ours.UserError(f"a model setting of the fixture is unknown here: {error}") from None

    def model(self, cfg: ours.Hyperparameters) -> ours.GPT:
        """Our model with the fixture's initial weights."""
        model = ours.GPT(cfg)
        try:
            model.load_state_dict(self.group("w"))
        except RuntimeError as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[1:])
            raise ours.UserError(f"the weights do not fit the model described: {reason}") from None
        return model


class Report:
    """Prints one line per quantity; `failed` if any differed by more than its tolerance."""

    def __init__(self):
        self.failed = False

    def __call__(self, what: str, off: float, tolerance: float, note: str = "", excused=False) -> None:
        verdict = "ok" if excused or off <= tolerance else "FAIL"
        self.failed |= verdict == "FAIL"
        print(f"{what:<28} {off:10.2e}   at most {tolerance:.0e}   {verdict:<4}   {note}".rstrip())

    def tensors(self, what: str, got: dict, wanted: dict, tolerance: float, slack: dict | None = None,
                relative: bool = False) -> None:
        """The worst of many tensors; one we lack counts as zeros. `slack`: what more an entry may be off."""
        if not wanted:
            raise ours.UserError(f"the fixture holds no {what}")
        worst, past, failing = {}, 0, 0
        for name, expected in wanted.items():
            off = difference(got.get(name), expected)
            if relative and off.numel():
                off = off / (expected[expected.isfinite()].abs().max() or 1.0)
            worst[name] = largest(off)
            past += int((off > tolerance).sum())
            failing += int((off - slack[name] > tolerance).sum()) if slack else 0
        name = max(worst, key=worst.get)
        excused = slack is not None and past > 0 and failing == 0
        self(what, worst[name], tolerance, f"{name}, of {len(worst)}" + (
            f"; rounding decides {past} entries" if excused else ""), excused)


def difference(got: torch.Tensor | None, wanted: torch.Tensor) -> torch.Tensor:
    """|got - wanted|, entry by entry, infinite for NaN. Raises UserError on unequal shapes."""
    got = torch.zeros_like(wanted) if got is None else got.detach()
    if got.shape != wanted.shape:
        raise ours.UserError(f"the fixture has shape {list(wanted.shape)} where {list(got.shape)} belongs")
    return (got.double() - wanted.double()).abs().nan_to_num(nan=math.inf)


def largest(off: torch.Tensor) -> float:
    return off.max().item() if off.numel() else 0.0


def max_difference(got, wanted) -> float:
    """Largest difference between two numbers or two lists of them."""
    return largest(difference(*(torch.tensor(side, dtype=torch.float64) for side in (got, wanted))))


def check_model(fixture: Fixture, cfg: ours.Hyperparameters, report: Report) -> None:
    """Logits, loss by both of our paths, gradients."""
    model, x, y = fixture.model(cfg), fixture.ids("batch/x"), fixture.ids("batch/y")
    with torch.no_grad():
        model.eval()
        off = difference(model.logits(model.hidden(x)), fixture.group("batch")["logits"])
        losses = [model.loss(x, y).item(), model.nll(x, y).mean().item()]
    report("logits", largest(off), CLOSE)
    report("loss", max_difference(losses, [fixture.expected["loss"]] * 2), CLOSE)
    model.train()
    model.loss(x, y).backward()
    report.tensors("gradients, relative", {name: p.grad for name, p in model.named_parameters()},
                   fixture.group("grad"), CLOSE_GRADIENTS, relative=True)


def three_steps(fixture: Fixture, cfg: ours.Hyperparameters, shake: int = 0) -> tuple[list[float], dict]:
    """Losses and weights of three steps of our optimisers: clip all together, AdamW, Muon.

    With `shake`, a seed, noise of rounding size is added to every gradient that is not 0.
    """
    model, optim, tokens = fixture.model(cfg).train(), fixture.config["optim"], fixture.ids("steps/tokens")
    optimisers, noise = ours.Optimisers(model, cfg, runtime()), torch.Generator().manual_seed(shake)
    tables = {p for name, p in model.named_parameters() if name.endswith(("tok_emb.weight", ".embed.weight"))}
    for group in optimisers.adamw.param_groups:  # the fixture has one rule for heads and all other small ones
        group["base_lr"] = optim["token_lr" if tables & set(group["params"]) else "scalar_lr"]
        group["weight_decay"] = optim["wd"]
    plan = ours.StepPlan(lr_scale=1.0, momentum=optim["momentum"], qat=False, snapshot=False)
    rows, length, losses = fixture.config["batch"], fixture.config["seq_len"], []
    for step in range(3):
        span = tokens[step * STEP_STRIDE:][:rows * length + 1]
        loss = model.loss(span[:-1].view(rows, length), span[1:].view(rows, length))
        loss.backward()
        for grad in [p.grad for p in model.parameters() if shake and p.numel()]:
            largest = grad.abs().amax(-1, keepdim=True) if grad.ndim else grad.abs()
            grad += (grad != 0) * ROUNDING * largest * torch.randn(grad.shape, generator=noise)
        optimisers.step(plan)
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def check_steps(fixture: Fixture, cfg: ours.Hyperparameters, report: Report) -> None:
    """Three optimiser steps, and which weights after them rounding leaves open."""
    losses, weights = three_steps(fixture, cfg)
    shaken = [three_steps(fixture, cfg, shake)[1] for shake in (1, 2)]
    slack = {name: 4 * torch.stack([difference(other[name], p) for other in shaken]).amax(0)
             for name, p in weights.items()}
    report("losses of three steps", max_difference(losses, fixture.expected["step_losses"]), CLOSE)
    report.tensors("weights after three steps", weights, fixture.group("after3"), CLOSE_WEIGHTS, slack)


def check_evaluation(fixture: Fixture, cfg: ours.Hyperparameters, report: Report, tokenizer) -> None:
    """Sliding evaluation, and the same with SGD learning from each scored chunk."""
    tokens, rt = fixture.ids("eval/tokens").int(), runtime()
    if len(tokens) <= cfg.window:
        raise ours.UserError(f"eval/tokens is shorter than a window of {cfg.window}")
    rest = (len(tokens) - 1 - cfg.window) % cfg.eval_stride
    tokens = tokens[:len(tokens) - rest]  # the fixture has full windows only
    sizes = torch.from_numpy(ours.token_bytes(tokenizer, tokens.numpy())) if tokenizer else torch.ones_like(tokens)
    val = ours.ValData(tokens, sizes, "")
    for name in ("sliding", "ttt"):
        model = fixture.model(cfg)
        adapter = ours.SgdAdapter(model, cfg, rt) if name == "ttt" else None
        plan = ours.plan_evaluation(val, cfg, rt, cfg.eval_stride, cfg.eval_batch_seqs, name == "ttt")
        result = ours.evaluate(name, model.nll, val, cfg, rt, plan, adapter)
        nats, bpb = fixture.expected[name]
        report(f"{name}, nats", max_difference(result.loss, nats), CLOSE)
        if tokenizer:
            report(f"{name}, bits per byte", max_difference(result.bpb, bpb), CLOSE)
            report(f"{name}, bytes", max_difference(result.bytes, fixture.expected["bytes_scored"]), 0)
        if adapter:
            weights = dict(model.named_parameters())
            report.tensors("weights after ttt", weights, fixture.group("after_ttt"), CLOSE_WEIGHTS)


def runtime() -> ours.Runtime:
    """One process on the CPU in fp32 that writes nothing."""
    return ours.Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32, compiles=False,
                        attention="flash", attend=ours.attend_sdpa, run_id="parity", folder=Path(),
                        log=ours.RunLog(Path(), "parity", active=False))


def find_tokenizer(cfg: ours.Hyperparameters, given: Path | None, folder: Path):
    """What tells the bytes of tokens; None, with a note, where the usual tokenizer is not there or is another one."""
    path = given or folder.resolve().parent.parent / "data" / "fineweb_1024_bpe.model"
    try:
        return ours.open_tokenizer(dataclasses.replace(cfg, tokenizer_path=str(path)))[0]
    except (ours.UserError, ImportError) as error:
        if given:
            raise ours.UserError(str(error)) from None
        print(f"note: bytes are not compared, only nats ({error}); --tokenizer names the model")
        return None


@one_line_errors
def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where fixture.json and fixture.npz are")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL",
                        help="SentencePiece model (default: FOLDER/../../data/fineweb_1024_bpe.model)")
    args, report = parser.parse_args(argv), Report()
    torch.set_num_threads(1)  # the sums are small: more threads cost more than they bring
    try:
        fixture = Fixture(args.folder)
        cfg = fixture.settings()
        tokenizer = find_tokenizer(cfg, args.tokenizer, args.folder)
        check_model(fixture, cfg, report)
        check_steps(fixture, cfg, report)
        check_evaluation(fixture, cfg, report, tokenizer)
    except (KeyError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ours.UserError(f"{args.folder} is not a whole fixture: {reason}") from None
    return int(report.failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
