"""
Quick start: digits by a network that was trained on photographs
================================================================

EfficientNet-Lite0, with the ImageNet weights that a package carries, learns scikit-learn's digits from 20 images
of each: a linear probe (ridge regression on its last features) beside the linearized network (LQF). The same
estimator then lives in a Pipeline, in a grid search over its L2 penalty, and in a pickle.
"""

import os
import pickle
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from sklearn_lqf import LQFClassifier, PriorDisplay

# %%
# 20 images of each digit to learn from, all others to test on. Pixels are 0..16 in the original.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)  # raveled rows, (n, 64)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:20] for k in range(10)])
test = np.setdiff1d(np.arange(len(y)), train)

# %%
# Fit, and a linear probe on the last features of the same network.
clf = LQFClassifier(backbone="efficientnet_lite0", image_shape=(8, 8), image_size=64)
start = time.perf_counter()
clf.fit(X[train], y[train])
seconds = time.perf_counter() - start
accuracy = clf.score(X[test], y[test])
last = clone(clf).set_params(tangents=None).fit(X[train], y[train])
probe = RidgeClassifierCV(alphas=np.logspace(-4, 4, 17)).fit(last.features(X[train]), y[train])
probe_accuracy = probe.score(last.features(X[test]), y[test])
print(f"ridge linear probe  accuracy {probe_accuracy:.3f}")
print(
    f"LQF                 accuracy {accuracy:.3f}   {clf.coef_.shape[1]} features in {len(clf.prior_)} groups, "
    f"{seconds:.0f} s for {len(train)} images"
)

# %%
# In a Pipeline: whatever ends in pixels may come before it.
pipeline = make_pipeline(FunctionTransformer(lambda rows: 255 - rows), clone(clf))
few, some = train[::2], test[:200]
print(f"Pipeline (inverted) accuracy {pipeline.fit(X[few], y[few]).score(X[some], y[some]):.3f}   10 images a digit")

# %%
# In a grid search: a numeric ``alpha`` is relative, one grid serves every backbone.
fewer = train[::4]
search = GridSearchCV(clf, {"alpha": [0.01, 1]}, cv=StratifiedKFold(2))
search.fit(X[fewer], y[fewer])
print(f"GridSearchCV        accuracy {search.best_score_:.3f}   cross-validated, alpha={search.best_params_['alpha']}")

# %%
# Through a pickle: equal predictions, bit by bit.
twin = pickle.loads(pickle.dumps(clf))
assert np.array_equal(twin.predict_proba(X[some]), clf.predict_proba(X[some]))
print("pickle              equal predictions")

# %%
# Test images with their probabilities, and what is read of the network: the learned prior over its depth.
proba = clf.predict_proba(X[some])
shown = np.r_[np.flatnonzero(proba.argmax(1) == y[some])[:5], np.flatnonzero(proba.argmax(1) != y[some])[:3]]
fig = plt.figure(figsize=(13, 4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[8, 5])
axes = left.subplots(2, 8, squeeze=False, height_ratios=[1, 3])
for i, (image_ax, bar_ax) in zip(shown, axes.T, strict=False):
    image_ax.imshow(X[some][i].reshape(8, 8), cmap="gray_r")
    image_ax.set(xticks=[], yticks=[], title=f"true {y[some][i]}")
    colors = ["tab:green" if k == y[some][i] else "tab:gray" for k in range(10)]
    bar_ax.barh(np.arange(10), proba[i], color=colors)
    bar_ax.set(xlim=(0, 1), xticks=[0, 1], yticks=range(10), ylim=(9.5, -0.5))
left.suptitle("Test images and predicted probabilities (last three: errors)")
PriorDisplay.from_estimator(clf, ax=right.subplots(), name="")
right.suptitle("What the model reads of the network")
path = Path(sys.argv[0]).parent / "output" / "quickstart.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure              {os.path.relpath(path)}")

assert accuracy > probe_accuracy + 0.03, "LQF should be clearly above the linear probe"
assert clf.prior_["last"] < 0.5, "digits are far from photographs: most should be read from the layers before the last"
