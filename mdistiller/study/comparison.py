"""Student against teacher, and runs against each other: charts of curves, calibration, agreement and features."""

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
CLASSES_SHOWN = 10  # t-SNE: more hues than these cannot be told apart
POINTS_SHOWN = 1000
LEAST = 5  # samples in a bin of the reliability diagram: the accuracy of fewer is chance
BINS = 15


def curves_chart(groups: list[Group]) -> Chart:
    wanted = (
        ("test_acc", "test accuracy", "top-1 (%)"),
        ("train_acc", "training accuracy", "top-1 (%)"),
        ("train_loss", "training loss", "loss, all terms"),
    )
    panels = []
    for key, title, label in wanted:
        panel = Panel(title, "epoch", label)
        for number, group in enumerate(groups):
            values = np.array([[row[key] for row in run.rows] for run in group.runs])  # (seeds, E)
            mean, bands = values.mean(0), {}
            if len(values) > 1:
                std = values.std(0, ddof=1)
                bands = {("minus_std", "plus_std"): (mean - std, mean + std)}
            epochs = [row["epoch"] for row in group.first.rows]
            panel.series.append(Series(group.label, number, epochs, mean, bands=bands))
        panels.append(panel)
    caption = "Mean over seeds; the band is one standard deviation to each side."
    return Chart("curves", CURVES, "Accuracy and loss by epoch", caption, panels)


@dataclass
class Comparison:
    """One run's last student, and its teacher where there is one, on the N images of the test set."""

    number: int  # of its group
    group: Group
    labels: np.ndarray  # (N,)
    names: list[str]  # of the K classes
    student: Predictions
    teacher: Predictions | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def class_accuracy(self) -> np.ndarray:
        """The student's accuracy on each class in percent, (K,)."""
        return 100 * st.class_means(self.student.logits.argmax(1) == self.labels, self.labels, len(self.names))

    @property
    def agreement(self) -> dict[str, float]:
        """Shares in percent of the images by who names their label."""
        shares = st.agreement(self.student.logits, self.teacher.logits, self.labels)
        return {name: 100 * share for name, share in shares.items()}

    @property
    def correlation_difference(self) -> np.ndarray:
        return st.correlation_difference(self.student.logits, self.teacher.logits)

    def ece(self, of: Predictions) -> float:
        """Expected calibration error in percent."""
        return 100 * st.calibration(of.logits, self.labels, BINS).ece


def compare(number: int, group: Group, networks: Networks) -> Comparison:
    """Return the comparison of the group's first run. Raises Missing where it lacks its student or its data."""
    run = group.first
    data = networks.data(run)
    names = class_names(run.cfg.DATASET.TYPE, data.num_classes)
    comparison = Comparison(number, group, data.test_labels.numpy(), names, networks.student(run, "test"))
    try:
        comparison.teacher = networks.teacher(run, "test")
    except Missing as error:
        if run.cfg.DISTILLER.TYPE != "NONE":
            comparison.notes.append(f"comparison with the teacher: {error}")
    return comparison


def calibration_chart(found: list[Comparison]) -> Chart:
    curve = Panel("reliability", "confidence", "accuracy", diagonal=True, y_range=(-0.02, 1.03))
    share = Panel("how often a confidence is given", "confidence", "samples (%)")
    centres = (np.arange(BINS) + 0.5) / BINS
    shown = [(c.group.label, c.number, c, c.student) for c in found]
    teachers = {id(c.teacher): c for c in found if c.teacher is not None}  # one that several groups share is one line
    shown += [(f"teacher {c.group.cfg.DISTILLER.TEACHER}", None, c, c.teacher) for c in teachers.values()]
    for name, number, comparison, predictions in shown:
        c = st.calibration(predictions.logits, comparison.labels, BINS)
        name, filled = f"{name}: ECE {100 * c.ece:.1f}%", c.share * len(comparison.labels) >= LEAST
        text = [f"{part:.1%} of the samples" for part in c.share[filled]]
        dashed = number is None
        curve.series.append(Series(name, number, c.confidence[filled], c.accuracy[filled], dashed=dashed, text=text))
        share.series.append(Series(name, number, centres, 100 * c.share, dashed=dashed))
    return Chart(
        "calibration",
        SECTION,
        "Calibration",
        f"Test set, {BINS} bins of the top-1 probability at temperature 1; on the dotted line confidence is right. "
        "ECE: expected calibration error (Guo et al., 1706.04599). Dashed: teachers. Bins of fewer than "
        f"{LEAST} samples are not drawn, but count in the ECE.",
        [curve, share],
    )


