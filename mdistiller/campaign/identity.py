"""What makes two runs the same run: the settings that change what is computed, and their hash."""

import hashlib
import json
from collections.abc import Iterable, Mapping

from mdistiller.config import computed as computing

__all__ = ["computing"]


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
