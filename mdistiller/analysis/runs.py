"""Recorded runs, read from their folders, and the groups of seeds that may be averaged."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import config, files
from mdistiller.analysis.statistics import Mean, mean_and_std
from mdistiller.distillers import LogitDistiller, distiller_dict
from mdistiller.errors import UserError
from mdistiller.runs.recorder import read_metrics

# EXPERIMENT holds names and places, and these two, which change what is computed.
COMPUTED = ("EXPERIMENT.LOGIT_STAND", "EXPERIMENT.PLUGINS")
# What an analysis may be told anew, as files move: the rest of a finished run stands.
MOVABLE = ("DATASET.ROOT", "DISTILLER.TEACHER_CKPT", "DEVICE")
NEEDED = (
    "SEED", "DEVICE", "DATASET.TYPE", "DATASET.ROOT", "SOLVER.EPOCHS", "DISTILLER.TYPE", "DISTILLER.STUDENT",
    "DISTILLER.TEACHER", "DISTILLER.TEACHER_CKPT",
)  # fmt: skip
FIGURES = ("epoch", "test_acc", "best_acc", "train_acc", "train_loss")
PARTS = {"target": " TCKD", "non_target": " NCKD"}


@dataclass(frozen=True)
class Run:
    """One run's folder, its configuration and the rows of its metrics.jsonl, the first epoch first."""

    folder: Path
    cfg: CfgNode
    rows: list[dict]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seed(self) -> int:
        return self.cfg.SEED

    @property
    def epochs(self) -> int:
        """Epochs that are finished."""
        return self.rows[-1]["epoch"]

    @cached_property
    def protocol(self) -> dict[str, str]:
        """Everything that runs must share to be averaged: {key: value as text}."""
        flat = config.leaves(self.cfg)
        kept = {k: repr(v) for k, v in flat.items() if k in COMPUTED or (k != "SEED" and config.role(k) == "computes")}
        return kept | {"finished epochs": str(self.epochs)}


@dataclass
class Group:
    """Runs of one protocol that differ in their seed alone, the lowest seed first."""

    runs: list[Run]
    extra: str = ""  # what tells it from another group of the same method, pair and length

    @property
    def first(self) -> Run:
        """The run that is drawn where one run has to stand for its group."""
        return self.runs[0]

    @property
    def cfg(self) -> CfgNode:
        return self.first.cfg

    @property
    def method(self) -> str:
        """DISTILLER.TYPE, with +LSKD where the logits are standardised and the part where only one is distilled."""
        kind = self.cfg.DISTILLER.TYPE
        stand = self.rule == "std" and self.rule != own_rule(kind)
        return kind + "+LSKD" * stand + PARTS.get(self.cfg.get("TEMPERATURE", {}).get("PART", "all"), "")

    @property
    def published_name(self) -> str | None:
        """What the literature calls the method; None under a rule that it was not published with."""
        return self.method if self.rule in (own_rule(self.cfg.DISTILLER.TYPE), "std") else None

    @property
    def rule(self) -> str:
        return rule_of(self.cfg)

    @property
    def pair(self) -> str:
        student = self.cfg.DISTILLER.STUDENT
        return student if self.cfg.DISTILLER.TYPE == "NONE" else f"{self.cfg.DISTILLER.TEACHER} → {student}"

    @property
    def schedule(self) -> str:
        """The number of epochs, as it must stand beside every figure of the group."""
        planned = self.cfg.SOLVER.EPOCHS
        return f"{planned} epochs" if self.first.epochs == planned else f"{self.first.epochs} of {planned} epochs"

    @property
    def seeds(self) -> str:
        return ", ".join(str(run.seed) for run in self.runs)

    @property
    def last(self) -> Mean:
        return mean_and_std([run.rows[-1]["test_acc"] for run in self.runs])

    @property
    def best(self) -> Mean:
        return mean_and_std([run.rows[-1]["best_acc"] for run in self.runs])

    @property
    def label(self) -> str:
        """Short, unique among the groups of a report."""
        method = "alone" if self.method == "NONE" else self.method
        if self.rule not in (own_rule(self.cfg.DISTILLER.TYPE), "std"):
            method += f" with {self.rule}"
        return f"{method}, {self.pair}, {self.schedule}" + f", {self.extra}" * bool(self.extra)

    @property
    def figures(self) -> str:
        """Last and best accuracy, for captions."""
        return f"last {self.last}, best {self.best}"


