"""Student against teacher, and runs against each other: charts of curves, calibration, agreement and features."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.manifold import TSNE

from mdistiller.study import statistics as st
from mdistiller.study.charts import COLOURS, Chart, Panel, Series
from mdistiller.study.networks import Missing, Networks, Predictions
from mdistiller.study.runs import Group
from mdistiller.study.superclasses import CIFAR100, class_names, coarse_labels
from mdistiller.study.tables import Table

CURVES, SECTION = "Training curves", "Student and teacher"
CURVE_PANELS = {
    "test_acc": ("test accuracy", "top-1 (%)"),
    "train_acc": ("training accuracy", "top-1 (%)"),
    "train_loss": ("training loss", "loss, all terms"),
}
CLASSES_SHOWN = 10  # t-SNE: more hues than these cannot be told apart
LEAST_POINTS, POINTS_SHOWN = 10, 1000
LEAST = 5  # samples in a bin of the reliability diagram: the accuracy of fewer is chance
BINS = 15


def curves_chart(groups: Sequence[Group]) -> Chart:
    panels = []
    detectors = all(group.first.task == "detection" for group in groups)
    for key, (title, axis) in CURVE_PANELS.items():
        if detectors and key == "test_acc":
            title, axis = "average precision in the test", "AP (%)"
        if detectors and key == "train_acc":  # they have none
            continue
        panel = Panel(title, "epoch", axis)
        for group in groups:
            epochs = min(len(run.rows) for run in group.runs)  # some may have stopped early
            # (seeds, E)
            values = np.array([[row.get(key, np.nan) for row in run.rows[:epochs]] for run in group.runs])
            mean, bands = values.mean(0), {}
            if len(values) > 1:
                std = values.std(0, ddof=1)
                bands = {("minus_std", "plus_std"): (mean - std, mean + std)}
            panel.add(group, range(1, len(mean) + 1), mean, bands=bands)
        panels.append(panel)
    caption = "Mean over seeds, as far as all of them go; the band is one standard deviation to each side."
    return Chart("curves", CURVES, "Accuracy and loss by epoch", caption, panels)


@dataclass
class Comparison:
    """One run's last student, and its teacher where there is one, on the N images of the test set."""

    group: Group
    labels: np.ndarray  # (N,)
    names: list[str]  # of the K classes
    student: Predictions
    teacher: Predictions | None = None
    notes: list[str] = field(default_factory=list)  # what is not known, and why

    @property
    def class_accuracy(self) -> np.ndarray:
        """The student's accuracy on each class in percent, (K,)."""
        return 100 * st.class_means(self.student.logits.argmax(1) == self.labels, self.labels, len(self.names))

    @property
    def agreement(self) -> dict[str, float]:
        """Shares in percent of the images by who names their label."""
        return st.agreement(self.student.logits, self.teacher.logits, self.labels)

    @property
    def correlation_difference(self) -> tuple[np.ndarray, np.ndarray]:
        """Student's minus teacher's correlations of logits, (K, K), in [-2, 2], and their absolutes off the diagonal:
        what the student has not learnt of how the teacher relates the classes (the picture that CRD,
        https://arxiv.org/abs/1910.10699, Fig. 3, introduced).
        """
        difference = st.class_correlation(self.student.logits) - st.class_correlation(self.teacher.logits)
        return difference, np.abs(difference[~np.eye(len(difference), dtype=bool)])


def compare(group: Group, networks: Networks) -> Comparison:
    """Return the comparison of the group's first run. Raises Missing where it lacks its student or its data."""
    run = group.first
    data = networks.data(run)
    names = class_names(run.cfg.DATASET.TYPE, data.num_classes, data.class_names)
    comparison = Comparison(group, data.test_labels.numpy(), names, networks.student(run, "test"))
    try:
        comparison.teacher = networks.teacher(run, "test") if run.taught else None
    except Missing as error:
        comparison.notes.append(f"comparison with the teacher: {error}")
    return comparison


def calibration_chart(found: Sequence[Comparison]) -> Chart:
    curve = Panel("reliability", "confidence", "accuracy", diagonal=True, y_range=(-0.02, 1.03))
    share = Panel("how often a confidence is given", "confidence", "samples (%)")
    shown = [(c.group.label, c.group.number, c, c.student) for c in found]
    teachers = {id(c.teacher): c for c in found if c.teacher is not None}  # one that several groups share is one line
    shown += [(f"teacher {c.group.first.teacher_name}", None, c, c.teacher) for c in teachers.values()]
    for name, number, comparison, predictions in shown:
        c, dashed = st.calibration(predictions.logits, comparison.labels, BINS), number is None
        name, filled = f"{name}: ECE {100 * c.ece:.1f}%", c.share * len(comparison.labels) >= LEAST
        text = [f"{part:.1%} of the samples" for part in c.share[filled]]
        how = {"dashed": dashed, "legend": "" if dashed else f"{name}: {comparison.group.figures}"}
        curve.series.append(Series(name, number, c.confidence[filled], c.accuracy[filled], text=text, **how))
        share.series.append(Series(name, number, (np.arange(BINS) + 0.5) / BINS, 100 * c.share, **how))
    caption = (
        f"Test set, {BINS} bins of the top-1 probability at temperature 1; on the dotted line confidence is right. "
        "ECE: expected calibration error (Guo et al., 1706.04599). Dashed: teachers. Bins of fewer than "
        f"{LEAST} samples are not drawn, but count in the ECE."
    )
    return Chart("calibration", SECTION, "Calibration", caption, [curve, share])


