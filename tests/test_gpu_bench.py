"""tools/bench.py --gpu: arithmetic, logs, the order of runs - and all of it on the CPU with programs that only log."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import bench  # noqa: E402
import benchlib  # noqa: E402
import estimate  # noqa: E402
import gpu_bench  # noqa: E402

FULL = gpu_bench.SETTINGS["cuda"]
OURS_LOG = """val_loader:shards pattern=x tokens:{tokens}
""" + "".join(f"step:{n}/6 train_loss:5.0 train_time:{400 + 100 * n + (5 if n < 3 else 0)}ms step_avg:1ms\n"
              for n in range(1, 7)) + """peak memory allocated: 1234 MiB reserved: 2000 MiB
Total submission size int6+lzma: 15000000 bytes
final_int6_roundtrip val_loss:3.1 val_bpb:1.90 eval_time:900ms
final_int6_sliding_window val_loss:3.0 val_bpb:1.80 stride:64 eval_time:{sliding}ms
final_int6_sliding_window_exact val_loss:3.01234567 val_bpb:1.80123456
legal_ttt val_loss:2.9 val_bpb:1.70 eval_time:{ttt}ms
"""


def test_flops_by_hand():
    """11 layers: queries and outputs 512x512, keys and values 256x512, MLP 512 <-> 1536; output 1024x512; bigram
    128 -> 512, values 128 -> 256. A token sees 1024.5 keys on average."""
    weights = 11 * (2 * 262_144 + 2 * 131_072 + 2 * 786_432) + 524_288 + 65_536 + 32_768
    flops = lambda **changes: estimate.flops_per_token(
        tg.Hyperparameters.from_env({key: str(value) for key, value in (FULL | changes).items()}))
    assert flops() == (6 * weights, 12 * 11 * 512 * 1024.5) and weights == 26_574_848
    assert flops(BIGRAM_VOCAB_SIZE=0, VE_ENABLED=0)[0] == 6 * (weights - 65_536 - 32_768)


def test_logs_of_both_kinds():
    found = benchlib.read_log(OURS_LOG.format(tokens=8192, sliding=3000, ttt=5000), 8192)
    assert found["step_ms"] == 100 and found["train_tokens_per_s"] == pytest.approx(81_920)
    assert (found["peak_mib"], found["total_bytes"], found["val_tokens"]) == (1234, 15_000_000, 8192)
    assert (found["sliding_bpb"], found["ttt_bpb"], found["ttt_s"]) == (1.80123456, 1.70, 5.0)
    other = "".join(f"{n}/6 train_loss: 5.0 train_time: 0.0m tok/s: {1e3 * n * 8192 / (300 + 100 * n):.0f}\n"
                    for n in range(1, 7)) + "quantized_ttt_phased val_loss:2.9 val_bpb:1.70 eval_time:5000ms\n"
    found = benchlib.read_log(other, 8192)
    assert found["step_ms"] == pytest.approx(100, rel=1e-2) and found["ttt_s"] == 5
    assert "sliding_bpb" not in found and benchlib.read_log("", 8192) == {}


def test_compilation_cancels_out_of_evaluation_speed():
    whole, quarter = (benchlib.read_log(OURS_LOG.format(tokens=t, sliding=s, ttt=s), 8192)
                      for t, s in ((8000, 21_000), (2000, 20_400)))
    about = {"flops_per_token": 2.5e8, "ceiling_tflops": 1}
    found = gpu_bench.combine(whole, quarter, about)
    assert found["sliding_tokens_per_s"] == pytest.approx(10_000) and found["step_ms"] == 100
    assert found["mfu"] == pytest.approx(81_920 * 2.5e8 / 1e12)
    assert "sliding_tokens_per_s" not in gpu_bench.combine(quarter, whole | {"val_tokens": 1e9}, about)


def write_program(path: Path, speed: int) -> Path:
    """A script that logs as if it had trained and scored, `speed` times as fast, and notes who ran in which order."""
    path.write_text(f"""import os
