"""What only CUDA reaches, as far as a machine without it can tell: which attention is chosen and what is said about it,
how process groups of GPUs begin and end. Stand-ins take the place of the device and of the packages."""
import dataclasses
import datetime
import functools
import os
import socket
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
import train_gpt as tg
from conftest import ROOT, environment, make_runtime
from torch.nn.attention import SDPBackend

CUDA = torch.device("cuda", 0)


# ---- attention

@pytest.fixture
def gpu(monkeypatch):
    """Pretends that there is a Hopper GPU and that no package with attention is installed; `install` adds one."""
    def start(major=9):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        for name in ("flash_attn_interface", "kernels", "flash_attn", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
        monkeypatch.setattr(torch.nn.attention, "activate_flash_attention_impl",
                            lambda name: __import__("flash_attn.cute"), raising=False)
    start.install = lambda name, **contents: monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**contents))
    start.patch = monkeypatch
    return start


def spy(q, k, v, causal, window_size):
    return ("attended", causal, window_size), "log-sum-exp"


@pytest.mark.parametrize("wanted", ["auto", "fa3"])
def test_flash_attention_3_from_its_own_package_or_from_the_hub(gpu, wanted):
    asked = []
    gpu()
    documents = tg.Documents(torch.tensor([0, 2, 3]), 2)
    package = types.SimpleNamespace(flash_attn_func=spy, flash_attn_varlen_func=lambda q, k, v, *places, **options: (
        torch.tensor([places[0].equal(places[1]) and options["causal"], *places[2:]]), "log-sum-exp"))
    gpu.install("kernels", get_kernel=lambda *a, **k: asked.append((a, k)) or package)
    name, attend = tg.pick_attention(wanted, CUDA, torch.bfloat16)
    assert name == "fa3" and asked == [(("kernels-community/flash-attn3",), {"version": 1})]
    assert attend(1, 2, 3) == ("attended", True, (-1, -1)) and attend(1, 2, 3, 5) == ("attended", True, (5, 0))
    assert attend(*torch.ones(3, 1, 3, 1, 1), documents=documents).tolist() == [[1, 2, 2]]
    gpu.install("flash_attn_interface", flash_attn_func=spy)
    assert tg.pick_attention(wanted, CUDA, torch.bfloat16)[0] == "fa3" and len(asked) == 1


@pytest.mark.parametrize("window", [0, 3])
def test_pytorchs_own_attention_of_documents_takes_these_arguments(window):
    """Shapes and gradients only: a meta tensor is no more than that."""
    q, k = (torch.empty(1, 64, heads, 32, device="meta", dtype=torch.bfloat16, requires_grad=True) for heads in (4, 2))
    documents = tg.Documents(torch.empty(5, device="meta", dtype=torch.int32), 40)
    out = tg.attend_sdpa(q, k, k, window, documents, first=SDPBackend.FLASH_ATTENTION)
    out.sum().backward()
    assert out.shape == q.shape == q.grad.shape and k.grad.shape == k.shape


@pytest.mark.parametrize("error", [OSError("libcudart.so.11.0: cannot open\nmore"), RuntimeError("no kernel for torch"),
                                   ImportError("undefined symbol: _ZN3c10"), TypeError("unexpected keyword 'version'")])
def test_a_package_that_cannot_be_loaded_is_told_in_one_line(gpu, error):
    def fail(*args, **kwargs):
        raise error
    gpu()
    gpu.install("kernels", get_kernel=fail)
    notes = []
    name, attend = tg.pick_attention("auto", CUDA, torch.bfloat16, notes)
    assert name == "cudnn" and attend.func is tg.attend_sdpa and len(notes) == 1
    text = ' '.join(str(error).split())
    assert f"kernels-community/flash-attn3 ({type(error).__name__}: {text})" in notes[0] and "\n" not in notes[0]
    assert "flash_attn_interface (ModuleNotFoundError" in notes[0] and "flash_attn.cute (ModuleNotFound" in notes[0]
    for wanted in ("fa3", "fa4"):
        with pytest.raises(tg.UserError, match=rf"^ATTENTION={wanted} needs .*Error: [^\n]*$"):
            tg.pick_attention(wanted, CUDA, torch.bfloat16)


def test_flash_attention_4_takes_the_place_of_the_flash_kernel(gpu):
    gpu(major=10)
    activated, notes = [], []
    gpu.patch.setattr(torch.nn.attention, "activate_flash_attention_impl", activated.append, raising=False)
    for wanted in ("auto", "fa4"):
        name, attend = tg.pick_attention(wanted, CUDA, torch.bfloat16, notes)
        assert name == "fa4" and attend.keywords == {"first": SDPBackend.FLASH_ATTENTION}
    assert activated == ["FA4"] * 2 and notes == []
    gpu.patch.delattr(torch.nn.attention, "activate_flash_attention_impl")  # as in torch 2.9
    assert tg.pick_attention("auto", CUDA, torch.bfloat16, notes)[0] == "cudnn" and "AttributeError" in notes[0]


def test_what_is_not_to_be_had_there_is_not_asked_for(gpu):
    notes = []
    for major, dtype, wanted, name in ((8, torch.bfloat16, "auto", "cudnn"), (9, torch.float32, "auto", "cudnn"),
                                       (9, torch.bfloat16, "flash", "flash"), (9, torch.bfloat16, "math", "math")):
        gpu(major)
        assert tg.pick_attention(wanted, CUDA, dtype, notes)[0] == name and notes == []
    with pytest.raises(tg.UserError, match="needs bf16, a Hopper GPU"):
        tg.pick_attention("fa3", CUDA, torch.float32)


