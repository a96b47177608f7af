"""Reading: one MLP of the dense model with what it reads for the first words of a story."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.calibration import Calibration
from ....core.conversion import convert_mlp, observe
from ....core.mlps import MLPWeights
from ....core.spec import ConversionSpec
from ....core.static.branched import BranchedMLP, LoopedMLP
from ....models import default_text
from ...server.loaded import LoadedModel

TOKENS = 64  # of the evaluation text, the beginning of the text included


@dataclass(frozen=True, eq=False)
class Reading:
    """One MLP and its input. Tokens that are not text, like the one that begins a text, are left
    out: models park large numbers there, which would drown all words."""

    layer: int
    weights: MLPWeights  # without the bias of down, which belongs to no branch
    x: Tensor  # (tokens, d_model)
    words: tuple[str, ...]  # one per token

    @property
    def dtype(self) -> str:
        return str(self.x.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def whole(self) -> Tensor:
        """(tokens, d_model) float32: what the whole MLP says."""
        return BranchedMLP(self.weights, (self.weights.d_ff,))(self.x).float()

    @torch.inference_mode()
    def activity(self) -> Tensor:
        """(d_ff,) float32: how strongly each neuron fires, in the mean over the tokens."""
        weights = self.weights
        h = F.linear(self.x, weights.up, weights.up_bias)  # (tokens, d_ff)
        if weights.gate is None:
            h = weights.activation(h)
        else:
            h = weights.activation(F.linear(self.x, weights.gate, weights.gate_bias)) * h
        return h.float().abs().mean(0).cpu()

    @torch.inference_mode()
    def looped(self, branches: int, order: str = "contiguous") -> tuple[Tensor, Tensor]:
        """What each branch says, (B, tokens, d_model) float32, and their sum by the paper's loop,
        which rounds to the model's dtype after every branch. SpecError if B exceeds d_ff."""
        spec = ConversionSpec(branches=branches, order=order)
        spec.check_fits(self.weights.d_ff)
        loop = LoopedMLP(convert_mlp(self.weights, spec))
        said = torch.stack([loop.branch(b, self.x) for b in range(branches)])
        return said.float(), loop(self.x).float()


def read_layers(loaded: LoadedModel) -> list[Reading]:
    """All MLPs of a model with their input, from one pass over TOKENS tokens."""
    ids = loaded.text(default_text(loaded.key)).documents[0][:TOKENS]
    special = torch.tensor(sorted(loaded.tokenizer.all_special_ids), dtype=ids.dtype)
    is_text = ~torch.isin(ids, special)
    words = tuple(_word(loaded, token) for token in ids[is_text].tolist())
    with loaded.turns.turn(long=True):
        observed = observe(loaded.model, Calibration(ids[None]))
    return [
        Reading(
            layer,
            replace(seen.weights, down_bias=None, adds_residual=False),
            seen.x[0, is_text.to(seen.x.device)],
            words,
        )
        for layer, seen in enumerate(observed.layers)
    ]


def _word(loaded: LoadedModel, token: int) -> str:
    text = loaded.tokenizer.decode([token])
    return text.replace("\n", "↵").strip() or "␣"


def relative_error(given: Tensor, whole: Tensor) -> float:
    """Size of the difference over size of the whole, over all tokens."""
    return float((given - whole).norm() / whole.norm())
