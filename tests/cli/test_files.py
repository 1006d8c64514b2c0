"""A full disk, a filled folder, a forbidden one: noticed before the work."""

from __future__ import annotations

from collections import namedtuple

import pytest

from openmsa.cli.door import UsageError
from openmsa.cli.files import check_space, check_vacant

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
