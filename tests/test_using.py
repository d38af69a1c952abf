"""An artifact in use: scored again, looked into, written with."""
import dataclasses
import importlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest

import train_gpt as tg
from conftest import ROOT, environment
from test_run_sh import project  # noqa: F401

sys.path += [str(ROOT / "tools"), str(ROOT / "data")]
import inspect_artifact  # noqa: E402
import report  # noqa: E402
import sample  # noqa: E402
import shell  # noqa: E402
import study  # noqa: E402
import sweep  # noqa: E402

SCORES = ("val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt")


@pytest.fixture
def made(run):
    """A tiny run that is done, and `again` to score its artifact where there are no training shards."""
    done = run(ITERATIONS=2, MLP_QUANT_BITS=5)
    assert done.code == 0, done.err
    done.again = lambda **variables: run(**{"EVAL_ARTIFACT": done.summary["artifact_path"], **variables})
    return done


def without_training_shards(corpus, folder):
    shutil.copytree(corpus.folder, folder, ignore=shutil.ignore_patterns("*_train_*"))
    return folder


# ---- eval

def test_an_artifact_scores_as_in_its_run(made, corpus, tmp_path):
    shards = without_training_shards(corpus, tmp_path / "shards")
    weights = (made.folder / "final_model.ptz").read_bytes()
    again = made.again(DATA_PATH=shards, NUM_LAYERS=9, MODEL_DIM=64, VE_LAYERS="8", MLP_QUANT_BITS=8, RUN_ID="again",
                       TRAIN_SEQ_SCHEDULE="1024:0.1,4096:1", TRAIN_BATCH_TOKENS=12_345, MAX_WALLCLOCK_SECONDS=5,
                       GPTQ_RESERVE_SECONDS=9)
    assert again.code == 0, again.err
    assert [again.summary[key] for key in SCORES] == [made.summary[key] for key in SCORES]
    assert set(again.summary) == set(made.summary)
    assert again.summary["val_bpb_pre_quant"] is None and again.summary["steps"] == again.summary["tokens"] == 0
    assert again.summary["artifact_bytes"] == len(weights) == os.path.getsize(again.summary["artifact_path"])
    assert "final_int5mlp+int6attn_roundtrip" in again.out and "final_model.pt," not in again.out
    assert json.loads((made.folder / "logs/again.summary.json").read_text()) == again.summary


def test_a_model_of_any_length_is_read_back(run):
    """Its sequences divide no batch of the defaults, and its attention is longer than the default's windows."""
    done = run(ITERATIONS=1, TRAIN_SEQ_LEN=100, TRAIN_BATCH_TOKENS=400, EVAL_SEQ_LEN=100, EVAL_STRIDE=0, TTT_ENABLED=0)
    assert done.code == 0, done.err
    for settings in ({"TRAIN_SEQ_LEN": "40000", "ATTENTION_WINDOW": "5000"}, {"TRAIN_SEQ_LEN": "7"}):
        assert tg.Hyperparameters.from_env(settings, tg.model_rules).train_seq_len == int(settings["TRAIN_SEQ_LEN"])
    with pytest.raises(tg.UserError, match="MODEL_DIM=510 is not divisible by NUM_HEADS=8"):
        tg.Hyperparameters.from_env({"MODEL_DIM": "510"}, tg.model_rules)


def test_lora_adapts_as_in_its_run(run):
    settings = dict(ITERATIONS=2, TTT_MODE="lora", EVAL_STRIDE=0)
    done = run(**settings)
    again = run(**settings, EVAL_ARTIFACT=done.summary["artifact_path"])
    assert again.summary["val_bpb_ttt"] == done.summary["val_bpb_ttt"] is not None


