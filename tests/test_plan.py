"""What a run will take, told before it: against published and measured numbers, and against the program itself."""
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train_gpt as tg

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import estimate  # noqa: E402
import plan  # noqa: E402
import profiles  # noqa: E402
import roofline  # noqa: E402
import systems  # noqa: E402
from shell import UsageError  # noqa: E402

# `bash run.sh smoke`, all of its 300 steps: what took the bytes (records/estimates)
SMOKE = {"attn": 134_920, "embed": 112_348, "half": 17_747, "mlp": 260_464, "ngram": 125_248, "scales": 10_283,
         "value": 63_036}
SMOKE_BYTES, SMOKE_PARAMETERS = 724_846, 928_148
# the largest model of records/packing, its codes
PACKING = {"attn": 779_164, "mlp": 1_479_052, "embed": 228_448, "ngram": 240_692, "value": 124_024}
PACKING_SETTINGS = {"num_layers": 6, "model_dim": 256, "ve_layers": "4,5", "train_seq_len": 512}


@pytest.fixture(autouse=True)
def no_settings(monkeypatch):
    for variable in ("DATA_PATH", "NUM_LAYERS", "RUN_SH_COMMAND"):
        monkeypatch.delenv(variable, raising=False)


def smoke() -> tg.Hyperparameters:
    return profiles.settings(profiles.load("smoke"))


# ---- parameters and bytes

def test_parameters_are_those_of_the_model():
    counts = estimate.parameters(smoke())
    assert sum(counts.values()) == SMOKE_PARAMETERS
    assert counts["embed"] == 1024 * 128 and counts["mlp"] == 4 * 2 * 384 * 128
    assert sum(estimate.parameters(tg.Hyperparameters()).values()) == 26_993_756  # PR 1092's log
    pr1216 = tg.Hyperparameters(num_layers=12, bigram_vocab_size=10240, ve_layers="10,11")
    assert sum(estimate.parameters(pr1216).values()) == 30_404_196


def test_bytes_of_the_smoke_model():
    streams = {stream.name: stream.bytes for stream in estimate.streams(smoke())}
    assert streams.keys() == {*SMOKE, "header"}
    for name, size in SMOKE.items():
        assert streams[name] == pytest.approx(size, rel=0.05), name
    assert estimate.artifact_bytes(smoke()) == pytest.approx(SMOKE_BYTES, rel=0.02)


def test_bytes_of_the_largest_recorded_model():
    streams = {stream.name: stream.bytes for stream in estimate.streams(tg.Hyperparameters(**PACKING_SETTINGS))}
    for name, size in PACKING.items():
        assert streams[name] == pytest.approx(size, rel=0.05), name
    assert sum(streams[name] for name in PACKING) == pytest.approx(sum(PACKING.values()), rel=0.02)


def test_bytes_of_a_published_artifact():
    """PR 1216's INT6 model of 27 million weights: 19,030,284 bytes less 85,431 of code."""
    cfg = tg.Hyperparameters(bigram_vocab_size=3072, bigram_dim=112, bigram_bits=6, fp16_keep_name_patterns="tok_emb",
                             compress="lzma", prune_frac=0.03)
    assert estimate.artifact_bytes(cfg) == pytest.approx(19_030_284 - 85_431, rel=0.05)


def test_gaussian_bits_are_those_of_the_theory():
    """A step of d standard deviations leaves log2(sqrt(2 pi e) / d) bits; a step twice as wide one bit less."""
    for bits, sigmas in ((6, 12.85), (8, 20.0)):
        spec = tg.QuantSpec(bits, "sdclip", sigmas)
        step = sigmas / (2 ** (bits - 1) - 1)
        assert estimate.gaussian_bits(512, spec, 0.0) == pytest.approx(
            math.log2(math.sqrt(2 * math.pi * math.e) / step), abs=0.02)
    plain, wide = (estimate.gaussian_bits(512, tg.QuantSpec(6, widen=widen), 0.0) for widen in (1.0, 2.0))
    assert plain - wide == pytest.approx(1.0, abs=0.05)
    assert estimate.gaussian_bits(512, tg.QuantSpec(6), 0.5) < plain - 1


