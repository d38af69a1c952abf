"""What the other published systems need: each setting is off by default, and alive where it is on."""
import collections
import dataclasses

import numpy as np
import pytest
import torch
import train_gpt as tg
from conftest import make_runtime, scrambled

PLAIN = {"attention_window": 12, "qk_norm": False, "logit_softcap": 0.0, "embed_norm": False, "smear_gate": "off",
         "unet_skips": False, "residual_mix": False, "norm_weights": True, "norm_eps": 1e-6, "ln_scale": False}
LOOP = {"num_loops": 2, "loop_start": 0, "loop_end": 1}
PR1855 = {**LOOP, "parallel_start_layer": 2, "skip_gates": True, "sparse_attn_gate": True, "sparse_attn_gate_scale": 0.5,
          "smear_gate": "window", "rope_train_seq_len": 0, "leaky_slope": 0.3, "mlp_mult": 4.0, "qk_gain_init": 5.0}
ONE_BY_ONE = {**{name: {name: value} for name, value in PLAIN.items() if name != "ln_scale"},
              "smear before": {"smear_gate": "before"}, "smear window": {"smear_gate": "window"},
              "skip gates": {"skip_gates": True}, "sparse gate": {"sparse_attn_gate": True}, "loop": LOOP,
              "joint": {"parallel_start_layer": 1, "parallel_form": "joint"}, "lanes": {"parallel_start_layer": 2},
              "all of PR 1855": PR1855, "all of PR 1254": PLAIN, "last layers": {"ve_last_n": 1}}


def batch_of(cfg, rows=2):
    ids = torch.randint(cfg.vocab_size, (rows, cfg.train_seq_len + 1), generator=torch.Generator().manual_seed(5))
    return ids[:, :-1], ids[:, 1:]


