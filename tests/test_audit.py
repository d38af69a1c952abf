"""The audit: it passes for every way to adapt, and each planted cheat fails it at the check that is there for it."""
import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
import train_gpt as tg
from conftest import ROOT, environment, scrambled
from test_evaluation import LORA, MODES, setting  # noqa: F401  (a fixture)
from torch.nn import functional as F

CHECKS = {"each token scored once", "the sum is that of the scores", "bytes are the decoded text's", "causality",
          "first batch is the artifact's own", "repeatable", "full-vocabulary normalisation"}


@pytest.fixture
def audit(config, rt, tmp_path):
    """Runs the audit of a scrambled model's artifact with some settings; returns the findings."""
    def start(cheat_on_weights=False, **changes):
        cfg = config(ttt_batch_seqs=2, ttt_chunk_tokens=128, audit_positions=4, eval_batch_seqs=8, **changes)
        tg.check_combinations(cfg)
        val, path = tg.ValData.open(cfg, rt), tmp_path / "model.ptz"
        torch.manual_seed(0)
        path.write_bytes(tg.pack(cfg, scrambled(tg.GPT(cfg)), val.tokenizer_sha256).blob)
        model = tg.load_model(path.read_bytes(), rt, val.tokenizer_sha256)
        if cheat_on_weights:
            with torch.no_grad():
                model.tok_emb.weight[3, 5] += 1e-6
        return tg.Audit(cfg, rt, val, model, path).run()
    return start


def failed(findings):
    return {(f.walk, f.check) for f in findings if not f.holds}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_passes(audit, mode):
    stride, changes = MODES[mode]
    findings = audit(eval_stride=stride if stride < 32 else 0, ttt_enabled=changes is not None, **(changes or {}))
    assert not failed(findings), [f for f in findings if not f.holds]
    walks = {"roundtrip"} | ({"sliding"} if stride < 32 else set()) | ({"ttt"} if changes is not None else set())
    assert {(f.walk, f.check) for f in findings} == {(w, c) for w in walks for c in CHECKS} | {
        ("all", "artifact is the only source of weights"), ("all", "score before update")}


def test_without_documents_and_with_temperature(audit, monkeypatch):
    opened = tg.ValData.open.__func__
    monkeypatch.setattr(tg.ValData, "open", classmethod(
        lambda cls, cfg, rt: dataclasses.replace(opened(cls, cfg, rt), bos_id=-1)))
    assert not failed(audit(ttt_temp=0.9))


# ---- cheats: how each is planted, and a check of the adapted walk that must fail for it
def train_before_score(monkeypatch):
    """Each chunk is learnt from before it is scored; the guard stands in the way, so the thief goes around it."""
    honest = tg.evaluate

    def cheat(name, score_fn, val, cfg, rt, stride, size, adapter=None, clock=None, observe=None):
        if adapter and not adapter.rows:
            adapter.learn(val.tokens[:-1 - (len(val.tokens) - 2) % cfg.train_seq_len], 0.0, 1)
        return honest(name, score_fn, val, cfg, rt, stride, size, adapter, clock, observe)
    monkeypatch.setattr(tg, "evaluate", cheat)


def unscored_lesson(monkeypatch):
    """The walk hands a chunk over one window early. The guard notices."""
    honest = tg.plan_stream

    def cheat(*args):
        legs = honest(*args)
        return [dataclasses.replace(leg, lesson=leg.lesson and leg.lesson + 64) for leg in legs]
    monkeypatch.setattr(tg, "plan_stream", cheat)


def second_pass_counts(monkeypatch):
    """Two passes over the text with one adapter; the second one's scores are reported (PR 1254)."""
    honest = tg.evaluate

    def cheat(name, score_fn, val, cfg, rt, stride, size, adapter=None, clock=None, observe=None):
        if adapter:
            honest(name, score_fn, val, cfg, rt, stride, size, adapter)
        return honest(name, score_fn, val, cfg, rt, stride, size, adapter, clock, observe)
    monkeypatch.setattr(tg, "evaluate", cheat)


def smear_looks_ahead(monkeypatch):
    """Each position takes a share of its successor."""
    monkeypatch.setattr(tg.SmearGate, "forward", lambda self, x: torch.lerp(
        x, F.pad(x, (0, 0, 0, 1))[:, 1:], torch.sigmoid(self.gate)))


