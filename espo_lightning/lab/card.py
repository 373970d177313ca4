"""A model card for what a run made: what it is, from what, by which method and settings, and what was measured.

Everything comes from files: ``summary.json`` and ``config.yaml`` of the run folder, and results of
`espo_lightning.evaluate`. The numbers stand in the text with their 95 % intervals, and as ``model-index`` in the
metadata, where the Hugging Face hub reads them.
"""

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import yaml

from espo_lightning.training.report import told

PAPER = "2512.03759"
SHOWN = {  # of the settings: what the table calls each, and where it stands
    "prompts per rollout": "data.batch_size",
    "completions per prompt (G)": "model.group_size",
    "updates per rollout (mu)": "model.updates",
    "rollouts or batches": "data.batches",
    "advantage": "model.advantage",
    "objective": "model.objective",
    "likelihood": "model.likelihood",
    "decoding": "model.decoding",
    "optimizer": "model.optimizer",
    "precision": "trainer.precision",
}
DATASETS = {"GSM8K": "openai/gsm8k", "MATH": "HuggingFaceH4/MATH-500", "MBPP": "google-research-datasets/mbpp"}
DATASETS |= {"HumanEval": "openai/openai_humaneval"}
HUB_ID = r"[A-Za-z0-9][\w.-]*/[\w.-]+"


class Made(NamedTuple):
    """What is known of a run. settings: its config. summary: its summary.json, empty where there is none.

    evaluations: results of `espo_lightning.evaluate` of the policy that it left.
    """

    settings: dict
    summary: dict
    evaluations: list[dict]
    adapters: bool


def read_run(run: Path, evaluations: list[str]) -> Made:
    """Raises ValueError if the folder is not that of a finished run, or a file is no evaluation."""
    if not (run / "config.yaml").is_file() or not (run / "policy").is_dir():
        raise ValueError(f"run {run} is no folder of a finished run: it must hold config.yaml and policy/")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    summary = _read(run / "summary.json") if (run / "summary.json").is_file() else {}
    results = [_read(Path(path)) for path in evaluations]
    for path, result in zip(evaluations, results):
        if not {"ci95", "n", "settings"} <= result.keys():
            raise ValueError(f"{path} is no result of espo_lightning.evaluate: it lacks ci95, n or settings")
    return Made(settings, summary, results, adapters=(run / "policy" / "adapter_config.json").is_file())


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}") from error


def base_of(settings: dict) -> str:
    """What the policy was made from: a path, hub id or ``bundled:NAME``; "" if it began with random weights."""
    return str((settings["model"]["policy"].get("init_args") or {}).get("path", ""))


def card(made: Made, name: str, licence: str, notes: str = "", where: str | None = None) -> str:
    """The README.md of a policy on the hub.

    Args:
        name: what the model is called.
        licence: the hub's name of one, such as apache-2.0.
        notes: what a reader should know beyond the files, as Markdown.
        where: what `load_policy` opens it by, if that is known.

    Returns:
        Metadata between two lines of dashes, then Markdown.
    """
    from huggingface_hub import ModelCardData

    base = base_of(made.settings)
    tags = ["espo_lightning", "diffusion-language-model", *(["espo", "reinforcement-learning"] if made.summary else [])]
    data = ModelCardData(
        base_model=base if re.fullmatch(HUB_ID, base) and not Path(base).exists() else None,
        library_name="peft" if made.adapters else "transformers",
        license=licence,
        model_name=name,
        pipeline_tag="text-generation",
        tags=[*tags, f"arxiv:{PAPER}"],
        eval_results=results_of(made) or None,
    )
    parts = [f"# {name}", _what(made, base), _measured(made), _how(made, where), notes, _settings(made)]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def results_of(made: Made) -> list:
    """The hub's ``model-index`` entries: every metric after training, and of every evaluation, with its interval."""
    found = [(_class(e["settings"]["task"]), e, f"{e['split']} split") for e in made.evaluations]
    if made.summary.get("after"):
        found.insert(0, (_class(made.settings["data"]["task"]), made.summary["after"], "greedy, held out"))
    return [_result(*one, metric) for one in found for metric in told(one[1])]


