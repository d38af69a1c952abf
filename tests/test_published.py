"""The published systems: their commands, as their authors printed them, and the profiles made of them.

tests/published/NAME.txt: what the pull requests print, as `LABEL PROFILE` (`-`: none) and indented KEY=VALUE words.
"""
import collections
import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import train_gpt as tg
from conftest import ROOT, TINY

FIELDS = {f.name: f for f in dataclasses.fields(tg.Hyperparameters)}
PROFILES = sorted(path.stem for path in (ROOT / "profiles").glob("*.env"))
PUBLISHED = [name for name in PROFILES if name.startswith("pr")]
TYPOS = {"WARMDRON_ITERS": "WARMDOWN_ITERS", "092": "0.92"}  # of PR 1092's README


def read_profile(name: str) -> list[tuple[str, str]]:
    lines = (ROOT / "profiles" / f"{name}.env").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("#")[0].strip().split("=", 1)) for line in lines if line.split("#")[0].strip()]


def read(text: str) -> dict[str, dict[str, str]]:
    """Lines that are not indented -> the KEY=VALUE words below them."""
    blocks = {}
    for line in filter(None, text.splitlines()):
        if line.startswith(" "):
            blocks[title].update(word.split("=", 1) for word in line.split())
        elif not line.startswith("#"):
            title = line
            blocks[title] = {}
    return blocks


def read_commands() -> list[SimpleNamespace]:
    files = sorted((Path(__file__).parent / "published").glob("*.txt"))
    blocks = [(path.stem, *block) for path in files for block in read(path.read_text(encoding="utf-8")).items()]
    return [SimpleNamespace(name=f"{stem}:{title.split()[0]}", profile=title.split()[1], env=env)
            for stem, title, env in blocks]


def corrected(env: dict[str, str]) -> dict[str, str]:
    return {TYPOS.get(key, key): TYPOS.get(value, value) for key, value in env.items()}


def resolve(profile: str, env: dict[str, str]) -> tg.Hyperparameters:
    """As run.sh does: what is given overrides the profile, under whatever name."""
    given = [set(tg.env_names(f)) for f in FIELDS.values() if not set(tg.env_names(f)).isdisjoint(env)]
    below = [] if profile == "-" else read_profile(profile)
    kept = {key: value for key, value in below if not any(key in names for names in given)}
    return tg.Hyperparameters.from_env({**kept, **env})


def settings(variables: dict[str, str]) -> dict:
    """By own name -> values of the settings' types."""
    return {name.lower(): tg.parse_value(name, FIELDS[name.lower()], value) for name, value in variables.items()}


COMMANDS = read_commands()
by_name = {command.name: command for command in COMMANDS}


# ---- commands

@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_published_command_is_understood(command):
    """Each variable arrives at its setting, or is one that is known to have no effect."""
    env = corrected(command.env)
    cfg = tg.Hyperparameters.from_env(env)
    for key, value in env.items():
        fields = [f for f in FIELDS.values() if key in tg.env_names(f)]
        assert fields or key in tg.WITHOUT_EFFECT, key
        assert all(getattr(cfg, f.name) == tg.parse_value(key, f, value) for f in fields)


