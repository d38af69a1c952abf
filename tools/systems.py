"""The profiles as a table: what each is, what was published of it, the estimated size of its artifact.

    bash run.sh systems
    python tools/systems.py

"bytes" are those published, code included. "fits": code and artifact within 16,000,000 bytes; "perhaps" where that lies
within the error of the estimate, SIZE_FIT where that setting will make it fit (see tools/estimate.py).
"""
from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402, F401  # its errors become one line
import estimate  # noqa: E402
import shell  # noqa: E402


@shell.one_line_errors
def main(argv: list[str]) -> int:
    shell.Parser(__doc__).parse_args(argv)
    print(estimate.table_of_systems())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
