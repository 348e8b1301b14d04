"""Every form of X gives the same tensors; bad input gives an error that says what to do."""

import builtins
import os
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from torchvision.transforms import v2

from sklearn_lqf.images.reading import ImageInputs, is_image_input

N, H, W = 7, 9, 12


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def color(rng):
    """Color images, (n, H, W, 3) uint8."""
    return rng.integers(0, 256, (N, H, W, 3), dtype=np.uint8)


@pytest.fixture
def gray(rng):
    """Grayscale images, (n, H, W) uint8."""
    return rng.integers(0, 256, (N, H, W), dtype=np.uint8)


@pytest.fixture
def opened(monkeypatch):
    """Record what PIL.Image.open is called with."""
    calls = []
    original = Image.open

    def spy(path, *args, **kwargs):
        calls.append(path)
        return original(path, *args, **kwargs)

    monkeypatch.setattr(Image, "open", spy)
    return calls


def as_pil(images):
    return [Image.fromarray(image) for image in images]


def as_files(images, folder):
    paths = [folder / f"{index}.png" for index in range(len(images))]
    for path, image in zip(paths, as_pil(images), strict=True):
        image.save(path)
    return paths


def as_objects(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def whole(X, **options):
    inputs = ImageInputs(X, **options)
    return inputs.batch(0, len(inputs))


def every_form(images, folder):
    """All the forms that are to give the same tensors, as (name, X, options)."""
    paths = as_files(images, folder)
    names = [str(path) for path in paths]
    rows = images.reshape(len(images), -1)
    shape = images.shape[1:]
    yield "array", images, {}
    yield "fortran order", np.asfortranarray(images), {}
    yield "negative strides", images[:, :, ::-1].copy()[:, :, ::-1], {}
    yield "tensor", torch.from_numpy(images), {}
    yield "raveled", rows, {"image_shape": shape}
    yield "raveled, fortran order", np.asfortranarray(rows), {"image_shape": shape}
    yield "DataFrame", pd.DataFrame(rows), {"image_shape": shape}
    yield "PIL list", as_pil(images), {}
    yield "PIL tuple", tuple(as_pil(images)), {}
    yield "PIL object array", as_objects(as_pil(images)), {}
    yield "array list", list(images), {}
    yield "tensor list", list(torch.from_numpy(images)), {}
    yield "array object array", as_objects(list(images)), {}
    yield "path list", paths, {}
    yield "string list", names, {}
    yield "string array", np.array(names), {}
    yield "string column", np.array(names)[:, None], {}
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        yield "variable-width strings", np.array(names, dtype=np.dtypes.StringDType()), {}
    yield "path object array", as_objects(paths), {}
    yield "path Series", pd.Series(paths), {}
    yield "string Series, odd index", pd.Series(names, index=range(5, 5 + len(names))), {}
    yield "string DataFrame", pd.DataFrame({"path": names}), {}
    yield "PIL Series", pd.Series(as_pil(images)), {}
    yield "mixed list", [paths[0], as_pil(images)[1], names[2], *images[3:]], {}
    if images.ndim == 4:
        first = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
        yield "channels first", first, {"channel_axis": 0}
        yield "channels first view", images.transpose(0, 3, 1, 2), {"channel_axis": 0}
        yield "channels first list", list(first), {"channel_axis": 0}
        raveled = {"channel_axis": 0, "image_shape": first.shape[1:]}
        yield "channels first raveled", first.reshape(len(first), -1), raveled
    else:
        yield "one channel", images[..., None], {}


# ----------------------------------------------------------------------------------------------------
# Equal pixels give equal bits


@pytest.mark.parametrize(
    ("image_size", "interpolation"),
    [
        (None, "bilinear"),
        (6, "bilinear"),
        (20, "bilinear"),
        ((5, 17), "bicubic"),
        ((20, 8), "nearest"),
        (H, "bicubic"),
    ],
)
@pytest.mark.parametrize(("kind", "in_channels"), [("color", 3), ("gray", 3), ("gray", 1)])
def test_every_form_gives_the_same_bits(request, tmp_path, kind, in_channels, image_size, interpolation):
    images = request.getfixturevalue(kind)
    options = {"image_size": image_size, "interpolation": interpolation, "in_channels": in_channels}
    expected = whole(images, **options)
    for name, X, form in every_form(images, tmp_path):
        inputs = ImageInputs(X, **options, **form)
        assert is_image_input(X, form.get("image_shape")), name
        assert len(inputs) == N, name
        assert inputs.image_shape[:2] == (H, W), name
        assert torch.equal(inputs.batch(0, N), expected), name
        assert torch.equal(inputs.batch(2, 4), expected[2:4]), name


def test_values_without_resizing(color):
    expected = torch.from_numpy(color).permute(0, 3, 1, 2).to(torch.float32) / 255
    assert torch.equal(whole(color), expected)


def test_batch_layout(color):
    for X in (color, color.astype(np.float32) / 255, as_pil(color)):
        for size in (None, 5):
            batch = whole(X, image_size=size)
            assert batch.dtype == torch.float32
            assert batch.is_contiguous()
            assert batch.device.type == "cpu"
            assert not batch.requires_grad


def test_batch_shares_no_memory_with_the_input(rng):
    X = rng.random((N, 3, H, W), dtype=np.float32)
    before = X.copy()
    whole(X, channel_axis=0).zero_()
    np.testing.assert_array_equal(X, before)


def test_batch_bounds_are_those_of_a_slice(color):
    inputs = ImageInputs(color)
    expected = inputs.batch(0, N)
    assert torch.equal(inputs.batch(5, 100), expected[5:])
    assert torch.equal(inputs.batch(-2, N), expected[-2:])
    assert inputs.batch(3, 3).shape == (0, 3, H, W)
    assert ImageInputs(as_pil(color), image_size=4).batch(5, 2).shape == (0, 3, 4, 4)


def test_batches_concatenate_to_the_whole(color):
    for X in (color, as_pil(color)):
        inputs = ImageInputs(X, image_size=(20, 7))
        parts = [inputs.batch(start, start + 2) for start in range(0, N, 2)]
        assert torch.equal(torch.cat(parts), inputs.batch(0, N))


def test_grayscale_is_repeated(gray):
    batch = whole(gray)
    assert batch.shape == (N, 3, H, W)
    assert torch.equal(batch[:, 0], batch[:, 2])
    assert torch.equal(whole(gray, in_channels=1), batch[:, :1])
    assert whole(gray, in_channels=5).shape == (N, 5, H, W)


def test_as_many_channels_as_the_network_takes(rng):
    X = rng.integers(0, 256, (N, H, W, 5), dtype=np.uint8)
    assert torch.equal(whole(X, in_channels=5)[:, 4], torch.from_numpy(X[..., 4]) / 255)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # Half a unit in the last place of the coarser of the two types.
    [("float64", 2.0**-24), ("float32", 2.0**-24), (">f4", 2.0**-24), ("float16", 2.0**-12)],
)
def test_floats_agree_with_uint8(color, dtype, tolerance):
    X = (color / 255).astype(dtype)
    for form in (X, list(X), X.reshape(N, -1)):
        batch = whole(form, image_shape=(H, W, 3))
        torch.testing.assert_close(batch, whole(color), rtol=0, atol=tolerance)


