"""From YAML files and KEY VALUE pairs to a checked, frozen configuration."""

import re
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from yacs.config import CfgNode

from mdistiller import files, registry
from mdistiller.config.core import DOT_TRAINERS
from mdistiller.config.keys import CFG, KEYS, SECTIONS, Config, leaves, meaning, needs_teacher, show
from mdistiller.config.plugins import Plugin, activate, find_plugin, load_plugin
from mdistiller.config.reading import read_yaml
from mdistiller.config.unknown import Known, unknown_key
from mdistiller.config.values import coerce, decode, decode_tree, kind_of
from mdistiller.errors import ConfigError, UserError, place_of

MOST_PROBLEMS = 20
NETWORKS = ("DISTILLER.TEACHER", "DISTILLER.STUDENT", "DISTILLER.ENSEMBLE")
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # and bytes that were no text


def load(path: str | Path | None = None, opts: Sequence = (), origin: str = "command line") -> Config:
    """Return the frozen configuration: defaults, then the YAML file and its _BASE_ files, then KEY VALUE pairs, which
    are from `origin`.

    Raises ConfigError with one line for each mistake found, all at once.
    """
    registry.fill()
    cfg = CFG.clone()
    problems = _merge_all(cfg, path, {}, opts, origin)
    _refuse([*problems, *_value_problems(cfg)])
    cfg.freeze()
    return cfg


