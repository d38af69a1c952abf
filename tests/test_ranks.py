"""Two ranks over gloo: they decide together, whatever their clocks say, and end with the same weights.

Both ranks run through all scenarios in one pair of processes, because importing torch takes longer than they do.
"""
import dataclasses
import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_gpt as tg
from clocks import FakeTime
from conftest import ROOT, environment, scrambled

SCENARIOS = {}


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


def whole_run(cfg, rt, name, **changes):
    """A run of its own in a folder of its own, in the process group there is; returns its summary or its error."""
    folder = rt.folder / name
    cfg = dataclasses.replace(cfg, artifact_dir=str(folder), **changes)
    rt = dataclasses.replace(rt, folder=folder, log=tg.RunLog(folder, rt.run_id, rt.rank == 0, cfg.resume),
                             resumes=cfg.resume)
    export, weights = tg.export, []
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tg, "export", lambda *args: weights.append(digest(args[2])) or export(*args))
            return {**tg.run(cfg, rt), "weights": weights[0]}
    except tg.UserError as error:
        return {"error": str(error)}
    except KeyboardInterrupt:
        rt.finish_writing()
        return {"error": "interrupted"}


def in_steps(patch, act):
    """Calls act(number of steps so far) before each step of the optimisers."""
    taken, step = [], tg.Optimisers.step

    def counted(optimisers, plan):
        act(len(taken))
        taken.append(plan)
        return step(optimisers, plan)
    patch.setattr(tg.Optimisers, "step", counted)


@scenario
def agreement(cfg, rt, patch):
    return [rt.agree(0.1 + rt.rank), rt.agree(1e300 * (1 - 2 * rt.rank)), rt.broadcast_object(bytes([7 + rt.rank])).hex()]


@scenario
def clocks(cfg, rt, patch):
    """Rank 0 takes 1 s a step. Rank 1's clock runs ahead at first, then stands still."""
    steps = []
    for name, pace in (("ahead", 10.0), ("behind", 0.0)):
        with pytest.MonkeyPatch.context() as patch:
            FakeTime(patch).charge(tg.Optimisers, "step", pace if rt.rank else 1.0)
            summary = whole_run(cfg, rt, name, max_wallclock_seconds=7.0, iterations=40, ttt_enabled=False,
                                eval_stride=0, eval_max_seconds=0.0, warmdown_iters=4)
        steps.append([summary["steps"], summary["val_bpb_roundtrip"], summary["weights"]])
    return steps


@scenario
def evaluation_clock(cfg, rt, patch):
    """Learning costs rank 1 nothing and rank 0 much: both do as many passes, and end with the same weights."""
    clock = FakeTime(patch)
    clock.charge(tg.GPT, "nll", 0.01)
    clock.charge(torch.Tensor, "backward", 0.0 if rt.rank else 1.0)
    torch.manual_seed(0)
    cfg = dataclasses.replace(cfg, eval_max_seconds=12.0, ttt_chunk_tokens=64, ttt_epochs=3)
    model, val = tg.GPT(cfg), tg.ValData.open(cfg, rt)
    results = tg.final_scores(cfg, rt, model, val)
    bpb, tokens = {key: r.bpb for key, r in results.items()}, [r.tokens for r in results.values()]
    return [bpb, tokens, clock.now < 13, digest(model)]


@scenario
def resumed(cfg, rt, patch):
    """Killed on both ranks in step 7 and gone on with after step 4, with momentum and row memory of each one's own."""
    def at_seven(taken):
        if taken == 6:
            raise KeyboardInterrupt
    cfg = dataclasses.replace(cfg, iterations=9, checkpoint_every=4, normuon=True, ttt_enabled=False, eval_stride=0,
                              late_qat_threshold=0.5, warmdown_iters=6)
    whole = whole_run(cfg, rt, "whole")
    with pytest.MonkeyPatch.context() as inner:
        in_steps(inner, at_seven)
        parts = whole_run(cfg, rt, f"parts{rt.rank or ''}")  # the ranks share no files
    again = whole_run(cfg, rt, f"parts{rt.rank or ''}", resume=True)
    return [whole["weights"], parts["error"], again["weights"], again["steps"], again["val_bpb_roundtrip"]]


