"""One page about a run: what was done, how well it does, and where in the model the task lies.

A layer above the stages: it reads what all of them wrote and draws on the code that wrote it.
"""

from spin_cli.reports.stage import report

__all__ = ["report"]
