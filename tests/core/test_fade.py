"""Fade removes exactly what torch.quantile on the float32 magnitudes would, however many ties."""

from dataclasses import fields
from math import floor
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from mlpmoe.core.mlps import MLPWeights
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.core.static import fade
from mlpmoe.core.static.branched import branch_sizes
from mlpmoe.core.static.fade import (
    QUANTILE_LIMIT,
    MagnitudeCounts,
    fade_projection,
    magnitude_threshold,
)
from mlpmoe.core.static.pipeline import build_static

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
each_device = pytest.mark.parametrize("device", DEVICES)

sparsities = st.floats(0, 1, width=64)
SMALLEST_SUBNORMAL = {torch.float16: 2**-24, torch.bfloat16: 2**-133, torch.float32: 2**-149}


@st.composite
def weights(draw, dtype, max_size=80):
    """A finite vector of `dtype`: arbitrary numbers, or many ties, or all equal, or subnormal."""
    bound = torch.finfo(torch.float16 if dtype is torch.float16 else torch.float32).max / 2
    if dtype is torch.float64:
        number = st.floats(-bound, bound, width=64)
    else:
        number = st.floats(-bound, bound, width=32)
    tiny = SMALLEST_SUBNORMAL.get(dtype, 1e-40)
    subnormal = st.integers(-20, 20).map(lambda n: n * tiny)
    tied = st.sampled_from([0.0, -0.0, 0.5, -0.5, 0.5009765625, 3.0, -3.0, tiny, -tiny])
    values = draw(
        st.one_of(
            st.lists(number, min_size=1, max_size=max_size),
            st.lists(tied, min_size=1, max_size=max_size),
            st.lists(subnormal, min_size=1, max_size=max_size),
            st.builds(lambda value, count: [value] * count, number, st.integers(1, max_size)),
            st.integers(1, max_size).map(lambda count: [0.0] * count),
        )
    )
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def paper_threshold(weight, sparsity):
    return torch.quantile(weight.abs().float(), sparsity).item()


def paper_mask(weight, sparsity):
    return weight.abs().float() > paper_threshold(weight, sparsity)


def bits(tensor):
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def assert_faded(faded, weight, mask):
    """Survivors keep every bit, the rest is zero."""
    assert torch.equal(bits(faded)[mask], bits(weight)[mask])
    assert not faded[~mask].any()


# Thresholds and masks ----------------------------------------------------------------------


@each_dtype
@given(data=st.data(), sparsity=sparsities)
def test_threshold_is_torch_quantile_to_the_bit(dtype, data, sparsity):
    weight = data.draw(weights(dtype))
    found = magnitude_threshold(weight, sparsity)
    assert found.value == paper_threshold(weight, sparsity)
    # The same mask, from a number that the weights' own dtype holds exactly.
    comparable = weight.float() if dtype is torch.float64 else weight
    assert found.cut in comparable.abs().double().tolist()
    assert torch.equal(comparable.abs().double() > found.cut, paper_mask(weight, sparsity))


@each_dtype
@given(data=st.data(), sparsity=sparsities.filter(bool))
def test_survivors_are_those_of_the_paper(dtype, data, sparsity):
    weight = data.draw(weights(dtype))
    before = weight.clone()
    faded, thresholds = fade_projection(weight[:, None], (len(weight),), [sparsity])
    assert_faded(faded[:, 0], weight, paper_mask(weight, sparsity))
    assert thresholds == (paper_threshold(weight, sparsity),)
    assert faded.dtype == dtype
    assert torch.equal(bits(weight), bits(before))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@given(data=st.data(), sparsity=sparsities)
def test_counts_know_what_would_survive(dtype, data, sparsity):
    weight = data.draw(weights(dtype))
    counts = MagnitudeCounts(weight)
    magnitudes = weight.abs().float()
    if sparsity:
        magnitudes = magnitudes[paper_mask(weight, sparsity)]
        assert counts.threshold(sparsity) == paper_threshold(weight, sparsity)
    values, many = counts.left(sparsity)
    assert np.repeat(values, many).tolist() == magnitudes[magnitudes > 0].sort().values.tolist()


@each_device
@each_dtype
@pytest.mark.parametrize("sparsity", [0.05625, 0.3, 0.5, 0.84375])
def test_real_sizes_lose_what_the_paper_loses(dtype, sparsity, device):
    generator = torch.Generator().manual_seed(1)
    weight = (0.02 * torch.randn(100, 173, generator=generator)).to(dtype).to(device)
    faded, _ = fade_projection(weight, (100,), [sparsity])
    mask = paper_mask(weight, sparsity)
    assert_faded(faded, weight, mask)
    # At least the requested share goes, and ties add less than one part in a hundred.
    realised = 1 - mask.float().mean().item()
    assert sparsity <= realised <= sparsity + 0.01


