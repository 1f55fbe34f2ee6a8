"""The process that trains one cell's seeds, one after the other, for the campaign that has started it.

python3 -m mdistiller.campaign.worker --cfg FILE --seeds N [N ...] [-- KEY VALUE ...]

Its standard input is a pipe from the campaign: where that ends, the campaign is gone, killed perhaps, and the worker
stops as on SIGTERM, with a checkpoint. Exit status: as tools/train_ours.py has it; 1 where one of several seeds failed.
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

from mdistiller.engine.builder import train
from mdistiller.engine.cfg import load
from mdistiller.errors import Preempted, UserError


def run(file: str | Path, opts: Sequence[str], seeds: Sequence[int]) -> int:
    """Train what is left of each seed; returns the exit status. What went wrong is said on stderr, seed by seed."""
    status = 0
    for seed in seeds:
        words = [*opts, "SEED", str(seed)]
        try:
            stopped = train(load(file, words), words, resume="auto")["signal"]
        except Preempted as error:
            print(f"seed {seed}: {error.lines[0]}", file=sys.stderr, flush=True)
            return error.status
        except UserError as error:
            print(f"error: seed {seed}: {'; '.join(error.lines)}", file=sys.stderr, flush=True)
            status = 1
        except Exception as error:
            traceback.print_exc()
            print(f"error: seed {seed}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            status = 1
        else:
            if stopped:
                return Preempted.status
    return status


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
