"""MLPs of one token, bound to compiled kernels: arrays are found once, and then only run.

Each function returns None where no kernel fits. What is bound is of the weights as they lie in
memory: bind anew for weights that were moved, or small vectors that changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from ..mlps import MLPWeights
from .arrays import kind_of, matrix, running, threads, vector

Choice = tuple[float, float | None]  # how many of the highest; or all above a threshold, if any


class Rows(Protocol):
    """An MLP whose neurons lie in rows, as routed_mlp.py stores them."""

    gate: Tensor | None  # (d_ff, d_model)
    up: Tensor  # (d_ff, d_model)
    down: Tensor  # (d_ff, d_model)
    gate_bias: Tensor | None  # (d_ff,)
    up_bias: Tensor | None  # (d_ff,)
    down_bias: Tensor | None  # (d_model,)
    idle_mean: Tensor | None  # (d_ff,)
    act_fn: Callable[[Tensor], Tensor]


class Factors(Protocol):
    """A matrix as the product of two, as low_rank_mlp.py stores it."""

    first: Tensor  # (directions, n)
    second: Tensor  # (directions, m)
    offset: Tensor | None  # (directions,)
    bias: Tensor | None  # (m,)
    kept: int  # directions that count for a token


class OneToken:
    """An MLP that is ready for one token."""

    def __init__(self, run: Callable[[np.ndarray, np.ndarray], None], multiply_adds: int) -> None:
        """run: (x, out), both (d_model,) float32; adds to out. multiply_adds: of all neurons."""
        self._run, self.threads = run, threads(multiply_adds)

    def __call__(self, x: np.ndarray, out: np.ndarray) -> None:
        with running(self.threads):
            self._run(x, out)


def dense(weights: MLPWeights, scale: Tensor | None = None) -> OneToken | None:
    """All neurons. scale: (d_ff,), of h."""
    bound = _bound(weights.activation, weights.gate, weights.up, weights.down)
    if bound is None:
        return None
    kind, matrices = bound
    vectors = [vector(b) for b in (weights.gate_bias, weights.up_bias, weights.down_bias, scale)]
    from .compiled import dense_mlp

    return OneToken(lambda x, out: dense_mlp(x, *matrices, *vectors, kind, out), weights.up.numel())


def experts(
    mlp: Rows, shared: int, size: int, router: tuple[Tensor, Tensor | None, bool], choice: Choice
) -> OneToken | None:
    """Shared neurons, and the experts of a linear router: its weight (experts, d_model), its bias,
    and whether it sees x at length 1."""
    chosen = _by_router(router, choice)
    if chosen is None:
        return None
    from .compiled import rows_of

    return given(mlp, lambda x: rows_of(chosen(x), shared, size))


def one_expert(
    mlp: Rows, members: np.ndarray, router: tuple[Tensor, Tensor | None, bool]
) -> OneToken | None:
    """The expert of the highest score. members: (experts, size) int64, rows of each."""
    chosen = _by_router(router, (1, None))
    return None if chosen is None else given(mlp, lambda x: members[chosen(x)[0]])


def _by_router(
    router: tuple[Tensor, Tensor | None, bool], choice: Choice
) -> Callable[[np.ndarray], np.ndarray] | None:
    """The indices of the experts that a linear router chooses for x."""
    weight = matrix(router[0])
    if weight is None:
        return None
    bias, unit = vector(router[1]), router[2]
    active, threshold = _numbers(choice)
    from .compiled import route

    return lambda x: route(x, weight, bias, unit, active, threshold)


def given(mlp: Rows, rows_for: Callable[[np.ndarray], np.ndarray]) -> OneToken | None:
    """The neurons whose rows are given for each x: (n,) int64."""
    run = _some(mlp)
    if run is None:
        return None
    return OneToken(lambda x, out: run(x, rows_for(x), out), mlp.up.numel())


def _some(mlp: Rows) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None] | None:
    """The neurons that are given as rows: (x, rows, out)."""
    bound = _bound(mlp.act_fn, mlp.gate, mlp.up, mlp.down)
    if bound is None:
        return None
    kind, matrices = bound
    vectors, parts = _vectors(mlp), threads(mlp.up.numel())
    from .compiled import some_neurons

    return lambda x, rows, out: some_neurons(x, *matrices, *vectors, kind, rows, parts, out)


def neurons(mlp: Rows, importance: Tensor | None, choice: Choice) -> OneToken | None:
    """The neurons that the gate chooses."""
    bound = _bound(mlp.act_fn, mlp.gate, mlp.up, mlp.down)
    if bound is None:
        return None
    kind, matrices = bound
    work = mlp.up.numel()
    fixed = (*_vectors(mlp), kind, vector(importance), *_numbers(choice), threads(work))
    from .compiled import chosen_neurons

    return OneToken(lambda x, out: chosen_neurons(x, *matrices, *fixed, out), work)


def inputs(
    mlp: Rows,
    by_columns: Sequence[str],
    input_importance: Tensor | None,
    importance: Tensor | None,
    choices: Sequence[Choice],
) -> OneToken | None:
    """Those that matter most. by_columns: the matrices that read chosen entries of x. choices: of
    inputs, of neurons that up is computed for, if it is not among them, and of those that down
    reads."""
    first = [
        None if tensor is None else tensor.T if name in by_columns else tensor
        for name, tensor in (("gate", mlp.gate), ("up", mlp.up))
    ]
    bound = _bound(mlp.act_fn, *first, mlp.down)
    if bound is None:
        return None
    kind, matrices = bound
    work = mlp.up.numel()
    active, thresholds = zip(*(_numbers(choice) for choice in choices), strict=True)
    fixed = (
        *_vectors(mlp), kind, vector(input_importance), vector(importance),
        "up" not in by_columns, active, thresholds, threads(work),
    )  # fmt: skip
    from .compiled import chosen_inputs

    return OneToken(lambda x, out: chosen_inputs(x, *matrices, *fixed, out), work)


def low_rank(
    activation: Callable[[Tensor], Tensor], gate: Factors | None, up: Factors, down: Factors
) -> OneToken | None:
    """Three matrices, or two, each as the product of two."""
    kind, parts = kind_of(activation), [_factors(up), _factors(down)]
    parts.insert(0, parts[0] if gate is None else _factors(gate))
    if kind is None or any(part is None for part in parts):
        return None
    if gate is None:
        first, offset, second, bias, kept = parts[0]
        parts[0] = (first[:0], offset, second, bias, kept)
    d_ff = up.second.shape[1]
    work = sum(part.first.numel() + part.second.numel() for part in (up, down))
    from .compiled import low_rank_mlp

    return OneToken(lambda x, out: low_rank_mlp(x, d_ff, *parts, kind, threads(work), out), work)


def _factors(factors: Factors) -> tuple | None:
    """As the kernel reads them; None where it cannot."""
    first, second = matrix(factors.first), matrix(factors.second)
    if first is None or second is None:
        return None
    return first, vector(factors.offset), second, vector(factors.bias), factors.kept


def _numbers(choice: Choice) -> tuple[int, np.float32]:
    """As the kernels read them: a negative number where the threshold chooses."""
    active, threshold = choice
    return (int(active), np.float32(0)) if threshold is None else (-1, np.float32(threshold))


def _bound(
    activation: Callable[[Tensor], Tensor], gate: Tensor | None, up: Tensor, down: Tensor
) -> tuple[int, list[np.ndarray]] | None:
    """The number of the activation, and gate, up and down; the gate has size 0 if it is missing."""
    kind = kind_of(activation)
    found = [matrix(tensor) for tensor in (up, down)]
    if gate is not None:
        found.insert(0, matrix(gate))
    if kind is None or any(array is None for array in found):
        return None
    if gate is None:
        found.insert(0, np.zeros((0, 0), found[0].dtype))
    return kind, found


def _vectors(mlp: Rows) -> list[np.ndarray]:
    return [vector(t) for t in (mlp.gate_bias, mlp.up_bias, mlp.down_bias, mlp.idle_mean)]
