"""Runs as one HTML page that needs nothing else: plotly's charts, its JavaScript inside. And what pictures share."""
from __future__ import annotations

import html
import itertools
import math

from pathlib import Path

from runlog import PHASES, Run
from shell import UsageError, optional

TITLES = {"pre_quant": "before quantisation", "roundtrip": "from the artifact", "sliding": "sliding windows",
          "ttt": "test-time training", "ngram": "counts"}
COLOURS = ["#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"]
MENTIONED = 0.001  # share of the bytes; the first tokens' few would dwarf all others
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1150px; padding: 0 1em; color: #222 }
table { border-collapse: collapse } td, th { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere }"""


# ---- pictures of matplotlib ----------------------------------------------------------------------------------
def picture(what: str, width: float, height: float):
    """An empty figure, in inches; `what` wants it. Raises UsageError."""
    figure = optional("matplotlib.figure", what, "matplotlib")
    return figure.Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> None:
    """Raises UsageError."""
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


# ---- eval.json -----------------------------------------------------------------------------------------------
def bpb(rows: list) -> list[float]:
    """Bits per byte of rows of (nats, bytes); nan where there is nothing."""
    return [nats / math.log(2) / size if size else math.nan for nats, size in rows]


def running(rows: list) -> list[float]:
    """Bits per byte of all rows up to each one."""
    return bpb(list(itertools.accumulate(rows, lambda sums, row: (sums[0] + row[0], sums[1] + row[1]))))


def places(traces: dict) -> list[float]:
    """How many targets are scored at the end of each row of a stream."""
    count = len(traces["roundtrip"]["stream"])
    return [traces["tokens"] * (i + 1) / count for i in range(count)]


def gains(traces: dict) -> list[tuple[int, float, float, float]]:
    """Rows (first position in the document, share of the bytes, bpb without adaptation, gain of adaptation)."""
    plain = traces.get("sliding", traces["roundtrip"])["position"]
    adapted, total = traces["ttt"]["position"], sum(size for _, size in plain)
    rows = enumerate(zip(bpb(plain), bpb(adapted), plain))
    return [(2 ** i - 1, size / total, before, before - after) for i, (before, after, (_, size)) in rows if size]


# ---- the page ------------------------------------------------------------------------------------------------
def plotly():
    return (optional(f"plotly.{part}", "a report") for part in ("graph_objects", "subplots"))


def training(runs: list[Run]):
    """Loss, learning rate and step time, against steps on the left and seconds on the right."""
    go, subplots = plotly()
    rows = {"training loss, nats": lambda run: run.steps, "validation, bits per byte": lambda run: run.validations,
            "learning rate, of its peak": lambda run: [row for row in run.lr_scales if row[2] is not None],
            "ms per step": lambda run: run.step_times}
    rows = {title: take for title, take in rows.items() if any(take(run) for run in runs)}
    figure = subplots.make_subplots(len(rows), 2, shared_xaxes="columns", shared_yaxes="rows", vertical_spacing=0.04,
                                    horizontal_spacing=0.03)
    for y, (title, take) in enumerate(rows.items(), 1):
        for i, run in enumerate(runs):
            points = take(run)
            for x in (1, 2) if points else ():
                figure.add_trace(go.Scatter(
                    x=[p[x - 1] for p in points], y=[p[2] for p in points], name=html.escape(run.name),
                    legendgroup=str(i), showlegend=y == 1 and x == 1,
                    mode="lines+markers" if len(points) < 40 else "lines", line_color=COLOURS[i % len(COLOURS)]), y, x)
        figure.update_yaxes(title_text=title, row=y, col=1)
    figure.update_xaxes(title_text="step", row=len(rows), col=1)
    figure.update_xaxes(title_text="seconds of training", row=len(rows), col=2)
    return figure.update_layout(height=240 * len(rows) + 60)


def phases(runs: list[Run]):
    go, _ = plotly()
    figure = go.Figure()
    for i, run in enumerate(runs):
        have = [phase for phase in PHASES if phase in run.bpb]
        figure.add_trace(go.Scatter(x=[TITLES[phase] for phase in have], y=[run.bpb[phase] for phase in have],
                                    name=html.escape(run.name), mode="lines+markers",
                                    line_color=COLOURS[i % len(COLOURS)]))
    figure.data = [trace for trace in figure.data if trace.x]
    return figure.update_layout(yaxis_title="bits per byte", height=380).update_xaxes(
        categoryorder="array", categoryarray=list(TITLES.values()))


def adaptation(runs: list[Run]):
    """What test-time training gains: along the text so far, and by position in the document."""
    go, subplots = plotly()
    figure = subplots.make_subplots(1, 2, subplot_titles=["along the text, up to here", "by position in the document"])
    for i, run in enumerate(runs):
        if "ttt" not in run.traces:
            continue
        plain, adapted = run.traces.get("sliding", run.traces["roundtrip"]), run.traces["ttt"]
        gain = [before - after for before, after in zip(running(plain["stream"]), running(adapted["stream"]))]
        look = {"name": html.escape(run.name), "legendgroup": str(i)}
        figure.add_trace(go.Scatter(x=places(run.traces), y=gain, line_color=COLOURS[i % len(COLOURS)], **look), 1, 1)
        rows = [row for row in gains(run.traces) if row[1] > MENTIONED]
        figure.add_trace(go.Bar(x=[f"{first:,}" for first, *_ in rows], y=[g for *_, g in rows], showlegend=False,
                                marker_color=COLOURS[i % len(COLOURS)], **look), 1, 2)
    figure.update_xaxes(title_text="targets scored", row=1, col=1)
    figure.update_xaxes(title_text="from this token on", row=1, col=2)
    return figure.update_layout(yaxis_title="bits per byte gained", height=400)


def artifact(runs: list[Run]):
    go, _ = plotly()
    streams = list(dict.fromkeys(row["stream"] for run in runs for row in run.ledger))
    have = [run for run in runs if run.ledger]
    figure = go.Figure()
    for stream in streams:
        sizes = [sum(row["packed_bytes"] for row in run.ledger if row["stream"] == stream) for run in have]
        figure.add_trace(go.Bar(name=stream, y=[html.escape(run.name) for run in have], x=sizes, orientation="h"))
    return figure.update_layout(barmode="stack", xaxis_title="bytes", height=120 + 50 * len(have))


def settings_table(runs: list[Run]) -> str:
    """The settings that differ between the runs that tell them."""
    keys = sorted({key for run in runs for key in run.settings} - {"run_id", "artifact_dir"})
    text = lambda run, key: html.escape(str(run.settings.get(key, "-")))
    rows = [(key, [text(run, key) for run in runs]) for key in keys]
    rows = [(key, cells) for key, cells in rows if len(set(cells) - {"-"}) > 1]
    if not rows:
        return "<p>None that two of the runs tell.</p>"
    return table(["setting", *(html.escape(run.name) for run in runs)],
                 [[html.escape(key.upper()), *cells] for key, cells in rows])


def table(heads: list[str], rows: list[list[str]]) -> str:
    line = lambda tag, cells: "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
    return "<table>" + line("th", heads) + "".join(line("td", row) for row in rows) + "</table>"


def overview(runs: list[Run]) -> str:
    number = lambda value, form: format(value, form) if value else "-"
    return table(["run", "state", "steps", *TITLES.values(), "bytes", "training, s", "audit"], [
        [html.escape(run.name), html.escape(f"{run.state} {run.why}"),
         f"{max((row[0] for row in [*run.steps, *run.validations]), default=0):,}",
         *(number(run.bpb.get(phase), ".4f") for phase in PHASES), number(run.total_bytes, ",d"),
         number(run.train_seconds, ".1f"), html.escape(run.audit or "-")] for run in runs])


def page(runs: list[Run]) -> str:
    """The whole page. Raises UsageError without plotly."""
    parts = [("Training", training, any(run.steps or run.validations for run in runs)),
             ("Bits per byte after each phase", phases, any(run.bpb for run in runs)),
             ("What test-time training gains", adaptation, any("ttt" in run.traces for run in runs)),
             ("Where the artifact's bytes are", artifact, any(run.ledger for run in runs))]
    body, first = [], True
    for title, draw, has_data in parts:
        if has_data:
            figure = draw(runs).update_layout(margin={"t": 40, "r": 10}, template="plotly_white")
            body.append(f"<h2>{title}</h2>" + figure.to_html(full_html=False, include_plotlyjs=first,
                                                              config={"displaylogo": False, "displayModeBar": "hover"}))
            first = False
    name = html.escape(", ".join(run.name for run in runs))
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{name}</title><link rel=icon href='data:,'>"
            f"<style>{STYLE}</style></head><body><h1>{name}</h1>{overview(runs)}{''.join(body)}"
            f"<h2>Settings that differ</h2>{settings_table(runs)}</body></html>\n")
