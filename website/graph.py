"""A Mermaid graph as SVG, when the site is built: Mermaid's own script would come from another server."""

import re

WIDTH, HEIGHT, COLUMN, ROW = 110, 30, 140, 70  # pixels: a box, and the distances between boxes


def layers(arrows: list[tuple[str, str]]) -> list[list[str]]:
    """The names from top to bottom, each below all that point to it; in a layer, as they are first mentioned."""
    names = list(dict.fromkeys(name for arrow in arrows for name in arrow))
    depth = dict.fromkeys(names, 0)
    for _ in names:
        for above, below in arrows:
            depth[below] = max(depth[below], depth[above] + 1)
    return [[name for name in names if depth[name] == level] for level in range(max(depth.values()) + 1)]


def drawing(mermaid: str) -> str:
    """The SVG of ``a --> b`` lines."""
    arrows = re.findall(r"(\w+) --> (\w+)", mermaid)
    rows = layers(arrows)
    widest = max(map(len, rows))
    place = {
        name: ((widest - len(row)) * COLUMN / 2 + i * COLUMN + COLUMN / 2, level * ROW + HEIGHT / 2 + 5)
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    width, height = widest * COLUMN, len(rows) * ROW - ROW + HEIGHT + 10
    parts = [
        f'<svg class="graph" viewBox="0 0 {width} {height}" width="{width}" role="img" xmlns="http://www.w3.org/2000/svg">'
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="currentColor"/></marker></defs>'
    ]
    for above, below in arrows:
        (x1, y1), (x2, y2) = place[above], place[below]
        line = f"M{x1} {y1 + HEIGHT / 2}C{x1} {y1 + ROW / 2 + 8} {x2} {y2 - ROW / 2 - 8} {x2} {y2 - HEIGHT / 2}"
        parts.append(f'<path d="{line}" fill="none" stroke="currentColor" opacity="0.6" marker-end="url(#tip)"/>')
    for name, (x, y) in place.items():
        box = f'x="{x - WIDTH / 2}" y="{y - HEIGHT / 2}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
        parts.append(f'<rect {box} fill="var(--md-default-bg-color, #fff)" stroke="currentColor"/>')
        parts.append(f'<text x="{x}" y="{y + 5}" text-anchor="middle" font-size="14" fill="currentColor">{name}</text>')
    return "".join([*parts, "</svg>"])
