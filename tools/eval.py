"""Accuracy of a checkpoint on a test set.

python3 tools/eval.py -m resnet8 -d digits -c RUN/student_best
python3 tools/eval.py -m resnet32x4 -c pretrain -d cifar100 -bs 256
"""

import argparse
from collections.abc import Sequence

from mdistiller.config import KEYS, load
from mdistiller.errors import run_command


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", required=True, help="a name of cifar_model_dict")
    parser.add_argument("-c", "--ckpt", default="pretrain", help="checkpoint; default: pretrain, the teacher's file")
    default = "default: %(default)s"
    parser.add_argument("-d", "--dataset", default="cifar100", help=default)
    parser.add_argument("-r", "--root", default="./data", help=f"folder of the data set; for npz, the file; {default}")
    parser.add_argument("-bs", "--batch-size", type=int, default=64, help=default)
    parser.add_argument("--device", default="auto", help=default)
    parser.add_argument("--amp", default="none", choices=KEYS["SOLVER.AMP"].check.names, help=default)
    parser.add_argument(
        "--plugins", nargs="+", default=[], metavar="FILE", help="plug-ins that bring the model or the data set"
    )
    a = parser.parse_args(words)

    from mdistiller.device import check_amp, resolve_device  # torch takes seconds to import, and --help needs none
    from mdistiller.engine.evaluator import evaluate_checkpoint

    load(None, ["EXPERIMENT.PLUGINS", a.plugins])
    device = resolve_device(a.device)
    check_amp(a.amp, device)
    report = evaluate_checkpoint(a.model, a.ckpt, a.dataset, a.root, a.batch_size, device, a.amp)
    rows = (
        ("top-1", f"{report.scores.top1:.2f} %"),
        ("top-5", "" if report.scores.top5 is None else f"{report.scores.top5:.2f} %"),
        ("loss", f"{report.scores.loss:.4f}"),
        ("parameters", f"{report.parameters:,}"),
        ("images/s", f"{report.images_per_second:,.0f}"),
    )
    print(f"{a.model} from {a.ckpt} on {a.dataset}, {device}, {a.amp} autocast")
    for name, value in (row for row in rows if row[1]):
        print(f"  {name:<12}{value:>14}")


if __name__ == "__main__":
    run_command(main)
