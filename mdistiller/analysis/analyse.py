"""tools/analyze.py: from run folders to figures, tables and the report."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mdistiller.analysis import comparison, results, temperatures
from mdistiller.analysis.charts import Chart, Table, write_numbers, write_table
from mdistiller.analysis.drawing import draw, draw_images
from mdistiller.analysis.networks import Missing, Networks
from mdistiller.analysis.page import GENERATOR, page
from mdistiller.analysis.runs import Group, check_opts, group_runs, read_run
from mdistiller.analysis.statistics import Mean
from mdistiller.analysis.superclasses import class_names
from mdistiller.errors import UserError


@dataclass
class Analysis:
    """What was found, in the order of the page. `folder` takes the pictures and their numbers."""

    groups: list[Group]
    folder: Path
    networks: Networks
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, chart: Chart) -> None:
        if not chart.empty:
            draw(chart, self.folder, [group.figures for group in self.groups])
            write_numbers(chart, self.folder / f"{chart.name}.csv")
            self.charts.append(chart)

    def add_table(self, table: Table) -> None:
        self.tables.append(table)
        head = [part for name in table.head for part in ((name, f"{name}, std") if _spreads(table, name) else (name,))]
        rows = [
            [part for name, cell in zip(table.head, row, strict=True) for part in _parts(cell, _spreads(table, name))]
            for row in table.rows
        ]
        write_table(self.folder.parent / f"{table.name.lower().replace(' ', '-')}.csv", head, rows)

    def note(self, group: Group, text: str) -> None:
        self.notes.append(f"{group.label}: {text}")

    def slug(self, number: int) -> str:
        words = re.sub(r"[^A-Za-z0-9]+", "-", self.groups[number].label.replace("→", " to ")).strip("-").lower()
        return f"{number + 1:02d}-{words[:60]}"


def _spreads(table: Table, name: str) -> bool:
    return any(isinstance(row[list(table.head).index(name)], Mean) for row in table.rows)


def _parts(cell: object, spreads: bool) -> list:
    if isinstance(cell, Mean):
        return [cell.mean, cell.std]
    return [cell, None] if spreads else [cell]


def analyse(
    folders: Sequence[Path],
    out: Path,
    published: Path | None = None,
    opts: Sequence[str] = (),
    latex: bool = False,
    markdown: bool = False,
    say: Callable[[str], None] = lambda _text: None,
) -> Analysis:
    """Write figures, tables and report.html into the folder `out`; `say` hears of progress.

    `opts`: KEY VALUE pairs of runs.MOVABLE. Raises UserError, with nothing written, where a run cannot be read or a
    part of it cannot be used; what a run lacks is left out, with a line in `notes`.
    """
    check_opts(opts)
    check_out(out)
    # the summaries that --seeds leaves lie among the runs, where PROJECT/* names them as well
    folders = [f for f in folders if not (f.suffix == ".json" and f.is_file())] or folders
    unique = list(dict.fromkeys(Path(os.path.realpath(f)) if os.path.exists(f) else f for f in folders))
    groups, notes = group_runs([read_run(folder, opts) for folder in unique])
    table = results.results_table(groups, results.read_published(published))
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        (stage / "figures").mkdir()
        analysis = Analysis(groups, stage / "figures", Networks(say), notes=notes)
        analysis.add_table(table)
        analysis.add(comparison.curves_chart(groups))
        look(analysis)
        if latex:
            (stage / "results.tex").write_text(results.latex(table), encoding="utf-8")
        if markdown:
            (stage / "results.md").write_text(results.markdown(table), encoding="utf-8")
        text = page(groups, analysis.tables, analysis.charts, notes, time.strftime("%Y-%m-%d"))
        (stage / "report.html").write_text(text, encoding="utf-8")
        deliver(stage, out)
    return analysis


def check_out(out: Path) -> None:
    """Raises UserError where `out` is no folder, or holds something other than an earlier report."""
    if os.path.lexists(out) and not os.path.isdir(out):
        raise UserError(f"-o {out}: is a file; name a folder")
    if os.path.isdir(out) and any(out.iterdir()):
        report = out / "report.html"
        if not report.is_file() or GENERATOR not in report.read_text(encoding="utf-8", errors="replace")[:2000]:
            raise UserError(f"-o {out}: holds files that are no report; name a new folder")


def deliver(stage: Path, out: Path) -> None:
    """Move what is finished to `out`, where the figures of an earlier report go first."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(out / "figures", ignore_errors=True)
        for path in stage.iterdir():  # one by one: the temporary folder itself is closed to other users
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, out / path.name)
    except OSError as error:
        raise UserError(f"-o {out}: cannot be written ({error.strerror}); name a folder of yours") from None


