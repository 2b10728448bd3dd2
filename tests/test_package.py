"""What `pip install .` gives: the local server with a script, and nothing of a generic name."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "local_wandb"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The project's wheel, built from a folder without what git ignores, such as an old build/."""
    source, wheels = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheels")
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("build", "local_wandb.egg-info"):
            (source / path.name).symlink_to(path)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    built = subprocess.run([*pip, str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = wheels.iterdir()
    with zipfile.ZipFile(path) as content:
        yield content


def test_the_wheel_holds_all_of_local_wandb_and_nothing_else(wheel):
    paths = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == {path for path in paths if "__pycache__" not in path}


def test_its_requirements_are_those_of_the_repository(wheel):
    (metadata,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    lines = wheel.read(metadata).decode().splitlines()
    needed = {line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")}
    listed = (PACKAGE / "requirements.txt").read_text().splitlines()
    assert needed == {line for line in listed if line and not line.startswith("#")}
    assert "-r local_wandb/requirements.txt" in (ROOT / "requirements.txt").read_text().splitlines()


def test_the_script_starts_without_torch_and_the_wandb_client():
    script = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["local-wandb"]
    module, function = script.split(":")
    code = f"import sys; from {module} import {function}; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "transformers", "trl", "wandb", "numpy", "train", "analysis"} & set(loaded.split())


def test_what_moves_projects_names_the_client_that_it_needs():
    code = "import sys; sys.modules['wandb'] = None; from local_wandb.__main__ import main; main()"
    command = [sys.executable, "-c", code, "import", "entity/project"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "import needs W&B's client: pip install wandb==" in done.stderr
