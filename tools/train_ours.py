"""Train a student, by the method and with the teacher that a YAML file names.

python3 tools/train_ours.py --cfg configs/digits/dtkd/res20_res8.yaml [--resume [auto]] [KEY VALUE ...]

Exit status: 0 done; 1 the run failed (no finite loss, memory, disk); 2 a mistake in the input; 75 stopped by SIGTERM,
SIGINT, SIGUSR1 or SIGHUP after a step, to go on there with --resume; 130 stopped at once by a second Ctrl-C.
"""

import argparse
import sys

from mdistiller.engine.builder import train
from mdistiller.engine.cfg import load
from mdistiller.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default=None, help="YAML file; without it, every key has its default")
    parser.add_argument(
        "--resume", nargs="?", choices=["auto", "last"],
        help="go on with the run from its last checkpoint; auto: or start it, where there is none",
    )  # fmt: skip
    words = sys.argv[1:]
    for place in [place for place, word in enumerate(words) if word == "--resume"][::-1]:
        value = words[place + 1] if words[place + 1 : place + 2] in (["auto"], ["last"]) else ""
        words[place : place + 1 + bool(value)] = [f"--resume={value or 'last'}"]  # no KEY is its value
    arguments, opts = parser.parse_known_args(words)  # not argparse's own: -1e-3 looks like an option to it
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise UserError(f"unknown option {flags[0]}; options are --cfg and --resume, the rest are KEY VALUE pairs")
    train(load(arguments.cfg, opts), opts, resume={"auto": "auto", "last": True}.get(arguments.resume, False))


if __name__ == "__main__":
    run_command(main)
