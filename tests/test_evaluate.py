"""Evaluations: protocols, kills and resumes, several processes, several samples. All against one uninterrupted run."""

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from functools import partial

import pytest
from conftest import Letters, small_policy

from espo_lightning import Decoding, Problem, Task, evaluate
from espo_lightning.decoding.published import PROTOCOLS
from espo_lightning.evaluate import fingerprint
from espo_lightning.lab.evaluation_parts import Shards

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

SHORT = Decoding(length=4, block_length=4, steps=4, temperature=1.0)
BLOCKED = multiprocessing.get_context("fork").Event()  # while set, problems from the sixth on take for ever


def verify(index: int, text: str) -> dict[str, float]:
    while BLOCKED.is_set() and index >= 5:
        time.sleep(0.01)
    return {"reward": text.count("a") / 4, "exact": float(len(text) % 2)}


@dataclass(frozen=True)
class Numbered(Task):
    def problem(self, split: str, seed: int, index: int) -> Problem:
        return Problem(f"{split} {index}", partial(verify, index), "aaaa")


def run(output, **changes) -> dict | None:
    settings = {"decoding": SHORT, "problems": 11, "batch_size": 2, "device": "cpu", "output": str(output)} | changes
    return evaluate.evaluate(small_policy(), settings.pop("task", Numbered()), **settings)


