"""Calibration, the rounding of a whole model and the fitting of its size, against slow and obvious references."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import train_gpt as tg
from clocks import FakeTime
from conftest import make_runtime, scrambled

BRIEF = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "COMPRESS": "lzma", "EVAL_MAX_SECONDS": 0}


def model_of(cfg, seed=0):
    torch.manual_seed(seed)
    return scrambled(tg.GPT(cfg), seed).eval()


# ---- which text

@pytest.mark.parametrize("ended_by", ["its steps", "the clock"])
def test_calibration_reads_the_text_that_the_next_steps_would_have_read(run, monkeypatch, ended_by):
    """The spans of six steps and of two batches of calibration lie one behind the other, and nothing else is read."""
    FakeTime(monkeypatch).charge(tg.Optimisers, "step", 1.0)
    limits = {"ITERATIONS": 6} if ended_by == "its steps" else {"ITERATIONS": 99, "MAX_WALLCLOCK_SECONDS": 7,
                                                                "GPTQ_RESERVE_SECONDS": 1}
    spans, read = [], tg.TokenStream.read

    def watched(stream, start, count):
        if "train" in stream.paths[0]:
            spans.append((start, start + count - 1))  # the last token is a target only
        return read(stream, start, count)
    monkeypatch.setattr(tg.TokenStream, "read", watched)
    done = run(GPTQ_ENABLED=1, GPTQ_CALIBRATION_BATCHES=2, **limits, **BRIEF)
    assert done.code == 0, done.err
    assert spans == [(256 * step, 256 * (step + 1)) for step in range(8)]


def test_calibration_looks_at_all_its_text_and_only_at_that(config, rt):
    cfg = config(gptq_enabled=True, gptq_calibration_batches=3, micro_batch_tokens=64)
    model, data = model_of(cfg), tg.TrainData.open(cfg, rt)
    look = tg.HessianSums(model)
    with torch.no_grad():
        for step in (10, 11, 12):
            for inputs, _ in data.batch(step):
                model.logits(model.hidden(inputs, hook=look), hook=look)
    hessians = tg.calibrate(cfg, rt, model, data, 10, math.inf).hessians
    for name, wanted in look.by_parameter(rt).items():
        torch.testing.assert_close(hessians[name], wanted, rtol=1e-5, atol=1e-4)


def test_nothing_is_looked_at_where_nothing_calibrates(config, rt):
    calibration = tg.calibrate(config(), rt, None, None, 6, math.inf)
    assert calibration.hessians == {} and calibration.prices == {}


def test_own_text_is_drawn_at_temperature_0_8(config, rt):
    """First tokens evenly; each next one as the softmax of logits / 0.8 says: the mean log-probability of what was
    drawn is what such a draw expects, within four standard errors, and it is not that of another temperature."""
    cfg = config(vocab_size=24, train_seq_len=8, gptq_calibration="self", gptq_calibration_batches=80)
    model = model_of(cfg)
    with torch.no_grad():
        model.tok_emb.weight.mul_(2)  # predictions with an opinion
        texts = [torch.cat((x[:, :1], y), dim=1) for x, y in tg.self_generated_text(cfg, rt, model)]
        text = torch.cat(texts)
        assert text.shape == (320, 9) and (text >= 0).all() and (text < 24).all()
        counts = torch.bincount(text[:, 0], minlength=24).double()
        assert ((counts - 320 / 24).square() / (320 / 24)).sum() < 50  # chi² of 23 degrees: 1 in 1000 is above
        logits = model.logits(model.hidden(text[:, :-1])).double()
    drawn = text[:, 1:, None]

    def surprise(temperature):
        log_p = (logits / temperature).log_softmax(-1)
        expected = (log_p.exp() * log_p).sum(-1)
        spread = ((log_p.exp() * log_p.square()).sum(-1) - expected.square()).sum().sqrt()
        return ((log_p.gather(-1, drawn)[..., 0] - expected).sum() / spread).item()
    assert abs(surprise(0.8)) < 4 and abs(surprise(0.7)) > 6 and abs(surprise(0.9)) > 6
    assert len({tuple(row) for row in text.tolist()}) > 200, "rows and batches are drawn by themselves"


def test_own_text_is_that_of_its_seed_and_is_shared_among_ranks(config, tmp_path):
    cfg = config(train_seq_len=4, gptq_calibration="self", gptq_calibration_batches=5)
    model = model_of(cfg)
    draw = lambda cfg, rank=0, world=1: [x for x, _ in tg.self_generated_text(
        cfg, make_runtime(tmp_path, rank=rank, world_size=world), model)]
    alone, parts = draw(cfg), [draw(cfg, rank, 3) for rank in range(3)]
    assert [len(part) for part in parts] == [2, 2, 1]
    assert all(torch.equal(alone[i], parts[i % 3][i // 3]) for i in range(5))
    assert not torch.equal(draw(dataclasses.replace(cfg, seed=99))[0], alone[0])


# ---- in which time

@pytest.mark.parametrize("changes, share", [({"gptq_enabled": True}, 1 / 1.5), ({"size_fit": True}, 1 / 3),
                                            ({"gptq_enabled": True, "gptq_calibration": "self"}, 1 / 1.5)])
def test_calibration_leaves_time_for_what_follows_it(config, tmp_path, monkeypatch, capsys, changes, share):
    """A batch takes 1 s, 9 are left: it reads no further than a good share of them, and says nothing."""
    cfg = config(gptq_calibration_batches=1000, train_seq_len=8, train_batch_tokens=64, **changes)
    rt, model = make_runtime(tmp_path, log=tg.RunLog(tmp_path, "test")), model_of(cfg)
    clock = FakeTime(monkeypatch)
    looked = clock.charge(tg.HessianSums, "__call__", lambda n, look, kind, *_: 1.0 if kind == "head" else 0.0)
    tg.calibrate(cfg, rt, model, tg.TrainData.open(cfg, rt), 6, 9.0)
    assert 9 * share <= clock.now <= 9 * share + 1 < 9 and looked
    assert "warning" not in capsys.readouterr().out


def test_calibration_that_overruns_says_by_how_much(config, tmp_path, monkeypatch, capsys):
    cfg = config(gptq_enabled=True)
    rt, model, clock = make_runtime(tmp_path, log=tg.RunLog(tmp_path, "test")), model_of(cfg), FakeTime(monkeypatch)
    clock.charge(tg.HessianSums, "__call__", lambda n, look, kind, *_: 5.0 if kind == "head" else 0.0)
    tg.calibrate(cfg, rt, model, tg.TrainData.open(cfg, rt), 6, 3.5)
    assert "warning: calibration took 5.0s, 1.5s more than was left" in capsys.readouterr().out


# ---- what comes of it

def test_the_codes_of_gptq_are_the_codes_of_the_artifact(run, config, rt):
    """From the float model on disk and the text behind the last step, calibrated here once more."""
    cfg = config(gptq_enabled=True, gptq_calibration_batches=2, mlp_quant_bits=3, attn_qat_bits=4)
    variables = {"GPTQ_CALIBRATION_BATCHES": 2, "MLP_QUANT_BITS": 3, "ATTN_QAT_BITS": 4, "ITERATIONS": 6,
                 "LATE_QAT_THRESHOLD": 0, **BRIEF}
    done = run(GPTQ_ENABLED=1, **variables)
    assert done.code == 0, done.err
    stored = {s.name: s for s in tg.read_artifact((done.folder / "final_model.ptz").read_bytes())[2] if s.bits}
    model = tg.GPT(cfg)
    model.load_state_dict(torch.load(done.folder / "final_model.pt"))
    hessians = tg.calibrate(cfg, rt, model, tg.TrainData.open(cfg, rt), 6, math.inf).hessians
    wanted, nearest = (tg.round_model(cfg, model, h) for h in (hessians, {}))
    assert stored.keys() == wanted.keys() and hessians.keys() <= wanted.keys()
    for name, (codes, scales) in wanted.items():
        assert np.array_equal(stored[name].values, codes.numpy()), name
        assert np.array_equal(stored[name].scales, scales.numpy()), name
    assert all((stored[name].values != nearest[name][0].numpy()).any() for name in ("mlp_up_bank", "qo_bank"))
    plain = run(GPTQ_ENABLED=0, **variables)
    for s in tg.read_artifact((plain.folder / "final_model.ptz").read_bytes())[2]:
        assert not s.bits or np.array_equal(s.values, nearest[s.name][0].numpy()), s.name
    assert plain.summary["val_bpb_pre_quant"] == done.summary["val_bpb_pre_quant"]
    assert plain.summary["val_bpb_roundtrip"] != done.summary["val_bpb_roundtrip"]


def test_a_model_takes_its_own_weights_back(config):
    cfg = config()
    model = model_of(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounded = tg.round_model(cfg, model, {})
    with pytest.raises(KeyError), tg.using_rounded_weights(model, rounded):
        for name, p in model.named_parameters():
            wanted = tg.dequantise(*rounded[name]) if name in rounded else before[name]
            assert torch.equal(p, wanted), name
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- prices and sizes

def drift_slowly(cfg, model, rounded, texts):
    """KL(float || rounded) in nats a token, in float64 and word by word; the mean over texts."""
    means = []
    for ids in texts:
        with torch.no_grad():
            true = model.logits(model.hidden(ids)).double().softmax(-1)
            other = tg.GPT(cfg)
            other.load_state_dict(model.state_dict() | {n: tg.dequantise(*pair) for n, pair in rounded.items()})
            seen = other.eval().logits(other.hidden(ids)).double().softmax(-1)
        means.append((true * (true / seen).log()).sum(-1).mean().item())
    return sum(means) / len(means)


@pytest.mark.parametrize("changes", [{}, {"gptq_enabled": True}, {"clip_rule": "sdclip", "mlp_clip_sigmas": 3.0,
                                      "attn_clip_sigmas": 3.0, "embed_clip_sigmas": 3.0, "mlp_clip_widen": 1.5}],
                         ids=["nearest", "gptq", "sdclip"])
def test_the_price_of_wider_steps_is_what_the_predictions_drift(config, rt, changes):
    """Family by family: everything rounded as settings say, and then that family alone on steps twice as wide."""
    cfg = config(size_fit=True, attn_qat_bits=3, mlp_quant_bits=4, embed_bits=5, **changes)
    model, data = model_of(cfg), tg.TrainData.open(cfg, rt)
    hessians = tg.calibrate(cfg, rt, model, data, 0, math.inf).hessians
    assert bool(hessians) == cfg.gptq_enabled
    texts = [next(data.batch(step))[0][:rows] for step, rows in ((40, 8), (41, 4))]
    families = {"attn_clip_widen": ("qo_bank", "kv_bank"), "mlp_clip_widen": ("mlp_up_bank", "mlp_down_bank"),
                "embed_clip_widen": ("tok_emb.weight", "bigram.embed.weight", "ve_shared.embed.weight")}
    rounded = tg.round_model(cfg, model, hessians)
    before, wanted = drift_slowly(cfg, model, rounded, texts), {}
    for setting, names in families.items():
        wide = dataclasses.replace(cfg, **{setting: 2 * getattr(cfg, setting)})
        wide = tg.round_model(wide, model, hessians)
        wanted[setting] = drift_slowly(cfg, model, rounded | {name: wide[name] for name in names}, texts) - before
    assert min(wanted.values()) > 1e-3 and before > 1e-3
    prices = tg.step_prices(cfg, model, hessians, texts)
    assert prices == pytest.approx(wanted, rel=2e-3, abs=1e-5)


def test_prices_are_measured_on_calibration_text(config, rt, monkeypatch):
    cfg = config(size_fit=True, gptq_calibration_batches=3)
    model, data, seen = model_of(cfg), tg.TrainData.open(cfg, rt), []
    monkeypatch.setattr(tg, "step_prices", lambda cfg, model, hessians, texts: seen.extend(texts) or {})
    tg.calibrate(cfg, rt, model, data, 20, math.inf)
    assert len(seen) == 3 and all(torch.equal(ids, next(data.batch(20 + i))[0]) for i, ids in enumerate(seen))


def entropy_of(codes):
    counts = np.unique(codes, return_counts=True)[1]
    return -sum(n * math.log2(n / counts.sum()) for n in counts) / 8


def test_sizes_are_foreseen_from_the_codes_themselves(config):
    cfg = config(mlp_quant_bits=5)
    model = model_of(cfg)
    fit = tg.SizeFit(cfg, model, dict.fromkeys(("mlp_clip_widen", "attn_clip_widen", "embed_clip_widen"), 0.1))
    for octaves in (dict.fromkeys(fit.groups, 0.0),
                    {"mlp_clip_widen": 1.0, "attn_clip_widen": 0.5, "embed_clip_widen": 2.25}):
        changed = dataclasses.replace(cfg, **{name: 2.0 ** x for name, x in octaves.items()})
        codes = [codes.numpy() for codes, _ in tg.round_model(changed, model, {}).values()]
        assert fit.bytes_at(octaves) == pytest.approx(sum(map(entropy_of, codes)), rel=1e-6)


@pytest.mark.parametrize("cheap", ["mlp_clip_widen", "attn_clip_widen", "embed_clip_widen"])
def test_size_fit_widens_where_it_costs_least(config, rt, cheap):
    """One family's steps cost next to nothing: they are widened as far as they must be, the others hardly."""
    cfg = config(size_fit=True, compress="lzma")
    model = model_of(cfg)
    make = lambda c: tg.pack(c, model, "0" * 64, tg.round_model(c, model, {}))
    total = len(make(cfg).blob) + 1000
    prices = {name: 1e-4 if name == cheap else 1.0 for name in ("mlp_clip_widen", "attn_clip_widen",
                                                                "embed_clip_widen")}
    limit = dataclasses.replace(cfg, artifact_limit_bytes=int(0.93 * total))
    fitted, artifact = tg.fit_size(limit, rt, model, prices, make, total, 1000)
    assert 0.995 * 0.93 * total - 1 <= len(artifact.blob) + 1000 <= 0.93 * total, "the code counts"
    for name in prices:
        assert getattr(fitted, name) > 1.3 if name == cheap else getattr(fitted, name) < 1.05, name