@scenario
def signalled(cfg, rt, patch):
    """SIGTERM reaches rank 1 only, in its third step: both save that step and stop."""
    def at_three(taken):
        rt.signals.number = signal.SIGTERM if rt.rank and taken == 2 else rt.signals.number
    cfg = dataclasses.replace(cfg, ttt_enabled=False, eval_stride=0)
    with pytest.MonkeyPatch.context() as inner:
        in_steps(inner, at_three)
        error = whole_run(cfg, rt, "signalled")["error"]
    rt.signals.number = rt.signals.agreed = 0
    return [error, whole_run(cfg, rt, "signalled", resume=True)["steps"]]


@scenario
def divergence(cfg, rt, patch):
    """Only rank 1 sees a loss that is none."""
    loss = tg.GPT.loss
    patch.setattr(tg.GPT, "loss", lambda *args, **kwargs: loss(*args, **kwargs) * (float("nan") if rt.rank else 1.0))
    return whole_run(cfg, rt, "diverged")["error"]


@scenario
def unequal_starts(cfg, rt, patch):
    """Each rank draws other initial weights; those of rank 0 count."""
    seed = torch.manual_seed
    patch.setattr(torch, "manual_seed", lambda value: seed(value + rt.rank))
    return whole_run(cfg, rt, "unequal", iterations=1, ttt_enabled=False, eval_stride=0)["weights"]


@scenario
def over_the_limit(cfg, rt, patch):
    return whole_run(cfg, rt, "over", iterations=1, artifact_limit_bytes=1000)["error"]


@scenario
def calibrated(cfg, rt, patch):
    """The ranks share the text of calibration; rank 0 rounds and writes, and both score what it wrote."""
    summary = whole_run(cfg, rt, "calibrated", iterations=2, gptq_enabled=True, gptq_calibration_batches=3,
                        ttt_enabled=False)
    return [summary["val_bpb_roundtrip"], summary["val_bpb_sliding"], summary["artifact_bytes"]]


@scenario
def fine_tuned(cfg, rt, patch):
    """The ranks read different text, and their clocks differ: all moves alike."""
    cfg = dataclasses.replace(cfg, clip_rule="waterfill", waterfill_nats=0.3, gptq_enabled=True, late_qat=False,
                              gptq_calibration_batches=1, tune_steps=12)
    torch.manual_seed(0)
    model, data = scrambled(tg.GPT(cfg)).eval(), tg.TrainData.open(cfg, rt)
    hessians = tg.calibrate(cfg, rt, model, data, 6, math.inf)
    factors = tg.loss_curvature(cfg, rt, model, data, 6, hessians, math.inf)
    rounded = tg.round_model(cfg, model, hessians, factors)
    tuned = tg.fine_tune(cfg, rounded, rt, model, data, 8, 100.0 * (1 + rt.rank))
    assert tuned is not rounded
    return torch.cat([codes.flatten() for codes, _ in tuned.values()]).tolist()


def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def on_a_rank(folder):
    """What each of the two processes does."""
    cfg = tg.Hyperparameters.from_env(tg.process_environment())
    rt = tg.Runtime.open(cfg)
    results = {}
    for name, function in SCENARIOS.items():
        with pytest.MonkeyPatch.context() as patch:
            results[name] = function(cfg, rt, patch)
    Path(folder, f"rank{rt.rank}.json").write_text(json.dumps(results))
    rt.close()


