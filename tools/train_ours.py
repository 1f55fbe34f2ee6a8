"""Train a student, by the method and with the teacher that a YAML file names.

python3 tools/train_ours.py --cfg configs/digits/dtkd/res20_res8.yaml [--resume] [KEY VALUE ...]
"""

import argparse

from mdistiller.engine.builder import train
from mdistiller.engine.cfg import load
from mdistiller.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cfg", default=None, help="YAML file; without it, every key has its default")
    parser.add_argument("--resume", action="store_true", help="go on with the run from its last finished epoch")
    arguments, opts = parser.parse_known_args()  # not argparse's own: values such as -1e-3 look like options to it
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise UserError(f"unknown option {flags[0]}; options are --cfg and --resume, the rest are KEY VALUE pairs")
    train(load(arguments.cfg, opts), opts, arguments.resume)


if __name__ == "__main__":
    run_command(main)
