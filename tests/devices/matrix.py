"""Every method on a real device, beside the same on the CPU in the same dtype.

    python -m tests.devices --device cuda                  # the whole matrix in bfloat16, minutes
    python -m tests.devices --device mps --dtype float32 --only neurons
    python -m tests.devices --device cpu                   # a trial run: both sides are the same

A line for each choice of every stage: the perplexity of what the CPU converts; by how much that
changes where the device runs it (moved), and where the device converts it from the beginning, with
its own look at the calibration text (made); and how often the likeliest next token is the same when
it is read token by token as when it is read at once: the forms of one token and of many, and the
kernels of the device, have to agree. Then checkpoints are written from the device, and verified on
it by another process. Ends with 1 where something is further off than rounding. Needs the library
alone; not a test, and not part of the suite.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mlpmoe import Calibration, ConversionSpec, compare, convert, export, load, named_text
from mlpmoe.checkpoints.forms.moe import MOE_FORMS
from mlpmoe.measure.quality.encoding import EncodedText, encode_text
from mlpmoe.measure.quality.perplexity import measure
from mlpmoe.measure.text.decoding import Reader
from mlpmoe.models import default_calibration, default_text
from tests.devices.cases import all_specs

# What may lie between two perplexities, as a part. Where tokens run, rounding lets some of them
# have other experts; where experts are made, it puts some neurons into others. That can matter:
# CMoE's router reads one neuron of each, and in bfloat16 the demo model has 11 % less perplexity
# by it than in float32.
MOVED = {"float32": 0.005, "bfloat16": 0.03, "float16": 0.015}
MADE = {"float32": 0.05, "bfloat16": 0.2, "float16": 0.1}
WRITTEN = 48  # tokens that are read at once, and written one by one
SAME = {"float32": 0.97, "bfloat16": 0.8, "float16": 0.9}  # of these, at least
EXPERTS = ConversionSpec(method="contiguous", experts=8, active=0.5)
FORMS = [
    (ConversionSpec(branches=8, fade=0.6), "dense"),
    (ConversionSpec(branches=8, fade=0.6), "branches"),
    (ConversionSpec(method="coactivation", experts=8, selection="threshold"), "branches"),
    (ConversionSpec(method="tokenclusters", experts=4), "branches"),
    *((EXPERTS, form) for form in MOE_FORMS),
]


@dataclass(frozen=True)
class Side:
    """A model on one device, and what it is given."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    calibration: Calibration
    text: EncodedText


