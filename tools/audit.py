"""Shows on a piece of the validation text that the scores of an artifact are legal.

    python tools/audit.py final_model.ptz                              # as the repository's train_gpt.py makes them
    python tools/audit.py final_model.ptz --script build/train_gpt.py   # as a built one does
    python tools/audit.py final_model.ptz --tokens 20000 --positions 12 RUN_ID=mine TTT_EPOCHS=1

The script is looked at from outside: its own `final_scores` makes all scores of the piece, and of changed ones, while
the audit notes every call of the scoring function, every score that enters a sum and every file that is opened. What
it then says of them it computes itself. Out of its sight: what a script does only on texts longer than the piece
(--tokens) or when it notices an audit, files that a library opens without Python, other programs.

Settings are those of train_gpt.py, from the environment or as KEY=VALUE; AUDIT_TOKENS=, AUDIT_POSITIONS= and
AUDIT_SCRIPT= are the options. The table goes to runs/RUN_ID/audit.txt, with all it depends on to audit.json beside it,
whose digest signs it. Without a RUN_ID it is the run in whose folder the artifact lies, else one with the artifact's
name. Exit code 0: all checks pass; 2: one line says which do not.
"""
from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import json
import math
import operator
import os
import site
import sys
import sysconfig
import tempfile
import time
import types
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from sentencepiece import SentencePieceProcessor
from torch import Tensor

import shell
from shell import AUDIT, AUDITED_SCRIPT, Parser, UsageError, one_line_errors, take_settings

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("UserError", "IllegalScore", "Runtime", "RunLog", "Scored", "ValData", "load_model", "settings_from",
          "final_scores", "write_atomically", "Hyperparameters", "env_names")
SHARD_HEADER_BYTES = 1024
EXACT = 1e-4          # nats, or probability: what the same arithmetic may be off
FUSED = 0.5, 2e-3     # nats, of one score and of their mean: compiled graphs in half precision against plain operations
NOISE_FACTOR = 4      # another text may move the scores before it by this much more than three equal passes differ
# Nats, at most and root mean square. FLIPS: what is allowed in any case if equal passes have unequal weights, since a
# rounding may flip in one of ten passes. UNSTEADY: more noise than this could hide a cheat.
FLIPS = {torch.float32: (1e-4, 1e-5), torch.bfloat16: (0.1, 0.02)}
UNSTEADY = {torch.float32: (0.02, 2e-3), torch.bfloat16: (0.25, 0.03)}


