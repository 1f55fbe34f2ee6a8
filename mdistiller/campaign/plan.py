"""Plans: a short YAML grid of pairs, methods, rules and seeds becomes the runs that it stands for, in their order."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import config, registry
from mdistiller.analysis.runs import own_rule
from mdistiller.campaign.identity import computing, identity, protocol
from mdistiller.distillers import RuleDistiller, distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.errors import ConfigError, UserError
from mdistiller.runs.folder import MOST_BYTES, run_folder

# key: its default, by whose type it is checked, and its meaning
KEYS = {
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
    "overrides": ({}, "configuration keys over those of the YAML files, for teachers and students alike"),
}
SET_BY_THE_PLAN = (
    "SEED", "EXPERIMENT.", "DISTILLER.", "TEMPERATURE.RULE", "LOG.PREFIX", "LOG.WANDB", "DATASET.ROOT", "DEVICE",
)  # fmt: skip
# what KEY VALUE pairs may say of all runs alike; the other places are each run's own
ANYWHERE = (
    "LOG.PREFIX", "LOG.TENSORBOARD_FREQ", "LOG.SAVE_CHECKPOINT_FREQ", "LOG.TEMPERATURE", "DEVICE", "DATASET.ROOT",
    "DATASET.NUM_WORKERS", "DATASET.TEST.BATCH_SIZE", "TEACHER_BANK_FOLDER",
)  # fmt: skip


@dataclass
class Trial:
    """One run of a plan: a cell with one seed."""

    cell: "Cell"
    seed: int
    cfg: CfgNode
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.cell.name},seed{self.seed}"

    @property
    def epochs(self) -> int:
        return self.cfg.SOLVER.EPOCHS

    @cached_property
    def settings(self) -> dict[str, object]:
        return computing(self.cfg)

    @property
    def teacher_settings(self) -> dict[str, object] | None:
        return self.cell.teacher.settings if self.cell.teacher else None

    @cached_property
    def hash(self) -> str:
        return identity(self.settings, self.teacher_settings)

    @property
    def weights(self) -> Path:
        """Of the last epoch."""
        return self.folder / "student_latest"


@dataclass
class Cell:
    """A method with its pair, in all its seeds: what one row of a table stands for."""

    name: str  # METHOD[+rule],teacher,student; NONE,student
    file: Path
    opts: list[str]  # KEY VALUE pairs, all but SEED
    teacher: Trial | None
    trials: list[Trial] = field(default_factory=list)  # the lowest seed first

    @property
    def cfg(self) -> CfgNode:
        """Of any of its trials: they differ in SEED alone."""
        return self.trials[0].cfg

    @property
    def protocol(self) -> dict[str, object]:
        return protocol(self.trials[0].settings, self.trials[0].teacher_settings)

    def command(self, seed: int | str) -> list[str]:
        """Trains one of its trials by hand, from the teacher's file $TEACHER; other places are left to who types it."""
        pairs = zip(self.opts[::2], self.opts[1::2], strict=True)
        computed = [(k, v) for k, v in pairs if config.role(k) == "computes" or k == "EXPERIMENT.PLUGINS"]
        words = [word for pair in computed for word in pair]
        file = Path(*self.file.parts[self.file.parts.index("configs") :]) if "configs" in self.file.parts else self.file
        teacher = ["DISTILLER.TEACHER_CKPT", '"$TEACHER"'] if self.teacher else []
        return ["python3", "tools/train_ours.py", "--cfg", str(file), *words, *teacher, "SEED", str(seed)]