MEANT = read("""
pr1092:README
    XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=2048 TRIGRAM_VOCAB_SIZE=0 VE_LAYERS=9,10 LATE_QAT=1 ITERATIONS=9000
    MAX_WALLCLOCK_SECONDS=580 WARMDOWN_ITERS=3500 MUON_MOMENTUM_WARMUP_START=0.92 TTT_LR=0.03 TTT_EPOCHS=3
    EVAL_STRIDE=64
pr1216:README_12L_INT4_bQAT_VE
    SEED=2 NUM_LAYERS=12 MLP_QUANT_BITS=4 ATTN_QAT_BITS=6 BIGRAM_BITS=4 VE_LAST_N=2 VE_DIM=128 LATE_QAT_FRAC=0.65
    TTT_LR=0.002 BIGRAM_VOCAB_SIZE=10240 ROPE_DIMS=16 WARMDOWN_ITERS=3000
pr1216:README_13L_INT4_attn_failed
    NUM_LAYERS=13 ATTN_QAT_BITS=4 MLP_QUANT_BITS=4 VE_LAST_N=2 LATE_QAT_FRAC=0.65
pr1216:v7_ve_small
    NUM_LAYERS=12 VE_LAST_N=1 VE_DIM=64 MLP_QUANT_BITS=4
pr1216:v11_gptq
    NUM_LAYERS=11 XSA_LAST_N=11 GPTQ_ENABLED=1 TTT_ENABLED=0 COMPRESS=lzma WARMDOWN_ITERS=4000 BIGRAM_VOCAB_SIZE=3072
    BIGRAM_DIM=112 BIGRAM_BITS=6
pr1216:v11_proxy
    ITERATIONS=500 MAX_WALLCLOCK_SECONDS=0 LATE_QAT_FRAC=0 LATE_QAT_THRESHOLD=0.9 TTT_ENABLED=0
pr1216:abl_ve
    VE_LAST_N=3 ITERATIONS=1500 LATE_QAT_THRESHOLD=0.4
pr550:v1
    TTT_LORA_RANK=8 TTT_EPOCHS=10 TTT_RESET=document TTT_MODE=lora
pr550:v4
    TTT_LORA_RANK=1 TTT_EPOCHS=5 TTT_DOC_CHUNK_TOKENS=256
pr550:v6
    TTT_LORA_RANK=8 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 TTT_LORA_LR=0.01 TTT_LORA_TARGETS=q,v TTT_RESET=stream
pr550:v6_defaults
    EVAL_STRIDE=64 MUON_MOMENTUM=0.95 TRAIN_BATCH_TOKENS=524288 SMEAR_GATE=before
pr550:v8
    TTT_CHUNK_TOKENS=4096 TTT_MODE=lora
pr550:v9
    TRAIN_BATCH_TOKENS=98304 MTP_NUM_HEADS=2 MTP_LOSS_WEIGHT=0.2 COMPLEMENT_ALPHA=0.5
pr550:v10_defaults
    TTT_POLYAK_DECAY=0.998 TTT_PROJ_LR_MULT=3 TTT_FC_LR_MULT=0.5 TTT_ENABLED=0 LATE_QAT_MIN_STEP=0
""")


@pytest.mark.parametrize("name", MEANT)
def test_it_means_what_its_authors_meant(name):
    command, meant = by_name[name], settings(MEANT[name])
    cfg = resolve(command.profile, corrected(command.env))
    assert {key: getattr(cfg, key) for key in meant} == meant


def test_value_embeddings_are_in_the_last_layers():
    for name, layers in {"v7_ve": (10, 11), "v7_ve_small": (11,), "v9_13l_int4attn": (11, 12),
                         "v11_gptq": (9, 10)}.items():
        command = by_name[f"pr1216:{name}"]
        assert resolve(command.profile, command.env).ve_layer_ids == layers


@pytest.mark.parametrize("left_out, said", [
    ("MUON_MOMENTUM_WARMUP_START", "error: WARMDRON_ITERS is not a setting; did you mean WARMDOWN_ITERS?"),
    ("WARMDRON_ITERS", "error: MUON_MOMENTUM_WARMUP_START=092 is out of range: 0 to 0.9999")])
def test_the_two_typing_errors_of_pr_1092_stop_the_run(run, left_out, said):
    result = run(**{key: value for key, value in by_name["pr1092:README"].env.items() if key != left_out})
    assert result.code == 2 and result.err.startswith(said) and result.err.count("\n") == 1 and not result.summary


SMALL = {**TINY, "iterations": 3, "train_batch_tokens": 128, "muon_momentum_warmup_steps": 2, "xsa_last_n": 4,
         "attention_window": 24, "trigram_vocab_size": 64, "gptq_calibration_batches": 2, "eval_stride": 16,
         "eval_batch_seqs": 64, "ttt_batch_docs": 4, "ttt_doc_chunk_tokens": 16, "ttt_min_doc_tokens": 16,
         "loop_start": 0, "loop_end": 1, "parallel_start_layer": 2, "gptq_reserve_seconds": 0.0, "ttt_lora_rank": 2, "ttt_lora_layers": "1-2", "ttt_lora_layer_rates": "1:0.6", "hash_embed_buckets": 64,
         "train_seq_schedule": "16:0.5,32:1", "ttt_eval_seq_len": 24, "ttt_chunk_ladder": "20:8"}
CLOCKS = ("max_wallclock_seconds", "eval_max_seconds")