class AuditError(UsageError):
    """The audit cannot be done, or failed. Printed as one line, exit code 2."""


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- files ---------------------------------------------------------------------------------------------------------
class Opened:
    """The files that Python opens for reading, and the hosts it calls, inside a `with`."""

    watching, hooked = None, False

    def __init__(self):
        self.read, self.made_here = set(), set()

    def __enter__(self) -> Opened:
        if not Opened.hooked:
            sys.addaudithook(lambda event, args: Opened.watching and Opened.watching.note(event, args))
            Opened.hooked = True
        Opened.watching = self
        return self

    def __exit__(self, *_) -> None:
        Opened.watching = None

    def note(self, event: str, args: tuple) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
            self.read.add(f"network {args[1][0]}")
        if event != "open" or isinstance(args[0], int):
            return
        path, flags = os.path.realpath(os.fsdecode(args[0])), args[2]
        if flags & (os.O_TRUNC | os.O_EXCL):
            self.made_here.add(path)
        elif flags & os.O_ACCMODE != os.O_WRONLY and os.path.exists(path) and not os.path.isdir(path):
            self.read.add(path)

    def foreign(self, known: list) -> list[str]:
        """What was read besides the `known` files, Python's, the system's, and what compilers keep."""
        parts = [*sysconfig.get_paths().values(), *site.getsitepackages(), site.getusersitepackages(), "/lib", "/lib64",
                 "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share", "/usr/include", "/usr/local/cuda", "/etc",
                 "/proc", "/sys", "/dev", os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton"]
        graphs = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or os.path.join(tempfile.gettempdir(), "torchinductor_")
        roots = (*(os.path.join(os.path.realpath(part), "") for part in parts), os.path.realpath(graphs))
        fine = self.made_here | {os.path.realpath(path) for path in known}
        return sorted(path for path in self.read - fine if path.startswith("/dev/shm/") or not path.startswith(roots))


def import_script(path: Path) -> types.ModuleType:
    """A module of exactly the bytes of a file; a built script unpacks itself. Raises AuditError."""
    module = types.ModuleType(AUDITED_SCRIPT)
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look for it there
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except OSError as error:
        raise AuditError(f"cannot read script {path}: {error.strerror}") from None
    except (Exception, SystemExit) as error:
        raise AuditError(f"cannot import script {path}: {type(error).__name__}: {error}") from None
    missing = [name for name in NEEDED if not hasattr(module, name)]
    if missing:
        raise AuditError(f"script {path} is no train_gpt.py that this audit knows: it has no {', '.join(missing)}")
    return module


def read_shards(data_path: str) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """The whole validation text, the bytes of each of its tokens where the data set tells them, and the files."""
    paths = sorted(glob.glob(os.path.join(glob.escape(data_path), "fineweb_val_*.bin")))
    kinds = [[path for path in paths if ("_bytes_" in os.path.basename(path)) == told] for told in (False, True)]
    tokens, sizes = (np.concatenate([np.fromfile(path, "<u2", offset=SHARD_HEADER_BYTES) for path in kind])
                     if kind else None for kind in kinds)
    return tokens, sizes, paths


# ---- what an evaluation pass does -----------------------------------------------------------------------------------
class Call(NamedTuple):
    """One call of the scoring function."""

    ids: Tensor
    wanted: Tensor
    temperature: float
    hook: object
    nll: Tensor

    def same_windows(self, other: Call | None) -> bool:
        return other is not None and torch.equal(self.ids, other.ids) and torch.equal(self.wanted, other.wanted)


@dataclass
class EvalPass:
    """What one evaluation pass over the text did on this rank; `joined`: on all."""

    nll: Tensor           # float64 [targets], on the CPU; zero where this rank gave no score
    times: Tensor         # float64 [targets]: how often it gave one
    order: Tensor         # float64 [targets]: when, one rank after another
    name: str = ""
    calls: int = 0        # of the scoring function whose scores were committed
    extra_calls: int = 0  # neither committed nor training on what was committed last
    altered: int = 0      # scores that are not what the call before made
    misplaced: int = 0    # scores of another token than the text's, or with another context
    temperatures: list = field(default_factory=list)
    off: list = field(default_factory=list)      # nats between a call's scores and what its logits say, as `Gap`
    foreign: list = field(default_factory=list)  # and what the artifact's own weights say
    masses: list = field(default_factory=list)   # of the whole vocabulary together, at the places that were tried
    weight_sums: list = field(default_factory=list)  # of all weights, the adapter's included, at each commit

    @classmethod
    def joined(cls, parts: list[EvalPass]) -> EvalPass:
        values = {f.name: functools.reduce(operator.add, (getattr(part, f.name) for part in parts))
                  for f in dataclasses.fields(cls)}
        return cls(**values | {"name": parts[0].name})


class Gap(NamedTuple):
    """Of one call's scores."""

    most: float
    total: float
    count: int
    call: int  # its number in the pass


def like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values` in a new tensor of the same layout: another one could need another compiled graph."""
    return tensor.new_empty_strided(tensor.shape, tensor.stride()).copy_(values)


class Run(NamedTuple):
    """Scores of neighbouring targets in a row of a call. in_place: their row is the text up to there."""

    row: int
    column: int
    count: int
    in_place: bool


class Spy:
    """Notes what one call of `final_scores` does. looks: computes each score itself as well; probes: at which calls of
    the scoring function to try the whole vocabulary."""

    def __init__(self, audit: Audit, tokens: Tensor, looks: bool, probes: set[int]):
        self.audit, self.tokens, self.looks, self.probes = audit, tokens.cpu().long(), looks, probes
        self.passes, self.pending, self.masses, self.last, self.random = [], [], [], None, audit.generator()
        self.count, self.ends = 0, [0]  # calls so far, and their number at the end of each pass
        self.mixed = []  # the scores that counts made

    def scoring(self, function):
        def call(ids, wanted, temperature=1.0, hook=None):
            nll = function(ids, wanted, temperature, hook)
            self.pending.append(Call(ids, wanted, temperature, hook, nll.detach().clone()))
            if self.count in self.probes:
                self.masses.append(self.mass(function, self.pending[-1]))
            self.count += 1
            return nll
        return call

    def mixing(self, script):
        """A patch of what mixes counts into scores, for a `with`."""
        def noted(*args):
            self.mixed.append(honest(*args))
            return self.mixed[-1]
        honest = getattr(script, "mixture_nll", None)
        return mock.patch.object(script, "mixture_nll", noted) if honest else contextlib.nullcontext()

    def pass_of(self, scored) -> EvalPass:
        if not self.passes or self.passes[-1][0] is not scored:
            self.passes.append((scored, EvalPass(*torch.zeros(3, len(self.tokens) - 1, dtype=torch.float64))))
            self.last = None
        return self.passes[-1][1]

    def watch(self, scored_class):
        """Patches of Scored, for a `with` each."""
        commit, result = scored_class.commit, scored_class.result

        def noted_commit(scored, numbers, nll):
            self.commit(self.pass_of(scored), numbers.cpu(), nll.cpu())
            return commit(scored, numbers, nll)

        def noted_result(scored, name, *args):
            eval_pass = self.pass_of(scored)
            self.settle(eval_pass, self.pending)
            eval_pass.name, eval_pass.masses, self.pending, self.masses = name, eval_pass.masses + self.masses, [], []
            self.ends.append(self.count)
            return result(scored, name, *args)
        return mock.patch.multiple(scored_class, commit=noted_commit, result=noted_result)

    def settle(self, eval_pass: EvalPass, training_calls: list[Call]) -> None:
        eval_pass.extra_calls += sum(not call.same_windows(self.last) for call in training_calls)

    @torch.no_grad()
    def commit(self, eval_pass: EvalPass, numbers: Tensor, nll: Tensor) -> None:
        """Scores on their way into the sum: the last call must have made them, from the text before their targets."""
        done = self.audit.rt.rank * len(eval_pass.times) + eval_pass.times.sum()
        eval_pass.order[numbers] = done + torch.arange(len(numbers), dtype=torch.float64)
        eval_pass.nll.index_add_(0, numbers, nll.double())
        eval_pass.times.index_add_(0, numbers, torch.ones_like(nll, dtype=torch.float64))
        calls, self.pending = self.pending, []
        eval_pass.masses, self.masses = eval_pass.masses + self.masses, []
        self.settle(eval_pass, calls[:-1])
        self.last = calls[-1] if calls else None
        adapter = getattr(self.last and self.last.hook, "__self__", None)
        weights = (*self.audit.model.parameters(), *(adapter.trained if adapter else ()))
        eval_pass.weight_sums += [t.sum(dtype=torch.float64).item() for t in weights]
        runs = self.made(self.last, numbers, nll) if calls else []
        eval_pass.altered += len(nll) - sum(run.count for run in runs)
        eval_pass.misplaced += sum(run.count for run in runs if not run.in_place)
        eval_pass.temperatures += [self.last.temperature] if calls else []
        for gaps, model, hook in ((eval_pass.off, self.audit.model, self.last and self.last.hook),
                                   (eval_pass.foreign, self.audit.disk, None)):
            if self.looks and runs:
                gap = (own_scores(model, self.last, hook) - self.last.nll.double()).cpu()
                gap = torch.cat([gap[run.row, run.column:run.column + run.count] for run in runs])
                gaps.append(Gap(gap.abs().max().item(), gap.sum().item(), len(gap), eval_pass.calls))
        eval_pass.calls += 1

    def made(self, call: Call, numbers: Tensor, nll: Tensor) -> list[Run]:
        """Where in a call the scores stand that are committed: each row may have made a run of them, in this order."""
        runs, lead, done = [], call.ids.size(1) - call.wanted.size(1), 0
        for row, (ids, wanted, scores) in enumerate(zip(call.ids.cpu(), call.wanted.cpu(), call.nll.cpu())):
            best = Run(row, 0, 0, False)
            for column in (scores == nll[done]).nonzero().flatten().tolist() if done < len(nll) else ():
                most = min(len(scores) - column, len(nll) - done)
                equal = scores[column:column + most] == nll[done:done + most]
                equal &= numbers[done:done + most] == numbers[done] + torch.arange(most)
                count, first = int(equal.cumprod(0).sum()), int(numbers[done]) - column - lead  # first: the window's
                stop, text = lead + column + count, self.tokens[max(first, 0):]
                in_place = (first >= 0 and torch.equal(ids[:stop], text[:stop])
                            and torch.equal(wanted[column:column + count], text[stop - count + 1:stop + 1]))
                best = max(best, Run(row, column, count, in_place), key=lambda run: (run.in_place, run.count))
            runs += [best] * (best.count > 0)
            done += best.count
        return runs

    def mass(self, function, call: Call) -> float:
        """Probability of all words together in one place of one window of a call. Each is put there as target, and as
        input if a later target is scored; were a score made with knowledge of its token, they would not be 1 together.

        Every other time the place is the one whose predecessor stood in the window most often before: there a cache of
        earlier tokens would know most. Only rows of the batch that score alike to the last bit are compared.
        """
        keep, lead = call.wanted.size(1), call.ids.size(1) - call.wanted.size(1)
        row, place = (int(torch.randint(n, (1,), generator=self.random)) for n in (len(call.ids), max(keep - 1, 1)))
        if self.count % 2 == 0:
            text = call.ids[row]
            place = int((text[lead:, None] == text).tril(lead - 1).sum(1)[:max(keep - 1, 1)].argmax())
        ids, wanted = like(call.ids, call.ids[row]), like(call.wanted, call.wanted[row])
        with lent_to_all(call.hook, row):
            nll = function(ids, wanted, call.temperature, call.hook).detach()
            alike, total = (nll == nll[row]).all(1), 0.0
            alike[row] = True
            alike = alike.nonzero().flatten()
            for words in torch.arange(self.audit.cfg.vocab_size, device=ids.device).split(len(alike)):
                rows = alike[:len(words)]
                wanted[rows, place] = words
                if place + 1 < keep:
                    ids[rows, lead + place + 1] = words
                nll = function(ids, wanted, call.temperature, call.hook).detach()
                total += nll[rows, place].double().neg().exp().sum().item()
        return total


def own_scores(model, call: Call, hook) -> Tensor:
    """-log p of a call's targets in float64, from the logits of a model over the whole vocabulary."""
    logits = model.logits(model.hidden(call.ids, keep=call.wanted.size(1), hook=hook), hook=hook) / call.temperature
    return torch.stack([-row.double().log_softmax(-1).gather(1, targets[:, None])[:, 0]
                        for row, targets in zip(logits, call.wanted)])


@contextlib.contextmanager
def lent_to_all(hook, row: int):
    """Inside, every row of a batch has the additions of one, if an adapter keeps some for each."""
    adapter = getattr(hook, "__self__", None)
    moving = [t.data for t in adapter.trained] if getattr(adapter, "rows", 0) else []  # .data: a graph may wait for them
    kept = [t.clone() for t in moving]
    for tensor, before in zip(moving, kept):
        tensor.copy_(before[row].expand_as(tensor))
    yield
    for tensor, before in zip(moving, kept):
        tensor.copy_(before)


class Counts:
    """The audit's own back-off over what followed each context before: plain, one token after another. ngrams: ((in the
    whole text or in its document?, context length), concentration), growing."""

    def __init__(self, tokens: list[int], ngrams, bos_id: int):
        self.tokens, self.ngrams = tokens, ngrams
        self.document = list(itertools.accumulate(token == bos_id for token in tokens))
        self.followed = {}  # (document, length, context) -> token -> how often

    def contexts(self, i: int):
        """What followed the contexts of target i so far, each with its concentration, the shortest context first."""
        for (whole, length), concentration in self.ngrams:
            context = None if whole else self.document[i], length, *self.tokens[max(i + 1 - length, 0):i + 1]
            yield self.followed.setdefault(context, collections.Counter()), concentration

    def mix(self, i: int, p, words):
        """Probabilities of some words as target i, from the model's."""
        for counts, concentration in self.contexts(i):
            if counts:
                prior = concentration * len(counts)
                p = (np.array([counts[word] for word in words]) + prior * p) / (sum(counts.values()) + prior)
        return p

    def add(self, i: int) -> None:
        for counts, _ in self.contexts(i):
            counts[self.tokens[i + 1]] += 1


# ---- the audit -------------------------------------------------------------------------------------------------------
class Finding(NamedTuple):
    """One row of the table."""

    evaluation: str  # "all" or the key of a result: roundtrip, sliding, ttt
    check: str
    holds: bool
    evidence: str


class Audit:
    """All checks of one artifact by one script. `opened` has watched since before the script was imported."""

    def __init__(self, script, cfg, rt, path: str, opened: Opened, tokens: int = 0, positions: int = 6):
        stride = cfg.eval_stride or cfg.window
        chunk = min(cfg.ttt_chunk_tokens, max(4 * cfg.train_seq_len, stride))
        size = tokens or max(chunk * 5 // 2, cfg.window + 2 * stride)
        self.script, self.opened, self.path, self.positions, self.findings = script, opened, path, positions, []
        self.blob = rt.broadcast_object(read_artifact(path) if rt.rank == 0 else None)
        self.val = script.ValData.open(cfg, rt)
        self.tokenizer = SentencePieceProcessor(model_file=cfg.tokenizer_path)
        self.whole, sizes, self.shards = read_shards(cfg.data_path)
        self.same_text = np.array_equal(self.val.tokens.cpu().numpy(), self.whole)
        self.take_piece(size, sizes)
        if len(self.tokens) <= cfg.window + 1:
            raise AuditError(f"AUDIT_TOKENS={size}: the audit needs more than a window of {cfg.window} tokens of text")
        self.known = cfg.ttt_enabled and cfg.ttt_reset == "document" and getattr(cfg, "lengths_known", False)
        self.order = torch.arange(len(self.tokens) - 1, dtype=torch.float64)  # in which targets are scored, or as if
        documents, small = int((self.tokens == self.val.bos_id).sum()), {"ttt_chunk_tokens": chunk}
        if self.known:  # several batches, one after another
            small |= {"ttt_batch_docs": min(cfg.ttt_batch_docs, max(documents // 3, 1)), "ttt_warm_chains": 1}
            if getattr(cfg, "phased_ttt_num_phases", 0):  # a phase after each batch but the last, of several steps
                small |= {"phased_ttt_prefix_docs": max(documents * 2 // 3, cfg.phased_ttt_num_phases),
                          "global_ttt_chunk_tokens": min(cfg.global_ttt_chunk_tokens, cfg.doc_context)}
        else:
            small["ttt_doc_chunk_tokens"] = min(cfg.ttt_doc_chunk_tokens, max(len(self.tokens) // 8, 1))
        # small chunks, so that many borders cost little; no clock, for it adapts less
        self.cfg = dataclasses.replace(cfg, eval_max_seconds=0.0, **small)
        self.model, self.disk = (script.load_model(self.blob, rt, self.val.tokenizer_sha256) for _ in range(2))
        self.weights = {name: tensor.clone() for name, tensor in self.disk.state_dict().items()}
        self.random, self.rt = self.generator(), self.watched(rt)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.cfg.seed)

    def take_piece(self, size: int, sizes: np.ndarray | None) -> None:
        """The first `size` targets, cut between characters; without a document in them, one begins at two fifths."""
        def inside(i: int) -> bool:  # a character?
            if i == len(self.whole):
                return self.tokenizer.is_byte(int(self.whole[-1]))
            token = int(self.whole[i])
            return self.tokenizer.is_byte(token) and 0x80 <= int(self.tokenizer.id_to_piece(token)[3:-1], 16) < 0xC0

        self.stop = stop = next((i for i in range(min(size + 1, len(self.whole)), 0, -1) if not inside(i)), 0)
        bos, place = self.val.bos_id, next((i for i in range(stop * 2 // 5, stop) if not inside(i)), 0)
        planted = bos >= 0 and place > 1 and not (self.whole[2:stop] == bos).any()

        def piece(tensor: Tensor, value: int) -> Tensor:
            parts = (tensor[:place], tensor.new_tensor([value]), tensor[place:stop]) if planted else (tensor[:stop],)
            return torch.cat(parts)
        n, device = len(self.val.tokens), self.val.tokens.device
        self.tokens = piece(torch.from_numpy(self.whole.astype(np.int32)), bos).to(device)
        self.sizes = None if sizes is None else piece(torch.from_numpy(sizes.astype(np.int64)), 0)
        told = {f.name: getattr(self.val, f.name) for f in dataclasses.fields(self.val)}  # whatever goes by token
        told = {name: piece(value, 0) for name, value in told.items() if isinstance(value, Tensor) and len(value) == n}
        self.val = dataclasses.replace(self.val, **told | {"tokens": self.tokens})

    def watched(self, rt):
        """The runtime, silent, with a spy before the scoring function."""
        audit = self

        class Watched(type(rt)):
            def compiled(self, function, *args, **options):
                made = super().compiled(function, *args, **options)
                return audit.spy.scoring(made) if function == audit.model.nll else made
        given = {f.name: getattr(rt, f.name) for f in dataclasses.fields(rt)}
        return Watched(**given | {"log": self.script.RunLog(rt.folder, "audit", active=False)})

    # -- passes
    def scores(self, tokens: Tensor, looks: bool = False, probes=()) -> tuple[dict, dict[str, list[EvalPass]]]:
        """Results of `final_scores` over a text with the artifact's weights, and the passes that reported each."""
        self.model.load_state_dict(self.weights)
        self.model.requires_grad_(True)  # as it was read: another state could need another compiled graph
        self.spy = Spy(self, tokens, looks, set(probes))
        val = dataclasses.replace(self.val, tokens=tokens)
        with self.spy.watch(self.script.Scored), self.spy.mixing(self.script):
            results = self.script.final_scores(self.cfg, self.rt, self.model, val)
        ranks = everyone(self.rt, [each for _, each in self.spy.passes])
        passes = [EvalPass.joined(parts) for parts in zip(*ranks)]
        named = {key: [p for p in passes if p.name == result.name] for key, result in results.items()}
        mixed = everyone(self.rt, [scores.cpu() for scores in self.spy.mixed])[0]  # the first rank's alone
        if "ngram" in results:  # made of the last pass's scores
            named["ngram"] = [dataclasses.replace(passes[-1], nll=scores) for scores in mixed]
        return results, named

    def run(self) -> list[Finding]:
        try:
            self.all_checks()
        except self.script.IllegalScore as error:
            self.find("all", "score before update", False, str(error))
        self.files_are_known()
        return self.findings

    def all_checks(self) -> None:
        self.weights_are_the_artifact_s()
        self.text_is_whole()
        self.guard()
        results, passes = self.scores(self.tokens, looks=True)
        starts = [min(a + 1, b - 1) for a, b in zip(self.spy.ends, self.spy.ends[1:])]  # the first has but one window
        probes = [a + (b - a) * share // 5 for a, b in zip(starts, self.spy.ends[1:]) for share in (1, 2, 4)]
        again = [self.scores(self.tokens, probes=probes)[1], self.scores(self.tokens)[1]]
        size = self.decoded_bytes()
        if "ngram" in results:
            self.mixture(results["ngram"], passes["ngram"], list(passes.values())[-2], size)
        for key, result in results.items():
            if key == "ngram":
                continue
            self.sums(key, result, passes[key], size)
            if passes[key]:
                self.single_scores(key, passes[key][-1], again[0][key])
        equal = [passes, *again]
        if self.known and passes["ttt"]:
            self.order = passes["ttt"][-1].order
        positions = self.where_to_change()
        texts = [self.other_text(t) for t in positions]
        others = [self.scores(text)[1] for text in texts]
        changed = [(text != self.tokens)[1:].cpu() for text in texts]
        for key in [key for key in results if all(w[key] for w in (*equal, *others))]:
            order = self.order if key == "ttt" else torch.arange(len(self.order))
            before = [order < order[targets].min() for targets in changed]
            self.noise_and_causality(key, [w[key][-1] for w in equal], positions, before,
                                     [w[key][-1].nll for w in others])

    # -- checks
    def find(self, evaluation: str, check: str, holds: bool, evidence: str) -> None:
        self.findings.append(Finding(evaluation, check, bool(holds), evidence))

    def weights_are_the_artifact_s(self) -> None:
        kept = self.model.state_dict()
        other = [name for name in {**kept, **self.weights} if name not in kept or name not in self.weights
                 or not torch.equal(kept[name], self.weights[name])]
        self.find("all", "artifact is the only source of weights", not other,
                  f"not the file's: {', '.join(other[:5])}" if other else
                  f"{len(kept)} tensors bit for bit those of the file with sha256 {digest(self.blob)}")

    def files_are_known(self) -> None:
        own = [self.path, self.script.__file__, __file__, shell.__file__, self.cfg.tokenizer_path, *self.shards,
               os.path.join(self.cfg.data_path, "dataset.json")]
        foreign = sorted({name for names in everyone(self.rt, self.opened.foreign(own)) for name in names})
        self.find("all", "nothing else was read", not foreign, ", ".join(foreign[:5]) or f"{len(self.opened.read)} "
                  "files: the artifact, the script, the validation text, the tokenizer, the system's")

    def text_is_whole(self) -> None:
        self.find("all", "the text is the whole text", self.same_text,
                  f"{len(self.whole):,} tokens in {len(self.shards)} shards with sha256 {digest(self.whole.tobytes())}"
                  + "; the script reads others" * (not self.same_text))

    def guard(self) -> None:
        scored, refused = self.script.Scored(self.val, self.rt), False
        scored.times[1:] = self.rt.rank == 0
        try:
            scored.training_tokens(0, len(scored.times))
        except self.script.IllegalScore:
            refused = True
        self.find("all", "score before update", refused,
                  "the guard through which training tokens are taken refuses a chunk with a single unscored token")

    def sums(self, key: str, result, passes: list[EvalPass], size: int) -> None:
        """Checks of a result and the passes that reported it, of which there must be one."""
        eval_pass = passes[-1] if passes else EvalPass(*torch.zeros(3, len(self.tokens) - 1, dtype=torch.float64))
        targets, twice = len(eval_pass.times), int((eval_pass.times != 1).sum())
        once = not (twice or eval_pass.extra_calls or eval_pass.misplaced) and len(passes) == 1
        self.find(key, "each token scored once", once and result.tokens == targets,
                  f"{int(eval_pass.times.sum())} scores of {targets} targets in {len(passes)} pass(es), {twice} of "
                  f"them not once, {eval_pass.misplaced} out of place; {eval_pass.extra_calls} further calls of the "
                  "scoring function")
        total = eval_pass.nll.sum().item()
        self.find(key, "the sum is that of the scores", not eval_pass.altered and math.isclose(
            result.loss * result.tokens, total, rel_tol=1e-9), f"{result.loss * result.tokens:.6f} nats, single scores "
            f"{total:.6f}, {eval_pass.altered} of them not as the scoring function made them")
        self.find(key, "bytes are the decoded text's", result.bytes == size, f"{result.bytes} counted, {size} decoded")
        bpb = total / math.log(2) / size
        self.find(key, "bits per byte are nats / ln 2 / bytes", math.isclose(result.bpb, bpb, rel_tol=1e-9),
                  f"{result.bpb:.8f} reported, {bpb:.8f} computed")

    def single_scores(self, key: str, eval_pass: EvalPass, probed: list[EvalPass]) -> None:
        exact = not self.rt.compiles or self.rt.device.type == "cpu" and self.rt.dtype == torch.float32
        limits = (EXACT, EXACT) if exact else FUSED

        def close(gaps: list[Gap]) -> tuple[bool, str]:
            most, count = max((gap.most for gap in gaps), default=math.nan), max(sum(gap.count for gap in gaps), 1)
            mean = sum(gap.total for gap in gaps) / count
            return (most <= limits[0] and abs(mean) <= limits[1] + (0 if exact else 0.1 * count ** -0.5),
                    f"{most:.1e} nats apart at most, {mean:+.1e} on average")
        holds, how = close(eval_pass.off)
        temperatures = sorted(set(eval_pass.temperatures))
        holds = holds and temperatures == [self.cfg.ttt_temp if key == "ttt" else 1.0]
        self.find(key, "scores are -log softmax of the logits", holds,
                  f"{how}, at temperature {', '.join(f'{t:g}' for t in temperatures)}")
        holds, how = close([gap for gap in eval_pass.foreign if key != "ttt" or gap.call == 0])
        self.find(key, f"{'first batch is' if key == 'ttt' else 'all scores are'} the artifact's own", holds,
                  f"{how}, from a model just read from disk")
        masses = probed[-1].masses if probed else []
        worst = max((abs(mass - 1) for mass in masses), default=math.nan)
        self.find(key, "full-vocabulary normalisation", worst <= EXACT, f"probabilities of the {self.cfg.vocab_size} "
                  f"tokens in one place are 1 together, {worst:.1e} off at most in {len(masses)} places")

    def noise_and_causality(self, key: str, equal: list[EvalPass], positions: list[int], before: list[Tensor],
                            others: list[Tensor]) -> None:
        """Checks of three equal passes, and of one for each position over a text that differs from there on; `before`:
        which targets are scored before all that differ."""
        def difference(a: Tensor, b: Tensor) -> Tensor:  # [largest, root mean square]
            return torch.stack(((a - b).abs().max(), (a - b).square().mean().sqrt()))
        nll, dtype = equal[0].nll, self.rt.dtype
        noise = torch.stack([difference(a.nll, b.nll) for a, b in zip(equal, equal[1:] + equal[:1])]).amax(0)
        drift = any(each.weight_sums != equal[0].weight_sums for each in equal)
        said = lambda pair: "{:.1e} nats at most, {:.1e} root mean square".format(*pair)
        self.find(key, "repeatable", (noise <= noise.new_tensor(UNSTEADY[dtype])).all(),
                  f"three equal passes differ by {said(noise)}" + "; weights differ too" * drift)
        limit = (NOISE_FACTOR * noise).maximum(noise.new_tensor(FLIPS[dtype])) if drift or noise.any() else noise
        worst = torch.stack([difference(other[first], nll[first]) for first, other in zip(before, others)]).amax(0)
        unseen = sum(torch.equal(other[~first], nll[~first]) for first, other in zip(before, others))
        how = " in the order of scoring, ends of documents excepted" if self.known and key == "ttt" else ""
        self.find(key, "causality", (worst <= limit).all() and not unseen,
                  f"text changed from {', '.join(map(str, positions))} on{how}: scores before are "
                  + (f"off by {said(worst)}" if worst.any() else "bit-identical")
                  + f"; {unseen} changes did not show after it either" * bool(unseen))

    def mixture(self, result, passes: list[EvalPass], before: list[EvalPass], size: int) -> None:
        """Checks of the score that counts made of the pass before, against counts of the audit's own: at every place,
        of earlier tokens alone and in the order of the text."""
        targets, vocab, places = len(self.tokens) - 1, self.cfg.vocab_size, 0
        given = before[-1].nll.numpy() if before else np.zeros(targets)
        mixed = passes[-1].nll.numpy() if len(passes) == 1 else np.full(targets, np.nan)
        counts, own, worst = Counts(self.tokens.tolist(), self.cfg.ngrams, self.val.bos_id), np.zeros(targets), 0.0
        for i in range(targets):
            word = counts.tokens[i + 1]
            own[i] = -np.log(counts.mix(i, np.exp(-given[i:i + 1]), [word])[0])
            if i % max(targets // 300, 1) == 0:  # any distribution in which the target has the model's probability
                rest = np.full(vocab, (1 - np.exp(-given[i])) / (vocab - 1))
                rest[word] = np.exp(-given[i])
                p, places = counts.mix(i, rest, range(vocab)), places + 1
                worst = max(worst, abs(p.sum() - 1), abs(p[word] - np.exp(-mixed[i])))
            counts.add(i)
        off = np.abs(own - mixed).max()
        self.find("ngram", "counts are exact, of earlier tokens", off <= 1e-6, f"{off:.1e} nats apart at most from a "
                  f"plain count along the text, {own.sum() / given.sum() - 1:+.2%} nats on the whole")
        masses = [self.mixed_mass(place, given) for place in self.often_seen(max(2048 // vocab, 1))]
        worst = max(worst, *(abs(mass - 1) for mass in masses))
        self.find("ngram", "full-vocabulary normalisation", worst <= 1e-6, f"probabilities of the {vocab} tokens in "
                  f"one place are 1 together, {worst:.1e} off at most in {places} places by the audit's counts and "
                  f"{len(masses)} by the script's")
        total = mixed.sum()
        self.find("ngram", "the sum is that of the scores", result.tokens == targets and math.isclose(
            result.loss * result.tokens, total, rel_tol=1e-9), f"{result.loss * result.tokens:.6f} nats, single scores "
            f"{total:.6f}")
        bpb = total / math.log(2) / size
        told = size == result.bytes and math.isclose(bpb, result.bpb, rel_tol=1e-9)
        self.find("ngram", "bits per byte are nats / ln 2 / bytes", told,
                  f"{result.bpb:.8f} reported, {bpb:.8f} computed")

    def often_seen(self, count: int) -> list[int]:
        """Targets whose shortest context occurred most often before."""
        length, seen, times = self.cfg.ngrams[0][0][1], collections.Counter(), []
        for i in range(len(self.tokens) - 1):
            context = tuple(self.tokens[max(i + 1 - length, 0):i + 1].tolist())
            times.append(seen[context])
            seen[context] += 1
        return sorted(range(len(times)), key=lambda i: -times[i])[:count]

    def mixed_mass(self, place: int, given: np.ndarray) -> float:
        """Probability that the script's mixture has for all words together as one target, the model's being equal."""
        tokens, total = self.tokens[:place + 2].clone(), 0.0
        nll = torch.from_numpy(given[:place + 1].copy()).to(tokens.device)
        nll[place] = math.log(self.cfg.vocab_size)
        for word in range(self.cfg.vocab_size):
            tokens[place + 1] = word
            mixed = self.script.mixture_nll(tokens, nll, self.cfg.ngrams, self.val.bos_id)
            total += math.exp(-mixed[place].item())
        return total

    def where_to_change(self) -> list[int]:
        """Positions from which on to change the text: next to borders of chunks and documents, where training on a few
        tokens too many would show, and at random."""
        documents, last = self.cfg.ttt_enabled and self.cfg.ttt_reset == "document", len(self.tokens) - 1
        starts = (self.tokens[2:] == self.val.bos_id).nonzero().flatten().add(2).tolist()
        longest = max(zip([0, *starts], [*starts, last]), key=lambda span: span[1] - span[0])[0]
        chunk = longest + self.cfg.ttt_doc_chunk_tokens if documents else self.cfg.ttt_chunk_tokens
        near = [border + more for more in (2, 0) for border in (chunk, *starts[:1], 2 * chunk)]
        if self.known:  # late in the order of scoring: much comes before; and where the last document has just begun
            begins = int(max(self.order[start] for start in [0, *starts] if start < last))
            near = [int(self.order.argsort()[min(place, last - 1)]) + 1
                    for place in (last * 9 // 10, begins + 2, last // 2, last * 2 // 10)]
        anywhere = torch.randint(2, last, (self.positions,), generator=self.random).tolist()
        picked = [*near[:(self.positions + 1) // 2], *anywhere][:self.positions]
        return sorted({min(max(t, 2), last - 1) for t in picked})

    def other_text(self, t: int) -> Tensor:
        """The text with every token from position t on another one; documents may end anywhere. If their lengths are
        known they end where they did, and what changes is all that is scored with that token or after it."""
        tokens, size, bos = self.tokens.clone(), self.cfg.vocab_size, self.val.bos_id
        later = 1 + (self.order >= self.order[t - 1]).nonzero().flatten().to(tokens.device)  # token t is target t - 1
        tokens[later] = (tokens[later] + torch.randint(1, size, later.shape, generator=self.random).to(tokens)) % size
        if self.known:
            return tokens.where((tokens != bos) & (self.tokens != bos), self.tokens)
        if bos >= 0:
            tokens[t + 7::97] = bos
        return tokens

    def decoded_bytes(self) -> int:
        """Bytes of the piece after its first token: those the data set tells, or the tokenizer's own decoding of each
        document. A planted one adds none."""
        if self.sizes is not None:
            return int(self.sizes[1:].sum())
        ids, decode = self.whole[:self.stop].tolist(), self.tokenizer.decode
        starts = [i for i, token in enumerate(ids) if token == self.val.bos_id and i] if self.val.bos_id >= 0 else []
        first = 1 if self.tokenizer.is_byte(ids[0]) else len(decode(ids[:1]).encode())
        return sum(len(decode(ids[a:b]).encode()) for a, b in zip([0, *starts], [*starts, len(ids)])) - first

    def report(self, log, seconds: float) -> None:
        """Print the table; write it to the run's audit.txt and what it depends on to audit.json. log: its RunLog."""
        failed, rt = [f for f in self.findings if not f.holds], self.rt
        verdict, piece = "FAIL" if failed else "pass", self.tokens.cpu().numpy().astype("<u2").tobytes()
        body = json.dumps({
            "verdict": verdict, "findings": [f._asdict() for f in self.findings],
            "artifact_sha256": digest(self.blob), "code_sha256": digest(Path(self.script.__file__).read_bytes()),
            "tokenizer_sha256": digest(Path(self.cfg.tokenizer_path).read_bytes()),
            "whole_text_tokens": len(self.whole), "whole_text_sha256": digest(self.whole.tobytes()),
            "text_tokens": len(self.tokens), "text_sha256": digest(piece), "settings": self.cfg.non_defaults(),
            "world_size": rt.world_size, "device": str(rt.device), "dtype": str(rt.dtype), "compile": rt.compiles,
            "torch": torch.__version__, "seconds": round(seconds, 1)}, indent=1, default=str)
        wide = [max(len(finding[i]) for finding in self.findings) for i in (0, 1)]
        table = [f"audit of {self.path} by {self.script.__file__}: the first {len(self.tokens):,} of "
                 f"{len(self.whole):,} tokens, chunks of {self.cfg.ttt_chunk_tokens:,}, world size {rt.world_size}"]
        table += [f"  {'pass' if f.holds else 'FAIL'}  {f.evaluation:<{wide[0]}}  {f.check:<{wide[1]}}  {f.evidence}"
                  for f in self.findings]
        table += [f"audit:{verdict} checks:{len(self.findings)} failed:{len(failed)} "
                  f"signed:sha256:{digest(body.encode())} of {log.folder / 'audit.json'}"]
        if rt.rank == 0:
            log.write("audit.json", body)
            log.write("audit.txt", "\n".join([*table, ""]))
            print("\n".join(table), flush=True)


def everyone(rt, value) -> list:
    """Every rank's value, on every rank."""
    if rt.world_size == 1:
        return [value]
    values = [None] * rt.world_size
    dist.all_gather_object(values, value, group=rt.groups["cpu"])
    return values


def read_artifact(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise AuditError(f"cannot read artifact {path}: {error.strerror}") from None


# ---- command line ------------------------------------------------------------------------------------------------
def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UsageError."""
    parser = Parser(__doc__)
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--script", metavar="FILE", help="what scores it (default: the repository's train_gpt.py)")
    parser.add_argument("--tokens", metavar="N", help="length of the piece; 0, the default: two and a half chunks")
    parser.add_argument("--positions", metavar="N", help="from how many positions on to change it (default: 6)")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    args = parser.parse_intermixed_args(argv)
    environ = {**os.environ, **dict(pair.split("=", 1) for pair in args.settings if "=" in pair)}
    for name, default, least in (("script", ROOT / "train_gpt.py", None), ("tokens", 0, 0), ("positions", 6, 1)):
        text = getattr(args, name) or environ.get(f"AUDIT_{name.upper()}") or str(default)
        if least is not None and not (text.isdecimal() and int(text) >= least):
            raise UsageError(f"AUDIT_{name.upper()}={text} is not a whole number from {least} on")
        setattr(args, name, text if least is None else int(text))
    return args


def settings_of(script, args: argparse.Namespace):
    """The settings that the audited script would score the artifact with. Raises UsageError and the script's own."""
    names = [name for f in dataclasses.fields(script.Hyperparameters) for name in script.env_names(f)]
    settings, rest = take_settings(args.settings, [*names, *AUDIT])
    if rest:
        raise UsageError(f"{rest[0]!r} is not KEY=VALUE")
    return script.settings_from({**os.environ, **settings, "EVAL_ARTIFACT": args.artifact})


def run_of(artifact: str, cfg) -> tuple[Path, str]:
    """ARTIFACT_DIR and RUN_ID of the run that the audit belongs to."""
    folder = Path(artifact).resolve().parent
    if not cfg.run_id and folder.parent.name == "runs":
        return folder.parent.parent, folder.name
    return Path(cfg.artifact_dir), cfg.run_id or Path(artifact).stem


def audit(args: argparse.Namespace, script, opened: Opened) -> None:
    """From settings to files. Raises AuditError if a check fails."""
    begun, cfg = time.perf_counter(), settings_of(script, args)
    log = script.RunLog(*run_of(args.artifact, cfg))
    with tempfile.TemporaryDirectory() as folder:  # for the logs of the script
        rt = script.Runtime.open(dataclasses.replace(cfg, artifact_dir=folder, run_id="audit", resume=False))
        try:
            if rt.device.type == "cuda":  # the less equal passes differ, the smaller the cheats that show
                warnings.filterwarnings("ignore", message=".*deterministic")
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.utils.deterministic.fill_uninitialized_memory = False
            auditor = Audit(script, cfg, rt, args.artifact, opened, args.tokens, args.positions)
            failed = [f"{f.check} ({f.evaluation})" for f in auditor.run() if not f.holds]
            auditor.report(log, time.perf_counter() - begun)
            rt.agree(0.0)  # no rank leaves before the first has written its files
        finally:
            rt.close()
    if failed:
        raise AuditError(f"the audit failed: {', '.join(failed)}; such a score does not count")


@one_line_errors
def main(argv: list[str]) -> int:
    args, opened = parse(argv), Opened()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products, before CUDA starts
    with opened:
        audit(args, import_script(Path(args.script)), opened)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