def _result(task: str, numbers: dict, how: str, metric: str):
    from huggingface_hub import EvalResult

    low, high = numbers["ci95"][metric]
    return EvalResult(
        task_type="text-generation",
        dataset_type=DATASETS.get(task, f"espo_lightning/{task}"),
        dataset_name=f"{task} of espo_lightning, {how}",
        dataset_split=numbers.get("split", "test"),
        metric_type="accuracy" if metric == "exact" else metric,
        metric_name=metric,
        metric_value=round(numbers[metric], 4),
        metric_args={"n": numbers["n"], "ci95": [round(low, 4), round(high, 4)]},
    )


def _class(spec: dict | str) -> str:
    return str(spec["class_path"] if isinstance(spec, dict) else spec).rsplit(".", 1)[-1]


def _what(made: Made, base: str) -> str:
    of = f"`{base}`" if base else "random weights"
    method = _class(made.settings["model"].get("objective", "")) if made.summary else ""
    how = f"by reinforcement learning (`{method}`, arXiv:{PAPER})" if made.summary else "by supervised training"
    library = made.summary.get("versions", {}).get("espo-lightning")
    by = f" {library}" if library else f" (this card was written by version {version('espo-lightning')})"
    kind = "LoRA adapters" if made.adapters else "A language model"
    task = _class(made.settings["data"]["task"])
    return (
        f"{kind} made from {of} {how} on the task `{task}` with espo_lightning{by}, seed {made.settings['seed']}. "
        "One seed is one draw: another one gives other numbers."
    )


def _measured(made: Made) -> str:
    summary, parts = made.summary, []
    if summary.get("after"):
        before, after, chance = summary["before"] or {}, summary["after"], summary["chance"]
        rows = ["| metric | before | after | chance |", "|---|---|---|---|"]
        for key in told(after):
            known = f"{chance[key]:.3f}" if key in chance else ""
            rows.append(f"| {key} | {_cell(before, key)} | {_cell(after, key)} | {known} |")
        what = f"Greedy decoding of {after['n']} held-out problems, with 95 % intervals:"
        parts.append("\n".join([what, "", *rows]))
    for one in made.evaluations:
        task, shown = _class(one["settings"]["task"]), ", ".join(f"{key} {_cell(one, key)}" for key in told(one))
        parts.append(f"`espo_lightning.evaluate` on {task}, {one['split']} split, n = {one['n']}: {shown}.")
    return "\n\n".join(["## Results", *parts]) if parts else ""


def _cell(numbers: dict, key: str) -> str:
    if key not in numbers.get("ci95", {}):
        return ""
    low, high = numbers["ci95"][key]
    return f"{numbers[key]:.3f} [{low:.3f}, {high:.3f}]"


def _how(made: Made, where: str | None) -> str:
    opened = f'load_policy("{where or "PATH OF THIS FOLDER"}")'
    lines = ["## Use", "", "```python", "from espo_lightning import load_policy", "", f"policy = {opened}", "```"]
    if made.adapters:
        lines += ["", "The folder holds adapters alone; they are put on the base that `adapter_config.json` names."]
    return "\n".join(lines)


def _settings(made: Made) -> str:
    lines = ["## Settings", "", "| what | value |", "|---|---|"]
    for label, path in SHOWN.items():
        value = made.settings
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            lines.append(f"| {label} | {_short(value)} |")
    everything = yaml.safe_dump(made.settings, sort_keys=False)
    folded = ["<details><summary>All settings</summary>", "", f"```yaml\n{everything}```", "", "</details>"]
    return "\n".join([*lines, "", *folded])


def _short(value: object) -> str:
    """A setting in a cell of a table: a class with its arguments, or one value."""
    if not isinstance(value, dict):
        return f"`{str(value).removeprefix('espo_lightning.')}`"
    name, given = (f"`{_class(value)}` ", value.get("init_args") or {}) if "class_path" in value else ("", value)
    plain = {key: v for key, v in given.items() if v is not None and not isinstance(v, dict)}
    return name + ", ".join(f"{key} {str(v).removeprefix('espo_lightning.')}" for key, v in plain.items())
