"""The arguments that several commands take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from ..checkpoints.check.record import read_spec_file
from ..core.calibration import MAX_TOKENS, MIN_SAMPLES, SAMPLE_TOKENS
from ..core.choices import REGISTRIES
from ..core.errors import UserError
from ..core.spec import ConversionSpec
from ..core.static.compensation import FILLS
from ..core.written import SPARSITY, flag_of
from ..measure.quality.encoding import PROTOCOLS
from ..models import CALIBRATIONS, TEXTS, recovery_folder
from .terminal import TrainingProgress

MODEL_HELP = (
    "short name, hub id, folder, or a GGUF file: its path, or owner/name/FILE.gguf on the hub"
)
# field -> its placeholder, and what a person needs to know beside the name; the names of choices
# are those of the registries
SPEC_FLAGS = {
    "method": ("NAME", "method of conversion: {choices}"),
    "branches": ("B", "branches per MLP"),
    "order": ("NAME", "which neurons come first: {choices}"),
    "fade": (
        "S",
        "Fractal Fade strength: branch i loses its smallest min(1, S·i/B) of gate and up",
    ),
    SPARSITY: (
        "P",
        "share of the weights that fade zeroes in the matrices it works on, in the mean over the "
        "branches, in place of --fade",
    ),
    "fade_schedule": ("NAME", "how branches share the zeros: {choices}"),
    "fade_exponent": ("P", "of a schedule that takes one, such as power"),
    "fade_projections": ("NAMES", "matrices that fade zeroes, such as gate-up-down"),
    "fade_score": ("NAME", "which weights go first: {choices}"),
    "fade_unit": ("UNIT", "what goes: {choices}, or n:m such as 2:4"),
    "keep": ("K", "only the first K branches stay"),
    "allocation": ("NAME", "K or fade per layer: {choices}"),
    "compensation": ("NAME", "static: {choices}; sqrt is √(B/K). Routed: {fills}"),
    "experts": ("N", "experts per MLP, shared ones included"),
    "active": ("SHARE", "routed: share of the neurons that run for a token; inputs: of compute"),
    "shared": ("SHARE", "share of the neurons that always run, or auto (expertweaver)"),
    "router": ("NAME", "what scores experts, neurons (gate, gate-norm) or inputs: {choices}"),
    "selection": ("NAME", "which scores win: {choices}"),
    "profile": ("NAME", "gate activations that expertweaver averages: {choices}"),
    "tau": ("T", "coefficient of variation of a specialised neuron (expertweaver)"),
    "spared": ("LAYERS", "layers kept dense, numbered from 0, such as 0,11 (in a sweep 0+11)"),
    "progressive": ("BOOL", "calibrate each layer on the converted layers before it"),
    "seed": ("N", "of what a method draws, and of the order of the text in training"),
    "recover": ("WHAT", "what is trained a little after the conversion: {choices}"),
    "recover_steps": ("N", "steps of that training, of 512 tokens each"),
    "recover_rate": ("RATE", "its largest learning rate"),
}
SPEC_NAMES = (*(field.name for field in fields(ConversionSpec)), SPARSITY)


def add_texts(parser: argparse.ArgumentParser) -> None:
    """What is measured on, and what methods may look at."""
    parser.add_argument(
        "--text",
        "--evaluation",
        metavar="TEXT",
        help=f"a file, UTF-8, or a name: {', '.join(TEXTS)} (default: stories for the demo model, "
        "prose for others). A name wins; write a file that is called like one with its folder, "
        "./c4. wikitext2 and c4 need a network once",
    )
    parser.add_argument(
        "--calibration",
        metavar="TEXT",
        help=f"text that methods may look at: a file, UTF-8, or {' or '.join(CALIBRATIONS)}, "
        "other text than --text has under these names (default: stories for the demo model, prose "
        "for others)",
    )
    parser.add_argument(
        "--nsamples",
        type=at_least(MIN_SAMPLES),
        metavar="N",
        help=f"calibration samples, from the beginning of the text (default: {MAX_TOKENS:,} "
        "tokens' worth, or the whole text)",
    )
    parser.add_argument(
        "--seqlen",
        type=at_least(2),
        default=SAMPLE_TOKENS,
        metavar="L",
        help="tokens per calibration sample (default: %(default)s)",
    )
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="documents: each document is scored by itself, in as many windows as it needs; "
        "stream: all is joined and cut into full windows without overlap, as most published "
        "figures are taken (default: documents; stream for wikitext2 and c4)",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens per window (default: 1024, or 2048 for a stream, or the model's context if "
        "shorter)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from window to window, at most a window (default: a window, no overlap)",
    )


def add_setting(parser: argparse.ArgumentParser) -> None:
    """What is measured on what, and where."""
    add_texts(parser)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16, ...")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")


def add_spec(parser: argparse.ArgumentParser, file: bool = True) -> None:
    """A flag for each field of ConversionSpec, which reads and checks the values itself, and one
    for a file that holds a spec."""
    group = parser.add_argument_group("conversion")
    if file:
        group.add_argument(
            "--spec-file",
            type=Path,
            metavar="FILE",
            help="conversion.json of a checkpoint, or JSON with fields of the spec; flags win",
        )
    unset = {"keep": "all", SPARSITY: "as --fade says", "recover_rate": "by what is trained"}
    defaults = {field.name: field.default for field in fields(ConversionSpec)}
    for name in SPEC_NAMES:
        default = defaults.get(name)
        default = unset.get(name, "the method's") if default is None else default
        placeholder, meaning = SPEC_FLAGS.get(name, ("VALUE", name))
        known = ", ".join(REGISTRIES.get(name, ()))
        meaning = meaning.format(choices=known, fills=", ".join(FILLS))
        group.add_argument(
            f"--{flag_of(name)}",
            default=argparse.SUPPRESS,
            metavar=placeholder,
            help=f"{meaning} (default: {default})",
        )


def read_spec(arguments: argparse.Namespace) -> ConversionSpec:
    """The spec of the flags, over that of the spec file if there is one."""
    texts = {}
    if arguments.spec_file:
        texts = dict(parse_qsl(read_spec_file(arguments.spec_file).to_query()))
    flags = {name: getattr(arguments, name) for name in SPEC_NAMES if name in arguments}
    if SPARSITY in flags:
        texts.pop("fade", None)
    return ConversionSpec.from_texts(texts | flags)


def add_training_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recover-limit",
        type=float,
        metavar="MINUTES",
        help="of training, at most: as many of the steps as fit, and the result is that of a spec "
        "with so many (default: no limit)",
    )


def conversion_ways(arguments: argparse.Namespace, spec: ConversionSpec) -> dict[str, Any]:
    """How `convert` is to go: who is told of it, where training is kept, and --recover-limit."""
    minutes = arguments.recover_limit
    if minutes is not None and not spec.recovers:
        raise UserError("--recover-limit is for --recover: nothing is trained here.")
    if minutes is not None and not 0 < minutes < inf:
        raise UserError("--recover-limit must be a number of minutes above 0.")
    told = TrainingProgress()
    return {
        "on_progress": told,
        "on_look": told.look,
        "state": recovery_folder(),
        "recover_seconds": None if minutes is None else 60 * minutes,
    }


def at_least(minimum: int) -> Callable[[str], int]:
    def number_of(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {value}")
        return value

    number_of.__name__ = "whole number"  # argparse names it in its message
    return number_of
