"""SCALE=tiny: every profile runs end to end, small, with all that was on still on."""
import dataclasses
import json
import re
import sys
import types
from pathlib import Path

import pytest

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import estimate  # noqa: E402
import profiles  # noqa: E402
import scale  # noqa: E402
import tiny as rules  # noqa: E402

# Everything that can be on beside one another, as two profiles; the parts lie where shrinking could lose them.
RICH = {
    "stream": {
        "NUM_LAYERS": "13", "NUM_HEADS": "8", "NUM_KV_HEADS": "2", "XSA_LAST_N": "4", "VALUE_EMBED_LAYERS": "2",
        "VALUE_EMBED_DIM": "128", "TRIGRAM_VOCAB_SIZE": "4096", "GATED_ATTENTION": "1", "VALUE_RESIDUAL": "1",
        "DTG_ENABLED": "1", "MTP_NUM_HEADS": "2", "TIE_EMBEDDINGS": "0", "NORMUON": "1", "SWA_ENABLED": "1",
        "LATE_QAT_THRESHOLD": "0.02", "LATE_QAT_MIN_STEP": "1000", "SOFT_ROUND": "1", "MLP_QUANT_BITS": "4",
        "GPTQ_ENABLED": "1", "GPTQ_CALIBRATION": "self", "PRUNE_FRAC": "0.03", "COMPLEMENT_ALPHA": "0.5",
        "SIZE_FIT": "1", "TTT_FREEZE_BLOCKS": "2", "TTT_POLYAK_DECAY": "0.9", "HASH_EMBED_BUCKETS": "16384",
        "ATTENTION_WINDOW": "512", "WARMDOWN_SHAPE": "cosine"},
    "document": {
        "NUM_LAYERS": "11", "VE_LAYERS": "0,5,10", "ROPE_DIMS": "0", "BIGRAM_DIM": "512", "VE_DIM": "256",
        "XSA_LAST_N": "0", "LAWA_ENABLED": "1", "LATE_QAT_FRAC": "0.65", "GPTQ_ENABLED": "1", "EVAL_SEQ_LEN": "4096",
        "MATRIX_OPTIMIZER": "adamw", "WARMDOWN_FRAC": "0.1", "MIN_LR": "0.1", "EVAL_STRIDE": "0", "TTT_MODE": "lora",
        "TTT_RESET": "document", "LORA_RANK": "96", "TTT_LORA_ALPHA": "144", "TTT_LORA_LAYERS": "7-10",
        "TTT_LORA_LAYER_RATES": "7:0.6,9:0.8", "TTT_MIN_DOC_TOKENS": "512", "TTT_LORA_TARGETS": "q,k,v,o,mlp,head"}}


def rich(name: str) -> profiles.Profile:
    return profiles.Profile(f"rich_{name}", name, RICH[name], profiles.Published())


ALL = [*map(profiles.load, profiles.names()), *map(rich, RICH)]
each_profile = pytest.mark.parametrize("profile", ALL, ids=lambda profile: profile.name)


def variables(profile: profiles.Profile, given: dict[str, str] = {}) -> dict[str, str]:
    """What a run with SCALE=tiny goes by."""
    shrunk = {key: value for key, value, _ in rules.tiny(profile, given)}
    return profiles.variables(types.SimpleNamespace(values={**profile.values, **shrunk}), given)


def tiny(profile: profiles.Profile, given: dict[str, str] = {}) -> tg.Hyperparameters:
    return tg.Hyperparameters.from_env(variables(profile, given))


def plans(cfg: tg.Hyperparameters) -> list[tg.StepPlan]:
    return [tg.plan_step(cfg, step, 0.0, 0.0) for step in range(cfg.iterations)]


# ---- what stays on

@each_profile
def test_what_is_on_stays_on(profile):
    """Switches and choices are the same; a size or list is nothing where it was nothing, and only there."""
    was, now = profiles.settings(profile), tiny(profile)
    for f in dataclasses.fields(was):
        before, after = getattr(was, f.name), getattr(now, f.name)
        if f.type == "bool" or f.metadata["choices"]:
            assert before == after, f.name
        else:
            assert bool(before) == bool(after) or f.name == "code_bytes", f.name
        if f.type in ("int", "float") and f.name not in ("code_bytes", "late_qat_threshold"):
            assert after <= before, f.name
        may_be_one = "num_kv_heads", "xsa_last_n", "loop_start", "ttt_freeze_blocks", "late_qat_min_step"
        assert f.type != "int" or before <= 1 or after > 1 or f.name in may_be_one, f.name


