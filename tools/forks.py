"""What of a checkout of another framework can be compared here: its methods and
its YAML files, tried in seconds.

python3 tools/forks.py path/to/checkout [path/to/method.py ...]

A checkout built as mdistiller is (a folder with distillers/__init__.py
inside), or a .py file with a method. Each method is trained for one step on
random images, by a YAML file of the checkout's configs/ where one is for it.
The code in it runs with your rights. A folder of YAML files alone is not
taken: tools/train.py --cfg FILE says of each what is wrong with it.
"""

import argparse
from pathlib import Path

from mdistiller.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="checkouts, or .py files with a method")
    words = parser.parse_args()
    from mdistiller.study.forks import find_all  # torch takes seconds to import, and --help needs none

    print(find_all(words.paths))


if __name__ == "__main__":
    run_command(main)
