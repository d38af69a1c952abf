"""Pictures of a run's evaluation, from logs/RUN_ID.eval.json: a PNG beside it, and the numbers as tables.

    python tools/report.py                          # the newest run in logs/
    python tools/report.py logs/RUN_ID.eval.json --out picture.png

Left: bits per byte along the text, with and without adaptation. Middle: what adaptation gains by position in the
document. Right: seconds that each chunk took to score and to learn from.
"""
from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from shell import one_line_errors  # noqa: E402

NAMES = {"roundtrip": "windows side by side", "sliding": "sliding windows", "ttt": "with adaptation"}


def newest(folder: Path) -> Path:
    found = sorted(folder.glob("*.eval.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise tg.UserError(f"no *.eval.json in {folder}: a run writes one when its final scores are done")
    return found[-1]


def read(path: Path) -> dict:
    """What `train_gpt.final_scores` wrote. Raises UserError."""
    try:
        traces = json.loads(tg.read_file(str(path)))
        assert traces["tokens"] and all(traces["roundtrip"][part] for part in ("stream", "position", "seconds"))
        return traces
    except (ValueError, LookupError, TypeError, AssertionError):
        raise tg.UserError(f"{path} is not the .eval.json of a run") from None


def bpb(rows: list) -> list[float]:
    """Bits per byte of rows of (nats, bytes); nan where there is nothing."""
    return [nats / math.log(2) / size if size else math.nan for nats, size in rows]


def running(rows: list) -> list:
    """Sums of all rows up to each one."""
    sums, total = [], (0.0, 0.0)
    for nats, size in rows:
        total = total[0] + nats, total[1] + size
        sums.append(total)
    return sums


def gains(traces: dict) -> list[tuple[int, float, float, float]]:
    """(first position in the document, share of the bytes, bpb without adaptation, gain of it) where there is text."""
    plain = traces.get("sliding", traces["roundtrip"])["position"]
    adapted, total = traces["ttt"]["position"], sum(size for _, size in plain)
    return [(2 ** i - 1, before[1] / total, bpb([before])[0], bpb([before])[0] - bpb([after])[0])
            for i, (before, after) in enumerate(zip(plain, adapted)) if before[1]]


def tables(traces: dict) -> list[str]:
    walks = [key for key in NAMES if key in traces]
    lines = ["bits per byte up to this share of the text:"]
    at = [len(traces["roundtrip"]["stream"]) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    for key in walks:
        curve = bpb(running(traces[key]["stream"]))
        lines.append(f"  {NAMES[key]:<20} " + "  ".join(f"{25 * (i + 1):>3} % {curve[at[i]]:.4f}" for i in range(4)))
    if "ttt" in traces:
        lines.append("gain by position in the document:")
        lines += [f"  from token {first:>7,}  {100 * share:5.1f} % of the bytes  bpb {before:.4f}  gain {gain:+.4f}"
                  for first, share, before, gain in gains(traces)]
    return lines


def draw(traces: dict, path: Path) -> None:
    """Raises UserError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise tg.UserError("pictures need matplotlib: pip install matplotlib") from None
    adapted = "ttt" in traces
    figure = Figure(figsize=(15, 4.2) if adapted else (6, 4.2), layout="constrained")
    panels = figure.subplots(1, 3 if adapted else 1, squeeze=False)[0]
    for key in [key for key in NAMES if key in traces]:
        curve = bpb(running(traces[key]["stream"]))
        panels[0].plot([traces["tokens"] * (i + 1) / len(curve) for i in range(len(curve))], curve, label=NAMES[key])
    panels[0].set(xlabel="targets scored", ylabel="bits per byte so far", title="along the text")
    panels[0].legend()
    if adapted:
        rows = [row for row in gains(traces) if row[1] > 0.001]  # the first tokens' few bytes would dwarf all others
        panels[1].bar(range(len(rows)), [gain for *_, gain in rows], tick_label=[f"{first:,}" for first, *_ in rows])
        panels[1].tick_params(axis="x", rotation=60)
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set(xlabel="from this token of the document on", ylabel="bits per byte", title="gain of adaptation")
        for what, seconds in traces["ttt"]["seconds"].items():
            panels[2].plot(seconds, label=what)
        panels[2].set(xlabel="chunk", ylabel="seconds", title="time a chunk", ylim=(0, None))
        panels[2].legend()
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise tg.UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


@one_line_errors
def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="?", type=Path, metavar="RUN_ID.eval.json")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture (default: RUN_ID.eval.png)")
    args = parser.parse_args(argv)
    path = args.traces or newest(Path("logs"))
    traces, out = read(path), args.out or path.with_suffix(".png")
    print("\n".join(tables(traces)))
    draw(traces, out)
    print(f"picture: {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
