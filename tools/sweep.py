"""Runs, or scores of an artifact, with each combination of some settings: a table with p-values, and a picture.

    bash run.sh sweep smoke LEAKY_SLOPE=0.3,0.5,0.75 SEED=1,2,3            # every combination (grid), a run each
    bash run.sh sweep smoke MATRIX_LR=0.01..0.1 --sampler tpe --trials 30  # what looks best so far is tried next
    bash run.sh sweep profiles/sweeps/slope.toml --jobs 8
    bash run.sh sweep final_model.ptz TTT_LORA_RANK=2,4,8 --tokens 100000  # test-time training of one artifact
    bash run.sh sweep profiles/sweeps/lora_rank.toml final_model.ptz       # the same of a file's table

Alternatives stand between commas, those of settings that are lists themselves between slashes (VE_LAYERS=1,2/2,3); a
range for the TPE sampler is low..high. Everything lies in sweeps/NAME/ in ARTIFACT_DIR, the runs in runs/NAME.VALUES/.
The same command goes on where an earlier one was stopped, from its runs' checkpoints; on several machines with one file
system it shares the work. A run that fails is tried once more. --prune ends runs that validate worse than the
median at the same step (tpe: always). The table's first combination is the baseline: p is two-sided, of equal means
(Welch).

Of an artifact, settings of the evaluation and SEED can vary; those that it does not have itself are a profile's, named
beside it or else this machine's. --tokens and --start score a part of the validation text only.

FILE.toml: profile = "smoke"; artifact, sampler, trials, jobs, prune, name, tokens, start as above; [settings] that all
runs share; [sweep] with lists of values, or ranges as texts ("0.01..0.1").
"""
from __future__ import annotations

import argparse
import csv
import ctypes
import dataclasses
import fcntl
import hashlib
import io
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
import benchlib  # noqa: E402
import charts  # noqa: E402
import profiles  # noqa: E402
import runlog  # noqa: E402
import shell  # noqa: E402
import stats  # noqa: E402
import study  # noqa: E402
import tiny  # noqa: E402

NAMES = [name for f in dataclasses.fields(tg.Hyperparameters) for name in tg.env_names(f)]
OF_ARTIFACTS = {"SEED", *(name for f in tg.settings_by_section()["Evaluation"] for name in tg.env_names(f))}
OF_DATA = {"DATA_PATH", "TOKENIZER_PATH", "VOCAB_SIZE"}
SAMPLERS = ("grid", "tpe")
POLL_SECONDS = 1.0
RESERVED = {"RUN_ID", "ARTIFACT_DIR", "OUT_DIR", "RESUME", "PROFILE", "CODE_BYTES", "EVAL_ARTIFACT"}


