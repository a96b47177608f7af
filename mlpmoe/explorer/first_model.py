"""The model that the page opens with: loaded in the background, while the page answers."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

from ..core.errors import UserError
from ..models import default_model
from ..models.catalogue import DEMO_KEY
from .loaded import LoadedModel
from .workbench import Workbench

VARIABLE = "MLPMOE_FIRST_MODEL"  # a host's own choice: a name that the page could load

logger = logging.getLogger(__name__)


class FirstModel:
    """Loads it once for all visitors, who may follow how far it is."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench
        self.note = ""  # why it is the demo model, where another was meant
        self._loaded: LoadedModel | None = None
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
        """What is being done, each time it changes, and at the end the model."""
        self.start()
        told = ""
        while self._loaded is None:
            with self._news:
                if self._message == told and self._loaded is None:
                    self._news.wait()
                told = self._message
            yield told
        yield self._loaded

    def _load(self) -> None:
        name, note = os.environ.get(VARIABLE, "").strip(), ""
        try:
            if not name:
                name, note = default_model()
            for step in self.workbench.load(name):
                self._tell(step, name)
            loaded = step
        except Exception as error:  # whatever it was, the demo model is there
            if not isinstance(error, UserError):
                logger.exception("the first model cannot be loaded")
            reason = str(error) if isinstance(error, UserError) else "see the server's log"
            note = (
                f"{name} cannot be loaded here ({reason.rstrip('.')}), so this is the demo model."
            )
            loaded = self.workbench.loaded(DEMO_KEY)
        with self._news:
            self.note, self._loaded = note, loaded
            self._news.notify_all()

    def _tell(self, step: str | LoadedModel, name: str) -> None:
        if isinstance(step, str):
            with self._news:
                self._message = f"{name}: {step}"
                self._news.notify_all()
