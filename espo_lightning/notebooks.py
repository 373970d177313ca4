"""``python -m espo_lightning.notebooks``: run the notebooks, one or all, at full or reduced scale.

A notebook is thin: it calls a function of `espo_lightning.lab.studies` for every seed, draws figures, and writes
``results/<name>/result.json``. Its parameters stand in one cell; ``reduced.yaml`` beside the notebooks holds
the small values that continuous integration uses.
"""

import ast
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml

from espo_lightning.lab.evidence import ANSWERS
from espo_lightning.ranges import check_counts
from espo_lightning.shipped import shipped
from espo_lightning.training.command_line import run
from espo_lightning.training.quiet import quiet

PACKAGES = ("espo-lightning", "torch", "lightning", "transformers", "numpy", "matplotlib")
FOLDER = "notebooks"
SETTINGS = ("processes", "results")  # parameters of a notebook that no number depends on
FIELDS = {
    "name": str,
    "parameters": dict,
    "per_seed": list,  # one dictionary per seed, with its "seed" and "seconds"
    "summary": dict,  # numbers over the seeds that the notebook shows
    "findings": dict,  # statement -> one of `ANSWERS`
    "versions": dict,
    "machine": str,
    "seconds": float,  # of processor time, one core, all seeds together
    "commit": (str, type(None)),
    "modified": (bool, type(None)),  # whether the package or the notebook differed from that commit
}

# ---- what a notebook calls ---------------------------------------------------------------------------


def over_seeds(study: Callable[..., dict], seeds: Iterable[int], /, **options: Any) -> list[dict]:
    """``study(seed, **settings)`` of every seed: `over_arms` with a single arm."""
    return over_arms(study, {"": {}}, seeds, **options)[""]


def over_arms(
    study: Callable[..., dict],
    arms: dict[str, dict],
    seeds: Iterable[int],
    /,  # a study may have settings of these names
    *,
    processes: int = 1,
    cache: str | Path | None = "../runs/notebooks",
    any_source: bool = False,
    **settings: Any,
) -> dict[str, list[dict]]:
    """``study(seed, **settings, **arm)`` of every arm and seed, in processes of their own with one thread each.

    What is finished is kept, one file per arm and seed, so that an interrupted or extended notebook computes only what
    is missing. A kept result counts only for the same settings, the same source and bundled policies of this package,
    and the same versions of what it stands on.

    Args:
        study: a function of an importable module that returns numbers, in lists and dictionaries.
        arms: name -> the settings in which this arm differs.
        processes: how many run at once.
        cache: folder of finished results; None = keep nothing.
        any_source: kept results count whatever source and versions made them: for a table that grows over versions.

    Returns:
        For every arm the dictionaries in the order of ``seeds``, each with "seed" and "seconds" of processor time.
    """
    seeds = list(seeds)
    sources = hashlib.sha256() if any_source else made_of(Path(__file__).parent)

    def file(arm: dict, seed: int) -> Path | None:
        if cache is None:
            return None
        digest = sources.copy()
        digest.update(json.dumps([study.__module__, study.__qualname__, settings | arm], sort_keys=True).encode())
        return Path(cache) / f"{study.__name__}_{digest.hexdigest()[:16]}" / f"seed_{seed}.json"

    jobs = {(name, seed): (seed, settings | arm, file(arm, seed)) for name, arm in arms.items() for seed in seeds}
    found = {job: json.loads(x[2].read_text()) for job, x in jobs.items() if x[2] is not None and x[2].exists()}
    if missing := {job: arguments for job, arguments in jobs.items() if job not in found}:
        with ProcessPoolExecutor(processes, get_context("spawn"), _start) as pool:
            waiting = {job: pool.submit(_timed, study, *arguments) for job, arguments in missing.items()}
            try:
                found |= {job: future.result() for job, future in waiting.items()}
            except BaseException:  # a job failed, or the kernel was interrupted: what runs is finished and kept
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    return {name: [found[name, seed] for seed in seeds] for name in arms}


