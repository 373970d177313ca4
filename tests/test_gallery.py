"""docs/tasks.md shows what the tasks do now."""

import re
import tempfile
from pathlib import Path

from espo_lightning import tasks
from espo_lightning.lab.task_gallery import entries, page

ROOT = Path(__file__).parents[1]


def test_the_gallery_is_current():
    """But for reasoning-gym's tasks, which test_reasoning_gym.py compares where the package is installed."""
    text = (ROOT / "docs" / "tasks.md").read_text()
    without = re.sub(r"\n## `ReasoningGym.*?(?=\n## )", "", text, flags=re.DOTALL)
    assert without == page(gym=False), "python -m espo_lightning.lab.task_gallery > docs/tasks.md"
    for link in re.findall(r"\]\(([a-z]+\.md)\)", text):
        assert (ROOT / "docs" / link).exists()


def test_the_gallery_has_every_task_with_a_right_and_a_wrong_answer():
    with tempfile.TemporaryDirectory() as folder:
        for entry in entries(Path(folder)):
            verify = entry.task.problem("train", 0, 0).verify
            right, wrong = verify(entry.right), verify(entry.wrong)
            assert right.get("exact", 1.0) == 1
            assert wrong.get("exact", 0.0) == 0
            assert wrong["reward"] < right["reward"]
        kinds = {type(entry.task).__name__ for entry in entries(Path(folder))}
    every = {
        name
        for name in tasks.__all__
        if isinstance(found := getattr(tasks, name), type) and issubclass(found, tasks.Task)
    }
    assert kinds == every - {"Task", "ReasoningGym"}