def test_equal_prices_a_weight_widen_all_alike_and_dearer_ones_as_the_square_says(config):
    """Two weights of a step each: doubling costs the error four-fold, so four times the price is one doubling less."""
    cfg = config()
    model = model_of(cfg)
    weights = {"mlp_clip_widen": model.mlp_up_bank.numel() + model.mlp_down_bank.numel(),
               "attn_clip_widen": model.qo_bank.numel() + model.kv_bank.numel(),
               "embed_clip_widen": model.tok_emb.weight.numel() + model.bigram.embed.weight.numel()
               + model.ve_shared.embed.weight.numel()}
    even = tg.SizeFit(cfg, model, {name: 1e-6 * n for name, n in weights.items()})
    start = even.bytes_at(dict.fromkeys(weights, 0.0))
    octaves = even.reach(0.8 * start)
    assert min(octaves.values()) == pytest.approx(max(octaves.values())) and 0.5 < octaves["mlp_clip_widen"] < 2
    assert even.nats(dict.fromkeys(weights, 1.0)) == pytest.approx(1e-6 * sum(weights.values()))
    dear = tg.SizeFit(cfg, model, {name: (4 if name == "mlp_clip_widen" else 1) * 1e-6 * n
                                   for name, n in weights.items()})
    octaves = dear.reach(0.7 * start)
    assert octaves["attn_clip_widen"] == pytest.approx(octaves["mlp_clip_widen"] + 1)
    assert octaves["attn_clip_widen"] == pytest.approx(octaves["embed_clip_widen"])


