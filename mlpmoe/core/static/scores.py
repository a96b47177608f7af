"""Which weights of a matrix go: by magnitude, by their part of a column, by Wanda's score, or by
SparseGPT's.

A matrix is (outputs, inputs). Branches are groups of its outputs (gate and up) or of its inputs
(down), each with a share to zero. Where all have the same share only magnitude, MLPMoE's own rule,
still looks at one branch at a time; the others compare as they were published, within whole rows
(Wanda) or blocks of inputs (SparseGPT). A pattern n:m zeroes n of every m neighbouring inputs
instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..errors import SpecError
from ..registry import Choice
from ..stopping import may_stop
from .fade import fade_projection
from .removal import damped

LEAST_SUM = 1e-30  # of a column, which may be all zeros
BLOCK = 128  # inputs whose mask SparseGPT chooses at a time


@dataclass(frozen=True)
class Score(Choice):
    """A way to choose weights."""

    _: KW_ONLY
    neurons: str  # the order that ranks whole neurons likewise


SCORES: dict[str, Score] = {
    "magnitude": Score("small ones (MLPMoE)", "the smallest", neurons="norm"),
    "relative": Score(
        "small beside others on their input", "the smallest beside others on their input",
        short="relative", neurons="norm",
    ),
    "wanda": Score(
        "small on small inputs (Wanda)", "the smallest on small inputs (Wanda)", short="Wanda",
        neurons="fluctuation", calibrated=True,
    ),
    "sparsegpt": Score(
        "least missed (SparseGPT)", "those the others make up for best (SparseGPT)",
        short="SparseGPT", neurons="least-squares", calibrated=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cut:
    """How much of a matrix is to be zeroed, and where."""

    sizes: Sequence[int]  # neurons per branch
    sparsities: Sequence[float]  # share to zero per branch; not used with a pattern
    axis: int  # of the neurons: 0, outputs (gate, up), or 1, inputs (down)
    pattern: tuple[int, int] | None = None  # n zeros in every m inputs

    def joined(self) -> Cut:
        """The same as a single branch, if all lose the same share: then they have no say in the
        choice."""
        if len(set(self.sparsities)) > 1:
            return self
        return replace(self, sizes=(sum(self.sizes),), sparsities=tuple(self.sparsities[:1]))

    @property
    def slices(self) -> list[slice]:
        ends = accumulate(self.sizes, initial=0)
        return [slice(first, last) for first, last in pairwise(ends)]


def zero_weights(
    weight: Tensor, cut: Cut, score: str, moment: Tensor | None
) -> tuple[Tensor, tuple[float, ...]]:
    """The matrix with its zeros, and the threshold of each branch where one magnitude decides.

    moment: (inputs, inputs), mean of x xᵀ over the calibration tokens; None for scores that look
    at none.
    """
    if cut.pattern and weight.shape[1] % cut.pattern[1]:
        raise SpecError(
            f"{cut.pattern[0]}:{cut.pattern[1]} zeros need a multiple of {cut.pattern[1]} inputs, "
            f"but a matrix here has {weight.shape[1]}."
        )
    if cut.pattern is None and score == "magnitude":
        return fade_projection(weight, cut.sizes, cut.sparsities, cut.axis)
    cut = cut.joined()
    if score == "sparsegpt":
        return _sparsegpt(weight, cut, moment), ()
    size = weight.detach().float().abs()
    if score == "wanda":
        size = size * moment.diagonal().clamp(min=0).sqrt().to(size)
    elif score == "relative":
        size = _relative(size)
    if cut.pattern:
        mask = _pattern_mask(size, cut.pattern)
    else:
        mask = torch.zeros_like(size, dtype=torch.bool)
        for where, share in zip(cut.slices, cut.sparsities, strict=True):
            index = (where, slice(None)) if cut.axis == 0 else (slice(None), where)
            mask[index] = _lowest_of_rows(size[index], share)
    return weight.detach().masked_fill(mask, 0), ()


def _relative(size: Tensor) -> Tensor:
    """|w| as a part of its column, the weights on the same input: a large input often has small
    weights. The column's part of relative importance (RIA, arXiv 2402.12531) without activations;
    the row's part made it worse."""
    return size / size.sum(0, keepdim=True).clamp(min=LEAST_SUM)


