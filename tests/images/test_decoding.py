"""Files and PIL images: colors, orientation, and every way in which they can be broken."""

import builtins
import io
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, PngImagePlugin
from support.images import Pairs, as_files, as_pil, encoded, whole

from sklearn_lqf.images.reading import ImageInputs


def exif(orientation: int) -> Image.Exif:
    found = Image.Exif()
    found[0x0112] = orientation
    return found


def opened(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content))


# -------------------------------------------------------------------------------------------------------- colors


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_are_converted(color, mode):
    image = Image.fromarray(color[0]).convert(mode)
    for target, in_channels in (("RGB", 3), ("L", 1)):
        expected = np.asarray(image.convert(target))
        assert torch.equal(whole([image], in_channels=in_channels), whole(expected[None], in_channels=in_channels))
    if mode == "P":  # silently, where Pillow would warn
        image.info["transparency"] = bytes(range(256))
        assert torch.equal(whole([image]), whole([image.convert("RGBA").convert("RGB")]))


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pil_images_of_more_than_8_bits_are_refused(gray, tmp_path, dtype):
    image = Image.fromarray(gray[0].astype(dtype))
    image.save(tmp_path / "deep.tiff")
    for X in ([image], [tmp_path / "deep.tiff"]):
        with pytest.raises(ValueError, match=r"X\[0\].*more than 8 bits a channel: pass an array of floats"):
            ImageInputs(X).batch(0, 1)


def test_files_for_other_than_1_or_3_channels(color, tmp_path):
    for X in (as_pil(color), as_files(color, tmp_path), [encoded(color[0])]):
        with pytest.raises(ValueError, match=r"X\[0\].*not the 4 that are needed: pass arrays"):
            ImageInputs(X, in_channels=4).batch(0, 1)


# --------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(
    ("format", "orientation"), [*(("png", k) for k in range(1, 9)), ("webp", 5), ("tiff", 5), ("tiff", 8), ("jpeg", 6)]
)
def test_orientation_of_files_is_applied(color, tmp_path, orientation, format):
    options = {"lossless": True} if format == "webp" else {}
    content = encoded(color[0], format, exif=exif(orientation), **options)
    turned = opened(content)
    if format != "tiff":  # which Pillow turns as it loads them, and in some versions again
        expected = ImageOps.exif_transpose(turned)
    else:
        expected = ImageOps.exif_transpose(opened(encoded(color[0], exif=exif(orientation))))
    expected = whole(np.asarray(expected)[None])
    path = tmp_path / f"turned.{format}"
    path.write_bytes(content)
    assert ImageInputs([path]).image_shape[:2] == expected.shape[2:]
    for X in ([path], [content], [opened(content)]):
        assert torch.equal(whole(X), expected)


def test_images_that_were_changed_are_taken_as_they_are(color):
    changed = opened(encoded(color[0], exif=exif(6))).rotate(90, expand=True)
    pixels = whole(np.asarray(changed)[None])
    with pytest.warns(UserWarning, match=r"X\[1\].*changed after it was opened.*exif_transpose.*del image.getexif"):
        found = whole([*as_pil(np.zeros_like(changed)[None]), changed])
    assert torch.equal(found[1:], pixels)
    del changed.getexif()[0x0112]  # the remedy
    assert torch.equal(whole([changed]), pixels)
    upright = ImageOps.exif_transpose(opened(encoded(color[0], exif=exif(6))))  # another
    assert torch.equal(whole([upright]), whole(np.rot90(color[0], -1)[None]))


def test_one_warning_names_the_images_of_a_batch(color):
    X = [opened(encoded(image, exif=exif(6))).copy() for image in color]
    inputs = ImageInputs([*as_pil(color[:1]), *X])
    with pytest.warns(UserWarning) as caught:
        inputs.batch(0, 4)
    assert len(caught) == 1
    assert "X[1]" in str(caught[0].message)
    assert "So are X[2], X[3]." in str(caught[0].message)
    inputs.batch(4, 7)  # silently


