"""From files to files: the same as in memory, within little of it, and safe to kill."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from mlpmoe import ConversionSpec, ExportError, SpecError, UserError, convert
from mlpmoe.__main__ import main
from mlpmoe.checkpoints.check.record import RECORD, read_spec_file
from mlpmoe.checkpoints.forms.dense import dense_form
from mlpmoe.checkpoints.forms.form import EXACT
from mlpmoe.checkpoints.write import file_export, streaming, target
from mlpmoe.checkpoints.write.file_export import export_files
from mlpmoe.checkpoints.write.source import PiecewiseError, Source
from mlpmoe.checkpoints.write.streaming import STATE, FileConversion
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.models import ModelError, preflight
from tests.checkpoints.large import SHAPE_8B, write_random_llama
from tests.families import FAMILIES, VOCABULARY, build
from tests.forked import Forked
from tests.tiny import byte_tokenizer, save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
TEXT = "One day, a fox slept in the grass.\n<|endoftext|>\nA cat sat on the wall and looked down."
IDS = torch.randint(VOCABULARY, (1, 40), generator=torch.Generator().manual_seed(1))
FADED = ConversionSpec(branches=4, fade=0.9)
NARROW = ConversionSpec(branches=5, keep=3)
SPARED = ConversionSpec(branches=5, keep=3, fade=0.5, spared="1")
RENAMED_ON_DISK = ("gpt_neox",)  # transformers turns its tensors' names around

GB = 1e9


def encode(tokenizer, model):
    return encode_text(tokenizer, TEXT)


def opened(folder):
    return Source(folder, [file.name for file in sorted(folder.glob("*.safetensors"))])


def quiet(message, share):
    pass


@pytest.fixture
def base(tmp_path):
    """The tiny model in several files."""
    return save_tiny_model(tmp_path / "base", max_shard_size="20KB")


@pytest.mark.parametrize("spec", [FADED, NARROW, SPARED], ids=["faded", "narrow", "spared"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in RENAMED_ON_DISK])
def test_files_become_what_the_model_would(family, spec, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 15_000)
    model = build(family)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    conversion = FileConversion(opened(tmp_path / "base"), spec)
    (tmp_path / "out").mkdir()
    conversion.write(tmp_path / "out", quiet)
    assert len(conversion.shards) > 1
    wanted = dense_form(convert(model, spec)).tensors
    found = {
        name: tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], atol=1e-6) for name in wanted)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    reloaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = convert(model, spec)(IDS).logits
        running = conversion.source.running(conversion.as_saved)(IDS, use_cache=False).logits
        for logits in (reloaded(IDS).logits, running):
            assert (logits - expected).abs().max() <= EXACT * expected.abs().max()


def test_neurons_that_fade_are_counted_before_a_weight_is_read(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path / "base")
    spec = ConversionSpec(branches=4, fade=0.9, fade_unit="neuron", order="norm")
    (tmp_path / "out").mkdir()
    FileConversion(opened(tmp_path / "base"), spec).write(tmp_path / "out", quiet)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    converted = convert(model, spec)
    assert reloaded.config.intermediate_size == sum(converted.model.layers[0].mlp.sizes)
    with torch.no_grad():
        assert torch.allclose(reloaded(IDS).logits, converted(IDS).logits, atol=1e-5)


def test_each_tensor_keeps_its_dtype(base):
    file = next(base.glob("*.safetensors"))
    tensors = {
        name: tensor.bfloat16() if tensor.ndim > 1 else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    source = opened(base)
    (base / "out").mkdir()
    conversion = FileConversion(source, ConversionSpec(branches=4, fade=0.9))
    conversion.write(base / "out", quiet)
    for name, dtype in source.dtypes.items():
        assert opened(base / "out").read(name).dtype == dtype


def test_the_whole_of_it(base, tmp_path):
    made = export_files(
        preflight(base), tmp_path / "out", ConversionSpec(branches=8, keep=6), encode=encode,
        text_name="two sentences",
    )  # fmt: skip
    assert made.verification.passed and made.verification.strict
    assert made.verification.relative_difference <= EXACT
    assert made.record.measured.dense.tokens == made.verification.scored_tokens
    names = {file.name for file in made.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", RECORD} <= names
    assert STATE not in names and target.LOCK not in names
    assert read_spec_file(made.folder / RECORD) == ConversionSpec(branches=8, keep=6)


def test_a_model_that_does_not_fit_is_compared_as_it_runs_from_files(base, tmp_path, monkeypatch):
    monkeypatch.setattr(file_export, "ROOM", 1e9)
    made = export_files(
        preflight(base), tmp_path / "out", ConversionSpec(branches=8, keep=6), encode=encode,
        text_name="the longer sentence",
    )  # fmt: skip
    found = made.verification
    assert found.strict and found.relative_difference <= EXACT
    longest = max(len(ids) for ids in encode_text(byte_tokenizer(), TEXT).documents)
    assert found.compared_tokens == longest and found.scored_tokens == longest - 1

    ids = max(encode_text(byte_tokenizer(), TEXT).documents, key=len)[None]
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.inference_mode():
        loss = dense(ids, labels=ids).loss.item()
    measured = made.record.measured
    assert measured.dense.value == pytest.approx(math.exp(loss), rel=1e-5)
    assert measured.converted.value == pytest.approx(found.reloaded_perplexity, rel=1e-5)
    card = (made.folder / "README.md").read_text()
    row = f"| perplexity, the longer sentence ({longest - 1} tokens) | {math.exp(loss):.2f} ±"
    assert row in card and "multiply-adds" not in card


def test_a_damaged_result_is_found_and_deleted(base, tmp_path, monkeypatch):
    write = FileConversion.write

    def damaged(self, folder, report):
        write(self, folder, report)
        file = next(f for f in folder.glob("*.safetensors") if "model.norm.weight" in load_file(f))
        tensors = load_file(file)
        tensors["model.norm.weight"] *= 1.01
        save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(FileConversion, "write", damaged)
    with pytest.raises(ExportError, match="does not repeat the model and was deleted"):
        export_files(preflight(base), tmp_path / "out", ConversionSpec(branches=8, keep=6))
    assert not list(tmp_path.glob("out*"))


class Interrupt:
    """Raises at the nth report of a layer."""

    def __init__(self, at, error):
        self.left, self.error = at, error

    def __call__(self, message, share):
        if message == "converting":
            self.left -= 1
            if not self.left:
                raise self.error


def test_an_interrupted_conversion_goes_on(base, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 15_000)
    spec = ConversionSpec(branches=8, keep=6)
    with pytest.raises(KeyboardInterrupt):
        export_files(
            preflight(base), tmp_path / "out", spec, on_progress=Interrupt(3, KeyboardInterrupt())
        )
    assert not (tmp_path / "out").exists()
    partial = tmp_path / f"out{target.PARTIAL}"
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(kept) == 2 and not (partial / "config.json").exists()
    made = export_files(preflight(base), tmp_path / "out", spec)
    assert made.verification.passed and not partial.exists()
    for name, time_written in kept.items():
        assert (made.folder / name).stat().st_mtime_ns == time_written


def test_what_another_conversion_left_is_not_used(base, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 15_000)
    with pytest.raises(KeyboardInterrupt):
        export_files(
            preflight(base), tmp_path / "out", ConversionSpec(branches=8, keep=6),
            on_progress=Interrupt(3, KeyboardInterrupt()),
        )  # fmt: skip
    spec = ConversionSpec(branches=8, keep=6, fade=0.5)
    made = export_files(preflight(base), tmp_path / "out", spec)
    assert made.verification.relative_difference <= EXACT


def test_a_failure_leaves_nothing(base, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "SHARD_BYTES", 15_000)
    full = OSError(28, "No space left on device")
    with pytest.raises(ExportError, match="the disk is full"):
        export_files(preflight(base), tmp_path / "out", FADED, on_progress=Interrupt(2, full))
    assert not list(tmp_path.glob("out*"))


DIES = """
import os, signal, sys
from mlpmoe.__main__ import main
from mlpmoe.checkpoints.write import streaming

