"""Last and best test accuracy of runs, side by side.

python3 tools/compare.py output/digits/*
"""

import sys
from pathlib import Path

import _package

from mdistiller.errors import run_command


def main() -> None:
    parser = _package.parser(__doc__, plugins="plug-ins of the runs, where these do not find them")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    words = parser.parse_args()

    from mdistiller.study.runs import lacking_plugins, read_runs  # torch takes seconds to import, and --help needs none
    from mdistiller.study.tables import compared, text_table
    from mdistiller.terminal import columns

    runs = read_runs(words.runs, plugins=words.plugins)
    table = compared(runs)
    if table.caption:
        print(f"{table.caption}\n")
    print(text_table(table, columns()))
    for line in lacking_plugins(runs):
        print(line, file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
