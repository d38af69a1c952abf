"""Parameter Golf in one file: train a small language model, squeeze it under 16,000,000 bytes, score it.

    bash run.sh                                                   # fits itself to the machine
    torchrun --standalone --nproc_per_node=8 train_gpt.py         # the competition's machine
    python train_gpt.py --help                                    # every setting, with default and range

Settings come from environment variables only; importing the file defines things and does nothing else. A room uses
only the rooms above it. `run` in MAIN is the path through them: settings -> data -> train -> calibrate -> export ->
read back -> evaluate -> report.

    CONFIG      Hyperparameters: every setting, declared once, with its default, range, help and published names
    RUNTIME     Runtime: ranks, device, attention kernel, collectives; log and progress; attend_*
    DATA        TokenStream (shards), TrainData (batches), ValData (text and the bytes its tokens stand for)
    METRIC      BpbMeter: nats and bytes -> bits per byte
    QUANTISER   weights <-> codes and scales: clip rules, rounding, fake quantisation, GPTQ of a matrix
    KERNELS     operators with their own backward pass, some also in Triton
    MODEL       GPT: a transformer on weight banks; hidden, logits, nll, loss
    PARAMETERS  FAMILIES: one row per kind of parameter: optimiser, learning rate, decay, bits
    OPTIMISERS  Muon for the banks, AdamW for everything else
    SCHEDULES   plan_step: progress -> learning-rate scale, momentum, QAT, snapshots
    AVERAGING   Averager: EMA, or the mean of snapshots (SWA, LAWA)
    TRAINING    train: warm-up, steps, validation, checkpoints
    ROUNDING    calibrate, round_model, fit_size, fine_tune: from a float model to codes of the right size
    ARTIFACT    pack, load_model: range coder, container, checks of what is read
    ADAPTERS    what test-time training changes: all weights, LoRA, a hashed embedding
    EVALUATION  evaluate: plan -> score -> commit -> train an adapter; Scored decides what makes a score illegal
    MAIN        run: one training run, or its end alone for an artifact made before

Where a technique lives:

    rotary base, partial rotation, NTK      rope_table, rotate; ROPE_BASE in CONFIG
    exclusive self-attention (XSA)          subtract_own_value, called by Attention
    activation (LeakyReLU squared)          Block.mlp: SquaredLeakyReLU, or FusedMlp with KERNELS=triton
    soft cap, cross-entropy in chunks       CappedCrossEntropy, called by GPT.loss; multi-token prediction: GPT.loss
    smear gates, hashed n-gram tables       GPT.embed: SmearGate, WindowSmearGate, hash_ngrams
    value embeddings, skip connections      GPT.hidden; value residual, gates, attention window: Attention, Block
    loop of layers (depth recurrence)       Hyperparameters.visits, applied by GPT.hidden; when: stage
    growing context, all graphs of a run    stage, stage_shares; warm_up, TrainState.rewarmed
    parallel residuals, two lanes or joint  Block.forward; where the lanes begin and end: GPT.hidden
    documents in a flat stream              TrainData.training_batch, document_starts; Documents, attend_varlen
    Muon, Newton-Schulz, Polar Express      Muon, newton_schulz; NorMuon: normalise_rows_; MuonEq-R: launch_update
    late QAT, soft rounding                 when: qat_progress; how: fake_quantise, soft_round
    complementary training                  BigramCounts; pruning: prune
    GPTQ, fitting the size                  gptq, HessianSums; fit_size; fine-tuning after both: fine_tune
    steps by what they cost (water-filling) loss_curvature, curvature, water_fill; the coder: finer_sixteenths
    sliding windows, time limit             Windows, plan_stream; EvalClock
    counts of scored tokens (back-off)      count_contexts, mixture_nll; mixed_result
    test-time training of all weights       SgdAdapter; of low-rank additions (LoRA): LoraAdapter
    of each document by itself              plan_documents, and the rows of LoraAdapter

The defaults are the system of the competition's pull request 1092, its slips corrected (each is named where it stands).
"""
from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import copy
import dataclasses
import datetime
import difflib
import fcntl
import functools
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import lzma
import math
import operator
import os
import re
import resource
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel


# ------------------------------------------------------------------------------------------------ CONFIG
class UserError(Exception):
    """A mistake of the user's. `main` prints it as one line, without a traceback, and exits with 2."""


def env_field(default, help: str, *, lo=None, hi=None, choices="", alias="", group="", section=""):
    """One setting: its type is the annotation, its variable the upper-cased name (or a published alias). `group`: a
    published name that sets several settings, unless their own names do. `section`: the one this setting begins."""
    meta = {"lo": lo, "hi": hi, "choices": choices.split(), "alias": alias, "group": group, "section": section}
    return dataclasses.field(default=default, metadata={"help": help, **meta})


@dataclass(frozen=True)
class Hyperparameters:
    """Every setting of a run. Defaults are those of PR 1092's best run unless the help says otherwise."""

    # Run
    run_id: str = env_field("", "name of the run and its log files; generated when empty", section="Run")
    seed: int = env_field(1337, "seed of the initial weights", lo=0)
    artifact_dir: str = env_field(".", "folder for runs/RUN_ID/ and the links to its files", alias="OUT_DIR")
    profile: str = env_field("", "where the settings come from, for the log only; run.sh gives the profile's name")
    device: str = env_field("auto", "where to compute", choices="auto cpu cuda")
    dtype: str = env_field("auto", "activation type; auto: bf16 on CUDA, fp32 on CPU", choices="auto bf16 fp32")
    compile: str = env_field("auto", "torch.compile; auto: on CUDA only", choices="auto 0 1")
    attention: str = env_field("auto", "attention kernel; auto: the best here", choices="auto fa4 fa3 cudnn flash math")
    kernels: str = env_field("auto", "of loss, MLP, Muon; triton: own, untried on a GPU", choices="auto torch triton")
    # Data
    data_path: str = env_field("./data/datasets/fineweb10B_sp1024", "folder with fineweb_{train,val}_*.bin; its "
                               "dataset.json, if there is one, names tokenizer and vocabulary size", section="Data")
    tokenizer_path: str = env_field("./data/tokenizers/fineweb_1024_bpe.model", "SentencePiece model of that data")
    train_batch_tokens: int = env_field(786_432, "tokens per optimiser step, over all ranks", lo=1)
    pack: str = env_field("rows", "a training batch: rows of TRAIN_SEQ_LEN tokens, or one stream whose attention stops "
                          "where a document begins and at TRAIN_SEQ_LEN (PR 1530)", choices="rows documents")
    train_seq_schedule: str = env_field("", "TRAIN_SEQ_LEN grows: lengths and the share of the budget until which each "
                                        "is used, like 1024:0.1,2048:0.7,3072:1 (PR 2014)")
    micro_batch_tokens: int = env_field(0, "maximum tokens per forward pass; 0: 98,304 on CUDA, 4,096 on CPU", lo=0)
    # Model
    vocab_size: int = env_field(1024, "tokens in the vocabulary", lo=2, hi=65536, section="Model")
    train_seq_len: int = env_field(2048, "tokens per training sequence; sets the rotary base too", lo=2)
    num_layers: int = env_field(11, "transformer blocks", lo=1, hi=256)
    model_dim: int = env_field(512, "width of the residual stream", lo=2)
    num_heads: int = env_field(8, "query heads", lo=1)
    num_kv_heads: int = env_field(4, "key and value heads; divides NUM_HEADS", lo=1)
    mlp_mult: float = env_field(3.0, "MLP width over model width", lo=0.01, hi=64)
    leaky_slope: float = env_field(0.75, "negative slope of LeakyReLU, whose square is the activation", lo=0, hi=1)
    tie_embeddings: bool = env_field(True, "use the embedding table as output layer")
    tied_embed_init_std: float = env_field(0.005, "standard deviation of the initial embedding", lo=0, hi=100)
    rope_base: float = env_field(10_000.0, "base of the rotary frequencies", lo=1, hi=1e9)
    rope_dims: int = env_field(16, "rotated dimensions per head; 0: all", lo=0)
    rope_train_seq_len: int = env_field(1024, "a longer TRAIN_SEQ_LEN scales the rotary base up (NTK); 0: none", lo=0)
    logit_softcap: float = env_field(30.0, "logits are cap*tanh(x/cap); 0: x itself", lo=0, hi=1e4)
    embed_norm: bool = env_field(True, "RMS norm after the embedding; off in PR 1254")
    smear_gate: str = env_field("after", "smear gate, after or before that norm (PR 550), or window: from GATE_WINDOW "
                                "channels, before it and not into BOS (PR 1855)", choices="after before window off")
    gate_window: int = env_field(12, "first channels that SMEAR_GATE=window and SPARSE_ATTN_GATE read", lo=1)
    unet_skips: bool = env_field(True, "skip connections from the first half of the layers to the second")
    skip_gates: bool = env_field(False, "learned gates between the stream and its skips", alias="SKIP_GATES_ENABLED")
    num_loops: int = env_field(0, "further passes through a loop of layers, with the same weights", lo=0, hi=16)
    loop_start: int = env_field(3, "first layer of that loop (from 0)", lo=0)
    loop_end: int = env_field(5, "last layer of that loop", lo=0)
    parallel_start_layer: int = env_field(0, "from this layer on attention and MLP work in parallel; 0: nowhere", lo=0)
    parallel_form: str = env_field("lanes", "each reads a stream of its own (PR 1204, 1855), or joint: both read the "
                                   "same (GPT-J; PR 1493)", choices="lanes joint")
    parallel_final_lane: str = env_field("mean", "which of the two streams is the last state", choices="mean attn mlp")
    residual_mix: bool = env_field(True, "learned scales of attention and MLP, and mixing in of the embedding")
    norm_weights: bool = env_field(False, "learned weights of the RMS norms (PR 1254)")
    norm_eps: float = env_field(0.0, "epsilon of the RMS norms; 0: that of the activation type", lo=0, hi=1)
    init: str = env_field("orthogonal", "initial banks; kaiming: all banks and tables", choices="orthogonal kaiming")
    qk_norm: bool = env_field(True, "normalise queries and keys, with a learned gain per query head")
    qk_gain_init: float = env_field(1.5, "initial gain of each query head", lo=0, hi=1000)
    ln_scale: bool = env_field(True, "scale normalised inputs by 1/sqrt(layer+1)")
    xsa_last_n: int = env_field(11, "exclusive self-attention in this many last layers", lo=0)
    attention_window: int = env_field(0, "tokens before it that a token attends to, besides itself; 0: all", lo=0)
    bigram_vocab_size: int = env_field(2048, "buckets of the hashed bigram table; 0: none", lo=0)
    bigram_dim: int = env_field(128, "width of the bigram table", lo=1)
    trigram_vocab_size: int = env_field(0, "buckets of the hashed trigram table; 0: none", lo=0)
    trigram_dim: int = env_field(128, "width of the trigram table", lo=1)
    ve_enabled: bool = env_field(True, "add a shared token embedding to the values of VE_LAYERS")
    ve_dim: int = env_field(128, "width of the value embedding", lo=1, alias="VALUE_EMBED_DIM")
    ve_layers: str = env_field("9,10", "layers (from 0) that get the value embedding, comma-separated")
    ve_last_n: int = env_field(-1, "instead: the last n layers; -1: off", lo=-1, alias="VALUE_EMBED_LAYERS")
    gated_attention: bool = env_field(False, "a learned gate on each head's output")
    sparse_attn_gate: bool = env_field(False, "another, from GATE_WINDOW channels", alias="SPARSE_ATTN_GATE_ENABLED")
    sparse_attn_gate_scale: float = env_field(1.0, "its steepness", lo=0, hi=1000)
    value_residual: bool = env_field(False, "mix the first layer's values into every later layer")
    dtg_enabled: bool = env_field(False, "a learned gate on each block's update")
    mtp_num_heads: int = env_field(0, "extra heads that predict tokens further ahead; training only", lo=0, hi=16)
    mtp_loss_weight: float = env_field(0.2, "weight of their mean loss", lo=0, hi=100)
    # Optimisers
    matrix_lr: float = env_field(0.025, "learning rate of the banks (Muon)", lo=0, hi=100, section="Optimisers")
    scalar_lr: float = env_field(0.025, "learning rate of vectors, gates and small projections (AdamW)", lo=0, hi=100)
    tied_embed_lr: float = env_field(0.035, "learning rate of the tables with TIE_EMBEDDINGS=1 (AdamW)", lo=0, hi=100)
    embed_lr: float = env_field(0.6, "learning rate of the tables with TIE_EMBEDDINGS=0", lo=0, hi=100)
    head_lr: float = env_field(0.008, "learning rate of an untied output layer and of MTP heads", lo=0, hi=100)
    muon_momentum: float = env_field(0.99, "momentum of Muon", lo=0, hi=0.9999)
    muon_momentum_warmup_start: float = env_field(0.92, "its initial value", lo=0, hi=0.9999)
    muon_momentum_warmup_steps: int = env_field(1500, "steps from the initial value to MUON_MOMENTUM", lo=0)
    muon_backend_steps: int = env_field(5, "Newton-Schulz iterations", lo=1, hi=20)
    polar_express: bool = env_field(False, "their own coefficients for each of the first five (Polar Express)")
    muon_row_normalize: bool = env_field(False, "rows of unit length before them (MuonEq-R, PR 1285)")
    muon_wd: float = env_field(0.04, "weight decay of the banks", lo=0, hi=10)
    normuon: bool = env_field(False, "normalise the rows of Muon's update (NorMuon, PR 173); off in PR 1092")
    muon_beta2: float = env_field(0.95, "decay of those row norms; used with NORMUON=1 only", lo=0, hi=0.9999)
    matrix_optimizer: str = env_field("muon", "what trains the banks", choices="muon adamw")
    adam_wd: float = env_field(0.04, "the same of AdamW, but for output heads", lo=0, hi=10, alias="WEIGHT_DECAY")
    embed_wd: float = env_field(-1.0, "instead, of the tables; -1: ADAM_WD", lo=-1, hi=10)
    beta1: float = env_field(0.9, "AdamW's first beta", lo=0, hi=0.9999)
    beta2: float = env_field(0.95, "AdamW's second beta", lo=0, hi=0.99999)
    adam_eps: float = env_field(1e-8, "AdamW's epsilon", lo=0, hi=1)
    grad_clip_norm: float = env_field(0.3, "norm the global gradient is clipped to; 0: no clipping", lo=0, hi=1e6)
    grad_quant: bool = env_field(False, "send bank gradients between ranks in bf16 instead of fp32")
    complement_alpha: float = env_field(0.0, "lower weight of tokens that bigram counts predict (PR 803)", lo=0, hi=1)
    control_tensor_name_patterns: str = env_field("", "more control tensors (floats): parts of names, comma-separated")
    # Schedule
    iterations: int = env_field(20_000, "maximum optimiser steps", lo=0, section="Schedule")
    max_wallclock_seconds: float = env_field(600.0, "training stops here; 0: no limit", lo=0, hi=1e7)
    warmup_steps: int = env_field(20, "steps that compile every graph and are then undone", lo=0)
    warmdown_iters: int = env_field(3500, "the learning rate falls to 0 over this many last steps", lo=0)
    warmdown_frac: float = env_field(0.0, "instead: over this last fraction of the budget; 0: off", lo=0, hi=1)
    warmdown_shape: str = env_field("linear", "how it falls", choices="linear cosine")
    min_lr: float = env_field(0.0, "with WARMDOWN_FRAC: lowest learning-rate scale", lo=0, hi=1)
    enable_looping_at: float = env_field(0.35, "NUM_LOOPS holds from this fraction of the budget on", lo=0, hi=0.99)
    val_loss_every: int = env_field(4000, "steps between validations; 0: only at the end", lo=0)
    val_batch_size: int = env_field(524_288, "maximum tokens per validation forward pass, over all ranks", lo=1)
    train_log_every: int = env_field(500, "steps between training log lines; 0: none", lo=0)
    checkpoint_every: int = env_field(1000, "steps between checkpoints; 0: only validations' and the last", lo=0)
    checkpoint_seconds: float = env_field(120.0, "seconds of training between them; 0: not by time", lo=0, hi=1e7)
    resume: bool = env_field(False, "continue from the last checkpoint of RUN_ID")
    # Averaging
    ema_enabled: bool = env_field(True, "export an exponential moving average of the weights", section="Averaging")
    ema_decay: float = env_field(0.997, "its decay per step", lo=0, hi=0.99999)
    ema_ramp: bool = env_field(True, "lower in the first steps; off as published")
    swa_enabled: bool = env_field(False, "export the mean of snapshots instead (collected, never used, in PR 1092)")
    swa_every: int = env_field(50, "steps between snapshots", lo=1)
    swa_start_frac: float = env_field(0.2, "snapshots start when the learning-rate scale falls below", lo=0, hi=1.01)
    lawa_enabled: bool = env_field(False, "export the mean of the last LAWA_K snapshots instead")
    lawa_k: int = env_field(10, "snapshots of LAWA", lo=1)
    lawa_freq: int = env_field(100, "steps between them", lo=1)
    # Quantisation
    qat_enabled: bool = env_field(False, "fake quantisation from the first step", section="Quantisation")
    late_qat: bool = env_field(True, "fake quantisation late in training: LATE_QAT_THRESHOLD or LATE_QAT_FRAC")
    late_qat_threshold: float = env_field(0.15, "it starts when the learning-rate scale falls below", lo=0, hi=1)
    late_qat_frac: float = env_field(0.0, "instead: at this fraction of the budget; 0: off", lo=0, hi=1)
    late_qat_min_step: int = env_field(0, "not before this step", lo=0)
    soft_round: bool = env_field(False, "QAT's rounding starts soft and hardens (PR 550)", alias="SOFT_ROUND_ENABLED")
    ema_reset_at_qat: bool = env_field(True, "restart the EMA when QAT starts (PR 1216)")
    mlp_quant_bits: int = env_field(6, "bits of the MLP banks", lo=2, hi=8, group="MATRIX_BITS")
    attn_qat_bits: int = env_field(6, "bits of attention", lo=2, hi=8, alias="ATTN_QUANT_BITS", group="MATRIX_BITS")
    embed_bits: int = env_field(8, "bits of the token table and output layer", lo=2, hi=8)
    bigram_bits: int = env_field(8, "bits of the hashed tables", lo=2, hi=8)
    ve_bits: int = env_field(8, "bits of the value-embedding table", lo=2, hi=8)
    clip_rule: str = env_field("percentile", "clip of each row: the best of five percentiles, the largest weight, k "
                               "standard deviations, or none: steps of rows and columns by water-filling (needs GPTQ; "
                               "bits do not matter then)", choices="percentile amax sdclip waterfill")
    mlp_clip_sigmas: float = env_field(12.85, "k of sdclip, MLP banks", lo=0.1, hi=1000, group="MATRIX_CLIP_SIGMAS")
    attn_clip_sigmas: float = env_field(12.85, "k of sdclip, attention", lo=0.1, hi=1000, group="MATRIX_CLIP_SIGMAS")
    embed_clip_sigmas: float = env_field(20.0, "k of sdclip, all tables", lo=0.1, hi=1000)
    clip_widen: float = env_field(1.0, "widens the steps of the banks; SIZE_FIT moves it", lo=1, hi=100)
    fp16_keep_name_patterns: str = env_field("", "stored as fp16, not rounded: parts of names, comma-separated")
    int8_keep_float_fp32_name_patterns: str = env_field("", "stored as fp32: parts of names, comma-separated")

    # Export: what follows training
    gptq_enabled: bool = env_field(False, "round so that each layer's output changes least (GPTQ), not to the nearest",
                                   section="Export")
    gptq_calibration: str = env_field("train", "calibrate on training batches or generated text", choices="train self")
    gptq_calibration_batches: int = env_field(16, "batches of it: TRAIN_BATCH_TOKENS each, or 4 sequences", lo=1)
    gptq_reserve_seconds: float = env_field(0.0, "calibration's part of MAX_WALLCLOCK_SECONDS; 0: 2 %", lo=0, hi=1e7)
    waterfill_nats: float = env_field(0.01, "nats per token that water-filling's steps cost by its own estimate; "
                                      "SIZE_FIT moves it, both ways", lo=1e-9, hi=100)
    waterfill_exponent: float = env_field(0.75, "a: its steps are in proportion to (second derivative of the loss)^"
                                          "(-a/2); 1 is best for fine steps, less for coarse ones", lo=0, hi=1)
    tune_steps: int = env_field(0, "optimiser steps that move codes after rounding, so that it costs less loss; of "
                                "waterfill only", lo=0)
    prune_frac: float = env_field(0.0, "zero this share of each matrix's smallest weights (PR 1216)", lo=0, hi=0.99)
    compress: str = env_field("auto", "entropy coder; range: ours for codes, LZMA for floats; auto: range, or lzma "
                              "without package constriction", choices="auto range lzma zstd", alias="COMPRESSOR")
    artifact_limit_bytes: int = env_field(16_000_000, "code + artifact above this ends the run with an error", lo=1)
    code_bytes: int = env_field(0, "size of the submitted code; 0: of this file; run.sh gives the built file's", lo=0)
    size_fit: bool = env_field(False, "instead: round more coarsely until it fits (waterfill: or more finely)")
    # Evaluation
    eval_seq_len: int = env_field(2048, "tokens per evaluation window; 0: TRAIN_SEQ_LEN", lo=0, section="Evaluation")
    eval_stride: int = env_field(64, "tokens each sliding window scores; 0: no such score", lo=0, alias="TTT_STRIDE")
    eval_batch_seqs: int = env_field(32, "windows per forward pass", lo=1)
    eval_artifact: str = env_field("", "score this artifact, with the model settings it holds, instead of training")
    eval_max_seconds: float = env_field(600.0, "for loading, compilation and all final scores together: cuts "
                                        "adaptation short, never scoring; 0: no limit", lo=0, hi=1e7)
    ttt_enabled: bool = env_field(True, "score once more with test-time training (TTT) on tokens already scored")
    ttt_mode: str = env_field("sgd", "what adapts: the weights, or low-rank additions to them", choices="sgd lora")
    ttt_reset: str = env_field("stream", "adapt along the text or (lora) in each document", choices="stream document")
    ttt_epochs: int = env_field(3, "passes over each scored chunk", lo=0)
    ttt_chunk_tokens: int = env_field(32_768, "tokens scored before each adaptation", lo=1)
    ttt_batch_seqs: int = env_field(32, "sequences per adaptation step, over all ranks", lo=1)
    ttt_grad_clip: float = env_field(1.0, "norm an adaptation gradient is clipped to; 0: no clipping", lo=0, hi=1e6)
    ttt_polyak_decay: float = env_field(0.0, "score with averaged weights of this decay; 0: off", lo=0, hi=0.99999)
    ttt_temp: float = env_field(1.0, "logits are divided by this while scoring with TTT", lo=1e-3, hi=1000)
    ttt_optimizer: str = env_field("sgd", "optimiser of the weights", choices="sgd adamw")
    ttt_lr: float = env_field(0.03, "its learning rate, a cosine over the chunks", lo=0, hi=100)
    ttt_momentum: float = env_field(0.9, "momentum of sgd", lo=0, hi=0.9999)
    ttt_freeze_blocks: int = env_field(0, "first blocks that stay frozen", lo=0)
    ttt_proj_lr_mult: float = env_field(-1.0, "MLP-down's rate over TTT_LR; -1: 3 for adamw, else 1", lo=-1, hi=1000)
    ttt_fc_lr_mult: float = env_field(-1.0, "MLP-up's rate over TTT_LR; -1: 0.5 for adamw, else 1", lo=-1, hi=1000)
    ttt_lora_rank: int = env_field(8, "rank of the additions", lo=1, alias="LORA_RANK")
    ttt_lora_alpha: float = env_field(0.0, "they are scaled by this over the rank; 0: by 1", lo=0, hi=1e5)
    ttt_lora_targets: str = env_field("q,v,head", "matrices that get one: of q, k, v, o, mlp, head, comma-separated")
    ttt_lora_parallel: bool = env_field(False, "those of o and mlp start at their block's normalised input (PR 1530)")
    ttt_lora_layers: str = env_field("", "in which layers (from 0), like 7-10 or 8,9,10; empty: all")
    ttt_lora_layer_rates: str = env_field("", "layers with another learning rate, relative to TTT_LORA_LR: 7:0.6,8:0.8")
    ttt_lora_optimizer: str = env_field("adam", "optimiser of the additions", choices="adam sgd")
    ttt_lora_lr: float = env_field(0.01, "its learning rate; a cosine over the chunks of a stream", lo=0, hi=100)
    ttt_local_lr_mult: float = env_field(1.0, "multiplies it (PR 1953)", lo=0, hi=100)
    ttt_beta1: float = env_field(0.9, "adam's first beta", lo=0, hi=0.9999)
    ttt_beta2: float = env_field(0.95, "adam's second beta", lo=0, hi=0.99999)
    ttt_adam_eps: float = env_field(1e-10, "adam's epsilon", lo=0, hi=1)
    ttt_weight_decay: float = env_field(0.0, "adam's decoupled weight decay", lo=0, hi=10)
    ttt_batch_docs: int = env_field(64, "documents in a rank's batch; fewer are padded", lo=1, alias="TTT_BATCH_SIZE")
    ttt_doc_chunk_tokens: int = env_field(256, "document tokens scored per adaptation", lo=1, alias="TTT_CHUNK_SIZE")
    ttt_chunk_ladder: str = env_field("", "fewer where a batch's longest document has at most so many tokens (PR "
                                      "2014): 256:8,2000:24", alias="TTT_SHORT_SCORE_FIRST_STEPS")
    ttt_min_doc_tokens: int = env_field(0, "a document adapts once this many of its tokens are scored", lo=0)
    ttt_eval_seq_len: int = env_field(0, "tokens of context inside a document; 0: EVAL_SEQ_LEN", lo=0)
    ttt_warm_start_a: bool = env_field(False, "the first factors, A, go on to the next batch of documents (PR 1767)")
    ttt_warm_chains: int = env_field(8, "in this many chains of batches, whatever the number of ranks", lo=1, hi=4096)
    phased_ttt_num_phases: int = env_field(0, "times that the weights train on finished documents, between those that "
                                           "adapt by themselves (PR 1610, 1626); 0: never", lo=0, hi=999)
    phased_ttt_prefix_docs: int = env_field(2000, "documents, the longest ones, finished at the last such phase", lo=1)
    global_ttt_lr: float = env_field(0.001, "learning rate of its SGD, a cosine over the chunks", lo=0, hi=100)
    global_ttt_momentum: float = env_field(0.9, "its momentum", lo=0, hi=0.9999)
    global_ttt_chunk_tokens: int = env_field(32_768, "tokens of a step, over all ranks", lo=1)
    global_ttt_epochs: int = env_field(1, "steps on each chunk", lo=1, hi=1000)
    global_ttt_grad_clip: float = env_field(1.0, "norm its gradient is clipped to; 0: no clipping", lo=0, hi=1e6)
    hash_embed_buckets: int = env_field(0, "rows of a bigram table only TTT trains (PR 1460: 16,384); 0: none", lo=0)
    hash_embed_lr_mult: float = env_field(10.0, "its rate over the other weights'", lo=0, hi=1e5)
    ngram_orders: str = env_field("", "context lengths at which counts of scored tokens join the last score's "
                                  "probabilities, shortest first, those of a document alone (d) before those of the "
                                  "whole text: d1,d2,d3,2,3,4,5,6,8,12; empty: none")
    ngram_concentrations: str = env_field("8", "weight of a shorter context's probability there, for each token known "
                                        "to follow: one for all lengths or one each (tools/ngram.py finds them)")

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
    def lora_lr(self) -> float:
        return self.ttt_lora_lr * self.ttt_local_lr_mult

    @property
    def table_wd(self) -> float:
        """Weight decay of the embedding tables."""
        return self.embed_wd if self.embed_wd >= 0 else self.adam_wd

    @property
    def train_seconds(self) -> float:
        """Seconds for training steps: the time limit less what calibration takes of it. 0: no limit."""
        limit = self.max_wallclock_seconds
        return limit - (self.gptq_reserve_seconds or 0.02 * limit) if limit and self.gptq_enabled else limit

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
    def stride(self) -> int:
        """Tokens that a window scores while test-time training."""
        return self.eval_stride or self.window

    @property
    def doc_context(self) -> int:
        """Most tokens a document's token is scored with."""
        return self.ttt_eval_seq_len or self.window

    @property
    def doc_chunks(self) -> tuple[tuple[float, int], ...]:
        """(tokens of the longest document, tokens of its chunks), growing. Raises UserError."""
        last = math.inf, self.ttt_doc_chunk_tokens
        return *parse_list("TTT_CHUNK_LADDER", self.ttt_chunk_ladder,
                           "growing lengths of documents with growing chunks below "
                           f"TTT_DOC_CHUNK_TOKENS={self.ttt_doc_chunk_tokens}, like 256:8,2000:24", pair(int, int),
                           lambda steps: all(map(growing, zip((0, 0), *steps, last)))), last

    @property
    def lengths_known(self) -> bool:
        """Whether scores depend on the lengths of documents, which a decoder would have to be told."""
        return self.ttt_warm_start_a or bool(self.ttt_chunk_ladder) or self.phased_ttt_num_phases > 0

    def visits(self, looped: bool) -> list[int]:
        """The layers in the order in which they are applied; `looped`: those of the loop again and again."""
        layers, again = list(range(self.num_layers)), self.num_loops if looped else 0
        end = self.loop_end + 1
        return layers[:end] + layers[self.loop_start:end] * again + layers[end:]

    @property
    def two_lanes(self) -> bool:
        return self.parallel_start_layer > 0 and self.parallel_form == "lanes"

    @property
    def seq_stages(self) -> tuple[tuple[int, float], ...]:
        """Training lengths, each with the share of the budget until which it is used. Raises UserError."""
        return parse_list(
            "TRAIN_SEQ_SCHEDULE", self.train_seq_schedule or f"{self.train_seq_len}:1",
            "lengths and growing shares of the budget, the last of them 1, like 1024:0.1,2048:1", pair(int, float),
            lambda stages: min(stages)[0] >= 2 and stages[-1][1] == 1 and growing([0, *(end for _, end in stages)]))

    @property
    def seq_unit(self) -> int:
        """The fewest tokens that are whole sequences of every training length."""
        return math.lcm(*(length for length, _ in self.seq_stages))

    @property
    def ve_layer_ids(self) -> tuple[int, ...]:
        """Layers with the value embedding. Raises UserError, as the next three properties do."""
        if not self.ve_enabled:
            return ()
        if self.ve_last_n >= 0:
            return tuple(range(self.num_layers))[self.num_layers - self.ve_last_n:]
        return parse_list("VE_LAYERS", self.ve_layers, "a list of layer numbers like 9,10", int)

    @property
    def lora_kinds(self) -> tuple[str, ...]:
        """Which matrices LoRA adds to, by the names of LayerWeights."""
        kinds = {"q": ["query"], "k": ["key"], "v": ["value"], "o": ["out"], "head": ["head"],
                 "mlp": ["down"] if self.ttt_lora_parallel else ["up", "down"]}
        chosen = parse_list("TTT_LORA_TARGETS", self.ttt_lora_targets, "some of q,k,v,o,mlp,head", kinds.__getitem__)
        return tuple(itertools.chain(*chosen))

    @property
    def lora_layer_ids(self) -> tuple[int, ...]:
        """Layers LoRA adds to, in order."""
        spans = parse_list("TTT_LORA_LAYERS", self.ttt_lora_layers, "layers like 7-10 or 8,9,10",
                           lambda part: [int(end) for end in part.split("-", 1)])
        chosen = {layer for span in spans for layer in range(min(span), max(span) + 1)}
        return tuple(sorted(chosen or range(self.num_layers)))

    @property
    def lora_layer_rates(self) -> dict[int, float]:
        """Layer -> its learning rate over TTT_LORA_LR, where that is not 1."""
        return dict(parse_list("TTT_LORA_LAYER_RATES", self.ttt_lora_layer_rates, "pairs like 7:0.6", pair(int, float)))

    @property
    def ngrams(self) -> tuple[tuple[tuple[bool, int], float], ...]:
        """Contexts that are counted, ((in the whole text?, length), concentration), growing. Raises UserError."""
        orders = parse_list("NGRAM_ORDERS", self.ngram_orders, "growing lengths of contexts, like d1,d2,2,3,5",
                            lambda part: (part[0] != "d", int(part.removeprefix("d"))), growing)
        weights = parse_list(
            "NGRAM_CONCENTRATIONS", self.ngram_concentrations,
            f"one positive number, or one for each of NGRAM_ORDERS={self.ngram_orders}", float,
            lambda weights: len(weights) in (1, len(orders)) and all(0 < weight < math.inf for weight in weights))
        return tuple(zip(orders, itertools.cycle(weights)))

    @classmethod
    def from_env(cls, environ, rules=None) -> Hyperparameters:
        """Settings from a mapping of variables. Raises UserError on a bad value, a misspelt name or a contradiction by
        the rules (None: all)."""
        refuse_near_misses(environ)
        values = {}
        for f in dataclasses.fields(cls):
            given = [name for name in env_names(f) if name in environ]
            given = [name for name in given if name != f.metadata["group"]] or given
            parsed = {name: parse_value(name, f, environ[name]) for name in given}
            if len(set(parsed.values())) > 1:
                raise UserError(f"{' and '.join(given)} are one setting and were given different values")
            if given:
                values[f.name] = parsed[given[0]]
        cfg = cls(**values)
        check_combinations(cfg, rules or combination_rules)
        return cfg

    def non_defaults(self) -> dict:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default}


