"""Fill in README.md's table from the records of results/quick (`make readme`)."""

from pathlib import Path

from hydra import initialize_config_dir

from rst.experiments.sweeps import gather
from rst.reporting import pages
from rst.reporting.records import recorded_in
from rst.reporting.tables import summarize

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("SGD", "SAM", "RST constant", "RST linear", "G-RST linear")


def table(results: Path) -> str:
    """Some rows of the table quick/overview, how to read them, and where they come from."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        (overview,), _ = gather(["overview"], ROOT / "conf", "quick", [])
    summary = summarize(overview, overview.columns[0], recorded_in(results / "quick").joined, {})
    lines = [line for line in pages.cells(summary, pages.USUAL) if line["Method"] in ROWS]
    source = " ".join(pages.provenance(summary.frame))
    return f"{pages.pipes(lines)}\n\n{pages.reading(summary)} {source}"


if __name__ == "__main__":
    pages.fill(ROOT / "README.md", "table", table(ROOT / "results"))
