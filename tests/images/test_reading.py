"""Every form of X gives the same tensors, of the size asked for, with any number of threads."""

import itertools
import os
import threading
import tracemalloc
import warnings
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from support.images import Pairs, as_files, as_pil, every_form, whole
from torchvision.transforms import v2

from sklearn_lqf.images.reading import ImageInputs
from sklearn_lqf.images.sources import is_image_input

N, H, W = 7, 9, 12

# ----------------------------------------------------------------------------------- equal pixels give equal bits


@pytest.mark.parametrize(
    ("kind", "in_channels", "image_size", "interpolation", "n_jobs"),
    [
        ("color", 3, None, "bilinear", 2),
        ("color", 3, (5, 17), "bicubic", 3),
        ("gray", 3, 20, "bilinear", None),
        ("gray", 1, (20, 8), "nearest", 1),
    ],
)
def test_every_form_gives_the_same_bits(request, tmp_path, kind, in_channels, image_size, interpolation, n_jobs):
    images = request.getfixturevalue(kind)
    options = {"image_size": image_size, "interpolation": interpolation, "in_channels": in_channels}
    expected = whole(images, **options)
    assert (expected.dtype, expected.is_contiguous(), expected.device.type) == (torch.float32, True, "cpu")
    for name, X, form in every_form(images, tmp_path):
        inputs = ImageInputs(X, n_jobs=n_jobs, **options, **form)
        assert is_image_input(X, form.get("image_shape")), name
        assert len(inputs) == N, name
        assert inputs.image_shape[:2] == (H, W), name
        assert torch.equal(inputs.batch(0, N), expected), name
        assert torch.equal(inputs.batch(2, 4), expected[2:4]), name


def test_values(color, gray, rng):
    assert torch.equal(whole(color), torch.from_numpy(color).permute(0, 3, 1, 2).to(torch.float32) / 255)
    batch = whole(gray)  # channels are repeated
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert torch.equal(whole(gray, in_channels=1), batch[:, :1])
    assert whole(gray, in_channels=5).shape == (N, 5, H, W)
    X = rng.random((N, H, W, 5), dtype=np.float32)
    before = X.copy()
    found = whole(X, in_channels=5)
    np.testing.assert_array_equal(found, before.transpose(0, 3, 1, 2))
    found.zero_()  # shares no memory with the input
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half a unit in the last place of the coarser of the two types.
    [("float64", 2.0**-24), (">f4", 2.0**-24), ("float16", 2.0**-12)],
)
def test_floats_agree_with_uint8(color, dtype, tolerance):
    X = (color / 255).astype(dtype)
    mixed = [image if i % 2 else x for i, (image, x) in enumerate(zip(color, X, strict=True))]
    for form in (X, list(X), mixed, X.reshape(N, -1), X.tolist(), X.reshape(N, -1).tolist()):
        torch.testing.assert_close(whole(form, image_shape=(H, W, 3)), whole(color), rtol=0, atol=tolerance)
    if dtype != ">f4":
        assert torch.equal(whole(torch.from_numpy(X).requires_grad_()), whole(X))


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_batches_are_slices_of_the_whole_in_any_order(color, tmp_path, n_jobs):
    expected = whole(color, image_size=(20, 7))
    for X in (color, as_pil(color), as_files(color, tmp_path)):
        inputs = ImageInputs(X, image_size=(20, 7), n_jobs=n_jobs)
        for start, stop in [*((a, a + 2) for a in range(0, N, 2)), (0, 3), (3, 5), (1, 4), (5, 100), (-2, N), (0, N)]:
            assert torch.equal(inputs.batch(start, stop), expected[start:stop])
        assert inputs.batch(3, 3).shape == inputs.batch(5, 2).shape == (0, 3, 20, 7)


def test_read_only_memmap(color, tmp_path):
    X = (color / 255).astype(np.float32)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors over read-only memory
        for form, size in itertools.product((mapped, mapped.reshape(N, -1), list(mapped)), (None, 5)):
            assert torch.equal(whole(form, image_shape=(H, W, 3), image_size=size), whole(X, image_size=size))


# ------------------------------------------------------------------------------------------- shapes and resizing


