"""Runs of train_gpt.py as forks of a process that has imported it once: importing PyTorch takes longer than a tiny run."""
from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # small runs, and as many as there are cores

import sentencepiece  # noqa: E402, F401 - it is imported late, and costs as much as a small run does
import train_gpt as tg  # noqa: E402


class Fork:
    """`main` of train_gpt.py in a process of its own. `environment`: its variables, and no others; `out`: the file
    that gets what it prints; `limit_bytes`: the largest file it can write (0: any), as if the disk were full."""

    def __init__(self, environment: dict[str, str], out: Path, limit_bytes: int = 0, main=tg.main):
        self.out, self.code, self.begun = out, None, time.monotonic()
        out.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        # a pipe has no limit; it holds all that a small run prints
        opened = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self.pipe, file = os.pipe() if limit_bytes else (-1, os.open(out, opened, 0o644))
        if limit_bytes:
            fcntl.fcntl(file, fcntl.F_SETPIPE_SZ, 1 << 20)
        self.pid = os.fork()
        if self.pid == 0:
            self._become(environment, limit_bytes, file, main)
        os.close(file)

    def _become(self, environment: dict[str, str], limit_bytes: int, file: int, main) -> None:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(file, stream)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a process that a shell has started
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if limit_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
            os.environ.clear()
            os.environ.update(environment)
            code = main([])
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
            if pid and self.pipe >= 0:
                with open(self.pipe, "rb") as told, open(self.out, "ab") as file:
                    file.write(told.read())
        return self.code

    def wait(self, seconds: float) -> int | None:
        """The exit code once it has ended; None, and it is killed, if it takes longer."""
        until = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        if self.code is None:
            self.send(signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.code = -signal.SIGKILL
            return None
        return self.code

    def send(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def printed(self) -> str:
        return self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else ""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(world: int, environment: dict[str, str], out: Path) -> list[Fork]:
    """A run of `world` ranks over gloo, without a launcher. Rank r prints into OUT.r"""
    common = {**environment, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(free_port())}
    return [Fork({**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, out.with_name(f"{out.name}.{rank}"))
            for rank in range(world)]


def run_worlds(worlds: list[str]) -> int:
    """The environment's run with so many ranks over gloo each, in ARTIFACT_DIR/RANKS. Returns an exit code."""
    folder = Path(os.environ.get("ARTIFACT_DIR", "."))
    for world in worlds:
        ranks = start_ranks(int(world), {**os.environ, "ARTIFACT_DIR": str(folder / world)}, folder / world / "out")
        codes = [rank.wait(300) for rank in ranks]
        if any(codes):
            print("".join(rank.printed() for rank in ranks if rank.code), file=sys.stderr)
            return 1
    return 0
