"""SCALE=tiny: a profile shrunk until it runs end to end on two CPU cores in half a minute, with all its features on.

Tools put the repository's root on sys.path before they import this.
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping

import estimate
import profiles
import shell
import train_gpt as tg

Settings = tg.Hyperparameters
EMBEDDED = "./data/datasets/embedded_sp{}"  # Python's own documentation, which carries up to 8,192 pieces
LAYERS, HEADS, HEAD_DIM, SEQ_LEN, SEQUENCES, STEPS = 4, 4, 8, 128, 8, 40  # eight ranks get a sequence each


def part(amount: int, whole: int, new_whole: int) -> int:
    """`amount` of `whole` in proportion to another whole: none stays none, all stays all, some stays some."""
    if amount == 0 or amount >= whole:
        return amount and new_whole
    return min(max(round(amount * new_whole / whole), 1), max(new_whole - 1, 1))


def scaled(amount: int, whole: int, new_whole: int) -> int:
    """`amount` in proportion, which may be more than the whole: none stays none."""
    return max(amount * new_whole // max(whole, 1), 1) if amount else 0


def place(layers: Iterable[int], places: Iterable[int], was: Settings, now: Settings) -> dict[int, int]:
    """Each of the layers, the last one first, -> the free place that is nearest to it in the shallower model."""
    placed, free, ratio = {}, list(places), (now.num_layers - 1) / max(was.num_layers - 1, 1)
    for layer in sorted(layers, reverse=True)[:len(free)]:
        placed[layer] = min(free, key=lambda place: abs(place - layer * ratio))
        free.remove(placed[layer])
    return placed


def fewer_layers(layers: Iterable[int], was: Settings, now: Settings) -> list[int]:
    """Layers of the shallower model for some of the deep one's: all for all, two or more for two or more."""
    layers = sorted(layers)
    count = min(max(part(len(layers), was.num_layers, now.num_layers), min(len(layers), 2)), now.num_layers)
    spread = [layers[round(i * (len(layers) - 1) / max(count - 1, 1)) if count > 1 else -1] for i in range(count)]
    return sorted(place(spread, range(now.num_layers), was, now).values())


def lora_layers(was: Settings, now: Settings) -> str:
    return ",".join(map(str, fewer_layers(was.lora_layer_ids, was, now))) if was.ttt_lora_layers else ""


def lora_layer_rates(was: Settings, now: Settings) -> str:
    """The rates go to layers that LoRA still adds to."""
    placed = place(was.lora_layer_rates, now.lora_layer_ids, was, now)
    return ",".join(f"{placed[layer]}:{rate:g}" for layer, rate in sorted(was.lora_layer_rates.items())
                    if layer in placed)


