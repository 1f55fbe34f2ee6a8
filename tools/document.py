"""Write the pages that come from the code: docs/api.md, docs/config.md and
docs/methods.md.

python3 tools/document.py docs
"""

from pathlib import Path

import _package


def main() -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder

    from mdistiller.engine import cfg  # torch takes seconds to import, and --help needs none
    from mdistiller.study.reference import api_page, methods_page

    (folder / "api.md").write_text(api_page(_package.ROOT), encoding="utf-8")
    (folder / "config.md").write_text(cfg.config_page(), encoding="utf-8")
    (folder / "methods.md").write_text(methods_page(_package.ROOT), encoding="utf-8")


if __name__ == "__main__":
    main()
