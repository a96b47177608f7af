"""What a person sees and does on the page, as Playwright says it. Waits are for conditions,
never for time."""

from __future__ import annotations

import re

PATIENCE = 120_000  # milliseconds for anything awaited; a busy machine may pause anywhere

TRACES = ("dropped by K", "removed by fade", "stays", "fade threshold")
SHOWN = {  # key of a tab -> what tells that it is filled in
    "weights": "#histograms .js-line",
    "tokens": "#branch-correlations .hm",
    "runs": "#runs tbody tr",
    "suggest": "#suggested-front .js-plotly-plot",
    "lesson": "#lesson .katex",
    "export": "#export-plan p",
}
# The point of the curve that is called "here": x, y, and whether it is measured (not hollow).
HERE = """() => {
    const plot = document.querySelector('#curve .js-plotly-plot');
    const here = plot?.data?.findLast(trace => trace.name === 'here');
    return here && { x: here.x[0], y: here.y[0], measured: here.marker?.symbol === 'circle' };
}"""
# Where on the screen the curve has this x.
ON_THE_CURVE = """x => {
    const plot = document.querySelector("#curve .js-plotly-plot");
    const box = plot.getBoundingClientRect();
    const { xaxis, yaxis } = plot._fullLayout;
    return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis._length / 3];
}"""
# outlines per trace: plotly leaves out traces without points
COUNT_OUTLINES = """() => {
    const plot = document.querySelector('#histograms .js-plotly-plot');
    if (!plot || !plot.calcdata) return {};
    const names = plot.calcdata.map(points => points[0].trace).filter(t => t.visible === true)
        .map(t => [t.name, (t.x ?? []).length]).filter(([, points]) => points);
    const drawn = [...plot.querySelectorAll('.scatterlayer .trace')];
    if (names.length !== drawn.length) return {};
    return Object.fromEntries(names.map(
        ([name], i) => [name, drawn[i].querySelectorAll('path.js-line').length]));
}"""


def figure(page, card: str, part: str = "converted") -> str:
    return page.inner_text(f"#card-{card} .{part}")


def value(page, control: str) -> float:
    return float(page.input_value(f"#{control} input[type=number]"))


def slider(page, control: str):
    return page.locator(f"#{control} input[type=range]")


def wait_for_value(page, control: str, expected: float) -> None:
    page.wait_for_function(
        "([id, value]) => Number(document.querySelector(`#${id} input[type=number]`)?.value)"
        " === value",
        arg=[control, expected],
    )


def wait_for_spec(page, **controls: float) -> None:
    for control, expected in controls.items():
        wait_for_value(page, control, expected)


def wait_for_outlines(page, **expected: int) -> None:
    """By trace: stays, zeroed, dropped, thresholds."""
    names = dict(zip(("dropped", "zeroed", "stays", "thresholds"), TRACES, strict=True))
    wanted = {names[key]: count for key, count in expected.items() if count}
    page.wait_for_function(
        f"""wanted => {{
            const found = ({COUNT_OUTLINES})();
            return Object.keys(found).length === Object.keys(wanted).length
                && Object.entries(wanted).every(([name, count]) => found[name] === count);
        }}""",
        arg=wanted,
    )


# The card of perplexity says of how many tokens an estimate is, until the text has ended.
ENDED = """() => !/first look|[0-9] of [0-9]/.test(
    document.querySelector('#card-perplexity .note')?.innerText ?? '')"""
# Of how many different numbers of tokens the estimates were that RECORD_NOTES saw.
COUNTS = "new Set(window.notes.map(note => note.match(/[0-9,]+ of [0-9]/)?.[0]).filter(Boolean))"
# Every note of that card from now on, as the visitor sees them one after the other.
RECORD_NOTES = """() => {
    window.notes = [];
    const card = document.querySelector('#card-perplexity');
    const look = () => {
        const note = card.querySelector('.note')?.innerText ?? '(empty)';
        if (window.notes.at(-1) !== note) window.notes.push(note);
    };
    new MutationObserver(look).observe(card, {subtree: true, childList: true, characterData: true});
    look();
}"""


