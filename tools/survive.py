"""Does a run survive? Kill it, stop it, damage its files, take its disk or a rank away, and see what remains.

    bash run.sh survive                                   # the whole table; exit code 1 if a figure is missed
    bash run.sh survive --kills 5 --terms 0 --mutants 200 --ranks 0 --disks 2 DATA_PATH=... KEY=VALUE...

The run is a small one with every phase - warm-up, training, calibration, packing, three scores - on the first tokens of
the data. A run that was disturbed goes on with RESUME=1 (without it where no checkpoint was written yet) and has to end
with the artifact and the scores of one left alone, bit for bit.
"""
from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import benchlib
import torch
from forks import Fork, start_ranks, tg
from shell import Parser, UsageError, check_profile, one_line_errors, read_profile

SETTINGS = dict(
    NUM_LAYERS=3, MODEL_DIM=32, NUM_HEADS=4, NUM_KV_HEADS=2, ROPE_DIMS=4, XSA_LAST_N=3, VE_LAYERS="1,2", VE_DIM=16,
    BIGRAM_VOCAB_SIZE=64, BIGRAM_DIM=16, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, TRAIN_BATCH_TOKENS=512, ITERATIONS=30,
    WARMUP_STEPS=2, WARMDOWN_ITERS=15, LATE_QAT_THRESHOLD=0.5, NORMUON=1, MUON_MOMENTUM_WARMUP_STEPS=10,
    VAL_LOSS_EVERY=15, VAL_BATCH_SIZE=4096, TRAIN_LOG_EVERY=1, CHECKPOINT_EVERY=5, GPTQ_ENABLED=1,
    GPTQ_CALIBRATION_BATCHES=4, COMPRESS="lzma", EVAL_STRIDE=16, TTT_EPOCHS=1, TTT_CHUNK_TOKENS=1024, TTT_BATCH_SEQS=8,
    MAX_WALLCLOCK_SECONDS=0, EVAL_MAX_SECONDS=0, DEVICE="cpu", DTYPE="fp32", COMPILE=0, RUN_ID="survivor")
VAL_TOKENS = 4_000
LIMIT_S = 300.0      # no run takes longer; one that does hangs
DOWN_S = 60.0        # after one rank is dead, the others are
LOOK_S = 10.0        # no file is looked at longer
NO_CHECKPOINT = "there is no checkpoint"
PHASES = (  # what the last line of a log tells of the moment: (pattern, phase); the first that fits
    (r"^(summary:|seconds |-{9})", "end"), (r"^(legal_ttt|ttt_sliding)", "test-time training"),
    (r"^final_\S+sliding", "test-time training"), (r"^final_\S+roundtrip", "sliding score"),
    (r"^(artifact:|Total submission|Serialized)", "plain score"), (r"^(packing|DIAGNOSTIC)", "packing"),
    (r"^(gptq|calibrat|ema:applying|swa:applying|peak memory)", "calibration"),
    (r"^(step:|late_qat|resume:|warning: the run)", "training"), (r"^warm", "warm-up"))


@dataclass
class Tally:
    """One row of the table: how often the figure was tried and reached, and what stood in the way."""

    what: str
    figure: str
    tried: int = 0
    reached: int = 0
    seen: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, fault: str, seen: str = "") -> None:
        """One try; no fault: the figure is reached."""
        self.tried, self.reached = self.tried + 1, self.reached + (not fault)
        self.seen.update([seen] if seen else [])
        if fault:
            self.faults.append(fault)
            print(f"{self.what}: {fault}", flush=True)

    def row(self) -> str:
        seen = ", ".join(f"{name} {count}" for name, count in sorted(self.seen.items()))
        return f"| {self.what} | {self.figure} | {self.reached} of {self.tried} | {seen} |"


