"""Budgets under a clock that stands still but for what a step, a validation or a forward pass is said to take."""
import json
import re

import pytest
import torch
import train_gpt as tg
from clocks import FakeDevice, FakeTime

BRIEF = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "EVAL_MAX_SECONDS": 0}


@pytest.fixture
def clock(monkeypatch):
    return FakeTime(monkeypatch)


def events(folder, kind, name="tiny"):
    lines = (folder / f"logs/{name}.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


# ---- training

@pytest.mark.parametrize("variables", [
    {}, {"VAL_LOSS_EVERY": 2}, {"CHECKPOINT_EVERY": 2}, {"WARMUP_STEPS": 3}, {"TRAIN_LOG_EVERY": 0}],
    ids=["alone", "validation", "checkpoints", "warm-up", "no log"])
def test_only_steps_spend_the_training_time(run, clock, variables):
    clock.charge(tg.Optimisers, "step", 1.0)
    clock.charge(tg.GPT, "nll", 50.0)
    clock.charge(tg.TrainState, "pack", 50.0)
    done = run(MAX_WALLCLOCK_SECONDS=7, ITERATIONS=100, **BRIEF, **variables)
    assert (done.code, done.summary["steps"], done.summary["seconds"]["train"]) == (0, 7, 7.0)
    assert "stopping_early: wallclock_cap train_time:7000ms step:7/100" in done.out
    if variables.get("TRAIN_LOG_EVERY") != 0:
        assert [e["train_time_s"] for e in events(done.folder, "train")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_run_without_a_limit_takes_its_steps(run, clock):
    clock.charge(tg.Optimisers, "step", 1000.0)
    done = run(MAX_WALLCLOCK_SECONDS=0, ITERATIONS=5, **BRIEF)
    assert done.summary["steps"] == 5 and "stopping_early" not in done.out


def test_a_step_is_not_begun_when_the_time_is_spent(run, clock):
    """Steps of 3 s in 7 s: the third one ends the run, there is no fourth."""
    clock.charge(tg.Optimisers, "step", 3.0)
    assert run(MAX_WALLCLOCK_SECONDS=7, ITERATIONS=100, **BRIEF).summary["steps"] == 3
    assert run(MAX_WALLCLOCK_SECONDS=9, ITERATIONS=100, **BRIEF).summary["steps"] == 3


def test_the_first_step_s_compilation_does_not_hasten_the_warm_down(run, clock):
    """One step of 100 s, then 1 s each, 140 s in all: the last twenty steps are the last twenty seconds."""
    clock.charge(tg.Optimisers, "step", lambda n, *_: 1.0 if n else 100.0)
    done = run(MAX_WALLCLOCK_SECONDS=140, ITERATIONS=100_000, WARMDOWN_ITERS=20, LATE_QAT_THRESHOLD=0, **BRIEF)
    scales = {e["step"]: e["lr_scale"] for e in events(done.folder, "train")}
    assert len(scales) == 41
    wanted = {1: 1.0, 2: 1.0, **{step: min(1.0, (140 - (100 + step - 2)) / 20) for step in range(3, 42)}}
    assert scales == pytest.approx(wanted)


@pytest.mark.parametrize("limit, pace, steps", [(7, 3.0, 3), (9, 3.0, 3), (20, 1.0, 20), (2, 5.0, 1)])
@pytest.mark.parametrize("variables", [{}, {"VAL_LOSS_EVERY": 2, "CHECKPOINT_EVERY": 3}, {"WARMUP_STEPS": 3}],
                         ids=["alone", "paused", "warm-up"])
def test_with_a_queue_before_a_device_training_ends_within_one_step(run, clock, variables, limit, pace, steps):
    """The host is ahead of the device by a step: no step begins after the limit all the same, and the pauses for
    validation and checkpoints hold nothing that training has queued."""
    FakeDevice(clock, tg.Optimisers, "step", pace)
    clock.charge(tg.GPT, "nll", 50.0)
    clock.charge(tg.TrainState, "pack", 50.0)
    done = run(MAX_WALLCLOCK_SECONDS=limit, ITERATIONS=100, TRAIN_LOG_EVERY=0, **BRIEF, **variables)
    assert (done.code, done.summary["steps"], done.summary["seconds"]["train"]) == (0, steps, steps * pace), done.err


def test_the_device_s_queue_is_emptied_at_the_end_only(run, clock):
    """Later steps take longer than the mean so far: three steps before the limit the clock is right."""
    device = FakeDevice(clock, tg.Optimisers, "step", lambda n: 1.0 + 0.01 * n)
    done = run(MAX_WALLCLOCK_SECONDS=40, ITERATIONS=100, TRAIN_LOG_EVERY=0, **BRIEF)
    assert 40 <= done.summary["seconds"]["train"] < 41.4
    begun = [waiting > 0 for waiting in device.backlog]  # behind a step that still ran
    assert len(begun) > 30 and all(begun[3:-3])


def test_one_exchange_of_the_clock_a_step(run, clock, monkeypatch):
    clock.charge(tg.Optimisers, "step", 1.0)
    asked = clock.charge(tg.Runtime, "agree", 0.0)
    assert run(MAX_WALLCLOCK_SECONDS=7, ITERATIONS=100, **BRIEF).summary["steps"] == 7
    several = len(asked)
    assert run(MAX_WALLCLOCK_SECONDS=17, ITERATIONS=100, **BRIEF).summary["steps"] == 17
    assert len(asked) - several == several + 10


@pytest.mark.parametrize("variables, steps", [
    ({"GPTQ_RESERVE_SECONDS": 6}, 14), ({"GPTQ_RESERVE_SECONDS": 3}, 17), ({}, 20),
    ({"GPTQ_ENABLED": 0, "SIZE_FIT": 1, "GPTQ_RESERVE_SECONDS": 6}, 20),
    ({"GPTQ_ENABLED": 0, "GPTQ_RESERVE_SECONDS": 6}, 20)])
def test_calibration_takes_place_inside_the_training_time(run, clock, variables, steps):
    """Twenty seconds, a step takes one, a calibration batch a quarter; the reserve is 2 % where none is given."""
    clock.charge(tg.Optimisers, "step", 1.0)
    batches = clock.charge(tg.HessianSums, "__call__", lambda n, look, kind, *_: 0.25 if kind == "head" else 0.0)
    done = run(**{"MAX_WALLCLOCK_SECONDS": 20, "ITERATIONS": 100, "GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 1000,
                  **BRIEF, **variables})
    seconds = done.summary["seconds"]
    assert done.code == 0 and done.summary["steps"] == steps
    if variables.get("GPTQ_ENABLED") == 0:
        assert not batches and seconds["calibrate"] == 0
    elif variables:
        reserve = variables["GPTQ_RESERVE_SECONDS"]
        assert seconds["train"] == 20 - reserve and 0.25 * reserve < seconds["calibrate"] < reserve
        assert "warning: calibration" not in done.out
    else:
        assert "warning: calibration took" in done.out, "nothing was left: one batch, and a word about it"
        assert seconds["calibrate"] == 0.25


# ---- evaluation

@pytest.fixture
def scored(run, monkeypatch):
    """Scores a tiny artifact under a fake clock: a millisecond a token read, `learn_s` a backward pass, `first_s` more
    for the first forward pass, which compiles. Returns the run, with `spent` seconds."""
    made = run(ITERATIONS=2, TTT_ENABLED=0, EVAL_STRIDE=0)
    assert made.code == 0, made.err

    def score(limit, learn_s=0.0, first_s=0.0, load_s=0.0, **variables):
        with monkeypatch.context() as patch:
            clock = FakeTime(patch)
            clock.charge(tg.GPT, "nll", lambda n, model, ids, *_: 0.001 * ids.numel() + (0 if n else first_s))
            clock.charge(torch.Tensor, "backward", learn_s)
            clock.charge(tg, "load_model", load_s)
            done = run(**{"EVAL_ARTIFACT": made.summary["artifact_path"], "TTT_ENABLED": 1, "EVAL_STRIDE": 8,
                          "RUN_ID": "again", "EVAL_MAX_SECONDS": limit, "TTT_CHUNK_TOKENS": 64, "TTT_EPOCHS": 2,
                          "TTT_FREEZE_BLOCKS": 0, **variables})
        done.spent = clock.now
        return done
    return score


def test_one_clock_holds_for_all_final_scores_together(scored):
    """Adaptation takes half of the time. With a fifth less, the last walk must know what the others have spent."""
    free = scored(0, learn_s=0.3)
    assert free.code == 0, free.err
    tight = scored(0.8 * free.spent, learn_s=0.3)
    assert 0.7 * free.spent < tight.spent <= 0.8 * free.spent
    assert "passes over scored chunks were left out" in tight.out
    assert tight.summary["val_bpb_sliding"] == free.summary["val_bpb_sliding"]
    assert tight.summary["val_bpb_ttt"] != free.summary["val_bpb_ttt"] != free.summary["val_bpb_sliding"]
    roomy = scored(1.1 * free.spent, learn_s=0.3)
    assert roomy.summary["val_bpb_ttt"] == free.summary["val_bpb_ttt"] and "ttt_clock" not in roomy.out


def test_less_adaptation_never_less_scoring(scored):
    """Hardly time to score: every token is scored all the same, in every walk, and nothing is learnt."""
    still = scored(0, TTT_EPOCHS=0)
    done = scored(1.09 * still.spent, learn_s=0.3)
    assert done.code == 0 and done.spent < 1.09 * still.spent, done.err
    assert {e["tokens"] for e in events(done.folder, "evaluation", "again")} == {1699}
    assert done.summary["val_bpb_ttt"] == pytest.approx(done.summary["val_bpb_sliding"], rel=1e-6)


def test_compilation_is_not_taken_for_the_pace_of_scoring(scored):
    """The first forward pass takes 20 s, all others together take less than that: 60 s are enough."""
    done = scored(60, first_s=20.0)
    assert done.code == 0, done.err
    assert 25 < done.spent < 45
    late = scored(60, first_s=70.0)
    assert late.code == 2 and "do not count" in late.err and late.err.count("\n") == 1, "but it is time spent"


def test_a_second_graph_s_compilation_is_not_taken_for_the_pace_of_documents(scored, monkeypatch):
    """Longer chunks than a document's first need a graph of their own. It takes 20 s; adaptation goes on."""
    honest, lengths = tg.scorer, []

    def scorer(model, rt, adapter=None):
        def score(ids, *rest):
            tg.time.perf_counter.now += 20.0 * (bool(adapter) and ids.size(1) > 8 and not lengths)
            lengths.extend([ids.size(1)] * (bool(adapter) and ids.size(1) > 8))
            return honest(model, rt, adapter)(ids, *rest)
        return score
    monkeypatch.setattr(tg, "scorer", scorer)
    done = scored(120, TTT_MODE="lora", TTT_RESET="document", TTT_DOC_CHUNK_TOKENS=8, TTT_BATCH_DOCS=4, EVAL_STRIDE=0)
    assert done.code == 0 and len(lengths) > 2 and done.spent > 20, done.err
    assert "ttt_clock" not in done.out


def test_reading_the_artifact_is_time_spent(scored):
    done = scored(60, load_s=70.0)
    assert done.code == 2 and "do not count" in done.err


def test_scoring_that_cannot_be_done_in_time_is_refused_before_it_begins(scored):
    needed = scored(0, TTT_EPOCHS=0).spent
    done = scored(0.5 * needed, TTT_EPOCHS=0)
    assert done.code == 2 and done.spent < 0.2 * needed and "roundtrip" not in done.out
    said = re.fullmatch(r"error: EVAL_MAX_SECONDS=\S+ scoring alone would take about ([\d.]+) s; .*\n", done.err)
    assert float(said.group(1)) == pytest.approx(needed, rel=0.1)
