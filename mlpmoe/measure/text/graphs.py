"""Decoding on a GPU: all launches of a token recorded once, as a CUDA graph, and then replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from weakref import WeakSet

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...core.kernels.arrays import switched_on
from ...core.kernels.gpu import warn

# transformers 5.24 renamed the argument and the output, and warns of the old name
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in {field.name for field in fields(CausalLMOutputWithPast)}
)
CLOSE = 1e-2  # of the largest logit: what a replay may differ by

_refused: WeakSet[PreTrainedModel] = WeakSet()  # a graph of it could not be recorded


class GraphDecoder:
    """One token after the other, from keys and values that a prompt left.

    model: for which `records` is true. capacity: tokens, prompt included; each step reads keys and
    values of all of them. The first step runs as it is, and is recorded after that; where the
    replay fails or says something else, all steps run as they are.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        self.model, self.position = model, 0  # tokens read
        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        self._replay: Callable[[], Tensor] | None = None

    def take(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go on after a prompt: its keys and values (1, heads, tokens, width) of each layer. What
        was read before is forgotten."""
        self._cache.reset()
        for layer, (keys, values) in zip(self._cache.layers, layers, strict=True):
            layer.update(keys, values)
            self.position = keys.shape[2]

    def step(self, token: Tensor | int) -> Tensor:
        """Read a token, an int or () on the device; the logits after it, (1, vocabulary)."""
        self._token.fill_(token)
        self.position += 1
        if self._replay is not None:
            return self._replay().clone()
        logits = self._read()
        if self.model not in _refused:
            try:
                self._record(logits)
            except Exception as error:  # it waits for the GPU, or needs memory, or ...
                self._refuse("torch does without CUDA graphs, one was not recorded: ", error)
        return logits

    def _read(self) -> Tensor:
        out = self.model(self._token, use_cache=True, **{CACHE: self._cache})
        return out["logits"][:, -1]

    def _record(self, logits: Tensor) -> None:
        """Record what was just read, read it again by the replay, and keep that if it agrees."""
        replay = capture(self._read)
        self._back()
        again = replay()
        if (again - logits).abs().max() <= CLOSE * logits.abs().max():
            self._replay = replay
            return
        self._refuse("torch does without CUDA graphs, one disagrees with what it is of")
        self._back()
        self._read()

    def _back(self) -> None:
        """Forget the last token."""
        for layer in self._cache.layers:
            layer.cumulative_length.sub_(1)

    def _refuse(self, message: str, error: Exception | str = "") -> None:
        _refused.add(self.model)
        warn(message, error)


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record the launches of `run`, which are not carried out; the result is always the same
    tensor."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def records(model: PreTrainedModel) -> bool:
    """Whether a token of the model may be a graph: it is on one GPU, keeps all keys and values in
    tensors of a fixed size, and waits for nothing that the GPU says."""
    if not isinstance(model, PreTrainedModel) or model.training or model in _refused:
        return False
    if not switched_on() or not _on_one_gpu(model):
        return False
    if not getattr(model, "_can_compile_fullgraph", False):
        return False
    parts = list(model.modules())
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return False  # they would hear nothing
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return all(getattr(part, "fixed", True) for part in parts) and all(
        type(layer) is StaticLayer for layer in layers
    )


def _on_one_gpu(model: PreTrainedModel) -> bool:
    devices = {parameter.device for parameter in model.parameters()}
    return len(devices) == 1 and devices.pop().type == "cuda"
