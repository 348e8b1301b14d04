"""
Searching for similar images
============================

Which images are like this one? Nearest neighbors in the features of a network answer, but the last features are made
for the classes of ImageNet. ``ImageFeatures`` reads all depths of the network, and scales each by how much it counts
for some labelled images. These may be of other classes than those that are searched.
"""

import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors

from sklearn_lqf import ImageFeatures

# %%
# 10 labelled images of each of the digits 0 to 4, and a collection of 40 of each of the digits 5 to 9, whose labels are
# only used to see how well the search does.
X, y = load_digits(return_X_y=True)
X = (X * (255 / 16)).astype(np.uint8)
rng = np.random.default_rng(0)
labelled = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:10] for k in range(5)])
collection = np.concatenate([rng.permutation(np.flatnonzero(y == k))[:40] for k in range(5, 10)])
X_found, y_found = X[collection], y[collection]

# %%
# These are transformers of scikit-learn. The first learns from the labels what counts; the second takes all depths
# alike, and the third has the last features alone.
transformers = {
    "tuned features": ImageFeatures(prior="leave-one-out", image_shape=(8, 8)),
    "all depths alike": ImageFeatures(image_shape=(8, 8)),
    "last features": ImageFeatures(tangents=None, image_shape=(8, 8)),
}
neighbors, precision = {}, {}
for name, transformer in transformers.items():
    transformer.fit(X[labelled], y[labelled])
    features = transformer.transform(X_found)
    search = NearestNeighbors(n_neighbors=5).fit(features)
    neighbors[name] = search.kneighbors(return_distance=False)  # of each image, without itself
    precision[name] = np.mean(y_found[neighbors[name]] == y_found[:, None])
    print(f"{name}: {features.shape[1]} columns, {precision[name]:.1%} of the five nearest have the same digit")

# %%
# A new image is searched for in the same way.
query = X[np.setdiff1d(np.flatnonzero(y == 7), collection)[:1]]
search = NearestNeighbors(n_neighbors=5).fit(transformers["tuned features"].transform(X_found))
print("a 7:", y_found[search.kneighbors(transformers["tuned features"].transform(query), return_distance=False)])

# %%
# One image of each digit, the first for which the two searches find differently many of the same digit.
same = {name: (y_found[found] == y_found[:, None]).sum(1) for name, found in neighbors.items()}
differ = same["tuned features"] != same["last features"]
shown = [np.flatnonzero((y_found == k) & differ)[0] for k in range(5, 10)]
fig = plt.figure(figsize=(11, 5.6), layout="constrained")
left, *panels = fig.subfigures(1, 3, width_ratios=[1.15, 5, 5])
left.suptitle("image")


def draw(ax, i, color):
    ax.imshow(X_found[i].reshape(8, 8), cmap="gray_r")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(color=color, linewidth=2.5)


for ax, i in zip(left.subplots(5, 1), shown, strict=True):
    draw(ax, i, "black")
for panel, name in zip(panels, ("tuned features", "last features"), strict=True):
    panel.suptitle(f"nearest by {name} (all images: {precision[name]:.0%} right)")
    for row, i in zip(panel.subplots(5, 5), shown, strict=True):
        for ax, j in zip(row, neighbors[name][i], strict=True):
            draw(ax, j, "tab:green" if y_found[j] == y_found[i] else "tab:red")
path = Path(sys.argv[0]).parent / "output" / "similar_images.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

assert precision["tuned features"] > precision["last features"] + 0.05, "tuned features should find more of the same"
