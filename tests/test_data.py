import hashlib
import json
import os
from operator import attrgetter

import numpy as np
import prepare
import pytest
import torch
import train_gpt as tg
from conftest import make_runtime
from hypothesis import given, settings, strategies as st
from test_optimisers import on_ranks


@given(st.lists(st.integers(1, 30), min_size=1, max_size=5), st.integers(0, 300), st.integers(1, 200))
@settings(max_examples=60, deadline=None)
def test_stream_reads_what_the_shards_hold_and_goes_round(tmp_path_factory, sizes, start, count):
    folder = tmp_path_factory.mktemp("shards")
    whole = np.arange(sum(sizes), dtype=np.uint16)
    for i, (end, size) in enumerate(zip(np.cumsum(sizes), sizes)):
        prepare.write_shard(folder / f"fineweb_train_{i:06d}.bin", whole[end - size:end])
    stream = tg.TokenStream(str(folder / "fineweb_train_*.bin"), 65536)
    assert stream.read(start, count).tolist() == np.take(whole, range(start, start + count), mode="wrap").tolist()


@given(world=st.sampled_from([1, 2, 4, 8]), micro=st.sampled_from([1, 64, 128, 10_000]), step=st.integers(0, 500))
@settings(max_examples=40, deadline=None)
def test_a_step_is_the_same_batch_at_any_world_size_and_micro_batch(corpus, tmp_path_factory, world, micro, step):
    cfg = tg.Hyperparameters(**{"data_path": str(corpus.folder), "vocab_size": 384, "train_seq_len": 32,
                                "train_batch_tokens": 512, "micro_batch_tokens": micro})
    rows = []
    for rank in range(world):
        data = tg.TrainData.open(cfg, make_runtime(tmp_path_factory.getbasetemp(), rank=rank, world_size=world))
        for inputs, targets in data.batch(step):
            assert inputs.numel() <= max(micro, 32)
            rows += [torch.cat((x, y[-1:])).tolist() for x, y in zip(inputs, targets)]
    both = np.concatenate([corpus.train, corpus.train])
    start = 512 * step % len(corpus.train)
    assert rows == [both[start + 32 * i:start + 32 * i + 33].tolist() for i in range(16)]


def broken(corpus, tmp_path, change):
    blob = bytearray((corpus.folder / "fineweb_train_000000.bin").read_bytes())
    (tmp_path / "fineweb_train_000000.bin").write_bytes(change(blob))
    return str(tmp_path / "fineweb_train_*.bin")


@pytest.mark.parametrize("change, said", [
    (lambda b: b"\0" * 4 + b[4:], "not a token shard"),
    (lambda b: b[:5] + b"\1" + b[6:], "not a token shard"),
    (lambda b: b[:500], "not a token shard"),
    (lambda b: b[:-2], "damaged"),
    (lambda b: b + b"\0\0", "damaged"),
    (lambda b: b"", "not a token shard"),
])
def test_damaged_shards_are_named(corpus, tmp_path, change, said):
    with pytest.raises(tg.UserError, match=said) as caught:
        tg.TokenStream(broken(corpus, tmp_path, change), 384)
    assert "fineweb_train_000000.bin" in str(caught.value)


def test_a_shard_that_is_cut_off_while_it_is_read_is_named(corpus, tmp_path):
    """Memory-mapped, it ended the process with SIGBUS."""
    pattern = broken(corpus, tmp_path, lambda b: b)
    stream = tg.TokenStream(pattern, 384)
    os.truncate(stream.paths[0], 1024 + 2 * 1000)
    assert len(stream.read(0, 1000)) == 1000
    with pytest.raises(tg.UserError, match="fineweb_train_000000.bin has become shorter"):
        stream.read(999, 2)


