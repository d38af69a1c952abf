"""train_gpt.py against numbers that a published system's own code has computed.

    python tools/parity.py FOLDER [--tokenizer MODEL]      # one fixture, one line per quantity
    python tools/parity.py --all FOLDER                    # every fixture below FOLDER, one line each
    python tools/parity.py FOLDER --text DOCS.jsonl        # a text fixture: its cases, and the totals of DOCS

A fixture is `fixture.json` (settings, expected scores) and `fixture.npz` (weights, logits, gradients, …) of one of the
systems in SYSTEMS; `config.source` names it. Each line has the largest difference, the tolerance, ok or FAIL. A text
fixture has `cases.json` instead, see parity_text.py.
Exit code 0: all agree; 1: something does not; 2: a fixture cannot be read. PR 1855's phases of base training are
compared with its slips put back, and a note says what they are worth; its LQER is not compared.

Tolerances: 2e-5 on logits, nats per token and bits per byte; 1e-4 on weights after updates and on bits per byte after
low-rank adaptation; a gradient may be off by 1e-4 of its tensor's largest entry (fp32 sums in another order, over
gradients of very unlike sizes). Where rounding alone decides an entry, this is too little: large logits without a soft
cap, a gradient that is the small difference of large sums, a weight whose gradient is of the size of AdamW's epsilon.
An entry past the tolerance may therefore be off by four times more what noise of rounding size does to it: noise in
the gradients for a weight after optimiser steps, in the weights for all else. The line says how many entries needed it.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import parity_text  # noqa: E402
import profiles  # noqa: E402
import train_gpt as ours  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402

CLOSE, CLOSE_WEIGHTS, CLOSE_GRADIENTS, CLOSE_ADAPTED = 2e-5, 1e-4, 1e-4, 1e-4
ROUNDING_GRADIENT = 1e-6  # of the largest gradient in a row: what fp32 sums of a few hundred terms leave open
ROUNDING_WEIGHT = 2 ** -24  # of a weight: half its last digit
STEP_STRIDE = 1000  # step s of the optimiser reads steps/tokens from this many times s
TOKENIZER = "fineweb_1024_bpe.model"


# ---- what is compared ------------------------------------------------------------------------------------------

class Quantity(NamedTuple):
    """One thing that we compute and the fixture holds."""

    name: str
    key: str                   # "loss", "ttt:0", "ttt:nll": a number in `expected`, in a list, in a mapping there;
                               # "rows/logits": an array; "grad/": all arrays below
    got: object                # number, tensor, or published name -> tensor (None: no gradient)
    tolerance: float
    relative: bool = False     # the tolerance is a share of each tensor's largest entry
    whole: bool = True         # the fixture has every tensor of ours
    noisy: object = None       # seed -> the same as `got`, computed with noise of rounding size


def rows(fixture: Fixture, group: str = "rows", has_logits: bool = True, train: bool = False):
    """Logits, loss by both of our paths, gradients; `train`: of the loss with the heads that predict further ahead."""
    cfg, (x, y) = fixture.settings(), fixture.rows(group)

    @torch.no_grad()
    def logits(seed: int = 0) -> torch.Tensor:
        model = fixture.model(cfg, seed).eval()
        return model.logits(model.hidden(x))

    if has_logits:
        yield Quantity("logits", f"{group}/logits", logits(), CLOSE, noisy=logits)
    model = fixture.model(cfg).eval()
    with torch.no_grad():
        yield Quantity("loss", "loss", model.loss(x, y), CLOSE)
        yield Quantity("loss while scoring", "loss", model.nll(x, y).mean(), CLOSE)
    yield gradients("gradients, relative", "grad/", functools.partial(backward, fixture, x, y, train))[1]


def heads(fixture: Fixture):
    """Loss and gradients with the heads that predict further ahead."""
    compute = functools.partial(backward, fixture, *fixture.rows("rows"), True)
    loss, quantity = gradients("its gradients, relative", "grad_train/", compute)
    yield Quantity("training loss", "loss_train", loss, CLOSE)
    yield quantity


def backward(fixture: Fixture, x, y, train: bool, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Our loss and its gradients."""
    model = fixture.model(fixture.settings(), seed).train(train)
    loss = model.loss(x, y)
    loss.backward()
    return loss, fixture.system.named({name: p.grad for name, p in model.named_parameters()})


def gradients(name: str, key: str, compute) -> tuple[torch.Tensor, Quantity]:
    """The loss, and its gradients as a quantity. compute(seed) gives both."""
    loss, grads = compute(seed=0)
    return loss, Quantity(name, key, grads, CLOSE_GRADIENTS, relative=True, noisy=lambda seed: compute(seed=seed)[1])


def streams(fixture: Fixture):
    """Rows and a flat stream of documents, before and after the loop switches on."""
    cfg, ((x, _), (flat, targets)) = fixture.settings(), (fixture.rows(group) for group in ("rows", "packed"))
    documents = fixture.documents(flat[0])

    @torch.no_grad()
    def logits(seed: int = 0, *, looped: bool, packed: bool) -> torch.Tensor:
        model = fixture.model(cfg, seed).eval()
        model.looped = looped
        return model.logits(model.hidden(flat, documents=documents)[0] if packed else model.hidden(x))

    def backward(seed: int = 0, *, looped: bool) -> tuple[torch.Tensor, dict]:
        model = fixture.model(cfg, seed)
        model.looped = looped
        loss = model.loss(flat, targets, documents=documents)
        loss.backward()
        return loss, fixture.system.named({name: p.grad for name, p in model.named_parameters()})

    yield Quantity("starts of documents", "packed/starts", documents.starts.unique()[:-1], 0)
    for name, looped in (("plain", False), ("looped", True)):
        for group in ("rows", "packed"):
            compute = functools.partial(logits, looped=looped, packed=group == "packed")
            yield Quantity(f"logits of {group}, {name}", f"{group}/logits_{name}", compute(), CLOSE, noisy=compute)
        loss, quantity = gradients(f"gradients, {name}", f"grad_{name}/", functools.partial(backward, looped=looped))
        yield Quantity(f"loss, {name}", f"loss_{name}", loss, CLOSE)
        yield quantity