@pytest.fixture(scope="module")
def ranks(corpus, tmp_path_factory):
    """Scenario -> what it came to on each rank."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; import test_ranks; " \
           f"test_ranks.on_a_rank({str(folder)!r})"
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **environment(corpus, folder)}
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True, env={**settings, "RANK": str(rank), "LOCAL_RANK": str(rank)})
                 for rank in range(2)]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    both = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return folder, {name: [results[name] for results in both] for name in SCENARIOS}


def test_rank_0_decides(ranks):
    assert ranks[1]["agreement"] == [[0.1, 1e300, "07"]] * 2


def test_ranks_with_different_clocks_stop_at_the_same_step(ranks):
    first, second = ranks[1]["clocks"]
    assert first == second and [steps for steps, *_ in first] == [7, 7]


def test_ranks_with_different_clocks_adapt_in_step(ranks):
    first, second = ranks[1]["evaluation_clock"]
    assert first[0] == second[0] and first[1] == second[1] == [1699] * 3 and first[3] == second[3] and first[2]
    assert "passes over scored chunks were left out" in (ranks[0] / "logs/tiny.txt").read_text()


def test_a_run_of_two_ranks_goes_on_to_the_same_bits(ranks):
    first, second = ranks[1]["resumed"]
    assert first == second and first[0] == first[2] and first[1] == "interrupted" and first[3] == 9
    whole, parts = ((ranks[0] / name / "final_model.ptz").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_signal_to_one_rank_stops_both_after_the_same_step(ranks):
    assert ranks[1]["signalled"] == [["interrupted", 6]] * 2
    log = (ranks[0] / "signalled/logs/tiny.txt").read_text()
    assert "resume:step:3 from" in log and log.count("step:3/6 train_loss") == 1


def test_a_run_of_two_ranks_goes_on_with_one(ranks, corpus, run):
    """A checkpoint holds whole buffers: one rank goes on from it to nearly the same scores."""
    bpb = ranks[1]["resumed"][0][4]
    (run.folder / "runs/tiny").mkdir(parents=True)
    (run.folder / "runs/tiny/checkpoint.pt").write_bytes((ranks[0] / "parts/runs/tiny/checkpoint.before.pt").read_bytes())
    done = run(RESUME=1, ITERATIONS=9, CHECKPOINT_EVERY=4, NORMUON=1, TTT_ENABLED=0, EVAL_STRIDE=0,
               LATE_QAT_THRESHOLD=0.5, WARMDOWN_ITERS=6)
    assert done.code == 0 and "resume:step:8 from" in done.out, done.err
    assert done.summary["val_bpb_roundtrip"] == pytest.approx(bpb, rel=1e-4)


def test_a_rank_that_diverges_ends_all_of_them(ranks):
    first, second = ranks[1]["divergence"]
    assert first == second and "gradients of 3 steps in a row, up to step 3, are not finite" in first


def test_all_ranks_start_from_the_first_one_s_weights(ranks):
    first, second = ranks[1]["unequal_starts"]
    assert first == second


def test_all_ranks_hear_of_the_limit(ranks):
    first, second = ranks[1]["over_the_limit"]
    assert first == second and "is over ARTIFACT_LIMIT_BYTES=1,000" in first


def test_fine_tuning_is_that_of_one_rank_with_all_the_text(ranks, config, rt):
    first, second = ranks[1]["fine_tuned"]
    assert first == second
    codes = fine_tuned(config(), rt, None)
    assert sum(a != b for a, b in zip(codes, first, strict=True)) < 0.002 * len(codes)


def test_all_ranks_score_what_the_first_one_wrote(ranks, run):
    first, second = ranks[1]["calibrated"]
    assert first == second
    size = os.path.getsize(ranks[0] / "calibrated/final_model.ptz")
    done = run(ITERATIONS=2, GPTQ_ENABLED=1, GPTQ_CALIBRATION_BATCHES=3, TTT_ENABLED=0)
    assert first[2] == size and first[:2] == pytest.approx(
        [done.summary["val_bpb_roundtrip"], done.summary["val_bpb_sliding"]], rel=2e-4)
