"""Find and read the MLPs of any transformers causal language model.

Every MLP of every family becomes one record of tensors, `MLPWeights`. Families are told apart
by structure (names and exact types of the children), not by model name, so a new model with a
known layout works unseen; what a layout claims is proved numerically at conversion
(`conversion.py`).
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from .errors import UnsupportedModelError, UserError
from .one_device import check_one_device


@dataclass(frozen=True)
class MLPWeights:
    """One MLP: `down @ (act(gate @ x + gate_bias) * (up @ x + up_bias)) + down_bias`.

    Plain two-layer MLPs have no gate: `down @ act(up @ x + up_bias) + down_bias`.
    Neuron j is row j of gate and up, with their biases, and column j of down. Tensors are the
    model's own parameters or views of them, never copies.
    """

    gate: Tensor | None  # (d_ff, d_model)
    up: Tensor  # (d_ff, d_model)
    down: Tensor  # (d_model, d_ff)
    gate_bias: Tensor | None  # (d_ff,)
    up_bias: Tensor | None  # (d_ff,)
    down_bias: Tensor | None  # (d_model,)
    activation: Callable[[Tensor], Tensor]
    adds_residual: bool = False  # BLOOM and MPT call mlp(x, residual) and expect the sum

    @property
    def d_ff(self) -> int:
        return self.up.shape[0]

    @property
    def d_model(self) -> int:
        return self.up.shape[1]


@dataclass(frozen=True)
class DenseMLP:
    """An MLP where it was found: its place in the model, its module and its weights."""

    name: str  # module path, e.g. "model.layers.0.mlp"
    module: nn.Module
    weights: MLPWeights


@dataclass(frozen=True)
class Layout:
    """Names of the children of an MLP module. A fused `up` holds gate rows first, then up."""

    up: str
    down: str
    gate: str | None = None
    fused: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name)

    def d_ff(self, module: nn.Module) -> int:
        """Neurons of an MLP module of this layout; it may be on the meta device."""
        down = getattr(module, self.down)
        return down.weight.shape[0 if type(down) is Conv1D else 1]


LAYOUTS = (
    Layout(gate="gate_proj", up="up_proj", down="down_proj"),  # Llama, Qwen, Mistral, Gemma, ...
    Layout(gate="w1", up="w3", down="w2"),  # LFM2
    Layout(up="gate_up_proj", down="down_proj", fused=True),  # Phi-3, GLM
    Layout(up="input_linear", down="output_linear", fused=True),  # Granite 4
    Layout(up="up_proj", down="down_proj"),  # Arcee, Apertus, MPT
    Layout(up="c_fc", down="c_proj"),  # GPT-2, GPT-Neo, GPT-BigCode, StarCoder2
    Layout(up="fc1", down="fc2"),  # Phi, NanoChat
    Layout(up="fc_in", down="fc_out"),  # GPT-J, CodeGen
    Layout(up="dense_h_to_4h", down="dense_4h_to_h"),  # GPT-NeoX, Falcon, BLOOM, Persimmon
)
ACTIVATION_NAMES = ("act_fn", "activation_fn", "activation", "act", "gelu_impl")
CONVERTED = (
    "BranchedMLP",
    "LoopedMLP",
    "RoutedMLP",
    "NeuronMLP",
    "InputMLP",
    "ClusterMLP",
    "LowRankMLP",
)
# Exact types: a subclass may compute something else (quantised layers do).
LINEAR_TYPES = (nn.Linear, Conv1D, FalconLinear)
PARAMETER_TYPES = (nn.Parameter,)
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_structure(model: nn.Module) -> None:
    """Raise UnsupportedModelError unless every decoder layer has one MLP of a known layout.

    Needs no weights: a model on the meta device will do.
    """
    for _ in _locate(model):
        pass


def read_mlps(model: nn.Module) -> list[DenseMLP]:
    """The MLPs of `model`, one per decoder layer, in order.

    Raises UnsupportedModelError, naming the module and the reason, for what cannot be split:
    norms between up and down, layers without an MLP module, existing mixtures of experts,
    quantised or offloaded weights, and for a model that is spread over several devices.
    """
    check_one_device(model)
    return [
        DenseMLP(name, module, read_mlp(name, module, layout))
        for name, module, layout in _locate(model)
    ]


def located_mlps(model: nn.Module) -> dict[str, tuple[nn.Module, Layout]]:
    """Path, module and layout of every MLP, in order of the layers; a model without weights will
    do. Raises UnsupportedModelError as `read_mlps` does."""
    return {name: (module, layout) for name, module, layout in _locate(model)}


def read_mlp(name: str, module: nn.Module, layout: Layout) -> MLPWeights:
    """The weights of one MLP that was located: its own parameters, or views of them."""
    up, up_bias = read_linear(f"{name}.{layout.up}", getattr(module, layout.up))
    down, down_bias = read_linear(f"{name}.{layout.down}", getattr(module, layout.down))
    gate = gate_bias = None
    if layout.gate:
        gate, gate_bias = read_linear(f"{name}.{layout.gate}", getattr(module, layout.gate))
    elif layout.fused:
        gate, up = up.detach().chunk(2)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.detach().chunk(2)
    if down.shape[1] != up.shape[0]:  # Moshi gates inside a wider fc1
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) makes {up.shape[0]} neurons but reads "
            f"{down.shape[1]}, so its neurons cannot be told apart."
        )
    activation = next(
        (getattr(module, a) for a in ACTIVATION_NAMES if callable(getattr(module, a, None))),
        F.silu,  # LFM2 calls it without a module; the proof at conversion catches a wrong guess
    )
    adds_residual = "residual" in inspect.signature(module.forward).parameters
    return MLPWeights(
        gate, up, down, gate_bias, up_bias, down_bias, activation, adds_residual=adds_residual
    )


def read_linear(name: str, linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight as (out, in), and bias, of a layer of LINEAR_TYPES; `name` is for errors. Raises
    UnsupportedModelError for weights that are not plain floats in memory."""
    weight = linear.weight
    if weight.is_meta:
        raise UnsupportedModelError(
            f"the weights of {name} are not in memory (offloaded to disk or CPU, or never "
            "loaded). Load the whole model on one device."
        )
    if type(weight) not in PARAMETER_TYPES or weight.dtype not in FLOAT_DTYPES:
        raise UnsupportedModelError(
            f"{name} stores {type(weight).__name__} of {weight.dtype}; allowed are plain float16, "
            "bfloat16, float32 and float64 weights."
        )
    if type(linear) is Conv1D:  # GPT-2 stores (in, out)
        weight = weight.detach().T
    return weight, linear.bias


