"""``python -m espo_lightning.sft``: supervised training on a task's answers, with the likelihoods of RL."""

from espo_lightning.training.cli import TrainingCLI
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.program import program
from espo_lightning.training.signals import Signals
from espo_lightning.training.supervised import SFTModule
from espo_lightning.training.trainer_flags import REFUSED, UNVALIDATED


class SFTCLI(TrainingCLI):
    """There is no validation."""

    refused = REFUSED | UNVALIDATED


def make(argv: list[str] | None, signals: Signals) -> SFTCLI:
    return SFTCLI(
        SFTModule,
        PromptDataModule,
        argv,
        signals,
        command="espo_lightning.sft",
        defaults={
            "model.policy": {"class_path": "espo_lightning.new_policy"},
            "model.optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3}},
            "data.batch_size": 128,
            "data.batches": 2000,
            "checkpoint_every": 500,
        },
        trainer_defaults={"limit_val_batches": 0},
    )


def work(cli: SFTCLI) -> None:
    cli.announce(f"{cli.datamodule.batches} batches of {cli.datamodule.batch_size} answers")
    cli.fit()
    cli.show("", f"{cli.checkpoint.policy_folder}  the policy", *cli.ending()[1:])


def main(argv: list[str] | None = None) -> None:
    program(lambda signals: make(argv, signals), work)


if __name__ == "__main__":
    main()
