"""tools/survive.py: a short form of its table, and what its verdicts are worth."""
import random
import subprocess
import sys

import pytest
import train_gpt as tg
from conftest import ROOT, VOCAB

sys.path.append(str(ROOT / "tools"))
import survive  # noqa: E402


def test_a_few_runs_survive(corpus, tmp_path):
    """Killed, stopped, without room on the disk, from damaged files: the command, its table and its exit code."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "survive.py", "--kills", "1", "--terms", "1", "--mutants", "60",
                           "--ranks", "0", "--disks", "1", "--out", tmp_path / "README.md", f"VOCAB_SIZE={VOCAB}",
                           f"DATA_PATH={corpus.folder}", f"TOKENIZER_PATH={corpus.tokenizer_path}", "ITERATIONS=10",
                           "BIGRAM_VOCAB_SIZE=0", "GPTQ_CALIBRATION_BATCHES=1"], capture_output=True, text=True)
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


@pytest.mark.parametrize("read, verdict", [
    (lambda *_: None, "accepted"), (lambda *_: tg.TokenStream("/nonexistent/*.bin", 2), "refused"),
    (lambda *_: [][0], "IndexError: 'list index out of range'"), (lambda *_: sys.exit(3), "SystemExit: '3'"),
    (lambda *_: survive.time.sleep(5), "it is still read after 0.1 s")])
def test_verdicts_on_a_file(monkeypatch, tmp_path, read, verdict):
    monkeypatch.setattr(survive, "LOOK_S", 0.1)
    assert survive.looked_at(read, tmp_path, {}) == verdict


def test_every_kind_of_damage_happens_and_a_seed_repeats_it():
    blob = bytes(range(256)) * 20
    one, other = ([survive.mutate(blob, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert one == other and {(len(m) > len(blob)) - (len(m) < len(blob)) for m in one} == {-1, 0, 1}
    assert sum(m == blob for m in one) < 10


def test_the_moment_is_told_by_the_last_line():
    lines = ["train_loader:dataset", "warmup_step:1/2", "step:3/30 train_loss:5.0", "ema:applying EMA weights",
             "packing 3 weights", "artifact:x", "final_int6_roundtrip val_loss:1", "final_int6_sliding_window val_loss:1",
             "legal_ttt val_loss:1", "-" * 72]
    assert [survive.phase_of("\n".join(lines[:end + 1])) for end in range(len(lines))] == [
        "start", "warm-up", "training", "calibration", "packing", "plain score", "sliding score", "test-time training",
        "test-time training", "end"]


@pytest.mark.parametrize("damage", [lambda b: b[:-2], lambda b: b"\0" + b[1:], lambda b: b + b"\0\0"])
def test_a_shard_that_cannot_be_right_is_known(corpus, damage):
    blob = (corpus.folder / "fineweb_val_000000.bin").read_bytes()
    assert survive.whole_shard(blob) and not survive.whole_shard(damage(blob))