def look(analysis: Analysis) -> None:
    """Everything that needs a record, checkpoints or data."""
    seen: dict[int, comparison.Seen] = {}
    for number, group in enumerate(analysis.groups):
        try:
            seen[number] = comparison.look_at(group, analysis.networks)
        except Missing as error:
            analysis.note(group, f"what its networks say: {error}")
    for number, one in seen.items():
        for note in one.notes:
            analysis.note(analysis.groups[number], note)
    add_temperatures(analysis, seen)
    add_comparison(analysis, seen)


def add_temperatures(analysis: Analysis, seen: dict[int, comparison.Seen]) -> None:
    over, recorded = {}, {}
    for number, group in enumerate(analysis.groups):
        if group.rule == "-":
            continue
        try:
            over[number] = (group, temperatures.group_over_epochs(group))
        except Missing as error:
            analysis.note(group, f"temperature: {error}")
            continue
        run = next((run for run in group.runs if (run.folder / temperatures.RECORD).is_file()), group.first)
        try:
            samples, notes = temperatures.samples_of(run, analysis.networks)
            recorded[number] = (group, samples)
        except Missing as error:
            analysis.note(group, f"temperature by sample: {error}")
            continue
        for note in notes:
            analysis.note(group, note)
    if over:
        rows = [
            temperatures.findings_row(group, figures, recorded.get(number, (None, None))[1])
            for number, (group, figures) in over.items()
        ]
        caption = (
            "Rank correlations (Spearman) are between the student's temperature and the sample's loss, margin and "
            "forgetting events: above 0, hot samples have more of it. Of one run for each group, its lowest seed."
        )
        analysis.add_table(
            Table(temperatures.SECTION, "What the record says", caption, temperatures.FINDINGS, rows, list(over))
        )
        analysis.add(temperatures.epochs_chart(over))
    varied = {number: both for number, both in recorded.items() if not both[1].constant}
    for number, (group, _) in recorded.items():
        if number not in varied:
            analysis.note(group, "temperature by sample: its rule gives every sample the same temperature")
    names = {number: one.names for number, one in seen.items()}
    accuracy = {number: one.class_accuracy for number, one in seen.items()}
    analysis.add(temperatures.difficulty_chart(varied))
    analysis.add(temperatures.persistence_chart(varied))
    analysis.add(temperatures.class_chart(varied, accuracy, names))
    for number, (_, samples) in varied.items():
        add_samples(analysis, number, samples)


def add_samples(analysis: Analysis, number: int, samples: temperatures.Samples) -> None:
    """samples-*.csv and, where the images are there, the picture of the hottest and the coldest."""
    group, slug = analysis.groups[number], analysis.slug(number)
    names = None
    if samples.labels is not None:
        data = analysis.networks.data(samples.run)
        names = class_names(samples.run.cfg.DATASET.TYPE, data.num_classes)
    head, rows = temperatures.sample_rows(samples, names)
    write_table(analysis.folder / f"samples-{slug}.csv", head, rows)
    if names is None:
        return
    blocks, listed = [], []
    for heading, chosen in temperatures.extremes(samples):
        texts = [f"{names[samples.labels[i]]}\n{samples.student[i]:.2f} / {samples.teacher[i]:.2f}" for i in chosen]
        blocks.append((heading, data.train_images[chosen.copy()].numpy(), texts))
        listed += [[heading, int(i), names[samples.labels[i]], samples.student[i], samples.teacher[i]] for i in chosen]
    name, title = f"extremes-{slug}", f"Hottest and coldest samples: {group.label}"
    draw_images(analysis.folder, name, title, blocks)
    write_table(analysis.folder / f"{name}.csv", ["block", "index", "class", "t_student", "t_teacher"], listed)
    caption = f"Training images with class and temperatures, student / teacher. {group.figures}."
    analysis.charts.append(Chart(name, temperatures.SECTION, title, caption, [], group=number, pictures=blocks))


def add_comparison(analysis: Analysis, seen: dict[int, comparison.Seen]) -> None:
    if not seen:
        return
    rows = [comparison.compared_row(one) for one in seen.values()]
    caption = (
        "On the test set, by the last checkpoint of each group's lowest seed; last and best accuracy are those of the "
        "group. Agreement: student and teacher name the same class."
    )
    analysis.add_table(
        Table(comparison.SECTION, "Student against teacher", caption, comparison.COMPARED, rows, list(seen))
    )
    analysis.add(comparison.calibration_chart(seen))
    analysis.add(comparison.agreement_chart(seen))
    superclasses = comparison.superclass_chart(seen)
    if superclasses.empty:
        analysis.notes.append("accuracy by superclass: only cifar100 has superclasses")
    else:
        analysis.add(superclasses)
    for number, one in seen.items():
        if one.teacher is not None:
            analysis.add(comparison.correlation_chart(one, number, analysis.slug(number)))
    for number, one in seen.items():
        analysis.add(comparison.tsne_chart(one, number, analysis.slug(number)))
