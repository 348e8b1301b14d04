"""The report on versions, devices and backbones."""

import re
import runpy

import pytest
import torch

import sklearn_lqf
from sklearn_lqf import versions
from sklearn_lqf.versions import installed_versions


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


def test_report_names_versions_devices_and_backbones(capsys):
    sklearn_lqf.show_versions()
    printed = capsys.readouterr().out
    assert re.search(rf"^  sklearn_lqf +{re.escape(sklearn_lqf.__version__)}$", printed, re.M)
    assert re.search(rf"^  torch +{re.escape(installed_versions(['torch'])['torch'])}$", printed, re.M)
    assert re.search(r"^  cpu +\d+ threads$", printed, re.M)
    assert re.search(r"^  vector +auto$", printed, re.M)


def test_command_prints_the_same(capsys):
    sklearn_lqf.show_versions()
    printed = capsys.readouterr().out
    runpy.run_module("sklearn_lqf", run_name="__main__")
    assert capsys.readouterr().out == printed


def test_import_of_the_command_prints_nothing(capsys):
    runpy.run_module("sklearn_lqf.__main__", run_name="imported")
    assert capsys.readouterr().out == ""


def test_absent_packages():
    assert installed_versions(["numpy-of-nobody"]) == {"numpy-of-nobody": None}
    assert versions._section("T", {"a": None, "bb": "1"}) == ["T", "  a   not installed", "  bb  1", ""]


def test_accelerators_are_listed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    class Device:
        name, total_memory = "Some GPU", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Device)
    assert versions._devices()["cuda:0"] == "Some GPU, 80 GiB"
