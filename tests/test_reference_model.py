"""The model against a slow one that is written from its description: position by position and head by head, in fp64."""
import math

import pytest
import torch
import train_gpt as tg

LENGTH, SEED = 7, 0
BASE = {"vocab_size": 23, "num_layers": 4, "model_dim": 24, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 1.5,
        "rope_dims": 4, "train_seq_len": LENGTH, "rope_train_seq_len": LENGTH, "xsa_last_n": 2, "ve_layers": "1,3",
        "ve_dim": 5, "bigram_vocab_size": 11, "bigram_dim": 6, "trigram_vocab_size": 0, "trigram_dim": 9}
OPTIONS = {
    "default": {}, "no bigram": {"bigram_vocab_size": 0}, "trigram": {"trigram_vocab_size": 13},
    "tables of the stream's width": {"bigram_dim": 24, "trigram_vocab_size": 13, "trigram_dim": 24, "ve_dim": 12},
    "no value embedding": {"ve_enabled": False}, "value embedding at the ends": {"ve_layers": "0,3"},
    "value residual": {"value_residual": True}, "value residual, XSA everywhere": {"value_residual": True,
                                                                                  "xsa_last_n": 4},
    "gated attention": {"gated_attention": True}, "gated blocks": {"dtg_enabled": True},
    "no XSA": {"xsa_last_n": 0}, "XSA once": {"xsa_last_n": 1}, "XSA more often than layers": {"xsa_last_n": 9},
    "no LN scale": {"ln_scale": False}, "untied": {"tie_embeddings": False}, "low cap": {"logit_softcap": 2.0},
    "one layer": {"num_layers": 1, "ve_layers": "0"}, "five layers": {"num_layers": 5, "ve_layers": "2"},
    "six layers": {"num_layers": 6}, "all dimensions rotate": {"rope_dims": 0}, "two rotate": {"rope_dims": 2},
    "stretched base": {"rope_train_seq_len": 2}, "small base": {"rope_base": 3.0}, "plain heads": {"num_kv_heads": 4},
    "one key head": {"num_kv_heads": 1}, "ReLU": {"leaky_slope": 0.0}, "slope": {"leaky_slope": 0.3},
    "heads ahead": {"mtp_num_heads": 3, "mtp_loss_weight": 0.7},
    "attention window": {"attention_window": 2}, "no QK norm": {"qk_norm": False}, "no cap": {"logit_softcap": 0.0},
    "no norm of the embedding": {"embed_norm": False}, "smear before the norm": {"smear_gate": "before"},
    "no smear": {"smear_gate": "off"}, "no skips": {"unet_skips": False}, "plain residuals": {"residual_mix": False},
    "learned norms": {"norm_weights": True}, "epsilon": {"norm_eps": 0.3},
    "value embedding in the last": {"ve_last_n": 3, "ve_layers": "0"},
    "PR 1254": {"attention_window": 3, "qk_norm": False, "logit_softcap": 0.0, "embed_norm": False, "rope_dims": 0,
                "smear_gate": "off", "unet_skips": False, "residual_mix": False, "norm_weights": True, "norm_eps": 1e-6,
                "ln_scale": False, "xsa_last_n": 4, "bigram_vocab_size": 0, "ve_enabled": False, "leaky_slope": 0.5},
    "smear window": {"smear_gate": "window", "gate_window": 5}, "skip gates": {"skip_gates": True},
    "sparse gate": {"sparse_attn_gate": True, "gate_window": 5, "sparse_attn_gate_scale": 0.7},
    "loop": {"num_loops": 2, "loop_start": 1, "loop_end": 2}, "loop of all": {"num_loops": 1, "loop_start": 0,
                                                                             "loop_end": 3, "value_residual": True},
    "joint": {"parallel_start_layer": 2, "parallel_form": "joint"}, "lanes": {"parallel_start_layer": 3},
    "early lanes": {"parallel_start_layer": 1, "residual_mix": False}, "lane of attention": {
        "parallel_start_layer": 2, "parallel_final_lane": "attn"}, "lane of MLP": {"parallel_start_layer": 2,
                                                                                  "parallel_final_lane": "mlp"},
    "PR 1855": {"num_layers": 5, "num_loops": 2, "loop_start": 1, "loop_end": 2, "parallel_start_layer": 3,
                "skip_gates": True, "smear_gate": "window", "gate_window": 4, "sparse_attn_gate": True,
                "sparse_attn_gate_scale": 0.5, "rope_train_seq_len": 0, "xsa_last_n": 5, "ve_enabled": False,
                "bigram_vocab_size": 0},
    "everything": {"trigram_vocab_size": 13, "value_residual": True, "gated_attention": True, "dtg_enabled": True,
                   "tie_embeddings": False, "mtp_num_heads": 2, "num_layers": 5, "xsa_last_n": 3, "ve_layers": "0,4",
                   "rope_train_seq_len": 3}}
