"""What captured runs say. Nothing works here yet: installing it adds no command.

Planned: `compare` (where two runs first disagree, and whether that is more than noise), plots,
reports and `weights.Scope` (which weights are sick). Until then read runs with
`tensortap.open_run`, which gives names, statistics and tensors.
"""

__version__ = "0.1.0"
