"""Phases: between documents that adapt by themselves, the weights train on those that are finished."""
import dataclasses
import math

import pytest
import torch
import train_gpt as tg
from conftest import environment, make_runtime, scrambled, walks_on_two_ranks
from test_adapters import STARTS, WARM, reference_chains, with_documents
from test_evaluation import Scores, score, setting  # noqa: F401  (a fixture)
from torch.nn import functional as F

PHASED = {**WARM, "phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 7, "global_ttt_chunk_tokens": 70,
          "global_ttt_lr": 0.05, "global_ttt_epochs": 2, "global_ttt_grad_clip": 0.7}


def plain_phase(cfg, model, tokens, documents, bos_id):
    """SGD written out, one piece of a document after another."""
    numbers = [number for first, stop in documents for number in range(first, stop)]
    chunks = [numbers[i:i + cfg.global_ttt_chunk_tokens] for i in range(0, len(numbers), cfg.global_ttt_chunk_tokens)]
    speeds = [torch.zeros_like(p) for p in model.requires_grad_(True).parameters()]
    for i, chunk in enumerate(chunks):
        lr = cfg.global_ttt_lr * 0.5 * (1 + math.cos(math.pi * i / (len(chunks) - 1)))
        rows = [chunk[j:j + cfg.doc_context] for j in range(0, len(chunk), cfg.doc_context)]
        for _ in range(cfg.global_ttt_epochs):
            loss = 0.0
            for row in rows:
                cuts = [0, *(j for j in range(1, len(row)) if tokens[row[j]] == bos_id), len(row)]
                for piece in (torch.tensor(row[a:b]) for a, b in zip(cuts, cuts[1:])):
                    logits = model.logits(model.hidden(tokens[None, piece]))[0]
                    loss = loss + F.cross_entropy(logits, tokens[piece + 1], reduction="sum") / len(chunk)
            params = list(model.parameters())
            grads = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
            norm = sum(g.square().sum() for g in grads) ** 0.5
            with torch.no_grad():
                for p, g, speed in zip(params, grads, speeds):
                    speed.mul_(cfg.global_ttt_momentum).add_(g * min(1.0, cfg.global_ttt_grad_clip / norm.item()))
                    p -= lr * speed
    model.requires_grad_(False)


