"""Words tinted by how much likelier or unlikelier they became: the scale, and what can be read."""

from __future__ import annotations

import re
from html import unescape
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlpmoe.explorer.shell.tint import LEAST, SHADES, Tint
from mlpmoe.measure.quality.tokens import TokenChange
from mlpmoe.models import assets_folder

HOSTILE = "<img src=x onerror='alert(1)'>&\""
changes = st.floats(-30, 30) | st.sampled_from([0.0, inf, -inf, nan])


def token(text="word", change=0.5, dense=1.0) -> TokenChange:
    return TokenChange(text, change, dense, 0, 1)


def shade(html: str) -> int:
    return int(re.search(r'class="worse d(\d)"', html)[1])


@given(st.lists(changes, max_size=40))
def test_more_damage_has_a_darker_shade(some):
    """A higher change never has a lower shade, and what is undefined has the last."""
    tokens = [token(change=change) for change in some]
    tint = Tint.of(tokens)
    worse = sorted(c for c in some if c >= LEAST)
    shades = [shade(tint.spans([token(change=change)])) for change in worse]
    assert shades == sorted(shades)
    assert all(0 <= one < SHADES for one in shades)
    for odd in (inf, nan):
        assert shade(tint.spans([token(change=odd)])) == SHADES - 1


@given(st.floats(LEAST, 20), st.integers(100, 200))
def test_one_outlier_does_not_make_the_others_pale(typical, count):
    """The last shade begins where all but the worst fiftieth lie below."""
    some = [token(change=typical * (i + 1) / count) for i in range(count)]
    tint = Tint.of([*some, token(change=1e6)])
    darkest = [shade(tint.spans([one])) for one in some if one.change >= LEAST]
    if typical >= 1.5:
        assert max(darkest) == SHADES - 1
        assert min(darkest) < SHADES - 1


def test_little_damage_is_not_coloured_and_gain_is_told_apart():
    tint = Tint.of([token()])
    for change in (0.0, LEAST / 2, -LEAST / 2):
        assert tint.spans([token(change=change)]) == "word"
    gained = tint.spans([token(change=-1.0)])
    assert 'class="better"' in gained and "worse" not in gained
    assert "−1.00 nats, dense 1.00" in gained
    assert "+0.50 nats, dense 1.00" in tint.spans([token()])
    assert "undefined" in tint.spans([token(change=nan)])


def test_a_calm_text_is_not_made_to_look_broken():
    """The scale goes up to a nat at least."""
    tint = Tint.of([token(change=0.11), token(change=0.12)])
    assert shade(tint.spans([token(change=0.12)])) == 0


def test_the_legend_has_every_shade_and_where_it_begins():
    tint = Tint.of([token(change=c / 10) for c in range(100)])
    steps = re.findall(r'class="worse d(\d)">\+([\d.]+)<', tint.legend())
    assert [int(step) for step, _ in steps] == list(range(SHADES))
    for step, begins in steps:
        assert shade(tint.spans([token(change=float(begins) + 0.06)])) == int(step)


@pytest.mark.parametrize("change", [0.0, -1.0, 1.0, nan])
def test_what_a_token_says_is_escaped(change):
    html = Tint.of([]).spans([token(HOSTILE, change)], lambda number: f' data-token="{number}"')
    assert re.findall(r"<(\w+)", html) == ["i"]
    assert unescape(re.sub(r"<[^>]*>", "", html)) == HOSTILE


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 has it."""
    full = colour if len(colour) == 7 else "#" + "".join(2 * c for c in colour[1:])
    channels = [int(full[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def rules(prefix: str) -> dict[int | None, str]:
    """The colour of the words on each shade; None: where no shade has one of its own."""
    style = (assets_folder() / "tokens.css").read_text(encoding="utf-8")
    found: dict[int | None, str] = {}
    for selectors, colour in re.findall(r"^([^{\n]+)\{ color: (#\w+); \}", style, re.MULTILINE):
        for selector in selectors.split(","):
            if match := re.fullmatch(rf"{re.escape(prefix)}\.worse(?:\.d(\d))?", selector.strip()):
                found[match[1] and int(match[1])] = colour
    return found


@pytest.mark.parametrize(("theme", "prefix"), [("light", ""), ("dark", ".dark ")])
def test_every_shade_can_be_read(theme, prefix):
    style = (assets_folder() / "network.css").read_text(encoding="utf-8")
    rule = {"light": r":root \{(.*?)\}", "dark": r"^\.dark \{(.*?)\}"}[theme]
    block = re.search(rule, style, re.DOTALL | re.MULTILINE)[1]
    shades = dict(re.findall(r"--damage-(\d): (#[0-9a-f]{6})", block))
    assert len(shades) == SHADES
    ink = rules(prefix)
    for step, colour in shades.items():
        pair = colour, ink.get(int(step), ink[None])
        light, dark = sorted(map(luminance, pair), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (step, pair)