def wait_for_new_figure(page, card: str, old: str) -> str:
    page.wait_for_function(
        f"""([card, old]) => {{
            const now = document.querySelector(`#card-${{card}} .converted`)?.innerText;
            return now && now !== old && !now.includes('…') && (card !== 'perplexity'
                || ({ENDED})());
        }}""",
        arg=[card, old],
    )
    return figure(page, card)


def token_counts(page) -> list[int]:
    """Of how many tokens the estimates were that RECORD_NOTES saw; none of the notes was empty."""
    notes = page.evaluate("window.notes")
    assert "(empty)" not in notes
    found = (re.search(r"([\d,]+) of [\d,]+ tokens", note) for note in notes)
    return [int(match.group(1).replace(",", "")) for match in found if match]


def wait_until_still(page, selector: str) -> str:
    """The text of a box or a block, once it has not changed for a second."""
    seen = page.wait_for_function(
        """selector => {
            const shown = document.querySelector(selector), now = shown?.value ?? shown?.innerText;
            if (window.lastSeen !== now) [window.lastSeen, window.since] = [now, Date.now()];
            return now !== undefined && Date.now() - window.since > 1000 && {now};
        }""",
        arg=selector,
        polling=50,
    )
    return seen.json_value()["now"]


def open_broken_link(window, server: str, query: str, said: str):
    """A page whose link says something wrong; the notice does not stay until all is measured."""
    page = window.new_page()
    page.goto(f"{server}/{query}")
    assert said in notice(page)
    return page


def notice(page) -> str:
    """The text of the latest notice, which is then closed."""
    found = page.wait_for_function(
        "() => { const said = [...document.querySelectorAll('[data-testid=toast-text]')].at(-1);"
        " return said && {text: said.innerText}; }"
    )
    text = found.json_value()["text"]
    page.evaluate(  # it may have gone by itself meanwhile
        "document.querySelectorAll('[data-testid=toast-close]').forEach(close => close.click())"
    )
    page.wait_for_function("!document.querySelector('[data-testid=toast-text]')")
    return text


def open_tab(page, name: str) -> None:
    """A tab of the page; where the tabs do not fit, some are in a menu."""
    page.wait_for_selector("#tabs [role=tab]")
    tab = page.locator("#tabs").get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
        return
    page.locator("#tabs .overflow-menu > button").first.click()
    page.locator("#tabs .overflow-dropdown button", has_text=name).click()


def load_model(page, name: str) -> None:
    box = page.locator("#model input")
    box.click()
    box.fill(name)
    box.press("Enter")
    page.click("#load")


def choose(page, dropdown: str, label: str) -> None:
    """An entry of a dropdown, as a mouse chooses it."""
    page.click(f"#{dropdown} input")
    page.get_by_role("option", name=label, exact=True).click()


def wait_for_choice(page, dropdown: str, label: str) -> None:
    page.wait_for_function(
        "([id, label]) => document.querySelector(`#${id} input`)?.value === label",
        arg=[dropdown, label],
    )


def wait_for_address(page, *parts: str, without: str = "no-such-part") -> None:
    """The address bar says all of these, and not that."""
    page.wait_for_function(
        "([parts, without]) => parts.every(part => `${location.search}&`.includes(`${part}&`))"
        " && !location.search.includes(without)",
        arg=[parts, without],
    )


def wait_for_here(page, x: float, near: float = 2.0) -> None:
    """The point of the curve that is called "here" stands there, measured."""
    page.wait_for_function(
        f"([x, near]) => {{ const here = ({HERE})();"
        " return here?.measured && Math.abs(here.x - x) < near; }",
        arg=[x, near],
    )


def network_picture(page) -> str:
    return page.evaluate("document.querySelector('#network canvas').toDataURL()")