def write_mlp(module: nn.Module, layout: Layout, weights: MLPWeights) -> None:
    """Make `weights` those of an MLP module, whose own may be on the meta device: the reverse of
    reading them. A bias that the module has and the weights lack becomes zeros; UserError for a
    bias that it has no place for, and for other shapes."""
    up, up_bias = weights.up, weights.up_bias
    if layout.gate:
        _fill(getattr(module, layout.gate), weights.gate, weights.gate_bias)
    elif layout.fused:
        up = torch.cat([weights.gate, up])
        up_bias = None if up_bias is None else torch.cat([weights.gate_bias, up_bias])
    _fill(getattr(module, layout.up), up, up_bias)
    _fill(getattr(module, layout.down), weights.down, weights.down_bias)
    for name in ACTIVATION_NAMES:  # copied: it may have parameters, which others move or train
        if isinstance(getattr(module, name, None), nn.Module):
            setattr(module, name, copy.deepcopy(weights.activation))


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder's layers."""
    decoder = model.get_decoder()
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    if count < 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers, and so no MLPs."
        )
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            path = next(name for name, module in model.named_modules() if module is child)
            return path, child
    raise UnsupportedModelError(
        f"{type(model).__name__} does not keep its {count} decoder layers in one list, "
        "so its MLPs cannot be found."
    )


def _locate(model: nn.Module) -> Iterator[tuple[str, nn.Module, Layout]]:
    path, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        name = f"{path}.{index}"
        modules = list(layer.named_modules(prefix=name))
        for child, module in modules:
            kind = type(module).__name__
            if kind in CONVERTED:
                raise UnsupportedModelError(
                    f"{child} is converted already. Convert the dense model instead."
                )
            # not by "moe" in a class's name, which dense layers of such models have, too
            if child.endswith(".experts") or re.search("experts", kind, re.IGNORECASE):
                raise UnsupportedModelError(
                    f"{child} ({kind}) is a mixture of experts already; only dense MLPs can be "
                    "converted."
                )
        found = [(n, m, layout) for n, m in modules if (layout := _layout(m))]
        if len(found) != 1:
            raise UnsupportedModelError(
                f"{name} ({type(layer).__name__}) has {len(found) or 'no'} MLP modules of a known "
                "layout; one is needed."
            )
        name, module, layout = found[0]
        _check_shape(name, module, layout, inside_layer=module is layer)
        yield name, module, layout


def _layout(module: nn.Module) -> Layout | None:
    children = {name for name, _ in module.named_children()}
    return next((layout for layout in LAYOUTS if children.issuperset(layout.names)), None)


def _check_shape(name: str, module: nn.Module, layout: Layout, inside_layer: bool) -> None:
    kind = type(module).__name__
    if inside_layer:
        raise UnsupportedModelError(
            f"{name} ({kind}) holds {' and '.join(layout.names)} directly, without an MLP module "
            "of their own: there is nothing to swap."
        )
    for child_name, child in module.named_children():
        if child_name in layout.names:
            if type(child) not in LINEAR_TYPES:
                raise UnsupportedModelError(
                    f"{name}.{child_name} is a {type(child).__name__}, not a plain linear layer. "
                    "Quantised or adapted models cannot be split; load the plain checkpoint."
                )
        elif child_name not in ACTIVATION_NAMES and any(True for _ in child.parameters()):
            raise UnsupportedModelError(
                f"{name}.{child_name} ({type(child).__name__}) works across all neurons at once, "
                "so branches of this MLP do not sum to it."
            )
    if getattr(module, "activation_sparsity", 0) > 0:  # Gemma 3n
        raise UnsupportedModelError(
            f"{name} ({kind}) keeps only its strongest activations, chosen across all neurons, "
            "so branches of this MLP do not sum to it."
        )


def _fill(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Set weight (out, in) and bias of a linear layer."""
    weight = weight.detach()
    weight = weight.T if type(linear) is Conv1D else weight
    place = linear.bias
    if linear.weight.shape != weight.shape or (place is None and bias is not None):
        raise UserError(
            f"a {type(linear).__name__} of {tuple(linear.weight.shape)}"
            f"{'' if place is not None else ' without bias'} cannot hold {tuple(weight.shape)}"
            f"{'' if bias is None else ' with bias'}."
        )
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if place is not None:
        bias = weight.new_zeros(place.shape) if bias is None else bias.detach()
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=place.requires_grad)


def context_length(model: PreTrainedModel) -> int | None:
    """The longest input the model was built for, in tokens; None if it states no limit."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)
