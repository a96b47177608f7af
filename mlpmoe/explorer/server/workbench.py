"""The models a server holds, shared by all its visitors."""

from __future__ import annotations

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from math import inf
from time import monotonic

from ...core.errors import UserError
from ...core.memory import return_memory
from ...core.spec import ConversionSpec
from ...models import find_entry, load_checked, preflight
from ...models.catalogue import DEMO_KEY
from .background import in_thread
from .loaded import LoadedModel
from .texts import Texts
from .turns import Turns

MAX_IDLE = 1  # models that nobody uses, held beside those that stay; the one used longest ago goes
IN_USE = 60.0  # seconds after its last use in which a visitor still looks at a model


class Workbench:
    """The loaded models of a server: the demo model and what the page opens with for good, what
    visitors use, and what nobody uses for as long as there is room."""

    def __init__(self) -> None:
        self._models: OrderedDict[str, LoadedModel] = OrderedDict()  # the last used last
        self._used: dict[str, float] = {}  # when each was
        self._loading, self._changing = Turns(), threading.Lock()
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
        found = self._use(key)
        if found is None:
            what = "the model of this page" if name == "" else f"{name!r:.80}"
            raise UserError(
                f"{what} is not loaded on this server (any more). Load it on the page first."
            )
        return found

    def load(self, name: str, by_host: bool = False) -> Iterator[str | LoadedModel]:
        """Load a model by catalogue key, label, hub id or folder; yields what is being done, then
        the model. by_host: see `preflight`. Raises UserError if it cannot be loaded; closing the
        iterator gives up."""
        key = model_key(name)
        yield "checking"
        while (found := self._use(key)) is None:  # it may have made room for another meanwhile
            yield from in_thread(lambda report: self._load_in_turn(key, by_host, report))
        yield found

    def _load_in_turn(self, key: str, by_host: bool, report: Callable[..., None]) -> None:
        """One model at a time; nobody waits for that who asks for one that is there."""
        with self._loading.turn():
            if not self.holds(key):
                self._load(key, by_host, report)

    def hold(self, loaded: LoadedModel) -> LoadedModel:
        """Add a model that was loaded elsewhere."""
        with self._changing:
            self._models[loaded.key], self._used[loaded.key] = loaded, monotonic()
        return loaded

    def _use(self, key: str) -> LoadedModel | None:
        with self._changing:
            if key in self._models:
                self._models.move_to_end(key)
                self._used[key] = monotonic()
            return self._models.get(key)

    def _idle(self) -> list[LoadedModel]:
        """The models that may go, the one used longest ago first."""
        with self._changing:
            now = monotonic()
            return [
                loaded
                for key, loaded in self._models.items()
                if key not in self.staying and not loaded.is_busy and now - self._used[key] > IN_USE
            ]

    def _drop(self, loaded: LoadedModel) -> None:
        with self._changing:
            del self._models[loaded.key], self._used[loaded.key]

    def _load(self, key: str, by_host: bool, report: Callable[..., None]) -> None:
        idle = self._idle()
        freed = sum(loaded.checked.memory_needed for loaded in idle)
        checked = preflight(key, by_host=by_host, reclaimable=freed)
        # memory_available counts what all of the idle ones would free
        short = checked.memory_needed - (checked.memory_available or inf) + freed
        while idle and short > 0:
            short -= idle[0].checked.memory_needed
            self._drop(idle.pop(0))
        gc.collect()  # what belongs to a dropped model refers to it in circles
        return_memory()
        model, tokenizer = load_checked(checked, on_progress=report)
        entry = find_entry(key)
        loaded = LoadedModel(
            key,
            entry.label if entry else checked.name,
            checked,
            model,
            tokenizer,
            self.texts,
        )
        report("reading its MLPs")
        loaded.converted(ConversionSpec(branches=1))  # refuses what cannot be split
        del model  # so that nothing but the workbench holds it
        self.hold(loaded)
        for old in self._idle()[:-MAX_IDLE]:
            self._drop(old)


def model_key(name: str) -> str:
    """One name per model: the catalogue's key where there is one."""
    if not isinstance(name, str):
        raise UserError("no model was named. Choose one of the list.")
    entry = find_entry(name)
    return entry.key if entry else name.strip()