EPS = torch.finfo(torch.float32).eps


def rms(x, cfg, weight=None):
    y = x / (x.square().mean() + (cfg.norm_eps or EPS)).sqrt()
    return y if weight is None else y * weight


def rotated(x, position, cfg):
    """Dimension i of the first half of the rotated ones turns with its partner in the second half."""
    dims = cfg.rope_dims or len(x)
    longer = max(1.0, max(LENGTH, cfg.train_seq_len) / (cfg.rope_train_seq_len or 1e9))
    base = cfg.rope_base * longer ** (dims / (dims - 2)) if dims > 2 else cfg.rope_base
    out = list(x)
    for i in range(dims // 2):
        angle, a, b = position * base ** (-2 * i / dims), x[i], x[i + dims // 2]
        out[i] = a * math.cos(angle) + b * math.sin(angle)
        out[i + dims // 2] = b * math.cos(angle) - a * math.sin(angle)
    return torch.stack(out)


def from_table(w, name, row):
    """A row of a table, projected where the table is narrower, times the table's scale."""
    x = w[f"{name}.embed.weight"][row]
    if f"{name}.proj.weight" in w:
        x = w[f"{name}.proj.weight"] @ x
    return x * w[f"{name}.scale"]


def embedded(w, cfg, ids):
    stream = []
    for t, token in enumerate(ids):
        x = w["tok_emb.weight"][token]
        if cfg.bigram_vocab_size:
            last = cfg.bigram_vocab_size - 1
            x = x + from_table(w, "bigram", last if t < 1 else ((36313 * token) ^ (27191 * ids[t - 1])) % last)
        if cfg.trigram_vocab_size:
            last = cfg.trigram_vocab_size - 1
            mixed = 0 if t < 2 else (36313 * token) ^ (27191 * ids[t - 1]) ^ (51497 * ids[t - 2])
            x = x + from_table(w, "trigram", last if t < 2 else mixed % last)
        stream.append(x)

    def smeared(xs):
        gate = torch.sigmoid(w["smear.gate"])
        return [(1 - gate) * x + gate * before for x, before in zip(xs, [torch.zeros_like(gate), *xs])]
    if cfg.smear_gate == "before":
        stream = smeared(stream)
    if cfg.smear_gate == "window":
        shares = [w["smear.scale"] * torch.sigmoid(w["smear.gate.weight"][0] @ x[:cfg.gate_window]) for x in stream]
        stream = [x + (share * before if token != 1 else 0) for token, x, share, before in zip(
            ids, stream, shares, [torch.zeros_like(stream[0]), *stream])]
    if cfg.embed_norm:
        stream = [rms(x, cfg) for x in stream]
    return smeared(stream) if cfg.smear_gate == "after" else stream


def attention(w, cfg, layer, xs, ids, first_values):
    """Outputs of all positions, and the values before they are mixed; xs are normalised and scaled."""
    layers, d, group = cfg.num_layers, cfg.model_dim // cfg.num_heads, cfg.num_heads // cfg.num_kv_heads
    name, heads = f"blocks.{layer}.attn", lambda x: x.reshape(-1, d)
    turned = lambda bank: [[rotated(rms(h, cfg) if cfg.qk_norm else h, t, cfg) for h in heads(bank[layer] @ x)]
                           for t, x in enumerate(xs)]
    queries, keys = turned(w["qo_bank"]), turned(w["kv_bank"])
    values = [w["kv_bank"][layers + layer] @ x for x in xs]
    where = [int(part) for part in cfg.ve_layers.split(",")] if cfg.ve_enabled else []
    if cfg.ve_last_n >= 0:
        where = list(range(layers - cfg.ve_last_n, layers))
    if layer in where:
        scale = w[f"ve_layer_scales.{where.index(layer)}"]
        values = [v + scale * from_table(w, "ve_shared", token) for v, token in zip(values, ids)]
    raw = values = [heads(v) for v in values]
    if cfg.value_residual and layer > 0:
        values = [w[f"{name}.vr_lambda"][0] * old + w[f"{name}.vr_lambda"][1] * v
                  for old, v in zip(first_values, values)]
    out = []
    for t, x in enumerate(xs):
        parts = []
        for h in range(cfg.num_heads):
            kv = h // group
            q = queries[t][h] * w[f"{name}.q_gain"][h] if cfg.qk_norm else queries[t][h]
            first = max(0, t - cfg.attention_window) if cfg.attention_window else 0
            scores = torch.stack([q @ keys[s][kv] / math.sqrt(d) for s in range(first, t + 1)])
            y = sum(p * values[s][kv] for s, p in enumerate(scores.softmax(0), first))
            if layer >= layers - cfg.xsa_last_n:
                own = values[t][kv] / values[t][kv].norm()
                y = y - (y @ own) * own
            if cfg.gated_attention:
                y = y * torch.sigmoid(w[f"{name}.attn_gate.weight"][h] @ x + w[f"{name}.attn_gate.bias"][h])
            if cfg.sparse_attn_gate:
                gate = w[f"{name}.sparse_gate.weight"][h] @ x[:cfg.gate_window]
                y = y * torch.sigmoid(cfg.sparse_attn_gate_scale * gate)
            parts.append(y)
        out.append(w["qo_bank"][layers + layer] @ torch.cat(parts))
    return out, raw


def block(w, cfg, layer, xs, x0s, ids, first_values, lane=None):
    """The stream after a block, the attention's values, and the second lane, if there is one."""
    name, before = f"blocks.{layer}", xs
    scale = 1 / math.sqrt(layer + 1) if cfg.ln_scale else 1.0
    if cfg.residual_mix:
        keep, anew = w[f"{name}.resid_mix"]
        xs = [keep * x + anew * x0 for x, x0 in zip(xs, x0s)]
    by = lambda branch: w[f"{name}.{branch}_scale"] if cfg.residual_mix else 1.0
    normed = lambda x, branch: scale * rms(x, cfg, w.get(f"{name}.{branch}_norm.weight"))
    attended, values = attention(w, cfg, layer, [normed(x, "attn") for x in xs], ids, first_values)
    out, joint = [], cfg.parallel_form == "joint" and 0 < cfg.parallel_start_layer <= layer

    def mlp(x):
        up = w["mlp_up_bank"][layer] @ normed(x, "mlp")
        leaky = torch.where(up > 0, up, cfg.leaky_slope * up)
        return by("mlp") * (w["mlp_down_bank"][layer] @ leaky.square())
    if lane is not None:
        keeps, takes = w["lane_keeps"][layer], w["lane_takes"][layer]
        branches = [(by("attn") * y, mlp(x)) for y, x in zip(attended, lane)]
        both = [[keeps[i] * x + takes[0][i] * y + takes[1][i] * z for x, (y, z) in zip(xs, branches)]
                for i, xs in enumerate((before, lane))]
        return both[0], values, both[1]
    for x, y in zip(xs, attended):
        h = x + by("attn") * y
        h = h + mlp(x if joint else h)
        if cfg.dtg_enabled:
            gate = torch.sigmoid(w[f"{name}.dtg_gate.weight"][0] @ x.detach() + w[f"{name}.dtg_gate.bias"][0])
            h = x + gate * (h - x)
        out.append(h)
    return out, values, None


def slow_hidden(w, cfg, ids):
    """Final states of one sequence.  # [T, dim]"""
    xs = x0s = embedded(w, cfg, ids)
    stack, first_values, lane, order = [], None, None, []
    for layer in range(cfg.num_layers):
        order.append(layer)
        if cfg.num_loops and layer == cfg.loop_end:
            order += [*range(cfg.loop_start, cfg.loop_end + 1)] * cfg.num_loops
    below = len(order) // 2
    for place, layer in enumerate(order):
        lanes = cfg.parallel_form == "lanes" and 0 < cfg.parallel_start_layer <= layer and place >= below
        lane = xs if lanes and lane is None else lane
        if place >= below and stack and cfg.unet_skips:
            skipped = [w["skip_weights"][place - below] * s for s in stack.pop()]
            share = torch.sigmoid(w["skip_gates"][place - below]) if cfg.skip_gates else None
            xs = [x + s if share is None else share * x + (1 - share) * s for x, s in zip(xs, skipped)]
        xs, values, lane = block(w, cfg, layer, xs, x0s, ids, first_values, lane)
        first_values = values if place == 0 else first_values
        if place < below:
            stack.append(xs)
    if lane is not None:
        xs = {"attn": xs, "mlp": lane, "mean": [(x + y) / 2 for x, y in zip(xs, lane)]}[cfg.parallel_final_lane]
    return torch.stack([rms(x, cfg, w.get("final_norm.weight")) for x in xs])


def slow_cross_entropy(cfg, states, matrix, targets):
    """(mean nats of the targets, logits); states and targets of all positions that have one."""
    logits = states @ matrix.T
    logits = cfg.logit_softcap * torch.tanh(logits / cfg.logit_softcap) if cfg.logit_softcap else logits
    return -sum(row.log_softmax(0)[t] for row, t in zip(logits, targets)) / len(targets), logits


def slow_loss(w, cfg, rows):
    """(training loss, loss of the next token, logits) of rows of LENGTH + 1 ids."""
    inputs, targets = [row[:-1] for row in rows], [row[1:] for row in rows]
    states = [slow_hidden(w, cfg, ids) for ids in inputs]
    flat = lambda parts: [t for part in parts for t in part]
    head = w["tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"]
    loss, logits = slow_cross_entropy(cfg, torch.cat(states), head, flat(targets))
    ahead = [slow_cross_entropy(cfg, torch.cat([s[:-k] for s in states]), w[f"mtp_heads.{k - 1}.weight"],
                                flat(t[k:] for t in targets))[0] for k in range(1, cfg.mtp_num_heads + 1)]
    total = loss + cfg.mtp_loss_weight * sum(ahead) / len(ahead) if ahead else loss
    return total, loss, logits


# ---- the comparison

def model_of(cfg, **more):
    """With weights far from their initial values, so that nothing hides behind a zero or a one."""
    torch.manual_seed(SEED)
    model = tg.GPT(cfg, **more)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * p + 0.4 * torch.randn(p.shape, generator=generator))
    return model


def rows_of(cfg):
    """The second row begins like the first, so that bigrams and trigrams repeat."""
    rows = torch.randint(cfg.vocab_size, (2, LENGTH + 1), generator=torch.Generator().manual_seed(3))
    rows[1, 1:4] = rows[0, :3]
    if cfg.smear_gate == "window":
        rows[0, 4] = tg.BOS_ID
    return rows


def check(model, w, rows, qat=False):
    """Loss, logits and every gradient of `model` and of the slow one with the weights `w`, leaves by name."""
    cfg = model.cfg
    loss = model.loss(rows[:, :-1], rows[:, 1:], qat)
    loss.backward()
    seen = {name: t if isinstance(t, torch.Tensor) else t[1] for name, t in w.items()}
    leaves = {name: t if isinstance(t, torch.Tensor) else t[0] for name, t in w.items()}
    total, plain, logits = slow_loss(seen, cfg, rows.tolist())
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    with torch.no_grad():
        ours = model.logits(model.hidden(rows[:, :-1], qat=qat), qat)
        torch.testing.assert_close(ours.flatten(0, 1).double(), logits, rtol=1e-4, atol=2e-5)
        if not qat:
            assert model.nll(rows[:, :-1], rows[:, 1:]).mean().item() == pytest.approx(plain.item(), rel=1e-5)
    for name, p in model.named_parameters():
        wanted = leaves[name].grad
        if p.numel():
            torch.testing.assert_close(p.grad.double(), wanted, rtol=2e-3, atol=5e-5 * wanted.abs().max().item(),
                                       msg=lambda text: f"gradient of {name}: {text}")
            assert wanted.abs().max() > 0, name


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_logits_loss_and_gradients_are_those_of_the_slow_model(changes):
    cfg = tg.Hyperparameters(**{**BASE, **changes})
    model = model_of(cfg)
    check(model, {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}, rows_of(cfg))


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "trigram_vocab_size": 13}], ids=["tied", "untied"])
def test_quantisation_aware_training_sees_rounded_weights(changes):
    """Banks, tables and head, each with its bits and a scale a row; the gradient passes as if nothing were rounded."""
    cfg = tg.Hyperparameters(**{**BASE, **changes, "clip_rule": "amax", "attn_qat_bits": 3, "mlp_quant_bits": 2,
                                "embed_bits": 4, "bigram_bits": 5, "ve_bits": 6})
    bits = {"qo_bank": 3, "kv_bank": 3, "mlp_up_bank": 2, "mlp_down_bank": 2, "tok_emb.weight": 4, "lm_head.weight": 4,
            "bigram.embed.weight": 5, "trigram.embed.weight": 5, "ve_shared.embed.weight": 6}
    names = [name for name, _ in tg.GPT(cfg).named_parameters()]
    model = model_of(cfg, qat_specs=tg.quant_specs(cfg, names))
    model.refresh_scales()
    w = {}
    for name, p in model.named_parameters():
        leaf, seen = p.detach().double().requires_grad_(), p.detach().clone()
        if name in bits:
            top = 2 ** (bits[name] - 1) - 1
            for row in seen.view(-1, seen.size(-1)):
                scale = (row.abs().max() / top).half().float()
                row.copy_((row / scale).round().clamp(-top, top) * scale)
        w[name] = leaf, leaf + (seen.double() - leaf.detach())
    assert set(bits) & set(names) == set(model.qat_specs)
    check(model, w, rows_of(cfg), qat=True)


