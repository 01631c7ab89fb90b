"""The real thing: embedded model, fetched data. Slow to load, so once a session."""

import pytest

from safelab.models import EMBEDDED, SAFE, load_model


@pytest.fixture(scope="session")
def safe_model():
    return load_model(SAFE)


@pytest.fixture(scope="session")
def unaligned_model():
    return load_model(EMBEDDED)