def test_mixed_dtypes_in_a_list(color):
    X = [image if index % 2 else image / 255 for index, image in enumerate(color)]
    torch.testing.assert_close(whole(X), whole(color), rtol=0, atol=2.0**-24)


def test_nested_lists_of_floats(color):
    X = color / 255
    assert is_image_input(X.tolist())
    assert torch.equal(whole(X.tolist()), whole(X))
    rows = X.reshape(N, -1).tolist()
    assert torch.equal(whole(rows, image_shape=(H, W, 3)), whole(X))


def test_tensor_that_requires_grad(color):
    X = (torch.from_numpy(color) / 255).requires_grad_()
    assert torch.equal(whole(X), whole(color))


# ----------------------------------------------------------------------------------------------------
# Shapes


@pytest.mark.parametrize(("kind", "channels"), [("color", 3), ("gray", 1)])
def test_image_shape_of_arrays(request, kind, channels):
    images = request.getfixturevalue(kind)
    for X in (images, list(images)):
        inputs = ImageInputs(X, image_size=30)
        assert inputs.image_shape == (H, W, channels)
        assert inputs.n_features == H * W * channels
        assert inputs.size == (30, 30)
    assert ImageInputs(images).size == (H, W)


def test_image_shape_of_channels_first(color):
    inputs = ImageInputs(color.transpose(0, 3, 1, 2), channel_axis=0)
    assert inputs.image_shape == (H, W, 3)


