"""tools/parity.py: small fixtures of every published system, golden numbers of them, spoilt ones, and the shared ones.

The fixtures made here have weights that need no random numbers, and our own results: what is published is said by the
fixtures beside the repository, which are not in it, and by tests/parity_golden.json. The golden numbers are those of our
model at a commit that agreed with all those fixtures; the published classes, given these weights, agree with them within
the tool's tolerances. If a system is added or a small fixture changes:

    python tests/test_parity.py        # computes the numbers anew and writes them into tests/parity_golden.json
"""
from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.append(str(ROOT / "tools"))
import parity  # noqa: E402
import profiles  # noqa: E402

tg = parity.ours
GOLDEN = Path(__file__).with_name("parity_golden.json")
SHARED = sorted(path.parent for path in (ROOT.parent / "shared" / "reference").rglob("fixture.json"))
SIZES = {"vocab_size": 40, "num_layers": 4, "model_dim": 16, "num_heads": 4, "num_kv_heads": 2, "mlp_mult": 2,
         "tie_embeddings": True, "tied_embed_init_std": 0.005, "logit_softcap": 30.0, "rope_base": 10000.0,
         "qk_gain_init": 1.5}
TABLES = {**SIZES, "bigram_vocab_size": 30, "bigram_dim": 8, "xsa_last_n": 2, "rope_dims": 2, "ln_scale": True}
PR1216 = {**TABLES, "value_embed_layers": 2, "value_embed_dim": 6}
PR1092 = {**TABLES, "ve_enabled": True, "ve_dim": 6, "ve_layers": "0,3"}
CONFIGS = {
    "PR 1092": {"batch": 2, "seq_len": 10, "env": {"TRIGRAM_VOCAB_SIZE": 20},
                "model": {**PR1092, "dtg": True, "gated_attention": True, "value_residual": True},
                "optim": {"matrix_lr": 0.02, "token_lr": 0.03, "scalar_lr": 0.02, "momentum": 0.95, "wd": 0.04,
                          "clip": 0.3},
                "eval": {"tokens": 200, "seq_len": 16, "stride": 5, "chunk": 64, "lr": 0.03, "epochs": 2,
                         "batch_seqs": 2}},
    "PR 1216, 12L INT4": {"batch": 2, "seq_len": 10, "model": PR1216},
    "PR 1216, 12L banked": {"batch": 2, "seq_len": 11, "model": {**PR1216, "num_layers": 3, "trigram_vocab_size": 0}},
    "PR 1216, 13L INT4 attention": {"batch": 1, "seq_len": 9, "model": {**PR1216, "value_embed_layers": 1}},
    "PR 1216, 11L INT6 XSA-all": {"batch": 2, "seq_len": 8, "model": {**PR1216, "xsa_last_n": 4, "mlp_mult": 2.5}},
    "PR 1216, banked GPTQ variant": {"batch": 2, "seq_len": 10, "model": {**SIZES, "tie_embeddings": False}},
    "PR 550 v8": {"batch": 2, "seq_len": 10, "env": {"SOFT_ROUND_ENABLED": 0}, "model": SIZES,
                  "ttt": {"tokens": 200, "seq_len": 10, "rank": 2, "epochs": 2, "lr": 0.01, "chunk": 50}},
    "PR 550 v10": {"batch": 2, "seq_len": 10, "mtp": True, "complement_alpha": 0.7,
                   "model": {**PR1092, "mtp_num_heads": 2, "mtp_loss_weight": 0.3}},
    "PR 1855": {"batch": 2, "seq_len": 10, "stream": 24, "optim": {"momentum": 0.95, "lr_scale": 0.8},
                "lora": {"batch": 3, "len": 9, "chunk": [3, 6]},
                "eval": {"tokens": 100, "phases": 2, "prefix_docs": 4},
                "env": {**{name.upper(): int(value) if value is True else value for name, value in SIZES.items()},
                        "TRAIN_SEQ_LEN": 9, "XSA_LAST_N": 4, "NUM_LOOPS": 2, "LOOP_START": 1, "LOOP_END": 2,
                        "PARALLEL_START_LAYER": 3, "SMEAR_GATE_ENABLED": 1, "GATE_WINDOW": 5, "ROPE_DIMS": 2,
                        "TTT_LORA_RANK": 2, "TTT_LORA_ALPHA": 6, "TTT_LORA_LR": 0.002, "TTT_CHUNK_SIZE": 4,
                        "TTT_EVAL_SEQ_LEN": 8, "TTT_BATCH_SIZE": 2, "TTT_WARM_START_A": 1,
                        "EVAL_SEQ_LEN": 8, "GLOBAL_TTT_LR": 0.1, "GLOBAL_TTT_CHUNK_TOKENS": 20}},
    "PR 1254": {"batch": 2, "seq_len": 12, "lora_rank": 3,
                "model": {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "max_seq_len": 20,
                          "window_size": 5}},
}
EVALUATED = {"PR 1092": {"sliding": [0, 0], "ttt": [0, 0]}, "PR 550 v8": {"unadapted_loss": 0, "lora_ttt": [0, 0]},
             "PR 1855": {"unadapted_documents": {"nll": 0, "tokens": 0},
                         "ttt_documents": {"nll": 0, "tokens": 0}, "ttt_phased": {"nll": 0}}}
