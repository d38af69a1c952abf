"""tools/record.py: the built train_gpt.py is the same program, and the folder says what was measured."""
from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from types import SimpleNamespace

import pytest
from conftest import ROOT, environment

pytest.importorskip("python_minifier")
sys.path.append(str(ROOT / "tools"))
import record  # noqa: E402


def load(path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


cached_build = functools.cache(record.build)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """The readable script and the built one, each alone in a folder."""
    folder = tmp_path_factory.mktemp("scripts")
    paths = {name: folder / name / "train_gpt.py" for name in ("readable", "built")}
    for path in paths.values():
        path.parent.mkdir()
    shutil.copy(ROOT / "train_gpt.py", paths["readable"])
    assert record.main(["build", "--source", str(paths["readable"]), "--out", str(paths["built"])]) == 0
    return SimpleNamespace(**paths)


@pytest.fixture(scope="module")
def modules(scripts):
    return SimpleNamespace(readable=load(scripts.readable, "readable_train_gpt"),
                           built=load(scripts.built, "built_train_gpt"))


def start(script, cwd, **variables):
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
    clean = {k: v for k, v in os.environ.items() if k not in unwanted}
    return subprocess.Popen([sys.executable, script], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**clean, "OMP_NUM_THREADS": "1", **variables})


@pytest.fixture(scope="module")
def runs(scripts, corpus):
    """The same tiny training by both scripts, side by side, each in its own folder."""
    def finish(process):
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return json.loads(out.strip().splitlines()[-1].removeprefix("summary: ")), out
    settings = environment(corpus, ".", SEED=7, VAL_LOSS_EVERY=3)
    started = [start("train_gpt.py", s.parent, **settings) for s in (scripts.readable, scripts.built)]
    found = SimpleNamespace(**dict(zip(("readable", "built"), map(finish, started))))
    for folder in (script.parent / "runs/tiny" for script in (scripts.readable, scripts.built)):
        digest = hashlib.sha256((folder / "final_model.ptz").read_bytes()).hexdigest()
        (folder / "audit.json").write_text(json.dumps({"verdict": "pass", "artifact_sha256": digest}, indent=1))
        (folder / "audit.txt").write_text("audit:pass\n")
    return found


# ---- the built file ----------------------------------------------------------------------------------------

def test_two_builds_are_equal_and_small(scripts):
    source, built = scripts.readable.read_text(), scripts.built.read_bytes()
    assert record.build(source) == built
    assert len(built) < 50_000 and len(built) < 0.2 * len(source)
    first, second, *_ = built.splitlines()
    assert first == b"# -*- coding: latin-1 -*-" and hashlib.sha256(source.encode()).hexdigest().encode() in second


def test_newer_pythons_build_the_same(scripts, monkeypatch):
    from python_minifier import expression_printer
    newer = SimpleNamespace(**{**vars(sys), "version_info": (3, 13, 0)})
    monkeypatch.setattr(expression_printer, "sys", newer)
    assert record.build(scripts.readable.read_text()) == scripts.built.read_bytes()


def test_any_bytes_survive_in_a_latin1_literal():
    """Alone, in every pair - an octal escape takes up to three digits - and in a file that Python runs."""
    data = b"".join(bytes([a, b]) for a in range(256) for b in (0, 10, 13, 39, 48, 55, 56, 92, 255))
    file = f"# -*- coding: latin-1 -*-\ndata = '{record.latin1_literal(data)}'\n".encode("latin1")
    names = {}
    exec(compile(file, "file", "exec"), names)
    assert names["data"].encode("latin1") == data
    assert b"\0" not in file and b"\r" not in file and file.count(b"\n") == 2  # git takes it for text, and keeps it