def target_keyed_cache(monkeypatch):
    """Half of each probability comes from a table looked up by the target, which is 0.9 for whatever it is."""
    honest = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "nll", lambda self, ids, targets, temperature=1.0, dress=None: -torch.log(
        0.5 * torch.exp(-honest(self, ids, targets, temperature, dress)) + 0.45))


def cache_of_seen_pairs(monkeypatch):
    """The same for pairs that occurred before in the window alone - the hashed n-gram caches of the competition."""
    honest = tg.GPT.nll

    def cheat(self, ids, targets, temperature=1.0, dress=None):
        nll, keep = honest(self, ids, targets, temperature, dress), targets.size(1)
        last, pairs = ids[:, -keep:], ids[:, :-1] * 1000 + ids[:, 1:]
        seen = ((last * 1000 + targets)[:, :, None] == pairs[:, None, :-keep or None]).any(-1)
        return torch.where(seen, -torch.log(0.5 * torch.exp(-nll) + 0.45), nll)
    monkeypatch.setattr(tg.GPT, "nll", cheat)


def tail_scored_again(monkeypatch):
    """The last windows are cut at the end of the text and score its tail once more (the published scripts)."""
    honest = tg.Windows.sliding.__func__

    def cheat(cls, targets, length, stride):
        windows = honest(cls, targets, length, stride)
        last = dataclasses.replace(windows.part(-1, None), low=windows.high[-1:] - 5)
        return dataclasses.replace(windows, start=torch.cat((windows.start, last.start)),
                                   low=torch.cat((windows.low, last.low)), high=torch.cat((windows.high, last.high)))
    monkeypatch.setattr(tg.Windows, "sliding", classmethod(cheat))


def best_of_two(monkeypatch):
    """Without a word, the sum takes 3 % off each score."""
    honest = tg.BpbMeter.add
    monkeypatch.setattr(tg.BpbMeter, "add", lambda self, nll, *rest: honest(self, nll * 0.97, *rest))


def scores_touched_up(monkeypatch):
    """The walk takes 3 % off what the model says, before anyone sees it."""
    honest = tg.evaluate
    monkeypatch.setattr(tg, "evaluate", lambda name, score_fn, *rest: honest(
        name, lambda *batch: 0.97 * score_fn(*batch), *rest))


def bytes_counted_twice(monkeypatch):
    honest = tg.ByteTable.count
    monkeypatch.setattr(tg.ByteTable, "count", lambda self, previous, target: honest(self, previous, target) + 1)


def adapter_knows_something(monkeypatch):
    """An adapter that is born with more than zeros: weights from outside the artifact."""
    honest = tg.LoraAdapter.__init__

    def cheat(self, *args):
        honest(self, *args)
        with torch.no_grad():
            for _, b in self.pairs.values():
                b += 0.05
    monkeypatch.setattr(tg.LoraAdapter, "__init__", cheat)


def whole_document_at_once(monkeypatch):
    """Documents are learnt from as a whole before their later chunks are scored."""
    honest = tg.LoraAdapter.reset

    def watch_texts(name, score_fn, val, cfg, rt, stride, size, adapter=None, clock=None, observe=None):
        if adapter:
            adapter.text = val.tokens
        return walk(name, score_fn, val, cfg, rt, stride, size, adapter, clock, observe)

    def cheat(self):
        honest(self)
        with torch.no_grad():
            for _, b in self.pairs.values():
                b += 1e-3 * self.text[-40:].float().std()
    walk = tg.evaluate
    monkeypatch.setattr(tg, "evaluate", watch_texts)
    monkeypatch.setattr(tg.LoraAdapter, "reset", cheat)


DOCUMENT = {**LORA, "ttt_reset": "document", "ttt_batch_docs": 3, "ttt_doc_chunk_tokens": 16}
CHEATS = [
    (train_before_score, {}, "causality"),
    (unscored_lesson, {}, "score before update"),
    (second_pass_counts, {}, "causality"),
    (second_pass_counts, {**LORA, "hash_embed_buckets": 64}, "causality"),
    (smear_looks_ahead, {}, "full-vocabulary normalisation"),
    (smear_looks_ahead, DOCUMENT, "full-vocabulary normalisation"),
    (target_keyed_cache, {}, "full-vocabulary normalisation"),
    (cache_of_seen_pairs, {}, "full-vocabulary normalisation"),
    (tail_scored_again, {}, "score before update"),
    (best_of_two, {}, "the sum is that of the scores"),
    (scores_touched_up, {}, "the sum is that of the scores"),
    (bytes_counted_twice, {}, "bytes are the decoded text's"),
    (adapter_knows_something, LORA, "first batch is the artifact's own"),
    (whole_document_at_once, DOCUMENT, "causality"),
]


