"""The numbers of an analysis: pure functions of arrays. N samples, K classes, E epochs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
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
    """Return mean and sample deviation of the values, of which there is at least one."""
    return Mean(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return -log softmax(logits)[label] of each sample, in nats: (N, K), (N,) -> (N,)."""
    return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]


def margin(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the label's logit minus the largest other one: (N, K), (N,) -> (N,); it is negative where the sample is
    misjudged.
    """
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
    """Return the expected calibration error, sum_i n_i / N |accuracy_i - confidence_i|, and the reliability diagram
    behind it (Guo et al., ICML 2017, https://arxiv.org/abs/1706.04599, Eq. 3). Logits (N, K), labels (N,).
    """
    probability = np.exp(log_softmax(logits.astype(np.float64), axis=1)).max(1)  # (N,)
    place = np.clip(np.ceil(probability * bins).astype(int) - 1, 0, bins - 1)
    confidence, accuracy = (class_means(values, place, bins) for values in (probability, logits.argmax(1) == labels))
    share = np.bincount(place, minlength=bins) / len(labels)
    return Calibration(confidence, accuracy, share, float(np.nansum(share * np.abs(accuracy - confidence))))


def class_correlation(logits: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation between the logits of every two classes over the samples: (N, K) -> (K, K). A class
    whose logit never varies correlates with none, and with itself by 1.
    """
    centred = logits.astype(np.float64) - logits.mean(0, dtype=np.float64)
    norm = np.linalg.norm(centred, axis=0)
    unit = centred / np.where(norm > 1e-12, norm, np.inf)
    result = unit.T @ unit
    np.fill_diagonal(result, 1)
    return result


AGREEMENT = ("both right", "teacher alone", "student alone", "same mistake", "different mistakes")


def agreement(logits_student: np.ndarray, logits_teacher: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the shares of the samples in percent by who names the label (N,). Student and teacher agree on
    the samples of "both right" and "same mistake".
    """
    student, teacher = logits_student.argmax(1), logits_teacher.argmax(1)
    right, right_teacher = student == labels, teacher == labels
    cases = np.select([right & right_teacher, right_teacher, right, student == teacher], range(4), 4)
    return dict(zip(AGREEMENT, (100 * np.bincount(cases, minlength=5) / len(labels)).tolist(), strict=True))


def class_means(values: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Return the mean of the values (N,) in each class (K,); NaN where a class has no sample."""
    with np.errstate(invalid="ignore"):
        return np.bincount(labels, values, num_classes) / np.bincount(labels, minlength=num_classes)


def forgetting_events(right: np.ndarray) -> np.ndarray:
    """Return how often each sample went from right to wrong (Toneva et al., ICLR 2019,
    https://arxiv.org/abs/1812.05159, section 3): right (E, N) bool, in the order of training, -> (N,).
    """
    return (right[:-1] & ~right[1:]).sum(0)


def binned(x: np.ndarray, y: np.ndarray, bins: int | None = 10) -> pd.DataFrame:
    """Return mean `x`, mean `y`, its quartiles `low` and `high`, and the `count` of samples in each bin of x. The bins
    hold equally many samples, but equal x never fall into two of them; None: one for each x. Both (N,).
    """
    place = rankdata(x) if bins is None else (rankdata(x) - 0.5) * bins // len(x)
    y, columns = pd.Series(np.asarray(y)).groupby(place), {"x": pd.Series(np.asarray(x)).groupby(place).mean()}
    columns |= {"y": y.mean(), "low": y.quantile(0.25), "high": y.quantile(0.75), "count": y.size()}
    return pd.DataFrame(columns).reset_index(drop=True)


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Return the rank correlation; 0 where either is constant."""
    return correlation(rankdata(x), rankdata(y))


def hot_share(values: np.ndarray, top: float = 0.1) -> np.ndarray:
    """Return the share of the epochs in which each sample is among the hottest `top`: (E, N) -> (N,). Where samples tie
    at the border none of them counts, so that a constant temperature makes nothing hot.
    """
    return np.mean([rankdata(row) > (1 - top) * len(row) for row in values], 0)
