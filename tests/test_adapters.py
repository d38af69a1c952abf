"""Test-time training: adapters against slow obvious loops, documents side by side, ranks, the clock, refusals."""
import dataclasses
import math

import pytest
import torch
import train_gpt as tg
from conftest import environment, make_runtime, scrambled, walks_on_two_ranks
from test_evaluation import LORA, MODES, Scores, reference_ttt, score, setting  # noqa: F401  (a fixture)
from torch.nn import functional as F

DOCUMENT = {**LORA, "ttt_reset": "document", "ttt_batch_docs": 3, "ttt_doc_chunk_tokens": 12}


def with_documents(val, starts, length=320):
    """The validation text cut to `length`, with documents beginning at 0 and at `starts` and nowhere else."""
    tokens = val.tokens[:length].clone()
    tokens[tokens == val.bos_id] = val.bos_id + 7
    tokens[[0, *starts]] = val.bos_id
    return dataclasses.replace(val, tokens=tokens)


def weights_with_additions(model, pairs, scale):
    """(parameters, output matrix) in which every addition is simply added."""
    named, layers = dict(model.named_parameters()), model.cfg.num_layers
    banks = {name: list(named[name]) for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank")}
    head = model.tok_emb.weight
    for (kind, layer), (a, b) in pairs.items():
        if kind == "head":
            head = head + scale * b @ a
            continue
        bank, offset = {"query": ("qo_bank", 0), "out": ("qo_bank", layers), "key": ("kv_bank", 0),
                        "value": ("kv_bank", layers), "up": ("mlp_up_bank", 0), "down": ("mlp_down_bank", 0)}[kind]
        banks[bank][layer + offset] = banks[bank][layer + offset] + scale * b @ a
    return {name: torch.stack(banks[name]) if name in banks else p for name, p in named.items()}, head


class Trunk(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model.hidden(ids)


def reference_documents(cfg, model, val):
    """Scores, one document after another, each with its own additions, its own optimiser and plain autograd."""
    adapter = tg.LoraAdapter(model, cfg, make_runtime("."))
    scale, trunk = (cfg.ttt_lora_alpha or cfg.ttt_lora_rank) / cfg.ttt_lora_rank, Trunk(model)
    tokens, chunk, scores = val.tokens.long(), cfg.ttt_doc_chunk_tokens, []
    bounds = sorted({0, *(tokens[:-1] == val.bos_id).nonzero().flatten().tolist(), len(tokens) - 1})
    for first, stop in zip(bounds, bounds[1:]):
        pairs = {key: [t[0].detach().clone().requires_grad_() for t in pair] for key, pair in adapter.pairs.items()}
        groups = [{"params": pair, "lr": cfg.ttt_lora_lr * cfg.lora_layer_rates.get(layer, 1.0)}
                  for (_, layer), pair in pairs.items()]
        params = [t for pair in pairs.values() for t in pair]
        optimiser = (torch.optim.Adam(groups, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=cfg.ttt_adam_eps)
                     if cfg.ttt_lora_optimizer == "adam" else torch.optim.SGD(groups, momentum=cfg.ttt_momentum))
        for low in range(first, stop, chunk):
            high, start = min(low + chunk, stop), max(first, low + chunk - cfg.window)

            def nll():
                named, head = weights_with_additions(model, pairs, scale)
                named = {f"model.{name}": p for name, p in named.items()}
                hidden = torch.func.functional_call(trunk, named, tokens[None, start:high])
                logits = tg.capped_logits(hidden[0, low - high:], head, cfg.logit_softcap)
                return F.cross_entropy(logits, tokens[low + 1:high + 1], reduction="none")
            with torch.no_grad():
                scores.append(nll())
            for _ in range(cfg.ttt_epochs if high < stop and low - first + chunk >= cfg.ttt_min_doc_tokens else 0):
                optimiser.zero_grad()
                nll().mean().backward()
                torch.nn.utils.clip_grad_norm_(params, cfg.ttt_grad_clip)
                optimiser.step()
    return torch.cat(scores)


class SlowStream:
    """Score, then learn, along the whole text: one window after another, one matrix after another, plain autograd, and
    the optimisers written out."""

    def __init__(self, cfg, model, rt):
        self.cfg, self.model, self.trunk, self.lora = cfg, model, Trunk(model), cfg.ttt_mode == "lora"
        if self.lora:
            born = tg.LoraAdapter(model, cfg, rt).pairs
            self.pairs = {key: [t.detach().clone().requires_grad_() for t in pair] for key, pair in born.items()}
            self.moving = [(cfg.lora_layer_rates.get(layer, 1.0), t) for (_, layer), p in self.pairs.items() for t in p]
        else:
            self.params = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
            adamw = cfg.ttt_optimizer == "adamw"
            rates = {"mlp_down_bank": cfg.ttt_proj_lr_mult if cfg.ttt_proj_lr_mult >= 0 else 3.0 if adamw else 1.0,
                     "mlp_up_bank": cfg.ttt_fc_lr_mult if cfg.ttt_fc_lr_mult >= 0 else 0.5 if adamw else 1.0}
            self.moving = [(rates.get(name, 1.0), p) for name, p in self.params.items()]
        self.average = [t.detach().clone() for _, t in self.moving]
        self.first, self.second = ([torch.zeros_like(t) for t in self.average] for _ in range(2))
        self.steps = 0

    def logits(self, ids, keep):
        """Of the last `keep` positions.  # [rows, keep, vocab]"""
        cfg = self.cfg
        if self.lora:
            scale = (cfg.ttt_lora_alpha or cfg.ttt_lora_rank) / cfg.ttt_lora_rank
            named, head = weights_with_additions(self.model, self.pairs, scale)
        else:
            named, frozen = dict(self.params), cfg.ttt_freeze_blocks
            for name in named:
                if name.endswith("_bank"):
                    named[name] = torch.stack([matrix.detach() if i % cfg.num_layers < frozen else matrix
                                               for i, matrix in enumerate(named[name])])
                elif name.startswith(tuple(f"blocks.{i}." for i in range(frozen))):
                    named[name] = named[name].detach()
            head = named["tok_emb.weight"]
        hidden = torch.func.functional_call(self.trunk, {f"model.{n}": p for n, p in named.items()}, ids)
        return tg.capped_logits(hidden[:, -keep:], head, cfg.logit_softcap)

    def step(self, lr):
        cfg = self.cfg
        optimiser = cfg.ttt_lora_optimizer if self.lora else cfg.ttt_optimizer
        beta1, beta2, eps = (cfg.ttt_beta1, cfg.ttt_beta2, cfg.ttt_adam_eps) if self.lora else (0.9, 0.999, 1e-8)
        grads = [t.grad if t.grad is not None else torch.zeros_like(t) for _, t in self.moving]
        norm = sum(g.double().square().sum() for g in grads) ** 0.5
        self.steps += 1
        with torch.no_grad():
            for i, (rate, t) in enumerate(self.moving):
                g = grads[i] * (min(1.0, cfg.ttt_grad_clip / norm) if cfg.ttt_grad_clip else 1.0)
                if optimiser == "sgd":
                    self.first[i] = cfg.ttt_momentum * self.first[i] + g
                    t -= lr * rate * self.first[i]
                else:
                    self.first[i] = beta1 * self.first[i] + (1 - beta1) * g
                    self.second[i] = beta2 * self.second[i] + (1 - beta2) * g * g
                    mean, square = self.first[i] / (1 - beta1 ** self.steps), self.second[i] / (1 - beta2 ** self.steps)
                    t *= 1 - lr * rate * (cfg.ttt_weight_decay if self.lora else 0.0)
                    t -= lr * rate * mean / (square.sqrt() + eps)
                t.grad = None
                self.average[i] = cfg.ttt_polyak_decay * self.average[i] + (1 - cfg.ttt_polyak_decay) * t

    def learn(self, tokens, progress):
        """tokens: a chunk and the one before it."""
        cfg, length = self.cfg, self.cfg.train_seq_len
        rows = [(tokens[j:j + length], tokens[j + 1:j + length + 1])
                for j in range(0, len(tokens) - length, length)]
        lr = (cfg.ttt_lora_lr if self.lora else cfg.ttt_lr) * 0.5 * (1 + math.cos(math.pi * progress))
        for _ in range(cfg.ttt_epochs):
            for start in range(0, len(rows), cfg.ttt_batch_seqs):
                x, y = map(torch.stack, zip(*rows[start:start + cfg.ttt_batch_seqs]))
                F.cross_entropy(self.logits(x, length).flatten(0, 1), y.flatten()).backward()
                self.step(lr)

    def walk(self, val, stride):
        """Scores of all targets, each window with the weights there are when its first target's chunk begins."""
        cfg, tokens, scores, learnt = self.cfg, val.tokens.long(), [], 0
        targets, chunk = len(tokens) - 1, cfg.ttt_chunk_tokens
        chunks = -(-targets // chunk)
        while len(scores) < targets:
            low = len(scores)
            while low >= (learnt + 1) * chunk:
                self.learn(tokens[learnt * chunk:(learnt + 1) * chunk + 1], learnt / (chunks - 1))
                learnt += 1
            end = min(low + stride if low else cfg.window, targets)
            own = [t.detach().clone() for _, t in self.moving]
            with torch.no_grad():
                if cfg.ttt_polyak_decay:
                    for (_, t), mean in zip(self.moving, self.average):
                        t.copy_(mean)
                logits = self.logits(tokens[None, end - cfg.window:end], end - low)[0] / cfg.ttt_temp
                scores += F.cross_entropy(logits, tokens[low + 1:end + 1], reduction="none").tolist()
                for (_, t), kept in zip(self.moving, own):
                    t.copy_(kept)
        return torch.tensor(scores)


FREE = {"ttt_grad_clip": 0.0, "ttt_lr": 0.02}  # a clipped step hides what the gradient was divided by
STREAMS = {
    "rest of a batch": (32, {**FREE, "ttt_chunk_tokens": 128, "ttt_batch_seqs": 3, "ttt_epochs": 2}),
    "rest of a chunk": (8, {**FREE, "ttt_chunk_tokens": 100, "ttt_batch_seqs": 2, "ttt_momentum": 0.5}),
    "clipped": (8, {"ttt_grad_clip": 0.05, "ttt_chunk_tokens": 96, "ttt_lr": 0.3, "ttt_batch_seqs": 2}),
    "micro-batches": (8, {**FREE, "ttt_chunk_tokens": 160, "micro_batch_tokens": 64, "ttt_batch_seqs": 5}),
    "frozen, rates": (7, {**FREE, "ttt_chunk_tokens": 96, "ttt_freeze_blocks": 1, "ttt_proj_lr_mult": 2.0,
                          "ttt_fc_lr_mult": 0.25}),
    "adamw": (8, {"ttt_optimizer": "adamw", "ttt_lr": 0.002, "ttt_chunk_tokens": 96, "ttt_batch_seqs": 2}),
    "polyak, temperature": (8, {**FREE, "ttt_polyak_decay": 0.6, "ttt_temp": 1.3, "ttt_chunk_tokens": 96}),
    "lora": (8, {**LORA, "ttt_lora_optimizer": "adam", "ttt_chunk_tokens": 96, "ttt_weight_decay": 0.5,
                 "ttt_adam_eps": 1e-3,
                 "ttt_lora_alpha": 4.0, "ttt_batch_seqs": 2, "ttt_lora_lr": 0.02}),
    "lora, sgd": (16, {**LORA, "ttt_lora_optimizer": "sgd", "ttt_lora_lr": 0.2, "ttt_lora_layers": "0,2",
                       "ttt_lora_targets": "q,v,mlp", "ttt_lora_layer_rates": "2:0.3", "ttt_chunk_tokens": 64,
                       "ttt_grad_clip": 0.0, "ttt_batch_seqs": 3, "ttt_epochs": 1})}


@pytest.mark.parametrize("kind", STREAMS)
def test_scores_of_a_stream_are_those_of_the_plain_loop(setting, rt, kind):
    stride, changes = STREAMS[kind]
    cfg, val, model = setting
    val = dataclasses.replace(val, tokens=val.tokens[:330])
    cfg = dataclasses.replace(cfg, **changes)
    _, nll = score(cfg, val, model(), stride, changes, rt)
    wanted = SlowStream(cfg, model(), rt).walk(val, stride)
    torch.testing.assert_close(nll, wanted, atol=1e-4, rtol=1e-4)
    still = score(cfg, val, model(), stride, {**changes, "ttt_lr": 0.0, "ttt_lora_lr": 0.0}, rt)[1]
    assert (nll - still)[cfg.ttt_chunk_tokens:].abs().max() > 1e-2, "else it shows nothing"


@pytest.mark.parametrize("changes", [
    DOCUMENT,
    {**DOCUMENT, "ttt_lora_optimizer": "sgd", "ttt_lora_lr": 0.1, "ttt_lora_alpha": 4.0, "ttt_min_doc_tokens": 30},
    {**DOCUMENT, "ttt_lora_targets": "q,v", "ttt_lora_layers": "0,2", "ttt_lora_layer_rates": "2:0.3", "ttt_epochs": 1},
    {**DOCUMENT, "ttt_doc_chunk_tokens": 32, "ttt_batch_docs": 9},
    {**DOCUMENT, "ttt_min_doc_tokens": 24}], ids=["adam", "sgd", "layers", "wide", "from two chunks on"])
def test_documents_side_by_side_are_documents_one_by_one(setting, rt, changes):
    cfg, val, model = setting
    val = with_documents(val, [1, 2, 30, 90, 100, 190, 290, 291])
    cfg = dataclasses.replace(cfg, **changes)
    _, nll = score(cfg, val, model(), 8, changes, rt)
    torch.testing.assert_close(nll, reference_documents(cfg, model(), val), atol=5e-5, rtol=1e-5)
    assert (nll - score(cfg, val, model(), 8, {**changes, "ttt_lora_lr": 0.0}, rt)[1]).abs().max() > 1e-2


WARM = {**DOCUMENT, "ttt_lora_parallel": True, "ttt_warm_start_a": True, "ttt_warm_chains": 2, "ttt_eval_seq_len": 40,
        "ttt_chunk_ladder": "25:4,60:7", "ttt_epochs": 1, "ttt_lora_lr": 0.02, "ttt_local_lr_mult": 1.5,
        "ttt_beta1": 0.0, "ttt_weight_decay": 0.5, "ttt_lora_alpha": 9.0, "rope_train_seq_len": 0}
STARTS = [1, 3, 21, 22, 45, 67, 90, 113, 150, 210, 290, 291, 315]  # 14 documents in 320 tokens: batches of 3 and one of 2


def plain_additions(model, scale, pairs):
    """A context in which every addition, all of them beside attention and MLP, is a plain sum at the place it is for."""
    block_mlps = [block.mlp for block in model.blocks]

    def beside(name, layer, x):
        a, b = pairs[name, layer]
        return scale * x @ a.T @ b.T

    def after_attention(layer, args, out):
        return out[0] + beside("out", layer, args[0])[:, -out[0].size(1):], out[1]
    handles = [block.attn.register_forward_hook(lambda m, args, out, layer=i: after_attention(layer, args, out))
               for i, block in enumerate(model.blocks)]
    for i, block in enumerate(model.blocks):
        block.mlp = lambda x, w, i=i: block_mlps[i](x, w) + beside("down", i, x)

    def undo():
        for handle, block in zip(handles, model.blocks):
            handle.remove()
            del block.mlp
    return undo


def reference_chains(cfg, model, val, batches=None):
    """Scores by target with warm first factors: chain by chain, row by row, plain sums, Adam written out. batches: of
    documents; otherwise all of the text."""
    adapter = tg.LoraAdapter(model, cfg, make_runtime("."))
    fresh = {key: [t[0].detach().clone() for t in pair] for key, pair in adapter.pairs.items()}
    tokens, scores = val.tokens.long(), torch.zeros(len(val.tokens) - 1)
    bounds = sorted({0, *(tokens[:-1] == val.bos_id).nonzero().flatten().tolist(), len(tokens) - 1})
    documents = sorted(zip(bounds, bounds[1:]), key=lambda span: span[1] - span[0])  # short ones first, full batches
    batches = batches or [documents[i:i + cfg.ttt_batch_docs] for i in range(0, len(documents), cfg.ttt_batch_docs)]
    longest = lambda batch: max(stop - first for first, stop in batch)
    chains = [[] for _ in range(cfg.ttt_warm_chains)]
    steps_of = lambda batch: -(-longest(batch) // chunk_of(batch))
    chunk_of = lambda batch: next(c for limit, c in ((24, 4), (59, 7), (math.inf, 12)) if longest(batch) <= limit)
    for batch in sorted(batches, key=lambda batch: (len(batch) == cfg.ttt_batch_docs, -longest(batch))):
        min(chains, key=lambda chain: sum(map(steps_of, chain))).append(batch)
    for chain in chains:
        rows = None
        for batch in chain:
            warm = rows if rows and len(rows) == cfg.ttt_batch_docs else [fresh] * len(batch)
            rows = [document(cfg, model, tokens, scores, *span, chunk_of(batch), steps_of(batch),
                             {key: [warm[i][key][0].clone(), pair[1].clone()] for key, pair in fresh.items()})
                    for i, span in enumerate(batch)]
    return scores


def document(cfg, model, tokens, scores, first, stop, chunk, steps, pairs):
    """One document of a batch that takes so many steps; returns its pairs, trained."""
    lr, squares = cfg.ttt_lora_lr * cfg.ttt_local_lr_mult, {}
    for step in range(steps):
        low, high = min(first + step * chunk, stop), min(first + (step + 1) * chunk, stop)
        start = max(first, high - cfg.doc_context)
        flat = [t.requires_grad_() for pair in pairs.values() for t in pair]
        grads = [torch.zeros_like(t) for t in flat]
        if low < high:
            undo = plain_additions(model, cfg.ttt_lora_alpha / cfg.ttt_lora_rank, pairs)
            named, head = weights_with_additions(model, {k: p for k, p in pairs.items() if k[0] not in ("out", "down")},
                                                 cfg.ttt_lora_alpha / cfg.ttt_lora_rank)
            hidden = torch.func.functional_call(Trunk(model), {f"model.{n}": p for n, p in named.items()},
                                                tokens[None, start:high])
            undo()
            logits = tg.capped_logits(hidden[0, low - high:], head, cfg.logit_softcap)
            nll = F.cross_entropy(logits, tokens[low + 1:high + 1], reduction="none")
            scores[low:high] = nll.detach()
            if high < stop:
                grads = torch.autograd.grad(nll.mean(), flat)
                norm = sum(g.square().sum() for g in grads) ** 0.5
                grads = [g * min(1.0, cfg.ttt_grad_clip / (norm.item() + 1e-6)) for g in grads]
        if step + 1 < steps:  # the optimiser of a batch moves all its rows
            for i, (t, g) in enumerate(zip(flat, grads)):
                squares[i] = cfg.ttt_beta2 * squares.get(i, 0.0) + (1 - cfg.ttt_beta2) * g * g
                with torch.no_grad():
                    t *= 1 - lr * cfg.ttt_weight_decay
                    t -= lr * g / ((squares[i] / (1 - cfg.ttt_beta2 ** (step + 1))).sqrt() + cfg.ttt_adam_eps)
    return {key: [t.detach() for t in pair] for key, pair in pairs.items()}


def test_first_factors_go_on_along_chains(setting, rt):
    cfg, val, model = setting
    val, cfg = with_documents(val, STARTS), dataclasses.replace(cfg, **WARM)
    _, nll = score(cfg, val, model(), 8, WARM, rt)
    torch.testing.assert_close(nll, reference_chains(cfg, model(), val), atol=1e-4, rtol=1e-4)
    for name, value in (("ttt_warm_start_a", False), ("ttt_warm_chains", 1), ("ttt_lora_parallel", False),
                        ("ttt_local_lr_mult", 1.0), ("ttt_eval_seq_len", 0), ("ttt_chunk_ladder", "")):
        other = score(cfg, val, model(), 8, {**WARM, name: value}, rt)[1]
        assert (other - nll).abs().max() > 1e-3, name


def test_any_number_of_ranks_gives_the_same_bits(setting, tmp_path):
    """Each rank walks the chains that are its own; nothing passes from one chain to another."""
    cfg, val, model = setting
    val, cfg = with_documents(val, STARTS), dataclasses.replace(cfg, **{**WARM, "ttt_warm_chains": 3})
    found = []
    for world in (1, 2, 4):
        scores = Scores(len(val.tokens) - 1)
        for rank in range(world):
            trained, alone = model(), make_runtime(tmp_path)
            plan = tg.plan_documents(val, cfg, make_runtime(tmp_path, rank=rank, world_size=world))
            try:
                tg.evaluate("test", trained.nll, val, cfg, alone, plan, tg.adapter_for(trained, cfg, alone),
                            observe=scores)
            except tg.IllegalScore as error:  # this rank alone has not scored the whole text
                assert world > 1 and "or of the whole text at its end" in str(error)
        assert (scores.given == 1).all()
        found.append(scores.nll)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("changes", [
    {}, {"ttt_chunk_ladder": ""}, {"ttt_warm_start_a": False},
    {"phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 9, "global_ttt_lr": 0.1, "global_ttt_chunk_tokens": 64}],
    ids=["all", "warm", "ladder", "phases"])
def test_what_is_scored_later_changes_nothing_scored_before(setting, rt, changes):
    """Documents of known lengths: in the order of scoring, other tokens from a place on leave all before it as it was,
    to the bit."""
    cfg, val, model = setting
    changes = {**WARM, **changes}
    val, order = with_documents(val, STARTS), []
    plan = tg.plan_documents(val, dataclasses.replace(cfg, **changes), rt)
    for windows in (windows for chunk in plan for windows in chunk.batches):
        _, _, numbers, counted = windows.read(val.tokens)
        order += numbers[counted].tolist()
    assert sorted(order) == list(range(len(val.tokens) - 1))
    _, nll = score(cfg, val, model(), 8, changes, rt)
    for place in (40, 113, 200, 300):
        later = torch.tensor(order[place:])
        tokens = val.tokens.clone()
        other = (tokens[later + 1] + 3) % cfg.vocab_size
        tokens[later + 1] = other.where((other != val.bos_id) & (tokens[later + 1] != val.bos_id), tokens[later + 1])
        moved = score(cfg, dataclasses.replace(val, tokens=tokens), model(), 8, changes, rt)[1]
        assert torch.equal(moved[order[:place]], nll[order[:place]]) and not torch.equal(moved[later], nll[later])


def test_a_document_s_scores_do_not_depend_on_its_company(setting, rt):
    """Bit for bit in a batch of the same size; to rounding at another size."""
    cfg, val, model = setting
    text = with_documents(val, [50, 130, 170])
    alone = text.take(slice(50, 131))
    _, among = score(cfg, text, model(), 8, DOCUMENT, rt)
    _, single = score(cfg, alone, model(), 8, DOCUMENT, rt)
    assert torch.equal(among[50:130], single)
    for size in (1, 7):
        _, other = score(cfg, text, model(), 8, {**DOCUMENT, "ttt_batch_docs": size}, rt)
        torch.testing.assert_close(other, among, atol=1e-5, rtol=1e-5)


def test_a_document_begins_with_nothing_learnt(setting, rt):
    """The same documents again get the same scores: from other batches before them nothing remains."""
    cfg, val, model = setting
    once = with_documents(val, [30, 100, 130, 200], 261).tokens
    once[-1] = val.bos_id
    twice = dataclasses.replace(val, tokens=torch.cat((once, once[1:])))
    for changes, same in (({**DOCUMENT, "ttt_batch_docs": 2}, True), ({**LORA, "ttt_chunk_tokens": 64}, False)):
        _, nll = score(cfg, twice, model(), 32, changes, rt)
        assert torch.equal(nll[:260], nll[260:]) == same


@pytest.mark.parametrize("mode", ["lora", "lora, hash", "hash", "document"])
def test_before_the_first_lesson_nothing_is_changed(setting, rt, mode):
    cfg, val, model = setting
    stride, changes = MODES[mode]
    still = {**changes, "ttt_lora_lr": 0.0, "ttt_lr": 0.0}
    _, nll = score(cfg, val, model(), stride, still, rt)
    if mode == "document":
        assert torch.equal(nll, score(cfg, val, model(), stride, {**changes, "ttt_min_doc_tokens": 10 ** 6}, rt)[1])
    else:
        assert torch.equal(nll, score(cfg, val, model(), stride, None, rt)[1])


@pytest.mark.parametrize("mode", ["adamw", "polyak", "hash", "lora", "lora, hash", "document"])
def test_each_adapter_learns(setting, rt, mode):
    """On text that repeats itself, inside its documents as well, the adapted score is the better one."""
    cfg, val, model = setting
    stride, changes = MODES[mode]
    again = with_documents(val, [])
    again = again.take(torch.cat((torch.arange(1), torch.arange(1, 60).repeat(20))))
    changes = {**changes, "ttt_chunk_tokens": 128, "ttt_lora_lr": 0.03, "ttt_epochs": 2}
    still, moved = (score(cfg, again, model(), stride, {**changes, **more}, rt)[0].bpb
                    for more in ({"ttt_lora_lr": 0.0, "ttt_lr": 0.0}, {}))
    assert moved < still - 0.05


def test_additions_are_where_they_were_asked_for_and_the_weights_stay(setting, rt):
    cfg, val, model = setting
    changes = {"ttt_mode": "lora", "ttt_lora_targets": "k,mlp,head", "ttt_lora_layers": "1-2", "ttt_lora_rank": 3,
               "ttt_lora_layer_rates": "2:0.5", "hash_embed_buckets": 64}
    cfg = dataclasses.replace(cfg, **changes)
    model, start = model(), model()
    adapter = tg.adapter_for(model, cfg, rt)
    assert set(adapter.pairs) == {(kind, layer) for kind in ("key", "up", "down") for layer in (1, 2)} | {("head", -1)}
    a, b = adapter.pairs["up", 2]
    assert a.shape == (3, 32) and b.shape == (96, 3) and not b.any()
    assert 0.8 * 32 ** -0.5 < a.abs().max() <= 32 ** -0.5
    rates = {id(t): group["full_lr"] for group in adapter.optimiser.param_groups for t in group["params"]}
    assert [rates[id(t)] for t in (a, adapter.pairs["up", 1][0], adapter.pairs["head", -1][1], adapter.table)] == \
        pytest.approx([0.005, 0.01, 0.01, 0.1])
    tg.evaluate("test", model.nll, val, cfg, rt, tg.plan_evaluation(val, cfg, rt, 8, 16, True), adapter)
    assert b.any() and adapter.table.any()
    assert all(torch.equal(p, q) for p, q in zip(start.parameters(), model.parameters()))


def test_each_visit_of_a_looped_layer_has_its_own_additions(setting, rt):
    """As if the loop were unrolled into layers with the same weights."""
    cfg, val, _ = setting
    shared = {"ln_scale": False, "ve_enabled": False, "xsa_last_n": 9, "skip_gates": True, "ttt_mode": "lora",
              "ttt_lora_targets": "q,k,v,o,mlp,head"}
    cfg = dataclasses.replace(cfg, **shared, num_loops=1, loop_start=0, loop_end=1)
    order, deep = [0, 1, 0, 1, 2], dataclasses.replace(cfg, num_loops=0, num_layers=5)
    model, unrolled = scrambled(tg.GPT(cfg)), tg.GPT(deep)
    for name, p in unrolled.named_parameters():
        parts = name.split(".")
        source = model.get_parameter(".".join(["blocks", str(order[int(parts[1])]), *parts[2:]] if parts[0] == "blocks"
                                              else parts)).detach()
        if name.endswith("_bank"):
            source = torch.cat([half[order] for half in source.split(3)])
        p.data.copy_(source)
    adapter = tg.adapter_for(model, cfg, rt)
    assert {visit for _, visit in adapter.pairs} == {-1, 0, 1, 2, 3, 4} and len(adapter.pairs) == 6 * 5 + 1
    for i, (_, b) in enumerate(adapter.pairs.values()):
        b.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    ids = val.tokens[:33].long()[None]
    weights, head = weights_with_additions(unrolled, adapter.pairs, adapter.scale)
    with torch.no_grad():
        states = torch.func.functional_call(Trunk(unrolled), {f"model.{n}": p for n, p in weights.items()}, (ids[:, :-1],))
        wanted = F.cross_entropy(tg.capped_logits(states, head, cfg.logit_softcap)[0], ids[0, 1:], reduction="none")
        torch.testing.assert_close(model.nll(ids[:, :-1], ids[:, 1:], hook=adapter.hook)[0], wanted, rtol=1e-4, atol=2e-5)
    frozen, start = dataclasses.replace(cfg, ttt_mode="sgd", ttt_freeze_blocks=1), model.qo_bank.detach().clone()
    tg.adapter_for(model, frozen, rt).learn(val.tokens[:129], 0.0, 1)
    assert torch.equal(model.qo_bank[0], start[0]) and not torch.equal(model.qo_bank[1], start[1])


def test_hash_of_pairs_as_published(setting, rt):
    ids = torch.tensor([[5, 7, 1023, 1023]])
    assert tg.hash_pairs(ids, 16384).tolist() == [[5 * 2040 % 16384, 10202, (7 * 2039 + 1023) % 16384, 6152]]
    cfg, val, model = setting
    cfg = dataclasses.replace(cfg, hash_embed_buckets=4096)
    adapter = tg.adapter_for(model(), cfg, rt)
    adapter.learn(val.tokens[:129], 0.0, 1)
    seen = torch.unique(tg.hash_pairs(val.tokens[:128].long().view(-1, cfg.train_seq_len), 4096))
    assert adapter.table.abs().sum(1).nonzero().flatten().tolist() == seen.tolist()


def test_polyak_scores_with_the_average_and_learns_from_the_weights(setting, rt):
    cfg, val, model = setting
    cfg = dataclasses.replace(cfg, ttt_polyak_decay=0.6, ttt_epochs=2)
    raw, averaged = reference_ttt(cfg, model(), val), model()
    adapter, start = tg.adapter_for(averaged, cfg, rt), averaged.qo_bank.detach().clone()
    tg.evaluate("test", averaged.nll, val, cfg, rt, tg.plan_evaluation(val, cfg, rt, 8, 16, True), adapter)
    for (name, p), hidden in zip(averaged.named_parameters(), adapter.average):
        torch.testing.assert_close(hidden, raw[name], rtol=1e-4, atol=1e-5, msg=name)
    assert (averaged.qo_bank - raw["qo_bank"]).abs().max() > 1e-4 < (averaged.qo_bank - start).abs().max()
    unmoved = dataclasses.replace(cfg, ttt_polyak_decay=0.99999)  # hardly moves in so few steps
    _, still = score(cfg, val, model(), 8, None, rt)
    torch.testing.assert_close(score(unmoved, val, model(), 8, {}, rt)[1], still, atol=2e-3, rtol=0)


def test_rates_of_families(setting, rt):
    cfg, _, model = setting
    for changes, wanted in (({}, (1, 1, 1)), ({"ttt_optimizer": "adamw"}, (3, 0.5, 1)),
                            ({"ttt_proj_lr_mult": 2.0, "ttt_fc_lr_mult": 0.0}, (2, None, 1))):
        model_ = model()
        adapter = tg.adapter_for(model_, dataclasses.replace(cfg, ttt_lr=1.0, **changes), rt)
        rates = {id(t): group["lr"] for group in adapter.optimiser.param_groups for t in group["params"]}
        assert tuple(rates.get(id(p)) for p in (model_.mlp_down_bank, model_.mlp_up_bank, model_.qo_bank)) == wanted
        assert len(adapter.optimiser.param_groups) == len(set(rates.values()))


# ---- the clock

class FakeTime:
    """Stands still but for what scoring and learning are said to take."""

    def __init__(self, monkeypatch, model, score_s, learn_s):
        self.now, nll, backward = 0.0, model.nll, torch.Tensor.backward

        def scored(ids, *rest):
            self.now += score_s(self) * ids.numel() if callable(score_s) else score_s * ids.numel()
            return nll(ids, *rest)

        def learnt(*args, **kwargs):
            self.now += learn_s
            return backward(*args, **kwargs)
        self.score = scored
        monkeypatch.setattr(torch.Tensor, "backward", learnt)

    def __call__(self):
        return self.now


class Log:
    active = False

    def __init__(self):
        self.lines = []

    def __call__(self, text, *rest, **fields):
        self.lines.append(text)


def timed(setting, rt, monkeypatch, limit, changes, learn_s=1.0, score_s=0.001):
    cfg, val, model = setting
    val = with_documents(val, [100, 290])
    cfg, model, log = dataclasses.replace(cfg, eval_max_seconds=limit, **changes), model(), Log()
    rt, fake = dataclasses.replace(rt, log=log), FakeTime(monkeypatch, model, score_s, learn_s)
    clock, scores = tg.EvalClock(limit, rt, now=fake), Scores(len(val.tokens) - 1)
    nothing = torch.zeros(2, cfg.window, dtype=torch.long)
    clock.measure_pace(lambda: fake.score(nothing, nothing[:, -8:], 1.0), nothing.numel(), 0)
    plan, adapter = tg.plan_evaluation(val, cfg, rt, 8, 16, True), tg.adapter_for(model, cfg, rt)
    tg.evaluate("test", fake.score, val, cfg, rt, plan, adapter, clock, scores)
    monkeypatch.undo()
    assert (scores.given == 1).all()
    return fake.now, [line for line in log.lines if line.startswith("ttt_clock")]


@pytest.mark.parametrize("changes", [
    {"ttt_chunk_tokens": 32, "ttt_epochs": 4},
    {**DOCUMENT, "ttt_lora_targets": "q", "ttt_batch_docs": 1, "ttt_epochs": 4}], ids=["stream", "document"])
def test_adaptation_gives_way_to_the_clock(setting, rt, monkeypatch, changes):
    free, lines = timed(setting, rt, monkeypatch, 1e6, changes)
    still, _ = timed(setting, rt, monkeypatch, 1e6, {**changes, "ttt_epochs": 0})
    assert lines == [] and timed(setting, rt, monkeypatch, 1.1 * free, changes) == (free, [])
    for share in (0.7,):  # of the time that learning would take
        limit = still + share * (free - still)
        spent, lines = timed(setting, rt, monkeypatch, limit, changes)
        assert 0.85 * limit < spent <= limit
        assert lines and all("epochs" in line or "adaptation ends" in line for line in lines[:-1])
        assert lines[-1].endswith("passes over scored chunks were left out") and len(lines) <= 1 + 4
    spent, lines = timed(setting, rt, monkeypatch, 1.02 * still, changes)
    assert still <= spent < 1.1 * still and "adaptation ends at chunk 1/" in lines[0]


def test_scoring_that_slows_down_ends_adaptation_and_goes_on(setting, rt, monkeypatch):
    changes = {"ttt_chunk_tokens": 32, "ttt_epochs": 2}
    spent, lines = timed(setting, rt, monkeypatch, 4, changes, 0.1, lambda fake: 0.001 if fake.now < 1 else 0.01)
    assert spent > 4 and any("adaptation ends" in line for line in lines) and "over EVAL_MAX_SECONDS=4" in lines[-1]


def test_a_limit_too_small_to_score_at_all_is_refused_before_scoring(run):
    done = run(EVAL_MAX_SECONDS=0.002)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "EVAL_MAX_SECONDS=0.002: scoring alone would take about" in done.err
    assert "roundtrip" not in done.out and (done.folder / "final_model.ptz").exists()


# ---- from settings

@pytest.mark.parametrize("variables, said", [
    ({}, "ttt_sliding:optimizer=sgd"),
    ({"TTT_OPTIMIZER": "adamw", "TTT_LR": 0.001, "TTT_POLYAK_DECAY": 0.9}, "ttt_sliding:optimizer=adamw"),
    ({"HASH_EMBED_BUCKETS": 4096, "TTT_FREEZE_BLOCKS": 1}, "ttt_sliding:params unfrozen="),
    ({"TTT_MODE": "lora", "TTT_LORA_TARGETS": "q,k,v,o,mlp,head", "TTT_LORA_LAYERS": "1-2"},
     "ttt_lora:rank=8 alpha=8 targets=q,k,v,o,mlp,head layers=1,2 optimizer=adam lr=0.01"),
    ({"TTT_MODE": "lora", "TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_BATCH_DOCS": 2, "LORA_RANK": 4},
     "ttt_document:start documents=")])
def test_every_mode_from_its_variables(run, variables, said):
    done = run(ITERATIONS=2, EVAL_STRIDE=16, **variables)
    assert done.code == 0, done.err
    assert said in done.out and done.summary["val_bpb_ttt"] != done.summary["val_bpb_sliding"]


@pytest.mark.parametrize("variables, said", [
    ({"TTT_LORA_TARGETS": "q,w"}, "TTT_LORA_TARGETS='q,w' is not some of q,k,v,o,mlp,head"),
    ({"TTT_LORA_TARGETS": ""}, "TTT_LORA_TARGETS="), ({"TTT_LORA_LAYERS": "1-x"}, "is not layers like"),
    ({"TTT_LORA_LAYERS": "2-3"}, "outside 0..2"), ({"TTT_LORA_LAYERS": "0-1-2"}, "is not layers like"),
    ({"TTT_LORA_LAYER_RATES": "1"}, "pairs like 7:0.6"), ({"TTT_LORA_LAYER_RATES": "9:0.6"}, "outside 0..2"),
    ({"TTT_LORA_RANK": 0}, "TTT_LORA_RANK=0 is out of range"),
    ({"TTT_RESET": "document", "TTT_MODE": "sgd"}, "only TTT_MODE=lora"),
    ({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 33}, "longer than a window"),
    ({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_POLYAK_DECAY": 0.9}, "works along a stream"),
    ({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_EVAL_SEQ_LEN": 8}, "TTT_DOC_CHUNK_TOKENS=16 is longer"),
    ({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_EVAL_SEQ_LEN": 64, "ROPE_TRAIN_SEQ_LEN": 16},
     "TTT_EVAL_SEQ_LEN=64 over TRAIN_SEQ_LEN=32 would change the rotary base"),
    *(({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_CHUNK_LADDER": ladder}, "TTT_CHUNK_LADDER='")
      for ladder in ("64:8,32:4", "32:8,64:4", "32:8,32:9", "32:16", "32:0", "32", "a:b", "32:4:5")),
    ({"TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_WARM_START_A": 1, "NGRAM_ORDERS": "2,3"},
     "no order of decoding serves both"),
    ({"TTT_LORA_ALPHA": -1}, "TTT_LORA_ALPHA=-1 is out of range"), ({"TTT_WARM_CHAINS": 0}, "TTT_WARM_CHAINS=0 is out"),
    ({"TTT_LOCAL_LR_MULT": "nan"}, "TTT_LOCAL_LR_MULT=nan is out of range"),
    ({"TTT_CHUNK_TOKENS": 16}, "holds no sequence"),
    ({"TTT_CHUNK_TOKENS": 40, "EVAL_STRIDE": 48, "EVAL_SEQ_LEN": 64}, "is less than the 48 a window")])
def test_refusals(corpus, tmp_path, variables, said):
    with pytest.raises(tg.UserError) as refused:
        tg.Hyperparameters.from_env(environment(corpus, tmp_path, **{"TTT_MODE": "lora", **variables}))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_documents_need_a_bos(config, rt, monkeypatch):
    cfg, opened = config(**DOCUMENT), tg.open_tokenizer
    for bos, said in ((-1, "has no BOS"), (2, r"no BOS \(token 2\) in ")):
        def other(cfg):
            tokenizer, digest = opened(cfg)
            monkeypatch.setattr(type(tokenizer), "bos_id", lambda self: bos)
            return tokenizer, digest
        monkeypatch.setattr(tg, "open_tokenizer", other)
        with pytest.raises(tg.UserError, match=said):
            tg.ValData.open(cfg, rt)


# ---- ranks

def walks(cfg, rt):
    """Scores of three ways to adapt, on this rank and its fellows."""
    val, results = tg.ValData.open(cfg, rt), []
    for changes in ({"ttt_polyak_decay": 0.6}, {**LORA, "hash_embed_buckets": 512}, {**DOCUMENT, "ttt_batch_docs": 1}):
        changed = dataclasses.replace(cfg, **{**changes, "ttt_batch_seqs": 3, "ttt_lora_targets": "q,head"})
        torch.manual_seed(0)
        model = scrambled(tg.GPT(cfg)).eval()
        adapter, clock = tg.adapter_for(model, changed, rt), tg.EvalClock(changed.eval_max_seconds, rt)
        plan = tg.plan_evaluation(val, changed, rt, 8, 16, True)
        r = tg.evaluate("test", model.nll, val, changed, rt, plan, adapter, clock)
        results.append([r.tokens, r.bytes, r.bpb])
    return results


def test_world_size_does_not_change_what_is_learnt(corpus, config, rt, tmp_path):
    for two, one in zip(walks_on_two_ranks("test_adapters", corpus, tmp_path), walks(config(), rt)):
        assert two[:2] == one[:2] and two[2] == pytest.approx(one[2], rel=2e-6)
