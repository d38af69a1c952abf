import dataclasses

import pytest
import torch
import train_gpt as tg
from conftest import make_runtime, scrambled
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F


@given(st.integers(1, 400), st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_score_each_target_once_with_all_the_context_there_is(targets, length, data):
    length = min(length, targets)
    stride = data.draw(st.integers(1, length))
    windows = tg.Windows.plan(targets, length, stride)
    scored = [t for end, fresh in zip(windows.ends.tolist(), windows.fresh.tolist()) for t in range(end - fresh, end)]
    assert scored == list(range(targets))
    assert windows.ends.min() >= length and windows.ends.max() == targets
    assert (windows.fresh[1:] <= stride).all()


class Recorder:
    """Stands where the meter stands and remembers every counted score, in order."""

    def __init__(self, byte_table):
        self.meter, self.nll, self.targets = tg_meter(byte_table), [], []
        self.sums = self.meter.sums
        Recorder.last = self

    def add(self, nll, previous, target, counted):
        self.nll += nll[counted].tolist()
        self.targets += target[counted].tolist()
        self.meter.add(nll, previous, target, counted)

    def reduce(self, rt):
        return self.meter.reduce(rt)


tg_meter = tg.BpbMeter


@pytest.fixture
def setting(config, rt, monkeypatch):
    """(settings, validation data, a fresh copy of one scrambled model) and a recorder of scores."""
    monkeypatch.setattr(tg, "BpbMeter", Recorder)
    cfg = config()
    val = tg.ValData.open(cfg, rt)

    def model():
        torch.manual_seed(0)
        return scrambled(tg.GPT(cfg)).eval()
    return cfg, val, model


MODES = [("plain", 32, False), ("sliding", 8, False), ("sliding, odd stride", 7, False), ("ttt", 8, True)]


def score(cfg, val, model, stride, adapts, rt):
    adapter = tg.SgdAdapter(model, cfg, rt) if adapts else None
    return tg.evaluate("test", model.nll, val, cfg, rt, stride, cfg.eval_batch_seqs, adapter)


@pytest.mark.parametrize("name, stride, adapts", MODES)
def test_every_token_once_and_the_bytes_of_the_text(setting, rt, corpus, name, stride, adapts):
    cfg, val, model = setting
    result = score(cfg, val, model(), stride, adapts, rt)
    assert Recorder.last.targets == val.tokens[1:].tolist()
    assert result.tokens == len(val.tokens) - 1
    assert result.bytes == int(val.byte_table.count(val.tokens[:-1], val.tokens[1:]).sum())
    nll = torch.tensor(Recorder.last.nll, dtype=torch.double)
    assert result.loss == pytest.approx(nll.mean().item()) and result.bpb == pytest.approx(nll.sum().item() / 0.6931471805599453 / result.bytes)


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_scores_are_those_of_one_window_at_a_time(setting, rt, stride):
    cfg, val, model = setting
    model, tokens = model(), val.tokens[:120].long()
    score(cfg, dataclasses.replace(val, tokens=tokens), model, stride, False, rt)
    wanted = []
    with torch.no_grad():
        while len(wanted) < len(tokens) - 1:  # the next `stride` targets, each window as early as it can be
            end = min(32 if not wanted else len(wanted) + stride, len(tokens) - 1)
            logits = model.logits(model.hidden(tokens[None, end - 32:end]))[0]
            nll = F.cross_entropy(logits, tokens[end - 31:end + 1], reduction="none")
            wanted += nll[len(wanted) - end:].tolist()
    assert Recorder.last.nll == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("name, stride, adapts", MODES)
@pytest.mark.parametrize("t", [1, 300, 511, 512, 513, 1024, 1600])
def test_no_score_depends_on_its_token_s_future(setting, rt, name, stride, adapts, t):
    """Score before update: other tokens from position t on leave every score before t bit-identical."""
    cfg, val, model = setting
    changed = val.tokens.clone()
    changed[t:] = (changed[t:] + 7) % cfg.vocab_size
    scores = []
    for tokens in (val.tokens, changed):
        score(cfg, dataclasses.replace(val, tokens=tokens), model(), stride, adapts, rt)
        scores.append(Recorder.last.nll)
    before = t - 1  # target i is token i + 1
    assert scores[0][:before] == scores[1][:before]
    assert scores[0][before:] != scores[1][before:]


def test_an_adapter_sees_only_scored_tokens_all_but_the_last_chunk(setting, rt):
    cfg, val, model = setting
    handed = []

    class Spy:
        def learn(self, tokens, progress):
            seen = len(handed) * cfg.ttt_chunk_tokens + len(tokens) - 1
            assert len(Recorder.last.nll) >= seen and torch.equal(tokens[1:], val.tokens[seen - len(tokens) + 2:seen + 1])
            handed.append(progress)
    for stride in (8, 7, 32):
        handed.clear()
        tg.evaluate("test", model().nll, val, cfg, rt, stride, 4, Spy())
        chunks = -(-(len(val.tokens) - 1) // cfg.ttt_chunk_tokens)
        assert handed == [i / (chunks - 1) for i in range(chunks - 1)]


def test_ttt_learns(setting, rt):
    """On text that repeats itself the adapted score must beat the plain one."""
    cfg, val, model = setting
    again = dataclasses.replace(val, tokens=val.tokens[:400].repeat(5))
    cfg = dataclasses.replace(cfg, ttt_lr=0.05, ttt_epochs=2)
    plain, adapted = (score(cfg, again, model(), 8, adapts, rt) for adapts in (False, True))
    assert adapted.bpb < plain.bpb - 0.05


def reference_ttt(cfg, model, val):
    """Chunk by chunk with torch's own SGD, written out plainly; returns the adapted parameters."""
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, momentum=cfg.ttt_momentum)
    tokens, chunk, length = val.tokens.long(), cfg.ttt_chunk_tokens, cfg.train_seq_len
    chunks = -(-(len(tokens) - 1) // chunk)
    for i in range(chunks - 1):
        rows = [(tokens[j:j + length], tokens[j + 1:j + length + 1]) for j in range(i * chunk, (i + 1) * chunk, length)]
        for group in optimiser.param_groups:
            group["lr"] = cfg.ttt_lr * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * i / (chunks - 1))).item())
        for _ in range(cfg.ttt_epochs):
            for start in range(0, len(rows), cfg.ttt_batch_seqs):
                batch = rows[start:start + cfg.ttt_batch_seqs]
                optimiser.zero_grad()
                logits = model.logits(model.hidden(torch.stack([x for x, _ in batch])))
                F.cross_entropy(logits.flatten(0, 1), torch.cat([y for _, y in batch])).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.ttt_grad_clip)
                optimiser.step()
    return dict(model.named_parameters())