def wait_for_other_picture(page, old: str) -> None:
    """Of the network."""
    page.wait_for_function(
        "old => document.querySelector('#network canvas').toDataURL() !== old", arg=old
    )


def click_in_network(page, layer: int, layers: int) -> None:
    box = page.locator(".network-grid").bounding_box()
    place = {"x": (layer + 0.5) / layers * box["width"], "y": box["height"] / 2}
    page.locator(".network-grid").click(position=place)


def wait_for_answer(page) -> None:
    """Both models have written with the setting that the page shows."""
    page.wait_for_selector("#writing-report p:last-child")


def wait_for_new_answer(page, old: str) -> None:
    """The converted model has written something else than `old`, see `answer`, to its end: only
    then are its words tinted, and nothing of the page is left to come."""
    page.wait_for_function(
        "old => { const text = document.querySelector('#converted-text .loss');"
        " return text?.children.length && text.innerHTML !== old; }",
        arg=old,
    )


def answer(page) -> str:
    """What the converted model wrote, with its tints."""
    return page.evaluate("document.querySelector('#converted-text .loss')?.innerHTML ?? ''")


def answers(page) -> tuple[str, str]:
    """What the dense and the converted model wrote."""
    return page.inner_text("#dense-text"), page.inner_text("#converted-text")


def wait_until_measured(page) -> None:
    """All four cards show figures, for the spec that the controls show and the whole text."""
    page.wait_for_function(
        f"""() => {{
            const shown = [...document.querySelectorAll('#cards .card .values')];
            return shown.length === 4 && shown.every(card => !card.textContent.includes('…'))
                && ({ENDED})();
        }}"""
    )


def open_accordion(page, block: str) -> None:
    """What is in an accordion or a tab is not in the page before it is opened."""
    page.click(f"#{block} > button")


def stored_runs(page) -> list[dict]:
    """What the browser keeps, the newest first."""
    return page.evaluate("JSON.parse(localStorage.getItem('mlpmoe-runs') ?? '[]')")


def wait_for_stored_runs(page, count: int) -> None:
    page.wait_for_function(
        "count => JSON.parse(localStorage.getItem('mlpmoe-runs') ?? '[]').length === count",
        arg=count,
    )


def wait_for_rows(page, count: int) -> None:
    """The table of runs has this many."""
    page.wait_for_function(
        "count => document.querySelectorAll('#runs tbody tr').length === count", arg=count
    )


def rows(page) -> list[list[str]]:
    """The cells of the table of runs: pin, recipe, perplexity, non-zero, compute and so on."""
    return page.evaluate(
        "[...document.querySelectorAll('#runs tbody tr')]"
        ".map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    )


def press_in_row(page, row: int, action: str) -> None:
    """action: pin, restore or remove."""
    page.locator("#runs tbody tr").nth(row).locator(f"[data-run-action={action}]").click()


def cards(page) -> list[str]:
    """What the cards say that is the same whoever looks: all but speed."""
    return [
        figure(page, card, part)
        for card in ("perplexity", "nonzero", "compute")
        for part in ("dense", "converted", "difference")
    ]


def wait_for_text(page, selector: str, text: str, timeout: int = PATIENCE) -> None:
    """The element is there, and this is part of its text."""
    _expected(page, selector).to_contain_text(text, timeout=timeout)


def wait_for_exactly(page, selector: str, text: str) -> None:
    """The element is there, and this is all that it shows."""
    _expected(page, selector).to_have_text(text, use_inner_text=True, timeout=PATIENCE)


def wait_for_other_text(page, selector: str, old: str) -> None:
    """The element is there, and shows something else than before."""
    _expected(page, selector).not_to_have_text(old, use_inner_text=True, timeout=PATIENCE)


def _expected(page, selector: str):
    from playwright.sync_api import expect  # where it is missing, tests are skipped

    return expect(page.locator(selector).first)
