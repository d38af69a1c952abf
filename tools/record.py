"""What is submitted: the small train_gpt.py, the folder of some runs; and a check of anyone's folder.

    python tools/record.py build                                  # train_gpt.py -> build/train_gpt.py
    python tools/record.py build --source FILE --out FILE
    python tools/record.py show FILE                              # the code inside a built file
    python tools/record.py NAME RUN_ID... --author A --github-id G        # the folder to submit, of runs in runs/
    python tools/record.py --check FOLDER                         # what of anyone's folder does not hold together

`build` drops comments, docstrings, annotations of arguments and results, and the help texts of settings (class
Stripper), prints the rest densely, packs it with LZMA2 and puts the bytes into a string literal of a Python file
encoded in Latin-1 (PEP 263). That costs 2 % over the packed bytes, where base85 costs 25 %; editors show the file
if they honour its first line, and whoever reads it as UTF-8 gets an error. No name is changed, so that tracebacks
stay legible. The printed program must have exactly the syntax tree of the stripped source. The file runs, imports,
and shows source lines in tracebacks and `inspect.getsource` of functions (not of classes); its size on disk is what
counts as code. The same source gives the same bytes, with the pinned minifier and the same liblzma.

NAME RUN_ID... writes records/DATE_NAME/ with README.md, submission.json, the built and the readable script, logs and
audits. It takes finished runs that differ in their seed only, each of this train_gpt.py or of the file built from it by
the sha256 in its log, whose summary says what its log and its events measured. It keeps the rules: an audit of each
run's own artifact that passed, training and calibration as well as evaluation within 600 s, the canonical data unless
--own-data says otherwise, and nothing that --check calls broken. --against BPB: the p-value of beating a score by 0.005
nats.

--check reads the folder alone: sizes of what is really shipped, times, whether losses, bits per byte, seeds, logs and
submission.json agree, and patterns in the code (tools/check_record.py). Exit code 1: something is broken.
"""
from __future__ import annotations

import argparse
import ast
import datetime
import hashlib
import json
import lzma
import os
import re
import shutil
import statistics
import sys
from pathlib import Path
from unittest import mock

import check_record
import runlog
from check_record import LIMIT_BYTES, LIMIT_SECONDS
from shell import Parser, UsageError, one_line_errors, optional

ROOT = Path(__file__).resolve().parents[1]
OLDEST_PYTHON = (3, 10)
PAYLOAD = "train_gpt.min.py"  # what the unpacked text is called in tracebacks; never a file
LZMA2 = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 23, "pb": 0}
WRAPPER = """\
# -*- coding: latin-1 -*-
{doc!a}
import linecache,lzma,sys,traceback
_=lzma.decompress('{code}'.encode('latin1'),3,None,[{{'id':33}}]).decode()
linecache.cache['{name}']=len(_),None,_.splitlines(True),'{name}'
if __name__=='__main__':sys.excepthook=traceback.print_exception
exec(compile(_,'{name}','exec'))
"""  # the hook: before Python 3.13 the interpreter's own printer looks for source on disk only


class RecordError(UsageError):
    """The source, a log or an artifact is not what a record needs."""


# ---- build -------------------------------------------------------------------------------------------------

