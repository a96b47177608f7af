"""The models a server holds, shared by all its visitors."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator

from ...core.errors import UserError
from ...core.spec import ConversionSpec
from ...models import find_entry, load_checked, preflight
from ...models.catalogue import DEMO_KEY
from .background import in_thread
from .loaded import LoadedModel
from .texts import Texts

MAX_GUESTS = 1  # models held beside those that stay; the one used longest ago makes room


class Workbench:
    """The loaded models of a server: the demo model and what the page opens with for good, and a
    few guests."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()
        self._loading = threading.Lock()
        self.staying = {DEMO_KEY}  # keys
        self.texts = Texts()

    def holds(self, name: str) -> bool:
        """Whether a model is in memory."""
        return model_key(name) in self._models

    def loaded(self, name: str) -> LoadedModel:
        """A model that is in memory; UserError if it had to make room for another."""
        key = model_key(name)
        if key == DEMO_KEY and key not in self._models:
            for _ in self.load(DEMO_KEY):
                pass
        if key not in self._models:
            what = "the model of this page" if name == "" else f"{name!r:.80}"
            raise UserError(
                f"{what} is not loaded on this server (any more). Load it on the page first."
            )
        self._models.move_to_end(key)
        return self._models[key]

    def load(self, name: str, by_host: bool = False) -> Iterator[str | LoadedModel]:
        """Load a model by catalogue key, label, hub id or folder; yields what is being done, then
        the model. by_host: see `preflight`. Raises UserError if it cannot be loaded; closing the
        iterator gives up."""
        key = model_key(name)
        yield "checking"
        with self._loading:
            if key not in self._models:
                yield from self._load(key, by_host)
        self._models.move_to_end(key)
        yield self._models[key]

    def _load(self, key: str, by_host: bool) -> Iterator[str]:
        guests = [k for k in self._models if k not in self.staying]
        leaving = [] if key in self.staying else guests[: max(0, len(guests) + 1 - MAX_GUESTS)]
        freed = sum(self._models[k].checked.memory_needed for k in leaving)
        checked = preflight(key, by_host=by_host, reclaimable=freed)
        if checked.memory_needed > (checked.memory_available or 0) - freed:
            for old in leaving:  # only together they are too large
                del self._models[old]
        model, tokenizer = yield from in_thread(
            lambda report: load_checked(checked, on_progress=report)
        )
        entry = find_entry(key)
        loaded = LoadedModel(
            key,
            entry.label if entry else checked.name,
            checked,
            model,
            tokenizer,
            self.texts,
        )
        yield "reading its MLPs"
        loaded.converted(ConversionSpec(branches=1))  # refuses what cannot be split
        for old in leaving:
            self._models.pop(old, None)
        self._models[key] = loaded


def model_key(name: str) -> str:
    """One name per model: the catalogue's key where there is one."""
    if not isinstance(name, str):
        raise UserError("no model was named. Choose one of the list.")
    entry = find_entry(name)
    return entry.key if entry else name.strip()
