"""Files are whole or absent, and a full disk is noticed before the work."""

from __future__ import annotations

import json
import os
from collections import namedtuple

import pytest

from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space, check_vacant, write_json, write_text

Usage = namedtuple("Usage", "total used free")


def test_a_filled_folder_is_kept_unless_told_otherwise(tmp_path):
    check_vacant(tmp_path, overwrite=False)
    check_vacant(tmp_path / "new", overwrite=False)
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(UsageError, match="--overwrite"):
        check_vacant(tmp_path, overwrite=False)
    check_vacant(tmp_path, overwrite=True)
    with pytest.raises(UsageError, match="is a file"):
        check_vacant(tmp_path / "kept.txt", overwrite=True)


def test_a_full_disk_is_noticed_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(100, 99, 1 << 20))
    check_space(tmp_path / "a" / "b", 1 << 20)
    with pytest.raises(OSError, match=r"needs about 2 MB .* 1 MB free"):
        check_space(tmp_path / "a" / "b", 2 << 20)
    assert not (tmp_path / "a").exists()


def test_a_folder_without_permission_is_noticed_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(OSError, match="no permission"):
        check_space(tmp_path / "new")


def test_a_write_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "results" / "a.txt"
    write_text(path, "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_json_is_json_for_everybody(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": (1, float("inf")), 3: None})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": None, "y": [1, None], "3": None}
    assert "NaN" not in text
