"""The layout's promises that no linter knows: who may import whom, and that the face names what exists."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmssl

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmssl", "modalities", "tasks", "ds_configs")


def sources():
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def test_everything_the_face_names_exists():
    for name in mmssl.__all__:
        assert getattr(mmssl, name) is not None
    assert set(mmssl.__all__) <= set(dir(mmssl))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmssl.nothing


def test_importing_the_face_imports_nothing_heavy():
    code = "import sys, mmssl; print([m for m in ('torch', 'numpy', 'tasks', 'modalities') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_nothing_inside_imports_the_face():
    for path in sources():
        if path == ROOT / "mmssl" / "__main__.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "mmssl" and node.level == 0:
                submodules = {p.stem for p in (ROOT / "mmssl").iterdir()}
                assert {alias.name for alias in node.names} <= submodules, path
            if isinstance(node, ast.Import):
                assert "mmssl" not in {alias.name for alias in node.names}, path


def test_no_task_shadows_a_standard_or_installed_module():
    """``deepspeed tasks/pretrain.py`` puts tasks/ first on the path."""
    names = [path.stem for path in (ROOT / "tasks").glob("*.py") if path.stem != "__init__"]
    assert len(names) > 10
    assert not set(names) & sys.stdlib_module_names
    found = found_elsewhere(names)
    assert not found, f"names in tasks/ that would hide others: {found}"
    assert found_elsewhere(["torch"])


def found_elsewhere(names: list[str]) -> str:
    code = f"import importlib.util as u; print(*[n for n in {names!r} if (s := u.find_spec(n)) and s.origin])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/", timeout=60)
    return done.stdout.strip()


def test_no_pickles_and_no_network():
    for path in sources():
        text = path.read_text()
        if path == ROOT / "mmssl" / "data" / "isolate.py":
            text = text.replace("import pickle", "")  # between a process and its own child; nothing is stored
        for word in ("torch.load(", "import pickle", "yaml.load(", "urlopen", "import requests", "from_pretrained("):
            assert word not in text, f"{path}: {word}"


def test_files_and_functions_stay_readable():
    for path in sources():
        text = path.read_text()
        assert len(text.splitlines()) <= 420, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno <= 75, f"{path}: {node.name}"
