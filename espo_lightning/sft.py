"""``python -m espo_lightning.sft``: supervised training on a task's answers, with the likelihoods of RL."""

from espo_lightning.training.command_line import TrainingCLI
from espo_lightning.training.data import PromptDataModule
from espo_lightning.training.supervised import SFTModule


def main(argv: list[str] | None = None) -> None:
    cli = TrainingCLI(
        SFTModule,
        PromptDataModule,
        argv,
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
    cli.fit()
    cli.finish([f"policy      {cli.checkpoint.policy_folder}"])


if __name__ == "__main__":
    main()
