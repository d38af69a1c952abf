"""What a record folder says about itself."""
import base64
import json
import lzma
import random
import sys

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import check_record  # noqa: E402
import record  # noqa: E402

LOG = """seed: 42
val_tokens: 47851520
1/20000 train_loss: 9.0087 train_time: 0.0m tok/s: 2000
  train_batch_tokens: 786432
stopping_early: wallclock_cap train_time: 596000ms step: 4900/20000
GPTQ:collected 67 Hessians in 3.5s
Serialized model quantized+pergroup: 15900000 bytes
Total submission size quantized+pergroup: 15930000 bytes
pre-quantization post-ema val_loss:2.33080000 val_bpb:1.06500000 eval_time:9000ms
quantized val_loss:2.34831000 val_bpb:1.07300000 eval_time:9100ms
quantized_ttt_phased val_loss:2.32186200 val_bpb:1.06100026 eval_time:480000ms
"""
CODE = "x = 1\n"


@pytest.fixture
def folder(tmp_path):
    """A folder without a fault: three seeds, whose scores differ a little."""
    scores = []
    for i, seed in enumerate((42, 0, 314)):
        loss = 2.321862 + 0.001 * i
        text = LOG.replace("seed: 42", f"  seed: {seed}").replace("2.32186200", f"{loss:.8f}").replace(
            "1.06100026", f"{loss / 2.188371:.8f}").replace("480000ms", f"48000{i}ms").replace("9100ms", f"910{i}ms")
        text = text.replace("9000ms", f"900{i}ms")
        scores.append(loss / 2.188371)
        (tmp_path / f"train_seed{seed}.log").write_text(text)
    (tmp_path / "train_gpt.py").write_text(CODE + "#" * (30000 - len(CODE)))
    (tmp_path / "README.md").write_text("a record")
    (tmp_path / "submission.json").write_text(json.dumps(
        {"author": "A", "github_id": "G", "name": "N", "date": "2026-01-01", "val_bpb": sum(scores) / 3,
         "seed_results": {"42": {"val_bpb": scores[0]}}}))
    return tmp_path


def change(path, *pairs):
    text = path.read_text()
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)


def test_a_folder_without_a_fault(folder, capsys):
    assert check_record.check(folder) == []
    assert record.main(["--check", str(folder)]) == 0 and "nothing is broken, 0 to look at" in capsys.readouterr().out


@pytest.mark.parametrize("file, pairs, said", [
    ("train_gpt.py", [("x = 1\n", "x = 1\n" + "#" * 80000)], "bytes, over 16,000,000"),
    ("train_seed0.log", [("596000ms", "601000ms")], "601.0 s of training"),
    ("train_seed0.log", [("596000ms", "599000ms")], "599.0 s of training and 3.5 s of calibration"),
    ("train_seed0.log", [("480001ms", "620000ms")], "620.0 s for the last score alone"),
    ("train_seed42.log", [("9.0087", "9.0073")], "the first batch has a loss of 9.0073"),
    ("train_seed0.log", [("2.32286200", "2.32290000")], "differs from log to log"),
    ("train_seed0.log", [("2.33080000", "2.33180000")], "differs from line to line"),
    ("train_seed0.log", [("val_tokens: 47851520", "val_tokens: 9662464")], "are 10,000 documents"),
    ("submission.json", [('"val_bpb": 1.061', '"val_bpb": 1.051')], "submission.json has 1.05"),
    ("submission.json", [("{", "")], "submission.json is not JSON"),
    ("train_gpt.py", [("x = 1", "x = = 1")], "train_gpt.py is not Python")])
def test_what_is_broken_is_found(folder, file, pairs, said, capsys):
    change(folder / file, *pairs)
    found = [f.text for f in check_record.check(folder) if f.broken]
    assert any(said in text for text in found), found
    assert record.main(["--check", str(folder)]) == 1


def test_bytes_that_are_counted_twice_show_in_the_ratio(folder):
    """As in PR 2071: the same losses, with more bytes."""
    for path in folder.glob("*.log"):
        for loss in ("2.32186200", "2.32286200", "2.32386200"):
            bpb = f"{float(loss) / 2.188371:.8f}"
            if bpb in path.read_text():
                change(path, (bpb, f"{float(loss) / 2.384211:.8f}"))
    found = [f.text for f in check_record.check(folder) if f.broken]
    assert sum("with its 47,851,520 tokens it would be 2.18837, and the score 1.06" in text for text in found) == 3


@pytest.mark.parametrize("line, said", [
    ("prequant_ttt = 1", "before quantisation"), ("word_boost = 0.75", "gates by word"),
    ("slot_steps = 8", "SLOT"), ("text = text.casefold()", "folds case")])
def test_patterns_in_plain_and_in_packed_code(folder, line, said):
    noise = base64.b64encode(random.Random(1).randbytes(3000)).decode()  # so that the packed literal has some length
    packed = base64.b85encode(lzma.compress(f"{line}\n# {noise}\n".encode())).decode()
    for code in (line, f"import lzma\nexec(lzma.decompress('{packed}'))"):
        (folder / "train_gpt.py").write_text(code + "\n")
        found = check_record.check(folder)
        assert any(said in f.text and not f.broken for f in found), found


def test_helpers_that_the_script_names_count(folder):
    (folder / "helper.py").write_text("#" * 80_000)
    assert check_record.check(folder) == []  # nobody uses it
    change(folder / "train_gpt.py", ("x = 1", "import helper"))
    assert any("with helper.py (80,000 bytes)" in f.text for f in check_record.check(folder) if f.broken)


def test_no_folder_and_an_empty_one(tmp_path, capsys):
    assert record.main(["--check", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'} is no folder\n"
    assert record.main(["--check", str(tmp_path)]) == 1