BATCHES = 3  # of complementary training


# ---- small fixtures ------------------------------------------------------------------------------------------------

def wave(name: str, shape) -> np.ndarray:
    """Values in -1..1 that need no random numbers, which differ between versions and machines."""
    count = int(np.prod(shape))
    return np.sin(1.37 * np.arange(count) ** 1.1 + zlib.crc32(name.encode()) % 1000).astype(np.float32).reshape(shape)


def weight(name: str, shape) -> np.ndarray:
    """Matrices of moderate gain; vectors around 1, which their starting values are around."""
    if len(shape) < 2 or name.endswith(("resid_mix", "skip_weights")):
        return (1 + 0.3 * wave(name, shape)).astype(np.float32)
    return (wave(name, shape) / shape[-1] ** 0.5).astype(np.float32)


def tokens(name: str, shape, vocab: int) -> np.ndarray:
    return ((wave(name, shape) + 1) * 0.4999 * vocab).astype(np.uint16)


def inputs(source: str, config: dict) -> dict[str, np.ndarray]:
    """A fixture's weights and texts, by the system's names."""
    system, vocab = parity.SYSTEMS[source], SIZES["vocab_size"]
    group, shape = "batch" if source == "PR 1092" else "rows", (config["batch"], config["seq_len"])
    arrays = {f"{group}/{side}": tokens(f"{source} {side}", shape, vocab) for side in "xy"}
    size = config.get("stream", config["batch"] * config["seq_len"])
    if "lora" in config:
        shape = config["lora"]["batch"], config["lora"]["len"]
        arrays |= {f"lora_rows/{side}": tokens(f"{source} lora {side}", shape, vocab) for side in "xy"}
    if "stream" in config:
        arrays |= {f"packed/{side}": tokens(f"{source} {side}", size, vocab) for side in "xy"}
        arrays["packed/x"][[4, 11]] = tg.BOS_ID
    for name, count in (("steps/tokens", 2000 + size + 1 if "optim" in config else 0),
                        ("eval/tokens", (config.get("eval") or config.get("ttt") or {"tokens": -1})["tokens"] + 1),
                        ("complement/tokens", 50 * BATCHES + 1 if "complement_alpha" in config else 0)):
        if count:
            arrays[name] = tokens(name, count, vocab // (3 if name.startswith("complement") else 1))
    for i in range(BATCHES if "complement_alpha" in config else 0):
        arrays[f"complement/weights{i}"] = np.zeros(50, np.float32)
    if "lora" in config:
        arrays["eval/tokens"][[0, 3, 11, 40, 60, 62, 85]] = tg.BOS_ID
    fixture = object.__new__(parity.Fixture)
    fixture.config, fixture.system, fixture.source = config, system, source
    cfg = fixture.settings()
    model = tg.GPT(cfg)
    own = system.named(dict(model.named_parameters()))
    arrays |= {f"w/{name}": weight(name, p.shape) for name, p in own.items() if p.numel()}
    if "lora_rank" in config or "lora" in config:
        rows = config.get("lora", {}).get("batch", cfg.ttt_batch_docs)
        adapter = tg.LoraAdapter(model, tg.dataclasses.replace(cfg, ttt_batch_docs=rows), parity.runtime())
        arrays |= {f"lora/{name}": 0.3 * weight(name, p.shape) for name, p in system.additions(adapter.pairs).items()}
    for name, original in system.unread.items():
        if original or config.get("model", {}).get("value_residual"):
            arrays[f"w/{name}"] = arrays[f"w/{original}"] if original else wave(name, 2)
    return arrays


def store(folder: Path, config: dict, expected: dict, arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "fixture.json").write_text(json.dumps({"config": config, "expected": expected}), encoding="utf-8")
    np.savez(folder / "fixture.npz", **arrays)
    return folder


def compute(folder: Path, source: str) -> list[parity.Quantity]:
    """What the tool computes from the inputs of a small fixture, which it leaves in the folder."""
    config = CONFIGS[source] if source == "PR 1092" else {"source": source, **CONFIGS[source]}
    fixture = parity.Fixture(store(folder, config, EVALUATED.get(source, {}), inputs(source, config)))
    return [quantity for check in fixture.system.checks for quantity in check(fixture)]


def whole(folder: Path, source: str) -> Path:
    """A small fixture with our own results in it."""
    quantities = compute(folder, source)
    fixture = parity.Fixture(folder)
    arrays, expected = dict(fixture.arrays), dict(fixture.expected)
    for quantity in quantities:
        key, got = quantity.key, quantity.got
        if key.endswith("/"):
            for name, tensor in got.items():
                if tensor is not None and tensor.numel():
                    arrays[key + name] = tensor.detach().numpy()
                    fixture.arrays = arrays  # `array` exchanges the halves of heads, which gives the system's order
                    arrays[key + name] = fixture.array(key + name).numpy().astype(np.float32)
        elif "/" in key:
            arrays[key] = got.numpy()
        elif ":" in key:
            name, place = key.split(":")
            if isinstance(expected[name], dict):
                expected[name] = expected[name] | {place: float(got)}
                continue
            values = np.ravel(expected[name]).tolist()
            values[int(place)] = float(got)
            expected[name] = values if isinstance(expected[name], list) else values[0]
        else:
            expected[key] = torch.as_tensor(got).tolist()
    return store(folder, fixture.config, expected, arrays)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """source -> folder of its small fixture, made once."""
    made = {}

    def make(source: str) -> Path:
        if source not in made:
            made[source] = whole(tmp_path_factory.mktemp("fixture"), source)
        return made[source]
    return make


@pytest.fixture
def spoilt(small, tmp_path):
    """A copy of a small fixture after change(config, expected, arrays)."""
    def make(source: str, change) -> Path:
        stored = json.loads((small(source) / "fixture.json").read_text())
        with np.load(small(source) / "fixture.npz") as arrays:
            arrays = {name: arrays[name] for name in arrays.files}
        change(stored["config"], stored["expected"], arrays)
        return store(tmp_path / "spoilt", stored["config"], stored["expected"], arrays)
    return make


def verdicts(text: str) -> dict[str, str]:
    """Quantity -> ok or FAIL."""
    lines = [line for line in text.splitlines() if "at most" in line]
    return {line[:28].strip(): "FAIL" if "FAIL" in line else "ok" for line in lines}


# ---- golden numbers ------------------------------------------------------------------------------------------------

def digest(quantities: list[parity.Quantity]) -> dict:
    """A few hundred numbers: losses and scores, norms of gradients and weights, a row of logits."""
    found = {}
    for key, got in ((quantity.key, quantity.got) for quantity in quantities):
        if key.endswith("/"):
            found[key] = {name: tensor.norm().item() for name, tensor in got.items()
                          if tensor is not None and tensor.numel()}
        else:
            got = torch.as_tensor(got)
            found[key] = got.flatten(0, -2)[-1].tolist() if got.ndim > 1 else got.tolist()
    return found


@pytest.mark.parametrize("source", CONFIGS)
def test_the_numbers_are_the_golden_ones(tmp_path, source):
    golden = json.loads(GOLDEN.read_text())
    assert source in golden, f"`python tests/{Path(__file__).name}` adds a system's numbers"
    found = digest(compute(tmp_path, source))
    assert set(found) == set(golden[source])
    for key, wanted in golden[source].items():
        assert found[key] == pytest.approx(wanted, rel=1e-4, abs=5e-5), key


def test_every_system_has_a_small_fixture_and_golden_numbers():
    assert set(CONFIGS) == set(parity.SYSTEMS) == set(json.loads(GOLDEN.read_text()))


# ---- profiles ------------------------------------------------------------------------------------------------------

FORKS = {"pr1216_proxy": "PR 1216, 12L INT4", "pr550_per_document": "PR 550 v8",
         "pr1254_lora_qkvo_last4": "PR 1254", "pr1254_eval_hash": "PR 1254"}
RUN_BY = [*((system.profile, source) for source, system in parity.SYSTEMS.items()), *FORKS.items()]


@pytest.mark.parametrize("profile, source", RUN_BY)
def test_a_profile_runs_the_model_that_its_fixture_proves(small, profile, source):
    """The profile with the fixture's sizes is the fixture's model, to the bit."""
    fixture = parity.Fixture(small(source))
    lines = profiles.load(profile).values | {"TTT_ENABLED": "0"}  # its layers, chunks and windows may not fit the sizes
    cfg = tg.Hyperparameters.from_env(lines | fixture.variables())
    x, y = fixture.rows("batch" if source == "PR 1092" else "rows")
    with torch.no_grad():
        scores = [fixture.model(each).eval().nll(x, y) for each in (cfg, fixture.settings())]
    assert torch.equal(*scores)


@pytest.mark.parametrize("source", CONFIGS)
def test_a_profile_has_the_rotary_base_of_its_system(source):
    """Stretched from 1,024 tokens on, where the system does that; never, where a fixture has NO_STRETCH."""
    system = parity.SYSTEMS[source]
    cfg = tg.Hyperparameters.from_env(profiles.load(system.profile).values)
    if "ROPE_TRAIN_SEQ_LEN" in system.settings:
        assert not cfg.rope_train_seq_len or cfg.rope_train_seq_len >= max(cfg.train_seq_len, cfg.window)
    else:
        assert cfg.rope_train_seq_len == 1024


# ---- agreement and disagreement ------------------------------------------------------------------------------------

@pytest.mark.parametrize("source", CONFIGS)
def test_a_small_fixture_agrees(small, capsys, source):
    code = parity.main([str(small(source))])
    out = capsys.readouterr().out
    assert code == 0 and set(verdicts(out).values()) == {"ok"}
    assert out.splitlines()[-1].startswith(f"{source}: {len(verdicts(out))} of {len(verdicts(out))} agree")


@pytest.mark.parametrize("source", CONFIGS)
def test_one_wrong_entry_of_any_result_is_found(small, spoilt, capsys, source):
    """Each array and number that is not an input, one after the other."""
    given = set(inputs(source, CONFIGS[source])) - {f"complement/weights{i}" for i in range(BATCHES)}
    fixture = parity.Fixture(small(source))
    for quantity in [quantity for check in fixture.system.checks for quantity in check(fixture)]:
        names = [name for name in fixture.arrays if name not in given and name.startswith(quantity.key)]
        if quantity.key.endswith("/"):
            names = [max(names, key=len), min(names, key=len)]
        for name in names or [quantity.key]:
            def change(config, expected, arrays):
                if name in arrays:
                    arrays[name] = arrays[name].copy()
                    whole_number = arrays[name].dtype.kind == "i"
                    arrays[name].reshape(-1)[-1] += 1 if whole_number else 0.01 * (np.abs(arrays[name]).max() or 1)
                else:
                    key, _, place = name.partition(":")
                    if isinstance(expected[key], dict):
                        expected[key][place] += max(0.01, 1e-3 * expected[key][place])
                        return
                    values = np.ravel(expected[key])
                    values[int(place or 0)] += 0.01
                    expected[key] = values.tolist() if isinstance(expected[key], list) else values.tolist()[0]
            code, out = parity.main([str(spoilt(source, change))]), capsys.readouterr().out
            failed = [line for line in out.splitlines() if "FAIL" in line]
            assert code == 1 and len(failed) in (1, 2), name
            assert name.partition("/")[2] in failed[0] or not quantity.key.endswith("/"), name


def test_the_worst_tensor_is_named(spoilt, capsys):
    def change(config, expected, arrays):
        arrays["grad/blocks.1.attn.c_k.weight"] *= 1.5
        arrays["grad/blocks.2.mlp.fc.weight"] *= 1.2

    assert parity.main([str(spoilt("PR 1216, 12L INT4", change))]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert "3 of 4 agree; worst is gradients, relative: 3" in last and last.endswith("in blocks.1.attn.c_k.weight")


def test_a_perturbed_weight_fails(spoilt, capsys):
    def change(config, expected, arrays):
        arrays["w/qo_bank"][0, 0, 0] += 0.5

    assert parity.main([str(spoilt("PR 1092", change))]) == 1
    lines = verdicts(capsys.readouterr().out)
    assert lines["logits"] == lines["loss"] == lines["weights after three steps"] == "FAIL"


def test_rounding_excuses_no_more_than_rounding_does():
    """An entry past the tolerance is excused where noise moves it so far, and nowhere else."""
    got = torch.tensor([1e-7, 1.0])
    quantity = parity.Quantity("gradient", "grad/", {"p": got}, 1e-4, noisy=lambda seed: {"p": got + torch.tensor(
        [(-1) ** seed * 2e-4, 0.0])})
    assert parity.compare(quantity, {"p": torch.tensor([5e-4, 1.0])}).agrees
    assert not parity.compare(quantity, {"p": torch.tensor([1e-3, 1.0])}).agrees
    assert not parity.compare(quantity, {"p": torch.tensor([0.0, 1.0002])}).agrees
    assert not parity.compare(quantity._replace(noisy=None), {"p": torch.tensor([5e-4, 1.0])}).agrees


# ---- what is no fixture --------------------------------------------------------------------------------------------

def drop(group, name):
    return lambda config, expected, arrays: {"expected": expected, "arrays": arrays, "config": config}[group].pop(name)


def put(name, value):
    return lambda config, expected, arrays: arrays.__setitem__(name, value)


def setting(name, value, section=None):
    return lambda config, expected, arrays: (config[section] if section else config).__setitem__(name, value)


LAYERS, BANKED = "PR 1216, 12L INT4", "PR 1216, 12L banked"
BAD = {
    "a weight too many": (LAYERS, put("w/blocks.4.attn.c_q.weight", np.zeros((16, 16), np.float32)),
                          "has w/blocks.4.attn.c_q.weight, which"),
    "a weight too few": (LAYERS, drop("arrays", "w/blocks.2.attn.c_k.weight"), "lacks w/blocks.2.attn.c_k.weight"),
    "no bank": (BANKED, drop("arrays", "w/kv_bank"), "lacks w/kv_bank"),
    "no copy of a head": ("PR 1254", put("w/head.weight", np.ones((40, 16), np.float32)),
                          "w/head.weight is not w/tok_emb.weight"),
    "another shape": (LAYERS, put("w/blocks.2.attn.c_k.weight", np.zeros((8, 15), np.float32)),
                      "w/blocks.2.attn.c_k.weight has shape [8, 15] where [8, 16] belongs"),
    "another shape where halves are exchanged": (
        "PR 1254", put("w/layers.0.attn.wq.weight", np.zeros((15, 16), np.float32)), "[15, 16] where [16, 16] belongs"),
    "logits of another shape": (LAYERS, put("rows/logits", np.zeros((2, 10), np.float32)), "rows/logits has shape"),
    "a gradient too many": (LAYERS, put("grad/warp", np.zeros(3, np.float32)), "has grad/warp, which"),
    "a gradient too few": (LAYERS, drop("arrays", "grad/tok_emb.weight"), "lacks grad/tok_emb.weight"),
    "no logits": (LAYERS, drop("arrays", "rows/logits"), "lacks rows/logits"),
    "no text": (LAYERS, drop("arrays", "rows/x"), "lacks rows/x"),
    "rows of unlike shapes": (LAYERS, put("rows/y", np.zeros((2, 9), np.uint16)), "rows/x and y have the shapes"),
    "strange tokens": (LAYERS, put("rows/x", np.full((2, 10), 40, np.uint16)), "tokens of a vocabulary of 40"),
    "no loss": (LAYERS, drop("expected", "loss"), "lacks expected.loss"),
    "an unknown source": (LAYERS, setting("source", "PR 9"), "unknown source 'PR 9' (known: PR 1092; PR 1216"),
    "another rotary base": ("PR 1855", setting("ROPE_YARN", 1, "env"), "ROPE_YARN=1: PR 1855 is only known with 0"),
    "an unknown argument": (LAYERS, setting("warp_drive", 1, "model"), "setting WARP_DRIVE is unknown here"),
    "an unknown variable": (LAYERS, setting("env", {"WARP": 1}), "setting WARP is unknown here"),
    "another system's trigrams": (BANKED, setting("trigram_vocab_size", 9, "model"), "only known with 0"),
    "a width that heads do not divide": (LAYERS, setting("num_heads", 3, "model"), "NUM_HEADS=3"),
    "no model": (LAYERS, drop("config", "model"), "not a whole fixture: it lacks 'model'"),
    "a model of another kind": (LAYERS, setting("model", [1]), "not a whole fixture"),
    "NaN in a weight": (LAYERS, put("w/tok_emb.weight", np.full((40, 16), np.nan, np.float32)), "not finite"),
    "NaN in a result": (LAYERS, put("rows/logits", np.full((2, 10, 40), np.inf, np.float32)), "not finite"),
    "NaN as a number": (LAYERS, lambda config, expected, arrays: expected.update(loss=float("nan")), "NaN is not a"),
    "words as numbers": (LAYERS, put("w/tok_emb.weight", np.array(["a"])), "w/tok_emb.weight holds no numbers"),
    "a text shorter than a window": ("PR 550 v8", put("eval/tokens", np.zeros(10, np.uint16)), "shorter than a window"),
    "a chunk of broken sequences": ("PR 550 v8", setting("chunk", 45, "ttt"), "not whole sequences of 10"),
    "batches of unlike sizes": ("PR 550 v10", put("complement/weights3", np.zeros(50, np.float32)), "equal batches"),
    "too few steps": ("PR 1092", put("steps/tokens", np.zeros(2000, np.uint16)), "fewer than three steps read"),
    "a LoRA tensor too few": ("PR 1254", drop("arrays", "lora/head.lora_B"), "lacks lora/head.lora_B"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_fixture_gives_one_line(spoilt, capsys, what):
    source, change, told = BAD[what]
    assert parity.main([str(spoilt(source, change))]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and told in err


@pytest.mark.parametrize("file, content", [
    ("fixture.json", None), ("fixture.npz", None), ("fixture.json", b"{"), ("fixture.json", b"[]"),
    ("fixture.json", b'{"config": {}}'), ("fixture.npz", b"no archive"), ("fixture.npz", b""), ("fixture.npz", "half"),
    ("fixture.npz", "bent")])
def test_a_damaged_file_gives_one_line(small, spoilt, capsys, file, content):
    folder = spoilt(LAYERS, lambda *_: None)
    if content is None:
        (folder / file).unlink()
    else:
        stored = (folder / file).read_bytes()
        middle = len(stored) // 2
        (folder / file).write_bytes({"half": stored[:middle], "bent": stored[:middle] + b"bent" + stored[middle + 4:]}.get(
            content, content))
    assert parity.main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1


# ---- many fixtures -------------------------------------------------------------------------------------------------

def test_all_fixtures_below_a_folder_have_a_line_each(small, spoilt, tmp_path, capsys):
    def link(name: str, folder: Path) -> None:
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).symlink_to(folder, target_is_directory=True)

    def lines() -> list[str]:
        return capsys.readouterr().out.splitlines()

    def copy(name: str, change, source: str = LAYERS) -> None:
        spoilt(source, change).rename(tmp_path / "all" / name)

    assert parity.main(["--all", str(tmp_path)]) == 2
    assert "no fixture.json below" in capsys.readouterr().err
    (tmp_path / "all" / "below").mkdir(parents=True)
    copy("below/good", lambda *_: None)
    assert parity.main(["--all", str(tmp_path / "all")]) == 0
    first, = lines()
    assert first.startswith("below/good ") and f"ok    {LAYERS}: 4 of 4 agree" in first
    copy("wrong", lambda config, expected, arrays: expected.update(loss=1.0))
    assert parity.main(["--all", str(tmp_path / "all")]) == 1
    assert "FAIL" in lines()[-1]
    copy("unknown", setting("source", "PR 9"))
    assert parity.main(["--all", str(tmp_path / "all")]) == 2
    assert [line.split()[1] for line in lines()] == ["ok", "error", "FAIL"]


# ---- the fixtures beside the repository ----------------------------------------------------------------------------

@pytest.mark.skipif(not SHARED, reason="no fixtures beside here")
@pytest.mark.parametrize("folder", SHARED, ids=lambda folder: folder.name)
def test_our_arithmetic_is_the_published_one(folder, capsys):
    assert parity.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert set(verdicts(out).values()) == {"ok"}
    notes = [line for line in out.splitlines() if line.startswith("note:")]
    assert [note.split(" gain ")[0] for note in notes] == ["note: phases"] * (folder.name == "parity_frontier")


@pytest.mark.skipif(not SHARED, reason="no fixtures beside here")
def test_without_the_tokenizer_only_nats_are_compared(tmp_path, capsys, monkeypatch):
    folder = next(folder for folder in SHARED if folder.name == "pr550_lora_ttt")
    (tmp_path / "copy").symlink_to(folder, target_is_directory=True)
    monkeypatch.setattr(parity, "TOKENIZER", "none.model")
    code, out = parity.main([str(folder)]), capsys.readouterr().out
    assert code == 0 and "note: bytes are not compared" in out and "lora_ttt, bits per byte" not in verdicts(out)
    assert parity.main([str(folder), "--tokenizer", str(tmp_path / "none.model")]) == 2


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as spare:
        numbers = {source: digest(compute(Path(spare), source)) for source in CONFIGS}
    rounded = json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.7g}"))
    lines = [f'"{source}": {json.dumps(found)}' for source, found in rounded.items()]
    GOLDEN.write_text("{" + ",\n\n".join(lines) + "}\n")