val = sum((n.stat().st_size - 1024) // 2 - 1 for n in os.scandir(os.environ["DATA_PATH"]) if "val" in n.name)
seconds = 20_000 + val // {speed}
print({OURS_LOG!r}.format(tokens=val, sliding=seconds, ttt=seconds))
open({str(path.parent / "order")!r}, "a").write(f"{path.stem}:{{os.environ.get('ATTENTION', '-')}}:"
                                                f"{{os.environ['ITERATIONS']}}:{{os.environ['SEED']}} ")
if os.environ.get("ATTENTION") == "math":
    raise SystemExit("no such kernel")
""", encoding="utf-8")
    return path


def test_the_whole_bench_on_the_cpu(corpus, tmp_path, capsys):
    ours, peer = write_program(tmp_path / "ours.py", 2), write_program(tmp_path / "peer.py", 1)
    code = gpu_bench.main(["--gpu", "--device", "cpu", "--ours", str(ours), "--peer", str(peer),
                           "--data", str(corpus.folder), "--tokenizer", str(corpus.tokenizer_path),
                           "--val-tokens", "1400", "--repeat", "2", "--attention", "flash,math", "--steps", "6",
                           "--out", str(tmp_path / "b" / "bench.json")])
    out = capsys.readouterr().out
    result = json.loads((tmp_path / "b" / "bench.json").read_text())
    assert code == 1 and result["device"] == "cpu"  # one side failed, and the others were measured all the same
    assert result["train_ratio"] == result["best"]["train_ratio"] == 1
    assert result["ratios"]["ours math"]["ttt_ratio"] is None
    assert result["sliding_ratio"] == result["ttt_ratio"] == pytest.approx(2, rel=1e-2)
    assert (tmp_path / "order").read_text().split() == [
        "ours:flash:6:1337", "ours:flash:0:1337", "ours:math:6:1337", "peer:-:6:1337", "peer:-:0:1337",
        "peer:-:6:1338", "peer:-:0:1338", "ours:math:6:1338", "ours:flash:6:1338", "ours:flash:0:1338"]
    assert "| median step, ms | 100.0 | 1.000 | - | - | 100.0 |" in out and "no such kernel" in out
    assert len(list((tmp_path / "b" / "bench_logs").iterdir())) == 10


def test_profile_of_a_step(corpus, config, tmp_path):
    cfg = config(run_id="profiled")
    environ = {name.upper(): str(int(v) if isinstance(v, bool) else v) for name, v in cfg.non_defaults().items()}
    found = gpu_bench.profile_step(str(ROOT / "train_gpt.py"), environ | {"DEVICE": "cpu"})
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    lines = gpu_bench.profile_table(found).splitlines()
    assert len(lines) == 4 + gpu_bench.TOP_KERNELS and any("aten::" in line for line in lines[4:])


def test_it_says_what_it_cannot_do(tmp_path, capsys):
    peer = write_program(tmp_path / "peer.py", 1)
    if not torch.cuda.is_available():
        assert gpu_bench.main(["--gpu", "--peer", str(peer)]) == 2
    for arguments in ([], ["--peer", str(tmp_path / "none.py")], ["--peer", str(peer), "steps"],
                      ["--peer", str(peer), "--repeat", "0"]):
        assert gpu_bench.main(["--gpu", *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in errors) and "--peer FILE is missing" in errors[-4]
    assert torch.cuda.is_available() or "sees none" in errors[0]
    with pytest.raises(SystemExit) as stop:
        gpu_bench.main(["--gpu", "--help"])
    assert stop.value.code == 0 and "--profile" in capsys.readouterr().out


def test_the_cpu_bench_hands_over_to_it(monkeypatch):
    started = []
    monkeypatch.setattr(bench.os, "execv", lambda *command: started.append(command) or sys.exit(0))
    with pytest.raises(SystemExit):
        bench.main(["--profile", "--gpu", "NUM_LAYERS=3"])
    file = str(ROOT / "tools" / "gpu_bench.py")
    assert started == [(sys.executable, [sys.executable, file, "--profile", "--gpu", "NUM_LAYERS=3"])]
