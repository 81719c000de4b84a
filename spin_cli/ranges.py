"""Which numbers an option may be: said once, at the field of a configuration, and checked here.

The command line, ``spin.toml`` and the stages' own functions all ask `Range.check`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

from spin_cli.errors import UsageError

RANGE = "range"
"""Mark of a field that is a number, or a list of numbers."""
OPTION = "option"


@dataclass(frozen=True)
class Range:
    """The numbers from *least* or *above* to *most* or *below*; never NaN, never infinite."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, name: str, value: Any) -> None:
        """Raise `UsageError` unless *value* (None, a number, or some) is in the range.

        Parameters
        ----------
        name : what the value is called in the error, as ``--seed`` or ``seed =``
        """
        many = isinstance(value, (tuple, list))
        if many and not value:
            raise UsageError(f"{name} {list(value)}: expected at least one number")
        for number in value if many else (value,):
            if number is not None and not self._holds(number):
                shown = list(value) if many else value
                raise UsageError(f"{name} {shown}: expected {'numbers ' if many else ''}{self}")

    def _holds(self, number: float) -> bool:
        return (
            (isinstance(number, int) or math.isfinite(number))
            and (self.least is None or number >= self.least)
            and (self.most is None or number <= self.most)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        low = f"above {self.above}" if self.least is None else f"from {self.least}"
        if self.below is not None:
            return f"{low} to below {self.below}"
        if self.most is not None:
            return f"{low} {'to' if self.above is None else 'and up to'} {self.most}"
        return low if self.least is None else f"at least {self.least}"


COUNT = Range(0)
POSITIVE = Range(1)
SHARE = Range(0, 1)
ETA = Range(above=0, most=1)
SEED = Range(0, 2**32 - 1)
"""scikit-learn takes no larger one, and NumPy none below."""


def ranged(default: Any, span: Range, option: str = "", **marks: bool) -> Any:
    """A field of a configuration, with its default and the numbers that it may be.

    Parameters
    ----------
    option : what it is called on the command line, where that is not made of the field's name
    marks : other marks of the field
    """
    return field(default=default, metadata={RANGE: span, OPTION: option, **marks})


def range_of(config: type[Any], name: str) -> tuple[Range, str]:
    """The numbers that a field of a configuration may be, and the option that gives it."""
    marks = config.__dataclass_fields__[name].metadata
    return marks[RANGE], marks[OPTION] or flag_of(name)


def flag_of(name: str) -> str:
    """An option as it is typed."""
    return f"--{name.replace('_', '-')}"


def check_ranges(config: Any, where: str = "") -> None:
    """Raise `UsageError` for the first field of *config* that is out of its range.

    Parameters
    ----------
    where : of a file of options, stands before the field's name; else the option is named
    """
    for each in fields(config):
        if RANGE in each.metadata:
            span, option = range_of(type(config), each.name)
            span.check(f"{where}{each.name} =" if where else option, getattr(config, each.name))
