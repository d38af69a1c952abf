"""Killed and gone on with: the same bits, the same time, the same log; and no going on with another run's settings."""
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import train_gpt as tg
from clocks import FakeTime
from conftest import ROOT, environment

BRIEF = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "ITERATIONS": 12, "CHECKPOINT_EVERY": 4, "WARMDOWN_ITERS": 9,
         "COMPRESS": "lzma"}


@pytest.fixture
def alone(run):
    """The summary and the models of a run that nothing disturbs; of one for all tests with the same settings."""
    def start(**settings):
        key = tuple(settings.items())
        if key not in ALONE:
            done = run(ARTIFACT_DIR=run.folder / "alone", RESUME=0, **settings)
            assert done.code == 0, done.err
            ALONE[key] = done.summary, models(run.folder / "alone")
        return ALONE[key]
    return start


ALONE = {}


def models(folder):
    return [(folder / name).read_bytes() for name in ("final_model.pt", "final_model.ptz")]


@pytest.fixture
def killed(run, monkeypatch):
    """Ends a run with Ctrl-C in its step number `at`."""
    def start(at, **variables):
        with monkeypatch.context() as patch:
            taken, step = [], tg.Optimisers.step

            def counted(optimisers, plan):
                taken.append(plan)
                if len(taken) == at:
                    raise KeyboardInterrupt
                return step(optimisers, plan)
            patch.setattr(tg.Optimisers, "step", counted)
            done = run(RESUME=0, **variables)
        assert done.code == 130 and "RESUME=1" in done.err and "Traceback" not in done.err
        return done
    return start


def steps_of(folder):
    lines = (folder / "logs/tiny.jsonl").read_text().splitlines()
    return [(e["step"], e["train_loss"], e["lr_scale"]) for e in map(json.loads, lines) if e["event"] == "train"]


