"""Accuracy and F1 of a classification, as scikit-learn defines them."""

from collections.abc import Sequence

import numpy as np


def accuracy(truth: Sequence[int], predicted: Sequence[int]) -> float:
    return float(np.mean(np.asarray(truth) == np.asarray(predicted)))


def macro_f1(truth: Sequence[int], predicted: Sequence[int]) -> float:
    """The mean of the classes' F1, over the classes that occur in either; a class of which nothing
    is right counts as zero."""
    t, p = np.asarray(truth), np.asarray(predicted)
    scores = []
    for label in np.union1d(t, p):
        right = np.sum((t == label) & (p == label))
        scores.append(2 * right / (np.sum(t == label) + np.sum(p == label)))
    return float(np.mean(scores))


def micro_f1(truth: Sequence[int], predicted: Sequence[int]) -> float:
    """Over all classes together. Where every row has one label and gets one, it is the accuracy."""
    return accuracy(truth, predicted)


METRICS = {"accuracy": accuracy, "macro_f1": macro_f1, "micro_f1": micro_f1}
