"""The Triton kernels against plain operations: on a GPU where there is one, in Triton's interpreter elsewhere."""
import sys
from types import SimpleNamespace

import pytest
import torch
import train_gpt as tg
from conftest import scrambled
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HALVES = [torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")  # Triton's interpreter cannot multiply bf16
PRODUCTS = pytest.mark.parametrize("dtype", HALVES, ids=["fp16", "bf16"][:len(HALVES)])


@pytest.fixture(scope="module")
def kernels():
    pytest.importorskip("triton")
    assert tg.pick_kernels("triton", torch.device(DEVICE)) == "triton"
    tg.load_kernels()
    most, tg.MOST_BLOCKS = tg.MOST_BLOCKS, 3  # so that each takes several tiles
    yield
    tg.MOST_BLOCKS = most


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    assert tg.pick_kernels("auto", torch.device("cpu")) == tg.pick_kernels("torch", torch.device("cuda")) == "torch"
    real = SimpleNamespace(knobs=SimpleNamespace(runtime=SimpleNamespace(interpret=False)))
    for found, told in ((None, "needs Triton"), (SimpleNamespace(), "needs Triton"), (real, "needs a CUDA")):
        monkeypatch.setitem(sys.modules, "triton", found)
        with pytest.raises(tg.UserError, match=told):
            tg.pick_kernels("triton", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(tg.UserError, match="Hopper"):
        tg.pick_kernels("triton", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert tg.pick_kernels("triton", torch.device("cuda")) == "triton"


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_near(got, want, dtype):
    """want: what fp32 makes of the same numbers. bf16 keeps 8 bits, fp16 11, of every result on the way."""
    assert got.dtype in (dtype, torch.float32) and got.shape == want.shape
    error = (got.float() - want).norm() / want.norm().clamp(min=1e-12)
    assert error < {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype], error.item()


def gradients(function, tensors, upstream):
    tensors = [t.clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream.to(out.dtype))]


@pytest.mark.parametrize("dtype, rows, columns, suits", [
    (torch.bfloat16, 512, 1536, True), (torch.float16, 8, 24, True), (torch.float32, 512, 512, False),
    (torch.float64, 8, 8, False), (torch.bfloat16, 510, 1536, False), (torch.bfloat16, 512, 1533, False)])
def test_which_products_triton_gets(dtype, rows, columns, suits):
    assert tg.suits_triton("triton", dtype, rows, columns) == suits
    assert not tg.suits_triton("torch", dtype, rows, columns)


def test_what_does_not_suit_triton_is_pytorchs_to_the_bit(kernels):
    for x in (randn(2, 16, 24), randn(2, 12, 24, dtype=torch.float16), randn(2, 16, 20, dtype=torch.float16)):
        assert torch.equal(tg.symmetric_product(x, kernels="triton"), x @ x.mT)
    tensors, targets = (randn(6, 8), randn(11, 8)), torch.arange(6, device=DEVICE)
    for cap in (0.0, tg.LARGEST_CAP + 1):
        ours, plain = (tg.CappedCrossEntropy.apply(*tensors, targets, cap, wanted) for wanted in ("triton", "torch"))
        assert torch.equal(ours, plain)


@DTYPES
@pytest.mark.parametrize("rows, dim, vocab, chunk", [(7, 16, 5, 4), (70, 32, 300, 64), (130, 24, 1024, 1024),
                                                     (9, 16, 2500, 1024)])
def test_capped_cross_entropy(kernels, dtype, rows, dim, vocab, chunk, monkeypatch):
    for name in ("CE_CHUNK_ROWS", "CE_CHUNK_LOGITS_CUDA"):
        monkeypatch.setattr(tg, name, chunk)
    torch.manual_seed(rows)
    hidden, weight = randn(rows, dim, dtype=dtype), (8 * randn(vocab, dim) / dim ** 0.5).to(dtype)
    targets, cap, upstream = torch.randint(vocab, (rows,)).to(DEVICE), 15.0, torch.tensor(3.0, device=DEVICE)
    ours = gradients(lambda *t: tg.CappedCrossEntropy.apply(*t, targets, cap, "triton"), (hidden, weight), upstream)
    plain = gradients(lambda h, w: F.cross_entropy(tg.capped_logits(h, w, cap), targets),
                      (hidden.float(), weight.float()), upstream)
    for got, want in zip(ours, plain):
        assert_near(got, want, dtype)


@pytest.mark.parametrize("cap", [1.0, 30.0, tg.LARGEST_CAP])
@pytest.mark.parametrize("size", [0.0, 1e-3, 40.0, 3e4])
def test_capped_cross_entropy_of_tiny_and_huge_logits(kernels, size, cap):
    logits, targets = size * randn(5, 33), torch.arange(5, device=DEVICE)
    logits[0] = -size  # all equal, and as far from the cap as can be
    x = logits.clone().requires_grad_()
    nll = F.cross_entropy(cap * torch.tanh(x / cap), targets, reduction="none")
    want, = torch.autograd.grad(nll.sum() / 5, x)
    losses = torch.ops.golf.capped_rows(logits, targets, cap, 1 / 5)  # leaves the gradient where the logits were
    torch.testing.assert_close(losses, nll.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-6)


@PRODUCTS
@pytest.mark.parametrize("rows, dim, width", [(5, 16, 24), (130, 72, 136), (128, 64, 128)])
def test_mlp(kernels, dtype, rows, dim, width):
    torch.manual_seed(rows)
    x, up, down = randn(rows, dim), randn(width, dim) / dim ** 0.5, randn(dim, width) / width ** 0.5
    tensors, upstream = [t.to(dtype) for t in (x, up, down)], randn(rows, dim)
    ours = gradients(lambda *t: tg.FusedMlp.apply(*t, 0.75), tensors, upstream)
    plain = gradients(lambda x, up, down: F.leaky_relu(x @ up.T, 0.75).square() @ down.T, [t.float() for t in tensors],
                      upstream.to(dtype).float())
    for got, want in zip(ours, plain):
        assert_near(got, want, dtype)


@PRODUCTS
@pytest.mark.parametrize("n, rows, columns", [(1, 8, 24), (3, 136, 72), (2, 128, 192), (1, 304, 64)])
def test_symmetric_product(kernels, dtype, n, rows, columns):
    torch.manual_seed(rows)
    x, add = randn(n, rows, columns, dtype=dtype), randn(n, rows, rows, dtype=dtype)
    add = add.triu() + add.triu(1).mT
    for arguments in ((), (add, 2.0, -4.5)):
        got = tg.symmetric_product(x, *arguments, kernels="triton")
        wide = [t.float() if isinstance(t, torch.Tensor) else t for t in (x, *arguments)]
        assert_near(got, tg.symmetric_product(*wide), dtype)
        assert torch.equal(got, got.mT)


@PRODUCTS
@pytest.mark.parametrize("rows, columns", [(24, 72), (72, 24)])
def test_newton_schulz(kernels, dtype, rows, columns):
    torch.manual_seed(0)
    x = randn(2, rows, columns)
    assert tg.suits_triton("triton", dtype, rows, columns)
    got, want = tg.newton_schulz(x, 5, dtype, "triton"), tg.newton_schulz(x, 5, torch.float32, "torch")
    assert got.dtype == dtype and (got - want).norm() / want.norm() < (5e-3 if dtype == torch.float16 else 4e-2)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_model_on_these_kernels_learns_the_same(kernels, dtype, config):
    """Loss and gradients, eager and traced as torch.compile traces it; rounded matrices pass the kernels by."""
    cfg, results = config(num_layers=2, ve_layers="1"), []
    assert tg.suits_triton("triton", dtype, cfg.model_dim, cfg.mlp_dim) == (dtype.itemsize == 2)
    torch.manual_seed(1)
    ids = torch.randint(cfg.vocab_size, (2, 33), device=DEVICE)
    for wanted, wrap in (("torch", lambda f: f), ("triton", lambda f: f),
                          ("triton", lambda f: torch.compile(f, backend="aot_eager", dynamic=False, fullgraph=True))):
        torch.manual_seed(0)
        model = scrambled(tg.GPT(cfg, tg.attend_math, dtype, kernels=wanted)).to(DEVICE)
        loss = wrap(model.loss)(ids[:, :-1], ids[:, 1:])
        loss.backward()
        hooked = model.nll(ids[:, :-1], ids[:, 1:], hook=lambda kind, layer, w: lambda x, *_: tg.project(x, w)
                           if kind != "embed" else F.embedding(x, w))
        results.append([loss.detach(), hooked.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            if dtype == torch.float32:
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5)
            else:  # some gradients are sums of large numbers of either sign
                assert (got - want).norm() < (1e-2 if dtype == torch.float16 else 8e-2) * want.norm() + 1e-5


def test_a_whole_run(kernels, run):
    done = run(KERNELS="triton", DTYPE="fp32", ITERATIONS=2, EVAL_STRIDE=32, DEVICE=DEVICE)
    assert done.code == 0 and "kernels:triton" in done.out, done.err
