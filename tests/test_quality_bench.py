"""tools/bench.py --quality: settings of a system, numbers of a published log, and two steps of two systems."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import quality_bench  # noqa: E402

LOG = """Serialized model: 135417533 bytes
1/400 train_loss: 6.1 train_time: 0.1m tok/s: 2000
2/400 train_loss: 5.1 train_time: 0.1m tok/s: 2000
3/400 train_loss: 4.1 train_time: 0.2m tok/s: 2000
50/400 train_loss: 3.1 train_time: 0.4m tok/s: 2000
diagnostic pre-quantization post-ema val_loss:2.3 val_bpb:2.00450000 eval_time:6718ms
Serialized model quantized+pergroup: 700000 bytes
Total submission size quantized+pergroup: 725023 bytes
diagnostic quantized val_loss:2.3 val_bpb:2.01400000 eval_time:49995ms
quantized_ttt_phased val_loss:2.3 val_bpb:1.96970000 eval_time:508785ms
"""


def test_a_system_is_a_profile_at_the_bench_s_sizes_with_its_changes():
    own = quality_bench.settings_of("frontier:LEAKY_SLOPE=0.4,MLP_MULT=3", {"ITERATIONS": "9"})
    assert (own["LEAKY_SLOPE"], own["MLP_MULT"], own["ITERATIONS"], own["MODEL_DIM"]) == ("0.4", "3", "9", "160")
    assert (own["LOOP_START"], own["LOOP_END"], own["PARALLEL_START_LAYER"]) == ("1", "2", "3")
    other = quality_bench.settings_of("pr1092", {})
    assert other["VE_LAYERS"] == "3,4" and "LOOP_START" not in other and other["WARMDOWN_ITERS"] == "200"


@pytest.mark.parametrize("arguments, told", [
    (["frontiers"], "no profile 'frontiers'; did you mean frontier?"), (["frontier:SLOPE"], "SLOPE is not KEY=VALUE"),
    (["smoke", "--set", "SEED"], "--set takes KEY=VALUE"), (["smoke", "--seeds", "1;2"], "--seeds numbers"),
    (["smoke", "--data", "nowhere"], "--data needs the --tokenizer")])
def test_bad_arguments_are_one_line(arguments, told, capsys):
    assert quality_bench.main(["--quality", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_published_log(tmp_path):
    path = tmp_path / "log"
    path.write_text(LOG)
    assert quality_bench.read_published("PR 1855", path) == {
        "pre_quant_bpb": 2.0045, "roundtrip_bpb": 2.014, "ttt_bpb": 1.9697, "ngram_bpb": None,
        "bytes": 700000.0, "train_tokens_per_s": pytest.approx(2000)}
    path.write_text("step:1/2\n")
    with pytest.raises(quality_bench.BenchError, match="has no line"):
        quality_bench.read_published("PR 1855", path)


def test_the_table_has_medians_and_the_ratio_to_the_first():
    run = dict(pre_quant_bpb=2.0, roundtrip_bpb=2.1, ttt_bpb=None, ngram_bpb=2.05, bytes=1000, train_tokens_per_s=50.0)
    lines = quality_bench.table({"a": [run, run | {"pre_quant_bpb": 4.0}, run], "b": [run | {"pre_quant_bpb": 1.0}]})
    assert lines.splitlines()[2:] == ["| a | 3 | 2.0000 | 1.0000 | 2.1000 | - | 2.0500 | 1,000 | 50 |",
                                      "| b | 1 | 1.0000 | 0.5000 | 2.1000 | - | 2.0500 | 1,000 | 50 |"]


def test_two_steps_of_a_system(corpus, tmp_path, capsys):
    small = ["ITERATIONS=2", "NUM_LAYERS=4", "MODEL_DIM=40", "TRAIN_SEQ_LEN=64", "EVAL_SEQ_LEN=64", "TTT_ENABLED=0",
             "TRAIN_BATCH_TOKENS=128", "CLIP_RULE=sdclip", "GPTQ_ENABLED=0", "VE_LAYERS=2,3", "XSA_LAST_N=4",
             "EVAL_STRIDE=0", f"VOCAB_SIZE={corpus.tokenizer.vocab_size()}"]
    out = tmp_path / "out.json"
    code = quality_bench.main(["--data", str(corpus.folder), "--tokenizer", str(corpus.tokenizer_path), "frontier",
                               "--out", str(out), *(word for pair in small for word in ("--set", pair))])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    (run,), = json.loads(out.read_text()).values()
    assert 0 < run["pre_quant_bpb"] < 20 and run["ttt_bpb"] is None and run["bytes"] > 1000
    assert f"| frontier | 1 | {run['pre_quant_bpb']:.4f} | 1.0000 |" in shown.out
