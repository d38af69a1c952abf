"""Plant mistakes in the code, one at a time, and see which of them the tests notice.

    python tools/mutate.py tests/mutants.toml --jobs 2           # a line a mistake and a total
    python tools/mutate.py tests/mutants.toml --only muon --all  # what the nearest tests miss goes through all of them

The list is TOML (tables [[mutant]]) or JSON of the same shape. A mistake is an exact replacement of text: `name`,
`old`, `new`, if need be `file` (train_gpt.py), `count` (how often `old` stands there: 1) and `tests` (files or ids;
else the files nearest to the room). What cannot be planted "does not apply": the list is out of date. Exit code 1 if
a mistake survives or does not apply. All is done in copies of the repository (what git tracks or does not ignore);
the tests run on one without a mistake first, since a test that always fails would notice everything. A test
that runs into the time limit has noticed.
"""
from __future__ import annotations

import importlib
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402
from shell import Parser, one_line_errors  # noqa: E402
toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # which pytest brings

NEAREST = {  # room -> its test files, the likeliest to notice first
    "CONFIG": "config", "RUNTIME": "runtime training", "DATA": "data bytes transforms packing", "METRIC": "data evaluation",
    "QUANTISER": "quantiser", "KERNELS": "kernels", "MODEL": "reference_model model golden", "PARAMETERS": "optimisers",
    "OPTIMISERS": "optimisers", "SCHEDULES": "schedules", "AVERAGING": "averaging", "TRAINING": "training pipeline",
    "ROUNDING": "rounding quantiser", "ARTIFACT": "artifact", "ADAPTERS": "adapters",
    "EVALUATION": "evaluation adapters clocks", "MAIN": "pipeline"}


class Mutant(NamedTuple):
    """One mistake: `old` becomes `new` in `file`, all `count` times."""
    name: str
    old: str
    new: str
    file: str = "train_gpt.py"
    count: int = 1
    tests: list[str] = ()


def read_list(path: Path) -> list[Mutant]:
    """The mistakes of a list. Raises UserError."""
    try:
        parse = toml.loads if path.suffix == ".toml" else json.loads
        return [Mutant(**row) for row in parse(path.read_text())["mutant"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise tg.UserError(f"{path} is not a list of mistakes (name, old, new, ...): {error}") from None


def plant(text: str, mutant: Mutant) -> str:
    """The text with the mistake in it. Raises ValueError or SyntaxError with why it does not apply."""
    if text.count(mutant.old) != mutant.count:
        raise ValueError(f"`old` stands there {text.count(mutant.old)} times, not {mutant.count}")
    changed = text.replace(mutant.old, mutant.new)
    compile(changed if mutant.file.endswith(".py") else "", mutant.file, "exec", dont_inherit=True)
    return changed


def nearest_tests(mutant: Mutant, text: str, root: Path) -> list[str]:
    """Where to look first: as the list says, else by the room or by the file's name, else everywhere."""
    rooms = re.findall(r"^# -{20,} (\w+)$", text[:text.find(mutant.old)], re.M)
    names = NEAREST.get(rooms[-1], "") if rooms else f"{Path(mutant.file).stem} tools"
    files = [f"tests/test_{name}.py" for name in names.split() if (root / f"tests/test_{name}.py").is_file()]
    return list(mutant.tests) or files or ["tests"]


def first_failure(copy: Path, tests: list[str], limit_s: float) -> str:
    """The first test that fails in a copy; "" when all pass. Raises UserError when pytest could not run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # without bytecode: Python takes a mutant's for that of another one of the same size and second
    process = subprocess.Popen(command, cwd=copy, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
                               start_new_session=True)
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the ranks that a test may have started
        process.communicate()
        return f"the time limit of {limit_s:g} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)
    if process.returncode and not failed:
        raise tg.UserError(f"pytest ended with code {process.returncode}: {' '.join(output.splitlines()[-1:])}")
    return failed[1] if process.returncode else ""


def copy_repository(root: Path, copy: Path) -> Path:
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True)
    if listed.returncode:
        raise tg.UserError(f"{root} is not a git checkout, which says what to copy: {listed.stderr.strip()}")
    for name in listed.stdout.split("\0"):
        if (root / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / name, copy / name)
    return copy


@one_line_errors
def main(argv: list[str], root: Path = ROOT) -> int:
    parser = Parser(__doc__)
    parser.add_argument("list", type=Path)
    parser.add_argument("--only", default="", metavar="PART", help="mistakes with this in their name")
    parser.add_argument("--jobs", type=int, choices=range(1, 65), default=1, metavar="N", help="so many at a time")
    parser.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="of one run of tests")
    parser.add_argument("--all", action="store_true", help="then all tests, for those the nearest ones miss")
    args, copies = parser.parse_args(argv), queue.SimpleQueue()
    chosen = [mutant for mutant in read_list(args.list) if args.only in mutant.name]

    def examine(mutant: Mutant) -> str:
        copy = copies.get()
        path, text = copy / mutant.file, (copy / mutant.file).read_text()
        try:
            path.write_text(plant(text, mutant))
            found = first_failure(copy, nearest_tests(mutant, text, copy), args.limit)
            found = found or (args.all and first_failure(copy, ["tests"], 10 * args.limit))
            verdict = f"noticed by {found}" if found else "NOT NOTICED"
        except (ValueError, SyntaxError) as error:
            verdict = f"does not apply: {error}"
        finally:
            path.write_text(text)
            copies.put(copy)
        print(f"{mutant.name}: {verdict}", flush=True)
        return verdict
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        for i in range(args.jobs):
            copies.put(first := copy_repository(root, Path(folder, str(i))))
        tests = {test for m in chosen for test in nearest_tests(m, tg.read_file(str(first / m.file)).decode(), first)}
        if chosen and (broken := first_failure(first, sorted(tests), 10 * args.limit)):
            raise tg.UserError(f"{broken} fails before anything is planted")
        verdicts = list(pool.map(examine, chosen))
    noticed, stale = (sum(v.startswith(what) for v in verdicts) for what in ("noticed", "does not apply"))
    print(f"{noticed} of {len(verdicts) - stale} noticed" + f", {stale} do not apply" * bool(stale))
    return int(noticed < len(verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
