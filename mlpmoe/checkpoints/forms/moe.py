"""Routed models as stock Mixture-of-Experts checkpoints that transformers and servers know."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Glm4MoeForCausalLM, PreTrainedModel, Qwen2MoeForCausalLM

from ...core.conversion import twin_of
from ...core.routed import RoutedMLP
from .form import Form, FormError, block_note, other_tensors, skeleton_of
from .moe_needs import FLOAT16, Routing, needs_of, routing_of
from .moe_targets import MOE_FORMS, TARGETS, Target, dense_layer, obstacle

CARRIED = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range",
    "rms_norm_eps", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    "tie_word_embeddings", "attention_dropout", "rope_parameters",
)  # fmt: skip
# The largest score, in lengths of the router's row behind the norm before the MLP; 3 to 10 on
# trained models of 0.3 to 5 million parameters.
GUESSED_BOUND = 8.0
PIECE = 512  # tokens at a time


@torch.no_grad()
def moe_form(
    model: PreTrainedModel,
    name: str,
    score_bound: Sequence[float] | None = None,
    dtype: torch.dtype | None = None,
) -> Form:
    """A routed model as the architecture that `name`, one of MOE_FORMS, stands for.

    score_bound: what `score_bounds` found on a text; without it, the size of the router scores is
    guessed from the weights. dtype: of the files; None is that of the model. MLP weights are
    copied, all others are the model's own. Raises FormError, with the reason, for what the
    architecture cannot hold.
    """
    if name not in TARGETS:
        raise FormError(f"there is no form {name!r}; there are {', '.join(MOE_FORMS)}.")
    target, routing = TARGETS[name], routing_of(model)
    needs = needs_of(model, routing)
    if reason := obstacle(target, needs):
        raise FormError(reason)
    bounds = list(score_bound) if score_bound is not None else _guessed_bounds(model, routing)
    if len(bounds) != len(routing.mlps):
        raise FormError(f"score_bound needs {len(routing.mlps)} values, one per routed layer.")
    flatness, note = target.in_files(dtype or model.dtype)
    values = {key: copy.deepcopy(getattr(model.config, key)) for key in CARRIED}
    values |= target.config(routing, needs, model.config)
    skeleton = skeleton_of(target.model_class.config_class(**values), target.model_class)
    skeleton.to(model.dtype)
    tensors = other_tensors(model)
    for (path, mlp), bound in zip(routing.mlps.items(), bounds, strict=True):
        rows, bias = _router_of(mlp)
        scale = 2.0 ** -math.ceil(flatness + math.log2(bound)) if bound > 0 else 1.0
        layer = target.layer(routing, mlp, rows * scale, None if bias is None else bias * scale)
        tensors |= _in_layer(path, layer)
    for path, mlp in routing.dense.items():
        tensors |= _in_layer(path, dense_layer(mlp))
    _complete(skeleton, tensors, model)
    return Form(
        name,
        skeleton,
        tensors,
        target.exact,
        target.float32,
        tuple(_notes(target, routing, score_bound is None, model.dtype, note)),
    )


def _in_layer(path: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their full names. path: of the layer's MLP."""
    parent = path.rpartition(".")[0]
    return {f"{parent}.{name}": tensor for name, tensor in tensors.items()}


def possible_moe_forms(model: PreTrainedModel) -> dict[str, str | None]:
    """For each of MOE_FORMS: None, or the sentence that says why it cannot hold this model.
    Copies no weights."""
    try:
        routing = routing_of(model)
    except FormError as error:
        return dict.fromkeys(MOE_FORMS, str(error))
    needs = needs_of(model, routing)
    return {name: obstacle(target, needs) for name, target in TARGETS.items()}


@torch.no_grad()
def score_bounds(model: PreTrainedModel, ids: Tensor) -> list[float]:
    """The largest |router score| of each routed layer of a model on a text, as `moe_form` needs
    it: less the mean over the layer's experts, and without biases. ids: (..., tokens) int64.
    Raises FormError for a model without a MoE form."""
    twin = twin_of(model).eval()
    mlps = list(routing_of(twin).mlps.values())
    found = [0.0] * len(mlps)

    def watch(index: int, rows: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            scores = F.linear(args[0].float(), rows)  # (..., experts)
            found[index] = max(found[index], float(scores.abs().max()))

        return look

    for index, mlp in enumerate(mlps):
        mlp.register_forward_pre_hook(watch(index, _router_of(mlp)[0]))
    for piece in ids.flatten().to(model.device).split(PIECE):
        twin.get_decoder()(input_ids=piece[None], use_cache=False)
    return found


def _router_of(mlp: RoutedMLP) -> tuple[Tensor, Tensor | None]:
    """(experts, d_model) rows and (experts,) bias in float32, less their means: what all scores
    of a token have in common changes no choice, and flat weights need small scores. Zeros where
    every expert runs, whatever its score."""
    if mlp.active == mlp.experts:
        return mlp.gate.new_zeros(mlp.experts, mlp.gate.shape[1], dtype=torch.float32), None
    rows, bias = mlp.router.weight.detach().float(), mlp.router.bias
    bias = None if bias is None else bias.detach().float()
    return rows - rows.mean(0), None if bias is None else bias - bias.mean()


def _guessed_bounds(model: PreTrainedModel, routing: Routing) -> list[float]:
    bounds = []
    for path, mlp in routing.mlps.items():
        norm = model.get_submodule(path.rpartition(".")[0]).post_attention_layernorm
        lengths = (_router_of(mlp)[0] * norm.weight.detach().float()).norm(dim=1)
        bounds.append(GUESSED_BOUND * float(lengths.max()))
    return bounds


def _complete(
    skeleton: PreTrainedModel, tensors: dict[str, Tensor], model: PreTrainedModel
) -> None:
    """Add zeros for the biases after attention that only the target has; FormError unless all
    shapes and names are then those of the skeleton."""
    tied = skeleton.all_tied_weights_keys
    places = {n: t.shape for n, t in skeleton.state_dict().items() if n not in tied}
    for name, shape in places.items():
        if name.endswith("o_proj.bias") and name not in tensors:
            tensors[name] = torch.zeros(shape, dtype=model.dtype, device=model.device)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    if odd := sorted(found.items() ^ places.items()):
        raise FormError(f"{type(skeleton).__name__} does not fit this model at {odd[0][0]}.")


def _notes(
    target: Target, routing: Routing, guessed: bool, dtype: torch.dtype, note: str
) -> Iterator[str]:
    yield f"A {target.title} model with {routing.width} neurons per expert: {note}"
    if guessed and not target.exact:
        yield (
            "How large router scores get was guessed from the weights; measured on a text, fewer "
            "tokens would get another expert."
        )
    if routing.width > routing.size:
        yield f"Each expert is filled up with zeros, from {routing.size} neurons."
    if note := block_note(routing.width):
        yield f"Experts of {note}"
    if not routing.common and target.model_class in (Glm4MoeForCausalLM, Qwen2MoeForCausalLM):
        yield "Its shared expert is all zeros: this architecture has one even if nothing is shared."
    if dtype != torch.float32 and FLOAT16 not in target.holds:
        yield (
            "Its router works in 16 bits like the rest of the model, so a token can get another "
            "expert where scores are close."
        )