def shrunk(cfg: tg.Hyperparameters) -> dict[str, str]:
    """Variables of the same system in the sizes of a tiny run. What is off, or means all, stays so."""
    values = dataclasses.asdict(cfg)
    values |= {name: value for name, value in SMALL.items() if values[name] not in (0, "")}
    values |= {"ve_last_n": min(cfg.ve_last_n, 2), "micro_batch_tokens": 0, **dict.fromkeys(CLOCKS, 0.0)}
    of_the_fixture = {"data_path", "tokenizer_path", "vocab_size", "artifact_dir", "run_id"}
    return {name.upper(): str(int(value) if isinstance(value, bool) else value)
            for name, value in values.items() if name not in of_the_fixture}


OWN = [SimpleNamespace(name=name, profile=name, env={}) for name in PUBLISHED]  # the profiles as they are


@pytest.mark.parametrize("command", [*COMMANDS, *OWN], ids=lambda command: command.name)
def test_it_runs_from_end_to_end(run, command):
    env = corrected(command.env)
    cfg = resolve(command.profile, env)
    result = run(**shrunk(cfg), **{key: env[key] for key in env if key in tg.WITHOUT_EFFECT})
    assert result.code == 0, result.err
    scores = [result.summary[f"val_bpb_{key}"] for key in ("roundtrip", *["ttt"] * cfg.ttt_enabled)]
    assert all(math.isfinite(score) and 1 < score < 9 for score in scores)
    for key in env.keys() & tg.WITHOUT_EFFECT.keys():
        assert (f"{key}={env[key]} has no effect: {tg.WITHOUT_EFFECT[key]}" in result.out) == (env[key] != "0")
    assert not cfg.late_qat_frac or "late_qat:enabled" in result.out
    assert not cfg.gptq_enabled or "GPTQ:collected" in result.out


# ---- profiles

