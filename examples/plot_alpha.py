"""
Choosing the penalty without a validation set
=============================================

With few images none can be spared for validation. Leave-one-out uses all of them, and for a linear model it is known in
closed form: one fit scores a whole path of penalties.
"""

import os
import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from sklearn_lqf import LQFClassifier, LQFClassifierCV, RegularizationPathDisplay

# %%
# 8 images of each digit to learn from, of which one in ten has a wrong label: a fit should not follow them all. 300
# others only the last figure sees.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
train = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:8] for k in range(10)])
test = rng.permutation(np.setdiff1d(np.arange(len(y)), train))[:300]

given = y[train].copy()
wrong = rng.permutation(len(train))[:8]
given[wrong] = (given[wrong] + rng.integers(1, 10, 8)) % 10

# %%
# The mean squared error of leave-one-out, for nine penalties.
options = {"image_shape": (8, 8), "image_size": 64}
clf = LQFClassifierCV("efficientnet_lite0", **options).fit(X[train], given)
print(f"chosen: alpha = {clf.best_alpha_:g}, mean squared error {-clf.best_score_:.4f}")

# %%
# What leave-one-out saw, beside the error on images that nobody had. Features of an image do not depend on the penalty.
onehot, features = np.eye(10)[y[test]], clf.features(X[test])
alphas = clf.cv_results_["alpha"]
errors = []
for alpha in alphas:
    single = LQFClassifier("efficientnet_lite0", alpha=alpha, **options).fit(X[train], given)
    outputs = features @ single.coef_.T + single.intercept_
    errors.append(((outputs - onehot) ** 2).mean())
display = RegularizationPathDisplay.from_estimator(clf)
display.ax_.plot(alphas, -np.array(errors), "--", color="tab:gray", label="test images, right labels")
display.ax_.legend()
path = Path(sys.argv[0]).parent / "output" / "alpha.png"
path.parent.mkdir(exist_ok=True)
display.figure_.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert errors[clf.best_index_] < 1.02 * min(errors), "the choice should be near the best on test images"