@pytest.mark.parametrize("in_channels", [1, 3])
def test_image_shape_of_files_has_the_channels_of_the_network(color, tmp_path, in_channels):
    for X in (as_pil(color), as_files(color, tmp_path)):
        assert ImageInputs(X, in_channels=in_channels).image_shape == (H, W, in_channels)


def test_image_shape_may_repeat_what_an_array_shows(color, gray):
    assert ImageInputs(color, image_shape=(H, W, 3)).image_shape == (H, W, 3)
    assert ImageInputs(gray, image_shape=[H, W, 1]).image_shape == (H, W, 1)
    assert ImageInputs(as_pil(gray), image_shape=np.array([H, W])).image_shape == (H, W, 3)


def test_image_shape_that_contradicts_an_array(color):
    with pytest.raises(ValueError, match=r"images of shape \(9, 12, 3\), but image_shape=\(12, 9, 3\)"):
        ImageInputs(color, image_shape=(W, H, 3))
    with pytest.raises(ValueError, match=r"X\[0\] is 9x12 \(height x width\), but image_shape=\(12, 9\)"):
        ImageInputs(as_pil(color), image_shape=(W, H)).batch(0, 1)


@pytest.mark.parametrize("as_table", [np.asarray, pd.DataFrame])
def test_raveled_rows_of_another_length(gray, as_table):
    with pytest.raises(ValueError, match=r"108 features, but image_shape=\(9, 11\) makes 99"):
        ImageInputs(as_table(gray.reshape(N, -1)), image_shape=(9, 11))


def test_raveled_rows_without_image_shape(gray):
    with pytest.raises(ValueError, match="pass image_shape="):
        ImageInputs(gray.reshape(N, -1))


@pytest.mark.parametrize("image_shape", [(8,), (8, 8, 3, 1), (0, 8), (8, -1), (8.0, 8), "88", 8, (True, 8)])
def test_bad_image_shape(gray, image_shape):
    with pytest.raises(ValueError, match="image_shape must be 2 or 3 positive ints"):
        ImageInputs(gray, image_shape=image_shape)


# ----------------------------------------------------------------------------------------------------
# Resizing


def test_int_is_shorter_side_then_center_crop(rng):
    X = rng.integers(0, 256, (2, 10, 20, 3), dtype=np.uint8)
    # Nearest, by a whole factor: the center 10 x 10 with each pixel doubled.
    expected = whole(X)[:, :, :, 5:15].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(whole(X, image_size=20, interpolation="nearest"), expected)


def test_pair_covers_then_center_crops(rng):
    X = rng.integers(0, 256, (2, 10, 20, 3), dtype=np.uint8)
    # max(20 / 10, 8 / 20) = 2: resized to 20 x 40, then the 8 columns in the middle.
    expected = whole(X)[:, :, :, 8:12].repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(whole(X, image_size=(20, 8), interpolation="nearest"), expected)


@pytest.mark.parametrize("height", [1, 7, 31, 224])
@pytest.mark.parametrize("width", [1, 3, 64])
def test_result_has_exactly_the_size_asked_for(rng, height, width):
    X = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(1, 1), (13, 5), (37, 91), (64, 64)]]
    assert whole(X, image_size=(height, width)).shape == (4, 3, height, width)


