"""
Serving a model without this package
====================================

``to_module`` makes one module of torch of a fitted estimator: in go pixels, out come the outputs. ``torch.export``
makes a file of it that needs torch alone, and ONNX one that needs not even torch.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_sample_images

from sklearn_lqf import LQFClassifier

try:
    import onnx  # noqa: F401
    import onnxruntime  # pip install "sklearn-lqf[onnx]" onnxruntime
    import onnxscript  # noqa: F401
except ImportError:
    onnxruntime = None

# %%
# Cut-outs of two photographs, a Chinese temple and a flower: from which of them is a piece?
SIDE = 96
photographs = load_sample_images().images
rng = np.random.default_rng(0)


def pieces(photograph, n):
    height, width = photograph.shape[:2]
    corners = zip(rng.integers(0, height - SIDE, n), rng.integers(0, width - SIDE, n), strict=True)
    return np.stack([photograph[i : i + SIDE, j : j + SIDE] for i, j in corners])


X = np.concatenate([pieces(photograph, 30) for photograph in photographs])
y = np.repeat(["temple", "flower"], 30)
clf = LQFClassifier().fit(X[::2], y[::2])
X_test, y_test = X[1::2], y[1::2]
expected = clf.decision_function(X_test)
print(f"accuracy {clf.score(X_test, y_test):.2f}, {len(X_test)} pieces")

# %%
# The module takes pixels in [0, 1], channels first, of the size of the model. The class is that of the largest output;
# probabilities are the softmax over ``temperature_``. Save these with it, and what resizes the images.
module = clf.to_module()
pixels = torch.from_numpy(X_test).permute(0, 3, 1, 2).contiguous().float() / 255
with torch.no_grad():
    outputs = module(pixels)
print("outputs", tuple(outputs.shape), "classes", clf.classes_, f"temperature {clf.temperature_:.3f}")

# %%
# A program of torch.export, for any number of images, in a file. The process that loads it needs torch, and neither
# scikit-learn nor this package: here is one that has nothing else.
folder = tempfile.TemporaryDirectory()
file, given, result = (os.path.join(folder.name, name) for name in ("model.pt2", "pixels.pt", "outputs.pt"))
batch = torch.export.Dim("batch", min=1, max=256)
program = torch.export.export(module, (pixels[:2],), dynamic_shapes=({0: batch},), strict=False)
torch.export.save(program, file)
torch.save(pixels, given)
server = """
import sys, torch
_, file, given, result = sys.argv
torch.save(torch.export.load(file).module()(torch.load(given)), result)
assert not {"sklearn", "sklearn_lqf", "timm"} & set(sys.modules)
"""
subprocess.run([sys.executable, "-c", server, file, given, result], check=True)
served = torch.load(result)
print(f"model.pt2 {os.path.getsize(file) / 2**20:.1f} MiB, largest difference {(served - outputs).abs().max():.1e}")
assert torch.allclose(served, outputs, atol=1e-5)


# %%
# An ONNX file, where the packages for it are installed, beside the others.
def without_gradient(call):
    def run(images):
        with torch.no_grad():
            return call(images).numpy()

    return run


run = {
    "estimator": lambda images: clf.decision_function(X_test[: len(images)]),
    "module": without_gradient(module),
    "torch.export": without_gradient(torch.export.load(file).module()),
}
if onnxruntime is None:
    print('no ONNX here: pip install "sklearn-lqf[onnx]" onnxruntime')
else:
    onnx_file = os.path.join(folder.name, "model.onnx")
    torch.onnx.export(module, (pixels[:2],), onnx_file, dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_file, settings, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    run["onnxruntime"] = lambda images: session.run(None, {name: images.numpy()})[0]

# %%
# Milliseconds for one image, alone and in a batch of 16: the fastest of several calls.
SIZES = (1, 16)
milliseconds = {kind: [] for kind in run}
for kind, call in run.items():
    for n in SIZES:
        times = []
        for _ in range(7):
            start = time.perf_counter()
            call(pixels[:n])
            times.append(time.perf_counter() - start)
        milliseconds[kind].append(1000 * min(times) / n)
    print(
        f"{kind:12} ",
        ", ".join(f"{ms:.1f} ms in a batch of {n}" for ms, n in zip(milliseconds[kind], SIZES, strict=True)),
    )

# %%
# Some of the pieces with what the served program says, and the times.
fig = plt.figure(figsize=(10, 3.4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[4, 5])
says = clf.classes_[served.argmax(1).numpy()]
proba = (served / clf.temperature_).softmax(1).amax(1)
contrast = X_test.std((1, 2, 3))
shown = np.concatenate(
    [np.flatnonzero(y_test == k)[contrast[y_test == k].argsort()[-4:]] for k in ("temple", "flower")]
)
for ax, i in zip(left.subplots(2, 4).flat, shown, strict=True):
    ax.imshow(X_test[i])
    ax.set(xticks=[], yticks=[])
    ax.set_title(f"{says[i]} {proba[i]:.2f}", fontsize=9)
left.suptitle("Answers of the served program")
ax = right.subplots()
for k, n in enumerate(SIZES):
    places = np.arange(len(run)) + 0.38 * (k - 0.5)
    bars = ax.barh(places, [ms[k] for ms in milliseconds.values()], 0.36, label=f"batches of {n}")
    ax.bar_label(bars, fmt="%.0f", padding=3)
ax.set(yticks=range(len(run)), yticklabels=run, xlabel="milliseconds an image")
ax.invert_yaxis()
ax.margins(x=0.12)
ax.spines[["top", "right"]].set_visible(False)
ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
right.suptitle(f"Time, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}")
path = Path(sys.argv[0]).parent / "output" / "serving.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")

# %%
# All give the outputs of the estimator, but for rounding. For two classes its decision values are the differences of
# both outputs, as everywhere in scikit-learn.
for kind in [*run][1:]:
    found = run[kind](pixels)
    assert np.allclose(found, outputs, atol=1e-4), kind
    assert np.allclose(found[:, 1] - found[:, 0], expected, atol=1e-4), kind
folder.cleanup()
assert (says == clf.predict(X_test)).all(), "what is served should answer like the estimator"
