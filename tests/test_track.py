"""What a run measures, sent to TensorBoard and Weights & Biases."""
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT
from test_runs import STEP, write_run

sys.path.append(str(ROOT / "tools"))
import track  # noqa: E402

SCORE = {"event": "evaluation", "time": 3.0, "name": "legal_ttt", "bpb": 1.25, "loss": 2.5, "tokens": 7, "bytes": 9,
         "seconds": 1.5}


@pytest.fixture
def logged(tmp_path):
    path = write_run(tmp_path, "mine", STEP, SCORE)
    events = path / "events.jsonl"
    events.write_text(events.read_text().removesuffix('{"event": "tra'))
    return path


def test_the_numbers_of_an_event():
    assert track.scalars({**STEP, "note": "x", "on": True}) == {"train/train_loss": 5.0, "train/train_time_s": 1.5,
                                                               "train/lr_scale": 0.5}
    assert track.scalars(SCORE)["legal_ttt/bpb"] == 1.25


def test_a_file_is_followed_as_it_grows(tmp_path, monkeypatch):
    path, seen = tmp_path / "events.jsonl", []
    monkeypatch.setattr(track, "POLL_SECONDS", 0)
    writes = iter([None, b'{"a": 1}\n{"a"', b': 2}\n', b'{"a": 3}\n{"half'])

    def ended():
        data = next(writes, b"")
        if data:
            with open(path, "ab") as file:
                file.write(data)
        return data == b""
    seen = list(track.follow(path, ended))
    assert seen == [{"a": 1}, {"a": 2}, {"a": 3}]


def test_tensorboard_has_the_numbers_of_the_file(logged):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    track.track(logged, [track.TensorBoard], lambda: True)
    found = EventAccumulator(str(logged))
    found.Reload()
    value, = found.Scalars("train/train_loss")[-1:]
    assert (value.step, value.value, value.wall_time) == (3, 5.0, 2.0)
    assert found.Scalars("legal_ttt/bpb")[-1].step == 3 and found.Scalars("legal_ttt/bpb")[-1].value == 1.25


def test_wandb_has_the_numbers_of_the_file(logged, monkeypatch):
    sent, fake = [], types.ModuleType("wandb")
    run = types.SimpleNamespace(log=sent.append, finish=lambda: sent.append("finished"))
    fake.init = lambda **how: sent.append(how) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    track.track(logged, [track.WandB], lambda: True)
    assert sent[0]["name"] == "mine" and sent[0]["config"]["profile"] == "smoke"
    assert sent[1]["train/train_loss"] == 5.0 and sent[1]["step"] == 3
    assert sent[2]["legal_ttt/bpb"] == 1.25 and sent[3:] == ["finished"]


def test_wandb_offline(logged):
    pytest.importorskip("wandb")
    program = f"import sys; sys.path[:0] = [{str(ROOT / 'tools')!r}]\nimport track; from pathlib import Path\n" \
        f"print(track.track(Path({str(logged)!r}), [track.WandB], lambda: True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "8" and list(logged.glob("wandb/offline-run-*/*.wandb"))


def test_a_missing_package_is_one_line(logged, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    dead = logged / "events.jsonl"
    dead.write_text(dead.read_text().replace(f'"pid": {os.getpid()}', '"pid": 99999999'))
    assert track.main(["mine", "WANDB_ENABLED=1", f"ARTIFACT_DIR={logged.parent.parent}"]) == 2
    assert capsys.readouterr().err.startswith("error: WANDB_ENABLED=1 needs wandb")
    assert track.main(["mine"]) == 2 and "needs a RUN_ID, and" in capsys.readouterr().err