@pytest.mark.parametrize("shape", [(10, 17), (31, 8), (9, 9)])
@pytest.mark.parametrize("size", [5, 16, 23])
def test_int_agrees_with_torchvision(rng, shape, size):
    X = rng.integers(0, 256, (1, *shape, 3), dtype=np.uint8)
    transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size)])
    torch.testing.assert_close(whole(X, image_size=size), transform(whole(X)), rtol=0, atol=1e-6)


def test_mixed_sizes_with_image_size(rng):
    X = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in [(8, 8), (9, 16), (20, 10)]]
    batch = whole(X, image_size=6)
    for index, image in enumerate(X):
        assert torch.equal(batch[index], whole(image[None], image_size=6)[0])


def test_same_size_changes_nothing(color):
    assert torch.equal(whole(color, image_size=(H, W), interpolation="bicubic"), whole(color))


def test_resizing_is_antialiased(rng):
    # A checkerboard shrunk by 8 is gray all over; without antialiasing it keeps whites and blacks.
    X = np.indices((1, 64, 64)).sum(axis=0).astype(np.uint8) % 2 * 255
    batch = whole(X, image_size=8)
    assert (batch - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
def test_resized_values_stay_in_range(interpolation):
    X = np.zeros((1, 16, 16), dtype=np.uint8)
    X[:, 4:12, 4:12] = 255  # edges at which bicubic overshoots
    batch = whole(X, image_size=33, interpolation=interpolation)
    assert batch.min() == 0
    assert batch.max() == 1


@pytest.mark.parametrize("image_size", [0, -3, 2.5, True, "backbone", (8,), (8, 0), (8, 8, 8), (8.0, 8)])
def test_bad_image_size(color, image_size):
    with pytest.raises(ValueError, match="image_size must be a positive int, a pair"):
        ImageInputs(color, image_size=image_size)


def test_numpy_ints_are_ints(color):
    assert ImageInputs(color, image_size=np.int64(5)).size == (5, 5)
    assert ImageInputs(color, image_size=np.array([5, 6])).size == (5, 6)


@pytest.mark.parametrize("interpolation", ["lanczos", None, 2])
def test_bad_interpolation(color, interpolation):
    with pytest.raises(ValueError, match="interpolation must be 'nearest', 'bilinear' or 'bicubic'"):
        ImageInputs(color, interpolation=interpolation)


@pytest.mark.parametrize("make", [list, as_pil])
def test_mixed_sizes_without_image_size(color, gray, make):
    X = make([*color[:3], gray[0, :5, :4]])
    with pytest.raises(ValueError, match=r"X\[3\] is 5x4 .* X\[0\] is 9x12.*image_size=224.*\"backbone\""):
        ImageInputs(X).batch(2, 4)


def test_mixed_sizes_of_files_without_image_size(color, tmp_path):
    X = as_files([color[0], color[1, :5]], tmp_path)
    with pytest.raises(ValueError, match=r"X\[1\] \('.*1\.png'\) is 5x12 .* X\[0\] \('.*0\.png'\) is 9x12"):
        ImageInputs(X).batch(1, 2)


# ----------------------------------------------------------------------------------------------------
# Channels


@pytest.mark.parametrize(("channels", "in_channels"), [(4, 3), (2, 3), (3, 1), (5, 3)])
def test_wrong_channels(rng, channels, in_channels):
    X = rng.integers(0, 256, (N, H, W, channels), dtype=np.uint8)
    message = rf"{channels} channels .*{in_channels} channel\(s\) are needed.*(Convert|convert) the images to grayscale"
    with pytest.raises(ValueError, match=message):
        ImageInputs(X, in_channels=in_channels)
    with pytest.raises(ValueError, match=rf"X\[0\] has {message}"):
        ImageInputs(list(X), in_channels=in_channels).batch(0, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_first_is_suggested_but_not_guessed(rng, channels):
    X = rng.integers(0, 256, (N, channels, H, W), dtype=np.uint8)
    with pytest.raises(ValueError, match=r"12 channels .*pass channel_axis=0"):
        ImageInputs(X)
    with pytest.raises(ValueError, match=r"12 channels .*pass channel_axis=0"):
        ImageInputs(list(X)).batch(0, 1)
    ImageInputs(X, channel_axis=0)


def test_channels_last_is_suggested_but_not_guessed(color):
    with pytest.raises(ValueError, match=r"9 channels .*pass channel_axis=-1"):
        ImageInputs(color, channel_axis=0)


@pytest.mark.parametrize("channel_axis", [1, 3, -3, None, "first"])
def test_bad_channel_axis(color, channel_axis):
    with pytest.raises(ValueError, match=r"channel_axis=.* is not supported"):
        ImageInputs(color, channel_axis=channel_axis)


@pytest.mark.parametrize("in_channels", [0, -1, 1.5, None])
def test_bad_in_channels(color, in_channels):
    with pytest.raises(ValueError, match="in_channels must be a positive int"):
        ImageInputs(color, in_channels=in_channels)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_are_converted(color, mode):
    image = Image.fromarray(color[0]).convert(mode)
    expected = np.asarray(image.convert("RGB"))
    assert torch.equal(whole([image]), whole(expected[None]))
    expected = np.asarray(image.convert("L"))
    assert torch.equal(whole([image], in_channels=1), whole(expected[None], in_channels=1))


def test_palette_with_transparency_is_read_silently(gray, tmp_path):
    image = Image.fromarray(gray[0]).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(whole([tmp_path / "a.png"]), whole(gray[:1]))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pil_images_of_more_than_8_bits_are_refused(gray, tmp_path, dtype):
    image = Image.fromarray(gray[0].astype(dtype))
    image.save(tmp_path / "deep.tiff")
    for X in ([image], [tmp_path / "deep.tiff"]):
        with pytest.raises(ValueError, match=r"X\[0\].*more than 8 bits a channel: pass an array of floats"):
            ImageInputs(X).batch(0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(color, tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(color[0]).save(path, exif=exif)
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: lambda a: np.rot90(a),
    }
    expected = turns[orientation](color[0])
    assert ImageInputs([path]).image_shape == expected.shape
    assert torch.equal(whole([path]), whole(expected[None]))
    with Image.open(path) as image:
        assert torch.equal(whole([image]), whole(expected[None]))


def test_files_for_other_than_1_or_3_channels(color, tmp_path):
    for X in (as_pil(color), as_files(color, tmp_path)):
        with pytest.raises(ValueError, match=r"X\[0\].*not the 4 that are needed: pass arrays"):
            ImageInputs(X, in_channels=4).batch(0, 1)


# ----------------------------------------------------------------------------------------------------
# Values


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint16", "bool", "complex64", "longdouble", "object", "str"])
def test_other_dtypes(gray, dtype):
    X = gray.astype(dtype)
    message = r"X has dtype .*cast to uint8 \(0\.\.255\) or scale floats to 0\.\.1"
    with pytest.raises(ValueError, match=message):
        ImageInputs(X)
    with pytest.raises(ValueError, match=message):
        ImageInputs(X.reshape(N, -1), image_shape=(H, W))
    with pytest.raises(ValueError, match=r"X\[0\] has dtype"):
        ImageInputs(list(X)).batch(0, 1)


def test_table_of_ints(gray):
    with pytest.raises(ValueError, match=r"X has dtype int64.*cast to uint8"):
        ImageInputs(pd.DataFrame(gray.reshape(N, -1).astype(np.int64)), image_shape=(H, W))


def test_tensors_that_numpy_cannot_hold(gray):
    for X in (torch.from_numpy(gray).to(torch.bfloat16), torch.zeros(N, H, W, device="meta")):
        with pytest.raises(ValueError, match=r"X is a tensor of dtype .*pass a CPU tensor"):
            ImageInputs(X)


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, r"Input X contains NaN\."), (np.inf, "Input X contains infinity"), (-np.inf, "infinity")],
)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_are_not_finite(value, message, dtype):
    X = np.zeros((N, H, W), dtype=dtype)
    X[5, 3, 2] = value
    for form in (X, torch.from_numpy(X)):
        with pytest.raises(ValueError, match=message):
            ImageInputs(form)
    for table in (X.reshape(N, -1), pd.DataFrame(X.reshape(N, -1))):
        with pytest.raises(ValueError, match=message):
            ImageInputs(table, image_shape=(H, W))
    inputs = ImageInputs(list(X))
    inputs.batch(0, 5)
    with pytest.raises(ValueError, match=message + r".*X\[5\]"):
        inputs.batch(5, 6)