def test_a_fitted_run_says_what_it_did_and_keeps_to_it(run):
    """The artifact's scales are wider than those of the same run without a limit, by what the log says."""
    variables = {"ITERATIONS": 3, "CLIP_RULE": "amax", **BRIEF}
    free = run(SIZE_FIT=0, **variables)
    scales = {s.name: s.scales for s in tg.read_artifact((free.folder / "final_model.ptz").read_bytes())[2] if s.bits}
    limit = free.summary["total_bytes"] - 6000
    done = run(SIZE_FIT=1, ARTIFACT_LIMIT_BYTES=limit, GPTQ_CALIBRATION_BATCHES=1, **variables)
    assert done.code == 0 and done.summary["total_bytes"] <= limit, done.err
    last = [e for e in map(json.loads, (done.folder / "logs/tiny.jsonl").read_text().splitlines())
            if e["event"] == "size_fit" and e["total"] == done.summary["total_bytes"]][-1]
    names = {"mlp_up_bank": "MLP_CLIP_WIDEN", "qo_bank": "ATTN_CLIP_WIDEN", "tok_emb.weight": "EMBED_CLIP_WIDEN"}
    for s in tg.read_artifact((done.folder / "final_model.ptz").read_bytes())[2]:
        if s.name in names:
            live = scales[s.name] > 2e-6  # rows of zeros stay at the floor
            ratio = s.scales[live].astype(float) / scales[s.name][live]
            assert ratio == pytest.approx(last["steps"][names[s.name]], rel=5e-3), s.name