def reference_phases(cfg, model, val):
    tokens = val.tokens.long()
    bounds = sorted({0, *(tokens[:-1] == val.bos_id).nonzero().flatten().tolist(), len(tokens) - 1})
    documents = sorted(zip(bounds, bounds[1:]), key=lambda span: span[1] - span[0])
    batches = [documents[i:i + cfg.ttt_batch_docs] for i in range(0, len(documents), cfg.ttt_batch_docs)]
    batches.sort(key=lambda batch: -max(stop - first for first, stop in batch))
    phases, scores, waiting, finished = cfg.phased_ttt_num_phases, torch.zeros(len(tokens) - 1), [], []
    ends = [min(cfg.phased_ttt_prefix_docs, len(documents)) * (i + 1) // phases for i in range(phases)]
    for i, batch in enumerate(batches):
        waiting.append(batch)
        finished += batch
        if i + 1 == len(batches) or ends and len(finished) >= ends[0]:
            part = reference_chains(cfg, model, val, waiting)
            for first, stop in (span for batch in waiting for span in batch):
                scores[first:stop] = part[first:stop]
            waiting = []
            if i + 1 < len(batches):
                lesson = sorted(finished, key=documents.index)[:ends.pop(0)]
                plain_phase(cfg, model, tokens, lesson, val.bos_id)
    return scores


def test_phases_are_those_of_the_plain_loop(setting, rt):
    cfg, val, model = setting
    val, cfg = with_documents(val, STARTS), dataclasses.replace(cfg, **PHASED)
    trained = model()
    _, nll = score(cfg, val, trained, 8, PHASED, rt)
    torch.testing.assert_close(nll, reference_phases(cfg, model(), val), atol=2e-4, rtol=2e-4)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), model().parameters()))  # as they were before
    assert torch.equal(nll, score(cfg, val, trained, 8, PHASED, rt)[1])
    for name, value in (("num_phases", 1), ("num_phases", 0), ("prefix_docs", 4)):
        other = score(cfg, val, model(), 8, {**PHASED, f"phased_ttt_{name}": value}, rt)[1]
        assert (other - nll).abs().max() > 1e-2, name
    for name in ("lr", "momentum", "epochs", "chunk_tokens", "grad_clip"):
        other = score(cfg, val, model(), 8, {**PHASED, f"global_ttt_{name}": getattr(cfg, f"global_ttt_{name}") // 2}, rt)
        assert (other[1] - nll).abs().max() > 1e-4, name


def test_a_phase_learns(setting, rt):
    """From long documents for the short ones: text that repeats itself."""
    cfg, val, model = setting
    val = with_documents(val, [])
    again = val.take(torch.cat((torch.arange(1), torch.arange(1, 60).repeat(6), *[torch.arange(40)] * 6)))
    changes = {**PHASED, "ttt_lora_lr": 0.0, "global_ttt_epochs": 4, "phased_ttt_prefix_docs": 2, "ttt_batch_docs": 1}
    still, moved = (score(cfg, again, model(), 8, {**changes, "phased_ttt_num_phases": phases}, rt)[0].bpb
                    for phases in (0, 2))
    assert moved < still - 0.05


def lessons(plan):
    return [chunk.finished.tolist() for chunk in plan if chunk.finished is not None]


def test_what_a_phase_is_taught(setting, rt):
    """Every token of the shortest finished documents, after its own predecessor, once."""
    cfg, val, _ = setting
    val, cfg = with_documents(val, STARTS), dataclasses.replace(cfg, **PHASED)
    plan, scored = tg.plan_documents(val, cfg, rt), tg.Scored(val, rt)
    assert [len(lesson) for lesson in lessons(plan)] == [3, 7]
    for chunk in plan:
        for windows in chunk.batches:
            _, _, numbers, counted = windows.read(val.tokens)
            scored.commit(numbers[counted], torch.zeros(int(counted.sum())))
        if chunk.finished is not None:
            tokens, targets = scored.training_documents(chunk.finished)
            spans = chunk.finished.tolist()
            assert targets.tolist() == [t for a, b in spans for t in val.tokens[a + 1:b + 1].tolist()]
            assert tokens.tolist() == [t for a, b in spans for t in val.tokens[a:b].tolist()]
            assert not ((tokens == val.bos_id) & (targets == val.bos_id)).any()
            assert [b - a for a, b in spans] == sorted(b - a for a, b in spans)


def test_a_phase_is_not_taught_what_has_no_score(setting, rt):
    cfg, val, model = setting
    val, cfg = with_documents(val, STARTS), dataclasses.replace(cfg, **PHASED)
    plan = tg.plan_documents(val, cfg, rt)
    place = next(i for i, chunk in enumerate(plan) if chunk.finished is not None)
    later = torch.tensor(lessons(plan)[1][:1])  # of the next phase, not finished yet
    plan[place] = dataclasses.replace(plan[place], finished=torch.cat((plan[place].finished, later)))
    with pytest.raises(tg.IllegalScore, match=f"{int(later[0, 1] - later[0, 0])} of .* were not scored once"):
        trained = model()
        tg.evaluate("test", trained.nll, val, cfg, rt, plan, tg.adapter_for(trained, cfg, rt))


@pytest.mark.parametrize("prefix, phases, sizes", [
    (7, 1, [7]), (7, 3, [2, 4, 7]), (14, 2, [7]), (10 ** 6, 2, [7]), (10 ** 6, 14, [1, 2, 3, 4]), (2, 2, [1, 2])])
def test_phases_begin_when_enough_is_finished(setting, rt, prefix, phases, sizes):
    """A phase after each batch at most, and none after the last one: 14 documents are batches of 2, 3, 3, 3 and 3."""
    cfg, val, _ = setting
    cfg = dataclasses.replace(cfg, **{**PHASED, "phased_ttt_prefix_docs": prefix, "phased_ttt_num_phases": phases})
    val = with_documents(val, STARTS)
    assert [len(lesson) for lesson in lessons(tg.plan_documents(val, cfg, rt))] == sizes
    for rank in range(3):  # all ranks stop for the same ones
        plan = tg.plan_documents(val, cfg, make_runtime(".", rank=rank, world_size=3))
        assert [len(lesson) for lesson in lessons(plan)] == sizes


def test_the_clock_leaves_phases_out_first_of_all(setting, rt, monkeypatch):
    cfg, val, model = setting
    val, cfg, trained = with_documents(val, STARTS), dataclasses.replace(cfg, **PHASED), model()
    clock, calls = tg.EvalClock(1.0, rt, now=lambda: 100.0), []
    monkeypatch.setattr(tg.LoraAdapter, "train_weights", lambda *args: calls.append(args))
    plan = tg.plan_documents(val, cfg, rt)
    scores = Scores(len(val.tokens) - 1)
    clock.pace = 1.0
    tg.evaluate("test", trained.nll, val, cfg, rt, plan, tg.adapter_for(trained, cfg, rt), clock, scores)
    assert not calls and (scores.given == 1).all()


@pytest.mark.parametrize("variables, said", [
    ({"PHASED_TTT_PREFIX_DOCS": 2}, "PHASED_TTT_PREFIX_DOCS=2 leaves some of PHASED_TTT_NUM_PHASES=3 without documents"),
    ({"PHASED_TTT_PREFIX_DOCS": 0}, "PHASED_TTT_PREFIX_DOCS=0 is out of range"),
    ({"TTT_RESET": "stream"}, "PHASED_TTT_NUM_PHASES=3 has no finished documents with TTT_RESET='stream'"),
    ({"TTT_RESET": "stream", "TTT_MODE": "sgd"}, "PHASED_TTT_NUM_PHASES=3 has no finished documents"),
    ({"NGRAM_ORDERS": "2,3"}, "PHASED_TTT_NUM_PHASES=3 the lengths: no order of decoding"),
    ({"GLOBAL_TTT_LR": "nan"}, "GLOBAL_TTT_LR=nan is out of range"),
    ({"GLOBAL_TTT_CHUNK_TOKENS": 0}, "GLOBAL_TTT_CHUNK_TOKENS=0 is out of range")])
def test_refusals(corpus, tmp_path, variables, said):
    given = {"TTT_MODE": "lora", "TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "PHASED_TTT_NUM_PHASES": 3}
    with pytest.raises(tg.UserError) as refused:
        tg.Hyperparameters.from_env(environment(corpus, tmp_path, **{**given, **variables}))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_whole_run_says_what_it_trains_on(run, corpus):
    """More documents are asked for than there are: the last phase would come after the last one."""
    count = int((corpus.val[:-1] == corpus.tokenizer.bos_id()).sum())
    done = run(ITERATIONS=1, EVAL_STRIDE=0, TTT_MODE="lora", TTT_RESET="document", TTT_DOC_CHUNK_TOKENS=32,
               TTT_BATCH_DOCS=1, PHASED_TTT_NUM_PHASES=2, PHASED_TTT_PREFIX_DOCS=100, GLOBAL_TTT_CHUNK_TOKENS=200)
    assert done.code == 0, done.err
    half = count // 2
    assert f"ttt_phased: total_docs:{count} prefix_docs:{half} num_phases:1 boundaries:[{half}]; the text has documents " \
        "for no more\n" in done.out
    assert f"ttpr: documents:{half} t:" in done.out


# ---- ranks

RANKS = {**WARM, "phased_ttt_num_phases": 2, "phased_ttt_prefix_docs": 4, "global_ttt_lr": 0.1, "ttt_batch_docs": 1}


def walks(cfg, rt):
    """Scores with chunks of one row, which only one rank computes, and of several."""
    val, results = tg.ValData.open(cfg, rt), []
    for chunk in (40, 130):
        changed = dataclasses.replace(cfg, **RANKS, global_ttt_chunk_tokens=chunk)
        torch.manual_seed(0)
        model = scrambled(tg.GPT(cfg)).eval()
        plan = tg.plan_documents(val, changed, rt)
        r = tg.evaluate("test", model.nll, val, changed, rt, plan, tg.adapter_for(model, changed, rt))
        results.append([r.tokens, r.bytes, r.loss])
    return results


def test_two_ranks_learn_the_same_to_the_bit(corpus, config, rt, tmp_path):
    """But for the order in which the nats of two ranks are added, in float64."""
    for two, one in zip(walks_on_two_ranks("test_phases", corpus, tmp_path), walks(config(), rt)):
        assert two[:2] == one[:2] and two[2] == pytest.approx(one[2], rel=1e-13)
