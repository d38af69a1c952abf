"""What SCALE=tiny makes of a profile, as the lines of a profile, each with its former value behind a #: run.sh asks.

    bash run.sh pr1092 SCALE=tiny
    python tools/scale.py tiny pr1092

They stand between the profile and the environment: a variable that is set is left alone, and what depends on it follows
it (tools/tiny.py has the rules).
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import profiles  # noqa: E402
import shell  # noqa: E402
import tiny  # noqa: E402


@shell.one_line_errors
def main(argv: list[str]) -> int:
    parser = shell.Parser(__doc__)
    parser.add_argument("scale", help="tiny")
    parser.add_argument("profile")
    args = parser.parse_args(argv)
    profile = profiles.load(args.profile)
    print(tiny.table(profile, tiny.shrunk(args.scale, profile, os.environ)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
