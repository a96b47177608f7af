"""A language model of a stock family whose MLPs are cut into branches, or of which each token
chooses experts, neurons, inputs or directions.

Made by mlpmoe, and needed to open the checkpoint beside it:

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Imports torch and transformers only; reads no other file and runs nothing while it is imported.
Attention, norms, embeddings and generation are the stock family's; each entry of `mlps` in
config.json says what stands in the place of one MLP:

    path             of the MLP in the model
    kind             a name in KINDS, which lists the classes below

and, unless the kind is "lowrank",

    d_model          width of input and output
    gated            whether there is a gate: down(act(gate x) * up x), else down(act(up x))
    biases           which of gate, up and down have one
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig as BaseConfig
from transformers import LlamaForCausalLM as BaseModel

ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "gelu_impl")  # in the MLPs of the families


class MLPMoEConfig(BaseConfig):
    """The config of the base family, and the MLPs."""

    # Unknown to transformers on purpose: opened as the base family, the checkpoint would get
    # random MLPs instead of an error.
    model_type = f"mlpmoe_{BaseConfig.model_type}"

    mlps: list[dict] | None = None  # one entry per layer


class BranchedMLP(nn.Module):
    """Branches that run for every token, each times its α: Σ_b α_b · branch_b(x).

    A branch is a slice of the neurons, so one product per matrix computes all of them.
    Entry: sizes, the neurons of each branch.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__()
        self.sizes = mlp["sizes"]
        d_model, d_ff, biases = mlp["d_model"], sum(self.sizes), mlp["biases"]
        self.gate_proj = nn.Linear(d_model, d_ff, bias="gate" in biases) if mlp["gated"] else None
        self.up_proj = nn.Linear(d_model, d_ff, bias="up" in biases)
        self.down_proj = nn.Linear(d_ff, d_model, bias="down" in biases)
        self.act_fn = act_fn
        self.alpha = nn.Parameter(torch.ones(len(self.sizes)))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        h = self.up_proj(x)  # (..., d_ff)
        h = self.act_fn(h) if self.gate_proj is None else self.act_fn(self.gate_proj(x)) * h
        sizes = torch.tensor(self.sizes, device=x.device)
        alpha = self.alpha.repeat_interleave(sizes, output_size=sum(self.sizes))  # (d_ff,)
        y = self.down_proj(h * alpha)
        return y if residual is None else y + residual


class NeuronRows(nn.Module):
    """The neurons of an MLP as rows of three matrices, down transposed.

    Neurons that do not run count with their mean, where there is one: h - idle_mean is summed
    over those that run, and the sum of the means is part of the bias of down.
    Entry: d_ff; idle_mean, whether there is one.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__()
        d_model, d_ff = mlp["d_model"], mlp["d_ff"]
        for name in ("gate", "up", "down") if mlp["gated"] else ("up", "down"):
            width = d_model if name == "down" else d_ff
            bias = nn.Parameter(torch.empty(width)) if name in mlp["biases"] else None
            self.register_parameter(name, nn.Parameter(torch.empty(d_ff, d_model)))
            self.register_parameter(f"{name}_bias", bias)
        self.register_buffer("idle_mean", torch.empty(d_ff) if mlp["idle_mean"] else None)
        self.gated, self.act_fn = mlp["gated"], act_fn
        self.active, self.threshold = mlp.get("active"), mlp.get("threshold")

    def project(self, name: str, x: Tensor, rows: slice) -> Tensor:
        """(tokens, rows): gate or up of some neurons."""
        bias = getattr(self, f"{name}_bias")
        return F.linear(x, getattr(self, name)[rows], None if bias is None else bias[rows])

    def first(self, x: Tensor, rows: slice) -> Tensor:
        """(tokens, rows): the activation function of gate, or of up where there is no gate."""
        return self.act_fn(self.project("gate" if self.gated else "up", x, rows))

    def activations(self, first: Tensor, x: Tensor, rows: slice) -> Tensor:
        """(tokens, rows): h of some neurons, less its mean when idle."""
        h = first * self.project("up", x, rows) if self.gated else first
        return h if self.idle_mean is None else h - self.idle_mean[rows]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.run(x.reshape(-1, x.shape[-1]))
        y = (y if self.down_bias is None else y + self.down_bias).view_as(x)
        return y if residual is None else y + residual


class RoutedMLP(NeuronRows):
    """Shared neurons run for every token, experts for the tokens that choose them.

    A chosen expert counts exactly 1. The first rows are shared, then come the experts, all of one
    size. Entry: shared, experts, size; router; active, the number of experts chosen, or threshold,
    the score above which an expert is chosen. Without a router all experts run.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__(mlp, act_fn)
        self.shared, self.experts, self.size = mlp["shared"], mlp["experts"], mlp["size"]
        router, shape = mlp["router"], (self.experts, mlp["d_model"])
        self.router = router and ROUTERS[router["kind"]](router, *shape, act_fn)

    def select(self, x: Tensor) -> Tensor:
        """(tokens, experts) bool: which experts each token runs. Of equal scores, those of lower
        index count."""
        if self.router is None:
            return x.new_ones(len(x), self.experts, dtype=torch.bool)
        scores = self.router(x.float())
        if self.threshold is not None:
            return scores > self.threshold
        best = scores.argsort(dim=-1, descending=True, stable=True)[:, : self.active]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)

    def run(self, x: Tensor) -> Tensor:
        chosen = self.select(x)
        y = self.output(x, slice(0, self.shared))
        for expert in chosen.any(0).nonzero().flatten().tolist():
            tokens = chosen[:, expert].nonzero().flatten()
            start = self.shared + expert * self.size
            piece = self.output(x[tokens], slice(start, start + self.size))
            y = y.index_add(0, tokens, piece)
        return y

    def output(self, x: Tensor, rows: slice) -> Tensor:
        """(tokens, d_model): what some neurons add to the output."""
        return self.activations(self.first(x, rows), x, rows) @ self.down[rows]


