"""
DINOv2, from a folder of photographs to predictions
===================================================

DINOv2 was trained on photographs without labels, so it knows things that ImageNet has no names for. Its weights are
on the hub of Hugging Face. With them the whole way is::

    pip install "sklearn-lqf[hf]"

    from sklearn_lqf import LQFClassifier, load_image_folder

    photos = load_image_folder("photos")  # photos/cat/001.jpg, photos/dog/017.jpg, ...
    clf = LQFClassifier("hf:facebook/dinov2-small", image_size=224).fit(photos.paths, photos.target)
    print(photos.target_names[clf.predict(["new.jpg"])[0]])

This page is made without a network. It goes the same way with a small DINOv2 of random weights, so its accuracy says
nothing of the real one.
"""

import os
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from sklearn_lqf import LQFClassifier, PriorDisplay, load_image_folder

try:
    import transformers
except ImportError:
    transformers = None

# %%
# A folder of photographs, with a sub-folder for each class: cut-outs of a temple and of a flower.
folder = tempfile.TemporaryDirectory()
SIDE = 112
rng = np.random.default_rng(0)
for name, photograph in zip(("temple", "flower"), load_sample_images().images, strict=True):
    path = Path(folder.name, "photos", name)
    path.mkdir(parents=True)
    height, width = photograph.shape[:2]
    for i in range(40):
        top, left = rng.integers(0, height - SIDE), rng.integers(0, width - SIDE)
        Image.fromarray(photograph[top : top + SIDE, left : left + SIDE]).save(path / f"{i:02d}.png")

# %%
# A folder with a model, as ``save_pretrained`` writes it and as the hub has it: a configuration, weights, and what the
# image processor does. It has four blocks of 64 numbers, where the small DINOv2 has twelve of 384. Without transformers
# the same network comes from timm, ``"timm:vit_small_patch14_dinov2"`` with its weights.
torch.manual_seed(0)
if transformers is None:
    options = {"img_size": SIDE, "depth": 4, "embed_dim": 64, "num_heads": 4}
    backbone = timm.create_model("vit_small_patch14_dinov2", pretrained=False, **options)
else:
    transformers.utils.logging.disable_progress_bar()
    config = transformers.Dinov2Config(
        image_size=SIDE, patch_size=14, hidden_size=64, num_hidden_layers=4, num_attention_heads=4
    )
    transformers.Dinov2Model(config).save_pretrained(Path(folder.name, "dinov2-tiny"))
    Path(folder.name, "dinov2-tiny", "preprocessor_config.json").write_text(
        '{"image_processor_type": "BitImageProcessor", "do_normalize": true, "resample": 3, '
        '"crop_size": {"height": 112, "width": 112}, "do_center_crop": true, '
        '"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}'
    )
    backbone = f"hf:{folder.name}/dinov2-tiny"  # a folder, or the name of a repository on the hub

# %%
# From here on it is as above. Half of the photographs are held out.
photos = load_image_folder(Path(folder.name, "photos"))
clf = LQFClassifier(backbone, image_size=SIDE, random_state=0)
clf.fit(photos.paths[::2], photos.target[::2])
paths, target = photos.paths[1::2], photos.target[1::2]
accuracy = clf.score(paths, target)
print(f"{clf.coef_.shape[1]} features in {len(clf.prior_)} groups, accuracy {accuracy:.3f} with random weights")

# %%
# What is read of the network: the vector at its end, and what its layers read on the way.
fig = plt.figure(figsize=(10, 4), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=[4, 5])
proba = clf.predict_proba(paths)
shown = [*range(4), *range(len(paths) - 4, len(paths))]
for ax, i in zip(left.subplots(2, 4).flat, shown, strict=True):
    ax.imshow(Image.open(paths[i]))
    ax.set(xticks=[], yticks=[])
    right_class = proba[i].argmax() == target[i]
    ax.set_title(
        f"{photos.target_names[proba[i].argmax()]} {proba[i].max():.2f}",
        color="black" if right_class else "tab:red",
        fontsize=9,
    )
left.suptitle("Held-out photographs")
PriorDisplay.from_estimator(clf, ax=right.subplots(), name="")
right.suptitle("What the model reads of the network")
path = Path(sys.argv[0]).parent / "output" / "dinov2.png"
path.parent.mkdir(exist_ok=True)
fig.savefig(path, dpi=120)
print(f"figure: {os.path.relpath(path)}")
folder.cleanup()

assert len(clf.prior_) > 8, "tokens and blocks should be read, not the last features alone"
assert accuracy > 0.7, "even random weights tell a temple from a flower"
