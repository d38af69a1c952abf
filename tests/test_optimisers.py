"""PARAMETERS and OPTIMISERS: rates, decays and roundings as a table; Muon, NorMuon, AdamW against slow ones."""
import copy
import dataclasses
import math
import threading

import pytest
import torch
import train_gpt as tg
from conftest import scrambled, make_runtime

# ---- how each parameter is trained and stored, written out

SETTINGS = {"matrix_lr": 0.01, "scalar_lr": 0.02, "tied_embed_lr": 0.03, "embed_lr": 0.04, "head_lr": 0.05,
            "muon_wd": 0.3, "adam_wd": 0.7, "embed_wd": 0.6, "attn_qat_bits": 3, "mlp_quant_bits": 4, "embed_bits": 5, "bigram_bits": 6,
            "ve_bits": 7, "clip_rule": "sdclip", "attn_clip_sigmas": 11.0, "mlp_clip_sigmas": 12.0,
            "embed_clip_sigmas": 13.0, "clip_widen": 1.1,
            "trigram_vocab_size": 32, "trigram_dim": 8, "gated_attention": True, "value_residual": True,
            "dtg_enabled": True, "mtp_num_heads": 2, "grad_clip_norm": 0.0, "skip_gates": True, "sparse_attn_gate": True,
            "smear_gate": "window", "num_loops": 1, "loop_start": 0, "loop_end": 1}
ATTN, MLP = (3, 11.0, 1.1), (4, 12.0, 1.1)  # bits, sigmas, widen
ROWS = {  # name -> rate, decay, rounding; {T}: the rate of tables
    "qo_bank": (0.01, 0.3, ATTN), "kv_bank": (0.01, 0.3, ATTN), "mlp_up_bank": (0.01, 0.3, MLP),
    "mlp_down_bank": (0.01, 0.3, MLP), "tok_emb.weight": ("T", 0.6, (5, 13.0, 1.0)),
    "bigram.embed.weight": ("T", 0.6, (6, 13.0, 1.0)), "trigram.embed.weight": ("T", 0.6, (6, 13.0, 1.0)),
    "ve_shared.embed.weight": ("T", 0.6, (7, 13.0, 1.0)), "lm_head.weight": (0.05, 0.0, (5, 13.0, 1.0)),
    "mtp_heads.0.weight": (0.05, 0.0, None), "mtp_heads.1.weight": (0.05, 0.0, None)}
CONTROL = (0.02, 0.7, None)  # every other one
TIED = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def stepped(config, rt, tied, gradient):
    """(model, weights before) of one step at half the rates; every gradient is `gradient`."""
    cfg = config(**SETTINGS, tie_embeddings=tied)
    model = tg.GPT(cfg)
    with torch.no_grad():
        for p in model.parameters():
            p.uniform_(1.0, 2.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimisers = tg.Optimisers(model, cfg, rt)
    for p in model.parameters():
        p.grad = torch.full_like(p, gradient)
    optimisers.step(tg.StepPlan(0.5, 0.9, False, False))
    return model, before


def row_of(name, tied):
    rate, decay, rounding = ROWS.get(name, CONTROL)
    return {"T": 0.03 if tied else 0.04}.get(rate, rate), decay, rounding


@TIED
def test_a_step_without_gradient_is_the_decay_alone(config, rt, tied):
    model, before = stepped(config, rt, tied, 0.0)
    for name, p in model.named_parameters():
        rate, decay, _ = row_of(name, tied)
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.5 * rate * decay), rtol=1e-6, atol=0, msg=name)


@TIED
def test_a_first_step_is_as_long_as_the_rate(config, rt, tied):
    """AdamW's whatever the gradient; Muon's by the one singular value that a constant gradient has."""
    model, before = stepped(config, rt, tied, 1e-2)
    image = slow_newton_schulz(torch.ones(1, 1).double(), 5).item()
    for name, p in model.named_parameters():
        rate, decay, _ = row_of(name, tied)
        moved = p.detach() - before[name] * (1 - 0.5 * rate * decay)
        wanted = torch.full_like(moved, -0.5 * rate)
        if name.endswith("_bank"):
            rows, columns = p.shape[1:]
            wanted *= image * max(1.0, rows / columns) ** 0.5 / (rows * columns) ** 0.5
        torch.testing.assert_close(moved, wanted, rtol=2e-2 if name.endswith("_bank") else 2e-3, atol=1e-6, msg=name)


