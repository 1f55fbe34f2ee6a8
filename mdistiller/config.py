"""The configuration tree: every key with its default and its meaning, loading, and validation.

Importing this module stays light (yacs alone). `load` imports the zoo, the methods and the data sets, because each
method declares its own section beside its class.
"""

import ast
import importlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from yacs.config import CfgNode

from mdistiller import registry
from mdistiller.errors import ConfigError, UserError


class Config(CfgNode):
    """yacs's tree. Its merge methods read files and pairs by the same rules as `load`: int for float, _BASE_, and
    ConfigError with every mistake at once.
    """

    def merge_from_file(self, cfg_filename: str | Path) -> None:
        problems: list[str] = []
        tree = _read_yaml(Path(cfg_filename), problems)
        self._merge_all([(tree, str(cfg_filename))], problems)

    def merge_from_list(self, cfg_list: Sequence) -> None:
        problems: list[str] = []
        self._merge_all([(tree, "command line") for tree in _parse_opts(cfg_list, problems)], problems)

    def merge_from_other_cfg(self, cfg_other: Mapping) -> None:
        self._merge_all([(cfg_other, "other configuration")], [])

    def _merge_all(self, sources: Iterable[tuple[Mapping, str]], problems: list[str]) -> None:
        if self.is_frozen():
            raise AttributeError("this configuration is frozen; clone() it, then defrost() the clone")
        for tree, source in sources:
            _merge(self, tree, source, "", "", problems)
        if problems:
            raise ConfigError(*dict.fromkeys(problems))


CFG = Config()
DOCS: dict[str, str] = {}  # full key or section name -> one line of documentation

KEYS = (
    ("EXPERIMENT.PROJECT", "distill", "Folder under LOG.PREFIX that groups runs."),
    ("EXPERIMENT.NAME", "", "Name of the run's folder; empty: EXPERIMENT.TAG."),
    ("EXPERIMENT.TAG", "default", "Comma-separated labels of the run."),
    ("EXPERIMENT.PLUGINS", [], "Python files to import before the YAML is read: methods of your own. They are code."),
    ("EXPERIMENT.LOGIT_STAND", False, "Distil z-scores of the logits (LSKD): another name for TEMPERATURE.RULE std."),
    ("DATASET.TYPE", "cifar100", "cifar100, cifar10, digits or npz."),
    ("DATASET.ROOT", "./data", "Folder that holds the data set (cifar*), or the .npz file itself (npz)."),
    ("DATASET.AUGMENT", "auto", "auto (as the data set declares), crop_flip, crop or none."),
    ("DATASET.NUM_WORKERS", 2, "Accepted for mdistiller's YAML files; images are held in memory and need no workers."),
    ("DATASET.TEST.BATCH_SIZE", 64, "Images in an evaluation batch."),
    ("DISTILLER.TYPE", "NONE", "Method: a name of distiller_dict. NONE trains the student alone."),
    ("DISTILLER.TEACHER", "ResNet50", "Teacher: a name of cifar_model_dict."),
    ("DISTILLER.STUDENT", "resnet32", "Student: a name of cifar_model_dict."),
    ("DISTILLER.TEACHER_CKPT", "", "Teacher checkpoint; empty: download_ckpts/<data set>_teachers/<teacher>_vanilla/."),
    ("DISTILLER.TRAIN_TEACHER", False, "Train a missing teacher first, by method NONE with this SOLVER, and store it."),
    ("SOLVER.TRAINER", "base", "base; dot: task and distillation gradients keep separate momenta; crd: same as base."),
    ("SOLVER.DOT.DELTA", 0.075, "dot: the momenta are MOMENTUM - DELTA for the task and + DELTA for distillation."),
    ("SOLVER.BATCH_SIZE", 64, "Images in a training batch; the last, smaller batch is kept."),
    ("SOLVER.EPOCHS", 240, "Training epochs."),
    ("SOLVER.LR", 0.05, "Learning rate of the first epoch."),
    ("SOLVER.LR_DECAY_STAGES", [150, 180, 210], "The rate falls after each of these epochs."),
    ("SOLVER.LR_DECAY_RATE", 0.1, "Factor of each fall."),
    ("SOLVER.WEIGHT_DECAY", 0.0001, "L2 penalty on every parameter."),
    ("SOLVER.MOMENTUM", 0.9, "SGD momentum."),
    ("SOLVER.TYPE", "SGD", "Optimizer: SGD."),
    ("SOLVER.AMP", "none", "Autocast of the forward pass: none, bf16 or fp16 (CUDA only). Losses stay in float32."),
    ("SOLVER.NAN_POLICY", "stop", "Where a loss or gradient is not finite: stop and name it, or skip the step."),
    ("TEMPERATURE.RULE", "", "Temperature rule of KD, DKD, DTKD, MLKD, DIST or CTKD; empty: the method's own."),
    ("TEMPERATURE.DETACH", False, "Stop the gradient through the rule's temperatures; published DTKD lets it flow."),
    ("TEMPERATURE.PART", "all", "Part of the divergence of KD, DTKD and DKD: all, target (TCKD) or non_target (NCKD)."),
    (
        "LOG.TEMPERATURE",
        "summary",
        "Record the rule's temperatures: off, summary (an epoch) or samples (each sample too).",
    ),
    ("LOG.TENSORBOARD_FREQ", 500, "Steps between TensorBoard points inside an epoch."),
    ("LOG.SAVE_CHECKPOINT_FREQ", 40, "Epochs between the checkpoints epoch_N and student_N."),
    ("LOG.PREFIX", "./output", "Root of all run folders."),
    ("LOG.WANDB", False, "Send figures to Weights & Biases as well (pip install wandb)."),
    ("SEED", 0, "Seeds initialisation, data order and augmentation."),
    ("DETERMINISTIC", False, "The same bits on the same machine on CUDA too, at some cost in speed."),
    ("DEVICE", "auto", "auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."),
)