def made_of(package: Path) -> "hashlib._Hash":
    """A hash of what a study's numbers depend on: source and assets of the package, and the versions below it."""
    digest = hashlib.sha256(json.dumps(versions(), sort_keys=True).encode())
    for path in sorted([*package.rglob("*.py"), *(p for p in package.glob("assets/**/*") if p.is_file())]):
        if path.stem not in ("notebooks", "plots"):  # which no study may import
            digest.update(f"{path.relative_to(package)}\0".encode())
            digest.update(path.read_bytes())
    return digest


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def _start() -> None:
    """One thread, so that the numbers do not depend on the machine's cores; no warning of what a study counts."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "rollout .* the gradient is NaN")  # a study counts the runs that diverge
    threading.Thread(target=_end_with, args=[parent_process()], daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    """A kernel that is killed, as by Ctrl-C in the runner, leaves no workers that go on for minutes."""
    parent.join()
    os._exit(1)


def _timed(study: Callable[..., dict], seed: int, settings: dict, path: Path | None) -> dict:
    quiet()  # no chatter among the outputs; Lightning is there only now, with the study
    start = time.process_time()  # of this process with its one thread, whatever else the machine does
    numbers = study(seed, **settings)
    text = json.dumps({"seed": seed, **numbers, "seconds": time.process_time() - start})
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(text)
        part.rename(path)  # never half a result
    return json.loads(text)


def save_result(
    results: str | Path, name: str, *, parameters: dict, per_seed: list[dict], summary: dict, findings: dict[str, str]
) -> dict:
    """Write ``results/<name>/result.json`` and return it.

    Args:
        parameters: the notebook's, without `SETTINGS`.
        per_seed: from `over_seeds`.
        summary: numbers over the seeds.
        findings: the statements of the notebook's expectations, and what is shown of each, see `lab.evidence`.

    Raises:
        ValueError: see `check_result`; nothing is written.
    """
    result = {
        "name": name,
        "parameters": parameters,
        "per_seed": rounded(per_seed),
        "summary": rounded(summary),
        "findings": findings,
        "versions": versions(),
        "machine": f"{platform.system()} {platform.machine()}, CPU",
        "seconds": float(sum(row["seconds"] for row in per_seed)),
        **dict(zip(("commit", "modified"), _commit(name))),
    }
    check_result(result)
    folder = Path(results) / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def rounded(value: Any) -> Any:
    """Floats with 6 significant digits: more are noise, and room in the repository."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def check_result(result: dict) -> None:
    """That a result has the fields of `FIELDS`, answers of `ANSWERS`, one row per seed, and no NaN or infinity.

    Raises:
        ValueError: naming the field.
    """
    if set(result) != set(FIELDS):
        raise ValueError(f"a result has the fields {sorted(FIELDS)}, got {sorted(result)}")
    for field, kind in FIELDS.items():
        if not isinstance(result[field], kind):
            raise ValueError(f"field {field} of a result must be {kind}, got {result[field]!r}")
    if other := {statement: answer for statement, answer in result["findings"].items() if answer not in ANSWERS}:
        raise ValueError(f"the answer to a statement must be one of {', '.join(ANSWERS)}, got {other}")
    if len(result["per_seed"]) != result["parameters"].get("seeds"):
        raise ValueError(f"parameters name {result['parameters'].get('seeds')} seeds, got {len(result['per_seed'])}")
    _check_finite(result, "result")


