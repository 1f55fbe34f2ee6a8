"""Figures, tables and a report of recorded runs: OUT/report.html, and
OUT/figures/ as PNG, SVG and CSV.

python3 tools/analyze.py output/digits/* -o output/report
"""

import sys
from pathlib import Path

import _package

from mdistiller.errors import run_command
from mdistiller.terminal import counted


def main() -> None:
    parser = _package.parser(__doc__, plugins="plug-ins of the runs, where these do not find them")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders; runs that differ in SEED alone are averaged")
    parser.add_argument("-o", "--out", required=True, type=Path, help="folder for the report")
    parser.add_argument(
        "--published", type=Path, help='JSON of published figures: {"METHOD": {"teacher/student": 73.3}}'
    )
    parser.add_argument("--latex", action="store_true", help="also write results.tex")
    parser.add_argument("--markdown", action="store_true", help="also write results.md")
    parser.add_argument(
        "--opts", nargs="+", default=[], metavar="KEY VALUE",
        help="where files lie now: DATASET.ROOT, DISTILLER.TEACHER_CKPT, DEVICE",
    )  # fmt: skip
    words = parser.parse_args()

    from mdistiller.study.analyze import analyze  # after --help, which needs none of its libraries

    def say(text: str) -> None:
        print(text, file=sys.stderr)

    done = analyze(words.runs, words.out, words.published, words.opts, words.latex, words.markdown, say, words.plugins)
    for note in done.notes:
        print(f"skipped: {note}")
    print(f"{words.out / 'report.html'}: {counted(len(done.groups), 'group')}, {counted(len(done.charts), 'chart')}")


if __name__ == "__main__":
    run_command(main)
