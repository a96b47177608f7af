"""Losses from logits in pieces, against the cross entropy of the logits of the whole model."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, LlamaModel
from transformers.modeling_outputs import CausalLMOutput

from mlpmoe.core.conversion import convert
from mlpmoe.core.errors import UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality import head
from mlpmoe.measure.quality.head import token_losses
from tests.families import REFUSED_FAMILIES, VOCABULARY, build
from tests.tiny import tiny_model

STATIC = ConversionSpec(branches=4, fade=0.9, keep=3)
ROUTED = ConversionSpec(method="contiguous", active=0.5)
ROWS = 7  # positions whose logits are taken at a time


@pytest.fixture(autouse=True)
def pieces(monkeypatch):
    """Several pieces to a window, and no class of models known already."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", ROWS * VOCABULARY + 5)
    monkeypatch.setattr(head, "_splits", {})


def some_ids(tokens, vocabulary=VOCABULARY):
    return torch.randint(2, vocabulary, (tokens,), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def whole_losses(model, ids, first):
    logits = model(ids[None]).logits[0, first - 1 : -1].double()
    return F.cross_entropy(logits, ids[first:], reduction="none")


def rows_of_head(model, ids, first):
    """How many positions the head was given in each call, once its class is known."""
    token_losses(model, ids, first)
    rows = []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: rows.append(logits.shape[-2])
    )
    token_losses(model, ids, first)
    hook.remove()
    return rows


def check(model, ids, first):
    found = token_losses(model, ids, first)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(whole_losses(model, ids, first).tolist(), abs=2e-5)


# Families ----------------------------------------------------------------------------------

# what a family does to its logits is made to matter
FAMILIES = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3_text": {"final_logit_softcapping": 3.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "nanochat": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {},
    "falcon": {},
    "bloom": {},
    "mpt": {},
    "phi3": {},
    "lfm2": {},
}


@pytest.mark.parametrize("spec", [None, STATIC, ROUTED], ids=["dense", "static", "routed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_whole_logits(family, spec):
    model = build(family, **FAMILIES[family])
    if spec:
        model = convert(model, spec)
    ids = some_ids(40)
    for first in (1, 13, 39):
        check(model, ids, first)
        scored = len(ids) - first
        rows = rows_of_head(model, ids, first)
        assert rows == [ROWS] * (scored // ROWS) + [scored % ROWS] * (scored % ROWS > 0)


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_logits_of_these_families_are_scaled_or_capped(family):
    """Else the test above would say nothing about them."""
    plain, changed = build(family), build(family, **FAMILIES[family])
    ids = some_ids(40)
    assert not torch.allclose(whole_losses(plain, ids, 1), whole_losses(changed, ids, 1), atol=0.1)


def test_one_class_with_several_configurations():
    """A class is known by its code; what its configuration says still counts for each model."""
    for cap in (None, 2.0, 5.0):
        check(build("gemma2", final_logit_softcapping=cap), some_ids(40), 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits(dtype):
    """Rounded logits, but losses in float32; in pieces as well."""
    model, ids = build("llama", dtype), some_ids(40)
    found = token_losses(model, ids, 5)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(whole_losses(model, ids, 5).tolist(), abs=0.05)
    assert max(rows_of_head(model, ids, 5)) == ROWS


# Other classes -----------------------------------------------------------------------------


class Own(LlamaForCausalLM):
    """As Llama, for tests that add to it; each class is proved by itself."""

    @classmethod
    def tiny(cls):
        model = tiny_model(vocab_size=VOCABULARY)
        model.__class__ = cls
        return model


class Shifted(Own):
    """Adds to the logits what depends on nothing else."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.arange(VOCABULARY) / 20
        return output


class Copying(Own):
    """After the head, the token that was read becomes likelier."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.logits = output.logits + 3 * F.one_hot(input_ids, VOCABULARY)
        return output


class Mixing(Own):
    """After the head, every position sees the logits of the one before it."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        before = F.pad(output.logits, (0, 0, 1, 0))[:, :-1]
        output.logits = output.logits + before / 2
        return output


class WithoutBase(Own):
    """`base_model` is the model itself."""

    base_model_prefix = ""


class Elsewhere(Own):
    """`base_model` is something else than what the head reads."""

    base_model_prefix = "other"

    @classmethod
    def tiny(cls):
        model = super().tiny()
        model.other = tiny_model(vocab_size=VOCABULARY, num_hidden_layers=1).model
        return model


class OwnDecoder(LlamaModel):
    def forward(self, input_ids):
        return super().forward(input_ids, use_cache=False)


class WithoutCache(Own):
    """`base_model` does not know the argument use_cache."""

    @classmethod
    def tiny(cls):
        model = super().tiny()
        model.model.__class__ = OwnDecoder
        return model

    def forward(self, input_ids, use_cache=None):
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids).last_hidden_state))


@pytest.mark.parametrize(
    ("kind", "apart"),
    [(Own, True), (Shifted, True), (Copying, False), (Mixing, False), (WithoutBase, False),
     (Elsewhere, False), (WithoutCache, False)],
)  # fmt: skip
def test_what_cannot_be_taken_apart_is_taken_whole(kind, apart):
    model, ids = kind.tiny(), some_ids(40)
    for first in (1, 13):
        check(model, ids, first)
    assert max(rows_of_head(model, ids, 5)) == (ROWS if apart else len(ids))


def test_a_family_whose_head_reads_a_part_of_the_decoder():
    model = build(REFUSED_FAMILIES["opt"].family)
    check(model, some_ids(40), 5)


def test_a_forward_that_was_replaced_is_called():
    """As accelerate does where a model is spread over devices; its class is proved already."""
    model, ids = Own.tiny(), some_ids(40)
    check(model, ids, 5)
    forward = model.forward

    def hooked(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = hooked
    check(model, ids, 5)


@pytest.mark.parametrize(("kind", "apart"), [(Own, True), (Copying, False)])
def test_a_broken_model_proves_nothing_about_its_class(kind, apart):
    broken, model, ids = kind.tiny(), kind.tiny(), some_ids(40)
    with torch.no_grad():
        broken.model.norm.weight[0] = torch.nan
    assert token_losses(broken, ids, 5).isnan().all()
    check(model, ids, 5)
    assert max(rows_of_head(model, ids, 5)) == (ROWS if apart else len(ids))


# Memory ------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_memory_does_not_grow_with_window_and_vocabulary(family, monkeypatch):
    vocabulary = 2**18
    model = build(
        family, vocab_size=vocabulary, hidden_size=8, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4, max_position_embeddings=256,
    )  # fmt: skip
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", 2**24)
    ids = some_ids(256, vocabulary)
    with Largest() as largest:
        losses = token_losses(model, ids, 1)
    assert len(losses) == 255
    assert largest.numbers <= 2**24 < 255 * vocabulary / 3
    assert losses[-5:].tolist() == pytest.approx(whole_losses(model, ids, 251).tolist(), abs=2e-5)


@torch.no_grad()
def test_what_float16_has_no_numbers_for_is_said_with_what_has():
    """The weights are finite in float16; what comes of them is not."""
    model = tiny_model()
    for layer in model.model.layers:
        for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            matrix.weight *= 60
    ids = some_ids(12, model.config.vocab_size)
    assert token_losses(model, ids, 1).isfinite().all()
    half = model.half()
    assert all(p.isfinite().all() for p in half.parameters())
    with pytest.raises(UserError, match="load it in bfloat16 or float32"):
        token_losses(half, ids, 1)
    assert token_losses(half.bfloat16(), ids, 1).isfinite().all()