@dataclass
class Lab:
    """A folder for the runs, the variables they share, and what one that was left alone came to."""

    folder: Path
    variables: dict[str, str]
    random: random.Random
    alone: dict = field(default_factory=dict)   # by number of ranks: (artifact, scores, lines of the log)
    count: int = 0

    def place(self) -> Path:
        """A new folder."""
        self.count += 1
        return self.folder / f"{self.count:04}"

    def environment(self, place: Path, **more) -> dict[str, str]:
        """The variables of a run in the folder `place`."""
        return {**self.variables, "ARTIFACT_DIR": str(place), **{name: str(value) for name, value in more.items()}}

    def start(self, place: Path, limit_bytes: int = 0, **more) -> Fork:
        return Fork(self.environment(place, **more), place / "out", limit_bytes)

    def left_alone(self, world: int = 1) -> tuple[bytes, list, int]:
        """Artifact, scores and lines of the log of a run that nothing disturbs. Raises UsageError if it fails."""
        if world not in self.alone:
            place = self.place()
            ranks = self.ranks(place, world)
            if any(rank.wait(LIMIT_S) for rank in ranks):
                raise UsageError(f"the run fails undisturbed: {benchlib.last_line(ranks[0].printed())}")
            said = ranks[0].printed()
            self.alone[world] = *results(place, said), said.count("\n")
        return self.alone[world]

    def ranks(self, place: Path, world: int, **more) -> list[Fork]:
        """A run of so many ranks; one has no process group."""
        if world == 1:
            return [self.start(place, **more)]
        return start_ranks(world, self.environment(place, **more), place / "out")

    def go_on(self, place: Path, world: int = 1) -> str:
        """Resume the run in `place` and let it end. Returns what is wrong with its results; nothing: ""."""
        for resume in (1, 0):
            ranks = self.ranks(place, world, RESUME=resume)
            before = len(ranks[0].printed())
            codes = [rank.wait(LIMIT_S) for rank in ranks]
            said = ranks[0].printed()[before:]
            if not (resume and any(codes) and NO_CHECKPOINT in said):
                break
        if any(codes):
            return f"going on ends with {codes}: {benchlib.last_line(said)}"
        artifact, scores = results(place, said)
        wanted = self.left_alone(world)
        return "" if (artifact, scores) == wanted[:2] else f"other results: {scores}, not {wanted[1]}"


def results(place: Path, printed: str) -> tuple[bytes, list]:
    """(artifact, scores) of a run that has ended, from its files and its last line."""
    summary = json.loads(benchlib.last_line(printed).removeprefix("summary: "))
    scores = [summary[f"val_bpb_{key}"] for key in ("pre_quant", "roundtrip", "sliding", "ttt")]
    return (place / "final_model.ptz").read_bytes(), [*scores, summary["steps"]]


def phase_of(printed: str) -> str:
    for line in reversed(printed.splitlines()):
        for pattern, phase in PHASES:
            if re.match(pattern, line):
                return phase
    return "start"


# ---- killed and stopped ------------------------------------------------------------------------------------
def disturbed(lab: Lab, number: int) -> tuple[Path, Fork]:
    """A run that got a signal soon after a random line of its log, before its end."""
    lines = lab.left_alone()[2]
    while True:
        place, at = lab.place(), lab.random.randrange(lines)
        run = lab.start(place)
        while run.printed().count("\n") < at and run.poll() is None:
            time.sleep(0.002)
        time.sleep(lab.random.uniform(0, 0.1))
        run.send(number)
        if run.wait(LIMIT_S) != 0:
            return place, run
        shutil.rmtree(place)  # it was faster than the one before


def kill(lab: Lab, count: int) -> Tally:
    tally = Tally("SIGKILL at a random moment", "resumed to the same bits")
    for _ in range(count):
        place, run = disturbed(lab, signal.SIGKILL)
        phase = phase_of(run.printed())
        fault = lab.go_on(place)
        tally.add(fault and f"killed in {phase}: {fault}", phase)
        shutil.rmtree(place)
    return tally


def steps_in(printed: str, pattern: str) -> list[int]:
    return [int(step) for step in re.findall(pattern, printed, re.MULTILINE)]