def test_every_way_to_store_is_counted():
    size = lambda **changes: estimate.artifact_bytes(tg.Hyperparameters(**PACKING_SETTINGS, **changes))
    plain = size()
    assert size(mlp_quant_bits=4) < size(mlp_quant_bits=5) < plain < size(compress="zstd") < size(compress="lzma")
    table = 1024 * 256
    kept = size(fp16_keep_name_patterns="tok_emb"), size(int8_keep_float_fp32_name_patterns="tok_emb")
    assert [round((more - plain) / table) for more in kept] == [1, 2]  # bytes per value, over 0.87
    assert size(mtp_num_heads=2) == plain  # not exported
    assert size(tie_embeddings=False) > plain + 200_000


def test_water_filling_is_estimated_by_what_it_may_cost():
    found = {nats: estimate.streams(tg.Hyperparameters(**PACKING_SETTINGS, clip_rule="waterfill", waterfill_nats=nats))
             for nats in (0.01, 0.04)}
    names = [{stream.name for stream in streams} for streams in found.values()]
    assert all("steps" in held and "scales" not in held for held in names)
    fine, coarse = (sum(stream.bytes for stream in streams) for streams in found.values())
    assert coarse < fine < estimate.artifact_bytes(tg.Hyperparameters(**PACKING_SETTINGS))


@pytest.mark.parametrize("limit", [600_000, 900_000])
def test_size_fit_fills_the_limit_with_water_filled_codes(limit):
    cfg = tg.Hyperparameters(**PACKING_SETTINGS, clip_rule="waterfill", size_fit=True, artifact_limit_bytes=limit)
    fitted = estimate.fitted(cfg, 40_000)
    assert estimate.artifact_bytes(fitted) == pytest.approx(limit - 40_000, rel=0.001)
    assert estimate.fitted(tg.Hyperparameters()) == tg.Hyperparameters()


@pytest.mark.parametrize("limit, size_fit, verdict", [
    (1_000_000, False, "yes"), (790_000, False, "perhaps"), (760_000, False, "perhaps"), (700_000, False, "no"),
    (1_000_000, True, "yes"), (760_000, True, "SIZE_FIT"), (700_000, True, "SIZE_FIT")])
def test_verdict(limit, size_fit, verdict):
    given = {"ARTIFACT_LIMIT_BYTES": str(limit), "SIZE_FIT": str(int(size_fit))}
    cfg = profiles.settings(profiles.load("smoke"), given)
    assert estimate.fits(cfg) == verdict


def test_a_limit_above_the_competitions_does_not_count(capsys):
    cfg = tg.Hyperparameters(artifact_limit_bytes=20_000_000, size_fit=True)
    assert estimate.fits(cfg) == "no" and estimate.fits(tg.Hyperparameters(size_fit=True)) == "SIZE_FIT"
    assert plan.main(["pr1092", "ARTIFACT_LIMIT_BYTES=20000000", "NUM_LAYERS=14", "SIZE_FIT=0"]) == 0
    out = capsys.readouterr().out
    assert "of 16,000,000: does not fit" in out and "ARTIFACT_LIMIT_BYTES=20,000,000 lets it pass" in out


# ---- FLOPs, memory, time

@pytest.mark.parametrize("changes", [{}, {"mtp_num_heads": 2}, {"tie_embeddings": False}, {"bigram_vocab_size": 0},
                                     {"ve_enabled": False}, {"trigram_vocab_size": 64}, {"mlp_mult": 4.0}])