@dataclass
class Plan:
    """Cells in the order in which they are run: a teacher, then its students."""

    name: str
    title: str
    note: str
    results: Path
    seeds: list[int]
    cells: list[Cell]

    @property
    def trials(self) -> list[Trial]:
        return [trial for cell in self.cells for trial in cell.trials]

    def select(self, patterns: Sequence[str]) -> list[Cell]:
        """The cells that any of `patterns` names, with the teachers that they need. Raises UserError where one names
        none.
        """
        for pattern in patterns:
            if not any(matches(cell.name, [pattern]) for cell in self.cells):
                known = " ".join(cell.name for cell in self.cells)
                raise UserError(f"--only {pattern}: names nothing in the plan {self.name}, which has {known}")
        chosen = {cell.name for cell in self.cells if not patterns or matches(cell.name, patterns)}
        needed = {cell.teacher.cell.name: cell.teacher for cell in self.cells if cell.name in chosen and cell.teacher}
        kept = []
        for cell in self.cells:
            if cell.name in chosen:
                kept.append(cell)
            elif cell.name in needed:  # for the one seed that its students learn from
                teacher = needed[cell.name]
                kept.append(Cell(cell.name, cell.file, cell.opts, None, [teacher]))
        return kept


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether any of `patterns` names the cell: words between commas, each of which is to match one part of the cell's
    name, with * and ? as in a shell.
    """
    parts = name.lower().split(",")
    return any(
        all(any(fnmatchcase(p, word) for p in parts) for word in pattern.lower().split(",")) for pattern in patterns
    )


def find(name: str, folder: Path) -> Path:
    """The plan's file: a path, or a name in `folder`."""
    known = sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    if name.endswith((".yaml", ".yml")) or "/" in name:
        if not Path(name).is_file():
            raise UserError(f"{name}: is no file; give a plan's YAML file, or one of {', '.join(known)}")
        return Path(name)
    if name not in known:
        raise UserError(registry.unknown("plan", name, known))
    return folder / f"{name}.yaml"