@TIED
def test_roundings_are_those_of_the_table(config, tied):
    cfg = config(**SETTINGS, tie_embeddings=tied)
    names = [name for name, _ in tg.GPT(cfg).named_parameters()]
    wanted = {name: tg.QuantSpec(row[2][0], "sdclip", *row[2][1:]) for name, row in ROWS.items()
              if row[2] and (name != "lm_head.weight" or not tied)}
    assert tg.quant_specs(cfg, names) == wanted
    kept = dataclasses.replace(cfg, fp16_keep_name_patterns="kv_, ve_shared",
                               int8_keep_float_fp32_name_patterns="mlp_up")
    assert set(wanted) - set(tg.quant_specs(kept, names)) == {"kv_bank", "ve_shared.embed.weight", "mlp_up_bank"}
    assert {name for name, family in tg.route(cfg, names).items() if not family.exported} == {
        "mtp_heads.0.weight", "mtp_heads.1.weight"}
    assert len(names) == len(set(names)) > len(ROWS)


def test_named_control_tensors_take_the_scalar_rate_and_stay_floats(config):
    cfg = config(**SETTINGS, control_tensor_name_patterns="qo_bank, bigram")
    families = tg.route(cfg, ["qo_bank", "kv_bank", "bigram.embed.weight"])
    assert [families[n].lr for n in families] == ["scalar_lr", "matrix_lr", "scalar_lr"]
    assert set(tg.quant_specs(cfg, families)) == {"kv_bank"}


# ---- Muon, a matrix at a time

def slow_newton_schulz(matrix, steps, coefficients=((3.4445, -4.7750, 2.0315),)):
    """As the method's description says it: normalise, then so many times X <- aX + b(XX')X + c(XX')(XX')X."""
    x = matrix / (matrix.square().sum().sqrt() + 1e-7)
    x = x.T if x.shape[0] > x.shape[1] else x
    for a, b, c in [*coefficients, *[coefficients[-1]] * steps][:steps]:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def slow_even_rows(update, memory, beta2):
    """NorMuon (PR 173) of one matrix; changes `memory`, a list of one number a row."""
    out = torch.zeros_like(update)
    for i, row in enumerate(update):
        memory[i] = beta2 * memory[i] + (1 - beta2) * row.square().mean().item()
        out[i] = row / (math.sqrt(memory[i]) + 1e-10)
    return out * update.square().sum().sqrt() / (out.square().sum().sqrt() + 1e-10)


def slow_muon(matrices, gradients, cfg, lr, momentum):
    """Matrices in fp64 after one step for each list of gradients."""
    out = []
    for i, w in enumerate(matrices):
        w, buffer, memory = w.double(), torch.zeros_like(w.double()), [0.0] * len(w)
        for step in gradients:
            g = step[i].double()
            buffer = momentum * buffer + g
            update = g + momentum * buffer
            if cfg.muon_row_normalize:
                update = torch.stack([row / row.square().sum().sqrt() for row in update])
            update = slow_newton_schulz(update, cfg.muon_backend_steps,
                                        *[tg.POLAR_EXPRESS] * cfg.polar_express)
            if cfg.normuon:
                update = slow_even_rows(update, memory, cfg.muon_beta2)
            w = w * (1 - lr * cfg.muon_wd) - lr * math.sqrt(max(1.0, w.shape[0] / w.shape[1])) * update
        out.append(w)
    return out


SHAPES = ((5, 4, 6), (3, 9, 5), (1, 6, 6))  # wide, tall and square; odd numbers of slices


