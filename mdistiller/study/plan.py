"""Studies: a short YAML grid of pairs, methods, rules and seeds becomes the groups of runs that it stands for."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import config, registry
from mdistiller.distillers import distiller_dict
from mdistiller.engine.refusals import refuse_unused
from mdistiller.errors import ConfigError, UserError
from mdistiller.runs.folder import run_folder
from mdistiller.study.runs import Group, Run, own_rule

# key: its default, by whose type it is checked, and its meaning
PLAN_KEYS = {
    "title": ("", "of tables and charts"),
    "note": ("", "a sentence below every table"),
    "configs": ("../cifar100", "folder of METHOD/*.yaml with each pair's hyperparameters, relative to the plan"),
    "results": ("results", "folder of runs.jsonl, tables and charts, relative to where the command runs"),
    "pairs": ([], "teacher/student; or teachers and students"),
    "teachers": ([], "each with every one of students"),
    "students": ([], "of teachers; all runs of one before the next one's"),
    "methods": ([], "names of distiller_dict; NONE is the student alone"),
    "rules": ([], "temperature rules under each of the methods; none: the method's own"),
    "seeds": ([], "of every student"),
    "teacher_seed": (0, "of the one training of each teacher"),
    "teacher_ckpt": ("", "of every teacher, which is then not trained: pretrained, or what TEACHER_CKPT takes"),
    "overrides": ({}, "configuration keys over those of the YAML files, for teachers and students alike"),
}
KINDS = {str: "text", int: "a whole number", list: "a list, [...]", dict: "a mapping of configuration keys"}
EACH_RUN_S_OWN = ("EXPERIMENT.", "DISTILLER.", "LOG.WANDB")
SET_BY_THE_PLAN = (
    "SEED", "EXPERIMENT.", "DISTILLER.", "TEMPERATURE.RULE", "LOG.PREFIX", "LOG.WANDB", "DATASET.ROOT", "DEVICE",
)  # fmt: skip


@dataclass
class PlannedGroup(Group):
    """A group of a study. `opts`: the KEY VALUE pairs over `file` that all of its runs have; each adds its SEED."""

    file: Path = Path()
    opts: list[str] = field(default_factory=list)
    teacher: Run | None = None


@dataclass
class Study:
    """A plan's groups in the order in which they are run: a teacher, then its students."""

    name: str
    title: str
    note: str
    results: Path
    groups: list[PlannedGroup]

    def select(self, patterns: Sequence[str]) -> list[PlannedGroup]:
        """Return the groups that any of `patterns` names, with the teachers that they need; all for no pattern.

        Raises UserError where a pattern names none.
        """
        for pattern in patterns:
            if not any(matches(group.name, [pattern]) for group in self.groups):
                known = " ".join(group.name for group in self.groups)
                raise UserError(f"--only {pattern}: names nothing in the plan {self.name}, which has {known}")
        chosen = [group for group in self.groups if not patterns or matches(group.name, patterns)]
        needed = {group.teacher.label for group in chosen if group.teacher}
        kept = []
        for group in self.groups:
            teachers = [run for run in group.runs if run.label in needed]
            if group in chosen:
                kept.append(group)
            elif teachers:  # without its other seeds
                kept.append(replace(group, runs=teachers))
        return kept


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Return whether any of `patterns` names the group: words between commas, each of which is to match one part of
    its name, with * and ? as in a shell.
    """
    parts = name.lower().split(",")
    return any(
        all(any(fnmatchcase(p, word) for p in parts) for word in pattern.lower().split(",")) for pattern in patterns
    )


def find(name: str, folder: Path) -> Path:
    """Return the plan's file: a path, or a name in `folder`. Raises UserError where there is none."""
    known = sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"{name}: is no file; give a plan's YAML file, or one of {', '.join(known)}")
        return Path(name)
    if name not in known:
        raise UserError(registry.unknown("plan", name, known))
    return folder / f"{name}.yaml"


