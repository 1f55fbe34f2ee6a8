"""A Run, read from its folder, and a Group: runs that differ in their seed alone."""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import config
from mdistiller.distillers import LogitDistiller, distiller_dict, rule_name
from mdistiller.engine.cfg import CFG
from mdistiller.errors import UserError
from mdistiller.registry import task_of
from mdistiller.runs.recorder import read_metrics
from mdistiller.runs.stop import stops_early
from mdistiller.study.statistics import Mean, mean_and_std
from mdistiller.terminal import counted

# The keys of a finished run that an analysis may be told anew, because files move.
MOVABLE = ("DATASET.ROOT", "DISTILLER.TEACHER_CKPT", "DEVICE")
NEEDED = (
    "SEED", "DEVICE", "DATASET.TYPE", "DATASET.ROOT", "SOLVER.EPOCHS", "DISTILLER.TYPE", "DISTILLER.STUDENT",
    "DISTILLER.TEACHER", "DISTILLER.TEACHER_CKPT",
)  # fmt: skip
FIGURES = ("epoch", "test_acc", "best_acc", "train_loss")
PARTS = {"target": " TCKD", "non_target": " NCKD"}


@dataclass(frozen=True)
class Run:
    """One run: its folder, its complete configuration and the rows of its metrics.jsonl, the first epoch first.

    A run that is planned has no rows yet. `environment` holds environment.json, empty where that is lost. `teacher`
    holds the settings of its teacher's run (those that change what is computed) where they are known, `study` the name
    of the plan that it was run for. `plugins`: digests of the plug-ins that it uses; `lacking`: those that are not
    found.
    """

    folder: Path
    cfg: CfgNode
    rows: list[dict]
    environment: dict = field(default_factory=dict)
    teacher: dict[str, object] | None = None
    study: str = ""
    plugins: tuple[str, ...] = ()
    lacking: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def label(self) -> str:
        """The run's name in a study, whose plan has no second one like it."""
        return f"{self.cell},seed{self.seed}"

    @property
    def student_file(self) -> Path:
        """The checkpoint of the student's last epoch."""
        return self.folder / "student_latest"

    @property
    def taught(self) -> bool:
        """Whether its method learns from a teacher."""
        return config.needs_teacher(self.cfg.DISTILLER.TYPE)

    @property
    def teacher_name(self) -> str:
        return "+".join(config.teacher_names(self.cfg))

    @property
    def cell(self) -> str:
        """METHOD[+rule],teacher,student; NONE,student: what the run has in common with its other seeds in a study."""
        names = self.cfg.DISTILLER
        if not self.taught:
            return f"{names.TYPE},{names.STUDENT}"
        rule = rule_of(self.cfg)
        method = names.TYPE if rule == own_rule(names.TYPE) else f"{names.TYPE}+{rule}"
        return f"{method},{self.teacher_name},{names.STUDENT}"

    @property
    def seed(self) -> int:
        return self.cfg.SEED

    @property
    def epochs(self) -> int:
        """The number of epochs that are finished."""
        return self.rows[-1]["epoch"] if self.rows else 0

    @property
    def task(self) -> str:
        """What was learned: classification, text or detection."""
        return task_of(self.cfg.DATASET.TYPE)

    @property
    def best_row(self) -> dict:
        """The row of its best epoch, which the last one names."""
        return self.rows[self.rows[-1]["best_epoch"] - 1]

    @property
    def stopped_early(self) -> bool:
        """Whether it is finished before SOLVER.EPOCHS, by SOLVER.EARLY_STOP."""
        solver = self.cfg.SOLVER
        best = self.rows[-1].get("best_epoch", 0) if self.rows else 0
        return self.epochs < solver.EPOCHS and stops_early(solver.EARLY_STOP, self.epochs, best)

    @property
    def finished(self) -> bool:
        return self.epochs == self.cfg.SOLVER.EPOCHS or self.stopped_early

    @cached_property
    def settings(self) -> dict[str, object]:
        """All settings that change what is computed: {key: value}."""
        return config.computed(self.cfg)

    @cached_property
    def protocol(self) -> dict[str, object]:
        """Everything that runs must share to be averaged: {key: value}; the teacher's keys begin with `teacher `."""
        own = {key: value for key, value in self.settings.items() if key != "SEED"}
        return own | {f"teacher {key}": value for key, value in (self.teacher or {}).items()}

    @cached_property
    def inputs(self) -> dict[str, str]:
        """What it was computed from, by digests of environment.json: "data", "teacher checkpoint" where nothing says
        how the teacher was trained, and "code of plug-ins" where it used any.
        """
        digests = self.environment.get("sha256", {})
        teacher = {} if self.teacher or not self.taught else {"teacher checkpoint": str(digests.get("teacher", ""))}
        code = {"code of plug-ins": str(digests["plugins"])} if digests.get("plugins") else {}
        return {"data": str(digests.get("data", ""))} | teacher | code

    @cached_property
    def hash(self) -> str:
        """Hash of what the run computes, its teacher's run included: the same run has it in every folder."""
        text = json.dumps([self.settings, self.teacher], sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def seconds(self) -> float:
        """The time that its epochs took: of training and evaluation, shared with students beside it."""
        return sum(row["epoch_seconds"] for row in self.rows)

    @property
    def students(self) -> float:
        """How many students its process trained in turn, itself included, on average over the time."""
        sessions, own = self.environment.get("sessions") or [{}], 0.0
        for row in self.rows:
            begun = [one for one in sessions if one.get("epoch", 0) < row["epoch"]] or sessions[:1]
            own += row["epoch_seconds"] / begun[-1].get("students", 1)
        return self.seconds / own if own else 1

    @property
    def commits(self) -> list[dict]:
        """The commits of the code that ran, each once: {"commit": hash, "clean": whether the tree was}."""
        found = [session["git"] for session in self.environment.get("sessions", []) if session.get("git")]
        return [commit for place, commit in enumerate(found) if commit not in found[:place]]


@dataclass
class Group:
    """Runs of one protocol that differ in their seed alone, the lowest seed first."""

    runs: list[Run]
    extra: str = ""  # what tells it from another group of the same method, pair and length
    number: int = 0  # its place in a report

    @property
    def first(self) -> Run:
        """The run that is drawn where one run has to stand for its group."""
        return self.runs[0]

    @property
    def cfg(self) -> CfgNode:
        return self.first.cfg

    @property
    def name(self) -> str:
        return self.first.cell

    @property
    def method(self) -> str:
        """DISTILLER.TYPE, with +LSKD where the logits are standardised and the part where only one is distilled."""
        kind = self.cfg.DISTILLER.TYPE
        stand = "+LSKD" if self.rule == "std" and self.rule != own_rule(kind) else ""
        return kind + stand + PARTS.get(self.cfg.TEMPERATURE.PART, "")

    @property
    def usual(self) -> bool:
        """Whether its temperature rule is one under which the literature has methods: its own, or LSKD's."""
        return self.rule in (own_rule(self.cfg.DISTILLER.TYPE), "std")

    @property
    def method_and_rule(self) -> str:
        return self.method if self.usual else f"{self.method}+{self.rule}"

    @property
    def rule(self) -> str:
        return rule_of(self.cfg)

    @property
    def pair(self) -> str:
        names = self.cfg.DISTILLER
        return f"{self.first.teacher_name} → {names.STUDENT}" if self.first.taught else names.STUDENT

    @property
    def schedule(self) -> str:
        """The number of epochs, as it must stand beside every figure of the group."""
        done, planned = self.first.epochs, self.cfg.SOLVER.EPOCHS
        if any(run.stopped_early for run in self.runs):
            ends = sorted({run.epochs for run in self.runs})
            where = ", ".join(map(str, ends))
            return f"stopped early at {'epoch' if len(ends) == 1 else 'epochs'} {where} of {planned}"
        return counted(done, "epoch") if done == planned else f"{done} of {counted(planned, 'epoch')}"

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
        """A short text, unique among the groups of a report."""
        method = "alone" if self.method == "NONE" else self.method_and_rule
        return ", ".join(filter(None, [method, self.pair, self.schedule, self.extra]))

    @property
    def figures(self) -> str:
        """Last and best accuracy, for captions."""
        return f"last {self.last}, best {self.best}"


def own_rule(method: str) -> str:
    """Return the temperature rule that a method has where nothing is chosen; - for one that knows no temperature."""
    kind = distiller_dict.get(method)
    inherits = isinstance(kind, type) and issubclass(kind, LogitDistiller)
    return getattr(kind, "own_rule", "fixed" if inherits else "-")


def rule_of(cfg: CfgNode) -> str:
    """Return the temperature rule: TEMPERATURE.RULE where the configuration names one, else the method's own."""
    own = own_rule(cfg.DISTILLER.TYPE)
    return own if own == "-" else rule_name(cfg, own)


def complete(flat: Mapping[str, object]) -> CfgNode:
    """Return {"SOLVER.LR": 0.1} as a configuration; keys that `flat` lacks have today's defaults.

    Raises TypeError that names a key whose value is of another kind, a section's name, or below another key.
    """
    if wrong := config.misfit(flat):
        raise TypeError(wrong)
    tree = CfgNode()
    for key, value in (config.leaves(CFG) | dict(flat)).items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, CfgNode())
        if isinstance(node.get(leaf), CfgNode):
            raise TypeError(key)
        node[leaf] = value
    return tree


