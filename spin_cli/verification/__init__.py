"""Checking that an artifact is still what was written."""

from spin_cli.verification.recomputing import Check
from spin_cli.verification.stage import TOLERANCE, check_sum, verify

__all__ = ["TOLERANCE", "Check", "check_sum", "verify"]
