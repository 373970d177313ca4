"""The folder of a run: whose it is, how files in it get their names, and what a resumed run finds there."""

import contextlib
import csv
import io
import json
import os
import shlex
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from espo_lightning.training.report import metrics_files

fcntl = None
with contextlib.suppress(ImportError):  # only where there are POSIX locks
    import fcntl

ASIDE = ".old"  # what gives its name away to a newer one, for a moment


def replace(new: Path, old: Path) -> None:
    """Give a file or folder that is complete its name, in the place of what has it.

    A folder cannot take another's name in one move, so the other first steps aside: whenever the process is killed,
    one of them is complete, and `recover` finds it.
    """
    aside = old.with_name(f"{old.name}{ASIDE}")
    if old.is_dir():
        if aside.exists():
            shutil.rmtree(aside)
        old.rename(aside)
    os.replace(new, old)
    if aside.is_dir():
        shutil.rmtree(aside)


def recover(path: Path) -> None:
    """Finish a `replace` of this path in which a process was killed."""
    aside = path.with_name(f"{path.name}{ASIDE}")
    if aside.is_dir():
        if path.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(path)


def recover_all(folder: Path) -> None:
    """`recover` what is in a folder, and drop what a killed process left unfinished there."""
    for aside in folder.glob(f"*{ASIDE}"):
        recover(aside.with_name(aside.name.removesuffix(ASIDE)))
    for part in folder.glob("*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a small file that is never seen half written."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    replace(part, path)


def amount(size: float) -> str:
    """Bytes in words, such as "1.4 GB" and "12 kB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" or size >= 10 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# ---- whose folder it is ------------------------------------------------------------------------------


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def run_of(checkpoint: Path) -> Path | None:
    """The run folder in which a checkpoint lies under the name that the user gave; None for a copy or a link."""
    folder = checkpoint.absolute().parents[1]
    inside = checkpoint.absolute().parent.name == "checkpoints" and not checkpoint.is_symlink()
    given = checkpoint.parent.parent if len(checkpoint.parts) > 2 else folder
    return given if inside and is_run(folder) else None


class Claim:
    """A folder taken for a new run, by writing its ``config.yaml``, which only one process can.

    Args:
        chosen: its path; None takes ``runs/TIME``, with a number behind it if that is somebody else's.
        config: what to write.

    Raises:
        ValueError: the folder holds something.
        OSError: it cannot be written to.
    """

    def __init__(self, chosen: str | None, config: str):
        stamp = f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
        for name in [chosen] if chosen else [stamp, *(f"{stamp}-{n}" for n in range(2, 1000))]:
            self.folder, self.existed = Path(name), Path(name).exists()
            if self._take(config):
                return
        unfinished = is_run(self.folder) and not checkpoints_in(self.folder / "checkpoints")
        state = "holds a run without a checkpoint, running or lost" if unfinished else "exists and is not empty"
        raise ValueError(f"run_dir {self.folder} {state}: name another, remove it, or resume a run with --ckpt_path")

    def _take(self, config: str) -> bool:
        if self.folder.is_dir() and any(self.folder.iterdir()):
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self.folder / "config.yaml").open("x") as file:
                file.write(config)
        except FileExistsError:
            return False
        except OSError:
            self.release()
            raise
        return True

    def release(self) -> bool:
        """Give the folder back as it was found, empty or not there, unless something was made in it: whether so."""
        made = [self.folder / "samples.jsonl", *self.folder.glob("checkpoints/*"), *self.folder.glob("*.pt")]
        if any(path.exists() for path in made):
            return False
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if not self.existed:
            self.folder.rmdir()
        return True


def lock(folder: Path) -> int | None:
    """Keep other processes out of a run folder for as long as the descriptor that is returned is open.

    None where the system has no such locks.

    Raises:
        ValueError: another process is writing there.
    """
    if fcntl is None:
        return None
    file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ValueError(f"run_dir {folder}: another process is writing there; wait until it has ended") from None
    except OSError:  # a file system without locks
        pass
    return file


# ---- what a resumed run finds ------------------------------------------------------------------------


def resume_command(command: str, checkpoint: Path, *flags: str) -> str:
    """What a user pastes into a shell to go on from a checkpoint."""
    return shlex.join(["python", "-m", command, "--ckpt_path", str(checkpoint), *flags])


def number(checkpoint: Path) -> int:
    """How many batches were done at ``batch_000010.ckpt``."""
    return int(checkpoint.stem.removeprefix("batch_"))


def checkpoints_in(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted((p for p in folder.glob("batch_*.ckpt") if p.stem.removeprefix("batch_").isdigit()), key=number)


def keep_lines(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop lines of a JSONL file, and half a line at its end that a killed process left."""
    if path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]
        kept = [line for line in lines if keep(json.loads(line))]
        write_text(path, "".join(line.decode() + "\n" for line in kept))


def keep_rows(path: Path, keep: Callable[[dict], bool]) -> None:
    """Drop rows of a CSV file, and half a line at its end that a killed process left."""
    text = path.read_text()
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    kept, out = [row for row in rows if keep(row)], io.StringIO()
    writer = csv.DictWriter(out, rows.fieldnames or [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    write_text(path, out.getvalue())


def rewind(run_dir: Path, batches: int, rollouts: int) -> None:
    """Make a run folder that of a run which is about to go on after so many batches.

    What belongs to the future that is about to be made again is dropped from metrics and samples, or set aside: a
    ``summary.json``, which is no longer the run's, and later checkpoints, which are not this future's.
    """
    keep_lines(run_dir / "samples.jsonl", lambda row: row["rollout"] <= rollouts)
    for path in metrics_files(run_dir):
        keep_rows(path, lambda row: float(row.get("rollout") or 0) <= rollouts)
    earlier = run_dir / "summary.json"
    if earlier.exists():
        finished = json.loads(earlier.read_text()).get("rollouts", 0)
        earlier.rename(run_dir / f"summary_{finished:06d}.json")
    folder = run_dir / "checkpoints"
    for checkpoint in checkpoints_in(folder):
        if number(checkpoint) > batches:
            (folder / "superseded").mkdir(exist_ok=True)
            replace(checkpoint, folder / "superseded" / checkpoint.name)
    best = folder / "best.json"
    if best.exists() and json.loads(best.read_text())["batches"] > batches:
        best.unlink()


class Metrics(CSVLogger):
    """``metrics.csv``; what an earlier part of the run wrote is kept as ``metrics.000.csv`` and so on."""

    def __init__(self, run_dir: Path):
        super().__init__(run_dir, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self):
        earlier = Path(self.log_dir) / "metrics.csv"
        if self._experiment is None and earlier.exists():  # which would be deleted
            earlier.rename(earlier.with_name(f"metrics.{len(list(earlier.parent.glob('metrics.*.csv'))):03d}.csv"))
        return super().experiment
