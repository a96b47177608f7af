"""A student whose tensors are trained: weights, α, or routers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import SpecError
from ..routed import ROUTED_TYPES, RoutedMLP
from ..spec import ConversionSpec
from ..static.branched import BranchedMLP
from .low_rank import LowRank
from .soft import SoftlyRouted
from .student import Student, Whole, replace_tensor, size_of

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


class TensorStudent(Student):
    """A converted model whose chosen tensors are trained.

    LoRA is our own ten lines and not `peft`, whose adapters know no zeros that have to stay, and
    would wrap modules whose weights are plain parameters.
    """

    def __init__(self, model: PreTrainedModel, spec: ConversionSpec) -> None:
        super().__init__(model)
        self.places = places(model, spec)
        self.relative = spec.recover == "router"  # scores of different routers differ in size
        if self.relative:
            for path in {place.path for place in self.places}:
                self.twin.get_submodule(path).__class__ = SoftlyRouted
        generator = torch.Generator().manual_seed(spec.seed)
        self.forms = nn.ModuleList(
            LowRank(place.tensor, generator) if spec.recover == "lora" else Whole(place.tensor)
            for place in self.places
        )

    def values(self, step: int | None = None) -> Iterator[tuple[str, Tensor]]:
        for place, form in zip(self.places, self.forms, strict=True):
            value = form()
            if place.fixed is not None:
                value = value.masked_fill(place.fixed, 0)
            yield place.key, value.to(place.tensor.dtype)

    @property
    def trained(self) -> list[nn.Parameter]:
        return list(self.forms.parameters())

    @property
    def paces(self) -> list[float]:
        return [size_of(p) for p in self.trained] if self.relative else super().paces

    @property
    def begins_with(self) -> list[Tensor]:
        return [place.tensor for place in self.places]

    @property
    def widest(self) -> int:
        return max(max(place.tensor.shape) for place in self.places)

    def bytes_of_a_pass(self) -> int:
        return sum(2 * place.tensor.nbytes for place in self.places)

    @torch.no_grad()
    def write(self, model: nn.Module) -> None:
        for name, value in self.values():
            replace_tensor(model, name, value)
