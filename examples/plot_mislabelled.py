"""
Finding mislabelled images
==========================

Some labels of a training set are wrong. A network that was fitted on them has learned them too; the model that did not
see an image has not. For the linearized network the outputs of that model are known in closed form, for each image,
from one fit, with the prior held fixed: where they disagree with a label, the label deserves a look.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score

from sklearn_lqf import LQFClassifier

# %%
# 8 images of each digit; the labels of 8 of them are replaced.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:8] for k in range(10)])
X, y = X[train], y[train]
wrong = np.zeros(len(y), bool)
wrong[rng.permutation(len(y))[:8]] = True
given = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)

# %%
# Fit on the labels as given, and ask each image's opinion of a model without it.
clf = LQFClassifier("efficientnet_lite0", image_shape=(8, 8), image_size=64).fit(X, given)
held_out = clf.leave_one_out(X, given)
suspicion = ((held_out - np.eye(10)[given]) ** 2).sum(1)
in_sample = ((clf.decision_function(X) - np.eye(10)[given]) ** 2).sum(1)
area = roc_auc_score(wrong, suspicion)
print(
    f"area under the ROC curve: leave-one-out {area:.3f}, residual in the sample {roc_auc_score(wrong, in_sample):.3f}"
)

# %%
# The most suspicious images.
order = np.argsort(-suspicion)
fig, axes = plt.subplots(2, 8, figsize=(11, 3.4), layout="constrained")
for ax, i in zip(axes.flat, order, strict=False):
    ax.imshow(X[i].reshape(8, 8), cmap="gray_r")
    color = "tab:red" if wrong[i] else "black"
    ax.set_title(f"label {given[i]}, says {held_out[i].argmax()}", color=color, fontsize=9)
    ax.set(xticks=[], yticks=[])
fig.suptitle("Training images in the order of suspicion (red: the label is wrong)")
path = Path(sys.argv[0]).parent / "output" / "mislabelled.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert area > 0.9, "leave-one-out should find the wrong labels"