@pytest.mark.parametrize("value", [-0.01, 1.01, 255.0])
def test_floats_out_of_range(value):
    X = np.zeros((N, H, W))
    X[5, 3, 2] = value
    message = r"must lie in 0\.\.1, got values from .* in X.*cast them to uint8"
    with pytest.raises(ValueError, match=message):
        ImageInputs(X)
    with pytest.raises(ValueError, match=message):
        ImageInputs(pd.DataFrame(X.reshape(N, -1)), image_shape=(H, W))
    with pytest.raises(ValueError, match=message.replace("in X", r"in X\[5\]")):
        ImageInputs(list(X)).batch(0, N)


def test_every_chunk_is_checked(monkeypatch):
    monkeypatch.setattr("sklearn_lqf.images.reading._CHECK_CHUNK", 2 * H * W)
    for row in range(N):
        X = np.zeros((N, H, W))
        X[row, -1, -1] = 2.0
        first = row // 2 * 2
        with pytest.raises(ValueError, match=rf"in X\[{first}:{min(first + 2, N)}\]"):
            ImageInputs(X)


# ----------------------------------------------------------------------------------------------------
# Shapes and types that are no images


@pytest.mark.parametrize(
    "X",
    [
        [],
        (),
        np.empty((0, 8, 8, 3), dtype=np.uint8),
        np.empty((0, 64)),
        np.empty(0, dtype=object),
        pd.Series([], dtype=object),
        pd.DataFrame({"path": pd.Series([], dtype=object)}),
        torch.empty(0, 8, 8),
    ],
)
def test_empty_input(X):
    with pytest.raises(ValueError, match=r"Found array with 0 sample\(s\)"):
        ImageInputs(X, image_shape=(8, 8))


