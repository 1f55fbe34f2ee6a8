"""What tests of plans, records and tables use."""

import functools
import json
from itertools import accumulate
from pathlib import Path

import numpy as np
import yaml
from helpers import ROOT

from mdistiller import config
from mdistiller.dataset import load_dataset
from mdistiller.engine.cfg import load
from mdistiller.study.jobs import Outcome, train_group

# test accuracies by seed
CURVES = {0: [30, 50, 40, 50, 45, 60, 70, 80], 1: [10, 20, 30, 30, 30, 31, 31, 32], 2: [1, 2, 3, 4, 5, 6, 7, 8]}
PLANS = ROOT / "configs" / "plans"
PUBLISHED = json.loads((ROOT / "results" / "published.json").read_text())


def write(path, **tree):
    """Write the tree as YAML and return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def change(path, **tree):
    """Write other values of some keys into the YAML file and return its path."""
    return write(path, **yaml.safe_load(path.read_text()) | tree)


@functools.cache
def few_digits(train, test):
    """Return the arrays of so many digits, 16 x 16."""
    data = load_dataset("digits", ".")
    arrays = {"train_images": data.train_images[:train, ::2, ::2], "train_labels": data.train_labels[:train]}
    arrays |= {"test_images": data.test_images[:test, ::2, ::2], "test_labels": data.test_labels[:test]}
    return {name: values.numpy() for name, values in arrays.items()}


def write_plan(root):
    """Write small.yaml: resnet14 -> resnet8 by NONE, KD and DTKD on 40 + 20 digits, two epochs of three steps."""
    np.savez(root / "digits.npz", **few_digits(40, 20))
    solver = {"EPOCHS": 2, "BATCH_SIZE": 16, "LR_DECAY_STAGES": [1]}
    for name in ("resnet8", "resnet14"):
        write(
            root / "configs" / "none" / f"{name}.yaml", DATASET={"TYPE": "npz", "ROOT": str(root / "digits.npz")},
            SOLVER=solver, DISTILLER={"TYPE": "NONE", "STUDENT": name},
        )  # fmt: skip
    return write(
        root / "small.yaml", configs="configs", pairs=["resnet14/resnet8"], methods=["NONE", "KD", "DTKD"],
        seeds=[0, 1], overrides={"DTKD": {"WARMUP": 1}},
    )  # fmt: skip


def write_run(root, name, accuracies, seed=0, finished=None, **keys):
    """Write a run's folder with a configuration and these test accuracies; in `keys`, __ stands for the dot."""
    folder = root / name
    folder.mkdir(parents=True)
    opts = {"DATASET.TYPE": "digits", "DISTILLER.STUDENT": "resnet8", "SOLVER.EPOCHS": len(accuracies), "SEED": seed}
    opts |= {key.replace("__", "."): value for key, value in keys.items()}
    cfg = load(None, [word for pair in opts.items() for word in pair])
    (folder / "config.yaml").write_text(cfg.dump())
    rows = [
        {"epoch": n, "test_acc": acc, "best_acc": best, "best_epoch": accuracies.index(best) + 1, "train_acc": acc,
         "train_loss": 1 / n}
        for n, (acc, best) in enumerate(zip(accuracies[:finished], accumulate(accuracies, max), strict=False), 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def record(method="KD", teacher="resnet20", student="resnet8", seed=0, last=60.0, best=61.0, **changes):
    """Return the line of a finished run of the published protocol; in `changes`, __ stands for the dot."""
    base = ROOT / "configs/cifar100/_base.yaml"
    opts = {"DISTILLER.TYPE": method, "DISTILLER.TEACHER": teacher, "DISTILLER.STUDENT": student, "SEED": seed}
    opts |= {"SOLVER.EPOCHS": 240} | {key.replace("__", "."): value for key, value in changes.items()}
    own = config.computed(config.load(base, [str(word) for pair in opts.items() for word in pair]))
    alone = ["DISTILLER.TYPE", "NONE", "DISTILLER.STUDENT", teacher, "SOLVER.EPOCHS", str(opts["SOLVER.EPOCHS"])]
    source = {"run": "t", "sha256": "t", "config": config.computed(config.load(base, alone))}
    curve = [best, *[min(last, best)] * (own["SOLVER.EPOCHS"] - 1)]
    return json.loads(json.dumps({
        "plan": "p", "cell": f"NONE,{student}" if method == "NONE" else f"{method},{teacher},{student}", "seed": seed,
        "last": last, "best": best, "epochs": len(curve), "seconds": 60.0, "students": 1,
        "device": "cpu (x)", "threads": 1, "versions": {"torch": "2"}, "git": [{"commit": "0" * 40, "clean": True}],
        "sha256": {"data": "d", "student": "s"}, "config": own, "curve": curve,
        "teacher": None if method == "NONE" else source,
    }))  # fmt: skip


def write_records(path, *records):
    """Write a runs.jsonl and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def figures(path="results/runs.jsonl"):
    """Return what must not depend on how often a study was disturbed."""
    records = [json.loads(line) for line in Path(path).read_text().splitlines()]
    keys = ("cell", "seed", "last", "best", "best_epoch", "epochs", "sha256", "config", "curve")
    return {(r["cell"], r["seed"]): {key: r[key] for key in keys} for r in records}


class Ended:
    """A job that has come to an end."""

    def __init__(self, outcome):
        self.found = outcome

    def ended(self):
        return True

    def stop(self, at_once=False):
        pass

    def outcome(self):
        return self.found


class Here:
    """An executor that trains in this process and keeps what it was asked for."""

    slots = 1

    def __init__(self):
        self.asked = []

    def start(self, group, seeds):
        self.asked.append((group.name, list(seeds)))
        return Ended(self.train(group, seeds))

    def train(self, group, seeds):
        return Outcome(True, train_group(group.file, group.opts, seeds))


class Dying(Here):
    """An executor whose first `deaths` jobs are killed before they do anything."""

    def __init__(self, deaths):
        super().__init__()
        self.deaths = deaths

    def train(self, group, seeds):
        self.deaths -= 1
        return Outcome(False, ["ended by signal 9"]) if self.deaths >= 0 else super().train(group, seeds)


def write_detector_run(root, **figures):
    """Write the folder of a detector's run of two epochs, whose rows have these figures as well."""
    keys = {"DATASET__TYPE": "scenes", "DISTILLER__STUDENT": "fasterrcnn_resnet8"}
    folder = write_run(root, "alone", [10.0, 20.0], **keys)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["train_acc"]
        row |= figures | {"AP": row["test_acc"], "best_epoch": 2}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
