"""The built documentation: every link, every anchor, no other server; in a browser no error and no missing picture.

`make docs` builds the site and runs this. Without a Chromium the browser's part is skipped.
"""

import functools
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import pytest

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build/site"
LOADED = {("script", "src"), ("img", "src"), ("link", "href"), ("source", "src"), ("iframe", "src")}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="make docs builds the site"),
]


class Page(HTMLParser):
    """The links of a page, what it loads, and the places that one can link to."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.places: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.places |= {values[name] for name in ("id", "name") if values.get(name)}
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        loads = values.get("rel") not in ("canonical", "alternate", "prev", "next")
        self.loaded += [values[name] for owner, name in LOADED if owner == tag and values.get(name) and loads]


@pytest.fixture(scope="module")
def pages() -> dict[str, Page]:
    """Every page by its path from the site's root."""
    return {str(path.relative_to(SITE)): Page(path) for path in sorted(SITE.rglob("*.html")) if path.name != "404.html"}


def test_every_page_of_the_plan_is_there(pages):
    plan = """index install first_run how_espo_works own_reward own_task own_denoiser own_objective real_checkpoints
    many_gpus commands metrics bad_input methods verifiers tasks scaling differences api/index structure
    notebooks/01_elbo_tightness"""
    assert [name for name in plan.split() if f"{name}.html" not in pages] == []


def test_every_link_leads_somewhere(pages):
    wrong = []
    for name, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = unquote(urlsplit(urljoin(f"/{name}", parts.path or f"/{name}")).path).removeprefix("/")
            target = target + "index.html" if target.endswith("/") or not target else target
            there = (SITE / target).exists()
            anchor = unquote(parts.fragment)
            if not there or (anchor and target in pages and anchor not in pages[target].places):
                wrong.append(f"{name}: {link}")
    assert wrong == []


def test_nothing_is_loaded_from_another_server(pages):
    foreign = [f"{name}: {link}" for name, page in pages.items() for link in page.loaded if urlsplit(link).netloc]
    assert foreign == []


def test_everything_that_is_loaded_is_there(pages):
    missing = []
    for name, page in pages.items():
        for link in page.loaded:
            if link.startswith("data:"):
                continue
            if not (SITE / name).parent.joinpath(unquote(urlsplit(link).path)).exists():
                missing.append(f"{name}: {link}")
    assert missing == []


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server():
    """The address of the site, served on this machine."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(SITE))) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


BROKEN = """async () => {  // the pictures that cannot be shown
    const bad = [];
    for (const image of document.images) await image.decode().catch(() => bad.push(image.src));
    return bad;
}"""


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("there is no Chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield made
        made.close()


def test_a_browser_finds_no_error_and_every_picture(browser, server, pages):
    """All pages but those of source files, and three screenshots in build/screenshots."""
    page, faults = browser.new_page(viewport={"width": 1300, "height": 1000}), []
    page.on("console", lambda m: faults.append(f"{page.url}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(f"{page.url}: {error}"))
    page.on("response", lambda r: faults.append(f"{page.url}: {r.url}: {r.status}") if r.status >= 400 else None)
    page.on("request", lambda r: faults.append(r.url) if not r.url.startswith((server, "data:", "blob:")) else None)
    for name in pages:
        if not name.endswith((".py.html", ".yaml.html")):
            page.goto(f"{server}/{name}", wait_until="load", timeout=120_000)
            faults += [f"{name}: {source}" for source in page.evaluate(BROKEN)]
    assert faults == []
    for name in ("index", "how_espo_works", "notebooks/06_sudoku_jump"):
        page.goto(f"{server}/{name}.html", timeout=120_000)
        picture = page.screenshot(path=ROOT / f"build/screenshots/{Path(name).name}.png")
        assert len(picture) > 20_000  # an empty page of this size has less


def test_the_search_finds_a_page(browser, server):
    page = browser.new_page(viewport={"width": 1300, "height": 1000})
    page.goto(f"{server}/index.html", timeout=120_000)
    page.locator("input.md-search__input").fill("leave_one_out")
    page.locator(".md-search-result__item a").first.wait_for(timeout=120_000)
    assert "objectives" in page.locator(".md-search-result__list").inner_text()