def test_a_run_whose_shards_are_cut_off_ends_with_one_line(corpus, run, monkeypatch):
    data = run.folder / "data"
    data.mkdir()
    for path in corpus.folder.glob("*.bin"):
        (data / path.name).write_bytes(path.read_bytes())
    step = tg.Optimisers.step

    def cut_off(optimisers, plan):
        for path in data.glob("fineweb_train_*"):
            os.truncate(path, 2000)
        return step(optimisers, plan)
    monkeypatch.setattr(tg.Optimisers, "step", cut_off)
    done = run(DATA_PATH=data)
    assert done.code == 2 and done.err.count("\n") == 1 and "has become shorter since the run began" in done.err


def test_a_shard_that_is_replaced_while_it_is_read_stays_what_it_was(corpus, tmp_path):
    """As data/prepare.py replaces one: the name gets another file."""
    stream = tg.TokenStream(broken(corpus, tmp_path, lambda b: b), 384)
    prepare.write_shard(stream.paths[0], np.zeros(3, np.uint16))
    assert np.array_equal(stream.read(5, 20), corpus.train[5:25])


def test_ids_beyond_the_vocabulary_are_refused_with_their_shard(corpus):
    with pytest.raises(tg.UserError, match="VOCAB_SIZE=100"):
        tg.TokenStream(str(corpus.folder / "fineweb_train_*.bin"), 100).read(0, 1000)


def test_the_first_id_beyond_the_vocabulary_is_refused_and_the_last_within_is_not(tmp_path):
    for ids, refused in (([3, 384, 5], True), ([3, 383, 5], False)):
        prepare.write_shard(tmp_path / "fineweb_val_000000.bin", np.array(ids, np.uint16))
        stream = tg.TokenStream(str(tmp_path / "fineweb_val_*.bin"), 384)
        if refused:
            with pytest.raises(tg.UserError, match="000000.bin holds token 384, but VOCAB_SIZE=384"):
                stream.read(0, 3)
        else:
            assert stream.read(0, 3).tolist() == ids


def test_the_validation_text_is_that_of_all_its_shards(corpus, config, rt, tmp_path):
    """In the order of their names, and so are the bytes: a shard may end in the middle of a document."""
    for name, part in (("000002", corpus.val[900:]), ("000000", corpus.val[:300]), ("000001", corpus.val[300:900])):
        prepare.write_shard(tmp_path / f"fineweb_val_{name}.bin", part)
    whole, parts = (tg.ValData.open(config(data_path=str(folder)), rt) for folder in (corpus.folder, tmp_path))
    assert parts.tokens.tolist() == corpus.val.tolist() and len(parts.sizes) == len(corpus.val)
    assert torch.equal(whole.sizes, parts.sizes)
    assert (whole.bos_id, whole.tokenizer_sha256) == (
        corpus.tokenizer.bos_id(), hashlib.sha256(corpus.tokenizer_path.read_bytes()).hexdigest())


def test_no_folder_no_shard(tmp_path):
    with pytest.raises(tg.UserError, match="no data folder"):
        tg.TokenStream(str(tmp_path / "nowhere" / "fineweb_train_*.bin"), 10)
    with pytest.raises(tg.UserError, match="no shard matches"):
        tg.TokenStream(str(tmp_path / "fineweb_train_*.bin"), 10)


def test_byte_sidecars_are_no_shards(corpus, tmp_path):
    for name in ("fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"):
        prepare.write_shard(tmp_path / name, corpus.val)
    assert len(tg.TokenStream(str(tmp_path / "fineweb_val_*.bin"), 384)) == len(corpus.val)


def bytes_beside(folder, name, tokens, sizes):
    prepare.write_shard(folder / f"fineweb_val_{name}.bin", np.array(tokens, np.uint16))
    if sizes is not None:
        prepare.write_shard(folder / f"fineweb_val_bytes_{name}.bin", np.array(sizes, np.uint16))


