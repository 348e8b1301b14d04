"""Values as JSON and tensors, and back."""

import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sklearn_lqf.io.manifest import decode, encode


def there_and_back(value):
    tensors = {}
    text = json.dumps(encode(value, "x", tensors), allow_nan=False)
    return decode(json.loads(text), tensors)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
trees = st.recursive(
    plain,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
)


@settings(max_examples=50, deadline=None, derandomize=True)  # a busy machine must not fail it
@given(trees)
def test_trees_of_plain_values(value):
    found = there_and_back(value)
    assert found == value
    assert repr(found) == repr(value)  # also the kinds inside


ARRAYS = {
    "floats": np.array([[0.1, -0.0, np.inf], [np.nan, 1e-320, 3.0]]),
    "big-endian": np.array([1.5, 2.0], dtype=">f8"),
    "half": np.array([0.1], dtype=np.float16),
    "unsigned": np.array([2**64 - 1], dtype=np.uint64),
    "bool": np.array([True, False]),
    "empty": np.empty((0, 3)),
    "no axis": np.array(3, dtype=np.int8),
    "not contiguous": np.arange(12).reshape(3, 4)[:, ::2],
    "text": np.array([["ä", "b\0c", "\ud800"]]),
    "bytes": np.array([b"a\xff", b"bc"]),
    "labels": np.array(["a", "b"], dtype=object),
    "objects": np.array(["a", 1, 2.5, True, None, np.int8(3), (1, "b")], dtype=object),
}


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
def test_arrays(value):
    found = there_and_back(value)
    assert (found.shape, found.dtype) == (value.shape, value.dtype.newbyteorder("="))
    np.testing.assert_array_equal(found, value)
    assert repr(found.tolist()) == repr(value.tolist())  # also signs of zeros, and the kinds inside


def test_other_values():
    assert there_and_back(np.float32(0.1)) == np.float32(0.1)
    assert isinstance(there_and_back(np.str_("a")), np.str_)
    assert np.isnan(there_and_back(float("nan")))
    assert there_and_back((-np.inf, Path("a") / "b")) == (-np.inf, str(Path("a") / "b"))
    assert there_and_back(OrderedDict(a={None: (), 1.5: []})) == {"a": {None: (), 1.5: []}}
    assert there_and_back(torch.device("cuda:1")) == "cuda:1"
    assert torch.equal(there_and_back(torch.arange(3).to(torch.bfloat16)), torch.arange(3).to(torch.bfloat16))
    source = np.random.RandomState(3)
    source.normal(size=3)
    assert np.array_equal(there_and_back(source).normal(size=5), source.normal(size=5))


def test_what_cannot_be_written_or_read():
    for value, message in (
        (print, "x is of type builtin_function_or_method; supported are None, bool"),
        ([1, {"a": {2, 3}}], "x.1.0 is of type set"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), r"x is an array of dtype datetime64\[D\]"),
        (np.array([object()]), "x.0 is of type object"),
        (np.longdouble(1), "x is an array of dtype (longdouble|float128)"),
    ):
        with pytest.raises(TypeError, match=message):
            encode(value, "x", {})
    for value in ({}, {"eval": "1"}, {"text": ["a"], "dtype": "O", "shape": [1]}, {"tensor": "absent"}):
        with pytest.raises((ValueError, KeyError)):
            decode(value, {})
