"""Calibration, the rounding of a whole model and the fitting of its size, against slow and obvious references."""
import copy
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
    hessians = tg.calibrate(cfg, rt, model, data, 10, math.inf)
    for name, wanted in look.by_parameter(rt).items():
        torch.testing.assert_close(hessians[name], wanted, rtol=1e-5, atol=1e-4)


def test_nothing_is_looked_at_where_nothing_calibrates(config, rt):
    assert tg.calibrate(config(), rt, None, None, 6, math.inf) == {}


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

@pytest.mark.parametrize("changes, share", [({}, 1 / 1.5), ({"gptq_calibration": "self"}, 1 / 1.5)])
def test_calibration_leaves_time_for_what_follows_it(config, tmp_path, monkeypatch, capsys, changes, share):
    """A batch takes 1 s, 9 are left: it reads no further than a good share of them, and says nothing."""
    cfg = config(gptq_enabled=True, gptq_calibration_batches=1000, train_seq_len=8, train_batch_tokens=64, **changes)
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
    hessians = tg.calibrate(cfg, rt, model, tg.TrainData.open(cfg, rt), 6, math.inf)
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


# ---- sizes

def test_size_fit_widens_the_banks_by_one_factor(config, rt):
    """By as much as it must, from where the settings already are; the tables stay as they are."""
    cfg = config(size_fit=True, compress="lzma", clip_widen=1.25)
    model = model_of(cfg)
    make = lambda c: tg.pack(c, model, "0" * 64, tg.round_model(c, model, {}))
    total, banks = len(make(cfg).blob) + 1000, sum(p.numel() for n, p in model.named_parameters() if "_bank" in n)
    limit = dataclasses.replace(cfg, artifact_limit_bytes=int(0.93 * total))
    fitted, artifact = tg.fit_size(limit, rt, banks, make, total, 1000)
    assert 0.995 * 0.93 * total - 1 <= len(artifact.blob) + 1000 <= 0.93 * total, "the code counts"
    assert fitted.clip_widen > 1.25 * 1.05
    specs = tg.quant_specs(fitted, dict(model.named_parameters()))
    assert {name.endswith("_bank"): spec.widen for name, spec in specs.items()} == {True: fitted.clip_widen, False: 1.0}


@pytest.mark.parametrize("bits", [0.7, 1.0, 1.6])
@pytest.mark.parametrize("over", [0.002, 0.1, 0.4])
def test_size_fit_finds_its_factor_whatever_a_doubling_saves(config, rt, bits, over):
    """A packer that saves so many bits per weight and doubling, less the wider the steps are; few packings suffice."""
    cfg, weights, packings = config(artifact_limit_bytes=1_000_000), 4_000_000, []

    def make(settings):
        saved = bits / 8 * weights * (1 - math.exp(-2 * math.log2(settings.clip_widen) / 4)) * 2
        packings.append(int(1_000_000 * (1 + over) - saved))
        return tg.Artifact(bytes(packings[-1]), ())
    _, artifact = tg.fit_size(cfg, rt, weights, make, int(1_000_000 * (1 + over)), 0)
    assert 995_000 <= len(artifact.blob) <= 1_000_000 and len(packings) <= 5


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
    factors = {"mlp_up_bank": last["widen"], "qo_bank": last["widen"], "tok_emb.weight": 1.0}
    assert last["widen"] > 1.05
    for s in tg.read_artifact((done.folder / "final_model.ptz").read_bytes())[2]:
        if s.name in factors:
            live = scales[s.name] > 2e-6  # rows of zeros stay at the floor
            ratio = s.scales[live].astype(float) / scales[s.name][live]
            assert ratio == pytest.approx(factors[s.name], rel=5e-3), s.name


@pytest.mark.parametrize("sizes, kept", [
    ((9300, 9800, 9700, 10_050, 9900, 9400), 9900), ((9300, 9970), 9970), ((10_001, 10_000), 10_000),
    ((9300,) * 3, 9300)])  # it is back at the steps that it began with, and narrower ones there are none
def test_of_all_packings_the_largest_that_fits_is_kept(config, rt, sizes, kept):
    """A packer whose sizes nobody could foresee: the search ends with the first within half a percent of the limit."""
    cfg = config(artifact_limit_bytes=10_000)
    made, packings = iter(sizes), []

    def make(settings):
        packings.append((settings, tg.Artifact(bytes(next(made) - 500), ())))
        return packings[-1][1]
    settings, artifact = tg.fit_size(cfg, rt, 16_000, make, 12_000, 500)
    assert len(artifact.blob) + 500 == kept and any(pair == (settings, artifact) for pair in packings)
    assert len(packings) == 1 + next((i for i, size in enumerate(sizes) if 9950 <= size <= 10_000), len(sizes) - 1)