def add_section(name: str, defaults: Mapping, doc: str = "") -> None:
    """Declare the section CFG.<name>: its keys, their defaults (nested dicts are sub-sections) and its title. `name`
    may be dotted: TEMPERATURE.ERRATUM.

    Raises ValueError if the section exists already.
    """
    *parents, last = name.split(".")
    parent = get(CFG, ".".join(parents)) if parents else CFG
    if last in parent:
        raise ValueError(f"config section '{name}' exists already; pick another name")
    parent[last] = _node(defaults)
    DOCS[name] = doc


def _node(tree: Mapping) -> CfgNode:
    return CfgNode({key: _node(value) if isinstance(value, Mapping) else value for key, value in tree.items()})


for _key, _default, _doc in KEYS:
    _section, _leaf = CFG, _key.split(".")
    for _part in _leaf[:-1]:
        _section = _section.setdefault(_part, CfgNode())
    _section[_leaf[-1]] = _default
    DOCS[_key] = _doc


def leaves(node: Mapping, prefix: str = "") -> dict[str, object]:
    """{full dotted key: value} of every value under `node`."""
    flat = {}
    for key, value in node.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def get(cfg: Mapping, key: str) -> object:
    """The value (or section) of the dotted `key`."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def expand(text: str, key: str) -> Path:
    """The path that the value `text` of `key` names, with ~ as the home folder. Raises UserError for ~nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(f"{key}: {text!r} names the home folder of a user that is not here; give the path") from None


