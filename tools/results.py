"""Tables (Markdown, LaTeX, CSV) and bar charts (PNG, SVG) of the runs on record.

python3 tools/results.py dtkd_charts
    of a plan's runs in results/runs.jsonl, into results/
python3 tools/results.py mine/runs.jsonl --only 'KD,resnet8'
    of whatever is on record there, by the protocol of most runs
python3 tools/results.py --page docs/reproduction.md
    the tables between that page's markers
"""

from pathlib import Path

import _package

from mdistiller.errors import UserError, run_command


def main() -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("what", nargs="?", help="a plan, or a runs.jsonl")
    parser.add_argument("--only", metavar="PATTERN", action="append", default=[], help="as in tools/reproduce.py")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="where a plan's runs.jsonl lies")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write; beside the runs.jsonl")
    parser.add_argument("--published", type=Path, default=_package.PUBLISHED, help="figures to compare with")
    parser.add_argument("--page", type=Path, help="a Markdown page with markers")
    words = parser.parse_args()
    if words.page and (words.what or words.only or words.out):
        raise UserError("--page: goes with --results and --published alone; its markers name the plans")
    if not words.page and not words.what:
        raise UserError("give a plan such as dtkd_charts, a runs.jsonl, or --page docs/reproduction.md")

    from mdistiller.study import results  # torch takes seconds to import, and --help needs none

    plans = _package.ROOT / "configs/plans"
    if words.page:
        results.fill(words.page, plans, words.published, words.results or _package.ROOT / "results")
    else:
        print(results.show(words.what, plans, words.results, words.out, words.published, words.only))


if __name__ == "__main__":
    run_command(main)