def save_file(tensors, part, **more):
    write(tensors, part, **more)
    if part.name.startswith("model-00006"):
        os.truncate(part, part.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

write, streaming.save_file, streaming.SHARD_BYTES = streaming.save_file, save_file, 1
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_process_leaves_no_folder_that_looks_complete(tmp_path, monkeypatch):
    """Killed while it writes the sixth file; the next one writes that again, and what is left."""
    base = write_random_llama(
        tmp_path / "base", vocab_size=257, hidden_size=64, intermediate_size=256,
        num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "dies.py").write_text(DIES)
    convert = ["convert", base, tmp_path / "out", "--branches", "4", "--fade", "0.9", "--text",
               tmp_path / "text.txt"]  # fmt: skip
    convert = list(map(str, convert))
    with open(tmp_path / "said", "wb") as said:
        command = [sys.executable, tmp_path / "dies.py", *convert]
        process = Forked(command, cwd=tmp_path, env=os.environ, stdout=said, stderr=said)
        status = process.wait(timeout=300)
    assert status == -signal.SIGKILL, (tmp_path / "said").read_text()
    partial = tmp_path / f"out{target.PARTIAL}"
    assert not (tmp_path / "out").exists() and not (partial / "config.json").exists()
    kept = {file.name: file.stat().st_mtime_ns for file in partial.glob("*.safetensors")}
    assert len(kept) == 5
    monkeypatch.setattr(streaming, "SHARD_BYTES", 1)
    assert main(convert) == 0
    found = {
        file.name: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.safetensors")
    }
    assert len(found) == 15 and kept.items() <= found.items()
    assert not partial.exists()


def test_files_that_need_the_whole_model(tmp_path):
    build("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(PiecewiseError, match=r"embed_out.*has to fit into memory"):
        opened(tmp_path)


def test_files_that_are_not_the_models(base):
    file = next(base.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:-1]}, file)
    with pytest.raises(PiecewiseError, match="another shape"):
        opened(base)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=f"1 of its tensors is missing, such as {name}"):
        opened(base)


