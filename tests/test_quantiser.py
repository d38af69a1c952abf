import numpy as np
import pytest
import torch
import train_gpt as tg
from hypothesis import given, settings, strategies as st

shapes = st.lists(st.integers(1, 40), min_size=2, max_size=3)
specs = st.builds(tg.QuantSpec, st.integers(2, 8), st.sampled_from(["percentile", "amax"]))


def weight_of(shape, seed, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(shape, generator=generator) * torch.rand(shape[:-1], generator=generator).unsqueeze(-1).exp()


@given(shapes, specs, st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_fake_quantisation_is_exactly_the_export(shape, spec, seed):
    weight = weight_of(shape, seed)
    codes, scales = tg.quantise(weight, spec)
    assert codes.dtype == torch.int8 and scales.dtype == torch.float16
    assert codes.abs().max() <= spec.top
    assert torch.equal(tg.fake_quantise(weight, tg.row_scales(weight, spec), spec), tg.dequantise(codes, scales))


@given(shapes, specs, st.integers(0, 10))
@settings(max_examples=30, deadline=None)
def test_gradient_goes_straight_through(shape, spec, seed):
    weight = weight_of(shape, seed).requires_grad_()
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tg.fake_quantise(weight, tg.row_scales(weight.detach(), spec), spec).backward(upstream)
    assert torch.equal(weight.grad, upstream)


@given(st.integers(1, 400), st.sampled_from(tg.PERCENTILES), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_upper_quantile_is_numpys(columns, share, seed):
    rows = weight_of((3, columns), seed).abs()
    wanted = np.quantile(rows.double().numpy(), share, axis=1, keepdims=True)
    np.testing.assert_allclose(tg.upper_quantile(rows, share).numpy(), wanted, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_each_row_gets_the_candidate_of_least_error(bits):
    weight, spec = weight_of((30, 700), 1), tg.QuantSpec(bits)
    chosen = tg.dequantise(*tg.quantise(weight, spec))
    for row, got in zip(weight, chosen):
        errors = []
        for share in tg.PERCENTILES:
            scale = (torch.quantile(row.abs(), share) / spec.top).half().float()
            errors.append(((row / scale).round().clamp(-spec.top, spec.top) * scale - row).square().sum())
        assert (got - row).square().sum() <= min(errors) * 1.0001
    assert (chosen - weight).square().mean() <= (tg.dequantise(*tg.quantise(weight, tg.QuantSpec(bits, "amax"))) - weight).square().mean()


def test_the_scale_fits_the_row_without_a_coarse_floor():
    """PR 1092's floor of 1/31 would make this [3, -2, 1, 9]."""
    codes, scales = tg.quantise(torch.tensor([[0.1, -0.05, 0.02, 0.301]]), tg.QuantSpec(6, "amax"))
    assert codes.tolist() == [[10, -5, 2, 31]] and scales.item() == pytest.approx(0.0097097, rel=1e-3)


def test_rows_of_zeros_stay_zero():
    codes, scales = tg.quantise(torch.zeros(2, 3, 5), tg.QuantSpec(6))
    assert not codes.any() and torch.isfinite(tg.dequantise(codes, scales)).all()
