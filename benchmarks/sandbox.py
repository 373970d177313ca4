"""How many trivial programs a second the sandbox runs, and how long one takes alone, on every backend of this host.

The load average is part of the result: on a machine with other work the same sandbox is slower.
"""

import argparse
import json
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from espo_lightning.tasks.sandbox.run import BACKENDS, Sandbox, probe


def measure(backend: str, programs: int) -> dict[str, float]:
    """One runner per CPU; the runners are warm."""
    pool = Sandbox(backend=backend)

    def one(index: int) -> float:
        start = time.perf_counter()
        result = pool.test("def f(x): return x + 1", (f"assert f({index}) == {index + 1}",), exports=("f",))
        assert result.passed == (True,), result
        return time.perf_counter() - start

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(one, range(os.cpu_count())))
        start = time.perf_counter()
        list(threads.map(one, range(programs)))
        seconds = time.perf_counter() - start
    alone = [one(index) for index in range(20)]
    pool.close()
    return {"per_second": programs / seconds, "milliseconds_alone": 1000 * statistics.median(alone)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--programs", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "sandbox.json")
    options = parser.parse_args()
    result = {"cpus": os.cpu_count(), "programs": options.programs}
    for backend in BACKENDS:
        if reason := probe(backend):
            print(reason)
            continue
        result[backend] = measure(backend, options.programs) | {"load_1_min": os.getloadavg()[0]}
        print(backend, json.dumps(result[backend]))
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
