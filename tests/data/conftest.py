"""Each form of a data set, not to be changed."""

from pathlib import Path

import pytest

from tests.data.forms import FORMS
from zerofl.data.dataset import checksum


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Each form's folder, not to be changed, and its checksum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZEROFL_CACHE", str(tmp_path_factory.mktemp("cache")))
        whole = {}
        for name, form in FORMS.items():
            root = tmp_path_factory.mktemp("form") / "data"
            form.write(root)
            whole[name] = root, checksum(form.load(str(root)))
        return whole
