import math

import pytest
import torch
import train_gpt as tg
from conftest import scrambled
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F

OPTIONS = [{}, {"trigram_vocab_size": 32, "trigram_dim": 8}, {"gated_attention": True, "value_residual": True},
           {"dtg_enabled": True, "xsa_last_n": 1}, {"tie_embeddings": False, "ve_enabled": False},
           {"num_layers": 1, "ve_layers": "0"}, {"rope_dims": 0, "ln_scale": False, "num_kv_heads": 4},
           {"bigram_vocab_size": 0, "num_layers": 4}, {"attention_window": 3, "smear_gate": "before"},
           {"num_layers": 6, "num_loops": 2, "loop_start": 1, "loop_end": 3, "parallel_start_layer": 4, "skip_gates": True,
            "smear_gate": "window", "sparse_attn_gate": True},
           {"parallel_start_layer": 1, "parallel_form": "joint", "value_residual": True, "num_loops": 1, "loop_start": 0,
            "loop_end": 2}]


@pytest.fixture(params=OPTIONS, ids=lambda o: ",".join(o) or "default")
def model(request, config):
    torch.manual_seed(0)
    return scrambled(tg.GPT(config(**request.param)))


def ids_of(model, batch=2, length=24):
    return torch.randint(model.cfg.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_causal_to_the_bit(model):
    ids = ids_of(model)[:, :-1]
    before = model.logits(model.hidden(ids))
    for t in (1, 7, 23):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 5) % model.cfg.vocab_size
        after = model.logits(model.hidden(changed))
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.equal(before[:, t:], after[:, t:])


@torch.no_grad()
def test_the_last_positions_alone_are_those_of_the_whole(model):
    ids = ids_of(model)[:, :-1]
    whole = model.hidden(ids)
    for keep in (1, 5, 24):
        torch.testing.assert_close(model.hidden(ids, keep=keep), whole[:, -keep:], rtol=0, atol=2e-6)


LENGTHS = (1, 9, 2, 12)  # of the documents of a flat stream


@pytest.mark.parametrize("attend", [tg.attend_sdpa, tg.attend_math], ids=["one by one", "masked"])
def test_a_document_of_a_flat_stream_is_a_row_by_itself(model, attend):
    """Logits and gradients; the second kind of attention is what a compiled graph has."""
    for block in model.blocks:
        block.attn.attend = attend
    ids, bounds = ids_of(model, 1)[:, :-1], [0, *torch.tensor(LENGTHS).cumsum(0).tolist()]
    ids[0, bounds[:-1]] = tg.BOS_ID
    starts = torch.tensor([*bounds, 24, 24], dtype=torch.int32)
    flat = model.logits(model.hidden(ids, documents=tg.Documents(starts, max(LENGTHS))))[0]
    rows = [model.logits(model.hidden(ids[:, a:b]))[0] for a, b in zip(bounds, bounds[1:])]
    torch.testing.assert_close(flat, torch.cat(rows), rtol=1e-4, atol=2e-5)
    loss = model.loss(ids, ids, documents=tg.Documents(starts, max(LENGTHS)))
    grads = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    wanted = torch.autograd.grad(F.cross_entropy(torch.cat(rows), ids[0]), list(model.parameters()),
                                 materialize_grads=True)
    for name, got, want in zip(dict(model.named_parameters()), grads, wanted):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * want.abs().sum().item() + 1e-9, msg=name)


def test_loss_is_the_cross_entropy_of_the_logits_and_so_is_its_gradient(model):
    ids = ids_of(model)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model.logits(model.hidden(ids[:, :-1]))
    plain = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    plain.backward()
    torch.testing.assert_close(loss, plain)
    for name, p in model.named_parameters():
        if p.numel():
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)
    with torch.no_grad():
        nll = model.nll(ids[:, :-1], ids[:, 1:])
    torch.testing.assert_close(nll.mean(), plain.detach())


def test_every_parameter_takes_part(model):
    ids = ids_of(model)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for name, p in model.named_parameters():
        assert not p.numel() or p.grad is not None and p.grad.abs().sum() > 0, name


