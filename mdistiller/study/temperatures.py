"""What a recorded temperature says: over the epochs, against difficulty, by class, and which samples stay hot.

A sample's temperature, where one number stands for it, is its mean over the last quarter of the recorded epochs: each
epoch shows the sample under another crop and flip, so that one epoch alone would be noise.
"""

import warnings
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.stats import binom

from mdistiller.errors import UserError
from mdistiller.runs.temperature import QUANTILES, SAVED, read_record
from mdistiller.study import statistics as st
from mdistiller.study.charts import Chart, Panel, Series
from mdistiller.study.comparison import Comparison
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.runs import Group, Run
from mdistiller.study.tables import Table

RECORD = "temperatures.bin"
SIDES = {"t_student": "student", "t_teacher": "teacher"}
LEVELS = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)
BANDS = (("q05", "q95"), ("q25", "q75"))
SECTION = "Temperature"
HALF = 0.5


def values_of(run: Run, name: str) -> np.ndarray:
    """Return (E, N), one of SAVED, of the epochs that are recorded. Raises Missing where no samples are on record."""
    if not (run.folder / RECORD).is_file():
        raise Missing("no temperatures of samples; train with LOG.TEMPERATURE samples")
    record = read_record(run.folder / RECORD)
    if not all(name in record.fields for name in SAVED):
        raise UserError(f"{run.folder / RECORD}: lacks one of the fields {', '.join(SAVED)}")
    values = record.values[: run.epochs, record.fields.index(name)].astype(np.float64)
    values = values[~np.isnan(values).all(1)]  # epochs that a resumed run has no record of
    if not len(values):
        raise Missing("its temperature record holds no finished epoch yet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a sample that was never seen has no mean
        own = np.nanmean(values, 0)  # stands for a sample in the epochs whose step was skipped
    return np.where(np.isnan(values), np.where(np.isnan(own), np.nanmean(values), own), values)


@dataclass
class OverEpochs:
    """`figures`: {"t_student q50", ..., "fell_back", "correlation_student", ...: (E,)}."""

    epochs: list[int]
    figures: dict[str, np.ndarray]


def over_epochs(run: Run) -> OverEpochs:
    """Read the summaries in metrics.jsonl, else the record of samples. Raises Missing without either."""
    rows = [row for row in run.rows if row.get("temperature")]
    if not rows:
        values = {side: values_of(run, side) for side in SIDES}
        figures = {
            f"{side} {level}": line
            for side, both in values.items()
            for level, line in zip(LEVELS, st.quantiles(both, QUANTILES), strict=True)
        }
        return OverEpochs(list(range(1, len(values["t_student"]) + 1)), figures)
    try:
        summaries = [row["temperature"] for row in rows]
        figures = {f"{side} {q}": np.array([float(s[side][q]) for s in summaries]) for side in SIDES for q in LEVELS}
        figures["fell_back"] = np.array([float(s["fell_back"]) for s in summaries])
        for side, name in SIDES.items():
            figures[f"correlation_{name}"] = np.array([float(s[f"confidence_correlation_{side}"]) for s in summaries])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{run.folder / 'metrics.jsonl'}: its temperature summaries are of another format") from None
    return OverEpochs([row["epoch"] for row in rows], figures)


def group_over_epochs(group: Group) -> OverEpochs:
    """Return means over the seeds that recorded the same epochs as the first that recorded any."""
    found = []
    for run in group.runs:
        try:
            found.append(over_epochs(run))
        except Missing as error:
            reason = error
    if not found:
        raise reason
    first = found[0]
    alike = [f.figures for f in found if f.epochs == first.epochs and f.figures.keys() == first.figures.keys()]
    return OverEpochs(first.epochs, {key: np.mean([figures[key] for figures in alike], 0) for key in first.figures})


@dataclass
class Samples:
    """What is known of the N training samples of one run; None where it is not."""

    run: Run
    student: np.ndarray  # (N,) temperature, mean over the last quarter of the epochs
    teacher: np.ndarray
    hot_student: np.ndarray  # (N,) share of the epochs among the hottest tenth
    hot_teacher: np.ndarray
    stability: np.ndarray  # (E,) rank correlation of the student's temperatures with the last epoch's
    epochs: int
    labels: np.ndarray | None = None  # (N,)
    right: np.ndarray | None = None  # (N,) bool, the last student on the image as it is
    loss: np.ndarray | None = None  # (N,)
    margin: np.ndarray | None = None
    teacher_loss: np.ndarray | None = None
    forgetting: st.Forgetting | None = None

    @property
    def constant(self) -> bool:
        return bool(np.ptp(self.student) < 1e-3 and np.ptp(self.teacher) < 1e-3)


def samples_of(group: Group, networks: Networks) -> tuple[Samples, list[str]]:
    """Return the record of the group's first run that has one and, as far as checkpoints and data are there, how hard
    its samples are; and a line for each part that is not there. Raises Missing where nothing is recorded.
    """
    run = next((run for run in group.runs if (run.folder / RECORD).is_file()), group.first)
    values = {side: values_of(run, side) for side in SIDES}
    epochs = len(values["t_student"])
    late = {side: v[-max(epochs // 4, 1) :].mean(0) for side, v in values.items()}
    hot = {side: st.hot_share(v) for side, v in values.items()}
    last = values["t_student"][-1]
    stability = np.array([st.spearman(row, last) for row in values["t_student"]])
    samples = Samples(run, late["t_student"], late["t_teacher"], *hot.values(), stability, epochs)
    notes = []
    try:
        labels = networks.data(run).train_labels.numpy()
        if len(labels) != len(last):
            raise UserError(
                f"{run.folder / RECORD}: holds {len(last):,} samples, but {run.cfg.DATASET.ROOT} has {len(labels):,}; "
                "point to the data it was recorded on with --opts DATASET.ROOT PATH"
            )
        samples.labels = labels
        logits = networks.student(run, "train").logits
        samples.right = logits.argmax(1) == labels
        samples.loss, samples.margin = st.cross_entropy(logits, labels), st.margin(logits, labels)
    except Missing as error:
        notes.append(f"temperature against difficulty: {error}")
        return samples, notes
    try:
        samples.teacher_loss = st.cross_entropy(networks.teacher(run, "train").logits, labels)
    except Missing as error:
        notes.append(f"temperature against the teacher's loss: {error}")
    try:
        samples.forgetting = st.forgetting_events(networks.history(run))
    except Missing as error:
        notes.append(f"temperature against forgetting: {error}")
    return samples, notes


def epochs_chart(found: dict[int, tuple[Group, OverEpochs]]) -> Chart:
    panels = []
    for side, name in SIDES.items():
        panel = Panel(f"T of the {name}", "epoch", "temperature")
        for number, (group, over) in found.items():
            bands = {pair: tuple(over.figures[f"{side} {q}"] for q in pair) for pair in BANDS}
            panel.series.append(Series(group.label, number, over.epochs, over.figures[f"{side} q50"], bands=bands))
        panels.append(panel)
    more = (
        ("fell_back", "samples that fell back to tau", "share (%)", 100),
        ("correlation_student", "T of the student and the teacher's confidence", "Pearson correlation", 1),
    )
    for key, title, label, scale in more:
        series = [
            Series(group.label, number, over.epochs, scale * over.figures[key])
            for number, (group, over) in found.items()
            if key in over.figures
        ]
        panel = Panel(title, "epoch", label, series)
        if key == "fell_back":  # a share is seen from 0, also where nothing but 0 is on it
            panel.y_range = (0, 1.05 * max((max(s.y) for s in series), default=0) or 1)
        panels += [panel] if series else []
    return Chart(
        "temperature-epochs",
        SECTION,
        "Temperature over the epochs",
        "Median over the training samples; bands hold 50% and 90% of them. Means over seeds. A sample falls back where "
        "the rule is undefined for its logits.",
        panels,
        columns=2,
    )


MEASURES = (
    ("loss", "student's loss", 1),
    ("margin", "student's margin", -1),
    ("teacher_loss", "teacher's loss", 1),
)


def difficulty_chart(found: dict[int, tuple[Group, Samples]]) -> Chart:
    panels = []
    for (name, title, sign), side in product(MEASURES, SIDES.values()):
        panel = Panel(f"T of the {side} against the {title}", "samples, easiest to hardest (%)", "temperature")
        for number, (group, samples) in found.items():
            measure = getattr(samples, name)
            if measure is not None:
                bins = st.binned(sign * measure, getattr(samples, side))
                upto = np.cumsum(bins.count)
                rank = 100 * (upto - bins.count / 2) / upto[-1]
                text = [f"mean {title} {sign * x:.3g}" for x in bins.x]
                bands = {("q25", "q75"): (bins.low, bins.high)}
                panel.series.append(Series(group.label, number, rank, bins.mean, bands=bands, text=text))
        panels.append(panel)
    for side in SIDES.values():
        panel = Panel(f"T of the {side} against forgetting", "forgetting events between checkpoints", "temperature")
        for number, (group, samples) in found.items():
            if samples.forgetting is not None:
                panel.series.append(forgetting_series(group, number, samples, side))
        panels.append(panel)
    return Chart(
        "temperature-difficulty",
        SECTION,
        "Are hot samples hard ones?",
        "Mean temperature in tenths of the training set, sorted by difficulty; the band holds the middle half of the "
        "samples. Loss and margin are those of the last checkpoint on the images as "
        "they are. Forgetting is counted between the saved checkpoints, over samples that were right at least once.",
        [panel for panel in panels if panel.series],
        columns=2,
    )


def forgetting_series(group: Group, number: int, samples: Samples, side: str) -> Series:
    """Return mean temperature and its middle half by number of events, over the samples that were learnt."""
    learnt = samples.forgetting.learnt
    events, temperature = samples.forgetting.events[learnt], getattr(samples, side)[learnt]
    counts = np.unique(events)
    parts = [temperature[events == n] for n in counts]
    low, high = np.array([np.quantile(p, (0.25, 0.75)) for p in parts]).T
    text = [f"{len(p):,} samples" for p in parts]
    return Series(
        group.label, number, counts, [p.mean() for p in parts], bands={("q25", "q75"): (low, high)}, text=text
    )


def persistence_chart(found: dict[int, tuple[Group, Samples]]) -> Chart:
    stay = Panel("how long samples stay hot", "epochs among the hottest tenth (%)", "samples, at least so long (%)")
    stable = Panel("how early the order is settled", "recorded epoch", "rank correlation with the last")
    lengths = {samples.epochs for _, samples in found.values()}
    for epochs in sorted(lengths):
        counts = np.arange(1, epochs + 1)
        chance = 100 * binom.sf(counts - 1, epochs, 0.1)
        stay.series.append(Series(f"by chance, {epochs} epochs", None, 100 * counts / epochs, chance, dashed=True))
    for number, (group, samples) in found.items():
        counts = np.arange(1, samples.epochs + 1)
        hot = np.round(samples.hot_student * samples.epochs)
        share = [100 * float((hot >= count).mean()) for count in counts]
        stay.series.append(Series(group.label, number, 100 * counts / samples.epochs, share))
        stable.series.append(Series(group.label, number, counts[:-1], samples.stability[:-1]))
    return Chart(
        "temperature-persistence",
        SECTION,
        "Which samples stay hot",
        "How many samples are among the hottest tenth (temperature of the student) in at least so many of the epochs; "
        "dashed: if chance chose them anew each epoch. Then: whether an epoch ranks the samples as the last one does. "
        "The samples themselves are in samples-*.csv. One run for each group, its lowest seed.",
        [stay, stable],
    )


def class_chart(found: dict[int, tuple[Group, Samples]], compared: dict[int, Comparison]) -> Chart:
    panels = []
    for side in SIDES.values():
        panel = Panel(f"T of the {side}", "mean temperature of the class", "test accuracy of the class (%)")
        for number, (group, samples) in found.items():
            if number in compared and samples.labels is not None:
                names, accuracy = compared[number].names, compared[number].class_accuracy
                means = st.class_means(getattr(samples, side), samples.labels, len(names))
                panel.series.append(Series(group.label, number, means, accuracy, "points", text=names))
        panels.append(panel)
    return Chart(
        "temperature-classes",
        SECTION,
        "Temperature by class",
        "One point for each class: its training samples' mean temperature against the student's last test accuracy.",
        panels,
        columns=2,
    )


FINDINGS = (
    "run", "rule", "median T student, first epoch", "median T student, last epoch", "median T teacher, last epoch",
    "fell back, first (%)", "fell back, last (%)", "rank corr. with loss", "rank corr. with margin",
    "rank corr. with forgetting", "hot in most epochs (%)", "by chance (%)",
)  # fmt: skip


def findings_table(over: dict[int, tuple[Group, OverEpochs]], recorded: dict[int, tuple[Group, Samples]]) -> Table:
    rows = [
        findings_row(group, figures, recorded[number][1] if number in recorded else None)
        for number, (group, figures) in over.items()
    ]
    caption = (
        "Rank correlations (Spearman) are between the student's temperature and the sample's loss, margin and "
        "forgetting events: above 0, hot samples have more of it. Of one run for each group, its lowest seed."
    )
    return Table(SECTION, "What the record says", caption, FINDINGS, rows, list(over))


def findings_row(group: Group, over: OverEpochs, samples: Samples | None) -> list:
    """Return a group's cells in the order of FINDINGS."""
    fell = over.figures.get("fell_back")
    row = [group.label, group.rule, *(float(over.figures["t_student q50"][i]) for i in (0, -1))]
    row += [float(over.figures["t_teacher q50"][-1])]
    row += [None, None] if fell is None else [100 * float(fell[0]), 100 * float(fell[-1])]
    if samples is None or samples.constant:
        return row + [None] * 5
    ranks = [None if m is None else st.spearman(samples.student, m) for m in (samples.loss, samples.margin)]
    known = samples.forgetting
    ranks.append(None if known is None else st.spearman(samples.student[known.learnt], known.events[known.learnt]))
    often = 100 * float((samples.hot_student > HALF).mean())
    return row + ranks + [often, 100 * float(binom.sf(np.floor(HALF * samples.epochs), samples.epochs, 0.1))]


def sample_rows(samples: Samples, names: list[str] | None) -> tuple[list[str], list[list]]:
    """Return head and rows of samples-*.csv, the sample that stays hot longest first."""
    columns: dict[str, np.ndarray] = {"index": np.arange(len(samples.student))}
    if names is not None:
        columns |= {"label": samples.labels, "class": np.array(names)[samples.labels]}
    columns |= {
        "t_student": samples.student, "t_teacher": samples.teacher,
        "hot_student": samples.hot_student, "hot_teacher": samples.hot_teacher,
    }  # fmt: skip
    for name in ("right", "loss", "margin", "teacher_loss"):
        if getattr(samples, name) is not None:
            columns[name] = getattr(samples, name)
    if samples.forgetting is not None:
        columns |= {"forgetting_events": samples.forgetting.events, "learnt": samples.forgetting.learnt}
    order = np.lexsort((-samples.student, -samples.hot_student))
    rows = zip(*(column[order].tolist() for column in columns.values()), strict=True)
    return list(columns), [list(row) for row in rows]


def extremes(samples: Samples, count: int = 16) -> list[tuple[str, np.ndarray]]:
    """Return (heading, indices) of the samples with the highest and the lowest temperature, of the student where it
    varies, else of the teacher.
    """
    side = "student" if np.ptp(samples.student) >= 1e-3 else "teacher"
    order = np.argsort(-getattr(samples, side), kind="stable")
    count = min(count, len(order) // 2)
    return [
        (f"highest temperature of the {side}", order[:count]),
        (f"lowest temperature of the {side}", order[::-1][:count]),
    ]
