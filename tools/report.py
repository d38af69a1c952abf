"""Runs and published logs as charts: one HTML page that needs nothing else, or a PNG of an evaluation.

    python tools/report.py                                    # the newest run; ARTIFACT_DIR= says where
    python tools/report.py RUN_ID other/train_seed42.log      # laid over each other: ours, and published logs
    python tools/report.py logs/RUN_ID.eval.json --out picture.png

The page, beside the first run unless --out names it: loss, learning rate and step time against steps and seconds; bits
per byte after each phase; what adaptation gains along the text and by position in the document; bytes of the artifact;
settings that differ. Of a run that is still going it shows what there is.

The PNG is made of a RUN_ID.eval.json, which is also printed as tables.
Left: bits per byte along the text, with and without adaptation. Middle: what adaptation gains by position in the
document. Right: seconds that each chunk took to score and to learn from.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import charts  # noqa: E402
import runlog  # noqa: E402
import shell  # noqa: E402

NAMES = {"roundtrip": "windows side by side", "sliding": "sliding windows", "ttt": "with adaptation"}


def read(path: Path) -> dict:
    """What `train_gpt.final_scores` wrote. Raises UserError."""
    try:
        traces = json.loads(path.read_text(encoding="utf-8"))
        assert traces["tokens"] and all(traces["roundtrip"][part] for part in ("stream", "position", "seconds"))
        tables(traces)
        return traces
    except OSError as error:
        raise tg.UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError):
        raise tg.UserError(f"{path} is not the RUN_ID.eval.json that a run writes beside its log") from None


def tables(traces: dict) -> list[str]:
    evaluations = [key for key in NAMES if key in traces]
    lines = ["bits per byte up to this share of the text:"]
    at = [len(traces["roundtrip"]["stream"]) * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    for key in evaluations:
        curve = charts.running(traces[key]["stream"])
        lines.append(f"  {NAMES[key]:<20} " + "  ".join(f"{25 * (i + 1):>3} % {curve[at[i]]:.4f}" for i in range(4)))
    if "ttt" in traces:
        lines.append("gain by position in the document:")
        lines += [f"  from token {first:>7,}  {100 * share:5.1f} % of the bytes  bpb {before:.4f}  gain {gain:+.4f}"
                  for first, share, before, gain in charts.gains(traces)]
    return lines


def draw(traces: dict, path: Path) -> None:
    """Raises UserError."""
    adapted = "ttt" in traces
    figure = charts.picture("a picture", 15 if adapted else 6, 4.2)
    panels = figure.subplots(1, 3 if adapted else 1, squeeze=False)[0]
    for key in [key for key in NAMES if key in traces]:
        panels[0].plot(charts.places(traces), charts.running(traces[key]["stream"]), label=NAMES[key])
    panels[0].set(xlabel="targets scored", ylabel="bits per byte so far", title="along the text")
    panels[0].legend()
    if adapted:
        rows = [row for row in charts.gains(traces) if row[1] > charts.MENTIONED]
        panels[1].bar(range(len(rows)), [gain for *_, gain in rows], tick_label=[f"{first:,}" for first, *_ in rows])
        panels[1].tick_params(axis="x", rotation=60)
        panels[1].axhline(0, color="black", linewidth=0.8)
        panels[1].set(xlabel="from this token of the document on", ylabel="bits per byte", title="gain of adaptation")
        for what, seconds in traces["ttt"]["seconds"].items():
            panels[2].plot(seconds, label=what)
        panels[2].set(xlabel="chunk", ylabel="seconds", title="time per chunk", ylim=(0, None))
        panels[2].legend()
    charts.save(figure, path)


def picture_of(path: Path, out: Path | None) -> None:
    traces, out = read(path), out or path.with_suffix(".png")
    print("\n".join(tables(traces)))
    draw(traces, out)
    print(f"picture: {out}")


def page_of(names: list[str], folder: Path, out: Path | None) -> None:
    runs = [runlog.find(name, folder) for name in names] or runlog.all_runs(folder)[-1:]
    if not runs:
        raise shell.UsageError(f"no runs in {folder / 'runs'}: bash run.sh makes one")
    for run in runs:
        if not run.steps and not run.validations and not run.bpb:
            raise shell.UsageError(f"{run.name} is {run.state} and has logged no step so far: there is nothing to draw")
        if run.state == "running":
            print(f"{run.name} is still running: what it has logged so far")
    out = out or runs[0].path.with_name("report.html")
    tg.write_atomically(out, charts.page(runs).encode())
    print(f"page: {out}")


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_ID, LOG or EVAL.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page or the picture (default: beside its source)")
    args = parser.parse(argv)
    if len(args.runs) == 1 and args.runs[0].endswith("eval.json"):
        picture_of(Path(args.runs[0]), args.out)
    else:
        page_of(args.runs, runlog.home(os.environ), args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