def _lowest_of_rows(size: Tensor, share: float) -> Tensor:
    """Mask of the smallest `share` of every row: compared within an output."""
    count = round(share * size.shape[1])
    lowest = size.topk(count, dim=1, largest=False, sorted=False).indices
    return torch.zeros_like(size, dtype=torch.bool).scatter_(1, lowest, True)


def _lowest(size: Tensor, share: float) -> Tensor:
    """Mask of the smallest `share` of all."""
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask.view(-1)[size.flatten().topk(round(share * size.numel()), largest=False).indices] = True
    return mask


def _pattern_mask(size: Tensor, pattern: tuple[int, int]) -> Tensor:
    n, m = pattern
    groups = size.unflatten(1, (-1, m))
    lowest = groups.topk(n, dim=2, largest=False).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, lowest, True).flatten(1)


def _sparsegpt(weight: Tensor, cut: Cut, moment: Tensor) -> Tensor:
    """Zero input by input; what a zero costs is made up for by the inputs that follow
    (SparseGPT, arXiv 2301.00774)."""
    may_stop()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment.double())))
    may_stop()
    upper = torch.linalg.cholesky(inverse, upper=True).float().to(weight.device)
    result = weight.detach().float().clone(memory_format=torch.contiguous_format)
    whole, branches = slice(None), list(zip(cut.slices, cut.sparsities, strict=True))
    inputs = slice(0, weight.shape[1])
    if cut.pattern or cut.axis == 0:  # rows know nothing of each other: all branches together
        blocks = [(block, branches) for block in _blocks(inputs, cut)]
    else:
        blocks = [(b, [(whole, share)]) for where, share in branches for b in _blocks(where, cut)]
    _feed_errors(result, upper, blocks, cut.pattern)
    return result.to(weight)


def _blocks(columns: slice, cut: Cut) -> list[slice]:
    """The columns in blocks of at most BLOCK, of a multiple of the pattern's m."""
    m = cut.pattern[1] if cut.pattern else 1
    ends = [*range(columns.start, columns.stop, max(1, BLOCK // m) * m), columns.stop]
    return [slice(first, last) for first, last in pairwise(ends)]


def _feed_errors(
    weight: Tensor,
    upper: Tensor,
    blocks: Sequence[tuple[slice, Sequence[tuple[slice, float]]]],
    pattern: tuple[int, int] | None,
) -> None:
    """SparseGPT's loop, in place: weight (outputs, inputs), upper (inputs, inputs) the Cholesky
    factor of the inverse moment, blocks of inputs with the share to zero of some outputs each. A
    pattern says which instead."""
    for where, shares in blocks:
        may_stop()
        block, factor = weight[:, where].clone(), upper[where, where]
        mask = torch.zeros_like(block, dtype=torch.bool)
        if pattern is None:
            saliency = (block / factor.diagonal()).square()
            for rows, share in shares:
                mask[rows] = _lowest(saliency[rows], share)
        errors = torch.zeros_like(block)
        for j in range(block.shape[1]):
            if pattern and j % pattern[1] == 0:
                group = slice(j, j + pattern[1])
                now = (block[:, group] / factor.diagonal()[group]).square()
                mask[:, group] = _pattern_mask(now, pattern)
            errors[:, j] = block[:, j] * mask[:, j] / factor[j, j]
            block[:, j:] -= errors[:, j, None] * factor[j, j:]
            block[:, j].masked_fill_(mask[:, j], 0)
        weight[:, where] = block
        weight[:, where.stop :] -= errors @ upper[where, where.stop :]
