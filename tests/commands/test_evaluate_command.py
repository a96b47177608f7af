"""`evaluate` on a tiny saved model: figures, table, texts, refusals."""

import hashlib
import io
import sys
from dataclasses import replace

import datasets
import pytest
import torch

from mlpmoe.__main__ import main
from mlpmoe.core.calibration import Calibration
from mlpmoe.core.conversion import convert
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.cost import speed
from mlpmoe.measure.cost.parameters import parameter_report
from mlpmoe.measure.quality.encoding import encode_stream, scored_tokens, windows
from mlpmoe.measure.quality.perplexity import compare, measure, perplexity
from mlpmoe.measure.runs.file import RunsFile
from mlpmoe.models import TEXTS, catalogue
from mlpmoe.models import texts as named_texts
from tests.commands.common import STORIES, TEXT, refused, row, strictly
from tests.tiny import CONTEXT, byte_tokenizer, save_tiny_model, tiny_model

SEEN = " ".join(f"stone {number}" for number in range(200))[:1500]  # 1,500 tokens


def test_json_holds_what_the_library_says(evaluate):
    status, out, err = evaluate("--branches", "6", "--fade", "0.9", "--keep", "4", "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    dense, spec = tiny_model(), ConversionSpec(branches=6, fade=0.9, keep=4)
    converted = convert(dense, spec)
    assert found["spec"] == spec.to_dict()
    measured = [perplexity(model, byte_tokenizer(), TEXT) for model in (dense, converted)]
    for name, model, expected in zip(
        ("dense", "converted"), (dense, converted), measured, strict=True
    ):
        report = parameter_report(model)
        assert found[name]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
        assert found[name]["stderr"] == pytest.approx(expected.stderr, rel=1e-5)
        assert found[name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        for field in ("total", "nonzero", "mlp_total", "mlp_nonzero", "macs_per_token"):
            assert found[name][field] == getattr(report, field)
    change = compare(*measured)
    assert found["perplexity_change"]["ratio"] == pytest.approx(change.ratio, rel=1e-6)
    assert found["perplexity_change"]["measurable"] == change.measurable
    assert (
        found["setting"]
        | {
            "dtype": "float32",
            "device": "cpu",
            "text": "mine.txt",
            "documents": 2,
            "bytes": measured[0].tokens,
            "tokens": measured[0].tokens,
            "protocol": "documents",
            "window": CONTEXT,
            "stride": CONTEXT,
            "layers": 2,
        }
        == found["setting"]
    )
    assert found["speed"] is None


def test_table(evaluate):
    status, out, err = evaluate("--branches", "4", "--fade", "0.9", "--dtype", "float32")
    assert (status, err) == (0, "")
    dense, converted = tiny_model(), convert(tiny_model(), ConversionSpec(branches=4, fade=0.9))
    reports = [parameter_report(model) for model in (dense, converted)]
    values = [perplexity(model, byte_tokenizer(), TEXT) for model in (dense, converted)]
    assert "2 documents" in out
    assert "--branches 4 --fade 0.9" in out
    assert "±" in row(out, "perplexity")[1]
    assert row(out, "perplexity")[1:3] == [f"{m.value:,.2f} ± {m.stderr:,.2f}" for m in values]
    assert row(out, "bits per byte")[1:3] == [f"{m.bits_per_byte:.3f}" for m in values]
    assert row(out, "parameters")[1:] == [
        f"{reports[0].total:,}",
        f"{reports[0].total + 2 * 4:,}",
        "+8 (±0.0 %)",
    ]
    zeros = reports[0].nonzero - reports[1].nonzero
    assert row(out, "not zero")[3].startswith(f"−{zeros:,} (−")
    assert row(out, "in MLPs, not zero")[2] == f"{reports[1].mlp_nonzero:,}"
    assert row(out, "multiply-adds per token")[3] == "0"
    assert "save neither multiply-adds nor time" in out
    assert "tokens written" not in out
    header, *body = out.split("\n\n")[1].splitlines()
    assert header.split() == ["dense", "converted", "difference"]
    start = header.index("difference")
    assert all(line[start - 1] == " " != line[start] for line in body)


def test_without_fade_nothing_is_said_about_zeros(evaluate):
    _, out, _ = evaluate("--keep", "12", "--compensation", "none")
    assert "--keep 12 --compensation none" in out
    assert "Fade" not in out


def test_the_same_model_has_no_measurable_change(evaluate):
    _, out, _ = evaluate("--branches", "1")
    assert row(out, "perplexity")[3] == "no measurable change"
    assert row(out, "bits per byte")[3] == "+0.000"


def test_speed(evaluate, monkeypatch):
    moments = iter(range(10**6))
    monkeypatch.setattr(speed, "perf_counter", lambda: next(moments))  # each takes a second
    _, out, _ = evaluate(speed=True)
    assert row(out, "tokens written per second")[1:] == ["16.0", "16.0", "no measurable change"]
    _, out, _ = evaluate("--json", speed=True)
    assert strictly(out)["speed"]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("flags", "stride"), [(["--stride", "3"], 3), (["--stride", "16"], 16), ([], 16)]
)
def test_windows(evaluate, flags, stride):
    _, out, _ = evaluate("--window", "16", *flags, "--json")
    found = strictly(out)
    assert (found["setting"]["window"], found["setting"]["stride"]) == (16, stride)
    expected = perplexity(tiny_model(), byte_tokenizer(), TEXT, window=16, stride=stride)
    assert found["dense"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    assert found["setting"]["tokens"] == expected.tokens
    _, out, _ = evaluate("--window", "16", *flags)
    assert f"windows of 16 tokens {'without overlap' if stride == 16 else 'every 3'}" in out


def test_both_protocols_of_a_file(evaluate, text):
    """Its documents one by one, or all joined, the line between them too, and cut."""
    content = "\n<|endoftext|>\n".join(f"Goose {n} of {n * n} – a grey one." for n in range(30))
    text.write_text(content, encoding="utf-8")
    documents = perplexity(tiny_model(), byte_tokenizer(), content, window=64)
    stream = encode_stream(byte_tokenizer(), content, window=64)
    expected = {
        "documents": (30, documents),
        "stream": (len(byte_tokenizer()(content).input_ids) // 64, measure(tiny_model(), stream)),
    }
    for protocol, (count, measured) in expected.items():
        status, out, err = evaluate("--protocol", protocol, "--window", "64", "--json")
        assert (status, err) == (0, "")
        found = strictly(out)
        setting = {
            "text": "mine.txt", "protocol": protocol, "documents": count,
            "tokens": measured.tokens, "window": 64, "stride": 64,
        }  # fmt: skip
        assert found["setting"].items() >= setting.items()
        for field, value in (("perplexity", measured.value), ("stderr", measured.stderr)):
            assert found["dense"][field] == pytest.approx(value, rel=1e-5)
    _, out, _ = evaluate("--protocol", "stream", "--window", "64", "--stride", "64")
    windows = expected["stream"][0]
    assert f"mine.txt: {windows} windows, " in out
    assert f" {windows * 63:,} tokens, windows of 64 tokens without overlap" in out
    done = evaluate("--protocol", "stream", "--window", "64", "--stride", "7")
    assert refused(done, "a stream is cut into windows without overlap: leave out --stride")


def test_a_stream_has_the_window_of_published_figures(evaluate, text):
    text.write_text("x" * 300, encoding="utf-8")
    _, out, _ = evaluate("--protocol", "stream", "--json")
    setting = strictly(out)["setting"]  # 2,048 tokens, but for the context
    assert (setting["window"], setting["tokens"]) == (CONTEXT, CONTEXT - 1)
    done = evaluate("--protocol", "stream", "--window", "302")
    assert refused(done, f"context of {CONTEXT} tokens")


def test_infinite_numbers_become_null(evaluate, text):
    """One scored token has no standard error."""
    text.write_text("a", encoding="utf-8")
    status, out, _ = evaluate("--json")
    assert status == 0
    assert strictly(out)["dense"]["stderr"] is None
    status, out, _ = evaluate()
    assert status == 0
    assert "nan" not in out


def test_a_model_that_overflows_is_no_measure(tmp_path, text, capsys):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[:] = 3e38
    model.save_pretrained(tmp_path / "broken")
    byte_tokenizer().save_pretrained(tmp_path / "broken")
    assert main(["evaluate", str(tmp_path / "broken"), "--text", str(text), "--no-speed"]) != 0
    printed = capsys.readouterr()
    assert "∞" not in printed.out
    assert "the dense model has infinite or undefined losses on this text" in printed.err


@pytest.fixture
def shipped(monkeypatch, tmp_path):
    """Shipped texts that take a moment only; what each begins with, in place of the real ones."""
    (tmp_path / "texts").mkdir()
    for name, content in {
        "evaluation": "Hello.", "calibration": STORIES,
        "prose-evaluation": "A heron.", "prose-calibration": STORIES.replace("Stone", "Rock"),
    }.items():  # fmt: skip
        (tmp_path / "texts" / f"{name}.txt").write_text(content, encoding="utf-8")
    monkeypatch.setattr(named_texts, "assets_folder", lambda: tmp_path)


def test_shipped_texts_are_the_default(folder, capsys, shipped, monkeypatch):
    """Prose, but for the demo model."""
    evaluate = ["evaluate", str(folder), "--no-speed", "--json", "--method", "cmoe"]
    assert main(evaluate) == 0
    setting = strictly(capsys.readouterr().out)["setting"]
    assert (setting["text"], setting["tokens"]) == ("prose", len("A heron."))
    assert setting["calibration"] == "prose"
    entry = replace(catalogue.CATALOGUE[0], source=folder)
    monkeypatch.setattr(catalogue, "CATALOGUE", (entry,))
    assert main(["evaluate", "demo", *evaluate[2:]]) == 0
    setting = strictly(capsys.readouterr().out)["setting"]
    assert (setting["text"], setting["tokens"]) == ("stories", len("Hello."))
    assert setting["calibration"] == "stories"


def test_calibration_texts_by_name(evaluate, shipped):
    """The default, prose, is another one; a file is called like one has its folder in front."""
    flags, found = ["--method", "cmoe", "--active", "0.5", "--json"], {}
    for name in ("stories", "prose"):
        _, out, _ = evaluate(*flags, "--calibration", name)
        found[name] = strictly(out)
        assert found[name]["setting"]["calibration"] == name
    assert found["stories"]["converted"] != found["prose"]["converted"]
    _, out, _ = evaluate(*flags)
    assert strictly(out)["converted"] == found["prose"]["converted"]
    status, out, err = evaluate(*flags, "--calibration", "./stories")
    assert (status, out) == (1, "")
    assert "stories cannot be read" in err


def test_a_byte_order_mark_is_no_text(evaluate, text):
    text.write_text(TEXT, encoding="utf-8-sig")
    _, out, _ = evaluate("--json")
    assert strictly(out)["setting"]["bytes"] == len(TEXT.replace("\n<|endoftext|>\n", "").encode())


def test_progress_is_shown_to_people_only(evaluate, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    status, out, _ = evaluate()
    assert status == 0
    assert "perplexity, converted 50%" in terminal.getvalue()  # the first of two documents
    assert terminal.getvalue().endswith("\r\033[K")  # nothing is left of it
    assert "50%" not in out


# Texts with a name -------------------------------------------------------------------------

LINES = [
    "",
    " = Title = \n",
    "",
    *(f" Line {n} of {n * n} grey geese – {n % 7} .\n" for n in range(60)),
]


@pytest.fixture
def wikitext(monkeypatch):
    """WikiText-2, as short as LINES; its whole text."""
    rows = datasets.Dataset.from_dict({"text": LINES})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    return "\n\n".join(LINES)


@pytest.fixture
def named(folder, capsys):
    """Run `evaluate` with these flags on a model, the tiny one by default, and no file."""

    def run(*flags, model=folder):
        status = main(["evaluate", str(model), "--no-speed", *flags])
        return status, *capsys.readouterr()

    return run


@pytest.mark.parametrize("window", [None, 64])
def test_windows_without_overlap(named, wikitext, window):
    flags = ["--text", "wikitext2", *(["--window", str(window)] if window else [])]
    status, out, err = named(*flags, "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    expected = encode_stream(byte_tokenizer(), wikitext, window=window or CONTEXT)
    parts = windows(tiny_model(), expected)
    setting = {
        "text": "wikitext2",
        "text_digest": hashlib.sha256(wikitext.encode()).hexdigest()[:12],
        "protocol": "stream",
        "documents": len(expected.documents),
        "bytes": sum(part.size for part in parts),
        "tokens": scored_tokens(parts),
        "window": window or CONTEXT,
        "stride": window or CONTEXT,
    }
    assert found["setting"].items() >= setting.items()
    value = measure(tiny_model(), expected).value
    assert found["dense"]["perplexity"] == pytest.approx(value, rel=1e-6)
    status, out, err = named(*flags)
    assert (status, err) == (0, "")
    assert f"windows of {window or CONTEXT} tokens without overlap" in out


def test_windows_of_published_figures(named, wikitext, tmp_path):
    model = save_tiny_model(tmp_path / "long", max_position_embeddings=4096)
    status, out, err = named("--text", "wikitext2", model=model)
    assert (status, err) == (0, "")
    assert "wikitext2: 1 windows, " in out
    assert "2,047 tokens, windows of 2,048 tokens without overlap" in out


def test_a_public_text_by_documents(named, wikitext):
    """As one document, since it has no lines of <|endoftext|>, with or without overlap."""
    for stride in (64, 16):
        flags = ["--protocol", "documents", "--window", "64", "--stride", str(stride)]
        status, out, _ = named("--text", "wikitext2", *flags, "--json")
        assert status == 0
        found = strictly(out)
        expected = perplexity(tiny_model(), byte_tokenizer(), wikitext, 64, stride)
        setting = {"protocol": "documents", "documents": 1, "tokens": expected.tokens}
        assert found["setting"].items() >= setting.items()
        assert found["dense"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)


def test_proxy_is_scored_by_documents(named):
    status, out, _ = named("--text", "proxy", "--json")
    assert status == 0
    setting = strictly(out)["setting"]
    assert (setting["text"], setting["protocol"]) == ("proxy", "documents")
    assert setting["stride"] == CONTEXT


def test_a_stride_is_refused_where_windows_do_not_overlap(named, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", None)  # before anything is read
    for text in ("wikitext2", "c4"):
        done = named("--text", text, "--stride", "7")
        assert refused(done, "without overlap: leave out --stride")


def test_a_window_longer_than_the_context_is_refused(named, wikitext):
    done = named("--text", "wikitext2", "--window", str(CONTEXT + 1))
    assert refused(done, f"context of {CONTEXT} tokens")


def test_a_public_text_that_fills_no_window(named, monkeypatch):
    rows = datasets.Dataset.from_dict({"text": ["Short."]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert refused(named("--text", "c4"), f"has 7 tokens; at least one window of {CONTEXT}")


def test_a_public_text_without_network(named, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/c4' on the Hub (OfflineModeIsEnabled)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    status, out, err = named("--text", "c4")
    assert (status, out) == (1, "")
    assert "C4 (validation) is not on this machine, which is set to work offline" in err
    assert err.count("\n") == 1


def test_a_name_wins_over_a_file_written_without_its_folder(named, wikitext, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for file in ("wikitext2", "mine"):
        (tmp_path / file).write_text(TEXT, encoding="utf-8")
    for flag, protocol in [
        ("wikitext2", "stream"),
        ("./wikitext2", "documents"),
        (str(tmp_path / "wikitext2"), "documents"),
        ("mine", "documents"),
    ]:
        status, out, _ = named("--text", flag, "--json")
        assert status == 0
        setting = strictly(out)["setting"]
        content = wikitext if protocol == "stream" else TEXT
        assert setting["protocol"] == protocol
        assert setting["text"] == flag.rsplit("/", 1)[-1]
        assert setting["text_digest"] == hashlib.sha256(content.encode()).hexdigest()[:12]


def test_unknown_names_are_refused(named):
    done = named("--text", "wikitext")
    assert refused(done, f"no file wikitext, and no text of that name: {', '.join(TEXTS)}")


def test_a_file_in_utf_16(evaluate, text):
    _, expected, _ = evaluate()
    text.write_bytes(TEXT.replace("\n", "\r\n").encode("utf-16"))
    assert evaluate() == (0, expected, "")


# Calibration -------------------------------------------------------------------------------


def test_a_routed_conversion(evaluate, stories):
    flags = ["--method", "cmoe", "--active", "0.5", "--calibration", str(stories)]
    status, out, err = evaluate(*flags, "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    spec = ConversionSpec(method="cmoe", active=0.5)
    calibration = Calibration.from_text(byte_tokenizer(), STORIES)
    converted = convert(tiny_model(), spec, calibration)
    expected, report = perplexity(converted, byte_tokenizer(), TEXT), parameter_report(converted)
    assert found["spec"] == spec.to_dict()
    assert found["converted"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    for field in ("total", "active_per_token", "mlp_macs_per_token"):
        assert found["converted"][field] == getattr(report, field)
    assert found["converted"]["active_per_token"] < found["dense"]["active_per_token"]
    assert found["setting"]["calibration"] == "stories.txt"
    assert found["setting"]["calibration_tokens"] == calibration.samples.numel()
    status, out, err = evaluate(*flags)
    assert (status, err) == (0, "")
    assert f"calibrated on stories.txt, {calibration.samples.numel():,} tokens" in out
    assert "converted with --method cmoe --active 0.5" in out
    assert row(out, "in MLPs")[2] == f"{report.mlp_total:,}"


@pytest.mark.parametrize(
    ("flags", "samples", "length"),
    [([], 11, 128), (["--nsamples", "9", "--seqlen", "64"], 9, 64), (["--seqlen", "32"], 48, 32)],
    ids=str,
)
def test_number_and_length_of_calibration_samples(evaluate, stories, flags, samples, length):
    """As in other projects' scripts; without a number, the whole text of 1,500 tokens."""
    stories.write_text(SEEN, encoding="utf-8")
    flags = ["--method", "cmoe", "--active", "0.5", "--calibration", str(stories), *flags]
    status, out, err = evaluate(*flags, "--json")
    assert (status, err) == (0, "")
    found = strictly(out)
    text = Calibration.from_text(byte_tokenizer(), SEEN, tokens=samples * length, length=length)
    assert text.samples.shape == (samples, length)
    assert found["setting"]["calibration_tokens"] == samples * length
    spec = ConversionSpec(method="cmoe", active=0.5)
    expected = perplexity(convert(tiny_model(), spec, text), byte_tokenizer(), TEXT)
    assert found["converted"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--nsamples", "2000"], "makes 11 samples of 128 tokens, not 2,000"),
        (["--nsamples", "8", "--seqlen", str(CONTEXT)], "at least 2,048 are needed"),
        (["--seqlen", str(CONTEXT + 1)], f"context has {CONTEXT} tokens"),
    ],
    ids=str,
)
def test_samples_that_cannot_be_had_are_refused(evaluate, stories, flags, words):
    stories.write_text(SEEN, encoding="utf-8")
    assert refused(evaluate("--method", "cmoe", "--calibration", str(stories), *flags), words)


@pytest.mark.parametrize("flags", [["--nsamples", "7"], ["--seqlen", "1"], ["--nsamples", "x"]])
def test_samples_that_make_no_sense_are_wrong_usage(evaluate, flags, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate(*flags)
    assert ended.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_too_few_tokens_for_a_fit_are_said(evaluate, stories):
    """The usual 1,024 are enough for 48 neurons, a quarter of them is not."""
    fitted = ["--keep", "12", "--order", "least-squares", "--calibration", str(stories)]
    status, _, err = evaluate(*fitted)
    assert (status, err) == (0, "")
    status, out, err = evaluate(*fitted, "--nsamples", "8", "--seqlen", "32")
    assert status == 0
    assert "converted with" in out
    assert err == (
        "mlpmoe: least squares solves for 48 neurons per layer on 256 calibration tokens; give it "
        "at least 384.\n"
    )


def test_what_looks_at_nothing_names_no_calibration_text(evaluate, stories):
    _, out, _ = evaluate("--method", "random", "--calibration", str(stories), "--json")
    assert strictly(out)["setting"]["calibration"] is None
    _, out, _ = evaluate("--method", "random", "--calibration", str(stories))
    assert "calibrated" not in out


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_calibrating_on_what_is_measured_is_refused(folder, stories, tmp_path, capsys, command):
    """The same file, and another one that shares a line with it, spaced otherwise."""
    other = tmp_path / "other.txt"
    shared = STORIES.splitlines()[4]
    other.write_text(f"{TEXT}\n  {shared.upper().replace(' ', '  ')}\n", encoding="utf-8")
    for measured in (stories, other):
        flags = ["--method", "cmoe", "--text", str(measured), "--calibration", str(stories)]
        assert main([command, str(folder), *flags]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "share a passage" in err
        assert err.count("\n") == 1


def test_a_short_calibration_text_is_refused(evaluate, stories):
    stories.write_text(STORIES[:500], encoding="utf-8")
    status, out, err = evaluate("--method", "cmoe", "--calibration", str(stories))
    assert (status, out) == (2, "")
    assert "at least 1,024 are needed" in err
    assert err.count("\n") == 1
    status, *_ = evaluate("--method", "random", "--calibration", str(stories))
    assert status == 0  # nothing looks at it


def test_a_calibration_text_that_is_not_there(evaluate, tmp_path):
    status, out, err = evaluate("--method", "cmoe", "--calibration", str(tmp_path / "none.txt"))
    assert (status, out) == (1, "")
    assert "none.txt cannot be read: No such file" in err


# The stages of a static conversion ---------------------------------------------------------

STATIC = {
    "order": (["--order", "norm", "--keep", "12"], {"order": "norm", "keep": 12}),
    "random": (
        ["--order", "random", "--keep", "8", "--seed", "3"],
        {"order": "random", "keep": 8, "seed": 3},
    ),
    "pattern": (
        ["--order", "norm", "--fade-unit", "2:4", "--fade-score", "wanda"],
        {"order": "norm", "fade_unit": "2:4", "fade_score": "wanda"},
    ),
    "neurons": (
        ["--fade", "1", "--fade-unit", "neuron", "--fade-schedule", "reverse"],
        {"fade": 1.0, "fade_unit": "neuron", "fade_schedule": "reverse"},
    ),
    "power": (
        ["--fade", "0.9", "--fade-schedule", "power", "--fade-exponent", "3"],
        {"fade": 0.9, "fade_schedule": "power", "fade_exponent": 3.0},
    ),
    "half of the weights": (
        ["--branches", "1", "--sparsity", "0.5", "--fade-schedule", "uniform"],
        {"branches": 1, "fade": 1.0, "fade_schedule": "uniform"},
    ),
    "all matrices": (
        ["--fade", "0.6", "--fade-schedule", "uniform", "--fade-projections", "down-gate-up"],
        {"fade": 0.6, "fade_schedule": "uniform", "fade_projections": "gate-up-down"},
    ),
    "fitted": (
        ["--fade", "0.6", "--fade-score", "sparsegpt", "--compensation", "refit"],
        {"fade": 0.6, "fade_score": "sparsegpt", "compensation": "refit"},
    ),
    "allocated": (
        ["--keep", "10", "--order", "least-squares", "--compensation", "mean",
         "--allocation", "sensitivity", "--progressive", "true"],
        {"keep": 10, "order": "least-squares", "compensation": "mean",
         "allocation": "sensitivity", "progressive": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "fields"), STATIC.values(), ids=STATIC)
def test_flags_of_the_static_stages_do_what_the_library_does(evaluate, stories, flags, fields):
    status, out, err = evaluate(*flags, "--calibration", str(stories), "--json")
    assert (status, err) == (0, "")
    found, spec = strictly(out), ConversionSpec(**fields)
    assert found["spec"] == spec.to_dict()
    calibration = Calibration.from_text(byte_tokenizer(), STORIES)
    converted = convert(tiny_model(), spec, calibration if spec.needs_calibration else None)
    expected, report = perplexity(converted, byte_tokenizer(), TEXT), parameter_report(converted)
    assert found["converted"]["perplexity"] == pytest.approx(expected.value, rel=1e-6)
    assert found["converted"]["perplexity"] != pytest.approx(found["dense"]["perplexity"])
    for field in ("total", "mlp_total", "mlp_nonzero", "macs_per_token", "mlp_macs_per_token"):
        assert found["converted"][field] == getattr(report, field)
    name = "stories.txt" if spec.needs_calibration else None
    assert found["setting"]["calibration"] == name


def test_the_shown_flags_give_the_same_again(evaluate, stories):
    flags, _ = STATIC["allocated"]
    texts = ["--calibration", str(stories)]
    _, out, _ = evaluate(*flags, *texts)
    (line,) = (line for line in out.splitlines() if line.startswith("converted with "))
    _, again, _ = evaluate(*line.removeprefix("converted with ").split(), *texts)
    assert again == out


def test_evaluation_is_another_name_of_text(folder, text, capsys):
    assert main(["evaluate", str(folder), "--evaluation", str(text), "--no-speed", "--json"]) == 0
    assert strictly(capsys.readouterr().out)["setting"]["text"] == "mine.txt"


def test_dropped_neurons_are_no_zeros_in_place(evaluate):
    _, out, _ = evaluate("--fade", "1", "--fade-unit", "neuron")
    assert "−" in row(out, "multiply-adds per token")[3]
    assert "save neither" not in out


def test_a_pattern_leaves_its_zeros_in_place(evaluate):
    _, out, _ = evaluate("--fade-unit", "2:4")
    assert row(out, "multiply-adds per token")[3] == "0"
    assert "save neither multiply-adds nor time" in out


# Refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--fade", "7"], "between 0 and 2"),
        (["--fade", "much"], "must be a number"),
        (["--fade", "-1"], "between 0 and 2"),
        (["--sparsity", "0.5", "--fade", "0.9"], "fade and sparsity say the same"),
        (["--sparsity", "0.8"], "at most 0.71875 of the weights in 16 branches"),
        (["--sparsity", "50%"], "sparsity must be a number, not '50%'"),
        (["--sparsity", "0.5", "--method", "cmoe"], "sparsity does not belong to the method cmoe"),
        (["--sparsity", "0.5", "--fade-unit", "2:4"], "leave out sparsity"),
        (["--keep", "17"], "branches (B) = 16"),
        (["--keep", "all"], "must be a number"),
        (["--branches", "0"], "at least 1"),
        (["--branches", "500"], "between 1 and 48"),
        (["--method", "magic"], "must be one of"),
        (["--compensation", "magic"], "sqrt, ratio, none"),
        (["--window", "999"], f"context of {CONTEXT} tokens"),
        (["--stride", "0"], "stride must lie"),
        (["--window", "16", "--stride", "17"], "between 1 and the window of 16, not 17"),
        (["--order", "magic"], "order must be one of"),
        (["--order", ""], "order must be one of"),
        (["--allocation", "magic"], "allocation must be one of"),
        (["--fade-schedule", "magic"], "linear, uniform, reverse, power"),
        (["--fade-exponent", "3"], "belongs to the schedule power"),
        (["--fade-schedule", "power", "--fade-exponent", "0"], "more than 0"),
        (["--fade-schedule", "power", "--fade-exponent", "x"], "must be a number"),
        (["--fade-projections", "side"], "gate, up or down"),
        (["--fade-projections", "gate,up"], "joined by hyphens"),
        (["--fade-score", "magic"], "magnitude, relative, wanda, sparsegpt"),
        (["--fade-unit", "block"], "weight, neuron, or n:m"),
        (["--fade-unit", "4:2"], "n must be at least 1"),
        (["--fade-unit", "2:4", "--fade", "0.5"], "leave fade at 0"),
        (["--fade-unit", "5:7"], "7"),  # 32 inputs and 48 neurons: no multiples of 7
        (["--fade-unit", "neuron", "--fade-projections", "up"], "leave fade_projections alone"),
        (
            ["--fade-unit", "neuron", "--fade", "2", "--keep", "1", "--fade-schedule", "reverse"],
            "leaves no neuron",
        ),
        (["--progressive", "maybe"], "true or false"),
        (["--progressive", "true"], "no stage of this spec looks at activations"),
        (["--method", "cmoe", "--order", "norm"], "order does not belong to the method cmoe"),
        (["--seed", "-1"], "seed must lie"),
        (["--dtype", "int4"], "bfloat16"),
        (["--device", "abacus"], "cpu"),
    ],
)
def test_wrong_values_are_refused_in_one_line(evaluate, flags, words):
    assert refused(evaluate(*flags), words)


def test_a_text_of_nothing_is_refused(evaluate, text):
    text.write_text(" \n", encoding="utf-8")
    status, out, err = evaluate()
    assert (status, out) == (2, "")
    assert "too short" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"caf\xe9", "mine.txt: the file is not UTF-8 text (byte 3)"),
        (b"a\x00b", "mine.txt: the file is not text (byte 1 is zero)"),
    ],
)
def test_texts_that_cannot_be_read_fail_in_one_line(evaluate, text, content, words):
    text.unlink()
    if content is not None:
        text.write_bytes(content)
    status, out, err = evaluate()
    assert (status, out) == (1, "")
    assert words in err
    assert err.count("\n") == 1


def test_a_folder_is_no_text(evaluate, text):
    text.unlink()
    text.mkdir()
    assert evaluate()[0] == 1


def test_what_a_full_disk_does_not_take_is_shown(evaluate, tmp_path, monkeypatch):
    def full(self, run, tokens):
        raise OSError(f"{self.path} cannot be written: the disk is full.")

    monkeypatch.setattr(RunsFile, "append", full)
    status, out, err = evaluate("--branches", "4", "--json", "--out", str(tmp_path / "runs"))
    assert status == 1 and err.endswith("runs cannot be written: the disk is full.\n")
    assert strictly(out)["converted"]["perplexity"] > 1