def test_empty_images():
    with pytest.raises(ValueError, match=r"Found array with 0 feature\(s\)"):
        ImageInputs(np.empty((3, 0, 8)))
    with pytest.raises(ValueError, match=r"X\[1\] is an empty image"):
        ImageInputs([np.zeros((8, 8)), np.zeros((0, 8))]).batch(1, 2)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4, 5, 3)])
def test_wrong_ndim(shape):
    with pytest.raises(ValueError, match=rf"got an array with {len(shape)} dimension\(s\)"):
        ImageInputs(np.zeros(shape))


@pytest.mark.parametrize("X", ["a.png", Path("a.png"), Image.new("RGB", (4, 4)), 3, None, sparse.eye(4).tocsr()])
def test_what_is_no_collection_of_images(X):
    assert not is_image_input(X)
    with pytest.raises(ValueError, match=r"Expected images as an array or as a sequence .* got "):
        ImageInputs(X, image_shape=(2, 2))


@pytest.mark.parametrize("element", [None, 3.0, float("nan"), b"a.png", np.zeros(4), ["a.png"], {}])
def test_an_element_that_is_no_image(color, element):
    inputs = ImageInputs([color[0], element])
    inputs.batch(0, 1)
    with pytest.raises(ValueError, match=r"X\[1\] is not an image: expected a path.*, got "):
        inputs.batch(0, 2)


# ----------------------------------------------------------------------------------------------------
# Files


