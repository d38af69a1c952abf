"""Every Triton kernel compiled for an H100, without one, through the code that launches it: what ptxas makes of it.

As a script it prints the table; the test runs the script, as this process may have Triton in its interpreter.
"""
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

REGISTERS_PER_SM, SHARED_PER_SM, SHARED_PER_BLOCK, WARPS_PER_SM = 65536, 233472, 232448, 64  # CUDA guide, 9.0
HOPPERS = {"HGMMA", "UTMALDG", "UTMASTG"}  # tensor cores and TMA, as Hopper's machine code names them
PLAIN, SPILLS = {"LDG", "STG", "HMMA"}, {"LDL", "STL"}


def cases(operator, torch):
    """(label, call) for each dtype, and sizes of the profiles and others, that `suits_triton` lets through."""
    empty = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for vocab in (1, 384, 1000, 1024, 4096, 8192, 16384, 32768, 50257, 65536):
            yield f"capped_rows {name} {vocab}", lambda: operator["capped_rows"](
                empty(2048, vocab, dtype=dtype), empty(2048, 1, dtype=torch.int64), 30.0, 1e-5)
        if dtype.itemsize != 2:
            continue
        for rows, dim, width in ((98304, 512, 1536), (98304, 512, 2048), (98304, 768, 3072), (5, 8, 24),
                                 (1000, 520, 1560)):
            x, up, y = empty(rows, dim, dtype=dtype), empty(width, dim, dtype=dtype), empty(rows, width, dtype=dtype)
            yield f"mlp_up {name} {rows} {dim} {width}", lambda: operator["mlp_up"](x, up, 0.5)
            yield f"mlp_back {name} {rows} {dim} {width}", lambda: operator["mlp_back"](
                x, empty(dim, width, dtype=dtype), y)
        for n, rows, columns in ((22, 512, 512), (22, 256, 512), (11, 512, 1536), (1, 8, 8), (3, 1000, 520)):
            x, gram = empty(n, rows, columns, dtype=dtype), empty(n, rows, rows, dtype=dtype)
            yield f"symmetric {name} {n} {rows} {columns}", lambda: operator["symmetric"](x, None, 1.0, 0.0)
            yield f"symmetric+ {name} {n} {rows} {rows}", lambda: operator["symmetric"](gram, gram, 2.0, -4.8)


def measure(kernel, tools: Path) -> dict:
    """Resources and machine instructions of a compiled kernel, by NVIDIA's tools in Triton's package."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listed = lambda *command: subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", listed(tools / "cuobjdump", "-res-usage", file.name)))
        code = re.findall(r"^\s*/\*\w+\*/\s+(?:@\S+\s+)?([A-Z]\w*)([\w.]*)",
                          listed(tools / "nvdisasm", "-c", file.name), re.M)
    warps, registers, shared = kernel.metadata.num_warps, int(usage["REG"]), kernel.metadata.shared
    blocks = min(REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256 * warps), WARPS_PER_SM // warps, 32,
                 SHARED_PER_SM // (shared + 1024))
    return {"registers": registers, "stack": int(usage["STACK"]) + int(usage["LOCAL"]), "shared": shared,
            "blocks": blocks, "warps": blocks * warps, "wide_stores": ("STG", ".E.128") in code,
            "code": sorted({name for name, _ in code} & (HOPPERS | PLAIN | SPILLS))}


def main() -> None:
    """Compile all cases with a driver that launches nothing; a line of JSON for each."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit
    driver.set_active(SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0, get_active_torch_device=lambda: torch.device("cuda", 0)))
    compiled, measured, operator = [], {}, {}
    compile_and_launch = jit.JITFunction.run
    jit.JITFunction.run = lambda self, *args, **options: compiled.append(
        compile_and_launch(self, *args, **{**options, "warmup": True}))  # warmup: all but the launch

    def collect(name, function, **_):
        operator[name.removeprefix("golf::")] = function
        return SimpleNamespace(register_fake=lambda allocate: None)
    torch.library.custom_op = collect
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import train_gpt
    train_gpt.load_kernels()
    tools = Path(triton.knobs.nvidia.ptxas.path).parent
    for label, call in cases(operator, torch):
        call()
        kernel = compiled.pop()
        measured[kernel.hash] = measured.get(kernel.hash) or measure(kernel, tools)
        print(json.dumps({"kernel": label, **measured[kernel.hash]}), flush=True)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not all((tools / name).exists() for name in ("ptxas", "cuobjdump", "nvdisasm")):
        pytest.skip("this Triton comes without NVIDIA's compiler")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=600,
                          env={**environ, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_fits_an_sm_without_spills(kernels):
    assert {k["kernel"].split()[0] for k in kernels} == {"capped_rows", "mlp_up", "mlp_back", "symmetric", "symmetric+"}
    for k in kernels:
        assert k["registers"] <= 255 and not k["stack"] and not SPILLS & set(k["code"]), k
        assert k["shared"] <= SHARED_PER_BLOCK and (k["blocks"] >= 2 or k["warps"] >= 16), k


def test_products_use_tensor_cores_and_tma(kernels):
    for k in kernels:
        if not k["kernel"].startswith("capped_rows"):
            assert HOPPERS <= set(k["code"]) and not PLAIN & set(k["code"]), k


def test_rows_of_logits_move_16_bytes_at_a_time(kernels):
    """A row of a multiple of 16 pieces; others are not aligned."""
    for k in kernels:
        kernel, *size = k["kernel"].split()
        if kernel == "capped_rows" and int(size[-1]) % 16 == 0:
            assert k["wide_stores"], k


if __name__ == "__main__":
    main()
