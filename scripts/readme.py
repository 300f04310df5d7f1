"""Fill in README.md's tables from results/ and conf/ (`make readme`)."""

import re
from pathlib import Path

import rst.experiments.command_line  # noqa: F401  registers the resolver that conf/train.yaml uses
from rst.experiments.listing import SIZE, model_table

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table:(\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
MODELS = re.compile(r"(<!-- models -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("Method", "Test error, last epoch (%)", "Difference to SAM (points)", "η measured", "Time / SGD's")


def section(name: str, markdown: str) -> str:
    """The figure, the columns of a table that fit a README, and a link to the whole table."""
    title, setting, *_ = (line for line in markdown.splitlines() if line)
    table = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    kept = [table[0].index(column) for column in COLUMNS]
    rows = ["| " + " | ".join(row[i] for i in kept) + " |" for row in table]
    notes = [line[2:] for line in markdown.splitlines() if line.startswith(("- Runs", "- Code", "- Machine"))]
    reading = (
        "Mean ± standard deviation over seeds, n in brackets; differences are paired by seed, with their "
        "95 % interval, and * where that excludes 0."
    )
    return "\n".join(
        [
            f"**{title.lstrip('# ')}.** {setting}.\n",
            *rows,
            f"\n{reading} {' '.join(notes)} All the rest: [results/{name}.md](results/{name}.md).\n",
            f"![test error against propagation count](results/{name}.png)\n",
        ]
    )


def models() -> str:
    """The table of `python train.py --list`."""
    rows = [f"| `{name}` | {size} | {comment} |" for name, size, comment in model_table(ROOT / "conf")]
    return "\n".join([f"| `model=` | {SIZE} | |", "|:--|--:|:--|", *rows, ""])


def main() -> None:
    readme = ROOT / "README.md"

    def fill(match: re.Match[str]) -> str:
        markdown = (ROOT / "results" / f"{match[2]}.md").read_text()
        return match[1] + section(match[2], markdown) + match[3]

    text = MARKED.sub(fill, readme.read_text())
    readme.write_text(MODELS.sub(lambda match: match[1] + models() + match[2], text))


if __name__ == "__main__":
    main()
