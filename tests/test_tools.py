"""tools/bench.py's reading of logs, what tools share, tools/export_bench.py."""
from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import train_gpt as tg

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tools"))
import bench  # noqa: E402
import benchlib  # noqa: E402
import export_bench  # noqa: E402


def test_no_tool_imports_a_command():
    """What two of them need is a module of its own below both."""
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tools").glob("*.py")}
    commands = {name for name, tree in trees.items() if any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in tree.body)}
    assert set(trees) - commands == {"benchlib", "charts", "check_record", "estimate", "forks", "parity_text",
                                     "profiles", "runlog", "shell", "stats", "study", "tiny"}
    for name, tree in trees.items():
        for node in ast.walk(tree):
            imported = [node.module] if isinstance(node, ast.ImportFrom) else \
                [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not commands & set(imported), f"tools/{name}.py, line {node.lineno}"


# ---- bench -------------------------------------------------------------------------------------------------

LOG = """val_loader:shards pattern=x tokens:10000
step:0/6 val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.01ms
step:1/6 train_loss:6.9 train_time:900ms step_avg:900.00ms
step:2/6 train_loss:6.8 train_time:1200ms step_avg:600.00ms
step:3/6 train_loss:6.7 train_time:1400ms step_avg:466.67ms
step:4/6 train_loss:6.6 train_time:1500ms step_avg:375.00ms
step:5/6 train_loss:6.5 train_time:1700ms step_avg:340.00ms
step:6/6 train_loss:6.4 train_time:1800ms step_avg:300.00ms
final_int6_roundtrip val_loss:3.1 val_bpb:1.90 eval_time:400ms
final_int6_roundtrip_exact val_loss:3.12345678 val_bpb:1.90123456
final_int6_sliding_window val_loss:3.0 val_bpb:1.80 stride:64 eval_time:2000ms
final_int6_sliding_window_exact val_loss:3.01234567 val_bpb:1.80123456
final_int8_zlib_roundtrip_exact val_loss:3.01234567 val_bpb:1.80123456
legal_ttt val_loss:2.9 val_bpb:1.70 eval_time:5000ms
"""


def test_a_log_gives_speeds_and_scores():
    found = bench.read_log(LOG, batch_tokens=8192)
    assert found["train_tokens_per_s"] == pytest.approx(8192 / 0.1)  # the median of 100, 200 and 100 ms
    assert (found["sliding_tokens_per_s"], found["ttt_tokens_per_s"]) == (5000, 2000)
    assert (found["roundtrip_bpb"], found["sliding_bpb"], found["ttt_bpb"]) == (1.90123456, 1.80123456, 1.70)


@pytest.mark.parametrize("missing, told", [
    ("legal_ttt", "legal_ttt"), ("step:", "train_loss"), ("val_loader", "tokens"), ("final_int6_s", "sliding")])
def test_a_log_that_lacks_something_is_refused_by_name(missing, told):
    text = "\n".join(line for line in LOG.splitlines() if not line.startswith(missing))
    with pytest.raises(benchlib.BenchError, match=told):
        bench.read_log(text, 8192)


def test_ratios_are_paired_and_the_table_shows_them():
    sides = [{key: scale for key in bench.ROWS} for scale in (100.0, 50.0, 300.0, 100.0, 100.0, 10.0)]
    pairs = [{"seed": i, "ours": sides[2 * i], "peer": sides[2 * i + 1]} for i in range(3)]
    rows = bench.summarise(pairs)
    assert rows["cpu_s"] == {"ours": 100, "peer": 50, "ratio": 3, "lowest": 2, "highest": 10}
    lines = bench.table(rows, "peer").splitlines()
    assert len(lines) == 2 + len(bench.ROWS) and "| 3.000 | 2.000 … 10.000 | more |" in lines[2]


def write_shard(path: Path, tokens: np.ndarray) -> None:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())


def test_validation_is_cut_to_whole_windows_over_shards(tmp_path):
    text = np.arange(100)
    write_shard(tmp_path / "fineweb_val_000000.bin", text[:30])
    write_shard(tmp_path / "fineweb_val_000001.bin", text[30:])
    write_shard(tmp_path / "fineweb_train_000000.bin", text)
    cut = benchlib.cut_validation(tmp_path, tmp_path / "cut", tokens=70, window=16)
    shard = tg.Shard(str(cut / "fineweb_val_000000.bin"))[:]
    assert shard.tolist() == text[:4 * 16 + 1].tolist()
    train = "fineweb_train_000000.bin"
    assert (cut / train).read_bytes() == (tmp_path / train).read_bytes()
    with pytest.raises(benchlib.BenchError, match="no window"):
        benchlib.cut_validation(tmp_path, tmp_path / "none", tokens=16, window=16)