def own_rule(method: str) -> str:
    """The temperature rule that a method has where nothing is chosen; - for one that knows no temperature."""
    kind = distiller_dict.get(method) if method in distiller_dict else None
    inherits = isinstance(kind, type) and issubclass(kind, LogitDistiller)
    return getattr(kind, "own_rule", "fixed" if inherits else "-")


def rule_of(cfg: CfgNode) -> str:
    """The temperature rule: TEMPERATURE.RULE where the configuration names one, else the method's own."""
    own = own_rule(cfg.DISTILLER.TYPE)
    if own == "-":
        return own
    return str(cfg.get("TEMPERATURE", {}).get("RULE", "")) or ("std" if cfg.EXPERIMENT.get("LOGIT_STAND") else own)


def read_run(folder: Path, opts: Sequence[str] = ()) -> Run:
    """The run in `folder`, with the MOVABLE keys `opts` (KEY VALUE pairs) in place of its own.

    Raises UserError where the folder holds no finished epoch, or files of another kind.
    """
    file = folder / "config.yaml"
    if not os.path.isfile(file) or not os.path.isfile(folder / "metrics.jsonl"):
        raise UserError(f"{folder}: is no run's folder; pass folders such as output/digits/none,res8")
    try:
        cfg = config.read(file)
        for key in NEEDED:
            config.get(cfg, key)
        key = config.misfit(cfg)
    except (KeyError, TypeError):
        raise UserError(f"{file}: is no configuration of this framework; it lacks {key}") from None
    if key:
        raise UserError(f"{file}: is no configuration of this framework; {key} is of another kind")
    try:
        files.open_regular(folder / "metrics.jsonl", "a run's folder").close()
        rows = read_metrics(folder)
        if not all(type(row["epoch"]) is int and all(math.isfinite(row[key]) for key in FIGURES) for row in rows):
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
        raise UserError(f"{folder / 'metrics.jsonl'}: holds a line that is no epoch of this framework") from None
    if [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(f"{folder / 'metrics.jsonl'}: its epochs do not count 1, 2, 3, ...; the file is damaged")
    if not rows:
        raise UserError(f"{folder}: no epoch is finished yet; wait for the first one")
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        section, leaf = key.split(".") if "." in key else ("", key)
        (cfg[section] if section else cfg)[leaf] = value
    return Run(folder, cfg, rows)


def check_opts(opts: Sequence[str]) -> None:
    """Raises UserError unless `opts` are pairs of a MOVABLE key and a value."""
    wrong = [key for key in opts[::2] if key not in MOVABLE]
    if wrong or len(opts) % 2:
        found = f"{wrong[0]!r} is none of them" if wrong else f"{opts[-1]} lacks its value"
        raise UserError(f"--opts: takes KEY VALUE pairs of {', '.join(MOVABLE)}; {found}")


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups in the order of their first run, and a line for each run that is left out because it repeats a seed."""
    groups: dict[tuple, Group] = {}
    notes = []
    for run in runs:
        group = groups.setdefault(tuple(sorted(run.protocol.items())), Group([]))
        twin = next((other for other in group.runs if other.seed == run.seed), None)
        if twin:
            notes.append(f"{run.name}: left out, it repeats SEED {run.seed} of {twin.name}")
        else:
            group.runs.append(run)
    for group in groups.values():
        group.runs.sort(key=lambda run: run.seed)
        teachers = {run.cfg.DISTILLER.TEACHER_CKPT for run in group.runs}
        if len(teachers) > 1:
            notes.append(f"{group.label}: its seeds name different teacher files, so their spread holds the teachers'")
    distinguish(list(groups.values()))
    return list(groups.values()), notes


def distinguish(groups: Sequence[Group]) -> None:
    """Write into `extra` what sets apart groups that would bear the same label."""
    by_label: dict[str, list[Group]] = {}
    for group in groups:
        by_label.setdefault(group.label, []).append(group)
    for alike in by_label.values():
        if len(alike) < 2:
            continue
        protocols = [group.first.protocol for group in alike]
        keys = [k for k in dict.fromkeys(k for p in protocols for k in p) if len({p.get(k) for p in protocols}) > 1]
        for number, (group, protocol) in enumerate(zip(alike, protocols, strict=True), 1):
            said = ", ".join(f"{key} {protocol.get(key, 'absent')}" for key in keys[:2])
            group.extra = said if len(keys) <= 2 else f"{said}, ... ({number})"
