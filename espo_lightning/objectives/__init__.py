"""What is maximised: advantages, ratios, KL estimators, and the losses made of them.

Pure functions of tensors and small frozen dataclasses, each beside its equation; no model, no trainer.
"""
