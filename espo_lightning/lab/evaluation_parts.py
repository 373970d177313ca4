"""The unfinished part of an evaluation on disk: numbered records that survive a kill and come from several processes.

Process ``rank`` appends to ``OUTPUT.RANK.jsonl``: a header line that says what is evaluated, then one line per record.
No process group is needed, only a common folder. Any process that finds all records may write the result; it is the
same whoever does.
"""

import glob
import json
import os
from pathlib import Path


class Shards:
    """The files beside ``output``.

    Args:
        output: the result file that is to come.
        header: what is evaluated; JSON. The result contains it.
        rank: number of this process.
    """

    def __init__(self, output: Path, header: dict, rank: int = 0):
        self.output, self.header, self.rank = output, json.loads(json.dumps(header, default=str)), rank
        self.own = output.with_name(f"{output.name}.{rank}.jsonl")

    def open(self) -> None:
        """Get ready to append. Raises ValueError if a file beside ``output`` belongs to another evaluation."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.read()  # checks the headers before anything is written
        with open(self.own, "ab+") as file:  # a kill may have left half a line: cut it off
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)
            if b"\n" not in content:
                file.write(json.dumps({"header": self.header}).encode() + b"\n")

    def finished(self) -> dict | None:
        """The result, if some process has written it. Raises ValueError if ``output`` is another evaluation's."""
        try:
            result = json.loads(self.output.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            result = {}  # some other file
        if {key: result.get(key) for key in self.header} != self.header:
            raise ValueError(f"output {self.output} exists already, from another evaluation: name another file")
        return result

    @property
    def files(self) -> list[Path]:
        """The files of all processes."""
        return sorted(self.output.parent.glob(glob.escape(self.output.name) + ".*.jsonl"))

    def read(self) -> dict[int, dict]:
        """All complete records by number, whichever process wrote them."""
        records: dict[int, dict] = {}
        for path in self.files:
            try:
                lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last newline is half a record
            except FileNotFoundError:  # another process wrote the result and removed it
                continue
            for line in map(json.loads, lines):
                if "header" in line:
                    self.check(path, line["header"])
                else:
                    records.setdefault(line.pop("number"), line)
        return records

    def check(self, path: Path, header: dict) -> None:
        """Raises ValueError, with the differences, unless ``header`` is this evaluation's."""
        if header != self.header:
            differences = "; ".join(_differences(header, self.header))
            raise ValueError(
                f"{path} belongs to another evaluation ({differences}): finish that one with its own command, remove "
                f"the file, or name another output"
            )

    def append(self, number: int, record: dict) -> None:
        """Add a record. It is on disk, or not there at all, whenever this process is killed."""
        with open(self.own, "ab") as file:
            file.write(json.dumps({"number": number, **record}, default=str).encode() + b"\n")

    def finish(self, result: dict) -> None:
        """Write the result in one move, then remove the files of all processes."""
        partial = self.output.with_name(f"{self.output.name}.{self.rank}.tmp")
        partial.write_text(json.dumps(result, indent=1, default=str))
        os.replace(partial, self.output)
        for path in self.files:
            path.unlink(missing_ok=True)


def _differences(there: object, here: object, name: str = "") -> list[str]:
    """The leaves in which two JSON values differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = sorted(there.keys() | here.keys())
        return [d for k in keys for d in _differences(there.get(k), here.get(k), f"{name}.{k}".lstrip("."))]
    return [] if there == here else [f"{name}: {there!r} there, {here!r} here"]
