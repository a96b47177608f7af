"""The converted model with what is trained in it, beside the model itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..errors import SpecError
from ..routed import ROUTED_TYPES, RoutedMLP
from ..routed.choosing import choose
from ..spec import ConversionSpec
from ..static.branched import BranchedMLP
from ..stopping import stop_between_modules
from .low_rank import LowRank

TYPES = (BranchedMLP, *ROUTED_TYPES)


@dataclass(frozen=True)
class Place:
    """A tensor of a converted model that is trained."""

    path: str  # of the MLP module
    name: str  # in that module, such as "up_proj.weight" or "down"
    tensor: Tensor  # as it is before
    fixed: Tensor | None  # bool: which of its numbers stay, the zeros that fade made

    @property
    def key(self) -> str:
        return f"{self.path}.{self.name}"


def places(model: nn.Module, spec: ConversionSpec) -> list[Place]:
    """What `spec` has trained in the layers of a converted model that are not spared.

    alpha: α. router: its weights. down: down and its bias. lora: gate, up and down. all: these,
    their biases and α; routers stay as they are, since what they choose has no gradient but a made
    up one. Zeros that fade made are not trained away. Raises SpecError where there is nothing.
    """
    found = []
    mlps = [(path, m) for path, m in model.named_modules() if isinstance(m, TYPES)]
    for layer, (path, mlp) in enumerate(mlps):
        if layer in spec.spared_layers:
            continue
        for name, tensor in mlp.named_parameters():
            if _chosen(spec.recover, name, tensor):
                found.append(Place(path, name, tensor, _zeros(spec, name, tensor)))
    if spec.recover == "router":
        choosing = {path for path, mlp in mlps if isinstance(mlp, RoutedMLP) and mlp.chooses}
        found = [place for place in found if place.path in choosing]
    if not found:
        raise SpecError(f"recover {spec.recover}: this conversion has none to train.")
    return found


def _chosen(what: str, name: str, tensor: Tensor) -> bool:
    part = name.partition(".")[0]
    if "act_fn" in name or (part == "router") != (what == "router"):
        return False
    return {
        "alpha": part == "alpha",
        "down": part in ("down", "down_proj", "down_bias"),
        "lora": tensor.ndim == 2,
    }.get(what, True)


def _zeros(spec: ConversionSpec, name: str, tensor: Tensor) -> Tensor | None:
    projection = name.removesuffix("_proj.weight")
    if not spec.fades or spec.fade_unit == "neuron" or projection not in spec.projections:
        return None
    zeros = tensor.detach() == 0
    return zeros if zeros.any() else None


class _Whole(nn.Module):
    """A tensor trained as it is, in float32 at least."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        wide = torch.promote_types(tensor.dtype, torch.float32)
        self.value = nn.Parameter(tensor.detach().to(wide, copy=True))

    def forward(self) -> Tensor:
        return self.value


class Student(nn.Module):
    """A converted model whose chosen tensors are trained, while the model itself stays as it is.

    What is trained is held in float32 at least and rounded to the model's dtype before each
    forward pass, so that a pass computes what the model will once it has the result. LoRA is our
    own ten lines and not `peft`, whose adapters know no zeros that have to stay, and would wrap
    modules whose weights are plain parameters.

    `forward(ids)`: (samples, tokens) int64 -> logits (samples, tokens, vocabulary).
    """

    def __init__(self, model: PreTrainedModel, spec: ConversionSpec) -> None:
        super().__init__()
        self.places = places(model, spec)
        self.twin = frozen_twin(model)
        if spec.recover == "router":
            for path in {place.path for place in self.places}:
                self.twin.get_submodule(path).__class__ = SoftlyRouted
        generator = torch.Generator().manual_seed(spec.seed)
        self.forms = nn.ModuleList(
            LowRank(place.tensor, generator) if spec.recover == "lora" else _Whole(place.tensor)
            for place in self.places
        )

    def forward(self, ids: Tensor) -> Tensor:
        values = dict(self.values())
        found = functional_call(self.twin, values, (ids,), {"use_cache": False}, tie_weights=False)
        return found.logits

    def values(self) -> Iterator[tuple[str, Tensor]]:
        """The trained tensors as the model will have them, by their names in it."""
        for place, form in zip(self.places, self.forms, strict=True):
            value = form()
            if place.fixed is not None:
                value = value.masked_fill(place.fixed, 0)
            yield place.key, value.to(place.tensor.dtype)

    @property
    def trained(self) -> list[nn.Parameter]:
        return list(self.forms.parameters())

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        """Give the result to the model, in tensors of its own: those it had may be the dense
        model's."""
        for place, (_, value) in zip(self.places, self.values(), strict=True):
            path, _, name = place.key.rpartition(".")
            own = torch.empty_like(place.tensor).copy_(value)  # strides as they were
            wanted = nn.Parameter(own, requires_grad=place.tensor.requires_grad)
            setattr(model.get_submodule(path), name, wanted)


def frozen_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the same memory, not trained and without dropout, which may be
    left between any two of its modules."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
    twin = copy.deepcopy(model, memo).eval()
    stop_between_modules(twin)
    return twin


class SoftlyRouted(RoutedMLP):
    """A RoutedMLP whose choice has a gradient, and the same output.

    Choosing the best k has none, so the gradient is that of a soft choice (straight through): a
    sigmoid of the score's distance to the border between chosen and not, in units of the scores'
    standard deviation. All experts run, so that a router learns of those it left out, too.

    A RoutedMLP becomes one, and one a RoutedMLP, by its `__class__`: both have the same tensors.
    """

    def select(self, x: Tensor) -> Tensor:
        """(tokens, experts), 0 or 1 in the dtype of x."""
        scores = self.router(x)
        with torch.no_grad():
            chosen = choose(scores, int(self.active), self.threshold)
            ends = scores.topk(min(int(self.active) + 1, self.experts)).values[:, -2:]
            border, unit = ends.mean(1, keepdim=True), scores.std().clamp(min=1e-12)
        soft = ((scores - border) / unit).sigmoid()
        return chosen.to(x.dtype) + (soft - soft.detach()).to(x.dtype)

    def _many(self, x: Tensor) -> Tensor:
        return self.summed(x) @ self.down
