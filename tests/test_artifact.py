"""The file that is submitted: packers, container, integrity."""
import dataclasses
import hashlib
import io
import json
import math
import pickle
import sys
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT, scrambled
from hypothesis import given, settings, strategies as st

import train_gpt as tg

sys.path.append(str(ROOT / "tools"))
import fuzz_artifact  # noqa: E402

SHA = "ab" * 32
CODECS = tuple(tg.CODECS)  # range first
shapes = st.lists(st.integers(1, 40), min_size=2, max_size=3)


def codes_of(shape, bits, seed, spread):
    """Codes as of a weight whose rows and columns differ in spread; some rows alike, as unused tokens' are."""
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=shape) * np.exp(rng.normal(size=shape[-1])) * np.exp(rng.normal(size=(*shape[:-1], 1)))
    weight[..., ::3, :] = weight[..., :1, :] + 0.1 * weight[..., ::3, :]
    top = 2 ** (bits - 1) - 1
    return np.clip(np.rint(spread * top * weight), -top, top).astype(np.int8 if bits <= 8 else np.int16)


def range_encode(codes, bits):
    return tg.pack_stream("range", [(codes, bits)])


def unpacked(codec, packed, kinds):
    """The arrays of a stream, from (shape, bits) of each."""
    parts = [(np.zeros(shape, np.int8 if bits <= 8 else np.int16), bits) for shape, bits in kinds]
    tg.unpack_stream(codec, packed, parts)
    return [array for array, _ in parts]


def model_of(cfg, seed=0):
    torch.manual_seed(seed)
    return scrambled(tg.GPT(cfg), seed)


@given(st.lists(st.tuples(shapes, st.integers(2, 8)), min_size=1, max_size=3)
       | st.lists(st.tuples(shapes, st.just(tg.WATER_BITS)), min_size=1, max_size=3), st.sampled_from(CODECS),
       st.integers(0, 100), st.sampled_from([0.0, 0.05, 0.3, 5.0]))
@settings(max_examples=80, deadline=None)
def test_codes_survive_every_packer(kinds, codec, seed, spread):
    arrays = [codes_of(shape, bits, seed + i, spread) for i, (shape, bits) in enumerate(kinds)]
    bits = tuple(b for _, b in kinds)
    packed = tg.pack_stream(codec, list(zip(arrays, bits)))
    assert packed == tg.pack_stream(codec, list(zip(arrays, bits)))
    for array, got in zip(arrays, unpacked(codec, packed, kinds), strict=True):
        assert np.array_equal(got, array)


