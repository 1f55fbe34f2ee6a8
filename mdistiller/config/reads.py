"""Which keys a configuration reads, and so what of it a run computes."""

import re
from collections.abc import Mapping

from mdistiller import registry
from mdistiller.config.keys import KEYS, SECTIONS, Key, leaves
from mdistiller.config.plugins import PLUGINS


def computed(cfg: Mapping) -> dict[str, object]:
    """Return {key: value} of the settings in `cfg`, nested or flat, that decide what is computed.

    Keys that only say where or how and those that are `unread` are left out, as are sections of other methods at their
    defaults. Keys that `cfg` lacks have their defaults, or what was computed before they were there (`Key.absent`), so
    that a key that is added later makes no finished run another one. Values are as YAML and JSON hold them: lists, no
    tuples.
    """
    registry.fill()
    given = leaves(cfg)
    flat = {name: _plain(key.before) for name, key in KEYS.items()} | {k: _plain(v) for k, v in given.items()}
    kept = {}
    for name, value in flat.items():
        key, section = KEYS.get(name, Key(None)), name.split(".")[0]
        here = name == "DATASET.ROOT" and flat["DATASET.TYPE"] in ("npz", "text")  # the data are that file
        of_another = section in SECTIONS and section != flat["DISTILLER.TYPE"]
        usual = of_another and value in (_plain(key.default), _plain(key.before))
        if (key.role == "computes" or here) and not usual and not unread(flat, name):
            kept[name] = key.effect(value) if key.effect else value
    return kept


def unread(flat: Mapping[str, object], name: str) -> str:
    """Return why a configuration, {key: value}, does not read the key `name`; empty where it does, or where code from
    outside may. Keys that `flat` lacks have their defaults.
    """

    def value_of(other: str) -> object:
        return flat.get(other, KEYS[other].before)

    key, method, (section, *parts) = KEYS.get(name), value_of("DISTILLER.TYPE"), name.split(".")
    cls = registry.distillers.get(method)  # None: of a plug-in that is not there
    if key and cls and section != method:
        if key.distils and not cls.needs_teacher:
            return f"{method} has no teacher"
        if section.startswith("TEACHER_BANK") and not cls.takes_teacher_logits:
            return f"{method} compares more than logits"
        if not name.startswith(cls.reads) and not _may_read(method, cls, section):
            rule = "std" if value_of("EXPERIMENT.LOGIT_STAND") else getattr(cls, "own_rule", "")
            rule = value_of("TEMPERATURE.RULE") or rule
            if section in SECTIONS:
                return f"{method} does not read it"
            if section == "TEMPERATURE" and not hasattr(cls, "own_rule"):
                return f"{method} takes no temperature rule"
            if section == "TEMPERATURE" and len(parts) > 1 and parts[0] != rule.upper():
                return f"the temperature rule is {rule}"
            if section == "DIVERGENCE" and not cls.takes_divergence:
                return f"{method} takes no other divergence"
    for other, values in key.only.items() if key else ():
        value = value_of(other)
        # a data set from outside reads what it likes
        ours = other != "DATASET.TYPE" or registry.is_ours(registry.datasets.get(value))
        if ours and not {value, registry.task_of(value)} & {*values}:
            return f"{other} is {value}"
    return ""


def _may_read(method: str, cls: type, section: str) -> bool:
    """Return whether a method from outside may read the section: where it is of plug-ins, they name it."""
    if registry.is_ours(cls):
        return False
    texts = [plugin.text for plugin in PLUGINS.values() if plugin.brought.get("method", {}).get(method) is cls]
    return not texts or any(re.search(rf"\b{section}\b", text) for text in texts)


def _plain(value: object) -> object:
    return list(map(_plain, value)) if isinstance(value, (list, tuple)) else value
