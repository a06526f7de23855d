import sys
from collections.abc import Iterator

import pytest

from tests.launch.stage import Stage


@pytest.fixture
def stage(tmp_path) -> Iterator[Stage]:
    if sys.platform != "linux":
        pytest.skip("the machines that these scripts are for, and the tools on them, are Linux's")
    stage = Stage(tmp_path)
    yield stage
    stage.end()