def load(file: Path, opts: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Plan:
    """The plan in `file`; `opts`: KEY VALUE pairs of ANYWHERE, `seeds`: in place of the plan's own.

    Raises ConfigError with one line for each mistake found, all at once.
    """
    tree = config.read(file)
    if len(opts) % 2:
        raise ConfigError(f"{opts[-1]}: has no value; overrides come in pairs: KEY VALUE")
    problems = []
    known = config.leaves(CFG)
    for key in opts[::2]:
        if key not in known:
            problems.append(registry.unknown("key", key, ANYWHERE))
        elif key not in ANYWHERE:
            problems.append(
                f"{key}: pairs of KEY VALUE say only where, by {', '.join(ANYWHERE)}; to compute something else, "
                "write it below overrides: in a plan of your own, with _BASE_: this one"
            )
    values = _checked(tree, problems)
    seeds = list(values["seeds"] if seeds is None else seeds)
    pairs = _pairs(values, problems)
    grid = _Grid(file, values, opts, seeds, problems)
    for teacher, student in pairs:
        if problems and grid.hopeless:
            break
        for method in values["methods"]:
            grid.add(method, teacher, student, seeds)
    trials = [trial for cell in grid.cells.values() for trial in cell.trials]
    folders = Counter(trial.folder for trial in trials)
    problems += [f"{t.name}: is not alone in the folder {t.folder}" for t in trials if folders[t.folder] > 1]
    if problems:
        raise ConfigError(*(f"{file}: {line}" for line in dict.fromkeys(problems)))
    return Plan(file.stem, values["title"], values["note"], Path(values["results"]), seeds, list(grid.cells.values()))


def _checked(tree: CfgNode, problems: list[str]) -> dict:
    """Every key of KEYS with its value, or its default where the value is of another kind."""
    values = {key: default for key, (default, _) in KEYS.items()}
    for key, value in tree.items():
        if key not in KEYS:
            problems.append(registry.unknown("key", key, [*KEYS, "_BASE_"]))
        elif not isinstance(value, dict if KEYS[key][0] == {} else type(KEYS[key][0])) or isinstance(value, bool):
            kinds = {str: "text", int: "a whole number", list: "a list, [...]", dict: "a mapping of configuration keys"}
            problems.append(f"{key}: must be {kinds[type(KEYS[key][0])]}, {KEYS[key][1]}; got {value!r}")
        else:
            values[key] = value
    for key in ("pairs", "teachers", "students", "methods", "rules", "seeds"):
        kind, wanted = (int, "whole numbers") if key == "seeds" else (str, "names")
        wrong = [item for item in values[key] if type(item) is not kind]
        if wrong:
            problems.append(f"{key}: takes {wanted}; got {wrong[0]!r}")
            values[key] = [item for item in values[key] if type(item) is kind]
        twice = [item for i, item in enumerate(values[key]) if item in values[key][:i]]
        if twice:
            problems.append(f"{key}: {twice[0]} stands there twice; remove one")
    flat = config.leaves(values["overrides"])
    plugins = flat.get("EXPERIMENT.PLUGINS")
    if plugins:  # they register what the plan names
        try:
            config.load(None, ["EXPERIMENT.PLUGINS", plugins])
        except ConfigError as error:
            problems += [f"overrides: {line}" for line in error.lines]
    seeds = [*values["seeds"], values["teacher_seed"]]
    if any(not 0 <= seed < 2**32 for seed in seeds):
        problems.append("seeds: must be in [0, 2**32)")
    problems += [f"{key}: is missing; {KEYS[key][1]}" for key in ("methods", "seeds") if not tree.get(key)]
    for key, known in (("methods", registry.distillers), ("rules", registry.temperature_rules)):
        problems += [f"{key}: {registry.unknown(known.kind, name, known)}" for name in values[key] if name not in known]
    values["methods"] = [name for name in values["methods"] if name in registry.distillers]
    values["rules"] = [name for name in values["rules"] if name in registry.temperature_rules]
    for name in values["methods"] if values["rules"] else ():
        if name != "NONE" and not issubclass(distiller_dict[name], RuleDistiller):
            problems.append(f"rules: {name} takes no temperature rule; give it a plan of its own")
    problems += [f"overrides: {key} is the plan's own business; leave it out" for key in flat if _reserved(key)]
    if not plugins:  # which bring keys of their own
        known = config.leaves(CFG)
        problems += [f"overrides: {registry.unknown('key', key, known)}" for key in flat if key not in known]
    values["overrides"] = {key: value for key, value in flat.items() if not _reserved(key)}
    return values


def _reserved(key: str) -> bool:
    return key.startswith(SET_BY_THE_PLAN) and key != "EXPERIMENT.PLUGINS"


def _pairs(values: dict, problems: list[str]) -> list[tuple[str, str]]:
    """(teacher, student): of a list, the students of a teacher one after the other; of a grid, all of a student."""
    if bool(values["pairs"]) == bool(values["teachers"] and values["students"]):
        problems.append("pairs: give either pairs: [teacher/student, ...], or teachers: and students:")
        return []
    grid = [(teacher, student) for student in values["students"] for teacher in values["teachers"]]
    pairs = []
    for text in values["pairs"]:
        if text.count("/") != 1:
            problems.append(f"pairs: must be teacher/student, such as resnet56/resnet20; got {text}")
        else:
            pairs.append(tuple(text.split("/")))
    models = registry.cifar_models
    for name in dict.fromkeys(name for pair in [*pairs, *grid] for name in pair if name not in models):
        problems.append(f"pairs: {registry.unknown(models.kind, name, models)}")
    order = list(dict.fromkeys(teacher for teacher, _ in pairs))
    pairs = sorted(pairs, key=lambda pair: order.index(pair[0])) + grid
    return [(teacher, student) for teacher, student in pairs if teacher in models and student in models]


class Shipped:
    """The pairs' YAML files in `folder`, METHOD/*.yaml."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, dict[tuple, Path]] = {}  # of each method: (teacher, student) -> YAML

    def file(self, method: str, teacher: str, student: str) -> tuple[Path | None, dict[str, str]]:
        """The pair's YAML file for the method, or the student's own one and the keys that make it the method's."""
        file = self._index(method).get((teacher, student))
        if file is not None or method == "NONE":
            return file, {}
        return self._index("NONE").get(("", student)), {"DISTILLER.TYPE": method, "DISTILLER.TEACHER": teacher}

    def settings(self, cfg: CfgNode) -> dict[str, object]:
        """What the file for the method and pair of `cfg` computes; empty where there is none."""
        names = cfg.DISTILLER
        if names.TYPE not in distiller_dict:  # a plug-in's, which is not here
            return {}
        file, changes = self.file(names.TYPE, "" if names.TYPE == "NONE" else names.TEACHER, names.STUDENT)
        return computing(config.load(file, [word for pair in changes.items() for word in pair])) if file else {}

    def _index(self, method: str) -> dict[tuple, Path]:
        if method not in self.files:
            found: dict[tuple, Path] = {}
            for file in sorted((self.folder / method.lower()).glob("[!_]*.yaml")):
                section = config.read(file).get("DISTILLER", {})
                if section.get("TYPE") == method:
                    teacher = "" if method == "NONE" else section.get("TEACHER")
                    found.setdefault((teacher, section.get("STUDENT")), file)
            self.files[method] = found
        return self.files[method]


class _Grid:
    """Cells as they come up; what is wrong with one of them is added to `problems`."""

    def __init__(self, file: Path, values: dict, opts: Sequence[str], seeds: Sequence[int], problems: list[str]):
        self.values, self.opts, self.problems = values, list(opts), problems
        self.longest = max((str(seed) for seed in [*seeds, values["teacher_seed"]]), key=len)
        self.folder = Path(os.path.normpath(file.parent / values["configs"]))
        self.cells: dict[str, Cell] = {}
        self.shipped = Shipped(self.folder)
        self.hopeless = not self.folder.is_dir()
        if self.hopeless:
            problems.append(f"configs: there is no folder {self.folder}")

    def add(self, method: str, teacher: str, student: str, seeds: list[int]) -> None:
        """The pair's cells for the method, one for each rule; before them the teacher's, which all of them need."""
        if method == "NONE":
            self._cell("NONE", "", "", student, seeds, None)
            return
        seed = self.values["teacher_seed"]
        cell = self._cell("NONE", "", "", teacher, [seed], None)
        source = next((t for t in cell.trials if t.seed == seed), None) if cell else None
        for rule in self.values["rules"] or [""]:
            rule = "" if rule == own_rule(method) else rule
            self._cell(method, rule, teacher, student, seeds, source)

    def _cell(
        self, method: str, rule: str, teacher: str, student: str, seeds: list[int], source: Trial | None
    ) -> Cell | None:
        name = ",".join([method + f"+{rule}" * bool(rule), *[teacher] * bool(teacher), student])
        cell = self.cells.get(name)
        if cell is None:
            file, changes = self.shipped.file(method, teacher, student)
            if file is None:
                self.problems.append(f"configs: {self.folder}/none has no YAML for {student}; add one")
                return None
            changes |= {key: v for key, v in self.values["overrides"].items() if self._read_by(method, key)}
            changes |= {"TEMPERATURE.RULE": rule} if rule else {}
            tag = re.sub(r"\W", "_", method.lower()) + f",{teacher}" * bool(teacher) + f",{student}"
            places = {"EXPERIMENT.PROJECT": f"campaign/{self.folder.name}", "EXPERIMENT.TAG": tag}
            places |= {"DISTILLER.TEACHER_CKPT": str(source.weights)} if source else {}
            words = [
                word if isinstance(word, str) else str(word).replace(" ", "") for w in changes.items() for word in w
            ]
            places |= self._short_name(tag, words)
            words += [word for pair in places.items() for word in pair]
            cell = self.cells[name] = Cell(name, file, [*words, *self.opts], source)
        for seed in seeds:
            if seed not in [trial.seed for trial in cell.trials]:
                opts = [*cell.opts, "SEED", str(seed)]
                try:
                    cfg = config.load(cell.file, opts)
                    folder = run_folder(cfg)
                    if "EXPERIMENT.NAME" in opts[::2]:  # as train_seeds has it
                        folder = folder.with_name(f"{folder.name}+SEED:{seed}")
                    cell.trials.append(Trial(cell, seed, cfg, folder))
                except UserError as error:
                    self.problems += [line.replace("(command line)", "(overrides)") for line in error.lines]
        cell.trials.sort(key=lambda trial: trial.seed)
        return cell

    def _short_name(self, tag: str, words: Sequence[str]) -> dict[str, str]:
        """EXPERIMENT.NAME with a digest of the changes in `words`, where a folder's name cannot hold them."""
        pairs = zip([*words[::2], "SEED"], [*words[1::2], self.longest], strict=True)
        changed = ",".join(f"{key}:{value}" for key, value in pairs if config.role(key) == "computes")
        if len(f"{tag}+{changed}".encode()) <= MOST_BYTES:
            return {}
        return {"EXPERIMENT.NAME": f"{tag}+{hashlib.sha256(' '.join(words).encode()).hexdigest()[:12]}"}

    @staticmethod
    def _read_by(method: str, key: str) -> bool:
        """Sections of other methods are left out, so that they stand in no run's name."""
        other = distiller_dict.get(key.split(".")[0])
        return other is None or issubclass(distiller_dict[method], other)