def test_artifacts_that_cannot_be_scored(made, corpus, tmp_path):
    import prepare
    other, short, foreign = tmp_path / "other.model", tmp_path / "short.ptz", tmp_path / "foreign.ptz"
    prepare.train_tokenizer([text[::-1] for text in ["some other text " * 40, "of other letters " * 40] * 20] +
                            [corpus.tokenizer.decode(corpus.train[:9000].tolist())[::-1]], other, 384)
    short.write_bytes((made.folder / "final_model.ptz").read_bytes()[:-1])
    foreign.write_bytes(b"PK\3\4")
    for variables, said in (({"EVAL_ARTIFACT": "missing.ptz"}, "cannot read missing.ptz: No such file"),
                            ({"EVAL_ARTIFACT": tmp_path}, "Is a directory"),
                            ({"EVAL_ARTIFACT": short}, "short.ptz: artifact is cut short"),
                            ({"EVAL_ARTIFACT": foreign}, "foreign.ptz: this is not an artifact of this program"),
                            ({"VOCAB_SIZE": 512}, "VOCAB_SIZE=512, but the model in"),
                            ({"TTT_LORA_LAYERS": "3", "TTT_MODE": "lora"}, "outside 0..2"),
                            ({"TOKENIZER_PATH": other}, "another tokenizer")):
        refused = made.again(**variables)
        assert refused.code == 2 and refused.summary is None and said in refused.err, refused.err
        assert refused.err.startswith("error: ") and refused.err.count("\n") == 1
        for name in variables:
            os.environ.pop(name, None)


# ---- inspect

def test_the_bytes_add_up(made, capsys):
    path = made.summary["artifact_path"]
    found = inspect_artifact.contents(tg.read_file(path))
    assert sum(s.bytes for s in found.streams) + found.header_bytes == found.file_bytes == os.path.getsize(path)
    assert sum(p.bytes for p in found.pieces) == pytest.approx(sum(s.bytes for s in found.streams))
    cfg, _, weights = tg.unpack(tg.read_file(path))
    assert {p.name: p.shape for p in found.pieces[:-1]} == {name: tuple(w.shape) for name, w in weights.items()}
    assert {p.bits for p in found.pieces if p.stream == "mlp"} == {5}
    assert inspect_artifact.main([path]) == 0
    out = capsys.readouterr().out
    total = os.path.getsize(path) + os.path.getsize(ROOT / "train_gpt.py")
    assert re.search(rf"^total +{total:,}$", out, re.M) and f"{16_000_000 - total:,} bytes under the limit" in out
    assert "NUM_LAYERS=3" in out and all(name in out for name in weights)


def test_plot(made, capsys, tmp_path):
    path, picture = made.summary["artifact_path"], tmp_path / "bytes.png"
    code = inspect_artifact.main([path, "--plot", str(picture)])
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert code == 2 and capsys.readouterr().err == "error: --plot needs matplotlib: pip install matplotlib\n"
    else:
        assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")


# ---- sample

def test_text_is_the_same_for_a_seed(made, capsys):
    def text(*arguments):
        assert sample.main([made.summary["artifact_path"], *arguments]) == 0
        return capsys.readouterr().out
    first = text("The value of", "--seed", "3")
    assert first == text("The value of", "--seed", "3") != text("The value of", "--seed", "4")
    assert first.startswith("The value of") and first.endswith("\n") and len(first) > 100
    assert text("The value of", "--length", "0") == "The value of\n"
    greedy = text("--temperature", "0", "--length", "40")
    assert greedy == text("--temperature", "0", "--length", "40", "--seed", "9") == \
        text("--top-k", "1", "--length", "40")


def test_length_and_window(made, corpus):
    cfg, digest, _ = tg.unpack(tg.read_file(made.summary["artifact_path"]))
    model = tg.load_model(tg.read_file(made.summary["artifact_path"]), sample.open_runtime(cfg), digest)
    lengths, hidden = [], model.hidden
    model.hidden = lambda ids, **how: lengths.append(ids.size(1)) or hidden(ids, **how)
    tokens = sample.continuation(model, [1, 5, 6], sample.barred_ids(corpus.tokenizer), 8, 0.8, 50, 0)
    assert len(list(itertools.islice(tokens, 20))) == 20
    assert lengths == [3, 4, 5, 6, 7] + [8] * 15
    assert list(sample.until_end(corpus.tokenizer, iter([9, 10, 11]), 2)) == [9, 10]
    assert list(sample.until_end(corpus.tokenizer, iter([9, corpus.tokenizer.bos_id(), 11]), 5)) == [9]


