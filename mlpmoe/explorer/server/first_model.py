"""The model that the page opens with: loaded in the background, while the page answers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from ...core.errors import UserError
from ...models import default_model
from ...models.catalogue import DEMO_KEY
from .loaded import LoadedModel
from .workbench import Workbench

VARIABLE = "MLPMOE_FIRST_MODEL"  # a host's own choice: a name that the page could load

logger = logging.getLogger(__name__)


class FirstModel:
    """Loads it once for all visitors, who may follow how far it is."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.note = ""  # why it is the demo model, where another was meant
        self._model: Future[LoadedModel] = Future()
        self._message = "starting"
        self._news = threading.Condition()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, if that was not done before."""
        with self._news:
            if self._thread is None:
                self._thread = threading.Thread(target=self._load, daemon=True)
                self._thread.start()

    def follow(self) -> Iterator[str | LoadedModel]:
        """What is being done, each time it changes, and at the end the model. Raises ModelError if
        not even the demo model can be loaded."""
        self.start()
        told = ""
        while not self._model.done():
            with self._news:
                if self._message == told and not self._model.done():
                    self._news.wait()
                told = self._message
            yield told
        yield self._model.result()

    def _load(self) -> None:
        try:
            loaded = self._first_or_demo()
            self.workbench.staying.add(loaded.key)
            self._model.set_result(loaded)
        except Exception as error:
            self._model.set_exception(error)
        with self._news:
            self._news.notify_all()

    def _first_or_demo(self) -> LoadedModel:
        name = os.environ.get(VARIABLE, "").strip()
        try:
            if not name:
                name, why = default_model()
                self.note = why if name == DEMO_KEY else ""
            for step in self.workbench.load(name, by_host=True):
                self._tell(step, name)
            return step
        except Exception as error:  # whatever it was, the demo model is there
            if not isinstance(error, UserError):
                logger.exception("the first model cannot be loaded")
            reason = str(error) if isinstance(error, UserError) else "see the server's log"
            self.note = (
                f"{name or 'The first model'} cannot be loaded here ({reason.rstrip('.')}), so "
                "this is the demo model."
            )
            return self.workbench.loaded(DEMO_KEY)

    def _tell(self, step: str | LoadedModel, name: str) -> None:
        if isinstance(step, str):
            with self._news:
                self._message = f"{name}: {step}"
                self._news.notify_all()
