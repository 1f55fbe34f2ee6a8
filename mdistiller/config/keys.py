"""The keys of the configuration: each with its default, meaning, check and role, declared once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from yacs.config import CfgNode

from mdistiller import registry


class Check(NamedTuple):
    """What a value has to fulfil. `wanted` completes a sentence that begins with the key: "must be ..."."""

    test: Callable[[object], bool]
    wanted: str
    names: Iterable[str] | None = None  # the values there are, for a hint at the nearest one

    def problem(self, value: object) -> str | None:
        """Return what is wrong with `value`, or None."""
        if self.test(value):
            return None
        if self.names is not None:
            known = getattr(self.names, "active", self.names)
            return registry.unknown(getattr(self.names, "kind", "value"), value, known)
        return f"{self.wanted}; got {show(value)}"


def at_least(low: float) -> Check:
    """Return the check of a number that is `low` or more."""
    return Check(lambda v: v >= low, f"must be at least {low}" if low else "must be 0 or more")


def below(high: float, low: float = 0) -> Check:
    """Return the check of a number in [low, high)."""
    return Check(lambda v: low <= v < high, f"must be in [{low}, {high})")


def between(low: float, high: float) -> Check:
    """Return the check of a number in [low, high]."""
    return Check(lambda v: low <= v <= high, f"must be at least {low}, and at most {high}")


def one_of(names: Iterable[str], empty: bool = False) -> Check:
    """Return the check of a name among `names`, a sequence or what is active in a registry; under `empty` it may be
    left out.
    """
    return Check(lambda v: v in getattr(names, "active", names) or (empty and v == ""), "", names)


inside = Check(lambda v: 0 < v < 1, "must be in (0, 1)")
positive = Check(lambda v: v > 0, "must be greater than 0")
all_positive = Check(lambda v: len(v) > 0 and min(v) > 0, "must be numbers greater than 0")
image_size = Check(
    lambda v: len(v) == 2 and 8 <= min(v) <= max(v) <= 1024,
    "must be two sizes of 8 or more and 1,024 at most, such as (32, 32)",
)


class Key(NamedTuple):
    """A configuration key.

    `role` says what a change of it does: "computes" changes the numbers of a run, so it is part of the run's name and
    identity; "how" changes only the way to the same numbers; "where" says where a run happens, reads and writes.
    `distils`: nothing reads it where there is no teacher. `effect` maps a value to what counts of it. `absent`: what a
    record that lacks the key was computed with, where that is not the default. `only`, {other key: values}: nothing
    reads it where that key has none of these values, nor names a data set of such a task.
    """

    default: object
    doc: str = ""
    check: Check | None = None
    role: str = "computes"
    distils: bool = False
    effect: Callable[[object], object] | None = None
    absent: object = None
    only: Mapping[str, Sequence] = {}

    @property
    def before(self) -> object:
        """What a record that lacks the key was computed with."""
        return self.default if self.absent is None else self.absent


class Config(CfgNode):
    """The tree that yacs offers. It remembers in `overrides` the KEY VALUE pairs that were merged into it.

    Its merge methods read files and pairs as `load` does: int for float, _BASE_, and one ConfigError with every
    mistake.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        overrides: list[tuple[str, object]] = []  # a later one wins
        plugins: list[str] = []  # the digests of those that it was loaded with
        came: dict[str, str] = {}  # where the value of each key that was given comes from, for a line that refuses it
        self.__dict__.update(overrides=overrides, plugins=plugins, came=came)

    def merge_from_file(self, cfg_filename: str) -> None:
        from mdistiller.config.loading import merge  # which needs this class

        merge(self, path=cfg_filename)

    def merge_from_list(self, cfg_list: Sequence) -> None:
        from mdistiller.config.loading import merge

        merge(self, opts=cfg_list)

    def merge_from_other_cfg(self, cfg_other: Mapping) -> None:
        from mdistiller.config.loading import merge

        merge(self, tree=cfg_other)


KEYS: dict[str, Key] = {}  # full dotted name -> Key
SECTIONS: dict[str, str] = {}  # name of a method's or rule's section -> its title
CFG = Config()


