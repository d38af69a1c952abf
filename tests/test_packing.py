"""PACK=documents and TRAIN_SEQ_SCHEDULE: the same tokens in other rows, the same losses, all shapes of a run."""
import copy
import json

import numpy as np
import prepare
import pytest
import torch
import train_gpt as tg
from conftest import make_runtime, scrambled
from hypothesis import given, settings, strategies as st

BOS = 1
GROWING = {"train_seq_schedule": "8:0.3,16:0.7,32:1", "train_seq_len": 32, "train_batch_tokens": 256}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=300), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_documents_begin_at_bos_and_where_one_is_cut(ids, longest):
    wanted, begin = [], None
    for position, token in enumerate(ids):
        if begin is None or token == BOS or position - begin == longest:
            begin = position
            wanted.append(position)
    starts = tg.document_starts(np.array(ids), BOS, longest)
    count = len(wanted)
    assert starts[:count].tolist() == wanted and (starts[count:] == len(ids)).all() and len(starts) > count
    assert starts.dtype == np.int32 and len(starts) & (len(starts) - 1) == 0


@pytest.mark.parametrize("seq_len", [8, 16, 32])
def test_a_flat_stream_has_the_loss_and_gradients_of_a_row_for_each_document(config, rt, seq_len):
    """Attention, n-gram tables and smear gate stop where a document begins or is cut; rotation counts on."""
    cfg = config(pack="documents", trigram_vocab_size=64, micro_batch_tokens=128, **GROWING)
    data, models = tg.TrainData.open(cfg, rt), [scrambled(tg.GPT(cfg))]
    models.append(copy.deepcopy(models[0]))
    assert data.micro_steps == 2
    for inputs, targets, packed in data.training_batch(3, seq_len):
        documents = packed["documents"]
        assert inputs.shape == targets.shape == (1, 128) and documents.longest == seq_len
        models[0].loss(inputs, targets, documents=documents).backward()
        starts = documents.starts.unique().tolist()
        assert len(starts) > 128 // seq_len
        for begin, end in zip(starts, starts[1:]):
            row = models[1].loss(inputs[:, begin:end], targets[:, begin:end])
            (row * (end - begin) / 128).backward()
    for (name, flat), single in zip(models[0].named_parameters(), models[1].parameters()):
        scale = single.grad.abs().max().item()
        torch.testing.assert_close(flat.grad, single.grad, rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@given(world=st.sampled_from([1, 2, 4]), micro=st.sampled_from([1, 64, 10_000]), step=st.integers(0, 90),
       seq_len=st.sampled_from([8, 16, 32]), pack=st.sampled_from(["rows", "documents"]))
@settings(max_examples=40, deadline=None)
def test_a_step_reads_the_same_tokens_at_any_length(corpus, tmp_path_factory, world, micro, step, seq_len, pack):
    cfg = tg.Hyperparameters(data_path=str(corpus.folder), tokenizer_path=str(corpus.tokenizer_path), vocab_size=384,
                             pack=pack, micro_batch_tokens=micro, **GROWING)
    read = []
    for rank in range(world):
        rt = make_runtime(tmp_path_factory.getbasetemp(), rank=rank, world_size=world)
        for inputs, targets, packed in tg.TrainData.open(cfg, rt).training_batch(step, seq_len):
            assert inputs.size(1) == (inputs.numel() if pack == "documents" else seq_len)
            assert inputs.numel() % 32 == 0 and list(packed) == ["documents"] * (pack == "documents")
            assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])
            read += inputs.flatten().tolist()
    start = 256 * step % len(corpus.train)
    assert read == np.concatenate([corpus.train, corpus.train])[start:start + 256].tolist()


def test_the_length_follows_the_share_of_the_budget(config):
    cfg = config(iterations=100, **GROWING)
    assert [tg.plan_step(cfg, step, 0.0, 0.0).seq_len for step in (0, 30, 31, 70, 71, 100)] == [8, 8, 16, 16, 32, 32]
    timed = config(max_wallclock_seconds=10.0, iterations=10 ** 6, **GROWING)
    assert [tg.plan_step(timed, 5, s, 0.1).seq_len for s in (0.0, 3.0, 3.1, 7.1, 12.0)] == [8, 8, 16, 32, 32]
    assert tg.plan_step(config(), 3, 0.0, 0.0).seq_len == 32  # no schedule: TRAIN_SEQ_LEN


def steps_of(done):
    events = map(json.loads, (done.folder / "logs/tiny.jsonl").read_text().splitlines())
    return {event["step"]: event for event in events if event["event"] == "train"}


