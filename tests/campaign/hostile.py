"""A hundred inputs that nobody's program means to send: each gets a sentence, the page goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.campaign.server import Server, serving
from tests.campaign.table import Table

LEAKS = ("Traceback", "site-packages", ".py", 'File \\"', "/usr", "/root", "/tmp", "root:")
UNHANDLED = "Something went wrong"
VALUES = (  # instead of a number, a name or an object
    "null", "true", '"16"', '"\\ud800"', '"\\u0000"', '""', "[]", "[[1]]", "{}", '{"a": {}}', "-1",
    "1e999", "NaN", "1e308", "9" * 400, '"' + "x" * 10_000 + '"', '"../../etc/passwd"',
)  # fmt: skip
MORE = (
    '{"fade_unit": {}}', '{"fade_unit": []}', '{"fade_projections": ["gate"]}',
    '{"fade_projections": {"gate": 1}}', '{"method": []}', '{"method": {"a": 1}}',
    '{"method": "cmoe", "active": []}', '{"method": "cmoe", "router": {}}',
    '{"method": "cmoe", "experts": "many"}', '{"order": {}}', '{"order": [["norm"]]}',
    '{"seed": {}}', '{"seed": "\\ud800"}', '{"spared": {}}', '{"spared": "\\ud800"}',
    '{"spared": [0]}', '{"progressive": "yes"}', '{"allocation": null}', '{"tau": []}',
    '{"recover": {}}', '{"recover": "lora", "recover_steps": []}', '{"\\ud800": 1}', '{"": 1}',
    '{"fade_exponent": "\\udfff"}', '{"profile": []}', '{"selection": {}}', '{"sparsity": []}',
    '{"sparsity": {}}', '{"branches": []}', '{"keep": {}}', "[]", '"more"', "5", "true",
)  # fmt: skip
SPEC = ['"demo"', "16", "0", "null", '"sqrt"']
PATHS = (
    "/etc/passwd",
    "../../etc/passwd",
    "app.py",
    "%2e%2e/%2e%2e/etc/passwd",
    "/proc/self/environ",
)


def inputs() -> Iterator[tuple[str, str]]:
    """Endpoint and body."""
    for place in range(len(SPEC)):
        for value in VALUES[:: 2 if place else 1]:
            if (place, value) in ((3, "null"), (2, "true")):
                continue  # allowed
            changed = [*SPEC]
            changed[place] = value
            yield "preview", _body(*changed, "null")
    for more in MORE:
        yield "preview", _body(*SPEC, more)
    for text in ('"\\ud800"', "[]", "{}", '"../x"', "3"):
        yield "evaluate", _body(*SPEC, text, "null")
    for prompt in ('"\\ud800"', '"a\\udc00b"', "null", "[]", '""', '"' + "x" * 5000 + '"'):
        yield "generate", _body(prompt, *SPEC, "8", "0", "null")
    for body in ("", "[]", "null", "{", '{"data": 5}', '{"data": {}}', '{"data": []}'):
        yield "generate", body
    yield "evaluate", '{"data": ["demo", 16], "session_hash": []}'
    yield "preview", _body('"demo"', "0")  # too few
    yield "preview", _body(*SPEC, "null", "1", "2")  # too many
    yield "nothing", _body()
    yield from (("v2/preview", '{"foo": 1}'), ("v2/nothing", "{}"), ("v2/preview", "5"))


def _body(*values: str) -> str:
    return f'{{"data": [{", ".join(values)}]}}'


def told(answer: str) -> str:
    """The sentence of an error."""
    try:
        found = json.loads(answer)
    except ValueError:
        return answer
    if isinstance(found, dict):
        found = found.get("error") or found.get("detail") or found
    return found if isinstance(found, str) else json.dumps(found)


def readable(sentence: str) -> bool:
    return sentence.endswith(".") and 15 < len(sentence) < 400 and UNHANDLED not in sentence


def campaign(folder: Path) -> Table:
    table = Table("hostile input")
    with serving(folder, MLPMOE_FIRST_MODEL="demo") as server:
        answered, refused, unread, leaks = 0, 0, [], []
        for name, body in inputs():
            fine, answer = server.post(name, body)
            said = told(answer)
            if fine:
                answered += 1
                table.notes.append(f"answered: {name} {body[:90]}")
                continue
            refused += 1
            if any(leak in answer and leak not in body for leak in LEAKS):
                leaks.append(f"{name} {body[:80]}: {said[:200]}")
            if not readable(said):
                unread.append(f"{name} {body[:80]}: {said[:200]}")
        bare = [path for path in PATHS if _reads(server, path)]
        fine, _ = server.post("preview", _body(*SPEC, "null"))
        log = server.log.read_text()
    table.row("inputs", f"{answered + refused}")
    table.row("refused in a sentence", f"{refused - len(unread)} of {refused}", not unread)
    table.row("answers that tell of the machine", f"{len(leaks)}", not leaks)
    table.row("tracebacks in the server's log", f"{log.count('Traceback')}", "Traceback" not in log)
    table.row("files read outside", f"{len(bare)} of {len(PATHS)} tried", not bare)
    table.row("the page answers afterwards", "yes" if fine else "no", fine)
    table.notes += [*unread, *leaks]
    return table


def _reads(server: Server, path: str) -> bool:
    answer = httpx.get(f"{server.url}/gradio_api/file={path}", timeout=30, trust_env=False)
    return answer.status_code == 200
