"""torchrun that ends with the failed rank's own error line and exit code, without the launcher's traceback.

    python tools/launch.py --standalone --nproc_per_node=8 train_gpt.py
    python tools/launch.py --nnodes=2 --node_rank=1 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train_gpt.py

On several machines the ranks are those of --node_rank: the machine 0 has rank 0 and with it the files of the run, also
after a restart. torchrun by itself numbers the machines by their names.
"""
import argparse
import logging
import os
import pathlib
import runpy
import signal
import sys
import tempfile

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

MACHINE = "LAUNCH_MACHINE"  # "NUMBER HOST FOLDER", for the processes that this file starts on one of several machines


def number_by_machine(args: argparse.Namespace, folder: str) -> None:
    """Let this file start the script, as the rank its machine's number gives; machine 0 hosts the rendezvous. An empty
    `folder` remembers which ranks have been started."""
    os.environ[MACHINE] = f"{args.node_rank} {args.rdzv_endpoint.rpartition(':')[0]} {folder}"
    args.training_script_args = [args.training_script, *args.training_script_args]
    args.training_script = os.path.abspath(__file__)
    args.rdzv_conf = ",".join(filter(None, [args.rdzv_conf, f"is_host={int(args.node_rank == 0)}"]))
    args.node_rank = 0  # c10d warns that it takes none


def start_script(arguments: list[str]) -> None:
    """In a process of one of several machines: run the script under its rank."""
    number, host, folder = os.environ[MACHINE].split(maxsplit=2)
    rank = int(number) * int(os.environ["LOCAL_WORLD_SIZE"]) + int(os.environ["LOCAL_RANK"])
    os.environ.update(RANK=str(rank), MASTER_ADDR=host)
    started = pathlib.Path(folder, str(rank))
    if started.exists():  # torchrun does not count the restart by which it takes in a machine that joins
        os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"
    started.touch()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def main(arguments: list[str]) -> int:
    """Start the ranks; takes torchrun's arguments. Returns the exit code of the first rank that failed, that of
    a signal that ended the launcher, or 0."""
    for name in ("", ".agent.server.api"):  # they log each rank that they end, and the signal
        logging.getLogger(f"torch.distributed.elastic{name}").setLevel(logging.CRITICAL)
    # torch 2.13 keeps its shared store over a restart: the new ranks may find the old ones' addresses in it, and a machine
    # that joins is not told where it is. Without it, each start has a store of its own
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    args = run.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory(prefix="launch-") as folder:
            if args.nnodes != "1" and args.rdzv_backend == "c10d":
                number_by_machine(args, folder)
            run.run(args)
    except SignalException as stop:  # the ranks have it too
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        print(f"error: rank {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode  # as a shell has it
    except (RendezvousError, DistError) as error:
        print(f"error: no connection to the other machines by {args.rdzv_endpoint}: {str(error).splitlines()[0]}",
              file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    if MACHINE in os.environ:
        start_script(sys.argv[1:])
    else:
        sys.exit(main(sys.argv[1:]))
