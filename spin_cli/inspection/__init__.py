"""Looking at artifacts and at files of others: what they are, from what, and what is in them.

Nothing that is looked at is believed: sizes are checked before they are read, links are shown and
not followed, and what cannot be read is said to be so.
"""

from spin_cli.inspection.folders import describe
from spin_cli.inspection.tree import readable

__all__ = ["describe", "readable"]
