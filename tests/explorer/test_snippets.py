"""The code under Code makes the same model and gives the same figures as the page."""

from __future__ import annotations

import argparse
import io
import json
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import replace
from urllib.parse import parse_qsl

import pytest
import torch

from mlpmoe import ConversionSpec, convert, load, named_text
from mlpmoe.__main__ import main
from mlpmoe.commands.arguments import add_spec, read_spec
from mlpmoe.explorer.server.asked import Calibrated, Conversion, spec_of
from mlpmoe.explorer.server.loaded import LoadedModel
from mlpmoe.explorer.server.workbench import Workbench
from mlpmoe.explorer.shell.handlers import Handlers
from mlpmoe.explorer.shell.preview import snippet
from mlpmoe.models import named_calibration
from mlpmoe.models.texts import TEXTS
from tests.explorer.controls import Previewed, preview_values

STATIC = [
    ConversionSpec(),
    ConversionSpec(branches=1),
    ConversionSpec(branches=48, fade=2.0),
    ConversionSpec(branches=5, fade=0.9, keep=1),
    ConversionSpec(branches=7, keep=3, compensation="none"),
]
CALIBRATED = [
    ConversionSpec(keep=12, order="least-squares", compensation="refit"),
    ConversionSpec(fade=0.6, fade_score="sparsegpt", fade_projections="gate-up-down"),
    ConversionSpec(branches=8, keep=5, allocation="sensitivity"),
    ConversionSpec(
        branches=8, keep=5, fade=0.8, fade_unit="neuron", fade_score="wanda",
        allocation="sensitivity",
    ),
]  # fmt: skip
ROUTED = [
    ConversionSpec(method="contiguous", experts=8, active=0.5),
    ConversionSpec(method="expertweaver", experts=8, active=0.5),
    ConversionSpec(method="neurons", active=0.5, selection="threshold", compensation="mean"),
    ConversionSpec(method="inputs", active=0.5, selection="threshold", router="inputs-norm"),
]
EVERY = [*STATIC, *CALIBRATED, *ROUTED]


def run_python(code: str) -> tuple[dict, list[float]]:
    """The names after running it, and perplexity dense, converted and their ratio as printed."""
    names: dict = {}
    with redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    dense, other, change = out.getvalue().split(" ", 2)
    return names, [float(dense), float(other), float(re.search(r"ratio=([^,]+)", change)[1])]


def shell_line(code: str) -> str:
    (line,) = (line for line in code.splitlines() if " -m mlpmoe " in line)
    assert line.startswith("#")
    return line[line.index("python") :]


def run_shell(code: str) -> dict:
    """What the command prints as JSON."""
    python, flag, name, *words = shlex.split(shell_line(code))
    assert (python, flag, name) == ("python", "-m", "mlpmoe")
    with redirect_stdout(io.StringIO()) as out:
        assert main([*words, "--json", "--no-speed"]) == 0
    return json.loads(out.getvalue())


def measured(loaded: LoadedModel, asked: Conversion, text: str) -> list[float]:
    """The same three figures as the page has them."""
    *_, found = loaded.evaluate(asked, text)
    return [found.dense.value, found.converted.value, found.change.ratio]


# the demo model itself, which snippets name


@pytest.fixture(scope="module")
def real() -> Workbench:
    return Workbench()


SHOWN = {"branches": 8, "keep": 6, "fade": 0.7, "fade_schedule": "uniform"}


def compare_with_the_page(loaded: LoadedModel, code: str, asked: Conversion, text: str) -> None:
    """Python and the shell give what the page has measured, and what it has counted."""
    expected = measured(loaded, asked, text)
    names, printed = run_python(code)
    assert names["converted"] is not loaded.converted(asked)
    assert printed == pytest.approx(expected, rel=1e-6)
    shown = run_shell(code)
    assert shown["spec"] == spec_of(asked).to_dict()
    told = [
        shown["dense"]["perplexity"],
        shown["converted"]["perplexity"],
        shown["perplexity_change"]["ratio"],
    ]
    assert told == pytest.approx(expected, rel=1e-6)
    run = loaded.run(asked, text)
    assert shown["converted"]["nonzero"] == run.nonzero
    macs = [shown[model]["macs_per_token"] for model in ("dense", "converted")]
    assert macs == [loaded.report.macs_per_token, run.macs_per_token]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "text"),
    [(SHOWN, "proxy"), ({"method": "contiguous", "experts": 8, "active": 0.5}, "stories")],
    ids=str,
)
def test_the_code_of_a_conversion_gives_the_page_s_figures(real, visitor, change, text):
    values = preview_values(share="8 8 8 0 -", text=text, **change)
    shown = Previewed(*Handlers(real).preview(visitor(), *values))
    loaded = real.loaded("demo")
    compare_with_the_page(loaded, shown.code, loaded.asked(ConversionSpec(**change)), text)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (ConversionSpec(keep=12, order="activation"), "proxy"),
        (ConversionSpec(method="cmoe", experts=8, active=0.5), "stories"),
    ],
    ids=str,
)
def test_the_code_of_a_calibrated_conversion_gives_the_page_s_figures(
    real, tmp_path, monkeypatch, spec, text
):
    """On a text of the visitor's own, since ours is long."""
    seen = named_calibration("stories")[:6000]
    (tmp_path / "own-calibration.txt").write_text(seen, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    code = snippet("demo", spec, text, "own-calibration.txt")
    compare_with_the_page(real.loaded("demo"), code, Calibrated(spec, seen), text)


# on a tiny model


@pytest.mark.parametrize("spec", EVERY, ids=ConversionSpec.to_query)
def test_the_snippet_makes_the_same_model(tiny, tiny_folder, spec):
    names, printed = run_python(snippet(str(tiny_folder), spec, "proxy"))
    expected = tiny.converted(tiny.asked(spec)).state_dict()
    made = names["converted"].state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.allclose(made[key], expected[key], atol=1e-5) for key in made)
    assert printed == pytest.approx(measured(tiny, tiny.asked(spec), "proxy"), rel=1e-4)


