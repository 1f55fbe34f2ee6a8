"""Train a student, by the method and with the teacher that a YAML file names.

python3 tools/train_ours.py --cfg configs/digits/dtkd/res20_res8.yaml \\
    [--seeds 0 1 2] [--resume [auto]] [KEY VALUE ...]

KEY VALUE pairs, such as SOLVER.EPOCHS 12, override the file; docs/config.md
lists every KEY.

Exit status: 0 done; 1 the run failed (no finite loss, memory, disk); 2 a
mistake in the input; 75 stopped by SIGTERM, SIGINT, SIGUSR1 or SIGHUP after a
step, to go on there with --resume; 130 stopped at once by a second Ctrl-C.
"""

import argparse
import re
import sys
from collections.abc import Sequence

import _package  # noqa: F401

from mdistiller import __version__
from mdistiller.config.seeds import parse_seeds
from mdistiller.errors import UserError, run_command


def main(words: Sequence[str] | None = None) -> None:
    """Train as `words` say, those of the command line by default."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--cfg FILE] [options] [KEY VALUE ...]", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--cfg", metavar="FILE", help="YAML file; without it, every key has its default")
    parser.add_argument("--version", action="version", version=f"mdistiller {__version__}")
    parser.add_argument(
        "--resume", nargs="?", choices=["auto", "last"],
        help="go on with the run from its last checkpoint; auto: or start it, where there is none",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", metavar="N",
        help="several students side by side, one for each SEED: 0 1 2, or 0-2; they share a teacher that is there, "
        "and its bank",
    )  # fmt: skip
    lskd = parser.add_argument_group("LSKD's options")
    lskd.add_argument("--logit-stand", action="store_true", help="distil z-scores: EXPERIMENT.LOGIT_STAND True")
    lskd.add_argument("--base-temp", metavar="T", help="the method's temperature; 2 under --logit-stand")
    lskd.add_argument("--kd-weight", metavar="W", help="the distillation's weight; 9 under --logit-stand")
    words = list(sys.argv[1:] if words is None else words)
    seeds = take_seeds(words)
    for place in [place for place, word in enumerate(words) if word == "--resume"][::-1]:
        value = words[place + 1] if words[place + 1 : place + 2] in (["auto"], ["last"]) else ""
        words[place : place + 1 + bool(value)] = [f"--resume={value or 'last'}"]  # no KEY is its value
    arguments, opts = parser.parse_known_args(words)  # not argparse's own: -1e-3 looks like an option to it
    flags = [word for word in opts if word.startswith("--")]
    if flags:
        raise UserError(
            f"unknown option {flags[0]}; options are --cfg, --seeds, --resume and LSKD's, the rest are KEY VALUE pairs"
        )
    if files := [word for word in opts if word.endswith((".yaml", ".yml"))]:
        raise UserError(f"{files[0]}: a configuration file comes behind --cfg; type --cfg {files[0]}")
    if arguments.cfg is None and not opts:
        raise UserError("what is to be trained? give --cfg FILE, such as configs/digits/dtkd/res20_res8.yaml")
    resume = {"auto": "auto", "last": True}.get(arguments.resume, False)

    from mdistiller.engine.cfg import load, lskd_pairs  # torch takes seconds to import, and --help needs none
    from mdistiller.engine.run import train
    from mdistiller.engine.seeds import train_seeds

    cfg = load(arguments.cfg, opts)
    if seeds is not None and any(key == "SEED" for key, _ in cfg.overrides):
        raise UserError("--seeds and SEED: give one of them")
    pairs = lskd_pairs(cfg, arguments.logit_stand, arguments.base_temp, arguments.kd_weight)
    cfg = load(arguments.cfg, [*opts, *pairs]) if pairs else cfg
    if seeds is None:
        train(cfg, resume)
    else:
        train_seeds(cfg, seeds, resume)


def take_seeds(words: list[str]) -> list[int] | None:
    """Take `--seeds` and what follows it up to an option or a KEY out of `words`; None if it is not there."""
    place = next((place for place, word in enumerate(words) if re.match(r"--seeds(=|$)", word)), None)
    if place is None:
        return None
    given = [words.pop(place).partition("=")[2]]
    while place < len(words) and not re.match(r"--|[A-Z_]+$|[A-Za-z_]\w*\.", words[place]):
        given.append(words.pop(place))
    seeds = parse_seeds(given)
    if take_seeds(words) is not None:
        raise UserError("--seeds: is given twice; write all seeds behind one")
    return seeds


if __name__ == "__main__":
    run_command(main)
