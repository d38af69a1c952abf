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

from shell import (OF_RUN_SH, check_profile, did_you_mean, one_line_errors, overridden, read_profile, take_settings,
                   unknown)


def check_arguments(arguments: list[str], names: list[str]) -> None:
    """Raises UsageError."""
    _, rest = take_settings(arguments, [*names, *OF_RUN_SH])
    for argument in rest:
        raise unknown(argument.partition("=")[0], names)


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
