"""Each score zeroes the weights its authors would, as many as asked for."""

import pytest
import torch

from mlpmoe.core.errors import SpecError
from mlpmoe.core.static import scores
from mlpmoe.core.static.order import ORDERS
from mlpmoe.core.static.removal import DAMPING
from mlpmoe.core.static.scores import SCORES, Cut, zero_weights

each_score = pytest.mark.parametrize("score", SCORES)
BY_OUTPUT = ("relative", "wanda")  # scores that compare within an output
each_axis = pytest.mark.parametrize("axis", [0, 1], ids=["gate-like", "down-like"])
LAYOUTS = {
    "contiguous": lambda w: w,
    "transposed": lambda w: w.T.contiguous().T,  # as GPT-2 stores it
    "strided": lambda w: torch.stack([w, w], dim=-1)[..., 0],
}


def random_weight(outputs, inputs, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(outputs, inputs, generator=generator).to(dtype)


def random_moment(inputs, seed=1):
    """(inputs, inputs) float64, of inputs that depend on each other, as hidden states do, and
    differ in size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator).double()
    mix = mix / torch.arange(1, inputs + 1)[:, None] ** 0.5
    x = torch.randn(6 * inputs, inputs, generator=generator).double() @ mix
    x = x * torch.rand(inputs, generator=generator).double().add(0.2)
    return x.T @ x / len(x)


def cut_of(weight, axis, shares, pattern=None):
    parts = torch.arange(weight.shape[axis]).tensor_split(len(shares))
    return Cut([len(part) for part in parts], list(shares), axis, pattern)


def branches_of(weight, cut):
    return weight.split(list(cut.sizes), dim=cut.axis)


def zeros(weight):
    return int((weight == 0).sum())


def lowest(values, count):
    """Positions of the `count` smallest of a list."""
    return sorted(range(len(values)), key=lambda i: values[i])[:count]


# Magnitude and Wanda -----------------------------------------------------------------------


@each_axis
@pytest.mark.parametrize("layout", LAYOUTS)
def test_magnitude_is_the_quantile_of_each_branch(axis, layout):
    weight = LAYOUTS[layout](random_weight(15, 22))
    cut = cut_of(weight, axis, [0, 0.3, 0.71, 1])
    found, thresholds = zero_weights(weight, cut, "magnitude", None)
    parts = zip(branches_of(weight, cut), branches_of(found, cut), strict=True)
    for (source, part), share, threshold in zip(parts, cut.sparsities, thresholds, strict=True):
        quantile = torch.quantile(source.abs(), share) if share else torch.tensor(0.0)
        assert threshold == quantile
        assert torch.equal(part, source * (source.abs() > quantile))


@each_axis
@pytest.mark.parametrize("layout", LAYOUTS)
def test_wanda_compares_within_each_output_of_a_branch(axis, layout):
    weight = LAYOUTS[layout](random_weight(9, 22))
    moment, cut = random_moment(22), cut_of(weight, axis, [0, 0.3, 0.7, 1])
    found, thresholds = zero_weights(weight, cut, "wanda", moment)
    expected = weight.clone()
    for where, share in zip(cut.slices, cut.sparsities, strict=True):
        rows = range(9)[where] if axis == 0 else range(9)
        inputs = range(22) if axis == 0 else range(22)[where]
        for row in rows:
            size = [abs(float(weight[row, j])) * float(moment[j, j]) ** 0.5 for j in inputs]
            for j in lowest(size, round(share * len(inputs))):
                expected[row, inputs[j]] = 0
    assert torch.equal(found, expected)
    assert thresholds == ()


@each_axis
@pytest.mark.parametrize("branches", [1, 3, 5])
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_wanda_compares_whole_outputs_where_branches_lose_the_same(axis, branches, share):
    """As published, whatever the branches are."""
    weight, moment = random_weight(9, 22), random_moment(22)
    found, _ = zero_weights(weight, cut_of(weight, axis, [share] * branches), "wanda", moment)
    expected = weight.clone()
    for row in range(9):
        size = [abs(float(weight[row, j])) * float(moment[j, j]) ** 0.5 for j in range(22)]
        expected[row, lowest(size, round(share * 22))] = 0
    assert torch.equal(found, expected)


def test_wanda_spares_small_weights_on_large_inputs():
    moment = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0]).double())
    weight = torch.tensor([[0.1, 0.5, 0.4, 0.6]])
    found, _ = zero_weights(weight, Cut([1], [0.5], 0), "wanda", moment)
    assert torch.equal(found, torch.tensor([[0.1, 0, 0, 0.6]]))


# Beside others on the same input -----------------------------------------------------------


def parts_of_columns(weight):
    """|w| / Σ|column|, one weight after the other."""
    size = [[abs(float(w)) for w in row] for row in weight]
    columns = [sum(column) for column in zip(*size, strict=True)]
    return [[w / columns[j] for j, w in enumerate(row)] for row in size]


@each_axis
@pytest.mark.parametrize("shares", [[0, 0.3, 0.7, 1], [0.4] * 4, [0.4]], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parts_of_columns_are_compared_within_each_output(axis, shares, layout):
    """Of a branch, or of all where they lose the same; the sums run over the whole matrix."""
    weight = random_weight(9, 22) * (torch.arange(22) + 1) ** 0.5
    weight = LAYOUTS[layout](weight)
    cut = cut_of(weight, axis, shares)
    found, thresholds = zero_weights(weight, cut, "relative", None)
    places = [(range(9), range(22), 0.4)]
    if len(set(shares)) > 1:
        places = [
            (range(9)[where], range(22), share)
            if axis == 0
            else (range(9), range(22)[where], share)
            for where, share in zip(cut.slices, shares, strict=True)
        ]
    expected, parts = weight.clone(), parts_of_columns(weight)
    for rows, inputs, share in places:
        for row in rows:
            gone = lowest([parts[row][j] for j in inputs], round(share * len(inputs)))
            expected[row, [inputs[i] for i in gone]] = 0
    assert torch.equal(found, expected)
    assert thresholds == ()


def test_columns_that_are_small_all_over_are_spared():
    weight = torch.tensor([[0.1, 1.0, 2.0], [0.1, 2.0, 1.0]])
    found, _ = zero_weights(weight, Cut([2], [1 / 3], 0), "relative", None)
    assert torch.equal(found, torch.tensor([[0.1, 0, 2.0], [0.1, 2.0, 0]]))


@each_axis
@pytest.mark.parametrize("pattern", [None, (1, 2)], ids=str)
def test_columns_of_zeros_go_first(axis, pattern):
    weight = random_weight(6, 24)
    weight[2], weight[:, 5] = 0, 0
    found, _ = zero_weights(weight, cut_of(weight, axis, [0.5], pattern), "relative", None)
    assert all(zeros(row) == (24 if i == 2 else 12) for i, row in enumerate(found))


# SparseGPT ---------------------------------------------------------------------------------


def plain_sparsegpt(weight, moment, blocks, pattern=None):
    """One weight after the other; its loss and what makes up for it from the inverse of the
    moment of the inputs that are still to come. float64, no Cholesky factor, nothing put off."""
    w = weight.double().clone()
    extra = DAMPING * moment.diagonal().mean()
    moment = moment + extra * torch.eye(len(moment)).double()
    inverses = [torch.linalg.inv(moment[j:, j:]) for j in range(len(moment))]

    def loss(row, j):
        return float(w[row, j] ** 2 / inverses[j][0, 0])

    for inputs, share in blocks:
        places = [(row, j) for row in range(len(w)) for j in inputs]
        gone = set()
        if not pattern:
            losses = [loss(*place) for place in places]
            gone = {places[i] for i in lowest(losses, round(share * len(places)))}
        for j in inputs:
            if pattern and j % pattern[1] == 0:
                for row in range(len(w)):
                    losses = [loss(row, k) for k in range(j, j + pattern[1])]
                    gone |= {(row, j + i) for i in lowest(losses, pattern[0])}
            for row in range(len(w)):
                if (row, j) in gone:
                    w[row, j:] -= w[row, j] / inverses[j][0, 0] * inverses[j][0]
                    w[row, j] = 0
    return w


def in_blocks(inputs, length):
    return [inputs[i : i + length] for i in range(0, len(inputs), length)]


def assert_like_plain(found, expected):
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [128, 7, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparsegpt_of_gate_and_up(block, layout, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", block)
    weight = LAYOUTS[layout](random_weight(11, 20))
    moment, cut = random_moment(20), cut_of(weight, 0, [0, 0.3, 0.65, 1])
    found, thresholds = zero_weights(weight, cut, "sparsegpt", moment)
    parts = zip(branches_of(weight, cut), branches_of(found, cut), cut.sparsities, strict=True)
    for source, part, share in parts:
        blocks = [(inputs, share) for inputs in in_blocks(range(20), block)]
        assert_like_plain(part, plain_sparsegpt(source, moment, blocks))
    assert thresholds == ()


@pytest.mark.parametrize("block", [128, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparsegpt_of_down(block, layout, monkeypatch):
    """Each branch of inputs has its share, and what it loses is made up for by later branches."""
    monkeypatch.setattr(scores, "BLOCK", block)
    weight = LAYOUTS[layout](random_weight(9, 22))
    moment, cut = random_moment(22), cut_of(weight, 1, [0, 0.6, 0.3, 0.8])
    found, _ = zero_weights(weight, cut, "sparsegpt", moment)
    blocks = [
        (inputs, share)
        for where, share in zip(cut.slices, cut.sparsities, strict=True)
        for inputs in in_blocks(range(22)[where], block)
    ]
    assert_like_plain(found, plain_sparsegpt(weight, moment, blocks))
    assert torch.equal(found[:, cut.slices[0]], weight[:, cut.slices[0]])


@each_axis
@pytest.mark.parametrize("branches", [1, 3, 5])
@pytest.mark.parametrize("block", [128, 8])
def test_sparsegpt_compares_whole_blocks_where_branches_lose_the_same(
    axis, branches, block, monkeypatch
):
    monkeypatch.setattr(scores, "BLOCK", block)
    weight, moment = random_weight(9, 22), random_moment(22)
    cut = cut_of(weight, axis, [0.4] * branches)
    found, _ = zero_weights(weight, cut, "sparsegpt", moment)
    blocks = [(inputs, 0.4) for inputs in in_blocks(range(22), block)]
    assert_like_plain(found, plain_sparsegpt(weight, moment, blocks))


def test_sparsegpt_beyond_a_block():
    weight, moment = random_weight(3, 150), random_moment(150)
    found, _ = zero_weights(weight, Cut([3], [0.5], 0), "sparsegpt", moment)
    blocks = [(range(128), 0.5), (range(128, 150), 0.5)]
    assert_like_plain(found, plain_sparsegpt(weight, moment, blocks))


@each_axis
@pytest.mark.parametrize("block, pattern", [(128, (2, 4)), (5, (1, 2)), (5, (2, 3)), (2, (5, 6))])
def test_sparsegpt_by_pattern(axis, block, pattern, monkeypatch):
    monkeypatch.setattr(scores, "BLOCK", block)
    weight, moment = random_weight(7, 24), random_moment(24)
    cut = cut_of(weight, axis, [0, 0, 0], pattern)
    found, _ = zero_weights(weight, cut, "sparsegpt", moment)
    assert_like_plain(found, plain_sparsegpt(weight, moment, [(range(24), 0)], pattern))


def loss(weight, changed, moment):
    """Mean squared error of the outputs over the calibration tokens."""
    change = (changed - weight).double()
    return float((change @ moment @ change.T).trace())


@each_axis
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_sparsegpt_loses_no_more_than_wanda_and_wanda_no_more_than_magnitude(axis, share, seed):
    weight, moment = random_weight(32, 48, seed=seed), random_moment(48, seed)
    cut = cut_of(weight, axis, [share] * 3)
    sparsegpt, wanda, magnitude = (
        loss(weight, zero_weights(weight, cut, score, moment)[0], moment)
        for score in ("sparsegpt", "wanda", "magnitude")
    )
    assert sparsegpt <= wanda <= magnitude


# All scores --------------------------------------------------------------------------------


@each_score
@each_axis
@pytest.mark.parametrize("pattern", [(1, 2), (2, 4), (1, 4), (3, 4), (5, 12), (7, 8), (23, 24)])
def test_a_pattern_leaves_n_zeros_in_every_m_inputs(score, axis, pattern):
    weight, moment = random_weight(10, 24), random_moment(24)
    cut = cut_of(weight, axis, [0.0] * 5, pattern)  # branches do not matter
    found, thresholds = zero_weights(weight, cut, score, moment)
    n, m = pattern
    for row in found:
        for first in range(0, 24, m):
            assert zeros(row[first : first + m]) == n
    assert thresholds == ()


@pytest.mark.parametrize("score", ["magnitude", "relative", "wanda"])
def test_a_pattern_zeroes_the_lowest_of_each_group(score):
    weight, moment = random_weight(6, 24), random_moment(24)
    found, _ = zero_weights(weight, Cut([6], [0.0], 0, (3, 8)), score, moment)
    expected, parts = weight.clone(), parts_of_columns(weight)
    for row in range(6):
        for first in range(0, 24, 8):
            size = [abs(float(weight[row, first + i])) for i in range(8)]
            if score == "relative":
                size = parts[row][first : first + 8]
            if score == "wanda":
                size = [s * float(moment[first + i, first + i]) ** 0.5 for i, s in enumerate(size)]
            for i in lowest(size, 3):
                expected[row, first + i] = 0
    assert torch.equal(found, expected)


@each_score
@each_axis
def test_inputs_that_are_no_multiple_of_m(score, axis):
    weight, moment = random_weight(12, 22), random_moment(22)
    with pytest.raises(SpecError, match=r"2:4 zeros need a multiple of 4 inputs, .* has 22\."):
        zero_weights(weight, cut_of(weight, axis, [0, 0], (2, 4)), score, moment)


@each_score
@each_axis
@pytest.mark.parametrize("shares", [(0, 0.31, 0.5, 0.9, 1), (1, 0), (0.999, 0.001, 0.25)], ids=str)
def test_as_many_zeros_as_asked_for(score, axis, shares):
    """Up to one weight of those that are compared: a branch, a branch's part of an output, or a
    branch's block of inputs."""
    weight, moment = random_weight(26, 24), random_moment(24)
    cut = cut_of(weight, axis, shares)
    found, _ = zero_weights(weight, cut, score, moment)
    for part, share in zip(branches_of(found, cut), shares, strict=True):
        together = part.shape[1] if score in BY_OUTPUT else part.numel()
        assert zeros(part) / part.numel() == pytest.approx(share, abs=1 / together)
        if share in (0, 1):
            assert zeros(part) == share * part.numel()


@each_score
@each_axis
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pattern", [None, (2, 4)], ids=str)
def test_the_dtype_stays_and_the_source_is_not_written_to(score, axis, dtype, pattern):
    weight, moment = random_weight(12, 24, dtype), random_moment(24)
    before, cut = weight.clone(), cut_of(weight, axis, [0, 0.5, 0.7], pattern)
    found, _ = zero_weights(weight, cut, score, moment)
    assert found.dtype == dtype
    assert found.shape == weight.shape
    assert torch.isfinite(found).all()
    assert torch.equal(weight, before)
    if score != "sparsegpt":
        assert torch.equal(found[found != 0], weight[found != 0])


@each_score
@each_axis
def test_a_parameter_is_no_reason_for_a_gradient(score, axis):
    weight, moment = torch.nn.Parameter(random_weight(12, 24)), random_moment(24)
    found, _ = zero_weights(weight, cut_of(weight, axis, [0, 0.5]), score, moment)
    assert not found.requires_grad


@each_axis
@pytest.mark.parametrize("score, share", [("wanda", 1 / 3), ("sparsegpt", 0.6)])
def test_weights_on_inputs_that_are_always_zero_go_first(score, share, axis):
    weight, moment = random_weight(6, 24), random_moment(24)
    dead = [1, 4, 7, 10, 13, 16, 19, 22]
    moment[dead], moment[:, dead] = 0, 0
    found, _ = zero_weights(weight, cut_of(weight, axis, [share]), score, moment)
    assert zeros(found[:, dead]) == 6 * len(dead)
    assert torch.isfinite(found).all()


@each_axis
@each_score
def test_a_layer_without_any_input_stays_finite(score, axis):
    weight, moment = random_weight(6, 24), torch.zeros(24, 24).double()
    for pattern in (None, (1, 2)):
        found, _ = zero_weights(weight, cut_of(weight, axis, [0.5], pattern), score, moment)
        assert torch.isfinite(found).all()
        assert zeros(found) == found.numel() / 2


def test_every_score_has_an_order_of_neurons():
    for score in SCORES.values():
        assert ORDERS[score.neurons].calibrated == score.calibrated
