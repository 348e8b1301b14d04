"""
Images beside a table
=====================

An image is often one column of a table: the path of a file, beside numbers that say something else. A stack of two
models, each with its own columns, reads both. Each part is a pipeline of scikit-learn, so that all of scikit-learn's
tools work on it.
"""

import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from PIL import Image
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_digits
from sklearn.ensemble import StackingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sklearn_lqf import ImageReader, LQFClassifier

# %%
# Parcels of ten kinds. A file shows the digit on each, but for the lower half of one in two labels, which is torn off.
# A scale shows the digit with an error of 0.7; a switch tells odd from even, and is wrong once in ten times.
folder = tempfile.TemporaryDirectory()
pixels, y = load_digits(return_X_y=True)
rng = np.random.default_rng(0)
chosen = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:24] for k in range(10)])
pixels, y = pixels[chosen] * (255 / 16), y[chosen]
pixels[rng.random(len(y)) < 0.5, 32:] = 0
paths = [os.path.join(folder.name, f"{i:03d}.png") for i in range(len(y))]
for path, row in zip(paths, pixels, strict=True):
    Image.fromarray(row.astype(np.uint8).reshape(8, 8)).save(path)
table = pd.DataFrame(
    {"file": paths, "scale": y + rng.normal(0, 0.7, len(y)), "odd": (y % 2) ^ (rng.random(len(y)) < 0.1)}
)
learn = np.arange(len(y)) % 24 < 8  # 8 parcels of each kind, and 16 to test on
train, test = table[learn], table[~learn]
print(train.assign(file=train["file"].map(os.path.basename), kind=y[learn])[::20].to_string(index=False))

# %%
# A model for each kind of column. ``ImageReader`` turns the column of paths into one array of images. The final model
# reads probabilities, which needs little penalty.
images = make_pipeline(
    make_column_transformer(("passthrough", ["file"])), ImageReader(image_size=64, interpolation="bicubic")
)
memory = {"memory": folder.name}  # all fits share the activations of the trunk
clf = LQFClassifier("efficientnet_lite0", execution=memory)
numbers = make_pipeline(make_column_transformer((StandardScaler(), ["scale", "odd"])), LogisticRegression())
stack = StackingClassifier(
    [("table", numbers), ("images", make_pipeline(images, clf))], final_estimator=LogisticRegression(C=30), cv=3
)
stack.fit(train, y[learn])
models = {**stack.named_estimators_, "both": stack}
predicted = {name: model.predict(test) for name, model in models.items() if name != "drop"}
accuracy = {name: np.mean(labels == y[~learn]) for name, labels in predicted.items()}
print("accuracy:", ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items()))

# %%
# A search that stands behind the reader decodes each file once, for all of its candidates and folds.
priors = ["last", "leave-one-out"]
search = make_pipeline(images, GridSearchCV(clf, {"prior": priors}, cv=2)).fit(train, y[learn])
for prior, score in zip(priors, search[-1].cv_results_["mean_test_score"], strict=True):
    print(f"prior={prior!r}: accuracy {score:.3f} with half of the parcels")

# %%
# What the table adds: parcels that the images alone get wrong and the stack gets right, one of a kind.
saved = np.flatnonzero((predicted["images"] != y[~learn]) & (predicted["both"] == y[~learn]))
saved = saved[np.unique(y[~learn][saved], return_index=True)[1]]
fig = plt.figure(figsize=(10, 3.2), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[2, 3])
ax = left.subplots()
bars = ax.barh(list(accuracy), list(accuracy.values()), color=["tab:gray", "tab:blue", "tab:green"])
ax.bar_label(bars, fmt="%.3f", padding=-36, color="white")
ax.set(xlim=(0, 1), xlabel="accuracy")
left.suptitle(f"{len(train)} parcels to learn from")
for ax, i in zip(right.subplots(1, 4), saved, strict=False):
    row = test.iloc[i]
    ax.imshow(Image.open(row["file"]), cmap="gray_r")
    ax.set(xticks=[], yticks=[], xlabel=f"scale {row['scale']:.1f}, {'odd' if row['odd'] else 'even'}")
    ax.set_title(f"image alone: {predicted['images'][i]}\nboth: {predicted['both'][i]}", fontsize=10)
right.suptitle("Wrong by the image alone, right by both")
path = Path(sys.argv[0]).parent / "output" / "pipelines.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")
folder.cleanup()

assert accuracy["both"] > max(accuracy["table"], accuracy["images"]) + 0.05, "both should know more than each alone"
