"""torchrun that ends with the failed rank's own error line and exit code, without the launcher's traceback.

    python tools/launch.py --standalone --nproc_per_node=8 train_gpt.py
"""
import logging
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: list[str]) -> int:
    """Start the ranks; takes torchrun's arguments. Returns the exit code of the first rank that failed, or 0."""
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs each rank that it ends
    try:
        run.run(run.parse_args(arguments))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code  # ended by a signal, as a shell has it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
