from __future__ import annotations

from pathlib import Path

import pytest

from mlpmoe.models import hub
from mlpmoe.models.catalogue import CATALOGUE
from mlpmoe.models.errors import ModelError, format_bytes, format_parameters, shorten
from mlpmoe.models.names import (
    HubPlace,
    check_revision,
    host_allows_any_model,
    identify,
    on_space,
    open_page_to,
    serves_visitors,
)

HOSTILE = {
    "": "No model was named",
    " \t\n ": "No model was named",
    "x" * 1_000_000: "1,000,000 characters is too long; 500 are allowed",
    "Qwen/Qwen3\0-0.6B": "control or invisible characters",
    "Qwen/\x1b[31mQwen3": "control or invisible characters",
    "\u202eowner/name": "control or invisible characters",
    "owner/na\u200bme": "control or invisible characters",
    "../nowhere": 'There is no folder "../nowhere"',
    "./nowhere": "There is no folder",
    "/nowhere/at/all": "There is no folder",
    "~nobody/model": "There is no folder",
    "C:\\models\\mine": "There is no folder",
    "x" * 400: "does not name a model",
    "gpt2": '"gpt2" does not name a model. Allowed are a catalogue name, a hub id in the form '
    "owner/name, a folder, or a GGUF file in either",
    "a/b/c": "does not name a model",
    "a/..": "does not name a model",
    "a--b/c": "does not name a model",
    "owner/name.git": "does not name a model",
    "-owner/name": "does not name a model",
    "owner/name?revision=1": "does not name a model",
    "<img src=x onerror=alert(1)>": "does not name a model",
    "öwner/name": "does not name a model",
    "https://example.org/owner/name": "is not the address of a model page",
    "ftp://huggingface.co/owner/name": "is not the address of a model page",
    "http://[": "is not the address of a model page",
    "file:///etc/passwd": "is not the address of a model page",
    "https://huggingface.co/datasets/owner/name": "not that of a model",
    "https://huggingface.co/": "not that of a model",
    "https://huggingface.co/owner/name/blob/main/config.json": "points inside a repository",
    "https://huggingface.co/owner/name/tree/other": "points inside a repository",
}


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:30]))
def test_bad_names_are_refused_with_a_short_reason(name):
    with pytest.raises(ModelError) as caught:
        identify(name, allow_any=True)
    message = str(caught.value)
    assert HOSTILE[name] in message
    assert len(message) < 300 and message.isprintable() and message.endswith(".")


@pytest.mark.parametrize("name", [None, 5, b"Qwen/Qwen3-0.6B", ["a/b"]])
def test_what_is_not_text_is_refused(name):
    with pytest.raises(ModelError, match="named by text"):
        identify(name, allow_any=True)


@pytest.mark.parametrize(
    "name",
    [
        "owner/name",
        "  owner/name\n",
        "https://huggingface.co/owner/name",
        "https://huggingface.co/owner/name/",
        "https://hf.co/owner/name?library=transformers#usage",
        "huggingface.co/owner/name/tree/main",
    ],
)
def test_hub_ids_and_addresses_of_model_pages(name):
    assert identify(name, allow_any=True) == HubPlace("owner/name")


def test_an_address_of_a_catalogue_model_is_allowed_everywhere():
    address = f"https://huggingface.co/{CATALOGUE[1].source}"
    assert identify(address, allow_any=False) == HubPlace(CATALOGUE[1].source)


def test_folders(tmp_path, monkeypatch):
    assert identify(str(tmp_path), allow_any=True) == tmp_path
    assert identify(tmp_path, allow_any=True) == tmp_path
    with pytest.raises(ModelError, match="There is no folder"):
        identify(Path("owner/name"), allow_any=True)  # a Path is never a hub id
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    assert identify("sub/../", allow_any=True).resolve() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert identify("~/sub", allow_any=True) == tmp_path / "sub"


@pytest.mark.parametrize("name", ["owner/name", "/", ".", "../", "/nowhere", Path("/")])
def test_other_models_are_refused_alike_whether_they_exist_or_not(name):
    with pytest.raises(ModelError, match="loads only the models of its catalogue: demo, smollm2"):
        identify(name, allow_any=False)


def test_a_space_never_looks_at_its_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "owner/space")
    for name in (str(tmp_path), "/nowhere", tmp_path):
        with pytest.raises(ModelError, match="does not name a model"):
            identify(name, allow_any=True)
    assert identify("owner/name", allow_any=True) == HubPlace("owner/name")


def test_hosts(monkeypatch):
    assert host_allows_any_model()
    monkeypatch.setenv("SPACE_ID", "owner/space")
    assert not host_allows_any_model()
    monkeypatch.setenv("MLPMOE_ALLOW_ANY_MODEL", "1")
    assert host_allows_any_model()
    monkeypatch.delenv("SPACE_ID")
    monkeypatch.setenv("MLPMOE_ALLOW_ANY_MODEL", "0")
    assert not host_allows_any_model()


@pytest.fixture
def page(monkeypatch):
    """A page that is opened at an address; afterwards this process serves nobody."""
    yield open_page_to
    open_page_to(None)


@pytest.mark.parametrize("address", [None, "", "localhost", "127.0.0.1", "127.1.2.3", "::1"])
def test_a_page_of_this_machine_only_is_its_owner_s(page, address, tmp_path):
    page(address)
    assert host_allows_any_model() and not serves_visitors()
    assert identify(str(tmp_path), allow_any=True) == tmp_path


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.5", "lab.example.org"])
def test_a_page_that_others_can_open_shows_them_neither_folders_nor_the_token(
    page, address, tmp_path, monkeypatch
):
    page(address)
    assert serves_visitors() and not host_allows_any_model() and not on_space()
    assert hub._access(None) is False and hub._access("theirs") == "theirs"
    said = set()
    for name in (str(tmp_path), str(tmp_path / "nowhere")):
        with pytest.raises(ModelError, match="does not name a model") as caught:
            identify(name, allow_any=True)
        said.add(str(caught.value).replace(name, ""))
    assert len(said) == 1  # whether it is there or not
    assert identify(str(tmp_path), allow_any=False, by_host=True) == tmp_path
    monkeypatch.setenv("MLPMOE_ALLOW_ANY_MODEL", "1")
    assert host_allows_any_model()


def test_a_page_under_a_public_link_serves_others_too(page):
    page("127.0.0.1", shared=True)
    assert serves_visitors()


def test_revisions():
    for revision in (None, "main", "v1.0", "refs/pr/4", "a" * 40):
        assert check_revision(revision) == revision
    for revision in ("", "../../token", "a/../b", "/etc", "a b", "-x", "x" * 201, "a\0", 5):
        with pytest.raises(ModelError, match="branch or tag, or a commit"):
            check_revision(revision)


def test_wording():
    assert format_bytes(32.1e9) == "32.1 GB"
    assert format_bytes(269.6e6) == "270 MB"
    assert format_bytes(999.9e6) == "1.0 GB"
    assert format_bytes(1.62e12) == "1.6 TB"
    assert format_bytes(1234) == "1 kB"
    assert format_parameters(8_030_261_248) == "8.0 billion"
    assert format_parameters(494_032_768) == "494 million"
    assert format_parameters(260_032) == "260 thousand"
    assert shorten("a\nb") == "a\N{REPLACEMENT CHARACTER}b"
    assert shorten("x" * 100) == "x" * 80 + "..."
