"""Last and best test accuracy of runs, side by side.

python3 tools/compare.py output/digits/*
"""

import argparse
from pathlib import Path

from mdistiller.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    words = parser.parse_args()
    from mdistiller.study.tables import compared, text_table  # torch takes seconds to import, and --help needs none

    print(text_table(compared(words.runs)))


if __name__ == "__main__":
    run_command(main)
