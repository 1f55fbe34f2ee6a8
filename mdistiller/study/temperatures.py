"""What a recorded temperature says: over the epochs, against difficulty, by class, and which samples stay hot.

A sample's temperature, where one number stands for it, is its mean over the last quarter of the recorded epochs: each
epoch shows the sample under another crop and flip, so that one epoch alone would be noise.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pandas as pd
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


@dataclass
class Summaries:
    """A group's temperatures over E epochs: {"t_student q50", ..., "fell_back", "correlation_student", ...: (E,)}."""

    number: int
    group: Group
    epochs: list[int]
    figures: dict[str, np.ndarray]


def summaries_of(number: int, group: Group) -> Summaries:
    """Return means over the seeds that recorded the same epochs as the first that recorded any. Raises Missing where
    none did.
    """
    found = [rows for run in group.runs if (rows := [row for row in run.rows if row.get("temperature")])]
    if not found:
        raise Missing("no temperatures; train with LOG.TEMPERATURE summary or samples")
    epochs = [row["epoch"] for row in found[0]]
    figures: dict[str, list] = {}
    try:
        for rows in found:
            if [row["epoch"] for row in rows] == epochs:
                for name, line in _lines([row["temperature"] for row in rows]).items():
                    figures.setdefault(name, []).append(line)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{group.first.folder / 'metrics.jsonl'}: its temperature summaries are of another format"
        ) from None
    return Summaries(number, group, epochs, {name: np.mean(lines, 0) for name, lines in figures.items()})


def _lines(epochs: list[dict]) -> dict[str, list[float]]:
    lines = {f"{side} {q}": [float(epoch[side][q]) for epoch in epochs] for side in SIDES for q in LEVELS}
    lines["fell_back"] = [float(epoch["fell_back"]) for epoch in epochs]
    for side, name in SIDES.items():
        lines[f"correlation_{name}"] = [float(epoch[f"confidence_correlation_{side}"]) for epoch in epochs]
    return lines


@dataclass
class Samples:
    """What is known of the N training samples of a group's first recorded run; None where it is not."""

    number: int
    group: Group
    run: Run
    student: np.ndarray  # (N,) temperature, mean over the last quarter of the epochs
    teacher: np.ndarray
    hot_student: np.ndarray  # (N,) share of the epochs among the hottest tenth
    hot_teacher: np.ndarray
    stability: np.ndarray  # (E,) rank correlation of the student's temperatures with the last epoch's
    labels: np.ndarray | None = None  # (N,)
    right: np.ndarray | None = None  # (N,) bool, the last student on the image as it is
    loss: np.ndarray | None = None  # (N,)
    margin: np.ndarray | None = None
    teacher_loss: np.ndarray | None = None
    forgetting: st.Forgetting | None = None
    notes: list[str] = field(default_factory=list)  # what is not known, and why

    @property
    def epochs(self) -> int:
        return len(self.stability)

    @property
    def constant(self) -> bool:
        return bool(np.ptp(self.student) < 1e-3 and np.ptp(self.teacher) < 1e-3)


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


