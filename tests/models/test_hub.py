"""The real hub client against a server that answers like the hub."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from time import perf_counter

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from huggingface_hub import constants
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from transformers import LlamaConfig, OPTConfig

from mlpmoe.core.errors import UnsupportedModelError, UserError
from mlpmoe.models import host
from mlpmoe.models.catalogue import CATALOGUE
from mlpmoe.models.errors import ModelError
from mlpmoe.models.hub import answers, explain, offline_models
from mlpmoe.models.loading import load, load_checked
from mlpmoe.models.origin import origin_of
from mlpmoe.models.preflight import preflight
from tests.gguf_writing import write_gguf
from tests.models.fake_hub import GOOD_TOKEN, FakeHub
from tests.models.random_models import save_random
from tests.tiny import save_tiny_model, tiny_model

REPO = "owner/tiny"
SMALLEST = CATALOGUE[1]  # of those on the hub
ROOT = Path(__file__).resolve().parents[2]


def refusal(name: str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load(name, device="cpu", **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 400
    return message


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def config_only(config, tiny_folder: Path) -> dict[str, bytes]:
    """A repository whose config is another one; its weights would not fit, nor be needed."""
    return {**files_of(tiny_folder), "config.json": config.to_json_string().encode()}


def test_a_model_is_loaded_as_it_was_saved(hub, tiny_folder):
    sha = hub.add(REPO, tiny_folder)
    seen = []
    model, tokenizer = load(REPO, device="cpu", on_progress=lambda *report: seen.append(report))
    reference = tiny_model()
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Once upon a time"
    assert not model.training and all(p.requires_grad for p in model.parameters())
    assert seen[0] == ("checking", None)
    assert re.fullmatch(r"downloading \d+ kB", seen[1][0]) and seen[1][1] == 0.0
    assert seen[-1] == ("reading weights", None)
    assert all(sha in path for path in hub.requested(".safetensors")), "pinned to one commit"


def test_only_needed_files_are_downloaded(hub, tiny_folder):
    extra = ("README.md", "pytorch_model.bin", "model.fp16.safetensors", "evil.py", "tf_model.h5")
    folder_files = {"onnx/model.onnx": b"x", "original/model.safetensors": b"x"}
    hub.add(REPO, {**files_of(tiny_folder), **dict.fromkeys(extra, b"x"), **folder_files})
    load(REPO, device="cpu")
    for name in (*extra, *folder_files):
        assert not hub.requested(f"/{name}")
    assert len([r for r in hub.requested(".safetensors") if r.startswith("GET")]) == 1


def test_preflight_downloads_no_weights_and_load_checked_goes_on(hub, tiny_folder):
    sha = hub.add(REPO, tiny_folder)
    found = preflight(REPO, device="cpu")
    assert found.source == found.name == REPO and found.revision == sha and found.folder is None
    size = (tiny_folder / "config.json").stat().st_size
    assert found.download == found.bytes_on_disk - size, "the config is here already"
    assert not hub.requested("tokenizer.json") and not hub.requested(".safetensors")
    model, _ = load_checked(found)
    assert model.num_parameters() == found.parameters
    assert preflight(REPO, device="cpu").download == 0


def test_a_sharded_model(hub, tmp_path):
    folder = save_tiny_model(tmp_path / "sharded", max_shard_size="20KB")
    hub.add(REPO, folder)
    model, _ = load(f"https://huggingface.co/{REPO}", device="cpu")
    for name, tensor in tiny_model().state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    files = files_of(folder)
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    del files[shards[1]]
    hub.add("owner/gap", files)
    assert f"1 of its {len(shards)} weight files is missing" in refusal("owner/gap")


def test_revisions(hub, tiny_folder, tmp_path):
    hub.add(REPO, tiny_folder)
    other = save_tiny_model(tmp_path / "other", num_hidden_layers=1)
    sha = hub.add(REPO, other, branch="one-layer")
    for revision in ("one-layer", sha):
        model, _ = load(REPO, device="cpu", revision=revision)
        assert model.config.num_hidden_layers == 1
    assert load(REPO, device="cpu")[0].config.num_hidden_layers == 2
    assert refusal(REPO, revision="v9") == "owner/tiny has no branch, tag or commit v9."
    assert "branch or tag" in refusal(REPO, revision="../../token")


def test_gated_models(hub, tiny_folder, monkeypatch):
    hub.add(REPO, tiny_folder, gated=True)
    message = (
        "owner/tiny is gated: accept its conditions on its page on huggingface.co, then sign in "
        "with a token (hf auth login)."
    )
    assert refusal(REPO) == message
    assert load(REPO, device="cpu", token=GOOD_TOKEN)
    # Now it is in the cache, which must not open it to others.
    assert refusal(REPO) == message
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    assert load(REPO, device="cpu")
    monkeypatch.setenv("SPACE_ID", "owner/space")  # there the token is the owner's
    assert refusal(REPO, allow_any=True) == message


def test_private_missing_and_wrong_token(hub, tiny_folder):
    hub.add(REPO, tiny_folder, private=True)
    hidden = refusal(REPO)
    assert hidden.startswith("There is no model owner/tiny on the hub, or it is private.")
    assert refusal("owner/none") == hidden.replace(REPO, "owner/none")
    assert load(REPO, device="cpu", token=GOOD_TOKEN)
    assert "does not accept the access token" in refusal(REPO, token="hf_bad")


def test_hosts_with_a_catalogue_only_ask_nobody(hub, tiny_folder, monkeypatch):
    hub.add(REPO, tiny_folder)
    hub.add(SMALLEST.source, tiny_folder)
    monkeypatch.setenv("SPACE_ID", "owner/space")
    assert "loads only the models of its catalogue" in refusal(REPO)
    assert hub.requests == []
    assert load(SMALLEST.key, device="cpu")
    monkeypatch.setenv("MLPMOE_ALLOW_ANY_MODEL", "1")
    assert load(REPO, device="cpu")


def test_refused_before_any_weight_is_requested(hub, tiny_folder, monkeypatch):
    files = files_of(tiny_folder)
    without_weights = {k: v for k, v in files.items() if k != "model.safetensors"}
    custom = {"model_type": "mystery", "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}
    hub.add("owner/pickle", {**without_weights, "pytorch_model.bin": b"\x80\x02."})
    hub.add("owner/custom", {**files, "config.json": json.dumps(custom).encode()})
    opt = OPTConfig(hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2)
    hub.add("owner/opt", config_only(opt, tiny_folder))
    hub.add("owner/mute", {k: v for k, v in files.items() if k != "tokenizer.json"})
    hub.add("owner/empty", {"README.md": b"hello"})
    assert "Opening those can run any code" in refusal("owner/pickle")
    assert "needs Python code from its repository" in refusal("owner/custom")
    with pytest.raises(UnsupportedModelError, match=r"layers\.0"):
        load("owner/opt")
    assert "has no tokenizer" in refusal("owner/mute")
    assert "has no config.json" in refusal("owner/empty")
    assert not hub.requested(".safetensors") and not hub.requested(".bin")


def test_too_large_for_memory(hub, tiny_folder, monkeypatch):
    huge = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=80,
        num_attention_heads=128,
        num_key_value_heads=8,
        architectures=["LlamaForCausalLM"],
    )
    sizes = {"model.safetensors": 500_000_000_000}
    hub.add("owner/huge", config_only(huge, tiny_folder), sizes=sizes)
    assert re.fullmatch(
        r"owner/huge \(25\d\.\d billion parameters\) needs about 932\.9 GB in bfloat16, "
        r"this machine has [\d.]+ [GM]B free\. Choose a smaller model\.",
        refusal("owner/huge", dtype="bfloat16"),
    )
    assert not hub.requested(".safetensors")


def test_too_large_for_the_disk(hub, tiny_folder, monkeypatch):
    hub.add(REPO, tiny_folder, sizes={"model.safetensors": 40_000_000_000})
    monkeypatch.setattr(host, "free_disk", lambda folder: 30_000_000_000)
    assert refusal(REPO) == (
        "owner/tiny is a download of 40.0 GB, but the disk has 30.0 GB free, of which 500 MB "
        "stay reserved."
    )
    assert not hub.requested(".safetensors")


def test_a_hub_with_problems(hub, tiny_folder):
    hub.add(REPO, tiny_folder, status=500)
    message = refusal(REPO)
    assert message.startswith("The hub has a problem of its own (error 500). Try again later, and")
    assert "owner/tiny is not on this machine" in message
    hub.add(REPO, tiny_folder, status=429)
    assert "asks to wait" in refusal(REPO)
    hub.add(REPO, tiny_folder, status=403)
    assert "refuses access to owner/tiny" in refusal(REPO)
    hub.add(REPO, tiny_folder, status=418)
    assert "did not understand the request for owner/tiny (error 418)" in refusal(REPO)
    hub.add(REPO, tiny_folder, status=None, weight_status=500)
    assert "The hub has a problem of its own (error 500)" in refusal(REPO)
    hub.add(REPO, tiny_folder, weight_status=None)
    assert load(REPO, device="cpu")


def test_without_network(hub, tiny_folder, monkeypatch):
    hub.add(SMALLEST.source, tiny_folder)
    hub.add("owner/later", tiny_folder)
    load(SMALLEST.key, device="cpu")
    hub.stop()
    assert SMALLEST in offline_models()
    model, _ = load(SMALLEST.key, device="cpu")  # from the cache
    assert model.config.hidden_size == 32
    message = refusal("owner/later")
    assert message.startswith(
        "The model hub cannot be reached, and owner/later is not on this machine. "
        "Models that work without network here: "
    )
    assert SMALLEST.key in message and CATALOGUE[2].key not in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(SMALLEST.source, device="cpu")
    offline = refusal("owner/later")
    assert offline.startswith("This machine is set to work offline, and owner/later is not on")


def test_half_a_model_in_the_cache_does_not_count(hub, tiny_folder):
    hub.add(SMALLEST.source, tiny_folder, weight_status=500)
    refusal(SMALLEST.key)
    hub.stop()
    assert SMALLEST not in offline_models()
    assert "is not on this machine" in refusal(SMALLEST.key)


def test_damaged_files_from_the_hub(hub, tiny_folder):
    files = files_of(tiny_folder)
    hub.add("owner/cut", {**files, "model.safetensors": files["model.safetensors"][:-8]})
    assert refusal("owner/cut") == (
        "model.safetensors of owner/cut is damaged or cut off. Download or copy it again."
    )
    hub.add("owner/words", {**files, "tokenizer.json": b"{}"})
    hub.requests.clear()
    assert "The tokenizer of owner/words cannot be read" in refusal("owner/words")
    assert not hub.requested(".safetensors"), (
        "the tokenizer is tried before the weights are fetched"
    )


# GGUF -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A repository of GGUF files of one model, with a card."""
    folder = tmp_path_factory.mktemp("quantised")
    saved = save_random(folder / "model", "llama", rope_parameters={"rope_type": "default"})
    for kind in (Kind.F32, Kind.Q8_0):
        write_gguf(saved, folder / f"tiny-{kind.name}.gguf", kind=kind)
    card = b"---\nlicense: mit\nbase_model: owner/tiny\n---\n"
    return {file.name: file.read_bytes() for file in folder.glob("*.gguf")} | {"README.md": card}


