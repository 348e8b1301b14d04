"""Folders of images: which files are found, of which class, and every folder that is not as it should be."""

import numpy as np
import pytest
import torch
from support.data import tiny_net
from support.images import as_files, encoded, whole

from sklearn_lqf import ImageReader, LQFClassifier, load_image_folder


@pytest.fixture
def folder(color, tmp_path):
    """Two classes of three images, one of which has images in a folder within it, and what is to be ignored."""
    root = tmp_path / "data"
    for name, images in (("dog", color[3:6]), ("cat", color[:2]), ("cat/old", color[2:3])):
        (root / name).mkdir(parents=True)
        as_files(images, root / name)
    (root / "cat" / "1.png").rename(root / "cat" / "1.PNG")
    for hidden in (".git", "cat/.cache"):
        (root / hidden).mkdir()
        as_files(color[:1], root / hidden)
    (root / "cat" / "._0.png").write_bytes(b"what some systems leave behind")
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "README.txt").write_text("no image")
    return root


@pytest.mark.parametrize("n_jobs", [None, 2])
def test_paths_and_classes(folder, color, n_jobs):
    data = load_image_folder(folder, n_jobs=n_jobs)
    assert data.target_names == ["cat", "dog"]
    assert data.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path[len(str(folder)) + 1 :] for path in data.paths.tolist()] == [
        "cat/0.png", "cat/1.PNG", "cat/old/0.png", "dog/0.png", "dog/1.png", "dog/2.png"
    ]  # fmt: skip
    assert torch.equal(whole(data.paths), whole(color[:6]))
    paths, target = load_image_folder(str(folder), return_X_y=True, broken="ignore")
    assert np.array_equal(paths, data.paths)
    assert np.array_equal(target, data.target)
    assert ImageReader(4).fit_transform(data.paths).shape == (6, 4, 4, 3)


def test_images_of_several_sizes_are_fitted(folder, color):
    for index in range(3):
        (folder / "cat" / f"wide{index}.png").write_bytes(encoded(np.repeat(color[index], 1 + index, axis=1)))
    net = tiny_net()
    net.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.5,) * 3}
    data = load_image_folder(folder)
    clf = LQFClassifier(net).fit(data.paths, data.target)
    assert np.array_equal(clf.predict(data.paths.tolist()), clf.predict(data.paths))


def test_some_classes_and_extensions(folder, color):
    (folder / "dog" / "3.jpg").write_bytes(encoded(color[6], "jpeg"))
    data = load_image_folder(folder, categories=["dog", "cat"], extensions=["JPG", ".png"])
    assert len(data.paths) == 7
    with pytest.warns(UserWarning, match="one class, 'dog'; a classifier needs two"):
        assert len(load_image_folder(folder, categories=["dog"]).paths) == 4
    with pytest.warns(UserWarning) as caught:
        assert load_image_folder(folder, extensions=[".jpg"]).target_names == ["dog"]
    assert {str(w.message).partition(" ")[0] for w in caught} == {"1", "All"}


def test_broken_files_are_named_together(folder, color):
    for index in range(12):
        (folder / "cat" / f"x{index:02}.png").write_bytes(b"no image" if index % 2 else encoded(color[0])[:-50])
    with pytest.raises(ValueError, match=r"(?s)^12 of 18 files .*x00\.png.*x09\.png.*and 2 more.*broken='skip'"):
        load_image_folder(folder)
    with pytest.warns(UserWarning, match=r"(?s)^12 of 18 files .*are left out:.*x00\.png.*none that Pillow knows"):
        data = load_image_folder(folder, broken="skip")
    assert data.target.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(load_image_folder(folder, broken="ignore").paths) == 18
    with pytest.raises(ValueError, match=r"(?s)At least 10 elements of X cannot be used.*x00\.png"):
        whole(load_image_folder(folder, broken="ignore").paths)


def test_what_is_left_out_is_said(folder, color):
    with pytest.warns(UserWarning, match=r"one class, 'data'.*If its sub-folders are the classes, pass that folder"):
        assert load_image_folder(folder.parent).target_names == ["data"]
    (folder / "empty").mkdir()
    as_files(color[:1], folder)
    with pytest.warns(UserWarning) as caught:
        assert load_image_folder(folder).target_names == ["cat", "dog"]
    found = sorted(str(w.message) for w in caught)
    assert "1 images in" in found[0] and "lie in the folder of their class" in found[0]
    assert "1 sub-folders" in found[1] and "'empty'" in found[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"no image in its 0 sub-folders, each of which is to be a class\. Extensions.*\.jpg"),
        (["a.png", "b.png"], r"no image in its 0 sub-folders.*but 2 in itself: images lie in the folder of their"),
        (["class/readme.txt", "class/.hidden.png"], "no image in its 1 sub-folders"),
        (["class/broken.png"], "no image that can be decoded"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_folders_without_images(tmp_path, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=message):
        load_image_folder(tmp_path, broken="skip")


@pytest.mark.parametrize(
    ("parameters", "error", "message"),
    [
        ({"path": "gone"}, FileNotFoundError, "'gone' is no folder"),
        ({"categories": ["cat", "cow"]}, ValueError, r"names \['cow'\], but the sub-folders .* are \['cat', 'dog'\]"),
        ({"categories": "cat"}, ValueError, "must be a sequence of names"),
        ({"extensions": ".png"}, ValueError, "must be a sequence of str"),
        ({"extensions": []}, ValueError, "must be a sequence of str"),
        ({"broken": "drop"}, ValueError, r"must be one of \['raise', 'skip', 'ignore'\], got 'drop'"),
        ({"n_jobs": 0}, ValueError, "n_jobs must be"),
    ],
)
def test_bad_parameters(folder, parameters, error, message):
    with pytest.raises(error, match=message):
        load_image_folder(**{"path": folder, **parameters})
