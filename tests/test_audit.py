"""The audit: it passes for every way to adapt, and each planted cheat fails it at the check that is there for it."""
import dataclasses
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import prepare
import pytest
import sentencepiece
import torch
import train_gpt as tg
from conftest import ROOT, environment, make_runtime, scrambled
from test_evaluation import LORA, MODES, setting  # noqa: F401  (a fixture)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

sys.path.insert(0, str(ROOT / "tools"))
import audit as tool  # noqa: E402
import record  # noqa: E402

OF_ALL = {"artifact is the only source of weights", "nothing else was read", "the text is the whole text",
          "score before update"}
OF_AN_EVALUATION = {"each token scored once", "the sum is that of the scores", "bytes are the decoded text's",
             "bits per byte are nats / ln 2 / bytes", "scores are -log softmax of the logits", "causality",
             "repeatable", "full-vocabulary normalisation"}
OWN = {"roundtrip": "all scores are the artifact's own", "sliding": "all scores are the artifact's own",
       "ttt": "first batch is the artifact's own"}
COUNT = len(OF_ALL) + 3 * (len(OF_AN_EVALUATION) + 1)


@pytest.fixture
def audit(config, tmp_path):
    """Runs the audit of a scrambled model's artifact with some settings; returns the findings."""
    def start(positions=2, dtype=torch.float32, compiles=False, **changes):
        cfg = config(**{"num_layers": 2, "ve_layers": "1", "ttt_batch_seqs": 2, "ttt_chunk_tokens": 128,
                        "eval_batch_seqs": 32, **changes})
        tg.check_combinations(cfg, tg.combination_rules)
        rt, path = make_runtime(tmp_path, dtype=dtype, compiles=compiles), tmp_path / "model.ptz"
        val = tg.ValData.open(cfg, rt)
        torch.manual_seed(0)
        path.write_bytes(tg.pack(cfg, scrambled(tg.GPT(cfg)), val.tokenizer_sha256).blob)
        with tool.Opened() as opened:
            start.audit = tool.Audit(tg, cfg, rt, str(path), opened, 0, positions)
            return start.audit.run()
    return start


def failed(findings):
    return {(f.evaluation, f.check) for f in findings if not f.holds}


@pytest.mark.parametrize("mode", [*MODES, "warm", "warm, one chunk", "ladder", "phases"])
def test_every_mode_passes(audit, mode):
    stride, changes = {**MODES, "warm": (8, WARM), "warm, one chunk": (8, {**WARM, "ttt_chunk_ladder": ""}),
                       "ladder": (8, {**WARM, "ttt_warm_start_a": False}), "phases": (8, PHASES)}[mode]
    findings = audit(eval_stride=stride if stride < 32 else 0, ttt_enabled=changes is not None, **(changes or {}))
    assert not failed(findings), [f for f in findings if not f.holds]
    evaluations = {"roundtrip"} | ({"sliding"} if stride < 32 else set()) | ({"ttt"} if changes is not None else set())
    assert {(f.evaluation, f.check) for f in findings} == {
        (e, c) for e in evaluations for c in OF_AN_EVALUATION | {OWN[e]}} | {("all", c) for c in OF_ALL}


# ---- cheats: how each is planted, and a check of an evaluation that must fail for it
def around(monkeypatch, change):
    """`change(evaluate, score_fn, val, cfg, adapter)` in place of each evaluation pass, which `evaluate(...)` makes."""
    honest = tg.evaluate

    def cheat(name, score_fn, val, cfg, rt, plan, adapter=None, *rest, **options):
        def evaluate(score_fn=score_fn, val=val):
            return honest(name, score_fn, val, cfg, rt, plan, adapter, *rest, **options)
        return change(evaluate, score_fn, val, cfg, adapter)
    monkeypatch.setattr(tg, "evaluate", cheat)


def train_before_score(monkeypatch):
    """Each chunk is learnt from before it is scored; the guard stands in the way, so the thief goes around it."""
    def cheat(evaluate, score_fn, val, cfg, adapter):
        if adapter and not adapter.rows:
            adapter.learn(val.tokens[:-1 - (len(val.tokens) - 2) % cfg.train_seq_len], 0.0, 1)
        return evaluate()
    around(monkeypatch, cheat)


def trains_past_the_chunk(monkeypatch):
    """The first training tokens include a few of the next chunk, past the guard: seen only next to that border."""
    honest = tg.Scored.training_tokens
    monkeypatch.setattr(tg.Scored, "training_tokens", lambda self, first, count: (
        honest(self, first, count), self.tokens[first + 2 * (first == 0):][:count + 1])[1])


