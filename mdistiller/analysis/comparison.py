"""Student against teacher, and runs against each other: charts of curves, calibration, agreement and features."""

from dataclasses import dataclass, field

import numpy as np
from sklearn.manifold import TSNE

from mdistiller.analysis import statistics as st
from mdistiller.analysis.charts import COLOURS, Chart, Panel, Series
from mdistiller.analysis.networks import Missing, Networks, Sight
from mdistiller.analysis.runs import Group
from mdistiller.analysis.superclasses import CIFAR100, class_names, coarse_labels

CURVES, SECTION = "Training curves", "Student and teacher"
CLASSES_SHOWN = 10  # t-SNE: more hues than these cannot be told apart
POINTS_SHOWN = 1000
LEAST = 5  # samples in a bin of the reliability diagram: the accuracy of fewer is chance


def curves_chart(groups: list[Group]) -> Chart:
    """Mean over seeds; the band is one sample standard deviation to each side."""
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
    return Chart("curves", CURVES, "Training curves", caption, panels)


@dataclass
class Seen:
    """One run's last student, and its teacher where there is one, on the test set."""

    group: Group
    labels: np.ndarray  # (N,)
    names: list[str]  # of the K classes
    student: Sight
    teacher: Sight | None
    notes: list[str] = field(default_factory=list)

    @property
    def class_accuracy(self) -> np.ndarray:
        """(K,), percent."""
        return 100 * st.class_means(self.student.logits.argmax(1) == self.labels, self.labels, len(self.names))


def look_at(group: Group, networks: Networks) -> Seen:
    """Raises Missing where the group's first run lacks its student or its data."""
    run = group.first
    data = networks.data(run)
    student = networks.student(run, "test")
    seen = Seen(group, data.test_labels.numpy(), class_names(run.cfg.DATASET.TYPE, data.num_classes), student, None)
    try:
        seen.teacher = networks.teacher(run, "test")
    except Missing as error:
        if run.cfg.DISTILLER.TYPE != "NONE":
            seen.notes.append(f"comparison with the teacher: {error}")
    return seen


def calibration_chart(found: dict[int, Seen], bins: int = 15) -> Chart:
    curve = Panel("reliability", "confidence", "accuracy", diagonal=True, y_range=(-0.02, 1.03))
    share = Panel("how often a confidence is given", "confidence", "samples (%)")
    centres = (np.arange(bins) + 0.5) / bins
    sights = [(f"{seen.group.label}", number, seen.student, seen.labels) for number, seen in found.items()]
    teachers = {id(seen.teacher): seen for seen in found.values() if seen.teacher is not None}
    sights += [(f"teacher {s.group.cfg.DISTILLER.TEACHER}", None, s.teacher, s.labels) for s in teachers.values()]
    for name, number, sight, labels in sights:
        c = st.calibration(sight.logits, labels, bins)
        name, filled = f"{name}: ECE {100 * c.ece:.1f}%", c.share * len(labels) >= LEAST
        text = [f"{n:.1%} of the samples" for n in c.share[filled]]
        dashed = number is None
        curve.series.append(Series(name, number, c.confidence[filled], c.accuracy[filled], dashed=dashed, text=text))
        share.series.append(Series(name, number, centres, 100 * c.share, dashed=dashed))
    return Chart(
        "calibration",
        SECTION,
        "Calibration",
        f"Test set, {bins} bins of the top-1 probability at temperature 1; on the dotted line confidence is right. "
        "ECE: expected calibration error (Guo et al., 1706.04599). Dashed: teachers. Bins of fewer than "
        f"{LEAST} samples are not drawn, but count in the ECE.",
        [curve, share],
    )


def agreement_chart(found: dict[int, Seen]) -> Chart:
    panel = Panel("test set", "", "samples (%)")
    for number, seen in found.items():
        if seen.teacher is not None:
            cells = st.agreement(seen.student.logits, seen.teacher.logits, seen.labels)
            panel.series.append(
                Series(seen.group.label, number, list(cells), [100 * v for v in cells.values()], "bars")
            )
    return Chart(
        "agreement",
        SECTION,
        "Where student and teacher agree",
        "Who names the label: both, the teacher alone, the student alone, neither (with one and the same mistake, or "
        "with two different ones).",
        [panel],
    )