# What the published runs resolved, typed from the pull requests (files' defaults below the commands of the runs).
RESOLVED = read("""
pr1092
    NUM_LAYERS=11 LEAKY_SLOPE=0.75 XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=2048 VE_LAYERS=9,10 ROPE_TRAIN_SEQ_LEN=1024
    TRAIN_BATCH_TOKENS=786432 MAX_WALLCLOCK_SECONDS=580 MATRIX_LR=0.025 TIED_EMBED_LR=0.035 LATE_QAT=0
    MLP_QUANT_BITS=6 EMBED_BITS=8 COMPRESS=lzma TTT_LR=0.03 TTT_MOMENTUM=0.9 TTT_CHUNK_TOKENS=32768 SEED=1337
pr1216_int4_ve
    NUM_LAYERS=12 LEAKY_SLOPE=0.5 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=10240 BIGRAM_DIM=128 ROPE_DIMS=16
    ROPE_TRAIN_SEQ_LEN=2048 MATRIX_LR=0.02 TIED_EMBED_LR=0.03 WARMDOWN_ITERS=3000 LATE_QAT_FRAC=0.65 QAT_ENABLED=0
    EMA_RESET_AT_QAT=1 MLP_QUANT_BITS=4 ATTN_QAT_BITS=6 BIGRAM_BITS=4 FP16_KEEP_NAME_PATTERNS=tok_emb PRUNE_FRAC=0.03
    COMPRESS=zstd TTT_LR=0.002 TTT_EPOCHS=3 SEED=2
pr1216_banked
    NUM_LAYERS=12 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=10240 MATRIX_LR=0.02 MUON_WD=0.04 ADAM_WD=0.04 LATE_QAT_FRAC=0.65
    MLP_QUANT_BITS=4 ATTN_QAT_BITS=6 PRUNE_FRAC=0.03 COMPRESS=zstd TTT_LR=0.002 SEED=1
pr1216_13l_int4_attn
    NUM_LAYERS=13 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=10240 VE_LAST_N=2 VE_DIM=128 LATE_QAT_FRAC=0.65 MLP_QUANT_BITS=4
    ATTN_QAT_BITS=4 BIGRAM_BITS=4 PRUNE_FRAC=0.03 TTT_ENABLED=1 TTT_LR=0.002 SEED=1
pr1216_int6_xsa_all
    NUM_LAYERS=11 XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 WARMDOWN_ITERS=4000 LATE_QAT_FRAC=0.65
    MLP_QUANT_BITS=6 ATTN_QAT_BITS=6 BIGRAM_BITS=6 COMPRESS=lzma PRUNE_FRAC=0.03 TTT_LR=0.002 SEED=1
pr1216_gptq
    NUM_LAYERS=11 XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 WARMDOWN_ITERS=4000 GPTQ_ENABLED=1
    LATE_QAT_FRAC=0.65 MLP_QUANT_BITS=6 BIGRAM_BITS=6 COMPRESS=lzma TTT_ENABLED=0 MAX_WALLCLOCK_SECONDS=600 SEED=1
pr1216_proxy
    NUM_LAYERS=11 XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=3072 BIGRAM_DIM=112 ITERATIONS=500 MAX_WALLCLOCK_SECONDS=0
    LATE_QAT_FRAC=0 LATE_QAT_THRESHOLD=0.9 MLP_QUANT_BITS=6 COMPRESS=lzma WARMDOWN_ITERS=4000 TTT_ENABLED=0 SEED=1
pr550_lora_ttt
    NUM_LAYERS=11 LEAKY_SLOPE=0.5 SMEAR_GATE=before ROPE_DIMS=0 LN_SCALE=0 XSA_LAST_N=0 BIGRAM_VOCAB_SIZE=4096
    VE_ENABLED=0 TRAIN_SEQ_LEN=1024 TRAIN_BATCH_TOKENS=524288 WARMDOWN_FRAC=0.15 MATRIX_LR=0.04 TIED_EMBED_LR=0.05
    MUON_MOMENTUM=0.95 MUON_WD=0 ADAM_WD=0 GRAD_CLIP_NORM=0 QAT_ENABLED=1 MLP_QUANT_BITS=6 BIGRAM_BITS=6 EMBED_BITS=8
    TTT_MODE=lora TTT_RESET=stream TTT_LORA_RANK=8 TTT_LORA_ALPHA=1 TTT_LORA_TARGETS=q,v TTT_LORA_LR=0.01
    TTT_CHUNK_TOKENS=4096 TTT_EPOCHS=3 TTT_BATCH_SEQS=1 TTT_BETA2=0.999
pr550_per_document
    NUM_LAYERS=11 TRAIN_SEQ_LEN=1024 MATRIX_LR=0.04 QAT_ENABLED=1 XSA_LAST_N=0 BIGRAM_VOCAB_SIZE=4096
    SMEAR_GATE=before TTT_MODE=lora TTT_RESET=document TTT_LORA_RANK=8 TTT_LORA_TARGETS=q,v TTT_LORA_LR=0.01
    TTT_DOC_CHUNK_TOKENS=256 TTT_MIN_DOC_TOKENS=512 TTT_EPOCHS=3
pr550_mtp_small_batch
    NUM_LAYERS=11 LEAKY_SLOPE=0.5 XSA_LAST_N=4 BIGRAM_VOCAB_SIZE=2048 VE_LAYERS=9,10 ROPE_TRAIN_SEQ_LEN=1024
    TRAIN_BATCH_TOKENS=98304 WARMDOWN_ITERS=3500 MATRIX_LR=0.025 MTP_NUM_HEADS=2 MTP_LOSS_WEIGHT=0.2
    COMPLEMENT_ALPHA=0.5 SOFT_ROUND=1 LATE_QAT_THRESHOLD=0.15 TTT_ENABLED=0 TTT_POLYAK_DECAY=0.998 EVAL_STRIDE=64
pr1254_sp8192_lora
    VOCAB_SIZE=8192 NUM_LAYERS=11 MODEL_DIM=416 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=3 LEAKY_SLOPE=0.5 LOGIT_SOFTCAP=0
    QK_NORM=0 NORM_WEIGHTS=1 NORM_EPS=1e-6 EMBED_NORM=0 SMEAR_GATE=off UNET_SKIPS=0 RESIDUAL_MIX=0 XSA_LAST_N=11
    ATTENTION_WINDOW=192 INIT=kaiming TRAIN_BATCH_TOKENS=16384 TRAIN_SEQ_LEN=256 ITERATIONS=5000
    MATRIX_OPTIMIZER=adamw MATRIX_LR=1e-3 SCALAR_LR=1e-3 TIED_EMBED_LR=1e-3 MUON_WD=0.1 ADAM_WD=0.1 BETA2=0.999
    GRAD_CLIP_NORM=1 WARMDOWN_SHAPE=cosine WARMDOWN_FRAC=1 LATE_QAT_FRAC=0.15 EMBED_BITS=6 CLIP_RULE=amax
    EMA_ENABLED=0 TTT_LORA_RANK=8 TTT_LORA_TARGETS=q,v,head TTT_LORA_LR=0.01 TTT_BETA2=0.95 TTT_EPOCHS=2
    TTT_MIN_DOC_TOKENS=512 SEED=42
pr1254_lora_qkvo_last4
    MODEL_DIM=416 VOCAB_SIZE=8192 TTT_MODE=lora TTT_RESET=document TTT_LORA_RANK=8 TTT_LORA_TARGETS=q,k,v,o
    TTT_LORA_LAYERS=7-10 TTT_LORA_LAYER_RATES=7:0.6 TTT_LORA_LR=0.01 ATTENTION_WINDOW=192 NORM_WEIGHTS=1
pr1254_eval_hash
    MODEL_DIM=416 VOCAB_SIZE=8192 HASH_EMBED_BUCKETS=16384 HASH_EMBED_LR_MULT=10 TTT_MODE=sgd TTT_LR=0.005
    TTT_MOMENTUM=0.9 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 ATTENTION_WINDOW=192 NORM_WEIGHTS=1 EVAL_STRIDE=64
pr1394
    VOCAB_SIZE=8192 NUM_LAYERS=11 MODEL_DIM=512 MLP_MULT=4 LEAKY_SLOPE=0.5 SMEAR_GATE=off SKIP_GATES=1 NUM_LOOPS=2
    LOOP_START=4 LOOP_END=5 ENABLE_LOOPING_AT=0.5 PARALLEL_START_LAYER=0 QK_GAIN_INIT=4 XSA_LAST_N=11 ROPE_DIMS=16
    WARMDOWN_FRAC=0.667 MIN_LR=0 MATRIX_LR=0.02 SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_MOMENTUM=0.99 POLAR_EXPRESS=0
    MUON_ROW_NORMALIZE=1 MUON_WD=0.085 EMBED_WD=0.085 ADAM_WD=0.02 BETA2=0.95 EMA_DECAY=0.997 EMA_RAMP=0
    EMBED_BITS=8 MLP_CLIP_SIGMAS=12.85 ATTN_CLIP_SIGMAS=12.85 EMBED_CLIP_SIGMAS=20 GPTQ_CALIBRATION_BATCHES=64
    GPTQ_RESERVE_SECONDS=12 TTT_ENABLED=0 SEED=1337
pr1493
    VOCAB_SIZE=8192 NUM_LAYERS=11 MLP_MULT=4 LEAKY_SLOPE=0.5 SMEAR_GATE=off SKIP_GATES=1 NUM_LOOPS=2 LOOP_START=3
    LOOP_END=5 ENABLE_LOOPING_AT=0.35 PARALLEL_START_LAYER=7 PARALLEL_FORM=joint QK_GAIN_INIT=5.25 WARMDOWN_FRAC=0.72
    MATRIX_LR=0.022 MUON_MOMENTUM=0.99 MUON_WD=0.095 EMBED_WD=0.085 EMA_DECAY=0.9965 EMBED_BITS=8 TTT_MODE=sgd
    TTT_LR=0.005 TTT_MOMENTUM=0.9 TTT_EPOCHS=3 TTT_CHUNK_TOKENS=32768 EVAL_STRIDE=64 SEED=42
pr1855
    VOCAB_SIZE=8192 NUM_LAYERS=11 MLP_MULT=4 LEAKY_SLOPE=0.5 SMEAR_GATE=window GATE_WINDOW=12 SKIP_GATES=1 NUM_LOOPS=2
    LOOP_START=3 LOOP_END=5 ENABLE_LOOPING_AT=0.35 PARALLEL_START_LAYER=8 PARALLEL_FORM=lanes PARALLEL_FINAL_LANE=mean
    SPARSE_ATTN_GATE=1 SPARSE_ATTN_GATE_SCALE=0.5 QK_GAIN_INIT=5 WARMDOWN_FRAC=0.85 MIN_LR=0.1 MATRIX_LR=0.026
    SCALAR_LR=0.02 TIED_EMBED_LR=0.03 MUON_MOMENTUM=0.97 POLAR_EXPRESS=1 MUON_ROW_NORMALIZE=1 MUON_WD=0.095
    EMBED_WD=0.085 ADAM_WD=0.02 BETA2=0.99 EMA_DECAY=0.9965 EMA_RAMP=0 EMBED_BITS=7 MLP_CLIP_SIGMAS=11.5
    ATTN_CLIP_SIGMAS=13 EMBED_CLIP_SIGMAS=14 TTT_LORA_RANK=80 TTT_LORA_ALPHA=144 TTT_LORA_LR=1e-4 TTT_BETA1=0
    TTT_BETA2=0.99 TTT_WEIGHT_DECAY=0.5 TTT_DOC_CHUNK_TOKENS=48 TTT_BATCH_DOCS=64 TTT_EVAL_SEQ_LEN=2048
    TTT_WARM_START_A=1 TTT_LORA_PARALLEL=1 SEED=42
pr2014
    NUM_LOOPS=2 PARALLEL_START_LAYER=8 SMEAR_GATE=window SPARSE_ATTN_GATE=1 QK_GAIN_INIT=5.25 TRAIN_SEQ_LEN=3072
    EVAL_SEQ_LEN=3072 MATRIX_LR=0.026 WARMDOWN_FRAC=0.85 TTT_LORA_TARGETS=k,o,mlp,head TTT_LORA_LR=1e-4
    TTT_LOCAL_LR_MULT=0.75 TTT_BATCH_DOCS=24 TTT_CHUNK_LADDER=256:8,2000:24 TTT_DOC_CHUNK_TOKENS=48
    TTT_EVAL_SEQ_LEN=3072 TTT_WARM_START_A=1 TTT_LORA_PARALLEL=1 SEED=42
""")
# Parameters of the exported model, as published or counted in the published scripts.
PARAMETERS = {"pr1092": 26_993_756, "pr1216_int4_ve": 30_404_196, "pr1216_banked": 30_404_196,
              "pr1216_int6_xsa_all": 27_067_484, "pr1216_gptq": 27_067_484, "pr550_mtp_small_batch": 26_993_756,
              "pr1254_sp8192_lora": 20_549_984, "pr1394": 35_943_512, "pr1493": 35_944_536, "pr1855": 35_945_671,
              "pr2014": 35_945_671}
