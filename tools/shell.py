"""What the tools share towards whoever calls them from a shell: settings among their arguments, usage lines, errors.

    python train_gpt.py --names | python tools/shell.py KEY=VALUE...     # how run.sh asks about its own arguments

Tools put the repository's root on sys.path before they import this.
"""
from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable

# Beginnings of variables that are other programs': they are passed on as they are.
OTHERS = ("AOT", "CUBLAS", "CUDA", "CUDNN", "GLOO", "HF_", "INDUCTOR", "KMP", "LD_", "LOCAL_RANK", "MASTER_", "MKL",
          "MPL", "NCCL", "NUMEXPR", "NVIDIA", "OMP", "OPENBLAS", "PYTHON", "PYTORCH", "RANK", "TMPDIR", "TORCH", "TQDM",
          "TRITON", "WORLD_SIZE")
# What `run.sh`, tools/audit.py and tools/scale.py go by.
RUN_SH = ["AUDIT", "AUDIT_OUT", "AUDIT_POSITIONS", "AUDIT_SCRIPT", "AUDIT_TOKENS", "SCALE"]


class UsageError(Exception):
    """The arguments are not what the tool takes. `one_line_errors` prints it as one line, exit code 2."""


def unknown(key: str, names: list[str]) -> UsageError:
    """The complaint about KEY=VALUE where KEY is no setting, with the nearest that are."""
    names, short = list(dict.fromkeys(names)), key.replace("LEARNING_RATE", "LR")
    near = (difflib.get_close_matches(key, names, 1, 0.85) or [name for name in names if name.endswith(f"_{short}")]
            or difflib.get_close_matches(key, names, 3))
    meant = f"; did you mean {' or '.join(near[:3])}?" if near else ""
    return UsageError(f"{key} is not a setting{meant} (bash run.sh settings lists all)")


def take_settings(arguments: Iterable[str], names: list[str]) -> tuple[dict[str, str], list[str]]:
    """({KEY: value}, the other arguments). KEY is one of `names` or another program's variable.

    A prompt may contain an equals sign: of the rest, only a single word with a name of three letters or more is taken
    for a mistyped setting. After `--` nothing is a setting. Raises UsageError.
    """
    settings, rest = {}, []
    arguments = iter(arguments)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and re.fullmatch(r"[A-Z][A-Z0-9_]*", key) and (key in names or key.startswith(OTHERS)):
            settings[key] = value
        elif re.fullmatch(r"[A-Z][A-Z0-9_]{2,}=\S*", argument):
            raise unknown(key, names)
        else:
            rest.append(argument)
        if argument == "--":
            rest += arguments
    return settings, rest


class Parser(argparse.ArgumentParser):
    """Calls the tool what run.sh calls it, complains in one line, and takes settings of train_gpt.py."""

    def __init__(self, description: str = "", prog: str | None = None, **more):
        super().__init__(prog=prog or os.environ.get("RUN_SH_COMMAND"), description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str):
        raise UsageError(f"{message} ({self.prog} --help says more)")

    def split(self, argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
        """(the tool's own arguments, the settings among them). Raises UsageError."""
        import dataclasses

        import train_gpt as tg
        names = [name for f in dataclasses.fields(tg.Hyperparameters) for name in tg.env_names(f)]
        settings, rest = take_settings(argv, names)
        return self.parse_intermixed_args(rest), settings

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The tool's own arguments; settings become environment variables. Raises UsageError."""
        args, settings = self.split(argv)
        os.environ.update(settings)
        return args


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """`main`, with a user's error turned into one line on stderr and exit code 2, as train_gpt.py does."""
    from train_gpt import UserError

    @functools.wraps(main)
    def guarded(*arguments) -> int:
        try:
            code = main(*arguments)
            sys.stdout.flush()
            return code
        except (UsageError, UserError) as error:
            print(f"error: {error}", file=sys.stderr)
        except BrokenPipeError:  # the reader, `head` say, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 2
    return guarded


def check(arguments: list[str], names: list[str]) -> int:
    """Exit code 0 if every argument is a setting that run.sh may pass on. No names: their printing has failed."""
    try:
        _, rest = take_settings(arguments, names + RUN_SH) if names else ({}, [])
        for argument in rest:
            raise unknown(argument.partition("=")[0], names)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if names else 2


if __name__ == "__main__":
    sys.exit(check(sys.argv[1:], sys.stdin.read().split()))
