"""Chosen neurons on a GPU, by triton: one token, and many tokens sorted by their experts.

Weights are float32, bfloat16 or float16, rows as routed_mlp.py stores them; sums are float32, in an
order that is always the same. What is chosen stays on the device, and nothing waits for it.
A place is a number among the neurons that run: shared ones first, then those of the chosen experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(value, KIND: tl.constexpr):
    """By the numbers in `arrays`."""
    if KIND == 0:  # silu
        value = value / (1 + tl.exp(-value))
    elif KIND == 1:  # gelu
        value = 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    elif KIND == 2:  # gelu by tanh, (1 + tanh z) / 2 = sigmoid(2 z)
        inner = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1 + tl.exp(-inner))
    else:  # relu; NaN stays NaN
        value = tl.where(value < 0, 0.0, value)
        if KIND == 4:
            value = value * value
    return value


@triton.jit
def rows_of(places, real, experts, shared, size):
    """Rows of the matrices, int64."""
    inside = places - shared
    routed = real & (inside >= 0)
    expert = tl.load(experts + inside // size, mask=routed, other=0).to(tl.int64)
    return tl.where(routed, shared + expert * size + inside % size, places)


@triton.jit
def some_hidden(
    x, gate, up, gate_bias, up_bias, idle_mean, gated, experts, h,
    count, shared, size, d_model, gate_step, up_step,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = places < count
    rows = rows_of(places, real, experts, shared, size)
    by_gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    by_up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, d_model, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        mask = real[:, None] & (at < d_model)[None, :]
        some = tl.load(x + at, mask=at < d_model, other=0).to(tl.float32)[None, :]
        weight = tl.load(up + rows[:, None] * up_step + at[None, :], mask=mask, other=0)
        by_up += weight.to(tl.float32) * some
        if gate is not None:
            weight = tl.load(gate + rows[:, None] * gate_step + at[None, :], mask=mask, other=0)
            by_gate += weight.to(tl.float32) * some
    value = tl.sum(by_up, 1)
    if up_bias is not None:
        value += tl.load(up_bias + rows, mask=real, other=0).to(tl.float32)
    if gate is not None:
        opens = tl.sum(by_gate, 1)
        if gate_bias is not None:
            opens += tl.load(gate_bias + rows, mask=real, other=0).to(tl.float32)
        value *= activate(opens, KIND)
    elif gated is not None:
        value *= tl.load(gated + rows, mask=real, other=0).to(tl.float32)
    else:
        value = activate(value, KIND)
    if idle_mean is not None:
        value -= tl.load(idle_mean + rows, mask=real, other=0).to(tl.float32)
    tl.store(h + places, value, mask=real)


@triton.jit
def some_summed(
    h, down, experts, parts, count, shared, size, d_model, down_step, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.program_id(1)
    inside = columns < d_model
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(part * share, (part + 1) * share, ROWS):
        places = start + tl.arange(0, ROWS)
        real = places < count
        rows = rows_of(places, real, experts, shared, size)
        mask = real[:, None] & inside[None, :]
        weight = tl.load(down + rows[:, None] * down_step + columns[None, :], mask=mask, other=0)
        total += tl.load(h + places, mask=real, other=0)[:, None] * weight.to(tl.float32)
    tl.store(parts + part * d_model + columns, tl.sum(total, 0), mask=inside)


@triton.jit
def add_parts(
    parts, base, bias, out, number, width, first, d_model, COLUMNS: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    columns = first + within
    inside = (within < width) & (columns < d_model)
    total = tl.zeros((COLUMNS,), tl.float32)
    for part in range(number):
        place = (token * number + part) * width
        total += tl.load(parts + place + within, mask=inside, other=0)
    if base is not None:
        total += tl.load(base + token * d_model + columns, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        total += tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + token * d_model + columns, total, mask=inside)


@triton.jit
def product(a, b, total, WIDEN: tl.constexpr):
    """total + a @ b. WIDEN: for the interpreter, which cannot multiply matrices of bfloat16."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def grouped_hidden(
    x, gate, up, gate_bias, up_bias, idle_mean, pairs, owners, starts, stops, h,
    chosen, experts, shared, size, d_model, gate_step, up_step, h_step,
    KIND: tl.constexpr, WIDEN: tl.constexpr,
    TOKENS: tl.constexpr, NEURONS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(size, NEURONS)
    block = tl.program_id(0) // pieces
    expert = tl.load(owners + block)
    if expert >= experts:
        return
    places = tl.load(starts + block) + tl.arange(0, TOKENS)
    real = places < tl.load(stops + block)
    token = tl.load(pairs + places, mask=real, other=0) // chosen
    neurons = tl.program_id(0) % pieces * NEURONS + tl.arange(0, NEURONS)
    valid = neurons < size
    rows = shared + expert * size + neurons
    by_gate = tl.zeros((TOKENS, NEURONS), tl.float32)
    by_up = tl.zeros((TOKENS, NEURONS), tl.float32)
    for start in range(0, d_model, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = at < d_model
        some = tl.load(
            x + token[:, None] * d_model + at[None, :], mask=real[:, None] & inside, other=0
        )
        mask = inside[:, None] & valid[None, :]
        weight = tl.load(up + rows[None, :] * up_step + at[:, None], mask=mask, other=0)
        by_up = product(some, weight, by_up, WIDEN)
        if gate is not None:
            weight = tl.load(gate + rows[None, :] * gate_step + at[:, None], mask=mask, other=0)
            by_gate = product(some, weight, by_gate, WIDEN)
    value = by_up
    if up_bias is not None:
        value += tl.load(up_bias + rows, mask=valid, other=0).to(tl.float32)[None, :]
    if gate is not None:
        opens = by_gate
        if gate_bias is not None:
            opens += tl.load(gate_bias + rows, mask=valid, other=0).to(tl.float32)[None, :]
        value *= activate(opens, KIND)
    else:
        value = activate(value, KIND)
    if idle_mean is not None:
        value -= tl.load(idle_mean + rows, mask=valid, other=0).to(tl.float32)[None, :]
    mask = real[:, None] & valid[None, :]
    tl.store(h + places[:, None] * h_step + neurons[None, :], value, mask=mask)


@triton.jit
def grouped_parts(
    h, down, pairs, owners, starts, stops, parts,
    experts, shared, size, d_model, down_step, h_step, first, width,
    WIDEN: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) // pieces
    expert = tl.load(owners + block)
    if expert >= experts:
        return
    places = tl.load(starts + block) + tl.arange(0, TOKENS)
    real = places < tl.load(stops + block)
    pair = tl.load(pairs + places, mask=real, other=0)
    within = tl.program_id(0) % pieces * COLUMNS + tl.arange(0, COLUMNS)
    columns = first + within
    inside = (within < width) & (columns < d_model)
    total = tl.zeros((TOKENS, COLUMNS), tl.float32)
    for start in range(0, size, DEPTH):
        neurons = start + tl.arange(0, DEPTH)
        valid = neurons < size
        some = tl.load(
            h + places[:, None] * h_step + neurons[None, :], mask=real[:, None] & valid, other=0
        )
        rows = shared + expert * size + neurons
        weight = tl.load(
            down + rows[:, None] * down_step + columns[None, :],
            mask=valid[:, None] & inside[None, :],
            other=0,
        )
        total = product(some, weight, total, WIDEN)
    mask = real[:, None] & inside[None, :]
    tl.store(parts + pair[:, None] * width + within[None, :], total, mask=mask)
