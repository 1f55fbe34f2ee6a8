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

from mdistiller import config
from mdistiller.errors import UserError
from mdistiller.runs.temperature import QUANTILES, SAVED, read_record
from mdistiller.study import statistics as st
from mdistiller.study.charts import Chart, Panel, Series
from mdistiller.study.comparison import Comparison
from mdistiller.study.networks import Missing, Networks
from mdistiller.study.runs import Group, Run
from mdistiller.study.superclasses import class_names
from mdistiller.study.tables import Table
from mdistiller.terminal import counted

RECORD = "temperatures.bin"
SIDES = {"t_student": "student", "t_teacher": "teacher"}
LEVELS = tuple(f"q{round(100 * q):02d}" for q in QUANTILES)
CORRELATION = "confidence_correlation_t_student"
SUMMARISED = [*(f"{side}.{level}" for side, level in product(SIDES, LEVELS)), "fell_back", CORRELATION]
SECTION = "Temperature"
QUARTILES = ("q25", "q75")
HALF = 0.5


def summaries_of(group: Group) -> pd.DataFrame:
    """Return a row for each recorded epoch, its index, with the columns SUMMARISED: means over the seeds that recorded
    the same epochs as the first that recorded any. Raises Missing where none did.
    """
    found = [rows for run in group.runs if (rows := {r["epoch"]: t for r in run.rows if (t := r.get("temperature"))})]
    if not found:
        raise Missing("no temperatures; train with LOG.TEMPERATURE summary or samples")
    same = [rows for rows in found if [*rows] == [*found[0]]]
    try:
        frames = [pd.DataFrame(map(config.leaves, rows.values()), [*rows])[SUMMARISED].astype(float) for rows in same]
    except (KeyError, TypeError, ValueError, AttributeError):
        file = group.first.folder / "metrics.jsonl"
        raise UserError(f"{file}: its temperature summaries are of another format") from None
    return sum(frames) / len(frames)


@dataclass
class Samples:
    """What is known of the training samples of a group's first recorded run.

    `frame` has a row for each sample, in the order of the training set: its "index"; its temperatures "t_student" and
    "t_teacher"; "hot_student" and "hot_teacher", the shares of the epochs in which it is among the hottest tenth; and
    as far as data and checkpoints are there its "label" and "class", whether the last student is "right" on the image
    as it is, its "loss", "margin" and "teacher_loss", its "forgetting_events", and whether it was ever "learnt".
    """

    group: Group
    run: Run
    frame: pd.DataFrame
    stability: np.ndarray  # (E,) rank correlation of the student's temperatures with the last epoch's
    notes: list[str] = field(default_factory=list)  # what is not known, and why

    @property
    def epochs(self) -> int:
        return len(self.stability)

    @property
    def constant(self) -> bool:
        return bool(all(np.ptp(self.frame[side]) < 1e-3 for side in SIDES))

    @property
    def hottest_first(self) -> pd.DataFrame:
        return self.frame.sort_values(["hot_student", "t_student"], ascending=False, kind="stable")

    @property
    def learnt(self) -> pd.DataFrame:
        """The samples whose forgetting can be counted; all of them, without a count, where that is not known."""
        return self.frame[self.frame["learnt"]] if "learnt" in self.frame else self.frame


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


