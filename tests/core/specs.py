"""Random specs of the static method, and random fields."""

from hypothesis import strategies as st

from mlpmoe.core.checks import MAX_PATTERN
from mlpmoe.core.choices import ALLOCATIONS
from mlpmoe.core.spec import MAX_EXPONENT, MAX_FADE, MAX_SEED, ConversionSpec
from mlpmoe.core.static.compensation import COMPENSATIONS
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.schedule import SCHEDULES
from mlpmoe.core.static.scores import SCORES


@st.composite
def patterns(draw):
    m = draw(st.integers(2, MAX_PATTERN))
    return f"{draw(st.integers(1, m - 1))}:{m}"


def spared():
    return st.lists(st.integers(0, 99), max_size=4).map(lambda layers: ",".join(map(str, layers)))


@st.composite
def static_specs(draw, max_branches=10**6):
    """Any spec of the static method that is allowed; no layer is spared."""
    branches = draw(st.integers(1, max_branches))
    unit = draw(st.sampled_from(["weight", "neuron"]) | patterns())
    schedule = draw(st.sampled_from(sorted(SCHEDULES))) if ":" not in unit else "linear"
    power = st.none() | st.floats(0, MAX_EXPONENT, exclude_min=True)
    matrices = st.lists(st.sampled_from(["gate", "up", "down"]), min_size=1, max_size=5)
    values = {
        "branches": branches,
        "fade": draw(st.floats(0, MAX_FADE)) if ":" not in unit else 0,
        "fade_schedule": schedule,
        "fade_exponent": draw(power) if schedule == "power" else None,
        "fade_projections": "gate-up" if unit == "neuron" else "-".join(draw(matrices)),
        "fade_score": draw(st.sampled_from(sorted(SCORES))),
        "fade_unit": unit,
        "keep": draw(st.none() | st.integers(1, branches)),
        "allocation": draw(st.sampled_from(list(ALLOCATIONS))),
        "order": draw(st.sampled_from(sorted(ORDERS))),
        "compensation": draw(st.sampled_from(sorted(COMPENSATIONS))),
        "seed": draw(st.integers(0, MAX_SEED)),
    }
    calibrated = ConversionSpec(**values).looks_at_activations
    return ConversionSpec(**values, progressive=calibrated and draw(st.booleans()))
