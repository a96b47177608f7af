"""EleutherAI's lm-eval, asked about a model in memory: its tasks, its figures, and its silence.

https://github.com/EleutherAI/lm-evaluation-harness, the package lm-eval, is imported only where it
is used.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tqdm
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...core.conversion import twin_of
from ...core.errors import UserError, not_finite
from ...core.mlps import context_length

PACKAGE = "lm-eval>=0.4.13,<0.5"  # that this was tried with
# Sequences read at a time. Log-probabilities of all their tokens are held in float32: of 4 × 1,000
# tokens and a vocabulary of 150,000 they are 2.4 GB.
BATCH, BATCH_OF_GPU = 4, 16
RESAMPLES = 1000  # for the errors of metrics that are no means, such as F1
LOGGERS = ("lm_eval", "lm-eval", "datasets", "huggingface_hub", "evaluate")
OUTAGES = (
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "ConnectError",
    "ConnectTimeout", "ReadTimeout", "ProxyError", "TimeoutError",
)  # fmt: skip

Progress = Callable[[str, float | None], None]


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their data, as `load_tasks` gives them."""

    names: tuple[str, ...]  # as asked for
    items: tuple[Any, ...]  # tasks and groups of lm_eval
    manager: Any  # which lm_eval would make anew, from thousands of files


def load_tasks(
    names: Sequence[str],
    folder: str | Path | None = None,
    on_progress: Progress = lambda message, share: None,
) -> LoadedTasks:
    """The tasks, groups or tags of lm-eval with these names, and their data, which is fetched from
    the hub where it is not in its cache. folder: one with tasks of your own (YAML), which may run
    code of theirs.

    Raises UserError where lm-eval is missing or too old, a name is unknown or given twice, data
    cannot be had, or a task is of a kind that is not offered.
    """
    manager_class = _task_manager()
    names = [name.strip() for name in names]
    how = f"see the list by python -m lm_eval ls tasks{_including(folder)}"
    if not any(names):
        raise UserError(f"name at least one task; {how}.")
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder} to find tasks in.")
    on_progress("looking for tasks", None)
    with _quiet():
        manager = manager_class(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"lm-eval knows no task {unknown[0]!r:.60}; {how}.")
    items: list[Any] = []
    leaves: dict[str, str] = {}  # name of a task -> what asked for it
    for name in names:
        on_progress(f"reading the task {name}", None)
        try:
            with _quiet():
                loaded = manager.load([name])
        except Exception as error:  # of YAML, templates, data sets and transport
            raise UserError(_explain(error, name)) from error
        _check_offered(loaded["tasks"])
        for leaf in loaded["tasks"]:
            if leaf in leaves:
                raise UserError(
                    f"the task {leaf} is asked for twice, by {leaves[leaf]} and by {name}."
                )
            leaves[leaf] = name
        inside = {child for group in loaded["groups"].values() for child in group.child_names}
        found = {**loaded["tasks"], **loaded["groups"]}
        items += [item for key, item in found.items() if key not in inside]
    return LoadedTasks(tuple(names), tuple(items), manager)


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: LoadedTasks,
    limit: int | None,
    shots: int | None,
    name: str,
    on_progress: Progress,
) -> dict[str, Any]:
    """What lm_eval.simple_evaluate says of one model, which is called `name` in the progress; see
    `task_scores`."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    which = ", ".join(tasks.names)
    which = which if len(which) <= 40 else f"{len(tasks.names)} tasks"
    with _quiet(lambda share: on_progress(f"{which}, {name}", share)):
        try:
            judged = HFLM(
                pretrained=_watched(model),
                tokenizer=copy.deepcopy(tokenizer),  # which lm_eval gives a padding token
                batch_size=BATCH if model.device.type == "cpu" else BATCH_OF_GPU,
                max_length=context_length(model),
                softmax_dtype="float32",
            )
            return lm_eval.simple_evaluate(
                judged,
                tasks=list(tasks.items),
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=RESAMPLES,
                task_manager=tasks.manager,
            )
        except UserError:
            raise
        except (AssertionError, ValueError) as error:
            raise UserError(f"lm-eval cannot judge {which}: {_said(error)}.") from error


def _watched(model: PreTrainedModel) -> PreTrainedModel:
    """The model; in float16 a twin that ends the work where it has no numbers for the logits, which
    lm_eval would take for wrong answers."""
    if model.dtype != torch.float16:
        return model

    def look(_: nn.Module, __: Any, output: Any) -> None:
        if output.logits.isnan().any():
            raise not_finite("this model", torch.float16)

    twin = twin_of(model)
    twin.register_forward_hook(look)
    return twin


def _task_manager() -> type:
    """lm_eval's TaskManager; UserError says what to install where there is none."""
    try:
        with _quiet():
            from lm_eval.tasks import TaskManager
    except ImportError as error:
        name = (error.name or "lm_eval").split(".")[0]
        needs = "lm-eval" if name == "lm_eval" else f"{name}, which comes with lm-eval"
        raise UserError(f'tasks need the package {needs}: pip install "{PACKAGE}".') from None
    if not hasattr(TaskManager, "load"):
        raise UserError(f'this lm-eval is too old for tasks: pip install "{PACKAGE}".')
    return TaskManager


def _including(folder: str | Path | None) -> str:
    return "" if folder is None else f" --include_path {folder}"


def _check_offered(tasks: Mapping[str, Any]) -> None:
    """UserError for tasks that these models cannot or should not be given."""
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"the task {name} runs code that the model writes, which is not done here; lm-eval "
                "does it on an exported checkpoint (--confirm_run_unsafe_code)."
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {name} shows pictures; only tasks of text can be judged.")


def _explain(error: BaseException, name: str) -> str:
    """One sentence for what loading a task raised. What the hub's client says may be wrapped, or
    only its name stand in a message."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    said = "\n".join(f"{type(each).__name__} {each}" for each in chain)
    if any(word in said for word in OUTAGES):
        return (
            f"the data of the task {name} cannot be had: the hub does not answer, or this machine "
            f"is set to work offline. It needs a network once; afterwards it is in the hub's cache "
            f"({_said(error)})."
        )
    return f"the task {name} or its data cannot be read ({_said(error)})."


def _said(error: BaseException) -> str:
    """The first line of an error, short."""
    first = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    text = f"{type(error).__name__}: {first}".removesuffix(": ")
    return text if len(text) <= 200 else f"{text[:197]}..."


@contextmanager
def _quiet(report: Callable[[float], None] = lambda share: None) -> Iterator[None]:
    """lm_eval and what it calls without their lines and bars. report: told the share that is done
    of what a bar of lm_eval's models counts."""

    out = sys.stdout

    class Told(tqdm.tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self.n += n or 0
            if self.total:
                with redirect_stdout(out):
                    report(min(1.0, self.n / self.total))

    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if "datasets" in sys.modules:
            datasets = sys.modules["datasets"]
            if not datasets.are_progress_bars_disabled():
                datasets.disable_progress_bars()
                stack.callback(datasets.enable_progress_bars)
        for name in ("tqdm", "lm_eval.api.model", "lm_eval.api.task", "lm_eval.models.huggingface"):
            module = sys.modules.get(name)
            if module is not None and hasattr(module, "tqdm"):
                stack.callback(setattr, module, "tqdm", module.tqdm)
                module.tqdm = Told
        # errors by resampling in this process: a pool would start another for every core
        before = os.environ.get("DISABLE_MULTIPROC")
        os.environ["DISABLE_MULTIPROC"] = "1"
        stack.callback(_restore, "DISABLE_MULTIPROC", before)
        yield


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
