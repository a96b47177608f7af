"""Histograms and sums per branch against NumPy on the plain weights."""

import numpy as np
import pytest
import torch

from mlpmoe.core.conversion import convert, mlp_modules
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost.magnitudes import branch_sums, magnitudes
from tests.families import build
from tests.tiny import D_FF, D_MODEL, LAYERS, tiny_model

BRANCHES = 5
SIZES = (10, 10, 10, 9, 9)  # of 48 neurons


@pytest.fixture(scope="module")
def dense():
    return tiny_model()


@pytest.fixture(scope="module")
def split(dense):
    return convert(dense, ConversionSpec(branches=BRANCHES))


@pytest.fixture(scope="module")
def faded(dense):
    return convert(dense, ConversionSpec(branches=BRANCHES, fade=0.9))


def branches_of(dense, layer, projection):
    """The magnitudes in each branch of a dense model's projection, float32."""
    weight = getattr(dense.model.layers[layer].mlp, f"{projection}_proj").weight.detach()
    neurons_first = weight.T if projection == "down" else weight
    return [piece.abs().float().numpy() for piece in neurons_first.tensor_split(BRANCHES)]


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_every_weight_is_counted_in_its_branch(dense, split, projection):
    found = magnitudes(split, 1, projection, bins=30)
    pieces = branches_of(dense, 1, projection)
    assert found.counts.shape == (BRANCHES, 30)
    assert found.counts.sum(1).tolist() == [size * D_MODEL for size in SIZES]
    assert found.zeros.tolist() == [0] * BRANCHES
    assert found.edges[0] == 0
    assert float(found.edges[-1]) == pytest.approx(max(float(piece.max()) for piece in pieces))
    for counts, piece in zip(found.counts, pieces, strict=True):
        expected, _ = np.histogram(piece, bins=found.edges.numpy().astype(float))
        # a magnitude on an edge may be rounded into either bin
        assert np.abs(counts.numpy() - expected).sum() <= 2


def test_branches_that_were_dropped_are_not_shown(dense):
    kept = convert(dense, ConversionSpec(branches=BRANCHES, keep=2))
    assert magnitudes(kept, 0, "up").counts.sum(1).tolist() == [10 * D_MODEL] * 2


@pytest.mark.parametrize("projection", ["gate", "up"])
def test_thresholds_are_quantiles_and_zeros_lie_below(dense, faded, projection):
    found = magnitudes(faded, 0, projection, bins=20)
    for branch, piece in enumerate(branches_of(dense, 0, projection)):
        counts, zeros, threshold = found.counts[branch], found.zeros[branch], 0.0
        if branch:
            threshold = torch.from_numpy(piece).quantile(0.9 * branch / BRANCHES).item()
            assert zeros == (piece <= threshold).sum()
        else:
            assert zeros == 0
        assert found.thresholds[branch] == threshold
        assert counts.sum() + zeros == piece.size
        whole_bins_below = int((found.edges[1:] <= threshold).sum())
        assert counts[:whole_bins_below].sum() == 0


def test_down_is_not_faded(faded):
    found = magnitudes(faded, 0, "down")
    assert found.thresholds == (0.0,) * BRANCHES
    assert found.zeros.sum() == 0


def test_weights_above_the_upper_edge_are_left_out(dense, split):
    whole = magnitudes(split, 0, "gate")
    upper = float(whole.edges[-1]) / 3
    cut = magnitudes(split, 0, "gate", bins=10, upper=upper)
    assert cut.edges.tolist() == pytest.approx(np.linspace(0, upper, 11))
    for counts, piece in zip(cut.counts, branches_of(dense, 0, "gate"), strict=True):
        assert counts.sum() == (piece <= np.float32(upper)).sum()
    assert cut.counts.sum() < whole.counts.sum()


def test_an_empty_matrix_has_zeros_only(dense):
    model = tiny_model()
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    found = magnitudes(convert(model, ConversionSpec(branches=2)), 0, "up")
    assert found.counts.sum() == 0
    assert found.zeros.tolist() == [D_FF // 2 * D_MODEL] * 2


def test_counts_stay_exact_beyond_what_float32_can_count():
    """torch.histc counts in float32, which stops at 2**24."""
    model = tiny_model(num_hidden_layers=1, hidden_size=1024, intermediate_size=2**14 + 1024)
    weight = model.model.layers[0].mlp.up_proj.weight
    torch.nn.init.constant_(weight, 0.25)
    weight.data[0, 0] = 1.0
    found = magnitudes(convert(model, ConversionSpec(branches=1)), 0, "up", bins=2)
    assert found.counts.tolist() == [[weight.numel() - 1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_all_dtypes(dtype):
    model = convert(tiny_model().to(dtype), ConversionSpec(branches=4, fade=1.5))
    found = magnitudes(model, 0, "gate")
    assert (found.counts.sum(1) + found.zeros).tolist() == [D_FF // 4 * D_MODEL] * 4


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_layers_out_of_range_are_refused(split, layer):
    with pytest.raises(UserError, match=rf"between 0 and {LAYERS - 1}, not {layer}"):
        magnitudes(split, layer, "up")


def test_unknown_projections_are_refused(split):
    with pytest.raises(UserError, match="allowed: gate, up, down"):
        magnitudes(split, 0, "side")
    plain = convert(build("gpt2"), ConversionSpec(branches=4))
    with pytest.raises(UserError, match="allowed: up, down"):
        magnitudes(plain, 0, "gate")


def test_dense_models_have_no_branches(dense):
    with pytest.raises(UserError, match="dense"):
        magnitudes(dense, 0, "up")
    with pytest.raises(UserError, match="dense"):
        branch_sums(dense, "energy")


def test_sums_per_branch(dense, faded):
    sums = {quantity: branch_sums(faded, quantity) for quantity in ("nonzero", "energy")}
    assert list(sums["energy"]) == ["gate", "up", "down"]
    for layer, mlp in enumerate(mlp_modules(faded)):
        weights = {"gate": mlp.gate_proj, "up": mlp.up_proj, "down": mlp.down_proj}
        for projection, linear in weights.items():
            weight = linear.weight.detach().numpy()
            neurons_first = weight.T if projection == "down" else weight
            for branch in range(BRANCHES):
                held = neurons_first[sum(SIZES[:branch]) : sum(SIZES[: branch + 1])]
                place = layer, branch
                assert sums["nonzero"][projection][place] == np.count_nonzero(held)
                assert sums["energy"][projection][place].item() == pytest.approx(
                    np.square(held.astype(float)).sum(), rel=1e-6
                )


def test_dropped_branches_hold_nothing(dense, split):
    kept = convert(dense, ConversionSpec(branches=BRANCHES, keep=2))
    left, whole = branch_sums(kept, "energy"), branch_sums(split, "energy")
    assert left.keys() == whole.keys()
    for projection, sums in left.items():
        assert sums.shape == whole[projection].shape == (LAYERS, BRANCHES)
        assert torch.equal(sums[:, :2], whole[projection][:, :2])
        assert sums[:, 2:].sum() == 0
