"""The examples run, and what each of them asserts at its end holds; README's program with a DINOv2."""

import functools
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image
from support.data import make_images

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("plot_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(tmp_path / script.name)])  # figures are put beside it
    try:
        exec(compile(script.read_text(encoding="utf-8"), script, "exec"), {"__name__": "__main__"})
    finally:
        plt.close("all")
    assert list((tmp_path / "output").iterdir())


@pytest.mark.slow
def test_newcomer(tmp_path, monkeypatch, capsys):
    """README's program, on a folder and with a DINOv2 of one block and random weights in the place of its own."""
    timm = pytest.importorskip("timm", minversion="1.0.9")
    for i, (image, label) in enumerate(zip(*make_images(4, size=32, n_classes=2), strict=True)):
        path = tmp_path / "photos" / label / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.repeat(image, 1 + i, axis=1)).save(path)
        Image.fromarray(image).save(tmp_path / f"new{i}.jpg")
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    with torch.random.fork_rng(devices=[]):
        state = timm.create_model("vit_small_patch14_dinov2").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *args, **options: state)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    exec(next(block for block in blocks if "dinov2" in block), {})
    assert [line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["new1.jpg", "new2.jpg"]