def test_byte_sidecars_are_the_truth(corpus, config, rt, tmp_path):
    """Of a text that was transformed before it was tokenised, only they know the bytes."""
    sizes = np.random.default_rng(0).integers(0, 9, len(corpus.val))
    bytes_beside(tmp_path, "000000", corpus.val[:700], sizes[:700])
    bytes_beside(tmp_path, "000001", corpus.val[700:], sizes[700:])
    val = tg.ValData.open(config(data_path=str(tmp_path)), rt)
    assert val.sizes.tolist() == sizes.tolist()
    plan = tg.plan_evaluation(val, config(), rt, 32, 16)
    result = tg.evaluate("test", tg.GPT(config()).nll, val, config(), rt, plan)
    assert result.bytes == sizes[1:].sum()
    assert result.bpb == pytest.approx(result.loss * result.tokens / np.log(2) / sizes[1:].sum())


@pytest.mark.parametrize("second, said", [(None, "cannot read shard .*val_bytes_000001"),
                                          (np.ones(5), "holds the bytes of 5 tokens, but .* has 1,000")])
def test_sidecars_that_do_not_fit_are_refused(corpus, config, rt, tmp_path, second, said):
    bytes_beside(tmp_path, "000000", corpus.val[:700], np.ones(700))
    bytes_beside(tmp_path, "000001", corpus.val[700:], second)
    with pytest.raises(tg.UserError, match=said):
        tg.ValData.open(config(data_path=str(tmp_path)), rt)


def test_brackets_in_the_path_are_no_pattern(corpus, tmp_path):
    folder = tmp_path / "[run 1]*?"
    folder.mkdir()
    prepare.write_shard(folder / "fineweb_val_000000.bin", corpus.val)
    assert len(tg.TokenStream(str(folder / "fineweb_val_*.bin"), 384)) == len(corpus.val)


def test_a_dangling_link_is_one_clear_line(tmp_path):
    (tmp_path / "fineweb_val_000000.bin").symlink_to("gone")
    with pytest.raises(tg.UserError, match="cannot read shard .*000000.bin: No such file"):
        tg.TokenStream(str(tmp_path / "fineweb_val_*.bin"), 384)


def noted(folder, tokenizer, vocab=384, **more):
    """A data folder whose dataset.json names a tokenizer, as data/prepare.py lays them out."""
    data = folder / "datasets" / "own"
    data.mkdir(parents=True)
    facts = {"name": tokenizer.name, "sha256": hashlib.sha256(tokenizer.read_bytes()).hexdigest(), **more}
    (data / "dataset.json").write_text(json.dumps({"vocab_size": vocab, "tokenizer": facts}))
    return data


def test_a_data_set_finds_its_tokenizer_and_vocabulary(corpus, tmp_path):
    data = noted(tmp_path, corpus.tokenizer_path)
    (tmp_path / "tokenizers").mkdir()
    for name in ("a.model", "tiny.model"):
        (tmp_path / "tokenizers" / name).write_bytes(corpus.tokenizer_path.read_bytes() if name[0] == "t" else b"x")
    cfg = tg.settings_from({"DATA_PATH": str(data)})
    assert (cfg.vocab_size, cfg.tokenizer_path) == (384, str(tmp_path / "tokenizers" / "tiny.model"))
    cfg = tg.settings_from({"DATA_PATH": str(data), "TOKENIZER_PATH": "mine", "VOCAB_SIZE": "7"})
    assert (cfg.vocab_size, cfg.tokenizer_path) == (7, "mine")
    (tmp_path / "tokenizers" / "tiny.model").rename(tmp_path / "tokenizers" / "renamed.model")
    assert tg.settings_from({"DATA_PATH": str(data)}).tokenizer_path.endswith("renamed.model")  # found by its contents