@each_profile
def test_layers_keep_their_places(profile):
    was, now = profiles.settings(profile), tiny(profile)
    last, new_last = was.num_layers - 1, now.num_layers - 1
    assert 2 <= now.num_layers <= 4
    for before, after in ((was.ve_layer_ids, now.ve_layer_ids), (was.lora_layer_ids, now.lora_layer_ids)):
        assert (last in before) == (new_last in after) and (0 in before) == (0 in after)
        assert min(len(before), 2) <= len(after) <= now.num_layers
        assert (len(before) == was.num_layers) == (len(after) == now.num_layers)
    assert sorted(now.lora_layer_rates.values()) == sorted(was.lora_layer_rates.values())
    assert set(now.lora_layer_rates) <= set(now.lora_layer_ids)
    for name in ("xsa_last_n", "ttt_freeze_blocks"):
        assert (getattr(was, name) < was.num_layers) == (getattr(now, name) < now.num_layers)


@each_profile
def test_shapes_keep_their_kind(profile):
    was, now = profiles.settings(profile), tiny(profile)
    kv = lambda cfg: cfg.num_kv_heads * cfg.head_dim
    assert (was.num_kv_heads < was.num_heads) == (now.num_kv_heads < now.num_heads)
    assert (was.rope_dims in (0, was.head_dim)) == (now.rope_dims in (0, now.head_dim))
    assert (was.ve_dim == kv(was)) == (now.ve_dim == kv(now))  # else there is a projection
    assert (was.bigram_dim == was.model_dim) == (now.bigram_dim == now.model_dim)
    assert (was.train_seq_len > was.rope_train_seq_len) == (now.train_seq_len > now.rope_train_seq_len)
    assert (0 < was.attention_window < was.train_seq_len) == (0 < now.attention_window < now.train_seq_len)
    assert (was.window > was.train_seq_len) == (now.window > now.train_seq_len)
    assert (0 < was.eval_stride < was.window) == (0 < now.eval_stride < now.window)
    assert now.train_batch_tokens % (8 * now.train_seq_len) == 0  # for eight ranks
    assert was.ttt_lora_alpha * now.ttt_lora_rank == pytest.approx(now.ttt_lora_alpha * was.ttt_lora_rank)


@each_profile
def test_the_schedule_passes_all_its_turns(profile):
    was, now = profiles.settings(profile), tiny(profile)
    steps, last = plans(now), tg.plan_step(was, was.iterations - 1, 0.0, 0.0)
    assert steps[-1].qat == last.qat and steps[0].qat == tg.plan_step(was, 0, 0.0, 0.0).qat
    if last.qat:
        assert sum(step.qat for step in steps) >= 2
        assert not was.soft_round or steps[-1].hardness > steps[-2].hardness or steps[-1].hardness == 1
    if was.warmdown_iters or was.warmdown_frac:
        assert steps[0].lr_scale == tg.plan_step(was, 0, 0.0, 0.0).lr_scale > steps[-1].lr_scale
    if was.muon_momentum_warmup_steps and was.matrix_optimizer == "muon":
        assert steps[0].momentum < steps[-1].momentum == was.muon_momentum
    assert not was.swa_enabled or sum(step.snapshot for step in steps) >= 2
    assert not was.lawa_enabled or now.lawa_k * now.lawa_freq < now.iterations
    assert 0 <= now.checkpoint_every < now.iterations and now.warmup_steps <= 2


# ---- what is given by hand

def test_a_given_size_is_kept_and_followed():
    profile = profiles.load("pr1092")
    now = tiny(profile, {"NUM_LAYERS": "6", "TRAIN_SEQ_LEN": "32", "PATH": "x"})
    assert now.num_layers == 6 and now.ve_layer_ids == (4, 5) and now.xsa_last_n == 6
    assert now.train_seq_len == 32 and now.train_batch_tokens == 256 and now.eval_seq_len == 32
    assert now.rope_train_seq_len == 16 and now.ttt_chunk_tokens == 512


def test_names_of_the_profile_and_the_environment():
    """One setting under two names would be a contradiction."""
    assert {"VALUE_EMBED_LAYERS", "VALUE_EMBED_DIM"} <= variables(rich("stream")).keys()
    assert "VE_LAST_N" not in variables(rich("stream"))
    assert tiny(rich("stream"), {"VALUE_EMBED_DIM": "12"}).ve_dim == 12
    given = {"OUT_DIR": "x", "VALUE_EMBED_DIM": "12", "MATRIX_BITS": "5"}
    assert tiny(profiles.load("default"), given).ve_dim == 12


def test_a_switch_given_by_hand_gets_its_sizes():
    now = tiny(profiles.load("default"), {"TTT_MODE": "lora", "TTT_RESET": "document", "LAWA_ENABLED": "1"})
    assert (now.ttt_lora_rank, now.ttt_batch_docs, now.lawa_freq) == (4, 8, 5)


def test_only_what_is_used_is_in_the_table():
    names = [key for key, _, _ in rules.tiny(profiles.load("pr1216_int4_ve"), {})]
    assert "TTT_CHUNK_TOKENS" in names and "BIGRAM_DIM" in names
    assert not {name for name in names if re.match("TRIGRAM|SWA|LAWA|GPTQ|TTT_LORA|TTT_BATCH_DOCS|CODE", name)}


