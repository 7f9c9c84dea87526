"""This process's app on an empty database and broker of the test's own; nothing runs the jobs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.deployment import Deployment, deployed


@pytest.fixture
def producer(server_dir: Path, tmp_path: Path) -> Iterator[Deployment]:
    with deployed(server_dir, tmp_path) as deployment:
        yield deployment
