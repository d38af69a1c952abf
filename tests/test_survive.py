"""tools/survive.py: a short form of its table, and what its verdicts are worth."""
import random
import subprocess
import sys
from types import SimpleNamespace

import pytest
import train_gpt as tg
from conftest import ROOT, VOCAB

sys.path.append(str(ROOT / "tools"))
import survive  # noqa: E402


def test_a_few_runs_survive(corpus, tmp_path):
    """Killed, stopped, without room on the disk, from damaged files: the command, its table and its exit code."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "survive.py", "--kills", "1", "--terms", "1",
                           "--mutants", "60", "--ranks", "0", "--disks", "1", "--out", tmp_path / "README.md",
                           f"VOCAB_SIZE={VOCAB}", f"DATA_PATH={corpus.folder}",
                           f"TOKENIZER_PATH={corpus.tokenizer_path}", "ITERATIONS=10", "BIGRAM_VOCAB_SIZE=0", "GPTQ_CALIBRATION_BATCHES=1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in (tmp_path / "README.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[2] for row in rows[2:]] == ["1 of 1", "1 of 1", "60 of 60", "1 of 1"]


def test_a_missed_figure_is_exit_code_1(monkeypatch, corpus, capsys):
    def missed(lab, count):
        tally = survive.Tally("killed", "resumed")
        tally.add("", "training")
        tally.add("other results", "training")
        return tally
    monkeypatch.setattr(survive, "kill", missed)
    only = ["--terms", "0", "--mutants", "0", "--ranks", "0", "--disks", "0", f"VOCAB_SIZE={VOCAB}",
            f"DATA_PATH={corpus.folder}", f"TOKENIZER_PATH={corpus.tokenizer_path}"]
    assert survive.main(["--kills", "2", *only]) == 1
    assert "| killed | resumed | 1 of 2 | training 2 |" in capsys.readouterr().out
    assert survive.main(["--kills", "0", *only]) == 0


def test_bad_arguments_are_one_line(capsys, tmp_path):
    assert survive.main([f"DATA_PATH={tmp_path}"]) == 2
    assert capsys.readouterr().err == f"error: no data in {tmp_path}; bash run.sh data embedded makes it\n"


@pytest.mark.parametrize("codes, artifact, bpb, fault", [
    ([0], b"whole", 1.0, ""), ([0], b"another", 1.0, "other results"), ([0], b"whole", 1.5, "other results"),
    ([1], b"whole", 1.0, "going on ends with [1]"), ([2, 0], b"whole", 1.0, ""),
    ([2, 2], b"whole", 1.0, "going on ends")])
def test_going_on_has_to_end_as_the_run_left_alone(monkeypatch, tmp_path, codes, artifact, bpb, fault):
    """Code 2: there is no checkpoint yet, so the second try begins at the start."""
    lab = survive.Lab(tmp_path, {}, random.Random(0), {1: (b"whole", [1.0, 1.0, 1.0, 1.0, 30], 99)})
    tries = []

    def start(place, limit_bytes=0, RESUME=0):
        tries.append(RESUME)
        code, told = codes[len(tries) - 1], []
        summary = {**dict.fromkeys(("val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt"), 1.0),
                   "val_bpb_pre_quant": bpb, "steps": 30}
        end = f"summary: {survive.json.dumps(summary)}" if code == 0 else "error: " + (
            survive.NO_CHECKPOINT if code == 2 else "another")
        return SimpleNamespace(wait=lambda seconds: code, printed=lambda: told.append(1) or end * (len(told) > 1))
    monkeypatch.setattr(lab, "start", start)
    (tmp_path / "final_model.ptz").write_bytes(artifact)
    said = lab.go_on(tmp_path)
    assert said.startswith(fault) and bool(said) == bool(fault) and tries == [1, 0][:len(codes)]


@pytest.mark.parametrize("read, verdict", [
    (lambda *_: None, "accepted"), (lambda *_: tg.TokenStream("/nonexistent/*.bin", 2), "refused"),
    (lambda *_: [][0], "IndexError: 'list index out of range'"), (lambda *_: sys.exit(3), "SystemExit: '3'"),
    (lambda *_: survive.time.sleep(5), "it is still read after 0.1 s")])
def test_verdicts_on_a_file(monkeypatch, tmp_path, read, verdict):
    monkeypatch.setattr(survive, "LOOK_S", 0.1)
    assert survive.looked_at(read, tmp_path, {}) == verdict


def test_every_kind_of_damage_happens_and_a_seed_repeats_it():
    blob = bytes(10_000)
    one, other = ([survive.mutate(blob, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert one == other and {(len(m) > len(blob)) - (len(m) < len(blob)) for m in one} == {-1, 0, 1}
    assert blob not in one


def test_the_moment_is_told_by_the_last_line():
    lines = ["train_loader:dataset", "warmup_step:1/2", "step:3/30 train_loss:5.0", "ema:applying EMA weights",
             "packing 3 weights", "artifact:x", "final_int6_roundtrip val_loss:1",
             "final_int6_sliding_window val_loss:1", "legal_ttt val_loss:1", "-" * 72]
    assert [survive.phase_of("\n".join(lines[:end + 1])) for end in range(len(lines))] == [
        "start", "warm-up", "training", "calibration", "packing", "plain score", "sliding score", "test-time training",
        "test-time training", "end"]


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b"\0" + b[1:], lambda b: b + b"\0\0"])
def test_a_shard_that_cannot_be_right_is_known(corpus, damage):
    blob = (corpus.folder / "fineweb_val_000000.bin").read_bytes()
    assert survive.whole_shard(blob) and not survive.whole_shard(damage(blob))