def test_size_fit_changes_nothing_that_fits(run):
    variables = {"ITERATIONS": 2, **BRIEF}
    free = run(SIZE_FIT=0, **variables)
    blob = (free.folder / "final_model.ptz").read_bytes()
    done = run(SIZE_FIT=1, GPTQ_CALIBRATION_BATCHES=1, ARTIFACT_LIMIT_BYTES=free.summary["total_bytes"], **variables)
    assert done.code == 0 and "size_fit:start" not in done.out
    assert (done.folder / "final_model.ptz").read_bytes() == blob


# ---- fine-tuning

@pytest.fixture
def tuned(config, rt):
    """cfg, the float model, codes and steps before and after fine-tuning, and text of no step."""
    cfg = config(clip_rule="waterfill", waterfill_nats=0.3, gptq_enabled=True, late_qat=False, gptq_calibration_batches=2,
                 tune_steps=12)
    model, data = model_of(cfg), tg.TrainData.open(cfg, rt)
    kept = copy.deepcopy(model.state_dict())
    hessians = tg.calibrate(cfg, rt, model, data, 6, math.inf)
    factors = tg.loss_curvature(cfg, rt, model, data, 6, hessians, math.inf)
    before = tg.round_model(cfg, model, hessians, factors)
    after = tg.fine_tune(cfg, before, rt, model, data, 8, math.inf)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    return cfg, model, before, after, torch.cat([ids for ids, _ in data.batch(40)])


@torch.no_grad()
def with_codes(model, rounded):
    model = copy.deepcopy(model)
    for name, (codes, steps) in rounded.items():
        model.get_parameter(name).copy_(tg.dequantise(codes, steps))
    return model


@torch.no_grad()
def kl(wanted, model, ids):
    """By its definition, token by token."""
    p, q = (m.logits(m.hidden(ids)).double().softmax(-1) for m in (wanted, model))
    return float((p * (p / q).log()).sum(-1).mean())


def test_fine_tuning_brings_other_text_nearer_by_codes_of_the_next_cell(tuned):
    cfg, model, before, after, ids = tuned
    assert kl(model, with_codes(model, after), ids) < 0.97 * kl(model, with_codes(model, before), ids)
    rounded = with_codes(model, after)
    targets = ids.roll(1, dims=1)  # whatever they are
    added = float((rounded.nll(ids, targets).double() - model.nll(ids, targets).double()).mean())
    for hard, cost in ((0.0, kl(model, rounded, ids)), (1.0, added), (0.3, 0.7 * kl(model, rounded, ids) + 0.3 * added)):
        assert float(tg.rounding_cost(rounded, model, ids, targets, hard).detach()) == pytest.approx(cost, rel=1e-3)
    for name, (codes, steps) in after.items():
        assert steps is before[name][1] and codes.dtype == before[name][0].dtype
        moved = (codes.int() - before[name][0].int()).abs()
        assert moved.max() <= 1 and (moved.any() or ".embed." in name), name


