"""How it works: the algebra in three steps, with numbers measured on the loaded model."""

from __future__ import annotations

from html import escape

from ..core.branched import branch_sizes
from ..core.schedule import branch_sparsities
from ..core.spec import ConversionSpec
from ..measure.contributions import Contributions, contributions
from ..measure.magnitudes import branched_mlps
from ..measure.notation import number
from .loaded import LoadedModel

OTHERS = ". These three steps are the published ones; your other choices under More are left out."
TOKENS = 64  # of the evaluation text


def lesson(loaded: LoadedModel, spec: ConversionSpec, layer: int) -> tuple[str, str, str, str]:
    """The strip of branches as HTML, then the texts of the three steps as Markdown: the stages as
    published, with B, fade, K and compensation of the spec."""
    other, spec = spec, published(spec)
    layer = min(layer, len(loaded.mlps) - 1)
    measured = contributions(
        loaded.model, layer, spec, loaded.text("stories").documents[0][:TOKENS]
    )
    return (
        strip(loaded, spec, "" if other == spec else OTHERS),
        split_step(loaded, spec, layer, measured),
        fade_step(loaded, spec, layer),
        keep_step(spec, layer, measured),
    )


def published(spec: ConversionSpec) -> ConversionSpec:
    """The spec with the paper's stages only."""
    compensation = spec.compensation if spec.compensation == "sqrt" else "none"
    return ConversionSpec(
        branches=spec.branches,
        fade=spec.fade,
        keep=spec.keep,
        compensation=compensation,
    )


def strip(loaded: LoadedModel, spec: ConversionSpec, note: str = "") -> str:
    """The neurons of one MLP as a row of branches: kept ones filled by what fade leaves."""
    sizes = branch_sizes(loaded.d_ff, spec.branches)
    cells = []
    for b, (size, sparsity) in enumerate(
        zip(sizes, branch_sparsities(spec.branches, spec.fade), strict=True)
    ):
        kept = b < spec.kept
        state = f"{100 * sparsity:.0f} % of gate and up zeroed" if kept else "dropped"
        cells.append(
            f'<span class="{"kept" if kept else "dropped"}" style="flex-grow:{size};'
            f'--left:{100 * (1 - sparsity):.0f}%" title="branch {b}: {size} neurons, {state}">'
            f"{b if spec.branches <= 32 else ''}</span>"
        )
    label = (
        f"{loaded.d_ff} neurons in {spec.branches} branches, {spec.kept} kept; "
        "fill: share of gate and up weights that stays"
    )
    return (
        f'<figure class="strip"><div role="img" aria-label="{escape(label)}">{"".join(cells)}</div>'
        f"<figcaption>{escape(label)}{escape(note)}</figcaption></figure>"
    )


def split_step(
    loaded: LoadedModel, spec: ConversionSpec, layer: int, measured: Contributions
) -> str:
    sizes = branch_sizes(loaded.d_ff, spec.branches)
    each = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[-1]} or {sizes[0]}"
    inner = r"\phi\left(W_{\text{gate}}^{(b)}x\right)\odot W_{\text{up}}^{(b)}x"
    if "gate" not in loaded.projections:
        inner = r"\phi\left(W_{\text{up}}^{(b)}x\right)"
    dtype = str(loaded.checked.dtype).removeprefix("torch.")
    return f"""### 1 · Split

$$\\mathrm{{MLP}}(x)=\\sum_{{b=0}}^{{B-1}}\\alpha_b\\,W_{{\\text{{down}}}}^{{(b)}}\\left[{inner}\\right]$$

The {loaded.d_ff} neurons of an MLP are cut into B = {spec.branches} branches of {each}. A neuron \
only meets its own row of the first matrices and its own column of the last one, so the branches \
add up to the whole MLP, as long as every α is 1.

**Measured** at layer {layer} on {measured.tokens} tokens: the sum of the {spec.branches} branches \
differs from the whole by at most **{number(measured.split_error, 2)}** of its largest value. That \
is {dtype} rounding, nothing else.
"""


def fade_step(loaded: LoadedModel, spec: ConversionSpec, layer: int) -> str:
    text = """### 2 · Fade

$$s_i=s\\cdot\\frac{i}{B}\\qquad\\text{branch }i:\\;\\;w\\mapsto 0\\;\\text{ if }\\;|w|\\le Q(s_i)$$

Fade zeroes the smallest weights of gate and up, more in later branches: Q is the quantile of the \
sizes |w| in that branch. Branch 0 and all of down stay as they are.
"""
    mlp = branched_mlps(loaded.converted(spec))[layer]
    if spec.fade and spec.kept == 1:
        return text + "\nOnly branch 0 is left now, and fade does not touch it.\n"
    if not mlp.fade_thresholds:
        return text + "\nFade is 0 now, so every weight stays. Move the slider and read on.\n"
    example = spec.kept // 2
    sparsity = branch_sparsities(spec.branches, spec.fade)[example]
    projection = loaded.projections[0]
    threshold = mlp.fade_thresholds[projection][example]
    zeros = loaded.zeros(spec)
    return f"""{text}
**Here** s = {spec.fade:.2f}, so branch {example} loses {spec.fade:.2f} · {example} / \
{spec.branches} = **{100 * sparsity:.1f} %**: all {projection} weights of layer {layer} up to \
|w| = **{number(threshold)}**. Over all kept branches {100 * zeros.requested:.2f} % was asked for \
and {100 * zeros.realised:.2f} % is zero. Fade alone saves no computation: the zeros stay in place \
and are multiplied like any other number.
"""


def keep_step(spec: ConversionSpec, layer: int, measured: Contributions) -> str:
    text = """### 3 · Keep K

$$\\alpha_b=\\begin{cases}\\sqrt{B/K}&b<K\\\\\\text{not run}&b\\ge K\\end{cases}$$

The first K branches stay, the others are neither stored nor run: this does save computation. The \
factor √(B/K) makes up for the lost size of the output, if branch outputs are uncorrelated and \
zero on average.
"""
    if spec.kept == spec.branches:
        return text + "\nAll branches are kept now, and α = 1. Lower K and read on.\n"
    size = f"**{100 * measured.kept_norm * measured.alpha:.0f} %**"
    scaled = f"; with α = {measured.alpha:.3f} it is {size}"
    if spec.compensation == "none":
        scaled = ", and compensation is off"
    return f"""{text}
**Measured** at layer {layer} on {measured.tokens} tokens: {spec.kept} of {spec.branches} branches \
reach **{100 * measured.kept_norm:.0f} %** of the size of the whole output{scaled}. But scaling \
cannot turn the output: the cosine between what is kept and the whole is \
**{measured.cosine:.2f}** (1 would be the same direction).
"""
