"""The paper's tables on the page: the published ones, and the same rows for the loaded model."""

from __future__ import annotations

import re
import shlex
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import pairwise
from math import exp
from time import monotonic
from xml.etree import ElementTree

import gradio as gr
import pytest
import torch

from mlpmoe import UserError, convert, named_text
from mlpmoe.__main__ import main
from mlpmoe.core.stopping import may_stop
from mlpmoe.explorer.server import loaded as loaded_models
from mlpmoe.explorer.server.workbench import Workbench
from mlpmoe.explorer.tabs import paper as page
from mlpmoe.explorer.tabs.paper import PaperHandlers
from mlpmoe.explorer.tabs.paper_table import published_tables
from mlpmoe.measure.notation import NBSP
from mlpmoe.measure.quality.encoding import encode_text, windows
from mlpmoe.measure.runs import paper
from mlpmoe.measure.runs.paper import DENSE, FADED, TABLES, VARIANTS
from mlpmoe.measure.text.decoding import Reader
from mlpmoe.models.texts import TEXTS
from tests.commands.common import strictly
from tests.explorer.conftest import load
from tests.tiny import save_tiny_model

SKIPPED = gr.skip()
WHOLE = "MLPMoE-All-16"
PATIENCE = 60  # seconds
COLUMNS = ("total", "nonzero", "proxy", "text", "loop", "fused")


