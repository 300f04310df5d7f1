"""Measure the sharpness of finished runs: python scripts/sharpness.py outputs/RUN…

Writes sharpness.json into each run's folder, which `make tables` collects (rst/reporting/sharpness.py says
what is measured). What a folder has is not measured again.
"""

import argparse
import sys
from pathlib import Path

from joblib import cpu_count

from rst.experiments.command_line import launch
from rst.experiments.measure_sharpness import IMAGES, measure_all


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--images", type=int, default=IMAGES, help="at most so many training images")
    parser.add_argument("--rho", type=float, help="the ball's radius (default: the run's setting rho)")
    parser.add_argument("--jobs", type=int, default=cpu_count(), help="runs at once")
    arguments = parser.parse_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    if arguments.images < 10:
        parser.error(f"--images must be at least 10, got {arguments.images}")
    if arguments.rho is not None and not arguments.rho > 0:
        parser.error(f"--rho must be above 0, got {arguments.rho}")
    finished = [folder for folder in arguments.runs if (folder / "result.json").exists()]
    if unfinished := [str(folder) for folder in arguments.runs if folder not in finished]:
        print(f"left out, as not finished: {', '.join(unfinished)}", file=sys.stderr)
    measure_all(dict.fromkeys(finished, arguments.rho), arguments.images, arguments.jobs)
    sys.exit(0 if finished else 1)


if __name__ == "__main__":
    launch(main)
