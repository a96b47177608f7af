"""Adapters: what is trained in place of a weight that stays, and a model that has them.

An adapter stands for a linear layer of weight (m, n). It has a `task`, the number of the one whose
text is being read, or None for text of none of them, and `merged(task)`: the plain layer that
computes the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.errors import UserError
from ..core.mlps import Layout, located_mlps, read_linear
from ..core.recovery.low_rank import LowRank
from ..core.recovery.student import frozen_twin

PROJECTIONS = ("gate", "up", "down")


def reflected(x: Tensor, mirrors: Tensor) -> Tensor:
    """H x for each row of x (..., n), where H = H₁H₂⋯H_k is the product of the Householder
    reflections H_i = 1 − 2u_iu_iᵀ/‖u_i‖² at the rows of mirrors (k, n).

    In one piece (compact WY): with Q the mirrors at length 1 as columns, H = 1 − Q T Qᵀ, where the
    inverse of T is the part of QᵀQ above its diagonal and ½ on it.
    """
    q = F.normalize(mirrors, dim=1)  # (k, n)
    inverse = (q @ q.T).triu(1) + 0.5 * torch.eye(len(q), dtype=q.dtype, device=q.device)
    return x - (x @ q.T) @ torch.linalg.solve_triangular(inverse.T, q, upper=False)


class MooreLinear(nn.Module):
    """A linear layer as orthogonal experts of rank one that are weighed by task and by token
    (MoORE, arXiv 2506.14436):

        y = U[(S + task(t) + W_b W_a x) ⊙ (Vᵀ H x)] + bias

    U S Vᵀ is the SVD of the weight (m, n): expert i of r = min(m, n) is u_i v_iᵀ. Trained are the
    tables task (tasks, r) and W_a (width, n), W_b (r, width) of the router by token, which there is
    only for a width above 0, and H, a product of reflections (an even number of them, 0 for none).
    At first it computes what the layer does: task and W_b are 0, and each mirror stands twice,
    which reflects back. Outputs stay in the column space of the weight. All experts run, so it
    takes more multiply-adds than the layer, not less.

    The published code makes task(t) from a vector of 64 numbers by a matrix, which can say no more
    for up to 64 tasks, and cuts the weights of the experts off at 0; here they may go below.

    Computes in float32 at least; the output has the dtype of x (..., n). Raises UserError for an
    odd number of reflections and for a width below 0.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        tasks: int,
        generator: torch.Generator,
        reflections: int = 6,
        width: int = 16,
    ) -> None:
        super().__init__()
        if reflections < 0 or reflections % 2:
            raise UserError(f"reflections come in pairs: give an even number, not {reflections}.")
        if width < 0:
            raise UserError(f"the width of a router is 0 or more, not {width}.")
        wide = torch.promote_types(weight.dtype, torch.float32)
        n, r, device = weight.shape[1], min(weight.shape), weight.device
        u, s, v = torch.linalg.svd(weight.detach().to(wide), full_matrices=False)
        for name, tensor in (("u", u), ("s", s), ("v", v)):  # (m, r), (r,), (r, n)
            self.register_buffer(name, tensor.contiguous(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)

        def drawn(rows: int) -> Tensor:
            """(rows, n), of about length 1 each."""
            values = torch.randn(rows, n, generator=generator, dtype=wide)
            return (values * n**-0.5).to(device)

        self.task: int | None = None
        self.tasks = nn.Parameter(torch.zeros(tasks, r, dtype=wide, device=device))
        self.mirrors = self.first = self.second = None
        if reflections:
            self.mirrors = nn.Parameter(drawn(reflections // 2).repeat_interleave(2, dim=0))
        if width:
            self.first = nn.Parameter(drawn(width))
            self.second = nn.Parameter(torch.zeros(r, width, dtype=wide, device=device))
        self.dtype = weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(self.s.dtype)
        z = wide if self.mirrors is None else reflected(wide, self.mirrors)
        z = z @ self.v.T  # (..., r)
        weights = self.weights(self.task)
        if self.first is not None:
            weights = weights + (wide @ self.first.T) @ self.second.T
        y = ((z * weights) @ self.u.T).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def weights(self, task: int | None) -> Tensor:
        """(r,): of the experts, without what the token adds."""
        return self.s if task is None else self.s + self.tasks[task]

    @torch.no_grad()
    def merged(self, task: int | None) -> nn.Linear:
        """Raises UserError where experts are weighed by token: no weight does that."""
        if self.first is not None:
            raise UserError(
                "what is routed by token cannot be merged into a weight: train it with a router of "
                "width 0."
            )
        v = self.v
        if self.mirrors is not None:
            v = reflected(v, self.mirrors.flip(0))  # the rows of Vᵀ H
        return _linear((self.u * self.weights(task)) @ v, self.bias, self.dtype)

    @staticmethod
    def count(m: int, n: int, tasks: int, reflections: int, width: int) -> int:
        """Numbers that are trained for a weight (m, n)."""
        r = min(m, n)
        return reflections * n + tasks * r + width * (n + r)


class LoraLinear(nn.Module):
    """A linear layer with a change of low rank: one for all text, or one for each task and none
    for other text."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        tasks: int | None,
        generator: torch.Generator,
        rank: int,
    ) -> None:
        super().__init__()
        self.task: int | None = None
        self.shared = tasks is None
        self.register_buffer("weight", weight.detach(), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.detach(), persistent=False)
        self.forms = nn.ModuleList(
            LowRank(self.weight, generator, rank) for _ in range(1 if tasks is None else tasks)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.changed(self.task), self.bias)

    def changed(self, task: int | None) -> Tensor:
        """(m, n) in the dtype of the weight."""
        if self.shared or task is not None:
            return self.forms[0 if self.shared else task]().to(self.weight.dtype)
        return self.weight

    @torch.no_grad()
    def merged(self, task: int | None) -> nn.Linear:
        return _linear(self.changed(task), self.bias, self.weight.dtype)


Adapter = MooreLinear | LoraLinear


class Adapted:
    """A model with adapters in place of some projections of its MLPs, beside the model itself,
    whose other tensors it shares.

    make(weight (m, n), bias or None) gives each adapter; projections: any of PROJECTIONS. Where a
    family holds gate and up in one layer, either name means both. Raises UserError for other names
    and for none that the model has, UnsupportedModelError as `read_mlps` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        make: Callable[[Tensor, Tensor | None], Adapter],
        projections: Sequence[str] = PROJECTIONS,
    ) -> None:
        self.model, self.twin = model, frozen_twin(model)
        self.adapters: dict[str, Adapter] = {}  # by the path of the layer they stand for
        for path, (module, layout) in located_mlps(self.twin).items():
            for name in _children(layout, projections):
                linear, place = getattr(module, name), f"{path}.{name}"
                self.adapters[place] = make(*read_linear(place, linear))
                setattr(module, name, self.adapters[place])
        if not self.adapters:
            raise UserError(f"the MLPs of this model have no {' or '.join(projections) or 'such'}.")
        self._begun = [p.detach().clone() for p in self.trained]

    @torch.no_grad()
    def reset(self) -> None:
        """Undo all training."""
        for parameter, begun in zip(self.trained, self._begun, strict=True):
            parameter.copy_(begun)

    def on(self, task: int | None) -> PreTrainedModel:
        """The model as it reads text of a task, or of none; it stays so until the next call."""
        for adapter in self.adapters.values():
            adapter.task = task
        return self.twin

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for adapter in self.adapters.values() for p in adapter.parameters()]

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum(p.numel() for p in self.trained)

    def merged(self, task: int | None) -> PreTrainedModel:
        """The model for one task with plain layers, in its own dtype; UserError where no plain
        layer computes what an adapter does."""
        made = frozen_twin(self.model)
        for place, adapter in self.adapters.items():
            made.set_submodule(place, adapter.merged(task))
        return made


def kinds_of(
    model: PreTrainedModel,
    tasks: int,
    seed: int,
    projections: Sequence[str],
    reflections: int,
    width: int,
) -> dict[str, Callable[[], Adapted]]:
    """What makes adapted models of each kind, by its name: MoORE, and LoRA of at least as many
    trained numbers (its rank is rounded up), one for all text or one for each task."""

    def moore() -> Adapted:
        drawn = torch.Generator().manual_seed(seed)
        return Adapted(
            model,
            lambda weight, bias: MooreLinear(weight, bias, tasks, drawn, reflections, width),
            projections,
        )

    def lora(own: int | None) -> Adapted:
        """own: how many tasks have one of their own."""
        drawn = torch.Generator().manual_seed(seed)

        def make(weight: Tensor, bias: Tensor | None) -> LoraLinear:
            wanted = MooreLinear.count(*weight.shape, tasks, reflections, width)
            rank = ceil(wanted / (sum(weight.shape) * (own or 1)))
            return LoraLinear(weight, bias, own, drawn, rank)

        return Adapted(model, make, projections)

    return {
        "MoORE": moore,
        "one LoRA": lambda: lora(None),
        "a LoRA per task": lambda: lora(tasks),
    }


def _children(layout: Layout, projections: Sequence[str]) -> list[str]:
    """Names of the layers that hold these projections, each once."""
    unknown = [name for name in projections if name not in PROJECTIONS]
    if unknown:
        raise UserError(f"no projection is called {unknown[0]!r:.60}: {', '.join(PROJECTIONS)}.")
    gate = layout.up if layout.fused else layout.gate
    named = {"gate": gate, "up": layout.up, "down": layout.down}
    return list(dict.fromkeys(named[name] for name in projections if named[name]))


def _linear(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> nn.Linear:
    m, n = weight.shape
    linear = nn.Linear(n, m, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