def _check_finite(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: a result holds finite numbers, leave the entry out instead")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        _check_finite(item, f"{where}[{key!r}]")


def _commit(name: str) -> tuple[str | None, bool | None]:
    """The checkout's commit and whether the package or the notebook differs from it; None outside a checkout."""
    ask = partial(subprocess.check_output, cwd=Path(__file__).parent, text=True, stderr=subprocess.PIPE)
    try:
        changes = ask(["git", "status", "--porcelain", "--", ".", f":/{FOLDER}/{name}.ipynb"])
        return ask(["git", "rev-parse", "HEAD"]).strip(), bool(changes)
    except (OSError, subprocess.CalledProcessError):
        return None, None


# ---- the runner --------------------------------------------------------------------------------------


def notebook_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a notebook with the values in its file."""
    import papermill

    return {name: ast.literal_eval(p["default"]) for name, p in papermill.inspect_notebook(str(path)).items()}


def execute(
    name: str | None = None,
    seeds: int | None = None,
    processes: int | None = None,
    parameters: dict[str, Any] | None = None,
    reduced: bool = False,
    folder: str = FOLDER,
    output_dir: str | None = None,
) -> list[Path]:
    """Run notebooks, and write them executed, with their results.

    Args:
        name: the notebook, or the start of its name, such as 01; all of them if left out.
        seeds: how many seeds.
        processes: seeds at once.
        parameters: other parameters of the notebooks, such as ``--parameters.rollouts=10``.
        reduced: the small values of ``reduced.yaml``, for a quick check.
        folder: where the notebooks are; where there is no folder ``notebooks``, one is made with those of the package.
        output_dir: where executed notebooks and ``results`` go. By default the folder itself if the notebooks run with
            the values in their files, else build/notebooks.

    Returns:
        The executed notebooks.

    Raises:
        ValueError: no such notebook or parameter, or a number below 1.
    """
    check_counts(1, seeds=seeds, processes=processes)
    wanted = Path(folder)
    source = wanted if wanted.exists() or folder != FOLDER else shipped(FOLDER)
    paths = _named(source, name)
    scale = yaml.safe_load((source / "reduced.yaml").read_text()) if reduced else {}
    shared = {k: v for k, v in {"seeds": seeds, "processes": processes, **(parameters or {})}.items() if v is not None}
    given = {path: {**scale.get(path.stem, {}), **shared} for path in paths}
    for path, values in given.items():
        known = notebook_parameters(path)
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"notebook {path.stem} has no parameter {', '.join(unknown)}; it has: {', '.join(known)}")
        given[path] = {k: v for k, v in values.items() if v != known[k]}
    as_committed = not any(set(values) - set(SETTINGS) for values in given.values())
    if source != wanted:  # which are nobody's to run in: they are the installed package's
        shutil.copytree(source, wanted, ignore=shutil.ignore_patterns("results", ".*", "running_*"))
        sys.stdout.write(f"the notebooks of the package are copied to {wanted.absolute()}\n")
        source, given = wanted, {wanted / path.name: values for path, values in given.items()}
    target = Path(output_dir) if output_dir else source if as_committed else Path("build/notebooks")
    target.mkdir(parents=True, exist_ok=True)
    if target.resolve() != source.resolve():
        results = os.path.relpath(target / "results", source)
        given = {path: {**values, "results": results} for path, values in given.items()}
    return [_run(path, values, source, target) for path, values in given.items()]


def _named(source: Path, name: str | None) -> list[Path]:
    """The notebooks of a folder whose names begin so."""
    known = sorted(source.glob("[0-9]*.ipynb"))
    if not known:
        raise ValueError(
            f"no notebooks in folder {source.absolute()}: name theirs with --folder, or leave it out for those of "
            "the package"
        )
    paths = [path for path in known if path.name.startswith(name or "")]
    if not paths:
        there = ", ".join(path.stem for path in known)
        raise ValueError(f"no notebook in {source} starts with {name or ''!r}; there are: {there}")
    return paths


def _run(path: Path, values: dict[str, Any], source: Path, target: Path) -> Path:
    """Run one notebook with other values, in the folder ``source``, and write it to ``target``."""
    import papermill

    start = time.perf_counter()
    # a failed run leaves the earlier one as it was, and is not taken for a notebook (whose names begin with digits)
    running = target / f"running_{path.name}"
    papermill.execute_notebook(
        str(path), str(running), values, cwd=str(source), kernel_name="python3", progress_bar=False
    )
    _as_opened(running)
    done = running.rename(target / path.name)
    sys.stdout.write(f"{done}  {time.perf_counter() - start:.0f} s\n")
    return done


def _as_opened(path: Path) -> None:
    """Write a notebook as Jupyter would after opening it, so that it is not taken for a changed one.

    What papermill adds about the run itself is dropped: it differs every time and names folders. So are the states of
    widgets, which say nothing without a kernel. The kernel has the name by which Jupyter shows it.
    """
    import nbformat
    from jupyter_client.kernelspec import get_kernel_spec

    notebook = nbformat.read(str(path), as_version=4)
    for key in ("papermill", "widgets"):
        notebook.metadata.pop(key, None)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
    kernel = get_kernel_spec("python3")
    notebook.metadata.kernelspec = {"display_name": kernel.display_name, "language": kernel.language, "name": "python3"}
    nbformat.write(notebook, str(path))


def main(argv: list[str] | None = None) -> None:
    run(execute, "espo_lightning.notebooks", argv)


if __name__ == "__main__":
    main()
