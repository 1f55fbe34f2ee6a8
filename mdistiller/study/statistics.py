"""The numbers of an analysis: pure functions of arrays. N samples, K classes, E epochs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax
from scipy.stats import rankdata

from mdistiller.runs.temperature import correlation


class Mean(NamedTuple):
    """Mean and sample standard deviation (over n - 1) of n runs; no deviation for a single one."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "")


def mean_and_std(values: Sequence[float]) -> Mean:
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[label] of each sample, in nats: (N, K), (N,) -> (N,)."""
    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The label's logit minus the largest other one: (N, K), (N,) -> (N,); negative where the sample is misjudged."""
    rows = np.arange(len(labels))
    others = logits.astype(np.float64)
    own = others[rows, labels]
    others[rows, labels] = -np.inf
    return own - others.max(1)


class Calibration(NamedTuple):
    """Reliability of the top-1 probability; bin i holds the confidences in (i / M, (i + 1) / M], M bins."""

    confidence: np.ndarray  # (M,), mean of the bin; NaN where it is empty
    accuracy: np.ndarray  # (M,), share that is right; NaN where it is empty
    share: np.ndarray  # (M,), of all samples
    ece: float  # in [0, 1]


def calibration(logits: np.ndarray, labels: np.ndarray, bins: int = 15) -> Calibration:
    """Expected calibration error, sum_i n_i / N |accuracy_i - confidence_i|, and the reliability diagram behind it
    (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599, Eq. 3). Logits (N, K), labels (N,).
    """
    probability = np.exp(log_softmax(logits.astype(np.float64), axis=1)).max(1)  # (N,)
    right = logits.argmax(1) == labels
    place = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(place, probability, bins) / count
        accuracy = np.bincount(place, right, bins) / count
    share = count / len(labels)
    return Calibration(confidence, accuracy, share, float(np.nansum(share * np.abs(accuracy - confidence))))


def class_correlation(logits: np.ndarray) -> np.ndarray:
    """Pearson correlation between the logits of every two classes over the samples: (N, K) -> (K, K). A class whose
    logit never varies correlates with none, and with itself by 1.
    """
    centred = logits.astype(np.float64) - logits.mean(0, dtype=np.float64)
    norm = np.linalg.norm(centred, axis=0)
    unit = centred / np.where(norm > 1e-12, norm, np.inf)
    result = unit.T @ unit
    np.fill_diagonal(result, 1)
    return result


def correlation_difference(logits_student: np.ndarray, logits_teacher: np.ndarray) -> np.ndarray:
    """Student's minus teacher's class_correlation, (K, K), in [-2, 2]: what the student has not learnt of how the
    teacher relates the classes (the picture that CRD, https://arxiv.org/abs/1910.10699, Fig. 3, introduced).
    """
    return class_correlation(logits_student) - class_correlation(logits_teacher)


AGREEMENT = ("both right", "teacher alone", "student alone", "same mistake", "different mistakes")


def agreement(logits_student: np.ndarray, logits_teacher: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Shares of the samples, which add up to 1, by who names the label (N,). Student and teacher agree on the samples
    of "both right" and "same mistake".
    """
    student, teacher = logits_student.argmax(1), logits_teacher.argmax(1)
    right, right_teacher, same = student == labels, teacher == labels, student == teacher
    cells = (
        right & right_teacher,
        ~right & right_teacher,
        right & ~right_teacher,
        ~right & ~right_teacher & same,
        ~right & ~right_teacher & ~same,
    )
    return {name: float(cell.mean()) for name, cell in zip(AGREEMENT, cells, strict=True)}


def class_means(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Mean of the values (N,) in each class (K,); NaN where a class has no sample."""
    with np.errstate(invalid="ignore"):
        return np.bincount(labels, values, num_classes) / np.bincount(labels, minlength=num_classes)


class Forgetting(NamedTuple):
    events: np.ndarray  # (N,) int
    learnt: np.ndarray  # (N,) bool: right at least once


def forgetting_events(right: np.ndarray) -> Forgetting:
    """How often each sample went from right to wrong (Toneva et al., ICLR 2019, https://arxiv.org/abs/1812.05159,
    section 3): right (E, N) bool, in the order of training. A sample that was never right has no event and is not
    learnt; the paper sorts it behind all others.
    """
    right = np.asarray(right, bool)
    return Forgetting((right[:-1] & ~right[1:]).sum(0), right.any(0))


class Bins(NamedTuple):
    x: np.ndarray  # (bins,) mean of x
    mean: np.ndarray  # of y
    low: np.ndarray  # 25% quantile of y
    high: np.ndarray  # 75% quantile of y
    count: np.ndarray


def binned(x: np.ndarray, y: np.ndarray, bins: int = 10) -> Bins:
    """y over bins of x that hold equally many samples; equal x never fall into two bins. Both (N,)."""
    order = np.argsort(x, kind="stable")
    x, y = x[order], y[order]
    cuts = np.searchsorted(x, x[np.arange(1, bins) * len(x) // bins])  # a bin begins where its first value does
    starts = np.unique(np.concatenate([[0], cuts]))
    rows = [
        (x[a:b].mean(), y[a:b].mean(), *np.quantile(y[a:b], (0.25, 0.75)), b - a)
        for a, b in zip(starts, [*starts[1:], len(x)], strict=True)
    ]
    return Bins(*map(np.array, zip(*rows, strict=True)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Rank correlation; 0 where either is constant."""
    return correlation(rankdata(x), rankdata(y))


def hot_share(values: np.ndarray, top: float = 0.1) -> np.ndarray:
    """The share of the epochs in which each sample is among the hottest `top`: (E, N) -> (N,). Where samples tie at
    the border none of them counts, so that a constant temperature makes nothing hot.
    """
    total = np.zeros(values.shape[1])
    for row in values:
        total += rankdata(row) > (1 - top) * len(row)
    return total / len(values)