def load(path: str | Path | None = None, opts: Sequence = ()) -> CfgNode:
    """The frozen configuration: defaults, then the YAML file and its _BASE_ files, then KEY VALUE pairs.

    Raises ConfigError with one line for each mistake found, all at once.
    """
    for package in ("models", "distillers", "dataset"):  # by name: they fill the registries, and import this module
        importlib.import_module(f"mdistiller.{package}")
    problems: list[str] = []
    tree = _read_yaml(Path(path), problems) if path else {}
    sources = [(tree, str(path))]
    sources += [(override, "command line") for override in _parse_opts(opts, problems)]
    plugins = []
    for source, _ in sources:
        plugins = _section_of(source, "EXPERIMENT").get("PLUGINS", plugins)
    plugin_text = _load_plugins(_decode(plugins), Path(path).parent if path else Path(), problems)

    cfg = CFG.clone()
    for source, name in sources:
        _merge(cfg, source, name, "", plugin_text, problems)
    problems += _value_problems(cfg)
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    cfg.freeze()
    return cfg


def _section_of(tree: Mapping, name: str) -> Mapping:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset; a key given twice is a mistake, where PyYAML silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        merge = "tag:yaml.org,2002:merge"  # << may bring a key that this mapping overrides
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path, problems: list[str], seen: tuple[Path, ...] = ()) -> dict:
    if path.resolve() in seen:
        problems.append(f"{path}: _BASE_ leads back to this file; remove one of the _BASE_ lines")
        return {}
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror}); pass an existing YAML file with --cfg")
        return {}
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text; pass a YAML file with --cfg")
        return {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"{path}: is not valid YAML: {' '.join(str(error).split())}")
        return {}
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        problems.append(f"{path}: holds a {type(tree).__name__}; a configuration is a mapping of sections to keys")
        return {}
    bases = tree.pop("_BASE_", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not (isinstance(bases, list) and all(isinstance(base, str) for base in bases)):
        problems.append(f"{path}: _BASE_ must be a path or a list of paths")
        return tree
    merged: dict = {}
    for base in bases:
        merged = _overlay(merged, _read_yaml(path.parent / base, problems, (*seen, path.resolve())))
    return _overlay(merged, tree)


def _overlay(base: Mapping, top: Mapping) -> dict:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _parse_opts(opts: Sequence, problems: list[str]) -> list[dict]:
    """One tree for each KEY VALUE pair, in order."""
    if len(opts) % 2:
        problems.append(f"command line: '{opts[-1]}' has no value; overrides come in pairs: KEY VALUE")
    trees = []
    for key, value in zip(opts[::2], opts[1::2], strict=False):
        if not isinstance(key, str) or key.startswith("-"):
            problems.append(f"command line: '{key}' is not a key; overrides are KEY VALUE pairs such as SOLVER.LR 0.1")
            continue
        for part in reversed(key.split(".")):
            value = {part: value}
        trees.append(value)
    return trees


def _load_plugins(plugins: object, folder: Path, problems: list[str]) -> str:
    """Import every plug-in; returns their source text, in which _merge looks for the sections that they read."""
    plugins = [plugins] if isinstance(plugins, str) else plugins
    if not isinstance(plugins, (list, tuple)):
        return ""  # _merge reports the wrong type
    text = ""
    for plugin in plugins:
        path = next((p for p in (Path(str(plugin)), folder / str(plugin)) if p.is_file()), None)
        if path is None or path.suffix != ".py":
            problems.append(f"EXPERIMENT.PLUGINS: '{plugin}' is not an existing .py file")
            continue
        try:
            importlib.import_module("mdistiller.distillers").load_plugin(path)
            text += path.read_text(encoding="utf-8")
        except Exception as error:  # a plug-in is foreign code: whatever it raises is a mistake in the input
            problems.append(f"EXPERIMENT.PLUGINS: {plugin} fails on import: {type(error).__name__}: {error}")
    return text


def _merge(node: CfgNode, tree: Mapping, source: str, prefix: str, plugin_text: str, problems: list[str]) -> None:
    for key, value in tree.items():
        full = f"{prefix}{key}"
        if key not in node:
            if not prefix and isinstance(value, Mapping) and re.search(rf"\.{re.escape(str(key))}\b", plugin_text):
                node[key] = _node({k: _decode_tree(v) for k, v in value.items()})  # a plug-in reads cfg.<key>
            elif prefix and prefix.split(".")[0] not in CFG:  # inside such a section
                node[key] = _decode_tree(value)
            else:
                problems.append(f"{full}: {_unknown_key(full, isinstance(value, Mapping))} ({source})")
        elif isinstance(node[key], CfgNode):
            if isinstance(value, Mapping):
                _merge(node[key], value, source, f"{full}.", plugin_text, problems)
            else:
                example = next(iter(leaves(node[key], f"{full}.")), f"{full}.KEY")
                problems.append(f"{full}: is a section, not a value; set its keys, such as {example} ({source})")
        elif isinstance(value, Mapping):
            problems.append(f"{full}: is a single value ({_kind(node[key])}), not a section ({source})")
        else:
            try:
                node[key] = _coerce(value, node[key])
            except TypeError:
                wanted = _kind(node[key])
                problems.append(f"{full}: must be {wanted}, such as {node[key]!r}; got {value!r} ({source})")


def _unknown_key(full: str, is_section: bool) -> str:
    sections = {key[: match.start()] for key in leaves(CFG) for match in re.finditer(r"\.", key)}
    close = registry.nearest(full, sections if is_section else leaves(CFG))
    if not close and not is_section:  # the section may be what is wrong: look for the last part anywhere
        last = full.rsplit(".", 1)[-1].casefold()
        close = [key for key in leaves(CFG) if key.rsplit(".", 1)[-1].casefold() == last]
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"unknown {'section' if is_section else 'key'}{hint}"


def _decode(text: object) -> object:
    """A value typed as text: 5e-4, [1, 2], True. YAML 1.1 reads 5e-4 as a string, so files need this too."""
    if not isinstance(text, str):
        return text
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.strip().lower(), text)


