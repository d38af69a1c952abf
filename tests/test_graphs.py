"""How many graphs a run compiles, and where. TorchDynamo traces them; nothing is made of them here."""
import collections
import functools
import sys

import pytest
import torch
import train_gpt as tg

PLACES = ("require_compiler", "warm_up", "train_step", "measure_pace", "learn", "evaluate")
DOCUMENTS = {"TTT_MODE": "lora", "TTT_RESET": "document", "TTT_DOC_CHUNK_TOKENS": 8, "TTT_BATCH_DOCS": 4}


@pytest.fixture
def graphs(run, monkeypatch):
    """Runs with COMPILE=1 and counts graphs by the function that was waiting for them, `evaluate` by the name of the
    evaluation. Training's clock runs in `train_step` outside of `warm_up`, that of evaluation from `measure_pace` on."""
    found = []

    def backend(graph, inputs):
        frame, places = sys._getframe(), []
        while frame:
            if frame.f_code.co_filename == tg.__file__ and frame.f_code.co_name in PLACES:
                places.append(frame.f_locals.get("name", frame.f_code.co_name))
            frame = frame.f_back
        found.append("warm_up" if "warm_up" in places else places[0] if places else "elsewhere")
        return graph.forward

    def start(**variables):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found.clear()
        done = run(**{"COMPILE": 1, "WARMUP_STEPS": 2, "ITERATIONS": 4, "VAL_LOSS_EVERY": 2, "LATE_QAT_THRESHOLD": 0.9,
                      "VAL_BATCH_SIZE": 512, "EVAL_MAX_SECONDS": 600, **variables})
        assert done.code == 0, done.err
        assert "late_qat:enabled" in done.out and not torch._dynamo.utils.counters["graph_break"]
        assert found.pop(0) == "require_compiler"
        return collections.Counter(found)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    return start


@pytest.mark.parametrize("variables, adapting", [
    ({}, {"learn": 1}),  # scores by the graphs there are
    ({"TTT_FREEZE_BLOCKS": 1, "ATTENTION_WINDOW": 8}, {"legal_ttt": 2, "learn": 1}),  # the first window, the others
    ({"HASH_EMBED_BUCKETS": 64, "COMPLEMENT_ALPHA": 0.5}, {"legal_ttt": 2, "learn": 1}),
    ({"TTT_MODE": "lora", "MTP_NUM_HEADS": 1}, {"legal_ttt": 2, "learn": 1}),
    (DOCUMENTS, {"legal_ttt": 2}),  # a document's first chunk, all longer ones
    ({**DOCUMENTS, "TTT_EPOCHS": 3}, {"legal_ttt": 2})],
    ids=["weights", "frozen blocks", "hashed embedding", "lora", "documents", "documents, epochs"])
def test_one_graph_for_each_use(graphs, variables, adapting):
    """Without rounding and with it, before training's clock; plain scores in the first validation; sliding ones as the
    pace of scoring is measured."""
    assert graphs(**variables) == {"warm_up": 2, "validation": 1, "measure_pace": 1, **adapting}


def test_each_length_has_its_graphs_before_training_s_clock(graphs):
    found = graphs(PACK="documents", TRAIN_SEQ_SCHEDULE="16:0.5,32:1", TTT_ENABLED=0, EVAL_STRIDE=0)
    assert found == {"warm_up": 4, "validation": 1}


def test_a_loop_has_its_graphs_before_the_clock(graphs):
    """Plain and looped, each without rounding and with it; validation before the switch and after it."""
    found = graphs(WARMUP_STEPS=4, NUM_LOOPS=1, LOOP_START=0, LOOP_END=1, ENABLE_LOOPING_AT=0.5, PARALLEL_START_LAYER=2)
    assert found == {"warm_up": 4, "validation": 2, "measure_pace": 1, "learn": 1}


def test_without_a_warm_up_training_s_clock_waits_for_both(graphs):
    found = graphs(WARMUP_STEPS=0, TTT_ENABLED=0, EVAL_STRIDE=0, VAL_LOSS_EVERY=0)
    assert found == {"train_step": 2, "validation": 1}
