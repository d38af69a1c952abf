"""Sweeps: what is refused before anything runs, retries, going on after a kill, tables."""
import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import train_gpt as tg
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import stats  # noqa: E402
import study  # noqa: E402
import sweep  # noqa: E402
from shell import UsageError  # noqa: E402

FAKE = """import json, os, sys, time
settings = dict(pair.split("=", 1) for pair in sys.argv if "=" in pair)
folder = os.path.join(os.environ["ARTIFACT_DIR"], "runs", os.environ["RUN_ID"])
os.makedirs(folder, exist_ok=True)
with open(os.path.join(folder, "tries"), "a") as f:
    f.write("x")
tries = os.path.getsize(f.name)
with open(os.path.join(folder, "given.jsonl"), "a") as f:
    f.write(json.dumps({"arguments": sys.argv[1:], **os.environ}) + "\\n")
if settings["LEAKY_SLOPE"] == "0.9" or settings["LEAKY_SLOPE"] == "0.5" and settings["SEED"] == "2" and tries == 1:
    sys.exit("error: out of luck")
bpb = float(settings["LEAKY_SLOPE"]) + 0.01 * int(settings["SEED"])
log = open(os.path.join(folder, "events.jsonl"), "w")
put = lambda **event: (log.write(json.dumps(dict(event, time=1.0)) + "\\n"), log.flush())
put(event="settings", all={"seed": 1}, pid=os.getpid(), host=os.uname().nodename)
for step in (1, 2):
    put(event="validation", step=step, train_time_s=1.0, val_loss=1.0, val_bpb=bpb)
    open(os.path.join(folder, "checkpoint.pt"), "w").close()
    time.sleep(float(settings.get("MATRIX_LR", 0)))
put(event="artifact", bytes=900, code_bytes=100, ledger=[])
put(event="evaluation", name="legal_ttt", bpb=bpb, loss=1.0, tokens=1, bytes=1, seconds=1.0)
open(os.path.join(folder, "log.txt"), "w").write("summary: {}\\n")
"""


def test_axes_as_they_are_written():
    assert study.read_axis("SEED", "1,2") == ["1", "2"] and study.read_axis("DATA_PATH", "./a/b") == ["./a/b"]
    assert study.read_axis("VE_LAYERS", "1,2/3") == ["1,2", "3"]
    assert study.read_axis("MATRIX_LR", "0.01..0.2") == study.Range(0.01, 0.2) and study.Range(0.01, 0.2).log
    assert study.read_axis("XSA_LAST_N", "2..5") == study.Range(2, 5) and not study.Range(2, 5).log
    axes = {key: study.read_axis(key, text) for key, text in (("SEED", "1,2"), ("TTT_LORA_TARGETS", "q,v/o"))}
    assert study.grid(axes) == [{"SEED": a, "TTT_LORA_TARGETS": b} for a in "12" for b in ("q,v", "o")]


@pytest.mark.parametrize("arguments, said", [
    (["smoke", "LEAKY_SLOP=0.1,0.2"], "LEAKY_SLOP is not a setting; did you mean LEAKY_SLOPE?"),
    (["smoke", "LEAKY_SLOPE=0.1,7"], "LEAKY_SLOPE=7 is out of range"),
    (["smoke", "MATRIX_LR=x,0.1"], "MATRIX_LR='x' is not a number"), (["smoke", "SEED=3"], "nothing varies"),
    (["smoke", "NUM_HEADS=4,3"], "is not divisible by"), (["smok", "SEED=1,2"], "no profile 'smok'; did you mean"),
    (["smoke", "MATRIX_LR=0.1..0.2"], "needs --sampler tpe"), (["smoke", "MATRIX_LR=0.2..0.1"], "a range goes up"),
    (["smoke", "MATRIX_LR=0.1..0.2", "--sampler", "tpe"], "needs --trials"), (["x.toml"], "cannot read x.toml"),
    (["smoke", "SEED=1,2", "--jobs", "0"], "--jobs 0 is out of range"),
    (["smoke", "RUN_ID=a,b"], "a sweep sets itself"), (["smoke", "SEED=1,2", "--trials", "3"], "is for --sampler tpe"),
    (["smoke", "SEED=1,2", "SCALE=small"], "SCALE=small is not one of: tiny"),
    (["smoke", "SCALE=tiny", "NUM_HEADS=4,3", "MODEL_DIM=32"], "is not divisible by"),
    (["smoke", "pr1092", "SEED=1,2"], "a sweep is of one profile, one file, one artifact"),
    (["smoke", "SEED=1,2", "--tokens", "9"], "--tokens and --start are for sweeps of an artifact"),
    (["none.ptz", "TTT_LR=0.1,0.2"], "cannot read none.ptz: No such file"),
    (["bad.ptz", "TTT_LR=0.1,0.2"], "bad.ptz: this is not an artifact"),
    (["bad.pt", "TTT_LR=0.1,0.2"], "bad.pt: this is not an artifact"),
    (["bad.ptz", "NUM_LAYERS=3,4"], "NUM_LAYERS cannot vary over an artifact"),
    (["bad.ptz", "SCALE=tiny", "TTT_LR=0.1,0.2"], "SCALE shrinks a model before training"),
    (["random.toml", "SEED=1,2"], "sampler 'random' is not one of grid, tpe"), (["empty.toml"], "nothing varies"),
    (["flat.toml"], "flat.toml: sweep is not a table"), (["bad.toml"], "bad.toml is not TOML"),
    (["odd.toml"], "odd.toml: colour = 3 is not understood")])
