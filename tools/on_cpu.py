"""Run a script written for CUDA on the CPU, in fp32 and eager: its source is changed in memory only.

    python tools/on_cpu.py PR_1092.py
"""
import contextlib
import re
import subprocess
import sys
import types
from pathlib import Path

import torch

REPLACEMENTS = (
    (r"torch\.cuda\.is_available\(\)", "True"),
    (r"\.bfloat16\(\)", ".float()"),
    (r"torch\.bfloat16", "torch.float32"),
    (r"torch\.device\(\s*(['\"])cuda\1[^)]*\)", "torch.device('cpu')"),
    (r"(['\"])cuda(?::\d+)?\1", "'cpu'"),
    (r"torch\.inference_mode\(", "torch.no_grad("))  # rotary tables outlive it
CUDA_FUNCTIONS = ("set_device", "synchronize", "manual_seed_all", "empty_cache", "reset_peak_memory_stats",
                  "max_memory_allocated", "max_memory_reserved")


def flash_attn_func(q, k, v, causal=True, **_):
    """FlashAttention's function with PyTorch's own; all tensors [batch, time, heads, head_dim]."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, enable_gqa=True).transpose(1, 2)


def replace_cuda() -> None:
    """Put stand-ins for the parts of PyTorch that need a GPU, and for nvidia-smi."""
    for name in CUDA_FUNCTIONS:
        setattr(torch.cuda, name, lambda *_, **__: 0)  # one object each: dynamo tells them apart
    for name in ("cudnn", "flash", "math", "mem_efficient"):  # meant for CUDA, they turn kernels off here
        setattr(torch.backends.cuda, f"enable_{name}_sdp", lambda *_: None)
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    really_run = subprocess.run
    subprocess.run = lambda command, *a, **k: types.SimpleNamespace(stdout="", stderr="", returncode=0) \
        if command[0] == "nvidia-smi" else really_run(command, *a, **k)


def main(path: str) -> None:
    source = Path(path).read_text(encoding="utf-8")
    for pattern, new in REPLACEMENTS:
        source = re.sub(pattern, new, source)
    replace_cuda()
    if re.search(r"^from flash_attn_interface import", source, re.MULTILINE):  # it cannot do without the package
        sys.modules["flash_attn_interface"] = types.SimpleNamespace(flash_attn_func=flash_attn_func)
    sys.argv = [path]
    exec(compile(source, path, "exec"), {"__name__": "__main__", "__file__": path})


if __name__ == "__main__":
    main(sys.argv[1])
