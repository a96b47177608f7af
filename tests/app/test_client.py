"""The four endpoints, through the client that other people's programs use."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
from gradio_client.exceptions import AppError

from mlpmoe import (
    CATALOGUE,
    ConversionSpec,
    convert,
    named_text,
    parameter_report,
    perplexity,
    write_side_by_side,
)
from mlpmoe.core.calibration import Calibration
from mlpmoe.explorer.server import loaded, texts
from mlpmoe.explorer.shell.preview import summary
from mlpmoe.models import assets_folder, named_calibration
from tests.app.calls import LEAKS, SPEC, refused


def test_only_four_endpoints_are_public(client):
    api = client.view_api(return_format="dict", print_info=False)
    assert set(api["named_endpoints"]) == {"/models", "/preview", "/evaluate", "/generate"}
    assert api["unnamed_endpoints"] == {}


def test_the_page_s_own_listeners_are_private(app):
    """There are many; each would be a promise to programs."""
    shown = {
        listener["api_name"]: listener["api_visibility"]
        for listener in app.blocks.config["dependencies"]
    }
    public = {name for name, visibility in shown.items() if visibility == "public"}
    assert public == {"models", "preview", "evaluate", "generate"}
    assert len(app.blocks.config["dependencies"]) > 40


def test_endpoints_describe_themselves(client):
    """Names and defaults are what programs rely on."""
    api = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    spec = ["model", "branches", "fade", "keep", "compensation"]
    names = {
        name: [p["parameter_name"] for p in endpoint["parameters"]]
        for name, endpoint in api.items()
    }
    assert names["/models"] == []
    assert names["/preview"] == [*spec, "more"]
    assert names["/evaluate"] == [*spec, "text", "more"]
    assert names["/generate"] == ["prompt", *spec, "tokens", "temperature", "more"]
    for parameter in api["/preview"]["parameters"]:
        assert parameter["parameter_has_default"]


def test_models(client):
    listed = client.predict(api_name="/models")
    assert [model["key"] for model in listed] == [entry.key for entry in CATALOGUE]
    assert [model["key"] for model in listed if model["loaded"]] == ["demo"]
    assert all(str(assets_folder()) not in str(model) for model in listed)


@pytest.mark.parametrize(
    "values",
    [{}, SPEC, {"branches": 1}, {"branches": 16, "keep": 12, "compensation": "none"}],
    ids=str,
)
def test_preview(app, client, values):
    expected = summary(app.demo, ConversionSpec(**values))
    assert client.predict(**values, api_name="/preview") == expected
    assert expected["parameters"]["dense"] == sum(p.numel() for p in app.demo.model.parameters())


MORE = {
    "order": {"keep": 12, "more": {"order": "norm"}},
    "schedule": {
        "fade": 0.5, "more": {"fade_schedule": "uniform", "fade_projections": "gate-up-down"}
    },
    "nothing": {"keep": 12, "more": {}},
    "not at all": {"keep": 12, "more": None},
    "neurons": {"fade": 0.9, "more": {"fade_unit": "neuron", "order": "random", "seed": 7}},
    "calibrated": {
        "branches": 8, "fade": 0.9, "keep": 6, "compensation": "mean",
        "more": {"fade_score": "wanda", "order": "fluctuation"},
    },
    "calibrated by a common field": {"branches": 8, "keep": 6, "compensation": "refit"},
    "routed": {"more": {"method": "cmoe", "active": 0.5, "shared": 0.25}},
    "routed, by single neurons": {"more": {"method": "neurons", "active": 0.5}},
    "routed, by inputs": {"more": {"method": "inputs", "active": 0.5}},
    "spared": {"branches": 8, "keep": 6, "more": {"spared": "1"}},
}  # fmt: skip


@pytest.fixture
def short_calibration(monkeypatch) -> str:
    """The server calibrates on as few stories as that takes."""
    text = named_calibration("stories")[:8000]
    monkeypatch.setattr(texts, "named_calibration", lambda key: text)
    return text


@pytest.fixture(scope="module")
def short_text(app) -> tuple[str, str]:
    """A text that is measured at once: its key on the server, and its content."""
    content = named_text("proxy")[:2000]
    return app.workbench.texts.add(content), content


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("values", MORE.values(), ids=MORE)
def test_more_fields(app, client, short_calibration, short_text, values):
    spec = ConversionSpec(
        **{k: v for k, v in values.items() if k != "more"}, **(values.get("more") or {})
    )
    shown = client.predict(**values, api_name="/preview")
    assert shown["spec"] == spec.to_dict()
    assert shown == summary(app.demo, app.demo.asked(spec))
    key, content = short_text
    result = client.predict(**values, text=key, api_name="/evaluate")
    assert result["spec"] == spec.to_dict()
    calibration = Calibration.from_text(app.demo.tokenizer, short_calibration)
    model = convert(app.demo.model, spec, calibration if spec.needs_calibration else None)
    assert shown["nonzero"]["converted"] == parameter_report(model).nonzero
    alone = perplexity(model, app.demo.tokenizer, content).value
    assert result["converted"] == pytest.approx(alone, rel=1e-4)


@pytest.mark.usefixtures("unharmed", "short_calibration")
def test_a_calibrated_model_writes(app, client):
    values = MORE["calibrated"]
    result = client.predict("Once", **values, tokens=8, api_name="/generate")
    common = {k: v for k, v in values.items() if k != "more"}
    model = app.demo.converted(app.demo.asked(ConversionSpec(**common, **values["more"])))
    *_, (dense, converted) = write_side_by_side(
        (app.demo.model, model), app.demo.tokenizer, "Once", 8
    )
    assert (result["dense"], result["converted"]) == (dense.text, converted.text)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"colour": "red"}, "Unknown field 'colour'; allowed: method, "),
        ({"x" * 10**6: 1}, "Unknown field"),
        ({"order": "x" * 10**6}, "Order must be one of contiguous"),
        ([1], "More must be an object: further fields of ConversionSpec by name"),
    ],
    ids=lambda value: str(value)[:20],
)
@pytest.mark.parametrize("api_name", ["/preview", "/evaluate"])
def test_odd_further_fields_are_refused_with_a_sentence(client, api_name, more, reason):
    assert reason in refused(client, api_name, more=more)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_streams_and_ends_with_the_library_s_text(app, client, temperature):
    prompt = "Once upon a time"
    job = client.submit(prompt, **SPEC, tokens=24, temperature=temperature, api_name="/generate")
    result = job.result(timeout=120)
    pair = (app.demo.model, convert(app.demo.model, ConversionSpec(**SPEC)))
    *_, (dense, converted) = write_side_by_side(pair, app.demo.tokenizer, prompt, 24, temperature)
    assert (result["dense"], result["converted"]) == (dense.text, converted.text)
    assert result["tokens"] == [len(dense.tokens), len(converted.tokens)]
    steps = [step for step in job.outputs() if step.get("doing") == "writing"]
    assert len(steps) == max(result["tokens"])
    for earlier, later in pairwise([*steps, result]):
        assert later["dense"].startswith(earlier["dense"].rstrip("�"))


BAD_SPECS = [
    ({"branches": 8, "keep": 9}, "must lie between 1 and"),
    ({"branches": 8, "keep": 0}, "must lie between 1 and"),
    ({"branches": 8, "keep": -1}, "must lie between 1 and"),
    ({"branches": 8, "keep": 2.5}, "must be a whole number"),
    ({"branches": 8, "keep": True}, "must be a whole number"),
    ({"branches": 8, "keep": "4"}, "must be a whole number"),
    ({"branches": 0}, "must be at least 1"),
    ({"branches": -1}, "must be at least 1"),
    ({"branches": 100_000}, "neurons: choose B between 1 and"),
    ({"branches": 10**30}, "neurons: choose B between 1 and"),
    ({"branches": 2.5}, "must be a whole number"),
    ({"branches": True}, "must be a whole number"),
    ({"branches": None}, "must be a whole number"),
    ({"branches": "8"}, "must be a whole number"),
    ({"branches": [8]}, "must be a whole number"),
    ({"branches": {"value": 8}}, "must be a whole number"),
    ({"fade": -0.1}, "number between 0 and 2"),
    ({"fade": 2.1}, "number between 0 and 2"),
    ({"fade": 10**400}, "number between 0 and 2"),
    ({"fade": "0.5"}, "number between 0 and 2"),
    ({"fade": None}, "number between 0 and 2"),
    ({"fade": False}, "number between 0 and 2"),
    ({"fade": []}, "number between 0 and 2"),
    ({"compensation": "double"}, "must be one of sqrt, ratio, none, alpha, mean, refit"),
    ({"compensation": ["sqrt"]}, "must be one of sqrt, ratio, none, alpha, mean, refit"),
    ({"more": {"colour": "red"}}, "unknown field 'colour'; allowed: method, "),
    ({"more": {"": 1}}, "unknown field ''"),
    ({"more": {"order": "alphabetical"}}, "order must be one of contiguous, "),
    ({"more": {"order": ["norm"]}}, "order must be one of contiguous, "),
    ({"more": {"fade_unit": "2:4"}, "fade": 0.5}, "leave fade at 0"),
    ({"more": {"fade_unit": "1:7"}}, "need a multiple of 7 inputs"),
    ({"more": {"fade_unit": 24}}, "must be weight, neuron, or n:m"),
    ({"more": {"fade_projections": ["gate"]}}, "must name gate, up or down"),
    ({"more": {"progressive": "true"}}, "progressive must be True or False"),
    ({"more": {"progressive": True}}, "no stage of this spec looks at activations"),
    ({"more": {"fade_exponent": 2}}, "belongs to the schedule power"),
    ({"more": {"seed": -1}}, "seed must lie between 0 and"),
    ({"more": {"experts": 8}}, "does not belong to the method mlpmoe"),
    ({"more": {"branches": 100_000}}, "neurons: choose B between 1 and"),
    ({"more": {"method": "other"}}, "method must be one of"),
    ({"more": {"method": "cmoe"}, "compensation": "ratio"}, "must be one of none, mean"),
    ({"more": {"method": "cmoe"}, "keep": 4}, "keep does not belong to the method cmoe"),
    ({"more": {"spared": "99"}}, "layer"),
    ({"more": []}, "more must be an object"),
    ({"more": ["order", "norm"]}, "more must be an object"),
    ({"more": "order=norm"}, "more must be an object"),
    ({"more": ""}, "more must be an object"),
    ({"more": 3}, "more must be an object"),
    ({"more": False}, "more must be an object"),
    ({"model": "qwen2.5-0.5b"}, "is not loaded"),
    ({"model": "owner/absent"}, "is not loaded"),
    ({"model": "../demo"}, "is not loaded"),
    ({"model": "/etc"}, "is not loaded"),
    ({"model": str(assets_folder() / "demo")}, "is not loaded"),
    ({"model": ""}, "is not loaded"),
    ({"model": "x" * 10**6}, "is not loaded"),
    ({"model": None}, "no model was named"),
    ({"model": 3}, "no model was named"),
    ({"model": ["demo"]}, "no model was named"),
]  # fmt: skip


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("api_name", ["/preview", "/evaluate", "/generate"])
def test_bad_specs_are_refused_with_a_sentence(client, api_name):
    """All in one test, since every one must leave the server as it was for the next. Endpoints
    read specs in one place, so that some of them show that the others do."""
    arguments = ("Once",) if api_name == "/generate" else ()
    for values, reason in BAD_SPECS if api_name == "/preview" else BAD_SPECS[::4]:
        with pytest.raises(AppError) as caught:
            client.predict(*arguments, **values, api_name=api_name)
        message = str(caught.value)
        assert reason.lower() in message.lower(), (values, message)
        assert len(message) < 350
        assert message.endswith("."), message
        named = values.get("model")
        unsaid = message.replace(repr(named)[:60], "") if named else message
        assert not any(leak in unsaid for leak in LEAKS), message


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"prompt": ""}, "The prompt is empty"),
        ({"prompt": " \n "}, "The prompt is empty"),
        ({"prompt": "x" * 10**6}, "The prompt must be a text of at most 2,000 characters"),
        ({"prompt": None}, "The prompt must be a text"),
        ({"prompt": 3}, "The prompt must be a text"),
        ({"prompt": ["Once"]}, "The prompt must be a text"),
        ({"tokens": 0}, "Tokens must be a whole number between 1 and"),
        ({"tokens": -5}, "Tokens must be a whole number"),
        ({"tokens": 10**9}, "Tokens must be a whole number"),
        ({"tokens": 2.5}, "Tokens must be a whole number"),
        ({"tokens": "8"}, "Tokens must be a whole number"),
        ({"tokens": None}, "Tokens must be a whole number"),
        ({"tokens": True}, "Tokens must be a whole number"),
        ({"tokens": [8]}, "Tokens must be a whole number"),
        ({"temperature": -0.1}, "Temperature must be a number between 0 and 2"),
        ({"temperature": 10**9}, "Temperature must be a number"),
        ({"temperature": "hot"}, "Temperature must be a number"),
        ({"temperature": None}, "Temperature must be a number"),
        ({"temperature": True}, "Temperature must be a number"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_writing_orders_are_refused(client, values, reason):
    assert refused(client, "/generate", **{"prompt": "Once", **values}).startswith(reason)


@pytest.mark.usefixtures("unharmed")
def test_a_prompt_longer_than_the_model_reads_is_refused(client):
    message = refused(client, "/generate", "語" * 2000)
    assert "tokens long; this model reads at most" in message


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(
    "prompt", ["‮abc‬ \u200d \ufeff", "<img src=x onerror=alert(1)>", "\0\x1b[2J", "🙂" * 50]
)
def test_strange_prompts_are_continued(client, prompt):
    result = client.predict(prompt, branches=4, tokens=2, api_name="/generate")
    assert result["tokens"] == [2, 2] or min(result["tokens"]) == 1


def wait_until(condition, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@pytest.mark.usefixtures("unharmed")
def test_a_cancelled_client_frees_the_queue(connect, monkeypatch):
    """A writer without end, so that only its cancellation can make room."""
    closed = threading.Event()
    original = loaded.write_side_by_side

    def endless(models, tokenizer, prompt, tokens, temperature):
        try:
            while True:
                yield from original(models, tokenizer, prompt, tokens, temperature)
        finally:
            closed.set()

    monkeypatch.setattr(loaded, "write_side_by_side", endless)
    job = connect().submit("Once", branches=8, keep=4, tokens=64, api_name="/generate")
    wait_until(lambda: len(job.outputs()) > 2)
    waiting = connect().submit("Once", tokens=1, api_name="/generate")
    monkeypatch.setattr(loaded, "write_side_by_side", original)
    assert not closed.is_set()
    job.cancel()
    assert closed.wait(timeout=10)
    assert waiting.result(timeout=30)["tokens"] == [1, 1]


@pytest.mark.usefixtures("unharmed")
def test_two_clients_get_their_own_results(app, connect, short_text):
    """At once and again and again, with specs that differ in everything."""
    specs = [
        {"branches": 16, "fade": 0.9},
        {"branches": 5, "keep": 2, "compensation": "none"},
    ]
    key, content = short_text
    start = threading.Barrier(len(specs))

    def visit(values):
        client = connect()
        start.wait(timeout=30)
        found = []
        for _ in range(2):
            shown = client.predict(**values, api_name="/preview")
            measured = client.predict(**values, text=key, api_name="/evaluate")
            written = client.predict("Once", **values, tokens=12, api_name="/generate")
            found.append((shown, measured, written))
        return found

    with ThreadPoolExecutor(len(specs)) as pool:
        visits = list(pool.map(visit, specs))
    demo = app.demo
    for values, found in zip(specs, visits, strict=True):
        spec = ConversionSpec(**values)
        model = convert(demo.model, spec)
        alone = perplexity(model, demo.tokenizer, content).value
        *_, (dense, converted) = write_side_by_side((demo.model, model), demo.tokenizer, "Once", 12)
        for shown, measured, written in found:
            assert shown == summary(demo, spec)
            assert measured["spec"] == spec.to_dict()
            assert measured["converted"] == pytest.approx(alone, rel=1e-5)
            assert (written["dense"], written["converted"]) == (dense.text, converted.text)
