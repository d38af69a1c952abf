"""torchrun that ends with the failed rank's own error line and exit code, without the launcher's traceback.

    python tools/launch.py --standalone --nproc_per_node=8 train_gpt.py
"""
import logging
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main(arguments: list[str]) -> int:
    """Start the ranks; takes torchrun's arguments. Returns the exit code of the first rank that failed, that of
    a signal that ended the launcher, or 0."""
    for name in ("", ".agent.server.api"):  # they log each rank that they end, and the signal
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    try:
        run.run(run.parse_args(arguments))
    except SignalException as stop:  # the ranks have it too
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode  # as a shell has it
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