def complement(fixture: Fixture):
    """Weights of the targets in successive batches under complementary training."""
    cfg, tokens = fixture.settings(), fixture.tokens("complement/tokens")
    wanted = [name for name in fixture.arrays if name.startswith("complement/weights")]
    size = (len(tokens) - 1) // max(len(wanted), 1)
    if not size or any(len(fixture.array(name)) != size for name in wanted):
        raise ours.UserError(f"complement/tokens has {len(tokens)} tokens, which are not {len(wanted)} equal batches")
    counts = ours.BigramCounts(cfg, torch.device("cpu"))
    for i in range(len(wanted)):
        x, y = (tokens[i * size + shift:][:size] for shift in (0, 1))
        yield Quantity(f"weights of batch {i}", f"complement/weights{i}", counts.weights(x, y), CLOSE)
        counts.pairs[x, y] += 1  # instead of counts.update(x, y): as published, a pair that
        counts.firsts[x] += 1    # repeats inside a batch is counted once


def low_rank(fixture: Fixture):
    """Loss and gradients with low-rank additions to the matrices."""
    cfg, (x, y) = fixture.settings(), fixture.rows("rows")

    def adapted(seed: int):
        model = fixture.model(cfg, seed)
        adapter = ours.LoraAdapter(model, cfg, runtime())
        pairs = fixture.system.additions(adapter.pairs)
        fixture.fill("lora/", pairs)
        return model, adapter.hook, pairs

    def compute(seed: int) -> tuple[torch.Tensor, dict]:
        model, hook, pairs = adapted(seed)
        loss = model.loss(x, y, hook=hook)
        loss.backward()
        return loss, {name: p.grad for name, p in pairs.items()}

    loss, quantity = gradients("LoRA's gradients, relative", "lora_grad/", compute)
    model, hook, _ = adapted(seed=0)
    with torch.no_grad():
        scored = model.nll(x, y, hook=hook).mean()
    yield Quantity("loss with LoRA", "loss_lora", loss, CLOSE)
    yield Quantity("the same while scoring", "loss_lora", scored, CLOSE)
    yield quantity


def side_by_side(fixture: Fixture):
    """Scores and gradients of rows that have low-rank additions of their own."""
    given, (x, y) = fixture.config["lora"], fixture.rows("lora_rows")
    cfg, columns = dataclasses.replace(fixture.settings(), ttt_batch_docs=given["batch"]), slice(*given["chunk"])

    def compute(seed: int) -> tuple[torch.Tensor, dict]:
        model = fixture.model(cfg, seed)
        adapter = ours.LoraAdapter(model, cfg, runtime())
        pairs = fixture.system.additions(adapter.pairs)
        fixture.fill("lora/", pairs)
        nll = model.nll(x, y, hook=adapter.hook)
        nll[:, columns].mean(1).sum().backward()
        return nll.detach(), {name: p.grad for name, p in pairs.items()}

    nll, quantity = gradients("LoRA's gradients, relative", "lora_grad/", compute)
    yield Quantity("nats with LoRA by row", "lora_rows/nll", nll, CLOSE, noisy=lambda seed: compute(seed)[0])
    yield quantity


def documents(fixture: Fixture):
    """The text of eval/tokens, each document with additions that learn from it as it is scored; and without them, in
    windows that lie end to end in a document."""
    cfg = dataclasses.replace(fixture.settings(), phased_ttt_num_phases=0)
    still = dataclasses.replace(cfg, ttt_warm_start_a=False, ttt_epochs=0, ttt_doc_chunk_tokens=cfg.doc_context)

    for name, cfg in (("unadapted_documents", still), ("ttt_documents", cfg)):
        result = score_documents(fixture, cfg)
        nats = lambda seed=0, cfg=cfg: score_documents(fixture, cfg, seed).loss * result.tokens
        yield Quantity(f"{name}, targets", f"{name}:tokens", result.tokens, 0)
        yield Quantity(f"{name}, nats", f"{name}:nll", nats(), CLOSE * result.tokens, noisy=nats)
    if fixture.tokenizer:
        yield Quantity(f"{name}, bytes", f"{name}:bytes", result.bytes, 0)
        yield Quantity(f"{name}, bits/byte", f"{name}:val_bpb", result.bpb, CLOSE_ADAPTED)


