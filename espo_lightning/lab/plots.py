"""One look for every figure and table of the notebooks: a colour per method, the same everywhere; lines over seeds."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, which colour-blind readers can tell apart
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
GREY = "#888888"
COLOURS = {
    "exact": BLACK,
    "chance": GREY,
    # likelihoods
    "ELBO": BLUE,
    "ELBO, uncentred": SKY,
    "log p^U": GREEN,
    "mean field": ORANGE,
    "trajectory": GREEN,
    # estimators of the ELBO
    "single": ORANGE,
    "single, counts 1..L": PURPLE,
    "single, stratified": VERMILLION,
    "coupled": BLUE,
    "coupled, stratified": SKY,
    "quadrature": GREEN,
    # ratios
    "sequence": BLUE,
    "token": VERMILLION,
    # what a log-ratio is divided by
    "1/L": BLUE,
    "1/|y|": ORANGE,
    # KL estimators
    "none": GREY,
    "k1": VERMILLION,
    "k1 + score": ORANGE,
    "k2": BLUE,
    "k2_u": SKY,
    "k3": GREEN,
    "d1 + k2": PURPLE,
    # rewards, and how rare the right mode is
    "cell": BLUE,
    "all or nothing": VERMILLION,
    "curriculum": GREEN,
    "prior 30%": BLUE,
    "prior 5%": ORANGE,
    "prior 1%": PURPLE,
    # phases of a training step, and what is varied at equal compute
    "rollout": BLUE,
    "old scores": ORANGE,
    "reference": PURPLE,
    "updates": GREEN,
    "default": BLUE,
    "M = 2": SKY,
    "M = 4": GREEN,
    "T = 8": ORANGE,
    "T = 4": VERMILLION,
    "masks once": PURPLE,
    # tasks, and what methods score
    "Sudoku": BLUE,
    "Countdown": ORANGE,
    "masked views": ORANGE,
    "one masked": PURPLE,
    "trace": GREEN,
    # what a policy says instead of the right answers
    "apart": BLUE,
    "half": GREEN,
    "twisted": VERMILLION,
    # kinds of policies
    "table": GREY,
    "random network": ORANGE,
    "taught network": BLUE,
    "blocks": GREEN,
    # whose completions
    "own": BLUE,
    "answer": ORANGE,
}
STYLE = {
    "figure.dpi": 100,
    "savefig.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "legend.handlelength": 3.0,  # so that dashes show beside a marker
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}


def panels(
    *titles: str, height: float = 3.0, width: float = 3.2, columns: int | None = None
) -> tuple[Figure, list[Axes]]:
    """Panels in the style of all notebooks, legible at the width of a README, in one row or with some ``columns``.

    The style stays for what is drawn next, legends included.

    Args:
        height, width: of a panel, in inches.
    """
    plt.rcParams.update(STYLE)
    columns = columns or len(titles)
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * max(2, columns), height * rows), squeeze=False)
    for axis, title in zip(axes.flat, titles):
        axis.set_title(title)
    for axis in axes.flat[len(titles) :]:
        axis.remove()
    return figure, list(axes.flat[: len(titles)])


def line(
    axes: Axes, x: Sequence[float], seeds: Sequence[Sequence[float]], method: str, label: str | None = None, **style
) -> None:
    """A method's median over seeds with the full range, and every seed if there are at most five.

    Args:
        x: positions.
        seeds: one row of values per seed.
        method: a key of `COLOURS`.
        label: in the legend; the method's name if left out.
    """
    colour = COLOURS[method]
    columns = [sorted(column) for column in zip(*seeds)]
    middle = [(c[(len(c) - 1) // 2] + c[len(c) // 2]) / 2 for c in columns]
    if 1 < len(seeds) <= 5:
        for values in seeds:
            axes.plot(x, values, color=colour, lw=0.6, alpha=0.5)
    axes.fill_between(x, [c[0] for c in columns], [c[-1] for c in columns], color=colour, alpha=0.15, lw=0)
    axes.plot(x, middle, **{"color": colour, "marker": "o", "label": label or method, **style})


def legend(figure: Figure, columns: int = 6) -> None:
    """One legend below all panels, each label once."""
    entries = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=min(columns, len(entries)))


class Picture(NamedTuple):
    """A written figure; a notebook shows it."""

    path: Path

    def _repr_png_(self) -> bytes:
        return self.path.read_bytes()

    def __repr__(self) -> str:
        return self.path.name


def save(figure: Figure, results: str | Path, name: str, file: str) -> Picture:
    """Write ``results/<name>/<file>.png`` with a palette of 256 colours, a third of the size, and close the figure."""
    path = Path(results) / name / f"{file}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    image = Image.open(buffer).convert("RGB")
    # this method serves rare colours too, such as those of thin lines; the means keep the hue of pale bands
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)
    return Picture(path)


class Table(NamedTuple):
    """A table that a notebook shows: what stands above the columns, and the cells of every row."""

    columns: Sequence[object]
    rows: Sequence[Sequence[object]]

    def _repr_markdown_(self) -> str:
        lines = [self.columns, ["---", *("---:" for _ in self.columns[1:])], *self.rows]
        return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)

    def __repr__(self) -> str:
        return f"table of {len(self.rows)} rows"


def verdicts(findings: dict[str, str]) -> Table:
    """What was expected, sentence by sentence, and whether it held: yes, no, or not shown."""
    return Table(["expected", "held"], list(findings.items()))
