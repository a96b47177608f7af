"""A ZeroGPU Space, with a stand-in for its package: measurements and texts come from processes that
are forked for them, and are what this process computes itself."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gradio_client import Client

from mlpmoe import Calibration, ConversionSpec, convert, load, perplexity, write_side_by_side
from mlpmoe.models import default_calibration
from mlpmoe.models.texts import named_calibration, named_text
from tests.campaign.server import serving

STANDIN = Path(__file__).parent / "standin_spaces"
CUT = {"branches": 16, "keep": 14}
ROUTED = {"method": "cmoe", "active": 0.75}
PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    folder = tmp_path_factory.mktemp("space")
    calls = folder / "calls"
    calls.touch()
    with serving(
        folder, SPACES_ZERO_GPU="true", STANDIN_CALLS=str(calls), PYTHONPATH=str(STANDIN)
    ) as server:
        yield server, calls


@pytest.fixture(scope="module")
def demo():
    return load("demo", device="cpu")


def evaluated(server, **asked):
    return Client(server.url, verbose=False).predict(text="proxy", **asked, api_name="/evaluate")


def test_two_visitors_get_their_own_numbers_from_forked_processes(space, demo):
    server, calls = space
    with ThreadPoolExecutor(2) as pool:
        cut = pool.submit(evaluated, server, **CUT)
        routed = pool.submit(evaluated, server, branches=16, more=ROUTED)
        found = [cut.result(), routed.result()]
    model, tokenizer = demo
    text = named_text("proxy")
    seen = Calibration.from_text(tokenizer, named_calibration(default_calibration("demo")))
    specs = ConversionSpec(**CUT), ConversionSpec(**ROUTED)
    for spec, answer in zip(specs, found, strict=True):
        converted = convert(model, spec, seen if spec.needs_calibration else None)
        for name, one in (("dense", model), ("converted", converted)):
            assert answer[name] == pytest.approx(perplexity(one, tokenizer, text).value, rel=1e-5)
    ran = {line.split()[1] for line in calls.read_text().splitlines() if "losses" in line}
    assert len(ran) >= 2 and str(server.process.pid) not in ran


def test_a_text_is_written_there(space, demo):
    server, calls = space
    asked = {"prompt": PROMPT, "tokens": 12, **CUT}
    answer = Client(server.url, verbose=False).predict(**asked, api_name="/generate")
    model, tokenizer = demo
    pair = (model, convert(model, ConversionSpec(**CUT)))
    *_, (dense, converted) = write_side_by_side(pair, tokenizer, PROMPT, 12)
    assert (answer["dense"], answer["converted"]) == (dense.text, converted.text)
    assert "written_there" in calls.read_text()


def test_what_is_refused_there_is_said_here(space):
    server, _ = space
    fine, answer = server.post(
        "generate", '{"data": ["' + "x" * 900 + '", "demo", 16, 0, 14, "sqrt", 8, 0, null]}'
    )
    assert not fine and "tokens long; this model reads at most" in answer
