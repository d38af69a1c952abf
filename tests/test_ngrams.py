"""NGRAM_ORDERS: a back-off over exact counts of scored tokens, against a plain one, and why its scores are legal."""
import collections
import dataclasses
import functools
import json
import math
import os
import re
import sys

import pytest
import torch
import train_gpt as tg
from conftest import ROOT, environment, make_runtime
from hypothesis import given, settings, strategies as st
from test_audit import DOCUMENT, audit, failed  # noqa: F401  (a fixture)
from test_evaluation import LORA, setting  # noqa: F401  (a fixture)

sys.path.insert(0, str(ROOT / "tools"))
import ngram as tool  # noqa: E402

BOS = 0  # in texts made here
NGRAMS = (((False, 1), 2.0), ((False, 2), 0.5), ((False, 4), 1.0),
          ((True, 1), 3.0), ((True, 2), 0.7), ((True, 3), 2.0), ((True, 5), 0.1), ((True, 8), 1.0), ((True, 12), 0.5))


class Plain:
    """One token after another; what followed each context, in the whole text or since the last BOS, is in a
    dictionary."""

    def __init__(self, ngrams):
        self.ngrams, self.followed = ngrams, collections.defaultdict(collections.Counter)

    def contexts(self, past):
        document = past.count(BOS)
        return [(self.followed[-1 if whole else document, length, tuple(past[-length:])], weight)
                for (whole, length), weight in self.ngrams]

    def mix(self, past, model):
        """Probabilities of the whole vocabulary after `past`, from the model's."""
        for counts, weight in self.contexts(past):
            prior = weight * len(counts)
            total = sum(counts.values()) + prior
            model = [(counts[w] + prior * p) / total for w, p in enumerate(model)] if counts else model
        return model

    def add(self, past, word):
        for counts, _ in self.contexts(past):
            counts[word] += 1


def distributions(count, vocab, seed=0):
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)).double().mul(2).softmax(1)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_scores_are_those_of_plain_counting_and_sum_to_one(data):
    """Any text, documents, lengths and concentrations: at each place the probabilities of all words are 1 together, by
    the same counts that give the target's; the score is -log of that one."""
    vocab = data.draw(st.integers(2, 9))
    tokens = data.draw(st.lists(st.integers(0, vocab - 1), min_size=2, max_size=60))
    orders = sorted(data.draw(st.sets(st.tuples(st.booleans(), st.integers(1, 20)), max_size=6)))
    ngrams = [(order, data.draw(st.floats(1e-3, 1e3))) for order in orders]
    model, plain, wanted = distributions(len(tokens) - 1, vocab), Plain(ngrams), []
    for i, word in enumerate(tokens[1:]):
        p = plain.mix(tokens[:i + 1], model[i].tolist())
        assert sum(p) == pytest.approx(1, abs=1e-9)
        wanted.append(-math.log(p[word]))
        plain.add(tokens[:i + 1], word)
    nll = -model.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0].log()
    assert tg.mixture_nll(torch.tensor(tokens), nll, ngrams, BOS).tolist() == pytest.approx(wanted, abs=1e-9)


def test_probabilities_of_the_whole_vocabulary_are_one_together():
    """From the function itself: each word in turn is the target, everything before it stays. At hundreds of places."""
    vocab, tokens = 7, torch.randint(0, 7, (400,), generator=torch.Generator().manual_seed(1)) ** 2 // 7
    model = distributions(399, vocab)
    nll = -model.gather(1, tokens[1:, None])[:, 0].log()
    for place in range(40, 399):
        total = 0.0
        for word in range(vocab):
            text, scores = tokens[:place + 2].clone(), nll[:place + 1].clone()
            text[-1], scores[-1] = word, -model[place, word].log()
            total += tg.mixture_nll(text, scores, NGRAMS, BOS)[-1].neg().exp().item()
        assert total == pytest.approx(1, abs=1e-6)


def test_nothing_later_counts():
    """Other tokens and scores from t on leave every score before t bit-identical, and their own token's counts too."""
    generator = torch.Generator().manual_seed(2)
    tokens, nll = torch.randint(0, 5, (500,), generator=generator), torch.rand(499, generator=generator)
    before = tg.mixture_nll(tokens, nll, NGRAMS, BOS)
    for t in (1, 2, 13, 250, 498, 499):  # token t is target t - 1
        changed, other = tokens.clone(), nll.clone()
        changed[t:] = (changed[t:] + 1 + torch.randint(0, 4, (500 - t,), generator=generator)) % 5
        other[t - 1:] = 1 - other[t - 1:]
        after = tg.mixture_nll(changed, other, NGRAMS, BOS)
        assert torch.equal(before[:t - 1], after[:t - 1]) and not torch.equal(before, after)


