"""Decoding with a model of Llama's kind: two compiled calls per layer in place of some thirty
operations of torch, so that what is left of a token's time is reading the weights.

Which models are of that kind is seen by their structure and proved by their numbers: attention,
norms, positions and head together, with the MLPs left out. Sums are kept in float32, so from 16-bit
weights it computes more exactly than torch does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..conversion import twin_of
from ..errors import UnsupportedModelError
from ..mlps import read_mlps
from .arrays import DTYPES, NONE, allowed, matrix, running, threads, vector
from .choice import is_faster
from .one_token import OneToken, dense

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")  # of every head, in Qwen3
NORMS = ("input_layernorm", "post_attention_layernorm")
FIXED_POSITIONS = ("default", "linear", "llama3", "yarn")  # their angles ignore the text's length
PROOF = (3, 1, 4, 1, 5, 2, 6, 5)  # token ids, which every vocabulary has
CLOSE = 1e-3, 6  # of the largest logit, and times the rounding step of the weights' dtype

_agrees: dict[str, bool] = {}
_pays: dict[tuple, bool] = {}


class CompiledDecoder:
    """One token after the other, from keys and values that a prompt left.

    model: for which `decodes` is true; its weights are read in place. capacity: tokens, prompt
    included. It is of the model as it is now: make another one for each text.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        body, config = model.model, model.config
        first = body.layers[0].self_attn
        positions = torch.arange(capacity)[None]
        with torch.inference_mode():
            angles = body.rotary_emb(torch.zeros(1, 1), positions)  # (1, capacity, width)
        self._cos, self._sin = (vector(each[0]) for each in angles)
        heads = first.k_proj.out_features // first.head_dim
        shape = len(body.layers), heads, capacity, first.head_dim
        self._keys, self._values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._layers = [
            (_attention(layer), np.float32(layer.self_attn.scaling), _norm(layer, NORMS[1]), mlp)
            for layer, mlp in zip(body.layers, _one_token_mlps(model), strict=True)
        ]
        self._norm, self._head = _norm(body, "norm"), matrix(model.lm_head.weight)
        self._embedding = body.embed_tokens.weight.detach()
        self._normed = np.empty(config.hidden_size, np.float32)
        self._threads = threads(first.q_proj.weight.numel())
        self._all_threads = threads(self._head.size)
        self.position = 0  # tokens read

    def take(self, layers: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Go on after a prompt: its keys and values (1, heads, tokens, width) of each layer."""
        for layer, both in enumerate(layers):
            for kept, given in zip((self._keys, self._values), both, strict=True):
                self.position = given.shape[2]
                kept[layer, :, : self.position] = given[0].float().numpy()

    def step(self, token: int) -> Tensor:
        """Read a token; the logits after it, (1, vocabulary) float32."""
        from .compiled import add_product, attend, normalise

        at, normed = self.position, self._normed
        x = self._embedding[token].float().numpy().copy()
        cos, sin = self._cos[at], self._sin[at]
        with running(self._threads):
            for layer, (attention, scaling, norm, mlp) in enumerate(self._layers):
                attend(x, *attention, cos, sin, self._keys[layer], self._values[layer], at, scaling)
                normalise(x, *norm, normed)
                mlp(normed, x)
        logits = np.zeros(len(self._head), np.float32)
        with running(self._all_threads):
            normalise(x, *self._norm, normed)
            add_product(self._head, normed, NONE, logits)
        self.position += 1
        return torch.from_numpy(logits)[None]


def decodes(model: PreTrainedModel) -> bool:
    """Whether CompiledDecoder computes what the model does, and was faster when it was tried."""
    if not allowed() or not isinstance(model, PreTrainedModel) or model.training:
        return False
    if model.device.type != "cpu" or not _is_of_the_kind(model):
        return False
    if any(part._forward_hooks or part._forward_pre_hooks for part in model.modules()):
        return False  # they would hear nothing
    name = f"{type(model).__name__} {model.dtype} {model.config.to_json_string()}"
    if name not in _agrees:
        _agrees[name] = _agree(model)
    if not _agrees[name]:
        return False
    mlps = tuple(f"{type(each).__name__} {each.extra_repr()}" for each in _mlps(model))
    if (name, mlps) not in _pays:
        _pays[name, mlps] = _pay(model)
    return _pays[name, mlps]


def _is_of_the_kind(model: PreTrainedModel) -> bool:
    """Whether all parts are there, and no others."""
    body = getattr(model, "model", None)
    if not {"model", "lm_head"} == _names(model) or body is None:
        return False
    if _names(body) != {"embed_tokens", "layers", "norm", "rotary_emb"} or not len(body.layers):
        return False
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in FIXED_POSITIONS:
        return False
    if getattr(model.config, "sliding_window", None) or model.lm_head.bias is not None:
        return False
    return (
        all(map(_is_layer, body.layers))
        and hasattr(body.norm, "variance_epsilon")
        and all(w.dtype in DTYPES for w in (model.lm_head.weight, body.embed_tokens.weight))
    )


def _is_layer(layer: nn.Module) -> bool:
    if _names(layer) != {"self_attn", "mlp", *NORMS}:
        return False
    attention, names = layer.self_attn, _names(layer.self_attn)
    linears = [getattr(attention, name, None) for name in PROJECTIONS]
    norms = [getattr(layer, name) for name in NORMS]
    norms += [getattr(attention, name) for name in HEAD_NORMS if name in names]
    return (
        names in ({*PROJECTIONS}, {*PROJECTIONS, *HEAD_NORMS})
        and all(type(linear) is nn.Linear for linear in linears)
        and all(matrix(linear.weight) is not None for linear in linears)
        and all(hasattr(norm, "variance_epsilon") for norm in norms)
        and hasattr(attention, "scaling")
        and hasattr(attention, "head_dim")
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


class _Silence(nn.Module):
    """An MLP that says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@torch.inference_mode()
def _agree(model: PreTrainedModel) -> bool:
    """Whether the logits are the model's own where its MLPs say nothing."""
    silent = twin_of(model)
    for layer in silent.model.layers:
        layer.mlp = _Silence()
    own = silent(torch.tensor([PROOF]), use_cache=False).logits[0, -1].float()
    decoder = CompiledDecoder(silent, len(PROOF))
    for token in PROOF:
        logits = decoder.step(token)[0]
    part, steps = CLOSE
    allowed = max(part, steps * torch.finfo(model.dtype).eps) * own.abs().max()
    return bool((logits - own).abs().max() <= allowed)


@torch.inference_mode()
def _pay(model: PreTrainedModel) -> bool:
    decoder, one = CompiledDecoder(model, len(PROOF)), torch.tensor([[PROOF[0]]])
    return is_faster(lambda: decoder.step(PROOF[0]), lambda: model(one, use_cache=False))


def _mlps(model: PreTrainedModel) -> list[nn.Module]:
    return [layer.mlp for layer in model.model.layers]


def _one_token_mlps(model: PreTrainedModel) -> list[OneToken]:
    """Compiled, or the module itself where no kernel fits."""
    modules = _mlps(model)
    known = {}
    if not any(hasattr(module, "one_token") for module in modules):
        try:
            known = {mlp.module: mlp.weights for mlp in read_mlps(model)}
        except UnsupportedModelError:
            pass
    return [
        (dense(known[module]) if module in known else _own(module)) or _as_it_is(module, model)
        for module in modules
    ]


def _own(module: nn.Module) -> OneToken | None:
    return module.one_token() if hasattr(module, "one_token") else None


def _as_it_is(module: nn.Module, model: PreTrainedModel) -> OneToken:
    def run(x: np.ndarray, out: np.ndarray) -> None:
        out += module(torch.from_numpy(x)[None, None].to(model.dtype))[0, 0].float().numpy()

    return OneToken(run, 0)


def _norm(parent: nn.Module, name: str) -> tuple[np.ndarray, np.float32]:
    norm = getattr(parent, name)
    return vector(norm.weight), np.float32(norm.variance_epsilon)


def _attention(layer: nn.Module) -> tuple:
    """What `attend` takes before the positions."""
    attention = layer.self_attn
    linears = [getattr(attention, name) for name in PROJECTIONS]
    norms = [getattr(attention, name, None) for name in HEAD_NORMS]
    return (
        *_norm(layer, NORMS[0]),
        *(matrix(linear.weight) for linear in linears),
        *(vector(linear.bias) for linear in linears),
        *(NONE if norm is None else vector(norm.weight) for norm in norms),
    )
