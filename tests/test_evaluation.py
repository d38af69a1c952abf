import dataclasses
import functools
import math

import pytest
import torch
import train_gpt as tg
from conftest import make_runtime, scrambled
from hypothesis import given, settings, strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F


@given(st.integers(1, 400), st.integers(1, 40), st.data())
@settings(max_examples=200, deadline=None)
def test_windows_score_each_target_once_with_all_the_context_there_is(targets, length, data):
    length = min(length, targets)
    stride = data.draw(st.integers(1, length))
    windows = tg.Windows.sliding(targets, length, stride)
    start, low, high, _ = windows.bounds
    scored = [t for first, end in zip(low.tolist(), high.tolist()) for t in range(first, end)]
    assert scored == list(range(targets))
    assert torch.equal(start, high - length) and high.max() == targets
    assert ((high - low)[1:] <= stride).all() and (start >= 0).all()
    tokens = torch.arange(targets + 1)
    for part in windows.batches(3, fixed=data.draw(st.booleans())):
        inputs, wanted, at, counted = part.read(tokens)
        assert torch.equal(wanted[counted], at[counted] + 1)
        assert torch.equal(inputs[:, -part.keep:][counted], at[counted])
        scored = scored[len(at[counted]):] if at[counted].tolist() == scored[:len(at[counted])] else None
    assert scored == []


class Scores:
    """Every score by the number of its target, and how often it was given."""

    def __init__(self, targets):
        self.nll, self.given = torch.full((targets,), torch.nan), torch.zeros(targets, dtype=torch.int)

    def __call__(self, numbers, nll):
        self.nll[numbers] = nll.float()
        self.given.index_add_(0, numbers, torch.ones_like(numbers, dtype=torch.int))


@pytest.fixture
def setting(config, rt):
    """(settings, validation data, a maker of fresh copies of one scrambled model)."""
    cfg = config()
    val = tg.ValData.open(cfg, rt)

    def model():
        torch.manual_seed(0)
        return scrambled(tg.GPT(cfg)).eval()
    return cfg, val, model


LORA = {"ttt_mode": "lora", "ttt_lora_targets": "q,k,v,o,mlp,head", "ttt_lora_rank": 2, "ttt_epochs": 2}
MODES = {  # name: (stride, changes to the settings; None: no adapter)
    "plain": (32, None), "sliding": (8, None), "sliding, odd stride": (7, None),
    "sgd": (8, {}), "sgd, frozen": (8, {"ttt_freeze_blocks": 1, "ttt_fc_lr_mult": 0.0}),
    "adamw": (8, {"ttt_optimizer": "adamw", "ttt_lr": 0.002}),
    "polyak": (8, {"ttt_polyak_decay": 0.6}), "hash": (8, {"hash_embed_buckets": 512}),
    "lora": (8, LORA), "lora, hash": (8, {**LORA, "hash_embed_buckets": 512}),
    "document": (8, {**LORA, "ttt_reset": "document", "ttt_batch_docs": 3, "ttt_doc_chunk_tokens": 16}),
    "document, sgd": (8, {**LORA, "ttt_reset": "document", "ttt_batch_docs": 2, "ttt_doc_chunk_tokens": 32,
                          "ttt_lora_optimizer": "sgd", "ttt_min_doc_tokens": 64, "ttt_epochs": 1})}


def score(cfg, val, model, stride, changes, rt, clock=None):
    """(result, scores) of a walk; with changes, {} included, something adapts."""
    cfg = dataclasses.replace(cfg, **changes or {})
    tg.check_combinations(cfg, tg.combination_rules)
    scores = Scores(len(val.tokens) - 1)
    adapter = None if changes is None else tg.adapter_for(model, cfg, rt)
    plan = tg.plan_evaluation(val, cfg, rt, stride, cfg.eval_batch_seqs, bool(adapter))
    result = tg.evaluate("test", model.nll, val, cfg, rt, plan, adapter, clock, scores)
    assert (scores.given == 1).all()
    return result, scores.nll


@pytest.mark.parametrize("mode", MODES)
def test_every_token_once_and_the_bytes_of_the_text(setting, rt, mode):
    cfg, val, model = setting
    stride, changes = MODES[mode]
    result, nll = score(cfg, val, model(), stride, changes, rt)
    assert result.tokens == len(val.tokens) - 1
    assert result.bytes == int(val.sizes[1:].sum())
    assert result.loss == pytest.approx(nll.double().mean().item())
    assert result.bpb == pytest.approx(nll.double().sum().item() / math.log(2) / result.bytes)


