"""
Which images to label next?
===========================

Photographs are many, labels are few, and most of a collection is more of the same. A model that says how sure it is can
ask for the labels that it needs. The posterior of the linear model gives each output a standard deviation;
``partial_fit`` takes the new labels up in less time than a new fit, and with the same result.
"""

import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from sklearn_lqf import LQFClassifier

# %%
# A pool as collections are: many images of the digits 0 to 4, few of 5 to 9. The test has 25 of each.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
shuffled = [rng.permutation(np.flatnonzero(y == k)) for k in range(10)]
test = np.concatenate([rows[:25] for rows in shuffled])
pool = np.concatenate([rows[25 : 25 + (40 if k < 5 else 8)] for k, rows in enumerate(shuffled)])


# %%
# How much a label of each image is wanted. By the margin: images whose two largest outputs are near to each other, in
# units of the standard deviation of an output. By the standard deviation alone: images unlike those that have a label,
# whatever their class. At random, for comparison.
def by_margin(clf, images, rng):
    outputs, std = clf.decision_function(images, return_std=True)
    second, first = np.sort(outputs, axis=1)[:, -2:].T
    return (second - first) / std[:, 0]


def by_deviation(clf, images, rng):
    return clf.decision_function(images, return_std=True)[1][:, 0]


def at_random(clf, images, rng):
    return rng.random(len(images))


# %%
# Two labelled images of each digit to begin with; then five rounds of ten labels each, three times from other images.
# All share what the network computes, by the folder ``memory``.
folder = tempfile.TemporaryDirectory()
STEP, ROUNDS, STARTS = 10, 5, 3


def run(wanted, seed):
    rng = np.random.default_rng(seed)
    order = rng.permutation(pool)
    known = np.concatenate([order[y[order] == k][:2] for k in range(10)])
    clf = LQFClassifier(image_shape=(8, 8), store_data=True, execution={"memory": folder.name})
    clf.fit(X[known], y[known])
    accuracy = [clf.score(X[test], y[test])]
    for _ in range(ROUNDS):
        rest = np.setdiff1d(pool, known)
        new = rest[np.argsort(-wanted(clf, X[rest], rng))[:STEP]]
        clf.partial_fit(X[new], y[new])
        known = np.concatenate([known, new])
        accuracy.append(clf.score(X[test], y[test]))
    return accuracy, known


curves, asked = {}, {}
for name, wanted in {"margin": by_margin, "standard deviation": by_deviation, "random": at_random}.items():
    results = [run(wanted, seed) for seed in range(STARTS)]
    curves[name] = np.array([accuracy for accuracy, _ in results])
    asked[name] = [known[20:] for _, known in results]
    rare = np.mean(y[np.concatenate(asked[name])] >= 5)
    print(f"{name:18}", *(f"{a:.3f}" for a in curves[name].mean(0)), f"  {rare:.0%} of the labels were of rare digits")

# %%
# The curves, and what the margin asked for first. It finds the rare digits; the standard deviation by itself asks for
# images that look unusual, whether or not they tell digits apart, and helps no more than chance.
fig = plt.figure(figsize=(10.5, 4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[6, 5])
ax = left.subplots()
labels = 20 + STEP * np.arange(ROUNDS + 1)
for (name, values), color in zip(curves.items(), ("tab:green", "tab:blue", "tab:gray"), strict=True):
    ax.plot(labels, values.T, color=color, alpha=0.25, linewidth=1)
    ax.plot(labels, values.mean(0), "o-", color=color, label=name)
ax.set(xlabel="labelled images", ylabel="accuracy on the test", xticks=labels)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(title="asked for by", loc="upper left")
left.suptitle(f"{STARTS} starts (thin) and their mean")
for ax, i in zip(right.subplots(4, 5).flat, asked["margin"][0], strict=False):
    ax.imshow(X[i].reshape(8, 8), cmap="gray_r")
    ax.set(xticks=[], yticks=[], title=f"a {y[i]}")
right.suptitle("The first that the margin asked for")
path = Path(sys.argv[0]).parent / "output" / "label_next.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")
folder.cleanup()

mean = {name: values[:, 1:].mean() for name, values in curves.items()}
assert mean["margin"] > mean["random"], "asking by the margin should be better than at random"
