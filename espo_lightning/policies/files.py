"""The files of a checkpoint: which folder, its JSON, its tensors."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

ASSETS = Path(__file__).parents[1] / "assets"


def resolve(path: str | Path, *, code: bool = False) -> Path:
    """The local folder of a checkpoint; ``bundled:NAME`` is one of the package, a hub id (owner/name) is downloaded."""
    if str(path).startswith("bundled:"):
        folder = ASSETS / str(path).removeprefix("bundled:")
        if not folder.is_dir():
            raise FileNotFoundError(f"{path}: the bundled policies are {sorted(f.name for f in ASSETS.iterdir())}")
        return folder
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(path)) and not folder.parent.is_dir()
    if not hub_id or folder.exists():
        what = "is a file" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"{path} {what}: expected a checkpoint folder or a hub id like owner/name")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", *(["*.py"] if code else [])]
    try:
        return Path(snapshot_download(str(path), allow_patterns=patterns))
    except Exception as error:  # a dozen classes, from HTTP to file locks
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{path} is no local folder, and the hub did not give it: {reason}") from error


def read_json(folder: Path, name: str) -> dict:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder} has no {name}: expected a checkpoint folder in Hugging Face form") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{folder / name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} must hold a JSON object, got {type(content).__name__}")
    return content


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a folder, shard by shard."""
    names = ["model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        weight_map = read_json(folder, "model.safetensors.index.json").get("weight_map")
        if not weight_map:
            raise ValueError(f"{folder / 'model.safetensors.index.json'} has no weight_map")
        names = sorted(set(weight_map.values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {', '.join(absent)}: copy the complete checkpoint, as safetensors")
    for name in names:
        try:
            with safe_open(folder / name, "pt") as shard:
                keys = list(shard.keys())
            for key in keys:
                with safe_open(folder / name, "pt") as shard:  # opened anew, which lets go of the pages already read
                    yield key, shard.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{folder / name} is damaged or no safetensors file: {error}") from error
