"""Files that readers see whole or not at all."""

from pathlib import Path

import pytest

from byteloom.core.storage.files import replace_file


@pytest.mark.parametrize("name", ["folder", "no/such/page.html"])
def test_error_of_a_write_names_the_file_and_leaves_nothing(tmp_path: Path, name: str):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError) as caught:
        replace_file(tmp_path / name, "text")
    assert caught.value.filename == str(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