def trains_on_unscored_tokens(monkeypatch):
    """Training gets a chunk one window early. The guard notices."""
    honest = tg.plan_stream

    def cheat(*args):
        legs = honest(*args)
        return [dataclasses.replace(leg, train_tokens=leg.train_tokens and leg.train_tokens + 64) for leg in legs]
    monkeypatch.setattr(tg, "plan_stream", cheat)


def second_pass_counts(monkeypatch):
    """Two passes over the text with one adapter; the second one's scores are reported (PR 1254)."""
    around(monkeypatch, lambda evaluate, score_fn, val, cfg, adapter: (adapter and evaluate(), evaluate())[1])


def smear_looks_ahead(monkeypatch):
    """Each position takes a share of its successor."""
    monkeypatch.setattr(tg.SmearGate, "forward", lambda self, x, *rest: torch.lerp(
        x, F.pad(x, (0, 0, 0, 1))[:, 1:], torch.sigmoid(self.gate)))


def smear_looks_two_ahead(monkeypatch):
    """At the token after the one to predict: the nearest that no score may know."""
    monkeypatch.setattr(tg.SmearGate, "forward", lambda self, x, *rest: torch.lerp(
        x, F.pad(x, (0, 0, 0, 2))[:, 2:], torch.sigmoid(self.gate)))


def target_keyed_cache(monkeypatch):
    """Half of each probability comes from a table looked up by the target, which is 0.9 for whatever it is."""
    honest = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "nll", lambda self, ids, targets, temperature=1.0, hook=None: -torch.log(
        0.5 * torch.exp(-honest(self, ids, targets, temperature, hook)) + 0.45))


def cache_of_seen_pairs(monkeypatch):
    """The same for pairs that occurred before in the window alone - the hashed n-gram caches of the competition."""
    honest = tg.GPT.nll

    def cheat(self, ids, targets, temperature=1.0, hook=None):
        nll, keep = honest(self, ids, targets, temperature, hook), targets.size(1)
        last, pairs = ids[:, -keep:], ids[:, :-1] * 1000 + ids[:, 1:]
        seen = ((last * 1000 + targets)[:, :, None] == pairs[:, None, :-keep or None]).any(-1)
        return torch.where(seen, -torch.log(0.5 * torch.exp(-nll) + 0.45), nll)
    monkeypatch.setattr(tg.GPT, "nll", cheat)


def a_little_too_likely(monkeypatch):
    """All probabilities are 1.009 times too high: what half precision could be taken to blur."""
    honest = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "nll", lambda self, *rest: honest(self, *rest) - 0.009)


def tail_scored_again(monkeypatch):
    """The last windows are cut at the end of the text and score its tail once more (the published scripts)."""
    honest = tg.Windows.sliding.__func__

    def cheat(cls, targets, length, stride):
        windows = honest(cls, targets, length, stride)
        start, _, high, end = windows.bounds[:, -1:]
        again = torch.stack((start, high - 5, high, end))
        return dataclasses.replace(windows, bounds=torch.cat((windows.bounds, again), dim=1))
    monkeypatch.setattr(tg.Windows, "sliding", classmethod(cheat))


def tail_without_guard(monkeypatch):
    tail_scored_again(monkeypatch)
    monkeypatch.setattr(tg.Scored, "require_scored_once", lambda self, times: None)


def hard_documents_left_out(monkeypatch):
    """Documents that are hard to predict get no score, here those of odd length; nobody demands one."""
    honest = tg.Windows.read

    def cheat(self, tokens):
        ids, wanted, at, counted = honest(self, tokens)
        return ids, wanted, at, counted & (at // 300 % 2 == 0)
    monkeypatch.setattr(tg.Windows, "read", cheat)
    monkeypatch.setattr(tg.Scored, "require_scored_once", lambda self, times: None)


def sum_of_less(monkeypatch):
    """Without a word, the sum takes 3 % off each score."""
    honest = tg.BpbMeter.add
    monkeypatch.setattr(tg.BpbMeter, "add", lambda self, nll, *rest: honest(self, nll * 0.97, *rest))


def scores_touched_up(monkeypatch):
    """The pass takes 3 % off what the model says, before it is committed."""
    around(monkeypatch, lambda evaluate, score_fn, *_: evaluate(lambda *batch: 0.97 * score_fn(*batch)))


def lower_of_two_temperatures(monkeypatch):
    """Each token has the better one of two scores."""
    around(monkeypatch, lambda evaluate, score_fn, *_: evaluate(lambda ids, wanted, temperature, hook: torch.minimum(
        score_fn(ids, wanted, temperature, hook), score_fn(ids, wanted, 1.2, hook))))


def lower_of_two_in_the_model(monkeypatch):
    honest = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "nll", lambda self, ids, targets, temperature=1.0, hook=None: torch.minimum(
        honest(self, ids, targets, temperature, hook), honest(self, ids, targets, 1.2, hook)))


