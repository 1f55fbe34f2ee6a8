"""The numbers of an analysis against cases counted by hand."""

import numpy as np
import pytest
import torch

from mdistiller.study import statistics as st
from mdistiller.study.superclasses import CIFAR100, class_names, coarse_labels


def logits_of(probabilities):
    return np.log(np.array(probabilities))


def test_ece_by_hand():
    # confidences 0.95, 0.85 | 0.6, 0.6 in bins (0.8, 1] and (0.4, 0.6]; of each pair one is right
    logits = logits_of([[0.95, 0.05], [0.15, 0.85], [0.599, 0.401], [0.599, 0.401]])
    c = st.calibration(logits, np.array([0, 0, 0, 1]), bins=5)
    np.testing.assert_allclose(c.confidence, [np.nan, np.nan, 0.599, np.nan, 0.9])
    np.testing.assert_allclose(c.accuracy, [np.nan, np.nan, 0.5, np.nan, 0.5])
    np.testing.assert_allclose(c.share, [0, 0, 0.5, 0, 0.5])
    assert c.ece == pytest.approx(0.5 * 0.099 + 0.5 * 0.4)


def test_ece_of_a_perfect_and_of_a_certain_and_wrong_network():
    logits = np.array([[50.0, 0], [0, 50.0]])
    assert st.calibration(logits, np.array([0, 1])).ece == pytest.approx(0)
    assert st.calibration(logits, np.array([1, 0])).ece == pytest.approx(1)


def test_correlation_difference_by_hand():
    student = np.array([[1.0, 1, 5], [2, 2, 5], [3, 3, 5]])
    teacher = np.array([[1.0, 3, 1], [2, 2, 2], [3, 1, 4]])
    difference = st.class_correlation(student) - st.class_correlation(teacher)
    assert difference[0, 1] == pytest.approx(1 - -1)
    # constant: correlates with none
    assert difference[0, 2] == pytest.approx(0 - np.corrcoef([1, 2, 3], [1, 2, 4])[0, 1])
    np.testing.assert_allclose(difference, difference.T)
    np.testing.assert_allclose(np.diag(difference), 0, atol=1e-12)
    np.testing.assert_allclose(st.class_correlation(3 * student + 1), st.class_correlation(student), atol=1e-12)


def test_forgetting_events_by_hand():
    right = np.array([[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 1, 1]], bool)
    assert st.forgetting_events(right).tolist() == [2, 0, 1, 0]


def test_bins_hold_equally_many_and_never_split_a_value():
    x = np.arange(10.0)[::-1]
    bins = st.binned(x, 2 * x, 5)
    np.testing.assert_allclose(bins.x, [0.5, 2.5, 4.5, 6.5, 8.5])
    np.testing.assert_allclose(bins["y"], 2 * bins["x"])
    np.testing.assert_allclose(bins["low"], 2 * bins["x"] - 0.5)
    tied = st.binned(np.array([0.0] * 7 + [1, 2, 3]), np.arange(10.0), 5)
    assert tied["count"].tolist() in ([8, 2], [7, 1, 2])
    assert st.binned(np.zeros(4), np.arange(4.0), 10)["count"].tolist() == [4]
    assert st.binned(np.array([0, 3, 3, 1]), np.arange(4.0), None)["y"].tolist() == [0, 3, 1.5]


def test_loss_and_margin():
    logits, labels = np.array([[2.0, 0, 0], [0, 1, 4]]), np.array([0, 1])
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels), reduction="none")
    np.testing.assert_allclose(st.cross_entropy(logits, labels), expected)
    assert st.margin(logits, labels).tolist() == [2, -3]


def test_agreement_by_hand():
    student, teacher = np.eye(3)[[0, 1, 0, 1, 2]], np.eye(3)[[0, 0, 1, 1, 1]]
    cells = st.agreement(student, teacher, np.zeros(5, int))
    assert list(cells.values()) == pytest.approx([20] * 5)


def test_hot_share():
    values = np.arange(20.0)[None].repeat(4, 0)
    values[3] = values[3, ::-1]
    hot = st.hot_share(values)
    assert hot[[0, 1, 18, 19]].tolist() == [0.25, 0.25, 0.75, 0.75]
    assert hot[2:18].sum() == 0
    assert st.hot_share(np.full((3, 9), 4.0)).sum() == 0, "a constant temperature makes nothing hot"


def test_rank_correlation():
    assert st.spearman([1, 2, 3], [1, 10, 100]) == pytest.approx(1)
    assert st.spearman([1, 2, 3], [5, 5, 5]) == 0


def test_mean_and_std():
    assert st.mean_and_std([1.0, 2.0, 3.0]) == (2, 1, 3)
    assert str(st.mean_and_std([1.0, 2.0, 3.0])) == "2.00 ± 1.00"
    assert str(st.mean_and_std([70.126])) == "70.13"


def test_superclasses():
    names, home = class_names("cifar100", 100), coarse_labels("cifar100")
    assert len(CIFAR100) == 20 and np.bincount(home).tolist() == [5] * 20
    assert (names[0], names[53], names[99]) == ("apple", "orange", "worm")
    assert list(CIFAR100)[home[0]] == list(CIFAR100)[home[53]] == "fruit and vegetables"
    assert coarse_labels("digits") is None and class_names("npz", 3) == ["0", "1", "2"]
