"""A logger of Lightning for trackio, which imitates W&B and keeps everything on this machine."""

from argparse import Namespace
from importlib import import_module
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class TrackioLogger(Logger):
    """Metrics, settings and sample tables in trackio: ``--trainer.logger=TrackioLogger``.

    Args:
        project: whose dashboard shows the run.
        run: its name; trackio invents one if there is none.

    Raises:
        ModuleNotFoundError: trackio is not installed.
    """

    def __init__(self, project: str = "espo_lightning", run: str | None = None):
        super().__init__()
        try:
            self.trackio = import_module("trackio")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("trainer.logger=TrackioLogger needs trackio: pip install trackio") from error
        self.project, self.run, self.settings, self._run = project, run, {}, None

    @property
    def name(self) -> str:
        return self.project

    @property
    def version(self) -> str | None:
        return self.run

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The run of trackio, begun when something is first logged; trackio ends it with the program."""
        if self._run is None:
            self._run = self.trackio.init(project=self.project, name=self.run, config=self.settings)
        return self._run

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """For the run that is about to begin: trackio sends settings with the first metrics."""
        self.settings = dict(params) if isinstance(params, dict) else vars(params)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.experiment.log(dict(metrics), step=step)

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], data: list[list[Any]], step: int | None = None) -> None:
        """As W&B's logger does."""
        self.experiment.log({key: self.trackio.Table(columns=columns, data=data)}, step=step)
