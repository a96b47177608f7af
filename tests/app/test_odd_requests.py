"""HTTP as nobody's client sends it: the server answers with an error and goes on."""

from __future__ import annotations

import json
import re
import time
from html import unescape
from typing import Any

import httpx
import pytest

from mlpmoe.explorer.shell import handlers
from tests.explorer.controls import Previewed, preview_values, settings

pytestmark = pytest.mark.usefixtures("unharmed")

LEAKS = ("Traceback", "site-packages", ".py", 'File \\"', "mlpmoe/")
SPEC = list(settings(keep=16))


def call(app, name: str, data: str) -> tuple[str, str]:
    """POST a body as it is; the last event and its data."""
    base = f"{app.url}gradio_api/call/{name}"
    answer = httpx.post(
        base, content='{"data": ' + data + "}", headers={"Content-Type": "application/json"}
    )
    if answer.status_code != 200:
        assert 400 <= answer.status_code < 500
        return "refused", answer.text
    event_id = answer.json()["event_id"]
    return _last_event(httpx.get(f"{base}/{event_id}", timeout=60).text)


def _last_event(stream: str) -> tuple[str, str]:
    event, data = stream.strip().split("\n\n")[-1].split("\n", 1)
    return event.removeprefix("event: "), data.removeprefix("data: ")


def join(app, fn: str, data: list, session: str) -> httpx.Response:
    """Trigger one of the page's own listeners, as the page does."""
    (index,) = (
        listener["id"]
        for listener in app.blocks.config["dependencies"]
        if listener["api_visibility"] == "private"
        and getattr(app.blocks.fns[listener["id"]].fn, "__name__", None) == fn
    )
    return httpx.post(
        f"{app.url}gradio_api/queue/join",
        content=json.dumps({"data": data, "fn_index": index, "session_hash": session}),
        headers={"Content-Type": "application/json"},
    )


def results(app, session: str, count: int) -> list[dict[str, Any]]:
    """The next results of a session, in the order in which the page gets them."""
    found = []
    url = f"{app.url}gradio_api/queue/data?session_hash={session}"
    with httpx.stream("GET", url, timeout=60) as stream:
        for line in stream.iter_lines():
            if line.startswith("data:"):
                message = json.loads(line.removeprefix("data:"))
                if message["msg"] == "process_completed":
                    found.append(message)
                    if len(found) == count:
                        return found
    raise AssertionError("the stream ended without a result")


def listen(app, fn: str, data: list, session: str = "odd") -> dict[str, Any]:
    """What a listener answers."""
    joined = join(app, fn, data, session)
    if joined.status_code != 200:
        assert 400 <= joined.status_code < 500
        return {"success": False, "output": {"error": joined.text}}
    return results(app, session, 1)[0]


@pytest.mark.parametrize(
    "data",
    [
        '["demo", 16, NaN, null, "sqrt"]',
        '["demo", 16, Infinity, null, "sqrt"]',
        '["demo", 16, -Infinity, null, "sqrt"]',
        '["demo", 16, 1e999, null, "sqrt"]',
        '["demo", NaN, 0, null, "sqrt"]',
        '["demo", 1e3000, 0, null, "sqrt"]',
        '["demo", ' + "9" * 4000 + ', 0, null, "sqrt"]',
        '["demo", ' + "9" * 5000 + ', 0, null, "sqrt"]',
        '["demo", 16, 0, NaN, "sqrt"]',
        '["demo", {"__type__": "update"}, 0, null, "sqrt"]',
        '["demo", 16, 0, null, {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]',
        '[{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, 16, 0, null, "sqrt"]',
        '["\\ud800", 16, 0, null, "sqrt"]',
        '["demo", 16, 0, null, "sqrt", "stories", {"\\ud800": 1}]',
        '["demo", 16, 0, null, "sqrt", {"fade": NaN}, {"fade": NaN}]',
        '["demo", 16, 0, null, "sqrt", {"seed": 1e999}, {"seed": 1e999}]',
        '["demo\\u0000", 16, 0, null, "sqrt"]',
        "{}",
        "null",
        '"demo"',
        "[" * 2000 + "]" * 2000,
        "not json",
    ],
    ids=lambda data: data[:40],
)
@pytest.mark.parametrize("name", ["preview", "evaluate"])
def test_odd_bodies(app, name, data):
    event, text = call(app, name, data)
    assert event in ("error", "refused")
    assert not any(leak in text for leak in LEAKS), text


@pytest.mark.parametrize(
    "data",
    [
        '["Once", "demo", 16, 0, null, "sqrt", NaN, 0]',
        '["Once", "demo", 16, 0, null, "sqrt", 8, NaN]',
        '["Once", "demo", 16, 0, null, "sqrt", 8, Infinity]',
        '["\\ud800", "demo", 16, 0, null, "sqrt", 8, 0]',
        '[NaN, "demo", 16, 0, null, "sqrt", 8, 0]',
        "[]",
    ],
)
def test_odd_writing_orders(app, data):
    event, text = call(app, "generate", data)
    assert event in ("error", "refused")
    assert not any(leak in text for leak in LEAKS), text


def preview_data(**change: Any) -> list:
    return list(preview_values(**{"model": None, "text": "stories", **change}))


