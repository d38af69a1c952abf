import dataclasses
import json
import math
import sys

import pytest
import torch
import train_gpt as tg
from conftest import ROOT, scrambled
from hypothesis import given, settings, strategies as st

sys.path.append(str(ROOT / "tools"))
from export_bench import using_rounded_weights  # noqa: E402


# ---- Newton-Schulz and Muon

@pytest.mark.parametrize("sigma, image", [(1.0, 0.6964), (0.5, 0.7654), (0.1, 0.7121), (0.03, 1.1223), (0.003, 1.1104)])
def test_newton_schulz_moves_one_singular_value_as_published(sigma, image):
    """A matrix with singular values (sigma, sqrt(1 - sigma²)) has Frobenius norm 1, so nothing is rescaled."""
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(6, 2, dtype=torch.double))[0] for _ in range(2))
    matrix = u @ torch.diag(torch.tensor([sigma, max(1 - sigma ** 2, 0) ** 0.5], dtype=torch.double)) @ v.T
    out = tg.newton_schulz(matrix[None], 5, torch.double)[0]
    assert (u[:, 0] @ out @ v[:, 0]).item() == pytest.approx(image, abs=2e-4)


@given(st.integers(1, 3), st.integers(2, 12), st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_newton_schulz_batches_and_transposes(n, rows, columns):
    torch.manual_seed(rows * 13 + columns)
    matrices = torch.randn(n, rows, columns, dtype=torch.double)
    out = tg.newton_schulz(matrices, 5, torch.double)
    for single, whole in zip(matrices, out):
        torch.testing.assert_close(tg.newton_schulz(single[None], 5, torch.double)[0], whole)
        torch.testing.assert_close(tg.newton_schulz(single.T[None], 5, torch.double)[0].T, whole)
    assert torch.equal(tg.newton_schulz(torch.zeros(1, rows, columns), 5, torch.float32), torch.zeros(1, rows, columns))


def reference_muon(weights, grads_by_step, lr, momentum, wd):
    """Muon one matrix at a time, as the paper's blog post and PR 1092 define it."""
    weights = [w.clone() for w in weights]
    buffers = [torch.zeros_like(w) for w in weights]
    for grads in grads_by_step:
        for w, g, buffer in zip(weights, grads, buffers):
            buffer.mul_(momentum).add_(g)
            update = tg.newton_schulz((g + momentum * buffer)[None], 5, torch.float32)[0]
            w *= 1 - lr * wd
            w -= lr * max(1.0, w.shape[0] / w.shape[1]) ** 0.5 * update
    return weights


def test_muon_on_banks_is_muon_on_each_matrix(config, rt):
    torch.manual_seed(0)
    banks = [torch.nn.Parameter(torch.randn(shape)) for shape in ((4, 6, 6), (2, 12, 5), (2, 3, 9))]
    muon, cfg = tg.Muon(banks, config(), rt), config()
    start = [m.clone() for bank in muon.banks for m in bank.detach()]
    steps = [[torch.randn_like(bank) for bank in muon.banks] for _ in range(3)]
    wanted = reference_muon(start, [[m for grad in grads for m in grad] for grads in steps], 0.1, 0.9, cfg.muon_wd)
    for grads in steps:
        for bank, grad in zip(muon.banks, grads):
            bank.grad = grad.clone()
        with torch.no_grad():
            shards = [rt.wait(pair) for pair in muon.launch_reduce()]
            muon.finish([rt.wait(pair) for pair in muon.launch_update(shards, 0.9)], 0.1)
    for got, want in zip((m for bank in muon.banks for m in bank.detach()), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_normuon_evens_out_rows_and_keeps_the_size():
    torch.manual_seed(0)
    update = torch.randn(2, 6, 8) * torch.logspace(-1, 1, 6)[:, None]
    before = update.clone()
    tg.normalise_rows_(update, torch.zeros(2, 6, 1), 1.0)
    torch.testing.assert_close(update.norm(dim=(1, 2)), before.norm(dim=(1, 2)))
    sizes = update.norm(dim=2)
    assert (sizes / sizes.mean(1, keepdim=True)).sub(1).abs().max() < 1e-4


def loaded_optimisers(config, rt, **changes):
    cfg = config(**changes)
    model = scrambled(tg.GPT(cfg))
    optimisers = tg.Optimisers(model, cfg, rt)
    torch.manual_seed(1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return cfg, model, optimisers


def test_gradients_are_clipped_together(config, rt):
    cfg, model, optimisers = loaded_optimisers(config, rt, grad_clip_norm=0.3)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    optimisers.step(tg.StepPlan(0.0, 0.0, False, False))
    moved = [*optimisers.muon.momentum, *(optimisers.adamw.state[p]["exp_avg"] / 0.1 for p in optimisers.replicated)]
    assert torch.cat([m.flatten() for m in moved]).norm().item() == pytest.approx(0.3, rel=1e-4)
    cfg, model, optimisers = loaded_optimisers(config, rt, grad_clip_norm=0.3)
    assert optimisers.step(tg.StepPlan(0.0, 0.0, False, False)).item() == pytest.approx(norm.item(), rel=1e-5)


def test_every_parameter_moves_at_its_own_rate(config, rt):
    cfg, model, optimisers = loaded_optimisers(config, rt, mtp_num_heads=1, tie_embeddings=False, adam_wd=0.0,
                                               muon_wd=0.0, grad_clip_norm=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimisers.step(tg.StepPlan(0.5, 0.9, False, False))
    families = tg.route(cfg, before)
    for name, p in model.named_parameters():
        step = (p.detach() - before[name]).abs()
        if families[name].optimiser == "adamw":  # AdamW's first step is the learning rate, whatever the gradient
            torch.testing.assert_close(step, torch.full_like(step, 0.5 * getattr(cfg, families[name].lr)),
                                       rtol=2e-3, atol=1e-6)
        assert p.grad is None and step.max() > 0


# ---- schedules

def plan(step, elapsed=0.0, pace=0.0, **changes):
    return tg.plan_step(dataclasses.replace(tg.Hyperparameters(), **changes), step, elapsed, pace)


def test_warmdown_by_steps_by_clock_and_by_fraction():
    by_steps = dict(max_wallclock_seconds=0.0, iterations=100, warmdown_iters=40)
    assert [plan(s, **by_steps).lr_scale for s in (0, 59, 60, 80, 99)] == [1.0, 1.0, 1.0, 0.5, 0.025]
    by_clock = dict(max_wallclock_seconds=600.0, iterations=20_000, warmdown_iters=3500)
    assert plan(0, **by_clock).lr_scale == 1.0
    assert plan(3000, 300.0, 0.1, **by_clock).lr_scale == pytest.approx(3000 / 3500)
    assert plan(6000, 600.0, 0.1, **by_clock).lr_scale == 0.0
    assert plan(90, 9.0, 0.1, max_wallclock_seconds=600.0, iterations=100, warmdown_iters=40).lr_scale == 0.25
    for width, spent, scale in ((0.667, 0.4, 0.89955), (0.667, 0.9, 0.14993), (0.667, 0.99, 0.1), (0.85, 0.4, 0.70588)):
        got = plan(0, 600 * spent, 0.1, warmdown_frac=width, min_lr=0.1).lr_scale
        assert got == pytest.approx(scale, abs=1e-5)


def test_momentum_ramp():
    assert [plan(s).momentum for s in (0, 750, 1500, 9000)] == pytest.approx([0.92, 0.955, 0.99, 0.99])


def test_qat_triggers():
    late = dict(max_wallclock_seconds=0.0, iterations=100, warmdown_iters=100)
    assert [plan(s, **late).qat for s in (0, 84, 86)] == [False, False, True]
    assert [plan(s, late_qat_frac=0.65, **late).qat for s in (0, 64, 65)] == [False, False, True]
    assert plan(0, qat_enabled=True).qat and not plan(99, late_qat_threshold=0.0, **late).qat


@given(st.integers(0, 30_000), st.floats(0, 1000), st.floats(0, 1), st.floats(0, 1), st.integers(0, 5000))
def test_scale_stays_between_zero_and_one(step, elapsed, pace, frac, iters):
    step = min(step, 20_000)
    assert 0.0 <= plan(step, elapsed, pace, warmdown_frac=frac, warmdown_iters=iters).lr_scale <= 1.0


# ---- averaging

def walk(cfg, values):
    weight = torch.nn.Parameter(torch.zeros(1))
    averager = tg.Averager(cfg, [weight])
    for step, value in enumerate(values, 1):
        weight.data.fill_(value)
        averager.update(step, tg.StepPlan(1.0, 0.0, False, snapshot=step % cfg.swa_every == 0))
    line = averager.apply()
    return weight.item(), line


def test_averages_are_what_they_say(config):
    values = [float(v * v % 17) for v in range(40)]
    ema = values and 0.0
    for t, value in enumerate(values, 1):
        decay = min(0.9, (1 + t) / (10 + t))
        ema = decay * ema + (1 - decay) * value
    assert walk(config(ema_decay=0.9), values) == (pytest.approx(ema), "ema:applying EMA weights")
    got, line = walk(config(swa_enabled=True, swa_every=5), values)
    assert got == pytest.approx(sum(values[4::5]) / 8) and "averaged 8 checkpoints" in line
    got, line = walk(config(lawa_enabled=True, lawa_freq=4, lawa_k=3), values)
    assert got == pytest.approx(sum(values[31::4]) / 3) and "k=3" in line
    assert walk(config(ema_enabled=False), values)[0] == values[-1]


# ---- the loop

def trained(config, rt, **changes):
    cfg = config(**changes)
    torch.manual_seed(cfg.seed)
    names = [name for name, _ in tg.GPT(cfg).named_parameters()]
    torch.manual_seed(cfg.seed)
    model = tg.GPT(cfg, qat_specs=tg.quant_specs(cfg, names))
    tg.train(cfg, rt, model, tg.TrainData.open(cfg, rt), validate=None)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.fixture
def without_validation(monkeypatch):
    """The loop always validates at its end; these tests look at weights alone."""
    original = tg.train
    blank = lambda name, score_fn: tg.EvalResult(name, 0.0, 0.0, 0, 0, 0.0)
    monkeypatch.setattr(tg, "train", lambda *args, validate: original(*args, validate=blank))


@pytest.mark.parametrize("changes", [{}, {"normuon": True, "qat_enabled": True, "soft_round": True},
                                     {"swa_enabled": True, "swa_every": 1}, {"lawa_enabled": True, "lawa_freq": 1},
                                     {"num_loops": 2, "loop_start": 0, "loop_end": 1}],
                         ids=["default", "normuon and qat", "swa", "lawa", "loop"])
def test_warm_up_leaves_no_trace(config, rt, without_validation, changes):
    plain, warmed = (trained(config, rt, warmup_steps=n, **changes) for n in (0, 4))
    assert all(torch.equal(plain[name], warmed[name]) for name in plain)


def test_micro_batches_add_up(config, rt, without_validation):
    whole, parts = (trained(config, rt, micro_batch_tokens=n) for n in (256, 32))
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("changes", [
    {"ema_decay": 0.6}, {"swa_enabled": True, "swa_every": 3, "swa_start_frac": 0.9},
    {"lawa_enabled": True, "lawa_freq": 3, "lawa_k": 2}, {"ema_enabled": False}], ids=["ema", "swa", "lawa", "none"])
def test_a_run_ends_with_the_average_of_its_weights(config, rt, without_validation, monkeypatch, changes):
    """Of the weights after each step, counted from 1. The learning rate falls below 0.9 with step 4."""
    cfg = config(iterations=10, warmdown_iters=8, late_qat_threshold=0.0, **changes)
    torch.manual_seed(cfg.seed)
    model, step = tg.GPT(cfg), tg.Optimisers.step
    weights = lambda: torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    after = [weights()]

    def watched(*args):
        norm = step(*args)
        after.append(weights())
        return norm
    monkeypatch.setattr(tg.Optimisers, "step", watched)
    tg.train(cfg, rt, model, tg.TrainData.open(cfg, rt), validate=None)
    wanted = after[10]
    if cfg.swa_enabled or cfg.lawa_enabled:
        wanted = (after[6] + after[9]) / 2  # step 3 has the full rate (swa), or is too long ago (lawa)
    elif cfg.ema_enabled:
        wanted = after[0]
        for n in range(1, 11):
            wanted = torch.lerp(after[n], wanted, min(0.6, (1 + n) / (10 + n)))
    torch.testing.assert_close(weights(), wanted, rtol=1e-5, atol=1e-7)


def test_soft_rounding_hardens_during_a_run(config, rt, without_validation, monkeypatch):
    """From nearly nothing when QAT starts to the export's rounding in its last tenth."""
    seen, loss = [], tg.GPT.loss
    monkeypatch.setattr(tg.GPT, "loss", lambda model, ids, targets, qat=False, hook=None, weights=None: (
        seen.append((qat, model.hardness.item())) or loss(model, ids, targets, qat, hook)))
    trained(config, rt, soft_round=True, late_qat_threshold=0.8, iterations=24, warmdown_iters=20)
    hard = [hardness for qat, hardness in seen if qat]
    assert hard[0] < 0.1 and hard[-1] == 1.0 and len(hard) == 15
    wanted = [min((0.8 - (15 - i) / 20) / 0.8 / 0.9, 1.0) for i in range(15)]
    assert hard == pytest.approx(wanted)


def test_late_qat_changes_the_run(config, rt, without_validation):
    off, on = (trained(config, rt, late_qat_threshold=t, attn_qat_bits=4, mlp_quant_bits=4) for t in (0.0, 0.7))
    assert not all(torch.equal(off[name], on[name]) for name in off)


@pytest.mark.parametrize("changes, rounds", [({}, True), ({"late_qat_threshold": 0.0}, False),
                                             ({"late_qat_threshold": 0.0, "late_qat_frac": 0.5}, True)])
def test_warm_up_runs_every_graph_that_training_may_need(config, rt, without_validation, monkeypatch, changes, rounds):
    """With QAT and without it, before the first step."""
    seen, loss = [], tg.GPT.loss
    monkeypatch.setattr(tg.GPT, "loss", lambda model, ids, targets, qat=False, hook=None, weights=None: (
        seen.append(qat) or loss(model, ids, targets, qat, hook)))
    trained(config, rt, warmup_steps=4, iterations=1, **changes)
    assert seen[:4] == [False, False, rounds, rounds] and not seen[4]


def test_a_loop_begins_after_its_share_of_the_run(config, rt, without_validation, monkeypatch):
    """Both models are compiled before; what comes out is the looped one, also where training never reached it."""
    seen, loss = [], tg.GPT.loss
    monkeypatch.setattr(tg.GPT, "loss", lambda model, ids, targets, qat=False, hook=None, weights=None: (
        seen.append((model.looped, qat)) or loss(model, ids, targets, qat, hook)))
    changes = {"num_loops": 1, "loop_start": 0, "loop_end": 1, "enable_looping_at": 0.5, "late_qat_threshold": 0.1}
    looped = trained(config, rt, warmup_steps=8, iterations=6, **changes)
    assert seen[:8:2] == seen[1:8:2] == [(False, False), (False, True), (True, False), (True, True)]
    assert [loops for loops, _ in seen[8:]] == [False] * 3 + [True] * 3
    plain = trained(config, rt, iterations=6, **{**changes, "enable_looping_at": 0.99})
    assert not torch.equal(plain["qo_bank"], looped["qo_bank"])


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False}, {"clip_rule": "sdclip", "mlp_clip_sigmas": 4.0},
                                     {"qat_enabled": True}, {"fp16_keep_name_patterns": "kv_bank,tok_emb"}],
                         ids=["percentile", "untied", "sdclip", "from the start", "kept"])
def test_each_step_of_qat_sees_the_weights_as_the_export_would_round_them(config, rt, without_validation, monkeypatch,
                                                                          changes):
    """Its loss is that of a model that wears the rounded weights of this very step, not of the first one with QAT."""
    cfg = config(**{"late_qat_threshold": 0.9, "iterations": 7, "warmdown_iters": 6, "attn_qat_bits": 4,
                    "mlp_quant_bits": 3, "embed_bits": 4, "matrix_lr": 0.1, **changes})
    loss, steps = tg.GPT.loss, []

    def watched(model, ids, targets, qat=False, hook=None, weights=None):
        value, rounded = loss(model, ids, targets, qat), tg.round_model(cfg, model, {})
        plain = loss(model, ids, targets, False)
        with using_rounded_weights(model, rounded), torch.no_grad():
            worn = loss(model, ids, targets, False)
        assert torch.equal(value, worn if qat else plain)
        assert not steps or not torch.equal(worn, plain), "else it shows nothing"
        steps.append((qat, {name: scales for name, (_, scales) in rounded.items()}))
        return value
    monkeypatch.setattr(tg.GPT, "loss", watched)
    trained(lambda **_: cfg, rt)
    first = 0 if cfg.qat_enabled else 2  # the scale of step 2 is 5/6
    assert [qat for qat, _ in steps] == [step >= first for step in range(7)]
    kept = {"kv_bank", "tok_emb.weight"} if cfg.fp16_keep_name_patterns else set()
    assert kept.isdisjoint(steps[-1][1])
    assert not torch.equal(steps[-1][1]["mlp_up_bank"], steps[first][1]["mlp_up_bank"]), "else it shows nothing"


def test_the_log_shows_the_mean_loss_of_the_global_batch(run, config, corpus):
    """Of step 1 with weights that have not moved, micro-batches or not."""
    for variables in ({}, {"MICRO_BATCH_TOKENS": 64}):
        done = run(ITERATIONS=1, TTT_ENABLED=0, EVAL_STRIDE=0, COMPRESS="lzma", **variables)
        event = next(e for e in map(json.loads, (done.folder / "logs/tiny.jsonl").read_text().splitlines())
                     if e["event"] == "train")
        torch.manual_seed(1337)
        model, ids = tg.GPT(config()), torch.from_numpy(corpus.train[:257].astype("int64"))
        with torch.no_grad():
            wanted = model.loss(ids[:-1].view(8, 32), ids[1:].view(8, 32)).item()
        assert event["train_loss"] == pytest.approx(wanted, rel=1e-5)


def test_seeds(run):
    """One seed, one run; two seeds, two runs, from the first weights on."""
    made = []
    for seed in (1, 1, 2):
        done = run(SEED=seed, ITERATIONS=2, TTT_ENABLED=0, EVAL_STRIDE=0, VAL_LOSS_EVERY=2, COMPRESS="lzma")
        first = next(line for line in done.out.splitlines() if line.startswith("step:0/2 val_loss"))
        assert f"seed:{seed}" in done.out.splitlines()
        made.append(((done.folder / "final_model.ptz").read_bytes(), first.split(" train_time")[0]))
    assert made[0] == made[1] and made[0][0] != made[2][0] and made[0][1] != made[2][1]


@pytest.fixture
def spoilt(monkeypatch):
    """Multiplies the loss by `value` in these steps, counted from 1; returns the list of all calls."""
    def start(value, steps):
        loss, calls = tg.GPT.loss, []

        def broken(*args, **kwargs):
            calls.append(1)
            return loss(*args, **kwargs) * (value if len(calls) in steps else 1.0)
        monkeypatch.setattr(tg.GPT, "loss", broken)
        return calls
    return start


@pytest.mark.parametrize("log_every", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_that_diverges_ends_after_three_steps(run, spoilt, value, log_every):
    calls = spoilt(value, {3, 5, 6, 8, 9, 10, 11})
    done = run(ITERATIONS=50, TRAIN_LOG_EVERY=log_every, VAL_LOSS_EVERY=0)
    assert done.code == 2 and done.summary is None and len(calls) == 10
    assert done.err == ("error: training diverged: the gradients of 3 steps in a row, up to step 10, are not finite; "
                        "lower MATRIX_LR or SCALAR_LR\n")
    assert [int(line.split()[2]) for line in done.out.splitlines() if "is not applied" in line] == [3, 5, 6, 8, 9, 10]
    assert not (done.folder / "final_model.ptz").exists() and not (done.folder / "final_model.pt").exists()


@pytest.mark.parametrize("changes", [{}, {"normuon": True, "muon_wd": 0.5}, {"matrix_optimizer": "adamw"}],
                         ids=["muon", "normuon", "adamw"])
def test_a_step_without_a_finite_gradient_changes_nothing(config, rt, changes):
    """Neither weights nor buffers; the next step is that of a run without it."""
    cfg = config(mtp_num_heads=1, **changes)

    def trained(gradients):
        torch.manual_seed(0)
        model = scrambled(tg.GPT(cfg))
        optimisers = tg.Optimisers(model, cfg, rt)
        for value in gradients:
            generator = torch.Generator().manual_seed(1)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            model.skip_weights.grad[0, 0] *= value
            norm = optimisers.step(tg.StepPlan(0.5, 0.9, False, False))
            assert norm.isfinite() == math.isfinite(value) and all(p.grad is None for p in model.parameters())
        return [*model.parameters(), *optimisers.muon.momentum, *optimisers.muon.row_memory,
                *(value for p in optimisers.replicated for value in optimisers.adamw.state[p].values())]
    wanted = trained([1.0, 0.5, 2.0])
    for got, want in zip(trained([1.0, math.nan, 0.5, math.inf, -math.inf, 2.0]), wanted, strict=True):
        assert torch.equal(got, want)