@pytest.mark.parametrize("stride", [1, 8, 32])
def test_scores_are_those_of_one_window_at_a_time(setting, rt, stride):
    cfg, val, model = setting
    model, tokens = model(), val.tokens[:120].long()
    _, nll = score(cfg, dataclasses.replace(val, tokens=tokens), model, stride, None, rt)
    wanted = []
    with torch.no_grad():
        while len(wanted) < len(tokens) - 1:  # the next `stride` targets, each window as early as it can be
            end = min(32 if not wanted else len(wanted) + stride, len(tokens) - 1)
            logits = model.logits(model.hidden(tokens[None, end - 32:end]))[0]
            each = F.cross_entropy(logits, tokens[end - 31:end + 1], reduction="none")
            wanted += each[len(wanted) - end:].tolist()
    assert nll.tolist() == pytest.approx(wanted, abs=2e-5)


@pytest.mark.parametrize("mode", MODES)
def test_no_score_depends_on_its_token_s_future(setting, rt, mode):
    """Score before update: other tokens from position t on leave every score before t bit-identical - also where they
    end or begin documents, so that others share the batch."""
    cfg, val, model = setting
    stride, changes = MODES[mode]
    tokens = val.tokens[:1100].clone()
    tokens[[40, 41, 300, 340, 600]] = val.bos_id
    _, before = score(cfg, dataclasses.replace(val, tokens=tokens), model(), stride, changes, rt)
    for t in (1, 300, 333, 512, 513, 1024):
        changed = tokens.clone()
        changed[t:] = (changed[t:] + 7) % cfg.vocab_size
        changed[t + 30::90] = val.bos_id
        _, after = score(cfg, dataclasses.replace(val, tokens=changed), model(), stride, changes, rt)
        assert torch.equal(before[:t - 1], after[:t - 1])  # target i is token i + 1
        assert not torch.equal(before[t - 1:], after[t - 1:])


@pytest.mark.parametrize("stride", [8, 7, 32])
def test_an_adapter_sees_only_scored_tokens_all_but_the_last_chunk(setting, rt, stride):
    cfg, val, model = setting
    scores, handed, model = Scores(len(val.tokens) - 1), [], model()

    class Spy(tg.SgdAdapter):
        def learn(self, tokens, progress, epochs):
            first = len(handed) * cfg.ttt_chunk_tokens
            last = first + len(tokens) - 1
            assert torch.equal(tokens, val.tokens[first:last + 1]) and (scores.given[:last] == 1).all()
            handed.append(progress)
    plan = tg.plan_evaluation(val, cfg, rt, stride, 4, True)
    tg.evaluate("test", model.nll, val, cfg, rt, plan, Spy(model, cfg, rt), observe=scores)
    chunks = -(-(len(val.tokens) - 1) // cfg.ttt_chunk_tokens)
    assert handed == [i / (chunks - 1) for i in range(chunks - 1)]


def test_ttt_learns(setting, rt):
    """On text that repeats itself the adapted score must beat the plain one."""
    cfg, val, model = setting
    again = val.take(torch.arange(400).repeat(5))
    cfg = dataclasses.replace(cfg, ttt_lr=0.05, ttt_epochs=2)
    plain, adapted = (score(cfg, again, model(), 8, changes, rt)[0] for changes in (None, {}))
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
    score(cfg, val, ours, 8, {}, rt)
    wanted = reference_ttt(cfg, model(), val)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_frozen_blocks_stay(setting, rt, optimiser):
    cfg, val, model = setting
    cfg = dataclasses.replace(cfg, ttt_freeze_blocks=2, ttt_optimizer=optimiser, ttt_lr=0.01)
    start, moved = model(), model()
    score(cfg, val, moved, 8, {}, rt)
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
    assert score(hot, val, model(), 8, None, rt)[0].bpb == score(cfg, val, model(), 8, None, rt)[0].bpb
    _, nll = score(hot, val, model(), 32, {}, rt)
    m, ids = model(), val.tokens[:33].long()[None]
    with torch.no_grad():
        logits = m.logits(m.hidden(ids[:, :-1]))[0] / 2
    assert nll[:32].tolist() == pytest.approx(F.cross_entropy(logits, ids[0, 1:], reduction="none").tolist(), abs=2e-5)


def test_padding_for_compiled_graphs_counts_nothing(setting, rt, tmp_path):
    cfg, val, model = setting
    eager, _ = score(cfg, val, model(), 8, None, rt)
    padded = dataclasses.replace(rt, compiles=True)  # score_fn stays eager: only the padding differs
    assert score(cfg, val, model(), 8, None, padded)[0].bpb == pytest.approx(eager.bpb, rel=1e-6)


def epochs_until(clock, last, tokens, chunk):
    """What `affordable_epochs` says of a clock that ends adaptation at a chunk."""
    clock.epochs = clock.most if chunk < last else 0
    return clock.epochs if tokens else 0


@pytest.mark.parametrize("mode, graphs", [("sliding", 2), ("sgd, frozen", 4), ("lora, hash", 4), ("document", 2),
                                          ("warm", 2)])
def test_every_way_to_adapt_compiles(setting, tmp_path, monkeypatch, mode, graphs):
    """As on a GPU: whole graphs, few of them - windows that grow with their documents share one, whatever they keep,
    and also when the clock ends adaptation - and the same scores.
    The back end runs them eagerly, for want of time; what cannot be traced fails all the same."""
    cfg, val, model = setting
    val = val.take(slice(1100))
    val.tokens[[40, 41, 300, 340, 600]] = val.bos_id
    warm = {**MODES["document"][1], "ttt_warm_start_a": True, "ttt_chunk_ladder": "40:4,80:8", "ttt_lora_parallel": True}
    stride, changes = {**MODES, "warm": (8, warm)}[mode]
    cfg = dataclasses.replace(cfg, rope_train_seq_len=20, **changes or {})  # the base stretches within the windows
    counted, made = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: made(function, backend=counted, **options))
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        rt, trained = make_runtime(tmp_path, compiles=compiles), model()
        trained.cfg = cfg
        adapter, clock = None if changes is None else tg.adapter_for(trained, cfg, rt), tg.EvalClock(0.0, rt)
        clock.affordable_epochs = functools.partial(epochs_until, clock, 9)
        plan = tg.plan_evaluation(val, cfg, rt, stride, 16, bool(adapter))
        results.append(tg.evaluate("test", tg.scorer(trained, rt, adapter), val, cfg, rt, plan, adapter, clock).bpb)
    assert results[1] == pytest.approx(results[0], rel=1e-5) and counted.frame_count <= graphs