def test_a_mistake_is_refused_before_anything_runs(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("a = = 1")
    (tmp_path / "odd.toml").write_text("colour = 3")
    (tmp_path / "random.toml").write_text("sampler = 'random'")
    (tmp_path / "empty.toml").write_text("[sweep]\nSEED = []")
    (tmp_path / "flat.toml").write_text("sweep = 3")
    for name in ("bad.ptz", "bad.pt"):
        (tmp_path / name).write_bytes(b"no model at all, but long enough for a header")
    assert sweep.main([*arguments, f"ARTIFACT_DIR={tmp_path}"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.count("\n") == 1 and not (tmp_path / "sweeps").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "profiles/sweeps").glob("*.toml")), ids=lambda path: path.stem)
def test_the_example_files(path):
    plan = sweep.read_toml(path)
    plan.check()
    assert plan.name == path.stem and path.read_text().startswith("# ")


def test_p_values_are_those_of_scipy():
    assert stats.welch([1, 2, 3, 4], [2, 3, 4, 7]) == pytest.approx(0.28773997821466446, rel=1e-12)
    assert stats.below([1, 2, 3, 4], 4) == pytest.approx(0.051364039429199496, rel=1e-12)
    assert stats.below([1, 2, 3, 4], 0) == pytest.approx(0.98477, abs=1e-5)
    assert stats.welch([1], [1, 2]) is None and stats.below([1, 1], 2) is None


def plan(**changes):
    return sweep.Plan("smoke", {}, {"LEAKY_SLOPE": ["0.3", "0.5"], "SEED": ["1", "2"]}, "mine", **changes)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)
    (tmp_path / "fake.py").write_text(FAKE)
    return [sys.executable, str(tmp_path / "fake.py")]


def rows(folder):
    with open(folder / "sweeps/mine/table.csv") as f:
        return {(row["LEAKY_SLOPE"], row["SEED"]): row for row in csv.DictReader(f)}


def given(folder, run_id):
    """Arguments and environment of each try of a run."""
    return [json.loads(line) for line in (folder / "runs" / run_id / "given.jsonl").read_text().splitlines()]


def test_a_grid_with_a_run_that_fails_once(fake, tmp_path, capsys):
    made = sweep.sweep(plan(jobs=2), tmp_path, fake)
    found = rows(tmp_path)
    assert len(found) == 4 and all(row["state"] == "complete" for row in found.values())
    assert float(found["0.5", "2"]["score"]) == 0.52 and found["0.5", "2"]["bytes"] == "1000"
    assert "LEAKY_SLOPE=0.5 SEED=2: failed, once more: out of luck" in capsys.readouterr().out
    table = (made.place / "table.md").read_text().splitlines()
    assert "| 0.3 | 2 | 0.31500 | 0.00707 | - | - |" in table[6]
    assert "| 0.5 | 2 | 0.51500 | 0.00707 | +0.20000 | 0.00125 |" in table[7]
    pytest.importorskip("matplotlib")
    sweep.draw(sweep.rows_of(made.study.trials_by_state(), plan().axes), tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    before = (made.place / "study.journal").stat().st_size
    sweep.sweep(plan(), tmp_path, ["false"])  # nothing is left to run
    assert (made.place / "study.journal").stat().st_size < before + 2000 and len(rows(tmp_path)) == 4


def test_a_run_that_always_fails_is_marked_with_its_reason(fake, tmp_path):
    axes = {"LEAKY_SLOPE": ["0.9", "0.3"]}
    made = sweep.sweep(sweep.Plan("smoke", {"SEED": "1"}, axes, "mine"), tmp_path, fake)
    table = (made.place / "table.md").read_text()
    assert "- LEAKY_SLOPE=0.9: failed: out of luck" in table and "| 0.3 | 1 | 0.31000 |" in table
    assert (tmp_path / "runs/mine.0.9/tries").read_text() == "xx"


def test_a_sweep_that_was_killed_goes_on(fake, tmp_path):
    program = tmp_path / "sweeps.py"
    program.write_text(f"""import sys; sys.path[:0] = [{str(ROOT / 'tools')!r}]
import sweep; from pathlib import Path
plan = sweep.Plan("smoke", {{"MATRIX_LR": "0.5"}}, {{"LEAKY_SLOPE": ["0.3", "0.5"], "SEED": ["1", "2"]}}, "mine")
sweep.sweep(plan, Path({str(tmp_path)!r}), {fake!r})""")
    child = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, text=True)
    assert "1 of 4" in child.stdout.readline()
    time.sleep(0.3)
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = rows(tmp_path)
    again = plan()
    again.settings["MATRIX_LR"] = "0.5"
    sweep.sweep(again, tmp_path, fake)
    assert len(rows(tmp_path)) == 4 and {row["state"] for row in rows(tmp_path).values()} == {"complete"}
    assert len((tmp_path / "runs/mine.0.3_1/tries").read_text()) == 1 and done  # what was done is not done again
    first, second = given(tmp_path, "mine.0.3_2")  # it was killed after its first checkpoint
    assert "RESUME" not in first and second["RESUME"] == "1" and "RESUME" not in given(tmp_path, "mine.0.5_2")[0]