def stop(lab: Lab, count: int) -> Tally:
    """After SIGTERM a run has ended with code 143, and goes on with the step after the last one it took."""
    tally = Tally("SIGTERM at a random moment", "no step lost, the same bits")
    for _ in range(count):
        place, run = disturbed(lab, signal.SIGTERM)
        before = run.printed()
        taken = max(steps_in(before, r"^step:(\d+)/\d+ train_loss"), default=0)
        fault = lab.go_on(place)
        resumed = max(steps_in((place / "out").read_text()[len(before):], r"^resume:.*step[: ](\d+)"), default=0)
        if run.code != 128 + signal.SIGTERM:
            fault = f"exit code {run.code}, not {128 + signal.SIGTERM}: {benchlib.last_line(before)}"
        elif resumed != taken:
            fault = f"step {taken} was taken, but it went on from step {resumed}"
        tally.add(fault and f"stopped in {phase_of(before)}: {fault}", phase_of(before))
        shutil.rmtree(place)
    return tally


# ---- damaged files -----------------------------------------------------------------------------------------
def mutate(blob: bytes, chance: random.Random) -> bytes:
    """The file with damage that makes a difference."""
    while (mutant := mutate_once(blob, chance)) == blob:
        pass
    return mutant


def mutate_once(blob: bytes, chance: random.Random) -> bytes:
    """One kind of damage: bits turned, cut off, longer, zeros, a piece elsewhere or out, a large number."""
    out, at, kind = bytearray(blob), chance.randrange(len(blob)), chance.randrange(8)
    length = chance.choice((1, 4, 64, 1000))
    if kind < 2:
        for _ in range(chance.choice((1, 3))):
            out[chance.randrange(min(len(out), 1100) if kind else len(out))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        out += chance.randbytes(length)
    elif kind == 4:
        out[at:at + length] = bytes(len(out[at:at + length]))
    elif kind == 5:
        out[at:at + length] = out[:length]
    elif kind == 6:
        del out[at:at + length]
    else:
        at = chance.randrange(0, min(len(out), 1024), 4)
        out[at:at + 4] = chance.choice((b"\xff\xff\xff\x7f", b"\xff" * 4, bytes(4)))
    return bytes(out)


def read_shard(path: Path, variables: dict[str, str]) -> None:
    stream = tg.TokenStream(str(path), int(variables["VOCAB_SIZE"]))
    stream.read(0, len(stream))


def whole_shard(blob: bytes) -> bool:
    """Whether magic, version and length are those of a shard."""
    magic, version, count = (int.from_bytes(blob[i:i + 4], "little", signed=True) for i in (0, 4, 8))
    return (magic, version) == (tg.SHARD_MAGIC, tg.SHARD_VERSION) and len(blob) == 1024 + 2 * count


class CheckpointReader:
    """Resumes in this process from a checkpoint written before, of which there is no older one."""

    def __init__(self, lab: Lab):
        self.cfg = tg.settings_from(lab.environment(lab.place(), RESUME=1))
        with contextlib.redirect_stdout(io.StringIO()):
            self.rt = tg.Runtime.open(self.cfg)
        self.path = tg.checkpoint_path(self.rt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        specs = tg.quant_specs(self.cfg, tg.parameter_shapes(self.cfg))
        self.state = tg.TrainState.initial(tg.GPT(self.cfg, self.rt.attend, self.rt.dtype, specs), self.cfg, self.rt)

    def __call__(self, path: Path, variables: dict[str, str]) -> None:
        os.replace(path, self.path)
        with contextlib.redirect_stdout(io.StringIO()):
            tg.load_checkpoint(self.cfg, self.rt, self.state)


def take_profile(path: Path, variables: dict[str, str]) -> None:
    """As run.sh does: its lines, then its names, then its values."""
    names = [list(tg.env_names(f)) for f in dataclasses.fields(tg.Hyperparameters)]
    values = read_profile(path)
    check_profile(str(path), [key for key, _ in values], names)
    tg.Hyperparameters.from_env({**dict(values), **variables})


def looked_at(read, path: Path, variables: dict[str, str]) -> str:
    """"accepted", "refused", or what is wrong: another exception than a user's error, a message of several lines, or no
    end."""
    def no_end(*_):
        raise TimeoutError
    signal.signal(signal.SIGALRM, no_end)
    signal.setitimer(signal.ITIMER_REAL, LOOK_S)
    try:
        read(path, variables)
        return "accepted"
    except (tg.UserError, UsageError) as error:
        return "refused" if "\n" not in str(error) else f"a message of several lines: {str(error)[:100]!r}"
    except TimeoutError:
        return f"it is still read after {LOOK_S:g} s"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:100]!r}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def damage(lab: Lab, count: int) -> Tally:
    """Mutated shards and checkpoints are refused if their length or contents cannot be right, profiles read or refused;
    each with one line."""
    tally = Tally("damaged shards, checkpoints, profiles", "read or refused in one line")
    data, place, scratch = Path(lab.variables["DATA_PATH"]), lab.place(), lab.folder / "mutant_train_0.bin"
    lab.start(place, ITERATIONS=5, TTT_ENABLED=0, EVAL_STRIDE=0).wait(LIMIT_S)
    checkpoint = next(path for path in sorted(place.rglob("*.pt")) if "checkpoint" in str(path.relative_to(place)))
    profile = benchlib.ROOT / "profiles" / "smoke.env"
    val = (data / "fineweb_val_000000.bin").read_bytes()
    kinds = [("shard", val, read_shard, whole_shard), ("profile", profile.read_bytes(), take_profile, lambda _: True),
             ("checkpoint", checkpoint.read_bytes(), CheckpointReader(lab), lambda _: False)]
    for i in range(count):
        kind, blob, read, fits = kinds[i % len(kinds)]
        mutant = mutate(blob, lab.random)
        scratch.write_bytes(mutant)
        verdict = looked_at(read, scratch, lab.variables)
        fault = "" if verdict in ("accepted", "refused") else f"{kind}: {verdict}"
        if verdict == "accepted" and not fits(mutant):
            fault = f"{kind}: accepted, but it cannot be right"
        tally.add(fault, f"{kind} {verdict if not fault else 'at fault'}")
    return tally


