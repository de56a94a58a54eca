"""The cluster that the tests of this folder share."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, reason_to_skip, running_cluster


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the cluster."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker("slurm")


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes of a private Slurm, or a skip that says what is missing."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    # Not pytest's own folder, whose path is too long for a socket in it.
    folder = Path(tempfile.mkdtemp(prefix="slurm."))
    try:
        with running_cluster(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)
