"""A record folder, anyone's, examined from its files and logs alone.

What is found is a rule that is broken, or something to look at. What cannot be found so: whether a score is legal
(tools/audit.py asks the program itself), and whether a log was printed by the script beside it.
"""
from __future__ import annotations

import ast
import base64
import json
import lzma
import re
import statistics
import zlib
from pathlib import Path
from typing import NamedTuple

import runlog
from shell import UsageError

LIMIT_BYTES, LIMIT_SECONDS = 16_000_000, 600.0
# Nats per token over bits per byte of the canonical validation texts: by bytes per token alone, so it tells the text.
RATIOS = {"CaseOps": (2.18836, 2.18857), "CaseOps with MP3": (2.39263, 2.39264), "SP-8192": (2.58305, 2.58315),
          "SP-4096": (2.30125, 2.30145), "SP-1024": (1.68840, 1.68850), "SP-1024, first export": (1.69285, 1.69290)}
CASEOPS_TOKENS = range(47_851_000, 47_854_000)
SAME_TEXT = 2e-6  # relative difference of the ratio that printed digits allow
LEAKED_STEP_1 = 9.0073  # CaseOps, seed 42: the first batch begins at validation document 10,000; 9.0087 is clean
PATTERNS = {  # in the code -> what to look at; it proves nothing
    r"(?i)pre_?quant_?ttt|ttt_?pre_?quant": "test-time training before quantisation: on validation text not yet scored?",
    r"(?i)\bslot_(?:steps|lr|enabled)": "SLOT: optimises on the tokens that it scores",
    r"(?i)\bppm\w*mix|byte_?ppm|ppm_order": "byte-level PPM mixture: is it a distribution over tokens that sums to 1?",
    r"(?i)(?:within|word)_(?:boost|gate|tau|bonus)": "n-gram gates by word: do they read the token that is scored?",
    r"(?i)val[_-]docs\b.{0,60}\b10_?000\b": "10,000 validation documents by default: does training begin there?",
    r"(?i)casefold\(\)|\.lower\(\)\s*\.encode": "folds case: is the text still lossless?"}


class Finding(NamedTuple):
    broken: bool
    text: str


def broken(text: str) -> Finding:
    return Finding(True, text)


def look(text: str) -> Finding:
    return Finding(False, text)


def check(folder: Path) -> list[Finding]:
    """Raises UsageError if it is no folder with a script."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder")
    script, logs = folder / "train_gpt.py", read_logs(folder)
    found = [broken(f"there is no {name}") for name in ("README.md", "submission.json", "train_gpt.py")
             if not (folder / name).is_file()]
    if not logs:
        found.append(broken("no log has a line of a run that is known"))
    entry = read_entry(folder, found)
    code = source_of(script, found) if script.is_file() else ""
    return [*found, *sizes(folder, script, code, logs, entry), *times(logs), *texts(logs), *seeds(logs),
            *agreement(entry, logs), *(look(f"{name}: {said}") for name, said in patterns(folder, code))]


def read_logs(folder: Path) -> dict[str, tuple[runlog.Run, str]]:
    """The logs at the folder's top, by name, with their text."""
    found = {}
    for path in sorted([*folder.glob("*.log"), *folder.glob("*.txt"), *folder.glob("logs/*")]):
        try:
            found[path.name] = runlog.read_published(path), runlog.read_text(path)
        except UsageError:
            continue
    return found


def read_entry(folder: Path, found: list[Finding]) -> dict:
    path = folder / "submission.json"
    try:
        entry = json.loads(runlog.read_text(path)) if path.is_file() else {}
        assert isinstance(entry, dict)
    except (ValueError, AssertionError):
        found.append(broken("submission.json is not JSON"))
        return {}
    missing = [key for key in ("author", "github_id", "name", "date", "val_bpb") if entry and key not in entry]
    return found.extend(look(f"submission.json has no {key}") for key in missing) or entry


def source_of(script: Path, found: list[Finding]) -> str:
    """The program, unpacked where it is a packed literal."""
    data = script.read_bytes()
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError) as error:
        found.append(broken(f"train_gpt.py is not Python: {error}"))
        return data.decode("latin1")
    literals = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)
                and isinstance(node.value, (str, bytes)) and len(node.value) > 2000]
    for literal in literals:
        for text in unpacked(literal):
            return text
    return data.decode("utf-8", "replace")