def read_runs(folders: Sequence[Path], opts: Sequence[str] = (), plugins: Sequence[str] = ()) -> list[Run]:
    """Return the runs in `folders`, as `read_run` does; the names that their plug-ins bring are known from here on.
    Files beside them, which PROJECT/* names as well, are passed over.
    """
    folders = [folder for folder in folders if not os.path.isfile(folder)] or folders
    runs = [read_run(folder, opts, plugins) for folder in folders]
    config.activate(dict.fromkeys(digest for run in runs for digest in run.plugins))
    return runs


def read_run(folder: Path, opts: Sequence[str] = (), plugins: Sequence[str] = ()) -> Run:
    """Return the run in `folder`, with the MOVABLE keys `opts` (KEY VALUE pairs) in place of its own.

    Its plug-ins are imported: one of `plugins` that has the name, else the file in the working directory or in
    `folder`. Raises UserError where the folder holds no finished epoch, or files of another kind, or where a plug-in
    fails.
    """
    file, metrics = folder / "config.yaml", folder / "metrics.jsonl"
    if not os.path.isfile(file) or not os.path.isfile(metrics):
        raise UserError(f"{folder}: is no run's folder; pass folders such as output/digits/none,res8")
    flat, reason = config.leaves(config.read(file)), ""
    brought, gone = config.load_plugins(flat.get("EXPERIMENT.PLUGINS"), folder, plugins)
    try:
        cfg = complete(flat | dict(zip(opts[::2], opts[1::2], strict=True)))
    except TypeError as error:
        reason = f"{error} is of another kind"
    reason = next((f"it lacks {key}" for key in NEEDED if key not in flat), reason)
    if reason:
        raise UserError(f"{file}: is no configuration of this framework; {reason}")
    rows = read_metrics(folder)
    numbers = all(isinstance(row.get(key), (int, float)) and abs(row[key]) < 1e38 for row in rows for key in FIGURES)
    if not numbers or [row["epoch"] for row in rows] != list(range(1, len(rows) + 1)):
        raise UserError(f"{metrics}: holds something other than the epochs 1, 2, 3, ... of this framework")
    if not rows:
        raise UserError(f"{folder}: no epoch is finished yet; wait for the first one")
    return Run(folder, cfg, rows, read_environment(folder), plugins=brought, lacking=gone)


def lacking_plugins(runs: Sequence[Run]) -> list[str]:
    """Return a line for each plug-in that is not found, with what to type."""
    first: dict[str, Run] = {}
    for run in runs:
        for name in run.lacking:
            first.setdefault(name, run)
    return [
        f"{run.name}: its plug-in {name} is neither in this folder nor in the run's; type --plugins "
        f"PATH/{Path(name).name}, or work in the folder where it was trained"
        for name, run in first.items()
    ]


def read_environment(folder: Path) -> dict:
    """Return environment.json of a run's folder; empty where it is lost, as no figure depends on it."""
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "environment.json").read_text())
        if isinstance(found, dict):
            return found
    return {}


def check_opts(opts: Sequence[str]) -> None:
    """Raises UserError unless `opts` are pairs of a MOVABLE key and a value."""
    wrong = [key for key in opts[::2] if key not in MOVABLE]
    if wrong or len(opts) % 2:
        found = f"{wrong[0]!r} is none of them" if wrong else f"{opts[-1]} lacks its value"
        raise UserError(f"--opts: takes KEY VALUE pairs of {', '.join(MOVABLE)}; {found}")
