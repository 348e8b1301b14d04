"""
Forgetting a person's images
============================

A person who gave training images wants them out of the model. The features of an image depend on nothing but the image,
so scale, prior and weights are fitted again to those of all others: the result is the model that would have been fitted
had the images never been there.
"""

import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits

from sklearn_lqf import LQFClassifier

# %%
# 12 images of each digit. One contributor wrote light on dark: 10 of them are inverted.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:12] for k in range(10)])
test = rng.permutation(np.setdiff1d(np.arange(len(y)), train))[:100]
X_train, y_train, X_test = X[train], y[train], 255 - X[test]  # inverted, as theirs
person = np.arange(0, 120, 12)  # one image of each digit
X_train[person] = 255 - X_train[person]

# %%
# The estimator keeps what it needs to forget: features, labels and weights, nothing else and only if asked.
options = {"image_shape": (8, 8), "image_size": 64, "store_data": True}
start = time.perf_counter()
clf = LQFClassifier("efficientnet_lite0", **options).fit(X_train, y_train)
fit_seconds = time.perf_counter() - start
before = clf.decision_function(X_test)

start = time.perf_counter()
clf.forget(person)
print(f"fit {fit_seconds:.1f} s, forget {time.perf_counter() - start:.1f} s")

# %%
# The model that never saw them, for comparison.
others = np.setdiff1d(np.arange(len(train)), person)
never = LQFClassifier("efficientnet_lite0", **options).fit(X_train[others], y_train[others])
after, expected = clf.decision_function(X_test), never.decision_function(X_test)
gap, effect = np.abs(after - expected).max(), np.abs(before - expected).max()
print(f"largest difference of an output: before {effect:.3f}, after {gap:.1e}")
print(f"accuracy on inverted digits: before {(before.argmax(1) == y[test]).mean():.2f}, ", end="")
print(f"after {(after.argmax(1) == y[test]).mean():.2f}, never seen {(expected.argmax(1) == y[test]).mean():.2f}")

# %%
# Outputs for inverted digits, before and after, against those of the model that never saw the person's images.
fig, axes = plt.subplots(1, 2, figsize=(8, 4), sharex=True, sharey=True, layout="constrained")
for ax, outputs, title in zip(axes, (before, after), ("before", "after forget"), strict=True):
    ax.plot([expected.min(), expected.max()], [expected.min(), expected.max()], color="gray", linewidth=0.8)
    ax.plot(expected.ravel(), outputs.ravel(), ".", markersize=3)
    ax.set(title=title, xlabel="output of a model that never saw them", aspect="equal")
axes[0].set_ylabel("output of this model")
path = Path(sys.argv[0]).parent / "output" / "forgetting.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert gap < 1e-4 * effect, "forgetting should give the model that never saw the images"
assert len(clf.leave_one_out()) == len(others), "what is stored should be of the others alone"