@pytest.fixture
def tab(workbench):
    return PaperHandlers(workbench)


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    """As many as it takes to say anything."""
    original = page.generation_rounds
    monkeypatch.setattr(
        page, "generation_rounds",
        lambda dense, converted, turn: original(dense, converted, 3, turn),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    for key in ("stories", "prose"):
        content = named_text(key)[:3000]
        entry = replace(TEXTS[key], read=lambda content=content: content)
        monkeypatch.setitem(TEXTS, key, entry)


def rows(html: str) -> dict[str, dict[str, list[str]]]:
    """Variant -> column -> the lines of its cell."""
    found = {}
    for row in ElementTree.fromstring(f"<div>{html}</div>").findall(".//tbody/tr"):
        variant, *cells = row
        lines = [[text.strip().replace(NBSP, " ") for text in cell.itertext()] for cell in cells]
        found[variant.text] = dict(zip(COLUMNS, lines, strict=False))
    return found


def table(steps) -> dict[str, dict[str, list[str]]]:
    """What is on the page after these steps."""
    return rows([html for _, html in steps if html != SKIPPED][-1])


def plain(html: str) -> str:
    return re.sub(r"<[^>]*>", "", html)


def value(line: str) -> float:
    """The first number of a line, and the one after ± or in brackets as they are written."""
    return float(re.search(r"[−±+]?\d[\d,]*\.?\d*", line)[0].replace(",", "").replace("−", "-"))


def wait_to_be_stopped():
    """What a step of a large model would be in the middle of."""
    deadline = monotonic() + PATIENCE
    while monotonic() < deadline:
        may_stop()
    raise AssertionError("nobody stopped it")


@pytest.fixture
def within(monkeypatch):
    """Have something done in the middle of a step, in the given call of a function, that ends
    the work; gives the calls."""

    def arrange(module, name: str, number: int, do, counts=lambda *given: True) -> list:
        run, calls = getattr(module, name), []

        def watched(*given, **named):
            calls.append(given) if counts(*given) else None
            if len(calls) >= number:
                do()
                wait_to_be_stopped()
            return run(*given, **named)

        monkeypatch.setattr(module, name, watched)
        return calls

    return arrange


# the published ones


def test_the_published_tables_are_shown_with_ratios_to_dense():
    html = published_tables()
    bodies = ElementTree.fromstring(f"<div>{html}</div>").findall(".//tbody")
    assert len(bodies) == len(TABLES)
    for body, published in zip(bodies, TABLES, strict=True):
        title, *shown = body
        assert published.model in title[0].text
        for row, (variant, *cells) in zip(published.rows, shown, strict=True):
            assert variant.text == row.variant
            figures = [value(cell.text) for cell in cells]
            assert figures == [row.total, row.nonzero, row.perplexity, row.seconds]
            below = [value(cell[0].text) for cell in cells if len(cell)]
            if row.variant == DENSE:
                assert below == []
                continue
            dense = published.dense
            assert below == pytest.approx(
                [
                    row.total - dense.total,
                    row.nonzero / dense.nonzero,
                    row.perplexity / dense.perplexity,
                    row.seconds / dense.seconds,
                ],
                abs=0.005,
            )


# the loaded model's


def test_before_the_button_only_what_is_known_is_shown(tab, demo, visitor):
    status, html, commands = tab.show(visitor(), "demo")
    found = rows(html)
    assert status == ""
    assert list(found) == [DENSE, *VARIANTS]
    assert value(found[DENSE]["total"][0]) == demo.report.total
    assert found[FADED] == {column: ["…"] for column in COLUMNS}
    assert commands.count("mlpmoe evaluate demo") == 4
    assert not demo.structure.known_report(VARIANTS[FADED])  # looking converts nothing


def test_the_rows_are_the_library_s(tab, demo, visitor):
    steps = list(tab.reproduce(visitor(), "demo"))
    found = table(steps)
    assert "…" not in plain(steps[-1][1])
    assert plain(steps[-1][0]).startswith("Done")
    sizes = {}
    for variant, spec in VARIANTS.items():
        parameters = list(convert(demo.model, spec).parameters())
        sizes[variant] = [
            sum(p.numel() for p in parameters), sum(int((p != 0).sum()) for p in parameters),
        ]  # fmt: skip
        assert [value(found[variant][c][0]) for c in ("total", "nonzero")] == sizes[variant]
        assert value(found[variant]["total"][1]) == sizes[variant][0] - demo.report.total
        assert value(found[variant]["nonzero"][1]) == pytest.approx(
            sizes[variant][1] / demo.report.nonzero, abs=5e-5
        )
    for column, key in (("proxy", "proxy"), ("text", "stories")):
        models = (demo.model, *(convert(demo.model, spec) for spec in VARIANTS.values()))
        means = [mean_loss(model, demo.tokenizer, key) for model in models]
        for variant, mean in zip((DENSE, WHOLE, FADED), means, strict=True):
            assert value(found[variant][column][0]) == pytest.approx(exp(mean), rel=1e-3)
        assert found[WHOLE][column][1:] == ["× 1.0000 ± 0.0000", "no measurable change"]
        change = demo.known_evaluation(VARIANTS[FADED], key).change
        assert change.ratio == pytest.approx(exp(means[2] - means[0]), rel=1e-5)
        assert found[FADED][column][1] == f"× {change.ratio:.4f} ± {change.stderr:.4f}"
        error = demo.known_dense(key).stderr
        assert value(found[DENSE][column][1].replace("±", "")) == pytest.approx(error, rel=1e-3)
    for variant in VARIANTS:
        for column in ("loop", "fused"):
            low, high = map(float, found[variant][column][1].split(" to "))
            assert low <= value(found[variant][column][0]) <= high
    assert "ms a token" in found[DENSE]["loop"][0]


def mean_loss(model, tokenizer, text: str) -> float:
    """In nats, from the logits of whole windows."""
    losses = []
    with torch.inference_mode():
        for part in windows(model, encode_text(tokenizer, named_text(text))):
            logs = model(part.ids[None]).logits[0].log_softmax(-1)
            scored = range(part.first, len(part.ids))
            losses += [-float(logs[i - 1, part.ids[i]]) for i in scored]
    return sum(losses) / len(losses)


def test_figures_are_known_one_by_one_those_of_the_longest_text_last(tab, demo):
    known = []

    def look(*_):
        cells = rows(tab._table(demo))
        known.append({(v, c) for v in cells for c in cells[v] if cells[v][c] != ["…"]})

    tab._measure(demo, look)
    for before, after in pairwise(known):
        assert before <= after
    arrived = [min(i for i, some in enumerate(known) if (FADED, c) in some) for c in COLUMNS]
    total, nonzero, proxy, text, loop, fused = arrived
    assert total == nonzero < proxy < loop == fused < text
    whole = min(i for i, some in enumerate(known) if (WHOLE, "text") in some)
    assert whole < text


def test_stop_keeps_what_is_measured_and_is_for_one_visitor(tab, demo, visitor, within):
    assert tab.jobs.press_stop(visitor()) == ""  # nothing is under way
    parts = demo.plan("stories").windows
    said = []

    def press():
        tab.jobs.press_stop(visitor("other"))
        said.append(tab.jobs.press_stop(visitor()))

    calls = within(
        loaded_models, "token_losses", 5, press,
        lambda model, ids, first: any(ids is part.ids for part in parts),
    )  # fmt: skip
    *_, (status, html) = tab.reproduce(visitor(), "demo")
    assert "topping" in said[0] and "Stopped" in status
    assert len(calls) == 5
    found = rows(html)
    measured = sum(parts[number].scored for number in demo.plan("stories").order[:2])
    assert f"{measured:,} of {demo.plan('stories').tokens:,} tokens" in found[WHOLE]["text"]
    assert found[FADED]["text"] == ["…"]
    assert found[FADED]["loop"] != ["…"]
    assert tab.jobs.press_stop(visitor()) == ""


def test_a_stopped_run_goes_on(tab, demo, visitor):
    steps = demo.evaluate(VARIANTS[WHOLE], "stories")
    for _ in range(3):
        next(steps)
    before = rows(tab.show(visitor(), "demo")[1])
    assert any("tokens" in line for line in before[WHOLE]["text"])
    found = table(tab.reproduce(visitor(), "demo"))
    assert not any("tokens" in line for cells in found.values() for line in cells["text"])


def test_stop_acts_between_two_tokens_of_a_generation(tab, visitor, monkeypatch):
    read, original = [], Reader.read

    def read_on(*given):
        read.append(given)
        if len(read) == 5:
            tab.jobs.press_stop(visitor())
            with suppress(CancelledError):  # this token is written to its end
                wait_to_be_stopped()
        return original(*given)

    monkeypatch.setattr(Reader, "read", read_on)
    *_, (status, html) = tab.reproduce(visitor(), "demo")
    assert "Stopped" in status
    assert len(read) == 5
    assert rows(html)[FADED]["proxy"] != ["…"]
    assert rows(html)[FADED]["loop"] == ["…"]


def test_another_model_ends_it_and_keeps_its_own_table(tab, visitor, one_layer, workbench, within):
    workbench.hold(one_layer)
    shown = []
    within(paper, "decode", 1, lambda: shown.append(tab.show(visitor(), one_layer.key)))
    *_, last = tab.reproduce(visitor(), "demo")
    assert last == (SKIPPED, SKIPPED)
    ((status, html, commands),) = shown
    assert status == ""
    assert value(rows(html)[DENSE]["total"][0]) == one_layer.report.total
    assert shlex.quote(one_layer.key) in commands


def test_opening_the_tab_again_disturbs_nothing(tab, visitor):
    steps = tab.reproduce(visitor(), "demo")
    next(steps)
    assert tab.show(visitor(), "demo")[0] == SKIPPED
    assert "Done" in list(steps)[-1][0]


def test_whatever_runs_a_model_waits_for_its_turn(tab, demo, visitor, monkeypatch):
    inside, ran = [], []
    original = demo.turns.turn

    @contextmanager
    def turn():
        with original():
            inside.append(True)
            yield
            inside.pop()

    monkeypatch.setattr(demo.turns, "turn", turn)

    def watch(module, name: str) -> None:
        run = getattr(module, name)

        def watched(*given, **named):
            ran.append((name, len(inside)))
            return run(*given, **named)

        monkeypatch.setattr(module, name, watched)

    watch(paper, "decode")
    watch(loaded_models, "token_losses")
    list(tab.reproduce(visitor(), "demo"))
    assert set(ran) == {("decode", 1), ("token_losses", 1)}


def test_a_first_look_is_not_shown(tab, demo, visitor):
    """Its short pieces give another ratio than windows."""
    spec = VARIANTS[FADED]
    step = next(demo.evaluate(spec, "stories"))
    assert step.look
    found = rows(tab.show(visitor(), "demo")[1])
    assert found[FADED]["text"] == found[DENSE]["text"] == ["…"]


@pytest.mark.parametrize("published", TABLES, ids=lambda table: table.key)
def test_the_paper_s_own_model_is_held_against_its_table(tab, demo, workbench, visitor, published):
    own = workbench.hold(replace(demo, key=published.key, label="Paper's"))
    found = table(tab.reproduce(visitor(), published.key))
    for row in published.rows:
        cells = found[row.variant]
        for column, theirs in (("total", row.total), ("nonzero", row.nonzero)):
            ours = value(cells[column][0])
            assert cells[column][-1] == f"paper {theirs:,} ({ours - theirs:+,.0f})".replace(
                "-", "−"
            )
    dense = published.dense
    spec = VARIANTS[FADED]
    ratio = own.known_evaluation(spec, "proxy").change.ratio
    theirs = published.rows[-1].perplexity / dense.perplexity
    paper_s, apart = found[FADED]["proxy"][-1].removeprefix("paper ").split(" (")
    assert value(paper_s) == pytest.approx(theirs, abs=5e-5)
    assert value(apart) == pytest.approx(ratio - theirs, abs=1e-4)
    paper_s, apart = found[FADED]["loop"][-1].removeprefix("paper ").split(" (")
    theirs = published.rows[-1].seconds / dense.seconds
    assert value(paper_s) == pytest.approx(theirs, abs=0.005)
    assert value(apart) == pytest.approx(value(found[FADED]["loop"][0]) - theirs, abs=0.011)
    # only what the paper has
    assert not any("paper" in line for c in ("text", "fused") for line in found[FADED][c])


def test_no_other_model_is_held_against_the_paper(tab, visitor):
    *_, (_, html) = tab.reproduce(visitor(), "demo")
    assert not any(
        "paper" in line for row in rows(html).values() for c in row.values() for line in c
    )


def test_without_a_gate_fade_works_on_half_of_the_mlps(gateless, visitor):
    tab = PaperHandlers(Workbench())
    tab.workbench.hold(gateless)
    *_, (_, html) = tab.reproduce(visitor(), gateless.key)
    ups = sum(mlp.weights.up.numel() for mlp in gateless.mlps)
    mlps = sum(p.numel() for mlp in gateless.mlps for p in mlp.module.parameters())
    assert f"{100 * ups / mlps:.1f}" in plain(html)
    zeros = gateless.report.nonzero - value(rows(html)[FADED]["nonzero"][0])
    alphas = 16 * len(gateless.mlps)
    assert f"{zeros + alphas:,.0f} zeros" in plain(html)


def test_a_model_with_fewer_neurons_than_branches_is_refused(tmp_path, visitor):
    workbench = Workbench()
    narrow = load(workbench, save_tiny_model(tmp_path / "narrow", intermediate_size=12))
    tab = PaperHandlers(workbench)
    assert tab.show(visitor(), narrow.key)[0] == ""
    with pytest.raises(UserError, match="12 neurons"):
        next(tab.reproduce(visitor(), narrow.key))
    assert tab.jobs.of(visitor()) is None


def test_the_commands_give_the_same_figures(tab, demo, visitor, capsys):
    found = table(list(tab.reproduce(visitor(), "demo")))
    _, _, commands = tab.show(visitor(), "demo")
    measured = set()
    for line in commands.strip().splitlines():
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "mlpmoe"]
        assert main([*words[3:], "--no-speed", "--json"]) == 0
        printed = strictly(capsys.readouterr().out)
        column = "proxy" if printed["setting"]["text"] == "proxy" else "text"
        variant = FADED if printed["spec"]["fade"] else WHOLE
        measured.add((variant, column))
        for name, row in (("dense", DENSE), ("converted", variant)):
            assert value(found[row]["total"][0]) == printed[name]["total"]
            assert value(found[row]["nonzero"][0]) == printed[name]["nonzero"]
            assert value(found[row][column][0]) == pytest.approx(
                printed[name]["perplexity"], rel=5e-4
            )
    assert measured == {(v, c) for v in VARIANTS for c in ("proxy", "text")}