def test_image_shape_is_that_of_the_images_as_given(color, gray, tmp_path):
    for X, shape in ((color, (H, W, 3)), (list(color), (H, W, 3)), (gray, (H, W, 1)), (list(gray), (H, W, 1))):
        for options in ({}, {"image_shape": shape}, {"image_shape": np.array(shape)}):
            inputs = ImageInputs(X, image_size=30, **options)
            assert (inputs.image_shape, inputs.size, inputs.n_features) == (shape, (30, 30), np.prod(shape))
        assert ImageInputs(X).size == (H, W)
    assert ImageInputs(color, image_size=np.array([5, 6]), n_jobs=np.int64(1)).size == (5, 6)
    assert ImageInputs(color.transpose(0, 3, 1, 2), channel_axis=0).image_shape == (H, W, 3)
    for channels, X in itertools.product((1, 3), (as_pil(color), as_files(color, tmp_path))):
        assert ImageInputs(X, in_channels=channels, image_shape=(H, W)).image_shape == (H, W, channels)
    with pytest.raises(ValueError, match=r"X\[0\] is 9x12 \(height x width\), but image_shape=\(12, 9\)"):
        ImageInputs(as_pil(color), image_shape=(W, H)).batch(0, 1)


@pytest.mark.parametrize(("size", "columns"), [(20, slice(5, 15)), ((20, 8), slice(8, 12))])
def test_covers_then_center_crops(rng, size, columns):
    # Nearest, by a factor of 2: 20 x 40, of which the 20 or 8 columns in the middle are kept.
    X = rng.integers(0, 256, (2, 10, 20, 3), dtype=np.uint8)
    expected = whole(X)[:, :, :, columns].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(whole(X, image_size=size, interpolation="nearest"), expected)
    assert torch.equal(whole(X, image_size=(10, 20), interpolation="bicubic"), whole(X))
    X = np.pad(np.full((1, 8, 8), 255, dtype=np.uint8), ((0, 0), (4, 4), (4, 4)))  # edges at which bicubic overshoots
    batch = whole(X, image_size=33, interpolation="bicubic")
    assert (batch.min(), batch.max()) == (0, 1)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 64), (31, 3), (224, 64)])
def test_result_has_exactly_the_size_asked_for(rng, height, width):
    X = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(1, 1), (13, 5), (37, 91), (64, 64)]]
    batch = whole(X, image_size=(height, width))
    assert batch.shape == (4, 3, height, width)
    for index, image in enumerate(X):
        assert torch.equal(batch[index], whole(image[None], image_size=(height, width))[0])


@pytest.mark.parametrize("shape", [(10, 17), (31, 8), (9, 9)])
@pytest.mark.parametrize("size", [5, 16, 23])
def test_int_agrees_with_torchvision(rng, shape, size):
    X = rng.integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    torch.testing.assert_close(whole(X, image_size=size), transform(whole(X)), rtol=0, atol=1e-6)


def test_mixed_sizes_without_image_size(color, gray, tmp_path):
    for X in ([*color[:3], gray[0, :5, :4]], as_pil([*color[:3], gray[0, :5, :4]])):
        with pytest.raises(ValueError, match=r"X\[3\] is 5x4 .* X\[0\] is 9x12.*image_size=224.*\"backbone\""):
            ImageInputs(X).batch(2, 4)
    X = as_files([color[0], color[1, :5]], tmp_path)
    with pytest.raises(ValueError, match=r"X\[1\] \('.*1\.png'\) is 5x12 .* X\[0\] \('.*0\.png'\) is 9x12"):
        ImageInputs(X).batch(1, 2)


# --------------------------------------------------------------------------------------------------- parameters

SIZES = [0, -3, 2.5, True, "backbone", (8,), (8, 0), (8, 8, 8), (8.0, 8)]
BAD = {
    "image_shape": ("must be 2 or 3 positive", [(8,), (8, 8, 3, 1), (0, 8), (8, -1), (8.0, 8), "88", 8, (True, 8)]),
    "image_size": ("must be a positive int, a pair", SIZES),
    "interpolation": ("must be 'nearest', 'bilinear' or 'bicubic'", ["lanczos", None, 2]),
    "channel_axis": ("=.* is not supported", [1, 3, -3, None, "first"]),
    "in_channels": ("must be a positive int", [0, -1, 1.5, None]),
    "n_jobs": ("must be None or an int other than 0", [0, 1.5, "2", True]),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, values) in BAD.items() for value in values])
