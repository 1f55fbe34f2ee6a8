"""Run the step again whose loss was not finite, from the file that the stopped
run kept.

python3 tools/replay.py 'output/distill/run/bad_batch,epoch_2,step_13'

Exit status: 1 where the step goes bad again, 0 where it does not, 2 for a file
that cannot be used.
"""

from collections.abc import Sequence
from pathlib import Path

import _package

from mdistiller.errors import run_command


def main(words: Sequence[str] | None = None) -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("file", type=Path, help="bad_batch,... in the run's folder")
    file = parser.parse_args(words).file

    from mdistiller.engine.replay import replay  # torch takes seconds to import, and --help needs none

    bad, losses = replay(file)
    print(f"losses: {losses}")
    print(f"first to go bad: {bad or 'nothing: the step is fine here'}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    run_command(main)
