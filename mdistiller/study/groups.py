"""Which runs may be averaged: groups that differ in the seed alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mdistiller.study.runs import Group, Run


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Return groups in the order of their first run, and a line for each run left out because it repeats a seed. Runs
    of other data, or under another teacher checkpoint, are another group. Groups that would bear one label have in
    `extra` what sets them apart.
    """
    groups: dict[str, Group] = {}
    notes = []
    for run in runs:
        length = run.cfg.SOLVER.EPOCHS if run.finished else run.epochs
        group = groups.setdefault(json.dumps([_question(run), length], sort_keys=True), Group([]))
        twin = next((other for other in group.runs if other.seed == run.seed), None)
        if twin:
            notes.append(f"{run.name}: left out, it repeats SEED {run.seed} of {twin.name}")
        else:
            group.runs.append(run)
    by_label: dict[str, list[Group]] = {}
    for number, group in enumerate(groups.values()):
        group.number = number
        group.runs.sort(key=lambda run: run.seed)
        by_label.setdefault(group.label, []).append(group)
    for alike in by_label.values():
        firsts = [group.first for group in alike]
        apart = [_question(run) | _named_inputs(run, firsts) for run in firsts]
        keys = list(differing(apart))
        for number, (group, values) in enumerate(zip(alike, apart, strict=True), 1):
            said = ", ".join(f"{key} {values.get(key, 'absent')}" for key in keys[:2])
            group.extra = said if len(keys) <= 2 else f"{said}, ... ({number})"
    return list(groups.values()), notes


def _question(run: Run) -> dict[str, object]:
    """Return what runs must share to be averaged: the protocol, and what it was computed from; a data set is its
    digest where that is known, wherever its file lies.
    """
    moved = ("DATASET.ROOT",) if run.inputs["data"] else ()
    return {key: value for key, value in run.protocol.items() if key not in moved} | run.inputs


def _named_inputs(run: Run, others: Sequence[Run]) -> dict[str, str]:
    """Return the run's `inputs` by the names of their files, or by their digests where files of `others` bear the same
    name.
    """

    def texts(of: Run, name: str) -> list[str]:
        files = {"data": of.cfg.DATASET.ROOT, "teacher checkpoint": of.cfg.DISTILLER.TEACHER_CKPT}
        return [Path(files.get(name, "")).name, files.get(name, "")]

    named = {}
    for name, digest in run.inputs.items():
        taken = [text for other in others if other.inputs.get(name) != digest for text in texts(other, name)]
        free = [text for text in texts(run, name) if text and text not in taken]
        named[name] = (free or [digest[:8] or "unknown"])[0]
    return named


def told_apart(runs: Sequence[Run], name: str, labels: Sequence[str]) -> list[str]:
    """Return `labels`, one of each run; behind those that runs share which differ in their input `name`, its name."""
    told = []
    for run, label in zip(runs, labels, strict=True):
        alike = [other for other, text in zip(runs, labels, strict=True) if text == label]
        apart = name in run.inputs and len({other.inputs.get(name) for other in alike}) > 1
        told.append(f"{label} {_named_inputs(run, alike)[name]}" if apart else label)
    return told


def differing(protocols: Sequence[Mapping]) -> dict[str, list]:
    """Return {key: its values, each once, in the order of appearance} of the keys in which `protocols` differ."""
    found: dict[str, list] = {}
    for key in dict.fromkeys(key for protocol in protocols for key in protocol):
        values = [protocol.get(key, "absent") for protocol in protocols]
        found[key] = [value for place, value in enumerate(values) if value not in values[:place]]
    return {key: values for key, values in found.items() if len(values) > 1}