@dataclass(frozen=True)
class Line:
    """What came of one spec."""

    perplexity: float  # on the CPU
    moved: float  # ratio to that, of the same conversion
    made: float  # of one that the device makes
    same: float  # share of the tokens
    seconds: float  # that converting and measuring took there

    def fits(self, dtype: str) -> bool:
        near = abs(self.moved - 1) <= MOVED[dtype] and abs(self.made - 1) <= MADE[dtype]
        return near and self.same >= SAME[dtype]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.devices", description=__doc__.splitlines()[0])
    parser.add_argument("--device", required=True, help="cuda, cuda:1, mps, cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=MOVED)
    parser.add_argument("--model", default="demo", help="a name, see python -m mlpmoe models")
    parser.add_argument("--tokens", type=int, default=4096, help="that perplexity is taken on")
    parser.add_argument("--calibration", type=int, default=4096, help="tokens that methods see")
    parser.add_argument("--only", default="", help="a part of the specs, such as cmoe")
    parser.add_argument("--no-forms", action="store_true", help="write no checkpoints")
    wish = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    here, there = side(wish, "cpu"), side(wish, wish.device)
    print(f"{wish.model} in {wish.dtype} on {there.model.device}, beside the CPU")
    print(f"torch {torch.__version__}, {device_name(there.model.device)}")
    specs = [spec for spec in all_specs() if wish.only in spec.to_flags()]
    off = list(matrix(here, there, [replace(EXPERTS, active=1.0), *specs], wish.dtype))
    if not wish.no_forms:
        off += [what for spec, form in FORMS if (what := not_repeated(there, spec, form))]
    print(
        f"{len(off)} of {len(specs)} specs and {len(FORMS)} checkpoints are off" + ":" * bool(off)
    )
    for what in off:
        print(f"    {what}")
    return int(bool(off))


def side(wish: argparse.Namespace, device: str) -> Side:
    model, tokenizer = load(wish.model, wish.dtype, device)
    seen = named_text(default_calibration(wish.model))
    text = encode_text(tokenizer, named_text(default_text(wish.model)))
    return Side(
        model, tokenizer, Calibration.from_text(tokenizer, seen, wish.calibration),
        beginning(text, wish.tokens),
    )  # fmt: skip


def beginning(text: EncodedText, tokens: int) -> EncodedText:
    """The first documents that hold so many tokens, the last one cut."""
    documents, sizes = [], []
    for document, size in zip(text.documents, text.sizes, strict=True):
        if tokens > 1:
            documents.append(document[:tokens])
            sizes.append(size[:tokens])
        tokens -= len(document)
    return EncodedText(tuple(documents), tuple(sizes), text.window)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def matrix(here: Side, there: Side, specs: Sequence[ConversionSpec], dtype: str) -> Iterator[str]:
    """Prints a line for each spec; the flags of those that failed, or are off."""
    print(f"{'CPU':>10} {'moved':>8} {'made':>8} {'same':>6} {'time':>7}")
    for spec in specs:
        try:
            line = measured(here, there, spec)
        except Exception:
            traceback.print_exc()
            yield f"{spec.to_flags()}: failed"
            continue
        fits = line.fits(dtype)
        print(
            f"{line.perplexity:10.3f} {line.moved - 1:+8.2%} {line.made - 1:+8.2%} "
            f"{line.same:6.0%} {line.seconds:6.1f}s  {'' if fits else 'OFF '}{spec.to_flags()}",
            flush=True,
        )
        if not fits:
            yield spec.to_flags()


def measured(here: Side, there: Side, spec: ConversionSpec) -> Line:
    reference = convert(here.model, spec, here.calibration)
    expected = measure(reference, here.text)
    # a copy: it shares tensors with the dense model, which has to stay
    moved = measure(copy.deepcopy(reference).to(there.model.device), there.text)
    began = perf_counter()
    converted = convert(there.model, spec, there.calibration)
    made = measure(converted, there.text)
    seconds = perf_counter() - began
    ids = there.text.documents[0][:WRITTEN].to(there.model.device)
    ratios = (compare(expected, found).ratio for found in (moved, made))
    return Line(expected.value, *ratios, same_tokens(converted, ids), seconds)


@torch.inference_mode()
def same_tokens(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """How often the likeliest token after each of `ids` is the same, read one by one with a cache
    (compiled, or as a graph) and read together."""
    together = model(ids[None], use_cache=False).logits[0].argmax(-1)
    reader = Reader(model, len(ids))
    alone = [reader.read(ids[None, n : n + 1])[0].argmax(-1) for n in range(len(ids))]
    return float((torch.stack(alone).to(together) == together).float().mean())


def not_repeated(there: Side, spec: ConversionSpec, form: str) -> str | None:
    """Writes a checkpoint and prints how well it is repeated; what is off, if it is."""
    text = EncodedText(there.text.documents[:1], there.text.sizes[:1])
    with tempfile.TemporaryDirectory() as room:
        try:
            converted = convert(there.model, spec, there.calibration)
            found = export(
                converted, f"{room}/out", tokenizer=there.tokenizer, text=text, form=form
            ).verification
        except Exception as error:
            print(f"checkpoint {form}: {error}")
            return f"checkpoint {form} of {spec.to_flags()}: {error}"
    print(
        f"checkpoint {form:12} {found.argmax_agreement:6.0%} same, perplexity "
        f"{found.perplexity:.3f} and {found.reloaded_perplexity:.3f}  {spec.to_flags()}",
        flush=True,
    )
    return None
