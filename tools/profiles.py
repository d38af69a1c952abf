"""The profiles in profiles/NAME.env, as run.sh reads them: KEY=VALUE lines below what the environment says.

Tools put the repository's root on sys.path before they import this.
"""
from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import shell
import train_gpt as tg

FOLDER = Path(__file__).resolve().parent.parent / "profiles"


@dataclass(frozen=True)
class Published:
    """What the authors of a system reported, from a profile's second line:

        # published: bpb A -> B, N bytes, X ms per step on one H100; not valid, for a reason

    Bits per byte before and after test-time training, as they are written; bytes of code and artifact; milliseconds per
    training step and on how many GPUs, 8 unless the line says one; whether the score is valid. None: not reported."""

    bpb: str = ""
    bytes: int | None = None
    step_ms: float | None = None
    gpus: int = 8
    valid: bool | None = None

    @classmethod
    def parse(cls, line: str) -> Published:
        def find(pattern: str, convert):
            match = re.search(pattern, line)
            return convert(match[1].replace(",", "")) if match else None
        return cls((find(r"bpb ([\d.]+(?: -> [\d.]+)?)", str) or "").replace("->", "→"), find(r"([\d,]+) bytes", int),
                   find(r"([\d.]+) ms", float), 1 if "on one" in line else 8,
                   "not valid" not in line if "valid" in line else None)


@dataclass(frozen=True)
class Profile:
    name: str
    summary: str             # its first comment line
    values: dict[str, str]   # in the order of the file
    published: Published


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.env"))


def load(name: str) -> Profile:
    """Raises UsageError if there is no such profile."""
    if name not in names():
        near = difflib.get_close_matches(name, names(), 3, 0.5)
        raise shell.UsageError(f"no profile {name!r}{shell.did_you_mean(near)} (profiles: {', '.join(names())})")
    lines = (FOLDER / f"{name}.env").read_text(encoding="utf-8").splitlines()
    values = dict(shell.read_profile(FOLDER / f"{name}.env"))
    told = lines[1] if lines[1:] and lines[1].startswith("# published:") else ""
    return Profile(name, lines[0].lstrip("# "), values, Published.parse(told))


def parse(variables: Mapping[str, str]) -> dict[str, object]:
    """The settings among the variables, by field, whether or not they go together. Raises UserError on a bad value."""
    found = {}
    for f in dataclasses.fields(tg.Hyperparameters):
        given = [name for name in tg.env_names(f) if name in variables]  # the own name first, that of a group last
        if given:
            found[f.name] = tg.parse_value(given[0], f, variables[given[0]])
    return found


def variables(profile: Profile, given: Mapping[str, str]) -> dict[str, str]:
    """The profile's variables below those that are given, of all of them those that are settings. As in run.sh, a
    setting counts as given under any of its names, and who gives DATA_PATH gets the vocabulary of that data."""
    names = [list(tg.env_names(f)) for f in dataclasses.fields(tg.Hyperparameters)]
    left_out = shell.overridden(profile.values, names, given)
    left_out += ["TOKENIZER_PATH", "VOCAB_SIZE"] if "DATA_PATH" in given else []
    found = {key: value for key, value in profile.values.items() if key not in left_out}
    found |= {key: value for key, value in given.items() if key in sum(names, [])}
    size = tg.dataset_facts(found.get("DATA_PATH", tg.Hyperparameters.data_path)).vocab_size
    return ({"VOCAB_SIZE": size} if size else {}) | found


def settings(profile: Profile, given: Mapping[str, str] = {}) -> tg.Hyperparameters:
    """Raises UserError where they contradict each other."""
    return tg.Hyperparameters.from_env(variables(profile, given))
