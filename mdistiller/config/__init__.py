"""The configuration tree: every key with its default and its meaning, loading, and validation.

Importing this module stays light (yacs alone). `load` imports the zoo, the methods and the data sets, because each
method declares its own section beside its class.
"""

import ast
import importlib
import os
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import yaml
from yacs.config import CfgNode

from mdistiller import files, registry
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
        _refuse(problems)


CFG = Config()
# No configuration comes near these; what exceeds them would take minutes or the memory.
MOST_BYTES, MOST_NODES, MOST_LEVELS, MOST_FILES, MOST_PROBLEMS = 2**18, 10_000, 30, 50, 20
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
    (
        "DATASET.TEST.BATCH_SIZE",
        64,
        "Images in an evaluation batch; on CUDA at least 1,000 of 32 x 32 pixels, or as many pixels of larger ones.",
    ),
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
    (
        "SOLVER.STEP",
        "auto",
        "How a step runs: eager, graph (a CUDA graph) or compile (torch.compile; on CUDA in a graph too); auto: graph "
        "on CUDA, compile on a CPU where that pays, else eager.",
    ),
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
    (
        "TEACHER_BANK",
        "auto",
        "Teacher's logits on all views of the training set, for logit methods: full (computed first, kept on disk), "
        "lazy (kept as they come), off (a teacher's pass in every step); auto: as the arithmetic says, same numbers.",
    ),
    ("TEACHER_BANK_DTYPE", "float16", "What the bank keeps, float16 or float32; auto rounds to it without a bank too."),
    ("TEACHER_BANK_FOLDER", "", "Where banks lie; empty: beside the teacher's checkpoint."),
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
    untyped = [key for key, value in leaves(defaults).items() if value is None]
    if untyped:
        raise ValueError(f"{name}.{untyped[0]}: None has no type that a value could be checked by; pick a default")
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
    _refuse(problems)
    cfg.freeze()
    return cfg


def read(path: Path) -> CfgNode:
    """The tree of a YAML file as it stands, with neither defaults nor validation. Raises ConfigError."""
    problems: list[str] = []
    tree = _read_yaml(path, problems)
    _refuse(problems)
    return _node(tree)


def misfit(tree: Mapping, node: CfgNode = CFG, prefix: str = "") -> str | None:
    """The first key in `tree` whose value is of another kind than its default; unknown keys count as fitting."""
    for key in (key for key in node if key in tree):
        value, default, full = tree[key], node[key], f"{prefix}{key}"
        if isinstance(default, CfgNode) and isinstance(value, Mapping):
            full = misfit(value, default, f"{full}.")
        elif not isinstance(default, CfgNode) and not isinstance(value, Mapping):
            try:
                _coerce(value, default)
                full = None
            except (TypeError, OverflowError):
                pass
        if full:
            return full
    return None


def _refuse(problems: Iterable[str]) -> None:
    """Raises ConfigError if there are any, MOST_PROBLEMS of them at most."""
    lines = list(dict.fromkeys(problems))
    more = len(lines) - MOST_PROBLEMS
    if lines:
        raise ConfigError(*lines[:MOST_PROBLEMS], *([f"and {more} more of this kind"] if more > 0 else []))


def _section_of(tree: Mapping, name: str) -> Mapping:
    section = tree.get(name)
    return section if isinstance(section, Mapping) else {}


class _StrictLoader(yaml.SafeLoader):
    """YAML's safe subset without its traps: a key given twice is a mistake, where PyYAML silently keeps the last; so
    are aliases that multiply, and whole numbers in base 60 (4:00 is 240). Dates are the text that they are.
    """

    def get_single_node(self) -> yaml.Node | None:
        root = super().get_single_node()
        size, depth = self._measure(root, {}) if root is not None else (0, 0)
        if size > MOST_NODES:
            self._fail(f"it holds more than {MOST_NODES:,} values, aliases counted each time", root)
        if depth > MOST_LEVELS:
            self._fail(f"it is nested more than {MOST_LEVELS} levels deep", root)
        return root

    def _measure(self, node: yaml.Node, known: dict[yaml.Node, tuple[int, int]]) -> tuple[int, int]:
        """(nodes, levels) of the tree under `node`, every alias counted as what it stands for."""
        if node not in known:
            known[node] = (0, 0)  # is being measured
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            if isinstance(node, yaml.MappingNode):
                children = [part for pair in children for part in pair]
            sizes = [self._measure(child, known) for child in children]
            known[node] = 1 + sum(size for size, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        elif known[node] == (0, 0):
            self._fail("an alias stands for something that contains it", node)
        return known[node]

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key_node.tag == f"{_TAG}merge":  # << may bring a key that this mapping overrides
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                self._fail(f"key {_show(key)} is no text; quote it", key_node)
            if key in seen:
                self._fail(f"key '{key}' is given twice", node)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def _number(self, node: yaml.Node) -> int | float:
        kind = node.tag.rpartition(":")[2]
        text = self.construct_scalar(node)
        if ":" in text:
            self._fail(f"{text} would be read in base 60; write one number, or quote it as text", node)
        return getattr(super(), f"construct_yaml_{kind}")(node)

    @staticmethod
    def _fail(reason: str, node: yaml.Node) -> None:
        raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)


