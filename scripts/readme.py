"""Fill in README.md's tables from results/ and conf/ (`make readme`)."""

import re
from pathlib import Path

import rst.experiments.command_line  # noqa: F401  registers the resolver that conf/train.yaml uses
from rst.experiments.listing import SIZE, model_table
from rst.reporting import pages
from rst.reporting.tables import read_table

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = re.compile(r"(<!-- models -->\n).*?(<!-- end -->)", re.DOTALL)


def section(results: Path, name: str) -> str:
    """The first column of the table in `results`/`name`: its main figure, its usual metrics, and a link."""
    summary = read_table(results / name)[0]
    return "\n\n".join(
        [
            f"**{summary.title}.** {summary.setting}.",
            f"![differences to {summary.reference}, with 95 % intervals](results/{name}/forest.png)",
            pages.pipes(pages.cells(summary, pages.USUAL)),
            f"{pages.reading(summary)} {' '.join(pages.provenance(summary.frame))}",
            f"Everything else about it: [results/{name}](results/{name}/README.md).\n",
        ]
    )


def models() -> str:
    """The table of `python train.py --list`."""
    rows = [f"| `{name}` | {size} | {comment} |" for name, size, comment in model_table(ROOT / "conf")]
    return "\n".join([f"| `model=` | {SIZE} | |", "|:--|--:|:--|", *rows, ""])


def main() -> None:
    readme = ROOT / "README.md"

    def fill(match: re.Match[str]) -> str:
        return match[1] + section(ROOT / "results", match[2]) + match[3]

    text = MARKED.sub(fill, readme.read_text())
    readme.write_text(MODELS.sub(lambda match: match[1] + models() + match[2], text))


if __name__ == "__main__":
    main()
