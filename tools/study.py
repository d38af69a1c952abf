"""A study of settings: which runs it consists of, and what became of each, in a file that several processes share.

The engine is Optuna's: its samplers, its median pruner and its journal, a file that is only ever appended to.
"""
from __future__ import annotations

import itertools
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from shell import UsageError, optional

# Settings that are lists: their alternatives stand between slashes.
LISTS = ("TTT_LORA_TARGETS", "TTT_LORA_LAYERS", "TTT_LORA_LAYER_RATES", "TTT_CHUNK_LADDER",
         "TTT_SHORT_SCORE_FIRST_STEPS", "TRAIN_SEQ_SCHEDULE", "VE_LAYERS", "NGRAM_ORDERS", "NGRAM_CONCENTRATIONS",
         "CONTROL_TENSOR_NAME_PATTERNS", "FP16_KEEP_NAME_PATTERNS", "INT8_KEEP_FLOAT_FP32_NAME_PATTERNS")
HOST = os.uname().nodename
GRACE_SECONDS = 30  # a lock older than this is of a killed process


@dataclass(frozen=True)
class Range:
    """Numbers from low to high for the TPE sampler: whole ones if both are, in logarithms over a decade or more."""

    low: float
    high: float

    @property
    def log(self) -> bool:
        return 0 < 10 * self.low <= self.high


def read_axis(key: str, text: str) -> list[str] | Range:
    """`a,b,c`, `a,b/c,d` where values are lists, or `low..high`."""
    ends = re.fullmatch(r"([-+.\de]+?)\.\.([-+.\de]+)", text)
    if ends:
        try:
            low, high = (int(end) if re.fullmatch(r"-?\d+", end) else float(end) for end in ends.groups())
        except ValueError:
            raise UsageError(f"{key}={text}: the ends of a range are numbers") from None
        if not low < high:
            raise UsageError(f"{key}={text}: a range goes up")
        return Range(low, high)
    return text.split("/" if key in LISTS else ",")


def grid(axes: dict[str, list[str]]) -> list[dict[str, str]]:
    """Every combination of values, the last key changing fastest."""
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def optuna():
    library = optional("optuna", "a sweep")
    library.logging.set_verbosity(library.logging.ERROR)
    return library


