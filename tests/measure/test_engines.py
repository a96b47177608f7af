"""Engines: a job that travels, both engines with the same numbers, and what goes wrong on Ray."""

import importlib.util
import pickle
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from mlpmoe.core.calibration import Calibration
from mlpmoe.core.errors import SpecError, UserError
from mlpmoe.core.spec import ConversionSpec
from mlpmoe.measure.quality.encoding import encode_text
from mlpmoe.measure.runs.engines import Job, _gpus_each, run_locally, run_on_ray
from mlpmoe.measure.runs.file import RunsFile
from mlpmoe.measure.runs.sweep import AT_ONCE, Run, sweep
from mlpmoe.models import ModelError, load
from tests.tiny import VOCABULARY, byte_tokenizer, save_tiny_model, tiny_model

TEXT = "A heron stood in the reeds.\n<|endoftext|>\nNobody had told the frogs, so they sang on."
SPECS = [
    *(ConversionSpec(branches=b, fade=0.9) for b in (2, 4, 8)),
    *(ConversionSpec(keep=k, order="fluctuation", compensation="mean") for k in (4, 8, 12)),
    ConversionSpec(method="cmoe", active=0.5),
    ConversionSpec(keep=8, order="least-squares", compensation="refit", progressive=True),
]
FAILING = ConversionSpec(fade_unit="1:5")  # of 32 inputs: shows when the model is converted

needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="the extra ray is not installed"
)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("engines") / "tiny")
    generator = torch.Generator().manual_seed(2)
    samples = Calibration(torch.randint(1, VOCABULARY, (8, 64), generator=generator))
    text = encode_text(byte_tokenizer(), TEXT)
    return Job(str(folder), text, samples, "float32", "cpu", 32, 8)


def test_a_job_travels(job):
    copy = pickle.loads(pickle.dumps(job))
    assert (copy.model, copy.window, copy.stride) == (job.model, 32, 8)
    assert all(map(torch.equal, copy.text.documents, job.text.documents))
    assert torch.equal(copy.calibration.samples, job.calibration.samples)


def test_the_local_engine_is_a_sweep(job):
    asked = []

    def loads(*how):
        asked.append(how)
        return tiny_model(), None

    runs = list(run_locally(job, SPECS, loads))
    assert asked == [(job.model, "float32", "cpu")]
    assert runs == list(sweep(tiny_model(), job.text, SPECS, job.calibration, 32, 8))
    assert len(SPECS) > AT_ONCE


def test_nothing_to_measure_loads_nothing(job):
    def fail(*_):
        raise AssertionError("loaded")

    assert list(run_locally(job, [], fail)) == []
    assert list(run_on_ray(job, [], fail)) == []


def test_without_ray(job, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="pip install ray"):
        list(run_on_ray(job, SPECS, load))


def test_workers_are_counted_from_one(job):
    with pytest.raises(UserError, match="at least 1"):
        list(run_on_ray(job, SPECS, load, workers=0))


@pytest.mark.parametrize(
    ("gpus", "device", "workers", "each"),
    [(0, "auto", 2, 0), (4, "cpu", 2, 0), (4, "auto", 2, 1), (2, "cuda:1", 2, 1),
     (1, "cuda", 2, 0.5), (2, "auto", 3, 0.6666)],
)  # fmt: skip
def test_gpus_are_shared_out(job, gpus, device, workers, each):
    resources = {"CPU": 8.0} | ({"GPU": float(gpus)} if gpus else {})
    asked = Job(job.model, job.text, device=device)
    assert _gpus_each(resources, asked, workers) == each


# Ray itself --------------------------------------------------------------------------------


def processes():
    return set(psutil.Process().children(recursive=True))


@pytest.fixture
def alone():
    """Whatever Ray starts is gone when a test ends."""
    import ray

    before = processes()
    assert not ray.is_initialized()
    yield
    assert not ray.is_initialized()
    _, alive = psutil.wait_procs(processes() - before, timeout=30)
    assert not alive


@needs_ray
@pytest.mark.slow
def test_two_workers_measure_what_this_process_does(job, tmp_path, alone):
    """On one file: what this process has measured before is not measured again."""
    file = RunsFile(tmp_path / "runs.jsonl", {"model": "tiny"})
    here = {run.spec: run for run in run_locally(job, SPECS, load)}
    file.append(here[SPECS[0]], 62)
    missing = [spec for spec in SPECS if spec not in file.read()]
    said, measured = [], []
    with pytest.raises(SpecError, match="--fade-unit 1:5: 1:5 zeros need a multiple"):
        for run in run_on_ray(job, [FAILING, *missing], load, 2, said.append):
            measured.append(run)
            file.append(run, 62)
    assert {run.spec for run in measured} == set(missing)  # all others, each once
    assert len(measured) == len(missing)
    found = file.read()
    assert set(found) == set(SPECS)
    for spec, expected in here.items():
        assert found[spec].ratio == pytest.approx(expected.ratio, rel=1e-6)
        assert found[spec].perplexity == pytest.approx(expected.perplexity, rel=1e-6)
        assert found[spec].nonzero == expected.nonzero
        assert found[spec].macs_per_token == expected.macs_per_token
    assert "2 workers on Ray, 7 of 8 measured, about " in " ".join(said)


@needs_ray
@pytest.mark.slow
def test_what_goes_wrong_on_a_worker_is_said_here(job, tmp_path, alone):
    """In one Ray that was there before, which stays."""
    import ray

    def dies(model, dtype, device):  # as for want of memory
        psutil.Process().kill()

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             logging_level="error", object_store_memory=100 * 2**20)  # fmt: skip
    try:
        with pytest.raises(ModelError, match=r"config\.json"):
            list(run_on_ray(replace(job, model=str(tmp_path)), SPECS, load, workers=1))
        with pytest.raises(UserError, match="a worker of Ray ended"):
            list(run_on_ray(job, SPECS, dies, workers=1))
        runs = run_on_ray(job, SPECS, load)
        assert isinstance(next(runs), Run)
        working = [p for p in processes() if "_Worker" in p.name() + " ".join(p.cmdline())]
        assert working
        runs.close()  # as an interrupt does
        assert not psutil.wait_procs(working, timeout=60)[1]
        assert ray.is_initialized()
    finally:
        ray.shutdown()
