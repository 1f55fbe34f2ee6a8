"""The complete configuration, with the section of every method: `from mdistiller.engine.cfg import CFG`."""

import inspect
import re
import sys

from yacs.config import CfgNode

from mdistiller import dataset, distillers, models  # noqa: F401  (they fill the registries and the sections)
from mdistiller.config import CFG, KEYS, PLUGINS, SECTIONS, Config, Key, get, leaves, load
from mdistiller.distillers._divergences import OPTIONS
from mdistiller.errors import UserError
from mdistiller.terminal import say


def describe(cfg: CfgNode) -> str:
    """Return the configuration as YAML, without the sections of methods that are not in use, and of temperature rules
    that stand at their defaults.
    """
    shown = cfg.clone()
    for name in SECTIONS:
        parent, _, last = name.rpartition(".")
        node = get(shown, parent)
        if last not in node or name == cfg.DISTILLER.TYPE:
            continue
        if not parent or all(value == KEYS[key].default for key, value in leaves(node[last], f"{name}.").items()):
            del node[last]
    return shown.dump()


def show_cfg(cfg: CfgNode) -> None:
    """Print what `describe` gives."""
    say(describe(cfg))


def unread_overrides(cfg: Config) -> str:
    """Return a line on the KEY VALUE pairs of `cfg` that its run does not read, and on the keys that came with plug-ins
    whose methods and models do not; empty if there are none.
    """
    method = cfg.DISTILLER.TYPE
    cls = distillers.distiller_dict[method]
    ruled = issubclass(cls, distillers.RuleDistiller)
    rule = distillers.rule_name(cfg, cls.own_rule) if ruled else ""
    code = "".join(PLUGINS[digest].code for digest in cfg.plugins)

    def reason(key: str) -> str:
        section, last = key.split(".")[0], key.rpartition(".")[2]
        if key not in KEYS:
            read = f"{re.escape(last)}|{re.escape(key.rpartition('.')[0] or last)}[^.\\w]"  # or its section as a whole
            return "" if re.search(rf"\b({read})", code) else "no method or model reads it"
        if section in SECTIONS and section != method and not _reads(cfg, cls, section):
            return f"{method} does not read the section {section}"
        of_teacher = key.startswith(("DISTILLER.TEACHER", "DISTILLER.TRAIN_TEACHER"))
        if not cls.needs_teacher and section != method and (of_teacher or (key in KEYS and KEYS[key].distils)):
            return f"{method} has no teacher"
        if section == "TEMPERATURE" and not ruled:
            return f"{method} takes no temperature rule"
        if key.rpartition(".")[0] in SECTIONS and section == "TEMPERATURE" and key.split(".")[1] != rule.upper():
            return f"the temperature rule is {rule}"
        if section == "DIVERGENCE" and not cls.takes_divergence:
            return f"{method} takes no other divergence"
        if key in ("DIVERGENCE.BETA", "DIVERGENCE.SKEW") and key.split(".")[1] != OPTIONS.get(cfg.DIVERGENCE.TYPE):
            return f"DIVERGENCE.TYPE is {cfg.DIVERGENCE.TYPE}"
        if key.startswith("SOLVER.LR_DECAY") and cfg.SOLVER.SCHEDULE != "multistep":
            return f"SOLVER.SCHEDULE is {cfg.SOLVER.SCHEDULE}"
        if key == "SOLVER.MOMENTUM" and cfg.SOLVER.TYPE != "SGD":
            return f"SOLVER.TYPE is {cfg.SOLVER.TYPE}"
        if key.startswith("SOLVER.DOT.") and "dot" not in cfg.SOLVER.TRAINER:
            return f"SOLVER.TRAINER is {cfg.SOLVER.TRAINER}"
        return ""

    given = [key for key, _ in cfg.overrides] + [key for key in cfg.came if key not in KEYS]
    unread = [f"{key} ({why})" for key, why in {key: reason(key) for key in given}.items() if why]
    return f"no effect here: {', '.join(unread)}" if unread else ""


