"""A disk that is full, for a while."""

import contextlib
import resource

import pytest


@pytest.fixture
def full_disk():
    """A context in which no file grows beyond so many bytes: writing more fails as it does on a full disk."""

    @contextlib.contextmanager
    def limit(size: int):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
