"""What sets the controls: a link, a run that is restored, a preset, a loaded model, a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ...core.errors import UserError
from ...core.presets import PRESETS
from ...core.spec import ConversionSpec
from ...models import default_calibration, default_text
from ...models.catalogue import DEMO_KEY, find_entry
from ..server.events import sentence
from ..server.first_model import FirstModel
from ..server.loaded import LoadedModel
from ..server.texts import show_calibration, show_text
from ..server.workbench import Workbench, model_key
from .cards import status_line
from .convert_panel import show_method
from .links import START, Link, read_link
from .preview import preset_name
from .settings import (
    AS_THEY_ARE,
    CONTROLS,
    Share,
    most_branches,
    parted,
    read_spec,
    set_budget,
    set_just_now,
    show_branches,
    show_spec,
)
from .training import Linked

MODEL = 3  # outputs of `_model`
LOADED = MODEL + 5  # outputs of `load`
RESTORED = 3 + len(CONTROLS) + 1 + 1 + 1  # outputs of `_restored`


class OpeningHandlers:
    """The events of the page over one workbench that set its controls."""

    def __init__(self, workbench: Workbench, first: FirstModel | None = None) -> None:
        self.workbench = workbench
        self.first = first or FirstModel(workbench)

    def open_link(self, request: gr.Request) -> Iterator[tuple]:
        """What to restore once its model is loaded; then what `_model` and what `_restored` give,
        from the link's query string."""
        link, notices = read_link(dict(request.query_params), default_model="")
        self._warn(notices)
        rest = (gr.skip(),) * (MODEL - 1 + RESTORED)
        yield gr.skip(), "<p>opening …</p>", *rest
        if link.model and self.workbench.holds(link.model):
            loaded = self.workbench.loaded(link.model)
        elif link.model and find_entry(link.model):
            yield link.to_query(), gr.skip(), *rest
            return
        else:
            if link.model:
                gr.Info(f"This link is about {escape(link.model[:80])}. Press Load to load it.")
            for step in self.first.follow():
                if isinstance(step, str):
                    yield gr.skip(), f"<p>{escape(step)} …</p>", *rest
            loaded = step
        restored = self._restored(link, loaded, link.model or loaded.key)
        yield "", *self._model(loaded), *restored

    def load_taken(
        self, taken: str, model: str, branches: int, keep: int, text: str, calibration: str
    ) -> Iterator[tuple]:
        """The model of a run or a link that is to be restored, if it is another one: as `load`."""
        link, _ = read_link(_query(taken))
        if not taken or model_key(link.model) == model:
            yield (gr.skip(),) * LOADED
        else:
            yield from self.load(link.model, model, branches, keep, text, calibration)

    def restore_taken(self, taken: str, model: str) -> tuple:
        """What `_restored` gives."""
        if not taken:
            return (gr.skip(),) * RESTORED
        link, notices = read_link(_query(taken))
        self._warn(notices)
        return self._restored(link, self.workbench.loaded(model), model)

    def _restored(self, link: Link, loaded: LoadedModel, name: str) -> tuple:
        """Name of the model, text, calibration text, controls with the share of K, tab, and the
        result of a training that the link names."""
        text = self._known_text(link.text, loaded, "text")
        calibration = self._known_text(link.calibration, loaded, "calibration")
        spec = link.spec
        try:
            loaded.check_fits(spec)
        except UserError as error:
            self._warn([f"{error} The default settings are shown."])
            spec = START if START.branches <= loaded.d_ff else ConversionSpec(branches=loaded.d_ff)
        return (
            name,
            show_text(text),
            show_calibration(calibration),
            *show_spec(spec, loaded),
            gr.update(selected=link.tab) if link.tab else gr.skip(),
            Linked(loaded.asked(spec, calibration), link.result) if link.result else None,
        )

    def _known_text(self, key: str | None, loaded: LoadedModel, what: str) -> str:
        """The key, where there is such a text, else the model's default with a notice."""
        default = {"text": default_text, "calibration": default_calibration}[what](loaded.key)
        if key is None:
            return default
        try:
            if what == "text":
                self.workbench.texts.check(key)
            else:
                self.workbench.texts.check_calibration(key)
        except UserError as error:
            self._warn([f"{error} The {what} of the model's kind is used."])
            return default
        return key

    def _warn(self, notices: Sequence[str]) -> None:
        for notice in notices:
            gr.Warning(sentence(UserError(notice)), title="Not as in the link")

    def use_text(self, content: str) -> dict:
        """The list of texts with the visitor's own, chosen."""
        key = self.workbench.texts.add(content)
        return show_text(key)

    def use_calibration(self, content: str) -> dict:
        """The list of calibration texts with the visitor's own, chosen."""
        key = self.workbench.texts.add(content)
        return show_calibration(key)

    def use_file(self, path: str | None) -> dict:
        if path is None:
            return gr.skip()
        return self.use_text(Path(path).read_bytes())

    def choose_preset(self, model: str, name: str, *values: Any) -> tuple:
        """What the controls show of a preset. Gradio says that a dropdown was used also as the
        focus leaves it; then the controls, whose values are given too, may move on meanwhile."""
        loaded = self.workbench.loaded(model)
        if name not in PRESETS or name == _named(values):
            return (gr.skip(),) * (len(CONTROLS) + 1)
        loaded.check_fits(PRESETS[name])
        return show_spec(PRESETS[name], loaded)

    def choose_method(self, model: str, *values: Any) -> tuple:
        """What `show_method` gives, K and the active share. A method that a visitor chooses comes
        with its authors' settings, at the budget there is; one that was set from here has its own.
        """
        settings, (share, budget) = parted(values)
        method = dict(zip(CONTROLS, settings, strict=False))["method"]
        if not model or set_just_now(share):
            return *show_method(method), gr.skip(), gr.skip()
        moved = (gr.skip(), gr.skip())
        if budget < 100:
            moved = set_budget(self.workbench.loaded(model), settings, budget)
        return *show_method(method, anew=True), *moved

    def load(
        self, name: str, model: str, branches: int, keep: int, text: str, calibration: str
    ) -> Iterator[tuple]:
        """What `_model` gives, then B, K, the share that K stands for, and the texts.

        name: what was asked for. model: the key of the one that was there before."""
        unchanged = (gr.skip(),) * (LOADED - 1)
        for step in self.workbench.load(name):
            if isinstance(step, str):
                yield f"<p>{escape(str(name)[:80])}: {escape(step)} …</p>", *unchanged
        loaded, most = step, most_branches(step)
        # a text of the visitor's choice stays; else it is that of the model's kind
        if text == default_text(model):
            text = default_text(loaded.key)
        if calibration == default_calibration(model):
            calibration = default_calibration(loaded.key)
        shown = gr.update(maximum=most), gr.skip(), gr.skip()
        if branches > most:
            kept = Share(keep, branches, branches).at(most)
            shown = show_branches(most, kept, most)
        yield (
            *self._model(loaded),
            *shown,
            show_text(text),
            show_calibration(calibration),
        )

    def _model(self, loaded: LoadedModel) -> tuple:
        """Status line, model key and note."""
        return status_line(loaded), loaded.key, self._note(loaded)

    def _note(self, loaded: LoadedModel) -> dict:
        """What to know about the model, as a line below its figures."""
        words = []
        if loaded.key == DEMO_KEY:
            words = [
                "A toy that writes children's stories. It hides most of the damage: what costs "
                "it 12 % can make a real model useless."
            ]
        if self.first.note and loaded.key == DEMO_KEY:
            words.append(self.first.note)
        return gr.update(value=f"<p>{escape(' '.join(words))}</p>", visible=bool(words))

    def load_failed(self, model: str) -> tuple[str, str, str]:
        """Name and status line of the model that is still there, and that the controls stand as
        they are."""
        loaded = self.workbench.loaded(model)
        return loaded.key, status_line(loaded), AS_THEY_ARE


def _query(taken: str) -> str:
    """What page.js sends: a query string and, after a space, the time."""
    return taken.partition(" ")[0]


def _named(values: Sequence[Any]) -> str | None:
    """The preset that the controls show, if they show one."""
    try:
        return preset_name(read_spec(values))
    except UserError:
        return None
