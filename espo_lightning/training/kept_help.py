"""``--help`` of programs that wait seconds for Lightning, kept from the last time that it was shown.

The text follows from the versions of a few packages, the sources of this one and the width of the terminal. A hash of
them names the file, in the user's folder for caches, so that a text is never shown for other sources.
"""

import contextlib
import hashlib
import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]
BELOW = ("jsonargparse", "lightning", "torch", "transformers")
missing: set[Path] = set()  # what `answer` looked for


def place(command: str) -> Path:
    """Where the help of a command is kept, as it would be printed now."""
    facts = [command, sys.version, shutil.get_terminal_size().columns, [version(name) for name in BELOW]]
    digest = hashlib.sha256(repr(facts).encode())
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return caches / "espo_lightning" / f"help_{digest.hexdigest()[:24]}.txt"


def answer(command: str, argv: list[str]) -> None:
    """If nothing but the help of a command is asked for, and it is kept, print it and end the program."""
    if argv not in (["--help"], ["-h"]):
        return
    path = place(command)
    if path.is_file():
        sys.stdout.write(path.read_text(encoding="utf-8"))
        raise SystemExit(0)
    missing.add(path)


def keeping(parser: Any, command: str) -> Any:
    """A parser that keeps the help it prints, if `answer` looked for it."""
    show = parser.print_help

    def shown(file: Any = None) -> None:
        show(file)
        if not missing or (path := place(command)) not in missing:
            return
        with contextlib.suppress(OSError):  # then the next one waits, too
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(f".{os.getpid()}")
            part.write_text(parser.format_help(), encoding="utf-8")
            part.replace(path)

    parser.print_help = shown
    return parser