def test_a_context_never_seen_leaves_the_score(device):
    tokens = torch.arange(100_000, device=device) % 65_536
    nll = torch.rand(99_999, device=device)
    mixed = tg.mixture_nll(tokens, nll, NGRAMS, BOS)
    assert torch.equal(mixed[:65_536], nll[:65_536].double()) and (mixed[65_548:] < nll[65_548:]).all()
    assert torch.isfinite(mixed).all()
    huge = tg.mixture_nll(tokens, 1000 + nll, NGRAMS, BOS)  # a probability that no float holds
    assert torch.equal(huge[:65_536], (1000 + nll)[:65_536].double()) and torch.isfinite(huge).all()


def test_documents_count_by_themselves():
    """Another document's tokens change nothing in a document's own counts; a context before its BOS is no context."""
    one, other = [BOS, 1, 2, 1, 2, 3, 1, 2], [BOS, 1, 3, 1, 3, 2, 1, 3, 3]
    alone = list(tg.count_contexts(torch.tensor([*one, BOS]), [(False, 1), (False, 2)], BOS))
    both = list(tg.count_contexts(torch.tensor([*other, *one, BOS]), [(False, 1), (False, 2)], BOS))
    for mine, all_of_them in zip(alone, both):
        assert all(torch.equal(a, b[len(other):]) for a, b in zip(mine, all_of_them))
    assert [count.tolist() for count in alone[0]] == [
        [0, 0, 0, 1, 1, 0, 2, 2], [0, 0, 0, 1, 0, 0, 2, 0], [0, 0, 0, 1, 1, 0, 1, 2]]
    assert alone[1][0].tolist() == [0, 0, 0, 0, 1, 0, 0, 2]


def test_keys_are_exact():
    """Contexts that a hash of 32 bits or a wrapped product would confuse stay apart, and equal ones together."""
    keys = torch.tensor([5, 5 + 2 ** 32, 5, 2 ** 62, 5 + 2 ** 32, 2 ** 62 + 1, 5])
    found = tg.Occurrences(keys)
    assert len(found.ids.unique()) == 4 and found.ids[0] == found.ids[2] == found.ids[6] and found.ids.min() == 1
    assert found.before(torch.ones(7)).tolist() == [0, 0, 1, 0, 1, 0, 2]
    assert found.before(torch.tensor([7, 1, 2, 9, 9, 9, 9])).tolist() == [0, 0, 7, 0, 1, 0, 9]


# ---- in a run

@pytest.mark.parametrize("stride, changes", [(8, None), (8, {}), (8, {**DOCUMENT, "ttt_lora_targets": "q"})],
                         ids=["sliding", "sgd", "document"])
def test_any_number_of_ranks_gives_the_same_bits(setting, tmp_path, monkeypatch, stride, changes):
    """The scores of 1, 2 and 4 ranks, added up, mix to the same result; no weight learns from the mixture."""
    cfg, val, model = setting
    cfg, val = dataclasses.replace(cfg, ngram_orders="d1,2,4", **changes or {}), val.take(slice(700))
    monkeypatch.setattr(tg.Scored, "require_scored_once", lambda self, times: None)
    results = []
    for world in (1, 2, 4):
        shares = []
        for rank in range(world if changes is None or "ttt_reset" in changes else 1):
            rt = make_runtime(tmp_path, rank=rank, world_size=world)
            alone, nll = make_runtime(tmp_path), torch.zeros(699)
            trained = model()
            adapter = None if changes is None else tg.adapter_for(trained, cfg, alone)
            plan = tg.plan_evaluation(val, cfg, rt if changes != {} else alone, stride, 1, bool(adapter))
            tg.evaluate("test", trained.nll, val, cfg, alone, plan, adapter,
                        observe=functools.partial(nll.index_copy_, 0))
            shares.append(nll)
        nll = sum(shares)
        results.append(tg.mixed_result("mixed", nll, val, cfg, make_runtime(tmp_path)))
        plain = tg.mixture_nll(val.tokens, nll, cfg.ngrams, val.bos_id).sum().item()
        assert results[-1].loss == plain / 699 and results[-1].bytes == int(val.sizes[1:].sum())
        assert results[-1].bpb == plain / math.log(2) / results[-1].bytes
    assert results[0].bpb == results[1].bpb == results[2].bpb and results[0].tokens == 699
    assert tg.mixed_result("mixed", nll, val, cfg, make_runtime(tmp_path, rank=1)).tokens == 0, "rank 0 adds them"