def test_missing_file(color, tmp_path):
    X = [*as_files(color, tmp_path), tmp_path / "missing.png"]
    inputs = ImageInputs(X)
    inputs.batch(0, N)
    with pytest.raises(FileNotFoundError, match=rf"X\[{N}\] \('.*missing\.png'\) does not exist") as caught:
        inputs.batch(N, N + 1)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif"])
@pytest.mark.parametrize("kept", [0, 0.3, 0.9])
def test_truncated_file(rng, tmp_path, suffix, kept):
    path = tmp_path / f"broken.{suffix}"
    Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"X\[1\] \('.*broken\.{suffix}'\) cannot be read") as caught:
        whole([np.zeros((32, 32)), path])
    assert caught.value.__cause__ is not None


def test_corrupt_file(color, tmp_path):
    path = as_files(color[:1], tmp_path)[0]
    content = bytearray(path.read_bytes())
    content[60:90] = b"\x00" * 30  # breaks a checksum, for which PIL raises SyntaxError, not OSError
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"X\[0\] \('.*0\.png'\) cannot be read as an image"):
        whole([path])


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for path in (tmp_path / "text.png", tmp_path):
        with pytest.raises(ValueError, match=r"X\[0\] .* cannot be read as an image") as caught:
            whole([path])
        assert isinstance(caught.value.__cause__, OSError)


def test_pil_image_whose_file_is_truncated(color, tmp_path):
    path = as_files(color[:1], tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"X\[0\] is a PIL image that cannot be"):
        whole([image])


def test_nothing_is_decoded_before_it_is_needed(color, tmp_path, opened):
    paths = as_files(color, tmp_path)
    inputs = ImageInputs(paths, image_size=5)
    assert len(inputs) == N
    assert inputs.size == (5, 5)
    assert opened == []
    inputs.batch(2, 5)
    assert opened == paths[2:5]


def test_shape_decodes_the_first_file_once(color, tmp_path, opened):
    paths = as_files(color, tmp_path)
    inputs = ImageInputs(paths)
    assert inputs.n_features == H * W * 3
    assert inputs.size == (H, W)
    assert opened == paths[:1]
    inputs.batch(3, 6)
    assert opened == [paths[0], *paths[3:6]]


def test_a_bad_file_harms_only_its_own_batch(color, tmp_path):
    paths = as_files(color, tmp_path)
    paths[4].write_bytes(b"")
    inputs = ImageInputs(paths)
    assert torch.equal(inputs.batch(0, 4), whole(color[:4]))
    assert torch.equal(inputs.batch(5, N), whole(color[5:]))


def test_files_are_closed(color, tmp_path, monkeypatch):
    paths = as_files(color, tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:-100])
    handles = []
    original = builtins.open

    def spy(*args, **kwargs):
        handles.append(original(*args, **kwargs))
        return handles[-1]

    monkeypatch.setattr(builtins, "open", spy)
    whole(paths)
    with pytest.raises(ValueError, match=r"broken\.png"):
        whole([broken])
    monkeypatch.undo()
    assert len(handles) == N + 2  # the first file is decoded for the size, too
    assert all(handle.closed for handle in handles)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the memory in use from Linux")
def test_memory_does_not_grow_with_the_number_of_files(rng, tmp_path):
    Image.fromarray(rng.integers(0, 256, (300, 300, 3), dtype=np.uint8)).save(tmp_path / "a.bmp")
    inputs = ImageInputs([tmp_path / "a.bmp"] * 400)

    def memory_in_use():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for start in range(0, 20, 4):  # until the allocators have what they need for a batch
        inputs.batch(start, start + 4)
    before = memory_in_use()
    for start in range(20, 400, 4):
        inputs.batch(start, start + 4)
    # Were they kept, 380 images would take 103 MB as uint8.
    assert memory_in_use() - before < 10e6