@pytest.mark.parametrize("sizes, kept", [
    ((9300, 9800, 9700, 10_050, 9900, 9400), 9900), ((9300, 9970), 9970), ((10_001, 10_000), 10_000),
    ((9300,) * 6, 9300)])
def test_of_all_packings_the_largest_that_fits_is_kept(config, rt, sizes, kept):
    """A packer whose sizes nobody could foresee: the search ends with the first within half a percent of the limit."""
    cfg = config(artifact_limit_bytes=10_000)
    model, made = model_of(cfg), iter(sizes)
    prices = dict.fromkeys(("mlp_clip_widen", "attn_clip_widen", "embed_clip_widen"), 0.1)
    packings = []

    def make(settings):
        packings.append((settings, tg.Artifact(bytes(next(made) - 500), ())))
        return packings[-1][1]
    settings, artifact = tg.fit_size(cfg, rt, model, prices, make, 12_000, 500)
    assert len(artifact.blob) + 500 == kept and any(pair == (settings, artifact) for pair in packings)
    assert len(packings) == 1 + next((i for i, size in enumerate(sizes) if 9950 <= size <= 10_000), 5)


def test_size_fit_changes_nothing_that_fits(run):
    variables = {"ITERATIONS": 2, **BRIEF}
    free = run(SIZE_FIT=0, **variables)
    blob = (free.folder / "final_model.ptz").read_bytes()
    done = run(SIZE_FIT=1, GPTQ_CALIBRATION_BATCHES=1, ARTIFACT_LIMIT_BYTES=free.summary["total_bytes"], **variables)
    assert done.code == 0 and "size_fit:start" not in done.out
    assert (done.folder / "final_model.ptz").read_bytes() == blob