_TAG = "tag:yaml.org,2002:"
_StrictLoader.add_constructor(f"{_TAG}int", _StrictLoader._number)
_StrictLoader.add_constructor(f"{_TAG}float", _StrictLoader._number)
_StrictLoader.add_constructor(f"{_TAG}timestamp", yaml.SafeLoader.construct_yaml_str)
for _kind_of_value in ("binary", "set", "omap", "pairs"):  # nothing here takes them
    _StrictLoader.add_constructor(_TAG + _kind_of_value, yaml.SafeLoader.construct_undefined)


def _read_yaml(path: Path, problems: list[str], seen: tuple[Path, ...] = (), read: list[Path] | None = None) -> dict:
    """The tree of `path` over those of its _BASE_ files. `seen`: the files that led here; `read`: all of them."""
    read = [] if read is None else read
    wanted = f"an existing YAML file as _BASE_ of {seen[-1]}" if seen else "an existing YAML file with --cfg"
    read.append(path)
    if len(read) > MOST_FILES:
        problems.append(f"{path}: _BASE_ brings in more than {MOST_FILES} files; remove some of the _BASE_ lines")
        return {}
    try:
        with files.open_regular(path, wanted) as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise UserError(f"{path}: is larger than {MOST_BYTES:,} bytes; pass {wanted}")
        if path.resolve() in seen:
            raise UserError(f"{path}: _BASE_ leads back to this file; remove one of the _BASE_ lines")
        tree = yaml.load(data.decode(), Loader=_StrictLoader)
    except UserError as error:
        problems += error.lines
        return {}
    except UnicodeDecodeError:
        problems.append(f"{path}: is not UTF-8 text; pass {wanted}")
        return {}
    except Exception as error:  # PyYAML lets through what int(), bool and recursion raise
        problems.append(f"{path}: cannot be read, for it is not valid YAML: {' '.join(str(error).split())}")
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
    for base in bases[: MOST_FILES + 1]:
        merged = _overlay(merged, _read_yaml(path.parent / base, problems, (*seen, path.resolve()), read))
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
        if not isinstance(key, str) or key.startswith("-") or key.count(".") > MOST_LEVELS:
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
        path = next((p for p in (Path(str(plugin)), folder / str(plugin)) if os.path.isfile(p)), None)
        if path is None or path.suffix != ".py":
            problems.append(f"EXPERIMENT.PLUGINS: '{plugin}' is not an existing .py file")
            continue
        try:
            importlib.import_module("mdistiller.distillers").load_plugin(path)
            text += path.read_text(encoding="utf-8")
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plug-in is foreign code: whatever it raises is a mistake in the input
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
            if isinstance(value, (bool, str)) and full in _CHOICES:
                word = {"True": "on", "False": "off"}.get(str(value))  # what YAML 1.1 takes these words for
                value = word if word in _CHOICES[full] else value
            try:
                node[key] = _coerce(value, node[key])
            except (TypeError, OverflowError):
                wanted = _kind(node[key])
                problems.append(f"{full}: must be {wanted}, such as {node[key]!r}; got {_show(value)} ({source})")


def _unknown_key(full: str, is_section: bool) -> str:
    if len(full) > 100:  # nothing is near it, and looking takes long
        return f"unknown {'section' if is_section else 'key'}"
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
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a text may look like odd Python
            value = ast.literal_eval(text.strip())
        return value if _is_plain(value) else text
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.strip().lower(), text)


def _decode_tree(value: object) -> object:
    return {k: _decode_tree(v) for k, v in value.items()} if isinstance(value, Mapping) else _decode(value)


