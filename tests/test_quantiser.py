import dataclasses
import math
import re
import sys

import numpy as np
import pytest
import torch
import train_gpt as tg
from conftest import ROOT, make_runtime, scrambled
from hypothesis import given, settings, strategies as st

sys.path.append(str(ROOT / "tools"))
from export_bench import using_rounded_weights  # noqa: E402

shapes = st.lists(st.integers(1, 40), min_size=2, max_size=3)
specs = st.builds(tg.QuantSpec, st.integers(2, 8), st.sampled_from(["percentile", "amax", "sdclip"]),
                  st.sampled_from([3.0, 12.85]), st.sampled_from([1.0, 1.7]))


def weight_of(shape, seed, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    weight = spread * torch.randn(shape, generator=generator)
    return weight * torch.rand(shape[:-1], generator=generator).unsqueeze(-1).exp()


@given(shapes, specs, st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_fake_quantisation_is_exactly_the_export(shape, spec, seed):
    weight = weight_of(shape, seed)
    codes, scales = tg.quantise(weight, spec)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert codes.abs().max() <= spec.max_code
    assert torch.equal(tg.fake_quantise(weight, tg.row_scales(weight, spec), spec), tg.dequantise(codes, scales))


@given(shapes, specs, st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_gradient_goes_straight_through(shape, spec, seed):
    weight = weight_of(shape, seed).requires_grad_()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tg.fake_quantise(weight, tg.row_scales(weight.detach(), spec), spec).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@given(st.integers(1, 400), st.lists(st.sampled_from((0.9, *tg.PERCENTILES)), min_size=1), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_upper_quantiles_are_numpys(columns, shares, seed):
    rows = weight_of((3, columns), seed).abs()
    wanted = np.quantile(rows.double().numpy(), shares, axis=1)[..., None]
    np.testing.assert_allclose(tg.upper_quantiles(rows, tuple(shares)).numpy(), wanted, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_each_row_gets_the_candidate_of_least_error(bits):
    weight, spec = weight_of((30, 700), 1), tg.QuantSpec(bits)
    chosen = tg.dequantise(*tg.quantise(weight, spec))
    for row, got in zip(weight, chosen):
        errors = []
        for share in tg.PERCENTILES:
            scale = (torch.quantile(row.abs(), share) / spec.max_code).half().float()
            errors.append(((row / scale).round().clamp(-spec.max_code, spec.max_code) * scale - row).square().sum())
        assert (got - row).square().sum() <= min(errors) * 1.0001
    widest = tg.dequantise(*tg.quantise(weight, tg.QuantSpec(bits, "amax")))
    assert (chosen - weight).square().mean() <= (widest - weight).square().mean()


def test_the_scale_fits_the_row_without_a_coarse_floor():
    """PR 1092's floor of 1/31 would make this [3, -2, 1, 9]."""
    codes, scales = tg.quantise(torch.tensor([[0.1, -0.05, 0.02, 0.301]]), tg.QuantSpec(6, "amax"))
    assert codes.tolist() == [[10, -5, 2, 31]] and scales.item() == pytest.approx(0.0097097, rel=1e-3)


@pytest.mark.parametrize("clip", ["percentile", "amax", "sdclip"])
def test_a_table_of_small_numbers_has_a_grid_of_its_own(clip):
    """Of spread 0.005, as the token table is at first: 8 bits leave errors of a few per cent of that, in all rows."""
    weight = 0.005 * torch.randn(20, 512, generator=torch.Generator().manual_seed(0))
    weight[7] *= 0.1
    codes, scales = tg.quantise(weight, tg.QuantSpec(8, clip, 8.0))
    error = (tg.dequantise(codes, scales) - weight).std(-1) / weight.std(-1)
    assert error.max() < 0.03 and codes.abs().amax(-1).min() >= 40


def test_rows_of_zeros_stay_zero():
    codes, scales = tg.quantise(torch.zeros(2, 3, 5), tg.QuantSpec(6))
    assert not codes.any() and torch.isfinite(tg.dequantise(codes, scales)).all()


def test_sdclip_places_the_largest_code_at_so_many_deviations():
    weight = weight_of((4, 300), 2)
    scale = tg.row_scales(weight, tg.QuantSpec(6, "sdclip", 12.85))
    torch.testing.assert_close(scale, 12.85 * weight.std(-1, keepdim=True) / 31, rtol=4e-3, atol=0)


def test_a_doubled_sdclip_is_one_bit_less_to_the_entropy_coder():
    """And one bit less at the same clip is the same codes: SIZE_FIT needs no knob for bits."""
    weight = torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    sizes = [tg.order0_bytes(tg.quantise(weight, tg.QuantSpec(6, "sdclip", k))[0].numpy()) * 8 / weight.numel()
             for k in (4, 8)]
    assert sizes[0] - sizes[1] == pytest.approx(1, abs=0.02)
    assert sizes[0] == pytest.approx(math.log2(31 / 4) + 0.5 * math.log2(2 * math.pi * math.e), abs=0.02)
    fewer, wider = (tg.quantise(weight, tg.QuantSpec(b, "amax", widen=w))[0] for b, w in ((5, 1.0), (6, 31 / 15)))
    assert (fewer == wider).float().mean() > 0.999


# ---- soft rounding

def test_soft_round_has_its_wells_on_the_grid():
    u = torch.tensor([0.1, 0.25, 0.5, 0.9])
    torch.testing.assert_close(tg.soft_round(u), torch.tensor([0.00645, 0.09085, 0.5, 0.99355]), atol=1e-5, rtol=0)
    whole = torch.arange(-31.0, 32.0)
    torch.testing.assert_close(tg.soft_round(whole), whole, atol=2e-5, rtol=0)
    u = torch.linspace(-3, 3, 601, requires_grad=True)
    y = tg.soft_round(u)
    assert (y.diff() >= -1e-6).all() and ((y - u.round()).abs() <= (u - u.round()).abs() + 1e-6).all()
    y.sum().backward()
    torch.testing.assert_close(u.grad, 1 - torch.cos(2 * math.pi * u.detach()), atol=1e-4, rtol=1e-4)


@given(shapes, specs, st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_soft_rounding_hardens_into_exactly_the_export(shape, spec, seed):
    weight = weight_of(shape, seed)
    scale, hard = tg.row_scales(weight, spec), tg.dequantise(*tg.quantise(weight, spec))
    away = [(tg.fake_quantise(weight, scale, spec, torch.tensor(h)) - hard).abs().sum() for h in (0.0, 0.3, 0.7, 1.0)]
    assert all(later <= sooner + 1e-6 for sooner, later in zip(away, away[1:]))
    assert torch.equal(tg.fake_quantise(weight, scale, spec, torch.tensor(1.0)), hard)


def test_hardness_reaches_one_before_a_run_ends_whatever_ends_it():
    def run_of(**changes):
        cfg = dataclasses.replace(tg.Hyperparameters(soft_round=True), **changes)
        steps = [tg.plan_step(cfg, s, 6.0 * s, 6.0) for s in range(100)]  # the clock stops it at step 100
        return [plan.hardness for plan in steps if plan.qat]
    for changes in ({"qat_enabled": True}, {"late_qat_frac": 0.5}, {"warmdown_iters": 60, "late_qat_threshold": 0.5},
                    {"warmdown_frac": 0.6, "min_lr": 0.1, "late_qat_threshold": 0.5}):
        hardness = run_of(**changes)
        assert len(hardness) >= 20 and hardness[0] < 0.1 and hardness[-1] == 1.0 and hardness == sorted(hardness)


def test_hardness_acts_in_a_compiled_graph_without_compiling_again(config):
    from torch._dynamo.testing import CompileCounter
    cfg = config(num_layers=2, ve_layers="", ve_enabled=False, soft_round=True, mlp_quant_bits=4, attn_qat_bits=4)
    model = scrambled(tg.GPT(cfg, qat_specs=tg.quant_specs(cfg, [n for n, _ in tg.GPT(cfg).named_parameters()])))
    counter, ids = CompileCounter(), torch.arange(64).view(2, 32)
    loss_fn, losses = torch.compile(model.loss, backend=counter, fullgraph=True, dynamic=False), []
    for hardness in (0.0, 0.5, 1.0):
        model.refresh_scales(hardness)
        losses.append(loss_fn(ids, ids, True).item())
    assert counter.frame_count == 1 and len(set(losses)) == 3
    assert losses[2] == pytest.approx(tg.GPT.loss(model, ids, ids, True).item())
    assert "hardness" not in model.state_dict()


# ---- GPTQ

def problem(matrices=2, rows=6, columns=40, seed=0):
    """Weights, and the sums x x^T of strongly correlated inputs of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(matrices, columns, columns, generator=generator)
    mix = mix * torch.rand(matrices, 1, columns, generator=generator)
    inputs = torch.randn(matrices, 300, columns // 4, generator=generator) @ mix[:, :columns // 4]
    inputs += 0.1 * torch.randn(matrices, 300, columns, generator=generator)
    return torch.randn(matrices, rows, columns, generator=generator), inputs.mT @ inputs


def slow_gptq(weight, hessian, scale, top):
    """One matrix: round the column with the largest input, then move all others to where they serve best. Repeat."""
    w, h = weight.double().clone(), hessian.double()
    h = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=torch.double)
    codes, order = torch.zeros_like(w), hessian.diagonal().argsort(descending=True).tolist()
    for i, j in enumerate(order):
        codes[:, j] = (w[:, j] / scale[:, 0]).round().clamp(-top, top)
        error, rest = codes[:, j] * scale[:, 0].double() - w[:, j], order[i + 1:]
        if rest:
            w[:, rest] -= torch.outer(error, torch.linalg.solve(h[rest][:, rest], h[rest, j]))
    return codes


def change(weight, codes, scales, hessian):
    error = tg.dequantise(codes, scales) - weight
    return float(((error @ hessian) * error).sum())



@pytest.mark.parametrize("block, spec", [(7, tg.QuantSpec(4, "amax")), (128, tg.QuantSpec(4, "amax")),
                                         (7, tg.QuantSpec(5)), (128, tg.QuantSpec(6, "sdclip", 5.0, 1.3))])
def test_gptq_is_the_slow_and_obvious_one(monkeypatch, block, spec):
    monkeypatch.setattr(tg, "GPTQ_BLOCK", block)
    weight, hessian = problem()
    codes, scales = tg.quantise(weight, spec, None, hessian, "bank")
    assert codes.dtype == torch.int8 and torch.equal(scales.float(), tg.row_scales(weight, spec))
    for w, h, c, s in zip(weight, hessian, codes, scales.float()):
        assert torch.equal(c, slow_gptq(w, h, s, spec.max_code).to(torch.int8))


@pytest.mark.parametrize("spec", [tg.QuantSpec(3), tg.QuantSpec(4), tg.QuantSpec(6, "sdclip", 12.85)])
def test_gptq_changes_the_output_much_less_than_rounding_to_nearest(spec):
    weight, hessian = problem(columns=200)
    nearest, ours = tg.quantise(weight, spec), tg.quantise(weight, spec, None, hessian, "bank")
    assert change(weight, *ours, hessian) < 0.5 * change(weight, *nearest, hessian)


@pytest.mark.parametrize("clip", ["percentile", "amax", "sdclip"])
def test_gptq_keeps_the_scales_that_late_qat_trained_on(clip):
    (weight, hessian), spec = problem(columns=90), tg.QuantSpec(4, clip, 4.0, 1.5)
    assert torch.equal(tg.quantise(weight, spec, None, hessian, "bank")[1].float(), tg.row_scales(weight, spec))


def test_gptq_without_correlation_is_rounding_to_nearest():
    weight, spec = problem()[0], tg.QuantSpec(4, "amax")
    diagonal = torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) + 0.1
    for hessian in (torch.eye(40).expand(2, 40, 40), torch.diag_embed(diagonal)):
        assert all(map(torch.equal, tg.quantise(weight, spec, None, hessian, "bank"), tg.quantise(weight, spec)))


def test_gptq_gives_the_same_bits_each_time_and_leaves_its_inputs_alone():
    (weight, hessian), spec = problem(columns=150), tg.QuantSpec(4)
    before = weight.clone(), hessian.clone()
    once, again = (tg.quantise(weight, spec, None, hessian, "bank") for _ in range(2))
    assert all(map(torch.equal, once, again)) and all(map(torch.equal, before, (weight, hessian)))


def test_gptq_does_not_mind_the_order_of_columns_or_of_matrices():
    (weight, hessian), spec = problem(), tg.QuantSpec(4)
    codes, _ = tg.quantise(weight, spec, None, hessian, "bank")
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    moved, _ = tg.quantise(weight[..., shuffle], spec, None, hessian[:, shuffle][:, :, shuffle], "bank")
    assert torch.equal(moved, codes[..., shuffle])
    assert torch.equal(tg.quantise(weight.flip(0), spec, None, hessian.flip(0), "bank")[0], codes.flip(0))


def test_columns_without_input_become_zero_and_change_nothing_else():
    (weight, hessian), spec = problem(), tg.QuantSpec(6, "amax")
    dead = torch.zeros(40, dtype=torch.bool).index_fill(0, torch.tensor([3, 17, 39]), True)
    weight[..., 0] = 9.0  # the row's largest, so that the scale is the same without the dead columns
    hessian = hessian.masked_fill(dead, 0).masked_fill(dead[:, None], 0)
    codes, _ = tg.quantise(weight, spec, None, hessian, "bank")
    assert not codes[..., dead].any()
    alive, _ = tg.quantise(weight[..., ~dead], spec, None, hessian[:, ~dead][:, :, ~dead], "bank")
    assert (codes[..., ~dead] == alive).float().mean() > 0.97  # the damping's mean knows of them, hence not all


def test_a_hessian_that_cannot_be_used_is_named():
    weight, hessian = problem()
    for bad in (float("nan"), float("inf"), -1e9):
        broken = hessian.clone()
        broken[1, 5, 5] = bad
        with pytest.raises(tg.UserError, match="Hessian of bank.1. is singular or not finite.*GPTQ_"):
            tg.quantise(weight, tg.QuantSpec(6), None, broken, "bank")


def test_damping_is_raised_where_it_is_needed():
    slightly_wrong = torch.diag(torch.tensor([1.0, 1.0, 1.0, -0.05])).double()[None]
    factor = tg.inverse_factor(slightly_wrong, "it")[0]
    torch.testing.assert_close(factor.diagonal()[0].item(), (1 + 0.1 * 0.7375) ** -0.5)
    whole = torch.randn(1, 9, 9, generator=torch.Generator().manual_seed(0)).double()
    whole = whole @ whole.mT
    factor = tg.inverse_factor(whole, "it")[0].double()
    damped = whole[0] + 0.01 * whole[0].diagonal().mean() * torch.eye(9)
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-6)
    assert torch.equal(factor, factor.triu())


# ---- calibration

def trained_like(cfg):
    torch.manual_seed(0)
    return scrambled(tg.GPT(cfg)).eval()


@pytest.mark.parametrize("tied, loops", [(True, 0), (False, 0), (True, 2)])
def test_hessians_are_the_sums_of_outer_products_of_inputs(config, rt, tied, loops):
    """Of every visit of a layer that loops."""
    cfg = config(tie_embeddings=tied, num_loops=loops, loop_start=1, loop_end=1, parallel_start_layer=2)
    model, ids = trained_like(cfg), torch.arange(64).view(2, 32)
    seen = {}

    def keep(kind, visit, weight):
        if kind == "embed":
            return weight
        def record(x, source):
            place = kind, -1 if visit < 0 else [0, *[1] * (1 + loops), 2][visit]
            seen[place] = torch.cat((seen.get(place, x[:0].flatten(0, -2)), x.flatten(0, -2)))
            return torch.nn.functional.linear(x, weight)
        return record
    with torch.no_grad():
        plain = model.logits(model.hidden(ids, hook=keep), hook=keep)
        look = tg.HessianSums(model)
        for rows in ids:
            looked = model.logits(model.hidden(rows[None], hook=look), hook=look)
    torch.testing.assert_close(looked[0], plain[1])
    sums = look.by_parameter(rt)
    assert set(sums) == {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank",
                         "tok_emb.weight" if tied else "lm_head.weight"}
    for name, kinds in (("qo_bank", ["query", "out"]), ("kv_bank", ["key", "value"]), ("mlp_up_bank", ["up"]),
                        ("mlp_down_bank", ["down"])):
        wanted = [seen[kind, i].T @ seen[kind, i] for kind in kinds for i in range(cfg.num_layers)]
        torch.testing.assert_close(sums[name], torch.stack(wanted), rtol=1e-4, atol=1e-4)
        assert len(sums[name]) == len(getattr(model, name))
    head = seen["head", -1]
    torch.testing.assert_close(sums[look.head], (head.T @ head)[None], rtol=1e-4, atol=1e-4)


def test_two_ranks_look_at_what_one_would(config, tmp_path):
    cfg = config(gptq_enabled=True, gptq_calibration_batches=3)
    model, sums = trained_like(cfg), []
    for world in (1, 2):
        parts = []
        for rank in range(world):
            rt = make_runtime(tmp_path)
            alone = dataclasses.replace(tg.TrainData.open(cfg, rt),
                                        rt=make_runtime(tmp_path, rank=rank, world_size=world))
            parts.append(tg.calibrate(cfg, rt, model, alone, 6, math.inf))
        sums.append({name: sum(part[name] for part in parts) for name in parts[0]})
    for name in sums[0]:
        torch.testing.assert_close(sums[0][name], sums[1][name], rtol=1e-4, atol=1e-3)


def test_gptq_rounds_the_banks_and_the_head_of_a_model(config, rt):
    cfg = config(gptq_enabled=True, mlp_quant_bits=3, attn_qat_bits=3, gptq_calibration_batches=4, clip_rule="amax")
    model, data = trained_like(cfg), tg.TrainData.open(cfg, rt)
    hessians = tg.calibrate(cfg, rt, model, data, 6, math.inf)
    ours, nearest = (tg.round_model(cfg, model, h) for h in (hessians, {}))
    assert set(ours) == set(nearest) == set(tg.quant_specs(cfg, dict(model.named_parameters())))
    params = dict(model.named_parameters())
    for name in ours:
        assert ours[name][0].shape == params[name].shape and ours[name][1].shape == (*params[name].shape[:-1], 1)
        assert torch.equal(ours[name][1], nearest[name][1])
        assert torch.equal(ours[name][0], nearest[name][0]) == (name not in hessians)
    inputs, targets = next(data.batch(7))
    with torch.no_grad():
        exact = model.logits(model.hidden(inputs))
        away = []
        for rounded in (ours, nearest):
            with using_rounded_weights(model, rounded):
                away.append((model.logits(model.hidden(inputs)) - exact).square().mean())
        assert torch.equal(model.logits(model.hidden(inputs)), exact), "the model must get its weights back"
    assert away[0] < 0.7 * away[1]


def test_the_models_own_text(config, rt):
    cfg = config(gptq_calibration="self", gptq_calibration_batches=2)
    model = trained_like(cfg)
    once, again = ([x.clone() for pair in tg.self_generated_text(cfg, rt, model) for x in pair] for _ in range(2))
    assert len(once) == 4 and all(map(torch.equal, once, again)) and not torch.equal(once[0], once[2])
    for inputs, targets in (once[:2], once[2:]):
        assert inputs.shape == targets.shape == (4, 32) and torch.equal(inputs[:, 1:], targets[:, :-1])
        assert inputs.min() >= 0 and targets.max() < cfg.vocab_size
    assert tg.calibrate(dataclasses.replace(cfg, gptq_enabled=True), rt, model, None, 0, math.inf)


def test_calibration_ends_with_its_time_and_says_when_it_ran_over(config, tmp_path, capsys):
    cfg = config(gptq_enabled=True, gptq_calibration_batches=1000)
    rt = make_runtime(tmp_path, log=tg.RunLog(tmp_path, "test"))
    data, model = tg.TrainData.open(cfg, rt), trained_like(cfg)
    hessians = tg.calibrate(cfg, rt, model, data, 0, 0.0)
    said = capsys.readouterr().out
    assert hessians["qo_bank"].abs().sum() > 0 and "from 256 tokens" in said
    assert "more than was left of MAX_WALLCLOCK_SECONDS; raise GPTQ_RESERVE_SECONDS" in said


def test_calibration_takes_its_time_from_training():
    cfg = tg.Hyperparameters()
    assert cfg.train_seconds == 600 and dataclasses.replace(cfg, gptq_enabled=True).train_seconds == 588
    cfg = dataclasses.replace(cfg, gptq_enabled=True, gptq_reserve_seconds=100.0, iterations=10 ** 6, warmdown_frac=0.5)
    assert cfg.train_seconds == 500 and dataclasses.replace(cfg, max_wallclock_seconds=0.0).train_seconds == 0
    assert tg.plan_step(cfg, 1, 250.0, 1.0).lr_scale == 1.0 and tg.plan_step(cfg, 1, 375.0, 1.0).lr_scale == 0.5


@pytest.mark.parametrize("variables, said", [
    ({"MLP_QUANT_BITS": "9"}, "MLP_QUANT_BITS=9 is out of range: 2 to 8"),
    ({"EMBED_BITS": "1"}, "EMBED_BITS=1 is out of range"),
    ({"CLIP_RULE": "median"}, "not one of percentile, amax, sdclip"),
    ({"MATRIX_CLIP_SIGMAS": "0"}, "MATRIX_CLIP_SIGMAS=0 is out of range"),
    ({"GPTQ_CALIBRATION": "val"}, "not one of train, self"),
    ({"GPTQ_ENABLED": "1", "GPTQ_RESERVE_SECONDS": "600"},
     "GPTQ_RESERVE_SECONDS=600 leaves nothing of MAX_WALLCLOCK_SECONDS"),
    ({"GPTQ_ENABLED": "1", "GPTQ_RESERVE_SECONDS": "700"}, "GPTQ_RESERVE_SECONDS=700 leaves nothing"),
])
def test_bad_settings(variables, said):
    with pytest.raises(tg.UserError, match=said):
        tg.Hyperparameters.from_env(variables)


def test_one_name_for_both_banks_and_a_bank_of_its_own_name():
    cfg = tg.Hyperparameters.from_env({"MATRIX_BITS": "5", "MLP_QUANT_BITS": "4", "MATRIX_CLIP_SIGMAS": "10"})
    assert (cfg.attn_qat_bits, cfg.mlp_quant_bits, cfg.mlp_clip_sigmas, cfg.attn_clip_sigmas) == (5, 4, 10, 10)


def test_families_kept_as_floats(config):
    cfg = config(fp16_keep_name_patterns="tok_emb", int8_keep_float_fp32_name_patterns="kv_bank")
    specs = tg.quant_specs(cfg, [name for name, _ in tg.GPT(cfg).named_parameters()])
    assert {"tok_emb.weight", "kv_bank"} & set(specs) == set() and "qo_bank" in specs


# ---- SIZE_FIT

@pytest.fixture
def fitting(config, tmp_path):
    """Fits a tiny model into a share of its size; returns settings, artifact, limit and log."""
    def start(share, **changes):
        cfg = config(size_fit=True, gptq_calibration_batches=1, compress="lzma", **changes)
        rt = make_runtime(tmp_path, log=tg.RunLog(tmp_path, "test"))
        model = trained_like(cfg)
        hessians = tg.calibrate(cfg, rt, model, tg.TrainData.open(cfg, rt), 6, math.inf)
        assert bool(hessians) == cfg.gptq_enabled
        make = lambda c: tg.pack(c, model, "0" * 64, tg.round_model(c, model, hessians))
        total, banks = len(make(cfg).blob), sum(p.numel() for n, p in model.named_parameters() if n.endswith("_bank"))
        cfg = dataclasses.replace(cfg, artifact_limit_bytes=int(share * total))
        fitted, artifact = tg.fit_size(cfg, rt, banks, make, total, 0)
        assert artifact.blob == make(fitted).blob
        return fitted, len(artifact.blob), cfg.artifact_limit_bytes
    return start


@pytest.mark.parametrize("share, changes", [(0.8, {}), (0.9, {"gptq_enabled": True}),
                                            (0.72, {"clip_rule": "sdclip", "mlp_clip_sigmas": 6.0})])
def test_size_fit_lands_just_under_the_limit(fitting, capsys, share, changes):
    fitted, size, limit = fitting(share, **changes)
    assert 0.995 * limit <= size <= limit and fitted.clip_widen > 1.1
    assert "size_fit:start" in capsys.readouterr().out


def test_size_fit_says_so_when_it_cannot(fitting):
    with pytest.raises(tg.UserError, match="SIZE_FIT=1 cannot reach ARTIFACT_LIMIT_BYTES.*fewer parameters or table"):
        fitting(0.1)


def test_a_whole_run_calibrates_rounds_and_fits(run):
    free = run(GPTQ_ENABLED=1, GPTQ_CALIBRATION_BATCHES=2, TTT_ENABLED=0, EVAL_STRIDE=0, ITERATIONS=3, COMPRESS="lzma")
    assert free.code == 0
    assert re.search(r"GPTQ:collected 13 Hessians in [\d.]+s from 512 tokens per rank \(train\)", free.out)
    limit = free.summary["total_bytes"] - 8000
    tight = dict(GPTQ_ENABLED=1, GPTQ_CALIBRATION_BATCHES=2, TTT_ENABLED=0, EVAL_STRIDE=0, ITERATIONS=3,
                 COMPRESS="lzma", ARTIFACT_LIMIT_BYTES=limit)
    assert run(**tight).code == 2
    done = run(**tight, SIZE_FIT=1)
    assert done.code == 0 and 0.995 * limit <= done.summary["total_bytes"] <= limit


# ---- water-filling

def test_curvature_is_the_gradients_and_what_later_columns_do_not_explain():
    """Per row, E[g^2]; per column, the variance of its input given those rounded after it. All of it by hand."""
    _, hessian = problem(columns=12)
    hessian, generator = hessian / 300, torch.Generator().manual_seed(3)
    strength = torch.rand(2, 6, 1, generator=generator) + 0.5
    rows, columns = tg.curvature(strength * hessian.diagonal(dim1=-2, dim2=-1)[:, None], hessian, "bank")
    for i, h in enumerate(hessian.double()):
        h = h + 0.01 * h.diagonal().mean() * torch.eye(12, dtype=torch.double)
        order = hessian[i].diagonal().argsort(descending=True).tolist()
        for at, j in enumerate(order):
            rest = order[at + 1:]
            explained = h[j, rest] @ torch.linalg.solve(h[rest][:, rest], h[rest, j]) if rest else 0.0
            product = rows[i].double() * columns[i, 0, j].double()
            torch.testing.assert_close(product, strength[i].double() * (h[j, j] - explained), rtol=1e-3, atol=0)
    torch.testing.assert_close(columns.log().mean(-1), torch.zeros(2, 1), atol=1e-5, rtol=0)


def test_rows_and_columns_that_nothing_reaches_cost_nothing_and_break_nothing():
    _, hessian = problem()
    hessian[:, 3] = hessian[:, :, 3] = 0
    squares = hessian.diagonal(dim1=-2, dim2=-1)[:, None].expand(2, 6, 40).clone()
    squares[:, 2] = 0
    rows, columns = tg.curvature(squares, hessian, "bank")
    assert (rows > 0).all() and (columns > 0).all() and rows.isfinite().all() and columns.isfinite().all()
    torch.testing.assert_close(rows[:, 2] / rows.mean(1), torch.full((2, 1), 0.03), rtol=0.02, atol=0)
    steps = tg.water_fill({"a": (rows, columns)}, 0.01, 0.75)["a"]
    codes, _ = tg.quantise(problem()[0], tg.QuantSpec(tg.WATER_BITS, "waterfill"), steps, hessian, "bank")
    assert not codes[..., 3].any() and codes.dtype == torch.int16


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_matrix_without_a_usable_gradient_is_named(value):
    squares = torch.ones(2, 3, 4)
    squares[1] = value
    with pytest.raises(tg.UserError, match="gradient of bank.1. is zero or not finite"):
        tg.curvature(squares, None, "bank")


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_steps_of_water_filling_cost_what_was_asked_for(exponent):
    """The sum of curvature * step^2 / 24, within what the grid leaves; with exponent 1 all weights cost alike."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).mul(2).exp()
    factors = {"bank": (draw(3, 50, 1), draw(3, 1, 40)), "table": (draw(70, 1), draw(1, 20))}
    steps, coarser = (tg.water_fill(factors, nats, exponent) for nats in (0.01, 0.16))
    costs = {name: rows * columns * steps[name].float() ** 2 / 24 for name, (rows, columns) in factors.items()}
    near = 0.05 if exponent else 0.2  # then there is but one step, which is on the grid
    assert sum(float(cost.sum()) for cost in costs.values()) == pytest.approx(0.01, rel=near)
    assert all(torch.equal(coarser[name].rows, steps[name].rows + 2 * tg.STEPS_PER_OCTAVE) for name in steps)
    if exponent == 1:
        for cost in costs.values():
            assert cost.max() / cost.min() < 2 ** (4 / tg.STEPS_PER_OCTAVE) * 1.001
    if exponent == 0:
        assert len({float(size) for s in steps.values() for size in (s.float().max(), s.float().min())}) == 1


def test_gradients_are_those_of_each_piece_of_text_by_itself(config, rt):
    cfg = config(clip_rule="waterfill", gptq_enabled=True, late_qat=False, gptq_calibration_batches=1)
    model, data = trained_like(cfg), tg.TrainData.open(cfg, rt)
    wanted, tokens, name = 0.0, 0, "bigram.embed.weight"
    for inputs, targets in data.batch(6):
        for x, y in zip(inputs, targets):
            model.zero_grad()
            model.nll(x[None], y[None]).sum().backward()
            wanted, tokens = wanted + model.get_parameter(name).grad.square(), tokens + len(x)
    rows, columns = tg.loss_curvature(cfg, rt, model, data, 6, {}, math.inf)[name]
    mean = (wanted / tokens).mean(-1, keepdim=True)
    torch.testing.assert_close(rows, mean.maximum(0.03 * mean.mean()), rtol=1e-3, atol=0)
    assert (columns == 1).all()


@pytest.mark.parametrize("start", [1e-5, 10.0])
def test_size_fit_moves_water_filling_both_ways(config, tmp_path, start):
    """From steps much too fine and from steps much too coarse, to the same place."""
    cfg = config(size_fit=True, compress="range", clip_rule="waterfill", gptq_enabled=True, late_qat=False)
    rt, model = make_runtime(tmp_path), trained_like(cfg)
    params = dict(model.named_parameters())
    factors = {name: tg.curvature(params[name].detach().square(), None, []) for name in tg.quant_specs(cfg, params)}
    make = lambda c: tg.pack(c, model, "0" * 64, tg.round_model(c, model, {}, factors))
    limit = len(make(dataclasses.replace(cfg, waterfill_nats=1e-2)).blob)
    cfg = dataclasses.replace(cfg, artifact_limit_bytes=limit, waterfill_nats=start)
    weights = sum(params[name].numel() for name in factors)
    fitted, artifact = tg.fit_size(cfg, rt, weights, make, len(make(cfg).blob), 0)
    assert 0.995 * limit <= len(artifact.blob) <= limit and artifact.blob == make(fitted).blob
    assert 0.5e-2 < fitted.waterfill_nats < 2e-2 and fitted.mlp_quant_bits == cfg.mlp_quant_bits


def test_a_whole_run_is_water_filled(run):
    variables = dict(CLIP_RULE="waterfill", GPTQ_ENABLED=1, LATE_QAT=0, GPTQ_CALIBRATION_BATCHES=2, TTT_ENABLED=0,
                     EVAL_STRIDE=0, ITERATIONS=4)
    free = run(WATERFILL_NATS=1e-3, **variables)
    assert free.code == 0, free.err
    assert "waterfill:gradients of 512 tokens" in free.out and "final_waterfill_roundtrip" in free.out
    assert abs(free.summary["val_bpb_roundtrip"] - free.summary["val_bpb_pre_quant"]) < 0.03
    for limit in (free.summary["total_bytes"] - 3000, free.summary["total_bytes"] + 3000):
        done = run(SIZE_FIT=1, ARTIFACT_LIMIT_BYTES=limit, WATERFILL_NATS=1e-3, **variables)
        assert done.code == 0 and 0.995 * limit <= done.summary["total_bytes"] <= limit, done.err


@pytest.mark.parametrize("variables, said", [
    ({"GPTQ_ENABLED": 0, "LATE_QAT": 0}, "CLIP_RULE='waterfill' rounds by GPTQ's Hessians"),
    ({"GPTQ_ENABLED": 1, "LATE_QAT": 1}, "CLIP_RULE='waterfill' has no steps before the end")])
def test_water_filling_needs_calibration_and_no_qat(variables, said):
    with pytest.raises(tg.UserError, match=re.escape(said)):
        tg.Hyperparameters.from_env({"CLIP_RULE": "waterfill", **{k: str(v) for k, v in variables.items()}})
