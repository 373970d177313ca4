"""Every experiment file parses against the real signatures and runs one small batch."""

import json
from pathlib import Path

import pytest
import yaml
from checkpoints import write

from espo_lightning import fit, sft

pytestmark = pytest.mark.usefixtures("global_generators_untouched")

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
DATA = Path(__file__).parent / "data"
SMALL = ["--data.batches=1", "--data.batch_size=2", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
SMALL_FIT = [*SMALL, "--data.eval_problems=2", "--data.eval_batch_size=2", "--model.group_size=2"]

MODELS = ("llada", "dream")
TASKS = {  # local rows; None draws its problems
    "sudoku": None,
    "countdown": None,
    "gsm8k": DATA / "gsm8k_60.jsonl",
    "math": DATA / "math500_84.jsonl",
    "code": "acecode.jsonl",
}
MACHINES = ("one_gpu", "paper_demo")
# but for EBPO, whose policies have blocks: see test_presets.py
METHODS = sorted(path.stem for path in (EXPERIMENTS / "methods").glob("*.yaml") if path.stem != "ebpo")
PARTS = {*MODELS, *MACHINES, *(f"paper_{task}" for task in TASKS)}  # combined; every other file stands alone
ALONE = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml") if path.stem not in PARTS)


def config(*names: str) -> list[str]:
    return [flag for name in names for flag in ("--config", str(EXPERIMENTS / f"{name}.yaml"))]


def read(*names: str) -> dict:
    """What the command line makes of some files, without the defaults of anything."""
    merged: dict = {}
    for name in names:
        merge(merged, yaml.safe_load((EXPERIMENTS / f"{name}.yaml").read_text()))
    return merged


def merge(into: dict, other: dict) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            merge(into[key], value)
        else:
            into[key] = value


@pytest.mark.parametrize("name", ALONE)
def test_every_experiment_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # nothing may depend on the working directory
    if name.endswith("_base"):
        sft.main([*config(name), "--run_dir=run", *SMALL])
    else:
        fit.main([*config(name), "--run_dir=run", *SMALL_FIT])
    assert (tmp_path / "run" / "policy" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    """Random checkpoints in the formats of LLaDA and Dream, and rows in the schema of AceCode."""
    root = tmp_path_factory.mktemp("local")
    for model in MODELS:
        write(root / model, model)
    row = {"question": "Write a function double(x).", "test_cases": ["assert double(2) == 4", "assert double(0) == 0"]}
    (root / "acecode.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    return root


def run(names: list[str], local: Path, folder: Path, monkeypatch) -> dict:
    """One rollout of a combination of files, small; its summary."""
    monkeypatch.chdir(folder)
    model, task = names[0], names[1].removeprefix("paper_")
    rows = [] if TASKS[task] is None else [f"--data.task.init_args.path={local / TASKS[task]}"]
    block = 4 if model == "llada" else 8
    sizes = ["--model.decoding.length=8", f"--model.decoding.block_length={block}", "--model.decoding.steps=4"]
    lora = [] if task == "code" else ["--model.policy.init_args.lora.rank=4"]
    machine = [] if names[-1] in MACHINES else ["--trainer.devices=1", "--trainer.strategy=auto"]
    other = ["--model.max_prompt_length=2000", "--model.updates=2", f"--model.policy.init_args.path={local / model}"]
    fit.main([*config(*names), "--run_dir=run", *SMALL_FIT, *rows, *sizes, *lora, *machine, *other])
    return json.loads((folder / "run" / "summary.json").read_text())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_every_model_and_task_runs_one_rollout(model, task, local, tmp_path, monkeypatch):
    summary = run([model, f"paper_{task}"], local, tmp_path, monkeypatch)
    settings, wanted = summary["settings"], read(model, f"paper_{task}")
    assert (summary["rollouts"], summary["updates"]) == (1, 2)
    objective = settings["model"]["objective"]["init_args"]
    assert objective["beta"] == wanted["model"]["objective"]["beta"]
    assert objective["clip_range"] == wanted["model"]["objective"]["clip_range"]
    # parts of one object from several files: the later file changes what it names and nothing else
    assert settings["model"]["optimizer"]["init_args"].items() >= wanted["model"]["optimizer"]["init_args"].items()
    adapters = (tmp_path / "run" / "policy" / "adapter_model.safetensors").exists()
    assert adapters == (task != "code")


@pytest.mark.parametrize("names", [["llada", "paper_sudoku", "one_gpu"], ["dream", "paper_countdown", "paper_demo"]])
def test_the_variants_for_one_gpu_run(names, local, tmp_path, monkeypatch):
    assert run(names, local, tmp_path, monkeypatch)["rollouts"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_with_the_settings_of_the_paper(method, local, tmp_path, monkeypatch):
    """The method's file comes last, and what it does not name stays as the others have it."""
    summary = run(["llada", "paper_sudoku", f"methods/{method}"], local, tmp_path, monkeypatch)
    model, wanted = summary["settings"]["model"], read(f"methods/{method}")["model"]
    objective = wanted["objective"]
    name = objective if isinstance(objective, str) else objective["class_path"]
    assert model["objective"]["class_path"].rpartition(".")[2] == name
    assert model["max_grad_norm"] == 0.2


def test_both_models_have_the_same_settings_but_for_weights_and_decoder():
    llada, dream = (read(model) for model in MODELS)
    for settings in (llada, dream):
        settings["model"].pop("decoding")
        settings["model"]["policy"]["init_args"].pop("path")
    assert llada == dream


# recipes/run_TASK_llada.sh of https://github.com/ML-GSAI/ESPO, commit b5f2dac
PUBLISHED = {  # beta, eps, lr, weight decay, G, completions per update, steps, clip-norm, LoRA
    "sudoku": (1e-2, 0.2, 3e-6, 0.01, 6, 96, 128, 0.2, True),
    "countdown": (3e-3, 0.0, 3e-6, 0.01, 6, 96, 128, 0.2, True),
    "gsm8k": (1e-3, 0.2, 3e-6, 0.01, 6, 96, 256, 0.2, True),
    "math": (1e-3, 0.2, 3e-6, 0.01, 16, 256, 256, 0.2, True),
    "code": (1e-2, 0.2, 1e-6, 0.1, 10, 160, 256, 0.8, False),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", MODELS)
def test_the_settings_are_the_published_ones(model, task):
    whole = read(model, f"paper_{task}")
    settings, optimizer = whole["model"], whole["model"]["optimizer"]["init_args"]
    completions = whole["data"]["batch_size"] * settings["group_size"]
    assert (
        settings["objective"]["beta"],
        settings["objective"]["clip_range"],
        optimizer["lr"],
        optimizer["weight_decay"],
        settings["group_size"],
        completions,
        settings["decoding"]["steps"],
        settings["max_grad_norm"],
        settings["policy"]["init_args"]["lora"] is not None,
    ) == PUBLISHED[task]
    assert (settings["updates"], settings["likelihood"]["init_args"]["draws"]) == (8, 2)
    assert optimizer["betas"] == [0.9, 0.99]
    assert settings["decoding"]["length"] == 256
    assert settings["warmup"] == pytest.approx(8 * whole["data"]["batches"] / 1000, abs=0.7)  # 0.1 % of the updates


def test_the_demo_is_the_published_one():
    whole = read("dream", "paper_countdown", "paper_demo")
    settings = whole["model"]
    assert whole["data"]["batch_size"] * settings["group_size"] == 12
    objective = settings["objective"]
    assert (objective["beta"], objective["clip_range"], settings["decoding"]["steps"]) == (1e-3, 4e-4, 64)
    assert settings["likelihood"]["init_args"] == {"draws": 1, "coupled": True}


def test_every_file_names_its_command_and_that_it_is_untried():
    for name in PARTS:
        head = (EXPERIMENTS / f"{name}.yaml").read_text().partition("\nmodel:")[0]
        assert f"--config experiments/{name}.yaml" in head, name
        assert "on a GPU" in head or "on GPUs" in head, name