def _is_plain(value: object) -> bool:
    """Of what YAML can hold: no set, no bytes, no complex number."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _show(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python writes no decimal of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}..."


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
_SIZES = "must be two sizes of 8 or more and 1,024 at most, such as (32, 32)"
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and bytes that were no text
_RULES = (
    # key, test, what to type instead
    ("SOLVER.EPOCHS", lambda v: 1 <= v < 2**20, "must be at least 1, and below 2**20"),
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
    ("CRD.NCE.K", lambda v: 1 <= v <= 2**20, "must be at least 1, and at most 2**20"),
    ("CRD.FEAT.DIM", lambda v: 1 <= v <= 2**16, "must be at least 1, and at most 2**16"),
    ("FITNET.INPUT_SIZE", lambda v: len(v) == 2 and 8 <= min(v) <= max(v) <= 2**10, _SIZES),
    ("VID.INPUT_SIZE", lambda v: len(v) == 2 and 8 <= min(v) <= max(v) <= 2**10, _SIZES),
    ("TEMPERATURE.ERRATUM.MARGIN", lambda v: 0 < v <= 1, "must be in (0, 1]"),
    ("TEMPERATURE.SHARPNESS.MARGIN", lambda v: 0 < v < 0.5, "must be in (0, 0.5)"),
    ("TEMPERATURE.SHARPNESS.ITERATIONS", lambda v: v >= 1, "must be at least 1"),
    ("LOG.TENSORBOARD_FREQ", lambda v: v >= 1, "must be at least 1"),
    ("LOG.SAVE_CHECKPOINT_FREQ", lambda v: v >= 1, "must be at least 1"),
    ("LOG.PREFIX", bool, "must name a folder"),
    ("EXPERIMENT.PLUGINS", lambda v: all(isinstance(p, str) for p in v), "must be paths of .py files"),
    ("SEED", lambda v: 0 <= v < 2**32, "must be in [0, 2**32)"),
    ("DEVICE", lambda v: re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", v), "must be auto, cpu, cuda, cuda:N or mps"),
)
_CHOICES = {
    "SOLVER.AMP": ("none", "bf16", "fp16"),
    "SOLVER.TYPE": ("SGD",),
    "SOLVER.NAN_POLICY": ("stop", "skip"),
    "SOLVER.STEP": ("auto", "eager", "graph", "compile"),
    "TEACHER_BANK": ("auto", "full", "lazy", "off"),
    "TEACHER_BANK_DTYPE": ("float16", "float32"),
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
        parts = value if isinstance(value, (list, tuple)) else [value]
        numbers = [n for n in parts if isinstance(n, (int, float))]
        if any(isinstance(text, str) and _CONTROL.search(text) for text in parts):
            yield f"{key}: must be text without control characters; got {_show(value)}"
        elif any(isinstance(n, float) and not abs(n) < 1e38 for n in numbers):  # NaN, and what float32 cannot hold
            yield f"{key}: must be a finite number, below 1e38; got {_show(value)}"
        elif any(not -(2**62) < n < 2**62 for n in numbers):  # what a tensor's index can hold, and room to add
            yield f"{key}: must be a whole number below 2**62; got {_show(value)}"
        elif isinstance(value, str):
            continue
        elif last in ("T", "TEMPERATURE", "TEMPERATURES") and not (numbers == [*parts] and min(numbers, default=0) > 0):
            yield f"{key}: {_POSITIVE}; got {_show(value)}"
        elif last.startswith("WARMUP") and not (numbers and numbers[0] >= 0):
            yield f"{key}: must be 0 or more; got {_show(value)}"
    for key, test, wanted in _RULES:
        if key in flat and not test(flat[key]):
            yield f"{key}: {wanted}; got {_show(flat[key])}"
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
    for key in ("EXPERIMENT.NAME", "EXPERIMENT.PROJECT", "LOG.PREFIX", "DATASET.ROOT", "DISTILLER.TEACHER_CKPT"):
        sizes = [len(part.encode(errors="replace")) for part in Path(flat[key]).parts]
        if max(sizes, default=0) > 255 or sum(sizes) > 2000:
            yield f"{key}: is longer than file names can be; got {_show(flat[key])}"
    for key in ("LOG.PREFIX", "DATASET.ROOT", "DISTILLER.TEACHER_CKPT"):
        try:
            files.expand(flat[key])
        except UserError as error:
            yield f"{key}: {error}"
