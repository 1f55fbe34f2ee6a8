"""The process that trains one cell's seeds, side by side, for the campaign that has started it.

python3 -m mdistiller.campaign.worker --cfg FILE --seeds N [N ...] [-- KEY VALUE ...]

Its standard input is a pipe from the campaign: where that ends, the campaign is gone, killed perhaps, and the worker
stops as on SIGTERM, with a checkpoint. Exit status: as tools/train_ours.py has it; 1 where one of several seeds failed;
IN_USE where another process trains in a folder of theirs.
"""

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from mdistiller.engine.cfg import load
from mdistiller.engine.seeds import train_seeds
from mdistiller.errors import FolderInUse, Preempted, UserError

IN_USE = 3


def run(file: str | Path, opts: Sequence[str], seeds: Sequence[int]) -> int:
    """Train what is left of each seed, side by side; returns the exit status. What went wrong is said on stderr, with
    the seed where one alone was lost.
    """
    words = list(opts)
    try:
        train_seeds(load(file, words), seeds, resume="auto")
    except Preempted as error:
        print(error.lines[0], file=sys.stderr, flush=True)
        return error.status
    except FolderInUse:
        return IN_USE
    except UserError as error:
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


def leash(descriptor: int = 0) -> None:
    """From here on, this process gets a SIGTERM when the other end of the pipe closes."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(descriptor, 1):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, required=True)
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    leash()
    raise SystemExit(run(arguments.cfg, words[split + 1 :], arguments.seeds))


if __name__ == "__main__":
    main()
