"""Readers of arguments: what they read, and what they refuse."""

from __future__ import annotations

import argparse

import pytest

from openmsa.cli.arguments import layer_list, shares, subset_of, whole_number, whole_numbers


@pytest.mark.parametrize(
    ("read", "text", "expected"),
    [
        (whole_number(1), "7", 7),
        (whole_number(0), "0", 0),
        (whole_numbers, "512,64, 64", (64, 512)),
        (shares, "1,0,0.5", (0.0, 0.5, 1.0)),
        (layer_list, "all", None),
        (layer_list, "auto", "auto"),
        (layer_list, "0,2-5", (0, 2, 3, 4, 5)),
        (layer_list, "3-3,1", (1, 3)),
        (subset_of("a", "b", "c"), "c,a", ("a", "c")),
    ],
)
def test_what_is_read(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (whole_number(1), "0"),
        (whole_number(1), "1.5"),
        (whole_number(0), "many"),
        (whole_numbers, "4,,5"),
        (whole_numbers, "4,-5"),
        (shares, "0.5,2"),
        (shares, "nan"),
        (shares, "half"),
        (layer_list, "1,5-2"),
        (layer_list, "1,x"),
        (layer_list, ""),
        (layer_list, "-1"),
        (subset_of("a", "b"), "a,z"),
    ],
)
def test_what_is_refused(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=r".+"):
        read(text)