def test_each_option_makes_a_difference():
    """Otherwise the comparison above would compare nothing."""
    losses = {}
    for name, changes in OPTIONS.items():
        cfg = tg.Hyperparameters(**{**BASE, **changes})
        rows = rows_of(cfg)
        losses[name] = model_of(cfg).loss(rows[:, :-1], rows[:, 1:]).item()
    assert len({round(loss, 5) for loss in losses.values()}) == len(losses), losses


@torch.no_grad()
def test_a_temperature_divides_the_capped_logits():
    cfg = tg.Hyperparameters(**BASE)
    model, rows = model_of(cfg), rows_of(cfg)
    logits = slow_loss({name: p.double() for name, p in model.named_parameters()}, cfg, rows.tolist())[2]
    for temperature in (0.5, 3.0):
        wanted = -(logits / temperature).log_softmax(-1).gather(1, rows[:, 1:].reshape(-1, 1))[:, 0]
        ours = model.nll(rows[:, :-1], rows[:, 1:], temperature)
        torch.testing.assert_close(ours.flatten().double(), wanted, rtol=1e-4, atol=2e-5)


def test_half_precision_normalises_the_same():
    x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    plain = tg.Hyperparameters()
    torch.testing.assert_close(tg.norm(x.bfloat16(), 0.5).float(), torch.stack([0.5 * rms(row, plain) for row in x]),
                               rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(tg.norm(x, 0.5), torch.stack([0.5 * rms(row, plain) for row in x]))
    tiny = torch.full((1, 4), 1e-4)  # here the epsilon shows
    torch.testing.assert_close(tg.norm(tiny), tiny / (1e-8 + EPS) ** 0.5)


# ---- initial values

def orthogonal(matrices):
    """Whether rows or columns, whichever are fewer, are orthonormal."""
    for m in matrices:
        m = m if m.size(0) <= m.size(1) else m.T
        torch.testing.assert_close(m @ m.T, torch.eye(len(m)), atol=1e-5, rtol=0)


EVERYTHING = {**OPTIONS["everything"], "vocab_size": 3000, "ve_dim": 8, "qk_gain_init": 1.75}


def test_initial_values_are_as_documented():
    torch.manual_seed(0)
    cfg = tg.Hyperparameters(**{**BASE, **EVERYTHING})
    w = {name: p.detach() for name, p in tg.GPT(cfg).named_parameters()}
    layers, left = cfg.num_layers, set(w)

    def constant(pattern, value):
        names = [name for name in w if tg.re.fullmatch(pattern, name)]
        assert names, pattern
        for name in names:
            torch.testing.assert_close(w[name], torch.as_tensor(value).expand_as(w[name]), msg=name)
        left.difference_update(names)
    orthogonal([*w["qo_bank"][:layers], *w["kv_bank"], *w["mlp_up_bank"], *(w[f"{name}.proj.weight"] for name in (
        "bigram", "trigram", "ve_shared"))])
    assert not w["qo_bank"][layers:].any()
    constant(r"mlp_down_bank|(bigram|trigram)\.embed\.weight|lm_head\.weight|mtp_heads\..*|smear\.gate", 0.0)
    constant(r".*(attn_gate|dtg_gate)\.weight", 0.0)
    constant(r".*attn_gate\.bias", 4.0)
    constant(r".*dtg_gate\.bias", 2.0)
    constant(r"bigram\.scale", 0.05)
    constant(r"trigram\.scale", 0.03)
    constant(r"ve_shared\.scale", 0.1)
    constant(r"skip_weights|ve_layer_scales\.\d|.*(attn_scale|mlp_scale)", 1.0)
    constant(r".*resid_mix", torch.tensor([[1.0], [0.0]]))
    constant(r".*q_gain", 1.75)
    constant(r".*vr_lambda", 0.5)
    assert sum("vr_lambda" in name for name in w) == layers - 1 and w["skip_weights"].shape == (2, 24)
    for name, std in (("tok_emb.weight", 1.0), ("ve_shared.embed.weight", 0.01)):
        assert w[name].std().item() == pytest.approx(std, rel=0.03) and abs(w[name].mean()) < 0.05 * std
    assert left == {"qo_bank", "kv_bank", "mlp_up_bank", "tok_emb.weight", "bigram.proj.weight", "trigram.proj.weight",
                    "ve_shared.proj.weight", "ve_shared.embed.weight"}
    later = dict(tg.GPT(tg.Hyperparameters(**{**BASE, **OPTIONS["PR 1855"]})).named_parameters())
    for name, value in (("skip_gates", 0.0), ("smear.scale", 0.0), ("smear.gate.weight", 0.0), ("lane_keeps", 1.1),
                        ("lane_takes", 1.0), *((f"blocks.{i}.attn.sparse_gate.weight", 0.0) for i in range(5))):
        torch.testing.assert_close(later[name].detach(), torch.tensor(value).expand_as(later[name]), msg=name)
    assert later["skip_weights"].shape == later["skip_gates"].shape == (4, 24)
    tied = tg.GPT(tg.Hyperparameters(**{**BASE, "vocab_size": 3000, "tied_embed_init_std": 0.007}))
    assert tied.tok_emb.weight.std().item() == pytest.approx(0.007, rel=0.03)


@torch.no_grad()
def test_blocks_are_the_identity_at_the_start():
    cfg = tg.Hyperparameters(**{**BASE, **EVERYTHING})
    model, ids = tg.GPT(cfg), rows_of(cfg)
    torch.testing.assert_close(model.hidden(ids), tg.norm(model.embed(ids, qat=False)), rtol=1e-4, atol=1e-5)