class ClusterMLP(NeuronRows):
    """Overlapping experts, of which each token runs the one of the highest score.

    Entry: experts, size; router. members has the rows of each expert.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__(mlp, act_fn)
        shape = mlp["experts"], mlp["size"]
        self.register_buffer("members", torch.empty(shape, dtype=torch.long))
        router = mlp["router"]
        self.router = ROUTERS[router["kind"]](router, mlp["experts"], mlp["d_model"], act_fn)

    def run(self, x: Tensor) -> Tensor:
        expert, y = self.router(x.float()).argmax(-1), torch.zeros_like(x)
        for number in expert.unique().tolist():
            tokens, rows = (expert == number).nonzero().flatten(), self.members[number]
            piece = self.activations(self.first(x[tokens], rows), x[tokens], rows)
            y = y.index_add(0, tokens, piece @ self.down[rows])
        return y


class LinearRouter(nn.Module):
    """Scores x Wᵀ + b in float32; with `normalise`, of x scaled to length 1."""

    def __init__(self, router: dict, experts: int, d_model: int, act_fn) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, d_model))
        bias = nn.Parameter(torch.empty(experts)) if router["bias"] else None
        self.register_parameter("bias", bias)
        self.normalise = router["normalise"]

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) if self.normalise else x
        return F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())


class RepresentativeRouter(nn.Module):
    """One neuron stands for each expert; scores are the softmax of |h| (CMoE), in float32."""

    def __init__(self, router: dict, experts: int, d_model: int, act_fn) -> None:
        super().__init__()
        self.gated = router["gated"]
        # not as a child: what it may have learnt is the MLP's, and saved once
        object.__setattr__(self, "act_fn", act_fn)
        for name in ("gate", "up") if self.gated else ("up",):
            bias = nn.Parameter(torch.empty(experts)) if name in router["biases"] else None
            self.register_parameter(name, nn.Parameter(torch.empty(experts, d_model)))
            self.register_parameter(f"{name}_bias", bias)

    def project(self, name: str, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias")
        return F.linear(x, getattr(self, name).float(), None if bias is None else bias.float())

    def forward(self, x: Tensor) -> Tensor:
        h = self.project("up", x)
        h = self.act_fn(self.project("gate", x)) * h if self.gated else self.act_fn(h)
        return h.abs().softmax(-1)


def highest(values: Tensor, importance: Tensor | None, active, threshold, among=None) -> Tensor:
    """Bool like values: the largest of each token, times their importance, or all above the
    threshold; with `among`, of those for which it holds."""
    scores = values.abs() if importance is None else values.abs() * importance
    scores = scores if among is None else torch.where(among, scores, -1.0)
    if threshold is not None:
        return scores > threshold
    best = scores.topk(active, dim=-1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


class NeuronMLP(NeuronRows):
    """The gate, computed in full, chooses single neurons by |act(gate x)|, times their importance
    where there is one. All run, and what is not chosen is masked.

    Entry: importance, whether there is one; active, the number of neurons chosen, or threshold.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__(mlp, act_fn)
        self.register_buffer("importance", torch.empty(mlp["d_ff"]) if mlp["importance"] else None)

    def run(self, x: Tensor) -> Tensor:
        every = slice(None)
        first = self.first(x, every)
        chosen = highest(first, self.importance, self.active, self.threshold)
        return (self.activations(first, x, every) * chosen) @ self.down


