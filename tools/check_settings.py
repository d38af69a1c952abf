"""What run.sh asks about settings before it starts anything: exit code 0, or 2 and one line that says what is wrong.

    python train_gpt.py --names | python tools/check_settings.py KEY=VALUE...      # arguments of run.sh
    python train_gpt.py --names | python tools/check_settings.py --profile FILE    # lines of KEY=VALUE
    python tools/check_settings.py --near WORD NAME...                             # "; did you mean NAME?" or nothing

Each KEY has to be a setting, or another program's variable, and a profile names a setting once. For a profile, the keys
are printed whose setting has another name in the environment, which counts. A line on stdin has the names of one
setting; without lines, train_gpt.py has failed and said why.
"""
import difflib
import os
import sys

from shell import AUDIT, OTHERS, RANKS, UsageError, did_you_mean, one_line_errors, overridden, take_settings, unknown


def check_arguments(arguments: list[str], names: list[str]) -> None:
    """Raises UsageError."""
    _, rest = take_settings(arguments, [*names, *AUDIT, *RANKS, "SCALE", "TENSORBOARD"])
    for argument in rest:
        raise unknown(argument.partition("=")[0], names)


def read_profile(path: str) -> list[tuple[str, str]]:
    """The (KEY, VALUE) pairs of a profile's lines, as run.sh reads them. Raises UsageError."""
    with open(path, "rb") as file:
        lines = file.read().decode("utf-8", "replace").splitlines()
    lines = [line.partition("#")[0].strip() for line in lines]
    return [tuple(part.strip() for part in line.split("=", 1)) for line in lines if "=" in line]


def check_profile(path: str, keys: list[str], settings: list[list[str]]) -> None:
    """Raises UsageError for a key that is no setting, and for a setting that is given twice."""
    names = [name for setting in settings for name in setting]
    for key in keys:
        if key not in names + AUDIT and not key.startswith(OTHERS):
            raise UsageError(f"{path}: {unknown(key, names)}")
        if keys.count(key) > 1:
            raise UsageError(f"{path}: {key} is given twice")
    for setting in settings:
        given = [key for key in keys if key in setting and names.count(key) == 1]  # a group's name counts for several
        if len(given) > 1:
            raise UsageError(f"{path}: {' and '.join(given)} are one setting, given twice")


@one_line_errors
def main(arguments: list[str]) -> int:
    if arguments[:1] == ["--near"]:
        word, names = arguments[1], arguments[2:]
        near = [name for name in names if name.startswith(word)] or difflib.get_close_matches(word, names, 3)
        print(did_you_mean(near))
        return 0
    settings = [line.split() for line in sys.stdin]
    if not settings:
        return 2
    if arguments[:1] == ["--profile"]:
        keys = [key for key, _ in read_profile(arguments[1])]
        check_profile(arguments[1], keys, settings)
        print(*overridden(keys, settings, os.environ))
    else:
        check_arguments(arguments, [name for setting in settings for name in setting])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
