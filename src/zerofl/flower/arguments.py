"""What `uplink_mod` and `SparseUplink` are given, looked at; what is wrong with it the caller says."""

from collections.abc import Iterable
from numbers import Real


def is_one_of(value: object, choices: Iterable[str]) -> bool:
    """Whether an argument is one of these words."""
    return isinstance(value, str) and value in choices


def is_number(value: object) -> bool:
    """Whether an argument is a number, and not True or False."""
    return isinstance(value, Real) and not isinstance(value, bool)
