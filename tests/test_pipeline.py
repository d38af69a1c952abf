"""The whole run as a user meets it: results, files, log lines, refusals, interruption, ranks."""
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import train_gpt as tg
from conftest import ROOT, environment


def test_from_settings_to_score(run):
    done = run(VAL_LOSS_EVERY=3, ITERATIONS=40, MATRIX_LR=0.02)
    assert done.code == 0, done.err
    s = done.summary
    assert {"run_id", "val_bpb_pre_quant", "val_bpb_roundtrip", "val_bpb_sliding", "val_bpb_ttt", "artifact_path",
            "artifact_bytes", "code_bytes", "total_bytes", "steps", "tokens", "seconds", "peak_rss_bytes"} <= set(s)
    untrained = float(re.search(r"step:0/40 val_loss:\S+ val_bpb:(\S+)", done.out).group(1))
    assert s["val_bpb_pre_quant"] < 0.85 * untrained and s["val_bpb_roundtrip"] < 1.1 * s["val_bpb_pre_quant"]
    assert s["artifact_bytes"] == os.path.getsize(s["artifact_path"])
    assert s["code_bytes"] == os.path.getsize(ROOT / "train_gpt.py")
    assert s["total_bytes"] == s["artifact_bytes"] + s["code_bytes"]
    assert (s["steps"], s["tokens"]) == (40, 40 * 256)
    assert json.loads((done.folder / "logs/tiny.summary.json").read_text()) == s
    events = [json.loads(line) for line in (done.folder / "logs/tiny.jsonl").read_text().splitlines()]
    assert {"settings", "train", "validation", "artifact", "evaluation", "ttt_chunk"} <= {e["event"] for e in events}
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, 41))


def test_log_lines_are_the_published_ones(run):
    out = run().out
    for pattern in (
        r"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path=\S+", r"train_loader:dataset:\S+ train_shards:2",
        r"val_loader:shards pattern=\S+ tokens:1699", r"model_params:\d+",
        r"mtp_num_heads:0 mtp_loss_weight:0\.2 mtp_params:0", r"XSA:last_11 active_layers:\[0, 1, 2\]",
        r"world_size:1 grad_accum_steps:1", r"attention_mode:gqa num_heads:4 num_kv_heads:2",
        r"tie_embeddings:True embed_lr:0\.035 head_lr:0\.0 matrix_lr:0\.025 scalar_lr:0\.025",
        r"train_batch_tokens:256 train_seq_len:32 iterations:6 warmup_steps:0 max_wallclock_seconds:0\.000",
        r"seed:1337",
        r"step:6/6 train_loss:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"step:6/6 val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} train_time:\d+ms step_avg:\d+\.\d\dms",
        r"peak memory \S+: \d+ MiB.*",
        r"ema:applying EMA weights", r"Serialized model: \d+ bytes", r"Code size: \d+ bytes",
        r"Serialized model int6\+\S+: \d+ bytes", r"Total submission size int6\+\S+: \d+ bytes",
        r"final_int6_roundtrip val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} eval_time:\d+ms",
        r"final_int6_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
        r"final_int6_sliding_window val_loss:\d+\.\d{4} val_bpb:\d+\.\d{4} stride:8 eval_time:\d+ms",
        r"ttt_sliding:start chunks=4 chunk_tokens=512 total_windows=210 stride=8 ttt_lr=0\.03 ttt_epochs=1 "
        r"freeze_blocks=0",
        r"ttt_sliding:params unfrozen=\d+ frozen=0", r"  ttt_chunk \[1/4\] bpb=\d+\.\d{6} time=\d+\.\ds",
        r"ttt_sliding:done val_loss=\d+\.\d{6} val_bpb=\d+\.\d{6} elapsed=\d+\.\ds",
        r"legal_ttt_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}",
    ):
        assert re.search(f"^{pattern}$", out, re.M), pattern


def test_a_run_is_the_same_run_twice(run):
    scores = []
    for _ in range(2):
        done = run()
        scores.append((done.summary["val_bpb_ttt"], (done.folder / "final_model.ptz").read_bytes()))
    assert scores[0] == scores[1]