def load(file: Path, opts: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Study:
    """Return the study that the plan `file` describes. `opts`: KEY VALUE pairs that say where or how all runs run;
    `seeds`: in place of the plan's own.

    Raises ConfigError with one line for each mistake found, all at once.
    """
    tree = config.read(file)
    registry.fill()
    if len(opts) % 2:
        raise ConfigError(f"{opts[-1]}: has no value; overrides come in pairs: KEY VALUE")
    anywhere = [key for key in config.KEYS if config.role(key) != "computes" and not key.startswith(EACH_RUN_S_OWN)]
    problems = [
        f"{key}: pairs of KEY VALUE say only where, by {', '.join(anywhere)}; to compute something else, write it "
        "below overrides: in a plan of your own, with _BASE_: this one"
        for key in opts[::2] if key not in anywhere
    ]  # fmt: skip
    values = _checked(tree, problems)
    if seeds is not None:
        values["seeds"] = list(seeds)
    shipped, planned = Shipped(Path(os.path.normpath(file.parent / values["configs"]))), {}
    wanted = _wanted(values, problems)
    if not shipped.folder.is_dir():
        problems.append(f"configs: there is no folder {shipped.folder}")
        wanted = {}
    for key, its_seeds in wanted.items():
        alone = planned.get(("NONE", "", "", key[2]))
        alone = None if values["teacher_ckpt"] else alone
        teacher = next((run for run in alone.runs if run.seed == values["teacher_seed"]), None) if alone else None
        try:
            given = ["DISTILLER.TEACHER_CKPT", values["teacher_ckpt"]] if values["teacher_ckpt"] and key[2] else []
            planned[key] = _group(key, its_seeds, shipped, values["overrides"], [*opts, *given], teacher)
        except ConfigError as error:
            problems += error.lines
    groups = list(planned.values())
    folders = Counter(run.folder for group in groups for run in group.runs)
    problems += [
        f"{run.label}: is not alone in the folder {run.folder}"
        for group in groups for run in group.runs if folders[run.folder] > 1
    ]  # fmt: skip
    if problems:
        raise ConfigError(*(f"{file}: {line}" for line in dict.fromkeys(problems)))
    return Study(file.stem, values["title"], values["note"], Path(values["results"]), groups)


def _checked(tree: CfgNode, problems: list[str]) -> dict:
    """Return every key of PLAN_KEYS with its value, or its default where the value is of another kind."""
    values = {key: default for key, (default, _) in PLAN_KEYS.items()}
    for key, value in tree.items():
        kind = type(PLAN_KEYS[key][0]) if key in PLAN_KEYS else None
        if kind is None:
            problems.append(registry.unknown("key", key, [*PLAN_KEYS, "_BASE_"]))
        elif not isinstance(value, kind) or isinstance(value, bool):
            problems.append(f"{key}: must be {KINDS[kind]}, {PLAN_KEYS[key][1]}; got {value!r}")
        elif kind is list:
            item, wanted = (int, "whole numbers") if key == "seeds" else (str, "names")
            problems += [f"{key}: takes {wanted}; got {one!r}" for one in value if type(one) is not item]
            values[key] = list(dict.fromkeys(one for one in value if type(one) is item))
        else:
            values[key] = value
    problems += [f"{key}: is missing; {PLAN_KEYS[key][1]}" for key in ("methods", "seeds") if not tree.get(key)]
    flat = config.leaves(values["overrides"])
    own = [key for key in flat if key.startswith(SET_BY_THE_PLAN) and key != "EXPERIMENT.PLUGINS"]
    problems += [f"overrides: {key} is the plan's own business; leave it out" for key in own]
    values["overrides"] = {key: value for key, value in flat.items() if key not in own}
    try:  # plug-ins register what the plan names
        config.load(None, ["EXPERIMENT.PLUGINS", flat.get("EXPERIMENT.PLUGINS", [])])
    except ConfigError as error:
        problems += [f"overrides: {line}" for line in error.lines]
    return values


def _wanted(values: dict, problems: list[str]) -> dict[tuple[str, ...], set[int]]:
    """Return {(method, rule, teacher, student): seeds} in the order in which groups are run: a teacher before its
    students; of a list of pairs, the students of a teacher one after the other; of a grid, all of a student.
    """
    if bool(values["pairs"]) == bool(values["teachers"] and values["students"]):
        problems.append("pairs: give either pairs: [teacher/student, ...], or teachers: and students:")
        return {}
    pairs = [tuple(text.split("/")) for text in values["pairs"] if text.count("/") == 1]
    problems += [
        f"pairs: must be teacher/student, such as resnet56/resnet20; got {text}"
        for text in values["pairs"] if text.count("/") != 1
    ]  # fmt: skip
    order = [teacher for teacher, _ in pairs]
    pairs.sort(key=lambda pair: order.index(pair[0]))
    pairs += [(teacher, student) for student in values["students"] for teacher in values["teachers"]]
    wanted: dict[tuple[str, ...], set[int]] = {}
    for (teacher, student), method in product(pairs, values["methods"]):
        if method == "NONE":
            wanted.setdefault(("NONE", "", "", student), set()).update(values["seeds"])
            continue
        if not values["teacher_ckpt"]:
            wanted.setdefault(("NONE", "", "", teacher), set()).add(values["teacher_seed"])
        for rule in values["rules"] or [""]:
            key = (method, "" if rule == own_rule(method) else rule, teacher, student)
            wanted.setdefault(key, set()).update(values["seeds"])
    return wanted


class Shipped:
    """The pairs' YAML files in `folder`, METHOD/*.yaml."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, dict[tuple, Path]] = {}  # method -> (teacher, student) -> file

    def file(self, method: str, teacher: str, student: str) -> tuple[Path | None, dict[str, str]]:
        """Return the pair's YAML file for the method, or the student's own one and the keys that make it the method's;
        no file where there is neither.
        """
        file = self._index(method).get((teacher, student))
        if file is not None or method == "NONE":
            return file, {}
        return self._index("NONE").get(("", student)), {"DISTILLER.TYPE": method, "DISTILLER.TEACHER": teacher}

    def settings(self, cfg: CfgNode) -> dict[str, object]:
        """Return what the file for the method and pair of `cfg` computes; empty where there is none."""
        names = cfg.DISTILLER
        if names.TYPE not in distiller_dict.active and not cfg.EXPERIMENT.PLUGINS:  # a plug-in's, which is not loaded
            return {}
        file, changes = self.file(names.TYPE, "" if names.TYPE == "NONE" else names.TEACHER, names.STUDENT)
        plugins = ["EXPERIMENT.PLUGINS", cfg.EXPERIMENT.PLUGINS] if cfg.EXPERIMENT.PLUGINS else []
        return config.computed(config.load(file, [*plugins, *words_of(changes)])) if file else {}

    def _index(self, method: str) -> dict[tuple, Path]:
        if method not in self.files:
            found: dict[tuple, Path] = {}
            for file in sorted((self.folder / method.lower()).glob("[!_]*.yaml")):
                section = config.read(file).get("DISTILLER", {})
                if section.get("TYPE", "NONE") == method:
                    teacher = "" if method == "NONE" else section.get("TEACHER")
                    found.setdefault((teacher, section.get("STUDENT")), file)
            self.files[method] = found
        return self.files[method]


def words_of(pairs: dict[str, object]) -> list[str]:
    """Return {key: value} as KEY VALUE words."""
    return [word for key, v in pairs.items() for word in (key, v if isinstance(v, str) else str(v).replace(" ", ""))]


def _group(
    key: tuple[str, ...], seeds: Iterable[int], shipped: Shipped, overrides: Mapping, opts: Sequence[str],
    source: Run | None,
) -> PlannedGroup:  # fmt: skip
    """Return the group `key`, (method, rule, teacher, student), of the teacher that is trained by `source`. Raises
    ConfigError where there is no YAML for it, or a run cannot be configured.
    """
    method, rule, teacher, student = key
    file, changed = shipped.file(method, teacher, student)
    if file is None:
        refusal = registry.model_refusal(student, shipped.folder.name)
        lacks = f"configs: {shipped.folder}/none has no YAML for {student}; add one"
        raise ConfigError(f"pairs: {refusal}" if refusal else lacks)
    ruled = {"TEMPERATURE.RULE": rule} if rule else {}
    flat = config.leaves(config.read(file)) | changed | overrides | ruled
    # what is not read stands in no run's name; alone there is nothing that a trainer could keep apart
    unread = {k for k in overrides if config.unread(flat, k) or (method, k) == ("NONE", "SOLVER.TRAINER")}
    changed |= {k: v for k, v in overrides.items() if k not in unread} | ruled
    tag = ",".join(filter(None, [re.sub(r"\W", "_", method.lower()), teacher, student]))
    places = {"EXPERIMENT.PROJECT": f"campaign/{shipped.folder.name}", "EXPERIMENT.TAG": tag}
    if source:
        places["DISTILLER.TEACHER_CKPT"] = str(source.student_file)
    group = PlannedGroup([], file=file, opts=[*words_of(changed | places), *opts], teacher=source)
    problems = []
    for seed in sorted(seeds):
        try:
            cfg = config.load(file, [*group.opts, "SEED", str(seed)])
            refuse_unused(cfg)
            group.runs.append(Run(run_folder(cfg), cfg, [], teacher=source.settings if source else None))
        except UserError as error:
            problems += [line.replace("(command line)", "(overrides)") for line in error.lines]
    if problems:
        raise ConfigError(*problems)
    return group
