"""What a person sees and does on the page, as Playwright says it. Waits are for conditions,
never for time."""

from __future__ import annotations

TRACES = ("dropped by K", "removed by fade", "stays", "fade threshold")
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
        "([id, value]) => Number(document.querySelector(`#${id} input[type=number]`).value)"
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


def wait_for_new_figure(page, card: str, old: str) -> str:
    page.wait_for_function(
        """([card, old]) => {
            const now = document.querySelector(`#card-${card} .converted`)?.innerText;
            return now && now !== old && !now.includes('…');
        }""",
        arg=[card, old],
    )
    return figure(page, card)


def wait_until_still(page, selector: str) -> str:
    """The text of a box, once it has not changed for a second."""
    page.wait_for_function(
        """selector => {
            const now = document.querySelector(selector).value;
            if (window.lastSeen !== now) [window.lastSeen, window.since] = [now, Date.now()];
            return Date.now() - window.since > 1000;
        }""",
        arg=selector,
        polling=50,
    )
    return page.input_value(selector)


def notice(page) -> str:
    """The text of the latest notice, which is then closed."""
    toast = page.locator("[data-testid=toast-text]").last
    toast.wait_for()
    text = toast.inner_text()
    page.locator("[data-testid=toast-close]").last.click()
    return text


def open_tab(page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


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
        "([id, label]) => document.querySelector(`#${id} input`).value === label",
        arg=[dropdown, label],
    )


def wait_until_measured(page) -> None:
    """All four cards show figures, for the spec that the controls show."""
    page.wait_for_function(
        """() => {
            const shown = [...document.querySelectorAll('#cards .card .values')];
            return shown.length === 4 && shown.every(card => !card.textContent.includes('…'));
        }"""
    )