def add_keys(keys: Mapping[str, Key]) -> None:
    """Enter `keys`, by full dotted name, into KEYS, and their defaults into CFG."""
    for name, key in keys.items():
        node, *parts = CFG, *name.split(".")
        for part in parts[:-1]:
            node = node.setdefault(part, CfgNode())
        default = key.default
        # a copy: YAML writes an object that stands in two places as an alias, which is refused when it is read
        node[parts[-1]] = type(default)([*default]) if isinstance(default, (list, tuple)) else default
        KEYS[name] = key


def add_section(name: str, defaults: Mapping, title: str = "", again: bool = False) -> None:
    """Declare the section CFG.<name>. `defaults` maps its keys to a Key or to a plain default; nested mappings are
    sub-sections. `name` may be dotted, as TEMPERATURE.ERRATUM. A plug-in's defaults of keys that exist are its own.
    `again`: the section may exist, and is declared anew.

    Raises ValueError where the section exists, or where a default is None, which has no type to check a value by, or
    fails its own check.
    """
    *parents, last = name.split(".")
    parent = get(CFG, ".".join(parents))
    if again:
        parent.pop(last, None)
        for key in [key for key in KEYS if key.startswith(f"{name}.")]:
            del KEYS[key]
    elif last in parent and registry.collected is None:
        raise ValueError(f"config section '{name}' exists already; pick another name")
    keys = {f"{name}.{key}": v if isinstance(v, Key) else Key(v) for key, v in leaves(defaults).items()}
    for key, value in keys.items():
        if value.default is None:
            raise ValueError(f"{key}: None has no type that a value could be checked by; pick a default")
        # names may be registered later: `load` looks at them
        if value.check and value.check.names is None and (problem := value.check.problem(value.default)):
            raise ValueError(f"{key}: its default {problem}; mend the default")
        if registry.collected is not None:
            registry.collected.setdefault("default", {})[key] = value.default
    parent.setdefault(last, CfgNode())
    add_keys({key: value._replace(distils=True) for key, value in keys.items() if key not in KEYS})
    SECTIONS.setdefault(name, title)


def leaves(node: Mapping, prefix: str = "") -> dict[str, object]:
    """Return {full dotted key: value} of every value under `node`."""
    flat = {}
    for key, value in node.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def get(cfg: Mapping, key: str) -> object:
    """Return the value or section of the dotted `key`; all of `cfg` for an empty one."""
    for part in key.split(".") if key else ():
        cfg = cfg[part]
    return cfg


def role(name: str) -> str:
    """Return the role of the key `name`. Keys that nobody declared, as a plug-in's may be, compute."""
    return KEYS[name].role if name in KEYS else "computes"


def used_names(cfg: Mapping) -> dict[str, list[str]]:
    """Return {kind of registry: the names that the configuration chooses there}."""
    names, distils = cfg["DISTILLER"], needs_teacher(cfg["DISTILLER"]["TYPE"])
    models = [names["STUDENT"], *(teacher_names(cfg) if distils else ())]
    found = {"method": [names["TYPE"]], "model": models, "dataset": [cfg["DATASET"]["TYPE"]]}
    return found | ({"temperature rule": [cfg["TEMPERATURE"]["RULE"]]} if distils else {})


def teacher_names(cfg: Mapping) -> list[str]:
    """Return the names of the teacher and of those beside it; joined by + they are the teacher's in labels."""
    names = cfg["DISTILLER"]
    return [names["TEACHER"], *(registry.name_and_file(text)[0] for text in names.get("ENSEMBLE", ()))]


def needs_teacher(method: str) -> bool:
    """Return whether the method learns from a teacher. One that nobody registered, as a plug-in's may be, does."""
    registry.fill()
    cls = registry.distillers.get(method)
    return cls is None or cls.needs_teacher


def meaning(name: str) -> str:
    """Return the key's own words, for the end of a line that refuses its value; empty where it has none."""
    return f" [{KEYS[name].doc.rstrip('.')}]" if name in KEYS and KEYS[name].doc else ""


def show(value: object) -> str:
    """Return `value` as it is typed, in 200 characters or fewer."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
