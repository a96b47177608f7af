"""Links to the page: model, spec, text and tab as a query string that a person can read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from urllib.parse import parse_qsl, urlencode

from ...core.errors import UserError
from ...core.presets import PRESETS
from ...core.spec import ConversionSpec
from ...core.written import SPARSITY
from ...models import default_calibration, default_text
from ...models.catalogue import DEMO_KEY
from .settings import check_shown

TABS = {  # key in a link -> name on the page
    "weights": "Weights",
    "lesson": "Lesson",
    "tokens": "Tokens",
    "runs": "Runs",
    "suggest": "Suggest",
    "export": "Export",
}
FIRST_TAB = "weights"
FORMER_TABS = {  # of older links
    "branches": "weights", "experts": "weights", "generations": None, "trade-offs": "runs",
    "how": "lesson",
}  # fmt: skip
# What a page shows that no link asks anything of: a conversion, not the model as it was.
START = PRESETS["Fractal Fade (paper)"]
RESULT = "[0-9a-f]{12}"  # see RecoveryReport; page.js writes it into the link
LONGEST = 4000  # characters of a query that is read
SPEC_NAMES = (*(f.name for f in fields(ConversionSpec)), SPARSITY)


@dataclass(frozen=True)
class Link:
    """What a link asks for."""

    model: str = DEMO_KEY
    spec: ConversionSpec = START
    text: str | None = None  # None: the default of the model
    tab: str | None = None  # None: where it makes sense
    calibration: str | None = None  # None: the default of the model
    result: str | None = None  # what training came to where the link was made: a fingerprint

    @property
    def measured_on(self) -> str:
        """The key of the text."""
        return self.text or default_text(self.model)

    @property
    def calibrated_on(self) -> str:
        """The key of the calibration text, whether the spec needs one or not."""
        return self.calibration or default_calibration(self.model)

    def to_query(self) -> str:
        """E.g. `model=demo&branches=16&fade=0.9&text=stories`."""
        query = f"{urlencode({'model': self.model})}&{self.spec.to_query()}"
        query += f"&{urlencode({'text': self.measured_on})}"
        other = self.calibrated_on != default_calibration(self.model)
        if self.spec.needs_calibration and other:
            query += f"&{urlencode({'calibration': self.calibration})}"
        if self.result:
            query += f"&result={self.result}"
        return f"{query}&{urlencode({'tab': self.tab})}" if self.tab else query


def read_link(
    query: str | Mapping[str, str], default_model: str = DEMO_KEY
) -> tuple[Link, list[str]]:
    """The link that a query string asks for, and notices on what of it could not be followed: that
    part is left at its default. Names that are not ours, such as a host adds, are passed over."""
    if isinstance(query, str):
        query = dict(parse_qsl(query[:LONGEST], keep_blank_values=True))
    notices = []
    spec, tab = START, query.get("tab")
    known = {name: value for name, value in query.items() if name in SPEC_NAMES}
    try:
        spec = ConversionSpec.from_texts(known) if known else spec
        check_shown(spec)
    except UserError as error:
        notices.append(f"{error} The default settings are shown.")
        spec = START
    tab = FORMER_TABS.get(tab, tab)
    if tab is not None and tab not in TABS:
        notices.append(f"there is no tab {tab!r:.40}; tabs are {', '.join(TABS)}.")
        tab = None
    model = query.get("model", "").strip() or default_model
    result = query.get("result")
    if result is not None and not re.fullmatch(RESULT, result):
        notices.append("the result in a link is 12 hexadecimal digits; this one is passed over.")
        result = None
    return Link(model, spec, query.get("text"), tab, query.get("calibration"), result), notices
