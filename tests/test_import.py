"""What may import what, and that the library lives without what the page or the search need."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted((ROOT / "mlpmoe").rglob("*.py"))
PAGE_ONLY = {"gradio", "gradio_client", "plotly"}
KERNELS = "mlpmoe.core.kernels"
COMPILED = {  # are imported where what they import is used
    f"{KERNELS}.compiled": "numba",
    f"{KERNELS}.triton_kernels": "triton",
    f"{KERNELS}.launches": "triton",
}
OPTIONAL = PAGE_ONLY | {"optuna", "datasets", "ray", "lm_eval", "numba", "triton"}
# Each floor may import the floors named here, and itself.
BELOW = {
    "core": set(),
    "measure": {"core"},
    "models": {"core"},
    "checkpoints": {"core", "measure", "models"},
    "studies": {"core", "measure", "models"},
    "commands": {"core", "measure", "models", "checkpoints", "studies"},
    "explorer": {"core", "measure", "models", "checkpoints"},
}


def imported_modules(file, nodes=ast.walk):
    """Absolute names of everything a file imports, wherever in the file `nodes` looks."""
    package = file.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import hub` imports a module, `from .hub import download` a name of one
            yield from (f"{module}.{alias.name}" for alias in node.names)


def run_on_import(tree):
    """The nodes that run when a module is imported: no functions, nothing for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
            continue
        yield node
        yield from run_on_import(node)


def floor_of(file):
    parts = file.relative_to(ROOT / "mlpmoe").parts
    return parts[0] if len(parts) > 1 else None


def name_of(file):
    return str(file.relative_to(ROOT))


def test_all_floors_are_known():
    assert {floor_of(file) for file in FILES} == {None, *BELOW}


def test_imports_point_down():
    for file in FILES:
        floor = floor_of(file)
        if floor is None:
            continue
        allowed = BELOW[floor] | {floor, "version"}
        for module in imported_modules(file):
            root, *rest = module.split(".")
            if root == "mlpmoe":
                assert rest, f"{name_of(file)} imports the whole library"
                assert rest[0] in allowed, f"{name_of(file)} imports {module}"


def test_only_the_page_needs_gradio_and_plotly():
    for file in FILES:
        if floor_of(file) != "explorer":
            found = {module.split(".")[0] for module in imported_modules(file)}
            assert not found & PAGE_ONLY, name_of(file)


def test_optional_packages_are_imported_where_they_are_used_only():
    for file in FILES:
        modules = set(imported_modules(file, run_on_import))
        found = {module.split(".")[0] for module in modules}
        own = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        found -= {COMPILED.get(own)}
        assert not found & (OPTIONAL - PAGE_ONLY), name_of(file)
        if own not in COMPILED:
            assert not any(module.startswith(tuple(COMPILED)) for module in modules), name_of(file)


def test_nothing_below_imports_the_command_line():
    for file in FILES:
        modules = set(imported_modules(file))
        assert not any(module.startswith("mlpmoe.__main__") for module in modules)
        if floor_of(file) != "commands" and file.name != "__main__.py":
            assert not any(module.startswith("mlpmoe.commands") for module in modules)


@pytest.mark.parametrize("name", ["__init__.py", "__main__.py"])
def test_the_library_and_the_command_line_do_without_the_page(name):
    modules = imported_modules(ROOT / "mlpmoe" / name)
    assert not any(module.startswith("mlpmoe.explorer") for module in modules)


def test_library_and_command_line_work_without_what_is_optional():
    program = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({sorted(OPTIONAL)!r}))  # None: importing it fails
import mlpmoe
for name in mlpmoe.__all__:
    getattr(mlpmoe, name)
assert "mlpmoe.commands" not in sys.modules
import mlpmoe.measure.runs.search
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
