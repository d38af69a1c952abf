"""Parameter Golf in one file: train a small language model, squeeze it under 16,000,000 bytes, score it.

    bash run.sh                                                   # fits itself to the machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # the competition's machine
    python train_gpt.py --help                                    # every setting, with default and range

Settings come from environment variables only. Importing the file defines things and does nothing else.
The rooms, in reading order; a room uses only the rooms above it:

    CONFIG      every setting, declared once           PARAMETERS  which parameter is treated how
    RUNTIME     ranks, device, clocks, log, files      OPTIMISERS  Muon on banks, AdamW on the rest
    DATA        shards, batches, validation text       SCHEDULES   pure functions of progress
    METRIC      nats and bytes -> bits per byte        AVERAGING   EMA, SWA, LAWA
    QUANTISER   weights <-> codes and scales           TRAINING    warm-up, step, loop, checkpoints
    MODEL       the transformer on weight banks        ARTIFACT    the file that is submitted
                                                       EVALUATION  score first, then (perhaps) learn
                                                       MAIN        the whole run on one screen

The system is that of the competition's pull request 1092, with its slips mended (each is named where it stands).
"""
from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import glob
import hashlib
import io
import json
import lzma
import math
import os
import re
import resource
import struct
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------------------------------ CONFIG
class UserError(Exception):
    """Something the user can mend. `main` prints it as one line, without a traceback, and exits with 2."""