class Study:
    """Trials of the settings in `axes`. sampler: grid, each combination once, or tpe, `trials` in all; `fixed`: what
    all trials have in common, also those of an earlier process. Raises UsageError."""

    def __init__(self, path: Path, axes: dict[str, list[str] | Range], sampler: str = "grid", trials: int = 0,
                 prune: bool = False, seed: int = 0, fixed: dict[str, str] | None = None):
        self.axes, self.path, self.lock = axes, path, threading.Lock()
        self.trials = trials if sampler == "tpe" else 0
        library = optuna()
        storages, self.states = library.storages, library.trial.TrialState
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.guarded():
            backend = storages.journal.JournalFileBackend(
                str(path), lock_obj=storages.journal.JournalFileOpenLock(str(path), grace_period=GRACE_SECONDS))
            self.study = library.create_study(
                storage=storages.JournalStorage(backend), study_name="sweep", load_if_exists=True,
                sampler=library.samplers.TPESampler(seed=seed, constant_liar=True) if sampler == "tpe"
                else library.samplers.RandomSampler(),  # of a grid, every trial is in the queue
                pruner=library.pruners.MedianPruner(n_startup_trials=4) if prune else library.pruners.NopPruner())
            self.require_the_same(fixed or {})
            self.requeue_the_dead()
            for changes in grid(axes) if sampler == "grid" else ():
                self.study.enqueue_trial(changes, {"queued": changes}, skip_if_exists=True)

    def guarded(self):
        return Guard(self.path)

    def require_the_same(self, fixed: dict[str, str]) -> None:
        before = self.study.user_attrs.get("fixed")
        if before is None:
            self.study.set_user_attr("fixed", fixed)
        elif before != fixed:
            key = min(key for key in before.keys() | fixed.keys() if before.get(key) != fixed.get(key))
            raise UsageError(f"{self.path.parent} is a sweep with {key}={before.get(key, '')}, not "
                             f"{key}={fixed.get(key, '')}; --name begins another one")

    def requeue_the_dead(self) -> None:
        """Trials of processes of this machine that are no more begin again."""
        for trial in self.study.get_trials(states=[self.states.RUNNING]):
            host, _, pid = trial.user_attrs.get("process", "").rpartition(":")
            if host == HOST and not Path(f"/proc/{pid}").exists():
                self.end(trial.number, why="its process was killed", again=trial.user_attrs.get("attempt", 1))

    def take(self):
        """The next trial, with its settings as `trial.params`, or None. For several threads and machines."""
        with self.lock, self.guarded():
            while True:
                waiting = self.study.get_trials(deepcopy=False, states=[self.states.WAITING])
                counted = [t for t in self.study.get_trials(deepcopy=False) if not t.user_attrs.get("again")]
                if not waiting and len(counted) >= self.trials:
                    return None
                trial = self.study.ask()
                if self.trials or self.holds(trial):
                    break
                self.study.tell(trial, state=self.states.FAIL)  # another process was faster, or it is not wanted now
            trial.set_user_attr("process", f"{HOST}:{os.getpid()}")
            for key, axis in self.axes.items() if self.trials else ():
                if isinstance(axis, list):
                    trial.suggest_categorical(key, axis)
                elif isinstance(axis.low, int) and isinstance(axis.high, int):
                    trial.suggest_int(key, axis.low, axis.high, log=axis.log)
                else:
                    trial.suggest_float(key, axis.low, axis.high, log=axis.log)
            return trial

    def hopeless(self, trial, step: int, value: float) -> bool:
        """After a validation: is it worse than the median of the others at this step?"""
        with self.lock, self.guarded():
            trial.report(value, step)
            return trial.should_prune()

    def done(self, trial, value: float, pruned: bool = False, **facts) -> None:
        with self.lock, self.guarded():
            for key, fact in facts.items():
                trial.set_user_attr(key, fact)
            self.study.tell(trial, None if pruned else value,
                            self.states.PRUNED if pruned else self.states.COMPLETE)

    def failed(self, trial, why: str) -> bool:
        """Marks it; the first failure of a trial puts it into the queue again. Returns whether it does."""
        with self.lock, self.guarded():
            attempt = trial.user_attrs.get("attempt", 1)
            self.end(trial.number, why, attempt + 1 if attempt == 1 else 0)
            return attempt == 1

    def end(self, number: int, why: str, again: int) -> None:
        """A trial without a result; `again`: the attempt that follows, or 0."""
        trial = self.study.get_trials()[number]
        handle = optuna().trial.Trial(self.study, trial._trial_id)
        handle.set_user_attr("why", why)
        handle.set_user_attr("again", again)
        self.study.tell(number, state=self.states.FAIL)
        if again:
            settings = settings_of(trial)
            self.study.enqueue_trial(settings, {"queued": settings, "attempt": again})

    def trials_by_state(self) -> list:
        """All that count: not those which began again, or were one too many."""
        with self.lock, self.guarded():
            return [trial for trial in self.study.get_trials()
                    if not trial.user_attrs.get("again") and self.holds(trial)]

    def holds(self, trial) -> bool:
        """Is it one of the axes as they are now? An earlier process may have had other values."""
        settings = settings_of(trial)
        return settings.keys() == self.axes.keys() and all(
            isinstance(axis, Range) or settings[key] in axis for key, axis in self.axes.items())


def settings_of(trial) -> dict[str, str]:
    return trial.params or trial.user_attrs.get("queued", {})


class Guard:
    """Errors of the journal as one line."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise UsageError(f"study file {self.path}: {error.strerror or error}") from None
        if isinstance(error, (ValueError, KeyError, AssertionError, RuntimeError)):
            raise UsageError(f"study file {self.path} is damaged or locked ({type(error).__name__}: {error}); "
                             "move it away to begin anew") from None