@pytest.mark.parametrize("pack", ["rows", "documents"])
def test_a_run_grows_warms_up_again_and_resumes_the_same(run, monkeypatch, pack):
    brief = {"TTT_ENABLED": 0, "EVAL_STRIDE": 0, "ITERATIONS": 10, "WARMDOWN_ITERS": 0, "COMPRESS": "lzma",
             "WARMUP_STEPS": 1, "PACK": pack, "TRAIN_SEQ_SCHEDULE": "8:0.3,16:0.7,32:1", "CHECKPOINT_EVERY": 6}
    monkeypatch.setattr(tg, "REWARM_STEPS", 3)
    read, training_batch = [], tg.TrainData.training_batch

    def watched(data, step, seq_len):
        read.append((step, seq_len))
        return training_batch(data, step, seq_len)
    monkeypatch.setattr(tg.TrainData, "training_batch", watched)
    done = run(**brief)
    assert done.code == 0, done.err
    assert [length for _, length in read[:6]] == [8, 8, 16, 16, 32, 32]  # the warm-up: without and with QAT
    assert read[6:] == [(step, 8 if step < 4 else 16 if step < 8 else 32) for step in range(10)]
    assert "train_seq_len:16 step:4" in done.out and "train_seq_len:32 step:8" in done.out
    rates = [event["lr_scale"] for event in steps_of(done).values()]
    assert rates == pytest.approx([1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3])
    artifact, files = (done.folder / "final_model.ptz").read_bytes(), done.folder / "runs/tiny"
    (files / "checkpoint.before.pt").replace(files / "checkpoint.pt")
    read.clear()
    resumed = run(RESUME=1, **brief)
    assert resumed.code == 0 and "resume:step:6 from" in resumed.out, resumed.err
    assert read[-4:] == [(6, 16), (7, 16), (8, 32), (9, 32)]
    assert (done.folder / "final_model.ptz").read_bytes() == artifact


@pytest.mark.parametrize("variables, said", [
    ({"TRAIN_SEQ_SCHEDULE": "1024"}, "is not lengths and growing shares"),
    ({"TRAIN_SEQ_SCHEDULE": "1024:0.1,2048:x"}, "is not lengths and growing shares"),
    ({"TRAIN_SEQ_SCHEDULE": "1024:0.5,2048:0.5,2048:1"}, "is not lengths and growing shares"),
    ({"TRAIN_SEQ_SCHEDULE": "1024:0.1,2048:0.9"}, "the last of them 1"),
    ({"TRAIN_SEQ_SCHEDULE": "1:0.1,2048:1"}, "is not lengths and growing shares"),
    ({"TRAIN_SEQ_SCHEDULE": ","}, "is not lengths and growing shares"),
    ({"TRAIN_SEQ_SCHEDULE": "512:0.1,1024:1"}, "the longest of TRAIN_SEQ_SCHEDULE='512:0.1,1024:1' is not TRAIN_SEQ"),
    ({"TRAIN_SEQ_SCHEDULE": "1000:0.1,2048:1"}, "TRAIN_BATCH_TOKENS=786432 is not divisible by 256000"),
    ({"TRAIN_SEQ_SCHEDULE": "16:0.1,2048:1", "ATTENTION_WINDOW": "32"}, "ATTENTION_WINDOW=32 is longer"),
    ({"PACK": "document"}, "not one of")])
def test_bad_schedules_are_one_line(variables, said):
    with pytest.raises(tg.UserError) as caught:
        tg.Hyperparameters.from_env(variables)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_ranks_and_documents_that_do_not_fit_are_refused(config, rt, tmp_path, corpus):
    with pytest.raises(tg.UserError, match="8 sequences of 32, not divisible by 3 ranks"):
        tg.TrainData.open(config(**GROWING), make_runtime(tmp_path, world_size=3))
    folder = tmp_path / "data"
    folder.mkdir()
    tokens = corpus.train[corpus.train != BOS]
    prepare.write_shard(folder / "fineweb_train_000000.bin", tokens)
    with pytest.raises(tg.UserError, match="PACK=documents: no document begins in .*token 1"):
        tg.TrainData.open(config(pack="documents", data_path=str(folder)), rt)


def test_a_run_s_stages_are_the_lengths_and_the_loop_at_their_shares(config):
    """PR 2014's four shapes; what has no loop is never without it, so it needs no second graph."""
    grows = {"train_seq_schedule": "8:0.1,16:0.7,32:1", "enable_looping_at": 0.35}
    stages = lambda cfg: [tuple(tg.stage(cfg, share).values()) for share in tg.stage_shares(cfg)]
    assert stages(config(num_loops=1, loop_start=1, loop_end=1, **grows)) == [(8, False), (16, False), (16, True),
                                                                              (32, True)]
    assert stages(config(**grows)) == [(8, True), (16, True), (32, True)] and stages(config()) == [(32, True)]
