"""Runs as they can be read from files: a folder runs/RUN_ID of ours, or the log of a published script."""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shell import UsageError

# Phases of a run that end in a score, in their order, and how published logs call them (the last match counts).
PHASES = {"pre_quant": r"DIAGNOSTIC post_\w+|(?:diagnostic )?pre-quantization post-ema",
          "roundtrip": r"final_(?:int(?!8_zlib_roundtrip)\w[\w+]*|waterfill)_roundtrip|(?:diagnostic )?quantized",
          "sliding": r"final_(?:int\w[\w+]*|waterfill)_sliding_window|quantized_sliding_window",
          "ttt": r"legal_ttt(?:_hash)?|quantized_ttt\w*|lora_ttt_eval|final_(?:int8_)?ttt_lora",
          "ngram": r"\S+_ngram"}
ONLY = {"roundtrip": r"final_int8_zlib_roundtrip"}  # the name of the first scripts; of later ones, an alias
SINGLE_NUMBERS = {"total_bytes": r"Total submission size(?: \S+)?: (\d+) bytes",  # field of a run -> its line
                  "artifact_bytes": r"Serialized model \S*\+\S*: (\d+) bytes",
                  "val_tokens": r"(?:val_loader:.* tokens:|val_tokens: ?)(\d+)",
                  "peak_mib": r"peak memory (?:allocated|resident): (\d+) MiB"}
HOME = ("ARTIFACT_DIR", "OUT_DIR")
STAMP = r"^(?:\d{10}\.\d{3} )?"  # PR 1610's logs begin each line with the time


@dataclass
class Run:
    """What is known of a run. Seconds are those of training; None, or an empty list: the log does not say."""

    name: str
    path: Path
    settings: dict[str, object] = field(default_factory=dict)
    state: str = ""                                  # running, done, failed or stopped
    why: str = ""
    begun: float | None = None                       # seconds since 1970
    steps: list[tuple[int, float, float]] = field(default_factory=list)         # step, seconds, loss
    lr_scales: list[tuple[int, float, float]] = field(default_factory=list)     # step, seconds, scale
    validations: list[tuple[int, float, float]] = field(default_factory=list)   # step, seconds, bits per byte
    bpb: dict[str, float] = field(default_factory=dict)                         # phase -> bits per byte
    loss: dict[str, float] = field(default_factory=dict)                        # phase -> nats per token
    seconds: dict[str, float] = field(default_factory=dict)                     # phase -> seconds
    total_bytes: int | None = None
    artifact_bytes: int | None = None
    val_tokens: int | None = None
    peak_mib: int | None = None                                                 # of memory
    ledger: list[dict] = field(default_factory=list)                            # rows of train_gpt.LedgerRow
    traces: dict = field(default_factory=dict)                                  # eval.json
    audit: str = ""                                                             # pass or FAIL

    @property
    def last_phase(self) -> str:
        """Of those that have a score."""
        return next((phase for phase in reversed(PHASES) if phase in self.bpb), "")

    @property
    def score(self) -> float | None:
        """Of the last phase that has one."""
        return self.bpb.get(self.last_phase)

    @property
    def step_times(self) -> list[tuple[int, float, float]]:
        """(step, seconds, milliseconds of each step since the line before)."""
        pairs = zip(self.steps, self.steps[1:])
        return [(b[0], b[1], round(1000 * (b[1] - a[1]) / (b[0] - a[0]), 6)) for a, b in pairs if b[0] > a[0]]

    @property
    def train_seconds(self) -> float:
        return max((s for _, s, _ in [*self.steps, *self.validations]), default=0.0)


def home(environ: Mapping[str, str]) -> Path:
    """The folder that runs/ and sweeps/ are in."""
    return Path(next(filter(None, map(environ.get, HOME)), "."))