class Stripper(ast.NodeTransformer):
    """Drops what the program does not need to run.

    Docstrings; the annotations of arguments and results, except tl.constexpr, which tells Triton what is fixed when
    a kernel is compiled (annotations of fields stay: they make dataclasses); the `help` of each call of `env_field`,
    which becomes an empty text, so that --help lists names, defaults and ranges only.
    """

    def __init__(self, tree: ast.Module):
        defined = [s for s in tree.body if isinstance(s, ast.FunctionDef) and s.name == "env_field"]
        self.env_field_arguments = [argument.arg for function in defined for argument in function.args.args]

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "env_field":
            node.args = [ast.Constant("") if name == "help" else value
                         for name, value in zip(self.env_field_arguments, node.args, strict=True)]
            for keyword in node.keywords:
                keyword.value = ast.Constant("") if keyword.arg == "help" else keyword.value
        return node

    def visit_arg(self, node):
        if node.annotation and not ast.unparse(node.annotation).endswith(".constexpr"):
            node.annotation = None
        return node

    def generic_visit(self, node):
        super().generic_visit(node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [s for s in node.body if not is_text(s)] or [ast.Pass()]
        return node


def is_text(statement: ast.stmt) -> bool:
    return (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
            and isinstance(statement.value.value, str))


def print_densely(tree: ast.Module) -> str:
    """The shortest text of a tree that the oldest Python reads."""
    python_minifier = optional("python_minifier", "building", "-r requirements.txt")
    f_string = optional("python_minifier.f_string", "building", "-r requirements.txt")
    made = f_string.OuterFString.__init__
    # From Python 3.12 on it nests equal quotes in f-strings, which older Pythons cannot read.
    old = lambda self, node, pep701=False: made(self, node, pep701=False)
    with mock.patch.object(f_string.OuterFString, "__init__", old):
        return python_minifier.unparse(tree)


def minify(source: str) -> str:
    """The stripped program, densely printed. Raises RecordError unless its syntax tree is the stripped source's."""
    try:
        tree = ast.parse(source, feature_version=OLDEST_PYTHON)
    except SyntaxError as error:
        raise RecordError(f"the source is not Python {'.'.join(map(str, OLDEST_PYTHON))}: "
                          f"line {error.lineno}: {error.msg}") from None
    tree = Stripper(tree).visit(tree)
    text = print_densely(tree)
    if ast.dump(ast.parse(text, feature_version=OLDEST_PYTHON)) != ast.dump(tree):
        raise RecordError("the minified text is not the same program; is python-minifier the pinned version?")
    return text


def latin1_literal(data: bytes) -> str:
    """What to write between single quotes in a Latin-1 file for the characters with these codes.

    Python reads every character of a literal as it stands but NUL, the line ends, the quote and the backslash.
    """
    text = data.decode("latin1")
    for character, escape in (("\\", r"\\"), ("'", r"\'"), ("\n", r"\n"), ("\r", r"\r")):
        text = text.replace(character, escape)
    return re.sub(r"\0(?![0-7])", r"\\0", text).replace("\0", r"\000")


def build(source: str) -> bytes:
    """The self-extracting script of a source text. Raises RecordError."""
    packed = lzma.compress(minify(source).encode(), lzma.FORMAT_RAW, filters=[LZMA2])
    title = (ast.get_docstring(ast.parse(source)) or PAYLOAD).splitlines()[0]
    doc = (f"{title}\n\nBuilt by tools/record.py from the source with sha256 {sha256(source.encode())},\n"
           "where the comments and the meaning of each setting are. This file's encoding is Latin-1.\n")
    return WRAPPER.format(doc=doc, code=latin1_literal(packed), name=PAYLOAD).encode("latin1")


def unpack(built: bytes) -> str:
    """The minified source inside a built script. Raises RecordError if it is none."""
    try:
        call = next(node for node in ast.walk(ast.parse(built)) if isinstance(node, ast.Call)
                    and ast.unparse(node.func) == "lzma.decompress")
        packed = call.args[0].func.value.value.encode("latin1")  # of 'packed'.encode('latin1')
        return lzma.decompress(packed, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2}]).decode()
    except (SyntaxError, ValueError, LookupError, AttributeError, StopIteration, lzma.LZMAError):
        raise RecordError("not a file made by `record.py build`") from None


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from None


def read_source(path: Path) -> str:
    """Raises RecordError: no such file, or no text."""
    try:
        return read_bytes(path).decode()
    except UnicodeError:
        raise RecordError(f"{path} is not UTF-8 text") from None


def build_file(source: Path, out: Path) -> None:
    if out.exists() and source.exists() and out.samefile(source):
        raise RecordError(f"--out {out} is the source itself")
    built = build(read_source(source))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(built)
    print(f"{out}: {len(built):,} bytes, {len(built) / LIMIT_BYTES:.3%} of {LIMIT_BYTES:,}; "
          f"{source.name} has {source.stat().st_size:,}, {len(unpack(built).encode()):,} minified")


# ---- folder ------------------------------------------------------------------------------------------------