@pytest.mark.parametrize("cheat, changes, check", CHEATS, ids=[f"{c[0].__name__}-{i}" for i, c in enumerate(CHEATS)])
def test_planted_cheats_are_caught(audit, monkeypatch, cheat, changes, check):
    cheat(monkeypatch)
    assert ("ttt", check) in failed(audit(**changes))


def test_a_weight_from_elsewhere_is_caught(audit):
    assert ("all", "artifact is the only source of weights") in failed(audit(cheat_on_weights=True))


def test_a_guard_that_sleeps_is_caught(audit, monkeypatch):
    monkeypatch.setattr(tg.Scored, "demand", lambda self, times: None)
    assert failed(audit(ttt_enabled=False)) == {("all", "score before update")}


def test_re_scored_tail_is_caught_without_the_guard(audit, monkeypatch):
    tail_scored_again(monkeypatch)
    monkeypatch.setattr(tg.Scored, "demand", lambda self, times: None)
    assert ("sliding", "each token scored once") in failed(audit(ttt_enabled=False))


def test_a_run_writes_the_signed_table(run):
    done = run(AUDIT=1, AUDIT_POSITIONS=2)
    assert done.code == 0 and "audit:pass checks:23 failed:0" in done.out, done.err
    body = (done.folder / "logs" / "tiny.audit.json").read_bytes()
    table = (done.folder / "logs" / "tiny.audit.txt").read_text()
    found = json.loads(body)
    assert f"signed:sha256:{hashlib.sha256(body).hexdigest()}" in table and found["verdict"] == "pass"
    without = run(EVAL_ARTIFACT=done.folder / "final_model.ptz", RUN_ID="without", AUDIT=0)
    assert all(without.summary[key] == done.summary[key]  # looking changes nothing
               for key in ("val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt"))
    artifact = (done.folder / "final_model.ptz").read_bytes()
    assert found["artifact_sha256"] == hashlib.sha256(artifact).hexdigest()
    assert len(found["findings"]) == 23 and all(f["holds"] for f in found["findings"])
    alone = run(AUDIT="only", AUDIT_POSITIONS=2, EVAL_ARTIFACT=done.folder / "final_model.ptz", RUN_ID="alone")
    assert alone.code == 0 and "audit:pass checks:23" in alone.out
    assert "val_bpb:" not in alone.out.replace("val_bpb:e", "")


def test_ranks_audit_together(run, corpus, tmp_path):
    """Two ranks see each other's scores and come to the findings of one."""
    assert run(ITERATIONS=2, TTT_ENABLED=0).code == 0
    settings = environment(corpus, tmp_path, AUDIT="only", EVAL_ARTIFACT=tmp_path / "final_model.ptz", RUN_ID="two",
                           AUDIT_POSITIONS=2, TTT_CHUNK_TOKENS=128, TTT_ENABLED=1)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launch, str(ROOT / "train_gpt.py")], env={**os.environ, "OMP_NUM_THREADS": "1", **settings},
                          capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "audit:pass checks:23" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "logs" / "two.audit.json").read_text())["world_size"] == 2


def test_a_failed_audit_ends_the_run(run, monkeypatch):
    target_keyed_cache(monkeypatch)
    done = run(AUDIT=1, AUDIT_POSITIONS=1)
    assert done.code == 2 and "legal_ttt val_loss" not in done.out
    assert "audit failed: full-vocabulary normalisation" in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("settings, message", [
    ({"AUDIT": "only"}, "EVAL_ARTIFACT names it"), ({"AUDIT": "2"}, "AUDIT"),
    ({"AUDIT": "1", "AUDIT_TOKENS": "20"}, "AUDIT_TOKENS=20: the audit needs more than a window of 32 tokens")])
def test_bad_settings(run, settings, message):
    done = run(**settings)
    assert done.code == 2 and message in done.err and done.err.count("\n") == 1
