"""``python -m espo_lightning.push``: write the model card of a run, and upload its policy to the Hugging Face hub.

Without ``--repo`` nothing leaves the machine: the card is written beside the policy, to be read first.
"""

import re
import sys
from pathlib import Path

from espo_lightning.lab.card import HUB_ID, base_of, card, read_run
from espo_lightning.training.command_line import run as start


def push(
    run: str,
    licence: str | None = None,
    name: str | None = None,
    notes: str = "",
    evaluations: list[str] = [],  # noqa: B006, as it is only read
    repo: str | None = None,
    private: bool = True,
) -> Path:
    """Write ``RUN/policy/README.md``, and upload the policy or its adapters if a repository is named.

    Args:
        run: the folder of a finished run of `espo_lightning.fit` or `espo_lightning.sft`.
        licence: of what is published, in the hub's spelling, such as mit; needed unless the base is a bundled policy,
            whose licence is apache-2.0.
        name: what the card calls the model; default the repository's name or that of the run folder.
        notes: what a reader should know beyond the files, as Markdown.
        evaluations: results of `espo_lightning.evaluate` that the card states, too.
        repo: OWNER/NAME on the hub, to which RUN/policy is uploaded with the token that huggingface_hub finds.
        private: who may see a repository that is made now.

    Returns:
        The card.

    Raises:
        ValueError: no finished run, no licence, or the hub refuses.
    """
    if repo is not None and not re.fullmatch(HUB_ID, repo):
        raise ValueError(f"repo must be OWNER/NAME, got {repo!r}")
    folder = Path(run)
    made = read_run(folder, evaluations)
    base = base_of(made.settings)
    if licence is None and not base.startswith("bundled:"):
        raise ValueError(
            f"name the licence, which that of the base {base or '(random weights)'} may bind: --licence=mit"
        )
    called = name or (repo or folder.resolve().name).rsplit("/", 1)[-1]
    path = folder / "policy" / "README.md"
    path.write_text(card(made, called, licence or "apache-2.0", notes, repo), encoding="utf-8")
    if repo is not None:
        upload(folder / "policy", repo, private)
    return path


def upload(folder: Path, repo: str, private: bool) -> None:
    """Make the repository if there is none, and put the folder's files there.

    Raises:
        ValueError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="espo_lightning")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Policy of espo_lightning")
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"the hub did not take {repo}: {reason}. The card is written; try the same again") from error


def main(argv: list[str] | None = None) -> None:
    path = start(push, "espo_lightning.push", argv)
    sys.stdout.write(f"{path}  the card of the policy beside it\n")


if __name__ == "__main__":
    main()
