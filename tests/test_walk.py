"""A walk over the text keeps a GPU busy. Here, without one, the calls are counted that would wait for it."""
import collections
import dataclasses
import sys

import pytest
import torch
import train_gpt as tg
from conftest import make_runtime
from test_adapters import STARTS, with_documents
from test_evaluation import LORA, setting  # noqa: F401  (a fixture)
from test_phases import PHASED, WARM
from torch import Tensor
from torch.overrides import TorchFunctionMode

READS = {Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
         Tensor.nonzero, torch.nonzero, Tensor.unique, torch.unique, Tensor.masked_select, torch.equal}


class Waits(TorchFunctionMode):
    """How often each function of the script reads a tensor's values or copies others into it."""

    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, waits = kwargs or {}, function in READS or function is torch.tensor
        if function is Tensor.to:
            waits = any(isinstance(value, (torch.device, str)) for value in (*args[1:], *kwargs.values()))
        if function in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            waits = any(isinstance(part, list) or isinstance(part, Tensor) and part.dtype == torch.bool
                        for part in index)
        if waits:
            frame, names = sys._getframe(1), []
            while frame:
                names += [frame.f_code.co_name] * (frame.f_code.co_filename == tg.__file__)
                frame = frame.f_back
            if "on_device" not in names or function is Tensor.to:  # a plan is the CPU's until it is moved
                self.found[names[0]] += 1
        return function(*args, **kwargs)


MODES = {  # what waits more often in a longer text
    "sliding": (None, set()),
    "sgd": ({}, {"require_scored_once"}),  # once for each chunk: whether all ranks have scored what is now learnt
    "lora": (LORA, {"require_scored_once"}),
    "documents": ({**WARM, "ttt_epochs": 2, "ttt_grad_clip": 0.5}, set()),
    "phases": (PHASED, {"attend_sdpa"})}  # only where nothing is compiled: it cuts its input at the documents


@pytest.mark.parametrize("mode", MODES)
def test_a_longer_text_is_not_waited_for_more_often(setting, rt, monkeypatch, mode):
    cfg, val, model = setting
    changes, growing = MODES[mode]
    cfg = dataclasses.replace(cfg, ttt_chunk_tokens=64, **changes or {})
    val, batches, found, chunks = with_documents(val, STARTS), [], [], []
    monkeypatch.setattr(tg, "report_chunk", lambda *args: None)
    for length in (160, 320):
        part, trained = val.take(slice(length)), model()
        adapter = None if changes is None else tg.adapter_for(trained, cfg, rt)
        plan = tg.plan_evaluation(part, cfg, rt, 8, 2, bool(adapter))
        chunks.append(len(plan))
        batches.append(sum(len(chunk.batches) for chunk in plan))
        with Waits() as waits:
            tg.evaluate("test", trained.nll, part, cfg, rt, plan, adapter, observe=lambda numbers, nll: None)
        found.append(waits.found)
    few, many = found
    assert batches[1] > batches[0] + 5
    assert {place for place in many if many[place] > few[place]} == growing
    assert many["on_device"] == 1 and many["require_scored_once"] <= chunks[1]


def test_counts_are_mixed_in_without_waiting_for_each_token(setting, rt):
    cfg, val, _ = setting
    cfg, found = dataclasses.replace(cfg, ngram_orders="2,3,5", ngram_concentrations="1"), []
    for length in (200, 400):
        with Waits() as waits:
            tg.mixed_result("test", torch.ones(length - 1), val.take(slice(length)), cfg, rt)
        found.append(waits.found)
    assert found[0] == found[1] and found[0]


def test_a_long_walk_reports_some_hundred_times(rt):
    meter, said = tg.BpbMeter("cpu"), []
    rt = dataclasses.replace(rt, log=lambda *args, chunk, **fields: said.append(chunk))
    for chunks, wanted in ((35, [1, 11, 21, 31, 35]), (5050, [*range(1, 5051, 50), 5050])):
        said.clear()
        for chunk in range(chunks):
            tg.report_chunk(rt, meter, chunk, chunks, 0.0)
        assert said == wanted


@pytest.mark.parametrize("device, seconds", [("cpu", [[0.0], [0.0, 0.0], [0.0, 0.0]]),
                                             ("cuda", [[], [7.0], [7.0, 2.0]])])
def test_a_lap_is_noted_when_a_gpu_has_ended_it(tmp_path, monkeypatch, device, seconds):
    """On a GPU it may be the next one that is waited for, so that the queue of work is never empty."""
    now, ends = [0.0], iter([7.0, 9.0])
    monkeypatch.setattr(tg.Runtime, "waiter", lambda self: lambda: self.on_cuda and now.__setitem__(0, next(ends)))
    rt = make_runtime(tmp_path, device=torch.device(device))
    clock, found = tg.EvalClock(0.0, rt, now=lambda: now[0]), []
    clock.begin([], 1)
    for act in (lambda: clock.lap("learn", True, 10), lambda: clock.lap("learn", True, 10, 2), clock.end):
        act()
        found.append([lap[0] for lap in clock.laps["learn"]])
    assert found == seconds and [lap[1:] for lap in clock.laps["learn"]] == [(10, False), (20, True)]