@pytest.mark.parametrize(
    "name",
    [
        "owner/tiny-GGUF/tiny-Q8_0.gguf",
        "https://huggingface.co/owner/tiny-GGUF/blob/main/tiny-Q8_0.gguf",
        "https://huggingface.co/owner/tiny-GGUF/resolve/main/tiny-Q8_0.gguf?download=true",
    ],
)
def test_a_gguf_file_of_a_repository(hub, quantised, monkeypatch, name):
    sha = hub.add("owner/tiny-GGUF", quantised)
    monkeypatch.setattr("mlpmoe.models.gguf_header.FIRST_PIECE", 8_000)
    found = preflight(name, device="cpu")
    assert found.name == "owner/tiny-GGUF" and found.gguf == "tiny-Q8_0.gguf"
    assert found.revision == sha and found.licence == "mit"
    assert found.download == found.bytes_on_disk == len(quantised["tiny-Q8_0.gguf"])
    assert found.architecture == "LlamaForCausalLM"
    pieces = [int(request.split()[-1]) for request in hub.requests if ".gguf " in request]
    assert pieces and max(pieces) < found.download, "no more than the header"
    assert not hub.requested(".gguf") and not hub.requested("tiny-F32.gguf")
    seen = []
    model, tokenizer = load_checked(found, on_progress=lambda *report: seen.append(report))
    assert model.num_parameters() == found.parameters
    assert tokenizer("the cat")["input_ids"]
    assert re.fullmatch(r"downloading \d+ kB", seen[0][0])
    origin = origin_of(model)
    assert (origin.name, origin.on_hub, origin.gguf) == ("owner/tiny-GGUF", True, "tiny-Q8_0.gguf")
    hub.stop()  # from the cache, by the file or, since there is only one, without
    assert load(name, device="cpu")
    assert load("owner/tiny-GGUF", device="cpu")
    assert "is not on this machine" in refusal("owner/tiny-GGUF/tiny-F32.gguf")