@given(rows=st.integers(1, 70), chunk=st.integers(1, 64), cap=st.floats(1, 50))
@settings(max_examples=30, deadline=None)
def test_chunked_cross_entropy_equals_autograd(rows, chunk, cap):
    torch.manual_seed(rows)
    hidden, weight = torch.randn(rows, 8, dtype=torch.double), torch.randn(11, 8, dtype=torch.double)
    targets = torch.randint(11, (rows,))
    results = []
    for ours in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if ours:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tg, "CE_CHUNK_ROWS", chunk)
                loss = tg.CappedCrossEntropy.apply(h, w, targets, cap, "torch")
        else:
            loss = F.cross_entropy(cap * torch.tanh(h @ w.T / cap), targets)
        (3 * loss).backward()
        results.append((loss.double(), h.grad, w.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@given(batch=st.integers(1, 3), keys=st.integers(1, 20), share=st.floats(0, 1), group=st.integers(1, 3),
       kv=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_attention_back_ends_agree(batch, keys, share, group, kv):
    queries = max(1, round(share * keys))
    torch.manual_seed(keys)
    tensors = [torch.randn(batch, t, h, 8, requires_grad=True)
               for t, h in ((queries, kv * group), (keys, kv), (keys, kv))]
    outs, grads = [], []
    for attend in (tg.attend_math, tg.attend_sdpa):
        out = attend(*tensors)
        outs.append(out)
        grads.append(torch.autograd.grad((out * torch.arange(out.numel()).view_as(out) / out.numel()).sum(), tensors))
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_by_hand():
    """A loop over positions and heads, as the definition says it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 3, 4, 8), torch.randn(1, 5, 2, 8), torch.randn(1, 5, 2, 8)
    out = tg.attend_math(q, k, v)
    for i in range(3):
        for h in range(4):
            seen = i + 3
            weights = (k[0, :seen, h // 2] @ q[0, i, h] / math.sqrt(8)).softmax(0)
            torch.testing.assert_close(out[0, i, h], weights @ v[0, :seen, h // 2])


def test_hash_buckets_are_the_published_ones():
    for previous, current, wanted in ((1, 2, (435, 2446, 2467)), (5, 7, (1082, 5128, 2085)), (7, 5, (704, 8892, 2750)),
                                      (1023, 1023, (977, 1817, 301))):
        for buckets, bucket in zip((2048, 10240, 3072), wanted):
            hashed = tg.hash_ngrams(torch.tensor([[previous, current]]), tg.BIGRAM_FACTORS, buckets)
            assert hashed.tolist() == [[buckets - 1, bucket]]
    assert tg.hash_ngrams(torch.tensor([[3, 5, 7]]), tg.TRIGRAM_FACTORS, 2048).tolist() == [[2047, 2047, 252]]
    assert tg.hash_ngrams(torch.tensor([[3]]), tg.TRIGRAM_FACTORS, 2048).tolist() == [[2047]]


def test_rope_base_is_stretched_past_the_trained_length():
    def base(dims, length, trained):
        cos, sin = tg.rope_table(tg.Hyperparameters(train_seq_len=trained, rope_dims=dims), length, "cpu")
        return float(torch.atan2(sin, cos)[1, 1]) ** (-dims / 2)
    assert base(16, 512, 512) == base(16, 1024, 512) == pytest.approx(10_000, rel=1e-3)
    assert base(64, 2048, 2048) == pytest.approx(20_452.23, rel=1e-3)
    for length in (16, 1024, 1280, 2048):  # a window shorter than the trained length is no other model
        assert base(16, length, 2048) == pytest.approx(22_081.79, rel=1e-3)
    assert base(16, 4096, 2048) == base(16, 4096, 512) == pytest.approx(10_000 * 4 ** (16 / 14), rel=1e-3)


def test_rotation_is_relative_and_leaves_the_rest():
    torch.manual_seed(0)
    cos, sin = tg.rope_table(tg.Hyperparameters(rope_dims=4), 12, "cpu")
    q, k = torch.randn(2, 8)
    spin = lambda x, t: tg.rotate(x.expand(1, 12, 1, 8), cos, sin)[0, t, 0]
    assert torch.equal(spin(q, 5)[4:], q[4:])
    torch.testing.assert_close(spin(q, 5) @ spin(k, 3), spin(q, 9) @ spin(k, 7))
    assert not torch.allclose(spin(q, 5) @ spin(k, 3), spin(q, 5) @ spin(k, 4))


def test_exclusive_attention_leaves_nothing_along_the_own_value():
    torch.manual_seed(0)
    y, v = torch.randn(2, 5, 6, 8), torch.randn(2, 5, 3, 8)
    out = tg.subtract_own_value(y, v)
    along = (out.view(2, 5, 3, 2, 8) * v.unsqueeze(3)).sum(-1)
    assert along.abs().max() < 1e-5
    assert (y - out).abs().max() > 0.1


def test_heads_that_look_further_ahead_are_trained_and_left_out_of_the_score(config):
    torch.manual_seed(0)
    model = scrambled(tg.GPT(config(mtp_num_heads=2)))
    ids = ids_of(model)
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert all(head.weight.grad.abs().sum() > 0 for head in model.mtp_heads)
    hidden = model.hidden(ids[:, :-1])
    main = F.cross_entropy(model.logits(hidden).flatten(0, 1), ids[:, 1:].flatten())
    ahead = [F.cross_entropy(tg.capped_logits(hidden[:, :-k], head.weight, 30.0).flatten(0, 1),
                             ids[:, 1 + k:].flatten())
             for k, head in enumerate(model.mtp_heads, 1)]
    torch.testing.assert_close(loss, main + 0.2 * (ahead[0] + ahead[1]) / 2)
    torch.testing.assert_close(model.eval().loss(ids[:, :-1], ids[:, 1:]), main)


def test_each_parameter_stands_in_one_row(model):
    families = tg.route(model.cfg, dict(model.named_parameters()))
    assert set(families) == set(dict(model.named_parameters()))
    assert all(families[name].optimiser == "muon" for name in families if name.endswith("_bank"))
    with pytest.raises(AssertionError):
        tg.route(model.cfg, ["surprise.weight"])


def test_named_patterns_turn_parameters_into_control_tensors(config):
    cfg = config(control_tensor_name_patterns="bigram.proj, tok_emb")
    families = tg.route(cfg, dict(tg.GPT(cfg).named_parameters()))
    assert {families[n].name for n in ("bigram.proj.weight", "tok_emb.weight")} == {"control"}
    assert "tok_emb.weight" not in tg.quant_specs(cfg, families)


def compiled(function):
    try:
        fast = torch.compile(lambda x: x + 1, fullgraph=True)
        fast(torch.zeros(2))
    except Exception as error:  # no C++ compiler on this machine
        pytest.skip(f"torch.compile does not work here: {type(error).__name__}")
    return torch.compile(function, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("wrap", [lambda f: f, compiled], ids=["eager", "compiled"])
def test_late_qat_really_runs(config, wrap):
    """After the switch the forward pass sees rounded banks and tables - exactly what the export writes - and the
    gradient goes straight through; before the switch it does not. Same compiled function on both sides of it."""
    cfg = config(num_layers=2, ve_layers="0,1", mlp_quant_bits=4, attn_qat_bits=4, embed_bits=4)
    specs = tg.quant_specs(cfg, [name for name, _ in tg.GPT(cfg).named_parameters()])
    torch.manual_seed(0)
    model = scrambled(tg.GPT(cfg, qat_specs=specs))
    ids = ids_of(model)
    model.refresh_scales()
    loss_fn = wrap(model.loss)
    plain, rounded = (loss_fn(ids[:, :-1], ids[:, 1:], qat) for qat in (False, True))
    assert abs(plain - rounded) > 1e-4
    rounded.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in specs)

    exported = tg.GPT(cfg)
    weights = {name: tg.dequantise(*tg.quantise(p.detach(), specs[name])) if name in specs else p.detach()
               for name, p in model.named_parameters()}
    exported.load_state_dict(weights)
    torch.testing.assert_close(exported.loss(ids[:, :-1], ids[:, 1:]), rounded.detach(), rtol=1e-5, atol=1e-5)
    assert {"qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb.weight"} <= set(specs)
