"""What a run measures as TensorBoard event files or in Weights & Biases, while it runs: run.sh starts it when asked.

    bash run.sh smoke TENSORBOARD=1                      # then: tensorboard --logdir runs
    bash run.sh smoke WANDB_ENABLED=1 WANDB_MODE=offline WANDB_PROJECT=mine
    python tools/track.py RUN_ID TENSORBOARD=1           # of a run that is over, or of one that runs

It follows runs/RUN_ID/events.jsonl, so the numbers are those of the file; a tracker that fails does not touch the run.
"""
from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from shell import Parser, UsageError, one_line_errors, optional, take_settings
import runlog

POLL_SECONDS = 1.0
SWITCHES = ["TENSORBOARD", "WANDB_ENABLED", "ARTIFACT_DIR", "OUT_DIR", "RUN_ID"]


def scalars(event: dict) -> dict[str, float]:
    """The numbers of an event by what they measure: train/train_loss, legal_ttt/bpb."""
    kind = event.get("name") or event["event"]
    return {f"{kind}/{key}": value for key, value in event.items()
            if key not in ("time", "step", "pid") and isinstance(value, (int, float)) and not isinstance(value, bool)}


def follow(path: Path, ended) -> Iterator[dict]:
    """The events of a file, as they come, until `ended()` and all is read."""
    place = 0
    while True:
        last = ended()
        if path.is_file():
            with open(path, "rb") as file:
                file.seek(place)
                for line in file:
                    if line.endswith(b"\n"):
                        place += len(line)
                        with contextlib.suppress(ValueError):  # half a line of a killed run, then a resumed one's
                            yield json.loads(line)
        if last:
            return
        time.sleep(POLL_SECONDS)


class TensorBoard:
    def __init__(self, folder: Path, settings: dict):
        optional("tensorboard", "TENSORBOARD=1")
        self.writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))
        self.writer.add_text("settings", "\n".join(f"    {key.upper()}={value}" for key, value in settings.items()))

    def log(self, values: dict[str, float], step: int, at: float) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step, walltime=at)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandB:
    def __init__(self, folder: Path, settings: dict):
        self.run = optional("wandb", "WANDB_ENABLED=1").init(project=os.environ.get("WANDB_PROJECT", "parameter-golf"),
                                                                name=folder.name, config=settings, dir=str(folder))

    def log(self, values: dict[str, float], step: int, at: float) -> None:
        self.run.log({**values, "step": step, "time": at})

    def close(self) -> None:
        self.run.finish()


def track(folder: Path, kinds: list, ended) -> int:
    """Send the run's events to each kind of tracker. Returns how many numbers there were."""
    trackers, step, count = [], 0, 0
    for event in follow(folder / "events.jsonl", ended):
        if event["event"] == "settings":
            trackers = trackers or [kind(folder, event["all"]) for kind in kinds]
            continue
        step, values = event.get("step", step), scalars(event)
        count += len(values)
        for tracker in trackers:
            tracker.log(values, step, event["time"])
    for tracker in trackers:
        tracker.close()
    return count


@one_line_errors
def main(argv: list[str]) -> int:
    parser = Parser(__doc__)
    parser.add_argument("run", nargs="?", metavar="RUN_ID", default=None)
    settings, rest = take_settings(argv, SWITCHES)
    run_id = parser.parse_args(rest).run or settings.get("RUN_ID") or os.environ.get("RUN_ID")
    asked = lambda key: settings.get(key, os.environ.get(key, "0")) not in ("", "0")
    kinds = [kind for key, kind in (("TENSORBOARD", TensorBoard), ("WANDB_ENABLED", WandB)) if asked(key)]
    if not run_id or not kinds:
        raise UsageError("track needs a RUN_ID, and TENSORBOARD=1 or WANDB_ENABLED=1")
    folder = runlog.home({**os.environ, **settings}) / "runs" / run_id
    over = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))  # run.sh: the run has ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run is interrupted, too, and its last lines are wanted
    parent = os.getppid()
    if "RUN_SH_TRACKS" in os.environ:
        ended = lambda: bool(over) or os.getppid() != parent
    else:
        ended = lambda: bool(over) or runlog.read(folder).state != "running"
    print(f"tracked: {track(folder, kinds, ended)} numbers of {run_id}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