def test_several_gguf_files_of_a_repository(hub, quantised, tiny_folder):
    hub.add("owner/tiny-GGUF", quantised)
    message = refusal("owner/tiny-GGUF")
    assert message.startswith(
        "owner/tiny-GGUF has 2 GGUF files; name one of them as owner/tiny-GGUF/tiny-F32.gguf. "
        "There are: tiny-F32.gguf ("
    )
    missing = refusal("owner/tiny-GGUF/tiny-Q4_0.gguf")
    assert missing.startswith("owner/tiny-GGUF has no file tiny-Q4_0.gguf. There are: tiny-F32")
    hub.add("owner/both", files_of(tiny_folder) | quantised)
    assert preflight("owner/both").weight_files == ("model.safetensors",)
    assert preflight("owner/both/tiny-F32.gguf").gguf == "tiny-F32.gguf"
    hub.add("owner/plain", tiny_folder)
    assert refusal("owner/plain/x.gguf") == "owner/plain has no file x.gguf. It has no GGUF files."
    assert not hub.requested(".gguf"), "nothing was downloaded"


def test_a_gguf_file_on_a_hub_with_problems(hub, quantised):
    hub.add("owner/tiny-GGUF", quantised, weight_status=500)
    assert "The hub has a problem of its own (error 500)" in refusal(
        "owner/tiny-GGUF/tiny-F32.gguf"
    )
    hub.add("owner/cut", quantised, sizes={"tiny-F32.gguf": 20_000})
    assert "is cut off: it has 20 kB of" in refusal("owner/cut/tiny-F32.gguf")


