"""Write the pages that come from the code: docs/api.md, docs/config.md and
docs/methods.md.

python3 tools/document.py docs
"""

import argparse
from pathlib import Path

import _package  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    from mdistiller.engine import cfg  # torch takes seconds to import, and --help needs none
    from mdistiller.study import methods, reference

    (folder / "api.md").write_text(reference.api_page(), encoding="utf-8")
    (folder / "config.md").write_text(cfg.config_page(), encoding="utf-8")
    (folder / "methods.md").write_text(methods.methods_page(Path(__file__).resolve().parents[1]), encoding="utf-8")


if __name__ == "__main__":
    main()