def better_batch_of_two(monkeypatch):
    """Each batch is scored at two temperatures, the better one counts: these are scores that one call made."""
    def change(evaluate, score_fn, *_):
        def scores(ids, wanted, temperature, hook):
            return min((score_fn(ids, wanted, t, hook) for t in (1.2, temperature)), key=lambda nll: nll.sum().item())
        return evaluate(scores)
    around(monkeypatch, change)


def another_temperature(monkeypatch):
    """One that was not announced."""
    around(monkeypatch, lambda evaluate, score_fn, *_: evaluate(
        lambda ids, wanted, temperature, hook: score_fn(ids, wanted, 1.1 * temperature, hook)))


def longer_context_than_the_text(monkeypatch):
    """The model reads something else than the text before the target: here, its own guess at what stands there."""
    around(monkeypatch, lambda evaluate, score_fn, *_: evaluate(
        lambda ids, wanted, *rest: score_fn(F.pad(ids[:, 1:-1], (1, 1), value=5), wanted, *rest)))


def bytes_counted_twice(monkeypatch):
    honest = tg.token_bytes
    monkeypatch.setattr(tg, "token_bytes", lambda *given: honest(*given) + 1)


def bpb_scaled(monkeypatch):
    """The sums are right, what is made of them is not."""
    honest = tg.BpbMeter.reduce

    def cheat(self, rt):
        loss, bpb, *counts = honest(self, rt)
        return loss, 0.99 * bpb, *counts
    monkeypatch.setattr(tg.BpbMeter, "reduce", cheat)


def loss_scaled(monkeypatch):
    honest = tg.BpbMeter.reduce
    monkeypatch.setattr(tg.BpbMeter, "reduce", lambda self, rt: (0.99 * honest(self, rt)[0], *honest(self, rt)[1:]))


def adapter_knows_something(monkeypatch):
    """An adapter that is born with more than zeros: weights from outside the artifact."""
    honest = tg.LoraAdapter.__init__

    def cheat(self, *args):
        honest(self, *args)
        with torch.no_grad():
            for _, b in self.pairs.values():
                b += 0.05
    monkeypatch.setattr(tg.LoraAdapter, "__init__", cheat)


def adapter_remembers(monkeypatch):
    """The next pass begins with what one has learnt."""
    kept = []

    def change(evaluate, score_fn, val, cfg, adapter):
        if not adapter:
            return evaluate()
        for tensor, before in zip(adapter.trained, kept):
            tensor.data.copy_(before)
        result = evaluate()
        kept[:] = [tensor.detach().clone() for tensor in adapter.trained]
        return result
    around(monkeypatch, change)


def sliding_after_adaptation(monkeypatch):
    """The sliding score is made with weights that have learnt from the whole text."""
    honest = tg.final_evaluations
    monkeypatch.setattr(tg, "final_evaluations", lambda cfg: dict(
        sorted(honest(cfg).items(), key=lambda item: ["roundtrip", "ttt", "sliding"].index(item[0]))))


def whole_document_at_once(monkeypatch):
    """Documents are learnt from as a whole before their later chunks are scored."""
    honest = tg.LoraAdapter.reset

    def watch_texts(evaluate, score_fn, val, cfg, adapter):
        if adapter:
            adapter.text = val.tokens
        return evaluate()

    def cheat(self, *args):
        honest(self, *args)
        with torch.no_grad():
            for _, b in self.pairs.values():
                b += 1e-3 * self.text[-40:].float().std()
    around(monkeypatch, watch_texts)
    monkeypatch.setattr(tg.LoraAdapter, "reset", cheat)


def warm_factors_have_seen_what_comes(monkeypatch):
    """First factors that go on have learnt from the last documents, too, which are scored later (or were, in a pass
    that does not count)."""
    honest = tg.LoraAdapter.reset

    def watch_texts(evaluate, score_fn, val, cfg, adapter):
        if adapter:
            adapter.text = val.tokens
        return evaluate()

    def cheat(self, keep_a=False):
        honest(self, keep_a)
        with torch.no_grad():
            for a, _ in self.pairs.values():
                a += 1e-3 * keep_a * self.text.float().std()
    around(monkeypatch, watch_texts)
    monkeypatch.setattr(tg.LoraAdapter, "reset", cheat)


def a_phase_knows_what_comes(monkeypatch):
    """The weights train on the whole text, past the guard."""
    honest = tg.Scored.training_documents
    monkeypatch.setattr(tg.Scored, "training_documents", lambda self, documents: (
        honest(self, documents), (self.tokens[:-1].long(), self.tokens[1:].long()))[1])


