"""What may import what, and that the library lives without the page's dependencies."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "mlpmoe").rglob("*.py"))
PAGE_ONLY = {"gradio", "gradio_client", "plotly"}
# Each floor may import the floors named here, and itself.
BELOW = {
    "core": set(),
    "measure": {"core"},
    "models": {"core"},
    "explorer": {"core", "measure", "models"},
}


def imported_modules(file):
    """Absolute names of everything a file imports, wherever in the file."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import hub` imports a module, `from .hub import download` a name of one
            yield from (f"{module}.{alias.name}" for alias in node.names)


def floor_of(file):
    parts = file.relative_to(ROOT / "mlpmoe").parts
    return parts[0] if len(parts) > 1 else None


def name_of(file):
    return str(file.relative_to(ROOT))


def test_all_floors_are_known():
    assert {floor_of(file) for file in FILES} == {None, *BELOW}


@pytest.mark.parametrize("file", [f for f in FILES if floor_of(f)], ids=name_of)
def test_imports_point_down(file):
    floor = floor_of(file)
    allowed = BELOW[floor] | {floor}
    for module in imported_modules(file):
        root, *rest = module.split(".")
        if root == "mlpmoe":
            assert rest, f"{name_of(file)} imports the whole library"
            assert rest[0] in allowed, f"{name_of(file)} imports {module}"


@pytest.mark.parametrize("file", [f for f in FILES if floor_of(f) != "explorer"], ids=name_of)
def test_only_the_page_needs_gradio_and_plotly(file):
    assert not {module.split(".")[0] for module in imported_modules(file)} & PAGE_ONLY


def test_nothing_below_imports_the_command_line():
    for file in FILES:
        assert not any(module.startswith("mlpmoe.__main__") for module in imported_modules(file))


def test_library_and_command_line_work_without_gradio_and_plotly():
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({sorted(PAGE_ONLY)!r}))  # None: importing it fails
import mlpmoe
for name in mlpmoe.__all__:
    getattr(mlpmoe, name)
sys.argv = ["mlpmoe", "models"]
runpy.run_module("mlpmoe", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"PYTHONUTF8": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.splitlines()[1].startswith("demo ")