def test_streamed_text_is_the_text_decoded_at_once(corpus):
    """Any ids, malformed runs of bytes among them; and never half a character."""
    tokenizer, dice = corpus.tokenizer, random.Random(0)
    words = [i for i in range(384) if not (tokenizer.is_byte(i) or tokenizer.is_control(i) or tokenizer.is_unknown(i))]
    byte = {int(tokenizer.id_to_piece(i)[3:-1], 16): i for i in range(384) if tokenizer.is_byte(i)}
    whole = [[byte[b] for b in character.encode()] for character in "é€😀\n" * 20]
    parts = [[i] for i in words] + whole + [[i] for i in byte.values()]
    for _ in range(300):
        ids = sum(dice.choices(parts, k=dice.randint(1, 12)), [])
        for prompt in ([tokenizer.bos_id()], [tokenizer.bos_id(), dice.choice(words)], [dice.choice(words)]):
            streamed = list(sample.pieces_of_text(tokenizer, prompt[-1], ids))
            assert "".join(streamed) == tokenizer.decode(prompt + ids)[len(tokenizer.decode(prompt)):], ids
    last = words[-1]
    assert list(sample.pieces_of_text(tokenizer, last, [*whole[2], last])) == ["😀", tokenizer.decode([last])]


@pytest.mark.parametrize("arguments, said", [
    (["missing.ptz"], "cannot read missing.ptz"), (["x", "--temperature", "-1"], "--temperature -1.0"),
    (["x", "--top-k", "-1"], "--top-k -1"), (["x", "--length", "-5"], "--length -5"),
    (["x", "--seed", "-1"], "--seed -1"),
    (["x", "--length", "many"], "argument --length: invalid int value"), ([], "the following arguments are required"),
])
def test_sample_refuses(arguments, said, capsys):
    assert sample.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


def test_ctrl_c_ends_quietly(made, capsys, monkeypatch):
    def interrupted(*_):
        yield 300
        raise KeyboardInterrupt
    monkeypatch.setattr(sample, "continuation", interrupted)
    assert sample.main([made.summary["artifact_path"], "The"]) == 130
    out, err = capsys.readouterr()
    assert out.startswith("The") and out.endswith("\n") and not err


# ---- settings among a tool's arguments

