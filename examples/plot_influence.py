"""
Why was this predicted?
=======================

The effect of each training image on each prediction is known in closed form: what the output of the predicted class
would lose, or gain, had the image not been there, with the prior held fixed.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_digits

from sklearn_lqf import LQFClassifier

# %%
# 8 images of each digit to learn from; three others to be explained.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:8] for k in range(10)])
test = np.setdiff1d(np.arange(len(y)), train)
clf = LQFClassifier("efficientnet_lite0", image_shape=(8, 8), image_size=64).fit(X[train], y[train])
predicted = clf.predict(X[test[:200]])
shown = test[:200][[np.flatnonzero(predicted == k)[0] for k in (3, 5, 8)]]

# %%
# Rows: images to be explained; columns: training images. Negative: without the image, the output is smaller.
effect = clf.influence(X[train], y[train], X[shown])
print("strongest support comes from labels", y[train][effect.argmin(1)], "for predictions", clf.predict(X[shown]))

# %%
# Leaving the strongest supporter out for real (its weight becomes zero), with a prior learned anew, does what was
# predicted.
i = effect[0].argmin()
weights = np.where(np.arange(len(train)) == i, 0.0, 1.0)
again = clone(clf).fit(X[train], y[train], weights)
before, after = (m.decision_function(X[shown[:1]])[0] for m in (clf, again))
change = (after - before)[before.argmax()]
print(f"change of the output without it: predicted {effect[0, i]:+.4f}, fitted again {change:+.4f}")

# %%
# Each image with the training images that support its prediction most, and those that speak most against it.
fig = plt.figure(figsize=(10, 4.9), layout="constrained")
explained, support, against = fig.subfigures(1, 3, width_ratios=[1.25, 3, 3])
titles = {"predicted": "black", "support": "tab:green", "against": "tab:red"}
explained.suptitle("Predicted", weight="bold")
support.suptitle("Output lost without this training image", color=titles["support"], weight="bold")
against.suptitle("Output gained without this one", color=titles["against"], weight="bold")


def draw(panel, images, captions, columns, color):
    for ax, image, caption in zip(panel.subplots(3, columns).flat, images, captions, strict=True):
        ax.imshow(image.reshape(8, 8), cmap="gray_r")
        ax.set(xticks=[], yticks=[])
        ax.set_title(caption, fontsize=10)
        ax.spines[:].set(color=color, linewidth=2)


order = np.argsort(effect, axis=1)
draw(explained, X[shown], [f"a {k}" for k in clf.predict(X[shown])], 1, titles["predicted"])
for panel, chosen, color in (
    (support, order[:, :3], titles["support"]),
    (against, order[:, :-4:-1], titles["against"]),
):
    size = np.abs(np.take_along_axis(effect, chosen, 1)).ravel()
    captions = [f"a {y[train][j]}: {s:.2f}" for j, s in zip(chosen.flat, size, strict=True)]
    draw(panel, X[train][chosen.ravel()], captions, 3, color)
path = Path(sys.argv[0]).parent / "output" / "influence.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert (y[train][effect.argmin(1)] == clf.predict(X[shown])).all()
assert abs(change - effect[0, i]) < 0.1 * abs(change)