@given(st.binary(min_size=1, max_size=3000), st.sampled_from(CODECS[1:]), st.binary(min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_a_stream_is_read_whole_and_nothing_beyond(raw, codec, extra):
    packed = tg.compress(codec, raw)
    assert tg.decompress(codec, packed, len(raw)) == raw
    for size, data in ((len(raw) + 1, packed), (len(raw), packed + extra), (len(raw), packed[:-1]),
                       *([(len(raw) - 1, packed)] if raw else [])):
        with pytest.raises(ValueError):
            tg.decompress(codec, data, size)


@pytest.mark.parametrize("codec", CODECS[1:])
def test_a_bomb_is_not_unpacked(codec):
    bomb = tg.compress(codec, bytes(2 ** 24))
    with pytest.raises(ValueError):
        tg.decompress(codec, bomb, 1000)


def test_range_coding_is_near_the_entropy_and_knows_rows_and_columns():
    rng = np.random.default_rng(1)
    plain = np.clip(np.rint(rng.normal(size=(2, 256, 256)) * 4), -31, 31).astype(np.int8)
    assert len(range_encode(plain, 6)) < 1.006 * tg.order0_bytes(plain)
    uneven = np.clip(np.rint(rng.normal(size=(2, 256, 256)) * np.exp(rng.normal(size=256)) * 2), -31, 31)
    assert len(range_encode(uneven.astype(np.int8), 6)) < 0.9 * tg.order0_bytes(uneven.astype(np.int8))


def test_range_coding_gives_these_bytes_everywhere():
    """A decoder on another machine must walk the same way; the digest is that of the machine this was written on."""
    i = np.arange(6 * 50 * 70)
    bank = ((i * 2654435761 % 2 ** 32 // 2 ** 20) % 63 - 31) * (i % 70 + 1) // 70
    table = (bank.reshape(300, 70)[:, ::-1] + i.reshape(300, 70) // 70 % 7) // 2
    packed = tg.pack_stream("range", [(bank.reshape(6, 50, 70).astype(np.int8), 6), (table.astype(np.int8), 6)])
    assert hashlib.sha256(packed).hexdigest()[:16] == "bb870badf210c0db"


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("codec", [*CODECS, "auto"])
def test_the_artifact_is_the_model(config, rt, codec, bits):
    cfg = config(compress=codec, mlp_quant_bits=bits, attn_qat_bits=bits, embed_bits=bits, mtp_num_heads=1,
                 int8_keep_float_fp32_name_patterns="q_gain")
    model = model_of(cfg)
    artifact = tg.pack(cfg, model, SHA)
    loaded = tg.load_model(artifact.blob, rt, SHA)
    specs = tg.quant_specs(cfg, [name for name, _ in model.named_parameters()])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in specs:
                p.copy_(tg.dequantise(*tg.quantise(p, specs[name])))
            elif not name.endswith("q_gain"):
                p.copy_(p.half().float())
    exported = {name: p for name, p in model.state_dict().items() if not name.startswith("mtp_heads")}
    assert exported.keys() == loaded.state_dict().keys()
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in exported.items())
    ids = torch.randint(cfg.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.logits(loaded.hidden(ids)), model.logits(model.hidden(ids)))


def test_parameters_kept_as_floats_read_back_whatever_keeps_them(config, rt):
    """An artifact does not hold the patterns, but what came of them."""
    cfg = config(control_tensor_name_patterns="kv_bank,tok_emb", fp16_keep_name_patterns="mlp_up",
                 int8_keep_float_fp32_name_patterns="bigram.embed,q_gain", attn_qat_bits=5)
    model = model_of(cfg)
    read, _, stored = tg.read_artifact(tg.pack(cfg, model, SHA).blob)
    assert read.control_tensor_name_patterns == read.fp16_keep_name_patterns == ""
    kept = {s.name: s for s in stored}
    assert kept.keys() == tg.parameter_shapes(cfg).keys()
    streams = {"kv_bank": "half", "tok_emb.weight": "half", "mlp_up_bank": "half", "mlp_down_bank": "mlp",
               "qo_bank": "attn", "bigram.embed.weight": "float", "blocks.0.attn.q_gain": "float", "smear.gate": "half"}
    assert {name: kept[name].stream for name in streams} == streams and kept["qo_bank"].bits == 5
    for name, stream in streams.items():
        weight = model.get_parameter(name).detach()
        if stream in tg.FLOAT_KINDS:
            assert torch.equal(kept[name].weight(), weight.half().float() if stream == "half" else weight)


def test_the_same_weights_give_the_same_bytes_and_another_weight_gives_others(config):
    cfg = config()
    blobs = [tg.pack(cfg, model_of(cfg), SHA).blob for _ in range(2)]
    assert blobs[0] == blobs[1]
    assert tg.pack(cfg, model_of(cfg, seed=1), SHA).blob != blobs[0]


def test_auto_codes_by_range_and_the_ledger_is_the_file(config):
    cfg, model = config(), model_of(config())
    artifact = tg.pack(cfg, model, SHA)
    assert {row.codec for row in artifact.ledger if row.stream in ("attn", "mlp", "embed")} == {"range"}
    assert {row.codec for row in artifact.ledger if row.stream in ("half", "scales")} == {"lzma"}
    assert all(0 < row.entropy_bytes <= row.raw_bytes for row in artifact.ledger)
    text, payload = tg.open_container(artifact.blob)
    assert sum(row.packed_bytes for row in artifact.ledger) == len(payload)
    assert sum(row.values for row in artifact.ledger if row.stream != "scales") == \
        sum(p.numel() for p in model.parameters())
    lines = artifact.table(1234)
    assert lines[-1].split()[:2] == ["total", f"{len(artifact.blob) + 1234:,}"]
    listed = [int(line.split(" B")[-2].split()[-1].replace(",", "")) for line in lines]
    assert sum(listed[:-1]) == listed[-1]


def test_rounding_chosen_elsewhere_is_stored(config, rt):
    cfg, model = config(), model_of(config())
    codes = torch.ones_like(model.kv_bank, dtype=torch.int8)
    scales = torch.full((*codes.shape[:-1], 1), 0.5, dtype=torch.float16)
    loaded = tg.load_model(tg.pack(cfg, model, SHA, {"kv_bank": (codes, scales)}).blob, rt, SHA)
    assert (loaded.kv_bank == 0.5).all()


@pytest.mark.parametrize("value, text", [(float("nan"), "is not finite: the training diverged"),
                                         (1e6, "q_gain is not finite in fp16")])
def test_weights_no_file_can_hold(config, value, text):
    cfg, model = config(), model_of(config())
    with torch.no_grad():
        (model.blocks[0].attn.q_gain if value == 1e6 else model.mlp_up_bank).view(-1)[3] = value
    with pytest.raises(tg.UserError, match=text):
        tg.pack(cfg, model, SHA)


@pytest.fixture(scope="module")
def tiny():
    return fuzz_artifact.tiny_artifact()


def json_bytes(value):
    """As the header is written."""
    return json.dumps(value, separators=(",", ":")).encode()


def resealed(blob, change):
    """The artifact with its header changed by `change(header)`, and the checksums mended."""
    text, payload = tg.open_container(blob)
    header = json.loads(text)
    return tg.make_container(json_bytes(change(header) or header), payload)


def zipped():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", "x")
    return file.getvalue()


class Bomb:
    def __reduce__(self):
        return pytest.fail, ("a pickle was opened",)


@pytest.mark.parametrize("bad, text", [
    (lambda blob: b"", "artifact is empty"),
    (lambda blob: blob[:5], "cut short: 5 bytes hold no header"),
    (lambda blob: blob[:-1], "cut short"),
    (lambda blob: blob[:len(blob) // 2], "cut short: .* bytes instead of"),
    (lambda blob: blob + b"\0", "over-long"),
    (lambda blob: zipped(), "a zip file"),
    (lambda blob: pickle.dumps(Bomb()), "a pickle"),
    (lambda blob: b"just some text, long enough to be one", "not an artifact of this program; nothing"),
    (lambda blob: blob[:5] + b"\1" + blob[6:], "version 1; this program reads version 7"),
    (lambda blob: blob.replace(b"\r\n", b"\n", 1), "damaged in its first bytes"),
    (lambda blob: blob[:-40] + bytes([blob[-40] ^ 1]) + blob[-39:], "checksum does not match"),
    (lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]), "checksum does not match"),
])
def test_a_bad_file_is_named_in_one_line(tiny, bad, text):
    with pytest.raises(tg.UserError, match=text) as caught:
        tg.unpack(bad(tiny))
    assert "\n" not in str(caught.value)


def test_any_flipped_byte_is_noticed(tiny):
    for at in {*range(40), *range(0, len(tiny), 7)}:
        with pytest.raises(tg.UserError):
            tg.unpack(tiny[:at] + bytes([tiny[at] ^ (1 << at % 8)]) + tiny[at + 1:])


def set_at(*path, value):
    def change(header):
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value
    return change


NAMES = list(tg.parameter_shapes(tg.Hyperparameters(**fuzz_artifact.TINY)))  # of `tiny`
QO_BANK, CONTROL = NAMES.index("qo_bank"), "blocks.0.attn.q_gain"
Q_GAIN, HALF = NAMES.index(CONTROL), sorted(["attn", "embed", "half", "mlp", "ngram", "scales", "value"]).index("half")


@pytest.mark.parametrize("change, text", [
    *((set_at("precision", QO_BANK, value=value), f"parameter qo_bank cannot be stored as {value!r}")
      for value in (9, 1, 0, -6, 16, True, 6.0, "6", "double", "attn", float("nan"), None)),
    *((set_at("precision", Q_GAIN, value=value), f"parameter {CONTROL} cannot be stored as {value!r}")
      for value in (6, 8, "control")),
    *((set_at("precision", 0, value=value), "malformed") for value in ([6], {}, ["half"])),
    (set_at("precision", QO_BANK, value="half"), "malformed"),
    (set_at("precision", Q_GAIN, value="float"), "streams are not those"),
    (lambda h: h["precision"].append("half"), "malformed"),
    (lambda h: h["precision"].insert(0, h["precision"][0]), "malformed"),
    (lambda h: h["precision"].pop() and None, "malformed"),
    (lambda h: h["precision"].reverse(), "cannot be stored as"),
    (set_at("precision", value={}), "malformed"),
    (set_at("precision", value=6), "malformed"),
    (lambda h: h.__setitem__("precision", dict.fromkeys(h["precision"])), "malformed"),
    (set_at("streams", 0, 0, value="rar"), "is packed with 'rar'"),
    (set_at("streams", 0, 0, value=["range"]), "malformed"),
    (set_at("streams", HALF, 0, value="range"), "stream half is packed with 'range'"),
    (lambda h: h["streams"].append(["lzma", 0, 0]), "streams are not those"),
    (lambda h: h["streams"].append(h["streams"][0]), "streams are not those"),
    (lambda h: h["streams"].pop() and None, "streams are not those"),
    (lambda h: h["streams"][0].append(0), "malformed"),
    (lambda h: h["streams"][0].pop() and None, "malformed"),
    (set_at("streams", 0, 1, value=-5), "do not fill the file"),
    (set_at("streams", 0, 1, value=2 ** 62), "do not fill the file"),
    (lambda h: h["streams"][0].__setitem__(1, float(h["streams"][0][1])), "do not fill the file"),
    (lambda h: h["streams"][0].__setitem__(2, float(h["streams"][0][2])), "do not fill the file"),
    (set_at("streams", value={}), "malformed"),
    (lambda h: h["config"].pop("MODEL_DIM") and None, "malformed"),
    (lambda h: h["config"].pop("LOGIT_SOFTCAP") and None, "header is not in the form"),
    (set_at("config", "SEED", value="1"), "header is not in the form"),
    (set_at("config", "CONTROL_TENSOR_NAME_PATTERNS", value="gain"), "header is not in the form"),
    (set_at("config", "NOT_A_SETTING", value="1"), "malformed"),
    (set_at("config", "MTP_NUM_HEADS", value="1"), "malformed"),
    (set_at("config", "MODEL_DIM", value=str(2 ** 62)), "malformed"),
    (set_at("config", "MODEL_DIM", value=2 ** 62), "malformed"),
    (set_at("config", "MODEL_DIM", value="1" + "0" * 5000), "malformed"),
    (set_at("config", "MODEL_DIM", value=10 ** 4000), "malformed"),
    (set_at("config", "NUM_LAYERS", value="many"), "malformed: NUM_LAYERS='many' is not a whole number"),
    (set_at("config", "LOGIT_SOFTCAP", value="inf"), "malformed: LOGIT_SOFTCAP=inf is out of range"),
    (set_at("config", value=[]), "malformed"),
    (set_at("tokenizer", value=["x"]), "malformed"),
    (set_at("tokenizer", value="no digest"), "header is not in the form"),
    (set_at("more", value=1), "header is not in the form"),
    (lambda h: dict(reversed(h.items())), "header is not in the form"),
    (lambda h: {**h, "config": dict(reversed(h["config"].items()))}, "header is not in the form"),
    (lambda h: [h], "malformed"),
    *((lambda h, key=key: h.pop(key) and None, "malformed") for key in ("config", "tokenizer", "precision", "streams")),
])
def test_a_malformed_header_is_refused_although_its_checksum_is_right(tiny, change, text):
    with pytest.raises(tg.UserError, match=text) as caught:
        tg.unpack(resealed(tiny, change))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_model_too_large_for_its_file_is_refused_before_it_is_made(tiny, monkeypatch):
    """At most 16 weights a byte: a zero bank packs into nothing, but a file must not ask for more than a model takes."""
    most, others = 16 * len(tiny) + 2 ** 16, sum(s.values.size for s in tg.read_artifact(tiny)[2]) - 32 * 8
    for spare, text in ((-2000, "parameters in so small a file"), (2000, "malformed")):  # the header changes its size
        grown = set_at("config", "BIGRAM_VOCAB_SIZE", value=str((most - others - spare) // 8))
        with pytest.raises(tg.UserError, match=text) as caught:
            tg.unpack(resealed(tiny, grown))
        assert (spare < 0) == ("so small a file" in str(caught.value))
    monkeypatch.setattr(np, "zeros", lambda *_, **__: pytest.fail("memory is allocated"))
    with pytest.raises(tg.UserError, match="parameters in so small a file"):
        tg.unpack(resealed(tiny, set_at("config", "BIGRAM_VOCAB_SIZE", value=str(2 ** 20))))


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data + bytes(4), lambda data: data + data[:4],
                                    lambda data: data[:-4]])
def test_a_range_stream_is_exactly_the_code_of_its_values(damage):
    array = codes_of((3, 20, 9), 6, 0, 0.3)
    packed = range_encode(array, 6)
    assert np.array_equal(unpacked("range", packed, [(array.shape, 6)])[0], array)
    with pytest.raises((ValueError, AssertionError)):  # the latter is constriction's
        unpacked("range", damage(packed), [(array.shape, 6)])


def test_every_stream_has_a_checksum_of_its_values(tiny):
    def other(header):
        header["streams"][1][2] ^= 1
    with pytest.raises(tg.UserError, match="stream .* has another checksum"):
        tg.unpack(resealed(tiny, other))


@pytest.mark.parametrize("name, value", [("NUM_LAYERS", 2), ("NUM_LAYERS", "2_0"), ("VE_DIM", " 8 "), ("VE_DIM", "08"),
                                         ("TIE_EMBEDDINGS", True), ("NUM_LAYERS", "2.0"), ("MLP_MULT", "3"),
                                         ("MLP_MULT", "3e0"), ("TIE_EMBEDDINGS", "true")])
def test_one_spelling_of_the_settings_only(tiny, name, value):
    with pytest.raises(tg.UserError, match="malformed"):
        tg.unpack(resealed(tiny, set_at("config", name, value=value)))


def test_a_model_that_is_read_is_not_initialised_first(tiny, rt, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "orthogonal_", lambda *_: pytest.fail("initial values nobody sees"))
    model = tg.load_model(tiny, rt, "0" * 64)
    assert all(p.requires_grad and p.device.type == "cpu" for p in model.parameters())
    model.loss(torch.zeros(1, 8, dtype=torch.long), torch.zeros(1, 8, dtype=torch.long)).backward()


def test_one_spelling_of_the_header_only(tiny):
    text, payload = tg.open_container(tiny)
    for other in (text.replace(b":", b": ", 1), text[:-1] + b',"config":{}}', text.replace(b"{", b'{"a":1,"a":1,', 1),
                  text.replace(b"NUM_LAYERS", b"NUM_LAYER\\u0053"), text.replace(b"{", b'{"tokenizer":"",', 1),
                  b"[" * 9999 + b"]" * 9999, b"\xff", b""):
        with pytest.raises(tg.UserError, match="malformed"):
            tg.unpack(tg.make_container(other, payload))


@pytest.mark.parametrize("stream, value", [("half", np.inf), ("half", np.nan), ("scales", np.nan), ("scales", -1.0),
                                           ("scales", -0.0), ("float", -np.inf), ("attn", 32), ("attn", -32),
                                           ("attn", -128), ("attn", 31), ("half", -1.0), ("scales", 0.0)])
def test_values_that_cannot_be_are_refused(stream, value):
    dtype, bits = (np.int8, 6) if stream == "attn" else ("<f4" if stream == "float" else "<f2", 0)
    array = np.ones((2, 3, 4), dtype)
    array[1, 2, 1] = value
    packed, blank = tg.pack_stream("lzma", [(array, bits)]), np.zeros_like(array)
    read = lambda: tg.unpack_streams({stream: [(blank, bits)]}, [["lzma", len(packed), zlib.crc32(array)]], packed)
    if (stream, value) in (("attn", 31), ("half", -1.0)) or str(value) == "0.0":
        read()
        assert np.array_equal(blank, array)
    else:
        with pytest.raises(ValueError, match="code is out of range" if bits else f"stream {stream} has a value that"):
            read()


# ---- water-filling

def filled(cfg, model, seed=0):
    """Codes and steps of all rounded parameters, by curvatures made up; keys and values read what queries read."""
    rng, params, factors = np.random.default_rng(seed), dict(model.named_parameters()), {}
    for name in tg.quant_specs(cfg, params):
        shape = params[name].shape
        draw = lambda *shape: torch.from_numpy(np.exp(3 * rng.normal(size=shape))).float()
        factors[name] = draw(*shape[:-1], 1), draw(*shape[:-2], 1, shape[-1])
    half = len(factors["kv_bank"][1]) // 2
    factors["kv_bank"] = factors["kv_bank"][0], factors["qo_bank"][1][:half].repeat(2, 1, 1)
    return tg.round_model(cfg, model, {}, factors)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("nats", [1e-9, 1e-3, 1e9])
def test_water_filled_weights_are_read_back_exactly(config, rt, codec, nats):
    """Also where steps are so fine that codes do not fit their alphabet, and so coarse that all are zero."""
    cfg = config(compress=codec, clip_rule="waterfill", waterfill_nats=nats)
    model = model_of(cfg)
    rounded = filled(cfg, model)
    artifact = tg.pack(cfg, model, SHA, rounded)
    loaded = dict(tg.load_model(artifact.blob, rt, SHA).named_parameters())
    for name, (codes, steps) in rounded.items():
        assert torch.equal(loaded[name], tg.dequantise(codes, steps)), name
    largest = max(int(codes.abs().max()) for codes, _ in rounded.values())
    assert largest == 4095 if nats == 1e-9 else largest <= 4095
    assert largest == 0 if nats == 1e9 else largest
    assert artifact.ledger[0].stream == "steps" and "scales" not in {row.stream for row in artifact.ledger}
    assert artifact.ledger[0].values == sum(s.rows.numel() + s.columns.numel() for n, (_, s) in rounded.items()) \
        - rounded["kv_bank"][1].columns.numel(), "keys and values share the columns of queries"
    assert artifact.blob == tg.pack(cfg, model, SHA, rounded).blob


def test_contexts_that_know_the_steps_save_bytes(config):
    """Codes of Gaussian weights on steps that differ by row and column, against the same codes without their steps."""
    rng = np.random.default_rng(0)
    steps = tg.Steps(*(torch.from_numpy(rng.integers(-8, 8, size)).short() for size in ((4, 60, 1), (4, 1, 90))))
    codes = np.rint(rng.normal(size=(4, 60, 90)) / steps.float().numpy()).astype(np.int16)
    known, unknown = (tg.pack_stream("range", [(codes, tg.WATER_BITS, *extra)]) for extra in ((lambda: steps,), ()))
    assert len(known) < 0.95 * len(unknown)
    blank = np.zeros_like(codes)
    tg.unpack_stream("range", known, [(blank, tg.WATER_BITS, lambda: steps)])
    assert np.array_equal(blank, codes)


def test_parameters_are_water_filled_together_or_not_at_all(tiny):
    precision = json.loads(tg.open_container(tiny)[0])["precision"]
    first = precision.index(6)
    for kind, said in ((tg.WATER_BITS, "cannot be stored as 6"), (12, "stored as 12"), (16, "stored as 16")):
        with pytest.raises(tg.UserError, match=said):
            tg.read_artifact(resealed(tiny, lambda header: header["precision"].__setitem__(first, kind)))


@pytest.mark.parametrize("damage", [np.int16(4095), np.int16(-4095)])
def test_steps_no_file_would_hold_stay_finite(config, damage):
    """Differences of exponents that add up to far beyond their range."""
    cfg = config(compress="lzma", clip_rule="waterfill")
    model = model_of(cfg)
    stored = tg.stored_parameters(cfg, model, filled(cfg, model))
    for s in stored:
        if s.bits:
            s.scales[...] = damage
            assert s.weight().isfinite().all() and s.steps().rows.abs().max() == tg.STEP_LIMIT


# ---- streams that are not what the header says, although every checksum of the file is right

@pytest.mark.parametrize("bits, value, fits", [
    (4, 7, True), (4, -7, True), (4, 8, False), (4, -8, False), (4, 14, False), (8, -127, True), (8, -128, False)])
def test_a_code_outside_its_alphabet_is_refused(bits, value, fits):
    """Packers of bytes can hold any; the range coder has no other symbols."""
    codes = codes_of((6, 9), bits, 0, 0.3)
    codes[5, 3] = value
    for codec in ("lzma", "zstd"):
        packed = tg.pack_stream(codec, [(codes, bits)])
        if fits:
            assert np.array_equal(unpacked(codec, packed, [((6, 9), bits)])[0], codes)
            continue
        with pytest.raises(ValueError, match="out of range"):
            unpacked(codec, packed, [((6, 9), bits)])


@pytest.mark.parametrize("shape", [(6, 9), (2, 5, 70), (4, 30), (300, 20)])
def test_a_range_stream_too_long_or_too_short_is_refused(shape):
    codes = codes_of(shape, 5, 3, 0.3)
    packed = range_encode(codes, 5)
    assert np.array_equal(unpacked("range", packed, [(shape, 5)])[0], codes)
    for other in (packed + b"\1", packed + b"\1\2\3", packed + bytes(4), packed + bytes(8), packed + bytes(range(16)),
                  packed + packed, packed[:-1], packed[1:], packed[:-3]):
        with pytest.raises((ValueError, AssertionError)):
            unpacked("range", other, [(shape, 5)])


def with_stream(blob, name, change):
    """The artifact with the bytes of one stream changed, its size in the header and the file's checksums mended."""
    text, payload = tg.open_container(blob)
    header, offset, parts = json.loads(text), 0, []
    for stream, row in zip(tg.streams_of(tg.read_artifact(blob)[2]), header["streams"], strict=True):
        part = payload[offset:offset + row[1]]
        offset += row[1]
        parts.append(change(part) if stream == name else part)
        row[1] = len(parts[-1])
    return tg.make_container(json_bytes(header), b"".join(parts))


STREAMS = ("attn", "embed", "half", "scales")
CHANGES = {"a byte less": lambda b: b[:-1], "without its first byte": lambda b: b[1:], "nothing": lambda b: b"",
           "a byte more": lambda b: b + b"\1", "a zero more": lambda b: b + b"\0", "half": lambda b: b[:len(b) // 2],
           "twice": lambda b: b + b, "eight zeros more": lambda b: b + bytes(8),
           "four zeros more": lambda b: b + bytes(4), "backwards": lambda b: b[::-1]}


@pytest.mark.parametrize("codec", ["range", "lzma", "zstd"])
def test_streams_of_another_length_are_refused(codec):
    blob = fuzz_artifact.tiny_artifact(codec)
    assert with_stream(blob, "attn", lambda part: part) == blob
    for name in STREAMS:
        for what, change in CHANGES.items():
            with pytest.raises(tg.UserError) as caught:
                tg.unpack(with_stream(blob, name, change))
            assert "\n" not in str(caught.value), (name, what)


def test_streams_in_another_order_or_of_each_other_are_refused(tiny):
    def swapped(header):
        header["streams"][0], header["streams"][1] = header["streams"][1], header["streams"][0]

    def shifted(header):
        header["streams"][0][1] -= 1
        header["streams"][1][1] += 1
    for change in (swapped, shifted):
        with pytest.raises(tg.UserError):
            tg.unpack(resealed(tiny, change))


@pytest.mark.parametrize("name, value", [("MODEL_DIM", "1_6"), ("MODEL_DIM", " 16 "), ("MODEL_DIM", 16),
                                         ("NUM_LAYERS", 2), ("LN_SCALE", 1), ("LN_SCALE", True), ("LN_SCALE", "True"),
                                         ("LOGIT_SOFTCAP", "30"), ("LOGIT_SOFTCAP", 30.0), ("MTP_NUM_HEADS", "00"),
                                         ("MTP_NUM_HEADS", 0)])
def test_settings_have_one_spelling_in_the_header(tiny, name, value):
    with pytest.raises(tg.UserError, match="malformed"):
        tg.unpack(resealed(tiny, set_at("config", name, value=value)))


@pytest.mark.parametrize("name, value", [
    ("mlp_up_bank", np.nan), ("qo_bank", np.inf), ("kv_bank", -np.inf), ("tok_emb.weight", np.nan),
    ("bigram.embed.weight", np.inf), ("smear.gate", np.nan), ("skip_weights", np.inf), ("bigram.scale", -np.inf),
    ("qo_bank", 1e30), ("tok_emb.weight", 3e38), ("skip_weights", 7e4)])
def test_no_weight_that_is_not_a_number_is_packed_wherever_it_is(config, name, value):
    cfg, model = config(int8_keep_float_fp32_name_patterns="bigram.scale", clip_rule="amax"), model_of(config())
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] = value
    for rounded in ({}, None) if math.isfinite(value) else ({},):
        with pytest.raises(tg.UserError, match=f"parameter {name} is not finite") as caught:
            tg.pack(cfg, model, SHA, rounded)
        assert "\n" not in str(caught.value)


def test_fuzz(capsys):
    outcomes = fuzz_artifact.fuzz(400)
    assert sum(outcomes.values()) == 400 and outcomes["damage refused"] > 40 and outcomes["header refused"] > 80


def test_another_tokenizer_is_refused(tiny, rt):
    with pytest.raises(tg.UserError, match="another tokenizer"):
        tg.load_model(tiny, rt, "cd" * 32)


@pytest.mark.parametrize("codec", ["range", "zstd"])
def test_a_missing_package_is_named_with_its_pip_line(config, monkeypatch, codec):
    cfg, model, package = config(compress=codec), model_of(config()), tg.CODECS[codec]
    blob = tg.pack(cfg, model, SHA).blob
    monkeypatch.setitem(sys.modules, package, None)  # what an absent package looks like to import
    for act in (lambda: tg.pack(cfg, model, SHA), lambda: tg.unpack(blob)):
        with pytest.raises(tg.UserError, match=f"needs a package: pip install {package}"):
            act()
    auto = tg.pack(dataclasses.replace(cfg, compress="auto"), model, SHA)
    assert codec not in {row.codec for row in auto.ledger}
    assert tg.unpack(auto.blob)[2].keys() == tg.parameter_shapes(cfg).keys()
