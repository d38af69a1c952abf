"""Runs as files: what tools read of ours and of published logs, and the table of them."""
import json
import os
import sys

import pytest
import train_gpt as tg
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import runlog  # noqa: E402
import runs  # noqa: E402
from shell import UsageError  # noqa: E402

FAMILY_A = """logs/x.txt
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 warmup_steps:20 max_wallclock_seconds:600.000
seed:1337
step:0/20000 val_loss:6.9 val_bpb:4.1000 train_time:0ms step_avg:0.02ms
step:1/20000 train_loss:6.9351 train_time:44ms step_avg:44.01ms
step:200/20000 train_loss:2.5000 train_time:8800ms step_avg:44.00ms
step:13780/20000 val_loss:2.0 val_bpb:1.2172 train_time:600038ms step_avg:43.54ms
stopping_early: wallclock_cap train_time:600038ms step:13780/20000
DIAGNOSTIC post_ema val_loss:1.9100 val_bpb:1.1369 eval_time:2000ms
Total submission size: 99 bytes
Total submission size int6+lzma: 15863489 bytes
final_int6_roundtrip val_loss:2.0 val_bpb:1.2244 eval_time:1400ms
final_int6_roundtrip_exact val_loss:2.07269931 val_bpb:1.22436570
final_int6_sliding_window val_loss:2.0 val_bpb:1.2000 stride:64 eval_time:74000ms
final_int8_zlib_roundtrip_exact val_loss:2.0 val_bpb:1.2000
legal_ttt val_loss:1.9 val_bpb:1.1900 eval_time:400000ms
legal_ttt_exact val_loss:1.90000000 val_bpb:1.19000000
"""
FAMILY_B = """1714000000.123 Hyperparameters:
1714000000.123   seed: 42
1714000000.123   train_batch_tokens: 1000
1714000001.123 1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 2000
1714000001.123 4000/20000 val_loss: 2.4000 val_bpb: 1.1000
1714000001.123 4908/20000 train_loss: 2.3000 train_time: 9.9m tok/s: 8180
1714000001.123 pre-quantization post-ema val_loss:2.33000000 val_bpb:1.06500000 eval_time:9000ms
1714000001.123 Total submission size quantized+pergroup: 15981234 bytes
1714000001.123 diagnostic quantized val_loss:2.35000000 val_bpb:1.07300000 eval_time:9000ms
1714000001.123 quantized_ttt_phased val_loss:2.32000000 val_bpb:1.06100000 eval_time:480000ms
"""


def test_published_logs_of_both_kinds(tmp_path):
    (tmp_path / "a.log").write_text(FAMILY_A)
    (tmp_path / "b.log").write_text(FAMILY_B)
    a, b = runlog.read(tmp_path / "a.log"), runlog.read(tmp_path / "b.log")
    assert a.steps == [(1, 0.044, 6.9351), (200, 8.8, 2.5)]
    assert a.validations == [(0, 0.0, 4.1), (13780, 600.038, 1.2172)]
    assert a.bpb == {"pre_quant": 1.1369, "roundtrip": 1.2243657, "sliding": 1.2, "ttt": 1.19}
    assert (a.total_bytes, a.settings["seed"], a.score, a.train_seconds) == (15863489, "1337", 1.19, 600.038)
    assert b.steps == [(1, 0.5, 9.0087), (4908, 600.0, 2.3)] and b.validations == [(4000, 600.0, 1.1)]
    assert b.bpb == {"pre_quant": 1.065, "roundtrip": 1.073, "ttt": 1.061} and b.seconds["ttt"] == 480
    assert (b.total_bytes, b.settings["seed"]) == (15981234, "42")


def test_the_first_scripts_name_for_their_only_score(tmp_path):
    (tmp_path / "a.log").write_text("final_int8_zlib_roundtrip val_loss:2.0 val_bpb:1.2244 eval_time:1400ms\n"
                                    "final_int8_zlib_roundtrip_exact val_loss:2.07 val_bpb:1.22436570\n")
    assert runlog.read(tmp_path / "a.log").bpb == {"roundtrip": 1.2243657}


@pytest.mark.parametrize("data, said", [
    (b"nothing\n", "has no line of a run"), (b"", "has no line of a run"), (FAMILY_A.encode("utf-16"), "is not UTF-8"),
    (None, "cannot read")])
def test_a_log_that_is_none_is_refused_in_one_line(tmp_path, data, said):
    path = tmp_path / "x.log"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UsageError, match=said):
        runlog.read(path)