@pytest.mark.parametrize("mode", ["sliding", "sgd", "document"])
def test_ranks_share_the_windows(setting, tmp_path, mode):
    """The plans of all ranks together score every target once."""
    cfg, val, _ = setting
    stride, changes = MODES[mode]
    cfg = dataclasses.replace(cfg, **changes or {})
    scored = []
    for rank in range(3):
        rt = make_runtime(tmp_path, rank=rank, world_size=3)
        legs = tg.plan_documents(val, cfg, rt) if mode == "document" else tg.plan_stream(
            len(val.tokens) - 1, cfg, rt, stride, 16, changes is not None)
        for windows in (windows for leg in legs for windows in leg.batches):
            _, _, at, counted = windows.read(val.tokens)
            scored += at[counted].tolist()
    assert sorted(scored) == list(range(len(val.tokens) - 1))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_plans_of_all_ranks_together_score_each_target_once_and_before_its_lesson(data):
    """Any length, window, stride, chunk, batch and number of ranks."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    window = draw(1, 40)
    stride, chunk, targets, world = draw(1, window), draw(1, 90), draw(window, 400), draw(1, 5)
    cfg = dataclasses.replace(tg.Hyperparameters(), eval_seq_len=window, ttt_chunk_tokens=chunk)
    size, compiles, adapts = draw(1, 9), draw(0, 1), draw(0, 1)
    ranks = [make_runtime(".", rank=rank, world_size=world, compiles=bool(compiles)) for rank in range(world)]
    plans = [tg.plan_stream(targets, cfg, rt, stride, size, bool(adapts)) for rt in ranks]
    assert len({len(plan) for plan in plans}) == 1 and (adapts or len(plans[0]) == 1)
    times, tokens = torch.zeros(targets, dtype=torch.int), torch.arange(targets + 1)
    for i, legs in enumerate(zip(*plans)):
        assert len({(leg.train_tokens, leg.first, leg.progress) for leg in legs}) == 1, "the ranks learn in step"
        for windows in (windows for leg in legs for windows in leg.batches):
            ids, wanted, at, counted = windows.read(tokens)
            assert ids.shape == (len(windows), window) and wanted.shape == (len(windows), windows.keep)
            assert len(windows) <= size and (at[counted] >= i * chunk).all()
            times.index_add_(0, at[counted], torch.ones_like(at[counted], dtype=torch.int))
        lesson = legs[0].train_tokens
        if lesson:
            assert (legs[0].first, lesson) == (i * chunk, chunk)
            assert (times[:legs[0].first + lesson] == 1).all(), "all of it is scored, by some rank, before it is learnt"
    assert (times == 1).all() and legs[0].train_tokens == 0, "and the last chunk teaches nobody"


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_plans_of_documents(data):
    """Any documents, window, chunk, batch and number of ranks: each target once, from a window that begins no earlier
    than its document, and as late as that or its length allows."""
    draw = lambda low, high: data.draw(st.integers(low, high))
    targets, window, world = draw(2, 300), draw(1, 40), draw(1, 4)
    chunk, docs = draw(1, window), draw(1, 6)
    starts = sorted(data.draw(st.sets(st.integers(0, targets - 1), max_size=12)) | {draw(0, targets - 1)})
    tokens = torch.ones(targets + 1, dtype=torch.int32)
    tokens[starts] = 0
    val = tg.ValData(tokens, None, "", bos_id=0)
    cfg = dataclasses.replace(tg.Hyperparameters(), eval_seq_len=window, ttt_doc_chunk_tokens=chunk,
                              ttt_batch_docs=docs, ttt_min_doc_tokens=draw(0, 30), ttt_eval_seq_len=draw(0, 1) * 50,
                              ttt_warm_start_a=bool(draw(0, 1)), ttt_warm_chains=draw(1, 4),
                              ttt_chunk_ladder=f"{draw(2, 60)}:1" if chunk > 1 and draw(0, 1) else "")
    begins = torch.tensor(sorted({0, *starts}))
    times = torch.zeros(targets, dtype=torch.int)
    for rank in range(world):
        for leg in tg.plan_documents(val, cfg, make_runtime(".", rank=rank, world_size=world)):
            for windows in leg.batches:
                _, _, at, counted = windows.read(tokens)
                assert len(windows) == docs
                for start, row, use in zip(windows.bounds[0].tolist(), at, counted):
                    if use.any():
                        own = begins[torch.searchsorted(begins, row[use], right=True) - 1]
                        assert (own == own[0]).all(), "a window scores one document"
                        chunk, stop = windows.keep, [*begins[begins > own[0]], targets][0]
                        end = own[0] + ((row[use] - own[0]) // chunk + 1) * chunk
                        end = end.clamp(max=stop) if cfg.lengths_known else end
                        assert start == max(end[0] - cfg.doc_context, own[0])
                times.index_add_(0, at[counted], torch.ones_like(at[counted], dtype=torch.int))
    assert (times == 1).all()


def test_what_is_not_scored_once_is_no_result_and_no_lesson(setting, rt):
    _, val, _ = setting
    val = dataclasses.replace(val, tokens=val.tokens[:21], sizes=val.sizes[:21])
    scored = tg.Scored(val, rt)
    scored.commit(torch.arange(12), torch.ones(12))
    assert torch.equal(scored.training_tokens(4, 8), val.tokens[4:13])
    for first, count in ((4, 9), (12, 1), (0, 20)):
        with pytest.raises(tg.IllegalScore):
            scored.training_tokens(first, count)
    with pytest.raises(tg.IllegalScore, match="8 of 20 tokens"):
        scored.result("test", 0.0)
    scored.commit(torch.arange(12, 20), torch.ones(8))
    assert scored.result("test", 0.0).tokens == 20 and len(scored.training_tokens(0, 20)) == 21
    scored.commit(torch.tensor([7]), torch.ones(1))
    asked = torch.tensor([[6, 7, 8, 25]])
    assert scored.training_rows(asked, asked < 8).tolist() == [[True, False, False, False]]
    for act in (lambda: scored.training_tokens(0, 20), lambda: scored.result("test", 0.0)):
        with pytest.raises(tg.IllegalScore, match="1 of 20 tokens"):
            act()


def test_where_in_the_text_and_in_its_documents_the_nats_lie(setting, rt):
    """Against a loop over the targets; row i of the second table is 2^i - 1 to 2^(i+1) - 2 tokens into a document."""
    _, val, _ = setting
    tokens = val.tokens[:700].clone()
    tokens[tokens == val.bos_id] = val.bos_id + 7
    tokens[[0, 40, 41, 300, 699]] = val.bos_id
    val = dataclasses.replace(val, tokens=tokens, sizes=val.sizes[:700])
    nll, begins = torch.rand(699), 0
    stream, position = torch.zeros(256, 2, dtype=torch.double), torch.zeros(32, 2, dtype=torch.double)
    for i in range(699):  # target i is token i + 1, and a document's own BOS is the last target of the one before
        begins = i if tokens[i] == val.bos_id else begins
        pair = torch.tensor([nll[i].item(), val.sizes[i + 1].item()], dtype=torch.double)
        stream[256 * i // 699] += pair
        position[math.floor(math.log2(i - begins + 1))] += pair
    tables = tg.score_tables(val, nll)
    torch.testing.assert_close(torch.tensor(tables["stream"], dtype=torch.double), stream)
    torch.testing.assert_close(torch.tensor(tables["position"], dtype=torch.double), position)


def test_soft_cap_and_loss_are_in_fp32_whatever_the_activations_are(config):
    """Only the product itself is rounded; records/ttt_head measures what that costs."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((4, 32), (50, 32)))
    logits = tg.capped_logits(hidden, weight, 30.0)
    assert torch.equal(logits, 30 * torch.tanh(F.linear(hidden, weight).float() / 30))
    assert logits.dtype == torch.float32 and not torch.equal(logits, logits.bfloat16().float())