@each_device
@each_dtype
def test_everything_equal_to_the_threshold_goes(dtype, device):
    weight = torch.tensor([[1.0, -1.0, 1.0, 2.0, -3.0]], dtype=dtype, device=device)
    faded, thresholds = fade_projection(weight, (1,), [0.5])
    assert thresholds == (1.0,)
    assert faded.tolist() == [[0.0, 0.0, 0.0, 2.0, -3.0]]


@each_dtype
def test_sparsity_one_empties_and_constants_vanish(dtype):
    weight = torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(10, 3).to(dtype)
    assert not fade_projection(weight, (10,), [1.0])[0].any()
    assert not fade_projection(torch.full((4, 3), -0.7, dtype=dtype), (4,), [1e-9])[0].any()
    assert not fade_projection(torch.zeros(4, 3, dtype=dtype), (4,), [0.5])[0].any()


def test_float64_is_compared_in_float32():
    """Two numbers that float32 cannot tell apart live and die together, as published."""
    weight = torch.tensor([[1.0], [1.0 + 1e-12], [2.0]], dtype=torch.float64)
    faded, _ = fade_projection(weight, (3,), [0.5])
    assert faded.flatten().tolist() == [0.0, 0.0, 2.0]


def test_infinitely_small_and_negative_zero():
    tiny = 2.0**-133
    weight = torch.tensor([[-0.0, 0.0, tiny, -2 * tiny, 3 * tiny]], dtype=torch.bfloat16)
    faded, thresholds = fade_projection(weight, (1,), [0.5])
    assert thresholds == (tiny,)
    assert faded.tolist() == [[0.0, 0.0, 0.0, -2 * tiny, 3 * tiny]]


@each_dtype
@pytest.mark.parametrize("layout", ["transposed", "columns", "reversed rows"])
def test_memory_layout_does_not_matter(dtype, layout):
    """GPT-2 stores its weights transposed; other readings are views as well."""
    stored = torch.randn(24, 36, generator=torch.Generator().manual_seed(2)).to(dtype)
    if layout == "transposed":
        weight = stored.T
    elif layout == "columns":
        weight = stored[:, 3:17]
    else:
        weight = stored.T[5:17]
    assert not weight.is_contiguous()
    before = stored.clone()
    sizes, wanted = (len(weight) - 5, 5), [0.3, 0.7]
    faded, thresholds = fade_projection(weight, sizes, wanted)
    expected, expected_thresholds = fade_projection(weight.contiguous(), sizes, wanted)
    assert torch.equal(faded, expected)
    assert thresholds == expected_thresholds
    assert torch.equal(stored, before)
    for part, source, share in zip(faded.split(sizes), weight.split(sizes), wanted, strict=True):
        assert_faded(part, source, paper_mask(source.contiguous(), share))


@pytest.mark.parametrize("ordered", [np.int16, np.int32])
@each_dtype
@given(data=st.data())
def test_down_loses_what_its_branches_lose_as_rows(dtype, ordered, data):
    """Neurons as columns, in odd widths, and 16 bits ordered as any machine would order them."""
    d_ff, d_model = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 7))
    pool = data.draw(weights(dtype))
    rows = pool[torch.arange(d_ff * d_model) * 37 % len(pool)].view(d_ff, d_model)
    sizes = branch_sizes(d_ff, data.draw(st.integers(1, d_ff)))
    shares = data.draw(st.lists(sparsities, min_size=len(sizes), max_size=len(sizes)))
    down = rows.T.contiguous()
    with patch.object(fade, "_ORDERED", ordered):
        (faded, thresholds), of_rows = (
            fade_projection(weight, sizes, shares, axis) for weight, axis in ((down, 1), (rows, 0))
        )
    assert faded.is_contiguous()
    assert torch.equal(bits(faded.T), bits(of_rows[0]))
    assert thresholds == of_rows[1]
    pieces = zip(faded.split(sizes, 1), down.split(sizes, 1), shares, thresholds, strict=True)
    for part, source, share, threshold in pieces:
        magnitudes = source.abs().float().flatten()
        assert threshold == (torch.quantile(magnitudes, share).item() if share else 0)
        assert_faded(part, source, paper_mask(source, share) if share else source == source)


# Beyond torch.quantile ---------------------------------------------------------------------


def magnitude(rank):
    """Every eighth float32 above 0.001: neighbours are far enough apart to interpolate."""
    first = torch.tensor(0.001).view(torch.int32)
    return (first + 8 * torch.as_tensor(rank)).to(torch.int32).view(torch.float32)


def all_different(count):
    """Weights and the ranks of their magnitudes, known without sorting."""
    assert count % 7919, "7919 is prime, so its multiples are a permutation"
    ranks = torch.arange(count) * 7919 % count
    weight = magnitude(ranks)
    weight[::2] *= -1
    return weight, ranks


