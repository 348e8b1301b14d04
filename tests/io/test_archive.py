"""Files of a header and tensors: whole or refused."""

import json
import os
import stat
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sklearn_lqf.io.archive import FORMAT, digest, read_archive, write_archive

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(0, dtype=torch.bool), "c": torch.tensor(1)}


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "file.safetensors"
    write_archive(found, {"x": [1, "ä"]}, TENSORS)
    return found


def test_there_and_back(path):
    header, tensors = read_archive(path)
    assert header["x"] == [1, "ä"]
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[k], v) and tensors[k].dtype == v.dtype for k, v in TENSORS.items())
    base = torch.arange(12.0).reshape(3, 4)  # tensors that share memory or lie strided
    several = {"whole": base, "part": base[1:], "turned": base.T, "expanded": torch.ones(1).expand(5)}
    write_archive(path, {}, several)
    assert all(torch.equal(v, several[k]) for k, v in read_archive(path)[1].items())
    assert os.listdir(path.parent) == [path.name]


def test_digest_tells_names_dtypes_shapes_and_bytes_apart():
    zeros, ints, other = torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.tensor([0, 0, 0, 1.0])
    different = [({"a": v}, "") for v in (zeros, zeros.reshape(2, 2), ints, other)]
    different += [({"b": zeros}, ""), ({"a": zeros[:2], "b": zeros[:2]}, ""), ({"a": zeros}, "text")]
    assert len({digest(*case) for case in different}) == len(different)
    assert digest({"a": torch.zeros(1), "b": torch.ones(1)}) == digest({"b": torch.ones(1), "a": torch.zeros(1)})


def test_damage_is_refused_or_does_nothing(path):
    """150 seeded flips of bits, truncations and insertions."""
    content, rng = path.read_bytes(), np.random.default_rng(0)
    before, harmless = read_archive(path), 0
    for k in range(150):
        at = int(rng.integers(len(content)))
        flipped = content[:at] + bytes([content[at] ^ (1 << int(rng.integers(8)))]) + content[at + 1 :]
        inserted = content[:at] + rng.bytes(int(rng.integers(1, 9))) + content[at:]
        path.write_bytes((flipped, content[:at], inserted)[k % 3])
        try:
            header, tensors = read_archive(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            harmless += 1
            assert header == before[0]
            assert digest(tensors) == digest(before[1])
    assert harmless < 4


RIGHT = {"format": FORMAT, "version": "1"}
OTHERS = [  # header, what else the file says, and the error
    ({"format": FORMAT}, {}, r"its header is broken \(KeyError: 'version'\)"),
    (RIGHT, {"digest": "0"}, "does not have the digest that it states"),
    ({"format": FORMAT + 1, "version": "9.0"}, {"digest": "of another kind"},
     rf"sklearn_lqf 9.0 wrote it in format {FORMAT + 1}.*install a newer version"),
    ({"format": 1, "version": "0.1.0"}, {"digest": "of another kind"},
     r"sklearn_lqf 0.1.0 wrote it in format 1.*fit it again, or load it with the version that wrote it"),
]  # fmt: skip


@pytest.mark.parametrize(("header", "more", "message"), OTHERS)
def test_other_headers(path, header, more, message):
    text = json.dumps(header)
    save_file(TENSORS, path, {"sklearn_lqf": text, "digest": digest(TENSORS, text), **more})
    with pytest.raises(ValueError, match=message):
        read_archive(path)


def test_what_save_has_not_written(path):
    save_file(TENSORS, path)
    with pytest.raises(ValueError, match="was not written by save"):
        read_archive(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="it is no safetensors file, or it is broken"):
        read_archive(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        read_archive(path)


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_failed_write_leaves_the_old_file_and_nothing_else(path, function, error, monkeypatch):
    def fail(*args):
        raise error

    before = path.read_bytes()
    monkeypatch.setattr(function, fail)
    with pytest.raises(type(error)):
        write_archive(path, {"x": 2}, TENSORS)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_killed_write_leaves_the_old_file(path, monkeypatch):
    with monkeypatch.context() as killed:  # neither the new name nor anything after it
        killed.setattr("os.replace", Mock(side_effect=KeyboardInterrupt))
        killed.setattr(Path, "unlink", Mock())
        with pytest.raises(KeyboardInterrupt):
            write_archive(path, {"x": 2}, TENSORS)
    assert len(os.listdir(path.parent)) == 2
    assert read_archive(path)[0]["x"] == [1, "ä"]
    write_archive(path, {"x": 3}, TENSORS)  # what it has left is not in the way
    assert read_archive(path)[0]["x"] == 3


def test_links_stay_and_rights_are_those_of_new_files(path):
    link = path.with_name("link")
    link.symlink_to(path)
    write_archive(link, {"x": 4}, TENSORS)
    assert link.is_symlink()
    assert read_archive(path)[0]["x"] == 4
    plain = path.with_name("plain")
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_missing_folder_and_missing_package(path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_archive(path.parent / "absent" / "f", {}, TENSORS)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: read_archive(path), lambda: write_archive(path, {}, TENSORS)):
        with pytest.raises(ImportError, match=r"sklearn-lqf\[save\]"):
            call()