def write_run(folder, name, *events, log="", **settings):
    """A run's files: its settings, then events."""
    path = folder / "runs" / name
    path.mkdir(parents=True)
    everything = {"profile": "smoke", "seed": 1337, **settings}
    first = {"event": "settings", "time": 1.0, "all": everything, "changed": {}, "pid": os.getpid(),
             "host": os.uname().nodename}
    (path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [first, *events]) + '{"event": "tra')
    (path / "log.txt").write_text(log)
    return path


STEP = {"event": "train", "time": 2.0, "step": 3, "train_loss": 5.0, "train_time_s": 1.5, "lr_scale": 0.5}


def test_states_of_runs(tmp_path):
    write_run(tmp_path, "goes_on", STEP, {**STEP, "train_loss": 4.0})
    dead = write_run(tmp_path, "killed", STEP) / "events.jsonl"
    dead.write_text(dead.read_text().replace(f'"pid": {os.getpid()}', '"pid": 99999999'))
    elsewhere = write_run(tmp_path, "elsewhere", STEP) / "events.jsonl"
    elsewhere.write_text(elsewhere.read_text().replace(os.uname().nodename, "another"))
    os.utime(elsewhere.with_name("log.txt"), (1, 1))
    write_run(tmp_path, "wrong", STEP, {"event": "failed", "time": 3.0, "why": "training diverged"})
    write_run(tmp_path, "whole", STEP, log="summary: {}")
    found = {run.name: (run.state, run.why) for run in runlog.all_runs(tmp_path)}
    assert found == {"goes_on": ("running", ""), "killed": ("stopped", ""), "elsewhere": ("stopped", ""),
                     "wrong": ("failed", "training diverged"), "whole": ("done", "")}
    assert runlog.read(tmp_path / "runs/goes_on").steps == [(3, 1.5, 4.0)]  # a repeated step counts once


def test_the_verdict_of_an_audit_and_a_damaged_file(tmp_path):
    path = write_run(tmp_path, "whole", STEP, log="summary: {}")
    (path / "audit.json").write_text('{"verdict": "pass"}')
    assert runlog.read(path).audit == "pass"
    for name in ("audit.json", "eval.json"):
        for text in ("{", "[1]"):
            (path / name).write_text(text)
            with pytest.raises(UsageError, match=f"{name} is not JSON"):
                runlog.read(path)
        (path / name).unlink()


def test_the_table_of_runs(tmp_path, monkeypatch, capsys):
    write_run(tmp_path, "first", STEP, {"event": "failed", "time": 3.0, "why": "a reason"}, muon_momentum=0.5)
    monkeypatch.setenv("ARTIFACT_DIR", str(tmp_path))
    assert runs.main([]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("first") and "failed: a reason" in line
    assert "MUON_MOMENTUM=0.5" in line and "SEED" not in line
    assert runs.main([f"ARTIFACT_DIR={tmp_path}/none"]) == 2
    assert capsys.readouterr().err == f"error: no runs in {tmp_path}/none/runs: bash run.sh makes one\n"


def test_a_run_by_its_name_its_folder_and_its_old_place(run):
    failed = run(ITERATIONS=2, TTT_ENABLED=0, RUN_ID="bad", ARTIFACT_LIMIT_BYTES=9, PROFILE="smoke")
    assert failed.code == 2
    found = runlog.find("bad", run.folder)
    assert found.state == "failed" and found.why in failed.err and found.total_bytes > 9
    assert found.settings["profile"] == "smoke" and [step for step, *_ in found.steps] == [1, 2]
    done = run(ITERATIONS=2, TTT_ENABLED=0, RUN_ID="tiny", ARTIFACT_LIMIT_BYTES=10**7, PROFILE="")
    for place in ("runs/tiny", "runs/tiny/log.txt", "runs/tiny/events.jsonl", "logs/tiny.txt", "logs/tiny.jsonl"):
        found = runlog.read(run.folder / place)
        assert (found.name, found.state, found.score) == ("tiny", "done", done.summary["val_bpb_sliding"])
        assert found.traces["tokens"] and sum(r["packed_bytes"] for r in found.ledger) < found.total_bytes
    own, public = found, runlog.read_published(run.folder / "logs/tiny.txt")
    assert public.bpb == pytest.approx(own.bpb, abs=1e-4) and [s[0] for s in public.steps] == [1, 2]
    assert public.total_bytes == own.total_bytes
    with pytest.raises(UsageError, match="no run 'nope'"):
        runlog.find("nope", run.folder)


def test_every_setting_that_a_run_has_can_differ():
    cfg = tg.Hyperparameters()
    assert runs.differences({**vars(cfg), "profile": "", "muon_momentum": 0.1, "normuon": True}) == \
        "MUON_MOMENTUM=0.1 NORMUON=1"