def a_phase_comes_early(monkeypatch):
    """The weights train on documents that are scored next. The guard notices."""
    honest = tg.plan_documents

    def cheat(*args):
        plan = honest(*args)
        return sorted(plan, key=lambda chunk: chunk.finished is None)
    monkeypatch.setattr(tg, "plan_documents", cheat)


def ignores_the_text(monkeypatch):
    """Whatever the text, the scores are those of the first one."""
    texts = []
    around(monkeypatch, lambda evaluate, score_fn, val, *_: (texts.append(val), evaluate(val=texts[0]))[1])


def random_scores(monkeypatch):
    """Every pass comes out differently, so that no other difference can be told from it."""
    honest = tg.GPT.nll
    monkeypatch.setattr(tg.GPT, "logits", lambda self, *args, honest=tg.GPT.logits, **options: honest(
        self, *args, **options) * (1 + 0.3 * random.random()))


def half_the_script_scores(monkeypatch):
    """Scores that the scoring function has not made at all."""
    monkeypatch.setattr(tg, "scorer", lambda model, rt, adapter=None: model.nll)


DOCUMENT = {**LORA, "ttt_reset": "document", "ttt_batch_docs": 8, "ttt_doc_chunk_tokens": 16}
WARM = {**DOCUMENT, "ttt_lora_parallel": True, "ttt_warm_start_a": True, "ttt_beta1": 0.0, "ttt_weight_decay": 0.5,
        "ttt_epochs": 1, "ttt_lora_alpha": 9.0, "ttt_chunk_ladder": "20:4,60:8"}
