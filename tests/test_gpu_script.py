"""scripts/gpu.sh, dry-run on the CPU."""

import os
import subprocess
import tarfile

import pytest
import torch
from conftest import ROOT
from PIL import Image


@pytest.mark.slow
def test_the_papers_size_in_small(tmp_path):
    """Step 3 on two dozen images. The second table's runs are then those of the first, thus complete."""
    for i in range(24):
        folder = tmp_path / "images" / ("train" if i < 16 else "test") / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / f"{i}.png")
    arguments = f"--outputs {tmp_path} --results {tmp_path}/results dataset.root={tmp_path}/images"
    arguments += " dataset.name=some model=resnet18 epochs=1 batch_size=8 seed=0"
    settings = {"DEVICE": "cpu", "ARGS": arguments, "JOBS": "1", "OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["scripts/gpu.sh", "3"], cwd=ROOT, env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "4 runs, 4 to do" in done.stdout and "4 runs, 0 to do" in done.stdout
    page = (tmp_path / "results" / "gpu" / "gpu" / "README.md").read_text()
    assert "not run" not in page and "device=cpu" not in page
    assert "4.68 (logs beside the authors' code" in page
    with tarfile.open(tmp_path / "step3.tar.gz") as results:
        assert "results/gpu/gpu/README.md" in results.getnames()