def test_flops_are_those_that_pytorch_counts(config, changes):
    """PyTorch counts the whole square of attention, the estimate its causal half."""
    cfg = config(train_seq_len=64, **changes)
    with torch.device("meta"):
        model, ids = tg.GPT(cfg), torch.zeros(1, 64, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model.loss(ids, ids).backward()
    counted = {str(op).rpartition(".")[2]: flops / 64 for op, flops in counter.get_flop_counts()["Global"].items()}
    matrices, attention = estimate.flops_per_token(cfg)
    # MTP heads meet some tokens fewer
    assert matrices == pytest.approx(counted["mm"], rel=0.02)
    assert 2 * attention * 64 / 65 == pytest.approx(counted["bmm"], rel=0.01)


def test_a_window_is_cheaper():
    keys = lambda **changes: estimate.flops_per_token(tg.Hyperparameters(num_layers=1, ve_layers="", **changes))[1] / (
        12 * 512)
    assert keys(train_seq_len=4, eval_seq_len=4) == 2.5
    assert keys(train_seq_len=4, eval_seq_len=4, attention_window=2) == (1 + 2 + 3 + 3) / 4
    assert keys(train_seq_len=4, eval_seq_len=4, attention_window=3) == keys(train_seq_len=4, eval_seq_len=4,
                                                                            attention_window=4) == 2.5


def test_default_mfu_is_pr_1092s():
    assert estimate.step_seconds(tg.Hyperparameters()) == pytest.approx(0.09397, rel=0.01)


def test_step_time_scales():
    cfg = tg.Hyperparameters()
    once = estimate.step_seconds(cfg)
    assert estimate.step_seconds(cfg, gpus=1) == pytest.approx(8 * once)
    assert estimate.step_seconds(cfg, mfu=0.48) == pytest.approx(once / 2)


def test_memory_counts_what_a_rank_holds(config):
    cfg = config(num_layers=4, ve_layers="2,3", matrix_optimizer="adamw", swa_enabled=True, complement_alpha=0.5)
    weights = sum(estimate.parameters(cfg).values())
    one = estimate.memory_bytes(cfg, 1)
    assert one["optimiser"] == 8 * weights and one["gradients"] == 4 * weights and one["averages"] == 8 * weights
    assert one["bigram counts"] == 4 * cfg.vocab_size ** 2
    muon = [estimate.memory_bytes(config(), gpus) for gpus in (1, 8)]
    assert muon[1]["optimiser"] < muon[0]["optimiser"] < 8 * sum(estimate.parameters(config()).values())
    assert muon[1]["gradients"] > muon[0]["gradients"]
    assert one["activations"] == estimate.activation_bytes_per_token(cfg) * cfg.train_batch_tokens


def test_activations_are_what_a_forward_pass_keeps(config):
    """In bf16 on the CPU, whose attention keeps no square either."""
    cfg, kept = config(train_seq_len=256, eval_seq_len=256), []
    for tokens in (256, 512):
        storages = {}
        model = tg.GPT(cfg, dtype=torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.int64)

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.loss(ids, ids)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
    assert estimate.activation_bytes_per_token(cfg) == pytest.approx((kept[1] - kept[0]) / 256, rel=0.05)


# ---- profiles

def test_published_line():
    line = "bpb 1.1252 -> 1.1219, 15,916,230 bytes, 93.97 ms per step"
    assert profiles.Published.parse(line) == profiles.Published("1.1252 → 1.1219", 15_916_230, 93.97)
    assert profiles.Published.parse(f"{line}; valid").valid is True
    assert profiles.Published.parse("bpb 1.50 after rounding; so not valid") == profiles.Published("1.50", valid=False)
    assert profiles.Published.parse("107.6 ms per step on one H100") == profiles.Published(step_ms=107.6, gpus=1)
    assert profiles.Published.parse("no run") == profiles.Published.parse("") == profiles.Published()
    assert profiles.load("pr1092").published.bpb == "1.1252 → 1.1219"


def test_unknown_profile_is_one_line_with_the_nearest():
    with pytest.raises(UsageError, match=r"^no profile 'pr1902'; did you mean pr1092.*\? \(profiles: .*smoke"):
        profiles.load("pr1902")
    with pytest.raises(UsageError, match=r"^no profile '../x' \(profiles: "):
        profiles.load("../x")


def test_data_brings_its_vocabulary(tmp_path):
    (tmp_path / "dataset.json").write_text('{"vocab_size": 4096}')
    given = {"DATA_PATH": str(tmp_path)}
    assert profiles.settings(profiles.load("pr1092"), given).vocab_size == 4096
    assert profiles.settings(profiles.load("pr1092"), {**given, "VOCAB_SIZE": "99"}).vocab_size == 99
    assert profiles.settings(profiles.load("pr1092"), {"PATH": "x"}).vocab_size == 1024


# ---- the commands

@pytest.mark.parametrize("name", profiles.names())
def test_plan_of_every_profile(name, capsys):
    assert plan.main([name]) == 0
    out = capsys.readouterr().out
    cfg = profiles.settings(profiles.load(name))
    assert f"parameters      {sum(estimate.parameters(cfg).values()):,}: " in out
    assert f"artifact        {estimate.artifact_bytes(estimate.fitted(cfg)):,} bytes (±5%)" in out
    assert "FLOPs per token" in out and "step time" in out
    assert ("memory per rank" in out and "tokens  " in out) or cfg.device == "cpu"


def test_plan_of_pr_1092(capsys):
    assert plan.main(["pr1092", "--mfu", "0.4", "CODE_BYTES=50000", "ITERATIONS=100"]) == 0
    out = capsys.readouterr().out
    for words in ("26,993,756", "and 50,000 of code", "FLOPs per token 228.7 million: matrices 159.4, attention 69.2",
                  "56.83 ms at MFU 0.4 of 8 x 989 TFLOP/s (published: 93.97 ms on 8xH100, MFU 0.242)",
                  "steps           100 in 6 s, ITERATIONS reached", "tokens          78,643,200 read, 3 per parameter"):
        assert words in out
    plan.main(["pr1092"])
    assert "steps           6,1" in capsys.readouterr().out  # the published run made 6,173 in these 580 s


def test_plan_says_what_would_make_it_fit(capsys):
    limit = "ARTIFACT_LIMIT_BYTES=600000"
    assert plan.main(["smoke", limit]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "SIZE_FIT=1 sees to it" in out
    assert plan.main(["smoke", limit, "SIZE_FIT=1"]) == 0
    assert "SIZE_FIT makes it fit" in capsys.readouterr().out


def test_plan_reads_the_data_that_is_there(corpus, capsys):
    there = len(corpus.train)
    assert plan.main(["pr1092", f"DATA_PATH={corpus.folder}", "VOCAB_SIZE=384", "ITERATIONS=2",
                      f"TRAIN_BATCH_TOKENS={2048 * 10}"]) == 0
    assert f"{corpus.folder} holds {there:,}: {2 * 20480 / there:.2f} passes" in capsys.readouterr().out
    assert plan.main(["pr1092", "DATA_PATH=/nowhere", "VOCAB_SIZE=384"]) == 0
    assert "/nowhere holds none yet" in capsys.readouterr().out


def test_the_environment_counts_below_the_arguments(capsys, monkeypatch):
    monkeypatch.setenv("BIGRAM_VOCAB_SIZE", "0")
    assert plan.main(["smoke", "VE_ENABLED=0"]) == 0
    out = capsys.readouterr().out
    assert "ngram" not in out and "value" not in out.replace("values", "")


@pytest.mark.parametrize("arguments, words", [
    (["pr1O92"], "no profile 'pr1O92'; did you mean pr1092"), ([], "the following arguments are required: profile"),
    (["pr1092", "NUM_LAYER=3"], "NUM_LAYER is not a setting; did you mean NUM_LAYERS?"),
    (["pr1092", "NUM_LAYERS=3"], "VE_LAYERS='9,10' names a layer"),
    (["pr1092", "NUM_LAYERS=x"], "NUM_LAYERS='x' is not a whole number"),
    (["pr1092", "--mfu", "0"], "--mfu: 0 is not above 0"), (["pr1092", "--gpus", "x"], "--gpus: invalid int value"),
    (["pr1092", "twice"], "unrecognized arguments: twice")])
def test_a_users_mistake_is_one_line(arguments, words, capsys):
    assert plan.main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1 and words in err


def test_systems(capsys):
    assert systems.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["profile", *profiles.names()]
    line = next(line for line in lines if line.startswith("pr1092 "))
    assert "1.1252 → 1.1219" in line and "15,916,230" in line and "18.39 MB" in line
    assert systems.main(["x"]) == 2


def test_roofline(capsys):
    """It has the FLOPs of the estimate and Newton-Schulz's; the record is what it prints today."""
    cfg = tg.Hyperparameters()
    found = {row.name: row for row in roofline.rows(cfg, gpus=8)}
    tables = estimate.parameters(cfg)["proj"]  # narrow, and left out
    want = (sum(estimate.flops_per_token(cfg)) - 6 * tables) * cfg.train_batch_tokens / 8
    assert sum(row.flops for row in found.values()) - found["Newton-Schulz of this GPU's slices"].flops == want
    assert all(row.ms() > 0 and row.ms(fused=True) <= row.ms() for row in found.values())
    assert roofline.main([]) == 0
    printed = capsys.readouterr().out
    assert printed in (ROOT / "records" / "gpu_not_run" / "roofline.md").read_text(encoding="utf-8")
    assert roofline.main(["NUM_LAYERS=x"]) == 2 and capsys.readouterr().err.startswith("error: NUM_LAYERS='x'")
