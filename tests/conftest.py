"""Shared pieces: a tiny real-text data set with its own tokenizer, a tiny model, a one-rank CPU runtime."""
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import prepare  # noqa: E402
import train_gpt as tg  # noqa: E402

VOCAB = 384
TINY = {"vocab_size": VOCAB, "num_layers": 3, "model_dim": 32, "num_heads": 4, "num_kv_heads": 2, "rope_dims": 4,
        "ve_layers": "1,2", "ve_dim": 16, "bigram_vocab_size": 64, "bigram_dim": 16, "train_seq_len": 32,
        "eval_seq_len": 32, "train_batch_tokens": 256, "iterations": 6, "warmup_steps": 0, "val_loss_every": 0,
        "train_log_every": 1, "max_wallclock_seconds": 0.0, "warmdown_iters": 3, "eval_stride": 8,
        "eval_batch_seqs": 16, "ttt_chunk_tokens": 512, "ttt_batch_seqs": 4, "ttt_epochs": 1, "checkpoint_every": 0,
        "muon_momentum_warmup_steps": 2}


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each test that takes it runs on the CPU always, so that its code is sound, and on a GPU where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def full_precision():
    """A run in this process on a GPU allows TF32; what a later test compares in fp32 is not to be held to it."""
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Shards and a tokenizer made from Python's own documentation, as data/prepare.py writes them."""
    from pydoc_data.topics import topics
    texts = [text[:2000] for _, text in sorted(topics.items())][:60]
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer_path = folder / "tiny.model"
    prepare.train_tokenizer(texts, tokenizer_path, VOCAB)
    import sentencepiece
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path))
    ids = [[tokenizer.bos_id(), *tokenizer.encode(text)] for text in texts]
    import numpy as np
    train, val = (np.array(sum(part, []), dtype=np.uint16) for part in (ids[:54], ids[54:]))
    prepare.write_shard(folder / "fineweb_train_000000.bin", train[:15000])
    prepare.write_shard(folder / "fineweb_train_000001.bin", train[15000:])
    prepare.write_shard(folder / "fineweb_val_000000.bin", val[:1700])
    return SimpleNamespace(folder=folder, tokenizer_path=tokenizer_path, tokenizer=tokenizer, train=train,
                           val=val[:1700])


@pytest.fixture
def config(corpus, tmp_path):
    """Builds settings: the tiny ones, changed by keywords."""
    def build(**changes):
        return tg.Hyperparameters(**{**TINY, "data_path": str(corpus.folder), "artifact_dir": str(tmp_path),
                                     "tokenizer_path": str(corpus.tokenizer_path), **changes})
    return build


@pytest.fixture
def rt(tmp_path):
    return make_runtime(tmp_path)


def make_runtime(folder, **changes):
    settings = {"rank": 0, "world_size": 1, "device": torch.device("cpu"), "dtype": torch.float32, "compiles": False,
                "attention": "flash", "attend": tg.attend_sdpa, "run_id": "test", "folder": Path(folder),
                "log": tg.RunLog(Path(folder), "test", active=False)}
    return tg.Runtime(**{**settings, **changes})


def scrambled(model, seed=0):
    """Move every parameter off its initial value, so that nothing hides behind a zero or a one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture
def run(corpus, tmp_path, monkeypatch, capsys):
    """Runs the script in this process with the tiny settings; returns exit code, output, error and summary."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)

    def start(**variables):
        for name, value in environment(corpus, tmp_path, **variables).items():
            monkeypatch.setenv(name, value)
        code = tg.main([])
        out, err = capsys.readouterr()
        last = out.strip().splitlines()[-1] if out.strip() else ""
        summary = json.loads(last.removeprefix("summary: ")) if last.startswith("summary: ") else None
        return SimpleNamespace(code=code, out=out, err=err, summary=summary, folder=tmp_path)
    start.folder = tmp_path
    return start


ON_TWO_RANKS = """
import json, sys
sys.path[:0] = {paths!r}
import train_gpt as tg
from {module} import walks
cfg = tg.Hyperparameters.from_env(tg.process_environment())
rt = tg.Runtime.open(cfg)
results = walks(cfg, rt)
if rt.rank == 0:
    print(json.dumps(results))
rt.close()
"""


def walks_on_two_ranks(module: str, corpus, folder) -> list:
    """What `walks(cfg, rt)` of a test module returns on rank 0 of two processes."""
    script = folder / "walks.py"
    script.write_text(ON_TWO_RANKS.format(paths=[str(ROOT), str(ROOT / "tests")], module=module))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run(launch, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment(corpus, folder)})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def environment(corpus, folder, **variables):
    """Environment variables of a tiny run."""
    settings = {**TINY, "data_path": corpus.folder, "tokenizer_path": corpus.tokenizer_path, "artifact_dir": folder,
                "run_id": "tiny"}
    as_text = {k.upper(): str(int(v) if isinstance(v, bool) else v) for k, v in settings.items()}
    return {**as_text, **{k: str(v) for k, v in variables.items()}}
