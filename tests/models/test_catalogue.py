from __future__ import annotations

import pytest

from mlpmoe.models.catalogue import CATALOGUE, assets_folder, find_entry
from mlpmoe.models.checkpoint import folder_checkpoint
from mlpmoe.models.names import HubPlace, identify


def test_entries_are_found_by_key_label_and_hub_id_in_any_case():
    for entry in CATALOGUE:
        assert find_entry(entry.key) is entry
        assert find_entry(f"  {entry.label.upper()} ") is entry
        if isinstance(entry.source, str):
            assert find_entry(entry.source.lower()) is entry
    assert find_entry("") is None


def test_keys_and_labels_are_unique_and_demo_comes_first():
    names = [name for entry in CATALOGUE for name in (entry.key, entry.label)]
    assert len(set(names)) == len(names)
    assert CATALOGUE[0].key == "demo"
    assert CATALOGUE[0].source == assets_folder() / "demo"


def test_a_folder_called_like_a_catalogue_model_is_not_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    (tmp_path / "other" / "model").mkdir(parents=True)
    assert identify("Qwen/Qwen3-0.6B", allow_any=True) == HubPlace("Qwen/Qwen3-0.6B")
    assert identify("other/model", allow_any=True).is_dir()


def test_the_demo_model_has_the_parameters_that_the_catalogue_promises():
    config = assets_folder() / "demo" / "config.json"
    if not config.is_file():
        pytest.skip("the demo model has not been trained here")
    from mlpmoe.models.architecture import inspect

    found = inspect(folder_checkpoint(config.parent, "demo"))
    assert found.parameters == CATALOGUE[0].parameters