@pytest.mark.parametrize(
    "change",
    [
        {"branches": 0},
        {"branches": 65},
        {"branches": 10**30},
        {"branches": "16"},
        {"branches": None},
        {"fade": -1},
        {"fade": 3},
        {"fade": "NaN"},
        {"keep": 17},
        {"keep": None},
        {"compensation": "other"},
        {"order": "other"},
        {"order": None},
        {"fade_schedule": ["linear"]},
        {"fade_exponent": None},
        {"fade_exponent": 10**30},
        {"fade_exponent": "NaN"},
        {"fade_projections": []},
        {"fade_projections": None},
        {"fade_projections": "gate"},
        {"fade_projections": ["left"]},
        {"fade_projections": [["gate"]]},
        {"fade_score": 3},
        {"fade_unit": "9:4"},
        {"fade_unit": "1" * 5000 + ":4"},
        {"fade_unit": None},
        {"fade_unit": {"value": "2:4"}},
        {"allocation": "other"},
        {"allocation": None},
        {"progressive": None},
        {"progressive": "yes"},
        {"text": "../evaluation.txt"},
        {"text": None},
        {"layer": -1},
        {"layer": 10**6},
        {"layer": "0"},
        {"axis": "other"},
        {"axis": None},
        {"method": "other"},
        {"method": None},
        {"method": "cmoe", "active": "half"},
        {"method": "cmoe", "experts": None},
        {"method": "cmoe", "own_share": None, "shared": 10**30},
        {"method": "cmoe", "router": "gate"},
        {"method": "neurons", "selection": None},
        {"spared": "first"},
        {"spared": None},
        {"spared": "9" * 5000},
        {"budget": None},
        {"share": None},
        {"share": 5},
        {"share": "9" * 5000},
        {"share": ["16"]},
        {"calibration": "../x", "order": "activation"},
        {"calibration": None, "order": "activation"},
        {"calibration": ["prose"], "order": "activation"},
    ],
    ids=lambda change: str(change)[:40],
)
def test_odd_values_for_the_page_s_own_listeners(app, change):
    message = listen(app, "preview", preview_data(**change))
    text = json.dumps(message["output"].get("error"))
    assert not any(leak in text for leak in LEAKS), text


def test_the_page_s_own_listener_works_when_called_well(app):
    """So that the tests above do not pass for a wrong reason."""
    message = listen(app, "preview", preview_data(branches=8))
    assert message["success"]
    assert Previewed(*message["output"]["data"]).keep["value"] == 8


@pytest.mark.parametrize(
    ("change", "shown"),
    [({"branches": 10**30}, 64), ({"branches": -5}, 1), ({"branches": 2.5}, 3)],
    ids=str,
)
def test_a_number_out_of_range_comes_back_as_what_is_used(app, change, shown):
    message = listen(app, "preview", preview_data(**change))
    assert message["success"]
    assert Previewed(*message["output"]["data"]).branches == shown


def test_a_slow_preview_is_not_shown_after_a_later_one(app, monkeypatch):
    """A link sets several sliders at once, and the page asks for a preview at each."""
    original = handlers.front

    def front(loaded, spec, *views):
        if spec.branches == 7:
            time.sleep(0.5)
        return original(loaded, spec, *views)

    monkeypatch.setattr(handlers, "front", front)
    events = [
        join(app, "preview", preview_data(branches=branches), "link").json()["event_id"]
        for branches in (7, 9)
    ]
    assert [message["event_id"] for message in results(app, "link", 2)] == events


@pytest.mark.parametrize(
    "name", [None, 3, "", "/etc", "../..", "owner/absent", "<img src=x>", ["demo"], "x" * 10**6]
)
def test_loading_odd_names_through_the_page(app, name):
    message = listen(app, "load", [name, None, 16, 16, "stories", "stories"])
    assert not message["success"]
    text = json.dumps(message["output"])
    assert not any(leak in text for leak in LEAKS), text
    assert app.workbench.holds("demo")


@pytest.mark.parametrize(
    ("prompt", "tokens", "temperature"),
    [(None, 64, 0), ("x" * 10**6, 16, 0), ("Once", None, 0), ("Once", "64", 0), ("Once", 64, [])],
    ids=lambda value: str(value)[:10],
)
def test_odd_writing_orders_through_the_page(app, prompt, tokens, temperature):
    message = listen(app, "write", [None, *SPEC, "stories", prompt, tokens, temperature, 0])
    assert not message["success"]
    text = json.dumps(message["output"])
    assert not any(leak in text for leak in LEAKS), text


@pytest.mark.parametrize(("tokens", "taken"), [(0, 16), (10**9, 256)])
def test_a_slider_takes_a_number_beyond_its_end_as_the_end(app, tokens, taken):
    values = [None, *SPEC, "stories", "Once", tokens, 99, 0]
    message = listen(app, "write", values, session=f"end{tokens}")
    assert message["success"]
    for shown in message["output"]["data"][:2]:
        written = unescape(re.sub("<[^>]*>", "", shown))
        assert 0 < len(app.demo.tokenizer(written)["input_ids"]) <= 1.1 * taken + 4  # read anew


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "../../../etc/passwd", "app.py", "assets/demo/train.py"]
)
def test_files_of_the_machine_are_not_served(app, path):
    answer = httpx.get(f"{app.url}gradio_api/file={path}")
    assert answer.status_code in (400, 403, 404)
    assert "root:" not in answer.text


def test_nobody_watches_the_visitors(app):
    answer = httpx.get(f"{app.url}monitoring", follow_redirects=True)
    assert answer.status_code in (403, 404)
