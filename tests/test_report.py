"""Traces of the final scores, and the pictures of them."""
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import train_gpt as tg
from conftest import ROOT
from test_evaluation import Scores, setting  # noqa: F401  (a fixture)
from test_runs import FAMILY_A, STEP, write_run

sys.path.append(str(ROOT / "tools"))
import charts  # noqa: E402
import report  # noqa: E402


def test_a_trace_has_every_nat_where_it_belongs(setting, rt):
    """Against a slow loop over the targets."""
    cfg, val, model = setting
    scores = Scores(len(val.tokens) - 1)
    tg.evaluate("test", model().nll, val, cfg, rt, tg.plan_evaluation(val, cfg, rt, 8, 16), observe=scores)
    stream, position, begun = torch.zeros(256, 2).double(), torch.zeros(32, 2).double(), 0
    for t, nats in enumerate(scores.nll.tolist()):
        begun = t if val.tokens[t] == val.bos_id else begun
        size = val.sizes[t + 1].item()
        row = torch.tensor([nats, size]).double()
        stream[t * 256 // (len(val.tokens) - 1)] += row
        position[int(math.log2(t - begun + 1))] += row
    found = tg.score_tables(val, scores.nll)
    torch.testing.assert_close(torch.tensor(found["stream"]).double(), stream, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found["position"]).double(), position, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"TTT_ENABLED": 0}, {"EVAL_STRIDE": 0, "TTT_MODE": "lora", "TTT_EPOCHS": 2},
                                      {"TTT_MODE": "lora", "TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16}])
def test_a_run_leaves_what_the_pictures_need(run, capsys, settings):
    done = run(ITERATIONS=2, **settings)
    path = done.folder / "logs" / "tiny.eval.json"
    traces = json.loads(path.read_text())
    for key in ("roundtrip", "sliding", "ttt"):
        wanted = done.summary[f"val_bpb_{key}"]
        assert (key in traces) == (wanted is not None)
        for part in ("stream", "position") if wanted else ():
            nats, size = (sum(column) for column in zip(*traces[key][part]))
            assert nats / math.log(2) / size == pytest.approx(wanted, rel=1e-6)
    if "ttt" in traces:
        assert sum(sum(seconds) for seconds in traces["ttt"]["seconds"].values()) <= done.summary["seconds"]["ttt"] + 0.001
        assert traces["ttt"]["seconds"]["learn"]
        gain = sum(share * gain for _, share, _, gain in charts.gains(traces))
        assert gain == pytest.approx((done.summary["val_bpb_sliding"] or done.summary["val_bpb_roundtrip"])
                                     - done.summary["val_bpb_ttt"], abs=1e-6)
    pytest.importorskip("matplotlib")
    assert report.main([str(path)]) == 0
    picture = path.with_suffix(".png")
    assert f"picture: {picture}" in capsys.readouterr().out and picture.read_bytes().startswith(b"\x89PNG")


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {"PATH": ""})
    (tmp_path / "folder").mkdir()
    parts = '"roundtrip": {"stream": [1], "position": [1], "seconds": {"a": 1}}'
    for name, text in (("other.eval.json", '{"tokens": 3}'), ("list.eval.json", "[1]"), ("empty.eval.json", ""),
                       ("log.txt", "step:1"), ("numbers.eval.json", f'{{"tokens": 3, {parts}}}')):
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.eval.json").write_bytes(b"\xff\xfe")
    bad = [([f"{name}.eval.json"], "is not the RUN_ID.eval.json")
           for name in ("other", "list", "empty", "numbers", "binary")]
    bad += [(["log.txt"], "has no line of a run"), (["binary.eval.json", "log.txt"], "is not UTF-8 text")]
    for argv, message in (([], "no runs in runs"), (["nope.eval.json"], "cannot read nope.eval.json: No such"),
                          (["folder"], "cannot read folder/events.jsonl: No such"),
                          (["--nonsense"], "unrecognized arguments"),
                          (["a", "ARTIFACT_DIR=folder"], "no run 'a' in folder/runs"), *bad):
        assert report.main(argv) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and "artifact" not in err


def test_the_picture_s_folder_must_exist(run, capsys):
    pytest.importorskip("matplotlib")
    done = run(ITERATIONS=1, TTT_ENABLED=0)
    assert report.main([str(done.folder / "logs" / "tiny.eval.json"), "--out", str(done.folder / "no" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err


# ---- the page ----------------------------------------------------------------------------------------------

@pytest.fixture
def page(run, capsys):
    """A page of two of our runs and a published log, and what was printed."""
    pytest.importorskip("plotly")
    for seed in (1, 2):
        assert run(ITERATIONS=4, SEED=seed, RUN_ID=f"r{seed}", VAL_LOSS_EVERY=2).code == 0
    (run.folder / "train_<b>.log").write_text(FAMILY_A)
    assert report.main(["r1", "r2", str(run.folder / "train_<b>.log"), f"ARTIFACT_DIR={run.folder}"]) == 0
    path = run.folder / "runs/r1/report.html"
    assert capsys.readouterr().out == f"page: {path}\n"
    return path


def charts_of(text):
    """The traces of each chart: what Plotly.newPlot is called with."""
    return [json.loads(found) for found in re.findall(r'Plotly\.newPlot\(\s*"[^"]*",\s*(\[.*?\]),\s*\{"', text)]


def test_the_page_needs_nothing_else_and_every_chart_has_data(page):
    text = page.read_text()
    assert not re.search(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?http", text)
    assert "<td>SEED</td>" in text and "<td>MODEL_DIM" not in text and "<b>.log" not in text
    charts = charts_of(text)
    assert len(charts) == 4
    for traces in charts:
        assert traces and all(len(trace["x"]) and len(trace["y"]) for trace in traces)
    assert len({trace["name"] for trace in charts[0]}) == 3 and any("&lt;b" in trace["name"] for trace in charts[0])


def test_the_page_in_a_browser(page, tmp_path):
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("no chromium")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking " \
        "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=5000 --dump-dom"
    done = subprocess.run([browser, *quiet.split(), f"--user-data-dir={tmp_path}/browser", page.as_uri()],
                          capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr and done.stdout.count('class="main-svg"') >= 4


def test_a_page_of_a_run_that_goes_on(tmp_path, capsys):
    pytest.importorskip("plotly")
    write_run(tmp_path, "young")
    assert report.main(["young", f"ARTIFACT_DIR={tmp_path}"]) == 2
    assert capsys.readouterr().err == "error: young is running and has logged no step so far: there is nothing to draw\n"
    write_run(tmp_path, "older", STEP, {**STEP, "step": 4})
    assert report.main(["older", f"ARTIFACT_DIR={tmp_path}", "--out", str(tmp_path / "x.html")]) == 0
    assert "still running" in capsys.readouterr().out and len(charts_of((tmp_path / "x.html").read_text())) == 1
