"""The tab Tokens: colours that tell the damage, and branches recomputed from the weights."""

from __future__ import annotations

import re
from copy import copy
from html import unescape
from math import nan, sqrt

import gradio as gr
import pytest
import torch

from mlpmoe import ConversionSpec, UserError
from mlpmoe.explorer.shell.settings import read_spec
from mlpmoe.explorer.shell.tint import LEAST, Tint
from mlpmoe.explorer.tabs import tokens as module
from mlpmoe.explorer.tabs.tokens import (
    SHOWN,
    TokenHandlers,
    branches_html,
    text_html,
    worst_html,
)
from mlpmoe.explorer.tabs.tokens_panel import EMPTY
from mlpmoe.measure.quality.tokens import Sentence, TokenChange, sentences, token_changes, worst
from tests.explorer.controls import controls, settings

SKIPPED = gr.skip()
HOSTILE = "<img src=x onerror='alert(1)'>&\""


@pytest.fixture
def tab(workbench):
    return TokenHandlers(workbench)


def token(text="word", change=0.5, dense=1.0, document=0, position=1) -> TokenChange:
    return TokenChange(text, change, dense, document, position)


# what is written


def test_what_a_token_says_is_escaped():
    changes = [token(HOSTILE, 1.0), token("\n"), token(" more", 0.0), token("", 1.0)]
    tint = Tint.of(changes)
    for html in (text_html(changes, tint), worst_html([Sentence(tuple(changes))], 4, tint)):
        assert not {"img", "script"} & {*re.findall(r"<(\w+)", html)}
    shown = re.sub(r"<[^>]*>", "", text_html(changes[:1], tint).split('<p class="loss">')[1])
    assert unescape(shown) == HOSTILE


