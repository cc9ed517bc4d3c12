"""The error tree is documented whole."""

from pathlib import Path

import pytest

from plait import errors
from plait.cli.output import flag

DOCUMENT = (Path(__file__).parents[2] / "docs" / "exit-codes.md").read_text()
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, errors.PlaitError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_exit_code_is_documented(kind: type[errors.PlaitError]) -> None:
    assert f"| {kind.exit_code} |" in DOCUMENT


def test_codes_are_words_of_their_own() -> None:
    assert len({kind.code for kind in CLASSES}) == len(CLASSES)


def test_a_remedy_names_options_as_its_interface_does() -> None:
    remedy = "allow more peers: `only` or `max_price`"
    assert errors.reworded(remedy, flag) == "allow more peers: --only or --max-price"
    assert errors.reworded("`explain`", flag) == "plait route MODEL --explain"
    assert errors.reworded("quoted `max-price`, untouched", flag) == "quoted `max-price`, untouched"