SCORES = {"val_bpb_ngram": "counts of scored tokens", "val_bpb_ttt": "test-time training",  # the best first
          "val_bpb_sliding": "sliding window", "val_bpb_roundtrip": "whole windows"}
EVENTS = {f"val_bpb_{phase}": end for end, phase in runlog.PLACES.items()}  # ends of the evaluations' names
# Tokens and bytes of the canonical validation texts, whole (plain SP-8192 and SP-1024, CaseOps, CaseOps with MP3).
CANONICAL = {f"{tokens} tokens of {size} bytes" for tokens, size in (
    (47_853_343, 151_080_622), (47_851_520, 151_074_499), (43_767_808, 151_079_389), (40_540_160, 151_078_222))}
# Settings in which runs of one record may differ: they change neither the model nor its score.
FREE = {"seed", "run_id", "artifact_dir", "profile", "resume", "train_log_every", "val_loss_every", "checkpoint_every",
        "checkpoint_seconds"}


def read_events(path: Path) -> dict[str, dict]:
    """The last event of each kind, evaluations by their names. Raises UsageError."""
    found = {event["name"] if event["event"] == "evaluation" else event["event"]: event
             for event in runlog.parse_lines(path)}
    missing = {"settings", "artifact", "validation"} - set(found)
    if missing:
        raise RecordError(f"{path} has no event {min(missing)!r}: not a finished training run")
    return found


class Log:
    """log.txt, events.jsonl and summary.json of one run, compared with each other. Raises UsageError."""

    def __init__(self, path: Path, sources: set[str]):
        self.path, self.text, self.beside = path, read_source(path), runlog.beside(path, "summary.json")
        self.events = read_events(runlog.beside(path, "events.jsonl"))
        try:
            self.summary = json.loads(read_source(self.beside))
            logged = json.loads(self.line(r"^summary: (.*)$"))
        except ValueError:
            raise RecordError(f"{self.beside} is not the summary of a finished run") from None
        if self.summary != logged:
            raise RecordError(f"{self.beside} is not the summary that {path} ends with")
        if not set(re.findall(r"^source:sha256:(\w+)", self.text, re.MULTILINE)) <= sources:
            raise RecordError(f"{path} is a run of another train_gpt.py: its source:sha256 is neither "
                              "the source's nor the built file's")

    def line(self, pattern: str) -> str:
        """What the last line like this says: the log of a resumed run holds what came before."""
        found = re.findall(pattern, self.text, re.MULTILINE)
        if not found:
            raise RecordError(f"{self.path} has no line {pattern.partition('(')[0].lstrip('^')}...")
        return found[-1]

    def check(self) -> None:
        """The summary says what was measured and logged. Raises RecordError."""
        def require(key: str, reported, measured, holds=None) -> None:
            if not (reported == measured if holds is None else holds):
                name = runlog.name_of(self.path)
                raise RecordError(f"{self.beside}: {key} is {reported}, but {name}'s log says {measured}")

        for key, ending in EVENTS.items():
            name = next((name for name in self.events if name.endswith(ending)), None)
            measured = self.events[name]["bpb"] if name else None
            require(key, self.summary.get(key), measured)
            if measured is not None and key in SCORES:
                printed = self.line(rf"^{re.escape(name)}_exact .*val_bpb:(\S+)$")
                require(key, f"{measured:.8f}", printed)
        last = self.events["validation"]
        size = int(self.line(r"^Serialized model \S+: (\d+) bytes$"))
        require("artifact_bytes", self.summary["artifact_bytes"], self.events["artifact"]["bytes"])
        require("artifact_bytes", self.summary["artifact_bytes"], size)
        require("steps", self.summary["steps"], last["step"])
        spent, seconds = self.summary["seconds"]["train"], round(last["train_time_s"], 3)
        require("seconds of training", spent, seconds, abs(spent - seconds) < 0.5 + 0.01 * seconds)
        limit = self.settings["max_wallclock_seconds"]
        if limit and spent > limit + 0.5 + 2 * spent / max(last["step"], 1):  # the last step may end after it
            raise RecordError(f"{self.path} trained for {spent} s, over MAX_WALLCLOCK_SECONDS={limit:g}")

    @property
    def settings(self) -> dict:
        return self.events["settings"]["all"]

    def common(self) -> dict:
        """What all runs of a record must have in common, by the names that a user knows."""
        fixed = {k.upper(): v for k, v in self.settings.items() if k not in FREE and not k.startswith("audit")}
        text = next(event for name, event in self.events.items() if name.endswith("_roundtrip"))
        return {**fixed, "validation text": f"{text['tokens']} tokens of {text['bytes']} bytes",
                "device": self.line(r"^device:(\S+)"), "number of processes": int(self.line(r"^world_size:(\d+)")),
                "PyTorch": self.line(r"^source:.* torch:(\S+)")}


