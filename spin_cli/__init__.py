"""spin: strong text classifiers out of a frozen language model's internal neurons."""

__version__ = "0.1.0"
