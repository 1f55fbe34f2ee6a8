"""tools/analyze.py: from run folders to figures, tables and the report."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from mdistiller.errors import UserError
from mdistiller.runs.detections import LEAST
from mdistiller.study import comparison, tables, temperatures
from mdistiller.study.charts import Chart, write_numbers, write_table
from mdistiller.study.drawing import save
from mdistiller.study.groups import group_runs
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.page import GENERATOR, report_page
from mdistiller.study.published import read_published
from mdistiller.study.runs import Group, check_opts, lacking_plugins, read_runs
from mdistiller.study.tables import Table


@dataclass
class Analysis:
    """What is found, in the order of the page; charts and tables are written into `folder` as they come."""

    groups: list[Group]
    folder: Path
    networks: Networks
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, chart: Chart) -> None:
        """Draw the chart. A line says which part of it has nothing to draw."""
        self.notes += [f"{chart.title}: there is nothing to draw of: {title}" for title in chart.drop_empty()]
        if not chart.empty:
            save(chart, self.folder / "figures")
            write_numbers(chart, self.folder / "figures" / f"{chart.name}.csv")
            self.charts.append(chart)

    def add_table(self, table: Table) -> None:
        write_table(self.folder / f"{table.name.lower().replace(' ', '-')}.csv", tables.numbers(table))
        self.tables.append(table)

    def note(self, group: Group, *lines: str) -> None:
        """Say what is not shown of a group."""
        self.notes += [f"{group.label}: {line}" for line in lines]


def name_of(kind: str, group: Group) -> str:
    """Return the name of the file of that kind for one group."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", group.label.replace("→", " to ")).strip("-").lower()
    return f"{kind}-{group.number + 1:02d}-{words[:60]}"


def analyze(
    folders: Sequence[Path],
    out: Path,
    published: Path | None = None,
    opts: Sequence[str] = (),
    latex: bool = False,
    markdown: bool = False,
    say: Callable[[str], None] = lambda _text: None,
    plugins: Sequence[str] = (),
) -> Analysis:
    """Write figures, tables and report.html into the folder `out`; `say` hears of progress.

    `opts`: KEY VALUE pairs of runs.MOVABLE. `plugins`: files of plug-ins that the runs do not find by themselves. What
    a run lacks is left out, with a line in the result's `notes`. Raises UserError, with nothing written, where a run
    cannot be read or a part of it cannot be used.
    """
    check_opts(opts)
    check_out(out)
    unique = list(dict.fromkeys(Path(os.path.realpath(f)) if os.path.exists(f) else f for f in folders))
    runs = read_runs(unique, opts, plugins)
    groups, notes = group_runs(runs)
    notes += lacking_plugins(runs)
    results = tables.results_table(groups, read_published(published))
    with tempfile.TemporaryDirectory() as temporary:
        stage = Path(temporary)
        (stage / "figures").mkdir()
        analysis = Analysis(groups, stage, Networks(say), notes=notes)
        analysis.add_table(results)
        analysis.add(comparison.curves_chart(groups))
        add_detections(analysis)
        compared = compare_all(analysis)
        add_temperatures(analysis, compared)
        add_comparisons(analysis, compared)
        if latex:
            (stage / "results.tex").write_text(tables.latex(results), encoding="utf-8")
        if markdown:
            (stage / "results.md").write_text(tables.markdown(results), encoding="utf-8")
        text = report_page(groups, analysis.tables, analysis.charts, notes, time.strftime("%Y-%m-%d"))
        (stage / "report.html").write_text(text, encoding="utf-8")
        deliver(stage, out)
    return analysis


def check_out(out: Path) -> None:
    """Raise UserError where `out` is no folder, or holds something other than an earlier report."""
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


def compare_all(analysis: Analysis) -> list[comparison.Comparison]:
    """Return the comparison of each group that has what it needs."""
    compared = []
    for group in analysis.groups:
        try:
            compared.append(comparison.compare(group, analysis.networks))
            analysis.note(group, *compared[-1].notes)
        except Missing as error:
            analysis.note(group, f"what its networks say: {error}")
    return compared


def add_detections(analysis: Analysis) -> None:
    """Show the picture that the first run of each group of detectors has left."""
    for group in analysis.groups:
        file = group.first.folder / "detections.png"
        if group.first.task != "detection":
            continue
        if not file.is_file():
            analysis.note(group, "what its networks find: the run leaves detections.png where it ends")
            continue
        try:
            picture = np.asarray(Image.open(file).convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:  # what PIL says of damaged files
            raise UserError(f"{file}: is no picture that can be read ({error}); remove it") from None
        block = (group.first.name, picture[None], [f"detections with a score of {LEAST} or more"])
        title = f"What the networks find: {group.label}"
        caption = "The first test images after the last epoch; each class has its colour."
        name = name_of("detections", group)
        analysis.add(Chart(name, "Detections", title, caption, [], group=group, pictures=[block]))


def add_temperatures(analysis: Analysis, compared: Sequence[comparison.Comparison]) -> None:
    summaries, recorded = [], []
    for group in analysis.groups:
        lacking: list[Missing] = []
        if group.rule == "-":
            continue
        try:
            summaries.append((group, temperatures.summaries_of(group)))
        except Missing as error:
            lacking.append(error)
        try:  # whatever the summaries lack: a damaged record is refused, never passed over
            recorded.append(temperatures.samples_of(group, analysis.networks))
            analysis.note(group, *recorded[-1].notes)
            if recorded[-1].constant:
                analysis.note(group, "temperature by sample: its rule gives every sample the same temperature")
            elif recorded[-1].epochs < 2:
                analysis.note(group, "which samples stay hot: only one epoch is recorded; train for two or more")
        except Missing as error:
            lacking.append(error)
        analysis.note(group, *(f"temperature: {error}" for error in lacking[:1]))
    varied = [samples for samples in recorded if not samples.constant]
    if summaries:
        analysis.add_table(temperatures.findings_table(summaries, recorded))
        analysis.add(temperatures.epochs_chart(summaries))
    analysis.add(temperatures.difficulty_chart(varied))
    analysis.add(temperatures.persistence_chart([samples for samples in varied if samples.epochs > 1]))
    analysis.add(temperatures.class_chart(varied, compared))
    for samples in varied:
        if "label" in samples.frame:
            images = analysis.networks.data(samples.run).train_images.numpy()
            analysis.add(temperatures.extremes_chart(samples, name_of("extremes", samples.group), images))
        file = analysis.folder / "figures" / f"{name_of('samples', samples.group)}.csv"
        write_table(file, samples.hottest_first)


def add_comparisons(analysis: Analysis, compared: Sequence[comparison.Comparison]) -> None:
    if not compared:
        return
    analysis.add_table(comparison.comparison_table(compared))
    analysis.add(comparison.calibration_chart(compared))
    analysis.add(comparison.agreement_chart(compared))
    superclasses = comparison.superclass_chart(compared)
    analysis.add(superclasses)
    if superclasses.empty:
        analysis.notes.append("accuracy by superclass: only cifar100 has superclasses")
    for one in compared:
        if one.teacher is not None:
            analysis.add(comparison.correlation_chart(one, name_of("correlation", one.group)))
    for one in compared:
        chart = comparison.tsne_chart(one, name_of("tsne", one.group))
        analysis.add(chart)
        if chart.empty:
            pooled = one.student.features is not None
            needs = (
                f"needs {comparison.LEAST_POINTS} test images or more" if pooled else "its networks give no pooled_feat"
            )
            analysis.note(one.group, f"t-SNE: {needs}")
