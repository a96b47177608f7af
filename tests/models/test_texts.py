"""Texts with a name, from real datasets that no network brought, and texts of visitors."""

import codecs
import errno
import hashlib
import logging
import re
import sys

import datasets
import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from hypothesis import example, given
from hypothesis import strategies as st

from mlpmoe.core.calibration import check_disjoint
from mlpmoe.core.errors import UserError
from mlpmoe.models.catalogue import CATALOGUE, assets_folder
from mlpmoe.models.errors import ModelError
from mlpmoe.models.texts import (
    CALIBRATIONS,
    MAX_OWN_TEXT,
    TEXTS,
    check_own_text,
    decode_text,
    default_calibration,
    default_text,
    named_calibration,
    named_text,
    text_digest,
)

FILES = {
    "stories": "evaluation",
    "prose": "prose-evaluation",
    "proxy": "proxy",
    "calibration": "calibration",
}
SOURCES = {"wikitext2": "Salesforce/wikitext", "c4": "allenai/c4"}


@pytest.fixture
def load_dataset(monkeypatch):
    """A function that says what datasets.load_dataset gives, or raises; with the list of calls."""

    def answer(given):
        calls = []

        def load_dataset(*arguments, **options):
            calls.append((arguments, options))
            if isinstance(given, BaseException):
                raise given
            return given

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    return answer


def refusal(text):
    with pytest.raises(ModelError) as caught:
        named_text(text)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 250
    assert message.endswith(".") and TEXTS[text].label in message
    return message


# Texts with a name -------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "file"), FILES.items())
def test_shipped_texts(name, file):
    content = (assets_folder() / "texts" / f"{file}.txt").read_bytes().decode()
    assert named_text(name) == content
    assert len(content) > 1000


@pytest.mark.parametrize("name", ["", "Stories", "wikitext", "../evaluation", None, ["c4"]])
def test_other_names_are_refused(name):
    with pytest.raises(UserError, match=f"allowed: {', '.join(TEXTS)}, calibration"):
        named_text(name)
    with pytest.raises(UserError, match="allowed: stories, prose"):
        named_calibration(name)


@pytest.mark.parametrize("name", CALIBRATIONS)
def test_shipped_calibration_texts_are_others_than_the_evaluation_texts(name):
    seen = named_calibration(name)
    for measured in FILES.keys() - {"calibration"}:
        check_disjoint(seen, named_text(measured))


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "stories"), ("Demo", "stories"), (CATALOGUE[0].label, "stories"),
     ("smollm2-135m", "prose"), ("owner/demo", "prose"), ("./demo", "prose"), ("", "prose")],
)  # fmt: skip
def test_the_demo_model_alone_reads_stories_by_default(model, name):
    assert (default_text(model), default_calibration(model)) == (name, name)
    assert name in TEXTS and name in CALIBRATIONS


def test_wikitext_keeps_its_empty_lines(load_dataset):
    lines = ["", " = A title = \n", "", " One <unk> line . \n", "Ein Übel – 🙂\n"]
    calls = load_dataset(datasets.Dataset.from_dict({"text": lines}))
    assert named_text("wikitext2") == "\n\n".join(lines)
    assert calls == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"})]


def test_c4_is_its_first_documents(load_dataset):
    documents = [f"Document\n{number}." for number in range(1234)]
    columns = {"text": documents, "url": ["https://example.org"] * len(documents)}
    calls = load_dataset(datasets.Dataset.from_dict(columns))
    assert named_text("c4") == " ".join(documents[:1100])
    ((arguments, options),) = calls
    assert arguments == ("allenai/c4",)
    assert options["split"] == "validation"
    assert options["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}
    assert "trust_remote_code" not in options


def test_one_file_is_enough_whatever_the_card_announces(monkeypatch, tmp_path):
    """The real loader on a dataset whose card lists more splits than the one file that is read."""
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "part.json").write_text('{"text": "One."}\n{"text": "Two."}\n')
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: text\n    dtype: string\n  splits:\n"
        "  - name: train\n    num_examples: 9\n  - name: validation\n    num_examples: 9\n---\n"
    )
    load = datasets.load_dataset

    def from_folder(source, **options):
        files = {"validation": "en/part.json"}
        return load(
            str(tmp_path), **options | {"data_files": files}, cache_dir=str(tmp_path / "cache")
        )

    monkeypatch.setattr(datasets, "load_dataset", from_folder)
    assert named_text("c4") == "One. Two."


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "https://example.org/a"))