def test_a_hub_that_answers(hub, monkeypatch):
    assert answers(5.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not answers(5.0)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.stop()
    assert not answers(5.0)


def test_a_hub_that_is_silent_is_not_waited_for(hub, monkeypatch):
    monkeypatch.setattr("mlpmoe.models.hub.get_session", lambda: threading.Event().wait(60))
    started = perf_counter()
    assert not answers(0.05)
    assert perf_counter() - started < 10


def test_quantised_weights_that_their_config_does_not_tell(hub, tiny_folder):
    """transformers would take the packed numbers for weights."""
    files = files_of(tiny_folder)
    tensors = load_tensors(files["model.safetensors"])
    name = next(name for name in tensors if name.endswith("up_proj.weight"))
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    hub.add("owner/packed", {**files, "model.safetensors": save_tensors(tensors, {"format": "pt"})})
    assert refusal("owner/packed").startswith("owner/packed is quantised (F8_E4M3);")


def test_a_progress_callback_can_cancel(hub, tiny_folder):
    hub.add(REPO, tiny_folder)

    class Stopped(Exception):
        pass

    def stop(message: str, fraction: float | None) -> None:
        if message.startswith("downloading"):
            raise Stopped

    with pytest.raises(Stopped):
        load(REPO, device="cpu", on_progress=stop)
    assert not hub.requested(".safetensors")


def test_a_callback_can_cancel_in_the_middle_of_a_download(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("mlpmoe.models.progress.REPORT_INTERVAL", 0.0)
    hub.add(REPO, save_tiny_model(tmp_path / "tiny"))
    fractions = []

    def stop(message: str, fraction: float | None) -> None:
        if fraction:
            fractions.append(fraction)
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        load(REPO, device="cpu", on_progress=stop)
    assert len(fractions) == 1 and 0 < fractions[0] <= 1
    assert load(REPO, device="cpu"), "a cancelled download can be taken up again"


def test_a_full_disk_and_a_closed_folder():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/private")
    closed = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/somewhere/private")
    assert explain(full, REPO, None) == "The disk is full: owner/tiny could not be downloaded."
    assert "cannot be written to" in explain(closed, REPO, None)
    assert explain(RuntimeError("secret"), REPO, None) == (
        "The download of owner/tiny failed (RuntimeError). Try again."
    )


def test_a_disk_that_fills_up_while_downloading(hub, tiny_folder, monkeypatch):
    hub.add(REPO, tiny_folder)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ModelError, match="The disk is full"):
        load(REPO, device="cpu")


def test_another_process_with_nothing_but_environment_variables(tmp_path, tiny_folder):
    """Importing asks the network for nothing, and HF_ENDPOINT is enough to use another hub."""
    script = f"""
import sys
import mlpmoe.models
assert not any(name.startswith(("gradio", "plotly")) for name in sys.modules)
print("imported", flush=True)
sys.stdin.readline()
model, tokenizer = mlpmoe.models.load({REPO!r}, device="cpu")
print(model.num_parameters())
"""
    with FakeHub() as hub:
        hub.add(REPO, tiny_folder)
        with subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=hub.environment(tmp_path / "cache"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout.readline() == "imported\n", process.stderr.read()
            assert hub.requests == []
            output, errors = process.communicate("go on\n", timeout=60)
    assert process.returncode == 0, errors
    assert int(output) == tiny_model().num_parameters()
    assert hub.requested("model.safetensors")