# ---- ranks and disks ---------------------------------------------------------------------------------------
def lose_rank(lab: Lab, count: int, world: int = 8) -> Tally:
    """One of the ranks is killed at a random step: the others end by themselves, without a launcher."""
    tally = Tally(f"one of {world} ranks killed at a random step",
                  f"down within {DOWN_S:.0f} s, resumed to the same bits")
    steps, longest = int(lab.variables["ITERATIONS"]), 0.0
    for _ in range(count if lab.left_alone(world) else 0):
        place, at, victim = lab.place(), lab.random.randrange(1, steps), lab.random.randrange(world)
        ranks, until = lab.ranks(place, world), time.monotonic() + LIMIT_S
        while f"step:{at}/" not in ranks[0].printed() and ranks[0].poll() is None and time.monotonic() < until:
            time.sleep(0.005)
        ranks[victim].send(signal.SIGKILL)
        dead = time.monotonic()
        codes = [rank.wait(max(dead + DOWN_S - time.monotonic(), 0.01)) for rank in ranks]
        longest = max(longest, time.monotonic() - dead)
        fault = f"rank {codes.index(None)} is still there" if None in codes else ""
        fault = fault or (f"exit codes {codes}" if 0 in codes else "")
        tally.add(fault or lab.go_on(place, world))
        shutil.rmtree(place)
    tally.seen[f"longest {longest:.1f} s; ranks"] = world
    return tally


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def fill_disk(lab: Lab, count: int) -> Tally:
    """No file grows beyond a limit, from nothing to the largest there is. What an earlier run left stays whole, and
    with room again the run goes on."""
    tally = Tally("disk full, as a limit on file size", "old files intact, then resumed to the same bits")
    old = lab.place()
    lab.start(old, RUN_ID="old").wait(LIMIT_S)
    (old / "out").unlink()
    kept, largest = files_of(old), max(path.stat().st_size for path in old.rglob("*") if path.is_file())
    ours = {name: blob for name, blob in kept.items() if "old" in Path(name).as_posix()}
    for i in range(count):
        place, limit = lab.place(), 1 + int(largest * (i + lab.random.random()) / count)
        shutil.copytree(old, place, symlinks=True)
        run = lab.start(place, limit_bytes=limit)
        code, said = run.wait(LIMIT_S), run.printed()
        now = files_of(place)
        fault = "" if code in (0, 2) and "Traceback" not in said else f"exit code {code}: {benchlib.last_line(said)}"
        changed = sorted(name for name, blob in ours.items() if now.get(name) != blob)
        fault = fault or (f"changed: {', '.join(changed)}" if changed else "")
        fault = fault or spoilt(place / "final_model.ptz") or leftovers(place)
        tally.add(fault and f"limit {limit:,}: {fault}" or lab.go_on(place), f"exit code {code}")
        shutil.rmtree(place)
    return tally