@pytest.mark.parametrize("size, name", [(1024, "sp1024"), (4096, "sp4096"), (8192, "sp8192"), (50000, "sp8192")])
def test_vocabulary_of_the_embedded_text(size, name):
    profile = profiles.Profile("x", "x", {"VOCAB_SIZE": str(size), "DATA_PATH": "./x"}, profiles.Published())
    assert variables(profile)["DATA_PATH"] == f"./data/datasets/embedded_{name}"
    assert variables(profiles.load("pr1092"), {"DATA_PATH": "./mine"})["DATA_PATH"] == "./mine"


def test_table_is_a_profile(capsys, monkeypatch):
    for name in rules.Settings.__dataclass_fields__:
        monkeypatch.delenv(name.upper(), raising=False)
    assert scale.main(["tiny", "pr1092"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# SCALE=tiny: what is smaller than in pr1092; every feature stays on"
    assert all(re.fullmatch(r"[A-Z_]+=\S* +# was \S+", line) for line in lines[1:])
    assert len({line.index("# was") for line in lines[1:]}) == 1
    assert any(line.startswith("VE_LAYERS=2,3 ") and line.endswith("# was 9,10") for line in lines)


@pytest.mark.parametrize("arguments, words", [
    (["huge", "pr1092"], "SCALE=huge is not one of: tiny"), (["", "smoke"], "SCALE= is not one of: tiny"),
    (["tiny", "pr1O92"], "no profile 'pr1O92'; did you mean pr1092"), (["tiny"], "required: profile")])
def test_a_users_mistake_is_one_line(arguments, words, capsys):
    assert scale.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_a_bad_value_is_one_line(capsys, monkeypatch):
    monkeypatch.setenv("NUM_LAYERS", "x")
    assert scale.main(["tiny", "pr1092"]) == 2
    assert capsys.readouterr().err == "error: NUM_LAYERS='x' is not a whole number\n"


# ---- whole runs

@each_profile
def test_runs_end_to_end(profile, corpus, tmp_path, monkeypatch, capsys):
    """On less text than SCALE=tiny alone reads, with a smaller vocabulary; all phases, and the marks of what is on."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", *rules.Settings.__dataclass_fields__):
        monkeypatch.delenv(name.upper(), raising=False)
    given = {"DATA_PATH": str(corpus.folder), "TOKENIZER_PATH": str(corpus.tokenizer_path), "VOCAB_SIZE": "384",
             "ARTIFACT_DIR": str(tmp_path), "RUN_ID": "tiny", "DEVICE": "cpu", "TTT_CHUNK_TOKENS": "512"}
    was, cfg = profiles.settings(profile), tiny(profile, given)
    for key, value in variables(profile, given).items():
        monkeypatch.setenv(key, value)
    assert tg.main([]) == 0
    log = capsys.readouterr().out
    summary = json.loads(log.splitlines()[-1].removeprefix("summary: "))
    assert summary["steps"] == cfg.iterations
    assert (summary["val_bpb_sliding"] is not None) == bool(was.eval_stride)
    assert (summary["val_bpb_ttt"] is not None) == was.ttt_enabled
    assert all(0 < value < 8 for key, value in summary.items() if key.startswith("val_bpb") and value is not None)
    count = lambda pattern: [int(number) for number in re.findall(pattern, log)]
    qat = count(r"late_qat:enabled step:(\d+)")
    assert bool(qat) == plans(cfg)[-1].qat and all(step < cfg.iterations - 1 for step in qat)
    assert not was.swa_enabled or was.lawa_enabled or count(r"swa:applying averaged (\d+) checkpoints")[0] >= 2
    assert not was.lawa_enabled or count(r"lawa:applying LAWA averaging k=(\d+)")[0] >= 2
    assert not was.gptq_enabled or count(r"GPTQ:collected (\d+) Hessians")
    assert not was.size_fit or count(r"size_fit:total:(\d+)")
    assert not was.mtp_num_heads or count(r"export_excluding_mtp_params:(\d+)")
    if was.ttt_enabled and was.ttt_reset == "stream":
        assert count(r"ttt_sliding:start chunks=(\d+)")[0] >= 2
    elif was.ttt_enabled:
        assert count(r"side_by_side=(\d+)")[0] >= 2
    packed = next(json.loads(line) for line in (tmp_path / "logs/tiny.jsonl").read_text().splitlines()
                  if json.loads(line)["event"] == "artifact")
    expected = {stream.name: stream.values for stream in estimate.streams(cfg) if stream.values}
    assert {row[0]: row[2] for row in packed["ledger"]} == expected


def test_a_growing_context_keeps_its_stages():
    was = tg.Hyperparameters(train_seq_schedule="1024:0.1,2048:0.7,3072:1", train_seq_len=3072)
    now = dataclasses.replace(was, train_seq_len=64)
    assert rules.seq_schedule(was, now) == "16:0.1,32:0.7,64:1" and rules.seq_schedule(tg.Hyperparameters(), now) == ""
