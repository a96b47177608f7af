"""What √(B/K) assumes, beside what branches do: against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlpmoe import ConversionSpec, UserError, convert
from mlpmoe.core.static.branched import branch_sizes
from mlpmoe.measure.quality.correlations import branch_statistics
from tests.tiny import D_FF, tiny_model

IDS = torch.randint(1, 257, (40,), generator=torch.Generator().manual_seed(0))


def outputs(model, layer: int, branches: int) -> np.ndarray:
    """Each branch's output, (B, tokens, d_model), from the weights alone."""
    caught = []
    mlp = model.model.layers[layer].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0][0]))
    with torch.inference_mode():
        model(IDS[None])
    handle.remove()
    x = caught[0].double()
    hidden = torch.nn.functional.silu(x @ mlp.gate_proj.weight.double().T)
    hidden = hidden * (x @ mlp.up_proj.weight.double().T)
    found, start = [], 0
    for size in branch_sizes(D_FF, branches):
        part = slice(start, start + size)
        found.append((hidden[:, part] @ mlp.down_proj.weight.double()[:, part].T).detach().numpy())
        start += size
    return np.stack(found)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize(("branches", "kept"), [(1, 1), (4, 4), (6, 2), (7, 5)])
def test_statistics_of_the_branches(layer, branches, kept):
    model = tiny_model()
    whole = convert(model, ConversionSpec(branches=branches))
    found = branch_statistics(whole, layer, IDS, kept)
    expected = outputs(model, layer, branches)
    total, some = expected.sum(0), expected[:kept].sum(0)
    assert found.tokens == len(IDS)
    norms = [np.linalg.norm(one) / np.linalg.norm(total) for one in expected]
    assert found.norms.tolist() == pytest.approx(norms, rel=1e-4)
    centred = (expected - expected.mean(1, keepdims=True)).reshape(branches, -1)
    correlation = np.atleast_2d(np.corrcoef(centred))
    assert np.allclose(found.correlation.numpy(), correlation, atol=1e-4)
    shares = len(IDS) * (expected.mean(1) ** 2).sum(1) / (expected**2).sum((1, 2))
    assert found.mean_share.tolist() == pytest.approx(shares.tolist(), rel=1e-3)
    size = np.linalg.norm(some) / np.linalg.norm(total)
    fit = (some * total).sum() / (some * some).sum()
    assert found.alpha_size == pytest.approx(1 / size, rel=1e-4)
    assert found.alpha_fit == pytest.approx(fit, rel=1e-4)
    pairs = [correlation[a, b] for a in range(branches) for b in range(branches) if a != b]
    assert found.mean_correlation == pytest.approx(np.mean(pairs) if pairs else 0, abs=1e-4)


def test_all_branches_are_the_whole():
    whole = convert(tiny_model(), ConversionSpec(branches=5))
    found = branch_statistics(whole, 0, IDS, 5)
    assert (found.size, found.cosine) == (pytest.approx(1), pytest.approx(1))
    assert (found.alpha_size, found.alpha_fit) == (pytest.approx(1), pytest.approx(1))


def test_the_model_is_left_alone():
    whole = convert(tiny_model(), ConversionSpec(branches=3))
    branch_statistics(whole, 1, IDS, 2)
    assert not any(module._forward_pre_hooks for module in whole.modules())


def test_other_layers_and_models_are_refused():
    model = tiny_model()
    with pytest.raises(UserError, match="layer must lie between 0 and 1, not 2"):
        branch_statistics(convert(model, ConversionSpec()), 2, IDS, 1)
    with pytest.raises(UserError, match="only the branches of a static conversion"):
        branch_statistics(model, 0, IDS, 1)