def test_bad_parameters(color, name, value):
    with pytest.raises(ValueError, match=f"{name}.*{BAD[name][0]}|{name}{BAD[name][0]}"):
        ImageInputs(color, **{name: value})


def test_frame_of_missing_values_names_rows(gray):
    frame = pd.DataFrame(gray.reshape(N, -1)).astype("UInt8")
    frame.iloc[3, 5] = frame.iloc[6, 0] = pd.NA
    with pytest.raises(ValueError, match=r"missing in rows 3, 6\. Leave these rows out"):
        ImageInputs(frame, image_shape=(H, W))


# ------------------------------------------------------------------------------- what is decoded, and in how many


@pytest.fixture
def opened(monkeypatch):
    """Record what PIL.Image.open is called with."""
    calls, original = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, *args: (calls.append(path), original(path, *args))[1])
    return calls


def test_nothing_is_decoded_before_it_is_needed(color, tmp_path, opened):
    paths = as_files(color, tmp_path)
    inputs = ImageInputs(paths, image_size=5)
    assert (len(inputs), inputs.size, opened) == (N, (5, 5), [])
    inputs.batch(2, 5)
    assert opened == paths[2:5]
    opened.clear()
    inputs = ImageInputs(paths)
    assert (inputs.n_features, inputs.size) == (H * W * 3, (H, W))
    inputs.batch(3, 6)
    assert opened == [paths[0], *paths[3:6]]  # the first once, for its shape


def test_threads_decode_each_file_once_and_one_batch_ahead(color, tmp_path, opened):
    paths = as_files(color, tmp_path)
    inputs = ImageInputs(paths, image_size=5, n_jobs=2)
    before = threading.active_count()
    inputs.batch(0, 2)
    assert set(opened) <= set(paths[:4])
    for start in (2, 4, 6):
        inputs.batch(start, start + 2)
    assert sorted(opened) == paths
    assert threading.active_count() <= before + 2


def test_number_of_threads_is_that_of_joblib(color):
    assert ImageInputs(color).n_jobs == 1
    assert ImageInputs(color, n_jobs=-1).n_jobs == joblib.cpu_count()
    with joblib.parallel_config(n_jobs=3):
        assert ImageInputs(color).n_jobs == 3


def test_items_of_a_data_set_are_taken_in_one_thread(color):
    threads = set()
    X = Pairs(color, lambda image: (threads.add(threading.get_ident()), image)[1])
    inputs = ImageInputs(X, n_jobs=2)
    for start in range(0, N, 2):
        inputs.batch(start, start + 2)
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_a_bad_file_harms_only_its_own_batch(color, tmp_path, n_jobs):
    paths = as_files(color, tmp_path)
    paths[4].write_bytes(b"")
    inputs = ImageInputs(paths, image_size=6, n_jobs=n_jobs)
    expected = whole(color, image_size=6)
    for start, stop in [(0, 2), (2, 4), (5, N), (0, 4)]:
        assert torch.equal(inputs.batch(start, stop), expected[start:stop])
    with pytest.raises(ValueError, match=r"X\[4\]"):
        inputs.batch(4, 6)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux")
def test_memory_does_not_grow_with_the_number_of_files(rng, tmp_path):
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(tmp_path / "a.bmp")
    inputs = ImageInputs([tmp_path / "a.bmp"] * 400, n_jobs=2)

    def memory_after(start, stop):
        for row in range(start, stop, 4):
            inputs.batch(row, row + 4)
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = memory_after(0, 40)  # when the allocators have what they need for a batch
    # Were they kept, 360 images would take 97 MB as uint8.
    assert memory_after(40, 400) - before < 20e6


def test_input_is_never_copied_as_a_whole(tmp_path):
    X = np.lib.format.open_memmap(tmp_path / "X.npy", mode="w+", dtype=np.float64, shape=(1000, 64, 64))
    for form, options in ((X, {}), (X.reshape(1000, -1), {"image_shape": (64, 64)})):
        tracemalloc.start()  # to which numpy reports what it allocates
        ImageInputs(form, **options).batch(0, 4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 < X.nbytes / 7