def _decode_tree(value: object) -> object:
    return {k: _decode_tree(v) for k, v in value.items()} if isinstance(value, Mapping) else _decode(value)


def _kind(default: object) -> str:
    names = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}
    return names.get(type(default), "a list")


def _coerce(value: object, default: object) -> object:
    """`value` as the type of `default`: int serves for float, list for tuple. Raises TypeError otherwise."""
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise TypeError
    value = _decode(value)
    if isinstance(default, (list, tuple)):
        if default in ([], ()) and isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise TypeError
        if not default:  # an empty default says nothing about what the list holds
            return type(default)(value)
        return type(default)(_coerce(item, default[0]) for item in value)
    if isinstance(default, float) and type(value) is int:
        return float(value)
    if type(value) is not type(default):
        raise TypeError
    return value


_POSITIVE = "must be greater than 0"
_RULES = (
    # key, test, what to type instead
    ("SOLVER.EPOCHS", lambda v: v >= 1, "must be at least 1"),
    ("SOLVER.BATCH_SIZE", lambda v: v >= 1, "must be at least 1"),
    ("DATASET.TEST.BATCH_SIZE", lambda v: v >= 1, "must be at least 1"),
    ("DATASET.NUM_WORKERS", lambda v: v >= 0, "must be 0 or more"),
    ("SOLVER.LR", lambda v: v > 0, _POSITIVE),
    ("SOLVER.LR_DECAY_RATE", lambda v: 0 < v <= 1, "must be in (0, 1]"),
    ("SOLVER.WEIGHT_DECAY", lambda v: v >= 0, "must be 0 or more"),
    ("SOLVER.MOMENTUM", lambda v: 0 <= v < 1, "must be in [0, 1)"),
    (
        "SOLVER.LR_DECAY_STAGES",
        lambda v: all(a < b for a, b in zip([0, *v], v, strict=False)),
        "must be epochs in rising order, each 1 or more, such as [150, 180, 210]",
    ),
    ("AT.P", lambda v: v > 0, _POSITIVE),
    ("CRD.NCE.K", lambda v: v >= 1, "must be at least 1"),
    ("CRD.FEAT.DIM", lambda v: v >= 1, "must be at least 1"),
    ("FITNET.INPUT_SIZE", lambda v: len(v) == 2 and min(v) >= 8, "must be two sizes of 8 or more, such as (32, 32)"),
    ("VID.INPUT_SIZE", lambda v: len(v) == 2 and min(v) >= 8, "must be two sizes of 8 or more, such as (32, 32)"),
    ("TEMPERATURE.ERRATUM.MARGIN", lambda v: 0 < v <= 1, "must be in (0, 1]"),
    ("TEMPERATURE.SHARPNESS.MARGIN", lambda v: 0 < v < 0.5, "must be in (0, 0.5)"),
    ("TEMPERATURE.SHARPNESS.ITERATIONS", lambda v: v >= 1, "must be at least 1"),
    ("LOG.TENSORBOARD_FREQ", lambda v: v >= 1, "must be at least 1"),
    ("LOG.SAVE_CHECKPOINT_FREQ", lambda v: v >= 1, "must be at least 1"),
    ("LOG.PREFIX", bool, "must name a folder"),
    ("SEED", lambda v: 0 <= v < 2**32, "must be in [0, 2**32)"),
    ("DEVICE", lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "must be auto, cpu, cuda, cuda:N or mps"),
)
_CHOICES = {
    "SOLVER.AMP": ("none", "bf16", "fp16"),
    "SOLVER.TYPE": ("SGD",),
    "SOLVER.NAN_POLICY": ("stop", "skip"),
    "SOLVER.TRAINER": ("base", "crd", "dot"),
    "TEMPERATURE.PART": ("all", "target", "non_target"),
    "LOG.TEMPERATURE": ("off", "summary", "samples"),
    "DATASET.AUGMENT": ("auto", "crop_flip", "crop", "none"),
}
_NAMES = {
    "DISTILLER.TYPE": registry.distillers,
    "DISTILLER.TEACHER": registry.cifar_models,
    "DISTILLER.STUDENT": registry.cifar_models,
    "DATASET.TYPE": registry.datasets,
    "TEMPERATURE.RULE": registry.temperature_rules,
}


