"""The package's four floors, and that imports point down only."""

import sys
from pathlib import Path

from conftest import command


def test_nothing_imports_upwards():
    """What may import what stands in pyproject.toml, [tool.importlinter]."""
    checked = command(Path(sys.executable).with_name("lint-imports"), "--no-cache")
    assert checked.returncode == 0, checked.stdout