@pytest.mark.parametrize("jobs, shares", [(1, {"0,1,2,3"}), (2, {"0,1", "2,3"}), (3, {"0", "1", "2"}),
                                          (5, {"0", "1", "2", "3"})])
def test_jobs_share_the_gpus_out(fake, tmp_path, monkeypatch, jobs, shares):
    monkeypatch.setattr(sweep, "gpus_here", lambda environ: ["0", "1", "2", "3"])
    made = sweep.Sweep(plan(jobs=jobs), tmp_path, fake)
    assert "OMP_NUM_THREADS" in made.environment({}, 0) and not made.gpus  # the profile computes on the CPU
    made = sweep.Sweep(sweep.Plan("default", {}, {"SEED": ["1", "2"]}, "gpus", jobs=jobs), tmp_path, fake)
    assert {made.environment({}, job)["CUDA_VISIBLE_DEVICES"] for job in range(jobs)} == shares


def test_gpus_are_those_that_are_visible(fake, tmp_path, monkeypatch):
    """Also where the command line names them: it is no setting that every run would get as it is."""
    monkeypatch.setattr(sweep.tg.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sweep.tg.torch.cuda, "device_count", lambda: 3)
    assert sweep.gpus_here({}) == ["0", "1", "2"] and sweep.gpus_here({"CUDA_VISIBLE_DEVICES": "6,4"}) == ["6", "4"]
    named = sweep.Plan("default", {"CUDA_VISIBLE_DEVICES": "6,4"}, {"SEED": ["1", "2"]}, "mine", jobs=2)
    made = sweep.Sweep(named, tmp_path, fake)
    assert [made.environment({}, job)["CUDA_VISIBLE_DEVICES"] for job in (0, 1)] == ["6", "4"] and not made.shared


def test_a_run_sees_its_share_only(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "gpus_here", lambda environ: ["5", "7"])
    axes = {"LEAKY_SLOPE": ["0.3"], "SEED": ["1", "2", "3"]}
    wide = sweep.Plan("default", {"MATRIX_LR": "0.1"}, axes, "mine", jobs=2)
    sweep.sweep(wide, tmp_path, fake)
    seen = [given(tmp_path, f"mine.0.3_{seed}")[0]["CUDA_VISIBLE_DEVICES"] for seed in "123"]
    assert set(seen) == {"5", "7"}


def test_a_sweep_may_grow_but_not_become_another(fake, tmp_path):
    """More values of an axis go on; another setting for all runs would mix two systems in one table."""
    few = sweep.Plan("smoke", {"SEED": "1"}, {"LEAKY_SLOPE": ["0.3"]}, "mine")
    sweep.sweep(few, tmp_path, fake)
    few.axes["LEAKY_SLOPE"] += ["0.4"]
    made = sweep.sweep(few, tmp_path, fake)
    assert [t.value for t in made.study.trials_by_state()] == [0.31, pytest.approx(0.41)]
    few.axes["LEAKY_SLOPE"] = ["0.4"]
    assert len(sweep.sweep(few, tmp_path, ["false"]).study.trials_by_state()) == 1
    few.settings["SEED"] = "2"
    with pytest.raises(UsageError, match="mine is a sweep with SEED=1, not SEED=2; --name begins another one"):
        sweep.sweep(few, tmp_path, fake)


