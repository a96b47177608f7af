"""A model in 16 bits is built as always, and torch's default dtype stays for other threads."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlpmoe.models.loading import load
from mlpmoe.models.quiet_dtype import default_dtype_stays
from tests.families import FAMILIES, build


def test_other_threads_see_no_change(tiny_folder):
    seen, done = set(), threading.Event()

    def watch():
        while not done.is_set():
            seen.add(torch.get_default_dtype())
            seen.add(torch.zeros(1).dtype)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(5):
            model, _ = load(tiny_folder, "bfloat16", "cpu")
    finally:
        done.set()
        watcher.join()
    assert model.dtype == torch.bfloat16
    assert seen == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_is_what_transformers_makes_it(family, tmp_path):
    build(family).save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    with default_dtype_stays():
        found = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(model, kind)()) for model in (found, expected))
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert mine[name].dtype == tensor.dtype, name
            assert torch.equal(mine[name], tensor), name