def test_branches_beyond_the_limit_of_torch_quantile():
    count = QUANTILE_LIMIT + 4099
    weight, ranks = all_different(count)
    sparsity = 0.84375
    rank = sparsity * (count - 1)  # ...33.69; float32 would make it ...34
    found = magnitude_threshold(weight, sparsity)
    assert found.cut == magnitude(floor(rank))
    assert magnitude(floor(rank)) < found.value < magnitude(floor(rank) + 1)
    faded, _ = fade_projection(weight.view(-1, 1), (count,), [sparsity])
    assert torch.equal(faded.flatten() != 0, ranks > floor(rank))


def test_branches_beyond_the_limit_in_bfloat16():
    count = QUANTILE_LIMIT + 4097
    weight = torch.empty(count, dtype=torch.bfloat16)
    weight.normal_(0, 0.02, generator=torch.Generator().manual_seed(3))
    threshold = np.quantile(weight.abs().double().numpy(), 0.421875)
    faded, thresholds = fade_projection(weight.view(-1, 1), (count,), [0.421875])
    assert thresholds == (pytest.approx(threshold, rel=1e-7),)
    assert_faded(faded.flatten(), weight, weight.abs().double() > threshold)


def test_the_last_size_that_torch_quantile_takes():
    """Up to here ranks are computed in float32, as torch does: 15099493 here, exactly ...93.5."""
    weight, _ = all_different(QUANTILE_LIMIT)
    assert magnitude_threshold(weight, 0.9).value == paper_threshold(weight, 0.9)


# Branches ----------------------------------------------------------------------------------


@st.composite
def faded_mlps(draw):
    """An MLP, into how many branches it is cut, and how many of them are kept."""
    dtype = draw(st.sampled_from(DTYPES))
    d_ff, d_model = draw(st.integers(1, 20)), draw(st.integers(1, 6))
    branches = draw(st.integers(1, d_ff))
    matrix = weights(dtype, max_size=40).map(
        lambda pool: pool[torch.arange(d_ff * d_model) * 37 % len(pool)].view(d_ff, d_model)
    )
    mlp = MLPWeights(
        gate=draw(st.none() | matrix),
        up=draw(matrix),
        down=torch.randn(d_model, d_ff, generator=torch.Generator().manual_seed(5)).to(dtype),
        gate_bias=torch.ones(d_ff, dtype=dtype),
        up_bias=torch.ones(d_ff, dtype=dtype),
        down_bias=torch.ones(d_model, dtype=dtype),
        activation=F.silu,
    )
    return mlp, branches, draw(st.integers(1, branches))


@given(case=faded_mlps(), strength=st.floats(0.001, 2))
@example(
    case=(
        MLPWeights(None, torch.ones(3, 2), torch.ones(2, 3), None, None, None, F.relu),
        3,
        3,
    ),
    strength=2.0,
)
def test_each_branch_fades_against_its_own_magnitudes(case, strength):
    mlp, branches, keep = case
    before = {f.name: getattr(mlp, f.name) for f in fields(mlp)}
    copies = {k: v.clone() for k, v in before.items() if isinstance(v, torch.Tensor)}
    module = build_static(mlp, ConversionSpec(branches=branches, keep=keep, fade=strength))
    sizes = branch_sizes(mlp.d_ff, branches)[:keep]
    thresholds = module.fade_thresholds
    assert set(thresholds) == {n for n in ("gate", "up") if keep > 1 and before[n] is not None}
    for name, copy in copies.items():
        assert torch.equal(bits(before[name]), bits(copy))  # the source was not written to
    for name, linear in module.projections.items():
        source, faded = before[name], linear.weight.detach()
        bias = before[f"{name}_bias"]
        assert (linear.bias is None) == (bias is None)
        assert bias is None or linear.bias.data_ptr() == bias.data_ptr()
        if name == "down" or keep == 1:
            assert faded.data_ptr() == source.data_ptr()
            continue
        parts = zip(faded.split(sizes), source[: sum(sizes)].split(sizes), strict=True)
        for branch, (part, dense) in enumerate(parts):
            if branch == 0:
                assert torch.equal(bits(part), bits(dense))
                assert thresholds[name][0] == 0
                continue
            share = min(1.0, strength * branch / branches)
            assert_faded(part, dense, paper_mask(dense, share))
            assert thresholds[name][branch] == paper_threshold(dense, share)
            if share == 1:
                assert not part.any()


@pytest.mark.parametrize("branches, fade", [(2, 0), (1, 0.9)])
def test_nothing_to_fade_changes_nothing(branches, fade):
    up = torch.ones(4, 2)
    mlp = MLPWeights(up, up, torch.ones(2, 4), None, None, None, F.silu)
    module = build_static(mlp, ConversionSpec(branches=branches, fade=fade))
    assert module.fade_thresholds == {}
    for linear, source in zip(module.projections.values(), (up, up, mlp.down), strict=True):
        assert linear.weight.data_ptr() == source.data_ptr()