@pytest.mark.parametrize("changes, of", [({"TTT_ENABLED": 0}, "final_int6_sliding_window"),
                                         ({"TTT_ENABLED": 0, "EVAL_STRIDE": 0}, "final_int6_roundtrip"),
                                         ({"EVAL_STRIDE": 32}, "legal_ttt")])
def test_both_scores_stand_side_by_side(run, monkeypatch, changes, of):
    shares, measure = [], tg.EvalClock.measure_after
    monkeypatch.setattr(tg.EvalClock, "measure_after",
                        lambda clock, work, share: shares.append(share) or measure(clock, work, share))
    plain = run(**changes)
    done = run(**changes, NGRAM_ORDERS="1,2,3", RUN_ID="mixed")
    assert done.code == 0, done.err
    assert len(shares) == 1 and 0 < shares[0] <= 1, "the clock leaves time for counting"
    key = {"final_int6_sliding_window": "sliding", "final_int6_roundtrip": "roundtrip", "legal_ttt": "ttt"}[of]
    without, mixed = done.summary[f"val_bpb_{key}"], done.summary["val_bpb_ngram"]
    assert without == plain.summary[f"val_bpb_{key}"] and plain.summary["val_bpb_ngram"] is None and mixed < without
    assert f"{of}_ngram val_loss:" in done.out and f"val_bpb:{mixed:.4f} without:{without:.4f}" in done.out
    assert f"{of}_ngram_exact" in done.out and f"counts {mixed:.4f}" in done.out and "counts off" in plain.out
    events = [json.loads(line) for line in (done.folder / "runs/mixed/events.jsonl").read_text().splitlines()]
    scores = {e["name"]: e["bpb"] for e in events if e.get("event") == "evaluation"}
    assert (scores[of], scores[f"{of}_ngram"]) == (without, mixed)


def test_counts_that_do_not_fit_into_memory_are_refused_before_the_scores(run, monkeypatch):
    monkeypatch.setattr(tg.Runtime, "free_memory", lambda rt: 100_000)
    done = run(TTT_ENABLED=0, ITERATIONS=1, NGRAM_ORDERS="1,2")
    assert done.code == 2 and re.search(r"error: counting NGRAM_ORDERS in [\d,]+ tokens takes about \d", done.err)
    assert "final_int6_roundtrip" not in done.out and len(done.err.splitlines()) == 1