def test_the_snippet_of_a_static_conversion_is_exact(tiny_folder):
    spec = ConversionSpec(branches=5, fade=0.9, keep=3)
    names, _ = run_python(snippet(str(tiny_folder), spec, "proxy"))
    expected = convert(load(tiny_folder)[0], spec).state_dict()
    assert all(torch.equal(weight, expected[key])
               for key, weight in names["converted"].state_dict().items())  # fmt: skip


def test_the_snippet_of_an_own_text_reads_it_from_a_file(tiny, tiny_folder, tmp_path, monkeypatch):
    content = "The ferry left at nine.\r\nNobody had told the gulls “no”. " * 9
    key, spec = tiny.texts.add(content), ConversionSpec(keep=9)
    (tmp_path / "own-text.txt").write_text(content, encoding="utf-8", newline="")
    monkeypatch.chdir(tmp_path)
    code = snippet(str(tiny_folder), spec, key)
    _, printed = run_python(code)
    assert printed == pytest.approx(measured(tiny, tiny.asked(spec), key), rel=1e-6)
    assert "--text own-text.txt" in shell_line(code)


@pytest.mark.parametrize("chosen", ["the model's", "stories", "prose", "own"])
def test_python_and_the_shell_calibrate_on_the_text_that_was_chosen(
    tiny, tiny_folder, tmp_path, monkeypatch, capsys, chosen
):
    """As the page does it. The command is called in this process, which a shell would not share."""
    spec, text, key = ConversionSpec(keep=12, order="activation"), None, None
    if chosen == "own":
        text = "A lamp stood on the table “at nine” and a moth flew round it.\r\n" * 60
        key = tiny.texts.add(text)
        (tmp_path / "own-calibration.txt").write_text(text, encoding="utf-8", newline="")
    elif chosen != "the model's":
        key = chosen
    monkeypatch.chdir(tmp_path)
    code = snippet(str(tiny_folder), spec, "proxy", key)
    expected = measured(tiny, tiny.asked(spec, key), "proxy")
    _, printed = run_python(code)
    assert printed == pytest.approx(expected, rel=1e-6)
    capsys.readouterr()
    words = shlex.split(shell_line(code))
    assert words[:3] == ["python", "-m", "mlpmoe"]
    assert main([*words[3:], "--json", "--no-speed"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["converted"]["perplexity"] == pytest.approx(expected[1], rel=1e-6)


def forget(loaded: LoadedModel) -> None:
    """What is known of texts, of which a test has changed one."""
    for known in (loaded._texts, loaded._plans, loaded._losses):
        known.clear()


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_the_snippet_of_a_public_text_measures_its_windows(
    tiny, tiny_folder, monkeypatch, name
):  # fmt: skip
    """In the windows that published figures have, or the model's context where that is shorter."""
    content = named_text("proxy") * 3
    entry = replace(TEXTS[name], read=lambda: content, most_windows=3)
    monkeypatch.setitem(TEXTS, name, entry)
    forget(tiny)
    spec = ConversionSpec(keep=9)
    _, printed = run_python(snippet(str(tiny_folder), spec, name))
    assert printed == pytest.approx(measured(tiny, tiny.asked(spec), name), rel=1e-6)
    assert tiny.text(name).window == 256
    assert len(tiny.text(name).documents) == 3
    forget(tiny)


@pytest.mark.parametrize("model", ["demo", "owner/model", 'my models/a\'b "c"', "back\\slash"])
@pytest.mark.parametrize("spec", EVERY, ids=ConversionSpec.to_query)
def test_the_shell_line_survives_the_shell(model, spec):
    words = shlex.split(shell_line(snippet(model, spec, "proxy", "own-calibration.txt")))
    assert words[:5] == ["python", "-m", "mlpmoe", "evaluate", model]
    parser = argparse.ArgumentParser()
    parser.add_argument("--text")
    parser.add_argument("--calibration")
    add_spec(parser)
    read = parser.parse_args(words[5:])
    assert read_spec(read) == spec
    assert read.text == "proxy"
    assert read.calibration == ("own-calibration.txt" if spec.needs_calibration else None)
    flags = dict(zip(words[5::2], words[6::2], strict=True))
    flags = {flag[2:].replace("-", "_"): value for flag, value in flags.items()}
    written = {k: v for k, v in flags.items() if k not in ("text", "calibration")}
    assert written == dict(parse_qsl(spec.to_query()))
    assert model in eval(re.search(r"load\((.*)\)", snippet(model, spec, "proxy"))[1])