def test_phases_that_are_off_are_null(run):
    summary = run(TTT_ENABLED=0, EVAL_STRIDE=0).summary
    assert summary["val_bpb_sliding"] is None and summary["val_bpb_ttt"] is None and summary["val_bpb_roundtrip"] > 0


def test_extra_heads_are_trained_and_not_exported(run):
    done = run(MTP_NUM_HEADS=2)
    assert "export_excluding_mtp_params:24576" in done.out
    _, _, weights = tg.unpack((done.folder / "final_model.ptz").read_bytes())
    assert not any("mtp" in name for name in weights)


def test_the_clock_ends_training(run):
    done = run(MAX_WALLCLOCK_SECONDS=0.2, ITERATIONS=100000, TRAIN_LOG_EVERY=0)
    assert done.code == 0 and re.search(r"stopping_early: wallclock_cap train_time:\d+ms step:\d+/100000", done.out)
    assert 0 < done.summary["steps"] < 2000


def test_over_the_limit_the_run_fails_with_the_table(run):
    done = run(ARTIFACT_LIMIT_BYTES=50_000)
    assert done.code == 2 and done.summary is None
    assert "over ARTIFACT_LIMIT_BYTES=50,000" in done.err
    assert re.search(r"^  mlp .*values.* B$", done.out, re.M) and re.search(r"^  total +", done.out, re.M)
    assert "roundtrip" not in done.out


def test_the_limit_at_its_very_edge(run):
    """Code and artifact together may take exactly ARTIFACT_LIMIT_BYTES, and not one byte more."""
    brief = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "ITERATIONS": 1, "COMPRESS": "lzma"}
    free = run(**brief).summary
    assert free["total_bytes"] == free["artifact_bytes"] + free["code_bytes"] and free["code_bytes"] > 10_000
    exact = run(**brief, ARTIFACT_LIMIT_BYTES=free["total_bytes"])
    assert exact.code == 0 and exact.summary["total_bytes"] == exact.summary["artifact_limit_bytes"]
    over = run(**brief, ARTIFACT_LIMIT_BYTES=free["total_bytes"] - 1)
    assert over.code == 2 and over.err.count("\n") == 1 and f"{free['total_bytes']:,} bytes is over" in over.err


def events_of(folder, name="tiny"):
    return [json.loads(line) for line in (folder / f"logs/{name}.jsonl").read_text().splitlines()]


def test_the_numbers_of_the_summary_are_those_of_the_log(run):
    done = run(VAL_LOSS_EVERY=3, CHECKPOINT_EVERY=0)
    s, events, lines = done.summary, events_of(done.folder), done.out.splitlines()
    scores = {e["name"]: e for e in events if e["event"] == "evaluation"}
    names = {"val_bpb_pre_quant": "post_average", "val_bpb_roundtrip": "final_int6_roundtrip",
             "val_bpb_sliding": "final_int6_sliding_window", "val_bpb_ttt": "legal_ttt"}
    assert [e["name"] for e in events if e["event"] == "evaluation"] == list(names.values())
    assert len({s[key] for key in names}) == 4
    for key, name in names.items():
        score = scores[name]
        assert s[key] == score["bpb"] and score["tokens"] == 1699
        assert s[key] == pytest.approx(score["loss"] * score["tokens"] / math.log(2) / score["bytes"], rel=1e-9)
        if key != "val_bpb_pre_quant":
            assert f"{name}_exact val_loss:{score['loss']:.8f} val_bpb:{score['bpb']:.8f}" in lines
            assert any(line.startswith(f"{name} val_loss:{score['loss']:.4f} val_bpb:{score['bpb']:.4f} ")
                       for line in lines)
    assert f"DIAGNOSTIC post_average val_loss:{scores['post_average']['loss']:.4f} " \
        f"val_bpb:{s['val_bpb_pre_quant']:.4f}" in done.out
    packed = next(e for e in events if e["event"] == "artifact")
    assert (packed["bytes"], packed["code_bytes"]) == (s["artifact_bytes"], s["code_bytes"])
    assert sum(row[-1] for row in packed["ledger"]) < s["artifact_bytes"] < 16_000_000 == s["artifact_limit_bytes"]
    for kind, size in (("Serialized model int6+", s["artifact_bytes"]), ("Code size:", s["code_bytes"]),
                       ("Total submission size int6+", s["total_bytes"])):
        assert [line for line in lines if line.startswith(kind)][0].endswith(f" {size} bytes")
    assert [line for line in lines if line.startswith("  total ")][0].split()[-2] == f"{s['total_bytes']:,}"
    assert s["steps"] == max(e["step"] for e in events if e["event"] == "train") == 6
    assert "step:6/6 val_loss" in done.out and s["tokens"] == 6 * 256
    assert s["seconds"]["total"] >= sum(s["seconds"][key] for key in ("train", "export", "roundtrip", "sliding", "ttt"))
    at_end = [line for line in lines if line.startswith("bits per byte")][0]
    assert re.findall(r"\d\.\d{4}", at_end) == [f"{s[key]:.4f}" for key in names]
    assert s["run_id"] == "tiny" and (done.folder / "logs/tiny.txt").read_text().splitlines()[-1] == lines[-1]


