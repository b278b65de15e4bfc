"""Files that are replaced in one step."""

import os
from pathlib import Path

import pytest

from common.files import write_atomically


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_write_that_is_interrupted_leaves_the_old_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    file = write_atomically(tmp_path / "a.json", "old")

    def refuse(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(error):
        write_atomically(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"] and file.read_text() == "old"