def spoilt(artifact: Path) -> str:
    try:
        tg.read_artifact(artifact.read_bytes())
        return ""
    except (tg.UserError, OSError) as error:
        return f"final_model.ptz is not whole: {error}"


def leftovers(place: Path) -> str:
    spare = [path.name for path in place.rglob("*.tmp")]
    return f"left behind: {', '.join(spare)}" if spare else ""


# ---- the whole ---------------------------------------------------------------------------------------------
def build_parser() -> Parser:
    parser = Parser("Kill, stop and damage small runs, and see whether they go on to the same bits.")
    for name, count, what in (("kills", 50, "SIGKILLs"), ("terms", 20, "SIGTERMs"), ("mutants", 2000, "damaged files"),
                              ("ranks", 10, "runs of 8 ranks that lose one"), ("disks", 20, "full disks")):
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments and places (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the table there, with the command")
    return parser


def variables_of(given: dict[str, str], folder: Path) -> dict[str, str]:
    """The variables of the small run. Its data: the first tokens of DATA_PATH's validation text. Raises UsageError."""
    default = str(benchlib.ROOT / "data" / "datasets" / "embedded_sp1024")
    found = tg.find_data({"DATA_PATH": default, **given})
    if not list(Path(found["DATA_PATH"]).glob("fineweb_val_*.bin")):
        raise UsageError(f"no data in {found['DATA_PATH']}; bash run.sh data embedded makes it")
    settings = {**SETTINGS, "VOCAB_SIZE": 1024, **found}
    data = benchlib.cut_validation(Path(found["DATA_PATH"]), folder / "data", VAL_TOKENS, int(settings["EVAL_SEQ_LEN"]))
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return {**plain, **{name: str(value) for name, value in settings.items()}, "DATA_PATH": str(data),
            "TOKENIZER_PATH": str(Path(found["TOKENIZER_PATH"]).resolve())}


def table(tallies: list[Tally], argv: list[str], seconds: float) -> str:
    return "\n".join([f"`bash run.sh {' '.join(['survive', *argv])}`, {seconds / 60:.0f} minutes:", "",
                      "| what was done | figure | reached | seen |", "| --- | --- | --- | --- |",
                      *(tally.row() for tally in tallies)])


@one_line_errors
def main(argv: list[str]) -> int:
    args, given = build_parser().split(argv)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        lab = Lab(Path(name), variables_of(given, Path(name)), random.Random(args.seed))
        todo = ((kill, args.kills), (stop, args.terms), (damage, args.mutants), (lose_rank, args.ranks),
                (fill_disk, args.disks))
        tallies = [act(lab, count) for act, count in todo if count]
    text = table(tallies, argv, time.monotonic() - begun)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    return int(any(tally.faults for tally in tallies))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
