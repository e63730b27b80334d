"""Checks of settings: what is taken, and what the message says."""

import math
import re
from typing import Any

import pytest

from timm_selfdistill.checks import (
    Arguments,
    Count,
    Number,
    Positive,
    Probability,
    Temperature,
    check,
    is_integer,
    is_number,
)


@pytest.mark.parametrize(
    ("kind", "value"), [(Number, -1), (Positive, 0.5), (Probability, 0), (Temperature, 1e3), (Count, 10**400)]
)
def test_a_value_of_the_type_is_returned(kind: Any, value: Any) -> None:
    assert check("x", value, kind) == value


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (Number, "1", "x is '1'; allowed is a finite number."),
        (Number, True, "x is True; allowed is a finite number."),
        (Positive, 0, "x is 0; allowed is a finite number above 0."),
        (Probability, math.nan, "x is nan; allowed is a finite number, from 0 to 1."),
        (Temperature, math.inf, "x is inf; allowed is a finite number, from 1e-06 to 1000."),
        (Count, 1.0, "x is 1.0; allowed is a whole number, 1 or more."),
        (Arguments, {"a": [math.inf]}, "x is {'a': [inf]}; allowed is a mapping, with finite numbers only."),
        (bool, 1, "x is 1; allowed is a valid boolean."),
    ],
)
def test_any_other_value_is_named_beside_what_is_allowed(kind: Any, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check("x", value, kind)


@pytest.mark.parametrize(
    ("value", "number", "integer"),
    [
        (1, True, True),
        (1.5, True, False),
        (10**400, True, True),
        (True, False, False),
        (math.nan, False, False),
        (math.inf, False, False),
        ("1", False, False),
        (None, False, False),
    ],
)
def test_numbers_are_finite_and_no_booleans(value: Any, number: bool, integer: bool) -> None:
    assert (is_number(value), is_integer(value)) == (number, integer)
