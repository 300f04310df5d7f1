"""From finished runs, by their measured sharpness, to their table."""

import json
import sys

import pytest
from conftest import command

from rst.experiments.measure_sharpness import measure
from rst.reporting.records import recorded_in


@pytest.mark.slow
def test_from_runs_to_the_table(tmp_path, run_script, capsys):
    size = ["epochs=1", "model.width=4", "dataset.train_size=128", "seed=0"]
    outputs, folder = tmp_path / "outputs", tmp_path / "results" / "quick"

    def driver(*arguments):
        places = ["--results", tmp_path / "results", "--outputs", outputs]
        table = ["--table", "imagenet", "--launcher", "basic", "--jobs", "1"]  # joblib's processes stay
        run_script("scripts/reproduce.py", *table, *places, *arguments, *size)

    driver()
    runs = sorted(path for path in outputs.iterdir() if "-sgd-" in path.name or "-sam-" in path.name)
    measuring = [sys.executable, "scripts/sharpness.py", "--images", "40", "--jobs", "1"]
    done = command(*measuring, *runs, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"left out, as not finished: {tmp_path}\n" in done.stderr
    assert len(done.stdout.splitlines()) == 2 and "λ_max" in done.stdout
    files = [run / "sharpness.json" for run in runs]
    measured = [json.loads(file.read_text()) for file in files]
    assert [one["images"] for one in measured] == [40, 40] and all(one["lambda_max"] > 0 for one in measured)
    assert measured[0]["loss"] != measured[1]["loss"]  # of trained weights: they began as the same

    before = [file.stat().st_mtime_ns for file in files]
    capsys.readouterr()
    run_script(*measuring[1:], *runs)
    assert capsys.readouterr().out == done.stdout
    assert [file.stat().st_mtime_ns for file in files] == before  # not measured again

    driver("--collect")
    page = (folder / "imagenet" / "README.md").read_text()
    assert page.count("not measured") == 4 * 2 and "| λ_max" in page
    assert "- Sharpness: images 40, directions 3, rho 0.1, commit " in page
    assert sorted(recorded_in(folder).sharpness["id"]) == sorted(one["id"] for one in measured)
    assert (folder / "imagenet" / "sharpness.png").exists()
    driver("--sharpness", "--collect")
    page = (folder / "imagenet" / "README.md").read_text()
    assert "not measured" not in page and "- Sharpness: images 128, directions 3, rho 0.1, commit " in page


def test_a_folder_without_a_result_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="it has no result"):
        measure(tmp_path, 100)
