"""The wheel: `pip install` of it brings the optimizer, which needs PyTorch and NumPy alone."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import rst

STEP = """
import sys, torch
from rst import RST, Constant
model = torch.nn.Linear(3, 1)
before = model.weight.detach().clone()
optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), schedule=Constant(1.0), total_steps=1)
def closure():
    loss = model(torch.ones(2, 3)).square().mean()
    loss.backward()
    return loss
optimizer.step(closure)
assert optimizer.propagations == 2 and not torch.equal(model.weight, before)
print(sys.modules["rst"].__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which a wheel built from these sources was installed, without its dependencies."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "rst", source / "rst", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "conf", source / "conf")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-index", "--no-compile", "--no-build-isolation"]
    subprocess.run([*pip, "install", *options, "--target", folder / "site", source], check=True)
    return folder / "site"


def required_by(distribution: importlib.metadata.Distribution) -> set[str]:
    """The names of what it needs here, without extras."""
    requirements = map(Requirement, distribution.requires or [])
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_wheel_needs_torch_and_numpy_and_holds_the_package_alone(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.name == "rst-optim"  # on PyPI, rst is another project
    assert required_by(distribution) == {"torch", "numpy"}
    assert distribution.version == rst.__version__
    assert {path.name for path in installed.iterdir()} == {"rst", f"rst_optim-{rst.__version__}.dist-info"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "rst").rglob("*.py")}
    assert {path.relative_to(installed) for path in installed.rglob("*.py")} == sources
    assert (installed / "rst" / "py.typed").exists()


def test_the_optimizer_trains_where_nothing_but_torch_and_numpy_is_installed(
    installed: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"  # links to what those two need of this environment
    environment.mkdir()
    names, seen = ["torch", "numpy"], set()
    while names:
        distribution = importlib.metadata.distribution(names.pop())
        if distribution.name not in seen:
            seen.add(distribution.name)
            names += required_by(distribution)
            for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                if not (environment / top).exists():
                    (environment / top).symlink_to(Path(str(distribution.locate_file(top))))
    # -S leaves out this environment's own packages.
    path = os.pathsep.join(map(str, (installed, environment)))
    done = subprocess.run(
        [sys.executable, "-S", "-c", STEP],
        env=os.environ | {"PYTHONPATH": path},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)
