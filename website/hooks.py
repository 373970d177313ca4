"""What MkDocs does not do by itself: pages made of the repository, and formulas without a script.

The site is more than ``docs/``. The README is its home page, the other Markdown files and the notebooks of the
repository are pages at their own paths, and every other file that a page links to becomes one too, so that no link
leaves the site for a repository. The API reference has a page per folder of the package.
Formulas become MathML when the site is built.
"""

import posixpath
import re
import sys
import unicodedata
from contextlib import suppress
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "website")]

from api import api_pages, public  # noqa: E402
from graph import drawing  # noqa: E402
from notebook_pages import notebook_page  # noqa: E402

LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "experiments/*/README.md", "docs/**/*.md")
ASSETS = {".png", ".svg", ".json", ".jsonl", ".csv"}
UNSEARCHED = "---\nsearch: {exclude: true}\n---\n\n"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "bash"}


def address(path: str) -> str:
    """Where a file or folder of the repository stands on the site."""
    if path == "README.md":
        return "index.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"{path}/README.md" if (ROOT / path / "README.md").exists() else f"{path}/index.md"
    if path.endswith(".ipynb"):
        return path.removesuffix("ipynb") + "md"
    return path if Path(path).suffix in {".md", *ASSETS} else f"{path}.md"


def targets(text: str, folder: str) -> set[str]:
    """The files and folders of the repository that a page in ``folder`` links to."""
    found = {posixpath.normpath(posixpath.join(folder, target)) for _, target, _ in LINK.findall(text)}
    return {path for path in found if not path.startswith("..") and (ROOT / path).exists()}


def relinked(text: str, folder: str, here: str) -> str:
    """A page of the repository with its links as they are on the site, where it stands at ``here``."""

    def changed(match: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if "://" in match[2] or path.startswith("..") or not (ROOT / path).exists():
            return match[0]
        return match[1] + posixpath.relpath(address(path), posixpath.dirname(here) or ".") + match[3]

    return LINK.sub(changed, text)


def source_page(path: str) -> str:
    """A file that is no Markdown, or the list of what lies in a folder."""
    if (ROOT / path).is_dir():
        kept = [p for p in sorted((ROOT / path).iterdir()) if p.suffix in {*LANGUAGES, ".md", ".ipynb"}]
        links = "\n".join(f"- [{p.name}]({p.relative_to(ROOT / path)})" for p in kept)
        return f"{UNSEARCHED}# {path}\n\n{links}\n"
    language = LANGUAGES.get(Path(path).suffix, "text")
    return f"{UNSEARCHED}# {Path(path).name}\n\n`{path}`\n\n`````{language}\n{(ROOT / path).read_text()}\n`````\n"


def everything() -> dict[str, str | bytes]:
    """The content of every page and picture by its address, docs/ included, with all links of the site."""
    waiting = sorted(str(p.relative_to(ROOT)) for pattern in PAGES for p in ROOT.glob(pattern))
    waiting += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("notebooks/*.ipynb"))
    made: dict[str, str | bytes] = {}
    while waiting:
        path = waiting.pop()
        here, folder = address(path), posixpath.dirname(path)
        if here in made:
            continue
        if Path(path).suffix in ASSETS:
            made[here] = (ROOT / path).read_bytes()
            continue
        if path.endswith(".ipynb"):
            text, pictures = notebook_page(ROOT / path)
            made |= {f"{posixpath.dirname(here)}/{name}": picture for name, picture in pictures.items()}
        elif path.endswith(".md"):
            text = (ROOT / path).read_text()
        else:
            text, folder = source_page(path), path if (ROOT / path).is_dir() else folder
        if path.endswith((".md", ".ipynb")) or (ROOT / path).is_dir():
            waiting += sorted(targets(text, folder))
            text = relinked(text, folder, here)
        made[here] = text
    return made | api_pages()


def on_config(config):
    """Put what there is of optional pages, notebooks and API pages into the navigation."""
    made = everything()
    notebooks = sorted(a for a in made if re.fullmatch(r"notebooks/\d\d_\w+\.md", a))
    groups = {"notebooks": notebooks, "api": sorted(api_pages(), key=lambda a: (a != "api/index.md", a))}

    def filled(entry):
        if isinstance(entry, list):
            return [x for x in map(filled, entry) if x is not None]
        if not isinstance(entry, dict):
            return entry
        ((title, content),) = entry.items()
        if isinstance(content, list):
            return {title: filled(content)}
        return {title: groups[content]} if content in groups else entry if content in made else None

    config.nav = filled(config.nav)
    config.extra["made"] = made
    return config


def on_files(files: Files, config) -> Files:
    """Add what is not in docs/, and replace what is, since its links change."""
    for uri, content in config.extra.pop("made").items():
        if (there := files.get_file_from_path(uri)) is not None:
            files.remove(there)
        files.append(File.generated(config, uri, content=content))
    files.append(File.generated(config, "style.css", abs_src_path=str(ROOT / "website/style.css")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Mermaid graphs as SVG."""
    return re.sub(r"```mermaid\n(.*?)```", lambda match: drawing(match[1]), markdown, flags=re.DOTALL)


def mathml(tex: str, display: bool) -> str:
    """A formula as MathML, of which browsers read no ``mathvariant``: such letters become characters of their own."""

    def letter(match: re.Match) -> str:
        style = {"script": "SCRIPT", "double-struck": "DOUBLE-STRUCK"}[match[1]]
        for name in (f"MATHEMATICAL {style} CAPITAL {match[2]}", f"{style} CAPITAL {match[2]}"):
            with suppress(KeyError):
                return f"<mi>{unicodedata.lookup(name)}</mi>"
        raise PluginError(f"no {style} {match[2]} in {tex!r}")

    made = convert(tex, display="block" if display else "inline")
    made = made.replace("<mi>&#x029F5;</mi>", "<mo>\\</mo>")  # set minus, whose own character few fonts have
    made = re.sub(r'<mi mathvariant="(script|double-struck)">(\w)</mi>', letter, made)
    return f'<div class="formula">{made}</div>' if display else made


def linked_names(html: str, url: str) -> str:
    """The public names in running text of a page of the reference, with links to where they are explained."""

    def link(match: re.Match) -> str:
        path = public().get(match[1])
        if path is None:
            return match[0]
        place = posixpath.relpath(f"api/{path.split('.')[1]}.html", posixpath.dirname(url) or ".")
        return f'<a href="{place}#{path}">{match[0]}</a>'

    return re.sub(r"(?<!>)<code>(\w+)</code>", link, html)  # behind a tag, it may stand in a link or a heading


def on_page_content(html: str, page, config, files) -> str:
    """Formulas as MathML, and links within the reference."""
    if page.url.startswith("api/") or page.url == "commands.html":
        html = linked_names(html, page.url)

    def formula(match: re.Match) -> str:
        tex = unescape(match[2]).strip()[2:-2]  # without \\( and \\)
        try:
            return mathml(tex, match[1] == "div")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: no MathML of {tex!r}: {error}") from error

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', formula, html, flags=re.DOTALL)