def load_plugins(named: object, folder: Path, given: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Import the plug-ins that config.yaml in `folder` has `named`, and `given` files, which take the place of those
    that bear their names. Return the digests of those that are there, and the names of the others.
    """
    moved = {Path(path).name: path for path in given}
    names = named if isinstance(named, list) else []
    places = {str(name): find_plugin(moved.pop(Path(str(name)).name, str(name)), folder) for name in names}
    found = [str(path) for path in places.values() if path] + list(moved.values())
    digests = load(None, ["EXPERIMENT.PLUGINS", found]).plugins if found else []
    return tuple(digests), tuple(name for name, path in places.items() if not path)


def check(cfg: CfgNode) -> None:
    """Raise ConfigError where a value of `cfg` fails its key's check, as one that was merged by hand may."""
    _refuse(_value_problems(cfg))


def read(path: Path) -> dict:
    """Return the tree of a YAML file as it stands, with neither defaults nor validation. Raises ConfigError."""
    problems: list[str] = []
    tree = read_yaml(path, problems)
    _refuse(problems)
    return tree


def misfit(tree: Mapping) -> str | None:
    """Return the first key in `tree` whose value is of another kind than its default; unknown keys count as fitting."""
    for name, value in leaves(tree).items():
        try:
            if name in KEYS:
                coerce(value, KEYS[name].default)
        except (TypeError, OverflowError):
            return name
    return None


def merge(
    cfg: Config,
    path: str | Path | None = None,
    tree: Mapping | None = None,
    opts: Sequence = (),
    origin: str = "command line",
) -> None:
    """Merge a YAML file, a `tree` and KEY VALUE pairs, which are from `origin`, into `cfg`. Raises ConfigError."""
    if cfg.is_frozen():
        raise AttributeError("this configuration is frozen; clone() it, then defrost() the clone")
    _refuse(_merge_all(cfg, path, tree or {}, opts, origin))


def _merge_all(cfg: Config, path: str | Path | None, tree: Mapping, opts: Sequence, origin: str) -> list[str]:
    """Merge as `merge` does, the plug-ins that the last PLUGINS among the sources names and their defaults first, and
    return what is wrong.
    """
    problems: list[str] = []
    file = read_yaml(Path(path), problems) if path else {}
    pairs = _parse_opts(opts, origin, problems)
    sources = [(file, str(path)), (tree, "other configuration"), *((override, origin) for _, override in pairs)]
    named = [section["PLUGINS"] for section in _sections(sources, "EXPERIMENT") if "PLUGINS" in section]
    if named:
        loaded = _load_plugins(decode(named[-1]), Path(path).parent if path else Path(), problems)
        _refuse(problems)  # what a plug-in would have brought is no mistake of its own
        cfg.plugins[:] = [plugin.digest for plugin in loaded]
    activate(cfg.plugins)
    if named:
        types = [section["TYPE"] for section in _sections(sources, "DISTILLER") if "TYPE" in section]
        method = registry.distillers.named(str(types[-1] if types else cfg.DISTILLER.TYPE))
        for plugin in loaded:
            for key, value in plugin.defaults_for(method).items():
                _set_default(cfg, key, value)
    known = Known(cfg.plugins)
    for tree, source in sources:
        _merge(cfg, tree, source, "", known, problems)
        cfg.came.update(dict.fromkeys(leaves(tree), source))
    cfg.DISTILLER.TYPE = registry.distillers.named(cfg.DISTILLER.TYPE)
    cfg.overrides.extend(pair for pair, _ in pairs)
    return problems


def _sections(sources: Iterable[tuple[Mapping, str]], name: str) -> list[Mapping]:
    return [tree[name] for tree, _ in sources if isinstance(tree.get(name), Mapping)]


def _refuse(problems: Iterable[str]) -> None:
    """Raise ConfigError if there are any problems, with MOST_PROBLEMS of them at most."""
    lines = list(dict.fromkeys(problems))
    if len(lines) > MOST_PROBLEMS:
        lines = [*lines[:MOST_PROBLEMS], f"and {len(lines) - MOST_PROBLEMS} more of this kind"]
    if lines:
        raise ConfigError(*lines)


def _as_typed(opts: Iterable) -> list:
    """Return KEYs and VALUEs in turn, of what may be typed: KEY=VALUE, and lists that the shell cut at their spaces."""
    words: list = []
    for word in opts:
        text = word if isinstance(word, str) else ""
        before = words[-1] if words and isinstance(words[-1], str) else ""
        if len(words) % 2 == 0 and before.startswith(("[", "(")) and not before.endswith(("]", ")")):
            words[-1] = f"{before} {word}"
        elif len(words) % 2 == 0 and re.match(r"[A-Za-z_][\w.]*=", text):
            words += text.split("=", 1)
        else:
            words.append(word)
    return words


def _parse_opts(opts: Sequence, origin: str, problems: list[str]) -> list[tuple[tuple[str, object], dict]]:
    """Return ((KEY, VALUE), its tree) for each pair, in order."""
    opts = _as_typed(opts)
    if len(opts) % 2:
        problems.append(f"{origin}: '{opts[-1]}' has no value; overrides come in pairs: KEY VALUE")
    pairs = []
    for key, value in zip(opts[::2], opts[1::2], strict=False):
        if not isinstance(key, str) or key.startswith("-"):
            problems.append(f"{origin}: '{key}' is not a key; overrides are KEY VALUE pairs such as SOLVER.LR 0.1")
            continue
        tree = value
        for part in reversed(key.split(".")):
            tree = {part: tree}
        pairs.append(((key, value), tree))
    return pairs


def _load_plugins(plugins: object, folder: Path, problems: list[str]) -> list[Plugin]:
    """Import every plug-in, a .py file or a checkout's folder."""
    plugins = [plugins] if isinstance(plugins, str) else plugins
    if not isinstance(plugins, (list, tuple)):
        return []  # _merge reports the wrong type
    loaded = []
    for plugin in plugins:
        path = find_plugin(str(plugin), folder)
        if path is None:
            close = registry.nearest(str(plugin), map(str, Path(str(plugin)).parent.glob("*.py")))
            near = f"; did you mean {close[0]}?" if close else ""
            problems.append(f"EXPERIMENT.PLUGINS: '{plugin}' is neither an existing .py file nor a folder{near}")
            continue
        try:
            loaded.append(load_plugin(path))
        except KeyboardInterrupt:
            raise
        except UserError as error:
            problems += error.lines
        except BaseException as error:  # foreign code: whatever it raises is a mistake in the input
            lacks_ours = isinstance(error, ImportError) and "mdistiller" in str(error) and path.is_file()
            hint = "; if the file is part of a checkout, name the checkout's folder" if lacks_ours else ""
            place = "" if isinstance(error, SyntaxError) else place_of(traceback.extract_tb(error.__traceback__))
            failed = f"{plugin} fails on import{place}: {type(error).__name__}: {error}{hint}"
            problems.append(f"EXPERIMENT.PLUGINS: {failed}")
    return loaded


def _set_default(cfg: CfgNode, key: str, value: object) -> None:
    """Set a plug-in's default, in sections that are made where there are none; of a key of the engine's, only a value
    of its kind.
    """
    *sections, last = key.split(".")
    node = cfg
    for section in sections:
        node = node.setdefault(section, CfgNode())
        if not isinstance(node, CfgNode):
            return
    try:
        node[last] = coerce(value, node[last]) if last in node else decode(value)
    except (TypeError, OverflowError):
        if sections and sections[0] in SECTIONS:
            node[last] = decode(value)


def _merge(node: CfgNode, tree: Mapping, source: str, prefix: str, known: Known, problems: list[str]) -> None:
    for key, value in tree.items():
        full, is_section = f"{prefix}{key}", isinstance(value, Mapping)
        if key not in node:
            if not known.reads(full, is_section):
                problems.append(f"{full}: {unknown_key(full, is_section)} ({source})")
                continue
            node[key] = CfgNode() if is_section else value
        if isinstance(node[key], CfgNode):
            if is_section:
                _merge(node[key], value, source, f"{full}.", known, problems)
            else:
                example = next(iter(leaves(node[key], f"{full}.")), f"{full}.KEY")
                problems.append(f"{full}: is a section, not a value; set its keys, such as {example} ({source})")
        elif is_section:
            problems.append(f"{full}: is a single value ({kind_of(node[key])}), not a section ({source})")
        elif full not in known.keys:  # a plug-in's, of which nobody knows what else than its default it may be
            node[key] = decode_tree(value)
        else:
            try:
                node[key] = coerce(_unquoted(full, value), KEYS[full].default)
            except (TypeError, OverflowError):
                default = KEYS[full].default
                wanted, example = kind_of(default), default or node[key]
                line = f"{full}: must be {wanted}, such as {example!r}; got {show(value)} ({source})"
                problems.append(line + meaning(full))


def _unquoted(name: str, value: object) -> object:
    """Return the word that YAML 1.1 took for a truth value, where the key `name` knows it: off, on."""
    check = KEYS[name].check if name in KEYS else None
    word = {"True": "on", "False": "off"}.get(str(value)) if isinstance(value, (bool, str)) else None
    return word if check and check.names is not None and word in check.names else value


def _value_problems(cfg: CfgNode) -> Iterable[str]:
    """Yield a line for each value that cannot be, with where it is from and what the key means."""
    came = cfg.came if isinstance(cfg, Config) else {}
    flat, keys = leaves(cfg), Known(getattr(cfg, "plugins", ())).keys
    for name, value in flat.items():
        parts = value if isinstance(value, (list, tuple)) else [value]
        numbers = [n for n in parts if isinstance(n, (int, float))]
        problem = None
        if any(isinstance(text, str) and _CONTROL.search(text) for text in parts):
            problem = f"must be text without control characters; got {show(value)}"
        elif any(isinstance(n, float) and not abs(n) < 1e38 for n in numbers):  # NaN, and what float32 cannot hold
            problem = f"must be a finite number, below 1e38; got {show(value)}"
        elif any(isinstance(n, int) and not -(2**62) < n < 2**62 for n in numbers):  # a tensor's index, and room to add
            problem = f"must be a whole number below 2**62; got {show(value)}"
        elif name in keys and keys[name].check:
            problem = keys[name].check.problem(value)
        unread = (
            name == "DISTILLER.TEACHER" and value == keys[name].default and not needs_teacher(flat["DISTILLER.TYPE"])
        )
        if not problem and name in NETWORKS and not unread:  # whose names depend on the data set
            found = [registry.name_and_file(text)[0] for text in parts] if name == "DISTILLER.ENSEMBLE" else parts
            refusals = (registry.model_refusal(text, flat["DATASET.TYPE"]) for text in found)
            problem = next(filter(None, refusals), None)
        if problem:
            yield f"{name}: {problem} ({came.get(name, f'the default; set {name}')}){meaning(name)}"
    momentum, delta = flat["SOLVER.MOMENTUM"], flat["SOLVER.DOT.DELTA"]
    trainer, method = flat["SOLVER.TRAINER"], flat["DISTILLER.TYPE"]
    if trainer in DOT_TRAINERS and not abs(delta) <= momentum < 1 - abs(delta):
        yield f"SOLVER.DOT.DELTA: SOLVER.MOMENTUM ({momentum}) +- DELTA must lie in [0, 1); got {delta!r}"
    if refused := getattr(registry.distillers.get(method), "refused", ""):
        yield f"DISTILLER.TYPE: {refused}"
    if trainer in DOT_TRAINERS and flat["SOLVER.TYPE"] != "SGD":
        yield f"SOLVER.TYPE: {trainer} is SGD with two momenta; set SOLVER.TYPE SGD, or SOLVER.TRAINER base"
    if trainer in DOT_TRAINERS and not needs_teacher(method):
        yield (
            f"SOLVER.TRAINER: {trainer} separates task from distillation; {method} does not distil; set SOLVER.TRAINER "
            "base"
        )
    for name in ("EXPERIMENT.NAME", "EXPERIMENT.PROJECT"):
        if ".." in Path(flat[name]).parts or Path(flat[name]).is_absolute():
            yield f"{name}: must be a folder name below LOG.PREFIX; got {flat[name]!r}"
    for name in ("LOG.PREFIX", "DATASET.ROOT", "DISTILLER.TEACHER_CKPT", "DISTILLER.STUDENT_CKPT"):
        try:
            files.expand(flat[name])
        except UserError as error:
            yield f"{name}: {error}"
