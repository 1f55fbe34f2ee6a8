"""What of a checkout of another framework can be compared here: its methods and
its YAML files, tried in seconds.

python3 tools/forks.py path/to/checkout [path/to/method.py ...] [KEY VALUE ...]

A checkout built as mdistiller is (a folder with distillers/__init__.py
inside), or a .py file with a method. Each method is trained for one step on
random images, by a YAML file of the checkout's configs/ where one is for it.
The code in it runs with your rights. A folder of YAML files alone is not
taken: tools/train.py --cfg FILE says of each what is wrong with it. KEY VALUE
pairs give the keys that a method file without a YAML of its own reads.
"""

import re
from pathlib import Path

import _package

from mdistiller.errors import run_command

KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_+]+)+(=.*)?")


def main() -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("paths", nargs="+", help="checkouts, or .py files with a method")
    words = parser.parse_args().paths
    first = next((place for place, word in enumerate(words) if KEY.fullmatch(word)), len(words))
    from mdistiller.study.forks import find_all  # torch takes seconds to import, and --help needs none

    print(find_all(map(Path, words[:first]), words[first:]))


if __name__ == "__main__":
    run_command(main)