@functools.cache
def score_documents(fixture: Fixture, cfg: ours.Hyperparameters, seed: int = 0, slips: bool = False) -> ours.EvalResult:
    """`slips`: with those of the published phases, which two functions stand for."""
    rt, val = runtime(), text(fixture, fixture.tokens("eval/tokens").int(), bos_id=ours.BOS_ID)

    def training_documents(scored, documents):
        """Each with the BOS after it, and so a BOS is followed by the next document's. Of one chunk, nothing."""
        tokens = torch.cat([scored.tokens[first:end + 1] for first, end in documents.tolist()]).long()
        tokens = tokens if len(tokens) - 1 > cfg.global_ttt_chunk_tokens else tokens[:1]
        return tokens[:-1], tokens[1:]

    def learn_documents(trainer, tokens, targets, bos_id):
        """All whole sequences in one row; a document may go on in the next one."""
        size = len(tokens) // cfg.window * cfg.window
        if size:
            begins = torch.from_numpy(ours.document_starts(tokens[:size].numpy(), bos_id, cfg.window))
            trainer.loss_fn(tokens[None, :size], targets[None, :size],
                            documents=ours.Documents(begins, cfg.window)).backward()
            trainer.step()

    with contextlib.ExitStack() as stack:
        for owner, function in ((ours.Scored, training_documents), (ours.Adapter, learn_documents)) if slips else ():
            stack.enter_context(mock.patch.object(owner, function.__name__, function))
        model = fixture.model(cfg, seed)
        plan = ours.plan_evaluation(val, cfg, rt, cfg.window, 1, adapts=True)
        return ours.evaluate("documents", model.nll, val, cfg, rt, plan, started(ours.adapter_for(model, cfg, rt)))


def phases(fixture: Fixture):
    """The same with the weights trained on finished documents in between, as published."""
    if "ttt_phased" not in fixture.expected:
        return
    given = fixture.config["eval"]
    cfg = dataclasses.replace(fixture.settings(), phased_ttt_num_phases=given["phases"],
                              phased_ttt_prefix_docs=given["prefix_docs"])
    result, ours_alone = score_documents(fixture, cfg, slips=True), score_documents(fixture, cfg)
    nats = lambda seed=0: score_documents(fixture, cfg, seed, slips=True).loss * result.tokens
    yield Quantity("ttt_phased as published, nats", "ttt_phased:nll", nats(), CLOSE * result.tokens, noisy=nats)
    without = dataclasses.replace(cfg, phased_ttt_num_phases=0)
    gains = [score_documents(fixture, without).loss - other.loss for other in (result, ours_alone)]
    fixture.notes.append("phases gain {:.5f} nats a token with the published slips and {:.5f} without them: no BOS learns "
                         "to be followed by another one, each chunk is trained on to its end, in rows of {} tokens "
                         "whatever the number of ranks".format(*gains, cfg.doc_context))


def steps(fixture: Fixture):
    """Three optimiser steps."""
    losses, weights = three_steps(fixture)
    yield Quantity("losses of three steps", "step_losses", losses, CLOSE,
                   noisy=lambda seed: three_steps(fixture, seed)[0])
    yield Quantity("weights after three steps", "after3/", weights, CLOSE_WEIGHTS,
                   noisy=lambda seed: three_steps(fixture, seed)[1])