def _value_problems(cfg: CfgNode) -> Iterable[str]:
    flat = leaves(cfg)
    for key, value in flat.items():
        last = key.rsplit(".", 1)[-1]
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
            yield f"{key}: must be a finite number; got {value!r}"
        elif isinstance(value, str):
            continue
        elif last in ("T", "TEMPERATURE", "TEMPERATURES") and (not numbers or min(numbers) <= 0):
            yield f"{key}: {_POSITIVE}; got {value!r}"
        elif last.startswith("WARMUP") and value < 0:
            yield f"{key}: must be 0 or more; got {value!r}"
    for key, test, wanted in _RULES:
        if key in flat and not test(flat[key]):
            yield f"{key}: {wanted}; got {flat[key]!r}"
    momentum, delta = flat["SOLVER.MOMENTUM"], flat["SOLVER.DOT.DELTA"]
    if flat["SOLVER.TRAINER"] == "dot" and not abs(delta) <= momentum < 1 - abs(delta):
        yield f"SOLVER.DOT.DELTA: SOLVER.MOMENTUM ({momentum}) +- DELTA must lie in [0, 1); got {delta!r}"
    if (flat["SOLVER.TRAINER"], flat["DISTILLER.TYPE"]) == ("dot", "NONE"):
        yield "SOLVER.TRAINER: dot separates task from distillation, and NONE does not distil; set SOLVER.TRAINER base"
    for key, known in (_CHOICES | _NAMES).items():
        if flat[key] not in known and not (key == "TEMPERATURE.RULE" and not flat[key]):
            yield f"{key}: {registry.unknown(getattr(known, 'kind', 'value'), flat[key], known)}"
    for key in ("EXPERIMENT.NAME", "EXPERIMENT.PROJECT"):
        if ".." in Path(flat[key]).parts or Path(flat[key]).is_absolute():
            yield f"{key}: must be a folder name below LOG.PREFIX; got {flat[key]!r}"
