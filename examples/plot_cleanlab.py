"""
Finding mislabelled images
==========================

Some labels of a training set are wrong. A network that was fitted on them has learned them too; a model that did not
see an image has not, and where it disagrees with the label, the label deserves a look. Tools that clean labels, such
as `cleanlab <https://docs.cleanlab.ai>`_, ask for the probabilities of such models, which as a rule take a
cross-validation. Here they are known in closed form from one fit, each by the model that saw all images but one, with
the prior held fixed.
"""

import os
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import softmax
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from sklearn_lqf import LQFClassifier

try:
    from cleanlab.filter import find_label_issues  # pip install cleanlab
except ImportError:
    find_label_issues = None

# %%
# 20 images of each digit; 20 of the 200 labels are replaced.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:20] for k in range(10)])
X, y = X[train], y[train]
wrong = np.zeros(len(y), bool)
wrong[rng.permutation(len(y))[:20]] = True
given = np.where(wrong, (y + rng.integers(1, 10, len(y))) % 10, y)

# %%
# One fit on the labels as given. ``leave_one_out`` gives the outputs for each image by the model without it; their
# softmax over the temperature of the fit gives probabilities.
clf = LQFClassifier(image_shape=(8, 8))
start = time.perf_counter()
clf.fit(X, given)
proba = {"leave-one-out": softmax(clf.leave_one_out(X, given) / clf.temperature_, axis=1)}
seconds = {"leave-one-out": time.perf_counter() - start}

# %%
# The usual way, for comparison: five fits, each of which sees four fifths of the images.
start = time.perf_counter()
folds = StratifiedKFold(5, shuffle=True, random_state=0)
proba["five folds"] = cross_val_predict(clf, X, given, cv=folds, method="predict_proba")
seconds["five folds"] = time.perf_counter() - start
proba["in the sample"] = clf.predict_proba(X)  # by the model that saw the image, with its label


# %%
# The smaller the probability of the label that was given, the more suspicious it is. How well this finds the wrong
# labels is the area under the ROC curve.
def confidence(probabilities):
    return probabilities[np.arange(len(given)), given]


area = {name: roc_auc_score(wrong, -confidence(values)) for name, values in proba.items()}
for name, value in area.items():
    print(f"{name:13}  area {value:.3f}", f"  {seconds[name]:.1f} s" if name in seconds else "")

# %%
# cleanlab says how many of them are issues: it compares each probability with what is usual for its class, and names
# few that are not. Where cleanlab is not installed we take all images for which another class is more probable, the
# plainest of its own filters, in the same order.
if find_label_issues is None:
    suspects = np.flatnonzero(proba["leave-one-out"].argmax(1) != given)
    suspects = suspects[np.argsort(confidence(proba["leave-one-out"])[suspects])]
    by = "the class that is most probable"
else:
    suspects = find_label_issues(given, proba["leave-one-out"], return_indices_ranked_by="self_confidence", n_jobs=1)
    by = "cleanlab"
found = wrong[suspects].sum()
print(f"by {by}: {len(suspects)} suspects, {found} of the {wrong.sum()} wrong labels among them")

# %%
# The most suspicious images.
says = proba["leave-one-out"].argmax(1)
fig, axes = plt.subplots(2, 8, figsize=(11, 3.5), layout="constrained")
for ax in axes.flat:
    ax.set_axis_off()
for ax, i in zip(axes.flat, suspects, strict=False):
    ax.imshow(X[i].reshape(8, 8), cmap="gray_r")
    ax.set_title(f"label {given[i]}, says {says[i]}", color="tab:red" if wrong[i] else "black", fontsize=10)
fig.suptitle(f"Suspects by {by}, the worst first (red: the label is wrong)")
path = Path(sys.argv[0]).parent / "output" / "cleanlab.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert area["leave-one-out"] > 0.95, "leave-one-out should find the wrong labels"
assert area["leave-one-out"] > area["five folds"] - 0.02, "it should not be worse than a cross-validation"
assert seconds["leave-one-out"] < seconds["five folds"], "one fit should take less time than five"
assert found > 0.6 * max(wrong.sum(), len(suspects)), "most suspects should be wrong labels, and most of these found"
