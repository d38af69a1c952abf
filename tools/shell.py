"""What the tools share as commands: settings among their arguments, usage lines, errors."""
from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping

# Beginnings of variables that are other programs': they are passed on as they are.
OTHERS = ("AOT", "CUBLAS", "CUDA", "CUDNN", "GLOO", "HF_", "INDUCTOR", "KMP", "LD_", "LOCAL_RANK", "MASTER_", "MKL",
          "MPL", "NCCL", "NUMEXPR", "NVIDIA", "OMP", "OPENBLAS", "PYTHON", "PYTORCH", "RANK", "TMPDIR", "TORCH", "TQDM",
          "TRITON", "WANDB", "WORLD_SIZE")
# Variables that run.sh and tools/audit.py read.
AUDIT = ["AUDIT", "AUDIT_POSITIONS", "AUDIT_SCRIPT", "AUDIT_TOKENS"]
RANKS = ["NNODES", "NODE_RANK", "RDZV_ENDPOINT", "NPROC_PER_NODE", "MAX_RESTARTS"]
OF_RUN_SH = [*AUDIT, *RANKS, "SCALE", "TENSORBOARD"]  # all that its command line takes besides settings
AUDITED_SCRIPT = "audited_script"  # the module that tools/audit.py makes of a script


class UsageError(Exception):
    """The arguments are not what the tool takes. `one_line_errors` prints it as one line, exit code 2."""


def optional(module: str, what: str, install: str = "-r tools/requirements.txt"):
    """A module of a package that only `what` needs. Raises UsageError where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UsageError(f"{what} needs {module.partition('.')[0]}: pip install {install}") from None


def did_you_mean(near: list[str]) -> str:
    return f"; did you mean {' or '.join(near[:3])}?" if near else ""


def unknown(key: str, names: list[str]) -> UsageError:
    """The error for KEY=VALUE where KEY is no setting, with the nearest names that are."""
    names, short = list(dict.fromkeys(names)), key.replace("LEARNING_RATE", "LR")
    endings = [name for name in names if name.endswith(f"_{short}") and len(short) > 1]
    near = difflib.get_close_matches(key, names, 1, 0.85) or endings or difflib.get_close_matches(key, names, 3)
    return UsageError(f"{key} is not a setting{did_you_mean(near)} (bash run.sh settings lists all)")


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


def read_profile(path: str | os.PathLike) -> list[tuple[str, str]]:
    """The (KEY, VALUE) pairs of a profile's lines, as run.sh reads them."""
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


def overridden(keys: Iterable[str], settings: list[list[str]], given: Mapping[str, str]) -> list[str]:
    """Keys of a profile whose setting is given under another name: an alias, or the name of a group of settings. A
    setting's own name does not override a group. settings: the names of each."""
    names = [name for setting in settings for name in setting]
    return [key for key in keys for setting in settings if key in setting and names.count(key) == 1
            and key not in given and not given.keys().isdisjoint(setting)]


class Parser(argparse.ArgumentParser):
    """Takes settings of train_gpt.py among the arguments; errors are one line.

    The tool's name in usage and errors is what the user typed: run.sh exports RUN_SH_COMMAND, `bash run.sh sweep` say.
    """

    def __init__(self, description: str = "", prog: str | None = None, **more):
        super().__init__(prog=prog or os.environ.get("RUN_SH_COMMAND"), description=description,
                         formatter_class=argparse.RawDescriptionHelpFormatter, **more)

    def error(self, message: str):
        raise UsageError(f"{message} ({self.prog} --help says more)")

    def split(self, argv: list[str], more: Iterable[str] = ()) -> tuple[argparse.Namespace, dict[str, str]]:
        """(the tool's own arguments, the settings and the variables in `more` among them). Raises UsageError."""
        import dataclasses

        import train_gpt as tg
        names = [name for f in dataclasses.fields(tg.Hyperparameters) for name in tg.env_names(f)]
        settings, rest = take_settings(argv, [*names, *more])
        return self.parse_intermixed_args(rest), settings

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The tool's own arguments; settings become environment variables. Raises UsageError."""
        args, settings = self.split(argv)
        os.environ.update(settings)
        return args


def user_errors() -> tuple[type[Exception], ...]:
    """UserError of train_gpt.py if it is imported; not every tool needs it, and with it PyTorch."""
    modules = filter(None, map(sys.modules.get, ("train_gpt", AUDITED_SCRIPT)))
    return tuple(module.UserError for module in modules if hasattr(module, "UserError"))


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """`main`, with a user's error turned into one line on stderr and exit code 2, as train_gpt.py does."""
    @functools.wraps(main)
    def guarded(*arguments) -> int:
        try:
            code = main(*arguments)
            sys.stdout.flush()
            return code
        except (UsageError, *user_errors()) as error:
            if os.environ.get("RANK", "0") == "0":
                print(f"error: {error}", file=sys.stderr)
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        return 2
    return guarded