def kv_heads(was: Settings, now: Settings) -> int:
    """As many query heads for each as before, or nearly."""
    most = max(now.num_heads * was.num_kv_heads // was.num_heads, 1)
    return max(n for n in range(1, most + 1) if now.num_heads % n == 0)


def table_width(width: int, was_full: int, full: int) -> int:
    """A table as wide as what it is added to needs no projection; any other keeps its own."""
    return full if width == was_full else max(min(part(width, was_full, full), full - 1), 1)


def late_qat_threshold(was: Settings, now: Settings) -> float:
    """High enough for the last two steps, where the profile's own last step is quantised."""
    def quantised(cfg: Settings, left: int) -> bool:
        return tg.plan_step(cfg, cfg.iterations - left, 0.0, 0.0).qat
    if not quantised(was, 1) or quantised(now, 2):
        return was.late_qat_threshold
    return min(round(1.01 * tg.lr_scale(now, now.iterations - 2, 0.0, 0.0), 4), 1.0)


def seq_schedule(was: Settings, now: Settings) -> str:
    """As many lengths at the same shares of the budget, each half of the next longer one."""
    longer = sorted({length for length, _ in was.seq_stages}, reverse=True)
    pairs = [f"{now.train_seq_len >> longer.index(length)}:{until:g}" for length, until in was.seq_stages]
    return ",".join(pairs) if was.train_seq_schedule else ""


def chunk_ladder(was: Settings, now: Settings) -> str:
    """The steps that are below the chunk of long documents."""
    return ",".join(f"{limit}:{chunk}" for limit, chunk in was.doc_chunks[:-1] if chunk < now.ttt_doc_chunk_tokens)


def size_limit(was: Settings, now: Settings) -> int:
    """A limit that SIZE_FIT has to work for, and can keep: a third of the banks' bytes less than is expected."""
    banks = sum(stream.bytes for stream in estimate.streams(now) if stream.name in ("attn", "mlp"))
    return round(estimate.artifact_bytes(now) - banks / 3)


# Setting -> its tiny value, of the profile's settings and of the tiny ones so far. In this order: a rule may look at
# the values above it.
RULES: dict[str, Callable[[Settings, Settings], object]] = {
    "data_path": lambda was, now: EMBEDDED.format(min(now.vocab_size, 8192)),
    "num_layers": lambda was, now: min(was.num_layers, LAYERS),
    "num_heads": lambda was, now: min(was.num_heads, HEADS),
    "num_kv_heads": kv_heads,
    "model_dim": lambda was, now: now.num_heads * min(was.head_dim, HEAD_DIM),
    "rope_dims": lambda was, now: max(part(was.rope_dims, was.head_dim, now.head_dim) // 2 * 2, min(was.rope_dims, 4)),
    "xsa_last_n": lambda was, now: part(was.xsa_last_n, was.num_layers, now.num_layers),
    "gate_window": lambda was, now: min(was.gate_window, now.model_dim),
    "parallel_start_layer": lambda was, now: part(was.parallel_start_layer, was.num_layers, now.num_layers),
    "loop_end": lambda was, now: min(part(was.loop_end, was.num_layers, now.num_layers),
                                     (now.parallel_start_layer if now.two_lanes else now.num_layers) - 1),
    "loop_start": lambda was, now: min(part(was.loop_start, was.num_layers, now.num_layers), now.loop_end),
    "bigram_vocab_size": lambda was, now: min(was.bigram_vocab_size, 256),
    "bigram_dim": lambda was, now: table_width(was.bigram_dim, was.model_dim, now.model_dim),
    "trigram_vocab_size": lambda was, now: min(was.trigram_vocab_size, 256),
    "trigram_dim": lambda was, now: table_width(was.trigram_dim, was.model_dim, now.model_dim),
    "ve_layers": lambda was, now: (",".join(map(str, fewer_layers(was.ve_layer_ids, was, now)))
                                   if was.ve_last_n < 0 else was.ve_layers),
    "ve_last_n": lambda was, now: (len(fewer_layers(was.ve_layer_ids, was, now))
                                   if was.ve_last_n > 0 else was.ve_last_n),
    "ve_dim": lambda was, now: table_width(was.ve_dim, was.num_kv_heads * was.head_dim,
                                           now.num_kv_heads * now.head_dim),
    "train_seq_len": lambda was, now: min(was.train_seq_len, SEQ_LEN),
    "train_seq_schedule": seq_schedule,
    "rope_train_seq_len": lambda was, now: scaled(was.rope_train_seq_len, was.train_seq_len, now.train_seq_len),
    "train_batch_tokens": lambda was, now: min(was.train_batch_tokens, SEQUENCES * now.train_seq_len),
    "iterations": lambda was, now: min(was.iterations, STEPS),
    "warmup_steps": lambda was, now: min(was.warmup_steps, 2),
    "warmdown_iters": lambda was, now: (now.iterations // 2 if 0 < was.warmdown_iters < was.iterations
                                        else scaled(was.warmdown_iters, was.iterations, now.iterations)),
    "muon_momentum_warmup_steps": lambda was, now: min(was.muon_momentum_warmup_steps, now.iterations // 4),
    "late_qat_min_step": lambda was, now: part(was.late_qat_min_step, was.iterations, now.iterations // 2),
    "late_qat_threshold": late_qat_threshold,
    "val_loss_every": lambda was, now: min(was.val_loss_every, now.iterations),
    "train_log_every": lambda was, now: min(was.train_log_every, now.iterations // 4),
    "checkpoint_every": lambda was, now: min(was.checkpoint_every, now.iterations // 2),
    "swa_every": lambda was, now: min(was.swa_every, 2),
    "lawa_k": lambda was, now: min(was.lawa_k, 3),
    "lawa_freq": lambda was, now: min(was.lawa_freq, now.iterations // 8),
    "gptq_calibration_batches": lambda was, now: min(was.gptq_calibration_batches, 2),
    "tune_steps": lambda was, now: min(was.tune_steps, 8),
    "eval_seq_len": lambda was, now: scaled(was.eval_seq_len, was.train_seq_len, now.train_seq_len),
    "attention_window": lambda was, now: max(part(was.attention_window, was.train_seq_len, now.train_seq_len),
                                             min(was.attention_window, 2)),
    "eval_stride": lambda was, now: max(part(was.eval_stride, was.window, now.window),
                                        min(was.eval_stride, now.window // 2)),
    "ttt_epochs": lambda was, now: min(was.ttt_epochs, 2),
    "ttt_chunk_tokens": lambda was, now: min(was.ttt_chunk_tokens, 16 * now.train_seq_len),
    "ttt_batch_seqs": lambda was, now: min(was.ttt_batch_seqs, 8),
    "ttt_freeze_blocks": lambda was, now: part(was.ttt_freeze_blocks, was.num_layers, now.num_layers),
    "ttt_lora_rank": lambda was, now: min(was.ttt_lora_rank, 4),
    "ttt_lora_alpha": lambda was, now: was.ttt_lora_alpha * now.ttt_lora_rank / was.ttt_lora_rank,
    "ttt_lora_layers": lora_layers,
    "ttt_lora_layer_rates": lora_layer_rates,
    "ttt_batch_docs": lambda was, now: min(was.ttt_batch_docs, 8),
    "ttt_doc_chunk_tokens": lambda was, now: min(was.ttt_doc_chunk_tokens, now.window // 2),
    "ttt_chunk_ladder": chunk_ladder,
    "ttt_eval_seq_len": lambda was, now: scaled(was.ttt_eval_seq_len, was.train_seq_len, now.train_seq_len),
    "ttt_warm_chains": lambda was, now: min(was.ttt_warm_chains, 2),
    "phased_ttt_prefix_docs": lambda was, now: min(was.phased_ttt_prefix_docs,
                                                   now.ttt_batch_docs * was.phased_ttt_num_phases),
    "global_ttt_chunk_tokens": lambda was, now: min(was.global_ttt_chunk_tokens, 4 * now.window),
    "ttt_min_doc_tokens": lambda was, now: scaled(was.ttt_min_doc_tokens, was.ttt_doc_chunk_tokens,
                                                  now.ttt_doc_chunk_tokens),
    "hash_embed_buckets": lambda was, now: min(was.hash_embed_buckets, 512),
    "code_bytes": lambda was, now: 1,
    "artifact_limit_bytes": size_limit,
}
# Of these settings, which ones a run looks at; of all others, it does.
USED: dict[str, Callable[[Settings], object]] = {
    r"bigram_dim": lambda cfg: cfg.bigram_vocab_size,
    r"trigram_dim": lambda cfg: cfg.trigram_vocab_size,
    r"ve_dim": lambda cfg: cfg.ve_layer_ids,
    r"ve_.*": lambda cfg: cfg.ve_enabled,
    r"gate_window": lambda cfg: cfg.smear_gate == "window" or cfg.sparse_attn_gate,
    r"loop_.*": lambda cfg: cfg.num_loops,
    r"warmdown_iters": lambda cfg: not cfg.warmdown_frac,
    r"muon_.*": lambda cfg: cfg.matrix_optimizer == "muon",
    r"swa_.*": lambda cfg: cfg.swa_enabled and not cfg.lawa_enabled,
    r"lawa_.*": lambda cfg: cfg.lawa_enabled,
    r"gptq_.*": lambda cfg: cfg.gptq_enabled,
    r"code_bytes|artifact_limit_bytes": lambda cfg: cfg.size_fit,
    r"ttt_lora_.*": lambda cfg: cfg.ttt_enabled and cfg.ttt_mode == "lora",
    r"ttt_warm_chains": lambda cfg: cfg.ttt_enabled and cfg.ttt_reset == "document" and cfg.ttt_warm_start_a,
    r"ttt_freeze_blocks": lambda cfg: cfg.ttt_enabled and cfg.ttt_mode == "sgd",
    r"ttt_(batch_docs|.*doc.*tokens|chunk_ladder|eval_seq_len)": lambda cfg: cfg.ttt_enabled and cfg.ttt_reset == "document",
    r"ttt_(chunk_tokens|batch_seqs)": lambda cfg: cfg.ttt_enabled and cfg.ttt_reset == "stream",
    r"(phased|global)_ttt_.*": lambda cfg: cfg.ttt_enabled and cfg.phased_ttt_num_phases,
    r"ttt_.*": lambda cfg: cfg.ttt_enabled,
}


def tiny(profile: profiles.Profile, environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """(variable, its tiny value, its value in the profile) of all that changes. Raises UserError."""
    was, given = profiles.settings(profile), profiles.parse(environ)
    now, lines = dataclasses.replace(was, **given), []
    fields = {f.name: f for f in dataclasses.fields(Settings)}
    for name, rule in RULES.items():
        used = next((condition for pattern, condition in USED.items() if re.fullmatch(pattern, name)), None)
        if name in given or used and not used(now):
            continue
        now = dataclasses.replace(now, **{name: rule(was, now)})
        if getattr(now, name) != getattr(was, name):
            own = fields[name].name.upper()  # or as the profile calls it: two names of one setting would contradict
            variable = next((key for key in tg.env_names(fields[name]) if key in profile.values), own)
            lines.append((variable, *(f"{getattr(cfg, name):g}" if fields[name].type == "float"
                                      else str(getattr(cfg, name)) for cfg in (now, was))))
    return lines


def shrunk(word: str, profile: profiles.Profile, environ: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """What SCALE=word changes, as `tiny` has it. Raises UsageError, UserError."""
    if word != "tiny":
        raise shell.UsageError(f"SCALE={word} is not one of: tiny")
    return tiny(profile, environ)


def table(profile: profiles.Profile, lines: list[tuple[str, str, str]]) -> str:
    width = max((len(f"{key}={value}") for key, value, _ in lines), default=0)
    return "\n".join([f"# SCALE=tiny: what is smaller than in {profile.name}; every feature stays on",
                      *(f"{f'{key}={value}':<{width}}  # was {before or 'empty'}" for key, value, before in lines)])