BROKEN = {
    "nonsense": b"Exif\0\0nonsense, and long enough to be a table of tags",
    "empty table": b"Exif\0\0II*\0" + struct.pack("<L", 5000),
    "truncated": b"Exif\0\0II*\0" + struct.pack("<LH", 8, 30),
    "text for a number": b"Exif\0\0II*\0" + struct.pack("<LHHHLL", 8, 1, 0x0112, 2, 1, 0),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_broken_metadata_make_no_image_unreadable(color, tmp_path, format, case):
    content = encoded(color[0], format, exif=BROKEN[case])
    (tmp_path / f"a.{format}").write_bytes(content)
    expected = whole(np.asarray(opened(content).convert("RGB"))[None])
    with pytest.warns(UserWarning, match=r"orientation of X\[0\] \('.*a\..*'\) cannot be read.*EXIF.*save it anew"):
        assert torch.equal(whole([tmp_path / f"a.{format}"]), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(whole([opened(content)]), expected)


def test_orientation_is_read_beside_tags_that_are_broken(color):
    entries = [struct.pack("<HHLL", 0x010F, 2, 1000, 5000), struct.pack("<HHLHH", 0x0112, 3, 1, 6, 0)]
    broken = b"Exif\0\0II*\0" + struct.pack("<LH", 8, 2) + b"".join(entries) + bytes(4)
    assert torch.equal(whole([encoded(color[0], exif=broken)]), whole(np.rot90(color[0], -1)[None]))


def test_orientation_is_read_from_xmp_where_exif_has_none(color):
    others, xmp = Image.Exif(), PngImagePlugin.PngInfo()
    others[0x010F] = "Maker"
    xmp.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>')
    for options in ({}, {"exif": others}):
        content = encoded(color[0], pnginfo=xmp, **options)
        for X in ([content], [opened(content)]):
            assert torch.equal(whole(X), whole(np.rot90(color[0], -1)[None]))


# -------------------------------------------------------------------------------------------------- broken files


def test_missing_file(color, tmp_path):
    inputs = ImageInputs([*as_files(color, tmp_path), tmp_path / "missing.png"])
    inputs.batch(0, len(color))
    with pytest.raises(FileNotFoundError, match=r"X\[7\] \('.*missing\.png'\) does not exist") as caught:
        inputs.batch(7, 8)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="address of a page: download"):
        whole(["https://example.org/cat.png"])


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
    with pytest.raises(ValueError, match=r"X\[0\] cannot be read as an image") as caught:
        whole([path.read_bytes()])
    assert "0x" not in str(caught.value)


def test_files_that_are_no_images(color, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    content = bytearray(encoded(color[0]))
    content[60:90] = b"\x00" * 30  # breaks a checksum, for which PIL raises SyntaxError, not OSError
    (tmp_path / "sum.png").write_bytes(content)
    for path, reason in (
        (tmp_path / "text.png", "none that Pillow knows"),
        (tmp_path, "directory"),
        (tmp_path / "sum.png", ""),
    ):
        with pytest.raises(ValueError, match=rf"X\[0\] .* cannot be read as an image: .*{reason}"):
            whole([path])
    with pytest.raises(ValueError, match=r"X\[0\] cannot be read as an image: its format is none") as caught:
        whole([b"secret"])
    assert "secret" not in str(caught.value)
    path = as_files(color[:1], tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-100])
    with Image.open(path) as image, pytest.raises(ValueError, match=r"X\[0\] is a PIL image that cannot be"):
        whole([image])


def test_decompression_bomb(color, tmp_path, monkeypatch):
    paths = as_files(color[:2], tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(ValueError, match=r"(?s)X\[0\].*decompression bomb.*raise PIL\.Image\.MAX_IMAGE_PIXELS"):
        whole(paths)


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_broken_files_among_a_hundred_are_named_together(color, tmp_path, n_jobs):
    sound = as_files(color, tmp_path)
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [sound[i % 7] for i in range(100)]
    paths[3] = paths[17] = tmp_path / "broken.png"
    paths[90] = tmp_path / "gone.png"
    for X in (paths, Pairs(paths)):
        with pytest.raises(ValueError, match=r"^3 elements of X cannot be used:") as caught:
            ImageInputs(X, image_size=4, n_jobs=n_jobs).batch(0, 8)
        assert all(f"X[{index}]" in str(caught.value) for index in (3, 17, 90))
    paths[5:20] = [tmp_path / "broken.png"] * 15
    with pytest.raises(ValueError, match=r"^At least 10 elements of X cannot be used:") as caught:
        ImageInputs(paths, image_size=4, n_jobs=n_jobs).batch(0, 8)
    assert str(caught.value).count("X[") == 10
    with pytest.raises(FileNotFoundError, match=r"^2 elements"):
        whole([tmp_path / "gone.png", sound[0], tmp_path / "lost.png"])


def test_files_are_closed(color, tmp_path, monkeypatch):
    paths = as_files(color, tmp_path)
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:-100])
    handles, original = [], builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: (handles.append(original(*a, **k)), handles[-1])[1])
    whole(paths)
    with pytest.raises(ValueError, match=r"broken\.png"):
        whole([broken])
    monkeypatch.undo()
    assert len(handles) > len(paths)
    assert all(handle.closed for handle in handles)


# ----------------------------------------------------------------------------------------------------- data sets


def test_a_data_set_whose_items_change(color):
    rng = np.random.default_rng(0)
    X = Pairs(color, lambda image: image if rng.random() < 0.5 else image[:, ::-1])
    with pytest.raises(ValueError, match=r"X\[\d\] is another image each time.*Pairs.*random transforms off.*'flip'"):
        whole(X)


def test_an_item_that_a_data_set_cannot_make(color):
    message = r"X\[0\] cannot be taken from the data set \(.*Pairs\): ZeroDivisionError: division"
    with pytest.raises(ValueError, match=message):
        whole(Pairs(color[:1], lambda image: 1 / 0))