def test_sgd_adaptation_is_the_plain_loop(setting, rt):
    cfg, val, model = setting
    cfg = dataclasses.replace(cfg, ttt_epochs=2)
    ours = model()
    score(cfg, val, ours, 8, True, rt)
    wanted = reference_ttt(cfg, model(), val)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_frozen_blocks_stay(setting, rt, optimiser):
    cfg, val, model = setting
    cfg = dataclasses.replace(cfg, ttt_freeze_blocks=2, ttt_optimizer=optimiser, ttt_lr=0.01)
    start, moved = model(), model()
    score(cfg, val, moved, 8, True, rt)
    before, after = dict(start.named_parameters()), dict(moved.named_parameters())
    for name in before:
        if name.endswith("_bank"):
            for i, (a, b) in enumerate(zip(before[name], after[name])):
                assert torch.equal(a, b) == (i % cfg.num_layers < 2), (name, i)
        elif name.startswith("blocks."):
            assert torch.equal(before[name], after[name]) == (int(name.split(".")[1]) < 2), name


def test_temperature_divides_the_logits_of_the_adapted_score_alone(setting, rt):
    cfg, val, model = setting
    hot = dataclasses.replace(cfg, ttt_temp=2.0, ttt_lr=0.0)
    assert score(hot, val, model(), 8, False, rt).bpb == score(cfg, val, model(), 8, False, rt).bpb
    score(hot, val, model(), 32, True, rt)
    m, ids = model(), val.tokens[:33].long()[None]
    with torch.no_grad():
        logits = m.logits(m.hidden(ids[:, :-1]))[0] / 2
    assert Recorder.last.nll[:32] == pytest.approx(F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), abs=2e-5)


def test_padding_for_compiled_graphs_counts_nothing(setting, rt, tmp_path):
    cfg, val, model = setting
    eager = score(cfg, val, model(), 8, False, rt)
    padded = dataclasses.replace(rt, compiles=True)  # score_fn stays eager: only the padding differs
    assert score(cfg, val, model(), 8, False, padded).bpb == pytest.approx(eager.bpb, rel=1e-6)


def test_ranks_share_the_windows(setting, tmp_path):
    cfg, val, model = setting
    scored = []
    for rank in range(3):
        rt = make_runtime(tmp_path, rank=rank, world_size=3)
        meter_targets = []
        windows = tg.Windows.plan(len(val.tokens) - 1, 32, 8)
        mine = rt.share_of(len(windows.ends))
        for chosen, keep in windows.batches(mine, 16):
            meter = Recorder(val.byte_table)
            with torch.no_grad():
                tg.score_batch(model().nll, val, windows, chosen, keep, meter, len(chosen), 1.0)
            meter_targets += meter.targets
        scored += meter_targets
    assert scored == val.tokens[1:].tolist()
