"""Notebooks as pages: text and outputs as they are stored, code folded away. Nothing is executed."""

from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

TEMPLATE = """\
{%- extends 'markdown/index.md.j2' -%}
{% block input %}
??? example "Code"

{{ ("```python\n" ~ cell.source ~ "\n```") | indent(4, true) }}
{% endblock input %}
{% block stream %}
```text
{{ output.text | trim | strip_ansi }}
```
{% endblock stream %}
"""


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """The Markdown of a notebook, and its pictures by their file names."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"output_files_dir": f"{path.stem}_files", "unique_key": path.stem}
    text, resources = MarkdownExporter(raw_template=TEMPLATE).from_notebook_node(notebook, resources)
    return text, resources.get("outputs", {})