def test_what_run_sh_takes_a_sweep_takes(monkeypatch):
    """Other programs' variables and run.sh's have one value, whatever commas are in it; the environment counts."""
    arguments = types.SimpleNamespace(what=["smoke"], jobs=None)
    words = {"SEED": "1,2", "SCALE": "tiny", "TENSORBOARD": "1", "CUDA_VISIBLE_DEVICES": "0,1", "WANDB_ENABLED": "1"}
    made = sweep.plan_of(arguments, words, {"ITERATIONS": "5", "SEED": "7", "RUN_ID": "x", "HOME": "/"})
    made.check()
    assert made.axes == {"SEED": ["1", "2"]} and made.settings == {
        "ITERATIONS": "5", **{key: value for key, value in words.items() if key != "SEED"}}
    assert made.configuration({"SEED": "1"}).model_dim == 32 and made.configuration({"SEED": "1"}).iterations == 5


def test_a_run_that_outlives_its_sweep_is_waited_for(fake, tmp_path):
    """Two of one name would be refused; it is not started before the other has let go of the log."""
    path = tmp_path / "runs/mine.0.3/log.txt"
    path.parent.mkdir(parents=True)
    log, released = open(path, "w"), []
    fcntl.flock(log, fcntl.LOCK_EX)
    threading.Timer(0.5, lambda: (released.append(time.time()), log.close())).start()
    made = sweep.sweep(sweep.Plan("smoke", {"SEED": "1"}, {"LEAKY_SLOPE": ["0.3"]}, "mine"), tmp_path, fake)
    assert [t.state.name for t in made.study.trials_by_state()] == ["COMPLETE"]
    assert (path.parent / "tries").stat().st_mtime >= released[0] - 0.01


def test_hopeless_runs_end_early(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.05)
    slow = sweep.Plan("smoke", {"SEED": "1", "MATRIX_LR": "0.3"},
                      {"LEAKY_SLOPE": ["0.1", "0.2", "0.3", "0.4", "0.8"]}, "mine", prune=True)
    made = sweep.sweep(slow, tmp_path, fake)
    states = {study.settings_of(t)["LEAKY_SLOPE"]: t.state.name for t in made.study.trials_by_state()}
    assert states == {"0.1": "COMPLETE", "0.2": "COMPLETE", "0.3": "COMPLETE", "0.4": "COMPLETE", "0.8": "PRUNED"}


def test_tpe_stops_after_its_trials(fake, tmp_path):
    tpe = sweep.Plan("smoke", {"SEED": "1"}, {"LEAKY_SLOPE": study.Range(0.1, 0.4)}, "mine", "tpe", 3)
    done = sweep.sweep(tpe, tmp_path, fake)
    assert len(done.study.trials_by_state()) == 3 and type(done.study.study.sampler).__name__ == "TPESampler"


@pytest.mark.parametrize("spoil", [b"not JSON\n", b"\xff\xfe\n"])
def test_a_damaged_study_is_one_line(fake, tmp_path, spoil):
    path = tmp_path / "study.journal"
    study.Study(path, {"SEED": ["1"]})
    path.write_bytes(path.read_bytes() + spoil + b'{"op_code": 1}\n')
    with pytest.raises(UsageError, match="is damaged"):
        study.Study(path, {"SEED": ["1"]})


def test_the_lock_of_a_killed_process_does_not_hold_forever(fake, tmp_path, monkeypatch):
    path = tmp_path / "study.journal"
    study.Study(path, {"SEED": ["1"]})
    lock = tmp_path / "study.journal.lock"
    lock.touch()
    os.utime(lock, (1, 1))
    monkeypatch.setattr(study, "GRACE_SECONDS", 1)
    assert study.settings_of(study.Study(path, {"SEED": ["1"]}).take()) == {"SEED": "1"}


def test_a_files_table_over_an_artifact(monkeypatch):
    words = [str(ROOT / "profiles/sweeps/lora_rank.toml"), "some/final_model.ptz"]
    made = sweep.plan_of(types.SimpleNamespace(what=words, tokens=500), {"TTT_LORA_LR": "0.01"}, {})
    assert (made.artifact, made.profile, made.tokens) == ("some/final_model.ptz", "document", 500)
    assert made.axes["TTT_LORA_RANK"] == ["1", "2", "4", "8"] and made.settings == {"TTT_LORA_LR": "0.01"}
    alone = sweep.plan_of(types.SimpleNamespace(what=["final_model.ptz", "pr1092"]), {"TTT_LR": "1,2"}, {})
    assert (alone.profile, alone.axes) == ("pr1092", {"TTT_LR": ["1", "2"]})
