"""What emits the neuron masks of all layers while they are trained (ToMoE, arXiv 2501.15316)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE, EMBEDDING = 32, 128  # numbers per layer and expert


class MaskGenerator(nn.Module):
    """Logits of the masks of all layers, from noise that stays as it was drawn.

    A bidirectional GRU reads the noise along the layers, for each expert alone, and gives an
    embedding per layer and expert; of that, LayerNorm, GELU and a matrix per layer make one logit
    per neuron. So layers and experts share what they learn, and a neuron's logits in all experts
    of a layer come from one row.

    starts: per layer (experts, d_ff) float32: the logits before training. random: draws the rest,
    on the CPU. `forward`: logits like `starts`.
    """

    def __init__(self, starts: Sequence[Tensor], random: torch.Generator) -> None:
        super().__init__()
        most = max(len(start) for start in starts)
        noise = torch.randn(len(starts), most, NOISE, generator=random)
        self.register_buffer("noise", noise, persistent=False)
        # on no device at first: its own start would draw from the generator that everybody shares
        gru = nn.GRU(NOISE, EMBEDDING // 2, bidirectional=True, device="meta")
        self.embed = gru.to_empty(device="cpu")
        self.norms = nn.ModuleList(nn.LayerNorm(EMBEDDING) for _ in starts)
        self.decoders = nn.ParameterList(torch.empty(s.shape[1], EMBEDDING) for s in starts)
        with torch.no_grad():
            for parameter in self.embed.parameters():
                _fill(parameter, (EMBEDDING // 2) ** -0.5, random)
            for parameter in self.decoders:
                _fill(parameter, EMBEDDING**-0.5, random)
        self.to(starts[0].device)
        with torch.no_grad():  # a start less what is emitted at first
            for layer, (start, drawn) in enumerate(zip(starts, self._emitted(), strict=True)):
                self.register_buffer(f"given_{layer}", start - drawn, persistent=False)

    def forward(self) -> list[Tensor]:
        return [getattr(self, f"given_{n}") + own for n, own in enumerate(self._emitted())]

    def _emitted(self) -> list[Tensor]:
        embedded, _ = self.embed(self.noise)  # (layers, experts, EMBEDDING)
        emitted = []
        for one, norm, decoder in zip(embedded, self.norms, self.decoders, strict=True):
            emitted.append(F.gelu(norm(one)) @ decoder.T)
        return emitted


def _fill(parameter: Tensor, reach: float, random: torch.Generator) -> None:
    """Evenly from -reach to reach."""
    parameter.copy_((2 * torch.rand(parameter.shape, generator=random) - 1) * reach)