@pytest.fixture
def untouched(monkeypatch):
    """What tools put into the environment is taken out again."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return os.environ


def test_settings_are_told_from_other_arguments():
    names = ["SEED", "TTT_LR"]
    for arguments, settings, rest in (
            (["a.ptz", "SEED=1", "x", "TTT_LR="], {"SEED": "1", "TTT_LR": ""}, ["a.ptz", "x"]),
            (["SEED=1", "SEED=a=b c"], {"SEED": "a=b c"}, []),
            (["CUDA_LAUNCH_BLOCKING=1"], {"CUDA_LAUNCH_BLOCKING": "1"}, []),
            (["E=mc2", "x=1", "Two = 2", "THE SUM=3", "SUM= 3", "=", ""], {},
             ["E=mc2", "x=1", "Two = 2", "THE SUM=3", "SUM= 3", "=", ""]),
            (["SEED=1", "--", "SEED=2", "SUM=3"], {"SEED": "1"}, ["--", "SEED=2", "SUM=3"])):
        assert shell.take_settings(arguments, names) == (settings, rest)
    with pytest.raises(shell.UsageError, match="TTT_LRR is not a setting; did you mean TTT_LR"):
        shell.take_settings(["a.ptz", "TTT_LRR=1"], names)


def test_every_tool_takes_settings(made, corpus, untouched, tmp_path, capsys):
    """An artifact is used with its tokenizer named as an argument, in an environment that names another."""
    path = made.summary["artifact_path"]
    untouched.update(TOKENIZER_PATH="none.model", DATA_PATH="nowhere")
    tokenizer = f"TOKENIZER_PATH={corpus.tokenizer_path}"
    assert sample.main([path, tokenizer, "--length", "3", "2+2=4 and"]) == 0
    assert capsys.readouterr().out.startswith("2+2=4 and")
    untouched["TOKENIZER_PATH"] = "none.model"
    assert inspect_artifact.main([path, "SEED=3"]) == 0
    capsys.readouterr()
    for tool, arguments in ((sample, [path]), (sweep, [path]), (inspect_artifact, [path]), (report, [])):
        assert tool.main([*arguments, "TTT_LRR=0.1"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: TTT_LRR is not a setting; did you mean TTT_LR") and err.count("\n") == 1


SCORES_ARTIFACT = """import os, sys
sys.path.insert(0, {root!r})
os.environ.update(pair.split("=", 1) for pair in sys.argv if "=" in pair)
os.environ["EVAL_ARTIFACT"] = sys.argv[2]
import train_gpt
sys.exit(train_gpt.main([]))
"""


def test_a_sweep_of_an_artifact_scores_it_on_a_part_of_the_text(made, corpus, untouched, tmp_path, capsys):
    """As run.sh would: `eval ARTIFACT PROFILE KEY=VALUE...`. Settings of the evaluation vary, on the first tokens."""
    pytest.importorskip("optuna")
    shutil.copy(made.summary["artifact_path"], tmp_path / "a.ptz")
    (tmp_path / "scores.py").write_text(SCORES_ARTIFACT.format(root=str(ROOT)))
    plan = sweep.Plan("pr1092", {**environment(corpus, tmp_path), "EVAL_STRIDE": "0", "TTT_CHUNK_TOKENS": "32"},
                      {"TTT_LR": ["0.1", "9"]}, "ttt",
                      artifact=str(tmp_path / "a.ptz"), tokens=100, start=7)
    for key in ("RUN_ID", "ARTIFACT_DIR"):
        del plan.settings[key]
    plan.check()
    done = sweep.sweep(plan, tmp_path, [sys.executable, str(tmp_path / "scores.py")])
    one, other = done.study.trials_by_state()
    assert study.settings_of(one) == {"TTT_LR": "0.1"} and one.user_attrs["seconds"] > 0
    assert one.user_attrs["bpb"]["roundtrip"] == other.user_attrs["bpb"]["roundtrip"] and one.value != other.value
    text = tg.Shard(str(tmp_path / "sweeps/ttt/text/fineweb_val_000000.bin"))[:]
    assert text.tolist() == corpus.val[7:108].tolist()
    scored = json.loads((tmp_path / "runs/ttt.0.1/eval.json").read_text())
    assert scored["tokens"] == 100
    with pytest.raises(shell.UsageError, match="--tokens 9 is less than a window of 32"):
        dataclasses.replace(plan, tokens=9).check()


@pytest.mark.parametrize("name", ["audit", "bench", "gpu_bench", "inspect_artifact", "mutate", "parity", "prepare",
                                  "record", "report", "sample", "sweep"])
def test_a_tool_calls_itself_what_run_sh_calls_it(name, untouched, monkeypatch, capsys):
    """In its usage and in the line about an argument it does not have; test_run_sh.py has what run.sh calls each."""
    tool = importlib.import_module(name)
    for called, shown in (("bash run.sh verb", "bash run.sh verb"), (None, "tool.py")):
        monkeypatch.setattr(sys, "argv", ["/some/tool.py"])
        untouched.pop("RUN_SH_COMMAND", None)
        if called:
            untouched["RUN_SH_COMMAND"] = called
        with pytest.raises(SystemExit) as stop:
            tool.main(["--help"])
        assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"usage: {shown} ")
        assert tool.main(["--nosuch"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.endswith(f"({shown} --help says more)\n") and err.count("\n") == 1


@pytest.mark.parametrize("body, code, out, err", [
    ("print('x' * 99999)", 0, "x" * 10, ""), ("print('x' * 9)", 0, "x" * 9, ""), ("open('/none/a')", 2, "",
     "error: /none/a: No such file or directory\n"), ("raise KeyboardInterrupt", 130, "", "interrupted\n")])
def test_how_tools_end(body, code, out, err):
    """A reader that leaves early, too. In a process of its own, whose train_gpt is a stand-in: nothing is computed."""
    script = ("import sys, types\nsys.modules['train_gpt'] = types.SimpleNamespace(UserError=ValueError)\n"
              f"import shell\n@shell.one_line_errors\ndef main():\n    {body}\n    return 0\nsys.exit(main())")
    command = ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | head -c 10', sys.executable, script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tools")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (code, out, err)


# ---- run.sh

def test_verbs(project):  # noqa: F811
    scored = project("eval", "a b.ptz", "smoke", "EVAL_STRIDE=32")
    assert scored.code == 0 and scored.calls[-1] == "train_gpt.py"
    assert (scored.env["EVAL_ARTIFACT"], scored.env["EVAL_STRIDE"]) == ("a b.ptz", "32")
    assert scored.env["EVAL_SEQ_LEN"] == project("smoke").env["EVAL_SEQ_LEN"] and "RUN_SH_COMMAND" not in scored.env
    assert all(f"bash run.sh {verb} " in project("help").out
               for verb in ("eval", "audit", "inspect", "sample", "sweep", "report", "record"))


def test_an_audit_alone_or_after_a_run(project):  # noqa: F811
    alone = project("audit", "a b.ptz", "smoke", "SEED=2", "AUDIT_TOKENS=500")
    assert "train_gpt.py" not in alone.calls and alone.calls[-1] == "tools/audit.py a b.ptz"
    assert (alone.env["SEED"], alone.env["AUDIT_TOKENS"]) == ("2", "500") and "not a setting" not in alone.err
    assert alone.env["EVAL_SEQ_LEN"] == project("smoke").env["EVAL_SEQ_LEN"] and "RUN_ID" not in alone.env
    run = project("smoke", AUDIT="1")
    assert run.calls[-2:] == ["train_gpt.py", f"tools/audit.py ./runs/{run.env['RUN_ID']}/final_model.ptz"]
    named = project("smoke", "AUDIT=1", "RUN_ID=mine", ARTIFACT_DIR="else where")
    assert named.env["RUN_ID"] == "mine" and named.calls[-1] == "tools/audit.py else where/runs/mine/final_model.ptz"
    ranks = project("AUDIT=1", "RUN_ID=mine", GPUS="2").calls[-2:]
    start = "tools/launch.py --standalone --nproc_per_node=2 "
    assert ranks == [f"{start}train_gpt.py", f"{start}tools/audit.py ./runs/mine/final_model.ptz"]
    assert project("eval", "x.ptz", AUDIT="1").calls[-2:] == ["train_gpt.py", "tools/audit.py x.ptz"]
    assert project("smoke", AUDIT="only", EVAL_ARTIFACT="x.ptz").calls[-1] == "tools/audit.py x.ptz"
    assert project("smoke", AUDIT="0").calls[-1] == "train_gpt.py"
    failed = project("smoke", AUDIT="1", TRAIN_STATUS="7")
    assert failed.code == 7 and failed.calls[-1] == "train_gpt.py"


@pytest.mark.parametrize("value, said", [("2", "AUDIT=2 is not one of 0, 1, only"), ("only", "run.sh audit ARTIFACT")])
def test_audit_is_0_1_or_only(project, value, said):  # noqa: F811
    refused = project("smoke", AUDIT=value)
    assert refused.code == 2 and said in refused.err and "train_gpt.py" not in refused.calls


def test_an_artifact_brings_its_tokenizer(project):  # noqa: F811
    """No profile's is forced on it, nor text that goes with another; what the user says is passed on."""
    three = ("DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE")
    found = lambda result: [result.env.get(key) for key in three]
    for command in ("eval", "audit", "sample", "inspect"):
        for gpus in "01":
            assert found(project(command, "a.ptz", GPUS=gpus)) == [None, None, None]
        assert found(project(command, "a.ptz", DATA_PATH="d", TOKENIZER_PATH="t")) == ["d", "t", None]
    assert "profile smoke, CPU" in project("sample", "a.ptz", "DEVICE=cpu", GPUS="1").err
    assert found(project("sample", "a.ptz", "DATA_PATH=own"))[0] == "own"
    own = project("eval", "a.ptz", "pr1092", "DATA_PATH=d", "TOKENIZER_PATH=t")
    assert found(own) == ["d", "t", None] and own.env["EVAL_ARTIFACT"] == "a.ptz"


def test_an_artifact_of_the_embedded_text_finds_it(project):  # noqa: F811
    """As one does that a smoke run on another machine made; what builds it does not mix with the text."""
    assert "data/prepare.py embedded" not in project("sample", "--help").calls
    built = project("sample", "a.ptz")
    assert "data/prepare.py embedded" in built.calls
    assert "data/prepare.py embedded" not in project("eval", "a.ptz").calls


@pytest.mark.parametrize("arguments", [(), ("SEED=1",), ("",), ("--help",)])
def test_eval_without_an_artifact(project, arguments):  # noqa: F811
    refused = project("eval", *arguments)
    assert refused.code == 2 and not refused.calls
    assert refused.err.startswith("error: eval needs a file") and refused.err.count("\n") == 1