def test_the_payload_is_the_program_without_what_only_people_read(scripts):
    """The source's tree, stripped here by other means, is the payload's."""
    tree = ast.parse(scripts.readable.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "env_field":
            node.args[1] = ast.Constant("")
        if isinstance(node, ast.arg) and not (node.annotation and ast.unparse(node.annotation) == "tl.constexpr"):
            node.annotation = None
    text = record.unpack(scripts.built.read_bytes())
    assert ast.dump(ast.parse(text, feature_version=(3, 10))) == ast.dump(tree)
    assert text.splitlines() == text.split("\n")  # no odd line ends: line numbers of tracebacks are right


def test_a_help_text_is_dropped_wherever_it_stands():
    source = ("def env_field(default, *, help, lo=None):\n    return default, help, lo\n"
              "a = env_field(1, lo=2, help='uno')\nb = other(1, 'due')\n")
    text = record.minify(source)
    assert "uno" not in text and "due" in text and "env_field(1,lo=2,help='')" in text
    assert "env_field(1,'',lo=2)" in record.minify(source.replace("*, help", "help, *").replace("1, lo=2, help=", "1, ")
                                                   .replace("'uno'", "'uno' + str(1), lo=2"))


def test_show_prints_the_code(scripts, tmp_path, capsys):
    assert record.main(["show", str(scripts.built)]) == 0
    assert capsys.readouterr().out == record.unpack(scripts.built.read_bytes()) + "\n"
    for content in (b"", b"x = 'no code'", b"x = (", b"\xff"):
        (tmp_path / "other.py").write_bytes(content)
        assert record.main(["show", str(tmp_path / "other.py")]) == 2
        assert capsys.readouterr().err == "error: not a file made by `record.py build`\n"


def test_it_imports_as_a_module_with_the_same_settings(scripts, modules):
    """The help texts excepted, which the built file has none of."""
    describe = lambda module: [(f.name, f.type, f.default, {**f.metadata, "help": ""})
                               for f in dataclasses.fields(module.Hyperparameters)]
    assert describe(modules.built) == describe(modules.readable)
    assert not any(f.metadata["help"] for f in dataclasses.fields(modules.built.Hyperparameters))
    assert modules.built.Hyperparameters.model_dim == modules.readable.Hyperparameters.model_dim
    assert set(vars(modules.readable)) <= set(vars(modules.built))
    assert modules.built.__file__ == str(scripts.built) and sys.excepthook is not traceback.print_exception


def test_source_lines_can_be_seen(modules):
    function = modules.built.env_names
    assert inspect.getsource(function).startswith("def env_names(f):return")
    with pytest.raises(AttributeError) as caught:
        function(None)
    text = "".join(traceback.format_exception(caught.value))
    assert f'File "{record.PAYLOAD}", line ' in text and "    def env_names(f):return" in text


def test_triton_reads_its_kernels_in_the_built_script(modules):
    pytest.importorskip("triton")
    import torch
    x = torch.randn(2, 24, 16, device="cuda" if torch.cuda.is_available() else "cpu", dtype=torch.float16)
    assert modules.built.suits_triton("triton", x.dtype, *x.shape[1:])
    torch.testing.assert_close(modules.built.symmetric_product(x, kernels="triton"), x @ x.mT, rtol=1e-2, atol=1e-2)


def test_an_uncaught_error_shows_its_line(tmp_path):
    source, out = tmp_path / "crash.py", tmp_path / "out.py"
    source.write_text('"""Crashes."""\ndef crash(x: int) -> int:\n    return 1 // x\n\ncrash(0)\n')
    assert record.main(["build", "--source", str(source), "--out", str(out)]) == 0
    process = start("out.py", tmp_path)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "def crash(x):return 1//x" in error and "ZeroDivisionError" in error


def test_help_and_refusals_are_those_of_the_source(modules, monkeypatch, capsys):
    assert modules.built.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("Parameter Golf") and "where the comments and the meaning of each setting are" in text
    settings = {f.name: f for f in dataclasses.fields(modules.readable.Hyperparameters)}
    for name, f in settings.items():
        line = next(line for line in text.splitlines() if line.startswith(f"  {name.upper()} "))
        assert line.endswith(f" [{modules.readable.describe_range(f)}]") and not f.metadata["help"] in line
    monkeypatch.setenv("WARMDRON_ITERS", "3")
    said = [(module.main([]), capsys.readouterr()) for module in (modules.readable, modules.built)]
    assert said[0] == said[1] and said[0][0] == 2 and "WARMDOWN_ITERS" in said[0][1].err


def test_both_train_to_the_same_numbers_and_bytes(scripts, runs):
    def numbers(text):
        return re.findall(r"(?:train_loss|val_loss|val_bpb|grad_norm):\S+", text)
    (readable, said), (built, says) = runs.readable, runs.built
    assert len(numbers(said)) > 15 and numbers(said) == numbers(says)
    assert built["code_bytes"] == os.path.getsize(scripts.built) < readable["code_bytes"]
    same = [k for k in readable if k.startswith("val_bpb") or k in ("artifact_bytes", "steps", "tokens")]
    assert [readable[k] for k in same] == [built[k] for k in same]
    one, other = (s.parent / "final_model.ptz" for s in (scripts.readable, scripts.built))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("text, message", [
    (None, "cannot read"), (b"\xff\xfe", "not UTF-8"), (b"x = (", "line 1"),
    (b"type X = int", "Python 3.10")])
def test_bad_sources_get_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "in.py").write_bytes(text)
    code = record.main(["build", "--source", str(tmp_path / "in.py"), "--out", str(tmp_path / "out.py")])
    error = capsys.readouterr().err
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out.py").exists()