def read_run(path: Path, sources: set[str]) -> dict:
    """The summary of one run with its seed, log and settings. Raises RecordError: not a run of ours, or edited."""
    log = Log(path, sources)
    try:
        log.check()
        changed = {k.upper(): v for k, v in log.events["settings"]["changed"].items() if k not in FREE}
        best = next(key for key in SCORES if log.summary.get(key) is not None)
        loss = next(event["loss"] for name, event in log.events.items() if name.endswith(EVENTS[best]))
        return {**log.summary, "log": path, "name": runlog.name_of(path), "loss": loss,
                "artifact_sha256": log.events["artifact"]["sha256"],
                "seed": int(log.line(r"^seed:(\d+)")), "common": log.common(),
                "settings": " ".join(f"{k}={v}" for k, v in changed.items())}
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        raise RecordError(f"{path} is not the log of a finished run: it lacks {error}") from None


def require_alike(runs: list[dict]) -> None:
    """One mean is of runs of one system. Raises RecordError with what differs."""
    first = runs[0]["common"]
    for run in runs[1:]:
        other = run["common"]
        keys = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if keys:
            unlike = ", ".join(f"{key}: {first.get(key)} and {other.get(key)}" for key in keys)
            raise RecordError(f"{runs[0]['log']} and {run['log']} are runs of unlike settings ({unlike}); "
                              "a record is of one system")


def submission(runs: list[dict], args, code_bytes: int) -> dict:
    """submission.json, with the mean of the best score all have. Raises RecordError: no score, too big."""
    key = next((k for k in SCORES if all(r.get(k) is not None for r in runs)), None)
    if key is None:
        raise RecordError("the runs have no score in common")
    scores = [r[key] for r in runs]
    largest = max(r["artifact_bytes"] for r in runs)
    if code_bytes + largest > LIMIT_BYTES:
        raise RecordError(f"{code_bytes:,} bytes of code + {largest:,} of artifact are over {LIMIT_BYTES:,}")
    results = {str(r["seed"]): {"val_bpb": r[key], "artifact_bytes": r["artifact_bytes"], "steps": r["steps"],
                                "artifact_sha256": r["artifact_sha256"], "seconds": r["seconds"]} for r in runs}
    if len(results) < len(runs):
        raise RecordError("two logs have the same seed")
    about = runs[0]["common"]
    return {"author": args.author, "github_id": args.github_id, "name": args.name, "date": args.date,
            "blurb": args.blurb, "val_bpb": statistics.fmean(scores), "score": SCORES[key],
            "val_bpb_std": statistics.stdev(scores) if len(scores) > 1 else None,
            "bytes_total": code_bytes + largest, "bytes_code": code_bytes, "seeds": [r["seed"] for r in runs],
            "seed_results": results, "hardware": f"{about['number of processes']} x {about['device']}",
            "pytorch_version": about["PyTorch"]}


def audits(runs: list[dict]) -> dict[str, Path]:
    """The signed tables beside the logs, by their names in the record. Raises RecordError: not passed, or of another
    artifact than the run's."""
    found = {}
    for run in runs:
        table = run["log"].with_name("audit.json")
        try:
            body = json.loads(read_source(table))
            verdict, audited = body["verdict"], body.get("artifact_sha256")
        except (ValueError, LookupError, TypeError, AttributeError):
            raise RecordError(f"{table} is not an audit") from None
        if verdict != "pass":
            raise RecordError(f"{table} is not the audit of scores that count: its verdict is {verdict}")
        if audited != run["artifact_sha256"]:
            raise RecordError(f"{table} is the audit of another artifact than this run's (sha256 {audited})")
        found |= {f"{run['name']}.audit{kind}": table.with_suffix(kind) for kind in (".json", ".txt")}
    return found