def banks_of(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients_of(steps, seed=1):
    """Of each step, for each bank: matrices large and small."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-4, 2, 6)
    return [[torch.randn(shape, generator=generator) * sizes[step % 6] for shape in SHAPES] for step in range(steps)]


def advance(muon, banks, rt, gradients, lr=0.1, momentum=0.8):
    """One step for each list of gradients, of `banks` in their own order."""
    with torch.no_grad():
        for step in gradients:
            for bank, grad in zip(banks, step):
                bank.grad = grad.clone()
            shards = [rt.wait(pair) for pair in muon.launch_reduce()]
            muon.finish([rt.wait(pair) for pair in muon.launch_update(shards, momentum)], lr)


@pytest.mark.parametrize("changes", [{}, {"muon_backend_steps": 1}, {"muon_backend_steps": 10}, {"muon_wd": 0.0},
                                     {"normuon": True}, {"normuon": True, "muon_beta2": 0.5},
                                     {"muon_row_normalize": True}, {"polar_express": True},
                                     {"polar_express": True, "muon_backend_steps": 7}], ids=str)
def test_muon_is_the_slow_one(config, rt, changes):
    cfg, banks, gradients = config(**{"muon_wd": 0.5, **changes}), banks_of(), gradients_of(4)
    flat = lambda parts: [m.detach().clone() for part in parts for m in part]
    wanted = slow_muon(flat(banks), [flat(step) for step in gradients], cfg, 0.1, 0.8)
    advance(tg.Muon(banks, cfg, rt), banks, rt, gradients)
    for got, want in zip(flat(banks), wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_so_many_iterations_as_are_asked_for(shape, steps):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    torch.testing.assert_close(tg.newton_schulz(matrix[None], steps, torch.double)[0],
                               slow_newton_schulz(matrix, steps))


def test_iterations_work_on_the_shorter_side(monkeypatch):
    """The longer one gives the same at the price of its square."""
    seen, product = set(), tg.symmetric_product
    monkeypatch.setattr(tg, "symmetric_product",
                        lambda x, *rest, **named: seen.add(x.size(1)) or product(x, *rest, **named))
    for shape in ((2, 4, 9), (2, 9, 4)):
        tg.newton_schulz(torch.ones(shape), 2, torch.float32)
    assert seen == {4}


def test_polar_express_moves_singular_values_as_published():
    """Published: five steps of the quintics of arXiv 2505.16932, here in fp64, bring all of 0.01..1 near 1."""
    values = torch.logspace(-2, 0, 20, dtype=torch.double)
    matrix = torch.diag(values)[None] / 1.01
    found = torch.linalg.svdvals(tg.newton_schulz(matrix * values.norm(), 5, torch.double, "torch", tg.POLAR_EXPRESS)[0])
    assert 0.85 < found.min() and found.max() < 1.15


def test_singular_values_come_near_one():
    matrix = torch.randn(1, 20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    for steps, lowest in ((5, 0.6), (10, 0.65)):
        values = torch.linalg.svdvals(tg.newton_schulz(matrix, steps, torch.double)[0])
        assert lowest < values.min() and values.max() < 1.25


# ---- ranks, as threads that meet where they would communicate

class Threaded(tg.Runtime):
    """A rank that hands its tensors over through `groups["meet"]`."""

    def exchange(self, tensor):
        """Every rank's tensor, in the order of the ranks."""
        barrier, slots = self.groups["meet"]
        slots[self.rank] = tensor.clone()
        barrier.wait()
        everyone = list(slots)
        barrier.wait()
        return everyone

    def sum_(self, tensor):
        return tensor.copy_(sum(self.exchange(tensor)))

    def launch_reduce_scatter(self, whole):
        assert len(whole) % self.world_size == 0
        return sum(self.exchange(whole)).chunk(self.world_size)[self.rank], None

    def launch_all_gather(self, shard):
        return torch.cat(self.exchange(shard)), None


class Late(Threaded):
    """What is launched is sent when it is waited for; its result is no number until then."""

    def launch_reduce_scatter(self, whole):
        shard = torch.full_like(whole[:len(whole) // self.world_size], math.nan)
        return shard, lambda: shard.copy_(Threaded.launch_reduce_scatter(self, whole)[0])

    def launch_all_gather(self, shard):
        whole = torch.full_like(torch.cat([shard] * self.world_size), math.nan)
        return whole, lambda: whole.copy_(Threaded.launch_all_gather(self, shard)[0])

    def wait(self, started):
        tensor, send = started
        return send() if send else tensor


def on_ranks(folder, world, work, kind=Threaded):
    """[work(rt) of each rank]"""
    meet, results = (threading.Barrier(world, timeout=60), [None] * world), [None] * world
    plain = make_runtime(folder)

    def rank(i):
        rt = kind(**{**vars(plain), "rank": i, "world_size": world, "groups": {"meet": meet}})
        try:
            results[i] = work(rt)
        except BaseException as error:
            results[i] = error
            meet[0].abort()
    threads = [threading.Thread(target=rank, args=(i,)) for i in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def model_steps(start, rt, gradients, resume_at=None):
    """Optimiser steps of a copy of a model whose global gradients are given; ranks share them out unevenly. With
    `resume_at`, state and weights go at that step into a new model. Returns (weights, norms before clipping, last
    state)."""
    model, cfg = copy.deepcopy(start), start.cfg
    optimisers, norms = tg.Optimisers(model, cfg, rt), []
    share = (1 + rt.rank) / sum(range(1, rt.world_size + 1))
    for step, grads in enumerate(gradients):
        if step == resume_at:
            saved, model = copy.deepcopy(optimisers.state()), copy.deepcopy(model)
            optimisers = tg.Optimisers(model, cfg, rt)
            optimisers.load(saved)
        for p, grad in zip(model.parameters(), grads):
            p.grad = share * grad
        norms.append(optimisers.step(tg.StepPlan(1.0, 0.8, False, False)).item())
    return {name: p.detach() for name, p in model.named_parameters()}, norms, optimisers.state()


def model_gradients(cfg, steps, size=lambda step: 1.0):
    generator = torch.Generator().manual_seed(4)
    return [[size(step) * torch.randn(p.shape, generator=generator) for p in tg.GPT(cfg).parameters()]
            for step in range(steps)]


def same(one, other, **tolerance):
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda text: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("world, optimiser", [(2, "muon"), (4, "muon"), (2, "adamw")])
def test_ranks_do_together_what_one_does_alone(config, rt, tmp_path, world, optimiser):
    """Clipping bites in some steps and not in others; banks of 6 and 3 slices do not divide by 4."""
    cfg = config(grad_clip_norm=30.0, normuon=True, matrix_optimizer=optimiser)
    gradients = model_gradients(cfg, 3, lambda step: (1.0, 0.01, 3.0)[step])
    start = tg.GPT(cfg)
    weights, norms, state = model_steps(start, rt, gradients)
    wanted = [math.sqrt(sum(g.double().square().sum().item() for g in step)) for step in gradients]
    assert norms == pytest.approx(wanted, rel=1e-4) and wanted[1] < 30 < wanted[0]
    for got, got_norms, got_state in on_ranks(tmp_path, world, lambda rt: model_steps(start, rt, gradients)):
        same(weights, got, rtol=1e-3, atol=2e-5)
        assert got_norms == pytest.approx(norms, rel=1e-4)
        for name in ("momentum", "row_memory"):
            for a, b in zip(state["muon"][name], got_state["muon"][name], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [Threaded, Late])
@pytest.mark.parametrize("normuon", [False, True])
def test_banks_of_ranks_that_overlap_their_transfers_are_those_of_the_slow_muon(config, tmp_path, kind, normuon):
    """Whether a transfer is done at once or only when it is waited for: nothing reads it before, and nothing that is
    still to be sent is overwritten. 4 ranks, of whose slices some are padding."""
    cfg = config(grad_clip_norm=0.0, normuon=normuon)
    gradients, start = model_gradients(cfg, 3), tg.GPT(cfg)
    banks = [i for i, (name, _) in enumerate(start.named_parameters()) if name.endswith("_bank")]
    names = [name for name, _ in start.named_parameters()]
    flat = lambda tensors: [m.detach().clone() for i in banks for m in tensors[i]]
    wanted = slow_muon(flat(list(start.parameters())), [flat(step) for step in gradients], cfg, cfg.matrix_lr, 0.8)
    for weights, _, _ in on_ranks(tmp_path, 4, lambda rt: model_steps(start, rt, gradients), kind):
        for got, want in zip(flat([weights[name] for name in names]), wanted, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_going_on_from_a_state_changes_nothing(config, tmp_path, world):
    """Momentum, row memory and AdamW's averages; with several ranks each finds its own part."""
    cfg = config(normuon=True, grad_clip_norm=0.0)
    start, gradients = tg.GPT(cfg), model_gradients(cfg, 4)
    straight, resumed = (on_ranks(tmp_path, world, lambda rt: model_steps(start, rt, gradients, at)[0])
                         for at in (None, 2))
    for one, other in zip(straight, resumed):
        same(one, other, rtol=0, atol=0)


def test_a_state_holds_whole_banks_and_fits_any_number_of_ranks(config, rt, tmp_path):
    cfg = config(normuon=True)
    _, _, whole = model_steps(tg.GPT(cfg), rt, model_gradients(cfg, 2))

    def passed_on(rt):
        muon = tg.Optimisers(tg.GPT(cfg), cfg, rt).muon
        for buffer in (*muon.momentum, *muon.row_memory):
            buffer.fill_(7.0)  # nothing of before may remain
        muon.load(whole["muon"])
        return muon.state()
    for state in on_ranks(tmp_path, 4, passed_on):
        for name in ("momentum", "row_memory"):
            assert all(map(torch.equal, state[name], whole["muon"][name]))


def test_gradients_sent_in_bf16_keep_their_range(config, rt, tmp_path):
    """What fp16 would flush to zero or to infinity arrives with bf16's three digits."""
    cfg, banks = config(grad_quant=True), banks_of()
    gradients = [torch.stack([g * scale for g, scale in zip(grad, (1e-12, 1e-5, 1.0, 1e6, 1e12))])
                 for grad in gradients_of(1)[0]]

    def reduced(rt):
        mine = banks_of()
        muon = tg.Muon(mine, cfg, rt)
        for bank, grad in zip(mine, gradients):
            bank.grad = (0.25, 0.75)[rt.rank] * grad
        return [rt.wait(rt.launch_all_gather(rt.wait(pair)))[:len(bank)]
                for pair, bank in zip(muon.launch_reduce(), muon.banks)]
    order = sorted(range(len(banks)), key=lambda i: -banks[i].numel())
    for got in on_ranks(tmp_path, 2, reduced):
        for i, shard in zip(order, got, strict=True):
            torch.testing.assert_close(shard.float(), gradients[i], rtol=0.02, atol=0)
            assert not torch.equal(shard.float(), gradients[i]), "nothing was rounded"


def test_gradients_are_sent_in_fp32_unless_asked(config, tmp_path):
    def kinds(rt):
        seen, banks = [], banks_of()
        for quant in (False, True):
            muon = tg.Muon(banks, config(grad_quant=quant), rt)
            for bank in banks:
                bank.grad = torch.ones_like(bank)
            seen.append({shard.dtype for shard, _ in muon.launch_reduce()})
        return seen
    assert on_ranks(tmp_path, 2, kinds) == [[{torch.float32}, {torch.bfloat16}]] * 2


# ---- AdamW

def test_adamw_is_the_papers(config, rt):
    """Written out number by number: averages, their corrections, epsilon, decoupled decay."""
    cfg = config(beta1=0.8, beta2=0.9, adam_eps=0.01, adam_wd=0.5, scalar_lr=0.02, grad_clip_norm=0.0)
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    start = model.blocks[1].attn.q_gain.detach().tolist()
    optimisers, gradients = tg.Optimisers(model, cfg, rt), [0.5, -0.02, 0.3]
    rates = [1.0, 0.5, 0.25]
    for gradient, scale in zip(gradients, rates):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        optimisers.step(tg.StepPlan(scale, 0.9, False, False))
    for got, w in zip(model.blocks[1].attn.q_gain.tolist(), start):
        m = v = 0.0
        for t, (g, scale) in enumerate(zip(gradients, rates), 1):
            m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
            w -= 0.02 * scale * 0.5 * w
            w -= 0.02 * scale * (m / (1 - 0.8 ** t)) / (math.sqrt(v / (1 - 0.9 ** t)) + 0.01)
        assert got == pytest.approx(w, rel=1e-5)


@pytest.mark.parametrize("limit", [0.0, 0.5, 1e4])
def test_the_whole_gradient_is_clipped_to_its_norm(config, rt, limit):
    cfg = config(grad_clip_norm=limit, beta1=0.0, mtp_num_heads=1)
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    optimisers = tg.Optimisers(model, cfg, rt)
    grads = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        p.grad = grads[name].clone()
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    assert optimisers.step(tg.StepPlan(1.0, 0.0, False, False)).item() == pytest.approx(norm, rel=1e-5)
    seen = dict(zip((id(b) for b in optimisers.muon.banks), optimisers.muon.momentum))
    seen |= {id(p): optimisers.adamw.state[p]["exp_avg"] for p in optimisers.replicated}
    for name, p in model.named_parameters():
        torch.testing.assert_close(seen[id(p)], grads[name] * (min(limit / norm, 1.0) if limit else 1.0), rtol=1e-4, atol=1e-7,
                                   msg=name)


def test_banks_by_adamw_are_those_of_pytorch(config, rt):
    """Each with MATRIX_LR and MUON_WD, as PR 1254 trains all it has."""
    cfg = config(matrix_optimizer="adamw", grad_clip_norm=0.0, matrix_lr=0.01, muon_wd=0.3, beta2=0.9)
    start, gradients = scrambled(tg.GPT(cfg)), model_gradients(cfg, 3)
    weights, _, state = model_steps(start, rt, gradients)
    assert state["muon"]["momentum"] == []
    for i, (name, p) in enumerate(start.named_parameters()):
        if name.endswith("_bank"):
            alone = p.detach().clone().requires_grad_()
            adamw = torch.optim.AdamW([alone], lr=0.01, betas=(cfg.beta1, 0.9), eps=cfg.adam_eps, weight_decay=0.3)
            for step in gradients:
                alone.grad = step[i].clone()
                adamw.step()
            torch.testing.assert_close(weights[name], alone.detach(), rtol=1e-5, atol=1e-6)
