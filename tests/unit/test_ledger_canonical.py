import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plait.ledger.canonical import INTEGER_MAX, JsonValue, decode_canonical, encode_canonical

ASCII = st.text(st.characters(max_codepoint=126), max_size=5)
TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-INTEGER_MAX, INTEGER_MAX) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ASCII, inner, max_size=3),
    max_leaves=8,
)


def test_it_sorts_and_escapes_as_rfc_8785_says() -> None:
    # The string of RFC 8785, section 3.2.2, without the numbers.
    value = {"string": '€$\u000f\nA\'B"\\\\"/', "literals": [None, True, False]}
    expected = '{"literals":[null,true,false],"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}'
    assert encode_canonical(value) == expected.encode()
    assert encode_canonical("\b\t\n\f\r\x7f\u2028") == '"\\b\\t\\n\\f\\r\x7f\u2028"'.encode()


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_what_is_encoded_decodes(value: JsonValue) -> None:
    data = encode_canonical(value)
    assert decode_canonical(data) == value
    assert encode_canonical(decode_canonical(data)) == data


@pytest.mark.parametrize(
    "value", [1.0, float("nan"), INTEGER_MAX + 1, -INTEGER_MAX - 1, {"é": 1}, {1: 1}, b"", "\ud800"]
)
def test_what_is_outside_the_subset_is_not_encoded(value: JsonValue) -> None:
    with pytest.raises(ValueError, match=r"."):
        encode_canonical(value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b" 1",
        b"1\n",
        b"-0",
        b"01",
        b"1.0",
        b"1e3",
        b"NaN",
        b"Infinity",
        b"9007199254740992",
        b"1" * 5000,
        b'{"b":1,"a":1}',
        b'{"a":1,"a":1}',
        b'{"a": 1}',
        b'"\\u0041"',
        b'"\\/"',
        b'"\\ud800"',
        b'"\\u000A"',
        b"\xef\xbb\xbf1",
        b"\xff",
        b'"a',
        b"[" * 100_000,
        b"[" * 40 + b"]" * 40,
        '{"é":1}'.encode(),
    ],
)
def test_any_other_spelling_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_canonical(data)


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_give_a_value_or_a_value_error(data: bytes) -> None:
    try:
        value = decode_canonical(data)
    except ValueError:
        return
    assert encode_canonical(value) == data
