"""The wheel: `pip install` of it brings the optimizer, which needs PyTorch and NumPy alone."""

import importlib.metadata
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import rst

pytestmark = pytest.mark.slow
STEP = """
import sys, torch
from rst import RST, Constant
model = torch.nn.Linear(3, 1)
before = model.weight.detach().clone()
optimizer = RST(torch.optim.SGD(model.parameters(), lr=0.1), schedule=Constant(1.0), total_steps=1)
for _ in optimizer.passes():
    model(torch.ones(2, 3)).square().mean().backward()
optimizer.step()
assert optimizer.propagations == 2 and not torch.equal(model.weight, before)
print(sys.modules["rst"].__file__)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new virtual environment with nothing but a wheel that was built from these sources."""
    folder = tmp_path_factory.mktemp("package")
    source = folder / "source"
    shutil.copytree(ROOT / "rst", source / "rst", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "train.py"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "conf", source / "conf")
    venv.create(folder / "environment", symlinks=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    options = ["--no-deps", "--no-index"]
    subprocess.check_call([*pip, "wheel", *options, "--no-build-isolation", "-w", folder, source])
    (wheel,) = folder.glob("*.whl")
    pip += ["--python", folder / "environment" / "bin" / "python"]
    subprocess.check_call([*pip, "install", *options, "--no-compile", wheel])
    return folder / "environment"


def site_packages(environment: Path) -> Path:
    (path,) = environment.glob("lib/python*/site-packages")
    return path


def installed(environment: Path) -> importlib.metadata.Distribution:
    (distribution,) = importlib.metadata.distributions(
        name="rst-optim", path=[str(site_packages(environment))]
    )
    return distribution


def required_by(distribution: importlib.metadata.Distribution) -> set[str]:
    """The names of what it needs here, without extras."""
    requirements = map(Requirement, distribution.requires or [])
    return {r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})}


def test_wheel_needs_torch_and_numpy_and_holds_the_package_alone(environment: Path) -> None:
    distribution = installed(environment)  # on PyPI, the name rst is another project's
    assert required_by(distribution) == {"torch", "numpy"}
    assert distribution.version == rst.__version__
    assert distribution.metadata["Requires-Python"] == ">=3.11"
    folder = site_packages(environment)
    names = {path.parts[0] for path in distribution.files or [] if path.suffix != ".pyc"}
    assert names == {"rst", f"rst_optim-{rst.__version__}.dist-info"}
    sources = {path.relative_to(ROOT) for path in (ROOT / "rst").rglob("*.py")}
    assert {path.relative_to(folder) for path in (folder / "rst").rglob("*.py")} == sources
    assert (folder / "rst" / "py.typed").exists()


def test_the_optimizer_trains_where_nothing_else_is_installed(environment: Path, tmp_path: Path) -> None:
    folder = site_packages(environment)
    names, seen = required_by(installed(environment)), set()
    while names:  # what pip would install; links, as PyTorch is large
        distribution = importlib.metadata.distribution(names.pop())
        if distribution.name not in seen:
            seen.add(distribution.name)
            names |= required_by(distribution)
            for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    python = environment / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", STEP], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(folder)