class InputMLP(NeuronRows):
    """Gate and up read some entries of x, or, if it opens, up all of x for some neurons by their
    act(gate x); down reads some neurons. All run, and what is not chosen is masked.

    Entry: opens; importance, whether there are factors on the sizes; active, the numbers chosen as
    inputs, opened and read, or thresholds for each.
    """

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__(mlp, act_fn)
        self.opens, self.thresholds = mlp["opens"], mlp["thresholds"] or {}
        for name, size in (("input_importance", mlp["d_model"]), ("importance", mlp["d_ff"])):
            self.register_buffer(name, torch.empty(size) if mlp["importance"] else None)

    def run(self, x: Tensor) -> Tensor:
        def choose(stage, values, importance, among=None):
            limits = self.active[stage], self.thresholds.get(stage)
            return highest(values, importance, *limits, among)

        some, every = x * choose("inputs", x, self.input_importance), slice(None)
        first = self.first(some, every)
        h = first * self.project("up", x if self.opens else some, every) if self.gated else first
        opened = choose("opened", first, self.importance) if self.opens else None
        read = choose("read", h, self.importance, opened)
        return ((h if self.idle_mean is None else h - self.idle_mean) * read) @ self.down


class Factors(nn.Module):
    """A matrix as a sum of rank-one directions, of which the `kept` largest count for a token.

    Entry: inputs, outputs, directions, kept; offset and bias, whether there are any.
    """

    def __init__(self, entry: dict) -> None:
        super().__init__()
        directions, outputs = entry["directions"], entry["outputs"]
        self.first = nn.Parameter(torch.empty(directions, entry["inputs"]))
        self.second = nn.Parameter(torch.empty(directions, outputs))
        for name, size in (("offset", directions), ("bias", outputs)):
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if entry[name] else None)
        self.kept = entry["kept"]

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.first, self.offset)
        if self.kept < len(self.first):
            z = z * highest(z, None, self.kept, None)
        y = z @ self.second
        return y if self.bias is None else y + self.bias


class LowRankMLP(nn.Module):
    """An MLP of such matrices. Entry: gate, where there is one, up and down."""

    def __init__(self, mlp: dict, act_fn) -> None:
        super().__init__()
        self.gate = Factors(mlp["gate"]) if "gate" in mlp else None
        self.up, self.down, self.act_fn = Factors(mlp["up"]), Factors(mlp["down"]), act_fn

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = self.up(flat)
        h = self.act_fn(h) if self.gate is None else self.act_fn(self.gate(flat)) * h
        y = self.down(h).view_as(x)
        return y if residual is None else y + residual


ROUTERS = {"linear": LinearRouter, "representative": RepresentativeRouter}
KINDS = {
    "branched": BranchedMLP, "routed": RoutedMLP, "clusters": ClusterMLP, "neurons": NeuronMLP,
    "inputs": InputMLP, "lowrank": LowRankMLP,
}  # fmt: skip


class MLPMoEForCausalLM(BaseModel):
    """The base model with each MLP of `config.mlps` replaced; its activation function stays."""

    config_class = MLPMoEConfig
    # A router rounded to 16 bits would choose other experts.
    _keep_in_fp32_modules_strict = (
        *(BaseModel._keep_in_fp32_modules_strict or ()),
        "router",
        "importance",
        "input_importance",
    )

    def __init__(self, config: MLPMoEConfig) -> None:
        super().__init__(config)
        for mlp in config.mlps:
            old = self.get_submodule(mlp["path"])
            named = (getattr(old, name, None) for name in ACTIVATION_NAMES)
            act_fn = next((found for found in named if callable(found)), F.silu)
            self.set_submodule(mlp["path"], KINDS[mlp["kind"]](mlp, act_fn))


MLPMoEConfig.register_for_auto_class()
MLPMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