LATE = {"LATE_QAT_THRESHOLD": 0.5, "MATRIX_BITS": 4}  # 4.5 of the 9 last steps: from step 8 on (counted from 0)
KINDS = {  # name: (killed in step, resumed after step, settings)
    "ema": (7, 4, {"EMA_DECAY": 0.9, "LATE_QAT_THRESHOLD": 0}),
    "swa": (11, 8, {"SWA_ENABLED": 1, "SWA_EVERY": 1, "SWA_START_FRAC": 0.9}),
    "lawa": (7, 4, {"LAWA_ENABLED": 1, "LAWA_FREQ": 1, "LAWA_K": 20}),
    "normuon": (7, 4, {"NORMUON": 1, "EMA_ENABLED": 0}),
    "before late qat": (7, 4, {**LATE, "EMA_ENABLED": 0}),
    "before late qat, ema": (7, 4, LATE),
    "at late qat, ema": (9, 8, LATE),
    "after late qat, ema": (12, 8, {**LATE, "LATE_QAT_THRESHOLD": 0.8}),
    "after late qat, no restart": (12, 8, {**LATE, "LATE_QAT_THRESHOLD": 0.8, "EMA_RESET_AT_QAT": 0}),
    "by fraction, soft": (11, 8, {**LATE, "LATE_QAT_FRAC": 0.3, "SOFT_ROUND": 1, "EMA_ENABLED": 0}),
    "extra heads, untied": (7, 4, {"MTP_NUM_HEADS": 1, "TIE_EMBEDDINGS": 0, "EMA_ENABLED": 0}),
    "calibrated": (7, 4, {"GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 2}),
    "warmed up": (9, 4, {"WARMUP_STEPS": 2, "EMA_ENABLED": 0})}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_without_interruption(run, killed, kind):
    at, checkpoint, settings = KINDS[kind]
    settings = {**BRIEF, **settings}
    whole = run(ARTIFACT_DIR=run.folder / "whole", **settings)
    assert whole.code == 0, whole.err
    killed(at, ARTIFACT_DIR=run.folder / "parts", **settings)
    again = run(ARTIFACT_DIR=run.folder / "parts", RESUME=1, **settings)
    assert again.code == 0 and f"resume:step:{checkpoint} from" in again.out, again.err
    for name in ("final_model.pt", "final_model.ptz"):
        assert (run.folder / "parts" / name).read_bytes() == (run.folder / "whole" / name).read_bytes(), name
    wanted, got = (steps_of(run.folder / name) for name in ("whole", "parts"))
    done = at - 1 - settings.get("WARMUP_STEPS", 0)
    assert got == wanted[:done] + wanted[checkpoint:], "the log of the first part stays, and the steps go on in it"
    assert again.summary["val_bpb_roundtrip"] == whole.summary["val_bpb_roundtrip"]
    assert again.summary["steps"] == 12


def test_the_log_of_the_run_so_far_is_kept(run, killed):
    killed(7, **BRIEF)
    before = {kind: (run.folder / f"logs/tiny.{kind}").read_text() for kind in ("txt", "jsonl")}
    assert "step:6/12 train_loss" in before["txt"] and "step:7/12 train_loss" not in before["txt"]
    assert run(**BRIEF, RESUME=1).code == 0
    for kind, text in before.items():
        after = (run.folder / f"logs/tiny.{kind}").read_text()
        assert after.startswith(text) and len(after) > len(text)
    assert run(**BRIEF, RESUME=0).code == 0
    text = (run.folder / "logs/tiny.txt").read_text()
    assert text.count("step:1/12 train_loss") == 1 and "resume:step" not in text, "a run from its start has a new log"


def test_the_time_spent_before_counts(run, killed, monkeypatch):
    """One step of 30 s, then 1 s each, 50 s in all, with a warm-down by the clock. Killed in step 11, resumed after
    step 8, which is 37 s: 13 more steps, at the rates of the run left alone."""
    settings = {**BRIEF, "ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 50, "WARMDOWN_ITERS": 15, "EVAL_MAX_SECONDS": 0}
    compiles = lambda n, *_: 1.0 if n else 30.0
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", compiles)
        whole = run(ARTIFACT_DIR=run.folder / "whole", **settings)
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", compiles)
        killed(11, ARTIFACT_DIR=run.folder / "parts", **settings)
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", 1.0)
        again = run(ARTIFACT_DIR=run.folder / "parts", RESUME=1, **settings)
    assert whole.summary["steps"] == again.summary["steps"] == 21
    assert again.summary["seconds"]["train"] == 50.0
    wanted, got = (steps_of(run.folder / name) for name in ("whole", "parts"))
    assert got == wanted[:10] + wanted[8:] and wanted[-1][2] < 0.2
    assert (run.folder / "parts/final_model.ptz").read_bytes() == (run.folder / "whole/final_model.ptz").read_bytes()


def test_what_a_resumed_run_compiles_is_not_counted(run, killed, monkeypatch):
    """It warms up before its clock starts, and from the checkpoint's state on: 12 steps of 1 s, whoever compiles."""
    settings = {**BRIEF, "ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 12, "WARMUP_STEPS": 2, "EVAL_MAX_SECONDS": 0}
    done = []
    for resume in (0, 1):
        with monkeypatch.context() as patch:
            FakeTime(patch).charge(tg.Optimisers, "step", lambda n, *_: 1.0 if n else 30.0)
            if resume:
                killed(11, ARTIFACT_DIR=run.folder / "1", **settings)
        with monkeypatch.context() as patch:
            FakeTime(patch).charge(tg.Optimisers, "step", lambda n, *_: 1.0 if n else 30.0)
            done.append(run(ARTIFACT_DIR=run.folder / str(resume), RESUME=resume, **settings))
    for ended in done:
        assert (ended.code, ended.summary["steps"], ended.summary["seconds"]["train"]) == (0, 12, 12.0), ended.err
        assert "warmup_step:2/2" in ended.out
    assert (run.folder / "1/final_model.ptz").read_bytes() == (run.folder / "0/final_model.ptz").read_bytes()


# ---- files

def checkpoint(done, kind=""):
    return done.folder / f"runs/tiny/checkpoint{kind}.pt"


def step_in(path):
    return torch.load(path, weights_only=True)["step"]


@pytest.mark.parametrize("variables, steps", [
    ({"CHECKPOINT_EVERY": 4}, [4, 8, 10]), ({"CHECKPOINT_EVERY": 5}, [5, 10]), ({}, [10]),
    ({"CHECKPOINT_SECONDS": 35}, [4, 8, 10]), ({"CHECKPOINT_SECONDS": 0}, [10]),
    ({"CHECKPOINT_SECONDS": 60, "CHECKPOINT_EVERY": 4}, [4, 8, 10]), ({"CHECKPOINT_SECONDS": 45}, [5, 10])], ids=str)
def test_checkpoints_come_by_steps_by_time_and_at_the_end(run, monkeypatch, variables, steps):
    """Steps of ten seconds: of themselves, runs shorter than two minutes have the last one only. Two are kept."""
    saved, save = [], tg.save_checkpoint
    monkeypatch.setattr(tg, "save_checkpoint", lambda cfg, rt, state: saved.append(state.step) or save(cfg, rt, state))
    FakeTime(monkeypatch).charge(tg.Optimisers, "step", 10.0)
    done = run(**{**BRIEF, "ITERATIONS": 10, "CHECKPOINT_EVERY": 0, "EVAL_MAX_SECONDS": 0, **variables})
    assert done.code == 0 and saved == steps, done.err
    assert step_in(checkpoint(done)) == 10 and checkpoint(done, ".before").exists() == (len(steps) > 1)
    assert len(steps) == 1 or step_in(checkpoint(done, ".before")) == steps[-2]


def test_a_checkpoint_is_written_while_training_goes_on_with_what_it_was(run, monkeypatch):
    """The disk is so slow that the checkpoint of step 4 is not written before step 7 is taken."""
    taken, step, write = [], tg.Optimisers.step, tg.write_atomically
    seventh = threading.Event()

    def counted(*args):
        taken.append(1)
        if len(taken) == 7:
            seventh.set()
        return step(*args)

    def slow(path, *args):
        assert path.name != "checkpoint.pt" or seventh.wait(60)
        return write(path, *args)
    whole = run(**BRIEF, ARTIFACT_DIR=run.folder / "whole")
    monkeypatch.setattr(tg.Optimisers, "step", counted)
    monkeypatch.setattr(tg, "write_atomically", slow)
    done = run(**BRIEF)
    assert done.code == 0 and step_in(checkpoint(done)) == 12 and step_in(checkpoint(done, ".before")) == 8
    for kind in ("", ".before"):
        got, wanted = (torch.load(folder / f"runs/tiny/checkpoint{kind}.pt", weights_only=True)["model"]
                       for folder in (run.folder, run.folder / "whole"))
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_a_full_disk_does_not_end_training(run, monkeypatch):
    """The last of three checkpoints fits again. What is missing is said twice: at once and at the end."""
    write, tried = tg.write_atomically, []

    def full(path, *args):
        if path.name == "checkpoint.pt":
            tried.append(1)
            if len(tried) < 3:
                raise tg.UserError(f"cannot write {path} (7 bytes): No space left on device")
        write(path, *args)
    monkeypatch.setattr(tg, "write_atomically", full)
    done = run(**BRIEF)
    assert done.code == 0 and done.summary["steps"] == 12 and step_in(checkpoint(done)) == 12
    said = f"cannot write {checkpoint(done)} (7 bytes): No space left on device"
    assert done.out.count(f"warning: {said}; the run goes on\n") == done.out.count(f"not written     {said}\n") == 2
    assert done.err == "" and not checkpoint(done, ".before").exists()


def test_weights_that_are_not_finite_do_not_take_the_place_of_a_checkpoint(run, monkeypatch):
    """A gradient that is finite all the same: step 8 writes NaN, and the run ends three steps later."""
    step, taken = tg.Optimisers.step, []

    def broken(optimisers, plan):
        norm = step(optimisers, plan)
        taken.append(1)
        if len(taken) == 8:
            optimisers.muon.banks[0].data[0, 0, 0] = torch.nan
        return norm
    monkeypatch.setattr(tg.Optimisers, "step", broken)
    done = run(**BRIEF)
    assert done.code == 2 and "up to step 11, are not finite" in done.err
    assert "warning: no checkpoint of step 8: its weights are not finite" in done.out and step_in(checkpoint(done)) == 4


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "cut":
        data = data[:len(data) // 2]
    elif kind == "longer":
        data += b"x"
    else:
        data[int(kind * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "longer", 0.0, 0.3, 0.99, 1.0])
def test_from_a_damaged_checkpoint_to_the_one_before(run, killed, alone, kind):
    done = killed(11, **BRIEF)
    assert [step_in(checkpoint(done, which)) for which in ("", ".before")] == [8, 4]
    damage(checkpoint(done), kind)
    (done.folder / "runs/tiny/.checkpoint.pt.77.tmp").write_bytes(b"killed while it was written")
    again = run(**BRIEF, RESUME=1)
    assert again.code == 0 and "resume:step:4 from" in again.out, again.err
    assert f"warning: checkpoint {checkpoint(done)} is damaged\n" in again.out
    assert models(done.folder) == alone(**BRIEF)[1]
    assert sorted(path.name for path in (done.folder / "runs/tiny").glob("*checkpoint*")
                  if path.suffix != ".json") == ["checkpoint.before.pt", "checkpoint.pt"]


def test_no_checkpoint_that_is_whole(run, killed):
    done = killed(11, **BRIEF)
    for which in ("", ".before"):
        damage(checkpoint(done, which), 0.5)
    again = run(**BRIEF, RESUME=1)
    assert (again.code, again.err) == (2, f"error: no checkpoint in {checkpoint(done).parent} is whole; start without "
                                          "RESUME=1\n")


@pytest.mark.parametrize("resume", [1, 0], ids=["by RESUME=1", "by torchrun"])
def test_killed_between_two_renamings(run, killed, monkeypatch, resume):
    """The newest has become the one before, and its successor has not yet its name."""
    done = killed(11, **BRIEF)
    checkpoint(done).replace(checkpoint(done, ".before"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(1 - resume))
    again = run(**BRIEF, RESUME=resume)
    assert again.code == 0 and "resume:step:8 from" in again.out and "damaged" not in again.out


# ---- phases after training

WHOLE = {"ITERATIONS": 4, "WARMDOWN_ITERS": 3, "GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 2, "VAL_LOSS_EVERY": 0,
         "COMPRESS": "lzma"}
SCORES = ("val_bpb_pre_quant", "val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt", "steps", "tokens",
          "artifact_bytes")


def stop_in(patch, phase):
    """Ctrl-C in a phase: a function, the writing of a file or an evaluation."""
    def stop(*args, **kwargs):
        raise KeyboardInterrupt
    write, evaluate = tg.write_atomically, tg.evaluate
    if hasattr(tg, phase):
        patch.setattr(tg, phase, stop)
    patch.setattr(tg, "write_atomically", lambda path, *args: stop() if path.name == phase else write(path, *args))
    patch.setattr(tg, "evaluate", lambda name, *args, **kwargs: (
        stop if name == phase else evaluate)(name, *args, **kwargs))


@pytest.mark.parametrize("phase", [
    "calibrate", "post_average", "round_model", "final_model.pt", "final_model.ptz", "final_int6_roundtrip",
    "legal_ttt", "eval.json", "summary.json"])
def test_a_run_stopped_after_training_goes_on_from_there(run, alone, monkeypatch, phase):
    summary, files = alone(**WHOLE)
    with monkeypatch.context() as patch:
        stop_in(patch, phase)
        assert run(**WHOLE).code == 130
    steps = FakeTime(monkeypatch).charge(tg.Optimisers, "step", 0.0)
    again = run(**WHOLE, RESUME=1)
    assert again.code == 0 and not steps, again.err
    assert [again.summary[key] for key in SCORES] == [summary[key] for key in SCORES]
    assert models(run.folder) == files
    assert json.loads((run.folder / "logs/tiny.summary.json").read_text()) == again.summary


def test_a_resumed_run_validates_the_model_that_was_saved(run, killed):
    """Before the loop of layers begins, at the step of the checkpoint itself."""
    settings = {**BRIEF, "NUM_LOOPS": 2, "LOOP_START": 1, "LOOP_END": 1, "ENABLE_LOOPING_AT": 0.9, "VAL_LOSS_EVERY": 4}
    log = killed(11, **settings).folder / "runs/tiny/events.jsonl"
    assert run(**settings, RESUME=1).code == 0
    events = [json.loads(line) for line in log.read_text().splitlines()]
    before, after = (e["val_bpb"] for e in events if e["event"] == "validation" and e["step"] == 8)
    assert before == after


@pytest.mark.parametrize("variables, steps", [
    ({"NGRAM_ORDERS": "1,2"}, 0), ({"EVAL_STRIDE": 16, "TTT_LR": 0.1, "TRAIN_LOG_EVERY": 0}, 0),
    ({"PHASED_TTT_PREFIX_DOCS": 5, "GLOBAL_TTT_LR": 0.1}, 0),
    ({"TUNE_STEPS": 5, "PRUNE_FRAC": 0.1}, 0), ({"COMPRESS": "range"}, 0), ({"GPTQ_CALIBRATION_BATCHES": 1}, 0), ({"CODE_BYTES": 99}, 0), ({"ITERATIONS": 6}, 2),
    ({"artifact": b"another"}, 0), ({"checkpoint": ".before"}, 2)], ids=str)
def test_a_finished_run_goes_on_with_other_settings(run, monkeypatch, variables, steps):
    settings = {**WHOLE, "TTT_ENABLED": 0, "CHECKPOINT_EVERY": 2}
    done = run(**settings)
    if "artifact" in variables:
        (run.folder / "final_model.ptz").write_bytes(variables["artifact"])
    if "checkpoint" in variables:
        checkpoint(done, ".before").replace(checkpoint(done))
    taken = FakeTime(monkeypatch).charge(tg.Optimisers, "step", 0.0)
    again = run(**{**settings, **{name: value for name, value in variables.items() if name.isupper()}, "RESUME": 1})
    assert (again.code, len(taken)) == (0, steps), again.err


def test_a_finished_run_resumed_shows_its_models_again_and_clears_up(run):
    run(**BRIEF)
    files = models(run.folder)
    for kind in ("pt", "ptz"):
        (run.folder / f"final_model.{kind}").unlink()
    (run.folder / "runs/tiny/.final_model.ptz.77.tmp").write_bytes(b"killed while it was written")
    assert run(**BRIEF, RESUME=1).code == 0
    assert models(run.folder) == files
    assert not list(run.folder.glob("runs/tiny/.*"))


@pytest.mark.parametrize("name", ["final_model.pt", "eval.json", "summary.json"])
def test_what_a_run_can_do_without_is_missed_at_its_end(run, monkeypatch, name):
    write = tg.write_atomically

    def full(path, *args):
        if path.name == name:
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, *args)
    monkeypatch.setattr(tg, "write_atomically", full)
    done = run(**BRIEF)
    assert done.code == 0 and done.summary["val_bpb_roundtrip"] > 0
    assert done.out.count(f"{name}: No space left on device\n") == 1, "under what was not written"


def test_an_artifact_that_does_not_fit_goes_elsewhere(run, monkeypatch, tmp_path_factory):
    write, spare = tg.write_atomically, tmp_path_factory.mktemp("spare")
    monkeypatch.setattr(tg.tempfile, "tempdir", str(spare))

    def full(path, *args):
        if path == run.folder / "runs/tiny/final_model.ptz":
            raise tg.UserError(f"cannot write {path}: No space left on device")
        write(path, *args)
    monkeypatch.setattr(tg, "write_atomically", full)
    done = run(**BRIEF)
    assert done.code == 0 and done.summary["artifact_path"] == str(spare / "tiny.ptz")
    assert f"not written     cannot write {run.folder / 'runs/tiny/final_model.ptz'}: No space left on device; the artifact is " \
           f"{spare / 'tiny.ptz'}\n" in done.out


# ---- signals, restarts, two runs of one name

@pytest.fixture
def signalled(run, monkeypatch):
    """Sends signals to a run as it calls owner.name for the `at`-th time."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background may ignore it

    def start(numbers, owner, name, at=1, **variables):
        with monkeypatch.context() as patch:
            original, calls = getattr(owner, name), []

            def sending(*args, **kwargs):
                calls.append(1)
                for number in numbers if len(calls) == at else ():
                    signal.raise_signal(number)
                return original(*args, **kwargs)
            patch.setattr(owner, name, sending)
            handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
            done = run(**variables)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
        return done
    yield start
    signal.signal(signal.SIGINT, before)


TO_GO_ON = "; to go on from the last checkpoint: bash run.sh ... RESUME=1 RUN_ID=tiny\n"


@pytest.mark.parametrize("numbers", [[signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGTERM]], ids=str)
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(run, alone, signalled, numbers):
    """The second of two at once is the same one, passed on by torchrun."""
    summary, files = alone(**BRIEF)
    done = signalled(numbers, tg.Optimisers, "step", 6, **BRIEF)
    assert done.code == 128 + numbers[0] and done.err == f"interrupted ({numbers[0].name}){TO_GO_ON}"
    assert step_in(checkpoint(done)) == 6 and "step:6/12 train_loss" in done.out and "step:7" not in done.out
    again = run(**BRIEF, RESUME=1)
    assert again.code == 0 and "resume:step:6 from" in again.out, "no step is lost"
    assert models(run.folder) == files and again.summary["val_bpb_roundtrip"] == summary["val_bpb_roundtrip"]


def test_a_signal_in_a_validation_does_not_wait_for_its_end(run, signalled):
    """In batch 3 of 14 of the second validation, after step 6, which is saved before it."""
    settings = {**BRIEF, "CHECKPOINT_EVERY": 0, "VAL_LOSS_EVERY": 6, "VAL_BATCH_SIZE": 128}
    done = signalled([signal.SIGTERM], tg.Progress, "update", 14 + 3, **settings)
    assert done.code == 143 and done.err == f"interrupted (SIGTERM){TO_GO_ON}"
    assert step_in(checkpoint(done)) == 6 and "step:6/12 val_loss" not in done.out and "step:7" not in done.out


@pytest.mark.parametrize("name, at, saved", [("warm_up", 1, False), ("train_step", 2, False), ("report_chunk", 1, True),
                                             ("calibrate", 1, True)])
def test_a_signal_outside_of_training_ends_the_run_at_once(run, signalled, name, at, saved):
    """train_step's second call is in the warm-up."""
    done = signalled([signal.SIGTERM], tg, name, at, **{**WHOLE, "WARMUP_STEPS": 3})
    assert done.code == 143 and done.out.count("warmup_step:") == (3 if saved else at - 1)
    assert done.err == f"interrupted (SIGTERM){TO_GO_ON if saved else '; there is no checkpoint to go on from' + chr(10)}"
    assert "legal_ttt_exact" not in done.out


def test_a_second_signal_stops_the_process(monkeypatch):
    sent, now = [], [0.0]
    monkeypatch.setattr(tg, "signal", SimpleNamespace(**{**vars(signal), "raise_signal": sent.append,
                                                         "signal": lambda *args: sent.append(args)}))
    monkeypatch.setattr(tg.time, "monotonic", lambda: now[0])
    signals = tg.Signals()
    for now[0] in (5.0, 5.9):
        signals(signal.SIGTERM, None)
    assert signals.number == signal.SIGTERM and not sent
    now[0] = 6.1
    signals(signal.SIGINT, None)
    assert sent == [(signal.SIGINT, signal.SIG_DFL), signal.SIGINT]


def test_a_signal_that_the_process_ignores_stays_ignored(run, signalled):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        done = signalled([signal.SIGINT], tg.Optimisers, "step", 6, **BRIEF)
    finally:
        signal.signal(signal.SIGINT, before)
    assert done.code == 0


def test_a_second_run_of_the_same_name_is_refused(run, corpus):
    done = run(**BRIEF)
    path, text = done.folder / "runs/tiny/log.txt", (done.folder / "logs/tiny.txt").read_text()
    with open(path) as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for resume in (0, 1):
            refused = run(**BRIEF, RESUME=resume)
            assert refused.code == 2 and refused.err == (
                f"error: another run with RUN_ID=tiny is going on: it writes {path}\n")
    assert path.read_text() == text
    assert run(**BRIEF).code == 0


def test_torchrun_s_restart_resumes_by_itself(run, killed, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fresh = run(**BRIEF)
    assert fresh.code == 0 and "resume:" not in fresh.out, "the first part did not come to a checkpoint"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    killed(7, **BRIEF)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    again = run(**BRIEF)
    assert again.code == 0 and "resume:step:4 from" in again.out


UNDER_TORCHRUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train_gpt as tg
step, taken = tg.train_step, []
def failing(*args):
    taken.append(1)
    if len(taken) == 6 and os.environ["RANK"] == "1":
        {act}
    return step(*args)
tg.train_step = failing
sys.exit(tg.main([]))
"""


@pytest.mark.parametrize("act, restarts, code, said", [
    ("raise tg.UserError('no more')", 0, 2, "error: rank 1: no more\n"),
    ("os.kill(os.getppid(), signal.SIGTERM)", 0, 143, f"interrupted (SIGTERM){TO_GO_ON}"),
    ("os.kill(os.getpid(), signal.SIGKILL)", 1, 137, "error: rank 1 was ended by SIGKILL\n")],
    ids=["user's error", "launcher ended", "killed, restarted, killed"])
def test_under_torchrun_one_line_tells_why(corpus, tmp_path, act, restarts, code, said):
    """In the sixth step of rank 1; of the second try, which begins after the fourth, too."""
    program = tmp_path / "program.py"
    program.write_text(UNDER_TORCHRUN.format(root=str(ROOT), act=act))
    command = [sys.executable, str(ROOT / "tools/launch.py"), "--standalone", "--nproc_per_node=2",
               f"--max-restarts={restarts}", str(program)]
    variables = environment(corpus, tmp_path, **{**BRIEF, "CHECKPOINT_EVERY": 2, "WARMDOWN_ITERS": 3})
    done = subprocess.run(command, text=True, capture_output=True, timeout=120,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **variables})
    assert (done.returncode, done.stderr) == (code, said)
    if restarts:
        assert "resume:step:4 from" in done.stdout and "step:9/12 train_loss" in done.stdout
    if code == 143:
        assert step_in(tmp_path / "runs/tiny/checkpoint.pt") == 6


# ---- settings

@pytest.fixture
def saved(config, rt):
    """The settings of a run with a checkpoint, and a way to go on from it with others."""
    cfg = config(iterations=12)
    model = tg.GPT(cfg)
    state = lambda: tg.TrainState.initial(model, cfg, rt)
    tg.save_checkpoint(cfg, rt, dataclasses.replace(state(), step=4))
    rt.finish_writing()
    return cfg, lambda other: tg.load_checkpoint(other, rt, state())


OTHERS = {"seed": 7, "train_seq_len": 64, "train_batch_tokens": 512, "warmdown_iters": 8, "warmdown_frac": 0.5,
          "min_lr": 0.1, "qat_enabled": True, "late_qat_threshold": 0.3, "late_qat_frac": 0.5, "soft_round": True,
          "ema_reset_at_qat": False, "mlp_quant_bits": 5, "attn_qat_bits": 5, "embed_bits": 5, "clip_rule": "amax",
          "clip_widen": 2.0, "fp16_keep_name_patterns": "kv"}


def another(f, cfg):
    value = getattr(cfg, f.name)
    return {"bool": lambda: not value, "int": lambda: value + 1, "float": lambda: value * 0.5 + 0.001,
            "str": lambda: f"{value}0"}[f.type]()


@pytest.mark.parametrize("section", ["Model", "Optimisers", "Averaging", "others"])
def test_what_shapes_a_run_cannot_be_changed_in_its_middle(saved, section):
    cfg, go_on = saved
    changed = OTHERS if section == "others" else {f.name: another(f, cfg) for f in tg.settings_by_section()[section]}
    for name, value in changed.items():
        with pytest.raises(tg.UserError, match=f"was made with another {name.upper()}"):
            go_on(dataclasses.replace(cfg, **{name: value}))
    go_on(cfg)


FREE = {"RESUME": 1, "ITERATIONS": 9, "MAX_WALLCLOCK_SECONDS": 500, "VAL_LOSS_EVERY": 3, "TRAIN_LOG_EVERY": 0,
        "CHECKPOINT_EVERY": 0, "CHECKPOINT_SECONDS": 0, "CODE_BYTES": 77, "MICRO_BATCH_TOKENS": 128, "VAL_BATCH_SIZE": 64, "EVAL_STRIDE": 16, "TTT_ENABLED": 1,
        "TTT_LR": 0.01, "COMPRESS": "range", "GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 1, "EVAL_BATCH_SEQS": 8,
        "SIZE_FIT": 1, "ARTIFACT_LIMIT_BYTES": 15_000_000, "HASH_EMBED_BUCKETS": 64}


def test_what_does_not_may_be_changed(run, killed):
    killed(7, **BRIEF)
    done = run(**{**BRIEF, **FREE})
    assert done.code == 0 and done.summary["steps"] == 9, done.err


@pytest.mark.parametrize("variables", [{"TRAIN_BATCH_TOKENS": 512}, {"TRAIN_SEQ_LEN": 64}, {"SEED": 1},
                                       {"MODEL_DIM": 64}, {"NORMUON": 1}, {"SEED": 1, "EMA_DECAY": 0.5}],
                         ids=lambda variables: "+".join(variables))
def test_another_run_s_checkpoint_is_refused_in_one_line_and_survives(run, variables):
    assert run(**{**BRIEF, "ITERATIONS": 4}).code == 0
    path = run.folder / "runs/tiny/checkpoint.pt"
    before, artifact = path.read_bytes(), (run.folder / "final_model.ptz").read_bytes()
    done = run(**{**BRIEF, "RESUME": 1, **variables})
    names = ", ".join(sorted(variables))
    assert done.code == 2 and done.err == f"error: checkpoint {path} was made with another {names}\n"
    assert path.read_bytes() == before and (run.folder / "final_model.ptz").read_bytes() == artifact


@pytest.mark.parametrize("left_out", ["settings", "elapsed_s", "model", "step", "averager"])
def test_a_whole_file_that_is_no_checkpoint(saved, rt, left_out):
    path = tg.checkpoint_path(rt)
    held = torch.load(path, weights_only=True)
    del held[left_out]
    path.write_bytes(tg.with_digest(tg.torch_bytes(held)))
    with pytest.raises(tg.UserError, match=r"cannot be read \(KeyError\); start without RESUME=1"):
        saved[1](saved[0])


def test_a_checkpoint_is_no_pickle_of_code(config, rt):
    """Somebody else's checkpoint must not run anything."""
    path = tg.checkpoint_path(rt)
    path.parent.mkdir(parents=True)

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)
    path.write_bytes(tg.with_digest(tg.torch_bytes({"settings": Trap()})))
    with pytest.raises(tg.UserError, match="cannot be read"):
        tg.load_checkpoint(config(), rt, None)


def test_what_a_checkpoint_costs_is_measured_beside_its_write(config, rt, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import checkpoint_cost
    checkpoint_cost.measure(config(), rt, 2)
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 4 and out[-1].startswith(f"{tg.checkpoint_path(rt).stat().st_size:,} bytes. Medians: ")
