"""How the tools end for whoever called them from a shell. They put the repository's root on sys.path before this."""
from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import train_gpt as tg


def one_line_errors(main: Callable[..., int]) -> Callable[..., int]:
    """`main`, with a UserError turned into one line on stderr and exit code 2, as train_gpt.py does."""
    @functools.wraps(main)
    def guarded(*arguments) -> int:
        try:
            return main(*arguments)
        except tg.UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return guarded
