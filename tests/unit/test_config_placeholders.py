"""Columns in braces."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distft.config.placeholders import columns, fill


@pytest.mark.parametrize(
    ("template", "named", "filled"),
    [
        ("Translate: {en}", ("en",), "Translate: 1"),
        ("{ en }{de}{en}", ("en", "de"), "121"),
        ("{{en}} {en} }}", ("en",), "{en} 1 }"),
        ("{the text}", ("the text",), "3"),
        ("none", (), "none"),
    ],
)
def test_columns_and_what_stands_in_their_place(template: str, named: tuple[str, ...], filled: str) -> None:
    assert columns(template) == named
    assert fill(template, {"en": "1", "de": "2", "the text": "3"}) == filled


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a {b", "the { at character 3 has no partner"),
        ("a } b", "the } at character 3 has no partner"),
        ("{a {b}}", "the { at character 1 has no partner"),
        ("{ }", "'{ }' at character 1 names no column"),
        ("{a\nb}", "names no column"),
    ],
)
def test_braces_that_do_not_match_are_refused(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        columns(template)


@given(st.text())
def test_text_with_doubled_braces_stays_as_it_is(text: str) -> None:
    assert fill(text.replace("{", "{{").replace("}", "}}"), {}) == text


@given(st.text())
def test_values_are_taken_as_they_are(value: str) -> None:
    assert fill("<{a}>", {"a": value}) == f"<{value}>"