def superclass_chart(found: dict[int, Seen]) -> Chart:
    """CIFAR-100's 20 superclasses: a guess counts as right where it lies in the label's superclass."""
    fine = Panel("the class itself is right", "", "accuracy (%)")
    coarse = Panel("the superclass is right", "", "accuracy (%)")
    for number, seen in found.items():
        home = coarse_labels(seen.group.cfg.DATASET.TYPE)
        if home is None:
            continue
        guess, label = seen.student.logits.argmax(1), seen.labels
        for panel, right in ((fine, guess == label), (coarse, home[guess] == home[label])):
            means = 100 * st.class_means(right, home[label], len(CIFAR100))
            panel.series.append(Series(seen.group.label, number, list(CIFAR100), means, "points"))
    return Chart(
        "superclasses",
        SECTION,
        "Accuracy by superclass",
        "CIFAR-100's 20 superclasses of five classes each (test set, last checkpoint).",
        [fine, coarse],
    )


def correlation_chart(seen: Seen, number: int, slug: str) -> Chart:
    difference = st.correlation_difference(seen.student.logits, seen.teacher.logits)
    off = np.abs(difference[~np.eye(len(difference), dtype=bool)])
    return Chart(
        f"correlation-{slug}",
        SECTION,
        f"Logit correlations, student minus teacher: {seen.group.label}",
        f"Pearson correlation between the logits of two classes over the test set. Mean absolute difference "
        f"{off.mean():.3f}, largest {off.max():.3f}. {seen.group.figures}.",
        [Panel("student minus teacher", matrix=difference, ticks=seen.names)],
        group=number,
    )


def tsne_chart(seen: Seen, number: int, slug: str) -> Chart:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) of the pooled features, from a PCA start, seed 0."""
    classes = np.unique(np.linspace(0, len(seen.names) - 1, CLASSES_SHOWN).round().astype(int))
    chosen = np.flatnonzero(np.isin(seen.labels, classes))
    chosen = chosen[:: -(-len(chosen) // POINTS_SHOWN)]
    panels = []
    for title, sight in (("student", seen.student), ("teacher", seen.teacher)):
        if sight is None or len(chosen) < 10:
            continue
        perplexity = min(30, (len(chosen) - 1) / 3)
        points = TSNE(2, perplexity=perplexity, init="pca", random_state=0).fit_transform(sight.features[chosen])
        panel = Panel(title, bare=True)
        for place, label in enumerate(classes):
            x, y = points[seen.labels[chosen] == label].T
            name = seen.names[label]
            panel.series.append(Series(name, number, x, y, "points", text=[name] * len(x), colour=COLOURS[place]))
        panels.append(panel)
    return Chart(
        f"tsne-{slug}",
        SECTION,
        f"t-SNE of pooled features: {seen.group.label}",
        f"{len(chosen):,} test images of {len(classes)} classes. Distances between clusters carry no meaning. "
        f"{seen.group.figures}.",
        panels,
        group=number,
    )


COMPARED = (
    "run", "last (%)", "best (%)", "ECE student (%)", "ECE teacher (%)", "agreement (%)", "both right (%)",
    "student alone right (%)", "mean |correlation difference|",
)  # fmt: skip


def compared_row(seen: Seen) -> list:
    """In the order of COMPARED; of the group's first run, except last and best, which are the group's."""
    row = [seen.group.label, seen.group.last, seen.group.best]
    row.append(100 * st.calibration(seen.student.logits, seen.labels).ece)
    if seen.teacher is None:
        return row + [None] * 5
    row.append(100 * st.calibration(seen.teacher.logits, seen.labels).ece)
    cells = st.agreement(seen.student.logits, seen.teacher.logits, seen.labels)
    row += [100 * (cells["both right"] + cells["same mistake"]), 100 * cells["both right"]]
    row.append(100 * cells["student alone"])
    difference = st.correlation_difference(seen.student.logits, seen.teacher.logits)
    return [*row, float(np.abs(difference[~np.eye(len(difference), dtype=bool)]).mean())]