def unpacked(literal: str | bytes):
    """What a literal may be packed from."""
    packed = literal.encode("latin1", "ignore") if isinstance(literal, str) else literal
    raw = [{"id": lzma.FILTER_LZMA2}]
    for decode in (base64.b85decode, base64.b64decode, base64.a85decode, lambda data: data):
        for expand in (lzma.decompress, zlib.decompress, lambda d: lzma.decompress(d, lzma.FORMAT_RAW, filters=raw)):
            try:
                yield expand(decode(packed)).decode()
            except (ValueError, lzma.LZMAError, zlib.error, UnicodeError, EOFError):
                continue


# ---- rules -------------------------------------------------------------------------------------------------
def sizes(folder: Path, script: Path, code: str, logs: dict, entry: dict) -> list[Finding]:
    """What is really shipped: the script as it lies there, what it imports from the folder, the largest artifact."""
    found, code_bytes = [], script.stat().st_size if script.is_file() else 0
    helpers = [path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".cu", ".cpp", ".so")
               and path != script and re.search(rf"\b{re.escape(path.stem)}\b", code)]
    more = sum(path.stat().st_size for path in helpers)
    artifacts = {name: run.artifact_bytes for name, (run, _) in logs.items() if run.artifact_bytes}
    if not artifacts:
        return [look("no log says how large its artifact is")]
    name, largest = max(artifacts.items(), key=lambda item: item[1])
    if largest + code_bytes > LIMIT_BYTES:
        found.append(broken(f"train_gpt.py as it is shipped, {code_bytes:,} bytes, and the artifact of {name}, "
                            f"{largest:,}, are {largest + code_bytes:,} bytes, over {LIMIT_BYTES:,}"))
    elif largest + code_bytes + more > LIMIT_BYTES:
        found.append(broken(f"with {', '.join(p.name for p in helpers)} ({more:,} bytes), which it names, train_gpt.py "
                            f"and the artifact of {name} are {largest + code_bytes + more:,} bytes, over "
                            f"{LIMIT_BYTES:,}"))
    elif more:
        found.append(look(f"{', '.join(p.name for p in helpers)}: {more:,} bytes of code beside train_gpt.py"))
    for name, (run, _) in logs.items():
        counted = (run.total_bytes or 0) - (run.artifact_bytes or 0)
        if run.artifact_bytes and 0 < counted != code_bytes:
            found.append(look(f"{name} counts {counted:,} bytes of code, train_gpt.py has {code_bytes:,}"))
            break
    return found


def times(logs: dict) -> list[Finding]:
    found = []
    for name, (run, text) in logs.items():
        stopped = re.findall(r"stopping_early: \w+ train_time: ?(\d+)ms", text)
        seconds = int(stopped[-1]) / 1000 if stopped else run.train_seconds
        hessians = sum(map(float, re.findall(r"(?i)collected \d+ hessians in ([\d.]+)s", text)))
        if seconds > LIMIT_SECONDS + 0.5:
            found.append(broken(f"{name}: {seconds:,.1f} s of training"))
        elif seconds + hessians > LIMIT_SECONDS + 0.5:
            found.append(broken(f"{name}: {seconds:,.1f} s of training and {hessians:.1f} s of calibration"))
        last = next((phase for phase in reversed(runlog.PHASES) if phase in run.seconds), None)
        total = sum(run.seconds.get(phase, 0.0) for phase in runlog.PHASES if phase != "pre_quant")
        if last and run.seconds[last] > LIMIT_SECONDS:
            found.append(broken(f"{name}: {run.seconds[last]:,.1f} s for the last score alone"))
        elif total > LIMIT_SECONDS:
            found.append(look(f"{name}: all final scores together take {total:,.1f} s"))
    return found


def ratio(run: runlog.Run) -> float | None:
    """Nats per token over bits per byte of the last phase."""
    last = next((phase for phase in reversed(runlog.PHASES) if phase in run.bpb and phase in run.loss), None)
    return run.loss[last] / run.bpb[last] if last and run.bpb[last] else None


