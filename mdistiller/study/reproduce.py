"""What tools/reproduce.py does: a plan, or a part of it, to its tables and charts."""

import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import yaml

from mdistiller.config.seeds import parse_seeds
from mdistiller.dataset import load_dataset
from mdistiller.errors import UserError
from mdistiller.runs.folder import check_writable
from mdistiller.runs.recorder import read_metrics
from mdistiller.study import plan
from mdistiller.study.conduct import Conductor, epoch_seconds, lost_teachers, state
from mdistiller.study.jobs import Local, Slurm
from mdistiller.study.plan import PlannedGroup
from mdistiller.study.published import read_published
from mdistiller.study.records import read_records, recorded
from mdistiller.study.results import results_of
from mdistiller.study.runs import Run
from mdistiller.study.tables import Table, text_table
from mdistiller.terminal import columns, counted, say

SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def parse_time(text: str) -> float:
    """Return the seconds of 2h, 90m, 1h30m, 45s. Raises UserError for other texts."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(a + b for a, b in parts) != text:
        raise UserError(f"--budget {text}: give a time such as 2h, 90m or 1h30m")
    return sum(float(number) * SECONDS[unit] for number, unit in parts)


def parse_parameters(words: Sequence[str]) -> dict[str, object]:
    """Return {KEY: value} of KEY=VALUE words, the values as YAML reads them. Raises UserError for other words."""
    wrong = [word for word in words if "=" not in word]
    if wrong:
        raise UserError(
            f"--slurm {wrong[0]}: takes KEY=VALUE, such as slurm_partition=gpu; KEY VALUE pairs stand before --slurm"
        )
    try:
        return {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in words)}
    except yaml.YAMLError:
        raise UserError(f"--slurm {' '.join(words)}: takes values as YAML has them; quote what is none") from None


def reproduce(words, folder: Path, opts: Sequence[str]) -> int:
    """Run the plan that the parsed `words` of tools/reproduce.py name; return the exit status.

    `folder`: where plans lie. `opts`: KEY VALUE pairs that say where to run or write. Raises UserError, with nothing
    written, where something of it cannot work.
    """
    begin = time.monotonic()
    budget = None if words.budget is None else parse_time(words.budget)
    seeds = None if words.seeds is None else parse_seeds([words.seeds])
    study = plan.load(plan.find(words.plan, folder), opts, seeds)
    groups = study.select(words.only)
    home = words.results or study.results
    figures, parameters = read_published(words.published), parse_parameters(words.slurm)
    if parameters and words.executor != "slurm":
        raise UserError("--slurm: add --executor slurm")
    records = read_records(home / "runs.jsonl")
    if words.dry_run:
        forecast(groups, records)
        return 0
    prefix = groups[0].first.folder.parent
    check_writable(prefix, "LOG.PREFIX")
    check_writable(home, "--results")
    unfinished = [g for g in groups if any(run.hash not in records for run in g.runs)]
    for wanted in {(g.cfg.DATASET.TYPE, g.cfg.DATASET.ROOT): g.cfg.DATASET for g in unfinished}.values():
        load_dataset(wanted.TYPE, wanted.ROOT, wanted)  # what it lacks is said before anything runs
    executor = Local() if words.executor == "local" else Slurm(prefix / ".slurm", parameters)
    conductor = Conductor(study.name, groups, home / "runs.jsonl", executor, budget)
    runs = [run for group in groups for run in group.runs]
    kept = sum(map(conductor.is_done, runs))
    if kept:
        total, are = counted(len(runs), "run"), "is" if kept == 1 else "are"
        say(f"{kept} of {total} {are} on record in {conductor.file}; --results FOLDER starts another")
    status = conductor.run()
    found = results_of(conductor.records.values(), figures, folder, study)
    found.write(home)
    say(f"\n{found.text}\n")
    left = conductor.left()
    for run in left:
        say(": ".join(filter(None, [f"waiting  {run.label}", conductor.waiting.get(run.label)])))
    for label, reason in conductor.failed.items():
        say(f"failed   {label}: {reason}")
    counts = {"done": sum(map(conductor.is_done, runs)), "failed": len(conductor.failed), "waiting": len(left)}
    counts = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
    written = f"; tables and charts in {home / study.name}" if found.table.rows else ""
    say(f"{counts}, in {duration(time.monotonic() - begin)}{written}")
    if status:
        say("the same command goes on with what is left")
    return status


def duration(seconds: float | None) -> str:
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def forecast(groups: Sequence[PlannedGroup], records: Mapping[str, Run]) -> None:
    """Say what would run, and about how long it would take, by epochs that ran on this device."""
    lost = lost_teachers(groups, records)
    rows, todo = [], []
    for group in groups:
        seconds = epoch_seconds(group, records)
        for run in group.runs:
            found = "done" if run.hash in records and run.label not in lost else state(run)
            epochs, times = run.cfg.SOLVER.EPOCHS, ["", ""]
            if found in ("done", "finished"):
                done = (records.get(run.hash) or recorded(run)).epochs
            else:
                done = 0 if found in ("missing", "another") else len(read_metrics(run.folder))
                left = None if seconds is None else seconds * (epochs - done)
                todo.append((epochs - done, left))
                times = [f"{seconds:.1f}" if seconds else "?", duration(left)]
            rows.append([run.label, found, f"{done}/{epochs}", *times])
    say(text_table(Table("forecast", "", "", ("run", "state", "epochs", "s/epoch", "time left"), rows), columns()))
    for label in sorted(lost):
        say(f"{label} is on record, but its network is gone: its students need it trained again")
    times = [left for _, left in todo if left is not None]
    unknown = len(todo) - len(times)
    time_left = f"about {duration(sum(times))} one after the other" if times or not unknown else ""
    if unknown:
        unsaid = f"{counted(unknown, 'run')} of unknown time: none like it has run on this device"
        time_left = ", and ".join(filter(None, [time_left, unsaid]))
    epochs_left = sum(epochs for epochs, _ in todo)
    say(f"{counted(len(todo), 'run')}, {counted(epochs_left, 'epoch')} left: {time_left}")
