"""Checks the KEY=VALUE arguments of run.sh: each KEY has to be a setting, or another program's variable.

    python train_gpt.py --names | python tools/check_settings.py KEY=VALUE...

Exit code 0: all are; 2: one line says which is not. Without names on stdin, train_gpt.py has failed and said why.
"""
import sys

from shell import AUDIT, one_line_errors, take_settings, unknown


@one_line_errors
def main(arguments: list[str], names: list[str]) -> int:
    if not names:
        return 2
    _, rest = take_settings(arguments, [*names, *AUDIT, "SCALE"])
    for argument in rest:
        raise unknown(argument.partition("=")[0], names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], sys.stdin.read().split()))
