"""The converted model with what is trained in it, beside the model itself."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from hashlib import sha256

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from ..stopping import stop_between_modules


class Student(ABC, nn.Module):
    """A converted model of which something is trained, while the model itself stays as it is.

    What is trained is held in float32 at least and rounded to the model's dtype before each
    forward pass, so that a pass computes what the model will once it has the result.

    model: the converted one.
    """

    draft = False  # whether the model is finished by `write` only, also where nothing was won
    kept_per_neuron = 4  # numbers that a layer keeps for its gradient, for each neuron and token

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.twin = frozen_twin(model)
        self.penalty: Tensor | None = None  # what the last pass adds to the loss, a scalar

    def forward(self, ids: Tensor, step: int | None = None) -> Tensor:
        """(samples, tokens) int64 -> logits (samples, tokens, vocabulary), of the model as it would
        be written now; or with `step`, as that step of the training sees it."""
        values = dict(self.values(step))
        found = functional_call(self.twin, values, (ids,), {"use_cache": False}, tie_weights=False)
        return found.logits

    @abstractmethod
    def values(self, step: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors that stand in for those of the twin, by their names in it. What is drawn
        for them depends on the seed and the step only, so that a training can be gone on with."""

    @property
    @abstractmethod
    def trained(self) -> list[nn.Parameter]: ...

    @property
    def paces(self) -> list[float]:
        """How fast each of `trained` moves, in units of the rate."""
        return [1.0] * len(self.trained)

    @property
    @abstractmethod
    def begins_with(self) -> list[Tensor]:
        """What of the model decides how training begins."""

    @property
    @abstractmethod
    def widest(self) -> int:
        """The most neurons that an MLP runs."""

    @abstractmethod
    def bytes_of_a_pass(self) -> int:
        """What `values` and their gradients take."""

    @property
    def active(self) -> float | None:
        """The share of the neurons that a token runs, where that is trained."""
        return None

    @torch.no_grad()
    def fingerprint(self) -> str:
        """12 hexadecimal digits of the tensors that the model has or gets, to the last bit."""
        found = sha256()
        for name, value in self.values():
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.cpu().contiguous().view(torch.uint8).numpy())
        return found.hexdigest()[:12]

    @abstractmethod
    def write(self, model: nn.Module) -> None:
        """Give the result to the converted model, in tensors of its own."""


class Whole(nn.Module):
    """A tensor trained as it is, in float32 at least."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        wide = torch.promote_types(tensor.dtype, torch.float32)
        self.value = nn.Parameter(tensor.detach().to(wide, copy=True))

    def forward(self) -> Tensor:
        return self.value


def size_of(tensor: Tensor) -> float:
    """The root mean square of its numbers; 1 where all are 0."""
    return float(tensor.detach().square().mean().sqrt()) or 1.0


@torch.no_grad()
def replace_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Give a parameter of the model another tensor, as the one it has in dtype and strides: that
    one may be the dense model's."""
    path, _, name = name.rpartition(".")
    module = model.get_submodule(path)
    before = getattr(module, name)
    own = torch.empty_like(before).copy_(value)
    setattr(module, name, nn.Parameter(own, requires_grad=before.requires_grad))


def frozen_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second tree of modules over the same memory, not trained and without dropout, which may be
    left between any two of its modules."""
    memo: dict[int, object] = {id(buffer): buffer for buffer in model.buffers()}
    for tensor in model.parameters():
        memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False)
    twin = copy.deepcopy(model, memo).eval()
    stop_between_modules(twin)
    return twin