def loss_and_gradients(model, loss_fn, *args):
    model.zero_grad(set_to_none=True)
    loss = loss_fn(*args)
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("changes", ONE_BY_ONE.values(), ids=ONE_BY_ONE)
def test_it_changes_the_loss_eager_and_compiled_alike(config, changes):
    """Compiled: traced whole, as for a device; the graph is run as it is."""
    cfg = config(**changes)
    model, batch = scrambled(tg.GPT(cfg)), batch_of(cfg)
    loss, grads = loss_and_gradients(model, model.loss, *batch)
    assert abs(loss - scrambled(tg.GPT(config())).loss(*batch).item()) > 1e-4
    torch._dynamo.reset()
    traced, traced_grads = loss_and_gradients(model, torch.compile(model.loss, backend="aot_eager", fullgraph=True),
                                              *batch)
    assert traced == pytest.approx(loss, rel=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(traced_grads[name], grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("attend", [tg.attend_math, tg.attend_sdpa])
@pytest.mark.parametrize("window", [0, 2, 5, 30])
def test_a_window_is_the_same_for_the_last_positions_alone(config, attend, window):
    """A sliding evaluation asks for the last positions only; each sees itself and `window` before it."""
    cfg = config(attention_window=window, num_layers=1, ve_layers="0", smear_gate="off", bigram_vocab_size=0)
    model, (ids, _) = scrambled(tg.GPT(cfg, attend)), batch_of(cfg)
    with torch.no_grad():
        whole = model.hidden(ids)
        torch.testing.assert_close(model.hidden(ids, keep=7), whole[:, -7:], rtol=1e-5, atol=1e-5)
        if window:
            other = ids.clone()
            at = len(ids[0]) - window - 2  # one too far for the last position
            other[:, at] = (ids[:, at] + 1) % cfg.vocab_size
            moved = (model.hidden(other) - whole).abs().amax((0, 2)) > 1e-6
            assert moved.nonzero().flatten().tolist() == list(range(at, at + window + 1))


ADAPT = {"sgd": {}, "lora": {"TTT_MODE": "lora"}, "documents": {"TTT_MODE": "lora", "TTT_RESET": "document",
                                                             "TTT_DOC_CHUNK_TOKENS": 16}}


@pytest.mark.parametrize("mode", ADAPT.values(), ids=ADAPT)
def test_a_whole_run_knows_of_all_of_pr_1855(run, mode):
    """Looped halfway, rounded while training, calibrated, written, read back, adapted."""
    variables = {name.upper(): int(value) if isinstance(value, bool) else value for name, value in PR1855.items()}
    done = run(**variables, **mode, POLAR_EXPRESS=1, MUON_ROW_NORMALIZE=1, EMBED_WD=0.085, EMA_RAMP=0, EMA_DECAY=0.5,
               WARMDOWN_FRAC=0.85, MIN_LR=0.1, LATE_QAT_FRAC=0.5, GPTQ_ENABLED=1, GPTQ_CALIBRATION_BATCHES=1,
               CLIP_RULE="sdclip", HASH_EMBED_BUCKETS=0 if "TTT_RESET" in mode else 64)
    assert done.code == 0, done.err
    assert "layer_loop:enabled step:3 layers:[0, 1, 0, 1, 0, 1, 2]" in done.out and "late_qat:enabled" in done.out
    cfg, _, weights = tg.unpack((done.folder / "final_model.ptz").read_bytes())
    assert all(getattr(cfg, name) == value for name, value in PR1855.items())
    assert len(weights["mlp_up_bank"]) == 3 and len(weights["skip_gates"]) == 3
    moved = {"smear.scale": 0.0, "skip_gates": 0.0, "lane_keeps": 1.1, "lane_takes": 1.0,
             "blocks.1.attn.sparse_gate.weight": 0.0}
    assert all((weights[name] - start).abs().max() > 1e-3 for name, start in moved.items())
    bpb = [done.summary[f"val_bpb_{key}"] for key in ("pre_quant", "roundtrip", "sliding", "ttt")]
    assert len(set(bpb)) == 4 and all(0 < x < 9 for x in bpb)


@pytest.mark.parametrize("mode", ADAPT.values(), ids=ADAPT)
def test_a_whole_run_knows_of_all_of_them(run, mode):
    """Trained by AdamW, pruned, written, read back, adapted. What is scored is what was written."""
    variables = {name.upper(): int(value) if isinstance(value, bool) else value for name, value in PLAIN.items()}
    done = run(**variables, **mode, INIT="kaiming", MATRIX_OPTIMIZER="adamw", WARMDOWN_SHAPE="cosine", WARMDOWN_FRAC=1,
               COMPLEMENT_ALPHA=0.5, PRUNE_FRAC=0.2, VALUE_EMBED_LAYERS=1, WEIGHT_DECAY=0.1, TTT_STRIDE=8,
               SOFT_ROUND_ENABLED=1, LATE_QAT_FRAC=0.5, GRAD_CLIP_NORM=1, EVAL_STRIDE=8, NGRAM_CACHE=1, BIAS_LR=0)
    assert done.code == 0, done.err
    assert "warning: NGRAM_CACHE=1 has no effect: hashed n-gram mixers do not give" in done.out and "BIAS_LR" not in done.out
    cfg, _, weights = tg.unpack((done.folder / "final_model.ptz").read_bytes())
    assert all(getattr(cfg, name) == value for name, value in PLAIN.items()) and cfg.ve_layer_ids == (2,)
    assert weights["blocks.0.attn_norm.weight"].std() > 0 and "blocks.0.resid_mix" not in weights
    assert all(0.19 < (weights[name] == 0).float().mean() < 0.6 for name in ("qo_bank", "mlp_up_bank"))
    bpb = [done.summary[f"val_bpb_{key}"] for key in ("pre_quant", "roundtrip", "sliding", "ttt")]
    assert len(set(bpb)) == 4 and all(0 < x < 9 for x in bpb)


@pytest.mark.parametrize("variables, said", [
    ({"ATTENTION_WINDOW": "1"}, "ATTENTION_WINDOW=1 is too short to attend; use 0 or at least 2"),
    ({"ATTENTION_WINDOW": "64", "TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "64", "TTT_ENABLED": "0"},
     "ATTENTION_WINDOW=64 is longer than"), ({"PRUNE_FRAC": "1"}, "PRUNE_FRAC=1 is out of range"),
    ({"VALUE_EMBED_LAYERS": "12"}, "VE_LAST_N=12 is more than NUM_LAYERS=11"),
    ({"SMEAR_GATE": "1"}, "SMEAR_GATE='1' is not one of after, before, window, off"),
    ({"NUM_LOOPS": "1", "LOOP_START": "3", "LOOP_END": "2"}, "LOOP_START=3 to LOOP_END=2 is no range in 0..10"),
    ({"NUM_LOOPS": "1", "LOOP_END": "11"}, "LOOP_START=3 to LOOP_END=11 is no range in 0..10"),
    ({"NUM_LOOPS": "1", "PARALLEL_START_LAYER": "5"}, "LOOP_END=5 is in the parallel part, PARALLEL_START_LAYER=5: a"),
    ({"PARALLEL_START_LAYER": "11"}, "PARALLEL_START_LAYER=11 is outside 0..10"),
    ({"PARALLEL_START_LAYER": "7", "DTG_ENABLED": "1"}, "DTG_ENABLED=True gates one stream; PARALLEL_FORM='lanes' has"),
    ({"GATE_WINDOW": "600"}, "GATE_WINDOW=600 is more than MODEL_DIM=512"),
    ({"MATRIX_OPTIMIZER": "sgd"}, "is not one of muon, adamw"), ({"ADAM_WD": "0.1", "WEIGHT_DECAY": "0.2"}, "different")])
def test_bad_input_is_one_line(variables, said):
    with pytest.raises(tg.UserError, match=said) as refused:
        tg.Hyperparameters.from_env(variables)
    assert "\n" not in str(refused.value)


# ---- initial weights

def test_kaiming_is_that_of_a_linear_layer(config):
    """PyTorch's own initial values: uniform within 1 / sqrt(inputs)."""
    cfg = config(init="kaiming", model_dim=64, mlp_mult=2.0)
    torch.manual_seed(0)
    model = tg.GPT(cfg)
    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb.weight"):
        weight = model.get_parameter(name).detach()
        bound = weight.size(-1) ** -0.5
        assert 0.95 * bound < weight.abs().max() <= bound and weight.std() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
        assert weight.flatten(0, -2).std(-1).min() > 0.3 * bound, name


# ---- complementary training

class SlowCounts:
    """PR 803, token by token."""

    def __init__(self, alpha):
        self.alpha, self.pairs, self.firsts = alpha, collections.Counter(), collections.Counter()

    def weigh(self, tokens):
        pairs = list(zip(tokens[:-1], tokens[1:]))
        weights = np.array([max(1 - self.alpha * self.pairs[p] / (self.firsts[p[0]] + 1), 0.1) for p in pairs])
        self.pairs.update(pairs)
        self.firsts.update(a for a, _ in pairs)
        return weights / weights.mean()


@pytest.mark.parametrize("world", [1, 2])
def test_what_bigrams_predict_weighs_less(config, tmp_path, world):
    cfg, slow = config(complement_alpha=0.9, micro_batch_tokens=64), SlowCounts(0.9)
    ranks = [make_runtime(tmp_path, rank=rank, world_size=world) for rank in range(world)]
    data = [tg.TrainData.open(cfg, rt) for rt in ranks]
    counts = [tg.BigramCounts(cfg, rt.device) for rt in ranks]
    for step in range(4):
        wanted = slow.weigh(data[0].read(step, range(256)).tolist())
        got = [c.weigh(d, step) for c, d in zip(counts, data)]
        assert all(part.shape == (4 // world, 2, 32) for part in got)
        np.testing.assert_allclose(torch.cat([part.flatten() for part in got]), wanted, rtol=1e-5)
    assert wanted.min() < 0.8 and wanted.mean() == pytest.approx(1)
    assert tg.BigramCounts(config(), ranks[0].device).weigh(data[0], 0) == [None] * (4 // world)


def test_weights_are_those_of_the_tokens_loss(config):
    """sum(w nll) / n with its gradient; with equal weights nothing changes."""
    cfg = config()
    model, (ids, targets) = scrambled(tg.GPT(cfg)), batch_of(cfg)
    weights = torch.rand(targets.shape, generator=torch.Generator().manual_seed(1)) + 0.1
    loss, grads = loss_and_gradients(model, model.loss, ids, targets, False, None, weights)
    wanted, wanted_grads = loss_and_gradients(model, lambda: (weights * model.nll(ids, targets)).mean())
    assert loss == pytest.approx(wanted, rel=1e-5)
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-3, atol=1e-6, msg=name)
    assert model.loss(ids, targets, False, None, torch.ones_like(weights)).item() == pytest.approx(
        model.loss(ids, targets).item(), rel=1e-6)


def test_counts_survive_a_checkpoint(run):
    variables = {"ITERATIONS": 8, "COMPLEMENT_ALPHA": 0.9, "CHECKPOINT_EVERY": 4, "TTT_ENABLED": 0, "EVAL_STRIDE": 0,
                 "WARMDOWN_ITERS": 0, "LATE_QAT": 0}  # so that the first steps do not depend on ITERATIONS
    whole = run(**variables, ARTIFACT_DIR=run.folder / "whole")
    plain = run(**{**variables, "COMPLEMENT_ALPHA": 0}, ARTIFACT_DIR=run.folder / "plain")
    run(**{**variables, "ITERATIONS": 4}, ARTIFACT_DIR=run.folder / "parts")
    parts = run(**variables, RESUME=1, ARTIFACT_DIR=run.folder / "parts")
    assert (whole.code, parts.code) == (0, 0), parts.err
    states = [torch.load(run.folder / name / "final_model.pt", weights_only=True) for name in ("whole", "parts", "plain")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["qo_bank"], states[2]["qo_bank"]) and plain.code == 0


# ---- pruning

@pytest.mark.parametrize("share", [0.0, 0.03, 0.5])
def test_the_smallest_weights_of_each_matrix_go(share):
    weight = torch.randn(3, 10, 20, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 10, 100])[:, None, None]
    pruned = tg.prune(weight, share)
    for before, after in zip(weight, pruned):
        gone = after == 0
        assert gone.sum() == int(share * 200) and torch.equal(before[~gone], after[~gone])
        assert not share or before[gone].abs().max() < before[~gone].abs().min()


def test_pruned_weights_are_zero_in_the_artifact_with_gptq_too(config):
    cfg = config(prune_frac=0.3, gptq_enabled=True)
    model = scrambled(tg.GPT(cfg))
    hessians = {name: torch.eye(p.size(-1)).expand(len(p), -1, -1) for name, p in model.named_parameters()
                if name.endswith("_bank")}
    plain = tg.round_model(dataclasses.replace(cfg, prune_frac=0.0), model, hessians)
    for name, (codes, _) in tg.round_model(cfg, model, hessians).items():
        assert (codes == 0).float().mean() > 0.29 > (plain[name][0] == 0).float().mean(), name