def test_a_vocabulary_finds_its_data_and_tokenizer(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    three = lambda variables: attrgetter("data_path", "tokenizer_path", "vocab_size")(tg.settings_from(variables))
    with pytest.raises(tg.UserError, match="no data for VOCAB_SIZE=384 in data.datasets; `bash run.sh data fineweb --vocab-size 384`"):
        tg.settings_from({"VOCAB_SIZE": "384"})
    with pytest.raises(tg.UserError, match="VOCAB_SIZE='many' is not a whole number"):
        tg.settings_from({"VOCAB_SIZE": "many"})
    assert tg.settings_from({}).non_defaults() == {}
    noted(tmp_path / "data", corpus.tokenizer_path)  # data/datasets/own
    (tmp_path / "data" / "tokenizers").mkdir()
    (tmp_path / "data" / "tokenizers" / "tiny.model").write_bytes(corpus.tokenizer_path.read_bytes())
    own = "data/datasets/own", "data/tokenizers/tiny.model", 384
    assert three({"VOCAB_SIZE": "384"}) == own
    assert three({"VOCAB_SIZE": "384", "TOKENIZER_PATH": "mine"}) == (own[0], "mine", 384)
    with pytest.raises(tg.UserError, match="no data for VOCAB_SIZE=385"):
        tg.settings_from({"VOCAB_SIZE": "385"})
    for size in (384, 8192):  # FineWeb comes first, also as others fetch it, without a dataset.json
        (tmp_path / "data" / "datasets" / f"fineweb10B_sp{size}").mkdir()
        named = f"./data/datasets/fineweb10B_sp{size}", f"./data/tokenizers/fineweb_{size}_bpe.model", size
        assert three({"VOCAB_SIZE": str(size)}) == named
        assert three({"VOCAB_SIZE": str(size), "DATA_PATH": named[0]}) == named
    assert three({}) == (tg.Hyperparameters.data_path, tg.Hyperparameters.tokenizer_path, 1024)


def test_a_tokenizer_of_another_data_set_is_refused(corpus, config, rt, tmp_path):
    data = noted(tmp_path, corpus.tokenizer_path, sha256="ab" * 32)
    prepare.write_shard(data / "fineweb_val_000000.bin", corpus.val)
    with pytest.raises(tg.UserError, match="was made with tokenizer tiny.model .*abababababab.*TOKENIZER_PATH"):
        tg.ValData.open(config(data_path=str(data)), rt)


@pytest.mark.parametrize("text", ["{", "[]", '{"tokenizer": 3}'])
def test_a_dataset_note_that_cannot_be_understood(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(tg.UserError, match="cannot understand .*dataset.json"):
        tg.dataset_facts(tmp_path)


def test_rows_must_divide_among_ranks(config, tmp_path):
    with pytest.raises(tg.UserError, match="not divisible by 3 ranks"):
        tg.TrainData.open(config(), make_runtime(tmp_path, world_size=3))


def test_counted_bytes_are_those_of_the_decoded_text(corpus, config, rt):
    """Each document by itself: what the tokens after BOS are said to weigh is what they decode to."""
    val, ids = tg.ValData.open(config(), rt), corpus.val.tolist()
    starts = [i for i, t in enumerate(ids) if t == corpus.tokenizer.bos_id()] + [len(ids)]
    assert len(starts) > 2
    for start, end in zip(starts, starts[1:]):
        weighed = val.sizes[start + 1:end].sum().item()
        assert weighed == len(corpus.tokenizer.decode(ids[start + 1:end]).encode())


@given(st.text(max_size=60))
@settings(max_examples=80, deadline=None)
def test_counted_bytes_of_any_text(corpus, text):
    ids = np.array([corpus.tokenizer.bos_id(), *corpus.tokenizer.encode(text)])
    decoded = corpus.tokenizer.decode(ids[1:].tolist())
    if "\ufffd" not in decoded:  # bytes that are no text cannot be compared as text
        assert tg.token_bytes(corpus.tokenizer, ids)[1:].sum() == len(decoded.encode())


def test_meter_is_nats_over_bytes(rt):
    meter, nll, weights = tg.BpbMeter("cpu"), torch.rand(20), torch.randint(1, 9, (20,))
    for part in (slice(0, 7), slice(7, 20)):
        meter.add(nll[part], weights[part])
    loss, bpb, tokens, size = meter.reduce(rt)
    nats = sum(nll.tolist())
    assert tokens == 20 and size == sum(weights.tolist())
    assert loss == pytest.approx(nats / tokens) and bpb == pytest.approx(nats / np.log(2) / size)


def test_a_token_counts_also_after_a_hundred_million(rt):
    """Where fp32 no longer sees it."""
    meter = tg.BpbMeter("cpu")
    meter.add(torch.tensor([2.0 ** 28]), torch.tensor([2 ** 28], dtype=torch.int32))
    for _ in range(3):
        meter.add(torch.ones(1), torch.ones(1, dtype=torch.int32))
    loss, bpb, tokens, size = meter.reduce(rt)
    assert (loss * 4, tokens, size) == (2.0 ** 28 + 3, 4, 2 ** 28 + 3)


def test_ranks_add_up_their_sums_before_anything_is_divided(tmp_path):
    """And a meter can be read again, with what came since."""
    def read(rt):
        meter, found = tg.BpbMeter("cpu"), []
        for nats, size in (([1.0], [4]), ([0.5, 3.0, 2.0], [1, 0, 7])):
            meter.add((1 + rt.rank) * torch.tensor(nats), torch.tensor(size, dtype=torch.int32))
            found.append(meter.reduce(rt))
        return found
    wanted = [(3 / 2, 3 / np.log(2) / 8, 2, 8), (19.5 / 8, 19.5 / np.log(2) / 24, 8, 24)]
    for found in on_ranks(tmp_path, 2, read):
        assert [pytest.approx(one) for one in wanted] == found


@pytest.mark.parametrize("content, said", [(None, "cannot read tokenizer"), (b"", "not a SentencePiece"),
                                           (b"hello" * 50, "not a SentencePiece")])
def test_bad_tokenizers(config, tmp_path, content, said):
    path = tmp_path / "t.model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tg.UserError, match=said):
        tg.open_tokenizer(config(tokenizer_path=str(path)))


def test_a_tokenizer_without_a_space_is_refused(config, tmp_path):
    """It would write spaces as unknown."""
    import sentencepiece
    path = tmp_path / "none.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["abcde" * 20] * 20), model_writer=file, model_type="char", vocab_size=8,
            add_dummy_prefix=False, minloglevel=3)
    with pytest.raises(tg.UserError, match="none.model has no piece for a space"):
        tg.open_tokenizer(config(tokenizer_path=str(path), vocab_size=8))


def test_tokenizer_of_another_size(config):
    with pytest.raises(tg.UserError, match="VOCAB_SIZE=512"):
        tg.open_tokenizer(config(vocab_size=512))


def test_validation_shorter_than_a_window(config, rt):
    with pytest.raises(tg.UserError, match="fewer than one window"):
        tg.ValData.open(config(eval_seq_len=4096), rt)


@pytest.mark.parametrize("text", [b"[" * 200_000, b'{"a":' * 100_000, b'{"tokenizer": {"name": 3}}', b"\xff", b"[]"])
def test_a_note_that_is_none_is_one_line(tmp_path, text):
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(tg.UserError, match="cannot understand .*dataset.json"):
        tg.dataset_facts(tmp_path)


def test_mutated_tokenizers_are_refused_or_read(corpus, config, tmp_path):
    """SentencePiece's own message may be no UTF-8 (a byte piece with a foreign byte in its name)."""
    path = tmp_path / "mutated.model"
    whole, random = corpus.tokenizer_path.read_bytes(), np.random.default_rng(0)
    spelt = whole.find(b"<0x41>")
    mutants = [whole[:spelt + 2] + b"\xff\xff\xff" + whole[spelt + 5:], b"", whole[:100]]
    for _ in range(60):
        blob = bytearray(whole)
        blob[random.integers(len(blob))] ^= 1 << random.integers(8)
        mutants.append(bytes(blob))
    for blob in mutants:
        path.write_bytes(blob)
        try:
            tokenizer, _ = tg.open_tokenizer(config(tokenizer_path=str(path)))
            assert len(tg.token_bytes(tokenizer, corpus.val)) == len(corpus.val)
        except tg.UserError as error:
            assert "mutated.model" in str(error)