def _reads(cfg: Config, cls: type, section: str) -> bool:
    """Return whether the code of a method, or that of a plug-in, may read the section."""
    text = "".join(PLUGINS[digest].text for digest in cfg.plugins)
    if re.search(rf"\b{section}\b", text) or (section == "CRD" and "contrastive_index" in text):
        return True
    for base in cls.__mro__:
        if base.__module__.startswith("mdistiller."):
            if re.search(rf"cfg\.{section}\b", inspect.getsource(sys.modules[base.__module__])):
                return True
        elif not base.__module__.startswith(("torch.", "builtins")) and not cfg.plugins:
            return True  # of a notebook
    return False


def lskd_pairs(cfg: CfgNode, stand: bool, base_temp: str | None, kd_weight: str | None) -> list[str]:
    """Return the KEY VALUE pairs that LSKD's --logit-stand, --base-temp and --kd-weight mean for the method in use.

    The temperature is the method's own, the middle one of MLKD's; the weight becomes LOSS.KD_WEIGHT, or multiplies
    ALPHA and BETA where a method has these. `stand` alone brings LSKD's defaults, 2 and 9. Raises UserError for an
    option that the method has no key for.
    """
    method = cfg.DISTILLER.TYPE
    own = leaves(cfg.get(method, {}), f"{method}.")
    pairs = ["EXPERIMENT.LOGIT_STAND", "True"] if stand else []
    if stand:
        base_temp, kd_weight = base_temp or "2", kd_weight or "9"
    if base_temp is not None:
        several = f"{method}.TEMPERATURES"
        keys = [f"{method}.{name}" for name in ("TEMPERATURE", "T") if f"{method}.{name}" in own]
        if keys:
            pairs += [keys[0], base_temp]
        elif several in own:
            values = list(own[several])
            values[len(values) // 2] = _number("--base-temp", base_temp)
            pairs += [several, str(values)]
        elif method == "CTKD":
            pairs += ["KD.TEMPERATURE", base_temp]  # its reference under another rule than the learned one
        else:
            raise UserError(f"{'--logit-stand' if stand else '--base-temp'}: {method} has no temperature; leave it out")
    if kd_weight is not None:
        factor, factors = _number("--kd-weight", kd_weight), [f"{method}.ALPHA", f"{method}.BETA"]
        if f"{method}.LOSS.KD_WEIGHT" in own:
            pairs += [f"{method}.LOSS.KD_WEIGHT", kd_weight]
        elif all(key in own for key in factors):
            pairs += [word for key in factors for word in (key, str(factor * own[key]))]
        else:
            raise UserError(f"--kd-weight: {method} has no weight of a loss on logits; leave it out")
    return pairs


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{option}: must be a number; got '{text}'") from None


def config_page() -> str:
    """Return docs/config.md: every key, its default, its meaning and its role."""
    lines = [
        "# Configuration",
        "",
        "Generated by `make docs` from the code; every key can stand in a YAML file, or as `KEY VALUE` on the command",
        "line. `_BASE_: other.yaml` (or a list) at the top of a file inherits from others, relative to that file.",
        "",
        "The role says what a change of the key does. *computes*: other numbers, so it is part of a run's name, and",
        "`--resume` refuses to change it, but for a larger `SOLVER.EPOCHS`, to train on. *how*: another way to the",
        "same numbers. *where*: another place.",
        "",
    ]
    methods = {name: title for name, title in SECTIONS.items() if "." not in name}
    lines += _table(key for key in KEYS if key.split(".")[0] not in methods)
    for name, title in sorted(methods.items()):
        lines += ["", f"## {name}", "", title, "", *_table(key for key in KEYS if key.split(".")[0] == name)]
    return "\n".join(lines) + "\n"


def _table(names) -> list[str]:
    rows = [(name, KEYS[name]) for name in names]
    cells = [f"| `{name}` | `{key.default!r}` | {key.role} | {key.doc} |" for name, key in rows]
    return ["| key | default | role | meaning |", "|---|---|---|---|", *cells]


__all__ = ["CFG", "Key", "config_page", "describe", "leaves", "load", "lskd_pairs", "show_cfg"]