def readme(record: dict, runs: list[dict], audited: dict[str, Path]) -> str:
    about, first = runs[0]["common"], runs[0]["name"]
    ranks, proof = about["number of processes"], record.get("p_value", {})
    bpb = lambda r: record["seed_results"][str(r["seed"])]["val_bpb"]
    rows = [f"| {r['seed']} | {bpb(r):.6f} | {r['val_bpb_pre_quant']:.6f} | {r['artifact_bytes']:,} "
            f"| {r['steps']:,} | {r['seconds']['train']:.1f} | `{r['name']}.txt` |" for r in runs]
    spread = f", standard deviation {record['val_bpb_std']:.6f}" if record["val_bpb_std"] is not None else ""
    launch = f"torchrun --standalone --nproc_per_node={ranks}" if ranks > 1 else "python"
    lines = [
        f"# {record['name']}", "", record["blurb"], "",
        f"**{record['val_bpb']:.6f} bits per byte** ({record['score']}; seeds: {len(runs)}{spread}), "
        f"{record['bytes_total']:,} of {LIMIT_BYTES:,} bytes with {record['bytes_code']:,} of code, "
        f"on {record['hardware']}, torch {record['pytorch_version']}.", "",
        "| seed | bpb | bpb before quantisation | artifact bytes | steps | training s | log |",
        "|---|---|---|---|---|---|---|", *rows, ""]
    if proof.get("p") is not None:
        lines += [f"p = {proof['p']:.3g} (one-sided, Student's t) that the mean does not beat {proof['beats']} by "
                  f"{proof['by_nats']} nats.", ""]
    lines += [
        "Architecture: {NUM_LAYERS} layers of width {MODEL_DIM}, {NUM_HEADS} heads, {NUM_KV_HEADS} of them for keys "
        "and values, MLP {MLP_MULT:g} times as wide, {VOCAB_SIZE:,} pieces, trained on {TRAIN_SEQ_LEN:,} tokens at a time."
        .format_map(about), "",
        "Command, with each of the seeds as `SEED`; the settings are those other than the defaults:", "",
        "```", f"{runs[0]['settings']} {launch} train_gpt.py".strip(), "```", ""]
    if f"{first}.audit.txt" in audited:
        lines += [f"Audits of the scores: {', '.join(f'`{name}`' for name in audited)}. That of `{first}`:", "",
                  "```", read_source(audited[f"{first}.audit.txt"]).strip(), "```", ""]
    return "\n".join([*lines, "`train_gpt.py` is what counts as code; it was built from `train_gpt_readable.py`, the "
                      "same program.", ""])


def finished_log(folder: Path, name: str) -> Path:
    """The log of a kept run. Raises RecordError: no such run, not finished, or not audited."""
    log = folder / "runs" / name / "log.txt"
    if not log.is_file():
        raise RecordError(f"there is no run {name!r} in {folder / 'runs'} (bash run.sh runs lists them)")
    run = runlog.read(log)
    if run.state != "done":
        raise RecordError(f"{name} is no finished run: {run.state}{f': {run.why}' if run.why else ''}")
    if not log.with_name("audit.json").is_file():
        raise RecordError(f"{name} has no audit: bash run.sh audit {log.with_name('final_model.ptz')}")
    return log


