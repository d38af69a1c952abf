"""Two machines, as two launchers on loopback with a folder each: one is lost and comes back."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

QUICK = {"PET_RDZV_CONF": "keep_alive_interval=1,keep_alive_max_attempt=2", "PET_MONITOR_INTERVAL": "0.1",
         "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@pytest.fixture
def machine(corpus, tmp_path):
    """Starts the launcher of machine `number`, whose files are in a folder of its own. All are gone in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    started = []

    def start(number, **variables):
        command = [sys.executable, str(ROOT / "tools" / "launch.py"), "--nnodes=2", f"--node_rank={number}",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}", "--max_restarts=1", "--nproc_per_node=1",
                   str(ROOT / "train_gpt.py")]
        env = {**os.environ, **environment(corpus, tmp_path / str(number), **variables), **QUICK}
        with open(tmp_path / f"out{number}", "a") as out:
            started.append(subprocess.Popen(command, env=env, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT))
        return started[-1]
    yield start
    for launcher in started:
        lose(launcher)


def lose(launcher):
    """A machine without power: the launcher and its ranks."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    ranks = children.read_text().split() if launcher.poll() is None else []
    for pid in (launcher.pid, *map(int, ranks)) if launcher.poll() is None else ():
        os.kill(pid, signal.SIGKILL)
    launcher.wait()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks of a launcher in /proc")
def test_a_machine_is_lost_and_comes_back(machine, tmp_path):
    """The other one starts its ranks again, which wait for it; only machine 0 has files."""
    settings = {"ITERATIONS": 150, "CHECKPOINT_EVERY": 5, "TTT_ENABLED": 0, "EVAL_STRIDE": 0, "COMPRESS": "lzma"}
    second, first = machine(1, **settings), machine(0, **settings)  # torchrun would give rank 0 to the first
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("0/**/checkpoint.pt")):
        assert time.monotonic() < deadline and first.poll() is None, (tmp_path / "out0").read_text()
        time.sleep(0.02)
    lose(second)
    back = machine(1, **settings)
    outputs = lambda: "\n".join(path.read_text() for path in sorted(tmp_path.glob("out*")))
    assert first.wait(timeout=120) == 0 and back.wait(timeout=30) == 0, outputs()
    said = (tmp_path / "out0").read_text()
    assert said.count("world_size:2") == 2 and '"steps": 150' in said and "\nresume:step:" in said
    assert not (tmp_path / "1").exists(), "rank 0 is on machine 0, whatever the machines are called"