def test_runs_alternate_and_failures_name_the_side(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import os\nprint({LOG!r})\nopen({str(tmp_path / 'order')!r}, 'a')"
                       ".write(os.environ['WHO'] + os.environ['SEED'] + ' ')\n")
    commands = {name: ["env", f"WHO={name}", sys.executable, str(program)] for name in ("ours", "peer")}
    pairs = bench.run_pairs(commands, {"TRAIN_BATCH_TOKENS": "8192", "SEED": "5"}, repeat=2, threads=1)
    assert (tmp_path / "order").read_text() == "ours5 peer5 peer6 ours6 "
    assert all(pair[side]["peak_rss_mib"] > 1 for pair in pairs for side in commands)
    program.write_text("raise SystemExit('boom')")
    with pytest.raises(benchlib.BenchError, match="peer ended with code 1: boom"):
        bench.run_once("peer", commands["peer"], {}, 1)


def test_a_cuda_script_runs_on_the_cpu_unchanged_on_disk(tmp_path):
    peer = tmp_path / "peer.py"
    peer.write_text("""import subprocess, torch
from flash_attn_interface import flash_attn_func
if not torch.cuda.is_available():
    raise RuntimeError("CUDA is required")
device = torch.device("cuda", 0)
torch.cuda.set_device(device)
with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
    x = torch.ones(1, 4, 2, 8, device=device).bfloat16()
    y = torch.compile(lambda t: flash_attn_func(t, t[:, :, :1], t[:, :, :1], causal=True), dynamic=False)(x)
torch.cuda.synchronize()
subprocess.run(["nvidia-smi"])
assert __name__ == "__main__" and y.shape == x.shape
print(y.dtype, y.device, torch.cuda.max_memory_allocated())
""")
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "on_cpu.py"), str(peer)],
                          capture_output=True, text=True)
    assert done.stdout.split() == ["torch.float32", "cpu", "0"], done.stderr


def test_help_and_bad_arguments(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--help"])
    assert stop.value.code == 0 and "--peer" in capsys.readouterr().out
    assert bench.main(["--peer", str(tmp_path / "none.py")]) == 2
    assert bench.main(["--peer", __file__, "steps"]) == 2
    assert bench.main(["--peer", __file__, "--data", str(tmp_path), "--tokenizer", __file__]) == 2
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())


def test_ranks_that_fail_leave_one_line(tmp_path):
    """tools/launch.py: what the first rank says, and its exit code; torchrun adds forty lines."""
    done = subprocess.run([sys.executable, ROOT / "tools" / "launch.py", "--standalone", "--nproc_per_node=2",
                           ROOT / "train_gpt.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "DEVICE": "cpu", "NUM_LAYERS": "many", "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stderr) == (2, "error: NUM_LAYERS='many' is not a whole number\n")


# ---- export_bench ------------------------------------------------------------------------------------------

def test_a_model_takes_its_own_weights_back(config):
    cfg = config()
    model = tg.GPT(cfg)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rounded = tg.round_model(cfg, model, {})
    with pytest.raises(KeyError), export_bench.using_rounded_weights(model, rounded):
        for name, p in model.named_parameters():
            wanted = tg.dequantise(*rounded[name]) if name in rounded else before[name]
            assert torch.equal(p, wanted), name
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_rules_are_held_against_each_other_at_equal_loss_and_at_equal_bytes(capsys):
    # Nats fall by half every 100 bytes; the second rule needs 150 bytes fewer for the same nats, the third never meets.
    theirs = [(0.08 / 2 ** i, 1000 + 100 * i) for i in range(3)]
    ours = [(nats, size - 150) for nats, size in theirs]
    lines = export_bench.compare({"theirs": theirs, "ours": ours[::-1], "far": [(1.0, 10), (0.9, 20)]})
    ratios = [line.split()[1:] for line in lines[1:]]
    assert ratios[0] == ["0.08000", "x0.850", f"x{2 ** -1.5:.3f}"]
    assert ratios[2] == ["0.02000", "x0.875", "-"] and ratios[3][1:] == ["-", "-"]
    assert export_bench.main(["nowhere.pt"]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_table_of_a_tiny_model(run, monkeypatch, capsys):
    done = run(ITERATIONS=2, TTT_ENABLED=0, EVAL_STRIDE=0)
    model = str(done.folder / "final_model.pt")
    theirs, *_, tuned = export_bench.RULES
    rules = (*theirs[:3], (1.0,)), (tuned[0], tuned[1] | {"TUNE_STEPS": 2}, tuned[2], (0.1,))
    monkeypatch.setattr(export_bench, "RULES", rules)
    assert export_bench.main([model, "--tokens", "512", "RUN_ID=table"]) == 0
    out = capsys.readouterr().out
    for rule in ("PR 1855, sigmas 1 ", "water-filling, tuned, nats 0.1 "):
        row = next(line for line in out.splitlines() if line.startswith(rule))
        *_, divergence, size, bits, _ = row.split()
        assert float(divergence) > 0 and int(size.replace(",", "")) > 1000 and 0 < float(bits) < 16
    assert "fine_tune:steps:2 nats:" in out
    assert export_bench.main([model, "CLIP_RULE=waterfill", "GPTQ_ENABLED=1", "LATE_QAT=0", "--packers"]) == 2
    assert "--packers rounds to the nearest code" in capsys.readouterr().err
