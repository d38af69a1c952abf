"""Killed and gone on with: the same bits, the same time, the same log; and no going on with another run's settings."""
import dataclasses
import json

import pytest
import torch
import train_gpt as tg
from clocks import FakeTime

BRIEF = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "ITERATIONS": 12, "CHECKPOINT_EVERY": 4, "WARMDOWN_ITERS": 9,
         "COMPRESS": "lzma"}


@pytest.fixture
def killed(run, monkeypatch):
    """Ends a run with Ctrl-C in its step number `at`."""
    def start(at, **variables):
        with monkeypatch.context() as patch:
            taken, step = [], tg.Optimisers.step

            def counted(optimisers, plan):
                taken.append(plan)
                if len(taken) == at:
                    raise KeyboardInterrupt
                return step(optimisers, plan)
            patch.setattr(tg.Optimisers, "step", counted)
            done = run(RESUME=0, **variables)
        assert done.code == 130 and "RESUME=1" in done.err and "Traceback" not in done.err
        return done
    return start


def steps_of(folder):
    lines = (folder / "logs/tiny.jsonl").read_text().splitlines()
    return [(e["step"], e["train_loss"], e["lr_scale"]) for e in map(json.loads, lines) if e["event"] == "train"]


LATE = {"LATE_QAT_THRESHOLD": 0.5, "MATRIX_BITS": 4}  # 4.5 of the 9 last steps: from step 8 on (counted from 0)
KINDS = {  # name: (killed in step, resumed after step, settings)
    "ema": (7, 4, {"EMA_DECAY": 0.9, "LATE_QAT_THRESHOLD": 0}),
    "swa": (11, 8, {"SWA_ENABLED": 1, "SWA_EVERY": 1, "SWA_START_FRAC": 0.9}),
    "lawa": (7, 4, {"LAWA_ENABLED": 1, "LAWA_FREQ": 1, "LAWA_K": 20}),
    "normuon": (7, 4, {"NORMUON": 1, "EMA_ENABLED": 0}),
    "before late qat": (7, 4, {**LATE, "EMA_ENABLED": 0}),
    "before late qat, ema": (7, 4, LATE),
    "at late qat, ema": (9, 8, LATE),
    "after late qat, ema": (12, 8, {**LATE, "LATE_QAT_THRESHOLD": 0.8}),
    "after late qat, no restart": (12, 8, {**LATE, "LATE_QAT_THRESHOLD": 0.8, "EMA_RESET_AT_QAT": 0}),
    "by fraction, soft": (11, 8, {**LATE, "LATE_QAT_FRAC": 0.3, "SOFT_ROUND": 1, "EMA_ENABLED": 0}),
    "extra heads, untied": (7, 4, {"MTP_NUM_HEADS": 1, "TIE_EMBEDDINGS": 0, "EMA_ENABLED": 0}),
    "calibrated": (7, 4, {"GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 2}),
    "warmed up": (9, 4, {"WARMUP_STEPS": 2, "EMA_ENABLED": 0})}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_without_interruption(run, killed, kind):
    at, checkpoint, settings = KINDS[kind]
    settings = {**BRIEF, **settings}
    whole = run(ARTIFACT_DIR=run.folder / "whole", **settings)
    assert whole.code == 0, whole.err
    killed(at, ARTIFACT_DIR=run.folder / "parts", **settings)
    again = run(ARTIFACT_DIR=run.folder / "parts", RESUME=1, **settings)
    assert again.code == 0 and f"resume:step:{checkpoint} from" in again.out, again.err
    for name in ("final_model.pt", "final_model.ptz"):
        assert (run.folder / "parts" / name).read_bytes() == (run.folder / "whole" / name).read_bytes(), name
    wanted, got = (steps_of(run.folder / name) for name in ("whole", "parts"))
    done = at - 1 - settings.get("WARMUP_STEPS", 0)
    assert got == wanted[:done] + wanted[checkpoint:], "the log of the first part stays, and the steps go on in it"
    assert again.summary["val_bpb_roundtrip"] == whole.summary["val_bpb_roundtrip"]
    assert again.summary["steps"] == 12


def test_the_log_of_the_run_so_far_is_kept(run, killed):
    killed(7, **BRIEF)
    before = {kind: (run.folder / f"logs/tiny.{kind}").read_text() for kind in ("txt", "jsonl")}
    assert "step:6/12 train_loss" in before["txt"] and "step:7/12 train_loss" not in before["txt"]
    assert run(**BRIEF, RESUME=1).code == 0
    for kind, text in before.items():
        after = (run.folder / f"logs/tiny.{kind}").read_text()
        assert after.startswith(text) and len(after) > len(text)
    assert run(**BRIEF, RESUME=0).code == 0
    text = (run.folder / "logs/tiny.txt").read_text()
    assert text.count("step:1/12 train_loss") == 1 and "resume:step" not in text, "a run from its start has a new log"


def test_the_time_spent_before_counts(run, killed, monkeypatch):
    """One step of 30 s, then 1 s each, 50 s in all, with a warm-down by the clock. Killed in step 11, resumed after
    step 8, which is 37 s: 13 more steps, at the rates of the run left alone."""
    settings = {**BRIEF, "ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 50, "WARMDOWN_ITERS": 15, "EVAL_MAX_SECONDS": 0}
    compiles = lambda n, *_: 1.0 if n else 30.0
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", compiles)
        whole = run(ARTIFACT_DIR=run.folder / "whole", **settings)
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", compiles)
        killed(11, ARTIFACT_DIR=run.folder / "parts", **settings)
    with monkeypatch.context() as patch:
        FakeTime(patch).charge(tg.Optimisers, "step", 1.0)
        again = run(ARTIFACT_DIR=run.folder / "parts", RESUME=1, **settings)
    assert whole.summary["steps"] == again.summary["steps"] == 21
    assert again.summary["seconds"]["train"] == 50.0
    wanted, got = (steps_of(run.folder / name) for name in ("whole", "parts"))
    assert got == wanted[:10] + wanted[8:] and wanted[-1][2] < 0.2
    assert (run.folder / "parts/final_model.ptz").read_bytes() == (run.folder / "whole/final_model.ptz").read_bytes()


def test_what_a_resumed_run_compiles_is_not_counted(run, killed, monkeypatch):
    """It warms up before its clock starts, and from the checkpoint's state on: 12 steps of 1 s, whoever compiles."""
    settings = {**BRIEF, "ITERATIONS": 1000, "MAX_WALLCLOCK_SECONDS": 12, "WARMUP_STEPS": 2, "EVAL_MAX_SECONDS": 0}
    done = []
    for resume in (0, 1):
        with monkeypatch.context() as patch:
            FakeTime(patch).charge(tg.Optimisers, "step", lambda n, *_: 1.0 if n else 30.0)
            if resume:
                killed(11, ARTIFACT_DIR=run.folder / "1", **settings)
        with monkeypatch.context() as patch:
            FakeTime(patch).charge(tg.Optimisers, "step", lambda n, *_: 1.0 if n else 30.0)
            done.append(run(ARTIFACT_DIR=run.folder / str(resume), RESUME=resume, **settings))
    for ended in done:
        assert (ended.code, ended.summary["steps"], ended.summary["seconds"]["train"]) == (0, 12, 12.0), ended.err
        assert "warmup_step:2/2" in ended.out
    assert (run.folder / "1/final_model.ptz").read_bytes() == (run.folder / "0/final_model.ptz").read_bytes()


# ---- settings

@pytest.fixture
def saved(config, rt):
    """The settings of a run with a checkpoint, and a way to go on from it with others."""
    cfg = config(iterations=12)
    model = tg.GPT(cfg)
    state = lambda: tg.TrainState.initial(model, cfg, rt)
    tg.save_checkpoint(cfg, rt, dataclasses.replace(state(), step=4))
    return cfg, lambda other: tg.load_checkpoint(other, rt, state())


OTHERS = {"seed": 7, "train_seq_len": 64, "train_batch_tokens": 512, "warmdown_iters": 8, "warmdown_frac": 0.5,
          "min_lr": 0.1, "qat_enabled": True, "late_qat_threshold": 0.3, "late_qat_frac": 0.5, "soft_round": True,
          "ema_reset_at_qat": False, "mlp_quant_bits": 5, "attn_qat_bits": 5, "embed_bits": 5, "clip_rule": "amax",
          "mlp_clip_widen": 2.0, "fp16_keep_name_patterns": "kv"}


def another(f, cfg):
    value = getattr(cfg, f.name)
    return {"bool": lambda: not value, "int": lambda: value + 1, "float": lambda: value * 0.5 + 0.001,
            "str": lambda: f"{value}0"}[f.type]()


@pytest.mark.parametrize("section", ["Model", "Optimisers", "Averaging", "others"])
def test_what_shapes_a_run_cannot_be_changed_in_its_middle(saved, section):
    cfg, go_on = saved
    changed = OTHERS if section == "others" else {f.name: another(f, cfg) for f in tg.settings_by_section()[section]}
    for name, value in changed.items():
        with pytest.raises(tg.UserError, match=f"was made with another {name.upper()}"):
            go_on(dataclasses.replace(cfg, **{name: value}))
    go_on(cfg)


FREE = {"RESUME": 1, "ITERATIONS": 9, "MAX_WALLCLOCK_SECONDS": 500, "VAL_LOSS_EVERY": 3, "TRAIN_LOG_EVERY": 0,
        "CHECKPOINT_EVERY": 0, "MICRO_BATCH_TOKENS": 128, "VAL_BATCH_SIZE": 64, "EVAL_STRIDE": 16, "TTT_ENABLED": 1,
        "TTT_LR": 0.01, "COMPRESS": "range", "GPTQ_ENABLED": 1, "GPTQ_CALIBRATION_BATCHES": 1, "EVAL_BATCH_SEQS": 8,
        "SIZE_FIT": 1, "ARTIFACT_LIMIT_BYTES": 15_000_000, "HASH_EMBED_BUCKETS": 64}


def test_what_does_not_may_be_changed(run, killed):
    killed(7, **BRIEF)
    done = run(**{**BRIEF, **FREE})
    assert done.code == 0 and done.summary["steps"] == 9, done.err


@pytest.mark.parametrize("variables", [{"TRAIN_BATCH_TOKENS": 512}, {"TRAIN_SEQ_LEN": 64}, {"SEED": 1},
                                       {"MODEL_DIM": 64}, {"NORMUON": 1}, {"SEED": 1, "EMA_DECAY": 0.5}],
                         ids=lambda variables: "+".join(variables))
def test_another_run_s_checkpoint_is_refused_in_one_line_and_survives(run, variables):
    assert run(**{**BRIEF, "ITERATIONS": 4}).code == 0
    path = run.folder / "runs/tiny/checkpoint.pt"
    assert (run.folder / "checkpoints/tiny.pt").samefile(path)
    before, artifact = path.read_bytes(), (run.folder / "final_model.ptz").read_bytes()
    done = run(**{**BRIEF, "RESUME": 1, **variables})
    names = ", ".join(sorted(variables))
    assert done.code == 2 and done.err == f"error: checkpoint {path} was made with another {names}\n"
    assert path.read_bytes() == before and (run.folder / "final_model.ptz").read_bytes() == artifact


def test_a_checkpoint_is_no_pickle_of_code(config, rt):
    """Somebody else's checkpoint must not run anything."""
    path = tg.checkpoint_path(rt)
    path.parent.mkdir(parents=True)

    class Trap:
        def __reduce__(self):
            return pytest.fail, ("a pickle was opened",)
    torch.save({"settings": Trap()}, path)
    with pytest.raises(tg.UserError, match="cannot be read"):
        tg.load_checkpoint(config(), rt, None)
