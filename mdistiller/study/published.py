"""Published figures: which of them a group may be compared with, in what it departs from them, and the verdict."""

import json
from collections.abc import Mapping
from pathlib import Path

from mdistiller import config
from mdistiller.errors import UserError
from mdistiller.files import open_regular
from mdistiller.study.runs import Group
from mdistiller.study.statistics import Mean

EPOCHS, DATA = 240, "cifar100"  # what figures are for where their file does not say
# the published protocol: its key in the file of published figures, and ours
PROTOCOL = {
    "epochs": "SOLVER.EPOCHS",
    "batch_size": "SOLVER.BATCH_SIZE",
    "lr_decay_stages": "SOLVER.LR_DECAY_STAGES",
    "lr_decay_rate": "SOLVER.LR_DECAY_RATE",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "momentum": "SOLVER.MOMENTUM",
}
SMALL_RATE = ("MobileNetV2", "ShuffleV1", "ShuffleV2")  # students with the published protocol's smaller learning rate
NOT_HYPERPARAMETERS = (
    "SEED", "DETERMINISTIC", "DATASET.", "DISTILLER.", "TEMPERATURE.RULE", "TEACHER_BANK", "SOLVER.AMP",
    "SOLVER.NAN_POLICY", "SOLVER.LR", *PROTOCOL.values(),
)  # fmt: skip


def read_published(file: Path | None) -> dict:
    """Return {METHOD: {"teacher/student": figure}} from JSON; other entries may stand beside them.

    The entries "protocol": {"epochs": n} and "dataset" say what the figures are for; without them 240 epochs of
    cifar100. Raises UserError for other files.
    """
    if file is None:
        return {}
    try:
        with open_regular(file, "a JSON file of figures as --published") as opened:
            table = json.load(opened)
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError among them
        raise UserError(f"--published {file}: is no JSON ({error})") from None
    whole = isinstance(table, dict) and isinstance(table.get("protocol", {}), dict)
    if not whole or not any(isinstance(value, dict) for value in table.values()):
        raise UserError(f'--published {file}: expected {{"METHOD": {{"teacher/student": figure}}}}')
    return table


def published_figure(group: Group, published: Mapping) -> tuple[float, float] | None:
    """Return the figure of the group's method and pair, and how far it may be off: charts were read by eye.

    None where there is none, or where it is for another data set.
    """
    names, alone = group.cfg.DISTILLER, group.method == "NONE"
    if group.cfg.DATASET.TYPE != published.get("dataset", DATA) or not group.usual or names.ENSEMBLE:
        return None
    pair = names.STUDENT if alone else f"{names.TEACHER}/{names.STUDENT}"
    for section in (group.method, "teachers_and_students_alone") if alone else (group.method,):
        figures = published.get(section)
        figure = figures.get(pair) if isinstance(figures, dict) else None
        if type(figure) in (int, float):
            return float(figure), 0.0
    chart = published.get(f"dtkd_chart_{names.STUDENT}", {})
    if not alone and group.method in chart and names.TEACHER in chart["teacher"]:
        return chart[group.method][chart["teacher"].index(names.TEACHER)], chart["read_by_eye_plus_minus"]
    return None


def departures(group: Group, published: Mapping) -> list[str]:
    """Return in what the group departs from the published protocol, one text for each key."""
    cfg, rule, found = group.cfg, published.get("protocol", {}), []
    if cfg.DATASET.TYPE != published.get("dataset", DATA):
        found.append(f"DATASET.TYPE {cfg.DATASET.TYPE}")
    if cfg.DATASET.AUGMENT not in ("auto", "crop_flip"):
        found.append(f"DATASET.AUGMENT {cfg.DATASET.AUGMENT}")
    rate = "lr_shuffle_mobilenet" if cfg.DISTILLER.STUDENT in SMALL_RATE else "lr"
    for name, key in (PROTOCOL | {rate: "SOLVER.LR"}).items():
        if name in rule and config.get(cfg, key) != rule[name]:
            found.append(f"{key} {config.get(cfg, key)} (published: {rule[name]})")
    return found


def changes(group: Group, theirs: Mapping[str, object]) -> list[str]:
    """Return the group's hyperparameters that are not `theirs`, one text for each key; rules apart, which stand in a
    row's name.
    """
    return [
        f"{key} {value} (published: {theirs[key]})"
        for key, value in group.first.settings.items()
        if theirs.get(key, value) != value and not key.startswith(NOT_HYPERPARAMETERS)
    ]


def verdict(ours: Mean, figure: float, off: float = 0.0) -> str:
    """Return where `figure`, uncertain by `off`, lies: inside, above or below ours, mean ± standard deviation."""
    if ours.std is None:
        return "one seed"
    reach = ours.std + off
    return "above" if figure > ours.mean + reach else "below" if figure < ours.mean - reach else "inside"