PHASES = {**WARM, "phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 20, "global_ttt_lr": 0.1}
CHEATS = [
    (train_before_score, {}, "causality"),
    (trains_past_the_chunk, {}, "causality"),
    (second_pass_counts, {}, "causality"),
    (second_pass_counts, {}, "each token scored once"),
    (second_pass_counts, {**LORA, "hash_embed_buckets": 64}, "causality"),
    (smear_looks_ahead, {}, "full-vocabulary normalisation"),
    (smear_looks_ahead, DOCUMENT, "full-vocabulary normalisation"),
    (smear_looks_two_ahead, {}, "causality"),
    (target_keyed_cache, {}, "full-vocabulary normalisation"),
    (cache_of_seen_pairs, {}, "full-vocabulary normalisation"),
    (a_little_too_likely, {"dtype": torch.bfloat16}, "full-vocabulary normalisation"),
    (a_little_too_likely, {"dtype": torch.bfloat16, **DOCUMENT}, "full-vocabulary normalisation"),
    (a_little_too_likely, {"dtype": torch.bfloat16}, "scores are -log softmax of the logits"),
    (tail_without_guard, {}, "each token scored once"),
    (hard_documents_left_out, {}, "each token scored once"),
    (sum_of_less, {}, "the sum is that of the scores"),
    (scores_touched_up, {}, "the sum is that of the scores"),
    (lower_of_two_temperatures, {}, "the sum is that of the scores"),
    (lower_of_two_temperatures, {}, "each token scored once"),
    (lower_of_two_in_the_model, {}, "scores are -log softmax of the logits"),
    (better_batch_of_two, {}, "each token scored once"),
    (another_temperature, {"ttt_temp": 0.9}, "scores are -log softmax of the logits"),
    (longer_context_than_the_text, {}, "each token scored once"),
    (half_the_script_scores, {}, "the sum is that of the scores"),
    (bytes_counted_twice, {}, "bytes are the decoded text's"),
    (bpb_scaled, {}, "bits per byte are nats / ln 2 / bytes"),
    (loss_scaled, {}, "the sum is that of the scores"),
    (adapter_knows_something, LORA, "first batch is the artifact's own"),
    (adapter_remembers, {}, "repeatable"),
    (random_scores, {}, "repeatable"),
    (whole_document_at_once, DOCUMENT, "causality"),
    (whole_document_at_once, WARM, "causality"),
    (warm_factors_have_seen_what_comes, WARM, "causality"),
    (a_phase_knows_what_comes, {**PHASES, "positions": 4}, "causality"),
    (whole_document_at_once, PHASES, "causality"),
    (smear_looks_ahead, WARM, "full-vocabulary normalisation"),
    (second_pass_counts, WARM, "each token scored once"),
    (ignores_the_text, {}, "causality"),
]


@pytest.mark.parametrize("cheat, changes, check", CHEATS, ids=[f"{c[0].__name__}: {c[2]}" for c in CHEATS])
def test_planted_cheats_are_caught(audit, monkeypatch, cheat, changes, check):
    cheat(monkeypatch)
    found = audit(**changes)
    assert ("ttt", check) in failed(found), found


@pytest.mark.parametrize("cheat, changes", [(trains_on_unscored_tokens, {}), (tail_scored_again, {}),
                                            (a_phase_comes_early, PHASES)])
def test_what_the_guard_stops(audit, monkeypatch, cheat, changes):
    cheat(monkeypatch)
    assert failed(audit(**changes)) == {("all", "score before update")}


def test_a_guard_that_sleeps_is_caught(audit, monkeypatch):
    monkeypatch.setattr(tg.Scored, "require_scored_once", lambda self, times: None)
    assert failed(audit(ttt_enabled=False)) == {("all", "score before update")}


def test_sliding_scores_of_adapted_weights_are_caught(audit, monkeypatch):
    sliding_after_adaptation(monkeypatch)
    assert ("sliding", "all scores are the artifact's own") in failed(audit())


def test_weights_that_drift_are_caught(audit, monkeypatch):
    """The first batch is scored with the artifact's weights, later ones are not, though nothing adapts."""
    honest = tg.GPT.nll

    def cheat(self, *rest):
        nll = honest(self, *rest)
        self.smear.gate.data += 0.1
        return nll
    monkeypatch.setattr(tg.GPT, "nll", cheat)
    assert ("roundtrip", "all scores are the artifact's own") in failed(audit(ttt_enabled=False, eval_batch_seqs=4))


def test_a_weight_from_elsewhere_is_caught(audit, monkeypatch):
    honest, loads = tg.load_model, []

    def cheat(*args):
        model = honest(*args)
        with torch.no_grad():
            model.tok_emb.weight[3, 5] += 1e-6 * (not loads)
        loads.append(model)
        return model
    monkeypatch.setattr(tg, "load_model", cheat)
    assert ("all", "artifact is the only source of weights") in failed(audit(ttt_enabled=False))


def test_weights_from_a_second_file_are_caught(audit, monkeypatch, tmp_path):
    """However often the model is read, they are there again; but the file is opened."""
    torch.save(torch.ones(32), tmp_path / "more.pt")
    honest = tg.load_model

    def cheat(*args):
        model = honest(*args)
        with torch.no_grad():
            model.tok_emb.weight[3] += torch.load(tmp_path / "more.pt")
        return model
    monkeypatch.setattr(tg, "load_model", cheat)
    found = audit(ttt_enabled=False)
    assert failed(found) == {("all", "nothing else was read")}
    assert str(tmp_path / "more.pt") in str(found)


def test_a_call_for_help_is_caught(audit, monkeypatch):
    def ask(evaluate, *_):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            s.connect(("192.0.2.7", 9))  # sends nothing
        return evaluate()
    around(monkeypatch, ask)
    found = audit(ttt_enabled=False)
    assert failed(found) == {("all", "nothing else was read")} and "192.0.2.7" in str(found)


def test_files_made_here_and_the_system_s_are_fine_others_are_not(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    for name in ("known", "before", "cache/kernel.so", "later"):
        (tmp_path / name).write_text("1")
    with tool.Opened() as opened:
        for name in ("known", "before", "cache/kernel.so"):
            (tmp_path / name).read_bytes()
        (tmp_path / "made").write_text("2")
        (tmp_path / "made").read_text()
        with open(tmp_path / "later", "a+") as file:
            file.read()
        open(json.__file__).close()
        os.listdir(tmp_path)
    (tmp_path / "later").read_text()
    assert opened.foreign([tmp_path / "known"]) == [str(tmp_path / "before"), str(tmp_path / "later")]


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no shared memory")
def test_memory_that_looks_like_a_device_is_a_file():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file, tool.Opened() as opened:
        open(file.name).close()
        open("/dev/null").close()
    assert opened.foreign([]) == [file.name]


def test_hard_documents_dropped_from_the_text_show(audit, monkeypatch, corpus):
    """From the script's reading, or from the data: then the signed hash is another."""
    honest = tg.ValData.open.__func__

    def cheat(cls, cfg, rt):
        val = honest(cls, cfg, rt)
        return val.take(slice(-200))
    monkeypatch.setattr(tg.ValData, "open", classmethod(cheat))
    assert failed(audit(ttt_enabled=False)) == {("all", "the text is the whole text")}
    whole = hashlib.sha256(corpus.val.astype("<u2").tobytes()).hexdigest()
    assert len(audit.audit.whole) == 1700 and hashlib.sha256(audit.audit.whole.tobytes()).hexdigest() == whole


# ---- honest runs that are not as simple

def test_without_documents_and_with_temperature(audit, monkeypatch):
    opened = tg.ValData.open.__func__
    monkeypatch.setattr(tg.ValData, "open", classmethod(
        lambda cls, cfg, rt: dataclasses.replace(opened(cls, cfg, rt), bos_id=-1)))
    assert not failed(audit(ttt_temp=0.9))


def noisy_gradients(monkeypatch, seed=0):
    """As a GPU's atomic additions: each time a little different."""
    honest, generator = tg.Adapter.step, torch.Generator().manual_seed(seed)

    def step(self):
        for grad in (t.grad for t in self.trained if t.grad is not None):
            grad *= 1 + 1e-7 * torch.randn(grad.shape, generator=generator)
        honest(self)
    monkeypatch.setattr(tg.Adapter, "step", step)


STRONG = {"ttt_lr": 0.3, "ttt_epochs": 3}


@pytest.mark.parametrize("changes", [STRONG, {"ttt_lr": 0.01}, DOCUMENT], ids=["strong", "weak", "document"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_honest_noise_passes(audit, monkeypatch, changes, dtype):
    """Seed 3: in half precision, noise moves weights of documents side by side, which do not outlast their documents,
    in the three equal passes, but flips the rounding of a score in none of them."""
    noisy_gradients(monkeypatch, seed=3)
    found = audit(dtype=dtype, positions=3, **changes)
    assert not failed(found), found
    assert [f.evaluation for f in found if "weights differ too" in f.evidence] == ["ttt"]


@pytest.mark.parametrize("left, apart, holds", [(0, 0.05, False), (1, 0.05, True), (1, 0.2, False)])
def test_what_noise_excuses(left, apart, holds):
    """A flipped rounding in half precision, where equal passes left unequal weights; nothing where they did not."""
    targets, found = torch.arange(40.0, dtype=torch.float64), []
    equal = [tool.EvalPass(targets, targets, targets, weight_sums=[left * i]) for i in range(3)]
    other = targets.clone()
    other[5] += apart
    other[20:] += 1
    half = SimpleNamespace(rt=SimpleNamespace(dtype=torch.bfloat16), known=False,
                           find=lambda *row: found.append(tool.Finding(*row)))
    tool.Audit.noise_and_causality(half, "ttt", equal, [21], [targets < 20], [other])
    assert [f.check for f in found] == ["repeatable", "causality"]
    assert found[0].holds and bool(found[1].holds) == holds


def test_noise_hides_no_cheat(audit, monkeypatch):
    noisy_gradients(monkeypatch)
    train_before_score(monkeypatch)
    assert ("ttt", "causality") in failed(audit(dtype=torch.bfloat16, **STRONG))


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """A tokenizer that knows few words and takes the rest for bytes."""
    path = tmp_path_factory.mktemp("bytes") / "tokenizer.model"
    prepare.train_tokenizer(["the cat sat on the mat and the dog ran to the cat " * 20] * 20, path, 290)
    return path, sentencepiece.SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("seed", range(24))
def test_the_piece_is_cut_and_divided_between_characters(config, rt, tmp_path, byte_tokenizer, seed):
    """Of mixed text without documents, wherever it ends: the bytes of the piece stay countable."""
    path, tokenizer = byte_tokenizer
    dice, folder = random.Random(seed), tmp_path / "mixed"
    words = ["the cat", "猫が座った", "собака", "😀🎉", "naïve", "of the mat", "ไทย"]
    ids = tokenizer.encode(" ".join(dice.choice(words) for _ in range(120)))[:200 + seed]
    folder.mkdir()
    prepare.write_shard(folder / "fineweb_val_000000.bin", np.array(ids, dtype=np.uint16))
    cfg = config(data_path=str(folder), tokenizer_path=str(path), vocab_size=tokenizer.vocab_size(), ttt_enabled=False)
    model = tmp_path / "model.ptz"
    val = tg.ValData.open(cfg, rt)
    model.write_bytes(tg.pack(cfg, tg.GPT(cfg), val.tokenizer_sha256).blob)
    audit = tool.Audit(tg, cfg, rt, str(model), tool.Opened(), 100 + seed)
    tokens = audit.tokens.long()
    assert (tokens == tokenizer.bos_id()).sum() == 1 and 98 + seed <= len(tokens) <= 102 + seed
    assert audit.decoded_bytes() == int(audit.val.sizes[1:].sum()) == int(val.sizes[1:audit.stop].sum())


def test_bytes_told_by_the_data_set_count(config, rt, tmp_path, corpus):
    """Their sum over the piece, whatever the tokenizer decodes; a planted document adds none."""
    folder = tmp_path / "told"
    folder.mkdir()
    tokens = corpus.val[corpus.val != corpus.tokenizer.bos_id()][:700]
    sizes = np.random.default_rng(0).integers(0, 9, len(tokens)).astype(np.uint16)
    prepare.write_shard(folder / "fineweb_val_000000.bin", tokens)
    prepare.write_shard(folder / "fineweb_val_bytes_000000.bin", sizes)
    cfg, model = config(data_path=str(folder), ttt_enabled=False), tmp_path / "model.ptz"
    val = tg.ValData.open(cfg, rt)
    model.write_bytes(tg.pack(cfg, tg.GPT(cfg), val.tokenizer_sha256).blob)
    audit = tool.Audit(tg, cfg, rt, str(model), tool.Opened(), 300)
    assert len(audit.tokens) == 302 and audit.decoded_bytes() == sizes[1:301].sum()


# ---- from the shell

def shell(corpus, folder, *arguments, launch=(), **variables):
    """A process of the tool with tiny settings; returns exit code, output and error."""
    settings = environment(corpus, folder, TTT_CHUNK_TOKENS=128, NUM_LAYERS=2, VE_LAYERS=1, **variables)
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run([sys.executable, *launch, str(ROOT / "tools/audit.py"), *map(str, arguments)], text=True,
                          env={**clean, "OMP_NUM_THREADS": "1", **settings}, capture_output=True, timeout=200)


@pytest.fixture(scope="module")
def artifact(corpus, tmp_path_factory):
    """An untrained model's."""
    folder = tmp_path_factory.mktemp("artifact")
    cfg = tg.Hyperparameters.from_env(environment(corpus, folder, NUM_LAYERS=2, VE_LAYERS=1))
    torch.manual_seed(0)
    (folder / "some.ptz").write_bytes(tg.pack(cfg, scrambled(tg.GPT(cfg)), tg.open_tokenizer(cfg)[1]).blob)
    return folder / "some.ptz"


def check_signed(folder, done, artifact, script, corpus):
    """The table, the file and the output say the same; returns what the file says."""
    body, table = folder / "audit.json", folder / "audit.txt"
    found, lines = json.loads(body.read_bytes()), table.read_text()
    assert lines == done.out and f"signed:sha256:{hashlib.sha256(body.read_bytes()).hexdigest()}" in lines
    bad = [f for f in found["findings"] if not f["holds"]]
    assert found["verdict"] == ("FAIL" if bad else "pass") and f"audit:{found['verdict']} " in lines
    assert f"checks:{len(found['findings'])} failed:{len(bad)} " in lines
    assert found["artifact_sha256"] == hashlib.sha256(artifact.read_bytes()).hexdigest()
    assert found["code_sha256"] == hashlib.sha256(script.read_bytes()).hexdigest()
    assert found["whole_text_tokens"] == 1700
    assert found["whole_text_sha256"] == hashlib.sha256(corpus.val.astype("<u2").tobytes()).hexdigest()
    piece = corpus.val[:found["text_tokens"]].astype("<u2").tobytes()
    assert found["text_sha256"] == hashlib.sha256(piece).hexdigest()
    return found


@pytest.fixture
def here(corpus, tmp_path, monkeypatch, capsys):
    """The tool in this process."""
    def start(*arguments, **variables):
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        settings = environment(corpus, tmp_path, TTT_CHUNK_TOKENS=128, NUM_LAYERS=2, VE_LAYERS=1, **variables)
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("RUN_ID")
        code = tool.main([str(argument) for argument in arguments])
        return SimpleNamespace(code=code, **dict(zip(("out", "err"), capsys.readouterr())))
    return start


def test_the_signed_table(here, artifact, tmp_path, corpus):
    done = here(artifact, "AUDIT_POSITIONS=2")
    assert done.code == 0, done.err
    found = check_signed(tmp_path / "runs/some", done, artifact, ROOT / "train_gpt.py", corpus)
    assert len(found["findings"]) == COUNT and found["world_size"] == 1 and found["text_tokens"] == 321
    assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == ["some.audit.json", "some.audit.txt"]
    longer = here(artifact, "--tokens", 400, "RUN_ID=mine", "TTT_ENABLED=0", AUDIT_POSITIONS=1)
    assert longer.code == 0
    found = check_signed(tmp_path / "runs/mine", longer, artifact, ROOT / "train_gpt.py", corpus)
    assert found["text_tokens"] == 401 and found["settings"]["ttt_enabled"] is False
    assert (tmp_path / "logs/mine.audit.json").resolve() == tmp_path / "runs/mine/audit.json"


def test_an_audit_goes_to_the_artifact_s_own_run(tmp_path):
    (tmp_path / "runs/s1").mkdir(parents=True)
    (tmp_path / "final_model.ptz").symlink_to("runs/s1/final_model.ptz")
    cfg = tg.Hyperparameters(artifact_dir="elsewhere")
    for artifact in ("final_model.ptz", "runs/s1/final_model.ptz"):
        assert tool.run_of(str(tmp_path / artifact), cfg) == (tmp_path, "s1")
    named = dataclasses.replace(cfg, run_id="s2")
    assert tool.run_of(str(tmp_path / "final_model.ptz"), named) == (Path("elsewhere"), "s2")
    assert tool.run_of(str(tmp_path / "mine.ptz"), cfg) == (Path("elsewhere"), "mine")


def test_a_built_script_and_a_failed_audit(here, artifact, tmp_path, corpus):
    """The self-extracting script is audited as well; one that lies has a signed FAIL, and one line says so."""
    source = (ROOT / "train_gpt.py").read_text()
    lie = source.replace("nats / math.log(2) / max(size, 1), int(tokens)", "nats / 0.7 / max(size, 1), int(tokens)")
    for name, text in (("honest", source), ("lying", lie)):
        (tmp_path / f"{name}.py").write_bytes(record.build(text))
        done = here(artifact, "--script", tmp_path / f"{name}.py", "AUDIT_POSITIONS=1", "TTT_ENABLED=0")
        found = check_signed(tmp_path / "runs/some", done, artifact, tmp_path / f"{name}.py", corpus)
        assert done.code == (0 if name == "honest" else 2) and (found["verdict"] == "pass") == (name == "honest")
    assert done.err == "error: the audit failed: {0} (roundtrip), {0} (sliding); such a score does not count\n".format(
        "bits per byte are nats / ln 2 / bytes")


def test_ranks_audit_together(corpus, tmp_path, artifact):
    """Two ranks see each other's scores and come to the findings of one."""
    done = shell(corpus, tmp_path, artifact, "--positions", 2, RUN_ID="two",
                 launch=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"))
    assert done.returncode == 0 and f"audit:pass checks:{COUNT}" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/two/audit.json").read_text())["world_size"] == 2


@pytest.mark.parametrize("mode, more", [("sliding", 0), ("sgd", 0), ("lora", 0), ("document", 1)])
def test_the_audit_adds_no_graphs(audit, monkeypatch, mode, more):
    """Probes and passes over other texts use those of the first evaluation; for growing windows torch makes one more
    when it meets a second adapter. The back end runs them eagerly, for want of time."""
    counted, made, honest, graphs = CompileCounterWithBackend("eager"), torch.compile, tg.final_scores, []
    monkeypatch.setattr(torch, "compile", lambda function, **options: made(function, backend=counted, **options))
    monkeypatch.setattr(tg, "final_scores", lambda *args: (honest(*args), graphs.append(counted.frame_count))[0])
    torch._dynamo.reset()
    stride, changes = MODES[mode]
    small = {"num_layers": 1, "ve_layers": "0", **(changes or {}), "ttt_lora_targets": "q"}
    found = audit(compiles=True, eval_stride=stride, ttt_enabled=changes is not None, **small)
    assert not failed(found), found
    assert graphs[-1] <= graphs[0] + more and len(graphs) == 5


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
def test_compiled_graphs_are_audited(corpus, tmp_path, artifact):
    done = shell(corpus, tmp_path, artifact, "--positions", 1, COMPILE=1, EVAL_STRIDE=0, TTT_MODE="lora",
                 TTT_LORA_TARGETS="q")
    assert done.returncode == 0 and "audit:pass" in done.stdout, done.stdout + done.stderr
    assert json.loads((tmp_path / "runs/tiny/audit.json").read_text())["compile"] is True


@pytest.mark.parametrize("arguments, message", [
    ([], "the following arguments are required: ARTIFACT"), (["none.ptz"], "cannot read none.ptz"),
    (["ARTIFACT", "--tokens", "20"], "AUDIT_TOKENS=20: the audit needs more than a window of 32 tokens"),
    (["ARTIFACT", "AUDIT_POSITIONS=0"], "AUDIT_POSITIONS=0 is not a whole number from 1 on"),
    (["ARTIFACT", "--tokens", "many"], "AUDIT_TOKENS=many is not a whole number from 0 on"),
    (["ARTIFACT", "LEARNING_RATE=3"], "LEARNING_RATE is not a setting"),
    (["ARTIFACT", "smoke"], "'smoke' is not KEY=VALUE"), (["ARTIFACT", "--nosuch"], "unrecognized arguments"),
    (["ARTIFACT", "TTT_EPOCHS=-1"], "TTT_EPOCHS=-1 is out of range"),
    (["ARTIFACT", "--script", "none.py"], "cannot read script none.py"),
    (["ARTIFACT", "--script", "ARTIFACT"], "cannot import script"),
    (["ARTIFACT", "--script", record.__file__], "is no train_gpt.py that this audit knows: it has no UserError"),
    (["ARTIFACT", "ARTIFACT_DIR=/dev/null/x", "TTT_ENABLED=0", "EVAL_STRIDE=0", "AUDIT_POSITIONS=1"], "cannot write")])
def test_mistakes_are_one_line(here, artifact, arguments, message):
    done = here(*(artifact if word == "ARTIFACT" else word for word in arguments))
    assert done.code == 2 and done.err.startswith("error: ") and message in done.err and done.err.count("\n") == 1