def test_the_source_is_not_overwritten(scripts, capsys):
    before = scripts.readable.read_bytes()
    assert record.main(["build", "--source", str(scripts.readable), "--out", str(scripts.readable)]) == 2
    assert "is the source itself" in capsys.readouterr().err and scripts.readable.read_bytes() == before


# ---- the folder --------------------------------------------------------------------------------------------

@pytest.fixture
def fold(scripts, runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "build", cached_build)

    def call(*names, **changes):
        options = {"runs": tmp_path if names else scripts.built.parent, "author": "A", "github-id": "a",
                   "blurb": "Tiny.", "date": "2026-01-02", "records": tmp_path, "source": scripts.readable, **changes}
        words = (str(word) for key, value in options.items() for word in (f"--{key}", value))
        code = record.main(["Tiny", *(names or ["tiny"]), "--own-data", *words])
        return code, capsys.readouterr().err
    return call


def test_the_folder_holds_what_the_rules_ask(fold, scripts, runs, tmp_path):
    assert fold() == (0, "")
    folder = tmp_path / "2026-01-02_Tiny"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "requirements.txt", "submission.json", "tiny.audit.json", "tiny.audit.txt", "tiny.txt",
        "train_gpt.py", "train_gpt_readable.py"]
    entry, (summary, _) = json.loads((folder / "submission.json").read_text()), runs.built
    assert {"author", "github_id", "name", "date", "blurb"} <= set(entry) and entry["seeds"] == [7]
    assert entry["val_bpb"] == summary["val_bpb_ttt"] and entry["bytes_total"] == summary["total_bytes"]
    assert (folder / "train_gpt.py").read_bytes() == scripts.built.read_bytes()
    text = (folder / "README.md").read_text()
    assert f"{entry['val_bpb']:.6f}" in text and "3 layers of width 32, 4 heads, 2 of them for keys" in text
    assert re.search(r"^[A-Z_]+=.* MODEL_DIM=32 .* python train_gpt.py$", text, re.M)


def test_a_run_of_the_readable_script_counts_the_built_one(fold, scripts, tmp_path):
    assert fold(runs=scripts.readable.parent) == (0, "")
    entry = json.loads((tmp_path / "2026-01-02_Tiny" / "submission.json").read_text())
    assert entry["bytes_code"] == os.path.getsize(scripts.built)


@pytest.fixture
def logs(scripts, runs, tmp_path):
    """`logs(seed, NAME=change)`: a copy of the run as that of another seed, with texts changed by functions."""
    def copy(seed=7, **changes):
        folder = tmp_path / f"runs/r{seed}"
        shutil.copytree(scripts.built.parent / "runs/tiny", folder, dirs_exist_ok=True)
        for name in ("log.txt", "events.jsonl", "summary.json", "audit.json"):
            text = (folder / name).read_text()
            if name in ("log.txt", "events.jsonl"):
                text = re.sub(r'^seed:7$|"seed": 7\b', lambda m: m[0].replace("7", str(seed)), text, flags=re.M)
            (folder / name).write_text(changes.get(name.partition(".")[0], str)(text))
        return folder.name
    return copy


def made(tmp_path):
    return [path for path in tmp_path.iterdir() if path.name != "runs"]