def test_scores_are_those_of_the_files_on_disk(run, config, rt):
    """The float model and the artifact, each scored here by one window at a time."""
    done = run(ITERATIONS=8, WARMDOWN_ITERS=8, MATRIX_BITS=3, EVAL_STRIDE=16)
    cfg = config(eval_stride=16)
    val = tg.ValData.open(cfg, rt)
    tokens, size = val.tokens.long(), val.sizes[1:].sum().item()

    def bpb(model, stride):
        nats, done = 0.0, 0
        with torch.no_grad():
            while done < len(tokens) - 1:
                end = min(done + stride if done else 32, len(tokens) - 1)
                nll = model.nll(tokens[None, end - 32:end], tokens[None, end - 31:end + 1])
                nats, done = nats + nll[0, done - end:].double().sum().item(), end
        return nats / math.log(2) / size
    trained = tg.GPT(cfg)
    trained.load_state_dict(torch.load(done.folder / "final_model.pt"))
    exported = tg.GPT(cfg)
    exported.load_state_dict(tg.unpack((done.folder / "final_model.ptz").read_bytes())[2])
    s = done.summary
    assert s["val_bpb_pre_quant"] == pytest.approx(bpb(trained, 32), rel=1e-6)
    assert s["val_bpb_roundtrip"] == pytest.approx(bpb(exported, 32), rel=1e-6) != pytest.approx(bpb(trained, 32))
    assert s["val_bpb_sliding"] == pytest.approx(bpb(exported, 16), rel=1e-6)


@pytest.mark.parametrize("mode", [{}, {"TTT_MODE": "lora"}, {"EVAL_STRIDE": 0}], ids=["sgd", "lora", "no sliding"])
def test_adaptation_comes_last_and_leaves_the_other_scores_alone(run, mode):
    with_it, without = (run(**{"ITERATIONS": 2, "TTT_LR": 0.1, "EVAL_STRIDE": 8, "COMPRESS": "lzma", **mode,
                               "TTT_ENABLED": enabled}) for enabled in (1, 0))
    for key in ("val_bpb_pre_quant", "val_bpb_roundtrip", "val_bpb_sliding"):
        assert with_it.summary[key] == without.summary[key], key
    assert without.summary["val_bpb_ttt"] is None
    assert with_it.summary["val_bpb_ttt"] not in (None, with_it.summary["val_bpb_sliding"])
    order = [re.match(r"(final_int6_roundtrip|final_int6_sliding_window|legal_ttt) ", line)
             for line in with_it.out.splitlines()]
    order = [match.group(1) for match in order if match]
    assert order == ["final_int6_roundtrip", *["final_int6_sliding_window"] * ("EVAL_STRIDE" not in mode), "legal_ttt"]


def test_the_running_score_ends_at_the_score(run):
    done = run(ITERATIONS=1, COMPRESS="lzma")
    chunks = [e for e in events_of(done.folder) if e["event"] == "ttt_chunk"]
    assert chunks[-1]["chunk"] == chunks[-1]["chunks"] == 4
    assert chunks[-1]["running_bpb"] == pytest.approx(done.summary["val_bpb_ttt"], rel=1e-9)


