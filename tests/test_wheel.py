"""A built wheel, installed elsewhere, brings its recipes, DeepSpeed configurations, demo data and pages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mmssl", "modalities", "tasks", "ds_configs")

PROBE = """
import ds_configs, mmssl, runpy, sys, tarfile
from pathlib import Path
assert Path(mmssl.__file__).is_relative_to(sys.argv[1]), mmssl.__file__
from mmssl.engine.deepspeed_setup import system_config
from tasks.build import load_recipe, recipe_names
from tasks.demo import DATA, demos, unpack
from tasks.report import Words, write_report
assert {"image-mae-tiny", "image-mae-s16", "image-mae-b16"} <= set(recipe_names())
load_recipe("image-mae-tiny")
for stage in range(4):
    assert system_config(f"zero{stage}")["zero_optimization"]["stage"] == stage
COUNTS = {"image": ("png", 10412), "video": ("mp4", 120), "audio": ("ogg", 1212), "image-text": ("webp", 1828)}
for name, (suffix, count) in COUNTS.items():
    with tarfile.open(demos()[name].archive) as tar:
        there = sorted(one.name for one in tar if one.name.endswith(f".{suffix}"))
    assert len(there) == count
    if name != "image":  # its files are many, and take seconds to write
        unpack(demos()[name].archive, Path("data", name))
        found = Path("data", name).rglob(f"*.{suffix}")
        assert sorted(str(path.relative_to(f"data/{name}")) for path in found) == there
assert (DATA / "LICENSES.txt").is_file() and (DATA / "README.md").is_file()
write_report(Path("report.html"), "a", "b", [Words("c", "d")])
from tasks.serve_app import ASSETS, FILES
assert {"index.html", "docs.html", *FILES} == {path.name for path in ASSETS.iterdir()}
assert {"page.js", "docs.js", "style.css"} <= set(FILES)
print(mmssl.__version__)
sys.argv = ["mmssl", "recipes"]
runpy.run_module("mmssl", run_name="__main__")  # as python -m mmssl recipes
"""


def run(*words: object, **more: object) -> str:
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, timeout=200, check=False, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_works_elsewhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # From a copy: a build leaves its folder in the tree, and what lies in it would be in the next wheel.
    source = tmp_path / "source"
    source.mkdir()
    for name in (*PACKAGES, "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(*pip, "wheel", "--no-deps", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("mmssl-*.whl")
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", site, wheel)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {**os.environ, "PYTHONPATH": str(site)}
    version, _, recipes = run(sys.executable, "-c", PROBE, site, cwd=elsewhere, env=env).partition("\n")
    assert version == "0.1.0"
    assert "image-mae-tiny" in recipes
    # A person's own folder of the same name hides ours: one sentence instead of a riddle.
    (elsewhere / "tasks").mkdir()
    (elsewhere / "tasks" / "__init__.py").touch()
    hidden = subprocess.run([sys.executable, "-m", "mmssl", "recipes"], cwd=elsewhere, env=env, capture_output=True,
                            text=True, check=False, timeout=60)  # fmt: skip
    assert hidden.returncode == 2
    assert "hides mmssl's own" in hidden.stderr
    assert "Traceback" not in hidden.stderr
