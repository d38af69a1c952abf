"""What must hold on a GPU as on a CPU. Every test runs on the CPU too (fixture `device`), in small."""
import functools
import warnings

import pytest
import torch
import train_gpt as tg
from conftest import make_runtime, scrambled
from torch._dynamo.utils import counters

# heads of 64 dimensions, as the fused kernels want them
SHAPE = {"model_dim": 128, "num_heads": 2, "num_kv_heads": 1, "num_layers": 2, "ve_layers": "1", "rope_dims": 16}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def runtime_on(device, folder, dtype="bf16", compiles=False, wanted="auto"):
    name, attend = tg.pick_attention(wanted, device, DTYPES[dtype])
    return make_runtime(folder, device=device, dtype=DTYPES[dtype], compiles=compiles, attention=name, attend=attend)


def model_on(rt, cfg, specs=None):
    torch.manual_seed(0)
    return scrambled(tg.GPT(cfg, rt.attend, rt.dtype, specs)).to(rt.device)


def state_of(model, cfg, rt):
    return tg.TrainState.initial(model, cfg, rt)


def loss_and_gradients(model, loss_fn, batch, qat=False):
    model.zero_grad(set_to_none=True)
    loss = loss_fn(*batch, qat)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a, b):
    """Norm of the difference over the norm of b."""
    a, b = (t.detach().double().cpu() for t in (a, b))
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("queries, keys", [(96, 96), (16, 96), (96, 0)], ids=["square", "last queries", "documents"])
@pytest.mark.parametrize("wanted", ["fa4", "fa3", "cudnn", "flash"])
def test_attention_back_ends_agree_with_the_written_out_one(device, wanted, queries, keys):
    torch.manual_seed(0)
    try:
        _, attend = tg.pick_attention(wanted, device, torch.bfloat16)
    except tg.UserError as error:
        pytest.skip(str(error))
    shapes, rows = ((queries, 4), (keys or queries, 2), (keys or queries, 2)), 3 if keys else 1
    bounds = torch.tensor([0, 1, 40, 96, 96], dtype=torch.int32, device=device)
    more = {} if keys else {"documents": tg.Documents(bounds, 56)}
    tensors = [torch.randn(rows, t, h, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for t, h in shapes]
    upstream = torch.randn(rows, queries, 4, 64, device=device)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    out, exact = attend(*tensors, **more), tg.attend_math(*wide, **more)
    assert out.dtype == torch.bfloat16 and distance(out, exact) < 0.01
    grads, exact = (torch.autograd.grad(y, xs, upstream.to(y.dtype)) for y, xs in ((out, tensors), (exact, wide)))
    for got, want in zip(grads, exact):
        assert distance(got, want) < 0.015


def loss_curve(cfg, rt, steps):
    """Training losses, one a step, as `train` takes its steps."""
    model = model_on(rt, cfg)
    state = state_of(model, cfg, rt)
    data, loss_fn, losses = tg.TrainData.open(cfg, rt), rt.compiled(model.loss), []
    for step in range(steps):
        state.step = step
        losses.append(tg.train_step(state, data, tg.plan_step(cfg, step, 0.0, 0.0), loss_fn)[0].item())
    return torch.tensor(losses)


def test_bf16_trains_like_fp32_on_the_cpu(config, device, tmp_path):
    cfg = config(**SHAPE, iterations=100)
    exact = loss_curve(cfg, runtime_on(torch.device("cpu"), tmp_path, "fp32"), 50)
    rough = loss_curve(cfg, runtime_on(device, tmp_path, compiles=device.type == "cuda"), 50)
    assert exact[:5].mean() - exact[-5:].mean() > 0.5  # it does learn
    assert (rough - exact).abs().max() < 0.2 and (rough - exact)[-10:].mean().abs() < 0.05


def test_compiled_is_eager_and_late_qat_acts_in_it(config, device, tmp_path, monkeypatch):
    """One compiled function for all of it, as in a run: without rounding, with it, and no graph more after that."""
    dtype, near = ("bf16", 0.03) if device.type == "cuda" else ("fp32", 1e-4)
    if device.type == "cpu":  # the same graphs; only what is made of them is not worth a minute's wait
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    rt, cfg = runtime_on(device, tmp_path, dtype, compiles=True), config(**SHAPE, mlp_quant_bits=4, attn_qat_bits=4)
    specs = tg.quant_specs(cfg, tg.parameter_shapes(cfg))
    model, data = model_on(rt, cfg, specs), tg.TrainData.open(cfg, rt)
    model.refresh_scales()
    torch._dynamo.reset()
    counters.clear()
    fast, losses = rt.compiled(model.loss), []
    for qat in (False, True):
        loss, grads = loss_and_gradients(model, model.loss, next(data.batch(0)), qat)
        compiled_loss, compiled_grads = loss_and_gradients(model, fast, next(data.batch(0)), qat)
        assert compiled_loss == pytest.approx(loss, rel=near / 10)
        assert max(distance(compiled_grads[name], grads[name]) for name in specs) < near
        whole = [torch.cat([found[name].flatten() for name in grads]) for found in (compiled_grads, grads)]
        assert distance(*whole) < near  # single gains are small sums of large terms: in bf16 they may be off by more
        losses.append(compiled_loss)
    assert abs(losses[0] - losses[1]) > 1e-4  # a hundred times what equal computations differ by in fp32
    assert all(compiled_grads[name].abs().sum() > 0 for name in specs)

    assert counters["stats"]["unique_graphs"] == 2
    state = state_of(model, cfg, rt)
    for step in range(4):
        state.qat, state.step = step >= 2, step
        tg.train_step(state, data, tg.plan_step(cfg, step, 0.0, 0.0), fast)
    assert counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("dtype, near", [("fp32", 2e-4), ("bf16", 1e-2)])
def test_an_artifact_scores_the_same_on_the_cpu(config, device, dtype, near, tmp_path):
    cfg = config(**SHAPE)
    here, there = runtime_on(device, tmp_path, dtype), runtime_on(torch.device("cpu"), tmp_path, "fp32")
    model = model_on(here, cfg)
    val = tg.ValData.open(cfg, here)
    blob = tg.pack(cfg, model, val.tokenizer_sha256, tg.round_model(cfg, model, {})).blob
    scores = []
    for rt in (here, there):
        loaded = tg.load_model(blob, rt, val.tokenizer_sha256)
        val = tg.ValData.open(cfg, rt)
        plan = tg.plan_evaluation(val, cfg, rt, cfg.eval_stride, 16)
        scores.append(tg.evaluate("sliding", loaded.nll, val, cfg, rt, plan).bpb)
    assert scores[0] == pytest.approx(scores[1], rel=near)


def test_two_walks_give_the_same_bits(config, device, tmp_path):
    cfg, rt = config(**SHAPE), runtime_on(device, tmp_path)
    model, val, walks = model_on(rt, cfg), tg.ValData.open(cfg, rt), []
    for _ in range(2):
        scores = []
        plan = tg.plan_evaluation(val, cfg, rt, cfg.eval_stride, 16)
        tg.evaluate("sliding", model.nll, val, cfg, rt, plan, observe=lambda at, nll: scores.append(nll))
        walks.append(torch.cat(scores))
    assert torch.equal(*walks)


@pytest.mark.parametrize("changes", [None, {"ttt_mode": "lora", "ttt_reset": "document", "ttt_doc_chunk_tokens": 16,
                                            "ttt_batch_docs": 4}], ids=["sliding", "documents"])
def test_a_longer_text_is_not_waited_for_more_often(config, device, tmp_path, monkeypatch, changes):
    """By PyTorch's warnings, which a GPU alone gives; tests/test_walk.py counts on a CPU what would wait."""
    cfg, rt, found = config(**SHAPE, **changes or {}), runtime_on(device, tmp_path), []
    whole, model = tg.ValData.open(cfg, rt), model_on(rt, cfg)
    monkeypatch.setattr(tg, "report_chunk", lambda *args: None)
    watch = torch.cuda.set_sync_debug_mode if device.type == "cuda" else lambda mode: None
    for length in (600, 1200):
        val, adapter = whole.take(slice(length)), tg.adapter_for(model, cfg, rt) if changes else None
        plan = tg.plan_evaluation(val, cfg, rt, cfg.eval_stride, 4, bool(adapter))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            watch("warn")
            tg.evaluate("test", model.nll, val, cfg, rt, plan, adapter)
            watch("default")
        found.append(sum("synchronizing" in str(warning.message) for warning in said))
    assert found[0] == found[1]


def test_a_whole_run(run, device):
    """Train, switch late QAT on, round, pack, read back, score, adapt."""
    variables = {key.upper(): value for key, value in SHAPE.items()}
    done = run(DEVICE=device.type, ITERATIONS=8, WARMUP_STEPS=2, LATE_QAT_THRESHOLD=0.9, **variables)
    assert done.code == 0, done.err
    assert "late_qat:enabled" in done.out and f"device:{device.type}" in done.out
    scores = [done.summary[f"val_bpb_{name}"] for name in ("pre_quant", "roundtrip", "sliding", "ttt")]
    assert all(1 < score < 8 for score in scores) and abs(scores[0] - scores[1]) < 0.3
