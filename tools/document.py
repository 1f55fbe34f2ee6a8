"""Write the page of all configuration keys, from the code.

python3 tools/document.py docs/config.md
"""

import argparse
from pathlib import Path

from mdistiller.engine.cfg import page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.parse_args().file.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