# A profile sets these whatever their defaults are, and those below where they make a difference.
ALWAYS = """
DATA_PATH TOKENIZER_PATH VOCAB_SIZE SEED NUM_LAYERS MODEL_DIM NUM_HEADS NUM_KV_HEADS MLP_MULT LEAKY_SLOPE TIE_EMBEDDINGS
LOGIT_SOFTCAP EMBED_NORM SMEAR_GATE UNET_SKIPS RESIDUAL_MIX NORM_WEIGHTS NORM_EPS INIT QK_NORM ROPE_BASE ROPE_DIMS
ROPE_TRAIN_SEQ_LEN LN_SCALE XSA_LAST_N ATTENTION_WINDOW BIGRAM_VOCAB_SIZE TRIGRAM_VOCAB_SIZE VE_ENABLED GATED_ATTENTION
VALUE_RESIDUAL DTG_ENABLED MTP_NUM_HEADS TRAIN_BATCH_TOKENS TRAIN_SEQ_LEN ITERATIONS MAX_WALLCLOCK_SECONDS WARMUP_STEPS
WARMDOWN_FRAC WARMDOWN_SHAPE MATRIX_OPTIMIZER MATRIX_LR SCALAR_LR TIED_EMBED_LR MUON_WD ADAM_WD BETA1 BETA2 ADAM_EPS
GRAD_CLIP_NORM COMPLEMENT_ALPHA EMA_ENABLED SWA_ENABLED LAWA_ENABLED QAT_ENABLED LATE_QAT SOFT_ROUND EMA_RESET_AT_QAT
MLP_QUANT_BITS ATTN_QAT_BITS EMBED_BITS CLIP_RULE GPTQ_ENABLED PRUNE_FRAC COMPRESS SIZE_FIT EVAL_SEQ_LEN EVAL_STRIDE
EVAL_MAX_SECONDS TTT_ENABLED TTT_MODE TTT_RESET TTT_EPOCHS TTT_GRAD_CLIP TTT_TEMP HASH_EMBED_BUCKETS""".split()