def test_tensors_without_a_place_are_never_left_out(base):
    file = next(base.glob("*.safetensors"))
    save_file(load_file(file) | {"model.layers.0.mlp.up_proj.bias": torch.ones(48)}, file)
    with pytest.raises(ModelError, match=r"has no place for, such as .*up_proj\.bias"):
        opened(base)


def test_heads_for_later_tokens_are_left_out_and_named(base, tmp_path, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    file = next(base.glob("*.safetensors"))
    save_file(load_file(file) | {"mtp.norm.weight": torch.ones(4)}, file)
    made = export_files(preflight(str(base)), tmp_path / "made", NARROW)
    assert made.record.verification.passed and made.record.origin.left_out == ("mtp.norm.weight",)
    card = (made.folder / "README.md").read_text()
    assert "1 tensor of the base model's files is left out" in card
    assert not any("mtp" in key for file in made.folder.glob("*.s*") for key in load_file(file))


def test_specs_that_look_at_more_than_a_layer(base, tmp_path):
    for spec in (
        ConversionSpec(method="random"),
        ConversionSpec(keep=4, order="activation"),
        ConversionSpec(keep=4, allocation="sensitivity"),
    ):
        with pytest.raises(UserError, match="looks at activations"):
            export_files(preflight(base), tmp_path / "out", spec)
    with pytest.raises(SpecError, match="48"):
        export_files(preflight(base), tmp_path / "out", ConversionSpec(branches=64))
    assert not list(tmp_path.glob("out*"))


def test_a_head_of_its_own_is_kept_and_said(tmp_path):
    """Whatever the flag of the base says: a reader that obeys it would drop the head."""
    base = save_tiny_model(tmp_path / "base", tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = 2 * tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    made = export_files(preflight(str(base)), tmp_path / "made", NARROW, encode=encode)
    assert made.record.verification.passed
    assert json.loads((made.folder / "config.json").read_text())["tie_word_embeddings"] is False
    found = load_file(made.folder / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], tensors["lm_head.weight"])


def test_how_it_writes_is_by_default_where_that_cannot_be_read(base, tmp_path):
    """Else the checkpoint could not be opened."""
    (base / "generation_config.json").write_text('{"max_new_tokens": "many"}')
    made = export_files(preflight(str(base)), tmp_path / "made", NARROW)
    assert made.record.verification.passed
    written = json.loads((made.folder / "generation_config.json").read_text())
    assert written["eos_token_id"] == 0 and "max_new_tokens" not in written


def test_too_little_space_is_known_before(base, tmp_path, monkeypatch):
    monkeypatch.setattr(target, "free_disk", lambda folder: 110_000_000)
    with pytest.raises(ExportError, match="the checkpoint takes"):
        export_files(preflight(base), tmp_path / "out", FADED)
    assert not list(tmp_path.glob("out*"))


# VmHWM and not ru_maxrss, which begins with what the process that started this one had.
MEMORY = """
import re, resource, sys
from pathlib import Path
from mlpmoe.__main__ import main
from mlpmoe.checkpoints.write import file_export, streaming

def memory(name):
    found = re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1))

file_export.ROOM = 1e9  # as for a model that does not fit
if sys.argv.pop(1) == "small":
    streaming.SHARD_BYTES = 1  # one layer to a file, as where layers are large
begun, status = memory("VmRSS"), main(sys.argv[1:])
reloaded = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(begun, max(memory("VmHWM"), reloaded), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.slow
def test_memory_is_that_of_one_layer(tmp_path):
    """12 layers of 34 MB, of which less than half may ever be held; with MLPMOE_LARGE=1, 8 billion
    parameters, 16 GB, and as much disk again."""
    large = os.environ.get("MLPMOE_LARGE") == "1"
    small = {
        "vocab_size": 257, "hidden_size": 1024, "intermediate_size": 4096,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8,
    }  # fmt: skip
    if large and shutil.disk_usage(tmp_path).free < 42 * GB:
        pytest.skip("needs 42 GB of disk")
    try:
        base = write_random_llama(tmp_path / "base", **SHAPE_8B if large else small)
        sizes = []
        for file in base.glob("*.safetensors"):
            with safe_open(file, framework="pt") as found:
                sizes += [found.get_tensor(name).nbytes for name in found.keys()]
        total, largest = sum(sizes), max(sizes)
        command = [
            sys.executable, "-c", MEMORY, "large" if large else "small", "convert", str(base),
            str(tmp_path / "out"), "--branches", "16", "--fade", "0.9", "--keep", "12", "--json",
        ]  # fmt: skip
        # what is freed goes back at once, as large tensors do by themselves
        env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "100000"}
        begun = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        seconds = time.monotonic() - begun
        assert done.returncode == 0, done.stderr
        before, peak = map(int, done.stderr.split()[-2:])
        found = json.loads(done.stdout)["verification"]
        print(
            f"{total / GB:.2f} GB in {seconds:.0f} s: peak {peak / GB:.2f} GB, of which "
            f"{before / GB:.2f} GB before it began, largest tensor {largest / GB:.2f} GB; "
            f"max|Δlogit| {found['max_logit_difference']:.1e}, perplexity "
            f"{found['perplexity']:.2f} and {found['reloaded_perplexity']:.2f}"
        )
        assert peak < largest + 2 * GB if large else peak - before < total / 2
        assert found["passed"]
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)