# ---- what is swept -----------------------------------------------------------------------------------------
@dataclasses.dataclass
class Plan:
    profile: str
    settings: dict[str, str]                            # that all runs share
    axes: dict[str, list[str] | study.Range]
    name: str = ""
    sampler: str = "grid"
    trials: int = 0
    jobs: int = 1
    prune: bool = False
    artifact: str = ""                                  # score this one, instead of training
    tokens: int = 0                                     # of the validation text; 0: all
    start: int = 0

    def check(self) -> None:
        """Every combination, before anything runs. Raises UsageError, and UserError of the settings."""
        for key in [*self.settings, *self.axes]:
            if key in RESERVED:
                raise shell.UsageError(f"{key} is what a sweep sets itself")
            if key not in [*NAMES, *shell.OF_RUN_SH] and not key.startswith(shell.OTHERS):
                raise shell.unknown(key, NAMES)
        if not all(self.axes.values()) or not self.axes:
            raise shell.UsageError("nothing varies: a sweep needs KEY=a,b or a range KEY=low..high")
        self.check_sampler()
        self.check_artifact()
        for option, least in (("jobs", 1), ("tokens", 0), ("start", 0)):
            if getattr(self, option) < least:
                raise shell.UsageError(f"--{option} {getattr(self, option)} is out of range: {least} or more")
        for changes in self.ends():
            window = self.configuration(changes).window
            if 0 < self.tokens < window:
                raise shell.UsageError(f"--tokens {self.tokens} is less than a window of {window}")

    def check_sampler(self) -> None:
        ranges = [key for key, axis in self.axes.items() if isinstance(axis, study.Range)]
        if self.sampler not in SAMPLERS:
            raise shell.UsageError(f"sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.sampler == "grid" and ranges:
            raise shell.UsageError(f"{ranges[0]} is a range, which needs --sampler tpe")
        if self.sampler == "grid" and self.trials:
            raise shell.UsageError("--trials is for --sampler tpe: a grid has every combination once")
        if self.sampler == "tpe" and (self.trials < 1 or "SEED" in self.axes):
            raise shell.UsageError("--sampler tpe needs --trials N, and one SEED")

    def check_artifact(self) -> None:
        fixed = [key for key in self.axes if key not in OF_ARTIFACTS]
        if self.artifact and fixed:
            raise shell.UsageError(f"{fixed[0]} cannot vary over an artifact: it is no setting of the evaluation")
        if self.artifact and "SCALE" in self.settings:
            raise shell.UsageError("SCALE shrinks a model before training; an artifact has its size")
        if not self.artifact and (self.tokens or self.start):
            raise shell.UsageError("--tokens and --start are for sweeps of an artifact")

    def ends(self) -> list[dict[str, str]]:
        """Every combination, of a range both ends."""
        return study.grid({key: axis if isinstance(axis, list) else [str(axis.low), str(axis.high)]
                           for key, axis in self.axes.items()})

    def configuration(self, changes: dict[str, str]) -> tg.Hyperparameters:
        """The settings of a run, as run.sh makes them. Raises UsageError, UserError."""
        profile, given = profiles.load(self.profile), {**self.settings, **changes}
        if self.artifact:
            own = {key: value for key, value in profiles.variables(profile, given).items() if key not in OF_DATA}
            return tg.settings_from({**own, **given, "EVAL_ARTIFACT": self.artifact})
        if "SCALE" in given:
            given |= {key: value for key, value, _ in tiny.shrunk(given["SCALE"], profile, given)}
        return profiles.settings(profile, given)

    def fixed(self) -> dict[str, str]:
        """What makes runs those of this sweep: all but the values that vary."""
        found = {"profile": self.profile, **self.settings}
        if self.artifact:
            digest = hashlib.sha256(tg.read_file(self.artifact)).hexdigest()
            found |= {"artifact": digest[:12], "tokens": str(self.tokens or "all"), "start": str(self.start)}
        return found

    def title(self) -> str:
        """The name, or one that the same sweep has again."""
        text = repr((sorted(self.fixed().items()), self.axes, self.sampler))
        what = Path(self.artifact).stem if self.artifact else self.profile
        return self.name or f"{what}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def read_toml(path: Path) -> Plan:
    try:
        import tomllib
    except ImportError:
        raise shell.UsageError("sweep files need Python 3.11 or newer") from None
    try:
        given = tomllib.loads(runlog.read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise shell.UsageError(f"{path} is not TOML: {error}") from None
    unlike = [key for key in ("settings", "sweep") if not isinstance(given.get(key, {}), dict)]
    if unlike:
        raise shell.UsageError(f"{path}: {unlike[0]} is not a table: [{unlike[0]}] and lines of KEY = value below it")
    as_text = lambda value: str(int(value) if isinstance(value, bool) else value)
    settings = {key: as_text(value) for key, value in given.pop("settings", {}).items()}
    axes = {key: [as_text(value) for value in values] if isinstance(values, list) else study.read_axis(key, str(values))
            for key, values in given.pop("sweep", {}).items()}
    kinds = {f.name: {"str": str, "int": int, "bool": bool}.get(f.type, ()) for f in dataclasses.fields(Plan)}
    for key, value in given.items():
        if not isinstance(value, kinds.get(key, ())):
            raise shell.UsageError(f"{path}: {key} = {value!r} is not understood (python tools/sweep.py --help)")
    return Plan(given.pop("profile", ""), settings, axes, **{"name": path.stem, **given})


def plan_of(args: argparse.Namespace, given: dict[str, str], environ: Mapping[str, str]) -> Plan:
    """From the arguments, over those of a file, over settings in the environment."""
    files = [word for word in args.what if word.endswith(".toml")]
    artifacts = [word for word in args.what if word.endswith((".ptz", ".pt"))]
    named = [word for word in args.what if word not in files + artifacts]
    if max(map(len, (files, artifacts, named))) > 1:
        raise shell.UsageError(f"{' '.join(args.what)}: a sweep is of one profile, one file, one artifact")
    plan = read_toml(Path(files[0])) if files else Plan("", {}, {})
    here = {key: value for key, value in environ.items() if key in NAMES and key not in {*RESERVED, *plan.axes}}
    plan.settings = {**here, **plan.settings}
    for key, text in given.items():
        axis = study.read_axis(key, text) if key in NAMES else [text]
        plan.settings.pop(key, None), plan.axes.pop(key, None)
        if isinstance(axis, list) and len(axis) == 1:
            plan.settings[key] = axis[0]
        else:
            plan.axes[key] = axis
    options = {key: value for key, value in vars(args).items() if key != "what" and value is not None}
    plan = dataclasses.replace(plan, **options, **({"artifact": artifacts[0]} if artifacts else {}))
    profile = (named or [plan.profile or ("default" if gpus_here(environ) else "smoke")])[0]
    return dataclasses.replace(plan, profile=profile)


# ---- runs --------------------------------------------------------------------------------------------------
def die_with_parent() -> None:
    """A sweep that is killed takes its runs along: they go on when it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Sweep:
    """command: what runs one, given a profile and KEY=VALUE."""

    def __init__(self, plan: Plan, folder: Path, command: list[str]):
        self.plan, self.folder = plan, folder
        others = {key: value for key, value in plan.settings.items() if key.startswith(shell.OTHERS)}
        self.environ = {**os.environ, **others}  # a job has its share of what CUDA_VISIBLE_DEVICES names
        self.shared = {key: value for key, value in plan.settings.items() if key not in others}
        scores = ["eval", str(Path(plan.artifact).resolve())] if plan.artifact else []
        self.command = [*command, *scores, plan.profile]
        self.place = folder / "sweeps" / plan.title()
        self.study = study.Study(self.place / "study.journal", plan.axes, plan.sampler, plan.trials,
                                 plan.prune or plan.sampler == "tpe", fixed=plan.fixed())
        self.stop, self.error, self.tables = threading.Event(), None, threading.Lock()
        first = plan.configuration(plan.ends()[0])
        self.gpus = gpus_here(self.environ) if first.device != "cpu" else []
        if plan.tokens or plan.start:
            self.cut_text(first)

    def cut_text(self, cfg: tg.Hyperparameters) -> None:
        """Let the runs score a part of the validation text. Raises BenchError."""
        text, half = self.place / "text", self.place / f"text.{os.getpid()}"
        if not text.exists():
            benchlib.cut_validation(Path(cfg.data_path), half, 1 + (self.plan.tokens or sys.maxsize),
                                    start=self.plan.start)
            half.replace(text)
        self.shared |= {"DATA_PATH": str(text.resolve()), "TOKENIZER_PATH": str(Path(cfg.tokenizer_path).resolve())}

    def run_id(self, settings: dict) -> str:
        values = re.sub(r"[^\w.+-]", "-", "_".join(f"{value}" for value in settings.values()))
        short = values if len(values) < 60 else hashlib.sha256(values.encode()).hexdigest()[:12]
        return f"{self.place.name}.{short}"

    def environment(self, settings: dict, job: int) -> dict[str, str]:
        """One job's share of the GPUs or of the cores, and where its files go."""
        env = {**self.environ, "RUN_ID": self.run_id(settings), "ARTIFACT_DIR": str(self.folder.resolve())}
        if self.gpus:
            share, count = max(len(self.gpus) // self.plan.jobs, 1), len(self.gpus)
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[(job * share + i) % count] for i in range(share))
        else:
            share = max((os.cpu_count() or 1) // self.plan.jobs, 1)
            env["OMP_NUM_THREADS"] = env.get("OMP_NUM_THREADS") or str(share)
        return env

    def work(self, job: int) -> None:
        """Trials until there are none left."""
        try:
            while not self.stop.is_set() and (trial := self.study.take()) is not None:
                self.run(trial, job)
        except Exception as error:
            self.error = self.error or error
            self.stop.set()

    def run(self, trial, job: int) -> None:
        settings, begun = study.settings_of(trial), time.time()
        env, out = self.environment(settings, job), self.place / "output" / f"{trial.number}.txt"
        files = self.folder / "runs" / env["RUN_ID"]
        while in_use(files / "log.txt"):  # a run that outlives a sweep which was killed ends soon, with a checkpoint
            if self.stop.wait(POLL_SECONDS):
                return
        if (files / "checkpoint.pt").exists() and trial.user_attrs.get("attempt", 1) == 1:
            env["RESUME"] = "1"
        found = runlog.read(files) if (files / "events.jsonl").exists() else None
        hopeless, code = False, 0
        if found is None or found.state != "done":
            out.parent.mkdir(parents=True, exist_ok=True)
            pairs = [f"{key}={value}" for key, value in {**self.shared, **settings}.items()]
            with open(out, "w", encoding="utf-8") as file:
                child = subprocess.Popen([*self.command, *pairs], cwd=ROOT, env=env, stdout=file,
                                         stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
                hopeless = self.watch(trial, child, files)
            code = child.returncode
            if self.stop.is_set() and code:
                return  # it stays as it is: the next sweep goes on with it
            found = runlog.read(files) if (files / "events.jsonl").exists() else None
        name = " ".join(f"{key}={value}" for key, value in settings.items())
        if hopeless:
            self.study.done(trial, 0.0, pruned=True)
            self.say(f"{name}: ended early, worse than the median")
        elif code or found is None or found.score is None:
            why = last_error(out) or (found.why if found else "") or f"exit code {code}"
            again = self.study.failed(trial, why)
            self.say(f"{name}: failed{', once more' if again else ''}: {why}")
        else:
            seconds = found.train_seconds or found.seconds[found.last_phase]
            self.study.done(trial, found.score, bpb=found.bpb, bytes=found.total_bytes, run=env["RUN_ID"],
                            seconds=seconds, steps=max((step for step, *_ in found.validations), default=0))
            size = f" {found.total_bytes:,} bytes," if found.total_bytes else ""
            self.say(f"{name}: {found.score:.4f} bits per byte,{size} {time.time() - begun:.0f} s ({env['RUN_ID']})")
        self.write_tables()

    def watch(self, trial, child: subprocess.Popen, files: Path) -> bool:
        """Until the run ends. Returns whether it was ended because it is hopeless."""
        told = 0
        while True:
            try:
                child.wait(POLL_SECONDS)
                return False
            except subprocess.TimeoutExpired:
                pass
            if self.stop.is_set():
                child.terminate()
            elif self.plan.prune or self.plan.sampler == "tpe":
                seen = runlog.read(files).validations if (files / "events.jsonl").exists() else []
                for step, _, bpb in [v for v in seen if v[0] > told]:
                    told = step
                    if self.study.hopeless(trial, step, bpb):
                        child.terminate()
                        child.wait()
                        return True

    def say(self, text: str) -> None:
        ended = [t for t in self.study.trials_by_state() if t.state.is_finished()]
        total = self.plan.trials or len(study.grid(self.plan.axes))
        print(f"{time.strftime('%H:%M:%S')}  {len(ended)} of {total}  {text}", flush=True)

    def write_tables(self) -> None:
        with self.tables:  # else the table of fewer trials could be written last
            trials = self.study.trials_by_state()
            tg.write_atomically(self.place / "table.csv", csv_of(trials, list(self.plan.axes)).encode())
            tg.write_atomically(self.place / "table.md", self.markdown(trials).encode())

    def markdown(self, trials: list) -> str:
        of = f"Artifact `{self.plan.artifact}`, profile" if self.plan.artifact else "Profile"
        shared = " ".join(f"{key}={value}" for key, value in self.plan.settings.items()) or "nothing else"
        rows = table(rows_of(trials, self.plan.axes), [key for key in self.plan.axes if key != "SEED"])
        return "\n".join([f"# {self.place.name}", "", f"{of} `{self.plan.profile}`, all runs with: `{shared}`", "",
                          *rows, ""])


def in_use(log: Path) -> bool:
    """Is there a run that holds this log?"""
    try:
        with open(log) as held:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return isinstance(error, BlockingIOError)


def last_error(path: Path) -> str:
    """What the program said went wrong, in one line."""
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines() if path.is_file() else []
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or \
        [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)]
    return said[-1] if said else ""


def gpus_here(environ: Mapping[str, str]) -> list[str]:
    if not tg.torch.cuda.is_available():
        return []
    count = tg.torch.cuda.device_count()
    return (environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")


# ---- results -----------------------------------------------------------------------------------------------
@dataclasses.dataclass
class Row:
    """All seeds of one combination."""

    settings: dict
    trials: list

    @property
    def scores(self) -> list[float]:
        return [t.value for t in self.trials if t.state.name == "COMPLETE"]

    def mean(self, phase: str) -> float | None:
        found = [t.user_attrs["bpb"][phase] for t in self.trials if phase in t.user_attrs.get("bpb", {})]
        return statistics.fmean(found) if found else None


def rows_of(trials: list, axes: dict) -> list[Row]:
    """Trials by what they have in common but for the seed; the first one's are the baseline."""
    rows: dict[tuple, Row] = {}
    place = lambda t: [axis.index(study.settings_of(t)[key]) for key, axis in axes.items() if isinstance(axis, list)]
    for trial in sorted(trials, key=place):
        settings = {key: str(value) for key, value in study.settings_of(trial).items() if key != "SEED"}
        rows.setdefault(tuple(settings.items()), Row(settings, [])).trials.append(trial)
    return list(rows.values())


def table(rows: list[Row], keys: list[str]) -> list[str]:
    """Markdown: mean and standard deviation, difference from the baseline with its p-value, phases, bytes."""
    number = lambda value, form: "-" if value is None else format(value, form)
    phases = [phase for phase in runlog.PHASES if any(row.mean(phase) for row in rows)]
    heads = [*keys, "runs", "bpb", "± std", "Δ", "p", *phases, "bytes", "seconds"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    base = rows[0].scores if rows else []
    for row in rows:
        got, done = row.scores, [t for t in row.trials if t.state.name == "COMPLETE"]
        mean = statistics.fmean(got) if got else None
        lines.append("| " + " | ".join([
            *(row.settings.get(key, "") for key in keys), str(len(got)), number(mean, ".5f"),
            number(statistics.stdev(got) if len(got) > 1 else None, ".5f"),
            number(mean - statistics.fmean(base) if got and base and row is not rows[0] else None, "+.5f"),
            number(stats.welch(got, base) if row is not rows[0] else None, ".3g"),
            *(number(row.mean(phase), ".5f") for phase in phases),
            number(max(filter(None, (t.user_attrs["bytes"] for t in done)), default=None), ",d"),
            number(statistics.fmean(t.user_attrs["seconds"] for t in done) if done else None, ".0f")]) + " |")
    ended = {"FAIL": "failed", "PRUNED": "ended early, worse than the median at the same step", "RUNNING": "is running"}
    lines += [""] + [f"- {' '.join(f'{k}={v}' for k, v in study.settings_of(t).items())}: {ended[t.state.name]}"
                     + (f": {t.user_attrs['why']}" if "why" in t.user_attrs else "")
                     for row in rows for t in row.trials if t.state.name in ended]
    return lines


def csv_of(trials: list, keys: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*keys, "state", "score", *runlog.PHASES, "bytes", "seconds", "steps", "run", "why"])
    for t in trials:
        facts = t.user_attrs
        writer.writerow([*(study.settings_of(t).get(key, "") for key in keys), t.state.name.lower(), t.value,
                         *(facts.get("bpb", {}).get(phase, "") for phase in runlog.PHASES),
                         *(facts.get(key, "") for key in ("bytes", "seconds", "steps", "run", "why"))])
    return out.getvalue()


def draw(rows: list[Row], path: Path) -> None:
    """Each run as a dot, each mean as a line, by combination. Raises UsageError."""
    rows = [row for row in rows if row.scores]
    figure = charts.picture("the picture", max(4.0, 1.6 * len(rows)), 4.5)
    panel = figure.subplots()
    for i, row in enumerate(rows):
        panel.plot([i] * len(row.scores), row.scores, "o", color="C0")
        panel.hlines(statistics.fmean(row.scores), i - 0.3, i + 0.3, color="C1")
    panel.set_xticks(range(len(rows)), ["\n".join(f"{k}={v}" for k, v in row.settings.items()) for row in rows],
                     rotation=60 if len(rows) > 6 else 0, fontsize=8)
    panel.set(ylabel="bits per byte", title=f"{path.parent.name}: runs and their means")
    charts.save(figure, path)


# ---- command line ------------------------------------------------------------------------------------------
def sweep(plan: Plan, folder: Path, command: list[str]) -> Sweep:
    """Run all that is left to run. Raises UsageError, KeyboardInterrupt once all runs have ended."""
    made = Sweep(plan, folder, command)
    workers = [threading.Thread(target=made.work, args=(job,), daemon=True) for job in range(plan.jobs)]
    for worker in workers:
        worker.start()
    try:
        while any(worker.is_alive() for worker in workers):
            time.sleep(0.2)
    except KeyboardInterrupt:
        made.stop.set()
        for worker in workers:
            worker.join()
        raise
    if made.error:
        raise made.error
    made.write_tables()
    return made


def code_bytes() -> str:
    """Of the built script, as run.sh counts it: once for all runs."""
    made = subprocess.run([sys.executable, str(ROOT / "tools" / "record.py"), "build"], capture_output=True)
    return "0" if made.returncode else str((ROOT / "build" / "train_gpt.py").stat().st_size)


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__, epilog="KEY=a,b,c: settings and their values")
    parser.add_argument("what", nargs="*", metavar="PROFILE, FILE.toml or ARTIFACT")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time; they share GPUs, or CPU cores, out")
    parser.add_argument("--sampler", choices=SAMPLERS)
    parser.add_argument("--trials", type=int, metavar="N", help="of tpe: runs in all")
    parser.add_argument("--prune", action="store_true", default=None, help="end runs that look hopeless")
    parser.add_argument("--name", metavar="NAME", help="of the folder in sweeps/")
    parser.add_argument("--tokens", type=int, metavar="N", help="score an artifact on N validation tokens")
    parser.add_argument("--start", type=int, metavar="N", help="the first of them")
    args, given = parser.split(argv, shell.OF_RUN_SH)
    folder = runlog.home({**os.environ, **{key: given.pop(key) for key in runlog.HOME if key in given}})
    plan = plan_of(args, given, os.environ)
    plan.check()
    study.optuna()
    os.environ.setdefault("CODE_BYTES", code_bytes())
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    made = sweep(plan, folder, ["bash", "run.sh"])
    rows = rows_of(made.study.trials_by_state(), plan.axes)
    print((made.place / "table.md").read_text(encoding="utf-8"))
    if any(row.scores for row in rows):
        draw(rows, made.place / "picture.png")
        print(f"picture: {made.place / 'picture.png'}")
    print(f"tables: {made.place / 'table.csv'}, table.md")
    return 0 if all(t.state.name in ("COMPLETE", "PRUNED") for row in rows for t in row.trials) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