WITHOUT_EFFECT = {  # published variables that cannot mean anything here -> why; a run logs those that are set
    **dict.fromkeys(("NGRAM_CACHE", "NGRAM_ORDER", "NGRAM_TAU", "NGRAM_CONC", "HEDGE_MIXER", "HEDGE_ETA"),
                    "hashed n-gram mixers do not give normalised probabilities; NGRAM_ORDERS counts exactly"),
    **dict.fromkeys(("ONLINE_BIAS", "BIAS_LR"), "PR 550's online bias learned from padding; test-time training adapts"),
    **dict.fromkeys(("NORM_RECAL_EPOCHS", "NORM_RECAL_LR", "NORM_RECAL_SEQS", "FISHER_VAL_SEQS"),
                    "training on validation text before it is scored is not legal"),
    **dict.fromkeys(("GLOBAL_TTT_WARMUP_CHUNKS", "GLOBAL_TTT_WARMUP_START_LR"), "no published run's rate rises first"),
    "GLOBAL_TTT_BATCH_SEQS": "each chunk is one step", "GLOBAL_TTT_RESPECT_DOC_BOUNDARIES": "no document reads another",
    "TTT_MAX_SEQS": "every token is scored", "SPEED_MEASURE_STEPS": "the warm-down follows the clock at every step",
    "WANDB_ENABLED": "run.sh and tools/track.py send what runs/RUN_ID/events.jsonl has"}


def process_environment() -> dict[str, str]:
    return dict(os.environ)


def env_names(f: dataclasses.Field) -> tuple[str, ...]:
    return tuple(filter(None, (f.name.upper(), f.metadata["alias"], f.metadata["group"])))


INT_LIMIT = 2 ** 31 - 1  # upper bound of integers that declare none
TYPES = {"bool": ("0 or 1", lambda text: {"0": False, "1": True}[text.strip()]), "int": ("a whole number", int),
         "float": ("a number", float), "str": ("text", str)}  # annotation -> what is wanted, parser


def parse_value(name: str, f: dataclasses.Field, text: str):
    """The value of one variable. Raises UserError if its type or range is wrong."""
    (wanted, parse), meta = TYPES[f.type], f.metadata
    try:
        value = parse(text)
    except (ValueError, KeyError):
        raise UserError(f"{name}={text!r} is not {wanted}") from None
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(f"{name}={text!r} is not one of {', '.join(meta['choices'])}")
    if meta["lo"] is not None and not meta["lo"] <= value <= (INT_LIMIT if meta["hi"] is None else meta["hi"]):
        raise UserError(f"{name}={text.strip()} is out of range: {describe_range(f)}")  # NaN, too
    return value


def parse_list(name: str, text: str, wanted: str, parse, fits=lambda values: True) -> tuple:
    """`parse` of each part of a comma-separated text. Raises UserError unless they can be parsed and fit together."""
    with contextlib.suppress(ValueError, LookupError):
        values = tuple(parse(part.strip()) for part in text.split(",") if part.strip())
        if fits(values):
            return values
    raise UserError(f"{name}={text!r} is not {wanted}")


def pair(*parse):
    """A parser of A:B, made of one for each."""
    return lambda text: tuple(read(part) for read, part in zip(parse, text.split(":"), strict=True))


def growing(values) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def describe_range(f: dataclasses.Field) -> str:
    lo, hi = f.metadata["lo"], f.metadata["hi"]
    if lo is None:
        return "0, 1" if f.type == "bool" else ", ".join(f.metadata["choices"]) or "text"
    return f"{lo} or more" if hi is None else f"{lo} to {hi}"


def refuse_near_misses(environ) -> None:
    """Raise UserError for a variable that is spelt almost like a setting, if its value would be valid for that setting;
    all others belong to other programs."""
    known = {name: f for f in dataclasses.fields(Hyperparameters) for name in env_names(f)}
    others = {"RANK", "LOCAL_RANK", "WORLD_SIZE", *WITHOUT_EFFECT}  # torchrun's own; names with a reason of their own
    for name in sorted(set(environ) - set(known) - others):
        alike = [k for k in known if abs(len(k) - len(name)) <= 1 and len(name) >= 5]
        for near in difflib.get_close_matches(name, alike, 1, cutoff=0.88):  # OMP_NUM_THREADS is 0.86 of MTP_NUM_HEADS
            try:
                parse_value(near, known[near], environ[name])
            except UserError:
                continue
            raise UserError(f"{name} is not a setting; did you mean {near}? (python train_gpt.py --help lists all)")


def check_combinations(cfg: Hyperparameters, rules) -> None:
    """Raise UserError where settings contradict each other."""
    shown = {f.name: f"{f.name.upper()}={getattr(cfg, f.name)!r}".removesuffix(".0") for f in dataclasses.fields(cfg)}
    for holds, message in rules(cfg):
        if not holds:
            raise UserError(message.format(**shown, head_dim=cfg.head_dim, window=cfg.window, last=cfg.num_layers - 1,
                                           scored=cfg.stride, context=cfg.doc_context))


def model_rules(cfg: Hyperparameters):
    """Yields (holds, message) of each rule, which may rely on those before it; {model_dim} becomes MODEL_DIM=512."""
    yield cfg.model_dim % cfg.num_heads == 0, "{model_dim} is not divisible by {num_heads}"
    yield cfg.num_heads % cfg.num_kv_heads == 0, "{num_heads} is not divisible by {num_kv_heads}"
    yield cfg.mlp_dim >= 1, "{mlp_mult} of {model_dim} leaves an MLP of no width"
    yield cfg.rope_dims <= cfg.head_dim, "{rope_dims} is more than a head's {head_dim} dimensions"
    yield (cfg.rope_dims or cfg.head_dim) % 2 == 0, "{rope_dims} of {head_dim} (0: all) is odd; rotation works on pairs"
    yield cfg.bigram_vocab_size != 1, "{bigram_vocab_size} leaves no bucket; use 0 or at least 2"
    yield cfg.trigram_vocab_size != 1, "{trigram_vocab_size} leaves no bucket; use 0 or at least 2"
    yield cfg.ve_last_n <= cfg.num_layers, "{ve_last_n} is more than {num_layers}"
    ids, layers = cfg.ve_layer_ids, set(range(cfg.num_layers))
    yield len(layers.intersection(ids)) == len(ids), "{ve_layers} names a layer twice or outside 0..{last}"
    yield cfg.gate_window <= cfg.model_dim, "{gate_window} is more than {model_dim}"
    if cfg.num_loops:
        yield cfg.loop_start <= cfg.loop_end < cfg.num_layers, "{loop_start} to {loop_end} is no range in 0..{last}"
        yield not cfg.two_lanes or cfg.loop_end < cfg.parallel_start_layer, (
            "{loop_end} is in the parallel part, {parallel_start_layer}: a loop cannot join two lanes")
    yield cfg.parallel_start_layer < cfg.num_layers, "{parallel_start_layer} is outside 0..{last}"
    yield not (cfg.two_lanes and cfg.dtg_enabled), "{dtg_enabled} gates one stream; {parallel_form} has two"
    yield cfg.attention_window != 1, "{attention_window} is too short to attend; use 0 or at least 2"


def combination_rules(cfg: Hyperparameters):
    """All rules of a run."""
    yield from model_rules(cfg)
    yield cfg.eval_stride <= cfg.window, "{eval_stride} is longer than a window of {window}"
    yield cfg.attention_window <= cfg.window, "{attention_window} is longer than a window of {window}"
    yield from training_rules(cfg) if not cfg.eval_artifact else ()
    yield from adaptation_rules(cfg) if cfg.ttt_enabled else ()
    yield all(1 <= length <= 10_000 for (_, length), _ in cfg.ngrams), (
        "{ngram_orders} has contexts that are not 1 to 10,000 tokens long")
    yield cfg.iterations or not cfg.resume, "RESUME=1 with {iterations}: nothing to resume"
    yield cfg.run_id or not cfg.resume, "RESUME=1 needs the RUN_ID of the run to resume"
    yield re.fullmatch(r"(?!\.)[\w.+-]*", cfg.run_id), "{run_id} names files: letters, digits, _ + -, later dots"


def training_rules(cfg: Hyperparameters):
    """The rules of what an artifact that is there already no longer needs."""
    yield cfg.train_batch_tokens % cfg.train_seq_len == 0, "{train_batch_tokens} is not divisible by {train_seq_len}"
    lengths = [length for length, _ in cfg.seq_stages]
    yield max(lengths) == cfg.train_seq_len, "the longest of {train_seq_schedule} is not {train_seq_len}"
    yield cfg.train_batch_tokens % cfg.seq_unit == 0, (
        f"{{train_batch_tokens}} is not divisible by {cfg.seq_unit}, the least that {{train_seq_schedule}} divides")
    yield cfg.attention_window <= min(lengths), (
        f"{{attention_window}} is longer than the training sequences of {min(lengths)}")
    yield not cfg.max_wallclock_seconds or cfg.train_seconds > 0, (
        "{gptq_reserve_seconds} leaves nothing of {max_wallclock_seconds} for training")
    if cfg.clip_rule == "waterfill":
        yield cfg.gptq_enabled, "{clip_rule} rounds by GPTQ's Hessians; {gptq_enabled}"
        yield not (cfg.qat_enabled or cfg.late_qat), (
            "{clip_rule} has no steps before the end of training: {late_qat}, {qat_enabled}")


def adaptation_rules(cfg: Hyperparameters):
    """The rules of test-time training."""
    if cfg.ttt_reset == "stream":
        yield not cfg.phased_ttt_num_phases, "{phased_ttt_num_phases} has no finished documents with {ttt_reset}"
        yield cfg.ttt_chunk_tokens >= cfg.train_seq_len, "{ttt_chunk_tokens} holds no sequence of {train_seq_len}"
        yield cfg.ttt_chunk_tokens >= cfg.stride, "{ttt_chunk_tokens} is less than the {scored} a window scores"
    else:
        yield cfg.ttt_mode == "lora", "{ttt_reset} needs weights per document, which only TTT_MODE=lora has"
        yield cfg.doc_chunks[-1][1] <= cfg.doc_context, "{ttt_doc_chunk_tokens} is longer than a window of {context}"
        yield not cfg.rope_train_seq_len or cfg.ttt_eval_seq_len <= cfg.train_seq_len, (
            "{ttt_eval_seq_len} over {train_seq_len} would change the rotary base; ROPE_TRAIN_SEQ_LEN=0 never does")
        learns = "phased_ttt_num_phases" if cfg.phased_ttt_num_phases else "ttt_warm_start_a"
        yield not (cfg.ngrams and getattr(cfg, learns)), (
            f"{{ngram_orders}} follows the text, {{{learns}}} the lengths: no order of decoding serves both")
        yield cfg.phased_ttt_num_phases <= cfg.phased_ttt_prefix_docs, (
            "{phased_ttt_prefix_docs} leaves some of {phased_ttt_num_phases} without documents to learn from")
        yield not cfg.hash_embed_buckets, "{hash_embed_buckets} works along a stream; {ttt_reset} restarts"
        yield not cfg.ttt_polyak_decay, "{ttt_polyak_decay} works along a stream; {ttt_reset} restarts"
    if cfg.ttt_mode == "lora":
        layers = set(range(cfg.num_layers))
        yield cfg.lora_kinds, "{ttt_lora_targets} is not some of q,k,v,o,mlp,head"
        yield layers.issuperset(cfg.lora_layer_ids), "{ttt_lora_layers} names a layer outside 0..{last}"
        yield layers.issuperset(cfg.lora_layer_rates), "{ttt_lora_layer_rates} names a layer outside 0..{last}"


def settings_by_section() -> dict[str, list[dataclasses.Field]]:
    sections = {}
    for f in dataclasses.fields(Hyperparameters):
        if f.metadata["section"]:
            sections[f.metadata["section"]] = current = []
        current.append(f)
    return sections


def config_table(title: str = "{0}", row: str = "  {0:<34} {1!s:<10} {3} [{2}]") -> str:
    """The settings by section, each in a row: variable, default, range, meaning. What --help prints."""
    lines = []
    for section, fields in settings_by_section().items():
        lines.append(title.format(section))
        for f in fields:
            default = "(empty)" if f.default == "" else int(f.default) if f.type == "bool" else f.default
            lines.append(row.format(" = ".join(env_names(f)), default, describe_range(f), f.metadata["help"]))
        lines.append("")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ RUNTIME
@contextlib.contextmanager
def replacing(path: Path, size: str = ""):
    """A spare path, for what then takes the place of `path` completely or not at all. Raises UserError."""
    spare = path.with_name(f".{path.name}.{threading.get_native_id()}.tmp")  # no two writers share one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        spare.unlink(missing_ok=True)
        yield spare
        os.replace(spare, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.unlink()
        raise UserError(f"cannot write {path}{size}: {error.strerror}") from None


def write_atomically(path: Path, data: bytes, older: Path | None = None) -> None:
    """Write a file completely or not at all. An existing file is kept on failure; on success it moves to `older`, if
    given. Raises UserError."""
    with replacing(path, f" ({len(data):,} bytes)") as spare:
        with open(spare, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        if older is not None and path.exists():
            os.replace(path, older)


def older_place(path: Path) -> Path:
    """Where the file at `path` moves when another run needs its place: NAME.DATE.SUFFIX."""
    date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
    return path.with_name(f"{path.stem}.{date}{path.suffix}")


def link(place: Path, file: Path) -> None:
    """Make `place` a relative link to `file`, or a copy of it where there are no links. Raises UserError."""
    with replacing(place) as spare:
        try:
            spare.symlink_to(os.path.relpath(file.resolve(), place.parent.resolve()))
            if place.is_file() and not place.is_symlink():  # it is not a run's, whose place has links
                place.rename(older_place(place))
        except OSError:
            spare.write_bytes(file.read_bytes())


def read_file(path: str | Path) -> bytes:
    """Raises UserError."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


class Signals:
    """SIGINT and SIGTERM, inside `with`. The first one of this rank is `number`: raised as KeyboardInterrupt(number) at
    once, or noted for the code that is running to act on, when all ranks have `agreed` on one. A second one stops the
    process."""

    SAME_S = 1.0  # a cluster sends one to each process, and torchrun passes on its own

    def __init__(self):
        self.number, self.agreed, self.at_once, self.first_s = 0, 0, False, 0.0

    def __call__(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.first_s = number, time.monotonic()
            self.raise_where_allowed()
        elif time.monotonic() > self.first_s + self.SAME_S:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def raise_where_allowed(self) -> None:
        if self.at_once and self.number:
            raise KeyboardInterrupt(self.number)

    def __enter__(self) -> Signals:
        heard = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        self.before = {number: signal.signal(number, self) for number in heard}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def act(self, at_once: bool):
        """Whether one is raised inside, or noted."""
        before, self.at_once = self.at_once, at_once
        try:
            self.raise_where_allowed()
            yield
        finally:
            self.at_once = before
        self.raise_where_allowed()


class RunLog:
    """Console and runs/RUN_ID/log.txt for people, events.jsonl beside it for programs; silent on ranks other than 0.
    The files are created by the first line, so that a run which is refused leaves none."""

    def __init__(self, folder: Path, run_id: str, active: bool = True, append: bool = False):
        self.folder, self.base = folder / "runs" / run_id, folder / "logs" / run_id
        self.active, self.append, self.broken, self.held = active, append, False, None

    def link(self, name: str) -> None:
        """Show a file where this field's tools look for it, in logs/ by the name of its run."""
        kind = {"log.txt": ".txt", "events.jsonl": ".jsonl"}.get(name, f".{name}")
        link(self.base.with_name(self.base.name + kind), self.folder / name)

    def write(self, name: str, text: str) -> None:
        """A whole file beside the log. Raises UserError."""
        if self.active:
            write_atomically(self.folder / name, text.encode())
            self.link(name)

    def __call__(self, text: str, event: str = "", console: bool = True, **fields) -> None:
        """One line for people and, with an event name, one JSON object for programs. Raises UserError if a log file
        cannot be created."""
        if not self.active:
            return
        if console:
            print(text, flush=True)
        self.held = self.held or self.begin()
        self._append("log.txt", text)
        if event:
            self._append("events.jsonl", json.dumps({"event": event, "time": round(time.time(), 3), **fields}))

    def begin(self):
        """Create the files. Returns the log, locked until it is closed or this process ends, in whatever way. Raises
        UserError if they cannot be written, or another process holds the log."""
        path = self.folder / "log.txt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            held = open(path, "a")
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another run with RUN_ID={self.base.name} is going on: it writes {path}") from None
            except OSError:
                pass  # a file system without locks
            for spare in self.folder.glob(".*.tmp"):  # of a run that was killed while it wrote
                spare.unlink()
            for name in ("log.txt", "events.jsonl"):
                open(self.folder / name, "a" if self.append else "w").close()
                self.link(name)
        except OSError as error:
            raise UserError(f"cannot write logs to {self.folder}: {error.strerror}") from None
        return held

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.folder / name, "a", encoding="utf-8") as f:
                f.write(text + "\n")
        except OSError as error:
            if not self.broken:  # a full disk must not end the run: its model may be saved on another one
                print(f"warning: log {self.folder / name} is incomplete: {error.strerror}", file=sys.stderr)
            self.broken = True

    def close(self) -> None:
        if self.held:
            self.held.close()


class Progress:
    """Lines in the log of how far something has come: after 5 seconds, then whenever twice as many have passed."""

    FIRST_SECONDS = 5.0

    def __init__(self, log: RunLog, total: int, what: str):
        self.log, self.total, self.what, self.done = log, total, what, 0
        self.start, self.due = time.perf_counter(), self.FIRST_SECONDS

    def update(self) -> None:
        self.done += 1
        seconds = time.perf_counter() - self.start
        if seconds > self.due and self.done < self.total:
            self.due = 2 * seconds
            self.log(f"{self.what}: {self.done} of {self.total} after {seconds:.0f} s, about "
                     f"{seconds * (self.total / self.done - 1):.0f} s to go")


class Stopwatch:
    """Seconds since it was made plus `spent`, without those inside `paused()`. `now`: the clock, for tests."""

    def __init__(self, spent: float = 0.0, now=time.perf_counter):
        self.now, self.start = now, now() - spent

    def elapsed(self) -> float:
        return self.now() - self.start

    @contextlib.contextmanager
    def paused(self, synchronize=lambda: None):
        """`synchronize` waits for the device, so that its queued work counts where it was queued."""
        synchronize()
        before = self.now()
        yield
        synchronize()
        self.start += self.now() - before


class Documents(NamedTuple):
    """The documents of a flat stream [1, N], which attention does not cross: int32 positions where each begins, then N,
    repeated at will (a tensor of one size needs one graph), and the most tokens that one has."""

    starts: Tensor
    longest: int

    def number(self, length: int) -> Tensor:
        """Which document each position belongs to, from 1.  # int64 [length]"""
        return torch.searchsorted(self.starts, torch.arange(length, device=self.starts.device), right=True)

    def distance(self, length: int) -> Tensor:
        """Of each position from the start of its document.  # int64 [length]"""
        return torch.arange(length, device=self.starts.device) - self.starts[self.number(length) - 1]


def attend_math(q: Tensor, k: Tensor, v: Tensor, window: int = 0, documents: Documents | None = None) -> Tensor:
    """Causal attention in plain fp32 operations: the reference of every other back end.

    q: [batch, Tq, heads, d]; k, v: [batch, Tk, kv_heads, d]; query i is at position Tk - Tq + i;
    query head h attends to kv head h // (heads / kv_heads), at its own position and `window` before it (0: all), inside
    its own document. Returns [batch, Tq, heads, d].
    """
    group = q.size(2) // k.size(2)
    k, v = (t.repeat_interleave(group, dim=2).float() for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k) * q.size(-1) ** -0.5
    scores = scores.masked_fill(~causal_mask(q.size(1), k.size(1), q.device, window, documents), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype)


def causal_mask(queries: int, keys: int, device, window: int = 0, documents: Documents | None = None) -> Tensor:
    """True where a query may attend; the last query is at the last key's position.  # [queries, keys]"""
    mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    mask = mask.triu(keys - queries - window) if window else mask
    if documents is None:
        return mask
    number = documents.number(keys)
    return mask & (number[keys - queries:, None] == number)


def attend_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int = 0, documents: Documents | None = None,
                first: SDPBackend | None = None) -> Tensor:
    """`attend_math` by PyTorch's fused kernels. `first`: the one that it tries first; the others stay allowed, because
    none takes every shape, type and mask. None: PyTorch's own order."""
    if documents is not None and q.device.type != "cpu" and q.dtype != torch.float32:
        # what varlen_attn calls, which torch 2.9 has not, and later ones with other arguments
        return attend_varlen(torch.ops.aten._flash_attention_forward, q, k, v, documents, dropout_p=0.0, is_causal=True,
                             return_debug_mask=False, window_size_left=window or None)
    if documents is not None and not torch.compiler.is_compiling():  # no graph: without the masked part's products
        bounds = documents.starts.unique().tolist()
        parts = [[t[:, begin:end] for t in (q, k, v)] for begin, end in zip(bounds, bounds[1:])]
        return torch.cat([attend_sdpa(*part, window, first=first) for part in parts], dim=1)
    whole = q.size(1) == k.size(1) and not window and documents is None
    causal = True if whole else False  # a plain bool, for graphs of any length too
    mask = None if causal else causal_mask(q.size(1), k.size(1), q.device, window, documents)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.is_cuda and not causal:  # the flash kernel takes no mask, and the memory-efficient one no grouped heads
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
    with sdpa_kernel([first, *SDPA_KERNELS], set_priority=True) if first else contextlib.nullcontext():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                              enable_gqa=k.size(1) < q.size(1)).transpose(1, 2)


def attend_varlen(function, q: Tensor, k: Tensor, v: Tensor, documents: Documents, **options) -> Tensor:
    """`attend_math` by a FlashAttention of sequences end to end."""
    out = function(q[0], k[0], v[0], *[documents.starts] * 2, *[documents.longest] * 2, **options)
    return (out[0] if isinstance(out, tuple) else out).unsqueeze(0)


SDPA_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]
FLASH_ATTENTION = {  # where it may come from: (ATTENTION, compute capabilities that have its kernels)
    "flash_attn_interface": ("fa3", (9,)), "kernels-community/flash-attn3": ("fa3", (9,)),
    "flash_attn.cute": ("fa4", (9, 10))}


def load_flash_attention(source: str):
    """FlashAttention of a package or, by the package `kernels`, of the Hugging Face hub. Raises whatever they raise."""
    if source == "flash_attn.cute":  # takes the place of PyTorch's flash kernel; torch 2.9 has no such function
        torch.nn.attention.activate_flash_attention_impl("FA4")
        return functools.partial(attend_sdpa, first=SDPBackend.FLASH_ATTENTION)
    module = (importlib.import_module("kernels").get_kernel(source, version=1) if "/" in source else
              importlib.import_module(source))

    def attend_fa3(q, k, v, window=0, documents=None):
        options = {"causal": True, "window_size": (window, 0) if window else (-1, -1)}
        if documents is not None:
            return attend_varlen(module.flash_attn_varlen_func, q, k, v, documents, **options)
        out = module.flash_attn_func(q, k, v, **options)
        return out[0] if isinstance(out, tuple) else out
    return attend_fa3


def pick_attention(wanted: str, device: torch.device, dtype: torch.dtype, notes: list[str] | None = None):
    """(name, function) of the attention back end: FlashAttention 3 or 4, cuDNN or flash SDPA, math - in that order.
    What could not be loaded goes to `notes`, in one line. Raises UserError where the wanted one cannot run."""
    if wanted == "math":
        return "math", attend_math
    on_cuda, failed = device.type == "cuda", []
    major = torch.cuda.get_device_capability(device)[0] if on_cuda and dtype == torch.bfloat16 else 0
    for source, (name, majors) in FLASH_ATTENTION.items():
        if wanted in ("auto", name) and major in majors:
            try:
                return name, load_flash_attention(source)
            except Exception as error:  # a library for another PyTorch or CUDA, or no network: of any kind
                failed.append(f"{source} ({type(error).__name__}: {' '.join(str(error).split())[:100]})")
    if wanted in ("fa3", "fa4"):
        raise UserError(f"ATTENTION={wanted} needs bf16, a Hopper GPU (fa4: or Blackwell) and its package: "
                        f"{', '.join(failed) or 'not here'}")
    if wanted == "cudnn" and not on_cuda:
        raise UserError("ATTENTION=cudnn needs CUDA")
    name = "cudnn" if on_cuda and wanted != "flash" and torch.backends.cudnn.is_available() else "flash"
    if failed and notes is not None:
        notes.append(f"warning: attention by {name}: no FlashAttention from {', '.join(failed)}")
    first = SDPBackend.CUDNN_ATTENTION if name == "cudnn" else SDPBackend.FLASH_ATTENTION
    return name, functools.partial(attend_sdpa, first=first) if on_cuda else attend_sdpa


def pick_kernels(wanted: str, device: torch.device) -> str:
    """"torch" or "triton". Raises UserError where Triton cannot run."""
    if wanted != "triton":
        return "torch"
    try:
        interprets = importlib.import_module("triton").knobs.runtime.interpret  # TRITON_INTERPRET, as Triton read it
    except (ImportError, AttributeError):
        raise UserError("KERNELS=triton needs Triton 3.5 or newer, which comes with PyTorch's CUDA build") from None
    if not interprets and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9):
        raise UserError("KERNELS=triton needs a CUDA device of Hopper's kind or newer (TRITON_INTERPRET=1 tries the "
                        "kernels out in Python)")
    return "triton"