def three_steps(fixture: Fixture, seed: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of three steps of our optimisers: clip all together, AdamW, Muon. With a seed, noise of
    rounding size is added to every gradient that is not 0."""
    cfg, optim, tokens = fixture.settings("optim"), fixture.config["optim"], fixture.tokens("steps/tokens")
    model, losses = fixture.model(cfg).train(), []
    optimisers, noise = ours.Optimisers(model, cfg, runtime()), torch.Generator().manual_seed(seed)
    tables = {p for name, p in model.named_parameters() if name.endswith(("tok_emb.weight", ".embed.weight"))}
    for group in optimisers.adamw.param_groups if "wd" in optim else ():  # one rule for heads and all other small ones
        group["base_lr"] = optim["token_lr" if tables & set(group["params"]) else "scalar_lr"]
        group["weight_decay"] = optim["wd"]
    plan = ours.StepPlan(optim.get("lr_scale", 1.0), momentum=optim["momentum"], qat=False, snapshot=False)
    count, length = fixture.config["batch"], fixture.config["seq_len"]
    size, stream = fixture.config.get("stream", count * length), "stream" in fixture.config
    if len(tokens) < 2 * STEP_STRIDE + size + 1:
        raise ours.UserError(f"steps/tokens has {len(tokens)} tokens, fewer than three steps read")
    for step in range(3):
        span = tokens[step * STEP_STRIDE:][:size + 1]
        x, y = (part.view(1, -1) if stream else part.view(count, length) for part in (span[:-1], span[1:]))
        loss = model.loss(x, y, documents=fixture.documents(x[0]) if stream else None)
        loss.backward()
        for grad in [p.grad for p in model.parameters() if seed and p.numel()]:
            largest = grad.abs().amax(-1, keepdim=True) if grad.ndim else grad.abs()
            grad += (grad != 0) * ROUNDING_GRADIENT * largest * torch.randn(grad.shape, generator=noise)
        optimisers.step(plan)
        losses.append(loss.item())
    return losses, fixture.system.named({name: p.detach() for name, p in model.named_parameters()})


def evaluations(fixture: Fixture, section: str, plain: str, adapted: str):
    """The text of eval/tokens scored without and with learning from each scored chunk. `plain`, `adapted`: the keys of
    their nats per token and bits per byte in `expected`."""
    cfg, rt, tokens = fixture.settings(section), runtime(), fixture.tokens("eval/tokens").int()
    lora, length = cfg.ttt_mode == "lora", cfg.window
    if len(tokens) <= length:
        raise ours.UserError(f"eval/tokens is shorter than a window of {length}")
    if lora and cfg.ttt_chunk_tokens % length:
        raise ours.UserError(f"a chunk of {cfg.ttt_chunk_tokens} tokens is not whole sequences of {length}")
    if lora and not cfg.tie_embeddings:  # an untied head gets its addition, too
        cfg = dataclasses.replace(cfg, ttt_lora_targets=f"{cfg.ttt_lora_targets},head")
    tokens = tokens[:len(tokens) - (len(tokens) - 1 - length) % cfg.eval_stride]  # full windows only, as published
    val = text(fixture, tokens)

    @functools.cache
    def score(name: str, seed: int = 0) -> tuple[ours.EvalResult, ours.GPT]:
        model, adapts = fixture.model(cfg, seed), name == adapted
        adapter = started(ours.adapter_for(model, cfg, rt)) if adapts else None
        plan = ours.plan_evaluation(val, cfg, rt, cfg.eval_stride, cfg.eval_batch_seqs, adapts)
        return ours.evaluate(name, model.nll, val, cfg, rt, plan, adapter), model

    for name in (plain, adapted):
        result, model = score(name)
        yield Quantity(f"{name}, nats", f"{name}:0", result.loss, CLOSE, noisy=lambda seed: score(name, seed)[0].loss)
        if fixture.tokenizer and isinstance(fixture.expected[name], list):
            close = CLOSE_ADAPTED if lora and name == adapted else CLOSE
            yield Quantity(f"{name}, bits per byte", f"{name}:1", result.bpb, close,
                           noisy=lambda seed: score(name, seed)[0].bpb)
        if fixture.tokenizer and "bytes_scored" in fixture.expected:
            yield Quantity(f"{name}, bytes", "bytes_scored", result.bytes, 0)
        if name == adapted and not lora:
            weights = fixture.system.named({name: p.detach() for name, p in model.named_parameters()})
            yield Quantity("weights after ttt", "after_ttt/", weights, CLOSE_WEIGHTS, whole=False)


def text(fixture: Fixture, tokens: torch.Tensor, **more) -> ours.ValData:
    """Tokens to score, of one byte each if there is no tokenizer."""
    sizes = torch.ones_like(tokens)
    if fixture.tokenizer:
        sizes = torch.from_numpy(ours.token_bytes(fixture.tokenizer, tokens.numpy()))
    return ours.ValData(tokens, sizes, "", **more)


def started(adapter: ours.Adapter) -> ours.Adapter:
    """Low-rank additions get the fixtures' starting values, which need no random numbers."""
    for i, (a, _) in enumerate(adapter.pairs.values() if isinstance(adapter, ours.LoraAdapter) else ()):
        rank, width = a.shape[-2:]
        angle = 1 + 0.37 * torch.arange(rank * width, dtype=torch.float64).view(rank, width)
        if adapter.rows:
            start = torch.sin(angle + torch.arange(adapter.rows).view(-1, 1, 1)) / width ** 0.5
        else:
            start = torch.sin(angle) / rank
        adapter.initial[2 * i] = start.to(a)
        a.data.copy_(start)
    return adapter


# ---- the published systems -------------------------------------------------------------------------------------

BANKS = {"qo_bank": ("query", "out"), "kv_bank": ("key", "value"), "mlp_up_bank": ("up",), "mlp_down_bank": ("down",)}
BY_LAYER = {"query": "blocks.{}.attn.c_q", "key": "blocks.{}.attn.c_k", "value": "blocks.{}.attn.c_v",
            "out": "blocks.{}.attn.proj", "up": "blocks.{}.mlp.fc", "down": "blocks.{}.mlp.proj", "head": "lm_head"}


class System(NamedTuple):
    """How a published system's settings and parameters are called here, and what its fixtures hold."""

    profile: str           # profiles/NAME.env runs it and has every setting that the fixture does not give
    checks: tuple          # generators of Quantity
    settings: dict = {}    # our variables: what a fixture has otherwise than the profile
    defaults: dict = {}    # our variables: what the constructor takes where the caller does not say
    by_env: bool = False   # its settings are variables, `config.env`, not the arguments of its model, `config.model`
    arguments: dict = {}   # argument -> our variables, with spaces, where that is not the argument in capitals; or for
                           # each value that is known, our NAME=VALUE
    names: dict = {}       # beginning of our parameter's name -> of its; {} stands for the layer
    matrices: dict = {}    # kind of matrix -> its name, in a system without banks
    swapped: tuple = ()    # kinds of matrices where it has the halves of a head in the other order
    adapters: dict = {}    # kind of matrix -> its additions' name, {} for the visit, where that is not the matrix's
    unread: dict = {}      # a parameter that only the system has -> which of ours it is a copy of, if any

    def named(self, tensors: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Our tensors under the system's names: a bank as views of its matrices where the system has no banks."""
        found = {}
        for name, tensor in tensors.items():
            if name in BANKS and self.matrices:
                for kind, half in zip(BANKS[name], tensor.chunk(len(BANKS[name]))):
                    found |= {f"{self.matrices[kind].format(i)}.weight": matrix for i, matrix in enumerate(half)}
            else:
                found[self.rename(name)] = tensor
        return found

    def rename(self, name: str) -> str:
        layer = name.split(".")[1] if name.startswith("blocks.") else ""
        for begins, theirs in self.names.items():
            if name.startswith(begins.format(layer)):
                return theirs.format(layer) + name.removeprefix(begins.format(layer))
        return name

    def additions(self, pairs: dict) -> dict[str, torch.Tensor]:
        """The tensors of a LoraAdapter's pairs under the system's names."""
        names = self.adapters or {kind: f"{name}.lora_" for kind, name in self.matrices.items()}
        return {names[kind].format(layer) + side: tensor
                for (kind, layer), pair in pairs.items() for side, tensor in zip("AB", pair)}

    def is_swapped(self, name: str) -> bool:
        """Whether this array has the outputs of such a matrix as its rows."""
        stem, _, part = name.partition("/")[2].rpartition(".")
        return part in ("weight", "lora_B") and any(
            re.fullmatch(self.matrices[kind].format(r"\d+"), stem) for kind in self.swapped)


# Entries of a fixture's configuration and of its sections, `model` excepted -> our variables.
SECTIONS = {
    "": {"seq_len": "TRAIN_SEQ_LEN", "lora_rank": "TTT_LORA_RANK", "complement_alpha": "COMPLEMENT_ALPHA"},
    "optim": {"matrix_lr": "MATRIX_LR", "wd": "MUON_WD", "clip": "GRAD_CLIP_NORM"},
    "eval": {"seq_len": "TRAIN_SEQ_LEN EVAL_SEQ_LEN", "stride": "EVAL_STRIDE", "chunk": "TTT_CHUNK_TOKENS",
             "lr": "TTT_LR", "epochs": "TTT_EPOCHS", "batch_seqs": "TTT_BATCH_SEQS"},
    "ttt": {"seq_len": "TRAIN_SEQ_LEN EVAL_SEQ_LEN EVAL_STRIDE", "chunk": "TTT_CHUNK_TOKENS", "rank": "TTT_LORA_RANK",
            "lr": "TTT_LORA_LR", "epochs": "TTT_EPOCHS"},
}
NO_STRETCH = {"ROPE_TRAIN_SEQ_LEN": "0"}  # the rotary base is the same at any length

PR1092 = System(
    "pr1092", (functools.partial(rows, group="batch", train=True), steps,
               functools.partial(evaluations, section="eval", plain="sliding", adapted="ttt")),
    defaults={"BIGRAM_VOCAB_SIZE": "0", "BIGRAM_DIM": "128", "XSA_LAST_N": "0", "ROPE_DIMS": "0", "LN_SCALE": "0",
              "DTG_ENABLED": "0", "VE_ENABLED": "0", "VE_DIM": "128", "VE_LAYERS": "9,10", "GATED_ATTENTION": "0",
              "VALUE_RESIDUAL": "0", "MTP_NUM_HEADS": "0", "MTP_LOSS_WEIGHT": "0.1"},
    arguments={"dtg": "DTG_ENABLED"}, unread={"blocks.0.attn.vr_lambda": ""})
PR1216 = System(
    "pr1216_banked", (rows,), NO_STRETCH | {"TRIGRAM_VOCAB_SIZE": "0"},  # its trigrams have another hash than PR 1092's
    defaults={"BIGRAM_VOCAB_SIZE": "0", "BIGRAM_DIM": "128", "ROPE_DIMS": "0", "LN_SCALE": "0", "XSA_LAST_N": "0",
              "VALUE_EMBED_LAYERS": "0", "VALUE_EMBED_DIM": "64"})
PR1254 = System(
    "pr1254_sp8192_lora", (rows, low_rank), NO_STRETCH | {"TTT_RESET": "stream"},  # one addition for all rows
    arguments={"dim": "MODEL_DIM", "n_layers": "NUM_LAYERS XSA_LAST_N", "n_heads": "NUM_HEADS",
               "n_kv_heads": "NUM_KV_HEADS", "window_size": "ATTENTION_WINDOW", "max_seq_len": ""},
    names={"blocks.{}.attn_norm.": "layers.{}.norm1.", "blocks.{}.mlp_norm.": "layers.{}.norm2.",
           "final_norm.": "norm."},
    matrices={"query": "layers.{}.attn.wq", "key": "layers.{}.attn.wk", "value": "layers.{}.attn.wv",
              "out": "layers.{}.attn.wo", "up": "layers.{}.mlp.w1", "down": "layers.{}.mlp.w2", "head": "head"},
    swapped=("query", "key"),  # it rotates the other way
    unread={"head.weight": "tok_emb.weight"})
SYSTEMS = {  # `config.source` of a fixture -> how to read it
    "PR 1092": PR1092,
    "PR 1216, 12L INT4": PR1216._replace(profile="pr1216_int4_ve", matrices=BY_LAYER),
    "PR 1216, 12L banked": PR1216,
    "PR 1216, 13L INT4 attention": PR1216._replace(profile="pr1216_13l_int4_attn", matrices=BY_LAYER),
    "PR 1216, 11L INT6 XSA-all": PR1216._replace(profile="pr1216_int6_xsa_all", matrices=BY_LAYER),
    "PR 1216, banked GPTQ variant": PR1216._replace(profile="pr1216_gptq"),
    "PR 550 v8": System(
        "pr550_lora_ttt",
        (functools.partial(rows, has_logits=False),
         functools.partial(evaluations, section="ttt", plain="unadapted_loss", adapted="lora_ttt")),
        NO_STRETCH, names={"bigram.": "bigram_hash.", "smear.": "smear_gate."}, matrices=BY_LAYER),
    "PR 550 v10": PR1092._replace(profile="pr550_mtp_small_batch", checks=(rows, heads, complement)),
    "PR 1254": PR1254,
    "PR 1855": System(
        "pr1855", (streams, steps, side_by_side, documents, phases), NO_STRETCH | {"TTT_WARM_CHAINS": "1"}, by_env=True,
        arguments={"SMEAR_GATE_ENABLED": {0: "SMEAR_GATE=off", 1: "SMEAR_GATE=window"}, "ROPE_YARN": {0: ""},
                   "TTT_GRAD_STEPS": "TTT_EPOCHS",
                   **dict.fromkeys(("ROPE_TRAIN_SEQ_LEN", "FUSED_CE_ENABLED", "GLOBAL_TTT_BATCH_SEQS"), "")},
        names={"lane_keeps": "parallel_resid_lambdas", "lane_takes": "parallel_post_lambdas",
               "smear.scale": "smear_lambda", "smear.gate.": "smear_gate.",
               "blocks.{}.attn.sparse_gate.weight": "blocks.{}.attn.attn_gate_w"},
        adapters={"query": "q_loras.{}.", "key": "k_loras.{}.", "value": "v_loras.{}.", "out": "o_loras.{}.",
                  "down": "mlp_loras.{}.", "head": "lm_head_lora."}),
}


# ---- reading a fixture -----------------------------------------------------------------------------------------

class Fixture:
    """A fixture's settings and arrays. Whatever is wrong with them raises UserError."""

    def __init__(self, folder: Path, tokenizer: Path | None = None):
        self.folder, self.tokenizer_path, self.notes = folder, tokenizer, []
        try:
            stored = json.loads((folder / "fixture.json").read_text(encoding="utf-8"), parse_constant=refuse_constant)
            with np.load(folder / "fixture.npz", allow_pickle=False) as arrays:
                self.arrays = {name: arrays[name] for name in arrays.files}
        except OSError as error:
            raise ours.UserError(f"cannot read {error.filename or folder}: {error.strerror or error}") from None
        except Exception as error:  # numpy and zipfile raise many kinds for a damaged file
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ours.UserError(f"{folder} holds no parity fixture ({reason})") from None
        for name in ("config", "expected"):
            if not isinstance(stored, dict) or not isinstance(stored.get(name), dict):
                raise ours.UserError(f"{folder / 'fixture.json'} lacks {name}")
        self.config, self.expected = stored["config"], stored["expected"]
        source = self.config.get("source", "PR 1092")  # the first fixture does not say
        if source not in SYSTEMS:
            raise ours.UserError(f"unknown source {source!r} (known: {'; '.join(SYSTEMS)})")
        self.source, self.system = source, SYSTEMS[source]
        for name, array in self.arrays.items():
            if array.dtype.kind not in "fiu":
                raise ours.UserError(f"{name} holds no numbers but {array.dtype}")
            if not np.isfinite(array).all():
                raise ours.UserError(f"{name} holds numbers that are not finite")

    def array(self, name: str) -> torch.Tensor:
        if name not in self.arrays:
            raise ours.UserError(f"the fixture lacks {name}")
        array = torch.from_numpy(self.arrays[name].astype(np.float64 if self.arrays[name].dtype.kind == "f" else int))
        head_dim = self.settings().head_dim if self.system.is_swapped(name) else 0
        return swap_halves(array, head_dim) if head_dim and len(array) % head_dim == 0 else array

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The arrays PREFIX/NAME by NAME, but for what the system has and ours does not read."""
        found = {name[len(prefix):]: self.array(name) for name in self.arrays if name.startswith(prefix)}
        if not found:
            raise ours.UserError(f"the fixture lacks {prefix}*")
        for name, original in self.system.unread.items():
            copy = found.pop(name, None)
            if copy is not None and original in found and not torch.equal(copy, found[original]):
                raise ours.UserError(f"{prefix}{name} is not {prefix}{original}, as the system has it")
        return found

    def tokens(self, name: str) -> torch.Tensor:
        """Token ids, checked against the vocabulary."""
        ids, vocab = self.array(name), self.settings().vocab_size
        if ids.is_floating_point() or not ids.numel() or ids.min() < 0 or ids.max() >= vocab:
            raise ours.UserError(f"{name} does not hold tokens of a vocabulary of {vocab}")
        return ids

    def rows(self, group: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets [batch, tokens]; a flat stream as one row."""
        x, y = self.tokens(f"{group}/x"), self.tokens(f"{group}/y")
        if x.ndim not in (1, 2) or x.shape != y.shape:
            raise ours.UserError(f"{group}/x and y have the shapes {list(x.shape)} and {list(y.shape)}, not both "
                                 "[batch, tokens]")
        return torch.atleast_2d(x), torch.atleast_2d(y)

    def documents(self, ids: torch.Tensor) -> ours.Documents:
        """A document of a flat stream begins with BOS, and again after TRAIN_SEQ_LEN tokens."""
        longest = self.settings().train_seq_len
        return ours.Documents(torch.from_numpy(ours.document_starts(ids.numpy(), ours.BOS_ID, longest)), longest)

    def variables(self, section: str = "") -> dict[str, str]:
        """Our variables for what the fixture says of the model and in a section of its configuration."""
        own = {name: f.name.upper() for f in dataclasses.fields(ours.Hyperparameters) for name in ours.env_names(f)
               if name != f.metadata["group"]}
        given, by_env = [*self.system.defaults.items()], self.system.by_env
        given += [] if by_env else self.config.get("env", {}).items()
        for argument, value in self.config["env" if by_env else "model"].items():
            meant = self.system.arguments.get(argument, argument.upper())
            if isinstance(meant, dict):
                if value not in meant:
                    known = " or ".join(map(str, meant))
                    raise ours.UserError(f"{argument}={value}: {self.source} is only known with {known}")
                meant, _, value = meant[value].partition("=")
            given += [(name, value) for name in meant.split()]
        for part in dict.fromkeys(("", section)):
            values = self.config[part] if part else self.config
            given += [(variable, values[name]) for name, variables in SECTIONS[part].items()
                      for variable in variables.split() if (part or name in values) and not by_env]
        unknown = [name for name, _ in given if name not in own]
        if unknown:
            raise ours.UserError(f"the fixture's setting {unknown[0]} is unknown here")
        found = {own[name]: str(int(value)) if isinstance(value, bool) else str(value) for name, value in given}
        return found | {"TRAIN_BATCH_TOKENS": found["TRAIN_SEQ_LEN"]}

    def settings(self, section: str = "") -> ours.Hyperparameters:
        """Our settings for the model and a section of the configuration."""
        given, fixed = self.variables(section), self.system.settings
        for name in set(given) & set(fixed):
            if given[name] != fixed[name]:
                raise ours.UserError(f"{name}={given[name]}: {self.source} is only known with {fixed[name]}")
        variables = profiles.load(self.system.profile).values | given | fixed | {"DEVICE": "cpu", "DTYPE": "fp32"}
        if int(variables.get("ATTENTION_WINDOW", 0)) >= int(variables["TRAIN_SEQ_LEN"]):
            variables["ATTENTION_WINDOW"] = "0"  # a window of the whole sequence masks nothing
        return ours.Hyperparameters.from_env(variables)

    def model(self, cfg: ours.Hyperparameters, seed: int = 0) -> ours.GPT:
        """Our model with the fixture's initial weights; with a seed, and noise of rounding size in them."""
        model, noise = ours.GPT(cfg), torch.Generator().manual_seed(seed)
        self.fill("w/", self.system.named(dict(model.named_parameters())))
        with torch.no_grad():
            for p in model.parameters() if seed else ():
                p.mul_(1 + ROUNDING_WEIGHT * torch.randn(p.shape, generator=noise))
        return model

    @torch.no_grad()
    def fill(self, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
        """Copy the arrays PREFIX/NAME into our tensors, every one into its own."""
        arrays = self.group(prefix)
        compare_names(prefix, tensors, arrays)
        for name, array in arrays.items():
            tensors[name].copy_(same_shape(prefix + name, array, tensors[name]))

    def wanted(self, quantity: Quantity):
        """What the fixture holds of it: a number, a tensor or tensors by name."""
        key, got = quantity.key, quantity.got
        if key.endswith("/"):
            arrays = self.group(key)
            compare_names(key, {n: t for n, t in got.items() if t is not None or n in arrays}, arrays, quantity.whole)
            return arrays
        if "/" in key:
            return self.array(key)
        name, _, place = key.partition(":")
        if name not in self.expected:
            raise ours.UserError(f"the fixture lacks expected.{name}")
        value = self.expected[name]
        if place:
            value = value[place] if isinstance(value, dict) else np.ravel(value)[int(place)]
        value = torch.tensor(value, dtype=torch.float64)
        if not value.isfinite().all():
            raise ours.UserError(f"expected.{name} is not finite")
        return value

    @functools.cached_property
    def tokenizer(self):
        """What tells the bytes of tokens; None, with a note, where the usual tokenizer is not there or another one."""
        folder = self.folder.resolve()
        places = [place / "data" / TOKENIZER for place in (*folder.parents, ROOT.parent / "shared")]
        path = self.tokenizer_path or next(filter(Path.is_file, places), places[0])
        try:
            return ours.open_tokenizer(dataclasses.replace(self.settings(), tokenizer_path=str(path)))[0]
        except (ours.UserError, ImportError) as error:
            if self.tokenizer_path:
                raise ours.UserError(str(error)) from None
            self.notes.append(f"bytes are not compared, only nats ({error}); --tokenizer names the model")
            return None


def refuse_constant(text: str):
    raise ValueError(f"{text} is not a number of a fixture")


def swap_halves(array: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of heads with the two halves of each head exchanged."""
    return array.unflatten(0, (-1, 2, head_dim // 2)).flip(1).flatten(0, 2)


def compare_names(prefix: str, ours_has: dict, theirs: dict, whole: bool = True) -> None:
    """Raise UserError unless both have the same names; one of our empty tensors may be left out."""
    needed = {name for name, tensor in ours_has.items() if tensor is None or tensor.numel()} if whole else set()
    absent, extra = sorted(needed - set(theirs)), sorted(set(theirs) - set(ours_has))
    for word, names in (("lacks", absent), ("has", extra)):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            end = "" if word == "lacks" else ", which the system described has not"
            raise ours.UserError(f"the fixture {word} {prefix}{names[0]}{more}{end}")


def same_shape(name: str, wanted: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """`wanted`, if it has the shape of `got`. Raises UserError."""
    if got.shape != wanted.shape:
        raise ours.UserError(f"{name} has shape {list(wanted.shape)} where {list(got.shape)} belongs")
    return wanted


def runtime() -> ours.Runtime:
    """One process on the CPU in fp32 that writes nothing."""
    return ours.Runtime(rank=0, world_size=1, device=torch.device("cpu"), dtype=torch.float32, compiles=False,
                        attention="flash", attend=ours.attend_sdpa, run_id="parity", folder=Path(),
                        log=ours.RunLog(Path(), "parity", active=False))


# ---- comparing -------------------------------------------------------------------------------------------------

class Verdict(NamedTuple):
    """How far a quantity is from the published one."""

    name: str
    off: float         # largest difference
    tolerance: float
    agrees: bool
    tensor: str = ""   # where it is, of several
    note: str = ""     # how many tensors, and what rounding excuses

    @property
    def strain(self) -> float:
        """Difference over tolerance."""
        return self.off / self.tolerance if self.tolerance else math.inf if self.off else 0.0

    def line(self) -> str:
        return (f"{self.name:<28} {self.off:10.2e}   at most {self.tolerance:.0e}   "
                f"{'ok' if self.agrees else 'FAIL':<4}   {self.tensor}{self.note}").rstrip()


def difference(got: torch.Tensor | None, wanted: torch.Tensor) -> torch.Tensor:
    """|got - wanted|, entry by entry; infinite where ours is NaN. What we lack counts as zeros."""
    got = torch.zeros_like(wanted) if got is None else got.detach()
    return (got.double() - wanted.double()).abs().nan_to_num(nan=math.inf)


def compare(quantity: Quantity, wanted) -> Verdict:
    """The worst entry of all tensors of a quantity. Raises UserError on unequal shapes."""
    several = isinstance(quantity.got, dict)
    got = quantity.got if several else {quantity.key: torch.as_tensor(quantity.got, dtype=torch.float64)}
    worst, past = {}, {}
    for name, expected in (wanted if several else {quantity.key: wanted}).items():
        if got[name] is not None:
            same_shape((quantity.key if several else "") + name, expected, got[name])
        size = (expected.abs().max() or 1.0) if quantity.relative and expected.numel() else 1.0
        off = difference(got[name], expected) / size
        worst[name] = off.max().item() if off.numel() else 0.0
        if worst[name] > quantity.tolerance:
            past[name] = off, size
    name = max(worst, key=worst.get)
    excused, notes = not past, [f"of {len(worst)}"] if several else []
    if past and quantity.noisy:
        noisy = [quantity.noisy(seed) for seed in range(1, 5)]
        noisy = noisy if several else [{quantity.key: torch.as_tensor(value)} for value in noisy]
        slack = {n: 4 * torch.stack([difference(other[n], got[n].detach()) for other in noisy]).amax(0) / past[n][1]
                 for n in past if got[n] is not None}
        excused = all(n in slack and bool((off - slack[n] <= quantity.tolerance).all()) for n, (off, _) in past.items())
        if excused:
            count = sum(int((off > quantity.tolerance).sum()) for off, _ in past.values())
            notes.append(f"rounding decides {count} of the entries")
    return Verdict(quantity.name, worst[name], quantity.tolerance, excused, name if several else "",
                   ", ".join([""] * several + notes))


def verdicts(fixture: Fixture):
    """Every quantity of the fixture's system, compared."""
    try:
        for check in fixture.system.checks:
            for quantity in check(fixture):
                yield compare(quantity, fixture.wanted(quantity))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ours.UserError(f"{fixture.folder} is not a whole fixture: {reason}") from None


def check_one(folder: Path, tokenizer: Path | None) -> int:
    """One line per quantity; the exit code."""
    fixture, found = Fixture(folder, tokenizer), []
    for verdict in verdicts(fixture):
        found.append(verdict)
        print(verdict.line())
    for note in fixture.notes:
        print(f"note: {note}")
    print(f"{fixture.source}: {summary(found)}")
    return int(not all(verdict.agrees for verdict in found))


def check_text(folder: Path, documents: Path | None) -> int:
    """One line per kind of comparison of a text fixture; the exit code."""
    try:
        lines = parity_text.compare(folder, documents)
    except (parity_text.prepare.UserError, OSError) as error:
        raise ours.UserError(str(error)) from None
    for line in lines:
        print(line.text())
    print(f"CaseOps: {parity_text.summary(lines)}")
    return int(any(line.agree < line.of for line in lines))


def check_all(folder: Path, tokenizer: Path | None, out: Path | None = None) -> int:
    """One line per fixture below the folder; the highest exit code. `out`: a JSON file for the result of each profile
    whose fixtures agree, which README's table of systems shows."""
    folders, codes, held = sorted({path.parent for path in folder.rglob("fixture.json")}), [0], {}
    texts = sorted(path.parent for path in folder.rglob("cases.json"))
    if not folders + texts:
        raise ours.UserError(f"there is no fixture.json below {folder}")
    for each in texts:
        try:
            lines = parity_text.compare(each)
            codes.append(int(any(line.agree < line.of for line in lines)))
            line = f"{'FAIL' if codes[-1] else 'ok':<5} CaseOps: {parity_text.summary(lines)}"
        except parity_text.prepare.UserError as error:
            line = f"error {error}"
            codes.append(2)
        print(f"{each.relative_to(folder)!s:<40} {line}", flush=True)
    for each in folders:
        try:
            fixture = Fixture(each, tokenizer)
            found = list(verdicts(fixture))
            codes.append(int(not all(verdict.agrees for verdict in found)))
            line = f"{'FAIL' if codes[-1] else 'ok':<5} {fixture.source}: {summary(found)}"
            line += "" if fixture.tokenizer else "; only nats, no bytes"
            if not codes[-1]:
                worst = max(found, key=lambda verdict: verdict.strain)
                held[fixture.system.profile] = f"{worst.name} {worst.off:.1e}"
        except ours.UserError as error:
            line = f"error {error}"
            codes.append(2)
        print(f"{each.relative_to(folder)!s:<40} {line}", flush=True)
    if out:
        ours.write_atomically(out, (json.dumps(held, indent=1) + "\n").encode())
    return max(codes)


def summary(found: list[Verdict]) -> str:
    """How many agree, and the one that comes closest to its tolerance or exceeds it most."""
    worst = max(found, key=lambda verdict: (not verdict.agrees, verdict.strain))
    where = f" in {worst.tensor}" if worst.tensor else ""
    return (f"{sum(verdict.agrees for verdict in found)} of {len(found)} agree; worst is {worst.name}: "
            f"{worst.off:.1e} of {worst.tolerance:.0e}{where}")


@one_line_errors
def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where fixture.json and fixture.npz are")
    parser.add_argument("--all", action="store_true", help="check every fixture below FOLDER")
    parser.add_argument("--tokenizer", type=Path, metavar="MODEL",
                        help=f"SentencePiece model (default: data/{TOKENIZER} in a folder above FOLDER)")
    parser.add_argument("--text", type=Path, metavar="DOCS", help="a text fixture: compare the totals of this .jsonl")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --all: write each profile's largest difference")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the sums are small: more threads cost more than they bring
    if args.all:
        return check_all(args.folder, args.tokenizer, args.out)
    if args.text or (args.folder / "cases.json").is_file():
        return check_text(args.folder, args.text)
    return check_one(args.folder, args.tokenizer)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