WHERE_THEY_COUNT = {
    "QK_GAIN_INIT": lambda cfg: cfg.qk_norm, "TIED_EMBED_INIT_STD": lambda cfg: cfg.init == "orthogonal",
    "BIGRAM_DIM BIGRAM_BITS": lambda cfg: cfg.bigram_vocab_size, "VE_DIM VE_BITS": lambda cfg: cfg.ve_enabled,
    "VE_LAYERS": lambda cfg: cfg.ve_enabled and cfg.ve_last_n < 0,
    "HEAD_LR MTP_LOSS_WEIGHT": lambda cfg: cfg.mtp_num_heads,
    "WARMDOWN_ITERS": lambda cfg: not cfg.warmdown_frac, "MIN_LR": lambda cfg: cfg.warmdown_frac,
    "MUON_MOMENTUM MUON_MOMENTUM_WARMUP_START MUON_MOMENTUM_WARMUP_STEPS MUON_BACKEND_STEPS NORMUON":
        lambda cfg: cfg.matrix_optimizer == "muon",
    "POLAR_EXPRESS MUON_ROW_NORMALIZE EMBED_WD EMA_RAMP SKIP_GATES PARALLEL_START_LAYER": lambda cfg: cfg.num_loops,
    "LOOP_START LOOP_END ENABLE_LOOPING_AT": lambda cfg: cfg.num_loops,
    "PARALLEL_FORM": lambda cfg: cfg.parallel_start_layer, "PARALLEL_FINAL_LANE": lambda cfg: cfg.two_lanes,
    "GATE_WINDOW": lambda cfg: cfg.smear_gate == "window", "SPARSE_ATTN_GATE_SCALE": lambda cfg: cfg.sparse_attn_gate,
    "EMA_DECAY": lambda cfg: cfg.ema_enabled,
    "LATE_QAT_THRESHOLD LATE_QAT_FRAC LATE_QAT_MIN_STEP": lambda cfg: cfg.late_qat,
    "GPTQ_CALIBRATION GPTQ_CALIBRATION_BATCHES GPTQ_RESERVE_SECONDS": lambda cfg: cfg.gptq_enabled,
    "TTT_OPTIMIZER TTT_LR TTT_MOMENTUM TTT_FREEZE_BLOCKS": lambda cfg: cfg.ttt_mode == "sgd",
    "TTT_LORA_RANK TTT_LORA_ALPHA TTT_LORA_TARGETS TTT_LORA_OPTIMIZER TTT_LORA_LR": lambda cfg: cfg.ttt_mode == "lora",
    "TTT_BETA1 TTT_BETA2 TTT_ADAM_EPS TTT_WEIGHT_DECAY": lambda cfg: cfg.ttt_mode == "lora",
    "TTT_CHUNK_TOKENS TTT_BATCH_SEQS TTT_POLYAK_DECAY": lambda cfg: cfg.ttt_reset == "stream",
    "TTT_BATCH_DOCS TTT_DOC_CHUNK_TOKENS TTT_MIN_DOC_TOKENS": lambda cfg: cfg.ttt_reset == "document",
    "HASH_EMBED_LR_MULT": lambda cfg: cfg.hash_embed_buckets}