@torch.no_grad()
def test_only_codes_near_a_border_move_and_against_their_gradient(tuned, rt, monkeypatch):
    """Adam's first step moves every latent weight by the rate: over the border to the next code where that is less away
    than the rate, and the slope of a finite difference is that way."""
    monkeypatch.setattr(tg, "TUNE_RATE", 0.02)
    cfg, model, before, *_ = tuned
    cfg, data = dataclasses.replace(cfg, tune_steps=1), tg.TrainData.open(cfg, rt)
    with torch.enable_grad():
        after = tg.fine_tune(cfg, before, rt, model, data, 8, math.inf)
    assert after is not before
    rounded, checked = with_codes(model, before), 0
    ids, targets = next(data.batch(8 + tg.TUNE_HELD))

    def cost():
        added = float((rounded.nll(ids, targets).double() - model.nll(ids, targets).double()).mean())
        return (1 - tg.TUNE_HARD) * kl(model, rounded, ids) + tg.TUNE_HARD * added

    for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank", "tok_emb.weight"):
        old, new = before[name][0].int(), after[name][0].int()
        step, weight = before[name][1].float(), rounded.get_parameter(name)
        offset = (model.get_parameter(name) / step - old).clamp(-0.49, 0.49)  # towards the float weight
        toward = offset.sign().int()
        assert ((new == old) | (new == old + toward) & (offset.abs() > 0.4799)).all(), name
        near = (offset.abs() > 0.482).nonzero()
        assert len(near) > 40, name
        for at in map(tuple, near[::len(near) // 40].tolist()):
            value, sides = weight[at].clone(), []
            for side in (0.2, -0.2):
                weight[at] = value + side * step[at]
                sides.append(cost())
            weight[at] = value
            if abs(sides[0] - sides[1]) > 2e-7:
                falls = 1 if sides[0] < sides[1] else -1
                assert (new[at] != old[at]) == (falls == toward[at]), (name, at)
                checked += 1
    assert checked > 30


@pytest.mark.parametrize("left_s, rate, steps", [(0.0, 3e-3, 0), (math.inf, 3.0, 12)])
def test_fine_tuning_that_gains_nothing_is_undone(tuned, tmp_path, capsys, monkeypatch, left_s, rate, steps):
    cfg, model, before, *_ = tuned
    rt = make_runtime(tmp_path, log=tg.RunLog(tmp_path, "test"))
    monkeypatch.setattr(tg, "TUNE_RATE", rate)
    assert tg.fine_tune(cfg, before, rt, model, tg.TrainData.open(cfg, rt), 8, left_s) is before
    out = capsys.readouterr().out
    assert f"fine_tune:steps:{steps} " in out and "warning: fine-tuning gained nothing and is undone" in out


def test_codes_stay_in_their_range(config, rt, monkeypatch):
    """Where steps are so fine that weights are clipped, the outermost codes stay what the packer knows."""
    cfg = config(clip_rule="waterfill", waterfill_nats=1e-9, gptq_enabled=True, late_qat=False, gptq_calibration_batches=1,
                 tune_steps=3)
    monkeypatch.setattr(tg, "TUNE_RATE", 0.2)
    model, data = model_of(cfg), tg.TrainData.open(cfg, rt)
    hessians = tg.calibrate(cfg, rt, model, data, 6, math.inf)
    before = tg.round_model(cfg, model, hessians, tg.loss_curvature(cfg, rt, model, data, 6, hessians, math.inf))
    seen, dequantise = [], tg.dequantise
    monkeypatch.setattr(tg, "dequantise", lambda codes, steps: seen.append(codes.abs().max()) or dequantise(codes, steps))
    tg.fine_tune(cfg, before, rt, model, data, 8, math.inf)
    assert len(seen) == 4 * len(before) and max(seen) == 4095


def test_what_fine_tuning_makes_too_large_is_not_taken(run, monkeypatch):
    monkeypatch.setattr(tg, "fine_tune", lambda cfg, rounded, **_: {n: (8 * codes, s) for n, (codes, s) in rounded.items()})
    settings = {"CLIP_RULE": "waterfill", "GPTQ_ENABLED": 1, "LATE_QAT": 0, "ITERATIONS": 2, "GPTQ_CALIBRATION_BATCHES": 1,
                "CODE_BYTES": 1000, "WATERFILL_NATS": 0.1, **BRIEF}
    plain = run(TUNE_STEPS=0, **settings)
    tight = run(TUNE_STEPS=1, ARTIFACT_LIMIT_BYTES=plain.summary["total_bytes"] + 10, **settings)
    assert tight.code == 0 and "warning: the artifact is not fine-tuned, which would take more than the limit" in tight.out
    assert tight.summary["artifact_bytes"] == plain.summary["artifact_bytes"]
    ample = run(TUNE_STEPS=1, ARTIFACT_LIMIT_BYTES=10 ** 6, **settings)
    assert "not fine-tuned" not in ample.out and ample.summary["artifact_bytes"] > plain.summary["artifact_bytes"] + 10


def test_a_run_that_is_fine_tuned_fits_and_is_scored_again(run):
    """And can be scored by itself, whatever the other settings say."""
    settings = {"CLIP_RULE": "waterfill", "GPTQ_ENABLED": 1, "LATE_QAT": 0, "SIZE_FIT": 1, "ARTIFACT_LIMIT_BYTES": 20_000,
                "CODE_BYTES": 1000, "ITERATIONS": 4, "GPTQ_CALIBRATION_BATCHES": 2, **BRIEF, "COMPRESS": "range"}
    done = run(TUNE_STEPS=20, **settings)
    blob = (done.folder / "final_model.ptz").read_bytes()
    plain = run(TUNE_STEPS=0, **settings)
    assert done.code == plain.code == 0, done.err
    assert "fine_tune:steps:20 nats:" in done.out and "fine_tune:" not in plain.out
    assert done.summary["total_bytes"] <= 20_000 and plain.summary["val_bpb_roundtrip"] != done.summary["val_bpb_roundtrip"]
    assert abs(done.summary["total_bytes"] - plain.summary["total_bytes"]) < 600
    artifact = done.folder / "tuned.ptz"
    artifact.write_bytes(blob)
    again = run(EVAL_ARTIFACT=artifact, **settings | {"CLIP_RULE": "percentile", "GPTQ_ENABLED": 0, "LATE_QAT": 1})
    assert again.code == 0 and "final_waterfill_roundtrip" in again.out, again.err
    assert again.summary["val_bpb_roundtrip"] == done.summary["val_bpb_roundtrip"]
    other = run(EVAL_ARTIFACT="", **settings | {"CLIP_RULE": "percentile", "SIZE_FIT": 0, "ARTIFACT_LIMIT_BYTES": 10 ** 6}, TUNE_STEPS=5)
    assert other.code == 0 and "fine_tune:" not in other.out