def test_documents_stay_apart_and_a_long_text_ends(monkeypatch):
    monkeypatch.setattr(module, "SHOWN_TOKENS", 5)
    changes = [token(f"t{i}", 0.0, document=i // 3) for i in range(9)]
    html = text_html(changes, Tint.of(changes))
    paragraphs = re.findall(r'<p class="loss">(.*?)</p>', html)
    assert paragraphs == ["t0t1t2", "t3t4"]
    assert "4 more tokens are not shown" in html
    assert "more tokens" not in text_html(changes[:5], Tint.of(changes))


def test_nothing_harder_is_said():
    tint = Tint.of([])
    for found in ([], [Sentence((token(change=-1.0),))], [Sentence((token(change=0.0),))]):
        said = worst_html(found, 1234, tint)
        assert "<li>" not in said and "1,234 tokens" in said
    some = [Sentence((token("bad", 2.0),)), Sentence((token("good", -2.0),))]
    html = worst_html(some, 5, tint)
    assert html.count("<li>") == 1
    assert "bad" in html and "good" not in html
    assert "undefined" in worst_html([Sentence((token("broken", nan),)), *some], 5, tint)


# what is shown of a conversion


def values(text="proxy", layer=0, **change) -> tuple:
    return "demo", *settings(**change), text, layer


def measured(tab, text="proxy", **change):
    loaded = tab.workbench.loaded("demo")
    spec = read_spec(controls(**change))
    *_, found = loaded.evaluate(loaded.asked(spec), text)
    return loaded, spec, found


def test_what_is_not_measured_is_not_shown(tab):
    shown = tab.show(*values(keep=8))
    assert shown[:2] == (EMPTY, "")
    assert shown[2:] == (SKIPPED,) * (SHOWN - 2)


@pytest.mark.parametrize(
    "change",
    [
        {"keep": 8},
        {"fade": 1.5},
        {"keep": 12, "order": "activation"},
        {"method": "cmoe", "experts": 8, "active": 0.5},
    ],
    ids=str,
)
def test_tokens_and_sentences_are_those_that_were_measured(tab, change):
    loaded, spec, found = measured(tab, **change)
    worst_list, text, drift, view, *branch_figures = tab.show(*values(**change))
    encoded = loaded.text("proxy")
    parts = loaded.windows("proxy")
    changes = token_changes(found.dense, found.converted, encoded, parts, loaded.tokenizer)
    plain = [
        unescape(re.sub(r"<[^>]*>", "", p)) for p in re.findall(r'<p class="loss">(.*?)</p>', text,
                                                                re.DOTALL)
    ]  # fmt: skip
    assert "".join(plain) == "".join(t.text for t in changes[: module.SHOWN_TOKENS])
    hardest = worst(sentences(changes), 1)[0]
    first = unescape(re.sub(r"<[^>]*>", "", re.search(r"<li>(.*?)</li>", worst_list, re.DOTALL)[1]))
    assert first.startswith(f"+{hardest.mean:.2f} nats")
    assert "".join(t.text for t in hardest.tokens).strip("\n") in first
    assert len(drift.data[0].x) == len(loaded.mlps)
    drift.to_json()
    assert view["visible"] == (not spec.routed)
    if spec.routed:  # there are no branches to look at
        assert branch_figures == [SKIPPED] * 3
        return
    branches, norms, correlations = branch_figures
    for figure in (norms, correlations):
        figure.to_json()
    assert "α of least error" in branches


def branch_outputs(loaded, layer: int, branches: int) -> torch.Tensor:
    """Outputs of the branches of one MLP on the first tokens of the text, from its weights:
    (B, tokens, d_model)."""
    ids = loaded.text("proxy").documents[0][: module.DRIFT_TOKENS]
    caught = []
    mlp = loaded.model.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    with torch.no_grad():
        loaded.model(ids[None])
        handle.remove()
        (x,) = caught
        gate, up, down = (
            getattr(mlp, f"{name}_proj").weight for name in ("gate", "up", "down")
        )  # fmt: skip
        hidden = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        pieces = zip(hidden.tensor_split(branches, 1), down.tensor_split(branches, 1), strict=True)
        return torch.stack([h @ d.T for h, d in pieces])


def test_of_a_part_of_the_text_only_that_part_is_coloured(tab):
    """A measurement may end before the text does; the tab says so and shows what is known."""
    loaded = tab.workbench.loaded("demo")
    steps = loaded.evaluate(ConversionSpec(keep=2), "proxy")
    look, window = next(steps), next(steps)
    steps.close()
    assert (look.look, window.look) == (True, False)
    worst_list, text, *_ = tab.show(*values(keep=2))
    assert f"{window.dense.tokens:,} of {window.total:,} tokens" in text
    (part,) = window.parts
    losses = window.converted.losses - window.dense.losses
    coloured = [
        float(found) for found in re.findall(r'title="([+−-][\d.]+) nats', text.replace("−", "-"))
    ]
    assert coloured == pytest.approx([c for c in losses.tolist() if abs(c) >= LEAST], abs=0.006)
    document = loaded.text("proxy").documents[part.document]
    measured_words = loaded.tokenizer.decode(document[part.start : part.start + len(part.ids)])
    hardest = unescape(
        re.sub(r"<[^>]*>", "", re.search(r"<li>(.*?)</li>", worst_list, re.DOTALL)[1])
    )
    assert hardest.split("nats", 1)[1].strip()[:12] in measured_words
    *_, _ = loaded.evaluate(ConversionSpec(keep=2), "proxy")
    assert "tokens are measured" not in tab.show(*values(keep=2))[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_figures_of_the_branches_are_recomputed(tab, layer):
    loaded, _, _ = measured(tab, branches=6, keep=4)
    shown = tab.branches(*values(layer=layer, branches=6, keep=4))
    view, html, norms, correlations = shown
    assert view["visible"] is True
    outputs = branch_outputs(loaded, layer, 6)
    whole, some = outputs.sum(0), outputs[:4].sum(0)
    sizes = outputs.flatten(1).norm(dim=1) / whole.norm()
    kept, dropped, expected = norms.data
    assert list(kept.x) == [0, 1, 2, 3] and list(dropped.x) == [4, 5]
    assert [*kept.y, *dropped.y] == pytest.approx((100 * sizes).tolist(), rel=1e-3)
    assert list(expected.y) == pytest.approx([100 / sqrt(6)] * 2)
    centred = (outputs - outputs.mean(1, keepdim=True)).flatten(1)
    found = torch.corrcoef(centred)
    drawn = correlations.data[0].z
    for a in range(6):
        for b in range(6):
            if a == b:
                assert drawn[a][b] is None
            else:
                assert drawn[a][b] == pytest.approx(float(found[a, b]), abs=2e-3)
    rows = dict(re.findall(r'<th scope="row">(.*?)</th><td>.*?</td><td class="converted">(.*?)<',
                           html))  # fmt: skip
    off = (found.sum() - found.trace()) / 30
    size = float(some.norm() / whole.norm())
    fit = float((some * whole).sum() / some.square().sum())
    mean = outputs.mean(1).square().sum() * outputs.shape[1] / outputs.square().sum()
    assert float(rows["correlation between branches, mean"]) == pytest.approx(float(off), abs=2e-3)
    assert float(rows["α that restores the size"]) == pytest.approx(1 / size, abs=2e-3)
    assert float(rows["α of least error"]) == pytest.approx(fit, abs=2e-3)
    assert float(rows["share of the outputs that is their mean"].rstrip("%\N{NBSP} ")) == (
        pytest.approx(100 * float(mean), abs=0.2)
    )
    assert f"{sqrt(6 / 4):.3f}" in html  # what √(B/K) assumes


def test_the_name_of_an_order_is_escaped(tab, monkeypatch):
    loaded, spec, _ = measured(tab, keep=8)
    whole = loaded.converted(ConversionSpec())
    ids = loaded.text("proxy").documents[0][:64]
    found = module.branch_statistics(whole, 0, ids, 8)
    spec = copy(spec)  # others share it
    object.__setattr__(spec, "order", HOSTILE)
    assert "<img" not in branches_html(found, spec)


def test_another_model_has_its_layers(tab, one_layer_folder):
    *_, guest = tab.workbench.load(str(one_layer_folder))
    assert tab.another_model(guest.key) == gr.update(maximum=1, value=0)
    assert tab.another_model("demo") == gr.update(maximum=1, value=0)
    with pytest.raises(UserError, match="not loaded"):
        tab.another_model("owner/absent")