def test_the_note_is_in_the_log(run, monkeypatch):
    pick = tg.pick_attention
    monkeypatch.setattr(tg, "pick_attention", lambda wanted, device, dtype, notes: notes.append("a note") or
                        pick(wanted, device, dtype, notes))
    assert "\na note\n" in run(ITERATIONS=0, TTT_ENABLED=0, EVAL_STRIDE=0).out


@pytest.mark.parametrize("first", [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
@pytest.mark.parametrize("queries, window", [(24, 0), (24, 5), (7, 0), (7, 5)])
def test_the_order_of_kernels_is_part_of_one_graph(first, queries, window):
    """A kernel that cannot run here (cuDNN's) leaves it to the next one; the order holds for this call only."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 8, requires_grad=True)
               for length, heads in ((queries, 4), (24, 2), (24, 2)))
    attend, before = functools.partial(tg.attend_sdpa, window=window, first=first), torch._C._get_sdp_priority_order()
    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    wanted = tg.attend_math(q, k, v, window)
    for function in (attend, compiled):
        y = function(q, k, v)
        torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
        for got, grad in zip(*(torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True)
                               for out in (y, wanted))):
            torch.testing.assert_close(got, grad, atol=1e-4, rtol=1e-4)
    assert torch._C._get_sdp_priority_order() == before and torch.backends.cuda.math_sdp_enabled()


# ---- process groups

def test_a_process_group_of_gpus(config, tmp_path, monkeypatch):
    """NCCL is bound to the device; decisions travel over gloo; the wait is limited for NCCL alone."""
    calls = []
    note = lambda name, value=None: lambda *args, **kwargs: calls.append((name, args, kwargs)) or value
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", note("set_device"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch, "set_float32_matmul_precision", note("precision"))
    for name in ("init_process_group", "new_group", "broadcast_object_list", "destroy_process_group"):
        monkeypatch.setattr(dist, name, note(name, "gloo group" if name == "new_group" else None))
    for name in ("_set_pg_timeout", "_abort_process_group"):
        monkeypatch.setattr(dist.distributed_c10d, name, note(name))
    for name, value in {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "x", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    rt = tg.Runtime.open(config(compile="0", run_id="a"))
    device = torch.device("cuda", 1)
    assert (rt.device, rt.dtype, rt.compiles, rt.groups) == (device, torch.bfloat16, False, {"cpu": "gloo group"})
    rt.allow_wait(60.0)
    rt.close()
    rt.close(failed=True)
    assert rt.groups == {} and [call for call in calls if call[0] != "broadcast_object_list"] == [
        ("set_device", (device,), {}), ("precision", ("high",), {}),
        ("init_process_group", ("nccl",), {"device_id": device}),
        ("new_group", (), {"backend": "gloo"}), ("_set_pg_timeout", (datetime.timedelta(seconds=60),), {}),
        ("destroy_process_group", (), {}), ("_abort_process_group", (), {})]


def test_the_wait_is_short_in_training_only(run, monkeypatch):
    order = []
    monkeypatch.setattr(tg.Runtime, "allow_wait", lambda rt, seconds: order.append(seconds))
    for name in ("warm_up", "train_step", "export"):
        original = getattr(tg, name)
        monkeypatch.setattr(tg, name, lambda *args, name=name, original=original: order.append(name) or original(*args))
    assert run(ITERATIONS=1, WARMUP_STEPS=1, TTT_ENABLED=0, EVAL_STRIDE=0).code == 0
    assert order == ["warm_up", "train_step", "train_step", 60.0, "train_step", 600.0, "export"], "with QAT and without"


FAILING = """
import os, sys
sys.path[:0] = [{root!r}, {tests!r}]
import train_gpt as tg
close = tg.Runtime.close
def closing(rt, failed=False):
    print("closing", failed, file=sys.stderr, flush=True)
    close(rt, failed)
tg.Runtime.close = closing
step, taken = tg.train_step, []
def failing(*args):
    taken.append(1)
    if len(taken) == 3 and os.environ["RANK"] == {rank!r}:
        raise {error}
    return step(*args)
tg.train_step = failing
sys.exit(tg.main([]))
"""


@pytest.mark.parametrize("rank, error, code, told", [
    ("1", "RuntimeError('device-side assert')", 1, "RuntimeError: device-side assert"),
    ("0", "tg.UserError('the disk is full')", 2, "error: the disk is full"),
    ("0", "KeyboardInterrupt", 130, "interrupted")])
def test_a_rank_that_fails_says_so_before_it_leaves_and_the_other_one_does_not_wait(corpus, tmp_path, rank, error, code,
                                                                                   told):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = FAILING.format(root=str(ROOT), tests=str(ROOT / "tests"), rank=rank, error=error)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", **environment(corpus, tmp_path)}
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  text=True, env={**settings, "RANK": r, "LOCAL_RANK": r}) for r in "01"]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed, other = int(rank), 1 - int(rank)
    assert processes[failed].returncode == code, errors
    assert 0 <= errors[failed].index(told) < errors[failed].index("closing True") and errors[failed].count(told) == 1
    assert processes[other].returncode == 1 and "closing True" in errors[other], "its collective fails, not hangs"