def test_free_memory_is_some_of_the_machines(tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < make_runtime(tmp_path).free_memory() <= machine


def test_the_clock_leaves_time_for_counting(tmp_path):
    """What follows the last evaluation is measured on a share of it, and taken off what adaptation may use."""
    now = [0.0]
    clock = tg.EvalClock(100.0, make_runtime(tmp_path), now=lambda: now[0])
    clock.measure_after(lambda: now.__setitem__(0, now[0] + 2.0), 0.05)
    assert clock.after == pytest.approx(40.0)
    with pytest.raises(tg.UserError, match="would take about"):
        clock.measure_pace(lambda: now.__setitem__(0, now[0] + 1.0), 10, 700)


@pytest.mark.parametrize("settings, message", [
    ({"NGRAM_ORDERS": "3,2"}, "NGRAM_ORDERS='3,2' is not growing lengths of contexts"),
    ({"NGRAM_ORDERS": "2,2"}, "NGRAM_ORDERS='2,2' is not growing"),
    ({"NGRAM_ORDERS": "0,1"}, "NGRAM_ORDERS='0,1' has contexts"), ({"NGRAM_ORDERS": "d0,1"}, "not 1 to 10,000 tokens"),
    ({"NGRAM_ORDERS": "1,2,d3"}, "NGRAM_ORDERS='1,2,d3' is not"), ({"NGRAM_ORDERS": "d"}, "NGRAM_ORDERS='d' is not"),
    ({"NGRAM_ORDERS": "d-1"}, "NGRAM_ORDERS='d-1' has contexts"), ({"NGRAM_ORDERS": "d20000,2"}, "not 1 to 10,000"),
    ({"NGRAM_ORDERS": "2", "TTT_WARM_START_A": 1, "TTT_MODE": "lora", "TTT_RESET": "document",
      "TTT_DOC_CHUNK_TOKENS": 16}, "TTT_WARM_START_A=True the lengths"),
    ({"NGRAM_ORDERS": "two"}, "NGRAM_ORDERS='two' is not"), ({"NGRAM_ORDERS": "2,20000"}, "not 1 to 10,000"),
    *(({"NGRAM_ORDERS": "2,3", "NGRAM_CONCENTRATIONS": text},
       f"NGRAM_CONCENTRATIONS='{text}' is not one positive number")
      for text in ("0", "-1", "nan", "4,nan", "1,0", "inf", "1,2,3", "", "much"))])
def test_mistakes_are_one_line(corpus, tmp_path, settings, message):
    with pytest.raises(tg.UserError) as error:
        tg.Hyperparameters.from_env(environment(corpus, tmp_path, **settings))
    assert message in str(error.value) and "\n" not in str(error.value)


# ---- the audit

COUNTED = {"ngram_orders": "d1,d2,1,2,3,5", "ngram_concentrations": "4"}
CHECKS = {"counts are exact, of earlier tokens", "full-vocabulary normalisation", "the sum is that of the scores",
          "bits per byte are nats / ln 2 / bytes", "repeatable", "causality"}


@pytest.mark.parametrize("changes", [{}, {"ttt_enabled": False}, DOCUMENT, {**LORA, "eval_stride": 0}],
                         ids=["sgd", "sliding", "document", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_honest_counts_pass(audit, changes, dtype):
    found = audit(dtype=dtype, positions=2, **COUNTED, **changes)
    assert not failed(found), [f for f in found if not f.holds]
    assert {f.check for f in found if f.evaluation == "ngram"} == CHECKS


def counts_include_the_target(monkeypatch):
    honest = tg.Occurrences.before
    monkeypatch.setattr(tg.Occurrences, "before", lambda self, values: honest(self, values) + values.long())


def counts_of_the_whole_text(monkeypatch):
    """Later tokens count, too."""
    def cheat(self, values):
        return torch.zeros_like(self.ids).index_add_(0, self.ids - 1, values.long())[self.ids - 1]
    monkeypatch.setattr(tg.Occurrences, "before", cheat)


def hashed_counts(monkeypatch):
    """Few buckets for contexts and for pairs, which collide: not a distribution (PR 550, its ninth version)."""
    honest = tg.Occurrences.__init__
    monkeypatch.setattr(tg.Occurrences, "__init__", lambda self, keys: honest(self, keys * 36_313 % 61))


def table_filled_in_another_order(monkeypatch):
    """Documents are counted from the last to the first, as a queue sorted by length might, but decoded along the
    text."""
    honest = tg.mixture_nll

    def cheat(tokens, nll, *others):
        half, n = len(nll) // 2, len(nll)
        order = torch.cat((torch.arange(half, n), torch.arange(half)))
        text = torch.cat((tokens[order], tokens[order[-1:] + 1]))
        return torch.empty(n, dtype=torch.float64).index_copy_(0, order, honest(text, nll[order], *others))
    monkeypatch.setattr(tg, "mixture_nll", cheat)


def documents_end_before_their_last_target(monkeypatch):
    """The BOS that ends a document is predicted as the next one's, which has no counts yet: that alone tells it."""
    honest = tg.count_contexts

    def cheat(tokens, orders, bos_id):
        for (whole, _), counts in zip(orders, honest(tokens, orders, bos_id)):
            yield counts if whole else [count.where(tokens[1:] != bos_id, 0) for count in counts]
    monkeypatch.setattr(tg, "count_contexts", cheat)


def lower_of_the_two(monkeypatch):
    """Each token has the better score of the two, with counts and without."""
    honest = tg.mixture_nll
    monkeypatch.setattr(tg, "mixture_nll", lambda tokens, nll, *others: torch.minimum(
        honest(tokens, nll, *others), nll.double()))


def sum_of_less(monkeypatch):
    honest = tg.mixed_result
    monkeypatch.setattr(tg, "mixed_result", lambda *args: dataclasses.replace(
        honest(*args), loss=0.99 * honest(*args).loss))


def counts_of_other_scores(monkeypatch):
    """The model's part is better than what was scored."""
    honest = tg.mixture_nll
    monkeypatch.setattr(tg, "mixture_nll", lambda tokens, nll, *others: honest(tokens, 0.9 * nll, *others))


@pytest.mark.parametrize("cheat, checks", [
    (counts_include_the_target, {"counts are exact, of earlier tokens", "full-vocabulary normalisation"}),
    (counts_of_the_whole_text, {"counts are exact, of earlier tokens", "causality"}),
    (hashed_counts, {"counts are exact, of earlier tokens", "full-vocabulary normalisation"}),
    (table_filled_in_another_order, {"counts are exact, of earlier tokens", "causality"}),
    (documents_end_before_their_last_target, {"counts are exact, of earlier tokens", "full-vocabulary normalisation"}),
    (lower_of_the_two, {"counts are exact, of earlier tokens", "full-vocabulary normalisation"}),
    (sum_of_less, {"the sum is that of the scores"}),
    (counts_of_other_scores, {"counts are exact, of earlier tokens"})],
    ids=lambda value: getattr(value, "__name__", ""))
def test_planted_cheats_are_caught(audit, monkeypatch, cheat, checks):
    cheat(monkeypatch)
    found = audit(ttt_enabled=False, eval_stride=0, **COUNTED)
    assert {check for evaluation, check in failed(found) if evaluation == "ngram"} >= checks, found


def test_text_order_with_documents_that_go_on_from_others_is_caught(audit, monkeypatch):
    """If additions are not reset between documents, longest first, then no decoder could follow the text's order."""
    monkeypatch.setattr(tg.LoraAdapter, "reset", lambda self, *_: None)
    found = failed(audit(**COUNTED, **{**DOCUMENT, "ttt_batch_docs": 1}))
    assert {("ttt", "causality"), ("ngram", "causality")} <= found


# ---- tools/ngram.py

@pytest.fixture
def artifact(config, rt, tmp_path):
    cfg = config(num_layers=1, ve_layers="0")
    torch.manual_seed(0)
    path = tmp_path / "some.ptz"
    path.write_bytes(tg.pack(cfg, tg.GPT(cfg), tg.open_tokenizer(cfg)[1]).blob)
    return path


@pytest.fixture
def find(corpus, tmp_path, monkeypatch, capsys, artifact):
    """The tool in this process: exit code, output, error."""
    def start(*arguments, **variables):
        for name, value in environment(corpus, tmp_path, TTT_ENABLED=0, **variables).items():
            monkeypatch.setenv(name, value)
        return tool.main([str(artifact), *arguments]), *capsys.readouterr()
    return start


def test_concentrations_come_from_training_text(find, corpus, monkeypatch):
    """From the end of it: other validation text changes nothing; what is printed can be set."""
    code, out, err = find("--tokens", "600", "NGRAM_ORDERS=d1,2,3", "EVAL_STRIDE=0")
    assert code == 0, err
    score, line = out.splitlines()
    assert score.startswith("roundtrip: ") and "on 300 targets of the training text" in score
    chosen = dict(pair.split("=") for pair in line.split())
    assert [order for order, _ in tg.Hyperparameters.from_env(chosen).ngrams] == [(False, 1), (True, 2), (True, 3)]
    opened = tg.ValData.open.__func__
    monkeypatch.setattr(tg.ValData, "open", classmethod(lambda cls, *args: dataclasses.replace(
        opened(cls, *args), tokens=torch.zeros(1700, dtype=torch.int32))))
    assert find("--tokens", "600", "NGRAM_ORDERS=d1,2,3", "EVAL_STRIDE=0")[1].splitlines()[1] == line
    assert "on 600 targets of the validation text" in find("--val", "--tokens", "600", "NGRAM_ORDERS=2,3")[1]


def test_picked_concentrations_are_better_than_their_neighbours():
    tokens = torch.randint(0, 6, (900,), generator=torch.Generator().manual_seed(3)) ** 2 // 6
    nll = torch.full((899,), math.log(6), dtype=torch.float64)
    orders = [(True, 1), (True, 2)]
    counts = list(tg.count_contexts(tokens, orders, BOS))
    chosen = tool.pick(counts, nll)
    loss = lambda weights: tg.mixture_nll(tokens, nll, list(zip(orders, weights)), BOS).mean().item()
    assert loss(chosen) < loss([8.0, 8.0])
    for i in (0, 1):
        for factor in (0.5, 2.0):
            other = [weight * factor if i == j else weight for j, weight in enumerate(chosen)]
            assert loss(chosen) <= loss(other) + 1e-6


@pytest.mark.parametrize("arguments, message", [
    (["--tokens", "600"], "NGRAM_ORDERS is empty"), (["--tokens", "20", "NGRAM_ORDERS=2"], "less than a window of 32"),
    (["--tokens", "1", "NGRAM_ORDERS=2"], "--tokens 1 is out of range"),
    (["NGRAM_ORDERS=2,1"], "NGRAM_ORDERS='2,1' is not growing"), (["NGRAM_ORDER=2"], "NGRAM_ORDER is not a setting")])
def test_mistakes_of_the_tool_are_one_line(find, arguments, message):
    code, _, err = find(*arguments)
    assert code == 2 and message in err and err.count("\n") == 1
