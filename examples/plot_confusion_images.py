"""
A confusion matrix that shows the images
========================================

A confusion matrix counts which classes are taken for which. What the classes have in common is seen only in the images
behind its cells: a bad photograph, a wrong label, or two things that do look alike.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix

from sklearn_lqf import LQFClassifier

# %%
# 6 images of each digit to learn from, 600 others to test on.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:6] for k in range(10)])
test = rng.permutation(np.setdiff1d(np.arange(len(y)), train))[:600]
clf = LQFClassifier(image_shape=(8, 8)).fit(X[train], y[train])
proba = clf.predict_proba(X[test])
true, predicted = y[test], clf.classes_[proba.argmax(1)]
counts = confusion_matrix(true, predicted)
errors = counts - np.diag(np.diag(counts))
print(f"accuracy {np.mean(true == predicted):.3f}, {errors.sum()} errors in {(errors > 0).sum()} of 90 cells")

# %%
# In each cell off the diagonal up to four of its images, those first of which the model was most sure, and how many
# more there are. On the diagonal the number of those that were right.
GRID = 2  # by 2 images in a cell


def draw(ax, images, row, column):
    """Draw up to GRID x GRID images into the middle of a cell, all of one size."""
    images = images[: GRID * GRID]
    side, rows = 0.88 / GRID, [images[i : i + GRID] for i in range(0, len(images), GRID)]
    for i, line in enumerate(rows):
        for j, image in enumerate(line):
            x, y = column + side * (j - len(line) / 2), row + side * (i - len(rows) / 2)
            ax.imshow(image, cmap="gray_r", extent=(x + 0.01, x + side - 0.01, y + side - 0.01, y + 0.01), zorder=2)


fig, ax = plt.subplots(figsize=(9, 9), layout="constrained")
shades = np.where(np.eye(10, dtype=bool), np.nan, errors)
ax.imshow(np.ma.masked_invalid(shades), cmap="Reds", norm=Normalize(0, 2 * errors.max()), zorder=1)
for i, j in np.argwhere(counts):
    if i == j:
        ax.text(j, i, counts[i, j], ha="center", va="center", color="tab:gray", fontsize=14)
        continue
    cell = np.flatnonzero((true == i) & (predicted == j))
    cell = cell[np.argsort(-proba[cell, j])]
    draw(ax, X[test][cell].reshape(-1, 8, 8), i, j)
    if len(cell) > GRID * GRID:
        more = {"ha": "right", "va": "top", "color": "white", "weight": "bold", "fontsize": 8, "zorder": 3}
        ax.text(j + 0.48, i - 0.47, f"+{len(cell) - GRID**2}", backgroundcolor="tab:red", **more)
ax.set(xlim=(-0.5, 9.5), ylim=(9.5, -0.5), xticks=range(10), yticks=range(10), aspect="equal")
ax.set_xticks(np.arange(-0.5, 10), minor=True)
ax.set_yticks(np.arange(-0.5, 10), minor=True)
ax.grid(which="minor", color="lightgray")
ax.tick_params(which="minor", length=0)
ax.set_xlabel("predicted", fontsize=12)
ax.set_ylabel("true", fontsize=12)
ax.set_title(f"What is taken for what: {errors.sum()} errors of {len(test)} images, {len(train)} to learn from")
path = Path(sys.argv[0]).parent / "output" / "confusion_images.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

# %%
# Where nobody knows the true classes, the errors have to be looked for among the images of which the model is unsure.
unsure = proba.max(1).argsort()[: len(test) // 5]
share = np.mean(np.isin(np.flatnonzero(true != predicted), unsure))
print(f"the fifth of the images of which the model is least sure has {share:.0%} of the errors")
assert share > 0.6, "most errors should be among the images of which the model is least sure"
