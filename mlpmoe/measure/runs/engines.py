"""Where a sweep runs: in this process, or on workers of Ray, here or on a cluster."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ...core.calibration import Calibration
from ...core.errors import SpecError, UserError
from ...core.spec import ConversionSpec
from ..quality.encoding import EncodedText
from .pace import Pace
from .sweep import AT_ONCE, Baseline, Report, Run, Take, runs_first, sweep

ENGINES = ("local", "ray")
DEFAULT_WORKERS = 2
STORE_BYTES = 100 * 2**20  # of Ray's shared memory on this machine: only texts and runs travel

# load(model, dtype, device) -> model and tokenizer, as `mlpmoe.load` does. measure stands below
# models, so it is told how to load; a worker needs a function that it can import.
Load = Callable[[str, str, str], tuple[PreTrainedModel, Any]]


@dataclass(frozen=True)
class Job:
    """What a worker needs to measure by itself; it can be pickled."""

    model: str  # short name, hub id, or a folder that every worker can read
    text: EncodedText  # what perplexity is measured on
    calibration: Calibration | None = None  # what methods may look at
    dtype: str = "auto"  # name one where workers differ, so that all measure the same
    device: str = "auto"
    window: int | None = None  # tokens, see `perplexity`
    stride: int | None = None
    state: Path | None = None  # a folder from which training that was ended goes on


def run_locally(
    job: Job,
    specs: Sequence[ConversionSpec],
    load: Load,
    report: Report = lambda message: None,
    take: Take = list,
) -> Iterator[Run]:
    """Measure the specs in this process, in their order; see `sweep`."""
    if specs:
        model, _ = load(job.model, job.dtype, job.device)
        yield from sweep(
            model, job.text, specs, job.calibration, job.window, job.stride, report, job.state,
            take,
        )  # fmt: skip


def run_on_ray(
    job: Job,
    specs: Sequence[ConversionSpec],
    load: Load,
    workers: int = DEFAULT_WORKERS,
    report: Report = lambda message: None,
    take: Take = list,
) -> Iterator[Run]:
    """Measure the specs on Ray; yields runs as they are known, in any order. take: see `sweep`.

    Uses the Ray that is initialised, else the cluster that RAY_ADDRESS names, else one that is
    started on this machine and ended again. Each worker takes one CPU core, and a share of the
    GPUs if there are any and the job does not ask for the CPU; it loads the model and measures the
    dense one once. mlpmoe has to be installed where they run. Closing the iterator ends them.

    A spec that cannot be converted raises its SpecError after all others are measured. Raises
    UserError if Ray is not installed or a worker dies, and what `load` raises on a worker.
    """
    if not specs:
        return
    if workers < 1:
        raise UserError(f"workers must be at least 1, not {workers}.")
    pace = Pace(len(specs))
    outcomes = _outcomes(job, specs, load, workers, report, pace, pace.leaving_out(take))
    yield from runs_first(outcomes, pace)


def _outcomes(
    job: Job, specs: Sequence[ConversionSpec], load: Load, workers: int, report: Report, pace: Pace,
    take: Take,
) -> Generator[Run | SpecError, None, None]:  # fmt: skip
    # Groups as large as share a pass over the calibration text, but two for each worker at least.
    size = min(AT_ONCE, -(-len(specs) // (2 * workers)))
    cut = (specs[start : start + size] for start in range(0, len(specs), size))
    groups = (some for group in cut if (some := take(group)))  # each asked for when it is its turn
    report(f"starting Ray, {pace}")
    with _ray(workers) as ray:
        options = {"num_cpus": 1, "num_gpus": _gpus_each(ray.cluster_resources(), job, workers)}
        kind = ray.remote(**options)(_Worker)
        actors = [kind.remote(job, load) for _ in range(min(workers, -(-len(specs) // size)))]
        try:
            # The first thing that each does is to load the model, which may fail.
            begun = zip(actors, groups)  # noqa: B905 – others may have taken some
            working = {actor.measure.remote(some): actor for actor, some in begun}
            while working:
                report(f"{len(actors)} workers on Ray, {pace}")
                (ready, *_), _ = ray.wait(list(working), num_returns=1)
                try:
                    yield ray.get(next(ready))
                except StopIteration:  # the group is done
                    actor = working.pop(ready)
                    if some := next(groups, None):
                        working[actor.measure.remote(some)] = actor
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayActorError as error:
                    reason = str(error).strip().splitlines()[-1][:100]
                    raise UserError(
                        f"a worker of Ray ended ({reason}). What was measured is kept. mlpmoe has "
                        "to be installed where workers run, and each needs memory for the model."
                    ) from error
        finally:
            for actor in actors:
                ray.kill(actor)


class _Worker:
    """A process that measures group after group against one dense model."""

    def __init__(self, job: Job, load: Load) -> None:
        self.job, self.load = job, load
        self.baseline: Baseline | None = None

    def measure(self, specs: Sequence[ConversionSpec]) -> Generator[Run | SpecError, None, None]:
        if self.baseline is None:  # not in __init__, whose errors Ray does not pass on
            job = self.job
            device = job.device.partition(":")[0]  # cuda:1 is the first of the GPUs that Ray shows
            model, _ = self.load(job.model, job.dtype, device)
            self.baseline = Baseline(
                model, job.text, job.calibration, job.window, job.stride, job.state
            )
        yield from self.baseline.outcomes(specs)


@contextmanager
def _ray(workers: int) -> Iterator[Any]:
    """The module ray, initialised; ended again if it was not before."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    try:
        import ray
    except ImportError:
        raise UserError("the engine ray needs Ray: pip install ray.") from None
    if ray.is_initialized():
        yield ray
        return
    where: dict[str, Any] = {"address": "auto"}
    if not os.environ.get("RAY_ADDRESS"):
        where = {
            "address": "local", "num_cpus": workers, "include_dashboard": False,
            "object_store_memory": STORE_BYTES,
        }  # fmt: skip
    try:
        ray.init(**where, log_to_driver=False, logging_level="error")
        yield ray
    finally:
        ray.shutdown()


def _gpus_each(resources: dict[str, float], job: Job, workers: int) -> float:
    """GPUs of a worker: equal shares of all, one at most."""
    gpus = resources.get("GPU", 0.0)
    if job.device == "cpu" or not gpus:
        return 0.0
    return 1.0 if gpus >= workers else int(1e4 * gpus / workers) / 1e4  # Ray's precision
