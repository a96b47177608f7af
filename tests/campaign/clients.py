"""Many programs at once on one page: are their numbers right, how long do they wait, and what
becomes of the memory?"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from time import monotonic, sleep
from typing import Any

from gradio_client import Client

from tests.campaign.server import Server, serving
from tests.campaign.table import Table

CALIBRATED = (
    {"method": "cmoe", "active": 0.5},
    {"method": "neurons", "active": 0.5},
    {"order": "fluctuation", "compensation": "mean"},
)
PROMPTS = ("Once upon a time", "The little dog", "What is the capital of France?")
KINDS = {"preview": 12, "evaluate": 4, "generate": 2, "models": 2}  # how often, of twenty calls
# Which kernels write is decided by their times, so in 16 bits two servers may break a tie between
# two tokens in different ways.
KERNELS = "plain"
EVERY = 2.0  # seconds between two looks at the memory
PREVIEW_LIMIT = 2.0  # seconds of the 99th percentile
GROWTH_LIMIT = 0.05  # of the memory, over the second half


@dataclass
class Log:
    """What all clients have seen."""

    answers: list[tuple[str, Any]] = field(default_factory=list)  # key of the call, answer
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: list[float] = field(
        default_factory=list
    )  # seconds to the first message of a measurement
    failed: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)


def call_of(random: Random, calibrated: bool) -> tuple[str, dict[str, Any]]:
    """An endpoint, and what it is asked."""
    (kind,) = random.choices(list(KINDS), list(KINDS.values()))
    if kind == "models":
        return kind, {}
    values: dict[str, Any] = {"branches": random.choice((8, 16))}
    values["fade"] = random.choice((0.0, 0.3, 0.6, 0.9))
    values["keep"] = random.choice((None, 6, 7, 8))
    if kind != "preview" and calibrated and random.random() < 0.25:
        values = {"branches": 16, "keep": None, "more": dict(random.choice(CALIBRATED))}
        if "order" in values["more"]:
            values |= {"keep": 12, "compensation": values["more"].pop("compensation")}
    if kind == "evaluate":
        values["text"] = "proxy"
    if kind == "generate":
        values |= {"prompt": random.choice(PROMPTS), "tokens": 12}
    return kind, values


def key_of(kind: str, values: dict[str, Any]) -> str:
    return repr((kind, sorted(values.items())))


def work(server: Server, model: str, number: int, until: float, log: Log, calibrated: bool) -> None:
    random, client = Random(number), Client(server.url, verbose=False)
    while monotonic() < until:
        kind, values = call_of(random, calibrated)
        asked = values if kind == "models" else values | {"model": model}
        began = monotonic()
        try:
            job = client.submit(**asked, api_name=f"/{kind}")
            if kind == "evaluate":
                while not job.outputs() and not job.done():
                    sleep(0.02)
                log.first.append(monotonic() - began)
            found = job.result(timeout=900)
        except Exception as error:
            log.failed.append(f"{kind} {values}: {error!r:.200}")
            continue
        log.seconds[kind].append(monotonic() - began)
        log.answers.append((key_of(kind, values), found))
        sleep(random.random() * 0.2)


def watch(server: Server, until: float, log: Log) -> None:
    while monotonic() < until:
        log.memory.append(server.memory)
        sleep(EVERY)


def run_clients(server: Server, model: str, count: int, minutes: float, calibrated: bool) -> Log:
    log, until = Log(), monotonic() + 60 * minutes
    threads = [
        threading.Thread(target=work, args=(server, model, number, until, log, calibrated))
        for number in range(count)
    ]
    threads.append(threading.Thread(target=watch, args=(server, until, log)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return log


def serial(server: Server, model: str, keys: set[str]) -> Iterator[tuple[str, Any]]:
    """The same calls, one after the other, on a server that nobody else uses."""
    client = Client(server.url, verbose=False)
    for key in sorted(keys):
        kind, values = eval(key, {"__builtins__": {}})  # as `key_of` has written it
        values = dict(values)
        asked = values if kind == "models" else values | {"model": model}
        yield key, client.predict(**asked, api_name=f"/{kind}")


def differs(found: Any, wanted: Any) -> bool:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return found.keys() != wanted.keys() or any(differs(found[k], wanted[k]) for k in found)
    if isinstance(found, float) and isinstance(wanted, float):
        return abs(found - wanted) > 1e-6 * max(1.0, abs(wanted))
    return found != wanted


def percentile(seconds: list[float], share: float) -> float:
    ordered = sorted(seconds)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def ready(server: Server, model: str) -> None:
    """Once the model of the page is loaded."""
    client = Client(server.url, verbose=False)
    while True:
        listed = {entry["key"]: entry["loaded"] for entry in client.predict(api_name="/models")}
        if listed.get(model):
            return
        sleep(0.5)


def campaign(folder: Path, model: str, count: int, minutes: float, calibrated: bool) -> Table:
    """The figures of `count` clients over so many minutes."""
    table = Table(f"{count} clients for {minutes:g} minutes on {model}")
    with serving(folder, MLPMOE_FIRST_MODEL=model, MLPMOE_KERNELS=KERNELS) as server:
        ready(server, model)
        before = server.memory
        log = run_clients(server, model, count, minutes, calibrated)
    with serving(folder, MLPMOE_FIRST_MODEL=model, MLPMOE_KERNELS=KERNELS) as server:
        ready(server, model)
        wanted = dict(
            serial(server, model, {key for key, _ in log.answers if "'models'" not in key})
        )
    wrong = [
        f"{key}: {found} and not {wanted[key]}"
        for key, found in log.answers
        if key in wanted and differs(found, wanted[key])
    ]
    table.row("calls answered", f"{len(log.answers):,}", bool(log.answers))
    table.row("calls that failed", f"{len(log.failed)}", not log.failed)
    table.row(f"wrong numbers, against {len(wanted)} serial answers", f"{len(wrong)}", not wrong)
    for kind, seconds in sorted(log.seconds.items()):
        shown = [f"{percentile(seconds, share):.2f}" for share in (0.5, 0.9, 0.99)]
        fine = kind != "preview" or percentile(seconds, 0.99) <= PREVIEW_LIMIT
        table.row(f"/{kind}, {len(seconds)} calls, s: median, 90 %, 99 %", " · ".join(shown), fine)
    table.row(
        "/evaluate, s to the first message: median, 99 %",
        f"{percentile(log.first, 0.5):.2f} · {percentile(log.first, 0.99):.2f}",
    )
    half = len(log.memory) // 2
    middle, last = (max(some, default=0) for some in (log.memory[:half], log.memory[half:]))
    table.row(
        "memory, MB: before, first half at most, second half at most",
        f"{before >> 20:,} · {middle >> 20:,} · {last >> 20:,}",
        not middle or last <= (1 + GROWTH_LIMIT) * middle,
    )
    table.notes += [*log.failed[:5], *(f"wrong: {key}" for key in wrong[:5])]
    return table
