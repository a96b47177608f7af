"""For all tests: no network, one thread, property tests that ignore the machine's mood."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Tiny tensors gain nothing from more threads, and threads that wait for a busy core cost a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

# A shared machine may pause anywhere, so time per example proves nothing.
settings.register_profile("mlpmoe", deadline=None)
settings.load_profile("mlpmoe")
