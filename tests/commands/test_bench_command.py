"""`bench`: its table and its JSON, with lines made up."""

import pytest
import torch

from mlpmoe.__main__ import main
from mlpmoe.commands import bench as bench_command
from mlpmoe.measure.cost.bench import BenchLine
from mlpmoe.measure.cost.bench_plan import LARGE, SHAPES
from mlpmoe.measure.cost.speed import Ratio
from tests.commands.common import strictly


@pytest.fixture
def fake_bench(monkeypatch):
    """Three lines instead of minutes of work; remembers what was asked for."""
    asked = []

    def bench(dtype, shape, rounds, written, report, device):
        assert device == "cpu"
        asked.append((dtype, shape, rounds, written))
        name = str(dtype).removeprefix("torch.")
        yield BenchLine(name, "fused, to dense", Ratio(1.0123, 0.99, 1.04), target=1.05)
        yield BenchLine(name, "fade", Ratio(48.5, 47, 49), target=50, at_least=True, note="short")
        yield BenchLine(name, "new memory", Ratio(2e-5, 2e-5, 2e-5), unit="%", target=0.001)
        yield BenchLine(name, "convert", Ratio(0.0123, 0.01, 0.02), unit="s")

    monkeypatch.setattr(bench_command, "bench", bench)
    return asked


def test_bench_table(fake_bench, capsys):
    assert main(["bench"]) == 0
    dtypes = (torch.float32, torch.bfloat16)
    assert fake_bench == [(dtype, shape, 7, 64) for shape in SHAPES.values() for dtype in dtypes]
    header, float32, bfloat16, *others = capsys.readouterr().out.split("\n\n")
    assert len(others) == 2 * len(SHAPES) - 2
    assert f"torch {torch.__version__}" in header
    assert "7 rounds" in header
    title, fused, fade, memory, seconds = float32.splitlines()
    assert title == "demo, float32"
    assert bfloat16.startswith("demo, bfloat16\n")
    assert "× 1.01 (0.990 to 1.04)" in fused
    assert fused.endswith("target ≤ × 1.05: met")
    assert "target ≥ × 50.0: not met" in fade
    assert fade.endswith("short")
    assert "0.002 %" in memory
    assert memory.endswith("target ≤ 0.1 %: met")
    assert "0.0123 s (0.0100 to 0.0200)" in seconds
    assert "target" not in seconds


def test_bench_as_json(fake_bench, capsys):
    arguments = ["bench", "--dtype", "bfloat16", "--shape", "0.5b", "--rounds", "3", "--json"]
    assert main(arguments) == 0
    assert fake_bench == [(torch.bfloat16, SHAPES["0.5b"], 3, 64)]
    found = strictly(capsys.readouterr().out)
    assert (found["rounds"], found["tokens"], found["lines"][0]["shape"]) == (3, 64, "0.5b")
    assert [line["met"] for line in found["lines"]] == [True, False, True, None]
    assert found["lines"][0]["measured"] == {"median": 1.0123, "low": 0.99, "high": 1.04}


def test_a_quick_look(fake_bench, capsys):
    """One shape, few rounds; what is said beside it counts."""
    assert main(["bench", "--quick", "--dtype", "float32"]) == 0
    ((dtype, shape, rounds, _),) = fake_bench
    assert (dtype, shape, rounds) == (torch.float32, SHAPES["smollm2"], 3)
    assert "3 rounds" in capsys.readouterr().out


def test_a_gpu_that_is_not_there(fake_bench, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "--device", "cuda"]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert not fake_bench


def test_on_a_gpu_the_model_is_a_large_one(monkeypatch, capsys):
    asked = []

    def bench(dtype, shape, device, **options):
        asked.append((dtype, shape, device))
        return iter(())

    monkeypatch.setattr(bench_command, "bench", bench)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a chip")
    assert main(["bench", "--device", "cuda"]) == 0
    assert asked == [(torch.bfloat16, LARGE["8b"], "cuda")]
    assert "a chip" in capsys.readouterr().out