def agreement_chart(found: Sequence[Comparison]) -> Chart:
    panel = Panel("test set", "", "samples (%)")
    for c in found:
        if c.teacher is not None:
            panel.add(c.group, [*c.agreement], [*c.agreement.values()], "bars")
    caption = (
        "Who names the label: both, the teacher alone, the student alone, neither (with one and the same mistake, or "
        "with two different ones)."
    )
    return Chart("agreement", SECTION, "Where student and teacher agree", caption, [panel])


def superclass_chart(found: Sequence[Comparison]) -> Chart:
    """Return the accuracy by CIFAR-100's superclasses, empty for other data sets."""
    fine = Panel("the class itself is right", "", "accuracy (%)")
    coarse = Panel("the superclass is right", "", "accuracy (%)")
    for c in found:
        home = coarse_labels(c.group.cfg.DATASET.TYPE)
        if home is None:
            continue
        guess, label = c.student.logits.argmax(1), c.labels
        for panel, right in ((fine, guess == label), (coarse, home[guess] == home[label])):
            panel.add(c.group, [*CIFAR100], 100 * st.class_means(right, home[label], len(CIFAR100)), "points")
    caption = "CIFAR-100's 20 superclasses of five classes each (test set, last checkpoint)."
    return Chart("superclasses", SECTION, "Accuracy by superclass", caption, [fine, coarse])


def correlation_chart(c: Comparison, name: str) -> Chart:
    (difference, off), home = c.correlation_difference, coarse_labels(c.group.cfg.DATASET.TYPE)
    order = np.arange(len(difference)) if home is None else np.argsort(home, kind="stable")
    sorting = "" if home is None else " The classes of a superclass stand together."
    caption = (
        f"Pearson correlation between the logits of two classes over the test set. Mean absolute difference "
        f"{off.mean():.3f}, largest {off.max():.3f}.{sorting} {c.group.figures}."
    )
    title = f"Logit correlations, student minus teacher: {c.group.label}"
    matrix, ticks = difference[np.ix_(order, order)], [c.names[i] for i in order]
    panel = Panel("student minus teacher", matrix=matrix, ticks=ticks)
    return Chart(name, SECTION, title, caption, [panel], group=c.group)


def tsne_chart(c: Comparison, name: str) -> Chart:
    """Return t-SNE (van der Maaten and Hinton, JMLR 2008) of the pooled features, from a PCA start, seed 0."""
    classes = np.unique(np.linspace(0, len(c.names) - 1, CLASSES_SHOWN).round().astype(int))
    chosen = np.flatnonzero(np.isin(c.labels, classes))
    chosen = chosen[:: max(-(-len(chosen) // POINTS_SHOWN), 1)]
    panels = []
    for title, predictions in (("student", c.student), ("teacher", c.teacher)):
        if predictions is None or predictions.features is None or len(chosen) < LEAST_POINTS:
            continue
        perplexity = min(30, (len(chosen) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(predictions.features[chosen])
        panel = Panel(title, bare=True)
        for label, colour in zip(classes, COLOURS, strict=False):
            (x, y), name_of = points[c.labels[chosen] == label].T, c.names[label]
            shown = Series(name_of, c.group.number, x, y, "points", text=[name_of] * len(x), colour=colour)
            panel.series.append(shown)
        panels.append(panel)
    caption = (
        f"{len(chosen):,} test images of {len(classes)} classes. Distances between clusters carry no meaning. "
        f"{c.group.figures}."
    )
    title = f"t-SNE of pooled features: {c.group.label}"
    return Chart(name, SECTION, title, caption, panels, group=c.group)


COMPARED = (
    "run", "last (%)", "best (%)", "ECE student (%)", "ECE teacher (%)", "agreement (%)", "both right (%)",
    "student alone right (%)", "mean |correlation difference|",
)  # fmt: skip


def comparison_table(found: Sequence[Comparison]) -> Table:
    rows = []
    for c in found:
        row = [c.group.label, c.group.last, c.group.best, 100 * st.calibration(c.student.logits, c.labels, BINS).ece]
        if c.teacher is not None:
            shares, (_, off) = c.agreement, c.correlation_difference
            row.append(100 * st.calibration(c.teacher.logits, c.labels, BINS).ece)
            row += [shares["both right"] + shares["same mistake"], shares["both right"], shares["student alone"]]
            row.append(float(off.mean()))
        rows.append(row + [None] * (len(COMPARED) - len(row)))
    caption = (
        "On the test set, by the last checkpoint of each group's lowest seed; last and best accuracy are those of the "
        "group. Agreement: student and teacher name the same class."
    )
    return Table(SECTION, "Student against teacher", caption, COMPARED, rows, [c.group.number for c in found])
