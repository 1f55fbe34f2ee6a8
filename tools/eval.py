"""What a checkpoint, or each network of a run, says of a test set.

python3 tools/eval.py -r RUN
python3 tools/eval.py -m resnet8 -d digits -c RUN/student_best
python3 tools/eval.py -m resnet32x4 -c pretrain -d cifar100 -bs 256
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import _package

from mdistiller.config import KEYS, load
from mdistiller.errors import UserError, run_command
from mdistiller.registry import task_of


def evaluate(words: Sequence[str] | None = None) -> None:
    parser = _package.parser(__doc__, plugins="plug-ins that bring the model or the data set")
    parser.add_argument(
        "-r", "--run", type=Path, help="a run's folder: its last and best student, and its teacher; beside -m: --root"
    )
    parser.add_argument(
        "-m", "--model", help="a network: a name of cifar_model_dict or of a plug-in's, timm:NAME, tv:NAME"
    )
    parser.add_argument("-c", "--ckpt", help="its checkpoint, or pretrained; default: pretrain, the teacher's file")
    parser.add_argument(
        "--size", type=int, default=0, help="pixels for a timm: or tv: network; default: as the data are"
    )
    default = "default: %(default)s"
    parser.add_argument("-d", "--dataset", help="a name of dataset_dict, or of a plug-in's; default: cifar100")
    parser.add_argument("--root", help="folder of the data set; for npz, the file; default: the run's, or ./data")
    parser.add_argument("-bs", "--batch-size", type=int, default=64, help=default)
    parser.add_argument("--device", default="auto", help=default)
    parser.add_argument("--amp", default="none", choices=KEYS["SOLVER.AMP"].check.names, help=default)
    parser.add_argument("pairs", nargs="*", metavar="KEY VALUE", help="keys of DATASET, such as DATASET.SIZE 64")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="write accuracy by class and confusion matrices there (CSV, PNG)"
    )
    a = parser.parse_args(words)
    if a.run and a.model and not a.root:  # beside a model, -r has always been the data set's folder
        a.run, a.root = None, str(a.run)
    part = a.pairs if a.pairs[::2] == ["DATASET.TEXT.TEST"] else []
    if a.run and (a.model or a.ckpt or a.dataset or a.pairs != part):
        raise UserError(
            "-r RUN says model, checkpoint and data set itself; leave out -m, -c, -d and KEY VALUE, other than "
            "DATASET.TEXT.TEST"
        )
    if not a.run and not a.model:
        raise UserError("say what to evaluate: -r RUN, or -m MODEL -c CHECKPOINT -d DATASET")

    from mdistiller.device import check_amp, resolve_device  # torch takes seconds to import, and --help needs none
    from mdistiller.files import check_folder
    from mdistiller.study import evaluation
    from mdistiller.study.tables import text_table
    from mdistiller.terminal import columns

    cfg = load(None, ["EXPERIMENT.PLUGINS", a.plugins, *a.pairs])
    device = resolve_device(a.device)
    check_amp(a.amp, device)
    if a.out:
        check_folder(a.out, "--out")
    if a.run:
        run = evaluation.run_to_evaluate(a.run, [*(["DATASET.ROOT", a.root] if a.root else []), *part], a.plugins)
        dataset, what = run.cfg.DATASET.TYPE, str(a.run)
    else:
        file, dataset = a.ckpt or "pretrain", a.dataset or "cifar100"
        section = cfg.DATASET.clone()
        section.defrost()
        section.TYPE, section.ROOT = dataset, a.root or "./data"
        what = f"{a.model} from {file}"
    if a.out and (task := task_of(dataset)) != "classification":
        raise UserError(f"--out: writes accuracy by class, and {dataset} is {task}; leave it out, or use --json")
    if a.run:
        reports, notes = evaluation.evaluate_run(run, a.batch_size, device, a.amp)
    else:
        networks, notes = {a.model: (a.model, a.size, file)}, []
        reports = evaluation.evaluate(networks, section, a.batch_size, device, a.amp)
    if a.json:
        print(json.dumps({name: evaluation.figures(report) for name, report in reports.items()}, indent=2))
    else:
        print(f"{what} on {dataset}, {device}, {a.amp} autocast\n")
        print(text_table(evaluation.evaluation_table(reports), columns()))
    for line in notes:
        print(line, file=sys.stderr)
    if a.out:
        evaluation.write_evaluation(a.out, reports, dataset)


def main(words: Sequence[str] | None = None) -> None:
    """Evaluate, and name --root in messages about the data in the place of the key."""
    try:
        evaluate(words)
    except UserError as error:
        error.lines = tuple(line.replace("--opts ", "").replace("DATASET.ROOT", "--root") for line in error.lines)
        raise


if __name__ == "__main__":
    run_command(main)
