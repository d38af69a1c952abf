"""Traces of the final scores, and the pictures of them."""
import json
import math
import os
import sys

import pytest
import torch
import train_gpt as tg
from conftest import ROOT
from test_evaluation import Scores, setting  # noqa: F401  (a fixture)

sys.path.append(str(ROOT / "tools"))
import report  # noqa: E402


def test_a_trace_has_every_nat_where_it_belongs(setting, rt):
    """Against a slow loop over the targets."""
    cfg, val, model = setting
    trace, scores = tg.Trace(val), Scores(len(val.tokens) - 1)

    def both(numbers, nll):
        trace(numbers, nll)
        scores(numbers, nll)
    tg.evaluate("test", model().nll, val, cfg, rt, tg.plan_evaluation(val, cfg, rt, 8, 16), observe=both)
    stream, position, begun = torch.zeros(256, 2).double(), torch.zeros(32, 2).double(), 0
    for t, nats in enumerate(scores.nll.tolist()):
        begun = t if val.tokens[t] == val.bos_id else begun
        size = val.sizes[t + 1].item()
        row = torch.tensor([nats, size]).double()
        stream[t * 256 // (len(val.tokens) - 1)] += row
        position[int(math.log2(t - begun + 1))] += row
    found = trace.tables(rt)
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
        gain = sum(share * gain for _, share, _, gain in report.gains(traces))
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
    for name, text in (("other.json", '{"tokens": 3}'), ("list.json", "[1]"), ("empty.json", ""), ("log.txt", "step:1"),
                       ("numbers.json", f'{{"tokens": 3, {parts}}}')):
        (tmp_path / name).write_text(text)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    bad = [([name], "is not the RUN_ID.eval.json") for name in ("other.json", "list.json", "empty.json", "log.txt",
                                                                "numbers.json", "binary")]
    for argv, message in (([], "no *.eval.json in logs"), (["nope.eval.json"], "cannot read nope.eval.json: No such"),
                          (["folder"], "cannot read folder: Is a dir"), (["--nonsense"], "unrecognized arguments"),
                          (["RUN_ID=a", "ARTIFACT_DIR=folder"], "no a.eval.json in folder/logs"), *bad):
        assert report.main(argv) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1 and "artifact" not in err


def test_the_picture_s_folder_must_exist(run, capsys):
    pytest.importorskip("matplotlib")
    done = run(ITERATIONS=1, TTT_ENABLED=0)
    assert report.main([str(done.folder / "logs" / "tiny.eval.json"), "--out", str(done.folder / "no" / "x.png")]) == 2
    assert "cannot write" in capsys.readouterr().err
