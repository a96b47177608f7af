"""Long work that can end at many points: since a person stops it, or since its time is up.

Whoever starts the work says how to find out, whoever does it calls `may_stop` wherever a while has
passed since the last time, and neither knows of the other: what runs in between, in as many
functions, needs no word of it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from torch import nn

_Module = TypeVar("_Module", bound=nn.Module)

_check: ContextVar[Callable[[], None] | None] = ContextVar("check", default=None)


@contextmanager
def stoppable(check: Callable[[], None]) -> Iterator[None]:
    """Every `may_stop` inside calls `check`, which ends the work by raising, and the checks around
    it. It holds for this thread, and for others that run in a copy of its context. Not to be held
    over a `yield`: it would hold for the one who asks."""
    outer = _check.get()

    def both() -> None:
        if outer is not None:
            outer()
        check()

    token = _check.set(both)
    try:
        yield
    finally:
        _check.reset(token)


def may_stop() -> None:
    """A point at which work may end: nothing is half changed here."""
    check = _check.get()
    if check is not None:
        check()


def stop_between_modules(model: nn.Module) -> None:
    """Let every module of `model` be such a point before it runs. The hooks stay, so it has to be
    a twin that nobody else runs."""
    for module in model.modules():
        module.register_forward_pre_hook(_before)


def stoppable_twin(model: _Module) -> _Module:
    """`model` with such a point before each of its modules, for a forward pass or two; the model
    itself where nothing could end the work. Everything but the tree of modules is the model's."""
    return model if _check.get() is None else _twin(model, {})


def _twin(module: _Module, made: dict[int, nn.Module]) -> _Module:
    if id(module) not in made:
        twin = made[id(module)] = copy.copy(module)
        twin._modules = {name: each and _twin(each, made) for name, each in twin._modules.items()}
        twin._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
        twin.register_forward_pre_hook(_before)
    return made[id(module)]


def _before(module: nn.Module, inputs: object) -> None:
    may_stop()