def agreement_chart(found: list[Comparison]) -> Chart:
    panel = Panel("test set", "", "samples (%)")
    for c in found:
        if c.teacher is not None:
            shares = c.agreement
            panel.series.append(Series(c.group.label, c.number, list(shares), list(shares.values()), "bars"))
    return Chart(
        "agreement",
        SECTION,
        "Where student and teacher agree",
        "Who names the label: both, the teacher alone, the student alone, neither (with one and the same mistake, or "
        "with two different ones).",
        [panel],
    )


def superclass_chart(found: list[Comparison]) -> Chart:
    """Return the accuracy by CIFAR-100's superclasses, empty for other data sets."""
    fine = Panel("the class itself is right", "", "accuracy (%)")
    coarse = Panel("the superclass is right", "", "accuracy (%)")
    for c in found:
        home = coarse_labels(c.group.cfg.DATASET.TYPE)
        if home is None:
            continue
        guess, label = c.student.logits.argmax(1), c.labels
        for panel, right in ((fine, guess == label), (coarse, home[guess] == home[label])):
            means = 100 * st.class_means(right, home[label], len(CIFAR100))
            panel.series.append(Series(c.group.label, c.number, list(CIFAR100), means, "points"))
    return Chart(
        "superclasses",
        SECTION,
        "Accuracy by superclass",
        "CIFAR-100's 20 superclasses of five classes each (test set, last checkpoint).",
        [fine, coarse],
    )


def correlation_chart(c: Comparison, slug: str) -> Chart:
    difference, home = c.correlation_difference, coarse_labels(c.group.cfg.DATASET.TYPE)
    order = np.arange(len(difference)) if home is None else np.argsort(home, kind="stable")
    sorting = "" if home is None else " The classes of a superclass stand together."
    off = np.abs(difference[~np.eye(len(difference), dtype=bool)])
    return Chart(
        f"correlation-{slug}",
        SECTION,
        f"Logit correlations, student minus teacher: {c.group.label}",
        f"Pearson correlation between the logits of two classes over the test set. Mean absolute difference "
        f"{off.mean():.3f}, largest {off.max():.3f}.{sorting} {c.group.figures}.",
        [Panel("student minus teacher", matrix=difference[np.ix_(order, order)], ticks=[c.names[i] for i in order])],
        group=c.number,
    )


def tsne_chart(c: Comparison, slug: str) -> Chart:
    """Return t-SNE (van der Maaten and Hinton, JMLR 2008) of the pooled features, from a PCA start, seed 0."""
    classes = np.unique(np.linspace(0, len(c.names) - 1, CLASSES_SHOWN).round().astype(int))
    chosen = np.flatnonzero(np.isin(c.labels, classes))
    chosen = chosen[:: max(-(-len(chosen) // POINTS_SHOWN), 1)]
    panels = []
    for title, predictions in (("student", c.student), ("teacher", c.teacher)):
        if predictions is None or len(chosen) < 10:
            continue
        perplexity = min(30, (len(chosen) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(predictions.features[chosen])
        panel = Panel(title, bare=True)
        for place, label in enumerate(classes):
            x, y = points[c.labels[chosen] == label].T
            name = c.names[label]
            panel.series.append(Series(name, c.number, x, y, "points", text=[name] * len(x), colour=COLOURS[place]))
        panels.append(panel)
    return Chart(
        f"tsne-{slug}",
        SECTION,
        f"t-SNE of pooled features: {c.group.label}",
        f"{len(chosen):,} test images of {len(classes)} classes. Distances between clusters carry no meaning. "
        f"{c.group.figures}.",
        panels,
        group=c.number,
    )


COMPARED = (
    "run", "last (%)", "best (%)", "ECE student (%)", "ECE teacher (%)", "agreement (%)", "both right (%)",
    "student alone right (%)", "mean |correlation difference|",
)  # fmt: skip


def comparison_table(found: list[Comparison]) -> Table:
    rows = []
    for c in found:
        row = [c.group.label, c.group.last, c.group.best, c.ece(c.student)]
        if c.teacher is None:
            rows.append(row + [None] * 5)
            continue
        shares, difference = c.agreement, c.correlation_difference
        row += [c.ece(c.teacher), shares["both right"] + shares["same mistake"], shares["both right"]]
        off = np.abs(difference[~np.eye(len(difference), dtype=bool)])
        rows.append([*row, shares["student alone"], float(off.mean())])
    caption = (
        "On the test set, by the last checkpoint of each group's lowest seed; last and best accuracy are those of the "
        "group. Agreement: student and teacher name the same class."
    )
    return Table(SECTION, "Student against teacher", caption, COMPARED, rows, [c.number for c in found])