def read_text(path: Path) -> str:
    """Raises UsageError: no such file, or no UTF-8 text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None


def read_json(path: Path) -> dict:
    """Raises UsageError: no such file, or no JSON object."""
    try:
        found = json.loads(read_text(path))
        assert isinstance(found, dict)
        return found
    except (ValueError, AssertionError):
        raise UsageError(f"{path} is not JSON, as a run writes it") from None


def read(path: Path) -> Run:
    """A run by its folder, its log or its events. Raises UsageError if there is no run in them."""
    if path.is_dir():
        path = path / "events.jsonl"
    events = beside(path, "events.jsonl")
    if events.is_file() and path.suffix in (".jsonl", ".txt"):
        return read_events(events.resolve())
    return read_published(path)


def beside(log: Path, name: str) -> Path:
    """A file of the run whose log or events these are: in runs/RUN_ID/, or a link in logs/ by the name of the run."""
    if log.name in ("log.txt", "events.jsonl"):
        return log.with_name(name)
    return log.with_name(log.stem + {"log.txt": ".txt", "events.jsonl": ".jsonl"}.get(name, f".{name}"))


def name_of(log: Path) -> str:
    """The RUN_ID of a log, or of events."""
    return log.parent.name if log.name in ("log.txt", "events.jsonl") else log.stem


def find(name: str, folder: Path) -> Run:
    """A run by what a user calls it: RUN_ID, or a path. Raises UsageError."""
    ours = folder / "runs" / name
    if "/" not in name and ours.is_dir():
        return read(ours)
    if not Path(name).exists():
        raise UsageError(f"no run {name!r} in {folder / 'runs'}, and no such file (bash run.sh runs lists them)")
    return read(Path(name))


def all_runs(folder: Path) -> list[Run]:
    """The runs below an ARTIFACT_DIR, the oldest first."""
    found = [read_events(path) for path in (folder / "runs").glob("*/events.jsonl")]
    return sorted(found, key=lambda run: run.begun or 0)


# ---- ours --------------------------------------------------------------------------------------------------
def parse_lines(path: Path) -> list[dict]:
    """The events of a file; a line that a killed run left half written is passed over. Raises UsageError."""
    events = []
    for line in read_text(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            events.append(event)
    if not events:
        raise UsageError(f"{path} has no event of a run")
    return events


PLACES = {"post_average": "pre_quant", "_roundtrip": "roundtrip", "_sliding_window": "sliding", "legal_ttt": "ttt",
          "_ngram": "ngram"}  # how the names of our evaluations end


def read_events(path: Path) -> Run:
    """runs/RUN_ID/events.jsonl and what lies beside it (of an older version: logs/RUN_ID.jsonl)."""
    run = Run(name_of(path), path)
    process, steps, lr_scales, validations = {}, {}, {}, {}
    for event in parse_lines(path):
        kind = event["event"]
        if kind == "settings":
            run.settings, process, run.why = event["all"], event, ""
            run.begun = run.begun or event["time"]
        elif kind == "train":  # by step: a resumed run repeats those since its checkpoint
            steps[event["step"]] = event["step"], event["train_time_s"], event["train_loss"]
            lr_scales[event["step"]] = event["step"], event["train_time_s"], event.get("lr_scale")
        elif kind == "validation":
            validations[event["step"]] = event["step"], event["train_time_s"], event["val_bpb"]
        elif kind == "evaluation":
            phase = next((PLACES[end] for end in PLACES if event["name"].endswith(end)), None)
            if phase:
                run.bpb[phase], run.loss[phase] = event["bpb"], event["loss"]
                run.seconds[phase] = event["seconds"]
        elif kind == "artifact":
            run.total_bytes, run.artifact_bytes = event["bytes"] + event["code_bytes"], event["bytes"]
            keys = "stream codec values raw_bytes entropy_bytes packed_bytes".split()
            run.ledger = [dict(zip(keys, row)) for row in event["ledger"]]
        elif kind == "failed":
            run.why = event["why"]
    run.steps, run.lr_scales, run.validations = ([rows[step] for step in sorted(rows)]
                                                 for rows in (steps, lr_scales, validations))
    run.state = state_of(run, process, beside(path, "log.txt"))
    if beside(path, "eval.json").is_file() and run.state == "done":
        run.traces = read_json(beside(path, "eval.json"))
    if beside(path, "audit.json").is_file():
        run.audit = read_json(beside(path, "audit.json")).get("verdict", "")
    return run


def state_of(run: Run, process: dict, log: Path) -> str:
    if run.why:
        return "failed"
    text = "\n" + read_text(log) if log.is_file() else ""
    if text.rfind("\nsummary: ") > text.rfind("\nsettings other than the defaults: "):
        return "done"
    if process.get("host") == os.uname().nodename:
        alive = Path(f"/proc/{process['pid']}").exists() if Path("/proc").exists() else True
    else:
        alive = log.is_file() and time.time() - log.stat().st_mtime < 600
    return "running" if alive else "stopped"


# ---- published ---------------------------------------------------------------------------------------------
def read_published(path: Path) -> Run:
    """The log of a published script. Raises UsageError if it has none of the lines they share."""
    run = parse(read_text(path))
    run.name, run.path = path.stem if path.parent.name in ("", "logs", ".") else f"{path.parent.name}/{path.stem}", path
    if not run.steps and not run.bpb:
        raise UsageError(f"{path} has no line of a run that is known: no train_loss, no val_bpb with its eval_time")
    run.state = "done" if run.bpb else "stopped"
    return run


def parse(text: str, batch_tokens: int = 0) -> Run:
    """What a log says by the lines that published scripts share. batch_tokens: of a step, where it does not say."""
    run = Run("", Path())
    all_of = lambda pattern: re.findall(STAMP + pattern, text, re.MULTILINE)
    for name, value in all_of(r"  (\w+): (.*)$") + all_of(r"(seed):(\d+)"):
        run.settings[name] = value
    for key, value in re.findall(r"\b(train_batch_tokens|iterations|train_seq_len|warmup_steps):(\d+)", text):
        run.settings.setdefault(key, value)
    batch = float(run.settings.get("train_batch_tokens") or batch_tokens)
    run.steps = [(int(step), float(ms) / 1000, float(loss)) for step, loss, ms in
                 all_of(r"step:(\d+)/\d+ train_loss:(\S+) train_time:([\d.]+)ms")]
    run.steps += [(int(step), int(step) * batch / float(speed) if batch else 60 * float(minutes), float(loss))
                  for step, loss, minutes, speed in
                  all_of(r"(\d+)/\d+ train_loss: (\S+) train_time: ([\d.]+)m tok/s: ([\d.]+)")]
    at = {step: seconds for step, seconds, _ in run.steps} | {0: 0.0}
    run.validations = [(int(step), float(ms) / 1000 if ms else at.get(int(step), max(at.values())), float(bpb))
                       for step, bpb, ms in all_of(r"(?:step:)?(\d+)/\d+ val_loss: ?\S+ val_bpb: ?([\d.]+)"
                                                   r"(?: train_time:([\d.]+)ms)?")]
    for phase, names in [*ONLY.items(), *PHASES.items()]:
        for loss, bpb, ms in all_of(rf"(?:{names}) val_loss:(\S+) val_bpb:([\d.]+)(?: stride:\d+)? eval_time:(\d+)ms"):
            run.loss[phase], run.bpb[phase], run.seconds[phase] = float(loss), float(bpb), int(ms) / 1000
        for loss, bpb in all_of(rf"(?:{names})_exact val_loss:(\S+) val_bpb:([\d.]+)"):
            run.loss[phase], run.bpb[phase] = float(loss), float(bpb)
    for name, pattern in SINGLE_NUMBERS.items():
        found = all_of(pattern)
        setattr(run, name, int(found[-1]) if found else None)
    return run
