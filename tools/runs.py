"""Every run that is kept: when, profile and what differs from it, steps, bits per byte, bytes, state.

    bash run.sh runs
    python tools/runs.py
    bash run.sh runs ARTIFACT_DIR=elsewhere --last 20

Bits per byte of each phase: before quantisation, from the artifact, sliding windows, test-time training. "stopped" runs
ended without a word: they were killed, or their machine was.
"""
from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import profiles  # noqa: E402
import runlog  # noqa: E402
import shell  # noqa: E402

NOT_THE_SYSTEM = {"run_id", "artifact_dir", "profile", "resume", "code_bytes", "tokenizer_path"}


def differences(settings: dict[str, object]) -> str:
    """What a run's settings have otherwise than its profile, or than the defaults if that is not here any more."""
    name = settings.get("profile", "")
    values = profiles.parse(profiles.load(name).values) if name in profiles.names() else {}
    wanted = {f.name: values.get(f.name, f.default) for f in dataclasses.fields(tg.Hyperparameters)}
    unlike = {key: value for key, value in settings.items()
              if key not in NOT_THE_SYSTEM and key in wanted and value != wanted[key]}
    return " ".join(f"{key.upper()}={int(value) if isinstance(value, bool) else value}"
                    for key, value in unlike.items())


def row(run: runlog.Run) -> list[str]:
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.begun)) if run.begun else "-"
    steps = max((step for step, _, _ in [*run.steps, *run.validations]), default=0)
    return [run.name, begun, str(run.settings.get("profile") or "-"), f"{steps:,}",
            *(f"{run.bpb[phase]:.4f}" if phase in run.bpb else "-" for phase in runlog.PHASES),
            f"{run.total_bytes:,}" if run.total_bytes else "-", f"{run.state}: {run.why}" if run.why else run.state,
            differences(run.settings)]


def table(rows: list[list[str]], heads: list[str]) -> str:
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    line = lambda cells: "  ".join(cell.ljust(width) for cell, width in zip(cells, widths)).rstrip()
    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, rows)])


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    parser.add_argument("--last", type=int, default=0, metavar="N", help="the newest N only")
    args = parser.parse(argv)
    folder = runlog.home(os.environ)
    found = runlog.all_runs(folder)[-args.last:]
    if not found:
        raise shell.UsageError(f"no runs in {folder / 'runs'}: bash run.sh makes one")
    heads = ["run", "begun", "profile", "steps", "before", "artifact", "sliding", "ttt", "counts", "bytes", "state"]
    print(table([row(run) for run in found], [*heads, "other than the profile's"]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
