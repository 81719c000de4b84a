"""Figures that the project stands by; see README.md and RESULTS.md."""
