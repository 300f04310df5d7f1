"""Run what is missing of tables under a protocol, then write them (make reproduce-tables, make tables)."""

import os
import sys
from pathlib import Path

from rst.experiments.command_line import launch
from rst.experiments.driver import reproduce
from rst.experiments.sweeps import table_parser

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = table_parser(__doc__, ROOT / "conf")
    parser.add_argument("--launcher", default="joblib", help="Hydra's: joblib, basic, submitit_slurm, ray, …")
    parser.add_argument("--jobs", type=int, help="processes at once, with joblib; by default one a core")
    parser.add_argument("--sharpness", action="store_true", help="measure that of all finished runs, too")
    parser.add_argument("--collect", action="store_true", help="run nothing, write tables of what there is")
    parser.add_argument("--print", action="store_true", help="write LaTeX and PDF, too")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {arguments.jobs}")
    os.chdir(ROOT)
    failures = reproduce(
        arguments.table,
        ROOT / "conf",
        arguments.protocol,
        arguments.overrides,
        outputs=arguments.outputs,
        results=arguments.results,
        launcher=arguments.launcher,
        jobs=arguments.jobs,
        only_collect=arguments.collect,
        reuse=arguments.reuse,
        sharpness=arguments.sharpness,
        for_print=arguments.print,
    )
    for command, reason in failures.items():
        print(f"failed: {command}: {reason}", file=sys.stderr)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    launch(main)