def without_seconds(result: dict) -> dict:
    assert result["seconds"] > 0
    return {key: value for key, value in result.items() if key != "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """What an uninterrupted run of one process writes."""
    output = tmp_path_factory.mktemp("whole") / "result.json"
    result = run(output)
    assert json.loads(output.read_text()) == result
    assert [p.name for p in output.parent.iterdir()] == ["result.json"]
    return without_seconds(result)


@pytest.fixture
def background():
    """Starts functions in forked processes, which inherit everything and need no import; kills what is left."""
    started = []

    def start(function, *args) -> multiprocessing.Process:
        started.append(multiprocessing.get_context("fork").Process(target=function, args=args))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()
    BLOCKED.clear()


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for a minute"
        time.sleep(0.01)


def lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_the_result_says_what_was_measured(whole):
    assert (whole["n"], len(whole["samples"]), whole["decoding"]["steps"]) == (11, 11, 4)
    assert whole["decoding"]["order"] == "espo_lightning.decoding.orders.low_confidence"
    assert whole["reward"] == pytest.approx(sum(s["verdict"]["reward"] for s in whole["samples"]) / 11)
    assert [s["problem"] for s in whole["samples"]] == list(range(11))
    assert whole["policy"] == fingerprint(small_policy().parameters()) != fingerprint(small_policy(seed=1).parameters())


# ---- kill and resume ------------------------------------------------------------------------------------------------


def test_a_killed_evaluation_goes_on_where_it_stopped(whole, background, tmp_path):
    """kill -9 while the third batch (problems 4 and 5) is judged; the same call then judges nothing twice."""
    part = tmp_path / "result.json.0.jsonl"
    BLOCKED.set()
    process = background(run, tmp_path / "result.json")
    wait_for(lambda: lines(part) == 3)
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    BLOCKED.clear()
    assert lines(part) == 3  # the header and two batches
    assert not (tmp_path / "result.json").exists()

    drawn = []

    @dataclass(frozen=True)
    class Counted(Numbered):
        def problem(self, split: str, seed: int, index: int) -> Problem:
            drawn.append(index)
            return super().problem(split, seed, index)

    assert without_seconds(run(tmp_path / "result.json", task=Counted())) == whole
    assert drawn == [0, *range(4, 11)]  # the first to see whether the data can be read
    assert not part.exists()


@pytest.mark.parametrize("cut", [1, 7, 100])
def test_half_a_line_is_made_again(whole, background, tmp_path, cut):
    part = tmp_path / "result.json.0.jsonl"
    BLOCKED.set()
    process = background(run, tmp_path / "result.json")
    wait_for(lambda: lines(part) == 3)
    process.kill()
    process.join()
    BLOCKED.clear()
    os.truncate(part, part.stat().st_size - cut)
    assert without_seconds(run(tmp_path / "result.json")) == whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 here"),
        ({"problems": 12}, "problems: 11 there, 12 here"),
        ({"batch_size": 3}, "batch_size: 2 there, 3 here"),
        ({"split": "train"}, "split: 'test' there, 'train' here"),
        ({"samples": 2}, "samples_per_problem: 1 there, 2 here"),
        ({"decoding": Decoding(length=4, block_length=4, steps=2)}, "decoding.steps: 4 there, 2 here"),
        ({"settings": {"task": "other"}}, "settings: None there, {'task': 'other'} here"),
    ],
)
def test_another_evaluation_is_refused(tmp_path, change, named):
    left = Shards(tmp_path / "result.json", header_of(tmp_path))
    left.open()
    left.append(0, {"seconds": 1.0, "samples": []})
    before = left.own.read_bytes()
    with pytest.raises(ValueError, match="belongs to another evaluation") as error:
        run(tmp_path / "result.json", **change)
    assert named in str(error.value)
    assert left.own.read_bytes() == before


def header_of(folder) -> dict:
    """The header that `run` writes."""
    run(folder / "once.json")
    result = json.loads((folder / "once.json").read_text())
    made = {"n", "clusters", "ci95", "chance", "seconds", "samples", "reward", "exact", "failed", "timeout"}
    return {key: value for key, value in result.items() if key not in made}


def test_a_finished_evaluation_is_not_overwritten(tmp_path):
    run(tmp_path / "result.json")
    before = (tmp_path / "result.json").read_bytes()
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "result.json")
    assert (tmp_path / "result.json").read_bytes() == before


# ---- several processes ----------------------------------------------------------------------------------------------


def as_rank(rank: int, world: int, output) -> dict | None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    return run(output)


@pytest.mark.parametrize("world", [2, 7])  # seven processes for six batches: one has nothing to do
def test_several_processes_write_what_one_does(whole, background, tmp_path, world):
    processes = [background(as_rank, rank, world, tmp_path / "result.json") for rank in range(world)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * world
    assert without_seconds(json.loads((tmp_path / "result.json").read_text())) == whole
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_each_process_does_its_own_part_and_the_last_one_merges(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(tmp_path / "result.json") is None
    assert lines(tmp_path / "result.json.1.jsonl") == 1 + 3
    monkeypatch.setenv("RANK", "0")
    assert without_seconds(run(tmp_path / "result.json")) == whole


def test_another_number_of_processes_can_go_on(whole, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    assert run(tmp_path / "result.json") is None
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert without_seconds(run(tmp_path / "result.json")) == whole


def test_a_process_that_comes_after_the_merge_takes_the_result(tmp_path, monkeypatch):
    """It starts late, and has nothing left to do."""
    result = run(tmp_path / "result.json")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert run(tmp_path / "result.json") == result
    with pytest.raises(ValueError, match="exists already"):
        run(tmp_path / "result.json", seed=1)


# ---- samples, protocols ---------------------------------------------------------------------------------------------


def test_several_samples_extend_one(whole, tmp_path):
    result = run(tmp_path / "result.json", samples=3)
    assert (result["n"], len(result["samples"])) == (11, 33)
    assert [s["completion"] for s in result["samples"][::3]] == [s["completion"] for s in whole["samples"]]
    right = [[s["verdict"]["exact"] for s in result["samples"][i : i + 3]] for i in range(0, 33, 3)]
    assert result["pass@1"] == result["exact"] == pytest.approx(sum(map(sum, right)) / 33)
    # of three samples, two that are both wrong are drawn with chance C(3 - c, 2) / 3
    both_wrong = [{0: 3, 1: 1, 2: 0, 3: 0}[int(sum(three))] / 3 for three in right]
    assert result["pass@2"] == pytest.approx(1 - sum(both_wrong) / 11)
    assert 0 < result["pass@1"] < result["pass@2"] < 1
    with pytest.raises(ValueError, match="all be equal"):
        run(tmp_path / "greedy.json", samples=2, decoding=SHORT.greedy)


def test_protocols():
    table = {
        name: (d.length, d.block_length, d.length // d.steps, d.temperature, d.top_p) for name, d in PROTOCOLS.items()
    }
    assert table == {
        "llada-planning-128": (128, 32, 2, 0.0, 1.0),
        "llada-planning-256": (256, 32, 2, 0.0, 1.0),
        "llada-planning-512": (512, 32, 2, 0.0, 1.0),
        "llada-reasoning-128": (128, 32, 1, 0.0, 1.0),
        "llada-reasoning-256": (256, 32, 1, 0.0, 1.0),
        "llada-reasoning-512": (512, 32, 1, 0.0, 1.0),
        "dream-planning-128": (128, 128, 2, 0.0, 1.0),
        "dream-planning-256": (256, 256, 2, 0.0, 1.0),
        "dream-planning-512": (512, 512, 2, 0.0, 1.0),
        "dream-reasoning-128": (128, 128, 1, 0.1, 0.9),
        "dream-reasoning-256": (256, 256, 1, 0.1, 0.9),
        "dream-reasoning-512": (512, 512, 1, 0.1, 0.9),
        "dream-reasoning-768": (768, 768, 1, 0.1, 0.9),
        "dream-reasoning-1024": (1024, 1024, 1, 0.1, 0.9),
    }
    ways = {(name.partition("-")[0], d.order.__name__, d.schedule.__name__) for name, d in PROTOCOLS.items()}
    assert ways == {("llada", "low_confidence", "even_schedule"), ("dream", "entropy_order", "dream_schedule")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("policy") / "tiny"
    small_policy().save(path)
    return str(path)


def test_a_protocol_from_the_command_line(folder, tmp_path, capsys):
    flags = [f"--policy.path={folder}", "--problems=2", "--device=cpu", "--protocol=llada-planning-128"]
    evaluate.main([*flags, f"--output={tmp_path / 'result.json'}"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["protocol"], result["settings"]["protocol"]) == ("llada-planning-128",) * 2
    assert result["decoding"] == evaluate.as_json(PROTOCOLS["llada-planning-128"])
    for more, message in [
        (["--decoding.steps=4"], "contradict each other"),
        (["--protocol=gsm8k"], "llada-reasoning-512"),
        (["--problems=0"], "must be at least 1"),
    ]:
        with pytest.raises(SystemExit) as error:
            evaluate.main([*flags, *more, f"--output={tmp_path / 'other.json'}"])
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_ctrl_c_is_no_traceback(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "run", interrupted)
    with pytest.raises(SystemExit) as stop:
        evaluate.main([])
    assert stop.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err


def test_decoding_from_a_yaml_file(folder, tmp_path):
    (tmp_path / "mine.yaml").write_text("decoding: {length: 8, block_length: 4, steps: 4, temperature: 0.5}\n")
    flags = [f"--policy.path={folder}", "--problems=2", f"--config={tmp_path / 'mine.yaml'}"]
    evaluate.main([*flags, f"--output={tmp_path / 'result.json'}"])
    decoding = json.loads((tmp_path / "result.json").read_text())["decoding"]
    assert [decoding[k] for k in ("length", "block_length", "steps", "temperature")] == [8, 4, 4, 0.5]


def test_letters_of_the_other_tests_are_evaluated_too(tmp_path):
    """A task without chance levels and with prompts of several lengths."""
    result = run(tmp_path / "result.json", task=Letters())
    assert result["chance"] == {}
    assert set(result["ci95"]) == {"reward", "exact", "failed", "timeout"}


@pytest.mark.parametrize("device", ["gpu", "cuda:7", "nowhere"])
def test_a_device_that_is_not_there_is_one_message_and_leaves_nothing(folder, tmp_path, capsys, device):
    flags = [f"--policy.path={folder}", "--problems=2", f"--output={tmp_path / 'result.json'}"]
    with pytest.raises(SystemExit) as error:
        evaluate.main([*flags, f"--device={device}"])
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert f"device={device} is not possible" in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("result*"))
    evaluate.main([*flags, "--device=cpu"])
    assert json.loads((tmp_path / "result.json").read_text())["n"] == 2