def require_compiler(device: torch.device) -> None:
    """Compile a trivial function, so that a missing compiler is found before training. Raises UserError."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
    except Exception as error:  # each back end has its own
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"torch.compile does not work here ({reason.strip()[:150]}); COMPILE=0 runs without") from None


def peak_rss_bytes() -> int:
    """Peak resident memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_ranks(environ) -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun sets them, (0, 1, 0) without it. Raises UserError."""
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    texts = {name: environ.get(name, default) for name, default in defaults.items()}
    for name, text in texts.items():
        if not text.isdecimal():
            raise UserError(f"{name}={text!r} is not a whole number; torchrun sets it, a single process needs none")
    rank, world_size, local_rank = map(int, texts.values())
    if rank >= world_size:
        raise UserError(f"RANK={rank} does not exist in WORLD_SIZE={world_size}; torchrun sets both, a single process "
                        "needs neither")
    absent = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name)]
    if world_size > 1 and absent:
        raise UserError(f"WORLD_SIZE={world_size} needs {' and '.join(absent)}; start with torchrun, or unset it")
    return rank, world_size, local_rank


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
    groups: dict = dataclasses.field(default_factory=dict)  # "cpu": the ranks without their devices; `close` empties it
    kernels: str = "torch"
    notes: list[str] = dataclasses.field(default_factory=list)  # for the log, which opens later
    resumes: bool = False  # RESUME=1, or torchrun has restarted the ranks
    unwritten: list[str] = dataclasses.field(default_factory=list)  # files that failed, for the end of the run
    threads: list[threading.Thread] = dataclasses.field(default_factory=list)  # at most one: see in_background
    signals: Signals = dataclasses.field(default_factory=Signals)
    in_flight: collections.deque = dataclasses.field(default_factory=collections.deque)  # see keep_pace

    @classmethod
    def open(cls, cfg: Hyperparameters, signals: Signals | None = None) -> Runtime:
        """Join the process group, choose device, precision and kernels, open the log. Raises UserError."""
        rank, world_size, local_rank = read_ranks(os.environ)
        if cfg.device == "cuda" and not torch.cuda.is_available():
            raise UserError("DEVICE=cuda was asked for, but this PyTorch sees no CUDA device")
        on_cuda, groups, notes = cfg.device != "cpu" and torch.cuda.is_available(), {}, []
        device = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
        if on_cuda:
            torch.cuda.set_device(device)
            torch.set_float32_matmul_precision("high")
        dtype = torch.bfloat16 if cfg.dtype == "bf16" or cfg.dtype == "auto" and on_cuda else torch.float32
        compiles = cfg.compile == "1" or cfg.compile == "auto" and on_cuda
        attention, attend = pick_attention(cfg.attention, device, dtype, notes)
        kernels = pick_kernels(cfg.kernels, device)
        if compiles:
            require_compiler(device)
        if world_size > 1:
            # imported later, its functions' defaults would keep the group: see `close`
            from torch import _dynamo  # noqa: F401
            dist.init_process_group("nccl" if on_cuda else "gloo", device_id=device if on_cuda else None)
            groups["cpu"] = dist.new_group(backend="gloo") if on_cuda else dist.group.WORLD
        rt = cls(rank, world_size, device, dtype, compiles, attention, attend, "", Path(cfg.artifact_dir), None, groups,
                 kernels, notes)
        run_id = cfg.run_id or f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        resumes = cfg.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        run_id, resumes = rt.broadcast_object((run_id, resumes))  # a machine that comes back counts from 0
        log = RunLog(rt.folder, run_id, active=rank == 0, append=resumes)
        return dataclasses.replace(rt, run_id=run_id, log=log, resumes=resumes, signals=signals or Signals())

    def close(self, failed: bool = False) -> None:
        """Leave the process group and drop all references to it: gloo's threads may abort a process they outlive. If
        this rank `failed`, at once: an orderly end would wait for ranks that wait for this one."""
        self.finish_writing()
        self.log.close()
        self.groups.clear()
        if self.world_size > 1:
            (dist.distributed_c10d._abort_process_group if failed else dist.destroy_process_group)()

    def attempt(self, write, *arguments) -> None:
        """Write what a run can do without: a UserError becomes a warning now and at the end of the run."""
        try:
            write(*arguments)
        except UserError as error:
            self.unwritten.append(str(error))
            self.log(f"warning: {error}; the run goes on")

    def in_background(self, function) -> None:
        """Call it in a thread, once the last one's is done."""
        self.finish_writing()
        self.threads.append(threading.Thread(target=function))
        self.threads[0].start()

    def finish_writing(self) -> None:
        while self.threads:
            self.threads.pop().join()

    def allow_wait(self, seconds: float) -> None:
        """Ranks that wait longer than this for another one's part of a collective fail. Not for `agree` and
        `broadcast_object`: others may wait for rank 0 as long as it packs."""
        if self.world_size > 1 and self.on_cuda:
            dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds))

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def run_folder(self) -> Path:
        """Where all files of this run are."""
        return self.folder / "runs" / self.run_id

    def compiled(self, function, grows: bool = False):
        """The function, compiled if `compiles`: one graph per shape or, if dimension 1 of its first two arguments
        `grows`, one for all sizes. (With dynamic=True all would be dynamic, and torch 2.13 cannot trace ScaledNorm.)"""
        if not self.compiles:
            return function
        if not grows:
            return torch.compile(function, dynamic=False, fullgraph=True)
        graphs = torch.compile(function, fullgraph=True)

        def call(ids: Tensor, targets: Tensor, *rest):
            torch._dynamo.maybe_mark_dynamic(ids, 1)
            torch._dynamo.maybe_mark_dynamic(targets, 1)
            return graphs(ids, targets, *rest)
        return call

    def synchronize(self) -> None:
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def to_device(self, array: np.ndarray | Tensor) -> Tensor:
        """Waits for nothing."""
        tensor = torch.as_tensor(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.on_cuda else tensor

    def waiter(self):
        """A function that waits until the device has done all that it has been given by now."""
        if not self.on_cuda:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_many_(self, tensors: list[Tensor]) -> list[Tensor]:
        """Sum each of many tensors over ranks, in place, in one collective."""
        if self.world_size > 1:
            flat = self.sum_(torch.cat([t.reshape(-1) for t in tensors])).split([t.numel() for t in tensors])
            torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(flat, tensors)])
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

    def keep_pace(self, number: Tensor, behind: int = 1) -> list[float]:
        """Wait until the device is at most so many steps behind. One: its queue never runs empty, and the clock is a
        step late; none: the clock is right. Returns each finished step's `number`, which are not waited for."""
        if not self.on_cuda:
            return [number.item()]
        self.in_flight.append((number.to("cpu", non_blocking=True), self.waiter()))
        finished = []
        while len(self.in_flight) > behind:
            number, wait = self.in_flight.popleft()
            wait()
            finished.append(number.item())
        return finished

    def peak_memory_line(self) -> str:
        if self.on_cuda:
            peak = torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device)
            return "peak memory allocated: {} MiB reserved: {} MiB".format(*(b // 2 ** 20 for b in peak))
        return f"peak memory resident: {peak_rss_bytes() // 2 ** 20} MiB"

    def free_memory(self) -> float:
        """Bytes that can still be had, of the GPU's or the machine's memory; infinite where nothing tells."""
        if self.on_cuda:  # PyTorch keeps what it has had, and gives it out again
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept
        with contextlib.suppress(OSError, TypeError):
            return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
        return math.inf

    def agree(self, value: float) -> float:
        """Rank 0's number on every rank, without synchronising devices: clocks differ, decisions must not. With it
        travels the signal of any rank."""
        box = torch.tensor([value if self.rank == 0 else -math.inf, self.signals.number], dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(box, dist.ReduceOp.MAX, group=self.groups["cpu"])
        self.signals.agreed = int(box[1])
        return box[0].item()

    def copy_first(self, tensors) -> None:
        """Rank 0's values into these tensors of every rank."""
        for tensor in tensors if self.world_size > 1 else ():
            dist.broadcast(tensor.detach(), src=0)

    def broadcast_object(self, value):
        """Rank 0's value, of any type that can be pickled, on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.groups["cpu"])
        return box[0]

    def from_first(self, function):
        """What it returns, or the UserError it raises, on rank 0, on every rank."""
        try:
            value = function() if self.rank == 0 else None
        except UserError as error:
            value = error
        value = self.broadcast_object(value)
        if isinstance(value, UserError):
            raise value
        return value

    def forward_tokens(self, cfg: Hyperparameters) -> int:
        """Maximum tokens of a forward pass: what fills a GPU, or what fits into a CPU's caches."""
        return cfg.micro_batch_tokens or (98_304 if self.on_cuda else 4096)

    def share_of(self, count: int) -> range:
        """Indices of this rank's contiguous part of `count` items."""
        return range(count * self.rank // self.world_size, count * (self.rank + 1) // self.world_size)


def lost_a_rank(error: Exception) -> bool:
    """Whether a collective failed because another rank did, which knows the reason."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


# ------------------------------------------------------------------------------------------------ DATA
SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_BYTES = 20240520, 1, 1024
BOS_ID = 1  # SentencePiece's token for the beginning of a document, unless it is told otherwise
BYTES_MARK = "_bytes_"  # in the name of a byte side-car: a shard of how many bytes of text each token of another one is
SPACE_MARK = "\u2581"   # SentencePiece's visible space
CASE_MARKS = "\ue001\ue002\ue003\ue004"  # CaseOps' pieces, which stand for capitals and no bytes (data/transforms.py)


class Shard:
    """The tokens of a file: 256 little-endian int32 of header, then uint16 ids. A slice is read when it is taken: of a
    memory-mapped file that is cut off meanwhile, the system would end the process without a word. Raises UserError."""

    def __init__(self, path: str):
        self.path, self.file = path, None
        header = self.read("<i4", 0, 256)
        if len(header) < 256 or header[0] != SHARD_MAGIC or header[1] != SHARD_VERSION:
            raise UserError(f"{path} is not a token shard (wrong magic or version); make it with data/prepare.py")
        self.count, size = int(header[2]), os.fstat(self.file.fileno()).st_size
        if self.count <= 0 or size != SHARD_HEADER_BYTES + 2 * self.count:
            raise UserError(f"{path} is damaged: {self.count:,} tokens by its header, "
                            f"{(size - SHARD_HEADER_BYTES) // 2:,} by its size of {size:,} bytes; download it again")

    def read(self, dtype: str, start: int, count: int) -> np.ndarray:
        """`count` numbers from byte `start`, or those there are."""
        try:
            self.file = self.file or open(self.path, "rb", buffering=0)
            self.file.seek(start)
            return np.fromfile(self.file, dtype, count)
        except OSError as error:
            raise UserError(f"cannot read shard {self.path}: {error.strerror}") from None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, part: slice) -> np.ndarray:
        """uint16 [tokens of the slice]"""
        start, stop, _ = part.indices(self.count)
        tokens = self.read("<u2", SHARD_HEADER_BYTES + 2 * start, stop - start)
        if len(tokens) < stop - start:
            raise UserError(f"{self.path} has become shorter since the run began; download it again, then RESUME=1")
        return tokens


class TokenStream:
    """All shards that match a pattern, sorted by name, as one endless stream of ids below vocab_size."""

    def __init__(self, pattern: str, vocab_size: int):
        folder, name = os.path.split(pattern)
        if not os.path.isdir(folder):
            raise UserError(f"there is no data folder {folder}; DATA_PATH names another, `bash run.sh data` makes one, "
                            "and `bash run.sh` without more trains on a small text of its own")
        self.paths = sorted(path for path in glob.glob(os.path.join(glob.escape(folder), name))
                            if BYTES_MARK not in os.path.basename(path))
        if not self.paths:
            raise UserError(f"no shard matches {pattern}; data/prepare.py makes them")
        self.shards = [Shard(path) for path in self.paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, count: int) -> np.ndarray:
        """`count` ids from position `start`, wrapping around at the end.  # int32 [count]"""
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

    A step reads one contiguous span; row i of the global batch is its i-th sequence at any world size. Its length may
    change from step to step: ranks and micro-batches hold whole sequences of every length.
    """

    stream: TokenStream
    seq_len: int
    batch_tokens: int
    micro_steps: int
    rt: Runtime
    bos_id: int = -1   # what begins a document that attention does not leave; -1: rows only

    @classmethod
    def open(cls, cfg: Hyperparameters, rt: Runtime) -> TrainData:
        units, bos_id = cfg.train_batch_tokens // cfg.seq_unit, -1
        if units % rt.world_size:
            raise UserError(f"TRAIN_BATCH_TOKENS={cfg.train_batch_tokens} is {units} sequences of {cfg.seq_unit}, not "
                            f"divisible by {rt.world_size} ranks")
        most, units = rt.forward_tokens(cfg), units // rt.world_size
        micro_steps = next(n for n in range(1, units + 1)
                           if units % n == 0 and (units // n * cfg.seq_unit <= most or n == units))
        stream = TokenStream(cfg.train_files, cfg.vocab_size)
        if cfg.pack == "documents":
            bos_id = open_tokenizer(cfg)[0].bos_id()
            if bos_id not in stream.read(0, min(len(stream), 10 ** 7)):
                raise UserError(f"PACK=documents: no document begins in {cfg.train_files} (BOS, token {bos_id})")
        return cls(stream, cfg.train_seq_len, cfg.train_batch_tokens, micro_steps, rt, bos_id)

    @property
    def share(self) -> range:
        """This rank's tokens of a global batch."""
        return self.rt.share_of(self.batch_tokens)

    def read(self, step: int, part: range) -> np.ndarray:
        """Part of the tokens of a step and the one that follows them.  # int32 [len(part) + 1]"""
        return self.stream.read(step * self.batch_tokens + part.start, len(part) + 1)

    def micro_batches(self, per_token: Tensor, seq_len: int = 0) -> Tensor:
        """One number per token of this rank, as its micro-batches.  # [tokens] -> [micro_steps, rows, seq_len]"""
        return per_token.view(self.micro_steps, -1, seq_len or self.seq_len)

    def rows(self, ids: np.ndarray, seq_len: int):
        """Inputs and targets of each micro-batch of this rank, whose tokens are `ids`.  # int64 [rows, seq_len] each"""
        span = self.rt.to_device(ids).long()
        return zip(self.micro_batches(span[:-1], seq_len), self.micro_batches(span[1:], seq_len))

    def batch(self, step: int):
        """Yields this rank's micro-batches of a step: inputs and targets.  # int64 [rows, TRAIN_SEQ_LEN] each"""
        return self.rows(self.read(step, self.share), self.seq_len)

    def training_batch(self, step: int, seq_len: int):
        """Yields what `batch` does and nothing more or, with PACK=documents, in one row, and the documents in it."""
        ids, seq_len = self.read(step, self.share), seq_len or self.seq_len
        for part, (inputs, targets) in zip(ids[:-1].reshape(self.micro_steps, -1), self.rows(ids, seq_len)):
            if self.bos_id < 0:
                yield inputs, targets, {}
            else:
                starts = self.rt.to_device(document_starts(part, self.bos_id, seq_len))
                yield inputs.view(1, -1), targets.view(1, -1), {"documents": Documents(starts, seq_len)}


def document_starts(ids: np.ndarray, bos_id: int, longest: int) -> np.ndarray:
    """Where the documents of a stream begin: at its start, at each BOS, and every `longest` tokens of one; then the end
    of the stream, so often that the size hardly ever changes, because each size needs a graph.  # int32 [n]"""
    begins = np.union1d(0, np.flatnonzero(ids == bos_id))
    pieces = [np.arange(begin, end, longest) for begin, end in zip(begins, [*begins[1:], len(ids)])]
    starts, room = np.concatenate(pieces), max(64, len(ids) // 128)
    while room <= len(starts):
        room *= 2
    return np.pad(starts, (0, room - len(starts)), constant_values=len(ids)).astype(np.int32)


def token_bytes(tokenizer, tokens: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each token adds to the text decoded so far, for any SentencePiece model.  # int32 [n]

    Documents begin after a control token (BOS). Where the decoder drops their first space, it is the tokenizer's dummy
    prefix and no part of the text.
    """
    vocab, silent = tokenizer.vocab_size(), lambda i: tokenizer.is_control(i) or tokenizer.is_unused(i)
    pieces = [tokenizer.id_to_piece(i).replace(SPACE_MARK, " ") for i in range(vocab)]
    pieces = ["" if silent(i) else "?" if tokenizer.is_byte(i) else tokenizer.decode([i]) if tokenizer.is_unknown(i)
              else pieces[i] for i in range(vocab)]
    length = np.array([len(piece.encode()) for piece in pieces], np.int32)[tokens]
    if tokenizer.decode([tokenizer.piece_to_id(SPACE_MARK)]) == "":
        begins = np.array([silent(i) for i in range(vocab)])[np.concatenate((tokens[:1], tokens[:-1]))]
        begins[:1] = True
        length -= begins & np.array([piece.startswith(" ") for piece in pieces])[tokens]
    return length


def read_sidecars(stream: TokenStream) -> np.ndarray | None:
    """Bytes of text of each token, from the fineweb_val_bytes_*.bin beside the shards; None where there are none. Only
    they can tell them if the text was transformed. Raises UserError unless each shard has one of its own length."""
    paths = [os.path.join(folder, name.replace("_val_", f"_val{BYTES_MARK}"))
             for folder, name in map(os.path.split, stream.paths)]
    if not any(map(os.path.lexists, paths)):
        return None
    sizes = [Shard(path) for path in paths]
    for path, size, shard, of in zip(paths, sizes, stream.shards, stream.paths):
        if len(size) != len(shard):
            raise UserError(f"{path} holds the bytes of {len(size):,} tokens, but {of} has {len(shard):,}; download "
                            "both again")
    return np.concatenate([size[:] for size in sizes]).astype(np.int32)


@dataclass(frozen=True)
class ValData:
    """The validation text and how many bytes of text its tokens stand for."""

    tokens: Tensor     # int32 [n]
    sizes: Tensor      # int32 [n]: UTF-8 bytes that each token adds after its predecessor
    tokenizer_sha256: str
    bos_id: int = -1   # what every document starts with; -1: none

    @classmethod
    def open(cls, cfg: Hyperparameters, rt: Runtime) -> ValData:
        stream, facts = TokenStream(cfg.val_files, cfg.vocab_size), dataset_facts(cfg.data_path)
        tokenizer, digest = open_tokenizer(cfg)
        if facts.tokenizer_sha256 not in ("", digest):
            raise UserError(f"{cfg.data_path} was made with tokenizer {facts.tokenizer} (sha256 "
                            f"{facts.tokenizer_sha256[:12]}…), not {cfg.tokenizer_path} ({digest[:12]}…); set "
                            "TOKENIZER_PATH to it, or put it into ../../tokenizers, where it is found")
        if len(stream) < cfg.window + 1:
            raise UserError(f"validation text has {len(stream):,} tokens, "
                            f"fewer than one window of EVAL_SEQ_LEN={cfg.window} and its target")
        tokens = stream.read(0, len(stream))
        sizes, bos_id = read_sidecars(stream), tokenizer.bos_id()
        if sizes is None:
            if not any(tokenizer.is_unknown(tokenizer.piece_to_id(mark)) for mark in CASE_MARKS):
                raise UserError(f"{cfg.data_path} lacks fineweb_val{BYTES_MARK}*.bin: its tokenizer is made for text "
                                "transformed by CaseOps, whose bytes only they tell; fetch or make the data again")
            sizes = token_bytes(tokenizer, tokens)
            if tokenizer.unk_id() >= 0 and (tokens == tokenizer.unk_id()).any():
                rt.log(f"warning: {cfg.val_files} has tokens unknown to the tokenizer; they count as decoded")
        if sizes[1:].sum() == 0:
            raise UserError(f"the tokens of {cfg.val_files} stand for no byte of text")
        if cfg.ttt_enabled and cfg.ttt_reset == "document" and not (tokens[:-1] == bos_id).any():
            why = f"no BOS (token {bos_id}) in {cfg.val_files}" if bos_id >= 0 else f"{cfg.tokenizer_path} has no BOS"
            raise UserError(f"TTT_RESET=document splits the text at BOS tokens: {why}")
        if cfg.smear_gate == "window" and bos_id not in (BOS_ID, -1):
            raise UserError(f"SMEAR_GATE=window knows BOS as token {BOS_ID}; in {cfg.tokenizer_path} it is {bos_id}")
        return cls(*(torch.from_numpy(array).to(rt.device) for array in (tokens, sizes)), digest, bos_id)

    def take(self, index) -> ValData:
        """The selected tokens with the bytes they have here. index: a slice or indices."""
        return dataclasses.replace(self, tokens=self.tokens[index], sizes=self.sizes[index])


class DatasetFacts(NamedTuple):
    """What dataset.json says about the shards beside it; empty where it says nothing."""

    vocab_size: str = ""
    tokenizer: str = ""          # the name of its file
    tokenizer_sha256: str = ""


def dataset_facts(folder: str | Path) -> DatasetFacts:
    """What the folder's dataset.json says, if there is one. Raises UserError if it cannot be parsed."""
    path = Path(folder) / "dataset.json"
    try:
        noted = json.loads(path.read_bytes())
        tokenizer = noted.get("tokenizer") or {}
        if isinstance(tokenizer, list):  # file names, as in published manifests
            tokenizer = {"name": next((name for name in tokenizer if name.endswith(".model")), "")}
        return DatasetFacts(str(noted.get("vocab_size", "")), Path(tokenizer.get("name", "")).name,
                            str(tokenizer.get("sha256", "")))
    except (FileNotFoundError, NotADirectoryError):
        return DatasetFacts()
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(f"cannot understand {path}: {error}") from None


def find_data(environ, tokenizer_sha256: str = "") -> dict[str, str]:
    """The variables, those of DATA_PATH, TOKENIZER_PATH and VOCAB_SIZE that are not set filled in from dataset.json.
    `tokenizer_sha256`: the tokenizer an artifact was made with, which is then the only one wanted.
    VOCAB_SIZE alone means FineWeb with that vocabulary, else any data set that has it; UserError if there is none."""
    found, default, usual = dict(environ), Hyperparameters.data_path, Hyperparameters.tokenizer_path
    if size := found.get("VOCAB_SIZE", ""):
        size = str(Hyperparameters.from_env({"VOCAB_SIZE": size}).vocab_size)
        default, usual = default.replace("1024", size), usual.replace("1024", size)
    if "DATA_PATH" not in found:
        root = Path(default).parent
        others = [str(path.parent) for path in sorted(root.glob("*/dataset.json"))]
        if tokenizer_sha256:
            fits = lambda folder: dataset_facts(folder).tokenizer_sha256 == tokenizer_sha256
            default = next(filter(fits, [default, *others]), default)
        elif size and not os.path.isdir(default):
            default = next((folder for folder in others if dataset_facts(folder).vocab_size == size), "")
            if not default:
                raise UserError(f"no data for VOCAB_SIZE={size} in {root}; `bash run.sh data fineweb --vocab-size "
                                f"{size}` fetches it, `bash run.sh data text FILE --vocab-size {size}` uses your text")
        found["DATA_PATH"] = default
    facts = dataset_facts(found["DATA_PATH"])
    if facts.vocab_size:
        found.setdefault("VOCAB_SIZE", facts.vocab_size)
    if "TOKENIZER_PATH" not in found:
        data = Path(found["DATA_PATH"])
        folders = data.parent.parent / "tokenizers", data, Path(usual).parent
        paths = [*(folder / facts.tokenizer for folder in folders if facts.tokenizer), Path(usual),
                 *(path for folder in folders for path in sorted(folder.glob("*.model")))]
        wanted = tokenizer_sha256 or facts.tokenizer_sha256
        fits = lambda path: not wanted or hashlib.sha256(path.read_bytes()).hexdigest() == wanted
        if path := next(filter(fits, filter(Path.is_file, paths if wanted or facts.tokenizer else [])), None):
            found["TOKENIZER_PATH"] = str(path)
    found.setdefault("TOKENIZER_PATH", usual)
    return found


def open_tokenizer(cfg: Hyperparameters):
    """(SentencePiece processor, sha256 of its file). Raises UserError."""
    import sentencepiece
    tokenizer, size = sentencepiece.SentencePieceProcessor(), 0
    try:
        blob = Path(cfg.tokenizer_path).read_bytes()
        tokenizer.LoadFromSerializedProto(blob)
        size = tokenizer.vocab_size()
    except OSError as error:
        raise UserError(f"cannot read tokenizer {cfg.tokenizer_path}: {error.strerror} (TOKENIZER_PATH)") from None
    except (RuntimeError, ValueError):  # the latter: its message is no UTF-8
        pass
    if size == 0:
        raise UserError(f"{cfg.tokenizer_path} is not a SentencePiece model")
    if size != cfg.vocab_size:
        raise UserError(f"VOCAB_SIZE={cfg.vocab_size}, but tokenizer {cfg.tokenizer_path} has {size} pieces")
    if tokenizer.is_unknown(tokenizer.piece_to_id(SPACE_MARK)):
        raise UserError(f"{cfg.tokenizer_path} has no piece for a space: bytes could not be counted")
    return tokenizer, hashlib.sha256(blob).hexdigest()


# ------------------------------------------------------------------------------------------------ METRIC
class BpbMeter:
    """Sums nats, tokens and bytes in float64: the one place where bits per byte are made."""

    def __init__(self, device):
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, tokens, bytes

    def add(self, nll: Tensor, size: Tensor) -> None:
        """Nll in nats of some tokens, and the bytes of text they stand for.  # [n] each"""
        count = torch.full((), len(nll), dtype=torch.float64, device=nll.device)
        self.sums += torch.stack((nll.double().sum(), count, size.double().sum()))

    def reduce(self, rt: Runtime) -> tuple[float, float, int, int]:
        """(nats per token, bits per byte, tokens, bytes) over all ranks; the meter itself stays this rank's."""
        nats, tokens, size = rt.sum_(self.sums.clone()).tolist()
        return nats / max(tokens, 1), nats / math.log(2) / max(size, 1), int(tokens), int(size)


# ------------------------------------------------------------------------------------------------ QUANTISER
PERCENTILES = (0.999, 0.9995, 0.9999, 0.99999, 1.0)  # PR 1092's candidates for a row's clip
SCALE_FLOOR = 2.0 ** -20  # for rows of zeros; below any trained row (PR 1092's 1/31 puts most rows on one coarse grid)
GPTQ_BLOCK = 128      # columns rounded before their errors are passed on to the rest of the matrix
GPTQ_DAMPING = 0.01   # of a Hessian's mean diagonal; ten times and a hundred times that where it is not enough
WATER_BITS = 13       # of the codes under water-filling: so many that hardly a weight is clipped
STEPS_PER_OCTAVE, STEP_LIMIT = 4, 128  # their steps are 2**(k/4); the row's and the column's part of k is 128 at most
CURVATURE_FLOOR = 0.03  # of a matrix's mean, for rows that calibration hardly reaches


@dataclass(frozen=True)
class QuantSpec:
    """How one family is rounded: signed codes of `bits` with one fp16 scale per row, or with the Steps given."""

    bits: int
    clip: str = "percentile"   # or "amax", "sdclip"; "waterfill", whose steps come from water_fill
    sigmas: float = 12.85      # sdclip: standard deviations of the row at the largest code (R1394)
    widen: float = 1.0         # steps are this much wider than the clip rule has them; the outer codes are then unused

    @property
    def max_code(self) -> int:
        """The largest code; codes are symmetric, so that rounding has no bias."""
        return 2 ** (self.bits - 1) - 1


class Steps(NamedTuple):
    """The steps of water-filling, as a file holds them: 2**((row + column) / 4)."""

    rows: Tensor     # int16 [..., rows, 1]
    columns: Tensor  # int16 [..., 1, columns]

    def float(self) -> Tensor:  # [..., rows, columns]
        sizes = [2.0 ** (k / STEPS_PER_OCTAVE) for k in range(-2 * STEP_LIMIT, 2 * STEP_LIMIT + 1)]
        return torch.tensor(sizes, device=self.rows.device)[self.rows.int() + self.columns.int() + 2 * STEP_LIMIT]


def upper_quantiles(magnitudes: Tensor, shares: tuple[float, ...]) -> Tensor:
    """Linearly interpolated quantiles of each row, for shares near 1: one topk, no sort.  # [shares, ..., rows, 1]"""
    last = magnitudes.size(-1) - 1
    largest = magnitudes.topk(last + 1 - math.floor(min(shares) * last), dim=-1).values  # [..., rows, few], descending

    def quantile(share: float) -> Tensor:
        below = last - math.floor(share * last)
        low, high = largest[..., below, None], largest[..., max(below - 1, 0), None]
        return low + (high - low) * (share * last % 1)
    return torch.stack([quantile(share) for share in shares])


def round_to(weight: Tensor, scale: Tensor | float, spec: QuantSpec) -> Tensor:
    """The one rounding: nearest code, ties to even, clipped.  # float, same shape as weight"""
    return (weight / scale).round_().clamp_(-spec.max_code, spec.max_code)


def storable(scale: Tensor) -> Tensor:
    """The scale as the export stores it: floored, in fp16 precision."""
    return scale.clamp(min=SCALE_FLOOR).half().float()


def row_scales(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Scale (the step) of each row by the clip rule, exact in fp16.  # float32 [..., rows, 1]

    amax: the largest weight of a row gets the largest code. percentile (PR 1092): the one of five quantiles of a row's
    magnitudes that gets the largest code at the least squared error. sdclip (R1394): `sigmas` standard deviations get
    it, larger weights are clipped, and the entropy coder needs about log2(sigmas) bits fewer than `bits` per weight.
    """
    if spec.clip == "sdclip":
        scale = spec.sigmas * weight.std(-1, keepdim=True, correction=0) / spec.max_code
    elif spec.clip == "amax":
        scale = weight.abs().amax(-1, keepdim=True) / spec.max_code
    else:
        scales = storable(upper_quantiles(weight.abs(), PERCENTILES) / spec.max_code)
        errors = [round_to(weight, scale, spec).mul_(scale).sub_(weight).square_().sum(-1, keepdim=True)
                  for scale in scales]
        scale = scales.gather(0, torch.stack(errors).argmin(0, keepdim=True))[0]
    return storable(scale * spec.widen)


def quantise(weight: Tensor, spec: QuantSpec, steps: Steps | None = None, hessian: Tensor | None = None,
             name: str = "") -> tuple[Tensor, Tensor | Steps]:
    """(integer codes [..., rows, columns], fp16 scales [..., rows, 1] or the `steps` given) of a float weight: to the
    nearest or, with a `hessian`, by `gptq`."""
    weight = weight.float()
    scale = (steps or row_scales(weight, spec)).float()
    codes = round_to(weight, scale, spec) if hessian is None else gptq(weight, scale, hessian, spec, name)
    return codes.to(torch.int8 if spec.bits <= 8 else torch.int16), steps or scale.half()


def dequantise(codes: Tensor, scales: Tensor | Steps) -> Tensor:
    """The float32 weight of codes and scales."""
    return codes.float() * scales.float()


def prune(weight: Tensor, share: float) -> Tensor:
    """Zero this share of the smallest magnitudes of each matrix (PR 1216).  # [..., rows, columns]"""
    count, magnitudes = int(share * weight.size(-1) * weight.size(-2)), weight.abs().flatten(-2)
    if not count:
        return weight
    return weight.masked_fill(weight.abs() <= magnitudes.kthvalue(count).values[..., None, None], 0.0)


def soft_round(codes: Tensor) -> Tensor:
    """u - sin(2 pi u) / (2 pi): halfway to rounding, with fixed points and slope 0 at whole numbers. (PR 550 adds the
    sine, which pushes weights off the grid, and stretches its period with the temperature.)"""
    return codes - torch.sin(2 * math.pi * codes) / (2 * math.pi)


def fake_quantise(weight: Tensor, scale: Tensor, spec: QuantSpec, hardness: Tensor | None = None) -> Tensor:
    """Straight-through rounding: with scale = row_scales(weight), the value is dequantise(*quantise(weight)) and the
    gradient the identity's. With `hardness` (0-d, in 0..1) the value goes from soft_round to rounding, and the gradient
    is soft_round's."""
    smooth = weight if hardness is None else soft_round(weight / scale) * scale
    with torch.no_grad():
        codes = round_to(weight, scale, spec)
        if hardness is not None:
            codes = torch.lerp((smooth / scale).clamp(-spec.max_code, spec.max_code), codes, hardness)
        rounded = codes * scale
    return rounded + (smooth - smooth.detach())  # the bracket is exactly 0 and carries the gradient


def gptq(weight: Tensor, scale: Tensor, hessian: Tensor, spec: QuantSpec, name: str) -> Tensor:
    """Codes, as floats, where the columns still to be rounded compensate the error of those already rounded.

    Lowers trace(error hessian error^T), the squared change of the outputs of weight [(n,) rows, columns], where hessian
    [n, columns, columns] sums x x^T over the inputs x of each matrix. Columns with the largest inputs go first; columns
    without input become 0. `scale`: of the rows as they are, on which late QAT trained, not as they are compensated.
    Source: GPTQ, arXiv 2210.17323. Raises UserError for a Hessian that cannot be used.
    """
    dead, order, factor = column_order(hessian, name)
    matrices, grid = (t.reshape(-1, *weight.shape[-2:]) for t in (weight, scale.expand_as(weight)))
    matrices = matrices.masked_fill(dead[:, None], 0).take_along_dim(order, -1)
    codes = round_columns(matrices, grid.take_along_dim(order, -1), factor, spec)
    return codes.take_along_dim(order.argsort(dim=-1), -1).view_as(weight)


def column_order(hessian: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Which columns have no input [n, columns], the order of rounding [n, 1, columns] and `inverse_factor` in it."""
    hessian = hessian.float()
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    order = torch.argsort(diagonal, dim=-1, descending=True, stable=True)[:, None]
    hessian = (hessian + torch.diag_embed(dead.float())).take_along_dim(order, -1).take_along_dim(order.mT, -2)
    return dead, order, inverse_factor(hessian.double(), name)


def round_columns(weight: Tensor, scale: Tensor, factor: Tensor, spec: QuantSpec) -> Tensor:
    """Codes of [n, rows, columns], column after column, each error passed on to the later columns by `factor`."""
    weight, codes = weight.clone(), torch.empty_like(weight)
    for start in range(0, weight.size(-1), GPTQ_BLOCK):
        stop = min(start + GPTQ_BLOCK, weight.size(-1))
        errors = torch.empty_like(weight[..., start:stop])
        for j in range(start, stop):
            column = weight[..., j:j + 1]
            codes[..., j:j + 1] = code = round_to(column, scale[..., j:j + 1], spec)
            error = (column - code * scale[..., j:j + 1]) / factor[:, j:j + 1, j:j + 1]
            weight[..., j + 1:stop] -= error * factor[:, j:j + 1, j + 1:stop]
            errors[..., j - start:j - start + 1] = error
        weight[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return codes


def inverse_factor(hessian: Tensor, name: str) -> Tensor:
    """Upper-triangular U with U^T U = (hessian + damping)^-1: row j says how the columns after j best compensate an
    error in column j, those before it being settled.  # float64 [n, columns, columns] -> float32"""
    identity = torch.eye(hessian.size(-1), dtype=hessian.dtype, device=hessian.device).expand_as(hessian)
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    damping = torch.full_like(mean, GPTQ_DAMPING)
    for _ in range(3):
        lower, failed = torch.linalg.cholesky_ex((hessian + damping * mean * identity).flip(-2, -1))
        failed = (failed != 0) | ~lower.isfinite().all(-1).all(-1)
        if not failed.any():  # flipped back: hessian + damping = R R^T with R upper-triangular
            return torch.linalg.solve_triangular(lower.flip(-2, -1), identity, upper=True).float()
        damping = torch.where(failed[:, None, None], 10 * damping, damping)
    raise UserError(f"GPTQ: the Hessian of {name}[{int(failed.nonzero()[0])}] is singular or not finite, even damped; "
                    "GPTQ_CALIBRATION_BATCHES gives it more text, GPTQ_ENABLED=0 does without")


def curvature(squares: Tensor, hessian: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Second derivative of the loss by each weight once GPTQ has made up for its error: a factor of its row times one
    of its column, whose geometric mean in a matrix is 1.  # [n, rows, 1], [n, 1, columns]

    `squares`: the mean square of the loss's gradient by each weight [n, rows, columns]. With an input x of matrix
    `hessian`, E[x x^T], it is a row's G times E[x_j^2]; what the columns rounded later do not explain of x_j is
    1 / U_jj^2. Without (tables) there are rows only. Raises UserError where a matrix has no usable gradient.
    """
    mean = squares.mean((-2, -1))
    bad = ~mean.isfinite() | (mean <= 0)
    if bad.any():
        raise UserError(f"CLIP_RULE=waterfill: the gradient of {name}[{int(bad.nonzero()[0])}] is zero or not finite")
    columns = squares.new_ones(*squares.shape[:-2], 1, squares.size(-1))
    if hessian is not None:
        dead, order, factor = column_order(hessian, name)
        squares = squares.div(hessian.diagonal(dim1=-2, dim2=-1)[:, None]).masked_fill(dead[:, None], 0)
        columns = factor.diagonal(dim1=-2, dim2=-1)[:, None].pow(-2).take_along_dim(order.argsort(dim=-1), -1)
        columns = columns.masked_fill(dead[:, None], columns.mean())
    rows = squares.mean(-1, keepdim=True)
    centre = columns.log().mean(-1, keepdim=True).exp()
    return rows.maximum(CURVATURE_FLOOR * rows.mean(-2, keepdim=True)) * centre, columns / centre


def water_fill(factors: dict[str, tuple[Tensor, Tensor]], nats: float, exponent: float) -> dict[str, Steps]:
    """Steps of all weights, in proportion to curvature^(-exponent/2), that cost `nats` to second order.

    A step of s makes a mean square error of s^2 / 12, and with exponent 1 each weight has the same part in the cost,
    which is the least for the bits (reverse water-filling; WaterSIC, arXiv 2603.04956, does it by columns). Where steps
    are so coarse that the second order fails, a smaller exponent does better.
    """
    cost = sum(float((rows.double() ** (1 - exponent)).sum(-2).mul((columns.double() ** (1 - exponent)).sum(-1)).sum())
               for rows, columns in factors.values())
    level = math.log2(24 * nats / cost) / 2

    def stored(exponents: Tensor) -> Tensor:
        return exponents.mul(STEPS_PER_OCTAVE).round().clamp(-STEP_LIMIT, STEP_LIMIT).short()
    return {name: Steps(stored(level - exponent / 2 * rows.log2()), stored(-exponent / 2 * columns.log2()))
            for name, (rows, columns) in factors.items()}


# ------------------------------------------------------------------------------------------------ KERNELS
CE_CHUNK_ROWS = 1024  # rows of logits in memory at a time: large enough for fast products, small enough for the cache
CE_CHUNK_LOGITS_CUDA = 2 ** 24  # a GPU has no such cache but needs large products, and a compiled graph few chunks
MOST_BLOCKS = 264  # of a Triton grid: two for each of an H100's streaming multiprocessors
LARGEST_CAP = 40.0  # of logits in the Triton kernel: exp(-2 * 40) is a number of fp32 with all its digits


def suits_triton(kernels: str, dtype: torch.dtype, *sizes: int) -> bool:
    """Whether Triton should multiply matrices of such rows and columns: its kernels are for tensor cores, which have
    no fp32, and their memory engine (TMA) copies rows of a multiple of 16 bytes."""
    return kernels == "triton" and dtype.itemsize == 2 and not any(size % 8 for size in sizes)


# The Triton kernels of torch.ops.golf.*, which torch.compile takes as they are; each has its reference, in plain
# operations, where it is used. `load_kernels` compiles them: importing this file must not need Triton. The products are
# for Hopper: blocks stay on their SM and take tile after tile, TMA moves the tiles and cuts them off at the edges.
# tests/test_sm90.py compiles all kernels for it; tile sizes are not tuned.
def capped_row(logits, targets, losses, vocab, cap, scale, BLOCK: tl.constexpr):
    """A row of logits -> its loss, and in its place the gradient times `scale`.

    With q = 1 / (exp(2 logit / cap) + 1) the capped logit is cap - 2 cap q: softmax needs no largest logit, as
    exp(-2 cap q) cannot vanish while cap <= LARGEST_CAP, and the derivative of the cap is 4 q (1 - q)."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    logits += row * vocab
    target, partition = tl.load(targets + row), tl.zeros((BLOCK,), tl.float32)
    reached = tl.load(logits + target).to(tl.float32)  # before the sum, at which all threads wait, and the stores
    for start in range(0, vocab, BLOCK):
        logit = tl.load(logits + start + at, mask=start + at < vocab, other=0.0).to(tl.float32)
        exps = tl.exp(-2 * cap / (tl.exp(2 / cap * logit) + 1))
        partition += tl.where(start + at < vocab, exps, 0.0)
    total = tl.sum(partition, axis=0)
    tl.store(losses + row, tl.log(total) + 2 * cap / (tl.exp(2 / cap * reached) + 1))
    for start in range(0, vocab, BLOCK):
        logit = tl.load(logits + start + at, mask=start + at < vocab, other=0.0).to(tl.float32)
        q = 1 / (tl.exp(2 / cap * logit) + 1)
        grad = tl.exp(-2 * cap * q) / total - (start + at == target).to(tl.float32)
        tl.store(logits + start + at, (grad * 4 * q * (1 - q) * scale).to(logits.dtype.element_ty),
                 mask=start + at < vocab)


def mlp_tiles(a, b, leaky, out, tiles, across, depth, slope, FORWARD: tl.constexpr, SIDE: tl.constexpr,
              DEPTH: tl.constexpr):
    """LeakyReLU²(a b^T) and half its derivative, `leaky`, in the forward pass; 2 leaky (a b) in the backward."""
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FORWARD):
        r, c = tile // across * SIDE, tile % across * SIDE  # b, the weight, stays in the cache
        product = tl.zeros((SIDE, SIDE), tl.float32)
        for k in range(0, depth, DEPTH):
            product = tl.dot(a.load([r, k]), b.load([c, k]).T if FORWARD else b.load([k, c]), product)
        halves = product.reshape(SIDE, 2, SIDE // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):  # half a tile waits in shared memory, so that two blocks fit on an SM
            x, column = halves[half], c + half * (SIDE // 2)
            if FORWARD:
                t = tl.where(x > 0, x, x * slope * slope)
                leaky.store([r, column], t.to(leaky.dtype))
                x = x * t
            else:
                x = 2 * x * leaky.load([r, column]).to(tl.float32)
            out.store([r, column], x.to(out.dtype))


def symmetric_tiles(x, add, out, batch, across, depth, alpha, beta, ADDS: tl.constexpr, SIDE: tl.constexpr,
                    DEPTH: tl.constexpr):
    """Tiles of alpha x x^T + beta add on and above the diagonal, and their mirror images below."""
    above = across * (across + 1) // 2
    for tile in tl.range(tl.program_id(0), batch * above, tl.num_programs(0), flatten=True):
        n, t = tile // above, tile % above
        j = ((tl.sqrt_rn(8.0 * t + 1) - 1) / 2).to(tl.int32)  # tile t, column by column: (0,0) (0,1) (1,1) (0,2)
        i = t - j * (j + 1) // 2
        product = tl.zeros((SIDE, SIDE), tl.float32)
        for k in range(0, depth, DEPTH):
            left, right = x.load([n, i * SIDE, k]), x.load([n, j * SIDE, k])
            product = tl.dot(left.reshape(SIDE, DEPTH), right.reshape(SIDE, DEPTH).T, product)
        product = alpha * product
        if ADDS:
            product += beta * add.load([n, i * SIDE, j * SIDE]).reshape(SIDE, SIDE).to(tl.float32)
        half, r = product.to(out.dtype), tl.arange(0, SIDE)
        if i == j:  # exactly symmetric, in whatever order the tensor cores add
            half = tl.where(r[:, None] <= r[None, :], half, half.T)
        else:
            out.store([n, j * SIDE, i * SIDE], half.T.reshape(1, SIDE, SIDE))
        out.store([n, i * SIDE, j * SIDE], half.reshape(1, SIDE, SIDE))


def tiled(x: Tensor, *block: int):
    return TensorDescriptor.from_tensor(x.contiguous(), list(block))


def launch_capped_rows(losses, logits, targets, cap, scale):
    capped_row[len(logits),](logits, targets, losses, logits.size(1), cap, scale, BLOCK=1024, num_warps=4)


def launch_mlp(out, a, b, leaky, slope, forward, side=128, depth=64):
    down, across = triton.cdiv(len(leaky), side), triton.cdiv(leaky.size(1), side)
    mlp_tiles[min(down * across, MOST_BLOCKS),](
        tiled(a, side, depth), tiled(b, *((side, depth) if forward else (depth, side))),
        tiled(leaky, side, side // 2), tiled(out, side, side // 2), down * across, across, a.size(1), slope,
        FORWARD=forward, SIDE=side, DEPTH=depth, num_warps=8, num_stages=3)


def launch_symmetric(out, x, add, alpha, beta, side=64, depth=64):  # Muon's matrices are few: small tiles for every SM
    across = triton.cdiv(x.size(1), side)
    symmetric_tiles[min(len(x) * across * (across + 1) // 2, MOST_BLOCKS),](
        tiled(x, 1, side, depth), tiled(out if add is None else add, 1, side, side), tiled(out, 1, side, side),
        len(x), across, x.size(2), alpha, beta, ADDS=add is not None, SIDE=side, DEPTH=depth, num_warps=4,
        num_stages=3)


@functools.cache
def load_kernels() -> None:
    """Make the functions above Triton's, and operators of their launchers."""
    global triton, tl, TensorDescriptor, capped_row, mlp_tiles, symmetric_tiles  # among which kernels look names up
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    capped_row, mlp_tiles, symmetric_tiles = map(triton.jit, (capped_row, mlp_tiles, symmetric_tiles))

    def register(schema: str, allocate, launch, mutates: tuple = ()) -> None:
        """An operator: `launch` fills what `allocate` returns. Tracing, which has no data, stops at `allocate`."""
        def run(*args):
            out = allocate(*args)
            launch(out, *args)
            return out
        name = schema.split("(")[0]
        torch.library.custom_op(f"golf::{name}", run, mutates_args=mutates,
                                schema=schema.removeprefix(name)).register_fake(allocate)

    register("capped_rows(Tensor(a!) logits, Tensor targets, float cap, float scale) -> Tensor",
             lambda logits, *_: logits.new_empty(len(logits), dtype=torch.float32), launch_capped_rows, ("logits",))
    register("mlp_up(Tensor x, Tensor weight, float slope) -> (Tensor, Tensor)",
             lambda x, weight, _: (x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight))),
             lambda out, x, weight, slope: launch_mlp(out[0], x, weight, out[1], slope, True))
    register("mlp_back(Tensor upstream, Tensor weight, Tensor leaky) -> Tensor",
             lambda upstream, weight, leaky: torch.empty_like(leaky),
             lambda out, upstream, weight, leaky: launch_mlp(out, upstream, weight, leaky, 0.0, False))
    register("symmetric(Tensor x, Tensor? add, float alpha, float beta) -> Tensor",
             lambda x, *_: x.new_empty(len(x), x.size(1), x.size(1)), launch_symmetric)


class ScaledNorm(torch.autograd.Function):
    """scale * RMS norm in fp32, with fewer passes over memory than the composed operation: two forward, three back."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: float, eps: float) -> Tensor:
        power = torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.size(-1)).add_(eps)
        inverse = power.rsqrt_().mul_(scale)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx, upstream: Tensor):
        y, inverse = ctx.saved_tensors
        along = torch.linalg.vecdot(upstream, y).unsqueeze(-1).div_(y.size(-1) * ctx.scale ** 2)
        return torch.addcmul(upstream, y, along, value=-1).mul_(inverse), None, None


class SquaredLeakyReLU(torch.autograd.Function):
    """LeakyReLU(x)² as x * leaky with leaky = LeakyReLU(x) of the squared slope. The derivative is 2 * leaky, so only
    that is saved."""

    @staticmethod
    def forward(ctx, x: Tensor, slope: float) -> Tensor:
        leaky = F.leaky_relu(x, slope * slope)
        ctx.save_for_backward(leaky)
        return x * leaky

    @staticmethod
    def backward(ctx, upstream: Tensor):
        leaky, = ctx.saved_tensors
        return (upstream * leaky).mul_(2), None


class FusedMlp(torch.autograd.Function):
    """`SquaredLeakyReLU` between two projections, by Triton: each kernel computes a product and applies the activation
    or, in the backward pass, its derivative.  # x [N, dim], up [mlp, dim], down [dim, mlp]"""

    @staticmethod
    def forward(ctx, x: Tensor, up: Tensor, down: Tensor, slope: float) -> Tensor:
        y, leaky = torch.ops.golf.mlp_up(x, up, slope)
        ctx.save_for_backward(x, up, down, y, leaky)
        return F.linear(y, down)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        x, up, down, y, leaky = ctx.saved_tensors
        grad = torch.ops.golf.mlp_back(upstream, down, leaky)
        return grad @ up, grad.t() @ x, upstream.t() @ y, None


class CappedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of soft-capped logits, in nats, that never holds the logits of the whole batch.

    The gradient is computed chunk by chunk in the forward pass, from the chunk's logits; the backward pass only scales
    it. hidden: [N, dim], weight: [vocab, dim], targets: int64 [N], token_weights: [N] or None; softcap 0: none. With
    `kernels` "triton" one kernel reads a chunk's logits once and overwrites them with their gradient, so that they are
    never stored in fp32.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float, kernels: str,
                token_weights: Tensor | None = None) -> Tensor:
        total, grad_hidden = hidden.new_zeros((), dtype=torch.float32), []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        size = max(CE_CHUNK_ROWS, CE_CHUNK_LOGITS_CUDA // len(weight)) if hidden.is_cuda else CE_CHUNK_ROWS
        parts = hidden.split(size), targets.unsqueeze(1).split(size)
        weighting = [None] * len(parts[0]) if token_weights is None else token_weights.unsqueeze(1).split(size)
        for rows, target, weights in zip(*parts, weighting):
            if kernels == "triton" and 0 < softcap <= LARGEST_CAP:
                grad = F.linear(rows, weight)
                losses = torch.ops.golf.capped_rows(grad, target, softcap, 1 / len(hidden)).unsqueeze(1)
            else:
                cap, tanh = softcap or 1.0, F.linear(rows, weight).float()
                tanh = tanh.div_(cap).tanh_() if softcap else tanh
                largest = tanh.amax(-1, keepdim=True)
                grad = (tanh - largest).mul_(cap).exp_()
                partition = grad.sum(-1, keepdim=True)
                losses = partition.log() + cap * (largest - tanh.gather(1, target))
                grad.div_(partition * len(hidden))                                           # softmax,
                grad.scatter_add_(1, target, grad.new_full(target.shape, -1 / len(hidden)))  # less the one-hot target,
                if softcap:
                    grad.addcmul_(grad, tanh.square_(), value=-1)                            # times d softcap / d logit
                grad = grad.to(hidden.dtype)
            total += losses.sum() if weights is None else (losses * weights).sum()
            grad = grad if weights is None else grad * weights.to(grad.dtype)
            if ctx.needs_input_grad[0]:
                grad_hidden.append(grad @ weight)
            if grad_weight is not None:
                grad_weight += grad.t() @ rows
        ctx.save_for_backward(torch.cat(grad_hidden) if grad_hidden else None,
                              None if grad_weight is None else grad_weight.to(weight.dtype))
        return total / len(hidden)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return *(None if grad is None else grad * upstream for grad in ctx.saved_tensors), None, None, None, None


# ------------------------------------------------------------------------------------------------ MODEL
BIGRAM_FACTORS, BIGRAM_SCALE = (36313, 27191), 0.05            # PR 1092: factors of the token and its predecessors,
TRIGRAM_FACTORS, TRIGRAM_SCALE = (36313, 27191, 51497), 0.03   # and the initial scale of the table's output
VALUE_SCALE = 0.1
LANE_KEEPS = 1.1  # PR 1855: what a lane keeps of itself at first


class CastedLinear(nn.Linear):
    """A linear layer with fp32 parameters that computes in the dtype of its input. Its weights start at 0, and its
    bias, if it has one, at the value given."""

    def __init__(self, inputs: int, outputs: int, bias: float | None = None):
        super().__init__(inputs, outputs, bias is not None)
        nn.init.zeros_(self.weight)
        if bias is not None:
            nn.init.constant_(self.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def norm(x: Tensor, scale: float = 1.0, eps: float = 0.0) -> Tensor:
    """scale * RMS norm over the last dimension; eps 0: the machine epsilon. PyTorch fuses it for half precision."""
    if x.dtype == torch.float32:
        return ScaledNorm.apply(x, scale, eps or torch.finfo(x.dtype).eps)
    return F.rms_norm(x, (x.size(-1),), eps=eps or None) * scale


class RMSNorm(nn.Module):
    """`norm` of the residual stream, times learned weights if NORM_WEIGHTS is on."""

    def __init__(self, cfg: Hyperparameters, scale: float = 1.0):
        super().__init__()
        self.scale, self.eps = scale, cfg.norm_eps
        self.weight = nn.Parameter(torch.ones(cfg.model_dim)) if cfg.norm_weights else None

    def forward(self, x: Tensor) -> Tensor:
        x = norm(x, self.scale, self.eps)
        return x if self.weight is None else x * self.weight.to(x.dtype)


def rope_table(cfg: Hyperparameters, length: int, device, longest: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, in fp32.  # [length, rotated dimensions / 2] each

    NTK scaling: the base grows with the longer of training length and window, from ROPE_TRAIN_SEQ_LEN on. (PR 1092
    counts from 1024 while it trains on 2048, which stretches its base to 22,082; ROPE_TRAIN_SEQ_LEN=1024 keeps that.)
    In a flat stream the window is its `longest` document, and positions count on (PR 1530): only differences matter.
    """
    # sym_max instead of max: one compiled graph serves every length
    reach, dims = torch.sym_max(longest or length, cfg.train_seq_len), cfg.rope_dims or cfg.head_dim
    stretch = torch.sym_max(reach / cfg.rope_train_seq_len, 1.0) if cfg.rope_train_seq_len else 1.0
    base = cfg.rope_base * stretch ** (dims / (dims - 2) if dims > 2 else 0)
    frequency = base ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / dims)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of each head as pairs (i, i + half), keep the rest.  # [batch, T, heads, d]"""
    half = cos.size(-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    first, second, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin, rest), dim=-1)


def subtract_own_value(y: Tensor, v: Tensor) -> Tensor:
    """Exclusive self-attention (XSA): remove from each head's output its projection on the position's own value.
    y: [batch, T, heads, d], v: [batch, T, kv_heads, d] -> [batch, T, heads, d]."""
    y = y.unflatten(2, (v.size(2), -1))                  # [batch, T, kv_heads, group, d]
    square = torch.linalg.vecdot(v, v).clamp(min=1e-24)  # [batch, T, kv_heads]
    v = v.unsqueeze(-2)                                  # [batch, T, kv_heads, 1, d]
    share = torch.linalg.vecdot(y, v) / square.unsqueeze(-1)
    return torch.addcmul(y, share.unsqueeze(-1), v, value=-1).flatten(2, 3)


def capped_logits(hidden: Tensor, weight, softcap: float) -> Tensor:
    """softcap * tanh(hidden weight^T / softcap) in fp32, 0: no cap; `weight` as in `project`.  # [..., vocab]"""
    logits = project(hidden, weight).float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def project(x: Tensor, weight, source: Tensor | None = None) -> Tensor:
    """x weight^T. Instead of a matrix, `weight` may be a function of x and of `source`, the input of attention or MLP
    as a whole (by default x): what a hook of `GPT.hidden` made of it."""
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight(x, x if source is None else source)


class SmearGate(nn.Module):
    """Mix each position with its predecessor by a learnt share per dimension, initially half.  # [batch, T, dim]"""

    def __init__(self, dim: int):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, ids: Tensor, distance: Tensor | None) -> Tensor:
        """`distance` of each position from the start of its document; None: one document a row."""
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        before = before if distance is None else before * (distance > 0).unsqueeze(-1)
        return torch.lerp(x, before, torch.sigmoid(self.gate).to(x.dtype))


class WindowSmearGate(nn.Module):
    """Add to each position a share of its predecessor, which its first channels decide (PR 1667); initially none. BOS
    gets nothing of the document before it (PR 1851), but a long document's cut in a flat stream counts for nothing."""

    def __init__(self, window: int):
        super().__init__()
        self.gate = CastedLinear(window, 1)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, ids: Tensor, distance: Tensor | None) -> Tensor:
        share = self.scale.to(x.dtype) * torch.sigmoid(self.gate(x[..., :self.gate.in_features]))
        return torch.addcmul(x, share * (ids != BOS_ID).unsqueeze(-1), F.pad(x, (0, 0, 1, 0))[:, :-1])


class ProjectedEmbedding(nn.Module):
    """A narrow embedding table, a projection to `width` where needed, and a learnt scale."""

    def __init__(self, rows: int, dim: int, width: int, scale: float):
        super().__init__()
        self.embed = nn.Embedding(rows, dim)
        self.proj = CastedLinear(dim, width) if dim != width else None
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, index: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
        """`table`: the weight of `embed`, perhaps rounded.  # int64 [batch, T] -> `dtype` [batch, T, width]"""
        x = F.embedding(index, table).to(dtype)
        return (x if self.proj is None else self.proj(x)) * self.scale.to(dtype)


def hash_ngrams(ids: Tensor, factors: tuple[int, ...], buckets: int) -> Tensor:
    """Bucket of each position's n-gram, n = len(factors): XOR of factor_j * id_{t-j}, in int32 as published, modulo
    buckets - 1; the first n-1 positions share the last bucket.  # [batch, T] -> int64 [batch, T]"""
    ids, reach, length = ids.int(), len(factors) - 1, ids.size(1)
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
        self.window, self.eps = cfg.attention_window, cfg.norm_eps
        self.q_gain = nn.Parameter(torch.full((cfg.num_heads,), cfg.qk_gain_init)) if cfg.qk_norm else None
        self.attn_gate = CastedLinear(cfg.model_dim, cfg.num_heads, bias=4.0) if cfg.gated_attention else None  # open
        self.sparse_gate = CastedLinear(cfg.gate_window, cfg.num_heads) if cfg.sparse_attn_gate else None
        self.sparse_scale = cfg.sparse_attn_gate_scale
        self.vr_lambda = nn.Parameter(torch.tensor([0.5, 0.5])) if cfg.value_residual and layer > 0 else None

    def forward(self, x, weights: LayerWeights, positions, value_embedding, first_value, keep: int):
        """Output of the last `keep` positions [batch, keep, dim] and this layer's values before they are mixed with
        those of the first layer [batch, T, kv_heads, d]. positions: of `rope_table`, and the Documents or None."""
        (cos, sin, documents), recent = positions, x[:, -keep:]
        q = project(recent, weights.query).unflatten(-1, (self.heads, -1))
        k = project(x, weights.key).unflatten(-1, (self.kv_heads, -1))
        if self.q_gain is not None:
            q, k = norm(q, eps=self.eps), norm(k, eps=self.eps)
        value = project(x, weights.value)
        if value_embedding is not None:
            value = value + value_embedding
        v = value = value.unflatten(-1, (self.kv_heads, -1))
        if self.vr_lambda is not None:
            mix = self.vr_lambda.to(x.dtype)
            v = mix[0] * first_value + mix[1] * value
        q = rotate(q, cos[-keep:], sin[-keep:])
        q = q if self.q_gain is None else q * self.q_gain.to(x.dtype)[:, None]
        y = self.attend(q, rotate(k, cos, sin), v, self.window, documents)      # [batch, keep, heads, d]
        if self.exclusive:
            y = subtract_own_value(y, v[:, -keep:])
        for gate, steepness in ((self.attn_gate, 1.0), (self.sparse_gate, self.sparse_scale)):
            if gate is not None:
                y = y * torch.sigmoid(steepness * gate(recent[..., :gate.in_features])).unsqueeze(-1)
        return project(y.flatten(2), weights.out, recent), value


class Block(nn.Module):
    """Attention and a LeakyReLU² MLP around a residual stream that mixes in the embedding."""

    def __init__(self, cfg: Hyperparameters, layer: int, attend, kernels: str):
        super().__init__()
        self.attn = Attention(cfg, layer, attend)
        ones, scale = torch.ones(cfg.model_dim), (layer + 1) ** -0.5 if cfg.ln_scale else 1.0
        self.attn_norm, self.mlp_norm = RMSNorm(cfg, scale), RMSNorm(cfg, scale)
        if cfg.residual_mix:
            self.attn_scale, self.mlp_scale = nn.Parameter(ones), nn.Parameter(ones.clone())
            self.resid_mix = nn.Parameter(torch.stack((ones, torch.zeros(cfg.model_dim))))
        self.mixes, self.joint = cfg.residual_mix, 0 < cfg.parallel_start_layer <= layer and not cfg.two_lanes
        self.dtg_gate = CastedLinear(cfg.model_dim, 1, bias=2.0) if cfg.dtg_enabled else None  # fairly open
        self.slope, self.kernels = cfg.leaky_slope, kernels

    def forward(self, x, lanes, x0, weights: LayerWeights, positions, value_embedding, first_value, keep: int):
        """Last `keep` positions of the stream after this block and of the MLP's lane, and the attention's values.

        Where the MLP has no lane, it reads what attention has written or, in the joint form, what attention reads. In
        two (PR 1204) each keeps a share of itself and takes of both outputs: lanes = (the MLP's, keeps [lane],
        takes [output, lane]).
        """
        before = x[:, -keep:]
        if self.mixes:
            mix = self.resid_mix.to(x.dtype)
            x = torch.addcmul(mix[0] * x, mix[1], x0)
        add = lambda x, name, y: torch.addcmul(x, getattr(self, name).to(x.dtype), y) if self.mixes else x + y
        y, value = self.attn(self.attn_norm(x), weights, positions, value_embedding, first_value, keep)
        x = x[:, -keep:]
        if lanes is not None:
            lane, keeps, takes = lanes[0][:, -keep:], *(weight.to(x.dtype) for weight in lanes[1:])
            z = self.mlp(self.mlp_norm(lane), weights)
            y, z = (y * self.attn_scale.to(x.dtype), z * self.mlp_scale.to(x.dtype)) if self.mixes else (y, z)
            x, lane = (keeps[i] * old + takes[0, i] * y + takes[1, i] * z for i, old in enumerate((before, lane)))
            return x, lane, value
        out = add(x, "attn_scale", y)
        out = add(out, "mlp_scale", self.mlp(self.mlp_norm(x if self.joint else out), weights))
        if self.dtg_gate is not None:
            out = x + torch.sigmoid(self.dtg_gate(x.detach())) * (out - x)
        return out, None, value

    def mlp(self, x: Tensor, weights: LayerWeights) -> Tensor:
        plain = all(isinstance(weight, Tensor) for weight in weights[4:])
        if plain and suits_triton(self.kernels, x.dtype, *weights.up.shape):
            return FusedMlp.apply(x.flatten(0, 1), weights.up, weights.down, self.slope).view_as(x)
        return project(SquaredLeakyReLU.apply(project(x, weights.up), self.slope), weights.down, x)


class GPT(nn.Module):
    """The language model. All large matrices are slices of four banks, so that the optimiser can batch them.

    qo_bank [2L, dim, dim]: L query then L output matrices; kv_bank [2L, kv_dim, dim]: keys then values;
    mlp_up_bank [L, mlp, dim]; mlp_down_bank [L, dim, mlp]; each matrix as [out, in].

    `qat_specs` maps parameter names to the QuantSpec they are exported with; a call with qat=True rounds those weights
    on the scales of the last `refresh_scales`. `qat` is an argument because a compiled graph sees a change of it; PR
    1092's class flag is a constant of the first trace, and its banks do not read it.
    """

    def __init__(self, cfg: Hyperparameters, attend=attend_sdpa, dtype: torch.dtype = torch.float32, qat_specs=None,
                 kernels: str = "torch"):
        super().__init__()
        if kernels == "triton":
            load_kernels()
        self.cfg, self.dtype, self.kernels = cfg, dtype, kernels
        self.qat_specs, self.qat_scales = dict(qat_specs or {}), {}
        self.register_buffer("hardness", torch.ones(()) if cfg.soft_round else None, persistent=False)
        layers, dim, kv_dim = cfg.num_layers, cfg.model_dim, cfg.num_kv_heads * cfg.head_dim
        self.tok_emb = nn.Embedding(cfg.vocab_size, dim)
        table = lambda rows, *args: ProjectedEmbedding(rows, *args) if rows else None
        self.bigram = table(cfg.bigram_vocab_size, cfg.bigram_dim, dim, BIGRAM_SCALE)
        self.trigram = table(cfg.trigram_vocab_size, cfg.trigram_dim, dim, TRIGRAM_SCALE)
        self.looped = True  # as it is scored; training starts without
        if cfg.smear_gate != "off":
            self.smear = WindowSmearGate(cfg.gate_window) if cfg.smear_gate == "window" else SmearGate(dim)
        self.skip_weights = nn.Parameter(torch.ones(len(cfg.visits(True)) // 2 if cfg.unet_skips else 0, dim))
        self.skip_gates = nn.Parameter(torch.zeros_like(self.skip_weights)) if cfg.skip_gates else None
        self.lane_keeps = nn.Parameter(torch.full((layers, 2), LANE_KEEPS)) if cfg.two_lanes else None
        self.lane_takes = nn.Parameter(torch.ones(layers, 2, 2)) if cfg.two_lanes else None
        self.qo_bank = nn.Parameter(torch.zeros(2 * layers, dim, dim))
        self.kv_bank = nn.Parameter(torch.zeros(2 * layers, kv_dim, dim))
        self.mlp_up_bank = nn.Parameter(torch.zeros(layers, cfg.mlp_dim, dim))
        self.mlp_down_bank = nn.Parameter(torch.zeros(layers, dim, cfg.mlp_dim))
        self.blocks = nn.ModuleList(Block(cfg, layer, attend, kernels) for layer in range(layers))
        self.final_norm = RMSNorm(cfg)
        self.ve_shared = table(cfg.vocab_size if cfg.ve_layer_ids else 0, cfg.ve_dim, kv_dim, VALUE_SCALE)
        self.ve_layer_scales = nn.ParameterList(nn.Parameter(torch.ones(1)) for _ in cfg.ve_layer_ids)
        self.lm_head = None if cfg.tie_embeddings else CastedLinear(dim, cfg.vocab_size)
        self.mtp_heads = nn.ModuleList(CastedLinear(dim, cfg.vocab_size) for _ in range(cfg.mtp_num_heads))
        if not self.qo_bank.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """What is not initialised where it is declared, which is mostly with zeros:

        queries, keys, values, MLP-up, projections of tables   orthogonal (INIT=kaiming: all banks and the token table
                                                               Kaiming-uniform, as nn.Linear's)
        token table                                            N(0, TIED_EMBED_INIT_STD) if tied, else N(0, 1)
        hashed tables; value table                             0; N(0, 0.01)"""
        layers, plain = self.cfg.num_layers, self.cfg.init == "kaiming"
        fill = functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)) if plain else nn.init.orthogonal_
        for matrix in (*self.qo_bank[:layers], *self.kv_bank, *self.mlp_up_bank):
            fill(matrix)
        self.tok_emb.weight.normal_(std=self.cfg.tied_embed_init_std if self.cfg.tie_embeddings else 1.0)
        for matrix in (*self.qo_bank[layers:], *self.mlp_down_bank, self.tok_emb.weight) if plain else ():
            fill(matrix)
        for table, std in ((self.bigram, 0.0), (self.trigram, 0.0), (self.ve_shared, 0.01)):
            if table is not None:
                table.embed.weight.normal_(std=std)
                if table.proj is not None:
                    nn.init.orthogonal_(table.proj.weight)

    @torch.no_grad()
    def refresh_scales(self, hardness: float = 1.0) -> None:
        """Fit the scales QAT rounds on to the present weights, by the export's rule. Called once per step and outside
        the compiled graph, where a sum in another order could pick another clip than the export does."""
        if self.hardness is not None:
            self.hardness.fill_(hardness)
        for name, spec in self.qat_specs.items():
            scale = row_scales(self.get_parameter(name), spec)
            self.qat_scales.setdefault(name, scale).copy_(scale)  # in place, where a compiled graph reads it

    def fake_quantised(self, name: str, qat: bool) -> Tensor:
        """A parameter as the forward pass sees it: rounded under QAT if it is exported rounded."""
        weight = operator.attrgetter(name)(self)
        if not qat or name not in self.qat_specs:
            return weight
        return fake_quantise(weight, self.qat_scales[name], self.qat_specs[name], self.hardness)

    def layer_of(self, visit: int) -> int:
        """The layer of a visit; -1 of -1, by which a hook knows what belongs to no layer."""
        return -1 if visit < 0 else self.cfg.visits(self.looped)[visit]

    def layer_weights(self, qat: bool, hook=None) -> list[LayerWeights]:
        """Per visit, its layer's slices of the banks in the activation dtype. One rounding and one cast per bank, and
        `unbind` rather than indexing: the gradient of a bank is then one stack, not a sum of mostly empty banks."""
        qo, kv, up, down = (self.fake_quantised(name, qat).to(self.dtype).unbind()
                            for name in ("qo_bank", "kv_bank", "mlp_up_bank", "mlp_down_bank"))
        layers, hook = self.cfg.num_layers, hook or (lambda kind, visit, weight: weight)
        slices = list(zip(qo, kv, kv[layers:], qo[layers:], up, down))
        return [LayerWeights(*(hook(kind, visit, weight) for kind, weight in zip(LayerWeights._fields, slices[layer])))
                for visit, layer in enumerate(self.cfg.visits(self.looped))]

    def look_up(self, name: str, index: Tensor, qat: bool) -> Tensor:
        """Rows of the ProjectedEmbedding `name`, in the activation dtype.  # int64 [batch, T] -> [batch, T, width]"""
        return getattr(self, name)(index, self.fake_quantised(f"{name}.embed.weight", qat), self.dtype)

    def embed(self, ids: Tensor, qat: bool, hook=None, documents: Documents | None = None) -> Tensor:
        """Token, bigram and trigram embeddings, normalised and smeared.  # [batch, T, dim]"""
        distance = None if documents is None else documents.distance(ids.size(1))
        table = self.fake_quantised("tok_emb.weight", qat)
        table = table if hook is None else hook("embed", -1, table)
        x = (F.embedding(ids, table) if isinstance(table, Tensor) else table(ids)).to(self.dtype)
        for name, table, factors in (("bigram", self.bigram, BIGRAM_FACTORS),
                                     ("trigram", self.trigram, TRIGRAM_FACTORS)):
            if table is not None:
                index = hash_ngrams(ids, factors, table.embed.num_embeddings)
                if distance is not None:
                    index = index.where(distance >= len(factors) - 1, table.embed.num_embeddings - 1)
                x = x + self.look_up(name, index, qat)
        x = self.smear(x, ids, distance) if self.cfg.smear_gate in ("before", "window") else x
        x = norm(x, eps=self.cfg.norm_eps) if self.cfg.embed_norm else x
        return self.smear(x, ids, distance) if self.cfg.smear_gate == "after" else x

    def merge_skip(self, x: Tensor, skip: Tensor, place: int) -> Tensor:
        """The stream with a skip connection's state of the first half, at a place of the second.  # [batch, T, dim]"""
        weight = self.skip_weights[place].to(x.dtype)
        if self.skip_gates is None:
            return torch.addcmul(x, weight, skip)
        return torch.lerp(weight * skip, x, torch.sigmoid(self.skip_gates[place].to(x.dtype)))

    def hidden(self, ids: Tensor, keep: int | None = None, qat: bool = False, hook=None,
               documents: Documents | None = None) -> Tensor:
        """The trunk: normalised final states of the last `keep` positions (all, if None).

        ids: int64 [batch, T] -> [batch, keep, dim]. The last block computes queries and MLP for those positions only.
        With `documents`, ids are a flat stream [1, N], and each document is computed as if it were a row by itself.

        `hook(kind, visit, matrix)` may replace a layer's matrix (kind: a field of LayerWeights) by a function, see
        `project`: to add a low-rank term to its output or to record its input. A visit is a place in the order of
        layers, of which a loop has several for a layer. The token table (a function of ids) and the output matrix are
        kinds "embed" and "head", of visit -1.
        """
        cfg, length = self.cfg, ids.size(1)
        longest = 0 if documents is None else documents.longest
        positions = *rope_table(cfg, length, ids.device, longest), documents
        shared = None if self.ve_shared is None else self.look_up("ve_shared", ids, qat)
        extra = {layer: shared * scale.to(self.dtype) for layer, scale in zip(cfg.ve_layer_ids, self.ve_layer_scales)}
        x = x0 = self.embed(ids, qat, hook, documents)
        skips, first_value, lane, order = [], None, None, cfg.visits(self.looped)
        for visit, (layer, weights) in enumerate(zip(order, self.layer_weights(qat, hook))):
            place = visit - len(order) // 2
            if lane is None and place >= 0 and cfg.two_lanes and layer >= cfg.parallel_start_layer:
                lane = x
            lanes = None if lane is None else (lane, self.lane_keeps[layer], self.lane_takes[layer])
            if place >= 0 and skips:
                x = self.merge_skip(x, skips.pop(), place)
            kept = keep or length if visit == len(order) - 1 else length
            x, lane, value = self.blocks[layer](x, lanes, x0, weights, positions, extra.get(layer), first_value, kept)
            first_value = value if visit == 0 else first_value
            if place < 0 and cfg.unet_skips:
                skips.append(x)
        if lane is not None:
            x = {"mean": (x + lane) / 2, "attn": x, "mlp": lane}[cfg.parallel_final_lane]
        return self.final_norm(x)

    def output_weight(self, qat: bool = False, hook=None):
        """The output matrix in the activation dtype, or what `hook` makes of it.  # [vocab, dim]"""
        name = "tok_emb.weight" if self.lm_head is None else "lm_head.weight"
        weight = self.fake_quantised(name, qat).to(self.dtype)
        return weight if hook is None else hook("head", -1, weight)

    def logits(self, hidden: Tensor, qat: bool = False, hook=None) -> Tensor:
        """Soft-capped logits in fp32.  # [..., dim] -> [..., vocab]"""
        return capped_logits(hidden, self.output_weight(qat, hook), self.cfg.logit_softcap)

    def nll(self, ids: Tensor, targets: Tensor, temperature: float = 1.0, hook=None) -> Tensor:
        """-log p in nats of each target; targets [batch, keep] belong to the last `keep` positions of ids."""
        logits = self.logits(self.hidden(ids, keep=targets.size(1), hook=hook), hook=hook) / temperature
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def loss(self, ids: Tensor, targets: Tensor, qat: bool = False, hook=None, token_weights=None,
             documents: Documents | None = None) -> Tensor:
        """Mean cross-entropy in nats per token over [batch, T], of tokens weighted by `token_weights` [batch, T] if
        given; while training, plus MTP_LOSS_WEIGHT times the unweighted mean of the multi-token-prediction heads."""
        cap, hidden = self.cfg.logit_softcap, self.hidden(ids, qat=qat, hook=hook, documents=documents)
        weight = self.output_weight(qat, hook)
        if not isinstance(weight, Tensor):  # it is a function then, whose gradient autograd finds
            return F.cross_entropy(capped_logits(hidden, weight, cap).flatten(0, 1), targets.flatten())
        cross_entropy = lambda hidden, weight, targets, token_weights=None: CappedCrossEntropy.apply(
            hidden.flatten(0, 1), weight, targets.flatten(), cap, self.kernels, token_weights)
        loss = cross_entropy(hidden, weight, targets, None if token_weights is None else token_weights.flatten())
        ahead = [cross_entropy(hidden[:, :-k], head.weight.to(self.dtype), targets[:, k:])
                 for k, head in enumerate(self.mtp_heads, 1)]
        return loss + self.cfg.mtp_loss_weight * torch.stack(ahead).mean() if ahead and self.training else loss


# ------------------------------------------------------------------------------------------------ PARAMETERS
@dataclass(frozen=True)
class Family:
    """How one kind of parameter is trained and stored; `lr` to `clip` name settings."""

    name: str
    pattern: str
    optimiser: str
    lr: str
    decay: str = ""       # "": none
    bits: str = ""        # "": stored as float
    clip: str = ""        # CLIP_clip_sigmas is its clip under sdclip
    exported: bool = True


FAMILIES = (
    Family("attn", r"(qo|kv)_bank", "muon", "matrix_lr", "muon_wd", "attn_qat_bits", "attn"),
    Family("mlp", r"mlp_(up|down)_bank", "muon", "matrix_lr", "muon_wd", "mlp_quant_bits", "mlp"),
    Family("embed", r"tok_emb\.weight", "adamw", "table_lr", "table_wd", "embed_bits", "embed"),
    Family("ngram", r"(bigram|trigram)\.embed\.weight", "adamw", "table_lr", "table_wd", "bigram_bits", "embed"),
    Family("value", r"ve_shared\.embed\.weight", "adamw", "table_lr", "table_wd", "ve_bits", "embed"),
    Family("head", r"lm_head\.weight", "adamw", "head_lr", "", "embed_bits", "embed"),
    Family("mtp", r"mtp_heads\.\d+\.weight", "adamw", "head_lr", exported=False),
    Family("proj", r"(bigram|trigram|ve_shared)\.proj\.weight", "adamw", "scalar_lr", "adam_wd"),
    Family("control", r"skip_(weights|gates)|lane_(keeps|takes)|final_norm\.weight|smear\..+|"
           r"(bigram|trigram|ve_shared)\.scale|ve_layer_scales\.\d+|blocks\.\d+\..+", "adamw", "scalar_lr", "adam_wd"),
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
    kept = f"{cfg.fp16_keep_name_patterns},{cfg.int8_keep_float_fp32_name_patterns}"
    fill = cfg.clip_rule == "waterfill"
    return {name: QuantSpec(WATER_BITS if fill else getattr(cfg, family.bits), cfg.clip_rule,
                            getattr(cfg, f"{family.clip}_clip_sigmas"),
                            cfg.clip_widen if name.endswith("_bank") else 1.0)
            for name, family in route(cfg, names).items() if family.bits and not named_in(kept, name)}


def parameter_shapes(cfg: Hyperparameters) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model's parameters, made without memory for them."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(cfg).named_parameters()}


# ------------------------------------------------------------------------------------------------ OPTIMISERS
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),)  # Keller Jordan's quintic: steep at 0, so five do; ends only near 1
POLAR_EXPRESS = (  # Amsel et al., arXiv 2505.16932: the best quintic for what the one before it leaves
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def symmetric_product(x: Tensor, add: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0,
                      kernels: str = "torch") -> Tensor:
    """x x^T, or alpha x x^T + beta add for a symmetric `add`.  # [n, rows, columns] -> [n, rows, rows]"""
    if suits_triton(kernels, x.dtype, *x.shape[1:]):
        load_kernels()
        return torch.ops.golf.symmetric(x, add, alpha, beta)
    return x @ x.mT if add is None else torch.baddbmm(add, x, x.mT, beta=beta, alpha=alpha)


def newton_schulz(matrices: Tensor, steps: int, dtype: torch.dtype, kernels: str = "torch",
                  coefficients=NEWTON_SCHULZ) -> Tensor:
    """Push the singular values of each matrix towards 1; steps after the last coefficients repeat them.
    # [n, rows, columns], any dtype -> same shape in `dtype`"""
    tall = matrices.size(-2) > matrices.size(-1)
    x = (matrices.mT if tall else matrices).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        gram = symmetric_product(x, kernels=kernels)
        x = torch.baddbmm(x, symmetric_product(gram, gram, c, b, kernels), x, beta=a)
    return x.mT if tall else x


class Muon:
    """Momentum, orthogonalised, on banks [n, rows, columns]; each rank works on its slices of every bank.

    One step is launch_reduce -> (clip) -> launch_update -> finish; transfers run between the calls. With one rank the
    shard is the bank and nothing is sent. Buffers, per shard: `momentum`, and `row_memory` for NorMuon (PR 173).
    """

    def __init__(self, banks: list[Tensor], cfg: Hyperparameters, rt: Runtime):
        self.banks, self.cfg, self.rt = sorted(banks, key=Tensor.numel, reverse=True), cfg, rt  # long transfers first
        self.slices = [-(-len(bank) // rt.world_size) for bank in self.banks]
        self.momentum = [bank.new_zeros(n, *bank.shape[1:]) for bank, n in zip(self.banks, self.slices)]
        self.row_memory = [m.new_zeros(*m.shape[:2], 1) for m in self.momentum] if cfg.normuon else []
        self.skipped = torch.zeros((), dtype=torch.bool, device=rt.device)  # the present step shall change nothing

    def launch_reduce(self) -> list[tuple[Tensor, object]]:
        """Start to sum the gradients over ranks: (this rank's shard, handle to wait for) of each bank."""
        if self.rt.world_size == 1:
            return [(bank.grad, None) for bank in self.banks]
        wire = torch.bfloat16 if self.cfg.grad_quant else torch.float32
        padded = lambda bank, n: F.pad(bank.grad.to(wire), (0, 0, 0, 0, 0, n * self.rt.world_size - len(bank)))
        return [self.rt.launch_reduce_scatter(padded(bank, n)) for bank, n in zip(self.banks, self.slices)]

    def launch_update(self, shards: list[Tensor], momentum: float) -> list[tuple[Tensor, object]]:
        """Orthogonalise this rank's slices and start to gather every rank's: (whole update, handle) of each bank."""
        started, kept = [], torch.where(self.skipped, 1.0, momentum)
        for i, (grad, buffer) in enumerate(zip(shards, self.momentum)):
            buffer.mul_(kept).add_(grad.masked_fill_(self.skipped, 0.0))
            nesterov = grad.add(buffer, alpha=momentum).masked_fill_(self.skipped, 0.0)
            if self.cfg.muon_row_normalize:
                nesterov = F.normalize(nesterov, dim=-1, eps=1e-7)
            update = newton_schulz(nesterov, self.cfg.muon_backend_steps, self.rt.dtype, self.rt.kernels,
                                   POLAR_EXPRESS if self.cfg.polar_express else NEWTON_SCHULZ)
            if self.row_memory:
                fresh = torch.where(self.skipped, 0.0, 1 - self.cfg.muon_beta2)
                update = normalise_rows_(update.float(), self.row_memory[i], fresh)
            started.append(self.rt.launch_all_gather(update.contiguous()))
        return started

    def finish(self, updates: list[Tensor], lr: float) -> None:
        """Decay the banks and add the updates, which are larger for tall matrices."""
        for bank, update in zip(self.banks, updates):
            aspect = max(1.0, bank.size(-2) / bank.size(-1)) ** 0.5
            kept = torch.where(self.skipped, 1.0, 1 - lr * self.cfg.muon_wd)
            bank.mul_(kept).add_(update[:len(bank)].to(bank.dtype), alpha=-lr * aspect)

    def state(self) -> dict:
        """Buffers of whole banks, which any world size can load."""
        whole = lambda shards: [self.rt.wait(self.rt.launch_all_gather(s))[:len(b)].clone()
                                for s, b in zip(shards, self.banks)]
        return {"momentum": whole(self.momentum), "row_memory": whole(self.row_memory)}

    def load(self, state: dict) -> None:
        for name in ("momentum", "row_memory"):
            for shard, n, whole in zip(getattr(self, name), self.slices, state[name], strict=False):
                mine = whole[n * self.rt.rank:n * (self.rt.rank + 1)]
                shard.zero_()[:len(mine)].copy_(mine)


def normalise_rows_(update: Tensor, memory: Tensor, fresh: Tensor | float) -> Tensor:
    """NorMuon: divide rows by a running mean of their squares, in which `fresh` is the weight of the present ones, then
    restore the matrix norm (PR 173)."""
    size = update.norm(dim=(-2, -1), keepdim=True)
    memory.lerp_(update.square().mean(-1, keepdim=True), fresh)
    update /= memory.sqrt() + 1e-10
    return update.mul_(size / (update.norm(dim=(-2, -1), keepdim=True) + 1e-10))


class Optimisers:
    """Muon for the banks, AdamW for everything else; one `step` for all ranks together."""

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime):
        self.cfg, self.rt = cfg, rt
        params = dict(model.named_parameters())
        families = route(cfg, params)
        by_muon = {name for name in params if families[name].optimiser == "muon" == cfg.matrix_optimizer}
        self.muon = Muon([params[name] for name in params if name in by_muon], cfg, rt)
        grouped = collections.defaultdict(list)
        for name, p in params.items():
            if name not in by_muon and p.numel():
                grouped[families[name].lr, families[name].decay].append(p)
        self.adamw = torch.optim.AdamW(
            [{"params": group, "base_lr": getattr(cfg, lr), "weight_decay": getattr(cfg, decay) if decay else 0.0}
             for (lr, decay), group in grouped.items()],
            lr=0.0, betas=(cfg.beta1, cfg.beta2), eps=cfg.adam_eps, fused=True)
        self.replicated = [p for group in self.adamw.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, plan: StepPlan) -> Tensor:
        """Apply the gradients in `.grad`, whose sum over ranks is the global one, and drop them. They are clipped after
        they are summed (PR 1092 clips each rank's own). If they are not finite, nothing else is changed: decided on the
        device, so that no host waits. Returns the norm before clipping."""
        started = self.muon.launch_reduce()
        grads = self.rt.sum_many_([p.grad for p in self.replicated])
        shards = [self.rt.wait(pair) for pair in started]
        squares = self.rt.sum_(torch.nn.utils.get_total_norm(shards).to(grads[0].device).square())
        norm = (squares + torch.nn.utils.get_total_norm(grads).square()).sqrt()
        self.muon.skipped = ~norm.isfinite()
        self.adamw.found_inf = self.muon.skipped.float()
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
    """What one step does; depends on progress only."""

    lr_scale: float
    momentum: float
    qat: bool
    snapshot: bool         # SWA takes one after this step
    seq_len: int = 0       # of the training sequences; 0: TRAIN_SEQ_LEN
    looped: bool = True    # the loop of layers is on
    hardness: float = 1.0  # of soft-rounding QAT: from 0 at its start to 1, the export's rounding, in its last tenth


def plan_step(cfg: Hyperparameters, step: int, elapsed_s: float, pace_s: float) -> StepPlan:
    """The plan of step `step` (from 0), after `elapsed_s` seconds of training at `pace_s` seconds per step."""
    scale = lr_scale(cfg, step, elapsed_s, pace_s)
    ramp = min(step / cfg.muon_momentum_warmup_steps, 1.0) if cfg.muon_momentum_warmup_steps else 1.0
    spent = budget_spent(cfg, step, elapsed_s)
    qat = qat_progress(cfg, step, scale, spent)
    return StepPlan(lr_scale=scale,
                    momentum=(1 - ramp) * cfg.muon_momentum_warmup_start + ramp * cfg.muon_momentum,
                    qat=qat is not None,
                    snapshot=scale < cfg.swa_start_frac and (step + 1) % cfg.swa_every == 0,
                    **stage(cfg, spent),
                    hardness=min(max((qat or 0.0) / 0.9, 0.0), 1.0))


def stage(cfg: Hyperparameters, spent: float) -> dict:
    """What changes the shapes of a training step, at a share of the budget: fields of StepPlan."""
    return {"seq_len": next(length for length, until in cfg.seq_stages if spent <= until),
            "looped": not cfg.num_loops or spent >= cfg.enable_looping_at}


def stage_shares(cfg: Hyperparameters) -> list[float]:
    """A share of the budget in each stage of a run."""
    begins = {0.0, *(math.nextafter(until, 2.0) for _, until in cfg.seq_stages[:-1])}
    return sorted(begins | {cfg.enable_looping_at} if cfg.num_loops else begins)


def qat_progress(cfg: Hyperparameters, step: int, scale: float, spent: float) -> float | None:
    """How far QAT is: 0 when it starts, 1 at the end of training, None before it starts. Measured in what triggers it
    (budget or learning-rate scale), so that a run that ends by the clock reaches 1 too (PR 550 counts ITERATIONS)."""
    if cfg.qat_enabled:
        return spent
    if not cfg.late_qat or step < cfg.late_qat_min_step:
        return None
    if cfg.late_qat_frac > 0:
        late = spent - cfg.late_qat_frac
        return late / max(1 - cfg.late_qat_frac, 1e-9) if late >= 0 else None
    lowest = cfg.min_lr if cfg.warmdown_frac > 0 else 0.0
    late = cfg.late_qat_threshold - scale
    return late / max(cfg.late_qat_threshold - lowest, 1e-9) if late > 0 else None


def budget_spent(cfg: Hyperparameters, step: int, elapsed_s: float) -> float:
    """The larger of the shares of the step and the time budget that are used, 0..1."""
    by_time = elapsed_s / cfg.train_seconds if cfg.train_seconds else 0.0
    return min(max(step / max(cfg.iterations, 1), by_time), 1.0)


def lr_scale(cfg: Hyperparameters, step: int, elapsed_s: float, pace_s: float) -> float:
    """Constant, then linear or half a cosine to 0 (or MIN_LR) at the step limit or the end of time, whichever comes
    first."""
    shape = {"linear": lambda x: x, "cosine": lambda x: 0.5 - 0.5 * math.cos(math.pi * x)}[cfg.warmdown_shape]
    if cfg.warmdown_frac > 0:
        left = 1.0 - budget_spent(cfg, step, elapsed_s)
        return 1.0 if left > cfg.warmdown_frac else max(shape(left / cfg.warmdown_frac), cfg.min_lr)
    steps_left = cfg.iterations - step
    if cfg.train_seconds and pace_s > 0:
        steps_left = min(steps_left, max(cfg.train_seconds - elapsed_s, 0.0) / pace_s)
    return shape(min(1.0, steps_left / cfg.warmdown_iters)) if cfg.warmdown_iters else 1.0


# ------------------------------------------------------------------------------------------------ AVERAGING
class Averager:
    """Averages of the weights, in fp32 on the device: an EMA, and a mean of snapshots, either of all from the end of
    training (SWA) or of the last LAWA_K (LAWA, which wins if both are on). `apply` prefers the mean to the EMA."""

    def __init__(self, cfg: Hyperparameters, params: list[Tensor]):
        self.cfg, self.params, self.snapshots, self.count = cfg, params, [], 0
        self.ema = self.copy_params() if cfg.ema_enabled else []

    def copy_params(self) -> list[Tensor]:
        return [p.detach().float().clone() for p in self.params]

    @torch.no_grad()
    def update(self, step: int, plan: StepPlan) -> None:
        """Take in the weights after step number `step` (counted from 1)."""
        cfg = self.cfg
        if self.ema:  # the first steps get a short memory: with 0.997 alone a short run averages its start
            ramp = (1 + step) / (10 + step) if cfg.ema_ramp else 1.0
            torch._foreach_lerp_(self.ema, self.params, 1 - min(cfg.ema_decay, ramp))
        if cfg.lawa_enabled:
            if step % cfg.lawa_freq == 0:
                self.snapshots = [*self.snapshots, self.copy_params()][-cfg.lawa_k:]
                self.count = len(self.snapshots)
        elif cfg.swa_enabled and plan.snapshot:
            if self.snapshots:  # all snapshots count, so that their sum is enough
                torch._foreach_add_(self.snapshots[0], self.params)
            else:
                self.snapshots = [self.copy_params()]
            self.count += 1

    @torch.no_grad()
    def apply(self) -> str:
        """Load the average into the parameters; returns the log line that says which."""
        if self.count:
            mean = [sum(copies) / self.count for copies in zip(*self.snapshots)]
            line = (f"lawa:applying LAWA averaging k={self.count}" if self.cfg.lawa_enabled else
                    f"swa:applying averaged {self.count} checkpoints")
        elif self.ema:
            mean, line = self.ema, "ema:applying EMA weights"
        else:
            return "average:none, the last weights are exported"
        torch._foreach_copy_(self.params, mean)
        return line

    def state(self) -> dict:
        return {"ema": self.ema, "snapshots": self.snapshots, "count": self.count}

    def load(self, state: dict) -> None:
        self.ema, self.snapshots, self.count = state["ema"], state["snapshots"], state["count"]


# ------------------------------------------------------------------------------------------------ TRAINING
class BigramCounts:
    """Complementary training (PR 803, PR 550): a token that counts of the bigrams (a, b) so far predict well has the
    lower weight max(1 - COMPLEMENT_ALPHA * n(a, b) / (n(a) + 1), 0.1)."""

    def __init__(self, cfg: Hyperparameters, device):
        self.alpha, size = cfg.complement_alpha, cfg.vocab_size if cfg.complement_alpha else 0
        self.pairs, self.firsts = torch.zeros(size, size, device=device), torch.zeros(size, device=device)

    def weights(self, a: Tensor, b: Tensor) -> Tensor:
        """int64 [n] each -> float32 [n]"""
        return (1 - self.alpha * self.pairs[a, b] / (self.firsts[a] + 1)).clamp(min=0.1)

    def update(self, a: Tensor, b: Tensor) -> None:
        ones = torch.ones_like(a, dtype=torch.float32)
        self.pairs.index_put_((a, b), ones, accumulate=True)
        self.firsts.index_add_(0, a, ones)

    def weigh(self, data: TrainData, step: int):
        """Weights of this rank's micro-batches, of mean 1 over the global batch, which is then counted; None for each
        if COMPLEMENT_ALPHA is 0. Every rank counts the whole batch, so that all have the same counts."""
        if not self.alpha:
            return [None] * data.micro_steps
        span = data.rt.to_device(data.read(step, range(data.batch_tokens))).long()
        weights = self.weights(span[:-1], span[1:])
        self.update(span[:-1], span[1:])
        return data.micro_batches((weights / weights.mean())[data.share.start:data.share.stop])


MOST_SKIPPED = 3  # steps in a row whose gradient is not finite
REWARM_STEPS = 32  # after a change of the sequence length, PR 2014


@dataclass
class TrainState:
    """Everything that changes while training: what a checkpoint holds, with the time of the clock."""

    model: GPT
    optimisers: Optimisers
    averager: Averager
    bigrams: BigramCounts
    watch: Stopwatch
    step: int = 0
    qat: bool = False
    first_step_s: float = 0.0
    seq_len: int = 0
    seq_step: int = -REWARM_STEPS  # when the sequence length changed
    skipped: int = 0  # steps in a row

    @classmethod
    def initial(cls, model: GPT, cfg: Hyperparameters, rt: Runtime) -> TrainState:
        return cls(model, Optimisers(model, cfg, rt), Averager(cfg, list(model.parameters())),
                   BigramCounts(cfg, rt.device), Stopwatch(), seq_len=cfg.seq_stages[0][0])

    def pace(self, elapsed_s: float) -> float:
        """Seconds per step, without the first one, which may have compiled. 0 when unknown."""
        return (elapsed_s - self.first_step_s) / (self.step - 1) if self.step > 1 else 0.0

    def ended(self, cfg: Hyperparameters, elapsed_s: float) -> bool:
        """Whether the step limit or the clock ends training."""
        return self.step >= cfg.iterations or 0 < cfg.train_seconds <= elapsed_s

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps (0: never) is due now."""
        return bool(every) and self.step % every == 0

    def rewarmed(self, rt: Runtime, plan: StepPlan) -> StepPlan:
        """The plan, with the learning rate rising anew over REWARM_STEPS where the sequence length has changed."""
        if plan.seq_len != self.seq_len:
            self.seq_len, self.seq_step = plan.seq_len, self.step
            rt.log(f"train_seq_len:{plan.seq_len} step:{self.step}", "train_seq_len", step=self.step)
        share = min((self.step - self.seq_step + 1) / REWARM_STEPS, 1.0)
        return dataclasses.replace(plan, lr_scale=plan.lr_scale * share)

    def pack(self) -> dict:
        return {"model": self.model.state_dict(), "optimisers": self.optimisers.state(),
                "averager": self.averager.state(), "bigrams": [self.bigrams.pairs, self.bigrams.firsts],
                "step": self.step, "qat": self.qat, "looped": self.model.looped, "first_step_s": self.first_step_s,
                "seq_len": [self.seq_len, self.seq_step]}

    def unpack(self, packed: dict) -> None:
        self.model.load_state_dict(packed["model"])
        self.optimisers.load(packed["optimisers"])
        self.averager.load(packed["averager"])
        self.bigrams.pairs, self.bigrams.firsts = packed["bigrams"]
        self.step, self.qat, self.first_step_s = packed["step"], packed["qat"], packed["first_step_s"]
        self.model.looped, (self.seq_len, self.seq_step) = packed["looped"], packed["seq_len"]


def checkpoint_path(rt: Runtime, kind: str = "") -> Path:
    """The place of the newest checkpoint; `kind` ".before": of the one before it."""
    return rt.run_folder / f"checkpoint{kind}.pt"


def resumable_settings(cfg: Hyperparameters) -> dict:
    """The settings a checkpoint must share with the run that resumes from it."""
    free = {"resume", "run_id", "device", "compile", "attention", "kernels", "checkpoint_every", "checkpoint_seconds",
            "train_log_every", "val_loss_every", "val_batch_size", "micro_batch_tokens", "profile", "iterations",
            "artifact_dir", "max_wallclock_seconds"}
    late = {f.name for section in ("Export", "Evaluation") for f in settings_by_section()[section]}
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in free | late}


def save_checkpoint(cfg: Hyperparameters, rt: Runtime, state: TrainState) -> None:
    """Serialise the state, for a thread to write. Weights that are not finite are not saved."""
    elapsed_s = state.watch.elapsed()
    if not torch.nn.utils.get_total_norm(list(state.model.parameters())).isfinite():
        return rt.log(f"warning: no checkpoint of step {state.step}: its weights are not finite")
    packed = state.pack()  # on every rank: shards are gathered
    if rt.rank == 0:
        data = torch_bytes({**packed, "settings": resumable_settings(cfg), "elapsed_s": elapsed_s})
        rt.in_background(lambda: rt.attempt(write_atomically, checkpoint_path(rt), with_digest(data),
                                            checkpoint_path(rt, ".before")))
    rt.agree(0.0)  # or the others' next collective would wait for rank 0


def with_digest(data: bytes) -> bytes:
    """The bytes and their sha256, which torch.load passes over."""
    return data + hashlib.sha256(data).digest()


def newest_checkpoint(cfg: Hyperparameters, rt: Runtime) -> tuple[Path, bytes] | None:
    """The newest checkpoint of RUN_ID that is whole. None if there is none, and a restart looks for one; with RESUME=1,
    or if all are damaged, it raises UserError."""
    paths = [path for path in (checkpoint_path(rt), checkpoint_path(rt, ".before")) if path.exists()]
    for path in paths:
        data = read_file(path)
        if with_digest(data[:-32]) == data:
            return path, data
        rt.log(f"warning: checkpoint {path} is damaged")
    if paths:
        raise UserError(f"no checkpoint in {rt.run_folder} is whole; start without RESUME=1")
    if cfg.resume:
        raise UserError(f"RESUME=1, but there is no checkpoint {checkpoint_path(rt)}")


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def load_checkpoint(cfg: Hyperparameters, rt: Runtime, state: TrainState) -> float:
    """Resume from the newest checkpoint of RUN_ID, which rank 0 reads for all. Returns the seconds of training it took.
    Raises UserError if it is missing, damaged or of other settings."""
    found = rt.from_first(lambda: newest_checkpoint(cfg, rt))
    if found is None:
        return 0.0
    path, data = found
    try:
        packed = torch.load(io.BytesIO(data), map_location=rt.device, weights_only=True)
        then, now = packed["settings"], resumable_settings(cfg)
        changed = sorted(name.upper() for name in now if then.get(name) != now[name])
        if not changed:
            spent_s = float(packed["elapsed_s"])
            state.unpack(packed)
    except Exception as error:  # torch raises many kinds for what is no checkpoint
        raise UserError(f"checkpoint {path} cannot be read ({type(error).__name__}); start without RESUME=1") from None
    if changed:
        raise UserError(f"checkpoint {path} was made with another {', '.join(changed)}")
    rt.log(f"resume:step:{state.step} from {path}", "resume", step=state.step)
    return spent_s


def train_step(state: TrainState, data: TrainData, plan: StepPlan, loss_fn) -> tuple[Tensor, Tensor]:
    """One optimiser step on the batch of state.step. Returns this rank's share of the mean loss, to be summed, and the
    norm of the gradient."""
    total = 0.0
    if state.qat:
        state.model.refresh_scales(plan.hardness)
    batch = data.training_batch(state.step, plan.seq_len)
    for (inputs, targets, packed), weights in zip(batch, state.bigrams.weigh(data, state.step)):
        loss = loss_fn(inputs, targets, state.qat, None, weights, **packed) / (data.micro_steps * data.rt.world_size)
        loss.backward()
        total = total + loss.detach()
    return total, state.optimisers.step(plan)


def count_skipped(rt: Runtime, state: TrainState, norms: list[float]) -> None:
    """Look at the norms of the last finished steps' gradients: a step whose norm is not finite was not applied. Raises
    UserError after MOST_SKIPPED in a row."""
    for step, norm in enumerate(norms, state.step - len(rt.in_flight) - len(norms) + 1):
        state.skipped = 0 if math.isfinite(norm) else state.skipped + 1
        if state.skipped:
            rt.log(f"warning: step {step} is not applied: the norm of its gradient is {norm}", "skipped", step=step)
        if state.skipped == MOST_SKIPPED:
            raise UserError(f"training diverged: the gradients of {MOST_SKIPPED} steps in a row, up to step {step}, "
                            "are not finite; lower MATRIX_LR or SCALAR_LR")


def warm_up(cfg: Hyperparameters, rt: Runtime, state: TrainState, data: TrainData, loss_fn) -> None:
    """Compile every graph training will need before the clock starts, by steps that are then undone."""
    may_round = cfg.qat_enabled or cfg.late_qat and (cfg.late_qat_frac > 0 or cfg.late_qat_threshold > 0)
    stages = [stage(cfg, share) for share in stage_shares(cfg)]
    graphs = [(parts, qat) for parts in stages for qat in (False, True)[:1 + may_round]]
    steps, start = max(cfg.warmup_steps, len(graphs)), copy.deepcopy(state.pack())
    rt.log(f"warm-up: {steps} steps, before the clock starts")
    for i in range(steps):
        parts, state.qat = graphs[i * len(graphs) // steps]
        state.model.looped = parts["looped"]
        train_step(state, data, dataclasses.replace(plan_step(cfg, 0, 0.0, 0.0), **parts), loss_fn)
        if steps <= 20 or (i + 1) % 10 == 0 or i + 1 == steps:
            rt.log(f"warmup_step:{i + 1}/{steps}")
    state.unpack(start)


def begin_training(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, loss_fn) -> TrainState:
    """The state of the first step, or of the checkpoint with RESUME=1, once every graph is compiled. Its clock runs."""
    state = TrainState.initial(model, cfg, rt)
    spent_s = load_checkpoint(cfg, rt, state) if rt.resumes else 0.0
    if cfg.warmup_steps and not state.ended(cfg, spent_s):
        with rt.signals.act(at_once=True):
            warm_up(cfg, rt, state, data, loss_fn)
    rt.synchronize()  # the device has done with the warm-up
    state.watch = Stopwatch(spent_s)
    return state


def train(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, validate) -> TrainState:
    """Train until the step limit or the clock ends it; the model is left with the averaged weights.

    `validate(name, score_fn)` returns an object with `loss` and `bpb`. Validation and checkpoints are not counted as
    training time. No step begins after the limit. Raises UserError after MOST_SKIPPED steps in a row without a finite
    gradient.
    """
    loss_fn, score_fn = rt.compiled(model.loss), rt.compiled(model.nll)
    state = begin_training(cfg, rt, model, data, loss_fn)
    model.train()
    rt.allow_wait(60.0)  # what took the ranks longer, to compile and to load, is behind them
    elapsed = saved_s = rt.agree(state.watch.elapsed())
    ended = state.ended(cfg, elapsed)
    while True:
        if ended or state.due(cfg.val_loss_every):
            with state.watch.paused(rt.synchronize), rt.signals.act(at_once=True):  # the last step is saved
                result = validate("validation", score_fn)
            log_losses(cfg, rt, state, elapsed, "validation", {"val_loss": result.loss, "val_bpb": result.bpb})
        if ended:
            break
        pace = state.pace(elapsed)
        plan = plan_step(cfg, state.step, elapsed, pace)
        announce(rt, state, plan, cfg)
        plan = state.rewarmed(rt, plan)
        loss, norm = train_step(state, data, plan, loss_fn)
        state.step += 1
        state.averager.update(state.step, plan)
        ends = state.step == cfg.iterations or cfg.train_seconds and elapsed + 3 * pace >= cfg.train_seconds
        count_skipped(rt, state, rt.keep_pace(norm, behind=0 if ends or not pace else 1))
        elapsed = rt.agree(state.watch.elapsed())
        state.first_step_s = state.first_step_s or elapsed
        ended = state.ended(cfg, elapsed)
        if cfg.train_log_every and (state.step <= 10 or ended or state.due(cfg.train_log_every)):
            loss = rt.sum_(loss).item()
            log_losses(cfg, rt, state, elapsed, "train", {"train_loss": loss}, lr_scale=plan.lr_scale)
        due = state.due(cfg.checkpoint_every) or 0 < cfg.checkpoint_seconds <= elapsed - saved_s
        if ended or due or state.due(cfg.val_loss_every) or rt.signals.agreed:
            saved_s = elapsed
            with state.watch.paused(rt.synchronize):
                save_checkpoint(cfg, rt, state)
        if rt.signals.agreed:
            raise KeyboardInterrupt(rt.signals.agreed)
    model.looped = True
    if state.step < cfg.iterations:
        rt.log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{state.step}/{cfg.iterations}")
    rt.allow_wait(600.0)  # compiling, calibrating and scoring take one rank longer than another
    rt.log(rt.peak_memory_line())
    rt.log(state.averager.apply())
    return state


def log_losses(cfg: Hyperparameters, rt: Runtime, state: TrainState, elapsed_s: float, event: str, losses: dict,
               **unprinted) -> None:
    """Print progress, losses and time in one line; the event log gets the same numbers and those `unprinted`."""
    shown = " ".join(f"{name}:{value:.4f}" for name, value in losses.items())
    rt.log(f"step:{state.step}/{cfg.iterations} {shown} train_time:{1000 * elapsed_s:.0f}ms "
           f"step_avg:{1000 * elapsed_s / max(state.step, 1):.2f}ms", event, step=state.step, **losses,
           train_time_s=elapsed_s, **unprinted)


def announce(rt: Runtime, state: TrainState, plan: StepPlan, cfg: Hyperparameters) -> None:
    """Switch late QAT on for the rest of the run, and log the turning points of the schedule."""
    if plan.looped and not state.model.looped:
        rt.log(f"layer_loop:enabled step:{state.step} layers:{cfg.visits(True)}", "layer_loop", step=state.step)
    state.model.looped = plan.looped
    if plan.qat and not state.qat:
        state.qat = True
        rt.log(f"late_qat:enabled step:{state.step} scale:{plan.lr_scale:.4f}", "late_qat", step=state.step)
        if cfg.ema_reset_at_qat and state.averager.ema and state.step:
            state.averager.ema = state.averager.copy_params()  # without the weights from before rounding
            rt.log(f"ema:restarted step:{state.step}")
    if state.step in (0, 10) and not cfg.warmdown_frac and plan.lr_scale < 1:
        rt.log(f"warning: the run is shorter than WARMDOWN_ITERS={cfg.warmdown_iters}: the learning rate is at "
               f"{plan.lr_scale:.3f} of its value at step {state.step} already; WARMDOWN_FRAC makes it a share of the "
               "run")
    if cfg.swa_enabled and plan.snapshot and not state.averager.count:
        rt.log(f"swa:start step:{state.step + 1}")


# ------------------------------------------------------------------------------------------------ ROUNDING
SELF_TEXT_ROWS, SELF_TEXT_TEMPERATURE = 4, 0.8   # PR 1019; its 64 sequences are 16 batches
FIT_WINDOW, FIT_ROUNDS = 0.005, 6        # share of the limit that may stay unused; packings
FIT_DOUBLINGS, FILL_DOUBLINGS = 4.0, 8.0  # of the step, at most: 6-bit weights then have 2 bits left; by water-filling
GRADIENT_PIECES, GRADIENT_TOKENS = 256, 256  # pieces of text, over all ranks, and tokens in each
TUNE_RATE, TUNE_TOKENS = 3e-3, 16_384  # of Adam, falling to 5 %; tokens of a rank at most, in each step
TUNE_HARD = 0.1    # part of the loss on the text itself; without it the float model's errors are learnt as well
TUNE_REACH = 0.49  # from its code, in steps, a latent weight starts at most; at 0.5 is the next code's cell
TUNE_HELD, TUNE_ROOM = 4, 0.001  # pieces of text that decide whether it gained; share of the limit left for what moves


class HessianSums:
    """A hook (see GPT.hidden) that changes nothing and sums x x^T over the inputs x of each matrix: the Hessians of
    GPTQ, from one pass over the text. Query, key and value share their input; the head's is the final state."""

    def __init__(self, model: GPT):
        cfg, device, self.layer_of = model.cfg, model.qo_bank.device, model.layer_of
        self.head = "tok_emb.weight" if cfg.tie_embeddings else "lm_head.weight"
        widths = {"query": cfg.model_dim, "out": cfg.model_dim, "up": cfg.model_dim, "down": cfg.mlp_dim}
        self.sums = {kind: torch.zeros(cfg.num_layers, n, n, device=device) for kind, n in widths.items()}
        self.sums["head"] = torch.zeros(1, cfg.model_dim, cfg.model_dim, device=device)

    def __call__(self, kind: str, visit: int, weight: Tensor):
        def project_and_sum(x: Tensor, source: Tensor) -> Tensor:
            rows = x.flatten(0, -2).float()
            self.sums[kind][self.layer_of(visit)].addmm_(rows.t(), rows)
            return F.linear(x, weight)
        return project_and_sum if kind in self.sums else weight

    def by_parameter(self, rt: Runtime) -> dict[str, Tensor]:
        """Sums over all ranks, in the layout of the parameters.  # [matrices, columns, columns]"""
        query, out, up, down, head = rt.sum_many_(list(self.sums.values()))
        return {"qo_bank": torch.cat((query, out)), "kv_bank": torch.cat((query, query)), "mlp_up_bank": up,
                "mlp_down_bank": down, self.head: head}


@torch.no_grad()
def self_generated_text(cfg: Hyperparameters, rt: Runtime, model: GPT):
    """Yields this rank's batches of text sampled from the model itself (PR 1019): inputs and targets, as TrainData.

    The first token is uniform, each next one is drawn at temperature 0.8. Batch i depends on SEED and i alone.
    """
    for i in range(rt.rank, cfg.gptq_calibration_batches, rt.world_size):
        dice = torch.Generator(rt.device).manual_seed(cfg.seed + i)
        text = torch.randint(cfg.vocab_size, (SELF_TEXT_ROWS, 1), generator=dice, device=rt.device)
        while text.size(1) <= cfg.train_seq_len:
            logits = model.logits(model.hidden(text, keep=1)[:, 0]) / SELF_TEXT_TEMPERATURE
            text = torch.cat((text, torch.multinomial(logits.softmax(-1), 1, generator=dice)), dim=1)
        yield text[:, :-1], text[:, 1:]


def calibration_text(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, step: int):
    """Yields inputs and targets: of the training steps from `step` on, which no step has read, or the model's own."""
    if cfg.gptq_calibration == "self":
        yield from self_generated_text(cfg, rt, model)
        return
    for i in range(cfg.gptq_calibration_batches):
        yield from data.batch(step + i)


@torch.no_grad()
def calibrate(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, step: int,
              left_s: float) -> dict[str, Tensor]:
    """Hessians by parameter, from GPTQ_CALIBRATION_BATCHES of text, or fewer if `left_s` seconds of the training time
    run out; empty without GPTQ."""
    if not cfg.gptq_enabled:
        return {}
    watch, look, tokens = Stopwatch(), HessianSums(model), 0
    rt.log("GPTQ:collecting Hessians from calibration data...")
    for inputs, _ in calibration_text(cfg, rt, model, data, step):
        model.logits(model.hidden(inputs, hook=look), hook=look)
        tokens += inputs.numel()
        rt.synchronize()
        if watch.elapsed() > left_s / 1.5:  # the rest is for rounding
            break
    hessians = look.by_parameter(rt)
    rt.log(f"GPTQ:collected {sum(map(len, look.sums.values()))} Hessians in {watch.elapsed():.1f}s from {tokens} "
           f"tokens per rank ({cfg.gptq_calibration})", "calibration", tokens=tokens, seconds=watch.elapsed())
    if watch.elapsed() > left_s:
        rt.log(f"warning: calibration took {watch.elapsed():.1f}s, {watch.elapsed() - left_s:.1f}s more than was left "
               "of MAX_WALLCLOCK_SECONDS; raise GPTQ_RESERVE_SECONDS or lower GPTQ_CALIBRATION_BATCHES")
    return hessians


def loss_curvature(cfg: Hyperparameters, rt: Runtime, model: GPT, data: TrainData, step: int,
                   hessians: dict[str, Tensor], left_s: float) -> dict[str, tuple[Tensor, Tensor]]:
    """`curvature` of each parameter that is exported rounded; empty unless CLIP_RULE=waterfill.

    By the Fisher information of GRADIENT_PIECES pieces of the text that `calibrate` reads: the gradient of the nats of
    a whole piece, squared, over its tokens. Stops early when `left_s` seconds are over.
    """
    if cfg.clip_rule != "waterfill":
        return {}
    params, watch, length = dict(model.named_parameters()), Stopwatch(), min(GRADIENT_TOKENS, cfg.train_seq_len)
    squares = {name: torch.zeros_like(params[name], dtype=torch.float32) for name in quant_specs(cfg, params)}
    weights, tokens = [params[name] for name in squares], torch.zeros((), device=rt.device)
    pieces = (piece for batch in calibration_text(cfg, rt, model, data, step)
              for piece in zip(*(t.reshape(-1).split(length) for t in batch)))
    for ids, targets in itertools.islice(pieces, -(-GRADIENT_PIECES // rt.world_size)):
        nats = model.nll(ids[None], targets[None]).sum()
        gradients = torch.autograd.grad(nats, weights, materialize_grads=True)
        torch._foreach_addcmul_(list(squares.values()), gradients, gradients)
        tokens += len(ids)
        rt.synchronize()
        if watch.elapsed() > left_s:
            break
    rt.sum_many_([tokens, *squares.values()])
    rt.log(f"waterfill:gradients of {int(tokens)} tokens in {watch.elapsed():.1f}s")
    factors = {}
    for name, square in squares.items():
        parts = curvature(square.view(-1, *square.shape[-2:]) / tokens, hessians.get(name), name)
        factors[name] = tuple(part.view(*square.shape[:-2], *part.shape[-2:]) for part in parts)
    return factors


@torch.no_grad()
def round_model(cfg: Hyperparameters, model: GPT, hessians: dict[str, Tensor],
                factors: dict[str, tuple[Tensor, Tensor]] | None = None) -> dict[str, tuple[Tensor, Tensor | Steps]]:
    """(codes, scales) of each parameter that is exported rounded: by GPTQ where there is a Hessian, else to nearest.
    `factors`: what `loss_curvature` returned."""
    params = dict(model.named_parameters())
    steps = water_fill(factors, cfg.waterfill_nats, cfg.waterfill_exponent) if factors else {}
    return {name: quantise(prune(params[name].detach().float(), cfg.prune_frac), spec, steps.get(name),
                           hessians.get(name), name) for name, spec in quant_specs(cfg, params).items()}


def rounding_cost(rounded: GPT, model: GPT, ids: Tensor, targets: Tensor, hard: float = TUNE_HARD) -> Tensor:
    """What rounding costs in nats per token of ids [batch, T]: the KL divergence from the model's distribution, and for
    the part `hard` of it the loss that it adds on the targets (soft and hard targets: arXiv 1503.02531)."""
    with torch.no_grad():
        wanted = model.logits(model.hidden(ids)).log_softmax(-1)
    own, targets = rounded.logits(rounded.hidden(ids)).log_softmax(-1), targets.flatten()
    divergence = F.kl_div(own, wanted, reduction="sum", log_target=True) / ids.numel()
    added = F.nll_loss(own.flatten(0, 1), targets) - F.nll_loss(wanted.flatten(0, 1), targets)
    return torch.lerp(divergence, added, hard)


def fine_tune(cfg: Hyperparameters, rounded: dict, rt: Runtime, model: GPT, data: TrainData, step: int,
              left_s: float) -> dict[str, tuple[Tensor, Steps]]:
    """Move codes so that rounding costs less than by `rounded`; `model`, from which they come, stays as it is.

    TUNE_STEPS steps of Adam on `rounding_cost` over training text from `step` on, or fewer in `left_s` seconds. Each
    code is the rounding of a latent weight, which takes the gradient of the rounded weight (straight-through, arXiv
    1308.3432) and starts as the float weight in units of its step, but within the cell of the code that `rounded` has:
    codes near a border cross it first. Returns `rounded` with the new codes, or as it was if the cost of TUNE_HELD
    pieces of other text has not fallen.
    """
    student, watch, specs = copy.deepcopy(model), Stopwatch(), quant_specs(cfg, dict(model.named_parameters()))
    weights = [student.get_parameter(name) for name in rounded]
    latents = [codes + (weight.detach() / steps.float() - codes).clamp(-TUNE_REACH, TUNE_REACH)
               for weight, (codes, steps) in zip(weights, rounded.values())]
    adam = torch.optim.Adam(latents, betas=(0.9, 0.99))
    pieces = (piece for i in itertools.count(step) for batch in data.batch(i)
              for piece in zip(*(t.split(max(TUNE_TOKENS // t.size(1), 1)) for t in batch)))
    held = list(itertools.islice(pieces, TUNE_HELD))

    @torch.no_grad()
    def put(codes_and_steps: dict) -> dict:
        torch._foreach_copy_(weights, list(itertools.starmap(dequantise, codes_and_steps.values())))
        return codes_and_steps

    @torch.no_grad()
    def held_cost() -> float:
        return rt.sum_(sum(rounding_cost(student, model, *piece) for piece in held)).item() / len(held) / rt.world_size
    tuned = put(rounded)
    before = held_cost()
    for done, piece in enumerate(pieces):
        rt.synchronize()
        share = max(done / cfg.tune_steps, rt.agree(watch.elapsed() / max(left_s, 1e-9)))
        if share >= 1:
            break
        gradients = torch.autograd.grad(rounding_cost(student, model, *piece), weights, materialize_grads=True)
        for latent, gradient in zip(latents, rt.sum_many_(list(gradients))):
            latent.grad = gradient  # neither its unit nor the number of ranks matters to Adam
        adam.param_groups[0]["lr"] = TUNE_RATE * (1 - 0.95 * share)
        adam.step()
        tuned = put({name: (round_to(latent, 1.0, specs[name]).to(codes.dtype), steps)
                     for latent, (name, (codes, steps)) in zip(latents, rounded.items())})
    after = held_cost()
    rt.log(f"fine_tune:steps:{done} nats:{before:.6f}->{after:.6f} time:{watch.elapsed():.1f}s")
    if after < before:
        return tuned
    rt.log("warning: fine-tuning gained nothing and is undone")
    return rounded


def fit_size(cfg: Hyperparameters, rt: Runtime, weights: int, make, total: int, code_bytes: int):
    """(settings, artifact) at most 0.5 % under ARTIFACT_LIMIT_BYTES: all steps of the banks - with water-filling of all
    rounded parameters - of `weights` weights are widened by one factor, by water-filling also narrowed.
    `make(settings)` rounds and packs; `total`: the bytes with the steps as they are.

    With an entropy coder a step twice as wide saves about one bit per weight; from there on the secant of the sizes
    packed so far says how wide. (Bits are no further knob: INT5 is INT6 with steps twice as wide, to the same codes.)
    Raises UserError where the widest steps do not suffice. Stops after FIT_ROUNDS packings.
    """
    limit, watch, best, doublings, slope = cfg.artifact_limit_bytes, Stopwatch(), None, 0.0, -weights / 8
    most = limit * (1 - TUNE_ROOM) if cfg.tune_steps and cfg.clip_rule == "waterfill" else limit
    finest, coarsest = (-FILL_DOUBLINGS, FILL_DOUBLINGS) if cfg.clip_rule == "waterfill" else (0.0, FIT_DOUBLINGS)
    rt.log(f"size_fit:start total:{total} limit:{limit} over:{total / limit - 1:.2%}")
    for _ in range(FIT_ROUNDS):
        before, size_before = doublings, total
        doublings = min(max(doublings + (most - limit * FIT_WINDOW / 2 - total) / slope, finest), coarsest)
        if doublings == before:  # at an end
            break
        settings = dataclasses.replace(cfg, clip_widen=cfg.clip_widen * 2 ** doublings,
                                       waterfill_nats=cfg.waterfill_nats * 4 ** doublings)
        artifact = make(settings)
        total = len(artifact.blob) + code_bytes
        rt.log(f"size_fit:total:{total} ({total / limit:.2%} of the limit) steps x{2 ** doublings:.3f} "
               f"time:{watch.elapsed():.1f}s", "size_fit", total=total, limit=limit, widen=2 ** doublings)
        if total <= most and (best is None or total > best[2]):
            best = settings, artifact, total
        if limit * (1 - FIT_WINDOW) <= total <= most:
            break
        slope = min((total - size_before) / (doublings - before), -weights / 64)  # no slope is flatter than 1/8 bit
    if best is None:
        raise UserError(f"SIZE_FIT=1 cannot reach ARTIFACT_LIMIT_BYTES={limit:,}: {total:,} bytes are left with "
                        f"steps {2 ** doublings:.3g} times as wide; fewer parameters"
                        f"{'' if cfg.clip_rule == 'waterfill' else ' or table bits'} are needed")
    if best[2] < limit * (1 - FIT_WINDOW):
        rt.log(f"warning: size_fit leaves {limit - best[2]} bytes unused")
    return best[:2]


@dataclass(frozen=True)
class Stored:
    """A parameter as an artifact holds it. Its stream is its family if it is rounded, else "half" or "float"."""

    name: str
    stream: str
    bits: int                         # 0: not rounded
    values: np.ndarray                # integer codes, or floats of the stream's type
    scales: np.ndarray | None = None  # of codes: fp16 [..., rows, 1]; of WATER_BITS, int16 [1, 1, n]: see `store_steps`
    queries: "Stored | None" = None   # of keys and values: where the steps of their columns are

    def weight(self) -> Tensor:
        values = torch.from_numpy(self.values)
        if not self.bits:
            return values.float()
        return dequantise(values, self.steps() if self.bits == WATER_BITS else torch.from_numpy(self.scales))

    def steps(self) -> Steps:
        """What `store_steps` stored; whatever a file holds is brought into the range that it stores."""
        exponents = torch.from_numpy(self.scales.ravel().cumsum(dtype=np.int64).clip(-STEP_LIMIT, STEP_LIMIT)).short()
        shape, count = self.values.shape, math.prod(self.values.shape[:-1])
        rows = exponents[:count].view(*shape[:-1], 1)
        if not self.queries:
            return Steps(rows, exponents[count:].view(*shape[:-2], 1, shape[-1]))
        return Steps(rows, self.queries.steps().columns[:len(rows) // 2].repeat(2, 1, 1))


def store_steps(steps: Steps, with_columns: bool) -> np.ndarray:
    """The exponents of all rows, then of all columns, as differences from the one before.  # int16 [1, 1, n]"""
    parts = [steps.rows.flatten(), steps.columns.flatten()][:1 + with_columns]
    return np.diff(torch.cat(parts).cpu().numpy(), prepend=np.int16(0))[None, None]


def shared_columns(name: str, bits: int, stored: list[Stored]) -> Stored | None:
    """The parameter, stored before, that has the steps of this one's columns, too: keys and values read what queries
    read."""
    return next((s for s in stored if name == "kv_bank" and s.name == "qo_bank" and s.bits == bits == WATER_BITS), None)


def stored_parameters(cfg: Hyperparameters, model: GPT, rounded: dict) -> list[Stored]:
    """Every exported parameter of a model, rounded as its family is. Raises UserError for values no file can hold."""
    params = dict(model.named_parameters())
    families, specs, stored = route(cfg, params), quant_specs(cfg, params), []
    for name in (name for name in params if families[name].exported):
        weight = params[name].detach().float().cpu()
        if name in specs:
            codes, scales = rounded.get(name) or quantise(weight, specs[name])
            queries = shared_columns(name, specs[name].bits, stored)
            scales = store_steps(scales, not queries) if isinstance(scales, Steps) else scales.cpu().numpy()
            stored.append(Stored(name, families[name].name, specs[name].bits, codes.cpu().numpy(), scales, queries))
        else:
            kind = "float" if named_in(cfg.int8_keep_float_fp32_name_patterns, name) else "half"
            stored.append(Stored(name, kind, 0, (weight if kind == "float" else weight.half()).numpy()))
        held = stored[-1]
        if not (weight.isfinite().all() and np.isfinite(held.scales if held.bits else held.values).all()):
            raise UserError(f"parameter {name} is not finite{' in fp16' * bool(weight.isfinite().all())}: "
                            "the training diverged, or it belongs into INT8_KEEP_FLOAT_FP32_NAME_PATTERNS")
    return stored


# ------------------------------------------------------------------------------------------------ ARTIFACT
# magic | u64 bytes of the file | u32 bytes of the header, packed | u32 the same, unpacked
# | header: LZMA of JSON (see header_bytes) | the packed streams | first 16 bytes of the SHA-256 of all before.
# Nothing in it is executed. Names, shapes and streams of the parameters follow from the model settings in the header;
# their sizes are bounded before memory of that size is allocated.
ARTIFACT_NAME, ARTIFACT_VERSION, ARTIFACT_DIGEST_BYTES, ARTIFACT_HEADER_LIMIT = b"PGOLF", 7, 16, 2 ** 20
ARTIFACT_MAGIC = ARTIFACT_NAME + bytes([ARTIFACT_VERSION]) + b"\r\n"
ARTIFACT_NUMBERS = struct.Struct("<QII")
FOREIGN = {b"PK": "a zip file, as torch.save writes", b"\x80": "a pickle", b"\xfd7zXZ": "an xz file",
           b"\x28\xb5\x2f\xfd": "a zstd file", b"\x1f\x8b": "a gzip file"}
FLOAT_KINDS = {"half": np.dtype("<f2"), "float": np.dtype("<f4")}
CODECS = {"range": "constriction", "lzma": "lzma", "zstd": "zstandard"}  # and the package of each
LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": 0, "pb": 0}  # for unaligned bytes
Parts = list[tuple]  # what a stream is made of: arrays, their bits (0: floats), and Stored.steps of water-filled codes


def library(codec: str):
    """The module a codec needs. Raises UserError with the line that installs it."""
    try:
        return importlib.import_module(CODECS[codec])
    except ImportError:
        raise UserError(f"packing with {codec} needs a package: pip install {CODECS[codec]}") from None


def pick_codec(wanted: str) -> str:
    """The codec COMPRESS names; auto: range where its package is installed, else lzma. Raises UserError."""
    if wanted == "auto":
        wanted = "range" if importlib.util.find_spec(CODECS["range"]) else "lzma"
    library(wanted)
    return wanted


def compress(codec: str, raw: bytes) -> bytes:
    if codec == "zstd":
        return library(codec).ZstdCompressor(level=22).compress(raw)
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=[LZMA2 | {"dict_size": max(len(raw), 4096)}])


def decompress(codec: str, packed: bytes, size: int) -> bytes:
    """The inverse of `compress`. Allocates hardly more than `size` bytes, whatever `packed` states. Raises ValueError
    unless `packed` holds exactly `size` bytes and nothing follows them."""
    module = library(codec)
    try:
        if codec == "zstd":  # allocates at once what a frame states
            exact = module.frame_content_size(packed) == size
            raw = module.ZstdDecompressor().decompress(packed, allow_extra_data=False) if exact else b""
        else:
            reader = module.LZMADecompressor(module.FORMAT_RAW, filters=[LZMA2 | {"dict_size": max(size, 4096)}])
            raw = reader.decompress(packed, max_length=size + 1)
            exact = reader.eof and not reader.unused_data
    except Exception as error:  # each library has its own type, known only where the library is
        raise ValueError(f"{codec} cannot read a stream: {error}") from None
    if len(raw) != size or not exact:
        raise ValueError(f"a {codec} stream does not hold exactly {size} bytes")
    return raw


def byte_planes(array: np.ndarray) -> np.ndarray:
    """uint8 [bytes per value, values] of little-endian values: exponents pack better by themselves."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, array.itemsize).T


def order0_bytes(array: np.ndarray) -> float:
    """Order-0 entropy of an array's byte planes, each by itself: the bound of packers without context."""
    counts = [count[count > 0] for count in map(np.bincount, byte_planes(array))]
    return sum(float((count * np.log2(array.size / count)).sum()) for count in counts) / 8


# The range coder. The library constriction codes the symbols; this file models their probabilities by adaptive
# histograms. The context of a weight is the magnitude that the weights coded before it in its row and column predict.
# Encoder and decoder compute the same model and must get the same bits on every machine: integers, or float64
# operations that IEEE 754 defines exactly (no exp or log, no float sum whose order could matter).
FIXED = 1 << 16               # 1.0 in fixed-point numbers
BUCKETS, BUCKET_STEP = 96, 2  # contexts: predicted magnitudes from 1/16 code upwards, in steps of 2/16 octave
ESCAPE = 255                  # symbols from here on are this one, and what is beyond it as a number by itself


@functools.cache
def powers_of_two() -> np.ndarray:
    """floor(2**(k/16)) for k = 0, 1, …, by integer roots."""
    return np.array([functools.reduce(lambda x, _: math.isqrt(x), range(4), 1 << k) for k in range(16 * 40)])


def log2_sixteenths(x: np.ndarray) -> np.ndarray:
    """floor(16 log2 x) of integers; of 256 for anything below."""
    return np.searchsorted(powers_of_two(), np.maximum(x, 256), side="right") - 1


class SpreadHistograms:
    """Adaptive histograms of symbols in -reach..reach, one per context, which start as Student's t distributions (7
    degrees of freedom: nearly Gaussian, without `exp`) and count a symbol half as itself and half as its negative."""

    def __init__(self, reach: int, encoder, decoder=None):
        self.reach, self.beyond, self.encoder, self.decoder = min(reach, ESCAPE), reach - ESCAPE, encoder, decoder
        mean = powers_of_two()[BUCKET_STEP * np.arange(BUCKETS) + 16 * 12 + BUCKET_STEP // 2] / FIXED
        sigma = (1.25 * mean + 0.2)[:, None]  # of a Gaussian with that mean magnitude, and the rounding
        square = 1 + np.arange(-self.reach, self.reach + 1) ** 2 / (7 * sigma * sigma)
        bell = np.rint(2.0 ** 30 / (square * square * square * square)).astype(np.int64)
        self.counts = 1 + (bell << 14) // bell.sum(1, keepdims=True)  # 64 make one symbol

    def code(self, bucket: np.ndarray, symbols: np.ndarray) -> np.ndarray:
        """Encode symbols, context by context; with a decoder, read as many from it first. Returns them."""
        models, near = library("range").stream.model, symbols.clip(-self.reach, self.reach)
        for b in np.unique(bucket):
            here = bucket == b
            model = models.Categorical(self.counts[b].astype(np.float64), perfect=False)
            shifted = self.exchange(near[here] + self.reach, model)
            near[here] = shifted - self.reach
            seen = np.bincount(shifted, minlength=2 * self.reach + 1)
            self.counts[b] += 32 * (seen + seen[::-1])
        far = np.abs(near) == ESCAPE
        if self.beyond > 0 and far.any():
            rest = self.exchange(np.abs(symbols[far]) - ESCAPE, models.Uniform(self.beyond + 1))
            near[far] += np.sign(near[far]) * rest
        return near

    def exchange(self, symbols: np.ndarray, model) -> np.ndarray:
        """The symbols, or what the decoder has in their place, encoded."""
        if self.decoder:
            symbols = self.decoder.decode(model, len(symbols))
        self.encoder.encode(symbols.astype(np.int32), model)
        return symbols


def code_tensor(codes: np.ndarray, histograms: SpreadHistograms, steps: Steps | None = None) -> None:
    """Code a tensor, integers [(matrices,) rows, columns]: an encoder reads it, a decoder fills it.

    Matrix by matrix, in growing blocks of rows. A weight's predicted magnitude is the level of its row, from the tiles
    to its left, times the factor of its column, from the blocks above; both are shrunk towards the average so far.
    With `steps` these are magnitudes of weights, and a code's is so much larger as its step is finer than the mean.
    """
    columns, total, cells = codes.shape[-1], 4, 1  # the average starts at 4 codes
    matrices = (t.reshape(-1, *codes.shape[-2:]) for t in (codes, finer_sixteenths(steps, codes.shape)))
    for matrix, finer in zip(*matrices):
        column_sum, level_sum, done = np.zeros(columns, np.int64), np.zeros(columns, np.int64), 0
        while done < len(matrix):
            block = matrix[done:done + min(max(done // 2, 4), max(4096 // columns, 64))]
            average = max(total * FIXED // cells, FIXED // 256)
            column = (column_sum + 6 * average) * FIXED // (level_sum + 6 * average)  # FIXED: like its row
            fineness = finer[done:done + len(block)]
            scale = powers_of_two()[16 * 16 + fineness]  # FIXED: a code of the mean step
            magnitude, level = code_block(block, histograms, average, column, fineness, scale)
            column_sum += magnitude.sum(0) * FIXED
            level_sum += (level[:, None] * scale // FIXED).sum(0)
            total += int(magnitude.sum())
            cells += int((column * scale.sum(0) // FIXED).sum()) // FIXED
            done += len(block)


def finer_sixteenths(steps: Steps | None, shape: tuple[int, ...]) -> np.ndarray:
    """By how many sixteenths of an octave each step is finer than the mean.  # int16 [..., rows, columns]"""
    if steps is None:
        return np.broadcast_to(np.int16(0), shape)
    rows, columns = (t.numpy() for t in steps)
    mean = int(rows.sum()) // rows.size + int(columns.sum()) // columns.size
    return (16 // STEPS_PER_OCTAVE * (mean - rows - columns)).clip(-96, 96)


def code_block(block, histograms: SpreadHistograms, average: int, column, fineness, scale):
    """Code rows of a matrix tile by tile. Returns (magnitudes of the codes [rows, columns], levels [rows])."""
    width = 64  # columns of a tile; the average counts as much as so many columns of a row
    magnitude, row_sum = np.zeros(block.shape, np.int64), np.zeros(len(block), np.int64)
    level, expected = row_sum + average, 0
    for left in range(0, block.shape[1], width):
        here = slice(left, left + width)
        tile, factor = block[:, here], column[here]
        spread = log2_sixteenths(level)[:, None] + log2_sixteenths(factor) + fineness[:, here]  # 512: one code
        bucket = ((spread - 448) // BUCKET_STEP).clip(0, BUCKETS - 1)
        tile[:] = histograms.code(bucket, tile.astype(np.int64))
        magnitude[:, here] = np.abs(tile.astype(np.int64))
        row_sum += magnitude[:, here].sum(1)
        expected += (factor * scale[:, here] // FIXED).sum(1)
        level = (row_sum * FIXED + width * average) * FIXED // (expected + width * FIXED)
    return magnitude, level


def code_tensors(parts: Parts, packed: bytes | None = None) -> bytes:
    """The range coder's bytes for int8 arrays [(matrices,) rows, columns] of so many bits. With `packed` the arrays are
    read from it; raises ValueError or AssertionError (constriction) if encoding what was read gives other bytes."""
    coders = library("range").stream.queue
    encoder = coders.RangeEncoder()
    decoder = None if packed is None else coders.RangeDecoder(np.frombuffer(packed, "<u4").astype(np.uint32))
    histograms_of = functools.cache(lambda reach: SpreadHistograms(reach, encoder, decoder))  # shared where it is equal
    for codes, bits, *steps in parts:
        code_tensor(codes, histograms_of(QuantSpec(bits).max_code), *(read() for read in steps))
    written = encoder.get_compressed().astype("<u4").tobytes()
    if packed is not None and written != packed:
        raise ValueError("a range stream is not the code of its values")
    return written


LedgerRow = collections.namedtuple("LedgerRow", "stream codec values raw_bytes entropy_bytes packed_bytes")


@dataclass(frozen=True)
class Artifact:
    """A packed model: its bytes, and the ledger of what each stream takes of them."""

    blob: bytes
    ledger: tuple[LedgerRow, ...]

    def table(self, code_bytes: int) -> list[str]:
        rows = [f"  {r.stream:<10} {r.codec:<6} {r.values:>12,} values {8 * r.packed_bytes / r.values:>7.3f} bits "
                f"each, order-0 entropy {r.entropy_bytes:>12,} B -> {r.packed_bytes:>12,} B" for r in self.ledger]
        width = len(rows[0]) - 15
        rest = len(self.blob) - sum(row.packed_bytes for row in self.ledger)
        return rows + [f"  {name:<10} {size:>{width},} B" for name, size in
                       (("header", rest), ("code", code_bytes), ("total", len(self.blob) + code_bytes))]


def header_bytes(cfg: Hyperparameters, tokenizer_sha256: str, stored: list[Stored], rows: list) -> bytes:
    """The header text: model settings, tokenizer, how each parameter is stored (its bits, "half" or "float"), in the
    model's order, and [codec, bytes, crc32] of each stream, in the order of `streams_of`."""
    fields = {"config": model_settings(cfg), "tokenizer": tokenizer_sha256,
              "precision": [s.bits or s.stream for s in stored], "streams": rows}
    return json.dumps(fields, separators=(",", ":")).encode()


def model_settings(cfg: Hyperparameters) -> dict[str, str]:
    """The variables of a model that is packed; it has no MTP heads any more."""
    typed = {"int": int, "float": float, "bool": int, "str": str}
    settings = {f.name.upper(): str(typed[f.type](getattr(cfg, f.name))) for f in settings_by_section()["Model"]}
    return settings | {"MTP_NUM_HEADS": "0"}


def blank_parameters(cfg: Hyperparameters, precision: list, limit: int) -> list[Stored]:
    """The parameters of a header, still zero. Raises ValueError if they have more than `limit` weights in all."""
    shapes, stored, wide = parameter_shapes(cfg), [], WATER_BITS in precision  # all that is rounded, or nothing
    count = sum(map(math.prod, shapes.values()))
    if count > limit:
        raise ValueError(f"{count:,} parameters in so small a file")
    for (name, shape), family, kind in zip(shapes.items(), route(cfg, shapes).values(), precision, strict=True):
        if kind in FLOAT_KINDS:
            stored.append(Stored(name, kind, 0, np.zeros(shape, FLOAT_KINDS[kind])))
        elif family.bits and type(kind) is int and kind in ([WATER_BITS] if wide else range(2, 9)):
            queries = shared_columns(name, kind, stored)
            count = math.prod(shape[:-1]) + (0 if queries else math.prod(shape) // shape[-2])
            scales = np.zeros((1, 1, count), "<i2") if wide else np.zeros((*shape[:-1], 1), "<f2")
            stored.append(Stored(name, family.name, kind, np.zeros(shape, "<i2" if wide else "i1"), scales, queries))
        else:
            raise ValueError(f"parameter {name} cannot be stored as {kind!r}")
    return stored


def streams_of(stored: list[Stored]) -> dict[str, Parts]:
    """Stream -> its parts, in order of their names but for the steps, which the codes' contexts know: what is packed
    together."""
    streams = collections.defaultdict(list)
    for s in stored:
        wide = s.bits == WATER_BITS
        streams[s.stream].append((s.values, s.bits, s.steps) if wide else (s.values, s.bits))
        if s.bits:
            streams["steps" if wide else "scales"].append((s.scales, WATER_BITS if wide else 0))
    return {name: streams[name] for name in sorted(streams, key=lambda name: (name != "steps", name))}


def joined(parts: Parts) -> np.ndarray:
    return np.concatenate([array.reshape(-1) for array, *_ in parts])


def pack_stream(codec: str, parts: Parts) -> bytes:
    return code_tensors(parts) if codec == "range" else compress(codec, byte_planes(joined(parts)).tobytes())


def unpack_stream(codec: str, packed: bytes, parts: Parts) -> None:
    """The inverse of `pack_stream`: fills the arrays. Raises ValueError for bytes or codes that cannot be theirs."""
    if codec == "range":
        code_tensors(parts, packed)
        return
    flat = joined(parts)
    planes = np.frombuffer(decompress(codec, packed, flat.nbytes), np.uint8).reshape(flat.itemsize, -1)
    flat = planes.T.copy().reshape(-1).view(flat.dtype)
    for array, bits, *_ in parts:
        array[...], flat = flat[:array.size].reshape(array.shape), flat[array.size:]
        if bits and (np.abs(array.astype(np.int32)) > QuantSpec(bits).max_code).any():
            raise ValueError("a code is out of range")


def pack_streams(wanted: str, streams: dict[str, Parts]) -> dict[str, tuple[str, bytes]]:
    """Stream -> (codec, bytes). The range coder knows codes only: floats go by LZMA then."""
    chosen = pick_codec(wanted)
    codecs = ["lzma" if chosen == "range" and not parts[0][1] else chosen for parts in streams.values()]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:  # the libraries release Python's lock
        return dict(zip(streams, zip(codecs, pool.map(pack_stream, codecs, streams.values()))))


def unpack_streams(streams: dict[str, Parts], rows: list, payload: bytes) -> None:
    """Fills the arrays of the streams, given [codec, bytes, crc32] of each. Raises ValueError unless the payload is
    exactly these streams, of values that can be in them."""
    if any(type(n) is not int or n < 0 for _, *numbers in rows for n in numbers) or len(rows) != len(streams) \
            or sum(size for _, size, _ in rows) != len(payload):
        raise ValueError("its streams are not those of its parameters, or do not fill the file")
    file = io.BytesIO(payload)
    for (stream, parts), (codec, size, crc) in zip(streams.items(), rows):
        if codec not in CODECS or codec == "range" and not parts[0][1]:
            raise ValueError(f"stream {stream} is packed with {codec!r}")
        unpack_stream(codec, file.read(size), parts)
        values = joined(parts)
        if not np.isfinite(values).all() or stream == "scales" and np.signbit(values).any():
            raise ValueError(f"stream {stream} has a value that is not finite, or a negative scale")
        if zlib.crc32(values) != crc:
            raise ValueError(f"stream {stream} has another checksum")


def pack(cfg: Hyperparameters, model: GPT, tokenizer_sha256: str, rounded: dict | None = None) -> Artifact:
    """Quantise and pack every exported parameter of a model. The same weights and settings give the same bytes.
    `rounded` has (codes, scales) by name for parameters whose rounding was chosen otherwise (GPTQ)."""
    stored = stored_parameters(cfg, model, rounded or {})
    streams, ledger, rows = streams_of(stored), [], []
    packed = pack_streams(cfg.compress, streams)
    for stream, (codec, data) in packed.items():
        values = joined(streams[stream])
        ledger.append(LedgerRow(stream, codec, values.size, values.nbytes, round(order0_bytes(values)), len(data)))
        rows.append([codec, len(data), zlib.crc32(values)])
    header = header_bytes(cfg, tokenizer_sha256, stored, rows)
    return Artifact(make_container(header, b"".join(data for _, data in packed.values())), tuple(ledger))


def make_container(text: bytes, payload: bytes) -> bytes:
    """The whole file from its header text and its streams."""
    header = compress("lzma", text)
    size = len(ARTIFACT_MAGIC) + ARTIFACT_NUMBERS.size + len(header) + len(payload) + ARTIFACT_DIGEST_BYTES
    blob = ARTIFACT_MAGIC + ARTIFACT_NUMBERS.pack(size, len(header), len(text)) + header + payload
    return blob + hashlib.sha256(blob).digest()[:ARTIFACT_DIGEST_BYTES]


def open_container(blob: bytes) -> tuple[bytes, bytes]:
    """(header text, payload) of an artifact that is whole. Raises UserError that says in which way it is not."""
    if not blob:
        raise UserError("artifact is empty")
    if not blob.startswith(ARTIFACT_NAME):
        kind = next((f": it looks like {kind}" for start, kind in FOREIGN.items() if blob.startswith(start)), "")
        raise UserError(f"this is not an artifact of this program{kind}; nothing of it was loaded")
    start = len(ARTIFACT_MAGIC) + ARTIFACT_NUMBERS.size
    if len(blob) < start:
        raise UserError(f"artifact is cut short: {len(blob)} bytes hold no header")
    if blob[5] != ARTIFACT_VERSION:
        raise UserError(f"artifact is of version {blob[5]}; this program reads version {ARTIFACT_VERSION}")
    if not blob.startswith(ARTIFACT_MAGIC):
        raise UserError("artifact is damaged in its first bytes")
    file_bytes, packed_bytes, text_bytes = ARTIFACT_NUMBERS.unpack(blob[len(ARTIFACT_MAGIC):start])
    if len(blob) != file_bytes:
        raise UserError(f"artifact is {'cut short' if len(blob) < file_bytes else 'over-long'}: "
                        f"{len(blob):,} bytes instead of {file_bytes:,}")
    body, digest = blob[:-ARTIFACT_DIGEST_BYTES], blob[-ARTIFACT_DIGEST_BYTES:]
    if hashlib.sha256(body).digest()[:ARTIFACT_DIGEST_BYTES] != digest:
        raise UserError("artifact is damaged: its checksum does not match its contents")
    if text_bytes > ARTIFACT_HEADER_LIMIT:
        raise UserError(f"artifact is malformed: a header of {text_bytes:,} bytes")
    return decompress("lzma", body[start:start + packed_bytes], text_bytes), body[start + packed_bytes:]


def read_artifact(blob: bytes, values: bool = True) -> tuple[Hyperparameters, str, list[Stored]]:
    """(model settings, tokenizer sha256, parameters) of an artifact; without `values` from its header alone, with zeros
    for them. Raises UserError for anything out of order."""
    try:
        text, payload = open_container(blob)
        header = json.loads(text)
        tokenizer_sha256, rows = header["tokenizer"], header["streams"]
        try:
            cfg = Hyperparameters.from_env(header["config"], model_rules)
        except UserError as error:
            raise ValueError(error) from None
        stored = blank_parameters(cfg, header["precision"], 2 ** 16 + 16 * len(blob))
        if header_bytes(cfg, tokenizer_sha256, stored, rows) != text or not re.fullmatch(r"\w{,64}", tokenizer_sha256):
            raise ValueError("its header is not in the form this program writes")
        if values:
            unpack_streams(streams_of(stored), rows, payload)
        return cfg, tokenizer_sha256, stored
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
            ValueError) as error:
        raise UserError(f"artifact is malformed: {str(error).partition(chr(10))[0][:200] or type(error).__name__}"
                        ) from None


def unpack(blob: bytes) -> tuple[Hyperparameters, str, dict[str, Tensor]]:
    """(model settings, tokenizer sha256, weights by parameter name) of an artifact. Raises UserError."""
    cfg, tokenizer_sha256, stored = read_artifact(blob)
    return cfg, tokenizer_sha256, {s.name: s.weight() for s in stored}


def load_model(blob: bytes, rt: Runtime, tokenizer_sha256: str) -> GPT:
    """A fresh model with the weights of an artifact and nothing else. Raises UserError."""
    cfg, made_with, weights = unpack(blob)
    if made_with != tokenizer_sha256:
        raise UserError(f"artifact was made with another tokenizer, of sha256 {made_with[:12]}…, not "
                        f"{tokenizer_sha256[:12]}…; TOKENIZER_PATH names the one to use")
    with torch.device("meta"):  # no memory for initial values that are overwritten
        model = GPT(cfg, rt.attend, rt.dtype, kernels=rt.kernels)
    model.load_state_dict(weights, assign=True)
    return model.to(rt.device).eval()


# ------------------------------------------------------------------------------------------------ ADAPTERS
def hash_pairs(ids: Tensor, buckets: int) -> Tensor:
    """Bucket of each (previous, current) pair as in PR 1460; the first token precedes itself.  # [rows, T]"""
    return (torch.cat((ids[:, :1], ids[:, :-1]), dim=1) * 2039 + ids) % buckets


def clip_rows_(grads: list[Tensor], most: float, rows: int) -> None:
    """Clip each row's gradient, over all tensors together, to the norm `most`, in place."""
    norms = torch.stack([grad.reshape(rows, -1).norm(dim=1) for grad in grads]).norm(dim=0)
    factor = (most / (norms + 1e-6)).clamp(max=1)
    torch._foreach_mul_(grads, [factor.view([-1, 1, 1][:grad.dim()]) for grad in grads])


class Adapter:
    """Score-first test-time training (PR 461): after each chunk of scored text, a few epochs on it. A subclass says
    which tensors train, at which rates, and how they enter a forward pass (`hook`, see GPT.hidden).

    In a stream the loss of a step is the mean over TTT_BATCH_SEQS sequences of all ranks. With documents side by side
    each row has its own mean, tensors and clipping, on the rank that holds it.
    """

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime, trained: list[tuple[float, Tensor]], lr: float,
                 optimiser: str, rows: int = 0):
        """trained: (rate over lr, tensor); rows: documents side by side, 0: a stream."""
        self.cfg, self.rt, self.rows, self.loss_fn, self.table = cfg, rt, rows, rt.compiled(model.loss), None
        if cfg.hash_embed_buckets:  # not in the artifact: it starts at zero
            self.table = torch.zeros(cfg.hash_embed_buckets, model.cfg.model_dim, device=model.tok_emb.weight.device)
            trained = [*trained, (cfg.hash_embed_lr_mult, self.table)]
        self.trained, groups = [tensor for _, tensor in trained], collections.defaultdict(list)
        for p in model.parameters():
            p.requires_grad_(False)
        for rate, tensor in trained:
            groups[lr * rate].append(tensor.requires_grad_(True))
        self.average = [tensor.detach().clone() for tensor in self.trained] if cfg.ttt_polyak_decay else []
        groups = [{"params": tensors, "lr": lr, "full_lr": lr} for lr, tensors in groups.items()]
        self.optimiser = {
            "sgd": lambda: torch.optim.SGD(groups, momentum=cfg.ttt_momentum, fused=True),
            "adamw": lambda: torch.optim.AdamW(groups, weight_decay=0.0, fused=True),
            "adam": lambda: torch.optim.AdamW(groups, betas=(cfg.ttt_beta1, cfg.ttt_beta2), eps=cfg.ttt_adam_eps,
                                              weight_decay=cfg.ttt_weight_decay, fused=True)}[optimiser]()

    def hook(self, kind: str, visit: int, matrix: Tensor):
        if kind == "embed" and self.table is not None:
            return lambda ids: F.embedding(ids, matrix) + F.embedding(hash_pairs(ids, len(self.table)), self.table)
        return matrix

    def learn(self, tokens: Tensor, progress: float, epochs: int) -> None:
        """Train on scored tokens [n + 1] of a stream: n targets and the token before them. progress: 0..1 of it."""
        length, cfg = self.cfg.train_seq_len, self.cfg
        rows = (len(tokens) - 1) // length
        inputs, targets = (t[:rows * length].long().view(rows, length) for t in (tokens[:-1], tokens[1:]))
        self.set_progress(progress)
        self.swap_averages()
        for start in [*range(0, rows, cfg.ttt_batch_seqs)] * epochs:
            count = min(cfg.ttt_batch_seqs, rows - start)
            share = self.rt.share_of(count)
            mine = slice(start + share.start, start + share.stop)
            at_once = max(self.rt.forward_tokens(cfg) // length, 1)
            for x, y in zip(inputs[mine].split(at_once), targets[mine].split(at_once)):
                if len(x):  # a rank may have no part in a step
                    (self.loss_fn(x, y, hook=self.hook) * (len(x) / count)).backward()
            self.step()
        self.swap_averages()

    def learn_rows(self, nll: Tensor, counted: Tensor, epochs: int, rescore) -> None:
        """Train on documents side by side. nll [rows, keep]: the scores just committed, with their autograd graph, so
        that the first epoch needs no second forward pass; rescore() computes them anew."""
        weight = counted / counted.sum(1, keepdim=True).clamp(min=1)
        for epoch in range(epochs):
            ((rescore() if epoch else nll) * weight).sum().backward()
            self.step()

    def learn_documents(self, tokens: Tensor, targets: Tensor, bos_id: int) -> None:
        """One step of all ranks on the mean loss of scored documents end to end.  # int64 [n] each, on the CPU

        They are computed in rows of the context's length, in which no document reads another. The rows' gradients are
        summed in float64, so that any number of ranks makes the same step.
        """
        length, sums = self.cfg.doc_context, [torch.zeros_like(t, dtype=torch.float64) for t in self.trained]
        weights = torch.full(tokens.shape, length / len(tokens))
        rows = list(zip(*(t.split(length) for t in (tokens, targets, weights))))
        for row in [rows[i] for i in self.rt.share_of(len(rows))]:
            x, y, weights = (F.pad(t, (0, length - len(t)))[None] for t in row)  # one length, so one compiled graph
            begins = document_starts(x[0].numpy(), bos_id, length)
            x, y, weights, begins = map(self.rt.to_device, (x, y, weights, begins))
            self.loss_fn(x, y, token_weights=weights, documents=Documents(begins, length)).backward()
            for total, tensor in zip(sums, self.trained):
                total += 0 if tensor.grad is None else tensor.grad
            self.optimiser.zero_grad()
        for tensor, total in zip(self.trained, self.rt.sum_many_(sums)):
            tensor.grad = total.to(tensor.dtype)
        self.step()

    def set_progress(self, progress: float) -> None:
        """The learning rates' cosine, from 0 to 1."""
        for group in self.optimiser.param_groups:
            group["lr"] = group["full_lr"] * 0.5 * (1 + math.cos(math.pi * progress))

    def step(self) -> None:
        """One optimiser step on the gradients in `.grad`, which a stream sums over ranks."""
        for tensor in self.trained:
            tensor.grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        grads = [tensor.grad for tensor in self.trained]
        if not self.rows:
            self.rt.sum_many_(grads)
        if self.cfg.ttt_grad_clip:
            clip_rows_(grads, self.cfg.ttt_grad_clip, self.rows or 1)
        self.optimiser.step()
        self.optimiser.zero_grad()
        if self.average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.trained, 1 - self.cfg.ttt_polyak_decay)

    @torch.no_grad()
    def swap_averages(self) -> None:
        """Exchange weights and average: the average scores, the weights train. (PR 550 trained the average, which
        shrank every chunk's update to a 500th.)"""
        if self.average:
            kept = [tensor.clone() for tensor in self.trained]
            torch._foreach_copy_(self.trained, self.average)
            torch._foreach_copy_(self.average, kept)


class SgdAdapter(Adapter):
    """Trains the weights themselves (PR 461, 549, 1092), except the first TTT_FREEZE_BLOCKS blocks. (The published
    filter by parameter name froze hardly anything, because the matrices are in banks.)"""

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime):
        self.frozen, self.layer_of = min(cfg.ttt_freeze_blocks, model.cfg.num_layers), model.layer_of
        fixed = tuple(f"blocks.{i}." for i in range(self.frozen))
        settings = {"mlp_down_bank": (cfg.ttt_proj_lr_mult, 3.0), "mlp_up_bank": (cfg.ttt_fc_lr_mult, 0.5)}
        rates = {name: given if given >= 0 else published if cfg.ttt_optimizer == "adamw" else 1.0
                 for name, (given, published) in settings.items()}
        trained = [(rates.get(name, 1.0), p) for name, p in model.named_parameters()
                   if p.numel() and rates.get(name, 1.0) and not name.startswith(fixed)]
        super().__init__(model, cfg, rt, trained, cfg.ttt_lr, cfg.ttt_optimizer)
        if not self.frozen and self.table is None:
            self.hook = None  # reuses the graphs compiled for scoring without adaptation

    def hook(self, kind: str, visit: int, matrix: Tensor):
        """A frozen block's slices of the banks get no gradient."""
        return matrix.detach() if 0 <= self.layer_of(visit) < self.frozen else super().hook(kind, visit, matrix)


class LoraAdapter(Adapter):
    """Trains low-rank additions to frozen matrices (LoRA; the record of 2026-03-17, PR 550): one set for the stream, or
    one for each of the documents side by side. Each visit of a looped layer has its own."""

    def __init__(self, model: GPT, cfg: Hyperparameters, rt: Runtime):
        rows, rank = cfg.ttt_batch_docs if cfg.ttt_reset == "document" else 0, cfg.ttt_lora_rank
        self.model, phased = model, cfg.phased_ttt_num_phases > 0
        self.weights = [(p, p.detach().clone()) for p in model.parameters() if p.numel() and phased]
        self.scale, self.pairs, self.initial, trained = (cfg.ttt_lora_alpha or rank) / rank, {}, [], []
        generator = torch.Generator().manual_seed(cfg.seed)
        self.parallel = ("out", "down") if cfg.ttt_lora_parallel else ()

        def add(kind: str, visit: int, matrix: Tensor) -> Tensor:
            layer = model.layer_of(visit)
            if kind in cfg.lora_kinds and (layer < 0 or layer in cfg.lora_layer_ids):
                width = model.cfg.model_dim if kind in self.parallel else matrix.size(1)
                a = torch.empty(rank, width).uniform_(-1, 1, generator=generator) * width ** -0.5
                initial = [t.to(matrix.device) for t in (a, torch.zeros(matrix.size(0), rank))]
                pair = self.pairs[kind, visit] = [t.repeat(rows, 1, 1) if rows else t.clone() for t in initial]
                self.initial += initial
                trained.extend((cfg.lora_layer_rates.get(layer, 1.0), t) for t in pair)
            return matrix
        model.layer_weights(False, add)
        model.output_weight(False, add)
        super().__init__(model, cfg, rt, trained, cfg.lora_lr, cfg.ttt_lora_optimizer, rows)

    def hook(self, kind: str, visit: int, matrix: Tensor):
        """x W^T + scale (x a^T) b^T, with one pair a [rank, in], b [out, rank] for all rows of x, or a pair per row."""
        if (kind, visit) not in self.pairs:
            return super().hook(kind, visit, matrix)
        a, b = self.pairs[kind, visit]

        def adapted(x: Tensor, source: Tensor) -> Tensor:
            read = source if kind in self.parallel else x
            return F.linear(x, matrix) + self.scale * (read @ a.mT.to(x.dtype) @ b.mT.to(x.dtype))
        return adapted

    @torch.no_grad()
    def reset(self, keep_a: bool = False) -> None:
        """Back to the initial values, in place, for other documents; keep_a: but for the first factors."""
        initial, trained = (values[1::2] if keep_a else values for values in (self.initial, self.trained))
        torch._foreach_copy_(trained, [start.expand_as(t) for start, t in zip(initial, trained)])
        for state in self.optimiser.state.values():
            torch._foreach_zero_(list(state.values()))

    def train_weights(self, tokens: Tensor, targets: Tensor, bos_id: int) -> None:
        """A phase of PR 1610, 1626, 1855: SGD on the weights themselves over scored documents end to end, in chunks;
        each phase has an optimiser of its own. (Published, a BOS learns to be followed by the next document's, what a
        chunk has beyond whole sequences is left out, and sequences weigh less on ranks that have more of them.)"""
        cfg, weights = self.cfg, [(1.0, p) for p, _ in self.weights]
        sgd = dataclasses.replace(cfg, ttt_momentum=cfg.global_ttt_momentum, ttt_grad_clip=cfg.global_ttt_grad_clip)
        trainer = Adapter(self.model, sgd, self.rt, weights, cfg.global_ttt_lr, "sgd", rows=1)
        chunks = list(zip(*(t.cpu().split(cfg.global_ttt_chunk_tokens) for t in (tokens, targets))))
        for i, chunk in enumerate(chunks[:-1] or chunks):  # the last one's rate would be 0
            trainer.set_progress(i / max(len(chunks) - 1, 1))
            for _ in range(cfg.global_ttt_epochs):
                trainer.learn_documents(*chunk, bos_id)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def restore_weights(self) -> None:
        """As they were before the first phase."""
        for p, before in self.weights:
            p.copy_(before)


def adapter_for(model: GPT, cfg: Hyperparameters, rt: Runtime) -> Adapter:
    return {"sgd": SgdAdapter, "lora": LoraAdapter}[cfg.ttt_mode](model, cfg, rt)


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
    """Which windows score which tokens. Target t is token t+1 of the text. For 12 targets, windows of 8 tokens and a
    stride of 3 (keep = 3; the first window is scored whole, see `batches`):

        window   start  low  high   reads tokens   scores targets
             0       0    0     8   0..7           0..7
             1       3    8    11   3..10          8..10
             2       4   11    12   4..11          11        (moved back: it ends with the text)
        filler       4   12    12   4..11          none      (low = high; pads a batch to a fixed size)

    Every target is scored by the window that gives it the longest context. A window never reads beyond token `high`;
    copies of that token fill its rest.
    """

    bounds: Tensor   # int64 [4, windows]: start, low, high, and the end of the document
    length: int      # tokens of a window
    keep: int        # its last so many positions hold all targets it scores
    count: int = 0   # targets it scores: see `on_device`

    def __len__(self) -> int:
        return self.bounds.size(1)

    @classmethod
    def sliding(cls, targets: int, length: int, stride: int) -> Windows:
        """Windows that together score every target once. (The published scripts cut their last windows at the end of
        the text, and score its tail several times.)"""
        count = 1 + -(-max(targets - length, 0) // stride)
        high = (length + stride * torch.arange(count)).clamp(max=targets)
        return cls(torch.stack((high - length, F.pad(high[:-1], (1, 0)), high, high)), length, stride)

    def part(self, start: int, stop: int) -> Windows:
        return dataclasses.replace(self, bounds=self.bounds[:, start:stop])

    def filled(self, size: int) -> Windows:
        """Padded to `size` windows: compiled graphs need fixed shapes, and sums of a fixed order give equal scores."""
        filler = self.bounds[[0, 2, 2, 3], -1:].expand(-1, size - len(self))
        return dataclasses.replace(self, bounds=torch.cat((self.bounds, filler), dim=1))

    def batches(self, size: int, fixed: bool) -> list[Windows]:
        """Batches of at most `size` windows. The first window of a text scores all it reads, in a batch of its own."""
        alone = int(len(self) > 0 and self.bounds[2, 0] - self.bounds[1, 0] > self.keep)
        whole = [dataclasses.replace(self.part(0, 1), keep=self.length)] * alone
        parts = whole + [self.part(i, i + size) for i in range(alone, len(self), size)]
        return [part.filled(size) if fixed else part for part in parts]

    def read(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inputs [n, length]; target ids, target numbers and which of them to score, [n, keep] each."""
        start, low, high = self.bounds[:3, :, None]
        at = start + torch.arange(self.length + 1, device=tokens.device)
        text, number = tokens[at.minimum(high)].long(), at[:, -self.keep - 1:-1]
        ids, wanted = text[:, :-1].contiguous(), text[:, -self.keep:].contiguous()  # one layout, so one compiled graph
        return ids, wanted, number, (number >= low) & (number < high)


@dataclass(frozen=True)
class ScoredChunk:
    """Windows for this rank to score, and what may then be trained on."""

    batches: list[Windows]
    train_tokens: int = 0   # scored ones of all ranks (stream), or those this rank read (documents)
    first: int = 0          # the first of them, in a stream
    progress: float = 0.0   # 0..1 of the text
    resets: bool = False    # the adapter starts afresh: other documents begin here
    keeps_a: bool = False   # but for the first factors of its additions
    finished: Tensor | None = None  # documents on which all ranks train the weights: first target and end, [n, 2]

    @property
    def reads(self) -> int:
        """Tokens this rank reads in order to score."""
        return sum(len(windows) * windows.length for windows in self.batches)


def plan_stream(targets: int, cfg: Hyperparameters, rt: Runtime, stride: int, size: int,
                adapts: bool) -> list[ScoredChunk]:
    """The text as chunks of TTT_CHUNK_TOKENS, or as one if nothing adapts; `size` windows a batch. A window belongs to
    the chunk of its first scored target, so when a chunk's windows are done all its targets are in the sum. Nothing is
    trained on the last chunk."""
    windows = Windows.sliding(targets, cfg.window, stride)
    chunk = cfg.ttt_chunk_tokens if adapts else targets
    count = -(-targets // chunk)
    first = torch.searchsorted(windows.bounds[1], chunk * torch.arange(count + 1)).tolist()
    plan = []
    for i in range(count):
        mine = rt.share_of(first[i + 1] - first[i])
        batches = windows.part(first[i] + mine.start, first[i] + mine.stop).batches(size, rt.compiles)
        plan.append(ScoredChunk(batches, chunk if i + 1 < count else 0, i * chunk, i / max(count - 1, 1)))
    return plan


def plan_documents(val: ValData, cfg: Hyperparameters, rt: Runtime) -> list[ScoredChunk]:
    """This rank's documents, TTT_BATCH_DOCS of about one length side by side, chunk by chunk. A document runs from its
    BOS to the next one, which is its last target. What a token is scored with depends on nothing after it: chunks are
    counted from the BOS, and every batch has the same number of rows.

    If the lengths of documents are known (PR 1855, 2014), they do more: chunks may grow with them, a last window
    reaches back as far as any, and the longest documents come first, so that others profit from what they teach. For
    phases all ranks stop when enough of them are finished, to train the weights on the shortest of these.
    """
    starts, targets = (val.tokens[:-1] == val.bos_id).nonzero().flatten().cpu(), len(val.tokens) - 1
    bounds = torch.unique(F.pad(F.pad(starts, (1, 0), value=0), (0, 1), value=targets))
    documents, length = torch.stack((bounds[:-1], bounds[1:]), dim=1), bounds.diff()
    phases, prefix = cfg.phased_ttt_num_phases, min(cfg.phased_ttt_prefix_docs, len(documents))
    ends = [prefix * (i + 1) // phases or 1 for i in range(phases)]
    order = length.argsort(descending=not cfg.lengths_known, stable=True)
    groups = order.split(cfg.ttt_batch_docs)
    if cfg.lengths_known:
        groups = sorted(groups, key=lambda group: -int(length[group].max()))
    plan, begun, finished = [], 0, torch.zeros(len(documents), dtype=torch.bool)
    for i, group in enumerate(groups[:-1], 1):  # no document would profit from a phase after the last batch
        finished[group] = True
        if ends and finished.sum() >= ends[0]:
            lesson = order[finished[order]][:ends.pop(0)]
            tokens = cfg.global_ttt_epochs * int(length[lesson].sum())
            plan += plan_chains([documents[group] for group in groups[begun:i]], cfg, rt)
            plan.append(ScoredChunk([], -(-tokens // rt.world_size), finished=documents[lesson]))
            begun = i
    return plan + plan_chains([documents[group] for group in groups[begun:]], cfg, rt)


def plan_chains(groups: list[Tensor], cfg: Hyperparameters, rt: Runtime) -> list[ScoredChunk]:
    """This rank's part of batches of documents ([rows, 2]: first target and end). First factors pass along a chain of
    whole batches; the chains are the plan's, not the ranks': what a batch goes on from depends on no rank's speed."""
    rows, warm = cfg.ttt_batch_docs, cfg.ttt_warm_start_a
    if warm:  # a batch that is not full comes first: no other goes on from it
        groups = sorted(groups, key=lambda group: len(group) == rows)
    chains = [[] for _ in range(cfg.ttt_warm_chains if warm else rt.world_size)]
    loads, carried = [0] * len(chains), [False] * len(chains)
    for first, stop in (group.unbind(1) for group in groups):
        longest = int((stop - first).max())
        chunk = next(tokens for limit, tokens in cfg.doc_chunks if longest + 1 <= limit)  # with the BOS after it
        steps = -(-longest // chunk)
        owner = loads.index(min(loads))  # the longest to the chain with the least to do
        for step in range(steps if owner % rt.world_size == rt.rank else 0):
            end = chunk * (step + 1)
            low, high = ((first + at).minimum(stop) for at in (end - chunk, end))
            length, reach = min(end, cfg.doc_context), high if cfg.lengths_known else first + end
            bounds = torch.stack(((reach - length).maximum(first), low, high, stop))
            trains = step + 1 < steps and end >= cfg.ttt_min_doc_tokens
            chains[owner].append(ScoredChunk([Windows(bounds, length, chunk).filled(rows)],
                                             rows * length if trains else 0, resets=step == 0, keeps_a=carried[owner]))
        loads[owner] += steps
        carried[owner] = warm and len(first) == rows  # where a row had no document, nothing was learnt
    return [chunk for chain in chains for chunk in chain]


def plan_evaluation(val: ValData, cfg: Hyperparameters, rt: Runtime, stride: int, batch_seqs: int,
                    adapts: bool = False) -> list[ScoredChunk]:
    """What `evaluate` does in which order. A stride equal to the window gives the plain evaluation."""
    if adapts and cfg.ttt_reset == "document":
        return plan_documents(val, cfg, rt)
    return plan_stream(len(val.tokens) - 1, cfg, rt, stride, batch_seqs, adapts)


def on_device(plan: list[ScoredChunk], device) -> list[ScoredChunk]:
    """The plan with its windows there and their targets counted, so that a walk waits for neither."""
    bounds = [windows.bounds for chunk in plan for windows in chunk.batches]
    whole = torch.cat([torch.empty(4, 0, dtype=torch.int64), *bounds], dim=1).to(device)
    parts = iter(whole.split([part.size(1) for part in bounds], dim=1))
    place = lambda windows: dataclasses.replace(windows, bounds=next(parts),
                                                count=int(windows.bounds[1:3].diff(dim=0).sum()))
    return [dataclasses.replace(chunk, batches=[place(windows) for windows in chunk.batches]) for chunk in plan]


class EvalClock:
    """EVAL_MAX_SECONDS for all final scores of a run together. Where an evaluation would run over, epochs of test-time
    training are left out; scoring never is. Costs are in seconds per token, measured on the way."""

    RESERVE = 0.03    # of the limit, for what the measurements do not foresee
    LEARN_COST = 3    # of a training token over a scored one, until measured: forward and backward pass

    def __init__(self, limit_s: float, rt: Runtime, now=time.perf_counter):
        self.limit, self.rt, self.watch, self.pace = limit_s or math.inf, rt, Stopwatch(now=now), 0.0
        self.after = 0.0  # seconds of what follows the last evaluation

    def seconds_of(self, work) -> float:
        begun = self.watch.elapsed()
        work()
        self.rt.synchronize()
        return self.watch.elapsed() - begun

    def measure_after(self, work, share: float) -> None:
        """Time `work()`, the given share of what follows the last evaluation."""
        if not math.isinf(self.limit):
            self.after = self.rt.agree(self.seconds_of(work) / share)

    def measure_pace(self, batch, tokens: int, reads: int) -> None:
        """Time `batch()`, which reads `tokens` tokens; raise UserError if reading `reads` would take too long."""
        if math.isinf(self.limit):
            return
        self.seconds_of(batch)  # it may compile
        self.pace = self.seconds_of(batch) / tokens
        needed = self.rt.agree(self.pace * reads) + self.after
        if needed > self.limit:
            raise UserError(f"EVAL_MAX_SECONDS={self.limit:g}: scoring alone would take about {needed:.1f} s; allow "
                            "more (0: no limit) or raise EVAL_STRIDE")

    def begin(self, plan: list[ScoredChunk], epochs: int) -> None:
        """An evaluation starts."""
        self.epochs = self.most = epochs
        self.chunks = len(plan)
        self.planned, self.left_out = epochs * sum(chunk.train_tokens > 0 for chunk in plan), 0
        self.to_do = {"score": sum(chunk.reads for chunk in plan), "learn": sum(chunk.train_tokens for chunk in plan)}
        self.graphs = set()  # that a lap has used
        self.laps, self.mark = {"score": [], "learn": []}, self.watch.elapsed()  # (seconds, tokens, compiled?)
        self.open = collections.deque()  # laps whose end the device may have before it

    def cost(self, what: str) -> float:
        """Seconds per token. The first lap of each graph is left out: it may have compiled."""
        laps = [(seconds, tokens) for seconds, tokens, compiled in self.laps[what] if compiled]
        if laps:
            return sum(seconds for seconds, _ in laps) / sum(tokens for _, tokens in laps)
        share = 1 / self.rt.world_size if self.in_step else 1
        return self.pace if what == "score" else self.cost("score") * self.LEARN_COST * share

    def lap(self, what: str, graph: bool, tokens: int, epochs: int = 1) -> None:
        """Note the time since the last lap as that of so many epochs over `tokens` tokens. graph: whether it was the
        one that is compiled for the first chunks of documents."""
        self.to_do[what] -= tokens
        if tokens * epochs:
            self.open.append((what, graph, tokens * epochs, self.rt.waiter()))
            # A GPU's last lap stays open, so that its queue never runs empty. The deadline sees all but that lap.
            self.close_laps(int(self.rt.on_cuda))

    def close_laps(self, keep: int) -> None:
        """Wait for the end of all open laps but the last `keep`, and note them."""
        while len(self.open) > keep:
            what, graph, tokens, wait = self.open.popleft()
            wait()
            now = self.watch.elapsed()
            self.laps[what].append((now - self.mark, tokens, (what, graph) in self.graphs))
            self.graphs.add((what, graph))
            self.mark = now

    def affordable_epochs(self, tokens: int, chunk: int) -> int:
        """Epochs over the `tokens` training tokens of a chunk that there is time for. Rounded up over all chunks to
        come, because every later chunk profits from an early one; the last chunks may then get none."""
        if math.isinf(self.limit) or not tokens:
            return self.epochs if tokens else 0
        before, spent, scoring = self.epochs, self.watch.elapsed(), self.to_do["score"] * self.cost("score")
        room = (self.limit * (1 - self.RESERVE) - spent - scoring - self.after) / max(self.cost("learn"), 1e-12)
        epochs = max(0, min(before, math.ceil(room / self.to_do["learn"]), int(room / tokens)))  # room: in tokens
        self.epochs = epochs = int(self.rt.agree(epochs)) if self.in_step else epochs
        self.left_out += self.most - epochs
        if epochs < before:
            what = f"epochs {before} -> {epochs}" if epochs else "adaptation ends"
            self.rt.log(f"ttt_clock: {what} at chunk {chunk + 1}/{self.chunks}, {spent:.1f} of {self.limit:g} s spent; "
                        f"the rest takes {scoring:.1f} s to score, {self.cost('learn') * self.to_do['learn']:.1f} s "
                        "per epoch to learn from",
                        "ttt_clock", chunk=chunk + 1, chunks=self.chunks, epochs=epochs, spent_s=spent,
                        scoring_s=scoring)
        return epochs

    def end(self) -> None:
        """An evaluation is over: say what was left out, on any rank."""
        self.close_laps(0)
        if math.isinf(self.limit):
            return
        left_out, planned = self.rt.sum_(torch.tensor([self.left_out, self.planned], device=self.rt.device)).tolist()
        if left_out:
            self.rt.log(f"ttt_clock: {left_out} of {planned} passes over scored chunks were left out")
        if self.watch.elapsed() > self.limit:
            self.rt.log(f"ttt_clock: {self.watch.elapsed():.1f} s spent, over EVAL_MAX_SECONDS={self.limit:g}")


class IllegalScore(Exception):
    """A score that must not count. The program's error, not the user's."""


class Scored:
    """Which targets have their score in the sum, and the sum. Before an adapter trains on tokens, of the stream or of
    documents, this checks that all of them have been scored."""

    def __init__(self, val: ValData, rt: Runtime):
        self.tokens, self.sizes, self.rt, self.meter = val.tokens, val.sizes, rt, BpbMeter(val.tokens.device)
        self.times = torch.zeros(len(val.tokens) - 1, dtype=torch.uint8, device=val.tokens.device)

    def commit(self, numbers: Tensor, nll: Tensor) -> None:
        """Scores of the targets with these numbers into the sum for good.  # [n] each"""
        self.meter.add(nll, self.sizes[numbers + 1])
        self.times.index_add_(0, numbers, torch.ones_like(numbers, dtype=torch.uint8))

    def require_scored_once(self, times: Tensor) -> None:
        """Raise IllegalScore unless all of these targets were scored once."""
        if not (times == 1).all():
            raise IllegalScore(f"{int((times != 1).sum())} of {len(times)} tokens to train on, or of the whole text at "
                               "its end, were not scored once")

    def training_tokens(self, first: int, count: int) -> Tensor:
        """The token before target `first` and `count` targets. Raises IllegalScore if a rank has yet to score one."""
        self.require_scored_once(self.rt.sum_(self.times[first:first + count].clone()))
        return self.tokens[first:first + count + 1]

    def training_rows(self, numbers: Tensor, wanted: Tensor) -> Tensor:
        """Which of the wanted targets were scored once; the others are left out, so that no device is waited for."""
        return wanted & (self.times[numbers.clamp(max=len(self.times) - 1)] == 1)

    def training_documents(self, documents: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, int64 [n] each, of documents [n, 2] end to end. Raises IllegalScore likewise."""
        numbers = torch.cat([torch.arange(first, end) for first, end in documents.tolist()]).to(self.tokens.device)
        self.require_scored_once(self.rt.sum_(self.times[numbers]))
        return self.tokens[numbers].long(), self.tokens[numbers + 1].long()

    def result(self, name: str, start_s: float) -> EvalResult:
        """The total. Raises IllegalScore if the ranks together did not score every target once."""
        self.require_scored_once(self.rt.sum_(self.times.clone()))
        return EvalResult(name, *self.meter.reduce(self.rt), time.perf_counter() - start_s)


def evaluate(name: str, score_fn, val: ValData, cfg: Hyperparameters, rt: Runtime, plan: list[ScoredChunk],
             adapter: Adapter | None = None, clock: EvalClock | None = None, observe=None) -> EvalResult:
    """The one loop over the validation text: score a chunk, commit its scores, only then let an adapter train on it.

    score_fn(ids, targets, temperature, hook) gives nats as `GPT.nll`; the clock may lower the adapter's epochs;
    observe(numbers, nll) gets every score of this rank with the number of its target.
    """
    start_s, scored, clock = time.perf_counter(), Scored(val, rt), clock or EvalClock(0.0, rt)
    temperature, hook, rows = (cfg.ttt_temp, adapter.hook, adapter.rows) if adapter else (1.0, None, 0)
    clock.begin(plan, cfg.ttt_epochs if adapter else 0)
    progress = Progress(rt.log, sum(len(chunk.batches) for chunk in plan), name)
    for i, chunk in enumerate(on_device(plan, val.tokens.device)):
        phase = chunk.finished is not None
        clock.in_step = phase or not rows  # the ranks train together and must agree
        epochs = clock.affordable_epochs(chunk.train_tokens, i)
        if chunk.resets:
            adapter.reset(chunk.keeps_a)
        for windows in chunk.batches:
            ids, targets, places, counted = windows.read(val.tokens)
            rescore = functools.partial(score_fn, ids, targets, temperature, hook)
            with torch.set_grad_enabled(rows > 0 and clock.most > 0):  # to the end: other graphs would have to compile
                nll = rescore()
            chosen = torch.nonzero_static(counted, size=windows.count).unbind(1)  # a mask's count would be waited for
            numbers, values = places[chosen], nll.detach()[chosen]
            scored.commit(numbers, values)
            if observe:
                observe(numbers, values)
            progress.update()
        clock.lap("score", chunk.resets, chunk.reads)
        if adapter:
            report_chunk(rt, scored.meter, i, len(plan), time.perf_counter() - start_s)
        if epochs and phase:
            adapter.train_weights(*scored.training_documents(chunk.finished), val.bos_id)
            rt.log(f"ttpr: documents:{len(chunk.finished)} t:{time.perf_counter() - start_s:.1f}s")
        elif epochs and rows:  # not in documents that have no more to score
            _, _, high, end = windows.bounds
            lesson = scored.training_rows(places, counted & (high < end)[:, None])
            adapter.learn_rows(nll, lesson, epochs, rescore)
        elif epochs:
            adapter.learn(scored.training_tokens(chunk.first, chunk.train_tokens), chunk.progress, epochs)
        clock.lap("learn", None if phase else chunk.resets, chunk.train_tokens, epochs)
        nll = rescore = None  # frees the graph of the forward pass
    if rows:
        adapter.restore_weights()
    clock.end()
    return scored.result(name, start_s)


def final_evaluations(cfg: Hyperparameters) -> dict[str, int]:
    """The final scores in their order, each with the stride of its windows. "ttt" adapts, the others do not."""
    strides = {"roundtrip": cfg.window, "sliding": cfg.eval_stride, "ttt": cfg.stride if cfg.ttt_enabled else 0}
    return {key: stride for key, stride in strides.items() if stride}


def scorer(model: GPT, rt: Runtime, adapter: Adapter | None = None):
    """The function that scores windows, compiled where that is on; those of documents have growing lengths."""
    return rt.compiled(model.nll, grows=bool(adapter and adapter.rows))


def score_tables(val: ValData, nll: Tensor) -> dict[str, list]:
    """Rows of [nats, bytes] by place: along the text, in 256 pieces, and by the distance from the start of the
    document, row i from 2^i - 1 tokens on. nll [targets]: of all ranks."""
    number = torch.arange(len(nll), device=nll.device)
    starts = F.pad((val.tokens[1:-1] == val.bos_id).nonzero().flatten() + 1, (1, 0))
    distance = number - starts[torch.searchsorted(starts, number, right=True) - 1]
    pair = torch.stack((nll.double(), val.sizes[1:].double()), dim=1)
    places = {"stream": (256, number * 256 // len(nll)), "position": (32, (distance + 1).double().log2().long())}
    return {name: pair.new_zeros(rows, 2).index_add_(0, row, pair).tolist() for name, (rows, row) in places.items()}


COUNTING_BYTES = 300  # of memory for each token; 208 to 283 were measured


class Occurrences:
    """Which keys of a sequence are equal, by sorting: exact, nothing is hashed."""

    def __init__(self, keys: Tensor):  # int64 [n]
        ordered, self.place = torch.sort(keys, stable=True)
        begins = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
        group = begins.cumsum(0)
        self.first = begins.nonzero().flatten()[group - 1]  # of the equal keys, in sorted order
        self.ids = torch.empty_like(keys).index_copy_(0, self.place, group)  # 1..n, equal for equal keys

    def before(self, values: Tensor) -> Tensor:
        """Sum of the values of all earlier equal keys, for each.  # int64 [n]"""
        ordered = values.long()[self.place]
        sums = ordered.cumsum(0) - ordered
        return torch.empty_like(sums).index_copy_(0, self.place, sums - sums[self.first])


def count_contexts(tokens: Tensor, orders, bos_id: int):
    """For each order (in the whole text or only in its document?, context length), growing: how often each token's
    context has occurred before, how often followed by this token, and by how many different ones.

    tokens [n + 1]  # yields three int64 [n] each
    """
    last, wanted = tokens[:-1].long(), tokens[1:].long()
    base, document = max(len(tokens), 2 ** 16) + 1, (last == bos_id).cumsum(0)  # id 0: before the text
    for whole, group in itertools.groupby(orders, lambda order: order[0]):
        contexts, length = Occurrences(last + (not whole) * document * base), 1
        for _, order in group:
            while length < order:  # a longer context is two that overlap or touch
                step = min(length, order - length)
                contexts = Occurrences(F.pad(contexts.ids, (step, 0))[:-step] * base + contexts.ids)
                length += step
            hits = Occurrences(contexts.ids * base + wanted).before(torch.ones_like(wanted))
            yield contexts.before(torch.ones_like(wanted)), hits, contexts.before(hits == 0)


def back_off(logp: Tensor, counts, concentration: float) -> Tensor:
    """Log-probabilities p_n of tokens from p_{n-1} and what `count_contexts` yields: see `mixture_nll`."""
    seen, hits, kinds = (count.double() for count in counts)
    prior = concentration * kinds
    return torch.where(seen > 0, torch.logaddexp(hits.log(), prior.log() + logp) - (seen + prior).log(), logp)


def mixture_nll(tokens: Tensor, nll: Tensor, ngrams, bos_id: int) -> Tensor:
    """Scores by a back-off over exact counts of the tokens before, with the model's probabilities at its end:

        p_n(w) = (c_n(w) + a_n p_{n-1}(w)) / (c_n + a_n),  p_0: the model's

    c_n: how often the last n tokens have occurred before, c_n(w): followed by w, a_n: how many different tokens have
    followed them, times a concentration. For any counts the probabilities of all w are 1 together if those of p_0 are,
    so only the target's need be known. (PR 550 and its kin hash: theirs are hundreds together.) Contexts of the own
    document, which begins with bos_id, come first; those of the whole text go on from their probabilities.

    tokens [n + 1]: in the order of decoding; nll [n]: the model's, in nats, of all but the first; ngrams: as the
    settings have them.  # float64 [n]
    """
    logp = -nll.double()
    for counts, (_, concentration) in zip(count_contexts(tokens, [order for order, _ in ngrams], bos_id), ngrams):
        logp = back_off(logp, counts, concentration)
    return -logp


def mixed_result(name: str, nll: Tensor, val: ValData, cfg: Hyperparameters, rt: Runtime) -> EvalResult:
    """The score that the counts of NGRAM_ORDERS make of an evaluation's, nll [targets]; nothing else learns from it.

    The order of decoding is that of the text: a score is made from what stands before it there - in its document, if
    documents adapt side by side, for each starts afresh. So no rank's share and no document's length has a say.
    """
    start_s, meter = time.perf_counter(), BpbMeter(val.tokens.device)
    if rt.rank == 0:
        meter.add(mixture_nll(val.tokens, nll, cfg.ngrams, val.bos_id), val.sizes[1:])
    return EvalResult(name, *meter.reduce(rt), time.perf_counter() - start_s)


def report_chunk(rt: Runtime, meter: BpbMeter, chunk: int, chunks: int, seconds: float) -> None:
    """The running score of rank 0's share, every tenth chunk or, of many, some hundred times."""
    if chunk % max(10, chunks // 100) == 0 or chunk + 1 == chunks:
        nats, _, size = meter.sums.tolist()
        bpb = nats / math.log(2) / max(size, 1)
        rt.log(f"  ttt_chunk [{chunk + 1}/{chunks}] bpb={bpb:.6f} time={seconds:.1f}s", "ttt_chunk",
               chunk=chunk + 1, chunks=chunks, running_bpb=bpb, seconds=seconds)


# ------------------------------------------------------------------------------------------------ MAIN
def settings_from(environ) -> Hyperparameters:
    """The settings of the environment, completed by what dataset.json and, with EVAL_ARTIFACT, the artifact tell: the
    model's settings are then the artifact's. Raises UserError."""
    path = environ.get("EVAL_ARTIFACT")
    if not path:
        return Hyperparameters.from_env(find_data(environ))
    stored, tokenizer_sha256 = model_variables(path)
    environ = find_data({"VOCAB_SIZE": stored["VOCAB_SIZE"], **environ}, tokenizer_sha256)
    size = Hyperparameters.from_env({"VOCAB_SIZE": environ["VOCAB_SIZE"]}).vocab_size
    if size != int(stored["VOCAB_SIZE"]):
        raise UserError(f"VOCAB_SIZE={size}, but the model in {path} has VOCAB_SIZE={stored['VOCAB_SIZE']}")
    fields = {f.name.upper(): f for f in dataclasses.fields(Hyperparameters)}
    replaced = {name for key in stored for name in env_names(fields[key])}
    return Hyperparameters.from_env({k: v for k, v in environ.items() if k not in replaced} | stored)


def model_variables(path: str) -> tuple[dict[str, str], str]:
    """An artifact's model settings as variables, with those of rounding that its log lines are named after, and the
    sha256 of its tokenizer. Raises UserError."""
    blob = read_file(path)
    try:
        cfg, tokenizer_sha256, stored = read_artifact(blob, values=False)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    bits = {s.stream: s.bits for s in stored}
    rounding = {f.bits.upper(): str(bits[f.name]) for f in FAMILIES if f.name in ("mlp", "attn") and f.name in bits}
    if WATER_BITS in bits.values():
        rounding = {"CLIP_RULE": "waterfill"}
    return model_settings(cfg) | rounding, tokenizer_sha256


def log_settings(cfg: Hyperparameters, rt: Runtime) -> None:
    """All settings to the log file, those that differ from the defaults to the console as well."""
    rt.log(f"{rt.log.base}.txt")
    source = Path(__file__).read_bytes()
    rt.log(f"source:sha256:{hashlib.sha256(source).hexdigest()} python:{sys.version.split()[0]} "
           f"torch:{torch.__version__}")
    rt.log("Hyperparameters:", console=False)
    for name, value in sorted(dataclasses.asdict(cfg).items()):
        rt.log(f"  {name}: {value}", console=False)
    given, changed = process_environment(), cfg.non_defaults()
    for name in sorted(name for name in WITHOUT_EFFECT if given.get(name, "0") not in ("", "0")):
        rt.log(f"warning: {name}={given[name]} has no effect: {WITHOUT_EFFECT[name]}")
    rt.log("settings other than the defaults: " + (" ".join(f"{k.upper()}={v}" for k, v in changed.items()) or "none"),
           "settings", all=dataclasses.asdict(cfg), changed=changed, pid=os.getpid(), host=os.uname().nodename)
    lines = [f"{k.upper()}={int(v) if isinstance(v, bool) else v}\n" for k, v in changed.items() if k != "run_id"]
    rt.log.write("settings.env", f"# {cfg.profile or 'settings'}, as run {rt.run_id} had them\n" + "".join(lines))


def log_preamble(cfg: Hyperparameters, rt: Runtime, model: GPT, val: ValData, data: TrainData | None = None) -> None:
    """The opening lines, as this field's log readers know them; those of training only with its data."""
    count = lambda module: sum(p.numel() for p in module.parameters())
    lines = [
        f"val_bpb:enabled tokenizer_kind=sentencepiece tokenizer_path={cfg.tokenizer_path}",
        f"val_loader:shards pattern={cfg.val_files} tokens:{len(val.tokens) - 1}",
        f"model_params:{count(model)}",
        f"XSA:last_{cfg.xsa_last_n} active_layers:{[i for i, b in enumerate(model.blocks) if b.attn.exclusive]}",
        f"device:{rt.device} dtype:{rt.dtype} compile:{int(rt.compiles)} attention:{rt.attention} "
        f"kernels:{rt.kernels}",
        f"attention_mode:gqa num_heads:{cfg.num_heads} num_kv_heads:{cfg.num_kv_heads}"]
    lines += [] if data is None else [
        f"train_loader:dataset:{Path(cfg.data_path).resolve().name} train_shards:{len(data.stream.paths)}",
        f"mtp_num_heads:{cfg.mtp_num_heads} mtp_loss_weight:{cfg.mtp_loss_weight} mtp_params:{count(model.mtp_heads)}",
        f"world_size:{rt.world_size} grad_accum_steps:{data.micro_steps}",
        f"tie_embeddings:{cfg.tie_embeddings} embed_lr:{cfg.table_lr} "
        f"head_lr:{0.0 if cfg.tie_embeddings else cfg.head_lr} matrix_lr:{cfg.matrix_lr} scalar_lr:{cfg.scalar_lr}",
        f"train_batch_tokens:{cfg.train_batch_tokens} train_seq_len:{cfg.train_seq_len} iterations:{cfg.iterations} "
        f"warmup_steps:{cfg.warmup_steps} max_wallclock_seconds:{cfg.max_wallclock_seconds:.3f}",
        f"seed:{cfg.seed}"]
    for line in [*lines, *rt.notes]:
        rt.log(line)


def submitted_code_bytes(cfg: Hyperparameters) -> int:
    return cfg.code_bytes or os.path.getsize(__file__)


def write_float_model(rt: Runtime, model: GPT, path: Path) -> int:
    """Returns its bytes."""
    skipped = sum(p.numel() for p in model.mtp_heads.parameters())
    if skipped:
        rt.log(f"export_excluding_mtp_params:{skipped}")
    whole = torch_bytes({k: v.cpu() for k, v in model.state_dict().items() if not k.startswith("mtp_heads")})
    rt.attempt(write_atomically, path, whole)
    rt.log(f"packing {sum(p.numel() for p in model.parameters()) - skipped:,} weights")
    return len(whole)


def write_artifact(rt: Runtime, path: Path, artifact: Artifact) -> Path:
    """Where it was written: in the temporary folder if `path` cannot be."""
    older = older_place(path) if path.exists() and not rt.resumes else None
    try:
        write_atomically(path, artifact.blob, older)
    except UserError as error:
        path = Path(tempfile.gettempdir(), f"{rt.run_id}.ptz")
        rt.unwritten.append(f"{error}; the artifact is {path}")
        rt.log(f"warning: {error}; it goes to {path}")
        write_atomically(path, artifact.blob)
    return path


def export(cfg: Hyperparameters, rt: Runtime, model: GPT, val: ValData, hessians: dict[str, Tensor],
           factors: dict[str, tuple[Tensor, Tensor]], tune) -> Path:
    """Write the float model and the artifact, and hold the artifact against its limit. Returns the artifact's path.

    Raises UserError above the limit, after the table of what took the bytes; with SIZE_FIT=1 it rounds more coarsely
    instead, or by water-filling also more finely. `tune(settings, rounded)` is `fine_tune`.
    """
    path, code_bytes, limit = rt.run_folder / "final_model.ptz", submitted_code_bytes(cfg), cfg.artifact_limit_bytes
    rounded_by = lambda settings: round_model(settings, model, hessians, factors)
    packed = lambda rounded: pack(cfg, model, val.tokenizer_sha256, rounded)

    def first_artifact() -> tuple[Hyperparameters, Artifact]:
        artifact = packed(rounded_by(cfg))
        total = len(artifact.blob) + code_bytes
        if not cfg.size_fit or total <= limit and not factors:
            return cfg, artifact
        weights = sum(p.numel() for n, p in model.named_parameters() if n.endswith("_bank") or n in factors)
        return fit_size(cfg, rt, weights, lambda settings: packed(rounded_by(settings)), total, code_bytes)

    whole = write_float_model(rt, model, path.with_suffix(".pt")) if rt.rank == 0 else 0
    settings, artifact = rt.from_first(first_artifact)
    if cfg.tune_steps and factors:
        rounded = tune(settings, rounded_by(settings))
        tuned = rt.from_first(lambda: packed(rounded))
        if len(tuned.blob) <= max(limit - code_bytes, len(artifact.blob)):
            artifact = tuned
        else:
            rt.log("warning: the artifact is not fine-tuned, which would take more than the limit")
    total = len(artifact.blob) + code_bytes
    if rt.rank == 0:
        path = write_artifact(rt, path, artifact)
        for file in filter(Path.exists, (path, path.with_suffix(".pt"))):  # where the published scripts have them
            rt.attempt(link, rt.folder / f"final_model{file.suffix}", file)
        tag = f"{precision_tag(cfg)}+{'+'.join(sorted({row[1] for row in artifact.ledger}))}"
        rt.log(f"Serialized model: {whole} bytes")
        rt.log(f"Code size: {code_bytes} bytes")
        for line in artifact.table(code_bytes):
            rt.log(line)
        rt.log(f"Serialized model {tag}: {len(artifact.blob)} bytes")
        rt.log(f"Total submission size {tag}: {total} bytes", "artifact", bytes=len(artifact.blob),
               code_bytes=code_bytes, ledger=artifact.ledger, sha256=hashlib.sha256(artifact.blob).hexdigest())
    if total > limit:
        raise UserError(f"submission of {total:,} bytes is over ARTIFACT_LIMIT_BYTES={limit:,}; the table above shows "
                        "what took them")
    return path


def precision_tag(cfg: Hyperparameters) -> str:
    mlp, attn = cfg.mlp_quant_bits, cfg.attn_qat_bits
    if cfg.clip_rule == "waterfill":
        return "waterfill"
    return f"int{mlp}" if mlp == attn else f"int{mlp}mlp+int{attn}attn"


def log_adaptation(cfg: Hyperparameters, rt: Runtime, model: GPT, adapter: Adapter, val: ValData,
                   plan: list[ScoredChunk]) -> None:
    """What is about to adapt, in the lines that this field's log readers know."""
    targets, lora, stride = len(val.tokens) - 1, cfg.ttt_mode == "lora", cfg.stride
    trained = sum(t.numel() for t in adapter.trained) // max(adapter.rows, 1)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if adapter.rows:
        documents = int((val.tokens[:-1] == val.bos_id).sum())
        phases = [len(chunk.finished) for chunk in plan if chunk.finished is not None]
        if cfg.phased_ttt_num_phases:
            rt.log(f"ttt_phased: total_docs:{documents} prefix_docs:{max(phases, default=0)} num_phases:{len(phases)} "
                   f"boundaries:{phases}" + "; the text has documents for no more" * (
                       len(phases) < cfg.phased_ttt_num_phases or max(phases) < cfg.phased_ttt_prefix_docs))
        rt.log(f"ttt_document:start documents={documents} "
               f"side_by_side={adapter.rows} chunk_tokens={cfg.ttt_doc_chunk_tokens} ttt_epochs={cfg.ttt_epochs} "
               f"min_doc_tokens={cfg.ttt_min_doc_tokens}")
    else:
        rt.log(f"ttt_sliding:start chunks={-(-targets // cfg.ttt_chunk_tokens)} chunk_tokens={cfg.ttt_chunk_tokens} "
               f"total_windows={len(Windows.sliding(targets, cfg.window, stride))} stride={stride} "
               f"ttt_lr={cfg.lora_lr if lora else cfg.ttt_lr} ttt_epochs={cfg.ttt_epochs} "
               f"freeze_blocks={0 if lora else cfg.ttt_freeze_blocks}")
    rt.log(f"ttt_sliding:params unfrozen={trained} frozen={frozen}")
    rt.log(f"ttt_lora:rank={cfg.ttt_lora_rank} alpha={cfg.ttt_lora_alpha or cfg.ttt_lora_rank:g} "
           f"targets={cfg.ttt_lora_targets} layers={','.join(map(str, cfg.lora_layer_ids))} "
           f"optimizer={cfg.ttt_lora_optimizer} lr={cfg.lora_lr}" if lora else
           f"ttt_sliding:optimizer={cfg.ttt_optimizer} lr={cfg.ttt_lr} momentum={cfg.ttt_momentum}")


def final_scores(cfg: Hyperparameters, rt: Runtime, model: GPT, val: ValData,
                 clock: EvalClock | None = None) -> dict[str, EvalResult]:
    """Plain, sliding and test-time-trained scores of a model, in that order: the last one changes the weights.
    EVAL_MAX_SECONDS holds for all three together and for what `clock` has measured before them."""
    tag, clock = precision_tag(cfg), clock or EvalClock(cfg.eval_max_seconds, rt)
    labels = {"roundtrip": f"final_{tag}_roundtrip", "sliding": f"final_{tag}_sliding_window", "ttt": "legal_ttt"}
    plans = {key: plan_evaluation(val, cfg, rt, stride, cfg.eval_batch_seqs, key == "ttt")
             for key, stride in final_evaluations(cfg).items()}
    nothing = torch.zeros(cfg.eval_batch_seqs, cfg.window, dtype=torch.int64, device=rt.device)
    score_fn, fresh = scorer(model, rt), nothing[:, -cfg.stride:].contiguous()
    if cfg.ngrams:
        needed, free = COUNTING_BYTES * len(val.tokens), rt.free_memory()
        if needed > free:
            raise UserError(f"counting NGRAM_ORDERS in {len(val.tokens):,} tokens takes about {needed / 2 ** 30:.1f} "
                            f"GiB, of which {free / 2 ** 30:.1f} are free; NGRAM_ORDERS= leaves it out")
        some = torch.arange(min(len(val.tokens), 2 ** 17), device=rt.device)
        clock.measure_after(lambda: mixture_nll(some, some[1:], cfg.ngrams, val.bos_id), len(some) / len(val.tokens))
    with torch.no_grad():
        clock.measure_pace(lambda: score_fn(nothing, fresh, 1.0), nothing.numel(),
                           sum(chunk.reads for plan in plans.values() for chunk in plan))
    results, traces = {}, {"tokens": len(val.tokens) - 1}
    for key, plan in plans.items():
        adapter, label, nll = None, labels[key], torch.zeros(len(val.tokens) - 1, device=rt.device)
        if key == "ttt":
            adapter = adapter_for(model, cfg, rt)
            log_adaptation(cfg, rt, model, adapter, val, plan)
            score_fn = scorer(model, rt, adapter)
        r = results[key] = evaluate(label, score_fn, val, cfg, rt, plan, adapter, clock,
                                    functools.partial(nll.index_copy_, 0))
        note = f" stride:{cfg.eval_stride}" if key == "sliding" else ""
        log_score(rt, label, r, note, exact=True)
        seconds = {what: [lap[0] for lap in laps] for what, laps in clock.laps.items()}
        traces[key] = {**score_tables(val, rt.sum_(nll)), "seconds": seconds}
        if adapter:
            rt.log(f"ttt_sliding:done val_loss={r.loss:.6f} val_bpb={r.bpb:.6f} elapsed={r.seconds:.1f}s")
    if cfg.ngrams:
        without, r = r, mixed_result(f"{label}_ngram", nll, val, cfg, rt)
        results["ngram"] = r
        log_score(rt, r.name, r, f" without:{without.bpb:.4f}", exact=True)
    rt.attempt(rt.log.write, "eval.json", json.dumps(traces))
    return results


def log_score(rt: Runtime, label: str, r: EvalResult, note: str = "", exact: bool = False) -> None:
    rt.log(f"{label} val_loss:{r.loss:.4f} val_bpb:{r.bpb:.4f}{note} eval_time:{1000 * r.seconds:.0f}ms", "evaluation",
           **dataclasses.asdict(r))
    if exact:
        rt.log(f"{label}_exact val_loss:{r.loss:.8f} val_bpb:{r.bpb:.8f}")


def make_artifact(cfg: Hyperparameters, rt: Runtime, val: ValData, watch: Stopwatch) -> tuple[dict, dict[str, float]]:
    """Train, average, quantise and write. Returns what the summary says of it, and the seconds of each phase."""
    specs, codec, data = quant_specs(cfg, parameter_shapes(cfg)), pick_codec(cfg.compress), TrainData.open(cfg, rt)
    if cfg.size_fit and not any(name.endswith("_bank") for name in specs):
        raise UserError("SIZE_FIT=1 has nothing to round more coarsely: all banks are kept as floats")
    log_settings(cfg, rt)
    if cfg.compress == "auto" and codec != "range":
        rt.log(f"warning: the package {CODECS['range']} is missing, so the codes are packed by {codec}: a larger file")
    torch.manual_seed(cfg.seed)
    model = GPT(cfg, rt.attend, rt.dtype, specs, rt.kernels).to(rt.device)
    rt.copy_first(model.parameters())
    log_preamble(cfg, rt, model, val, data)
    tokens = min(cfg.val_batch_size // rt.world_size, rt.forward_tokens(cfg))
    plan = plan_evaluation(val, cfg, rt, cfg.window, max(tokens // cfg.window, 1))
    plain = functools.partial(evaluate, val=val, cfg=cfg, rt=rt, plan=plan)
    seconds = {"setup": watch.elapsed()}
    with rt.signals.act(at_once=False):  # a step is finished first, and saved
        state = train(cfg, rt, model, data, plain)
    seconds["train"], phase = state.watch.elapsed(), Stopwatch()
    left_s = cfg.max_wallclock_seconds - seconds["train"] if cfg.max_wallclock_seconds else math.inf
    hessians = calibrate(cfg, rt, model, data, state.step, left_s)
    factors = loss_curvature(cfg, rt, model, data, state.step, hessians, left_s - phase.elapsed())
    seconds["calibrate"] = phase.elapsed()
    averaged = plain("post_average", rt.compiled(model.nll))
    log_score(rt, "DIAGNOSTIC post_average", averaged)
    phase = Stopwatch()
    tune = functools.partial(fine_tune, rt=rt, model=model, data=data, step=state.step + cfg.gptq_calibration_batches,
                             left_s=left_s - seconds["calibrate"])
    path = export(cfg, rt, model, val, hessians, factors, tune)
    seconds["export"] = phase.elapsed()
    return {"artifact_path": str(path), "val_bpb_pre_quant": averaged.bpb, "steps": state.step,
            "tokens": state.step * cfg.train_batch_tokens}, seconds


def run(cfg: Hyperparameters, rt: Runtime) -> dict:
    """config -> data -> train -> average -> quantise -> write -> read back -> evaluate; with EVAL_ARTIFACT what follows
    writing. Returns the summary, in which a score that was not asked for is None."""
    watch, val = Stopwatch(), ValData.open(cfg, rt)
    if cfg.eval_artifact:
        log_settings(cfg, rt)
        made = {"artifact_path": cfg.eval_artifact, "val_bpb_pre_quant": None, "steps": 0, "tokens": 0}
        seconds = {"setup": watch.elapsed()}
    else:
        made, seconds = make_artifact(cfg, rt, val, watch)
    path, clock = made["artifact_path"], EvalClock(cfg.eval_max_seconds, rt)
    blob = rt.from_first(lambda: read_file(path))
    model = load_model(blob, rt, val.tokenizer_sha256)
    rt.log(f"artifact:{path} bytes:{len(blob)} sha256:{hashlib.sha256(blob).hexdigest()}")
    if cfg.eval_artifact:
        log_preamble(cfg, rt, model, val)
    results, code_bytes = final_scores(cfg, rt, model, val, clock), submitted_code_bytes(cfg)
    bpb = {f"val_bpb_{key}": results[key].bpb if key in results else None
           for key in ("roundtrip", "sliding", "ttt", "ngram")}
    seconds |= {key: r.seconds for key, r in results.items()}
    seconds |= {"evaluate": clock.watch.elapsed(), "total": watch.elapsed()}
    return {"run_id": rt.run_id, **made, **bpb, "artifact_bytes": len(blob), "code_bytes": code_bytes,
            "total_bytes": len(blob) + code_bytes, "artifact_limit_bytes": cfg.artifact_limit_bytes,
            "seconds": {k: round(v, 3) for k, v in seconds.items()}, "peak_rss_bytes": peak_rss_bytes()}


def report(rt: Runtime, summary: dict) -> None:
    """The short summary for people; then the same as one JSON line and file for programs."""
    spent = ", ".join(f"{phase} {s:.1f}" for phase, s in summary["seconds"].items())
    bpb = lambda key: "off" if summary[key] is None else f"{summary[key]:.4f}"
    text = json.dumps(summary)
    rt.attempt(rt.log.write, "summary.json", text + "\n")
    for line in (
        "-" * 72,
        f"bits per byte   before quantisation {bpb('val_bpb_pre_quant')}, "
        f"from the artifact {bpb('val_bpb_roundtrip')}, "
        f"sliding {bpb('val_bpb_sliding')}, test-time training {bpb('val_bpb_ttt')}, counts {bpb('val_bpb_ngram')}",
        f"size            {summary['total_bytes']:,} of {summary['artifact_limit_bytes']:,} bytes: "
        f"artifact {summary['artifact_bytes']:,}, code {summary['code_bytes']:,}",
        f"seconds         {spent}",
        f"files           {summary['artifact_path']}, all else in {rt.run_folder}",
        *(f"not written     {problem}" for problem in rt.unwritten),
    ):
        rt.log(line)
    rt.log(f"summary: {text}")
    if rt.rank == 0:
        for name in ("log.txt", "events.jsonl"):
            rt.log.link(name)  # where there are no links, the copies of the first lines become those of the whole


def print_error(message: str, rank: int, signals: Signals | None = None) -> None:
    """`signals`: of a rank that another one may speak for. It waits whether torchrun stops it meanwhile."""
    if signals:
        time.sleep(3.0)
    if not (signals and signals.number):
        print(f"error: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)


def log_failure(rt: Runtime | None, why: str) -> None:
    if rt is not None and rt.log.held:  # the log has begun
        rt.log(f"error: {why}", "failed", console=False, why=why)


def how_to_go_on(rt: Runtime | None) -> str:
    if rt is None:
        return ""
    rt.finish_writing()
    return (f"; to go on from the last checkpoint: bash run.sh ... RESUME=1 RUN_ID={rt.run_id}"
            if checkpoint_path(rt).exists() else "; there is no checkpoint to go on from")


def main(arguments: list[str]) -> int:
    """Run with the settings of the environment. Returns 0: done, 1: another rank failed, 2: a user's error, 130 or 143:
    interrupted by SIGINT or SIGTERM."""
    if arguments == ["--names"]:
        names = [" ".join(env_names(f)) for f in dataclasses.fields(Hyperparameters)]  # of one setting on one line
        print("\n".join([*names, *WITHOUT_EFFECT]))
        return 0
    if arguments:
        asked = arguments[0] in ("-h", "--help")
        print(f"{__doc__}\n{config_table()}" if asked else f"error: no argument {arguments[0]} (settings are "
              "environment variables; --help lists them)", file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    with Signals() as signals:
        return start(signals)


def start(signals: Signals) -> int:
    """`main` without arguments."""
    rank, rt, code = 0, None, 1
    try:
        with signals.act(at_once=True):
            rank = read_ranks(process_environment())[0]
            cfg = settings_from(process_environment())
            rt = Runtime.open(cfg, signals)
            summary = run(cfg, rt)
            report(rt, summary)
            spent = summary["seconds"]["evaluate"]
            if cfg.eval_max_seconds and spent > cfg.eval_max_seconds:
                raise UserError(f"evaluation took {spent:.1f} s, over EVAL_MAX_SECONDS={cfg.eval_max_seconds:g}: these "
                                "scores do not count; raise EVAL_STRIDE, or EVAL_MAX_SECONDS (0: no limit)")
            rt.agree(0.0)  # no rank leaves before the first has written its last file
            code = 0
    except UserError as error:
        log_failure(rt, str(error))
        print_error(str(error), rank, signals if rank else None)
        code = 2
    except KeyboardInterrupt as stop:
        number = (*stop.args, signal.SIGINT)[0]
        why = f"interrupted ({signal.Signals(number).name})"
        log_failure(rt, why)
        if rank == 0:
            print(why + how_to_go_on(rt), file=sys.stderr, flush=True)
        code = 128 + number
    except Exception as error:  # said before the process group ends: that may take this process with it
        if rt is None or rt.world_size == 1:
            raise
        if lost_a_rank(error):
            print_error(f"another rank is gone ({str(error).strip().splitlines()[0][-150:]})", rank, signals)
        else:
            traceback.print_exc()
    finally:
        if rt is not None:
            rt.close(failed=code != 0)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
