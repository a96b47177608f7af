"""What happens as the controls move and a conversion is measured: values in, updates out.

Nothing of a visitor is kept here but what they look at, so that a measurement that has been
overtaken stops by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing
from dataclasses import dataclass
from math import inf, nan
from time import monotonic, time_ns
from typing import Any

import gradio as gr

from ...core.checks import layer_numbers
from ...core.errors import UserError
from ...core.stopping import stoppable
from ..server.asked import Calibrated, Conversion, spec_of
from ..server.background import each_in_thread, in_thread
from ..server.events import sentence
from ..server.loaded import LoadedModel, ends_here
from ..server.looks import Looks
from ..server.turns import Place
from ..server.workbench import Workbench
from .convert_panel import CUSTOM
from .front import FRONT, Front, axis_for, dense_network, front
from .links import FIRST_TAB, Link
from .preview import preset_name, snippet
from .records import Record, measured_record, now, write_records
from .settings import USED, arriving, parted, read_asked, set_budget, set_just_now, settle
from .training import TrainingNews

PREVIEW = USED + 5 + FRONT  # outputs of `preview`
WINDOWS_PER_ROUND = 2  # of perplexity to one of speed: neither waits for the other to end
MOST_LAYERS = 10_000  # of any model
NOT_MEASURED = "not measured; press Measure again"
TO_TRAIN = "Measure trains it first"
BETWEEN_ESTIMATES = 0.25  # seconds, at least: a page is busy with each for a while


@dataclass(frozen=True)
class _Chosen:
    """What is asked for, and how it is looked at."""

    loaded: LoadedModel
    asked: Conversion
    text: str
    axis: str
    mine: Sequence[Record]  # what the visitor's browser keeps
    layer: int

    @property
    def at(self) -> tuple:
        return self.loaded.key, self.asked, self.text

    def front(self, message: str) -> Front:
        return front(self.loaded, self.asked, self.text, self.axis, self.mine, self.layer, message)


class Handlers:
    """The events of the page over one workbench."""

    def __init__(self, workbench: Workbench, looks: Looks | None = None) -> None:
        self.workbench, self.looks = workbench, looks or Looks()

    def preview(self, request: gr.Request, model: str, *values: Any) -> tuple:
        """All that needs no forward pass, at once; what was measured before, if it was. A
        calibrated conversion is shown once it is made (`measure`). A page that is slow to show
        what was set from here is asked again."""
        settings, (text, axis, mine, layer, share, budget) = parted(values)
        loaded = self.workbench.loaded(model)
        loaded.texts.check(text)
        if arriving(settings, share):
            again = str(time_ns()) if set_just_now(share) else gr.skip()
            return *(gr.skip(),) * (PREVIEW - FRONT - 1), again, *(gr.skip(),) * FRONT
        settings, used, said = settle(loaded, settings, share, budget)
        if self.looks.is_of(request, loaded.key):  # what another model left behind is nobody's slip
            for notice in said:
                gr.Info(notice)
        asked = read_asked(loaded, settings)
        spec = spec_of(asked)
        shown = axis_for(axis, loaded, asked)
        chosen = _Chosen(loaded, asked, text, shown, mine, layer)
        # the page may ask again for what it shows: what is being measured goes on
        if not self.looks.is_at(request, chosen.at):
            self.looks.move(request, chosen.at)
        message = NOT_MEASURED if self.looks.of(request).failed else "measuring …"
        if loaded.is_to_train(asked):
            message = TO_TRAIN
        calibration = asked.key if isinstance(asked, Calibrated) else None
        return (
            *used,
            preset_name(spec) or CUSTOM,
            Link(loaded.key, spec, text, calibration=calibration).to_query(),
            snippet(loaded.key, spec, text, calibration),
            gr.skip() if shown == axis else shown,
            gr.skip(),
            *chosen.front(message).outputs,
        )

    def another_model(self, model: str) -> dict:
        """The network as it is before it is converted."""
        return dense_network(self.workbench.loaded(model))

    def look(self, model: str, *values: Any) -> tuple:
        """Curve and network, looked at otherwise; nothing before there is a model."""
        if not model:
            return gr.skip(), gr.skip()
        shown = self._chosen(model, values).front("")
        return shown.curve, shown.network

    def picked(self, spared: str, event: gr.EventData) -> tuple:
        """Layer that is looked at, layers that are spared, and the tab, of a click in the
        network."""
        done = event._data if isinstance(event._data, dict) else {}
        layer = done.get("layer")
        if type(layer) is not int or not 0 <= layer < MOST_LAYERS:
            return (gr.skip(),) * 3
        if done.get("action") != "spare":
            return layer, gr.skip(), gr.update(selected=FIRST_TAB)
        numbers = {*layer_numbers(spared)} ^ {layer}
        return gr.skip(), ", ".join(map(str, sorted(numbers))), gr.skip()

    def budget(self, model: str, *values: Any) -> tuple:
        """K and the active share at a budget that the visitor has set."""
        settings, (asked,) = parted(values)
        try:
            budget = float(asked.split()[0])
        except (ValueError, IndexError, AttributeError):
            budget = nan
        if not -inf < budget < inf:
            raise UserError("a budget is a number of per cent.")
        return set_budget(self.workbench.loaded(model), settings, budget)

    def measure_live(
        self, request: gr.Request, model: str, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        """The front and the new run, as an estimate sharpens by itself."""
        yield from self._measure(request, model, values, whole=False)

    def measure(self, request: gr.Request, model: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """The same to the end of the text, and speed anew."""
        yield from self._measure(request, model, values, whole=True)

    def stop_measuring(self, request: gr.Request, model: str, *values: Any) -> tuple[Any, ...]:
        self.looks.move(request, ())
        return self._not_measured(model, values, "stopped; Measure goes on")

    def measuring_failed(self, model: str, *values: Any) -> tuple[Any, ...]:
        return self._not_measured(model, values, NOT_MEASURED)

    def _not_measured(self, model: str, values: Sequence[Any], message: str) -> tuple[Any, ...]:
        """The front with what is known, and the message where nothing is."""
        chosen = self._chosen(model, values)
        trained = TrainingNews(chosen.loaded, chosen.asked).tell()
        return *chosen.front(message).outputs, *trained, gr.skip()

    def _chosen(self, model: str, values: Sequence[Any]) -> _Chosen:
        settings, (text, axis, mine, layer) = parted(values)
        loaded = self.workbench.loaded(model)
        return _Chosen(loaded, read_asked(loaded, settings), text, axis, mine, layer)

    def _measure(
        self, request: gr.Request, model: str, values: Sequence[Any], whole: bool
    ) -> Iterator[tuple[Any, ...]]:
        """Whatever is yielded last stays on the page. What a visitor looks at is measured by itself
        once; the button begins anew."""
        chosen = self._chosen(model, values)
        if not whole:
            look = self.looks.of(request)
            if look is None or look.at != chosen.at or look.begun:
                return
            if chosen.loaded.is_to_train(chosen.asked):  # which only the button begins
                return
        mine = self.looks.move(request, chosen.at, whole)
        mine.begun = True
        check = self.looks.check(request, mine)
        try:
            with closing(_steps(chosen, mine.whole, whole)) as steps:
                while True:
                    try:
                        with stoppable(check):
                            step = next(steps)
                        check()
                    except (CancelledError, StopIteration):
                        break
                    yield step
        except GeneratorExit:  # nobody is there to see the rest
            mine.begun = False
            raise
        except Exception:
            mine.failed = True
            raise


def _steps(chosen: _Chosen, whole: bool, speed_anew: bool) -> Iterator[tuple[Any, ...]]:
    """The front, as far as it changes, what training has done, and the new run."""
    loaded, asked, text, began = chosen.loaded, chosen.asked, chosen.text, now()
    trained = TrainingNews(loaded, asked)

    def known(message: str) -> tuple[Any, ...]:
        return *chosen.front(message).outputs, *trained.tell(), gr.skip()

    def measured(message: str) -> tuple[Any, ...]:
        return *chosen.front(message).measured, *trained.tell(), gr.skip()

    def run() -> Any:
        if not loaded.is_repeatable(asked):
            return gr.skip()
        return write_records([measured_record(loaded, asked, text, when=began)])

    if not loaded.is_converted(asked):
        for message in loaded.convert(asked):
            yield known(f"{message} …")
        if said := loaded.few_tokens(asked):
            gr.Warning(sentence(UserError(said)), title="Few calibration tokens")
        yield known("measuring …")
    if spec_of(asked).routed and loaded.known_routing(asked) is None:
        for said in in_thread(lambda report: loaded.routing(asked)):
            yield measured(f"{said if isinstance(said, Place) else 'watching the experts'} …")
        yield known("measuring …")
    if not loaded.has_text(text):
        yield measured("reading the text …")
        for message in in_thread(lambda report: loaded.text(text)):
            yield measured(f"{message} …")
    untimed = speed_anew or loaded.known_speed(asked) is None
    timing = loaded.speed(asked) if untimed else iter(())
    shown = -inf

    def due() -> bool:
        nonlocal shown
        late = monotonic() - shown > BETWEEN_ESTIMATES
        shown = monotonic() if late else shown
        return late

    number = -1
    for found in each_in_thread(loaded.evaluate(asked, text, whole)):
        if isinstance(found, Place):
            yield measured(f"{found} …")
            continue
        number, ended = number + 1, ends_here(found, whole)
        if due() or ended:
            # the run together with its figures: who sees them may go on at once
            yield *measured("measuring …")[:-1], run() if ended else gr.skip()
        if number and number % WINDOWS_PER_ROUND == 0 and next(timing, None) and due():
            yield measured("measuring …")
    for report in timing:
        if report and due():
            yield measured("measuring …")
    # all of it once more: a page that was busy may have passed over a part
    yield *known("")[:-1], run()
    if not spec_of(asked).routed:
        loaded.structure.get_ready_to_fade(asked)
