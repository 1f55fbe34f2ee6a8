"""Run a plan of configs/plans, or what is left of it, to its tables and charts.

python3 tools/reproduce.py quick
python3 tools/reproduce.py dtkd_charts --only KD,resnet20 --seeds 0-4 \\
    --budget 2h [LOG.PREFIX /scratch ...]

The same command goes on after anything: finished runs are in
RESULTS/runs.jsonl and are left alone, half-done ones go on where they were, a
run that another process trains is waited for. Exit status: 0 all is done; 1 a
run failed; 2 a mistake in the input; 75 stopped, or out of budget, with
something left; 130 a second Ctrl-C.
"""

from pathlib import Path

import _package

from mdistiller.errors import UserError, run_command


def main() -> None:
    parser = _package.parser(__doc__)
    parser.add_argument("plan", help="a name in configs/plans, or a YAML file")
    parser.add_argument("--seeds", help="in place of the plan's: 0-4, or 0,2,5")
    parser.add_argument(
        "--only", metavar="PATTERN", action="append", default=[],
        help="runs that match, with their teachers: words between commas, such as DTKD,resnet20,resnet8 or 'res*,KD'; "
        "may be given several times",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would run and how long; write nothing")
    parser.add_argument("--budget", metavar="TIME", help="such as 2h, 90m, 1h30m: start nothing that will not fit")
    parser.add_argument("--executor", choices=["local", "slurm"], default="local")
    parser.add_argument(
        "--slurm", metavar="KEY=VALUE", nargs="+", default=[],
        help="submitit's parameters, such as slurm_partition=gpu gpus_per_node=1 timeout_min=240",
    )  # fmt: skip
    parser.add_argument(
        "--results", type=Path, metavar="FOLDER", help="in place of the plan's: runs.jsonl, tables, charts"
    )
    parser.add_argument("--published", type=Path, default=_package.PUBLISHED, help="figures to compare with")
    words, opts = parser.parse_known_args()
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise UserError(f"unknown option {flags[0]}; see --help")
    from mdistiller.study.reproduce import reproduce  # torch takes seconds to import, and --help needs none

    raise SystemExit(reproduce(words, _package.ROOT / "configs/plans", opts))


if __name__ == "__main__":
    run_command(main, "the same command goes on with what is left")