def keep_the_rules(args, runs: list[dict], record: dict) -> None:
    """Of a submission. Adds to the record what they need. Raises RecordError."""
    from stats import below
    for run in runs:
        spent = run["seconds"]
        for what, seconds in (("training and calibration", spent["train"] + spent.get("calibrate", 0.0)),
                              ("evaluation", spent["evaluate"])):
            if seconds > LIMIT_SECONDS:
                raise RecordError(f"{run['log']}: {what} took {seconds:,.1f} s, over {LIMIT_SECONDS:g}")
    data = runs[0]["common"]["validation text"]
    if data not in CANONICAL and not args.own_data:
        raise RecordError(f"{data} are not the canonical validation text; --own-data says that this is meant")
    if args.against:
        losses = [run["loss"] for run in runs]
        bound = args.against * runs[0]["loss"] / record["seed_results"][str(runs[0]["seed"])]["val_bpb"] - 0.005
        record["p_value"] = {"beats": args.against, "by_nats": 0.005, "p": below(losses, bound)}


def make_folder(args) -> Path:
    """The record's folder, whole or not at all."""
    if not re.fullmatch(r"\w[\w.-]*", args.name):
        raise RecordError(f"NAME is letters, digits, dots, dashes and underscores, not {args.name!r}")
    folder = args.records / f"{args.date}_{args.name}"
    if folder.exists():
        raise RecordError(f"{folder} exists already")
    logs = [finished_log(args.runs, name) for name in args.run_ids]
    source = read_source(args.source)
    built = build(source)
    runs = [read_run(log, {sha256(source.encode()), sha256(built)}) for log in logs]
    require_alike(runs)
    record = submission(runs, args, len(built))
    keep_the_rules(args, runs, record)
    audited = audits(runs)
    half = folder.with_name(f".{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for name, data in {"README.md": readme(record, runs, audited).encode(), "train_gpt.py": built,
                       "train_gpt_readable.py": source.encode(),
                       "submission.json": (json.dumps(record, indent=2) + "\n").encode()}.items():
        (half / name).write_bytes(data)
    for name, path in {"requirements.txt": ROOT / "requirements.txt", **audited,
                       **{f"{run['name']}.txt": run["log"] for run in runs}}.items():
        shutil.copy(path, half / name)
    wrong = [finding.text for finding in check_record.check(half) if finding.broken]
    if wrong:
        shutil.rmtree(half)
        raise RecordError(f"the folder does not pass its own check: {wrong[0]}")
    half.rename(folder)
    return folder


# ---- command line ------------------------------------------------------------------------------------------

def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="write the small, self-extracting train_gpt.py")
    make.add_argument("--out", type=Path, default=ROOT / "build" / "train_gpt.py")
    show = commands.add_parser("show", help="print the code inside a built file")
    show.add_argument("built", type=Path, metavar="FILE")
    of_runs = commands.add_parser("runs", help="write the folder of finished runs: NAME RUN_ID..., without this word")
    of_runs.add_argument("name")
    of_runs.add_argument("run_ids", nargs="+", metavar="RUN_ID")
    of_runs.add_argument("--runs", type=Path, default=runlog.home(os.environ), metavar="FOLDER",
                         help="the ARTIFACT_DIR they are in")
    of_runs.add_argument("--against", type=float, metavar="BPB", help="a score that is to be beaten")
    of_runs.add_argument("--own-data", action="store_true", help="another text than the canonical one is meant")
    of_runs.add_argument("--author", required=True)
    of_runs.add_argument("--github-id", required=True)
    of_runs.add_argument("--blurb", default="")
    of_runs.add_argument("--date", default=datetime.date.today().isoformat())
    of_runs.add_argument("--records", type=Path, default=ROOT / "records")
    checked = commands.add_parser("check", help="what of a record folder does not hold together")
    checked.add_argument("folder", type=Path)
    for command in (make, of_runs):
        command.add_argument("--source", type=Path, default=ROOT / "train_gpt.py")
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--check"]:
        arguments[0] = "check"
    elif len(arguments) > 1 and arguments[0] not in commands.choices and not arguments[0].startswith("-"):
        arguments.insert(0, "runs")  # NAME RUN_ID...
    return parser.parse_args(arguments)


@one_line_errors
def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    if args.command == "build":
        build_file(args.source, args.out)
    elif args.command == "check":
        found = check_record.check(args.folder)
        print(check_record.table(args.folder, found))
        return int(any(finding.broken for finding in found))
    else:
        print(unpack(read_bytes(args.built)) if args.command == "show" else make_folder(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
