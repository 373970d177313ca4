"""The API reference: one page per folder of the package, with every public name that is defined there."""

from functools import cache

import espo_lightning
from espo_lightning import tasks

INTRODUCTION = """# API reference

Every public name of the package, generated from its docstring. Names of `espo_lightning` are imported from there, and
the tasks from `espo_lightning.tasks`. A shape is written in brackets, in which M is the number of mask draws, B of
completions, G of completions per prompt, L of the canvas' tokens, P of the prompt's tokens, and V of the vocabulary.

{table}
"""
FOLDERS = {
    "tasks": "Problems, verifiers and rewards.",
    "policies": "Networks and their tokenizers.",
    "decoding": "From prompts to completions.",
    "scoring": "Masks, and likelihoods on them.",
    "objectives": "Advantages, ratios, KL estimators and losses.",
    "training": "The Lightning module, its data, and strategies.",
}


@cache
def public() -> dict[str, str]:
    """Every public name with the path at which it is defined."""
    found = {}
    for package in (espo_lightning, tasks):
        for name in package.__all__:
            thing = getattr(package, name)
            if callable(thing) and getattr(thing, "__module__", "").startswith("espo_lightning"):
                found[name] = f"{thing.__module__}.{thing.__qualname__}"
    return found


def api_pages() -> dict[str, str]:
    """Markdown of all pages by address; mkdocstrings fills in the docstrings."""
    folders: dict[str, dict[str, str]] = {folder: {} for folder in FOLDERS}
    for name, path in sorted(public().items(), key=lambda item: item[0].lower()):
        folders[path.split(".")[1]][name] = path
    rows = ["| name | folder |", "|---|---|"]
    pages = {}
    for folder, names in folders.items():
        rows += [f"| [`{name}`][{path}] | [{folder}]({folder}.md) |" for name, path in names.items()]
        directives = "\n\n".join(f"::: {path}" for path in names.values())
        pages[f"api/{folder}.md"] = f"# {folder}\n\n{FOLDERS[folder]}\n\n{directives}\n"
    return {"api/index.md": INTRODUCTION.format(table="\n".join(rows)), **pages}
