"""What one token costs, compiled by numba: matrices are read once, in place, as they are stored.

Weights are float32, or bfloat16 as the uint16 that it is stored in; everything else is float32,
and so is every sum. Arrays of size 0 stand for what an MLP does not have. All functions of one
file, for numba's cache knows of a change only in the file itself.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

# sums in any order and fused multiply-adds, without which nothing is vectorised; NaN stays NaN
FAST = {"fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True, "cache": True}
ALL = np.zeros(0, np.int64)  # in place of rows: all of them
AT_ONCE = 4  # rows that are multiplied side by side
ADDED_AT_ONCE = 8  # that are added up in one pass over the sum
LEADING, REST = 1 << 11, np.uint32(21)  # bits of a score that are counted by, and the others
NEVER = np.float32(-1)  # score of what is not computed
SILU, GELU, GELU_TANH, RELU, RELU_SQUARED = range(5)


def load(stored):
    """A stored weight as float32; bfloat16 is the upper half of one."""


@overload(load, inline="always")
def _load(stored):
    if stored == types.uint16:
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: stored


@njit(**FAST)
def dot(row, x):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += load(row[j]) * x[j]
    return total


@njit(**FAST)
def four_dots(a, b, c, d, x):
    """Four rows side by side, which keeps more reads of memory under way than one."""
    sum_a = sum_b = sum_c = sum_d = np.float32(0)
    for j in range(x.shape[0]):
        sum_a += load(a[j]) * x[j]
        sum_b += load(b[j]) * x[j]
        sum_c += load(c[j]) * x[j]
        sum_d += load(d[j]) * x[j]
    return sum_a, sum_b, sum_c, sum_d


@njit(**FAST)
def project(weight, bias, row, x):
    """weight[row] · x + bias[row]."""
    return dot(weight[row], x) + (bias[row] if bias.size else np.float32(0))


@njit(**FAST)
def project_four(weight, bias, rows, x):
    """The same of four rows."""
    a, b, c, d = rows
    said = four_dots(weight[a], weight[b], weight[c], weight[d], x)
    if bias.size:
        said = said[0] + bias[a], said[1] + bias[b], said[2] + bias[c], said[3] + bias[d]
    return said


@njit(**FAST)
def four_of(i, step):
    """Four places that are far apart: each is the next of a long piece of memory."""
    i = np.int64(i)  # prange counts unsigned
    return i, i + step, i + 2 * step, i + 3 * step


@njit(**FAST)
def four_rows(rows, places):
    """The rows at four places of `rows`, where there are any."""
    if not rows.size:
        return places
    return rows[places[0]], rows[places[1]], rows[places[2]], rows[places[3]]


@njit(**FAST)
def activate(kind, value):
    one, half = np.float32(1), np.float32(0.5)
    if kind == SILU:
        return value / (one + np.exp(-value))
    if kind == GELU:
        return half * value * (one + np.float32(math.erf(value * np.float32(0.70710678))))
    if kind == GELU_TANH:
        inner = np.float32(0.79788456) * (value + np.float32(0.044715) * value * value * value)
        return half * value * (one + np.tanh(inner))
    positive = max(value, np.float32(0))
    return positive if kind == RELU else positive * positive


@njit(parallel=True, **FAST)
def activate_all(kind, values):
    for i in prange(values.shape[0]):
        values[i] = activate(kind, values[i])


@njit(parallel=True, **FAST)
def add_product(weight, x, bias, out):
    """out += weight @ x + bias."""
    count = weight.shape[0]
    step = count // AT_ONCE
    for i in prange(step):
        places = four_of(i, step)
        said = project_four(weight, bias, places, x)
        for n in range(AT_ONCE):
            out[places[n]] += said[n]
    for i in range(AT_ONCE * step, count):
        out[i] += project(weight, bias, i, x)


@njit(parallel=True, **FAST)
def hidden(x, gate, up, gate_bias, up_bias, kind, rows, h):
    """h[i] of the i-th of some rows of gate and up, or of all."""
    count = h.shape[0]
    step = count // AT_ONCE
    for i in prange(step):
        places = four_of(i, step)
        chosen = four_rows(rows, places)
        values = project_four(up, up_bias, chosen, x)
        if gate.size:
            gated = project_four(gate, gate_bias, chosen, x)
            for n in range(AT_ONCE):
                h[places[n]] = activate(kind, gated[n]) * values[n]
        else:
            for n in range(AT_ONCE):
                h[places[n]] = activate(kind, values[n])
    for i in range(AT_ONCE * step, count):
        row = rows[i] if rows.size else i
        value = project(up, up_bias, row, x)
        if gate.size:
            h[i] = activate(kind, project(gate, gate_bias, row, x)) * value
        else:
            h[i] = activate(kind, value)


@njit(parallel=True, **FAST)
def add_rows(h, weight, rows, parts, out):
    """out += Σ h[i] · weight[rows[i]]. weight: (n, m). parts: to share the rows out in.

    Eight rows are read side by side, each from an eighth of its own: where rows follow each other,
    as those of an expert do, memory is read in eight long pieces, which the CPU foresees.
    """
    count, width = rows.shape[0], weight.shape[1]
    sums = np.zeros((parts, width), np.float32)
    for part in prange(parts):
        total = sums[part]
        i, stop = part * count // parts, (part + 1) * count // parts
        step = (stop - i) // ADDED_AT_ONCE
        for _ in range(step):
            a, b, c, d = h[i], h[i + step], h[i + 2 * step], h[i + 3 * step]
            e, f, g, k = h[i + 4 * step], h[i + 5 * step], h[i + 6 * step], h[i + 7 * step]
            row_a, row_b = weight[rows[i]], weight[rows[i + step]]
            row_c, row_d = weight[rows[i + 2 * step]], weight[rows[i + 3 * step]]
            row_e, row_f = weight[rows[i + 4 * step]], weight[rows[i + 5 * step]]
            row_g, row_k = weight[rows[i + 6 * step]], weight[rows[i + 7 * step]]
            for j in range(width):
                total[j] += (
                    a * load(row_a[j]) + b * load(row_b[j])
                    + c * load(row_c[j]) + d * load(row_d[j])
                    + e * load(row_e[j]) + f * load(row_f[j])
                    + g * load(row_g[j]) + k * load(row_k[j])
                )  # fmt: skip
            i += 1
        for last in range(i + (ADDED_AT_ONCE - 1) * step, stop):
            a, row_a = h[last], weight[rows[last]]
            for j in range(width):
                total[j] += a * load(row_a[j])
    for part in range(parts):
        for j in range(width):
            out[j] += sums[part, j]


@njit(**FAST)
def normalise(x, weight, eps, out):
    """out = x / √(mean of x² + eps) · weight (RMSNorm)."""
    square = np.float32(0)
    for j in range(x.shape[0]):
        square += x[j] * x[j]
    scale = np.float32(1) / np.sqrt(square / np.float32(x.shape[0]) + eps)
    for j in range(x.shape[0]):
        out[j] = x[j] * scale * weight[j]


@njit(**FAST)
def highest(scores, count):
    """Indices, ascending, of the `count` highest scores; of equal ones those of lower index."""
    n = scores.shape[0]
    if count >= n:
        return np.arange(n)
    chosen = np.empty(count, np.int64)
    if count == 0:
        return chosen
    keys, least, equal = least_of(scores, count)
    found = 0
    for i in range(n):
        if keys[i] > least or (keys[i] == least and equal > 0):
            equal -= keys[i] == least
            chosen[found] = i
            found += 1
    return chosen


@njit(**FAST)
def least_of(scores, count):
    """Scores as integers of the same order, the least of the `count` highest, and how many that
    equal it are among them. Counted by the leading bits first: a few times faster than
    partitioning all scores."""
    n, bits = scores.shape[0], scores.view(np.uint32)
    keys, counts = np.empty(n, np.uint32), np.zeros(LEADING, np.int64)
    for i in range(n):
        sign = bits[i] >> np.uint32(31)
        keys[i] = ~bits[i] if sign else bits[i] | np.uint32(1 << 31)
        counts[keys[i] >> REST] += 1
    above, place = 0, LEADING - 1
    while above + counts[place] < count:
        above += counts[place]
        place -= 1
    some, found = np.empty(counts[place], np.uint32), 0
    for i in range(n):
        if keys[i] >> REST == place:
            some[found] = keys[i]
            found += 1
    wanted = count - above  # of these
    least = np.partition(some, found - wanted)[found - wanted]
    for i in range(found):
        wanted -= some[i] > least
    return keys, least, wanted


@njit(**FAST)
def above(scores, threshold):
    """Indices, ascending, of the scores above a threshold."""
    chosen, found = np.empty(scores.shape[0], np.int64), 0
    for i in range(scores.shape[0]):
        if scores[i] > threshold:
            chosen[found] = i
            found += 1
    return chosen[:found]


@njit(**FAST)
def choose(scores, active, threshold):
    """The `active` highest, or where it is negative all above the threshold."""
    return highest(scores, active) if active >= 0 else above(scores, threshold)


@njit(**FAST)
def add_neurons(h, down, rows, idle_mean, bias, parts, out):
    """out += what some neurons of h, less its mean when idle, and the bias add to the output."""
    if idle_mean.size:
        for i in range(rows.shape[0]):
            h[i] -= idle_mean[rows[i]]
    add_rows(h, down, rows, parts, out)
    if bias.size:
        out += bias


@njit(**FAST)
def route(x, weight, bias, unit, active, threshold):
    """Indices of the experts of a linear router. unit: whether it sees x at length 1."""
    scores = np.empty(weight.shape[0], np.float32)
    scale = np.float32(1)
    if unit:
        scale = np.float32(1) / max(np.sqrt(dot(x, x)), np.float32(1e-12))
    for i in range(weight.shape[0]):
        scores[i] = dot(weight[i], x) * scale + (bias[i] if bias.size else np.float32(0))
    return choose(scores, active, threshold)


@njit(**FAST)
def rows_of(experts, shared, size):
    """Neurons of the shared part and of some experts, ascending."""
    rows = np.empty(shared + experts.shape[0] * size, np.int64)
    for i in range(shared):
        rows[i] = i
    for n in range(experts.shape[0]):
        for i in range(size):
            rows[shared + n * size + i] = shared + experts[n] * size + i
    return rows


@njit(**FAST)
def dense_mlp(x, gate, up, down, gate_bias, up_bias, down_bias, scale, kind, out):
    """out += an MLP of which all neurons run. down: (d_model, d_ff). scale: (d_ff,) of h."""
    h = np.empty(up.shape[0], np.float32)
    hidden(x, gate, up, gate_bias, up_bias, kind, ALL, h)
    if scale.size:
        h *= scale
    add_product(down, h, down_bias, out)


@njit(**FAST)
def some_neurons(
    x, gate, up, down, gate_bias, up_bias, down_bias, idle_mean, kind, rows, parts, out
):  # fmt: skip
    """out += some neurons of an MLP. down: (d_ff, d_model)."""
    h = np.empty(rows.shape[0], np.float32)
    hidden(x, gate, up, gate_bias, up_bias, kind, rows, h)
    add_neurons(h, down, rows, idle_mean, down_bias, parts, out)


@njit(**FAST)
def chosen_neurons(
    x, gate, up, down, gate_bias, up_bias, down_bias, idle_mean, kind, importance, active,
    threshold, parts, out,
):  # fmt: skip
    """out += the neurons of the largest |φ(gate x)|, times importance; up takes the gate's part
    where there is none. down: (d_ff, d_model)."""
    gated = np.empty(up.shape[0], np.float32)
    if gate.size:
        hidden(x, gate[:0], gate, gate_bias, gate_bias, kind, ALL, gated)
    else:
        hidden(x, gate, up, gate_bias, up_bias, kind, ALL, gated)
    rows = choose(sizes(gated, importance), active, threshold)
    h = gated[rows]
    if gate.size:
        times_rows(x, up, up_bias, rows, h)
    add_neurons(h, down, rows, idle_mean, down_bias, parts, out)


@njit(**FAST)
def chosen_inputs(
    x, gate, up, down, gate_bias, up_bias, down_bias, idle_mean, kind, input_importance,
    importance, opens, active, thresholds, parts, out,
):  # fmt: skip
    """out += an MLP that reads the chosen of its inputs: see InputMLP. What reads chosen entries
    of x is (d_model, d_ff), its columns in rows; other matrices are (d_ff, d_model)."""
    d_ff = down.shape[0]
    inputs = choose(sizes(x, input_importance), active[0], thresholds[0])
    some = x[inputs]
    if not gate.size:
        h = start(up_bias, d_ff)
        add_rows(some, up, inputs, parts, h)
        activate_all(kind, h)
        scores = sizes(h, importance)
    else:
        gated = start(gate_bias, d_ff)
        add_rows(some, gate, inputs, parts, gated)
        activate_all(kind, gated)
        if opens:
            opened = choose(sizes(gated, importance), active[1], thresholds[1])
            values = gated[opened]
            times_rows(x, up, up_bias, opened, values)
            h, scores = np.zeros(d_ff, np.float32), np.full(d_ff, NEVER)
            for n in range(opened.shape[0]):
                i = opened[n]
                h[i] = values[n]
                scores[i] = abs(h[i]) * (importance[i] if importance.size else np.float32(1))
        else:
            h = start(up_bias, d_ff)
            add_rows(some, up, inputs, parts, h)
            h *= gated
            scores = sizes(h, importance)
    rows = choose(scores, active[2], thresholds[2])
    read = h[rows]
    add_neurons(read, down, rows, idle_mean, down_bias, parts, out)


@njit(**FAST)
def through(x, first, offset, second, bias, kept, parts, out):
    """out += a matrix as the product of two, of whose directions the `kept` largest count."""
    z = np.zeros(first.shape[0], np.float32)
    add_product(first, x, offset, z)
    rows = highest(np.abs(z), kept)
    add_rows(z[rows], second, rows, parts, out)
    if bias.size:
        out += bias


@njit(**FAST)
def low_rank_mlp(x, d_ff, gate, up, down, kind, parts, out):
    """out += an MLP of such matrices. gate, up, down: first, offset, second, bias and kept."""
    h = np.zeros(d_ff, np.float32)
    through(x, up[0], up[1], up[2], up[3], up[4], parts, h)
    if gate[0].size:
        gated = np.zeros(d_ff, np.float32)
        through(x, gate[0], gate[1], gate[2], gate[3], gate[4], parts, gated)
        activate_all(kind, gated)
        h *= gated
    else:
        activate_all(kind, h)
    through(h, down[0], down[1], down[2], down[3], down[4], parts, out)


@njit(**FAST)
def sizes(values, importance):
    """|values|, times importance where there is one."""
    return np.abs(values) * importance if importance.size else np.abs(values)


@njit(**FAST)
def start(bias, width):
    """A bias, or zeros, to add to."""
    return bias.copy() if bias.size else np.zeros(width, np.float32)


@njit(parallel=True, **FAST)
def times_rows(x, weight, bias, rows, h):
    """h[i] *= weight[rows[i]] · x + bias[rows[i]]."""
    count = rows.shape[0]
    step = count // AT_ONCE
    for i in prange(step):
        places = four_of(i, step)
        said = project_four(weight, bias, four_rows(rows, places), x)
        for n in range(AT_ONCE):
            h[places[n]] *= said[n]
    for i in range(AT_ONCE * step, count):
        h[i] *= project(weight, bias, rows[i], x)


@njit(parallel=True, **FAST)
def attend(
    x, norm, eps, q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm, k_norm, cos, sin,
    keys, values, position, scale,
):  # fmt: skip
    """x += attention of one token over those before it, which are in keys and values, (heads,
    tokens, width): its own are written there. cos, sin: (width,), of this position."""
    queries, others, width = q.shape[0], k.shape[0], cos.shape[0]
    normed = np.empty_like(x)
    normalise(x, norm, eps, normed)
    made = np.empty(queries + 2 * others, np.float32)
    for i in prange(queries + 2 * others):
        if i < queries:
            made[i] = project(q, q_bias, i, normed)
        elif i < queries + others:
            n = i - queries
            made[i] = project(k, k_bias, n, normed)
        else:
            n = i - queries - others
            made[i] = project(v, v_bias, n, normed)
    heads, groups = queries // width, queries // others
    for head in range(heads + others // width):
        part = made[head * width : (head + 1) * width]
        own = q_norm if head < heads else k_norm
        if own.size:
            normalise(part.copy(), own, eps, part)
        rotate(part, cos, sin)
    for head in range(others // width):
        start = queries + head * width
        for j in range(width):
            keys[head, position, j] = made[start + j]
            values[head, position, j] = made[start + others + j]
    mixed = np.empty(queries, np.float32)
    for head in prange(heads):
        read_back(
            made[head * width : (head + 1) * width], keys[head // groups], values[head // groups],
            position + 1, scale, mixed[head * width : (head + 1) * width],
        )  # fmt: skip
    add_product(o, mixed, o_bias, x)


@njit(**FAST)
def rotate(part, cos, sin):
    """A head's query or key at its position (RoPE, halves rotated)."""
    half = part.shape[0] // 2
    for j in range(half):
        a, b = part[j], part[j + half]
        part[j] = a * cos[j] - b * sin[j]
        part[j + half] = b * cos[j + half] + a * sin[j + half]


@njit(**FAST)
def read_back(query, keys, values, count, scale, out):
    """What one head reads of the first `count` tokens."""
    weights, most = np.empty(count, np.float32), np.float32(-np.inf)
    for t in range(count):
        weights[t] = dot(keys[t], query) * scale
        most = max(most, weights[t])
    total = np.float32(0)
    for t in range(count):
        weights[t] = np.exp(weights[t] - most)
        total += weights[t]
    out[:] = np.float32(0)
    for t in range(count):
        part = weights[t] / total
        for j in range(out.shape[0]):
            out[j] += part * values[t, j]


@njit(parallel=True, **FAST)
def _nothing(out):
    for i in prange(out.shape[0]):
        out[i] = 0


# with its first parallel kernel numba sets how many threads OpenMP has, torch's too
_threads = torch.get_num_threads()
_nothing(np.zeros(1))
torch.set_num_threads(_threads)