def test_a_record_is_of_runs_that_differ_in_their_seed_only(fold, logs, tmp_path):
    def changed(**settings):
        return lambda text: re.sub(rf'"({"|".join(settings)})": [^,}}]+', lambda m: f'"{m[1]}": {settings[m[1]]}', text)
    one, two = logs(1), logs(2, events=changed(run_id='"b"', artifact_dir='"b"', train_log_every=9, checkpoint_every=7))
    assert fold(one, two) == (0, "")
    entry = json.loads((tmp_path / "2026-01-02_Tiny" / "submission.json").read_text())
    text = (tmp_path / "2026-01-02_Tiny" / "README.md").read_text()
    assert entry["seeds"] == [1, 2] and "MODEL_DIM=32" in text and "SEED=" not in text and "RUN_ID=" not in text
    shutil.rmtree(tmp_path / "2026-01-02_Tiny")
    for name, change, said in (
            ("events", changed(model_dim=64, iterations=20), "(ITERATIONS: 6 and 20, MODEL_DIM: 32 and 64)"),
            ("events", changed(data_path='"./other"'), "DATA_PATH: "), ("events", changed(ttt_lr=0.5), "TTT_LR: "),
            ("events", changed(bytes=77), "artifact_bytes is"),
            ("events", lambda text: re.sub(r'(?m)^(.*_roundtrip.*"bytes": )\d+', r"\g<1>77", text),
             "validation text: "),
            ("log", lambda text: text.replace("device:cpu", "device:cuda:0"), "device: cpu and cuda:0"),
            ("log", lambda text: text.replace("world_size:1", "world_size:8"), "number of processes: 1 and 8")):
        code, error = fold(one, logs(2, **{name: change}))
        assert code == 2 and said in error and error.count("\n") == 1 and not made(tmp_path), said


def test_a_summary_that_its_log_does_not_bear_is_refused(fold, logs, runs, tmp_path):
    """Edited alone, or together with the log's last line, or with all lines but the clock's limit."""
    told = runs.built[0]
    best, size, spent = told["val_bpb_ttt"], told["artifact_bytes"], told["seconds"]["train"]
    both = lambda old, new: {"summary": lambda text: text.replace(old, new),
                             "log": lambda text: re.sub(r"(?m)^summary: .*", lambda m: m[0].replace(old, new), text)}
    train = f'"train": {spent}', '"train": 601.0'
    limited = lambda text: text.replace('"max_wallclock_seconds": 0.0', '"max_wallclock_seconds": 300.0')
    longer = lambda text: re.sub(r'"train_time_s": [\d.e-]+', '"train_time_s": 601.0', limited(text))
    for changes, said in (
            ({"summary": lambda text: text.replace(*train)}, "is not the summary that"),
            ({"log": lambda text: text.partition("summary: ")[0]}, "r7 is no finished run: stopped"),
            (both(*train), "seconds of training is 601.0"), ({**both(*train), "events": longer}, "over MAX_WALLCLOCK"),
            (both(f'"val_bpb_ttt": {best}', '"val_bpb_ttt": 1.0'), "val_bpb_ttt is 1.0"),
            (both(f'"val_bpb_ttt": {best}', '"val_bpb_ttt": null'), "val_bpb_ttt is None"),
            ({**both(str(best), "1.0"), "events": lambda text: text.replace(str(best), "1.0")},
             "val_bpb_ttt is 1.0000"),
            (both(f'"val_bpb_pre_quant": {told["val_bpb_pre_quant"]}', '"val_bpb_pre_quant": 1.0'), "pre_quant is 1.0"),
            (both(f'"artifact_bytes": {size}', f'"artifact_bytes": {size - 1}'), "artifact_bytes is"),
            ({**both(f'"artifact_bytes": {size}', f'"artifact_bytes": {size - 1}'),
              "events": lambda text: text.replace(f'"bytes": {size}', f'"bytes": {size - 1}')}, "artifact_bytes is"),
            (both('"steps": 6', '"steps": 5'), "steps is 5"), ({"events": lambda text: "[]"}, "has no event of a run"),
            ({"events": lambda text: ""}, "has no event"), ({"summary": lambda text: ""}, "is not the summary of")):
        code, error = fold(logs(**changes))
        assert code == 2 and said in error and error.count("\n") == 1 and not made(tmp_path), (said, error)
    assert fold(logs(events=limited)) == (0, "")


