"""What sets the controls: a link, a run that is restored, a preset, a loaded model, a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

import gradio as gr

from ..core.errors import UserError
from ..core.presets import PRESETS
from ..core.spec import ConversionSpec
from ..models.catalogue import DEMO_KEY, find_entry
from .cards import status_line
from .events import sentence
from .expert_settings import CONTROLS as ROUTED_CONTROLS
from .expert_settings import show_spec as show_routed
from .links import DEFAULT_TEXT, Link, read_link
from .loaded import LoadedModel
from .settings import CONTROLS, most_branches, show_spec
from .texts import text_choices
from .workbench import Workbench, model_key

LOADED = 5  # outputs of `load`
RESTORED = 2 + len(CONTROLS) + 1 + len(ROUTED_CONTROLS) + 1  # outputs of `_restored`


class OpeningHandlers:
    """The events of the page over one workbench that set its controls."""

    def __init__(self, workbench: Workbench) -> None:
        self.workbench = workbench

    def open_link(self, request: gr.Request) -> tuple:
        """The page is open: whether it can be filled in, what to restore once its model is loaded,
        status line, and then what `_restored` gives, from the link's query string."""
        link, notices = read_link(dict(request.query_params))
        demo = self.workbench.loaded(DEMO_KEY)
        self._warn(notices)
        other = link.model != DEMO_KEY
        if other and (self.workbench.holds(link.model) or find_entry(link.model)):
            nothing = (gr.skip(),) * RESTORED
            return False, link.to_query(), status_line(demo), *nothing
        if other:
            gr.Info(f"This link is about {escape(link.model[:80])}. Press Load to load it.")
        return True, "", status_line(demo), *self._restored(link, demo, link.model)

    def load_taken(self, taken: str, model: str, branches: int) -> Iterator[tuple]:
        """The model of a run or a link that is to be restored, if it is another one: as `load`."""
        link, _ = read_link(_query(taken))
        if not taken or model_key(link.model) == model:
            yield (gr.skip(),) * LOADED
        else:
            yield from self.load(link.model, branches)

    def restore_taken(self, taken: str, model: str) -> tuple:
        """The page can be filled in, and what `_restored` gives."""
        if not taken:
            return (gr.skip(),) * (1 + RESTORED)
        link, notices = read_link(_query(taken))
        self._warn(notices)
        return True, *self._restored(link, self.workbench.loaded(model), model)

    def _restored(self, link: Link, loaded: LoadedModel, name: str) -> tuple:
        """Name of the model, text, controls of static and of routed specs, tab."""
        text, spec = link.text, link.spec
        try:
            self.workbench.texts.check(text)
        except UserError as error:
            self._warn([f"{error} The evaluation stories are used."])
            text = DEFAULT_TEXT
        try:
            spec.check_fits(loaded.d_ff)
        except UserError as error:
            self._warn([f"{error} The default settings are shown."])
            spec = ConversionSpec()
        static, routed = (gr.skip(),) * (len(CONTROLS) + 1), (gr.skip(),) * len(ROUTED_CONTROLS)
        if spec.routed:
            routed = show_routed(spec)
        else:
            static = show_spec(spec, loaded)
        return (
            name,
            gr.update(choices=text_choices(text), value=text),
            *static,
            *routed,
            gr.update(selected=link.tab) if link.tab else gr.skip(),
        )

    def _warn(self, notices: Sequence[str]) -> None:
        for notice in notices:
            gr.Warning(sentence(UserError(notice)), title="Not as in the link")

    def use_text(self, content: str) -> dict:
        """The list of texts with the visitor's own, chosen."""
        key = self.workbench.texts.add(content)
        return gr.update(choices=text_choices(key), value=key)

    def use_file(self, path: str | None) -> dict:
        if path is None:
            return gr.skip()
        return self.use_text(Path(path).read_bytes())

    def choose_preset(self, model: str, name: str) -> tuple:
        loaded = self.workbench.loaded(model)
        if name not in PRESETS:
            return (gr.skip(),) * (len(CONTROLS) + 1)
        PRESETS[name].check_fits(loaded.d_ff)
        return show_spec(PRESETS[name], loaded)

    def load(self, name: str, branches: int) -> Iterator[tuple]:
        """Status line, model key, then the limits of B, layer and projection."""
        unchanged = (gr.skip(),) * (LOADED - 1)
        for step in self.workbench.load(name):
            if isinstance(step, str):
                yield f"<p>{escape(str(name)[:80])}: {escape(step)} …</p>", *unchanged
        loaded = step
        yield (
            status_line(loaded),
            loaded.key,
            gr.update(maximum=most_branches(loaded), value=min(branches, most_branches(loaded))),
            gr.update(maximum=max(1, len(loaded.mlps) - 1), value=0),
            gr.update(choices=loaded.projections, value=loaded.projections[0]),
        )

    def load_failed(self, model: str) -> tuple[str, bool]:
        """The status line of the model that is still there, and that the page can be filled in."""
        return status_line(self.workbench.loaded(model)), True


def _query(taken: str) -> str:
    """What page.js sends: a query string and, after a space, the time."""
    return taken.partition(" ")[0]