def texts(logs: dict) -> list[Finding]:
    """Is the validation text a canonical one, and was it kept out of training?"""
    found = []
    for name, (run, text) in logs.items():
        measured = ratio(run)
        known = [kind for kind, (low, high) in RATIOS.items() if measured and low <= measured <= high]
        if measured and not known:
            said = f"{name}: val_loss/val_bpb is {measured:.6f}, which is that of no canonical validation text"
            found.append(broken(f"{said}; with its {run.val_tokens:,} tokens it would be 2.18837, and the score "
                                f"{run.score * measured / 2.188371:.4f}") if run.val_tokens in CASEOPS_TOKENS
                         else look(said))
        if 9_000_000 < (run.val_tokens or 0) < 10_000_000:
            found.append(broken(f"{name}: {run.val_tokens:,} validation tokens are 10,000 documents, not 50,000"))
        first = next((loss for step, _, loss in run.steps if step == 1), None)
        if "CaseOps" in known and str(run.settings.get("seed")) == "42" and first == LEAKED_STEP_1:
            found.append(broken(f"{name}: the first batch has a loss of {first}: training text begins at document "
                                "10,000, inside the 50,000 of the validation text"))
    return found


def seeds(logs: dict) -> list[Finding]:
    """Do the runs look like runs of one program on one text?"""
    found, last = [], {name: ratio(run) for name, (run, _) in logs.items() if ratio(run)}
    if last and max(last.values()) / min(last.values()) - 1 > SAME_TEXT:
        unlike = ", ".join(f"{name} {value:.6f}" for name, value in last.items())
        found.append(broken(f"val_loss/val_bpb differs from log to log, which one text does not allow: {unlike}"))
    for name, (run, _) in logs.items():
        inner = [run.loss[p] / run.bpb[p] for p in ("roundtrip", "sliding") if p in run.loss]
        inner += [run.loss["pre_quant"] / run.bpb["pre_quant"]] if "pre_quant" in run.loss else []
        if inner and max(inner) / min(inner) - 1 > 2e-4:
            found.append(broken(f"{name}: val_loss/val_bpb differs from line to line: "
                                f"{', '.join(f'{value:.6f}' for value in inner)}"))
    marks = [{(phase, seconds) for phase, seconds in run.seconds.items()} for run, _ in logs.values()]
    same = set.intersection(*map(set, marks)) if len(marks) > 1 else set()
    if same:
        found.append(look(f"evaluation took exactly as long in all runs: {', '.join(f'{p} {s} s' for p, s in same)}"))
    scores = [run.score for run, _ in logs.values() if run.score]
    if len(scores) > 2 and statistics.stdev(scores) > 0.003:
        found.append(look(f"the runs' scores differ by {max(scores) - min(scores):.4f}"))
    if len(logs) < 3:
        found.append(look(f"{len(logs)} log{'s' * (len(logs) != 1)}: one run says nothing of the spread"))
    return found


def agreement(entry: dict, logs: dict) -> list[Finding]:
    """Is submission.json what the logs say?"""
    found, scores = [], {name: run.score for name, (run, _) in logs.items() if run.score}
    claimed = entry.get("val_bpb", entry.get("mean_val_bpb"))
    if isinstance(claimed, (int, float)) and scores:
        mean = statistics.fmean(scores.values())
        if min(abs(claimed - value) for value in (mean, *scores.values())) > 6e-5:
            found.append(broken(f"submission.json has {claimed:.6f} bits per byte, the logs {mean:.6f} in the mean"))
    results = entry.get("seed_results")
    for seed, result in results.items() if isinstance(results, dict) else ():
        name = next((n for n, (run, _) in logs.items() if str(run.settings.get("seed")) == str(seed)), None)
        said = result.get("val_bpb") if isinstance(result, dict) else None
        if name in scores and isinstance(said, (int, float)) and abs(said - scores[name]) > 6e-5:
            found.append(broken(f"submission.json has {said:.6f} for seed {seed}, {name} {scores[name]:.6f}"))
    return found


def patterns(folder: Path, code: str) -> list[tuple[str, str]]:
    """(file, what to look at) for each pattern in the script and in the code beside it."""
    files = {"train_gpt.py": code} | {path.name: path.read_text(encoding="utf-8", errors="replace")
                                      for path in sorted(folder.glob("*.py")) if path.name != "train_gpt.py"}
    found = {(said, name) for name, text in files.items() for pattern, said in PATTERNS.items()
             if name != "train_gpt_readable.py" and re.search(pattern, text)}
    return [(name, said) for said, name in sorted(found)]


def table(folder: Path, found: list[Finding]) -> str:
    rows = [f"  {'broken' if f.broken else 'look at'}  {f.text}" for f in sorted(found, key=lambda f: not f.broken)]
    rules = sum(f.broken for f in found)
    return "\n".join([f"{folder.resolve().name}: {f'{rules} broken' if rules else 'nothing is broken'}, "
                      f"{len(found) - rules} to look at", *rows])