def env_field(default, help: str, *, lo=None, hi=None, choices=(), aliases=()):
    """One setting: its type is the annotation, its variable the upper-cased name (or a published alias)."""
    meta = {"help": help, "lo": lo, "hi": hi, "choices": tuple(choices), "aliases": tuple(aliases)}
    return dataclasses.field(default=default, metadata=meta)


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run. Defaults are those of PR 1092's best run unless the help says otherwise."""

    # Run
    run_id: str = env_field("", "name of the run and its log files; made up when empty")
    seed: int = env_field(1337, "seed of the initial weights", lo=0)
    artifact_dir: str = env_field(".", "folder for logs/, checkpoints/ and the model files", aliases=("OUT_DIR",))
    device: str = env_field("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = env_field("auto", "activation type; auto: bf16 on CUDA, fp32 on a CPU", choices=("auto", "bf16", "fp32"))
    compile: str = env_field("auto", "torch.compile; auto: on CUDA only", choices=("auto", "0", "1"))
    attention: str = env_field("auto", "attention kernel; auto: the best one there is",
                               choices=("auto", "fa3", "cudnn", "flash", "math"))
    # Data
    data_path: str = env_field("./data/datasets/fineweb10B_sp1024", "folder with fineweb_{train,val}_*.bin")
    tokenizer_path: str = env_field("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of that data")
    train_batch_tokens: int = env_field(786_432, "tokens of one optimiser step, over all ranks", lo=1)
    train_seq_len: int = env_field(2048, "tokens of a training sequence", lo=2)
    micro_batch_tokens: int = env_field(0, "most tokens of one forward pass; 0: 98,304 on CUDA, 4,096 on a CPU", lo=0)
    # Model
    vocab_size: int = env_field(1024, "tokens in the vocabulary", lo=2, hi=65536)
    num_layers: int = env_field(11, "transformer blocks", lo=1, hi=256)
    model_dim: int = env_field(512, "width of the residual stream", lo=2)
    num_heads: int = env_field(8, "query heads", lo=1)
    num_kv_heads: int = env_field(4, "key and value heads; divides NUM_HEADS", lo=1)
    mlp_mult: float = env_field(3.0, "MLP width over model width", lo=0.01, hi=64)
    leaky_slope: float = env_field(0.75, "negative slope of LeakyReLU, whose square is the activation", lo=0, hi=1)
    tie_embeddings: bool = env_field(True, "use the embedding table as output layer")
    tied_embed_init_std: float = env_field(0.005, "spread of the initial embedding", lo=0)
    rope_base: float = env_field(10_000.0, "base of the rotary frequencies", lo=1)
    rope_dims: int = env_field(16, "rotated dimensions a head; 0: all", lo=0)
    rope_train_seq_len: int = env_field(1024, "longer sequences stretch the rotary base (NTK); 1024 as PR 1092", lo=1)
    logit_softcap: float = env_field(30.0, "logits are cap*tanh(x/cap)", lo=1e-3)
    qk_gain_init: float = env_field(1.5, "initial gain of each query head", lo=0)
    ln_scale: bool = env_field(True, "scale normalised inputs by 1/sqrt(layer+1)")
    xsa_last_n: int = env_field(11, "exclusive self-attention on this many last layers", lo=0)
    bigram_vocab_size: int = env_field(2048, "buckets of the hashed bigram table; 0: none", lo=0)
    bigram_dim: int = env_field(128, "width of the bigram table", lo=1)
    trigram_vocab_size: int = env_field(0, "buckets of the hashed trigram table; 0: none", lo=0)
    trigram_dim: int = env_field(128, "width of the trigram table", lo=1)
    ve_enabled: bool = env_field(True, "add a shared token embedding to the values of VE_LAYERS")
    ve_dim: int = env_field(128, "width of the value embedding", lo=1, aliases=("VALUE_EMBED_DIM",))
    ve_layers: str = env_field("9,10", "layers (from 0) that get the value embedding, with commas")
    gated_attention: bool = env_field(False, "a learnt gate on each head's output")
    value_residual: bool = env_field(False, "mix the first layer's values into every later layer")
    dtg_enabled: bool = env_field(False, "a learnt gate on each block's update")
    mtp_num_heads: int = env_field(0, "extra heads that predict tokens further ahead; training only", lo=0, hi=16)
    mtp_loss_weight: float = env_field(0.2, "weight of their mean loss", lo=0)
    # Optimisers
    matrix_lr: float = env_field(0.025, "learning rate of the banks (Muon)", lo=0)
    scalar_lr: float = env_field(0.025, "learning rate of vectors, gates and small projections (AdamW)", lo=0)
    tied_embed_lr: float = env_field(0.035, "learning rate of the tables when embeddings are tied (AdamW)", lo=0)
    embed_lr: float = env_field(0.6, "learning rate of the tables when they are not", lo=0)
    head_lr: float = env_field(0.008, "learning rate of an untied output layer and of MTP heads", lo=0)
    muon_momentum: float = env_field(0.99, "momentum of Muon", lo=0, hi=0.9999)
    muon_momentum_warmup_start: float = env_field(0.92, "its first value", lo=0, hi=0.9999)
    muon_momentum_warmup_steps: int = env_field(1500, "steps from the first value to MUON_MOMENTUM", lo=0)
    muon_backend_steps: int = env_field(5, "Newton-Schulz iterations", lo=1, hi=20)
    muon_wd: float = env_field(0.04, "weight decay of the banks", lo=0, hi=10)
    normuon: bool = env_field(False, "even out the rows of Muon's update (PR 173); off in PR 1092")
    muon_beta2: float = env_field(0.95, "memory of those row norms; used with NORMUON=1 only", lo=0, hi=0.9999)
    adam_wd: float = env_field(0.04, "weight decay of AdamW, output heads excepted", lo=0, hi=10)
    beta1: float = env_field(0.9, "AdamW's first beta", lo=0, hi=0.9999)
    beta2: float = env_field(0.95, "AdamW's second beta", lo=0, hi=0.99999)
    adam_eps: float = env_field(1e-8, "AdamW's epsilon", lo=0, hi=1)
    grad_clip_norm: float = env_field(0.3, "norm the global gradient is clipped to; 0: not", lo=0)
    grad_quant: bool = env_field(False, "send bank gradients between ranks in bf16 instead of fp32")
    control_tensor_name_patterns: str = env_field(
        "", "name parts, with commas: further parameters kept as floats and trained as control tensors")
    # Schedule
    iterations: int = env_field(20_000, "most optimiser steps", lo=0)
    max_wallclock_seconds: float = env_field(600.0, "training stops here; 0: no limit", lo=0)
    warmup_steps: int = env_field(20, "steps that compile every graph and are then undone", lo=0)
    warmdown_iters: int = env_field(3500, "the learning rate falls to 0 over this many last steps", lo=0)
    warmdown_frac: float = env_field(0.0, "instead: over this last fraction of the budget; 0: use WARMDOWN_ITERS",
                                     lo=0, hi=1)
    min_lr: float = env_field(0.0, "with WARMDOWN_FRAC: lowest learning-rate scale", lo=0, hi=1)
    val_loss_every: int = env_field(4000, "steps between validations; 0: only at the end", lo=0)
    val_batch_size: int = env_field(524_288, "most tokens of one validation forward pass, over all ranks", lo=1)
    train_log_every: int = env_field(500, "steps between training log lines; 0: none", lo=0)
    checkpoint_every: int = env_field(1000, "steps between checkpoints; 0: none", lo=0)
    resume: bool = env_field(False, "go on from the checkpoint of RUN_ID")
    # Averaging
    ema_enabled: bool = env_field(True, "export an exponential average of the weights")
    ema_decay: float = env_field(0.997, "its decay a step; shorter memory in the first steps", lo=0, hi=0.99999)
    swa_enabled: bool = env_field(False, "export the mean of snapshots instead (collected, never used, in PR 1092)")
    swa_every: int = env_field(50, "steps between snapshots", lo=1)
    swa_start_frac: float = env_field(0.2, "snapshots start when the learning-rate scale falls below", lo=0, hi=1.01)
    lawa_enabled: bool = env_field(False, "export the mean of the last LAWA_K snapshots instead")
    lawa_k: int = env_field(10, "snapshots of LAWA", lo=1)
    lawa_freq: int = env_field(100, "steps between them", lo=1)
    # Quantisation and artifact
    qat_enabled: bool = env_field(False, "train on rounded weights from the first step")
    late_qat_threshold: float = env_field(0.15, "train on them once the learning-rate scale falls below; 0: never",
                                          lo=0, hi=1)
    late_qat_frac: float = env_field(0.0, "instead: once this fraction of the budget is spent; 0: not so", lo=0, hi=1)
    mlp_quant_bits: int = env_field(6, "bits of the MLP banks", lo=2, hi=8)
    attn_qat_bits: int = env_field(6, "bits of the attention banks", lo=2, hi=8, aliases=("ATTN_QUANT_BITS",))
    embed_bits: int = env_field(8, "bits of the token table and output layer", lo=2, hi=8)
    bigram_bits: int = env_field(8, "bits of the hashed tables", lo=2, hi=8)
    ve_bits: int = env_field(8, "bits of the value-embedding table", lo=2, hi=8)
    clip_rule: str = env_field("percentile", "how a row's largest code is placed", choices=("percentile", "amax"))
    int8_keep_float_fp32_name_patterns: str = env_field(
        "", "name parts, with commas: parameters stored as fp32 in the artifact")
    compress: str = env_field("auto", "entropy coder; auto: the smallest", choices=("auto", "zstd", "lzma"),
                              aliases=("COMPRESSOR",))
    artifact_limit_bytes: int = env_field(16_000_000, "code + artifact above this ends the run with an error", lo=1)
    # Evaluation
    eval_seq_len: int = env_field(2048, "tokens of an evaluation window; 0: TRAIN_SEQ_LEN", lo=0)
    eval_stride: int = env_field(64, "tokens newly scored by each sliding window; 0: no sliding evaluation", lo=0)
    eval_batch_seqs: int = env_field(32, "windows of one forward pass", lo=1)
    ttt_enabled: bool = env_field(True, "score once more with test-time training on what was scored before")
    ttt_optimizer: str = env_field("sgd", "what adapts the weights", choices=("sgd", "adamw"))
    ttt_lr: float = env_field(0.03, "its learning rate, a cosine over the chunks", lo=0)
    ttt_momentum: float = env_field(0.9, "momentum of sgd", lo=0, hi=0.9999)
    ttt_epochs: int = env_field(3, "passes over each scored chunk", lo=0)
    ttt_chunk_tokens: int = env_field(32_768, "tokens scored before each adaptation", lo=1)
    ttt_batch_seqs: int = env_field(32, "sequences of one adaptation step, a rank", lo=1)
    ttt_freeze_blocks: int = env_field(0, "first blocks that stay as they are", lo=0)
    ttt_grad_clip: float = env_field(1.0, "norm an adaptation gradient is clipped to; 0: not", lo=0)
    ttt_temp: float = env_field(1.0, "logits are divided by this while scoring with TTT", lo=1e-3)

    @property
    def train_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_train_*.bin")

    @property
    def val_files(self) -> str:
        return os.path.join(self.data_path, "fineweb_val_*.bin")

    @property
    def table_lr(self) -> float:
        """Learning rate of the embedding tables."""
        return self.tied_embed_lr if self.tie_embeddings else self.embed_lr

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def mlp_dim(self) -> int:
        return int(self.mlp_mult * self.model_dim)

    @property
    def window(self) -> int:
        """Tokens of an evaluation window."""
        return self.eval_seq_len or self.train_seq_len

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        return tuple(int(part) for part in self.ve_layers.split(",") if part.strip()) if self.ve_enabled else ()

    @classmethod
    def from_env(cls, environ=None) -> Hyperparameters:
        """Settings from a mapping of variables, by default the process's own.

        Raises UserError on a bad value, a near miss of a name or a contradiction.
        """
        environ = os.environ if environ is None else environ
        refuse_near_misses(environ)
        values = {}
        for f in dataclasses.fields(cls):
            given = [name for name in env_names(f) if name in environ]
            parsed = {name: parse_value(name, f, environ[name]) for name in given}
            if len(set(parsed.values())) > 1:
                raise UserError(f"{' and '.join(given)} are one setting and were given different values")
            if given:
                values[f.name] = parsed[given[0]]
        cfg = cls(**values)
        check_combinations(cfg)
        return cfg

    def non_defaults(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


def env_names(f: dataclasses.Field) -> tuple[str, ...]:
    return (f.name.upper(), *f.metadata["aliases"])


def parse_value(name: str, f: dataclasses.Field, text: str):
    """The value of one variable, checked for type and range."""
    meta, kind = f.metadata, f.type
    try:
        if kind == "bool":
            value = {"0": False, "1": True}[text.strip()]
        else:
            value = {"int": lambda t: int(t.replace("_", "")), "float": float, "str": str}[kind](text)
    except (ValueError, KeyError):
        wanted = {"bool": "0 or 1", "int": "a whole number", "float": "a number"}[kind]
        raise UserError(f"{name}={text!r} is not {wanted}") from None
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name}={text!r} is not one of {', '.join(meta['choices'])}")
    lo, hi = meta["lo"], meta["hi"]
    if kind == "float" and not math.isfinite(value) or lo is not None and value < lo or hi is not None and value > hi:
        raise UserError(f"{name}={text} is out of range: {describe_range(f)}")
    return value


def describe_range(f: dataclasses.Field) -> str:
    meta = f.metadata
    if meta["choices"]:
        return ", ".join(meta["choices"])
    if f.type == "bool":
        return "0, 1"
    if meta["hi"] is not None:
        return f"{meta['lo']} to {meta['hi']}"
    return f"{meta['lo']} or more" if meta["lo"] is not None else "text"


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, with a swap of neighbours counted as one edit."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(rows[i - 1][j] + 1, row[j - 1] + 1, rows[i - 1][j - 1] + (x != y)))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                row[j] = min(row[j], rows[i - 2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def refuse_near_misses(environ) -> None:
    """A variable one or two letters away from a setting is a typing error, not somebody else's variable."""
    known = [name for f in dataclasses.fields(Hyperparameters) for name in env_names(f)]
    for name in sorted(set(environ) - set(known)):
        reach = 2 if len(name) >= 8 else 1  # short names of other programs are easily two letters away
        near = [k for k in known if abs(len(k) - len(name)) <= reach and edit_distance(name, k) <= reach]
        if len(name) >= 5 and near:
            raise UserError(f"{name} is not a setting; did you mean {near[0]}? (python train_gpt.py --help lists all)")


def check_combinations(cfg: Hyperparameters) -> None:
    """Raise UserError where settings contradict each other."""
    def demand(holds: bool, message: str) -> None:
        if not holds:
            raise UserError(message)

    demand(cfg.model_dim % cfg.num_heads == 0,
           f"MODEL_DIM={cfg.model_dim} is not divisible by NUM_HEADS={cfg.num_heads}")
    demand(cfg.num_heads % cfg.num_kv_heads == 0,
           f"NUM_HEADS={cfg.num_heads} is not divisible by NUM_KV_HEADS={cfg.num_kv_heads}")
    demand(cfg.rope_dims % 2 == 0 and (cfg.rope_dims or cfg.head_dim) % 2 == 0,
           f"ROPE_DIMS={cfg.rope_dims or cfg.head_dim} is odd; rotation works on pairs")
    demand(cfg.rope_dims <= cfg.head_dim, f"ROPE_DIMS={cfg.rope_dims} is more than a head's {cfg.head_dim} dimensions")
    for name in ("bigram_vocab_size", "trigram_vocab_size"):
        demand(getattr(cfg, name) != 1, f"{name.upper()}=1 leaves no bucket; use 0 or at least 2")
    try:
        ids = cfg.ve_layer_ids
    except ValueError:
        raise UserError(f"VE_LAYERS={cfg.ve_layers!r} is not a list of layer numbers like 9,10") from None
    demand(all(0 <= i < cfg.num_layers for i in ids) and len(set(ids)) == len(ids),
           f"VE_LAYERS={cfg.ve_layers} names a layer twice or outside 0..{cfg.num_layers - 1}")
    demand(cfg.train_batch_tokens % cfg.train_seq_len == 0,
           f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} is not divisible by TRAIN_SEQ_LEN={cfg.train_seq_len}")
    demand(cfg.eval_stride <= cfg.window, f"EVAL_STRIDE={cfg.eval_stride} is longer than a window of {cfg.window}")
    demand(not cfg.ttt_enabled or cfg.ttt_chunk_tokens >= cfg.train_seq_len,
           f"TTT_CHUNK_TOKENS={cfg.ttt_chunk_tokens} holds no sequence of TRAIN_SEQ_LEN={cfg.train_seq_len} to learn from")
    demand(cfg.iterations > 0 or not cfg.resume, "RESUME=1 with ITERATIONS=0: nothing to resume")
    demand(not cfg.resume or bool(cfg.run_id), "RESUME=1 needs the RUN_ID of the run to go on with")
    demand(re.fullmatch(r"[\w.+-]*", cfg.run_id) is not None,
           f"RUN_ID={cfg.run_id!r} names files: letters, digits and . _ + - only")


SECTIONS = {"run_id": "Run", "data_path": "Data", "vocab_size": "Model", "matrix_lr": "Optimisers",
            "iterations": "Schedule", "ema_enabled": "Averaging", "qat_enabled": "Quantisation and artifact",
            "eval_seq_len": "Evaluation"}  # the first setting of each


def settings_by_section() -> dict[str, list[dataclasses.Field]]:
    sections = {}
    for f in dataclasses.fields(Hyperparameters):
        if f.name in SECTIONS:
            sections[SECTIONS[f.name]] = current = []
        current.append(f)
    return sections


def config_table(markdown: bool = False) -> str:
    """The settings as a table: what --help prints and what README shows."""
    lines = []
    for section, fields in settings_by_section().items():
        lines += ([f"**{section}**", "", "| variable | default | range | meaning |", "|---|---|---|---|"] if markdown
                  else [section])
        for f in fields:
            default, names = int(f.default) if f.type == "bool" else f.default, " = ".join(env_names(f))
            lines.append(f"| `{names}` | `{default}` | {describe_range(f)} | {f.metadata['help']} |" if markdown
                         else f"  {names:<34} {default!s:<10} {f.metadata['help']} [{describe_range(f)}]")
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ RUNTIME
def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: on any failure the old file survives. Raises UserError."""
    spare = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(spare, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(spare, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.unlink()
        raise UserError(f"cannot write {path} ({len(data):,} bytes): {error.strerror}") from None


class RunLog:
    """Console and logs/RUN_ID.txt for people, logs/RUN_ID.jsonl for programs; silent on ranks other than 0."""

    def __init__(self, folder: Path, run_id: str, active: bool = True, append: bool = False):
        self.base, self.active, self.broken = folder / "logs" / run_id, active, False
        if active:
            try:
                self.base.parent.mkdir(parents=True, exist_ok=True)
                for kind in (".txt", ".jsonl"):
                    open(self.path(kind), "a" if append else "w").close()
            except OSError as error:
                raise UserError(f"cannot write logs to {self.base.parent}: {error.strerror}") from None

    def path(self, kind: str) -> Path:
        return self.base.with_name(self.base.name + kind)

    def __call__(self, text: str, event: str = "", console: bool = True, **fields) -> None:
        """One line for people; with an event name, one JSON object for programs as well."""
        if not self.active:
            return
        if console:
            print(text, flush=True)
        self._append(".txt", text)
        if event:
            self._append(".jsonl", json.dumps({"event": event, "time": round(time.time(), 3), **fields}))

    def _append(self, kind: str, text: str) -> None:
        try:
            with open(self.path(kind), "a", encoding="utf-8") as f:
                f.write(text + "\n")
        except OSError as error:  # a full disk must not end a training run that may still be saved elsewhere
            if not self.broken:
                print(f"warning: log {self.path(kind)} is incomplete: {error.strerror}", file=sys.stderr)
            self.broken = True

    def progress(self, total: int, what: str):
        """A progress bar on a terminal; elsewhere an object that does nothing."""
        if self.active and sys.stderr.isatty():
            with contextlib.suppress(ImportError):
                from tqdm import tqdm
                return tqdm(total=total, desc=what, leave=False, unit="win")
        return _NoProgress()


class _NoProgress:
    def update(self, n: int = 1) -> None:
        pass

    def set_postfix_str(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class Stopwatch:
    """Seconds of work, without the spans spent inside `paused()`. `now` is replaceable in tests."""

    def __init__(self, spent: float = 0.0, now=time.perf_counter):
        self.now, self.start = now, now() - spent

    def elapsed(self) -> float:
        return self.now() - self.start

    @contextlib.contextmanager
    def paused(self):
        before = self.now()
        yield
        self.start += self.now() - before


def attend_math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out in fp32: the reference of every other back end.

    q: [batch, Tq, heads, d]; k, v: [batch, Tk, kv_heads, d]; query i stands at position Tk - Tq + i;
    query head h reads kv head h // (heads / kv_heads). Returns [batch, Tq, heads, d].
    """
    group = q.size(2) // k.size(2)
    k, v = (t.repeat_interleave(group, dim=2).float() for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~causal_mask(q.size(1), k.size(1), q.device), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


def causal_mask(queries: int, keys: int, device) -> Tensor:
    """True where a query may look; the last query stands at the last key.  # [queries, keys]"""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend_math` by PyTorch's fused kernels, which take grouped kv heads as they are."""
    square = q.size(1) == k.size(1)
    mask = None if square else causal_mask(q.size(1), k.size(1), q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, enable_gqa=True)
    return y.transpose(1, 2)


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype):
    """(name, function) of the attention back end: FlashAttention 3, cuDNN or flash SDPA, math - in that order."""
    if wanted == "math":
        return "math", attend_math
    if wanted in ("auto", "fa3") and device.type == "cuda" and dtype == torch.bfloat16:
        with contextlib.suppress(ImportError):
            from flash_attn_interface import flash_attn_func
            if torch.cuda.get_device_capability(device)[0] == 9:  # its kernels are Hopper's
                def attend_fa3(q, k, v):
                    out = flash_attn_func(q, k, v, causal=True)
                    return out[0] if isinstance(out, tuple) else out
                return "fa3", attend_fa3
    if wanted == "fa3":
        raise UserError("ATTENTION=fa3 needs a Hopper GPU, bf16 and the package flash_attn_interface")
    if device.type == "cpu":
        if wanted == "cudnn":
            raise UserError("ATTENTION=cudnn needs CUDA")
        return "flash", attend_sdpa
    name = "cudnn" if wanted in ("auto", "cudnn") and torch.backends.cudnn.is_available() else "flash"
    torch.backends.cuda.enable_cudnn_sdp(name == "cudnn")
    torch.backends.cuda.enable_flash_sdp(name == "flash")
    torch.backends.cuda.enable_math_sdp(dtype == torch.float32)  # the fused kernels take half precision only
    return name, attend_sdpa


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Runtime:
    """Where the run happens. The only place that knows of ranks, devices and kernels."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    compiles: bool
    attention: str
    attend: object
    run_id: str
    folder: Path
    log: RunLog
    cpu_group: object = None
    in_flight: collections.deque = dataclasses.field(default_factory=collections.deque)  # end-of-step events

    @classmethod
    def open(cls, cfg: Hyperparameters) -> Runtime:
        """Join the process group, choose device, precision and kernels, open the log. Raises UserError."""
        rank, world_size, local_rank = (
            int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("DEVICE=cuda was asked for, but this PyTorch sees no CUDA device")
        on_cuda = cfg.device != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        dtype = {"auto": torch.bfloat16 if on_cuda else torch.float32,
                 "bf16": torch.bfloat16, "fp32": torch.float32}[cfg.dtype]
        attention, attend = pick_attention(cfg.attention, device, dtype)
        cpu_group = None
        if world_size > 1:
            dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
            cpu_group = dist.new_group(backend="gloo") if on_cuda else dist.group.WORLD
        names = [cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"]
        if world_size > 1:
            dist.broadcast_object_list(names, src=0, group=cpu_group)
        folder = Path(cfg.artifact_dir)
        log = RunLog(folder, names[0], active=rank == 0, append=cfg.resume)
        return cls(rank, world_size, device, dtype, {"auto": on_cuda, "0": False, "1": True}[cfg.compile],
                   attention, attend, names[0], folder, log, cpu_group)

    def close(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()

    def compiled(self, function):
        return torch.compile(function, dynamic=False, fullgraph=True) if self.compiles else function

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_many_(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sum each of many small tensors over ranks, in place, in one transfer."""
        if self.world_size > 1:
            flat = self.sum_(torch.cat([t.reshape(-1) for t in tensors]))
            torch._foreach_copy_(tensors, [part.view_as(t) for part, t in
                                           zip(flat.split([t.numel() for t in tensors]), tensors)])
        return tensors

    def launch_reduce_scatter(self, whole: Tensor) -> tuple[Tensor, object]:
        """Start to sum [n*world, ...] over ranks: (this rank's n slices once done, handle for `wait`)."""
        shard = whole.new_empty(len(whole) // self.world_size, *whole.shape[1:])
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # renamed in torch 2.13
        return shard, collective(shard, whole, async_op=True)

    def launch_all_gather(self, shard: Tensor) -> tuple[Tensor, object]:
        """Start to gather every rank's slices: (all of them once done, handle for `wait`)."""
        if self.world_size == 1:
            return shard, None
        whole = shard.new_empty(len(shard) * self.world_size, *shard.shape[1:])
        collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return whole, collective(whole, shard, async_op=True)

    def wait(self, started: tuple[Tensor, object]) -> Tensor:
        tensor, handle = started
        if handle is not None:
            handle.wait()
        return tensor

    def keep_pace(self) -> None:
        """Let the device be one step behind, not more: the clock then tells the truth without emptying the queue."""
        if self.device.type == "cuda":
            self.in_flight.append(torch.cuda.Event())
            self.in_flight[-1].record()
            if len(self.in_flight) > 1:
                self.in_flight.popleft().synchronize()

    def peak_memory_line(self) -> str:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            return "peak memory allocated: {} MiB reserved: {} MiB".format(*(b // 2 ** 20 for b in peak))
        return f"peak memory resident: {peak_rss_bytes() // 2 ** 20} MiB"

    def agree(self, value: float) -> float:
        """Rank 0's value on every rank, without touching the device: clocks differ, decisions must not."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        dist.broadcast(box, src=0, group=self.cpu_group)
        return box.item()

    def share_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank."""
        box = [data]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def share_of(self, count: int) -> range:
        """This rank's contiguous part of `count` things."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


# ------------------------------------------------------------------------------------------------ DATA
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024


def open_shard(path: str) -> np.ndarray:
    """The tokens of a shard, memory-mapped: 256 little-endian int32 of header, then uint16 ids. Raises UserError."""
    size = os.path.getsize(path)
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
        raise UserError(f"{path} is not a token shard (wrong magic or version); make it with data/prepare.py")
    count = int(header[2])
    if count <= 0 or size != SHARD_HEADER_BYTES + 2 * count:
        raise UserError(f"{path} is damaged: its header promises {count:,} tokens, "
                        f"its size of {size:,} bytes holds {(size - SHARD_HEADER_BYTES) // 2:,}; fetch it again")
    return np.memmap(path, dtype="<u2", mode="r", offset=SHARD_HEADER_BYTES, shape=(count,))


class TokenStream:
    """All shards of a pattern, in the order of their names, as one endless stream of ids below vocab_size."""

    def __init__(self, pattern: str, vocab_size: int):
        folder = os.path.dirname(pattern)
        if not os.path.isdir(folder):
            raise UserError(f"there is no data folder {folder}; `bash run.sh data` makes one, DATA_PATH names another")
        self.paths = sorted(p for p in glob.glob(pattern) if "_bytes_" not in os.path.basename(p))
        if not self.paths:
            raise UserError(f"no shard matches {pattern}")
        self.shards = [open_shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start`, going round at the end.  # int32 [count]"""
        parts, position = [], start % len(self)
        while count > 0:
            index = int(np.searchsorted(self.ends, position, side="right"))
            shard, offset = self.shards[index], position - int(self.ends[index]) + len(self.shards[index])
            part = shard[offset:offset + count]
            if int(part.max()) >= self.vocab_size:
                raise UserError(f"{self.paths[index]} holds token {int(part.max())}, but VOCAB_SIZE={self.vocab_size}")
            parts.append(part)
            count, position = count - len(part), (position + len(part)) % len(self)
        return np.concatenate(parts).astype(np.int32)


@dataclass(frozen=True)
class TrainData:
    """Batches as a pure function of the step: nothing to rewind after warm-up, nothing to store in a checkpoint.

    A step reads one contiguous span; row i of the global batch is its i-th sequence, whatever the world size.
    """

    stream: TokenStream
    seq_len: int
    batch_tokens: int
    micro_steps: int
    rt: Runtime

    @classmethod
    def open(cls, cfg: Hyperparameters, rt: Runtime) -> TrainData:
        rows = cfg.train_batch_tokens // cfg.train_seq_len
        if rows % rt.world_size:
            raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} is {rows} sequences of "
                            f"{cfg.train_seq_len}, not divisible by {rt.world_size} ranks")
        most = cfg.micro_batch_tokens or (98_304 if rt.device.type == "cuda" else 4096)
        rows //= rt.world_size
        micro_steps = next(n for n in range(1, rows + 1)
                           if rows % n == 0 and (rows // n * cfg.train_seq_len <= most or n == rows))
        return cls(TokenStream(cfg.train_files, cfg.vocab_size), cfg.train_seq_len, cfg.train_batch_tokens,
                   micro_steps, rt)

    def batch(self, step: int):
        """Yields this rank's micro-batches of a step: inputs and targets.  # int64 [rows, seq_len] each"""
        rows = self.rt.share_of(self.batch_tokens // self.seq_len)
        start = step * self.batch_tokens + rows.start * self.seq_len
        span = torch.from_numpy(self.stream.read(start, len(rows) * self.seq_len + 1))
        if self.rt.device.type == "cuda":
            span = span.pin_memory().to(self.rt.device, non_blocking=True)
        span = span.long()
        inputs, targets = (t.view(self.micro_steps, -1, self.seq_len) for t in (span[:-1], span[1:]))
        yield from zip(inputs, targets)


@dataclass(frozen=True)
class ByteTable:
    """What each token adds to the decoded text, in UTF-8 bytes."""

    length: Tensor    # int64 [vocab]: bytes of the piece without its leading space mark
    spaced: Tensor    # bool [vocab]: the piece starts with a space mark
    silent: Tensor    # bool [vocab]: control, unknown or unused; a space right after one is not decoded

    @classmethod
    def of(cls, tokenizer, vocab_size: int, device) -> ByteTable:
        length, spaced, silent = [0] * vocab_size, [False] * vocab_size, [True] * vocab_size
        for i in range(vocab_size):
            if tokenizer.is_control(i) or tokenizer.is_unknown(i) or tokenizer.is_unused(i):
                continue
            piece = tokenizer.id_to_piece(i)
            silent[i], spaced[i] = False, piece.startswith("\u2581") and not tokenizer.is_byte(i)
            length[i] = 1 if tokenizer.is_byte(i) else len(piece[spaced[i]:].encode())
        return cls(torch.tensor(length, device=device), torch.tensor(spaced, device=device),
                   torch.tensor(silent, device=device))

    def count(self, previous: Tensor, target: Tensor) -> Tensor:
        """Bytes each target adds after its predecessor. Any shape of ids -> int64 of that shape."""
        return self.length[target] + (self.spaced[target] & ~self.silent[previous])


@dataclass(frozen=True)
class ValData:
    """The validation text and what its tokens weigh in bytes."""

    tokens: Tensor     # int32 [n]
    byte_table: ByteTable
    tokenizer_sha256: str

    @classmethod
    def open(cls, cfg: Hyperparameters, rt: Runtime) -> ValData:
        tokenizer, digest = open_tokenizer(cfg)
        stream = TokenStream(cfg.val_files, cfg.vocab_size)
        if len(stream) < cfg.window + 1:
            raise UserError(f"validation text has {len(stream):,} tokens, "
                            f"fewer than one window of EVAL_SEQ_LEN={cfg.window} and its target")
        tokens = torch.from_numpy(stream.read(0, len(stream))).to(rt.device)
        return cls(tokens, ByteTable.of(tokenizer, cfg.vocab_size, rt.device), digest)


def open_tokenizer(cfg: Hyperparameters):
    """(SentencePiece processor, sha256 of its file). Raises UserError."""
    import sentencepiece
    try:
        blob = Path(cfg.tokenizer_path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {cfg.tokenizer_path}: {error.strerror}; TOKENIZER_PATH names it") from None
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        tokenizer.LoadFromSerializedProto(blob)
        size = tokenizer.vocab_size()
    except RuntimeError:
        size = 0
    if size == 0:
        raise UserError(f"{cfg.tokenizer_path} is not a SentencePiece model")
    if size != cfg.vocab_size:
        raise UserError(f"VOCAB_SIZE={cfg.vocab_size}, but tokenizer {cfg.tokenizer_path} has {size} pieces")
    if tokenizer.is_unknown(tokenizer.piece_to_id("\u2581")):
        raise UserError(f"{cfg.tokenizer_path} has no piece for a space: bytes could not be counted")
    return tokenizer, hashlib.sha256(blob).hexdigest()


# ------------------------------------------------------------------------------------------------ METRIC
class BpbMeter:
    """Sums nats, tokens and bytes in float64: the one place where bits per byte are made."""

    def __init__(self, byte_table: ByteTable):
        self.byte_table = byte_table
        self.sums = torch.zeros(3, dtype=torch.float64, device=byte_table.length.device)  # nats, tokens, bytes

    def add(self, nll: Tensor, previous: Tensor, target: Tensor, counted: Tensor) -> None:
        """Per-token nll in nats, ids before and of each token, and which to count; all of one shape."""
        nats = torch.where(counted, nll.double(), 0.0).sum()
        size = torch.where(counted, self.byte_table.count(previous, target), 0).sum()
        self.sums += torch.stack((nats, counted.sum().double(), size.double()))

    def reduce(self, rt: Runtime) -> tuple[float, float, int, int]:
        """(nats per token, bits per byte, tokens, bytes) over all ranks; the meter itself stays this rank's."""
        nats, tokens, size = rt.sum_(self.sums.clone()).tolist()
        return nats / max(tokens, 1), nats / math.log(2) / max(size, 1), int(tokens), int(size)


# ------------------------------------------------------------------------------------------------ QUANTISER
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # PR 1092's candidates for a row's clip
SCALE_FLOOR = 2.0 ** -20  # keeps rows of zeros defined; far below any trained row, so it shapes nothing
# (PR 1092 floors scales at 1/31, which forces most rows onto one coarse grid.)


@dataclass(frozen=True)
class QuantSpec:
    """How one family is rounded: signed codes of `bits` with one fp16 scale a row."""

    bits: int
    clip: str = "percentile"

    @property
    def top(self) -> int:
        """The largest code; codes are symmetric, so that rounding has no bias."""
        return 2 ** (self.bits - 1) - 1


def upper_quantile(magnitudes: Tensor, share: float) -> Tensor:
    """Linear-interpolated quantile of each row, for shares near 1: a few largest values instead of a sort."""
    position = share * (magnitudes.size(-1) - 1)
    below = math.floor(position)
    largest = magnitudes.topk(magnitudes.size(-1) - below, dim=-1).values  # [..., rows, few], descending
    low, high = largest[..., -1:], largest[..., -2:-1] if below + 1 < magnitudes.size(-1) else largest[..., -1:]
    return low + (high - low) * (position - below)


def round_to(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """The one rounding: nearest code, ties to even, clipped.  # float, same shape as weight"""
    return (weight / scale).round().clamp(-spec.top, spec.top)


def row_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """fp16-exact scale of each row by the spec's clip rule.  # float32 [..., rows, 1]"""
    magnitudes = weight.abs()
    shares = PERCENTILES if spec.clip == "percentile" else (1.0,)
    best = best_error = None
    for share in shares:
        scale = (upper_quantile(magnitudes, share) / spec.top).clamp(min=SCALE_FLOOR).half().float()
        if len(shares) == 1:
            return scale
        error = (round_to(weight, scale, spec) * scale - weight).square().sum(-1, keepdim=True)
        better = True if best is None else error < best_error
        best = scale if best is None else torch.where(better, scale, best)
        best_error = error if best_error is None else torch.where(better, error, best_error)
    return best


def quantise(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """(int8 codes [..., rows, columns], fp16 scales [..., rows, 1]) of a float weight."""
    scale = row_scales(weight.float(), spec)
    return round_to(weight.float(), scale, spec).to(torch.int8), scale.half()


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * scales.float()


def fake_quantise(weight: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """With scale = row_scales(weight): dequantise(*quantise(weight)), and the identity to the gradient."""
    with torch.no_grad():
        rounded = round_to(weight, scale, spec) * scale
    return rounded + (weight - weight.detach())  # the bracket is exactly 0 and carries the gradient


# ------------------------------------------------------------------------------------------------ MODEL
BIGRAM_FACTORS, BIGRAM_SCALE = (36313, 27191), 0.05            # PR 1092: factors of the token and its predecessors,
TRIGRAM_FACTORS, TRIGRAM_SCALE = (36313, 27191, 51497), 0.03   # and the initial scale of the table's output
VALUE_SCALE = 0.1
CE_CHUNK_ROWS = 1024  # rows of logits alive at a time: enough to feed a matrix unit, little enough to stay cached


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),))


def rope_table(length: int, dims: int, cfg: Hyperparameters, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, in fp32.  # [length, dims/2] each

    Past the trained length the base grows (NTK). PR 1092 fixes that length at 1024 while it trains on 2048,
    so its base is always stretched to 22,082; ROPE_TRAIN_SEQ_LEN=1024 keeps that.
    """
    base = cfg.rope_base
    if length > cfg.rope_train_seq_len and dims > 2:
        base *= (length / cfg.rope_train_seq_len) ** (dims / (dims - 2))
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head as pairs (i, i + half); the rest passes.  # [batch, T, heads, d]"""
    half = cos.size(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def subtract_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention: remove from each head's output its part along the position's own value.

    y: [batch, T, heads, d], v: [batch, T, kv_heads, d] -> [batch, T, heads, d].
    """
    y = y.unflatten(2, (v.size(2), -1))                  # [batch, T, kv_heads, group, d]
    axis = F.normalize(v, dim=-1).unsqueeze(-2)          # [batch, T, kv_heads, 1, d]
    return (y - (y * axis).sum(-1, keepdim=True) * axis).flatten(2, 3)


def capped_logits(hidden: Tensor, weight: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(hidden weight^T / softcap) in fp32.  # [..., vocab]"""
    return softcap * torch.tanh(F.linear(hidden, weight).float() / softcap)


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, in nats, that never holds the logits of the whole batch.

    The gradient is made chunk by chunk in the forward pass, while the chunk's logits are at hand; the backward pass
    only scales it. hidden: [N, dim], weight: [vocab, dim], targets: int64 [N].
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_hidden = []
        for rows, wanted in zip(hidden.split(CE_CHUNK_ROWS), targets.unsqueeze(1).split(CE_CHUNK_ROWS)):
            curve = F.linear(rows, weight).float().div_(softcap).tanh_()
            logits = curve * softcap
            partition = logits.logsumexp(-1, keepdim=True)
            total += (partition - logits.gather(1, wanted)).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad = logits.sub_(partition).exp_()                              # softmax,
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0))   # less the one-hot target,
            grad.mul_(curve.square_().neg_().add_(1)).div_(len(hidden))       # times d softcap / d logit
            grad = grad.to(hidden.dtype)
            if wants_hidden:
                grad_hidden.append(grad @ weight)
            if wants_weight:
                grad_weight += grad.t() @ rows
        ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else None,
                              None if grad_weight is None else grad_weight.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *(None if grad is None else grad * upstream for grad in ctx.saved_tensors), None, None


def project(x: Tensor, weight) -> Tensor:
    """x weight^T. Instead of a plain matrix, `weight` may be a function of x that wraps one: see `GPT.hidden`."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight(x)


class SmearGate(nn.Module):
    """Each position takes a learnt share of its predecessor, dimension by dimension; half at the start."""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        share = torch.sigmoid(self.gate).to(x.dtype)
        return x + share * (F.pad(x, (0, 0, 1, 0))[:, :-1] - x)


class Table(nn.Module):
    """A narrow embedding table, a projection to `width` where needed, and a learnt scale."""

    def __init__(self, rows: int, dim: int, width: int, scale: float):
        super().__init__()
        self.embed = nn.Embedding(rows, dim)
        self.proj = nn.Linear(dim, width, bias=False) if dim != width else None
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, index: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        x = F.embedding(index, table).to(dtype)
        if self.proj is not None:
            x = F.linear(x, self.proj.weight.to(dtype))
        return x * self.scale.to(dtype)


def hash_ngrams(ids: Tensor, factors: tuple[int, ...], buckets: int) -> Tensor:
    """Bucket of each position's n-gram, n = len(factors); the first n-1 positions share the last bucket.

    XOR of factor_j * id_{t-j}, in int32 as published, modulo buckets - 1.  # [batch, T] -> int64 [batch, T]
    """
    ids, reach = ids.int(), len(factors) - 1
    length = ids.size(1)
    mixed = ids[:, reach:] * factors[0]
    for back, factor in enumerate(factors[1:], 1):
        mixed = mixed ^ (ids[:, reach - back:length - back] * factor)
    return F.pad(mixed % (buckets - 1), (min(reach, length), 0), value=buckets - 1).long()


LayerWeights = collections.namedtuple("LayerWeights", "query key value out up down")  # one layer's slices of the banks


class Attention(nn.Module):
    """Grouped-query attention with normalised queries and keys, partial RoPE and exclusive self-attention."""

    def __init__(self, cfg: Hyperparameters, layer: int, attend):
        super().__init__()
        self.heads, self.kv_heads, self.attend = cfg.num_heads, cfg.num_kv_heads, attend
        self.exclusive = layer >= cfg.num_layers - cfg.xsa_last_n
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init))
        self.attn_gate = nn.Linear(cfg.model_dim, cfg.num_heads) if cfg.gated_attention else None
        self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5])) if cfg.value_residual and layer > 0 else None

    def forward(self, x, weights, rope, value_embedding, first_value, keep: int):
        """Output of the last `keep` positions [batch, keep, dim] and this layer's values before mixing."""
        query_w, key_w, value_w, out_w = weights
        cos, sin = rope
        recent = x[:, -keep:]
        q = norm(project(recent, query_w).unflatten(-1, (self.heads, -1)))
        k = norm(project(x, key_w).unflatten(-1, (self.kv_heads, -1)))
        value = project(x, value_w)
        if value_embedding is not None:
            value = value + value_embedding
        value = value.unflatten(-1, (self.kv_heads, -1))
        v = value
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(x.dtype)
            v = mix[0] * first_value + mix[1] * value
        q = rotate(q, cos[-keep:], sin[-keep:]) * self.q_gain.to(x.dtype)[:, None]
        y = self.attend(q, rotate(k, cos, sin), v)                              # [batch, keep, heads, d]
        if self.exclusive:
            y = subtract_own_value(y, v[:, -keep:])
        if self.attn_gate is not None:
            gate = F.linear(recent, self.attn_gate.weight.to(x.dtype), self.attn_gate.bias.to(x.dtype))
            y = y * torch.sigmoid(gate).unsqueeze(-1)
        return project(y.flatten(2), out_w), value


class Block(nn.Module):
    """Attention and a LeakyReLU² MLP around a residual stream that mixes in the embedding."""

    def __init__(self, cfg: Hyperparameters, layer: int, attend):
        super().__init__()
        self.attn = Attention(cfg, layer, attend)
        self.attn_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.mlp_scale = nn.Parameter(torch.ones(cfg.model_dim))
        self.resid_mix = nn.Parameter(torch.stack((torch.ones(cfg.model_dim), torch.zeros(cfg.model_dim))))
        self.dtg_gate = nn.Linear(cfg.model_dim, 1) if cfg.dtg_enabled else None
        self.norm_scale = (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        self.slope = cfg.leaky_slope

    def forward(self, x, x0, weights: LayerWeights, rope, value_embedding, first_value, keep: int):
        """Last `keep` positions of the stream after this block, and the attention's values."""
        mix = self.resid_mix.to(x.dtype)
        x = mix[0] * x + mix[1] * x0
        y, value = self.attn(norm(x) * self.norm_scale, weights[:4], rope, value_embedding, first_value, keep)
        x = x[:, -keep:]
        out = x + self.attn_scale.to(x.dtype) * y
        y = F.leaky_relu(project(norm(out) * self.norm_scale, weights.up), self.slope).square()
        out = out + self.mlp_scale.to(x.dtype) * project(y, weights.down)
        if self.dtg_gate is not None:
            gate = F.linear(x.detach(), self.dtg_gate.weight.to(x.dtype), self.dtg_gate.bias.to(x.dtype))
            out = x + torch.sigmoid(gate) * (out - x)
        return out, value


class GPT(nn.Module):
    """The language model. All large matrices lie in four banks, so that the optimiser can batch them.

    qo_bank [2L, dim, dim]: L query then L output matrices; kv_bank [2L, kv_dim, dim]: keys then values;
    mlp_up_bank [L, mlp, dim]; mlp_down_bank [L, dim, mlp]; each matrix as [out, in].

    `qat_specs` maps parameter names to the QuantSpec they are exported with; a call with qat=True sees those weights
    rounded so, on the scales of the last `refresh_scales`. The switch is an argument, so that a compiled graph cannot
    overlook it (PR 1092's flag was folded at the first trace, and its banks never looked at it).
    """

    def __init__(self, cfg: Hyperparameters, attend=attend_sdpa, dtype: torch.dtype = torch.float32, qat_specs=None):
        super().__init__()
        self.cfg, self.dtype = cfg, dtype
        self.qat_specs, self.qat_scales = dict(qat_specs or {}), {}
        layers, dim, kv_dim = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.tok_emb = nn.Embedding(cfg.vocab_size, dim)
        self.bigram = (Table(cfg.bigram_vocab_size, cfg.bigram_dim, dim, BIGRAM_SCALE)
                       if cfg.bigram_vocab_size else None)
        self.trigram = (Table(cfg.trigram_vocab_size, cfg.trigram_dim, dim, TRIGRAM_SCALE)
                        if cfg.trigram_vocab_size else None)
        self.smear = SmearGate(dim)
        self.skip_weights = nn.Parameter(torch.ones(layers // 2, dim))
        self.qo_bank = nn.Parameter(torch.empty(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.empty(2 * layers, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.empty(layers, cfg.mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.empty(layers, dim, cfg.mlp_dim))
        self.blocks = nn.ModuleList(Block(cfg, layer, attend) for layer in range(layers))
        self.ve_shared = Table(cfg.vocab_size, cfg.ve_dim, kv_dim, VALUE_SCALE) if cfg.ve_layer_ids else None
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in cfg.ve_layer_ids)
        self.lm_head = None if cfg.tie_embeddings else nn.Linear(dim, cfg.vocab_size, bias=False)
        self.mtp_heads = nn.ModuleList(nn.Linear(dim, cfg.vocab_size, bias=False) for _ in range(cfg.mtp_num_heads))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Queries, keys, values, MLP-up and small projections orthogonal; attention-out, MLP-down, output heads,
        hashed tables zero; token table N(0, TIED_EMBED_INIT_STD) if tied, else N(0, 1); value table N(0, 0.01);
        attention gate open (bias 4), block gate fairly open (bias 2). Vectors are set where they are declared."""
        layers = self.cfg.num_layers
        for matrix in (*self.qo_bank[:layers], *self.kv_bank, *self.mlp_up_bank):
            nn.init.orthogonal_(matrix)
        for zeroed in (self.qo_bank[layers:], self.mlp_down_bank, *(head.weight for head in self.mtp_heads)):
            zeroed.zero_()
        self.tok_emb.weight.normal_(std=self.cfg.tied_embed_init_std if self.cfg.tie_embeddings else 1.0)
        for table, std in ((self.bigram, 0.0), (self.trigram, 0.0), (self.ve_shared, 0.01)):
            if table is not None:
                table.embed.weight.normal_(std=std)
                if table.proj is not None:
                    nn.init.orthogonal_(table.proj.weight)
        if self.lm_head is not None:
            self.lm_head.weight.zero_()
        for block in self.blocks:
            for gate, bias in ((block.attn.attn_gate, 4.0), (block.dtg_gate, 2.0)):
                if gate is not None:
                    gate.weight.zero_()
                    gate.bias.fill_(bias)

    @torch.no_grad()
    def refresh_scales(self) -> None:
        """Fit the scales that QAT rounds on to the present weights, by the export's rule. Once a step, and outside
        the compiled graph: a sum in another order could pick another clip, and the codes would not be the export's."""
        for name, spec in self.qat_specs.items():
            scale = row_scales(self.get_parameter(name), spec)
            if name in self.qat_scales:
                self.qat_scales[name].copy_(scale)  # in place, where a compiled graph looks for it
            else:
                self.qat_scales[name] = scale

    def seen(self, name: str, weight: Tensor, qat: bool) -> Tensor:
        """A weight as the forward pass sees it: rounded under QAT if it is exported rounded."""
        if not qat or name not in self.qat_specs:
            return weight
        return fake_quantise(weight, self.qat_scales[name], self.qat_specs[name])

    def layer_weights(self, qat: bool, dress=None) -> list[LayerWeights]:
        """Per layer, its slices of the banks in the activation dtype. One rounding and one cast a bank, and `unbind`
        rather than indexing: the gradient of a bank is then one stack, not a sum of mostly empty banks."""
        qo, kv, up, down = (self.seen(name, getattr(self, name), qat).to(self.dtype).unbind()
                            for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"))
        layers = self.cfg.num_layers
        plain = [LayerWeights(*parts) for parts in zip(qo, kv, kv[layers:], qo[layers:], up, down)]
        if dress is None:
            return plain
        return [LayerWeights(*(dress(kind, layer, w) for kind, w in zip(LayerWeights._fields, weights)))
                for layer, weights in enumerate(plain)]

    def embed(self, ids: Tensor, qat: bool) -> Tensor:
        """Token, bigram and trigram embeddings, normalised and smeared.  # [batch, T, dim]"""
        cfg = self.cfg
        x = F.embedding(ids, self.seen("tok_emb.weight", self.tok_emb.weight, qat)).to(self.dtype)
        for name, table, factors in (("bigram", self.bigram, BIGRAM_FACTORS), ("trigram", self.trigram, TRIGRAM_FACTORS)):
            if table is not None:
                buckets = hash_ngrams(ids, factors, table.embed.num_embeddings)
                x = x + table(buckets, self.seen(f"{name}.embed.weight", table.embed.weight, qat), self.dtype)
        return self.smear(norm(x))

    def value_embeddings(self, ids: Tensor, qat: bool) -> dict[int, Tensor]:
        """Layer -> what is added to its values.  # [batch, T, kv_dim]"""
        if self.ve_shared is None:
            return {}
        table = self.seen("ve_shared.embed.weight", self.ve_shared.embed.weight, qat)
        shared = self.ve_shared(ids, table, self.dtype)
        return {layer: shared * scale.to(self.dtype) for layer, scale in zip(self.cfg.ve_layer_ids, self.ve_layer_scales)}

    def hidden(self, ids: Tensor, keep: int | None = None, qat: bool = False, dress=None) -> Tensor:
        """The trunk: normalised final states of the last `keep` positions (all, if None).

        ids: int64 [batch, T] -> [batch, keep, dim]. The last block computes queries and MLP for those positions
        only: a sliding window that scores 64 of 2,048 tokens pays for 64 there.

        `dress(kind, layer, matrix)` may replace a layer's matrix (kind: a field of LayerWeights) by a function of its
        input - to add something to its output, or to look at what comes in.
        """
        cfg, length = self.cfg, ids.size(1)
        rope = rope_table(length, cfg.rope_dims or cfg.head_dim, cfg, ids.device)
        extra = self.value_embeddings(ids, qat)
        x = x0 = self.embed(ids, qat)
        skips, first_value = [], None
        for layer, (block, weights) in enumerate(zip(self.blocks, self.layer_weights(qat, dress))):
            decoder = layer - cfg.num_layers // 2
            if decoder >= 0 and skips:
                x = x + self.skip_weights[decoder].to(x.dtype) * skips.pop()
            wanted = keep or length
            wanted = wanted if layer == cfg.num_layers - 1 else length
            x, value = block(x, x0, weights, rope, extra.get(layer), first_value, wanted)
            first_value = value if layer == 0 else first_value
            if decoder < 0:
                skips.append(x)
        return norm(x)

    def output_weight(self, qat: bool = False) -> Tensor:
        """The output matrix in the activation dtype.  # [vocab, dim]"""
        name, layer = ("tok_emb.weight", self.tok_emb) if self.lm_head is None else ("lm_head.weight", self.lm_head)
        return self.seen(name, layer.weight, qat).to(self.dtype)

    def logits(self, hidden: Tensor, qat: bool = False) -> Tensor:
        """Soft-capped logits in fp32.  # [..., dim] -> [..., vocab]"""
        return capped_logits(hidden, self.output_weight(qat), self.cfg.logit_softcap)

    def nll(self, ids: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
        """-log p in nats of each target; targets [batch, keep] belong to the last `keep` positions of ids."""
        logits = self.logits(self.hidden(ids, keep=targets.size(1))) / temperature
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def loss(self, ids: Tensor, targets: Tensor, qat: bool = False) -> Tensor:
        """Mean cross-entropy in nats over [batch, T], plus that of the MTP heads while training."""
        cap, hidden = self.cfg.logit_softcap, self.hidden(ids, qat=qat)
        loss = CappedCrossEntropy.apply(hidden.flatten(0, 1), self.output_weight(qat), targets.flatten(), cap)
        ahead = [CappedCrossEntropy.apply(hidden[:, :-k].flatten(0, 1), head.weight.to(self.dtype),
                                          targets[:, k:].flatten(), cap)
                 for k, head in enumerate(self.mtp_heads, 1)]
        return loss + self.cfg.mtp_loss_weight * torch.stack(ahead).mean() if ahead and self.training else loss


# ------------------------------------------------------------------------------------------------ PARAMETERS
@dataclass(frozen=True)
class Family:
    """How one kind of parameter is trained and stored; `lr`, `decay` and `bits` name settings."""

    name: str
    pattern: str
    optimiser: str
    lr: str
    decay: str = ""       # "": none
    bits: str = ""        # "": stored as float
    exported: bool = True


FAMILIES = (
    Family("attn", r"(qo|kv)_bank", "muon", "matrix_lr", "muon_wd", "attn_qat_bits"),
    Family("mlp", r"mlp_(up|down)_bank", "muon", "matrix_lr", "muon_wd", "mlp_quant_bits"),
    Family("embed", r"tok_emb\.weight", "adamw", "table_lr", "adam_wd", "embed_bits"),
    Family("ngram", r"(bigram|trigram)\.embed\.weight", "adamw", "table_lr", "adam_wd", "bigram_bits"),
    Family("value", r"ve_shared\.embed\.weight", "adamw", "table_lr", "adam_wd", "ve_bits"),
    Family("head", r"lm_head\.weight", "adamw", "head_lr", "", "embed_bits"),
    Family("mtp", r"mtp_heads\.\d+\.weight", "adamw", "head_lr", exported=False),
    Family("proj", r"(bigram|trigram|ve_shared)\.proj\.weight", "adamw", "scalar_lr", "adam_wd"),
    Family("control", r"skip_weights|smear\.gate|(bigram|trigram|ve_shared)\.scale|ve_layer_scales\.\d+|blocks\.\d+\..+",
           "adamw", "scalar_lr", "adam_wd"),
)


def named_in(patterns: str, name: str) -> bool:
    """Whether one of the comma-separated parts occurs in a parameter's name."""
    return any(part.strip() in name for part in patterns.split(",") if part.strip())


def route(cfg: Hyperparameters, names) -> dict[str, Family]:
    """Family of each parameter. Every name belongs to exactly one row; anything else is a programming error."""
    families = {}
    for name in names:
        rows = [family for family in FAMILIES if re.fullmatch(family.pattern, name)]
        assert len(rows) == 1, f"parameter {name} stands in {len(rows)} rows of FAMILIES"
        families[name] = FAMILIES[-1] if named_in(cfg.control_tensor_name_patterns, name) else rows[0]
    return families


def quant_specs(cfg: Hyperparameters, names) -> dict[str, QuantSpec]:
    """How each parameter that is exported rounded is rounded - by QAT and by the export alike."""
    return {name: QuantSpec(getattr(cfg, family.bits), cfg.clip_rule)
            for name, family in route(cfg, names).items()
            if family.bits and not named_in(cfg.int8_keep_float_fp32_name_patterns, name)}


# ------------------------------------------------------------------------------------------------ OPTIMISERS
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Keller Jordan's quintic: steep at 0, so five steps do; ends near 1, not at it


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype) -> Tensor:
    """Push the singular values of each matrix towards 1.  # [n, rows, columns], any dtype -> same shape in `dtype`"""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised, on banks [n, rows, columns]; each rank works on its slices of every bank.

    One step is launch_reduce -> (clip) -> launch_update -> finish; between the calls the network works. With one rank
    the shard is the bank and nothing is sent. Buffers: `momentum`, and `row_memory` for NorMuon (PR 173), per shard.
    """

    def __init__(self, banks: list[Tensor], cfg: Hyperparameters, rt: Runtime):
        self.banks, self.cfg, self.rt = sorted(banks, key=Tensor.numel, reverse=True), cfg, rt  # long transfers first
        self.slices = [-(-len(bank) // rt.world_size) for bank in self.banks]
        self.momentum = [bank.new_zeros(n, *bank.shape[1:]) for bank, n in zip(self.banks, self.slices)]
        self.row_memory = [m.new_zeros(*m.shape[:2], 1) for m in self.momentum] if cfg.normuon else []

    def launch_reduce(self) -> list[tuple[Tensor, object]]:
        """Start to sum the gradients over ranks: (this rank's shard, handle to wait for) of each bank."""
        wire = torch.bfloat16 if self.cfg.grad_quant else torch.float32
        started = []
        for bank, n in zip(self.banks, self.slices):
            if self.rt.world_size == 1:
                started.append((bank.grad, None))
                continue
            padded = F.pad(bank.grad.to(wire), (0, 0, 0, 0, 0, n * self.rt.world_size - len(bank)))
            started.append(self.rt.launch_reduce_scatter(padded))
        return started

    def launch_update(self, shards: list[Tensor], momentum: float) -> list[tuple[Tensor, object]]:
        """Orthogonalise this rank's slices and start to gather every rank's: (whole update, handle) of each bank."""
        started = []
        for i, (grad, buffer) in enumerate(zip(shards, self.momentum)):
            buffer.mul_(momentum).add_(grad)
            update = newton_schulz(grad.add(buffer, alpha=momentum), self.cfg.muon_backend_steps, self.rt.dtype)  # Nesterov
            if self.row_memory:
                update = even_rows_(update.float(), self.row_memory[i], self.cfg.muon_beta2)
            started.append(self.rt.launch_all_gather(update.contiguous()))
        return started

    def finish(self, updates: list[Tensor], lr: float) -> None:
        for bank, update in zip(self.banks, updates):
            stretch = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            bank.mul_(1 - lr * self.cfg.muon_wd).add_(update[:len(bank)].to(bank.dtype), alpha=-lr * stretch)

    def state(self) -> dict:
        """Buffers of whole banks, whatever the world size that made them."""
        whole = lambda shards: [self.rt.wait(self.rt.launch_all_gather(s))[:len(b)].clone()
                                for s, b in zip(shards, self.banks)]
        return {"momentum": whole(self.momentum), "row_memory": whole(self.row_memory)}

    def load(self, state: dict) -> None:
        for name in ("momentum", "row_memory"):
            for shard, n, whole in zip(getattr(self, name), self.slices, state[name], strict=False):
                mine = whole[n * self.rt.rank:n * (self.rt.rank + 1)]
                shard.zero_()[:len(mine)].copy_(mine)


def even_rows_(update: Tensor, memory: Tensor, beta2: float) -> Tensor:
    """NorMuon: divide rows by a running mean of their size, then restore the matrix norm (PR 173)."""
    size = update.norm(dim=(-2, -1), keepdim=True)
    memory.lerp_(update.square().mean(-1, keepdim=True), 1 - beta2)
    update /= memory.sqrt() + 1e-10
    return update.mul_(size / (update.norm(dim=(-2, -1), keepdim=True) + 1e-10))


class Optimisers:
    """Muon for the banks, AdamW for everything else; one `step` for all ranks together."""

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime):
        self.cfg, self.rt = cfg, rt
        params = dict(model.named_parameters())
        families = route(cfg, params)
        self.muon = Muon([p for name, p in params.items() if families[name].optimiser == "muon"], cfg, rt)
        grouped = collections.defaultdict(list)
        for name, p in params.items():
            if families[name].optimiser == "adamw" and p.numel():
                grouped[families[name].lr, families[name].decay].append(p)
        self.adamw = torch.optim.AdamW(
            [{"params": group, "base_lr": getattr(cfg, lr), "weight_decay": getattr(cfg, decay) if decay else 0.0}
             for (lr, decay), group in grouped.items()],
            lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.replicated = [p for group in self.adamw.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, plan: StepPlan) -> Tensor:
        """Apply the gradients in `.grad`, which add up to the global one over ranks, and drop them.

        Gradients are clipped after they are summed (PR 1092 clips each rank's own). Returns the norm before clipping.
        """
        started = self.muon.launch_reduce()
        grads = self.rt.sum_many_([p.grad for p in self.replicated])
        shards = [self.rt.wait(pair) for pair in started]
        squares = self.rt.sum_(torch.nn.utils.get_total_norm(shards).square())
        norm = (squares + torch.nn.utils.get_total_norm(grads).square()).sqrt()
        if self.cfg.grad_clip_norm > 0:
            torch._foreach_mul_([*shards, *grads], (self.cfg.grad_clip_norm / (norm + 1e-6)).clamp(max=1.0))
        updates = self.muon.launch_update(shards, plan.momentum)
        for group in self.adamw.param_groups:
            group["lr"] = group["base_lr"] * plan.lr_scale
        self.adamw.step()  # while the last banks' updates travel
        self.muon.finish([self.rt.wait(pair) for pair in updates], self.cfg.matrix_lr * plan.lr_scale)
        for p in (*self.muon.banks, *self.replicated):
            p.grad = None
        return norm

    def state(self) -> dict:
        return {"muon": self.muon.state(), "adamw": self.adamw.state_dict()}

    def load(self, state: dict) -> None:
        self.muon.load(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


# ------------------------------------------------------------------------------------------------ SCHEDULES
@dataclass(frozen=True)
class StepPlan:
    """What one step does, decided from progress alone."""

    lr_scale: float
    momentum: float
    qat: bool
    snapshot: bool   # SWA takes one after this step


def plan_step(cfg: Hyperparameters, step: int, elapsed_s: float, pace_s: float) -> StepPlan:
    """The plan of step `step` (from 0), `elapsed_s` of training time having passed at `pace_s` a step."""
    scale = lr_scale(cfg, step, elapsed_s, pace_s)
    ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    if cfg.qat_enabled:
        qat = True
    elif cfg.late_qat_frac > 0:
        qat = budget_spent(cfg, step, elapsed_s) >= cfg.late_qat_frac
    else:
        qat = scale < cfg.late_qat_threshold
    return StepPlan(scale, (1 - ramp) * cfg.muon_momentum_warmup_start + ramp * cfg.muon_momentum, qat,
                    scale < cfg.swa_start_frac and (step + 1) % cfg.swa_every == 0)


def budget_spent(cfg: Hyperparameters, step: int, elapsed_s: float) -> float:
    """Share of the step or time budget that is gone, whichever is larger. 0..1"""
    by_time = elapsed_s / cfg.max_wallclock_seconds if cfg.max_wallclock_seconds else 0.0
    return min(max(step / max(cfg.iterations, 1), by_time), 1.0)


def lr_scale(cfg: Hyperparameters, step: int, elapsed_s: float, pace_s: float) -> float:
    """Constant, then linear to 0 (or MIN_LR), timed so that the end meets the step limit or the clock."""
    if cfg.warmdown_frac > 0:
        left = 1.0 - budget_spent(cfg, step, elapsed_s)
        return 1.0 if left > cfg.warmdown_frac else max(left / cfg.warmdown_frac, cfg.min_lr)
    steps_left = cfg.iterations - step
    if cfg.max_wallclock_seconds and pace_s > 0:
        steps_left = min(steps_left, max(cfg.max_wallclock_seconds - elapsed_s, 0.0) / pace_s)
    return min(1.0, steps_left / cfg.warmdown_iters) if cfg.warmdown_iters else 1.0


# ------------------------------------------------------------------------------------------------ AVERAGING
class Averager:
    """Averages of the weights, in fp32 on the device. At the end LAWA is used if on, else SWA, else EMA."""

    def __init__(self, cfg: Hyperparameters, params: list[Tensor]):
        self.cfg, self.params, self.updates = cfg, params, 0
        self.ema = self._copy() if cfg.ema_enabled else []
        self.swa, self.swa_count = [], 0
        self.lawa = collections.deque(maxlen=cfg.lawa_k)

    def _copy(self) -> list[Tensor]:
        return [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int, plan: StepPlan) -> None:
        """Take in the weights after step number `step` (counted from 1)."""
        if self.ema:
            self.updates += 1  # the first steps get a short memory: with 0.997 alone a short run averages its start
            decay = min(self.cfg.ema_decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.ema, self.params, 1 - decay)
        if self.cfg.swa_enabled and plan.snapshot:
            if self.swa:
                torch._foreach_add_(self.swa, self.params)
            else:
                self.swa = self._copy()
            self.swa_count += 1
        if self.cfg.lawa_enabled and step % self.cfg.lawa_freq == 0:
            self.lawa.append(self._copy())

    @torch.no_grad()
    def apply(self) -> str:
        """Load the chosen average into the parameters; returns the log line that says which."""
        if self.lawa:
            mean = [sum(copies) / len(self.lawa) for copies in zip(*self.lawa)]
            line = f"lawa:applying LAWA averaging k={len(self.lawa)}"
        elif self.swa:
            mean = [total / self.swa_count for total in self.swa]
            line = f"swa:applying averaged {self.swa_count} checkpoints"
        elif self.ema:
            mean, line = self.ema, "ema:applying EMA weights"
        else:
            return "average:none, the last weights are exported"
        torch._foreach_copy_(self.params, mean)
        return line

    def state(self) -> dict:
        return {"updates": self.updates, "ema": self.ema, "swa": self.swa, "swa_count": self.swa_count,
                "lawa": list(self.lawa)}

    def load(self, state: dict) -> None:
        for name in ("updates", "swa_count", "ema", "swa"):
            setattr(self, name, state[name])
        self.lawa = collections.deque(state["lawa"], maxlen=self.cfg.lawa_k)


# ------------------------------------------------------------------------------------------------ TRAINING
@dataclass
class TrainState:
    """Everything that changes while training: what a checkpoint holds."""

    model: GPT
    optimisers: Optimisers
    averager: Averager
    watch: Stopwatch
    step: int = 0
    qat: bool = False
    first_step_s: float = 0.0

    def pace(self, elapsed_s: float) -> float:
        """Seconds a step, the first one left out: it may have compiled. 0 when unknown."""
        return (elapsed_s - self.first_step_s) / (self.step - 1) if self.step > 1 else 0.0

    def pack(self) -> dict:
        return {"model": self.model.state_dict(), "optimisers": self.optimisers.state(),
                "averager": self.averager.state(), "step": self.step, "qat": self.qat,
                "first_step_s": self.first_step_s}

    def unpack(self, packed: dict) -> None:
        self.model.load_state_dict(packed["model"])
        self.optimisers.load(packed["optimisers"])
        self.averager.load(packed["averager"])
        self.step, self.qat, self.first_step_s = packed["step"], packed["qat"], packed["first_step_s"]


def checkpoint_path(rt: Runtime) -> Path:
    return rt.folder / "checkpoints" / f"{rt.run_id}.pt"


def resumable_settings(cfg: Hyperparameters) -> str:
    """The settings a checkpoint must share with the run that goes on from it."""
    free = {"resume", "run_id", "artifact_dir", "device", "compile", "attention", "checkpoint_every", "iterations",
            "max_wallclock_seconds", "train_log_every", "val_loss_every", "val_batch_size", "micro_batch_tokens"}
    late = ("eval_", "ttt_", "compress", "artifact_")
    return json.dumps({k: v for k, v in dataclasses.asdict(cfg).items() if k not in free and not k.startswith(late)})


def save_checkpoint(cfg: Hyperparameters, rt: Runtime, state: TrainState) -> None:
    packed = state.pack()  # on every rank: shards are gathered
    if rt.rank == 0:
        packed |= {"settings": resumable_settings(cfg), "elapsed_s": state.watch.elapsed()}
        write_whole(checkpoint_path(rt), torch_bytes(packed))


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_checkpoint(cfg: Hyperparameters, rt: Runtime, state: TrainState) -> None:
    """Go on where the checkpoint of RUN_ID stopped. Raises UserError."""
    path = checkpoint_path(rt)
    try:
        packed = torch.load(path, map_location=rt.device, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"RESUME=1, but there is no checkpoint {path}") from None
    except Exception as error:  # torch raises many kinds for a damaged file
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}); start without RESUME=1") from None
    then, now = json.loads(packed["settings"]), json.loads(resumable_settings(cfg))
    changed = sorted(name.upper() for name in now if then.get(name) != now[name])
    if changed:
        raise UserError(f"checkpoint {path} was made with another {', '.join(changed)}")
    state.unpack(packed)
    state.watch = Stopwatch(packed["elapsed_s"])
    rt.log(f"resume:step:{state.step} from {path}", "resume", step=state.step)


def train_step(state: TrainState, data: TrainData, plan: StepPlan, loss_fn) -> Tensor:
    """One optimiser step on the batch of state.step. Returns this rank's share of the mean loss (sums over ranks)."""
    total = 0.0
    if state.qat:
        state.model.refresh_scales()
    for inputs, targets in data.batch(state.step):
        loss = loss_fn(inputs, targets, state.qat) / (data.micro_steps * data.rt.world_size)
        loss.backward()
        total = total + loss.detach()
    state.optimisers.step(plan)
    return total


def warm_up(cfg: Hyperparameters, rt: Runtime, state: TrainState, data: TrainData, loss_fn) -> None:
    """Run every graph training will need before the clock starts, then put everything back."""
    start = copy.deepcopy(state.pack())
    may_round = cfg.qat_enabled or cfg.late_qat_frac > 0 or cfg.late_qat_threshold > 0
    for i in range(cfg.warmup_steps):
        state.qat = may_round and i >= cfg.warmup_steps // 2
        train_step(state, data, plan_step(cfg, 0, 0.0, 0.0), loss_fn)
        if cfg.warmup_steps <= 20 or (i + 1) % 10 == 0 or i + 1 == cfg.warmup_steps:
            rt.log(f"warmup_step:{i + 1}/{cfg.warmup_steps}")
    state.unpack(start)


def train(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, validate) -> TrainState:
    """Train until the step limit or the clock ends it; the model is left with the averaged weights.

    `validate(name, score_fn)` gives an object with `loss` and `bpb`; its time is not counted.
    """
    state = TrainState(model, Optimisers(model, cfg, rt), Averager(cfg, list(model.parameters())), Stopwatch())
    loss_fn, score_fn = rt.compiled(model.loss), rt.compiled(model.nll)
    if cfg.warmup_steps and not cfg.resume:
        warm_up(cfg, rt, state, data, loss_fn)
    state.watch = Stopwatch()
    if cfg.resume:
        load_checkpoint(cfg, rt, state)
    model.train()
    stop = False
    while True:
        elapsed = rt.agree(state.watch.elapsed())
        timing = f"train_time:{1000 * elapsed:.0f}ms step_avg:{1000 * elapsed / max(state.step, 1):.2f}ms"
        stop = stop or state.step >= cfg.iterations
        if stop or cfg.val_loss_every and state.step % cfg.val_loss_every == 0:
            with state.watch.paused():
                result = validate("validation", score_fn)
            rt.log(f"step:{state.step}/{cfg.iterations} val_loss:{result.loss:.4f} val_bpb:{result.bpb:.4f} {timing}",
                   "validation", step=state.step, val_loss=result.loss, val_bpb=result.bpb, train_time_s=elapsed)
        if stop:
            break
        plan = plan_step(cfg, state.step, elapsed, state.pace(elapsed))
        announce(rt, state, plan, cfg)
        loss = train_step(state, data, plan, loss_fn)
        state.step += 1
        state.averager.update(state.step, plan)
        rt.keep_pace()
        elapsed = rt.agree(state.watch.elapsed())
        state.first_step_s = state.first_step_s or elapsed
        stop = bool(cfg.max_wallclock_seconds) and elapsed >= cfg.max_wallclock_seconds
        if cfg.train_log_every and (state.step <= 10 or state.step % cfg.train_log_every == 0 or stop):
            loss = rt.sum_(loss).item()
            rt.log(f"step:{state.step}/{cfg.iterations} train_loss:{loss:.4f} train_time:{1000 * elapsed:.0f}ms "
                   f"step_avg:{1000 * elapsed / state.step:.2f}ms", "train", step=state.step, train_loss=loss,
                   train_time_s=elapsed, lr_scale=plan.lr_scale)
            if not math.isfinite(loss):
                raise UserError(f"training diverged: loss {loss} at step {state.step}; lower MATRIX_LR or SCALAR_LR")
        if cfg.checkpoint_every and state.step % cfg.checkpoint_every == 0:
            with state.watch.paused():
                save_checkpoint(cfg, rt, state)
    if state.step < cfg.iterations:
        rt.log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{state.step}/{cfg.iterations}")
    rt.log(rt.peak_memory_line())
    rt.log(state.averager.apply())
    return state


def announce(rt: Runtime, state: TrainState, plan: StepPlan, cfg: Hyperparameters) -> None:
    """Switch late QAT on, for good, and log the turning points of the schedule."""
    if plan.qat and not state.qat:
        state.qat = True
        rt.log(f"late_qat:enabled step:{state.step} scale:{plan.lr_scale:.4f}", "late_qat", step=state.step)
    if cfg.swa_enabled and plan.snapshot and not state.averager.swa:
        rt.log(f"swa:start step:{state.step + 1}")


# ------------------------------------------------------------------------------------------------ ARTIFACT
# magic | u32 header bytes | header: LZMA of JSON | one packed stream after another | first 16 bytes of the SHA-256
# of all before. Nothing in it is executed; every size is known from the header and bounded before it is used.
ARTIFACT_MAGIC, ARTIFACT_DIGEST_BYTES = b"PGOLF\x01\r\n", 16
ARTIFACT_MOST_PARAMS = 2 ** 30
LZMA_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}]
FLOAT_KINDS = {"half": np.dtype("<f2"), "float": np.dtype("<f4")}


def zstandard_or_error():
    try:
        import zstandard
        return zstandard
    except ImportError:
        raise UserError("COMPRESS=zstd needs the package zstandard: pip install zstandard") from None


def compress(codec: str, raw: bytes) -> bytes:
    if codec == "zstd":
        return zstandard_or_error().ZstdCompressor(level=22, write_content_size=False).compress(raw)
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA_FILTERS)


def decompress(codec: str, packed: bytes, size: int) -> bytes:
    """The `size` bytes of a stream; never makes more than one byte beyond that. Raises UserError."""
    try:
        if codec == "zstd":
            zstandard = zstandard_or_error()
            with zstandard.ZstdDecompressor().stream_reader(packed) as reader:
                raw = reader.read(size + 1)
        else:
            raw = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA_FILTERS).decompress(packed, max_length=size + 1)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise UserError(f"artifact is damaged: {error}") from None
    except Exception as error:  # zstandard's own error type is only known where the package is
        if type(error).__name__ != "ZstdError":
            raise
        raise UserError(f"artifact is damaged: {error}") from None
    if len(raw) != size:
        raise UserError(f"artifact is damaged: a stream holds {len(raw)} bytes instead of {size}")
    return raw


def best_packed(wanted: str, raw: bytes) -> tuple[str, bytes]:
    """(codec, packed bytes): the wanted coder's, or the smallest of those there are."""
    codecs = [wanted] if wanted != "auto" else ["lzma"]
    if wanted == "auto":
        with contextlib.suppress(UserError):
            zstandard_or_error()
            codecs.append("zstd")
    return min(((codec, compress(codec, raw)) for codec in codecs), key=lambda pair: len(pair[1]))


def planes(array: np.ndarray) -> bytes:
    """Bytes of a little-endian array, all first bytes, then all second ones, …: exponents pack better by themselves."""
    return array.reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T.tobytes()


def unplanes(raw: bytes, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T.copy().reshape(-1).view(dtype)


@dataclass(frozen=True)
class Artifact:
    """A packed model: its bytes, and the ledger of what took them: (stream, codec, parameters, raw, packed bytes)."""

    blob: bytes
    ledger: tuple[tuple[str, str, int, int, int], ...]

    def table(self, code_bytes: int) -> list[str]:
        rows = [f"  {name:<10} {codec:<5} {count:>12,} values {raw:>13,} B -> {packed:>12,} B"
                for name, codec, count, raw, packed in self.ledger]
        rest = len(self.blob) - sum(row[-1] for row in self.ledger)
        return [*rows, f"  {'header':<10} {rest:>54,} B", f"  {'code':<10} {code_bytes:>54,} B",
                f"  {'total':<10} {len(self.blob) + code_bytes:>54,} B"]


def pack(cfg: Hyperparameters, model: GPT, tokenizer_sha256: str) -> Artifact:
    """Quantise and pack every exported parameter of a model. The same weights and settings give the same bytes."""
    params = dict(model.named_parameters())
    families, specs = route(cfg, params), quant_specs(cfg, params)
    streams, tensors = collections.defaultdict(list), []
    for name, p in params.items():
        if not families[name].exported:
            continue
        weight = p.detach().float().cpu()
        if name in specs:
            codes, scales = quantise(weight, specs[name])
            streams[families[name].name].append(codes.numpy())
            streams["scales"].append(scales.numpy())
            tensors.append([name, list(weight.shape), families[name].name, specs[name].bits])
        else:
            kind = "float" if named_in(cfg.int8_keep_float_fp32_name_patterns, name) else "half"
            streams[kind].append(weight.numpy().astype(FLOAT_KINDS[kind]))
            tensors.append([name, list(weight.shape), kind, 0])
    ledger, payload = [], b""
    for stream, arrays in sorted(streams.items()):
        flat = np.concatenate([array.reshape(-1) for array in arrays])
        raw = planes(flat)
        codec, packed = best_packed(cfg.compress, raw)
        ledger.append((stream, codec, flat.size, len(raw), len(packed)))
        payload += packed
    shape = {f.name: getattr(cfg, f.name) for f in settings_by_section()["Model"]}
    header = json.dumps({"config": {**shape, "mtp_num_heads": 0}, "tokenizer": tokenizer_sha256, "tensors": tensors,
                         "streams": [[stream, codec, raw, packed] for stream, codec, _, raw, packed in ledger]},
                        separators=(",", ":")).encode()
    header = compress("lzma", header) + struct.pack("<I", len(header))
    blob = ARTIFACT_MAGIC + struct.pack("<I", len(header)) + header + payload
    return Artifact(blob + hashlib.sha256(blob).digest()[:ARTIFACT_DIGEST_BYTES], tuple(ledger))


def unpack(blob: bytes) -> tuple[Hyperparameters, str, dict[str, Tensor]]:
    """(model settings, tokenizer sha256, weights by parameter name) of an artifact. Raises UserError."""
    if blob[:len(ARTIFACT_MAGIC)] != ARTIFACT_MAGIC:
        raise UserError("this is not an artifact of this program (or of another version of it)")
    body, digest = blob[:-ARTIFACT_DIGEST_BYTES], blob[-ARTIFACT_DIGEST_BYTES:]
    if hashlib.sha256(body).digest()[:ARTIFACT_DIGEST_BYTES] != digest:
        raise UserError("artifact is damaged or cut short: its checksum does not match")
    try:
        return read_body(body)
    except (ValueError, KeyError, TypeError, IndexError, struct.error) as error:
        raise UserError(f"artifact is malformed: {error}") from None


def read_body(body: bytes) -> tuple[Hyperparameters, str, dict[str, Tensor]]:
    start = len(ARTIFACT_MAGIC) + 4
    header_bytes, = struct.unpack_from("<I", body, len(ARTIFACT_MAGIC))
    packed, (size,) = body[start:start + header_bytes - 4], struct.unpack_from("<I", body, start + header_bytes - 4)
    header = json.loads(decompress("lzma", packed, min(size, 2 ** 24)))
    cfg = Hyperparameters.from_env({k.upper(): str(int(v) if isinstance(v, bool) else v)
                                    for k, v in header["config"].items()})
    tensors = header["tensors"]
    if sum(math.prod(shape) for _, shape, _, _ in tensors) > ARTIFACT_MOST_PARAMS:
        raise ValueError("more parameters than this program reads")
    values, offset = {}, start + header_bytes
    for stream, codec, raw_bytes, packed_bytes in header["streams"]:
        dtype = np.dtype("<f2") if stream == "scales" else FLOAT_KINDS.get(stream, np.dtype("i1"))
        if not 0 <= raw_bytes <= 8 * ARTIFACT_MOST_PARAMS or offset + packed_bytes > len(body):
            raise ValueError(f"stream {stream} is larger than the file")
        values[stream] = unplanes(decompress(codec, body[offset:offset + packed_bytes], raw_bytes), dtype)
        offset += packed_bytes
    taken, weights = collections.Counter(), {}

    def take(stream: str, shape: list[int]) -> Tensor:
        count = math.prod(shape)
        part = values[stream][taken[stream]:taken[stream] + count]
        taken[stream] += count
        return torch.from_numpy(part.reshape(shape))

    for name, shape, stream, bits in tensors:
        weights[name] = dequantise(take(stream, shape), take("scales", [*shape[:-1], 1])) if bits \
            else take(stream, shape).float()
    return cfg, header["tokenizer"], weights


def load_model(blob: bytes, rt: Runtime, tokenizer_sha256: str) -> GPT:
    """A fresh model with the weights of an artifact and nothing else. Raises UserError."""
    cfg, made_with, weights = unpack(blob)
    if made_with != tokenizer_sha256:
        raise UserError("artifact was made with another tokenizer; TOKENIZER_PATH names the one to use")
    model = GPT(cfg, rt.attend, rt.dtype)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"artifact does not fit its own settings: {str(error).splitlines()[-1].strip()}") from None
    return model.to(rt.device).eval()


# ------------------------------------------------------------------------------------------------ EVALUATION
@dataclass(frozen=True)
class EvalResult:
    """A score: nats per token, bits per byte, what was counted, and how long it took."""

    name: str
    loss: float
    bpb: float
    tokens: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Windows:
    """Which windows score which tokens. Target t is token t+1 of the text; window k reads the `length` tokens before
    target `ends[k]` and scores the last `fresh[k]` of its targets. Together they score every target once, the tail
    included: the last window ends with the text (the published scripts cut their windows there and score the tail
    again and again)."""

    ends: Tensor     # int64 [windows]
    fresh: Tensor    # int64 [windows]
    length: int
    stride: int

    @classmethod
    def plan(cls, targets: int, length: int, stride: int) -> Windows:
        count = 1 + -(-max(targets - length, 0) // stride)
        ends = (length + stride * torch.arange(count)).clamp(max=targets)
        return cls(ends, ends.diff(prepend=torch.zeros(1, dtype=ends.dtype)), length, stride)

    def batches(self, chosen: range, size: int):
        """Groups of at most `size` windows that need equally many logits: (window numbers, how many positions)."""
        if chosen and chosen[0] == 0 and self.length != self.stride:
            yield range(1), self.length  # the first window scores all it reads
            chosen = chosen[1:]
        for start in range(0, len(chosen), size):
            yield chosen[start:start + size], self.stride


class SgdAdapter:
    """Score-first test-time training of the whole model (PR 461, 1092): after each chunk of scored text, a few
    passes of SGD or AdamW over it. A step's gradient is the mean over TTT_BATCH_SEQS sequences, whatever the ranks."""

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime):
        self.cfg, self.rt, self.frozen = cfg, rt, min(cfg.ttt_freeze_blocks, model.cfg.num_layers)
        self.layers, self.loss_fn = model.cfg.num_layers, rt.compiled(model.loss)
        fixed = tuple(f"blocks.{i}." for i in range(self.frozen))
        self.named = {name: p for name, p in model.named_parameters() if p.numel() and not name.startswith(fixed)}
        groups = [{"params": [p], "base_lr": cfg.ttt_lr * self.rate(name)} for name, p in self.named.items()]
        self.optimiser = (torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0) if cfg.ttt_optimizer == "adamw"
                          else torch.optim.SGD(groups, lr=0.0, momentum=cfg.ttt_momentum))

    def rate(self, name: str) -> float:
        """PR 1092's rates for AdamW: MLP-down 3x, MLP-up 0.5x; SGD treats all alike."""
        return {"mlp_down_bank": 3.0, "mlp_up_bank": 0.5}.get(name, 1.0) if self.cfg.ttt_optimizer == "adamw" else 1.0

    def learn(self, tokens: Tensor, progress: float) -> None:
        """Adapt to scored tokens [n + 1]: n targets and the token before them. progress: 0..1 of the text."""
        length, cfg = self.cfg.train_seq_len, self.cfg
        rows = (len(tokens) - 1) // length
        inputs, targets = (t[:rows * length].long().view(rows, length) for t in (tokens[:-1], tokens[1:]))
        for group in self.optimiser.param_groups:
            group["lr"] = group["base_lr"] * 0.5 * (1 + math.cos(math.pi * progress))
        for start in [*range(0, rows, cfg.ttt_batch_seqs)] * cfg.ttt_epochs:
            batch = range(start, min(start + cfg.ttt_batch_seqs, rows))
            mine = self.rt.share_of(len(batch))
            self.step(inputs[batch[0]:][mine.start:mine.stop], targets[batch[0]:][mine.start:mine.stop], len(batch))

    def step(self, inputs: Tensor, targets: Tensor, rows_of_all: int) -> None:
        params = list(self.named.values())
        if len(inputs):
            (self.loss_fn(inputs, targets) * (len(inputs) / rows_of_all)).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        self.rt.sum_many_(grads)
        for (name, p), grad in zip(self.named.items(), grads):
            if name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"):
                grad.unflatten(0, (-1, self.layers))[:, :self.frozen] = 0  # a bank may hold two matrices a layer
            p.grad = grad
        if self.cfg.ttt_grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(params, self.cfg.ttt_grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


def score_batch(score_fn, val: ValData, windows: Windows, chosen: range, keep: int, meter: BpbMeter, rows: int,
                temperature: float) -> None:
    """Score some windows and add what is new in them to the meter. Compiled graphs get their full number of rows."""
    padding = rows - len(chosen)
    ends, fresh = (F.pad(t[chosen.start:chosen.stop], (0, padding), value=v)
                   for t, v in ((windows.ends, windows.length), (windows.fresh, 0)))
    ends, fresh = ends.to(val.tokens.device), fresh.to(val.tokens.device)
    text = val.tokens.unfold(0, windows.length + 1, 1)[ends - windows.length].long()  # [rows, length + 1]
    previous, targets = text[:, -keep - 1:-1], text[:, -keep:]
    nll = score_fn(text[:, :-1], targets, temperature)
    counted = torch.arange(keep, device=fresh.device) >= keep - fresh[:, None]
    meter.add(nll, previous, targets, counted)


def evaluate(name: str, score_fn, val: ValData, cfg: Hyperparameters, rt: Runtime, stride: int,
             batch_seqs: int, adapter=None) -> EvalResult:
    """The one walk over the validation text: score a chunk, and only then let an adapter learn from it.

    Without an adapter the text is one chunk; `stride` equal to the window gives the plain evaluation. A window belongs
    to the chunk of its first scored target, so when a chunk's windows are done all its targets are in the sum.
    """
    start_s, targets, meter = time.perf_counter(), len(val.tokens) - 1, BpbMeter(val.byte_table)
    windows = Windows.plan(targets, cfg.window, stride)
    chunk_tokens = cfg.ttt_chunk_tokens if adapter else targets
    chunks = -(-targets // chunk_tokens)
    first = torch.searchsorted(windows.ends - windows.fresh, chunk_tokens * torch.arange(chunks + 1)).tolist()
    temperature = cfg.ttt_temp if adapter else 1.0
    bar = rt.log.progress(len(windows.ends), name)
    for chunk in range(chunks):
        mine = range(first[chunk], first[chunk + 1])
        mine = mine[rt.share_of(len(mine)).start:rt.share_of(len(mine)).stop]
        with torch.no_grad():
            for chosen, keep in windows.batches(mine, batch_seqs):
                rows = batch_seqs if rt.compiles and keep == stride else len(chosen)
                score_batch(score_fn, val, windows, chosen, keep, meter, rows, temperature)
                bar.update(len(chosen) * rt.world_size)
        if adapter:
            report_chunk(rt, meter, chunk, chunks, time.perf_counter() - start_s)
            if chunk + 1 < chunks:
                scored = val.tokens[chunk * chunk_tokens:(chunk + 1) * chunk_tokens + 1]
                adapter.learn(scored, chunk / max(chunks - 1, 1))
    bar.close()
    loss, bpb, tokens, size = meter.reduce(rt)
    rt.synchronize()
    assert tokens == targets, f"{name} scored {tokens} of {targets} tokens"
    return EvalResult(name, loss, bpb, tokens, size, time.perf_counter() - start_s)


def report_chunk(rt: Runtime, meter: BpbMeter, chunk: int, chunks: int, seconds: float) -> None:
    """The running score of rank 0's share, every tenth chunk."""
    if chunk % 10 == 0 or chunk + 1 == chunks:
        nats, _, size = meter.sums.tolist()
        bpb = nats / math.log(2) / max(size, 1)
        rt.log(f"  ttt_chunk [{chunk + 1}/{chunks}] bpb={bpb:.6f} time={seconds:.1f}s", "ttt_chunk",
               chunk=chunk + 1, chunks=chunks, running_bpb=bpb, seconds=seconds)


# ------------------------------------------------------------------------------------------------ MAIN
def log_settings(cfg: Hyperparameters, rt: Runtime) -> None:
    """All settings to the log file, those that differ from the defaults to the console as well."""
    rt.log(str(rt.log.path(".txt")))
    source = Path(__file__).read_bytes()
    rt.log(f"source:sha256:{hashlib.sha256(source).hexdigest()} python:{sys.version.split()[0]} torch:{torch.__version__}")
    rt.log("Hyperparameters:", console=False)
    for name, value in sorted(dataclasses.asdict(cfg).items()):
        rt.log(f"  {name}: {value}", console=False)
    changed = cfg.non_defaults()
    rt.log("settings other than the defaults: " + (" ".join(f"{k.upper()}={v}" for k, v in changed.items()) or "none"),
           "settings", all=dataclasses.asdict(cfg), changed=changed)


def log_preamble(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, val: ValData) -> None:
    """The opening lines, as this field's log readers know them."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    for line in (
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}",
        f"train_loader:dataset:{Path(cfg.data_path).resolve().name} train_shards:{len(data.stream.paths)}",
        f"val_loader:shards pattern={cfg.val_files} tokens:{len(val.tokens) - 1}",
        f"model_params:{count(model)}",
        f"mtp_num_heads:{cfg.mtp_num_heads} mtp_loss_weight:{cfg.mtp_loss_weight} mtp_params:{count(model.mtp_heads)}",
        f"XSA:last_{cfg.xsa_last_n} active_layers:{[i for i, b in enumerate(model.blocks) if b.attn.exclusive]}",
        f"world_size:{rt.world_size} grad_accum_steps:{data.micro_steps}",
        f"device:{rt.device} dtype:{rt.dtype} compile:{int(rt.compiles)} attention:{rt.attention}",
        f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}",
        f"tie_embeddings:{cfg.tie_embeddings} embed_lr:{cfg.table_lr} "
        f"head_lr:{0.0 if cfg.tie_embeddings else cfg.head_lr} matrix_lr:{cfg.matrix_lr} scalar_lr:{cfg.scalar_lr}",
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}",
        f"seed:{cfg.seed}",
    ):
        rt.log(line)


def export(cfg: Hyperparameters, rt: Runtime, model: GPT, val: ValData) -> tuple[Path, int, bytes]:
    """Write the float model and the artifact, hold the artifact against its limit, read it back from disk.

    Returns (path, code bytes, the bytes read). Raises UserError above the limit, after the table of what took the bytes.
    """
    path, code_bytes = rt.folder / "final_model.ptz", os.path.getsize(__file__)
    blob = None
    if rt.rank == 0:
        skipped = sum(p.numel() for p in model.mtp_heads.parameters())
        if skipped:
            rt.log(f"export_excluding_mtp_params:{skipped}")
        whole = torch_bytes({k: v.cpu() for k, v in model.state_dict().items() if not k.startswith("mtp_heads")})
        write_whole(rt.folder / "final_model.pt", whole)
        artifact = pack(cfg, model, val.tokenizer_sha256)
        write_whole(path, artifact.blob)
        blob = path.read_bytes()
        tag = f"{precision_tag(cfg)}+{'+'.join(sorted({row[1] for row in artifact.ledger}))}"
        rt.log(f"Serialized model: {len(whole)} bytes")
        rt.log(f"Code size: {code_bytes} bytes")
        for line in artifact.table(code_bytes):
            rt.log(line)
        rt.log(f"Serialized model {tag}: {len(blob)} bytes")
        rt.log(f"Total submission size {tag}: {len(blob) + code_bytes} bytes", "artifact", bytes=len(blob),
               code_bytes=code_bytes, ledger=artifact.ledger)
    blob = rt.share_bytes(blob)
    if len(blob) + code_bytes > cfg.artifact_limit_bytes:
        raise UserError(f"submission of {len(blob) + code_bytes:,} bytes is over ARTIFACT_LIMIT_BYTES="
                        f"{cfg.artifact_limit_bytes:,}; the table above shows what took them")
    return path, code_bytes, blob


def precision_tag(cfg: Hyperparameters) -> str:
    mlp, attn = cfg.mlp_quant_bits, cfg.attn_qat_bits
    return f"int{mlp}" if mlp == attn else f"int{mlp}mlp+int{attn}attn"


def final_scores(cfg: Hyperparameters, rt: Runtime, model: GPT, val: ValData) -> dict[str, EvalResult]:
    """Plain, sliding and test-time-trained scores of a model, in that order: the last one changes the weights."""
    results, tag, score_fn = {}, precision_tag(cfg), rt.compiled(model.nll)

    def run(key: str, label: str, stride: int, adapter=None, note: str = "") -> EvalResult:
        r = results[key] = evaluate(label, score_fn, val, cfg, rt, stride, cfg.eval_batch_seqs, adapter)
        rt.log(f"{label} val_loss:{r.loss:.4f} val_bpb:{r.bpb:.4f}{note} eval_time:{1000 * r.seconds:.0f}ms",
               "evaluation", **dataclasses.asdict(r))
        rt.log(f"{label}_exact val_loss:{r.loss:.8f} val_bpb:{r.bpb:.8f}")
        return r

    run("roundtrip", f"final_{tag}_roundtrip", cfg.window)
    if cfg.eval_stride:
        run("sliding", f"final_{tag}_sliding_window", cfg.eval_stride, note=f" stride:{cfg.eval_stride}")
    if cfg.ttt_enabled:
        adapter, stride = SgdAdapter(model, cfg, rt), cfg.eval_stride or cfg.window
        moving, targets = sum(p.numel() for p in adapter.named.values()), len(val.tokens) - 1
        rt.log(f"ttt_sliding:start chunks={-(-targets // cfg.ttt_chunk_tokens)} chunk_tokens={cfg.ttt_chunk_tokens} "
               f"total_windows={len(Windows.plan(targets, cfg.window, stride).ends)} stride={stride} "
               f"ttt_lr={cfg.ttt_lr} ttt_epochs={cfg.ttt_epochs} freeze_blocks={cfg.ttt_freeze_blocks}")
        rt.log(f"ttt_sliding:params unfrozen={moving} frozen={sum(p.numel() for p in model.parameters()) - moving}")
        rt.log(f"ttt_sliding:optimizer={cfg.ttt_optimizer} lr={cfg.ttt_lr} momentum={cfg.ttt_momentum}")
        r = run("ttt", "legal_ttt", stride, adapter)
        rt.log(f"ttt_sliding:done val_loss={r.loss:.6f} val_bpb={r.bpb:.6f} elapsed={r.seconds:.1f}s")
    return results


def run(cfg: Hyperparameters, rt: Runtime) -> dict:
    """config -> data -> train -> average -> quantise -> write -> read back -> evaluate. Returns the summary."""
    log_settings(cfg, rt)
    seconds, watch = {}, Stopwatch()
    torch.manual_seed(cfg.seed)
    val, data = ValData.open(cfg, rt), TrainData.open(cfg, rt)
    names = [name for name, _ in GPT(cfg).named_parameters()]
    model = GPT(cfg, rt.attend, rt.dtype, quant_specs(cfg, names)).to(rt.device)
    log_preamble(cfg, rt, model, data, val)
    plain = functools.partial(evaluate, val=val, cfg=cfg, rt=rt, stride=cfg.window,
                              batch_seqs=max(cfg.val_batch_size // rt.world_size // cfg.window, 1))
    seconds["setup"] = watch.elapsed()
    state = train(cfg, rt, model, data, plain)
    seconds["train"] = state.watch.elapsed()
    averaged = plain("post_average", rt.compiled(model.nll))
    rt.log(f"DIAGNOSTIC post_average val_loss:{averaged.loss:.4f} val_bpb:{averaged.bpb:.4f} "
           f"eval_time:{1000 * averaged.seconds:.0f}ms", "evaluation", **dataclasses.asdict(averaged))
    packing = Stopwatch()
    path, code_bytes, blob = export(cfg, rt, model, val)
    seconds["export"] = packing.elapsed()
    results = final_scores(cfg, rt, load_model(blob, rt, val.tokenizer_sha256), val)
    seconds |= {key: r.seconds for key, r in results.items()} | {"total": watch.elapsed()}
    bpb = {key: results[key].bpb if key in results else None for key in ("roundtrip", "sliding", "ttt")}
    return {"run_id": rt.run_id, "val_bpb_pre_quant": averaged.bpb, "val_bpb_roundtrip": bpb["roundtrip"],
            "val_bpb_sliding": bpb["sliding"], "val_bpb_ttt": bpb["ttt"], "artifact_path": str(path),
            "artifact_bytes": len(blob), "code_bytes": code_bytes, "total_bytes": len(blob) + code_bytes,
            "artifact_limit_bytes": cfg.artifact_limit_bytes, "steps": state.step,
            "tokens": state.step * cfg.train_batch_tokens, "seconds": {k: round(v, 3) for k, v in seconds.items()},
            "peak_rss_bytes": peak_rss_bytes()}


def report(rt: Runtime, summary: dict) -> None:
    """The short summary for people; then the same as one JSON line and file for programs."""
    spent = ", ".join(f"{phase} {s:.1f}" for phase, s in summary["seconds"].items())
    bpb = lambda key: "off" if summary[key] is None else f"{summary[key]:.4f}"
    for line in (
        "-" * 72,
        f"bits per byte   before quantisation {bpb('val_bpb_pre_quant')}, from the artifact {bpb('val_bpb_roundtrip')}, "
        f"sliding {bpb('val_bpb_sliding')}, test-time training {bpb('val_bpb_ttt')}",
        f"size            {summary['total_bytes']:,} of {summary['artifact_limit_bytes']:,} bytes: "
        f"artifact {summary['artifact_bytes']:,}, code {summary['code_bytes']:,}",
        f"seconds         {spent}",
        f"files           {summary['artifact_path']}, {rt.folder / 'final_model.pt'}, {rt.log.path('.txt')}, .jsonl, "
        f".summary.json",
    ):
        rt.log(line)
    text = json.dumps(summary)
    if rt.rank == 0:
        write_whole(rt.log.path(".summary.json"), (text + "\n").encode())
    rt.log(f"summary: {text}")


def main(arguments: list[str]) -> int:
    """Run with the settings of the environment. 0: done, 2: the user can mend it, 130: interrupted."""
    if arguments:
        asked = arguments[0] in ("-h", "--help")
        print(f"{__doc__}\n{config_table()}" if asked else f"error: no argument {arguments[0]} (settings are environment "
              "variables; --help lists them)", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    try:
        cfg = Hyperparameters.from_env()
        rt = Runtime.open(cfg)
        try:
            report(rt, run(cfg, rt))
        finally:
            rt.close()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; RESUME=1 with this RUN_ID goes on from its last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