def test_every_system_has_a_profile():
    assert set(RESOLVED) == set(PUBLISHED) and {"default", "document", "smoke"} <= set(PROFILES)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_names_each_setting_once_and_parses(profile):
    keys = [key for key, _ in read_profile(profile)]
    of_field = collections.Counter(f.name for f in FIELDS.values() for key in keys if key in tg.env_names(f))
    known = {name for f in FIELDS.values() for name in tg.env_names(f)}
    assert not set(keys) - known and len(keys) == len(set(keys)) and set(of_field.values()) == {1}
    tg.Hyperparameters.from_env(dict(read_profile(profile)))


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_profile_is_the_published_run(profile):
    values = dict(read_profile(profile))
    cfg = tg.Hyperparameters.from_env(values)
    published = settings(RESOLVED[profile])
    assert {name: getattr(cfg, name) for name in published} == published
    counting = [name for names, counts in WHERE_THEY_COUNT.items() if counts(cfg) for name in names.split()]
    assert not {*ALWAYS, *counting} - set(values), "it would change with a default"
    if profile in PARAMETERS:
        exported = {name: shape for name, shape in tg.parameter_shapes(cfg).items() if not name.startswith("mtp_heads")}
        assert sum(map(math.prod, exported.values())) == PARAMETERS[profile]


@pytest.mark.parametrize("profile", PUBLISHED)
def test_a_profile_says_what_was_published_and_what_differs(profile):
    lines = (ROOT / "profiles" / f"{profile}.env").read_text(encoding="utf-8").splitlines()
    header = [line for line in lines[:7] if line.startswith("# ")]
    assert 3 <= len(header) <= 6 and lines[:len(header)] == header and header[1].startswith("# published: ")
    assert not [line for line in lines if len(line) > 120]
