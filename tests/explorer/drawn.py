"""Whatever a visitor can set, drawn at random."""

from __future__ import annotations

from hypothesis import strategies as st

from mlpmoe.core.choices import ALLOCATIONS, unit_choices
from mlpmoe.core.routed import ROUTED_METHODS
from mlpmoe.core.routed.routers import ROUTERS
from mlpmoe.core.spec import MAX_FADE, PROJECTIONS
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.schedule import SCHEDULES
from mlpmoe.core.static.scores import SCORES
from mlpmoe.explorer.shell.settings import LEAST_ACTIVE, MAX_BRANCHES, MAX_EXPERTS, OWN, read_spec
from tests.explorer.controls import controls

branch_counts = st.integers(1, 48)  # of the tiny model's 48 neurons
UNITS = [unit for _, unit in unit_choices()]


@st.composite
def settings_of_the_page(draw):
    """Anything that a visitor can set, as the page sends it."""
    branches = draw(branch_counts)
    return {
        "branches": branches,
        "fade": draw(st.one_of(st.just(0.0), st.just(0), st.floats(0, MAX_FADE))),
        "keep": draw(st.integers(1, MAX_BRANCHES)),
        "compensation": draw(st.sampled_from(list(COMPENSATIONS))),
        "order": draw(st.sampled_from(list(ORDERS))),
        "fade_schedule": draw(st.sampled_from(list(SCHEDULES))),
        "fade_exponent": draw(st.floats(0.25, 8)),
        "fade_projections": draw(st.permutations(PROJECTIONS))[: draw(st.integers(1, 3))],
        "fade_score": draw(st.sampled_from(list(SCORES))),
        "fade_unit": draw(st.sampled_from([*UNITS, "3:7"])),
        "allocation": draw(st.sampled_from(list(ALLOCATIONS))),
        "progressive": draw(st.booleans()),
        "spared": draw(st.sampled_from(["", "0"])),
    }


@st.composite
def routed_settings_of_the_page(draw):
    """The same for routed methods; a router may be left over from another method."""
    return {
        "method": draw(st.sampled_from(sorted(ROUTED_METHODS))),
        "active": draw(st.floats(LEAST_ACTIVE, 1)),
        "experts": draw(st.integers(2, MAX_EXPERTS)),
        "shared": draw(st.floats(0, 0.95)),
        "own_share": draw(st.booleans()),
        "router": draw(st.sampled_from([OWN, *sorted(ROUTERS)])),
        "selection": draw(st.sampled_from(["topk", "threshold"])),
        "fill": draw(st.sampled_from(["none", "mean"])),
        "progressive": draw(st.booleans()),
        "spared": draw(st.sampled_from(["", "1", "0, 1"])),
    }


all_settings = settings_of_the_page() | routed_settings_of_the_page()
specs = all_settings.map(lambda values: read_spec(controls(**values)))