def test_what_is_scored_is_what_lies_on_disk(run, monkeypatch):
    """A disk that changes the artifact while it is written: the run must not score what it meant to write."""
    write = tg.write_atomically
    monkeypatch.setattr(tg, "write_atomically", lambda path, data, *more: write(
        path, data[:-1] + bytes([data[-1] ^ 1]) if path.suffix == ".ptz" else data, *more))
    done = run(ITERATIONS=1)
    assert done.code == 2 and "damaged" in done.err and "roundtrip" not in done.out


def test_a_missing_package_ends_the_run_before_training(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    done = run(COMPRESS="range")
    assert done.code == 2 and "pip install constriction" in done.err and "train_loss" not in done.out


def test_a_log_that_cannot_be_written_does_not_end_the_run(run, monkeypatch):
    """It is said once; the scores and the artifact are there."""
    opened, broken = open, []

    def refusing(path, mode="r", *args, **kwargs):
        if "runs/tiny/" in str(path) and mode == "a" and broken:
            raise OSError(28, "No space left on device")
        return opened(path, mode, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refusing)
    step = tg.Optimisers.step
    monkeypatch.setattr(tg.Optimisers, "step", lambda *args: broken.append(1) or step(*args))
    done = run(ITERATIONS=2, TTT_ENABLED=0)
    assert done.code == 0 and done.summary["val_bpb_sliding"] > 0 and (done.folder / "final_model.ptz").exists()
    assert done.err.count("is incomplete: No space left on device") == 1


def test_exit_codes(run, monkeypatch, capsys):
    assert tg.main(["--help"]) == tg.main(["-h"]) == 0
    assert "MODEL_DIM" in capsys.readouterr().out
    assert tg.main(["--train"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: no argument --train") and err.count("\n") == 1
    assert run(ITERATIONS=1, TTT_ENABLED=0, EVAL_STRIDE=0).code == 0

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt
    monkeypatch.setattr(tg, "export", interrupted)
    done = run(ITERATIONS=1)
    assert done.code == 130 and done.err.startswith("interrupted (SIGINT); to go on ") and done.summary is None

    def wrong(*args, **kwargs):
        raise ZeroDivisionError
    monkeypatch.setattr(tg, "export", wrong)
    with pytest.raises(ZeroDivisionError):  # the program's own error is not dressed up as the user's
        run(ITERATIONS=1)


# ---- bad input: one clear line, exit code 2, nothing made

@pytest.mark.parametrize("variables, said", [
    ({"DATA_PATH": "/nowhere/at/all"}, "no data folder"),
    ({"VOCAB_SIZE": 512}, "VOCAB_SIZE=512"),
    ({"TOKENIZER_PATH": "missing.model"}, "missing.model"),
    ({"WARMDRON_ITERS": 3500}, "WARMDOWN_ITERS"),
    ({"MUON_MOMENTUM_WARMUP_START": "092"}, "out of range"),
    ({"EVAL_SEQ_LEN": 4096, "EVAL_STRIDE": 64}, "fewer than one window"),
    ({"ARTIFACT_DIR": "/proc/nothing"}, "cannot write logs"),
    ({"RESUME": 1}, "no checkpoint"),
    ({"ATTENTION": "cudnn"}, "needs CUDA"),
    pytest.param({"DEVICE": "cuda"}, "no CUDA device",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")),
])
def test_refusals(run, variables, said):
    done = run(**variables)
    assert done.code == 2 and done.summary is None
    assert said in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert not (done.folder / "final_model.ptz").exists()


def on_ranks(corpus, folder, worlds, **variables):
    """{ranks: events in the log} of a run on so many ranks each, in folder/RANKS."""
    program = "import sys; sys.path.insert(0, sys.argv[1]); import forks; sys.exit(forks.run_worlds(sys.argv[2:]))"
    command = [sys.executable, "-c", program, str(ROOT / "tools"), *map(str, worlds)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment(corpus, folder, **variables)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    logs = {ranks: next((folder / str(ranks)).rglob("*.jsonl")).read_text() for ranks in worlds}
    return {ranks: [json.loads(line) for line in log.splitlines()] for ranks, log in logs.items()}


def start(corpus, folder, limit_bytes=None, **variables):
    """The script in a process of its own."""
    command = [sys.executable, str(ROOT / "train_gpt.py")]

    def prepare():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background inherit a deaf ear
        if limit_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment(corpus, folder, **variables)}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            preexec_fn=prepare)


def test_a_full_disk_leaves_the_old_artifact_whole(corpus, tmp_path):
    """A limit on file size stands for the full disk: no checkpoint fits, no float model and no artifact, wherever."""
    old = b"the artifact of an earlier run"
    for name in ("final_model.pt", "final_model.ptz"):
        (tmp_path / name).write_bytes(old)
    out, err = start(corpus, tmp_path, limit_bytes=15_000, TMPDIR=tmp_path).communicate(timeout=120)
    assert f"error: cannot write {tmp_path / 'tiny.ptz'} (" in err and "Traceback" not in err
    for path in ("checkpoint.pt", "final_model.pt", "final_model.ptz"):
        assert f"warning: cannot write {tmp_path / 'runs/tiny' / path} (" in out
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["final_model.pt", "final_model.ptz"]
    assert all((tmp_path / name).read_bytes() == old for name in ("final_model.pt", "final_model.ptz"))


OLD_PLACES = {"final_model.ptz": "final_model.ptz", "final_model.pt": "final_model.pt", "logs/{}.txt": "log.txt",
              "logs/{}.jsonl": "events.jsonl", "logs/{}.summary.json": "summary.json", "logs/{}.eval.json": "eval.json",
              "logs/{}.settings.env": "settings.env"}


def test_every_run_is_kept_and_the_newest_one_is_where_tools_look(run):
    (run.folder / "final_model.ptz").write_bytes(b"somebody's own")
    for name in ("first", "second"):
        done = run(RUN_ID=name, SEED=len(name), ITERATIONS=1, TTT_ENABLED=0, CHECKPOINT_EVERY=1, PROFILE="mine")
        files = done.folder / "runs" / name
        assert {path.name for path in files.iterdir()} == {*OLD_PLACES.values(), "checkpoint.pt"}
        for place, file in OLD_PLACES.items():
            place = done.folder / place.format(name)
            assert place.samefile(files / file) and not os.path.isabs(os.readlink(place))
        assert done.summary["artifact_path"] == str(files / "final_model.ptz")
        assert (files / "settings.env").read_text().startswith(f"# mine, as run {name} had them\n")
        assert f"SEED={len(name)}\n" in (files / "settings.env").read_text()
    first, second = ((done.folder / "runs" / name / "final_model.ptz").read_bytes() for name in ("first", "second"))
    assert first != second
    kept, = done.folder.glob("final_model.2*.ptz")
    assert kept.read_bytes() == b"somebody's own"
    run(RUN_ID="second", SEED=7, ITERATIONS=1, TTT_ENABLED=0)  # a name that is used again replaces no artifact
    kept, = (done.folder / "runs/second").glob("final_model.2*.ptz")
    assert kept.read_bytes() == second != (done.folder / "final_model.ptz").read_bytes()


def test_without_links_the_old_places_have_copies(run, monkeypatch):
    def none(*args):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(Path, "symlink_to", none)
    done = run(ITERATIONS=1, TTT_ENABLED=0, CHECKPOINT_EVERY=1)
    for place, file in OLD_PLACES.items():
        place = done.folder / place.format("tiny")
        assert not place.is_symlink() and place.read_bytes() == (done.folder / "runs/tiny" / file).read_bytes()


def test_links_lead_to_the_run_where_a_folder_is_a_link_itself(run, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("disk")
    (run.folder / "logs").symlink_to(elsewhere)
    done = run(ITERATIONS=1, TTT_ENABLED=0, EVAL_STRIDE=0)
    assert (elsewhere / "tiny.txt").read_text() == (done.folder / "runs/tiny/log.txt").read_text()


def test_a_run_that_cannot_begin_leaves_no_log(run):
    done = run(DATA_PATH="nowhere")
    assert done.code == 2 and "bash run.sh" in done.err and not (done.folder / "logs").exists()


@pytest.mark.parametrize("ranks, said", [
    ({"RANK": ""}, "RANK='' is not a whole number"), ({"RANK": "3"}, "RANK=3 does not exist in WORLD_SIZE=1"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 needs MASTER_ADDR and MASTER_PORT"), ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x'")])
def test_ranks_that_cannot_be(ranks, said):
    with pytest.raises(tg.UserError, match=said):
        tg.read_ranks(ranks)


def test_a_missing_compiler_is_noticed_before_the_work(corpus, tmp_path):
    """In a process of its own: torch remembers the compiler it found."""
    process = start(corpus, tmp_path, COMPILE=1, CXX="/nonexistent/g++", PATH="/nonexistent",
                    TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2 and err.startswith("error: torch.compile does not work here") and not out, err


def test_a_warmdown_longer_than_the_run_is_warned_of(run):
    assert "shorter than WARMDOWN_ITERS=60" in run(WARMDOWN_ITERS=60, TTT_ENABLED=0).out
    assert "shorter than WARMDOWN_ITERS" not in run(WARMDOWN_ITERS=6, TTT_ENABLED=0).out


def test_size_fit_with_nothing_to_round_is_refused_before_training(run):
    done = run(SIZE_FIT=1, FP16_KEEP_NAME_PATTERNS="bank,emb,bigram,ve_shared")
    assert done.code == 2 and "SIZE_FIT=1 has nothing to round" in done.err and "step:1" not in done.out


def test_without_the_range_coder_auto_says_what_it_takes(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert "packed by lzma" in run(TTT_ENABLED=0).out


def test_the_code_that_counts_may_be_the_built_one(run):
    done = run(CODE_BYTES=1234, TTT_ENABLED=0)
    assert done.summary["code_bytes"] == 1234 and "Code size: 1234 bytes" in done.out


def test_an_evaluation_over_its_time_does_not_count(run, monkeypatch):
    """Reading the artifact is part of it."""
    slow = tg.load_model
    now = [0.0]
    monkeypatch.setattr(tg, "load_model", lambda *rest: (now.__setitem__(0, 700.0), slow(*rest))[1])
    begin = tg.EvalClock.__init__
    monkeypatch.setattr(tg.EvalClock, "__init__", lambda self, cfg, rt: begin(self, cfg, rt, now=lambda: now[0]))
    done = run(EVAL_MAX_SECONDS=600)
    assert done.code == 2 and "evaluation took 700.0 s, over EVAL_MAX_SECONDS=600: these scores do not count" in done.err
    assert done.summary["val_bpb_sliding"] > 0


def test_long_phases_say_how_far_they_are(run, monkeypatch):
    monkeypatch.setattr(tg.Progress, "FIRST_SECONDS", 0.0)
    out = run(WARMUP_STEPS=2).out
    assert re.search(r"^final_int6_sliding_window: 1 of \d+ after \d+ s, about \d+ s to go$", out, re.M)
    assert "warm-up: 2 steps, before the clock starts" in out and re.search(r"^packing [\d,]+ weights", out, re.M)


def test_a_checkpoint_of_other_settings_is_refused(run):
    assert run(CHECKPOINT_EVERY=4).code == 0
    refused = run(CHECKPOINT_EVERY=4, RESUME=1, MATRIX_LR=0.5)
    assert refused.code == 2 and "another MATRIX_LR" in refused.err
    for kind in ("", ".before"):
        (refused.folder / f"runs/tiny/checkpoint{kind}.pt").write_bytes(b"PK damaged")
    damaged = run(CHECKPOINT_EVERY=4, RESUME=1)
    assert damaged.code == 2 and "is whole; start without RESUME=1" in damaged.err


def test_world_size_does_not_change_the_mathematics(corpus, tmp_path):
    """1, 2, 4 and 8 ranks (gloo) on the same global batch: training, artifact, evaluation and TTT."""
    settings = dict(TRAIN_BATCH_TOKENS=768, ITERATIONS=4, WARMDOWN_ITERS=2, TTT_EPOCHS=2, TTT_BATCH_SEQS=5, NORMUON=1)
    runs, codes = on_ranks(corpus, tmp_path, (1, 2, 4, 8), **settings), {}
    losses = {ranks: [e.get("train_loss", e.get("loss")) for e in events if e["event"] in ("train", "evaluation")]
              for ranks, events in runs.items()}
    assert len(losses[1]) == 4 + 4
    scores = {ranks: [e for e in events if e["event"] == "evaluation"] for ranks, events in runs.items()}
    for ranks in runs:
        stored = tg.read_artifact((tmp_path / str(ranks) / "final_model.ptz").read_bytes())[2]
        codes[ranks] = np.concatenate([s.values.ravel() for s in stored if s.bits]).astype(int)
    for ranks in (2, 4, 8):
        assert losses[ranks][:4] == pytest.approx(losses[1][:4], rel=1e-5), ranks
        # a code on the edge may fall to the other side after sums in another order: a little more room behind rounding
        assert (codes[ranks] != codes[1]).mean() < 0.001 and abs(codes[ranks] - codes[1]).max() <= 1
        assert losses[ranks][4:] == pytest.approx(losses[1][4:], rel=2e-4), ranks
        for many, one in zip(scores[ranks], scores[1]):
            assert all(many[key] == one[key] for key in ("name", "tokens", "bytes"))
            assert many["bpb"] == pytest.approx(one["bpb"], rel=2e-4)


def test_two_ranks_give_the_bytes_of_one_that_adds_two_micro_batches(corpus, tmp_path):
    """There is one order to add two gradients in. Clipping is off: its norm adds the squares of shards."""
    settings = dict(ITERATIONS=4, WARMDOWN_ITERS=2, GRAD_CLIP_NORM=0, NORMUON=1, MICRO_BATCH_TOKENS=128, TTT_ENABLED=0,
                    EVAL_STRIDE=0)
    on_ranks(corpus, tmp_path, (1, 2), **settings)
    one, two = ((tmp_path / f"{ranks}/final_model.ptz").read_bytes() for ranks in (1, 2))
    assert one == two


def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    tg.write_atomically(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(tg.UserError, match="No space left on device"):
        tg.write_atomically(path, b"new" * 1000)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"]


def test_two_threads_write_one_file(tmp_path):
    path = tmp_path / "file"
    with tg.replacing(path) as spare:
        spare.write_bytes(b"first")
        other = threading.Thread(target=tg.write_atomically, args=(path, b"other"))
        other.start(), other.join()
        assert path.read_bytes() == b"other"
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]


def test_stopwatch_leaves_out_pauses():
    time = iter(range(0, 100, 10))
    watch = tg.Stopwatch(now=lambda: next(time))
    with watch.paused():
        pass
    assert watch.elapsed() == 20  # started at 0, paused from 10 to 20, read at 30


@pytest.mark.parametrize("settings, most", [
    ({"TTT_ENABLED": 0}, 5), ({"TTT_MODE": "sgd"}, 5), ({"TTT_MODE": "sgd", "TTT_FREEZE_BLOCKS": 1}, 7),
    ({"TTT_MODE": "lora", "HASH_EMBED_BUCKETS": 64}, 7),
    ({"TTT_MODE": "lora", "TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 16, "TTT_BATCH_DOCS": 2}, 7)])
def test_a_whole_run_scores_with_few_graphs(run, monkeypatch, settings, most):
    """Over all walks: PyTorch gives up on a function after eight. Validation's batch is another one than the final
    scores'. Graphs are traced but not made into machine code."""
    graphs, compiled = [], torch.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled(
        function, backend=backend, **options) if function.__name__ == "nll" else function)
    done = run(COMPILE=1, ITERATIONS=1, VAL_BATCH_SIZE=256, NUM_LAYERS=1, VE_LAYERS=0, **settings)
    assert done.code == 0, done.err
    assert 0 < len(graphs) <= most