# ----------------------------------------------------------------------------------------------------
# Memory maps


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_read_only_memmap(color, tmp_path, dtype):
    X = color if dtype == np.uint8 else (color / 255).astype(dtype)
    np.save(tmp_path / "X.npy", X)
    mapped = np.load(tmp_path / "X.npy", mmap_mode="r")
    assert not mapped.flags.writeable
    assert is_image_input(mapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of tensors over read-only memory
        for image_size in (None, 5):
            assert torch.equal(whole(mapped, image_size=image_size), whole(X, image_size=image_size))
            rows = mapped.reshape(N, -1)
            assert torch.equal(
                whole(rows, image_shape=(H, W, 3), image_size=image_size), whole(X, image_size=image_size)
            )
            assert torch.equal(whole(list(mapped), image_size=image_size), whole(X, image_size=image_size))


@pytest.mark.parametrize("dtype", [np.uint8, np.float64])
def test_input_is_never_copied_as_a_whole(tmp_path, dtype):
    X = np.lib.format.open_memmap(tmp_path / "X.npy", mode="w+", dtype=dtype, shape=(2000, 64, 64))
    for form, options in ((X, {}), (X.reshape(2000, -1), {"image_shape": (64, 64)})):
        tracemalloc.start()  # to which numpy reports what it allocates
        inputs = ImageInputs(form, **options)
        inputs.batch(0, 4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 < X.nbytes / 7


# ----------------------------------------------------------------------------------------------------
# is_image_input


class NotAnArray:
    """What scikit-learn's common checks pass as X: convertible to an array, and no more."""

    def __init__(self, data):
        self.data = np.asarray(data)

    def __array__(self, dtype=None, copy=None):
        return self.data


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((4, 8)),
        np.zeros((4, 1)),
        np.zeros((4, 8), dtype=object),
        np.zeros((4, 1), dtype=object),
        np.array([["a", "b"], ["c", "d"]], dtype=object),
        pd.DataFrame(np.zeros((4, 8))),
        pd.DataFrame({"a": [1.0, 2.0]}),
        NotAnArray(np.zeros((4, 8))),
        torch.zeros(4, 8),
        [[1.0, 2.0], [3.0, 4.0]],
        [np.zeros(8), np.zeros(8)],
    ],
)
def test_tables_are_images_only_with_image_shape(X):
    assert is_image_input(X) is False
    assert is_image_input(X, (2, 4)) is True


@pytest.mark.parametrize(
    "X",
    [
        sparse.eye(4).tocsr(),
        sparse.csr_array(np.eye(4)),
        np.zeros(4),
        np.array(3.0),
        np.zeros(4, dtype=object),
        np.zeros((2, 2, 2, 2, 2)),
        pd.Series([1.0, 2.0]),
        torch.zeros(4),
        [],
        (),
        [1.0, 2.0],
        [[]],
        [None, "a.png"],
        {"a": 1},
        3.0,
        None,
    ],
)
def test_left_to_scikit_learn(X):
    assert is_image_input(X) is False
    if not hasattr(X, "toarray"):
        assert np.ndim(X) != 2 or is_image_input(X, (2, 2))
    else:
        assert is_image_input(X, (2, 2)) is False


@pytest.mark.parametrize(
    "X",
    [
        np.zeros((4, 8, 8)),
        np.zeros((4, 8, 8, 3)),
        np.zeros((0, 8, 8, 3)),
        np.zeros((4, 8, 8), dtype=object),
        torch.zeros(4, 8, 8),
        NotAnArray(np.zeros((4, 8, 8))),
        [np.zeros((8, 8))],
        [torch.zeros(3, 8, 8)],
        ["missing.png"],
        [Path("missing.png")],
        ("missing.png",),
        (Image.new("RGB", (4, 4)),),
        np.array(["missing.png"]),
        np.array([["missing.png"]], dtype=object),
        pd.Series(["missing.png"]),
        pd.DataFrame({"path": ["missing.png"]}),
        pd.Series([Image.new("L", (4, 4))]),
    ],
)
def test_read_as_images(X):
    assert is_image_input(X) is True


def test_array_like(color):
    assert torch.equal(whole(NotAnArray(color)), whole(color))
