"""Where experiments and notebooks are: beside the package in a clone, inside it where a wheel was installed."""

from pathlib import Path

PACKAGE = Path(__file__).parent


def shipped(folder: str) -> Path:
    """The folder ``experiments`` or ``notebooks``; it need not be there, as in a copy of the package alone."""
    inside = PACKAGE / "shipped" / folder
    return inside if inside.is_dir() else PACKAGE.parent / folder


def found(path: str) -> str:
    """A path as it is, unless there is nothing and it names one of the library's experiments: then that one.

    So ``--config experiments/countdown_tiny.yaml`` works in every folder, and a file of one's own comes first.
    """
    first, _, rest = path.partition("/")
    if first != "experiments" or Path(path).exists() or not (own := shipped(first) / rest).is_file():
        return path
    return str(own)
