"""One token through MLPs, by several runtimes: what docs/speed.md says of them.

    pip install onnx onnxruntime openvino && python -m tests.compare_runtimes

MLPs of the shape of Qwen2.5-0.5B with random weights, more of them than caches hold: as dense MLPs,
and as half of 64 experts that are given, gathered by their numbers. Ratios to our kernel of the
dense MLPs in float32, in one run. Not a test, and not part of the suite.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mlpmoe.core.kernels import one_token
from mlpmoe.core.mlps import MLPWeights
from mlpmoe.measure.cost.bench import SHAPES
from mlpmoe.measure.cost.speed import ratio, time_in_turn

EXPERTS, ACTIVE = 64, 32
SHAPE = SHAPES["0.5b"]
SIZE = SHAPE.d_ff // EXPERTS
GIVEN = np.sort(np.random.default_rng(0).choice(EXPERTS, ACTIVE, replace=False))
ROWS = (GIVEN[:, None] * SIZE + np.arange(SIZE)).ravel()

Action = Callable[[], object]
Layer = tuple[Tensor, Tensor, Tensor]  # gate, up, down, each (d_ff, d_model)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    wish = parser.parse_args()
    torch.manual_seed(0)
    layers = [
        tuple(torch.randn(SHAPE.d_ff, SHAPE.d_model) * 0.02 for _ in range(3))
        for _ in range(wish.layers)
    ]
    actions = {}
    for kind in (ours, by_torch, by_openvino, by_onnxruntime):
        actions |= dict(kind(layers))
        print(f"{kind.__name__}: ready", flush=True)
    with torch.inference_mode():
        times = time_in_turn(list(actions.values()), wish.rounds)
    for name, seconds in zip(actions, times, strict=True):
        measured = ratio(seconds, times[0])
        print(f"{name:45} {measured.median:.2f} ({measured.low:.2f} to {measured.high:.2f})")


def ours(layers: list[Layer]) -> Iterator[tuple[str, Action]]:
    x, out = np.ones(SHAPE.d_model, np.float32), np.zeros(SHAPE.d_model, np.float32)
    for dtype in (torch.float32, torch.bfloat16):
        stored = [tuple(w.to(dtype) for w in layer) for layer in layers]
        dense = [
            one_token.dense(MLPWeights(g, u, d.T.contiguous(), None, None, None, F.silu))
            for g, u, d in stored
        ]
        yield f"ours, {dtype}, dense", partial(_each, dense, x, out)
        some = [one_token.given(_Rows(*layer), lambda x: ROWS) for layer in stored]
        yield f"ours, {dtype}, half", partial(_each, some, x, out)


class _Rows:
    gate_bias = up_bias = down_bias = idle_mean = None
    act_fn = staticmethod(F.silu)

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.gate, self.up, self.down = gate, up, down


def _each(mlps: list, x: np.ndarray, out: np.ndarray) -> None:
    for mlp in mlps:
        mlp(x, out)


def by_torch(layers: list[Layer]) -> Iterator[tuple[str, Action]]:
    rows = torch.from_numpy(ROWS)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(1, SHAPE.d_model, dtype=dtype)
        stored = [tuple(w.to(dtype) for w in layer) for layer in layers]

        def dense(x: Tensor = x, stored: list = stored) -> None:
            for gate, up, down in stored:
                (F.silu(x @ gate.T) * (x @ up.T)) @ down

        def half(x: Tensor = x, stored: list = stored) -> None:
            for layer in stored:
                gate, up, down = (w.index_select(0, rows) for w in layer)
                (F.silu(x @ gate.T) * (x @ up.T)) @ down

        yield f"torch, {dtype}, dense", dense
        yield f"torch, {dtype}, half, rows gathered", half
    x = torch.ones(1, SHAPE.d_model)
    mlps = torch.nn.ModuleList(_Module(*layer) for layer in layers)
    mlps = torch.ao.quantization.quantize_dynamic(mlps, {torch.nn.Linear}, torch.qint8)
    yield "torch, int8, dense", lambda: [mlp(x) for mlp in mlps]


class _Module(torch.nn.Module):
    def __init__(self, gate: Tensor, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            for weight in (gate, up, down.T)
        )
        for linear, weight in zip((self.gate, self.up, self.down), (gate, up, down.T), strict=True):
            linear.weight = torch.nn.Parameter(weight.contiguous(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def by_openvino(layers: list[Layer]) -> Iterator[tuple[str, Action]]:
    import openvino as ov
    from openvino import opset13 as op

    def model_of(dtype: np.dtype, gathered: bool) -> ov.Model:
        x = op.parameter([1, SHAPE.d_model], np.float32, name="x")
        inputs = [x]
        if gathered:
            chosen = op.parameter([ACTIVE], np.int64, name="chosen")
            inputs.append(chosen)
        y = x
        for layer in layers:
            matrices = []
            for weight in layer:
                array = weight.numpy().reshape(EXPERTS, SIZE, -1) if gathered else weight.numpy()
                constant = op.constant(array.astype(dtype))
                if gathered:
                    constant = op.gather(constant, chosen, op.constant(0))
                    shape = op.constant(np.array([ACTIVE * SIZE, SHAPE.d_model]))
                    constant = op.reshape(constant, shape, False)
                if dtype != np.float32:
                    constant = op.convert(constant, np.float32)
                matrices.append(constant)
            gate, up, down = matrices
            gated = op.swish(op.matmul(x, gate, False, True))
            h = op.multiply(gated, op.matmul(x, up, False, True))
            y = op.add(y, op.matmul(h, down, False, False))
        return ov.Model([y], inputs)

    core = ov.Core()
    for name, dtype, hint in (
        ("float32", np.float32, "f32"),
        ("float16, bf16 inside", np.float16, "bf16"),
    ):
        for gathered in (False, True):
            compiled = core.compile_model(
                model_of(dtype, gathered), "CPU",
                {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": hint},
            )  # fmt: skip
            request = compiled.create_infer_request()
            given = {"x": np.ones((1, SHAPE.d_model), np.float32)}
            given |= {"chosen": GIVEN.astype(np.int64)} if gathered else {}
            what = "half, experts gathered" if gathered else "dense"
            yield f"OpenVINO, {name}, {what}", partial(request.infer, given)


def by_onnxruntime(layers: list[Layer]) -> Iterator[tuple[str, Action]]:
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    for gathered in (False, True):
        nodes, weights, total = [], [], "x"
        for number, layer in enumerate(layers):
            names = []
            for part, weight in zip(("gate", "up", "down"), layer, strict=True):
                name = f"{part}{number}"
                array = weight.numpy() if part == "down" else weight.numpy().T
                if gathered:
                    array = weight.numpy().reshape(EXPERTS, SIZE, -1)
                weights.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
                if gathered:
                    nodes.append(helper.make_node("Gather", [name, "chosen"], [f"{name}g"], axis=0))
                    nodes.append(helper.make_node("Reshape", [f"{name}g", "shape"], [f"{name}r"]))
                    name = f"{name}r"
                    if part != "down":
                        nodes.append(
                            helper.make_node("Transpose", [name], [f"{name}t"], perm=[1, 0])
                        )
                        name = f"{name}t"
                names.append(name)
            gate, up, down = names
            at = str(number)
            nodes += [
                helper.make_node("MatMul", ["x", gate], [f"a{at}"]),
                helper.make_node("Sigmoid", [f"a{at}"], [f"s{at}"]),
                helper.make_node("Mul", [f"a{at}", f"s{at}"], [f"g{at}"]),
                helper.make_node("MatMul", ["x", up], [f"u{at}"]),
                helper.make_node("Mul", [f"g{at}", f"u{at}"], [f"h{at}"]),
                helper.make_node("MatMul", [f"h{at}", down], [f"y{at}"]),
                helper.make_node("Add", [total, f"y{at}"], [f"t{at}"]),
            ]
            total = f"t{at}"
        if gathered:
            weights.append(
                numpy_helper.from_array(np.array([ACTIVE * SIZE, SHAPE.d_model]), "shape")
            )
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SHAPE.d_model])]
        if gathered:
            inputs.append(helper.make_tensor_value_info("chosen", TensorProto.INT64, [ACTIVE]))
        output = helper.make_tensor_value_info(total, TensorProto.FLOAT, [1, SHAPE.d_model])
        graph = helper.make_graph(nodes, "mlps", inputs, [output], weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 9
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        given = {"x": np.ones((1, SHAPE.d_model), np.float32)}
        given |= {"chosen": GIVEN.astype(np.int64)} if gathered else {}
        what = "half, experts gathered" if gathered else "dense"
        yield f"onnxruntime, float32, {what}", partial(session.run, None, given)


if __name__ == "__main__":
    main()
