"""What makes two runs the same run: the settings that change what is computed, and their hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from mdistiller import config
from mdistiller.engine.cfg import ALWAYS, CFG
from mdistiller.runs.folder import PLACE, by_effect

ALONE = ("SOLVER.", "DATASET.", "DISTILLER.TYPE", "DISTILLER.STUDENT", "SEED", "DETERMINISTIC")  # all that NONE reads


def computing(tree: Mapping) -> dict[str, object]:
    """{key: value} of the settings in `tree`, nested or flat, that change what is computed: no PLACE, no section of a
    method that is not in use. Keys that `tree` lacks have today's defaults, so that a key added later makes no finished
    run another one.
    """
    defaults = {key: _plain(value) for key, value in config.leaves(CFG).items()}
    flat = by_effect(defaults | {key: _plain(value) for key, value in config.leaves(tree).items()})
    if flat["DISTILLER.TYPE"] == "NONE":
        kept = [key for key in flat if key.startswith(ALONE) and not _is_place(key, flat)]
        kept += ["EXPERIMENT.PLUGINS"] * bool(flat["EXPERIMENT.PLUGINS"])  # which may bring the student's model
        return {key: flat[key] for key in kept}
    used = (*ALWAYS, flat["DISTILLER.TYPE"], "SEED", "DETERMINISTIC")
    return {
        key: value
        for key, value in flat.items()
        if not _is_place(key, flat) and (key.split(".")[0] in used or value != defaults.get(key))
    }


def tree_of(flat: Mapping[str, object]) -> dict:
    """{"SOLVER.LR": 0.1} as {"SOLVER": {"LR": 0.1}}."""
    tree: dict = {}
    for key, value in flat.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def _is_place(key: str, flat: Mapping) -> bool:
    computes = ["EXPERIMENT.PLUGINS", *["DATASET.ROOT"] * (flat["DATASET.TYPE"] == "npz")]  # the images are that file
    return key.startswith(PLACE) and key not in computes


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value  # YAML and JSON know lists only


def identity(own: Mapping, teacher: Mapping | None) -> str:
    """Hash of a run: its settings and, where it has a teacher that was trained here, the teacher's."""
    text = json.dumps([own, teacher], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def protocol(own: Mapping, teacher: Mapping | None) -> dict[str, object]:
    """All that runs must share to be averaged: everything but the seed. The teacher's keys have `teacher ` before."""
    return {k: v for k, v in own.items() if k != "SEED"} | {f"teacher {k}": v for k, v in (teacher or {}).items()}


def differing(protocols: Iterable[Mapping]) -> dict[str, list]:
    """{key: its values, in the order of appearance} of the keys in which some of `protocols` differ."""
    protocols = list(protocols)
    values = {k: [p.get(k, "absent") for p in protocols] for k in dict.fromkeys(k for p in protocols for k in p)}
    apart = {k: [v for i, v in enumerate(vs) if v not in vs[:i]] for k, vs in values.items()}
    return {k: vs for k, vs in apart.items() if len(vs) > 1}