def test_a_resumed_run_is_of_one_script_all_along(fold, logs):
    first = lambda text: f"source:sha256:{'0' * 64} python:3.11.7 torch:2.13.0\n{text}"
    code, error = fold(logs(log=first))
    assert code == 2 and "a run of another train_gpt.py" in error


def test_a_run_without_its_measurements_is_refused(fold, logs, tmp_path):
    name = logs()
    (tmp_path / "runs" / name / "events.jsonl").unlink()
    code, error = fold(name)
    assert code == 2 and "cannot read" in error and "runs/r7/events.jsonl" in error


def test_an_audit_comes_along_and_must_have_passed(fold, logs, tmp_path):
    told = lambda **changes: lambda text: json.dumps({**json.loads(text), **changes})
    for change, said in ((told(verdict="FAIL", why='"verdict": "pass"'), "scores that"),
                         (told(artifact_sha256="0" * 64), "the audit of another artifact"),
                         (told(artifact_sha256=None), "the audit of another artifact"),
                         (lambda text: "[]", "is not JSON"), (lambda text: "{", "is not JSON"),
                         (lambda text: "{}", "is not an audit")):
        code, error = fold(logs(audit=change))
        assert code == 2 and said in error and error.count("\n") == 1 and not made(tmp_path), error
    assert fold(logs()) == (0, "")
    folder = tmp_path / "2026-01-02_Tiny"
    assert (folder / "r7.audit.txt").read_text() == "audit:pass\n"
    text = (folder / "README.md").read_text()
    assert "r7.audit.json" in text and "```\naudit:pass\n```" in text


def test_foreign_scripts_and_runs_are_refused(fold, tmp_path, scripts):
    other = tmp_path / "other.py"
    other.write_text(scripts.readable.read_text() + "\nx = 1\n")
    for names, changes, message in (([], {"source": other}, "another train_gpt.py"), (["none"], {}, "no run 'none'")):
        code, error = fold(*names, **changes)
        assert code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["other.py"]
    assert fold()[0] == 0
    code, error = fold()
    assert code == 2 and "exists already" in error


# ---- the folder of kept runs -------------------------------------------------------------------------------

def test_a_record_of_three_kept_runs_passes_its_own_check(scripts, logs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(record, "build", cached_build)
    command = ["Three", "r1", "r2", "r3", "--author", "A", "--github-id", "G", "--runs", str(tmp_path),
               "--date", "2026-01-02", "--records", str(tmp_path / "records"), "--source", str(scripts.readable),
               "--against", "1.2"]

    def refused(said, *more):
        assert record.main([*command, *more]) == 2 and not (tmp_path / "records/2026-01-02_Three").exists()
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1, err
    refused("there is no run 'r1' in")
    for seed in (1, 2, 3):
        logs(seed)
    logs(2, events=lambda text: text + '{"event": "failed", "time": 3.0, "why": "training diverged"}\n')
    refused("r2 is no finished run: failed: training diverged")
    logs(2)
    (tmp_path / "runs/r1/audit.json").unlink()
    refused(f"r1 has no audit: bash run.sh audit {tmp_path}/runs/r1/final_model.ptz")
    logs(1)
    refused("are not the canonical validation text; --own-data")
    monkeypatch.setattr(record, "LIMIT_SECONDS", 1e-6)
    refused("training and calibration took")
    monkeypatch.setattr(record, "LIMIT_SECONDS", 600)
    assert record.main([*command, "--own-data"]) == 0, capsys.readouterr().err
    folder = tmp_path / "records/2026-01-02_Three"
    entry = json.loads((folder / "submission.json").read_text())
    assert {"r1.txt", "r2.txt", "r3.txt"} <= {path.name for path in folder.iterdir()}
    assert entry["seeds"] == [1, 2, 3] and entry["p_value"]["beats"] == 1.2 and entry["val_bpb_std"] == 0
    assert record.main(["--check", str(folder)]) == 0, capsys.readouterr().out
    assert "2026-01-02_Three: nothing is broken" in capsys.readouterr().out
    shutil.rmtree(folder)
    monkeypatch.setattr(record.check_record, "LIMIT_BYTES", 1000)
    refused("does not pass its own check: train_gpt.py as it is shipped", "--own-data")
