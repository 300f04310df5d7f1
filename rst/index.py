"""The results folder's README.md: which tables there are, with their files, runs, commits and dates."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from rst.rendering import pipes


def index(results: Path) -> str:
    """The results folder's README.md: of each protocol's folder its tables with their files, runs, commits
    and dates, and links to the benchmarks, all of it read from what lies there."""
    parts = [
        "# Results",
        "Written with the tables. `make reproduce-tables PROTOCOL=… TABLE=…` runs what is missing of a table "
        "(`conf/table/`) under a protocol (`conf/protocol/`); one that is not listed here has not been run.",
    ]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        names = sorted(path.stem for path in folder.glob("*.md") if path.with_suffix(".csv").exists())
        if names and folder.name == "benchmark":  # of machines, not of runs
            parts += ["## benchmark", _links([folder / f"{name}.md" for name in names], results)]
        elif names:
            data = _links([folder / "runs.csv", folder / "curves.csv"], results)
            lines = [_index_line(folder, name, names) for name in names]
            parts += [f"## {folder.name}", pipes(lines), f"Runs and epochs: {data}" if data else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def _index_line(folder: Path, name: str, names: list[str]) -> dict[str, str]:
    """Title of the table `name`, links to its files, and its provenance."""

    def is_its_figure(path: Path) -> bool:  # a_b.png is table a's, unless there is a table a_b
        owners = [other for other in names if f"{path.stem}_".startswith(f"{other}_")]
        return path.suffix in (".png", ".pdf") and max(owners, key=len, default="") == name

    files = [folder / f"{name}.{suffix}" for suffix in ("md", "csv", "tex")]
    figures = sorted(filter(is_its_figure, folder.iterdir()))
    frame = pd.read_csv(files[1], dtype="string", keep_default_na=False)
    commits = sorted({commit for cell in frame["commit"] if cell for commit in cell.split("; ")})
    dates = sorted(date[:10] for date in [*frame["first_finished"], *frame["last_finished"]] if date)
    return {
        "Table": files[0].read_text().splitlines()[0].removeprefix("# "),
        "Files": _links(files, folder.parent),
        "Figures": _links(figures, folder.parent),
        "Runs": f"{sum(map(len, frame['runs'].str.split()))} of {sum(map(int, frame['n_expected']))}",
        "Commit": ", ".join(commits) + ", uncommitted changes" * any("True" in x for x in frame["dirty"]),
        "Finished (UTC)": " to ".join(sorted({dates[0], dates[-1]})) if dates else "not run",
    }


def _links(paths: Sequence[Path], results: Path) -> str:
    return ", ".join(f"[{p.name}]({p.relative_to(results).as_posix()})" for p in paths if p.exists())
