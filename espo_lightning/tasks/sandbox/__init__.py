"""Model-written Python, run confined: `run` is the trainer's side; `inner`, `isolation` and `peer` run in the sandbox.

`espo_lightning.tasks.sandbox.run` states the threat model.
"""