def samples_of(number: int, group: Group, networks: Networks) -> Samples:
    """Return the record of the group's first run that has one and, as far as checkpoints and data are there, how hard
    its samples are. Raises Missing where nothing is recorded.
    """
    run = next((run for run in group.runs if (run.folder / RECORD).is_file()), group.first)
    student, teacher = (values_of(run, side) for side in SIDES)
    late = max(len(student) // 4, 1)
    stability = np.array([st.spearman(row, student[-1]) for row in student])
    hot = st.hot_share(student), st.hot_share(teacher)
    samples = Samples(number, group, run, student[-late:].mean(0), teacher[-late:].mean(0), *hot, stability)
    part = "difficulty"
    try:
        labels = networks.data(run).train_labels.numpy()
        if len(labels) != len(samples.student):
            raise UserError(
                f"{run.folder / RECORD}: holds {len(samples.student):,} samples, but {run.cfg.DATASET.ROOT} has "
                f"{len(labels):,}; point to the data it was recorded on with --opts DATASET.ROOT PATH"
            )
        samples.labels = labels
        logits = networks.student(run, "train").logits
        samples.right = logits.argmax(1) == labels
        samples.loss, samples.margin = st.cross_entropy(logits, labels), st.margin(logits, labels)
        part = "forgetting"
        samples.forgetting = st.forgetting_events(networks.history(run))
    except Missing as error:
        samples.notes.append(f"temperature against {part}: {error}")
    try:
        if samples.loss is not None:
            samples.teacher_loss = st.cross_entropy(networks.teacher(run, "train").logits, labels)
    except Missing as error:
        samples.notes.append(f"temperature against the teacher's loss: {error}")
    return samples


def epochs_chart(found: Sequence[Summaries]) -> Chart:
    panels = []
    for side, name in SIDES.items():
        panel = Panel(f"T of the {name}", "epoch", "temperature")
        for s in found:
            bands = {pair: tuple(s.figures[f"{side} {q}"] for q in pair) for pair in BANDS}
            panel.series.append(Series(s.group.label, s.number, s.epochs, s.figures[f"{side} q50"], bands=bands))
        panels.append(panel)
    back, confidence = (
        [Series(s.group.label, s.number, s.epochs, scale * s.figures[key]) for s in found]
        for key, scale in (("fell_back", 100), ("correlation_student", 1))
    )
    most = max((float(max(s.y)) for s in back), default=0)  # a share is seen from 0, also where it is 0 throughout
    panels.append(Panel("samples that fell back to tau", "epoch", "share (%)", back, y_range=(0, 1.05 * most or 1)))
    panels.append(Panel("T of the student and the teacher's confidence", "epoch", "Pearson correlation", confidence))
    caption = (
        "Median over the training samples; bands hold 50% and 90% of them. Means over seeds. A sample falls back where "
        "the rule is undefined for its logits."
    )
    return Chart("temperature-epochs", SECTION, "Temperature over the epochs", caption, panels, columns=2)


def difficulty_chart(found: Sequence[Samples]) -> Chart:
    measures = (
        ("loss", "student's loss", 1),
        ("margin", "student's margin", -1),
        ("teacher_loss", "teacher's loss", 1),
    )
    panels = []
    for (name, title, sign), side in product(measures, SIDES.values()):
        panel = Panel(f"T of the {side} against the {title}", "samples, easiest to hardest (%)", "temperature")
        for s in found:
            if getattr(s, name) is not None:
                bins = st.binned(sign * getattr(s, name), getattr(s, side))
                upto = np.cumsum(bins.count)
                rank = 100 * (upto - bins.count / 2) / upto[-1]
                text = [f"mean {title} {sign * x:.3g}" for x in bins.x]
                bands = {("q25", "q75"): (bins.low, bins.high)}
                panel.series.append(Series(s.group.label, s.number, rank, bins.mean, bands=bands, text=text))
        panels.append(panel)
    for side in SIDES.values():
        panel = Panel(f"T of the {side} against forgetting", "forgetting events between checkpoints", "temperature")
        panel.series = [forgetting_series(s, side) for s in found if s.forgetting is not None]
        panels.append(panel)
    caption = (
        "Mean temperature in tenths of the training set, sorted by difficulty; the band holds the middle half of the "
        "samples. Loss and margin are those of the last checkpoint on the images as they are. Forgetting is counted "
        "between the saved checkpoints, over samples that were right at least once."
    )
    panels = [panel for panel in panels if panel.series]
    return Chart("temperature-difficulty", SECTION, "Are hot samples hard ones?", caption, panels, columns=2)


def forgetting_series(s: Samples, side: str) -> Series:
    """Return mean temperature and its middle half by number of events, over the samples that were learnt."""
    learnt = s.forgetting.learnt
    events, temperature = s.forgetting.events[learnt], getattr(s, side)[learnt]
    counts = np.unique(events)
    parts = [temperature[events == n] for n in counts]
    bands = {("q25", "q75"): tuple([np.quantile(part, q) for part in parts] for q in (0.25, 0.75))}
    text = [f"{len(part):,} samples" for part in parts]
    return Series(s.group.label, s.number, counts, [part.mean() for part in parts], bands=bands, text=text)


def persistence_chart(found: Sequence[Samples]) -> Chart:
    stay = Panel("how long samples stay hot", "epochs among the hottest tenth (%)", "samples, at least so long (%)")
    stable = Panel("how early the order is settled", "recorded epoch", "rank correlation with the last")
    for epochs in sorted({s.epochs for s in found}):
        counts = np.arange(1, epochs + 1)
        chance = 100 * binom.sf(counts - 1, epochs, 0.1)
        stay.series.append(Series(f"by chance, {epochs} epochs", None, 100 * counts / epochs, chance, dashed=True))
    for s in found:
        counts = np.arange(1, s.epochs + 1)
        hot = np.round(s.hot_student * s.epochs)
        share = [100 * float((hot >= count).mean()) for count in counts]
        stay.series.append(Series(s.group.label, s.number, 100 * counts / s.epochs, share))
        stable.series.append(Series(s.group.label, s.number, counts[:-1], s.stability[:-1]))
    caption = (
        "How many samples are among the hottest tenth (temperature of the student) in at least so many of the epochs; "
        "dashed: if chance chose them anew each epoch. Then: whether an epoch ranks the samples as the last one does. "
        "The samples themselves are in samples-*.csv. One run for each group, its lowest seed."
    )
    return Chart("temperature-persistence", SECTION, "Which samples stay hot", caption, [stay, stable])


def class_chart(found: Sequence[Samples], compared: dict[int, Comparison]) -> Chart:
    """Return the chart of the groups whose students were `compared`, {number: comparison}, on the test set."""
    panels = []
    for side in SIDES.values():
        panel = Panel(f"T of the {side}", "mean temperature of the class", "test accuracy of the class (%)")
        for s in found:
            if s.number in compared and s.labels is not None:
                names, accuracy = compared[s.number].names, compared[s.number].class_accuracy
                means = st.class_means(getattr(s, side), s.labels, len(names))
                panel.series.append(Series(s.group.label, s.number, means, accuracy, "points", text=names))
        panels.append(panel)
    caption = (
        "One point for each class: its training samples' mean temperature against the student's last test accuracy."
    )
    return Chart("temperature-classes", SECTION, "Temperature by class", caption, panels, columns=2)


FINDINGS = (
    "run", "rule", "median T student, first epoch", "median T student, last epoch", "median T teacher, last epoch",
    "fell back, first (%)", "fell back, last (%)", "rank corr. with loss", "rank corr. with margin",
    "rank corr. with forgetting", "hot in most epochs (%)", "by chance (%)",
)  # fmt: skip


def findings_table(summaries: Sequence[Summaries], recorded: dict[int, Samples]) -> Table:
    """`recorded`: the samples of those groups that have some, by the group's number."""
    rows = []
    for s in summaries:
        student, teacher, fell = (s.figures[key] for key in ("t_student q50", "t_teacher q50", "fell_back"))
        ends = [student[0], student[-1], teacher[-1], 100 * fell[0], 100 * fell[-1]]
        samples = recorded.get(s.number)
        rows.append([s.group.label, s.group.rule, *map(float, ends), *(ranks(samples) if samples else [None] * 5)])
    caption = (
        "Rank correlations (Spearman) are between the student's temperature and the sample's loss, margin and "
        "forgetting events: above 0, hot samples have more of it. Of one run for each group, its lowest seed."
    )
    return Table(SECTION, "What the record says", caption, FINDINGS, rows, [s.number for s in summaries])


def ranks(s: Samples) -> list[float | None]:
    """Return the last five of FINDINGS; None where they are not known or no temperature varies."""
    if s.constant:
        return [None] * 5
    found = [None if measure is None else st.spearman(s.student, measure) for measure in (s.loss, s.margin)]
    known = s.forgetting
    found.append(None if known is None else st.spearman(s.student[known.learnt], known.events[known.learnt]))
    chance = binom.sf(np.floor(HALF * s.epochs), s.epochs, 0.1)
    return [*found, 100 * float((s.hot_student > HALF).mean()), 100 * float(chance)]


def sample_frame(s: Samples, names: Sequence[str] = ()) -> pd.DataFrame:
    """Return what samples-*.csv holds, the sample that stays hot longest first. `names`: of the classes."""
    frame = pd.DataFrame({"index": np.arange(len(s.student))})
    if s.labels is not None:
        frame["label"], frame["class"] = s.labels, np.array(names)[s.labels]
    frame["t_student"], frame["t_teacher"] = s.student, s.teacher
    for name in ("hot_student", "hot_teacher", "right", "loss", "margin", "teacher_loss"):
        if getattr(s, name) is not None:
            frame[name] = getattr(s, name)
    if s.forgetting is not None:
        frame["forgetting_events"], frame["learnt"] = s.forgetting
    return frame.sort_values(["hot_student", "t_student"], ascending=False, kind="stable")


def extremes_chart(s: Samples, name: str, images: np.ndarray, names: Sequence[str], count: int = 16) -> Chart:
    """Return the samples with the highest and the lowest temperature, of the student where it varies, else of the
    teacher. `images`: uint8 (N, H, W, 3), the training set's.
    """
    side = "student" if np.ptp(s.student) >= 1e-3 else "teacher"
    order = np.argsort(-getattr(s, side), kind="stable")
    count = min(count, len(order) // 2)
    blocks = []
    for which, chosen in (("highest", order[:count]), ("lowest", order[::-1][:count])):
        texts = [f"{names[s.labels[i]]}\n{s.student[i]:.2f} / {s.teacher[i]:.2f}\nno. {i}" for i in chosen]
        blocks.append((f"{which} temperature of the {side}", images[chosen], texts))
    caption = f"Training images with class, temperatures, student / teacher, and number. {s.group.figures}."
    return Chart(
        name, SECTION, f"Hottest and coldest samples: {s.group.label}", caption, [], group=s.number, pictures=blocks
    )