def samples_of(group: Group, networks: Networks) -> Samples:
    """Return the record of the group's first run that has one and, as far as checkpoints and data are there, how hard
    its samples are. Raises Missing where nothing is recorded.
    """
    run = next((run for run in group.runs if (run.folder / RECORD).is_file()), group.first)
    values = {side: values_of(run, side) for side in SIDES}
    student = values["t_student"]
    columns = {side: v[-max(len(v) // 4, 1) :].mean(0) for side, v in values.items()}
    columns |= {f"hot_{SIDES[side]}": st.hot_share(v) for side, v in values.items()}
    frame = pd.DataFrame({"index": np.arange(student.shape[1])} | columns)
    samples = Samples(group, run, frame, np.array([st.spearman(row, student[-1]) for row in student]))
    try:
        add_difficulty(samples, networks)
    except Missing as error:
        samples.notes.append(f"temperature against difficulty: {error}")
    return samples


def add_difficulty(samples: Samples, networks: Networks) -> None:
    """Add to the frame how hard the samples are, as the last student, the teacher and the saved checkpoints say; what
    only the latter two lack is noted.
    """
    run, frame, data = samples.run, samples.frame, networks.data(samples.run)
    labels = data.train_labels.numpy()
    if len(labels) != len(frame):
        raise UserError(
            f"{run.folder / RECORD}: holds {len(frame):,} samples, but {run.cfg.DATASET.ROOT} has "
            f"{len(labels):,}; point to the data it was recorded on with --opts DATASET.ROOT PATH"
        )
    frame.insert(1, "label", labels)
    frame.insert(2, "class", np.array(class_names(run.cfg.DATASET.TYPE, data.num_classes, data.class_names))[labels])
    logits = networks.student(run, "train").logits
    frame["right"] = logits.argmax(1) == labels
    frame["loss"], frame["margin"] = st.cross_entropy(logits, labels), st.margin(logits, labels)
    try:
        frame["teacher_loss"] = st.cross_entropy(networks.teacher(run, "train").logits, labels)
    except Missing as error:
        samples.notes.append(f"temperature against the teacher's loss: {error}")
    try:
        right = networks.history(run)
        frame["forgetting_events"], frame["learnt"] = st.forgetting_events(right), right.any(0)
    except Missing as error:
        samples.notes.append(f"temperature against forgetting: {error}")


def epochs_chart(found: Sequence[tuple[Group, pd.DataFrame]]) -> Chart:
    panels = [Panel(f"T of the {name}", "epoch", "temperature") for name in SIDES.values()]
    panels.append(Panel("samples that fell back to tau", "epoch", "share (%)"))
    panels.append(Panel("T of the student and the teacher's confidence", "epoch", "Pearson correlation"))
    for group, figures in found:
        epochs, figures = [*figures.index], figures.reset_index(drop=True)
        for panel, side in zip(panels, SIDES, strict=False):
            bands = {pair: tuple(figures[f"{side}.{q}"] for q in pair) for pair in (("q05", "q95"), QUARTILES)}
            panel.add(group, epochs, figures[f"{side}.q50"], bands=bands)
        panels[2].add(group, epochs, 100 * figures["fell_back"])
        panels[3].add(group, epochs, figures[CORRELATION])
    most = max((s.y.max() for s in panels[2].series), default=0)
    panels[2].y_range = (0, 1.05 * most or 1)  # a share is seen from 0, also where it is 0 throughout
    caption = (
        "Median over the training samples; bands hold 50% and 90% of them. Means over seeds. A sample falls back where "
        "the rule is undefined for its logits."
    )
    return Chart("temperature-epochs", SECTION, "Temperature over the epochs", caption, panels, columns=2)


def difficulty_chart(found: Sequence[Samples]) -> Chart:
    measures = {
        "loss": ("student's loss", 1),
        "margin": ("student's margin", -1),
        "teacher_loss": ("teacher's loss", 1),
    }
    panels = []
    for (measure, (title, sign)), (side, name) in product(measures.items(), SIDES.items()):
        panel = Panel(f"T of the {name} against the {title}", "samples, easiest to hardest (%)", "temperature")
        for s in found:
            if measure in s.frame:
                bins = st.binned(sign * s.frame[measure], s.frame[side])
                rank = 100 * (bins["count"].cumsum() - bins["count"] / 2) / len(s.frame)
                text = [f"mean {title} {sign * x:.3g}" for x in bins["x"]]
                panel.add(s.group, rank, bins["y"], bands={QUARTILES: (bins["low"], bins["high"])}, text=text)
        panels.append(panel)
    for side, name in SIDES.items():
        panel = Panel(f"T of the {name} against forgetting", "forgetting events between checkpoints", "temperature")
        for s in found:
            if "learnt" in s.frame:
                bins = st.binned(s.learnt["forgetting_events"], s.learnt[side], bins=None)
                bands, text = {QUARTILES: (bins["low"], bins["high"])}, [counted(n, "sample") for n in bins["count"]]
                panel.add(s.group, bins["x"].astype(int), bins["y"], bands=bands, text=text)
        panels.append(panel)
    caption = (
        "Mean temperature in tenths of the training set, sorted by difficulty; the band holds the middle half of the "
        "samples. Loss and margin are those of the last checkpoint on the images as they are. Forgetting is counted "
        "between the saved checkpoints, over samples that were right at least once."
    )
    panels = [panel for panel in panels if panel.series]
    return Chart("temperature-difficulty", SECTION, "Are hot samples hard ones?", caption, panels, columns=2)


def persistence_chart(found: Sequence[Samples]) -> Chart:
    stay = Panel("how long samples stay hot", "epochs among the hottest tenth (%)", "samples, at least so long (%)")
    stable = Panel("how early the order is settled", "recorded epoch", "rank correlation with the last")
    for epochs in sorted({s.epochs for s in found}):
        counts = np.arange(1, epochs + 1)
        chance = 100 * binom.sf(counts - 1, epochs, 0.1)
        name = f"by chance, {counted(epochs, 'epoch')}"
        stay.series.append(Series(name, None, 100 * counts / epochs, chance, dashed=True))
    for s in found:
        counts = np.arange(1, s.epochs + 1)
        hot = np.round(s.frame["hot_student"] * s.epochs)
        stay.add(s.group, 100 * counts / s.epochs, [100 * (hot >= count).mean() for count in counts])
        stable.add(s.group, counts[:-1], s.stability[:-1])
    caption = (
        "How many samples are among the hottest tenth (temperature of the student) in at least so many of the epochs; "
        "dashed: if chance chose them anew each epoch. Then: whether an epoch ranks the samples as the last one does. "
        "The samples themselves are in samples-*.csv. One run for each group, its lowest seed."
    )
    return Chart("temperature-persistence", SECTION, "Which samples stay hot", caption, [stay, stable])


def class_chart(found: Sequence[Samples], compared: Sequence[Comparison]) -> Chart:
    """Return the chart of the groups whose students were `compared` on the test set."""
    axes = "mean temperature of the class", "test accuracy of the class (%)"
    panels = [Panel(f"T of the {name}", *axes) for name in SIDES.values()]
    for s, c in product(found, compared):
        if s.group is c.group and "label" in s.frame:
            for panel, side in zip(panels, SIDES, strict=True):
                means = st.class_means(s.frame[side], s.frame["label"], len(c.names))
                panel.add(s.group, means, c.class_accuracy, "points", text=c.names)
    caption = (
        "One point for each class: its training samples' mean temperature against the student's last test accuracy."
    )
    return Chart("temperature-classes", SECTION, "Temperature by class", caption, panels, columns=2)


FINDINGS = (
    "run", "rule", "median T student, first epoch", "median T student, last epoch", "median T teacher, last epoch",
    "fell back, first (%)", "fell back, last (%)", "rank corr. with loss", "rank corr. with margin",
    "rank corr. with forgetting", "hot in most epochs (%)", "by chance (%)",
)  # fmt: skip


def findings_table(summaries: Sequence[tuple[Group, pd.DataFrame]], recorded: Sequence[Samples]) -> Table:
    """`recorded`: the samples of those groups that have some."""
    samples = {s.group.number: ranks(s) for s in recorded}
    rows = []
    for group, figures in summaries:
        first, last = figures.iloc[0], figures.iloc[-1]
        ends = [first["t_student.q50"], last["t_student.q50"], last["t_teacher.q50"]]
        ends += [100 * first["fell_back"], 100 * last["fell_back"]]
        rows.append([group.label, group.rule, *map(float, ends), *samples.get(group.number, [None] * 5)])
    caption = (
        "Rank correlations (Spearman) are between the student's temperature and the sample's loss, margin and "
        "forgetting events: above 0, hot samples have more of it. Of one run for each group, its lowest seed."
    )
    return Table(SECTION, "What the record says", caption, FINDINGS, rows, [group.number for group, _ in summaries])


def ranks(s: Samples) -> list[float | None]:
    """Return the last five of FINDINGS; None where they are not known or no temperature varies."""
    if s.constant:
        return [None] * 5
    measures = ((s.frame, "loss"), (s.frame, "margin"), (s.learnt, "forgetting_events"))
    found = [st.spearman(f["t_student"], f[measure]) if measure in f else None for f, measure in measures]
    chance = binom.sf(np.floor(HALF * s.epochs), s.epochs, 0.1)
    return [*found, 100 * float((s.frame["hot_student"] > HALF).mean()), 100 * float(chance)]


def extremes_chart(s: Samples, name: str, images: np.ndarray, count: int = 16) -> Chart:
    """Return the samples with the highest and the lowest temperature, of the student where it varies, else of the
    teacher. `images`: uint8 (N, H, W, 3), the training set's.
    """
    side = "t_student" if np.ptp(s.frame["t_student"]) >= 1e-3 else "t_teacher"
    hottest = s.frame.sort_values(side, ascending=False, kind="stable")
    count = min(count, len(hottest) // 2)
    blocks = []
    for which, chosen in (("highest", hottest[:count]), ("lowest", hottest[::-1][:count])):
        texts = [f"{r['class']}\n{r.t_student:.2f} / {r.t_teacher:.2f}\nno. {i}" for i, r in chosen.iterrows()]
        blocks.append((f"{which} temperature of the {SIDES[side]}", images[chosen.index], texts))
    caption = f"Training images with class, temperatures, student / teacher, and number. {s.group.figures}."
    title = f"Hottest and coldest samples: {s.group.label}"
    return Chart(name, SECTION, title, caption, [], group=s.group, pictures=blocks)