def caused(error, cause):
    error.__cause__ = cause
    return error


def behind(error, context):
    """As `raise error from None` in an except block leaves it."""
    error.__context__, error.__suppress_context__ = context, True
    return error


OFFLINE = "set to work offline: it needs a network once; afterwards it is in the hub's cache"
SILENT = "the hub does not answer: it needs a network once; afterwards it is in the hub's cache"
FAILURES = {
    "offline": (OfflineModeIsEnabled("no"), OFFLINE),
    "offline, wrapped": (
        caused(ConnectionError("Couldn't reach it"), OfflineModeIsEnabled("no")),
        OFFLINE,
    ),
    "offline, only in words": (
        behind(
            ConnectionError("Couldn't reach 'a/b' on the Hub (OfflineModeIsEnabled)"),
            FileNotFoundError("Dataset a/b is not cached in None"),
        ),
        OFFLINE,
    ),
    "no connection": (ConnectionError("Couldn't reach it"), SILENT),
    "no such server": (httpx.ConnectError("[Errno -2] Name or service not known"), SILENT),
    "no server, wrapped": (caused(RuntimeError("x"), httpx.ConnectError("refused")), SILENT),
    "slow": (httpx.ReadTimeout(""), SILENT),
    "not in the cache": (LocalEntryNotFoundError("x"), SILENT),
    "overloaded": (HfHubHTTPError("x", response=response(503)), SILENT),
    "too many requests": (HfHubHTTPError("x", response=response(429)), SILENT),
    "gated": (GatedRepoError("x", response=response(403)), "is gated: accept its conditions on"),
    "gated, wrapped": (
        caused(
            datasets.exceptions.DatasetNotFoundError("'a' is a gated dataset on the Hub."),
            GatedRepoError("x", response=response(403)),
        ),
        "is gated: accept its conditions on",
    ),
    "gated, only in words": (
        behind(
            datasets.exceptions.DatasetNotFoundError("'a' is a gated dataset on the Hub."), None
        ),
        "is gated: accept its conditions on",
    ),
    "gone": (RepositoryNotFoundError("x", response=response(404)), "cannot be found"),
    "gone, wrapped": (datasets.exceptions.DatasetNotFoundError("x"), "cannot be found"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    "disk too small": (
        OSError("Not enough disk space. Needed: 9 GB (download: 1 GB)"), "the disk is full",
    ),
    "full disk while reading": (
        caused(
            datasets.exceptions.DatasetGenerationError("An error occurred"),
            OSError(errno.ENOSPC, "No space left on device"),
        ),
        "the disk is full",
    ),
    "no right to write": (PermissionError(errno.EACCES, "no"), "cannot be written to"),
    "broken file": (
        datasets.exceptions.DatasetGenerationError("An error occurred\nwhile\x1b[0m reading"),
        "(DatasetGenerationError: An error occurred)",
    ),
    "other splits": (ValueError('Unknown split "test".'), '(ValueError: Unknown split "test".)'),
    "nothing to say": (KeyError(), "(KeyError)"),
    "a very long word": (ValueError("x" * 10_000), "x..."),
}  # fmt: skip


@pytest.mark.parametrize("text", SOURCES)
@pytest.mark.parametrize(("error", "words"), FAILURES.values(), ids=FAILURES)
def test_what_goes_wrong_is_said_in_one_sentence(load_dataset, text, error, words):
    load_dataset(error)
    message = refusal(text)
    assert words in message
    if "gated" in words or "found" in words:
        assert SOURCES[text] in message


def test_a_dataset_without_text_is_refused(load_dataset):
    load_dataset(datasets.Dataset.from_dict({"words": ["a"]}))
    for text in SOURCES:
        assert "cannot be read" in refusal(text)


def test_the_real_loader_without_network(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    for text in SOURCES:
        assert OFFLINE in refusal(text)


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    for text in SOURCES:
        assert refusal(text).endswith("needs the package datasets: pip install datasets.")
    assert named_text("stories")


def test_an_interrupt_is_no_failure(load_dataset):
    load_dataset(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        named_text("c4")


@pytest.mark.parametrize("fails", [False, True])
def test_reading_is_quiet_and_leaves_settings_as_they_were(monkeypatch, fails):
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    before = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    seen = []

    def load_dataset(*_, **__):
        seen.append(all(not logger.isEnabledFor(logging.WARNING) for logger in loggers))
        seen.append(datasets.are_progress_bars_disabled())
        if fails:
            raise ConnectionError
        return datasets.Dataset.from_dict({"text": ["a"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if fails:
        refusal("c4")
    else:
        assert named_text("c4") == "a"
    assert seen == [True, True]
    assert before == ([logger.level for logger in loggers], datasets.are_progress_bars_disabled())


# Texts of visitors -------------------------------------------------------------------------


def lines_alike(text):
    return re.sub("\r\n?", "\n", text)


TEXT_CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@given(st.text(TEXT_CHARACTERS).filter(str.strip), st.sampled_from(["utf-8", "utf-8-sig"]))
@example("\ufeffx", "utf-8")
@example("\r\r\n\nx", "utf-8")
def test_any_text_comes_back(text, encoding):
    kept = lines_alike(text.removeprefix("\ufeff") if encoding == "utf-8" else text)
    if not kept.strip():
        return
    assert check_own_text(text.encode(encoding)) == kept
    assert check_own_text(kept) == kept.removeprefix("\ufeff")


@given(st.text(TEXT_CHARACTERS).filter(str.strip), st.sampled_from(["le", "be"]))
def test_marked_utf_16_comes_back(text, order):
    mark = codecs.BOM_UTF16_LE if order == "le" else codecs.BOM_UTF16_BE
    assert decode_text(mark + text.encode(f"utf-16-{order}")) == lines_alike(text)


@given(st.binary(max_size=60))
@example(b"")
@example(b"\xff\xfe")
@example(b"\xff\xfea")
@example(b"\xff\xfe\x00\xd8")  # the first half of a pair
@example(b"\xff\xfe\x00\x00a\x00\x00\x00")  # UTF-32
@example(b"\xef\xbb\xbf")
@example(b"\xed\xa0\x80")  # a surrogate in UTF-8
@example(b"a\x00")
def test_bytes_are_text_or_refused(content):
    try:
        text = check_own_text(content)
    except UserError as error:
        assert str(error).isprintable()
    else:
        assert text.strip()
        assert "\0" not in text and "\r" not in text
        assert check_own_text(text) in (text, text.removeprefix("\ufeff"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"caf\xe9 noir", "not UTF-8 text (byte 3)"),
        (codecs.BOM_UTF8 + b"caf\xe9 noir", "not UTF-8 text (byte 6)"),
        ("é".encode() * 600 + b"\xff", "not UTF-8 text (byte 1,200)"),
        (codecs.BOM_UTF16_LE + b"a\x00b", "not UTF-16 text (byte 4)"),
        (codecs.BOM_UTF8 + "é\0".encode(), "byte 5 is zero"),
        (codecs.BOM_UTF16_BE + "a\0".encode("utf-16-be"), "byte 4 is zero"),
        ("GIF\0".encode("utf-16-le"), "byte 1 is zero"),  # without a mark
        ("ab\0c", "character 2 is a zero"),
        ("ab\ud800c", "character 2 of the text is half a character"),
    ],
)
def test_where_a_text_is_none_and_what_to_do(content, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        check_own_text(content)
    assert re.search(r"Save it as .*UTF-8,? and try again\.|Take it out\.", str(caught.value))


@pytest.mark.parametrize(
    "content", ["", " \r\n\t", "<|endoftext|>", " <|endoftext|>\n", b"", b"\xef\xbb\xbf\n", None, 7]
)
def test_nothing_is_no_text(content):
    with pytest.raises(UserError, match="there is no text: paste some"):
        check_own_text(content)


def test_the_longest_text():
    longest = "ä" * MAX_OWN_TEXT
    assert check_own_text(longest) == longest
    assert check_own_text(longest.encode()) == longest
    for content in (longest + "b", (longest + "b").encode()):
        with pytest.raises(UserError, match="1,000,001 characters; at most 1,000,000"):
            check_own_text(content)


def test_digest():
    assert text_digest("") == "e3b0c44298fc"
    assert text_digest("Grüße") == hashlib.sha256("Grüße".encode()).hexdigest()[:12]
