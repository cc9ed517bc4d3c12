"""Tools: told, forced, and read again however the answer is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plait.compute.grammar import check_grammar
from plait.gateway.tools import CallReader, Tool, ToolCall, Tools, chosen, introduced

WEATHER = Tool("weather", "Tell the weather.", {"type": "object", "properties": {"city": {}}})
CLOCK = Tool("clock", "Tell the time.", {"type": "object", "properties": {}})
OFFERED = Tools((WEATHER, CLOCK))
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def read(reader: CallReader, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    out, calls = "", list[ToolCall]()
    for piece in pieces:
        text, found = reader.push(piece)
        out, calls = out + text, calls + found
    text, found = reader.flush()
    return out + text, [(call.name, json.loads(call.arguments)) for call in calls + found]


@pytest.mark.parametrize(
    ("answer", "text", "names"),
    [
        ("just text", "just text", []),
        (f"<tool_call>\n{CALL}\n</tool_call>", "", ["weather"]),
        (f"Let me see. <tool_call>{CALL}</tool_call>", "Let me see. ", ["weather"]),
        (f"<tool_call>{CALL}</tool_call><tool_call>{CALL}</tool_call>", "", ["weather"] * 2),
        (f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", ["weather"] * 2),
        (f"<tool_call>{CALL}", "", ["weather"]),  # the end mark was an end token
        ("<tool_call>no JSON</tool_call> x", "<tool_call>no JSON</tool_call> x", []),
        ('<tool_call>{"name": "other"}</tool_call>',) * 2 + ([],),
        ("<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
        ("<tool_call>cut", "<tool_call>cut", []),
        ("a < b <tool", "a < b <tool", []),
        ('<tool_call>{"name": "clock"}</tool_call>', "", ["clock"]),
    ],
)
@given(cuts=st.lists(st.integers(0, 80), max_size=6))
def test_calls_are_taken_out_wherever_the_answer_is_cut(
    answer: str, text: str, names: list[str], cuts: list[int]
) -> None:
    ends = sorted({min(cut, len(answer)) for cut in cuts} | {0, len(answer)})
    pieces = [answer[a:b] for a, b in pairwise(ends)]
    out, calls = read(CallReader(OFFERED), pieces)
    assert (out, [name for name, _ in calls]) == (text, names)


def test_without_tools_nothing_is_held_back() -> None:
    assert CallReader(Tools()).push("<tool_call>") == ("<tool_call>", [])


def test_a_forced_answer_is_a_call() -> None:
    reader = CallReader(chosen([WEATHER, CLOCK], "auto", "weather"))
    out, calls = read(reader, [CALL[:9], CALL[9:]])
    assert (out, calls) == ("", [("weather", {"city": "Oslo"})])
    assert read(CallReader(Tools((CLOCK,), forced=True)), ["not", " one"]) == ("not one", [])


def test_a_call_without_end_does_not_fill_the_memory() -> None:
    reader = CallReader(OFFERED)
    reader.push("<tool_call>")
    assert sum(len(reader.push("x" * 10_000)[0]) for _ in range(10)) > 60_000


@pytest.mark.parametrize(
    ("mode", "name", "count", "forced"),
    [
        ("auto", None, 2, False),
        ("required", None, 2, True),
        ("none", None, 0, False),
        ("auto", "clock", 1, True),
    ],
)
def test_the_choice_among_tools(mode: Any, name: str | None, count: int, forced: bool) -> None:
    tools = chosen([WEATHER, CLOCK], mode, name)
    assert (len(tools.offered), tools.forced) == (count, forced)
    grammar = tools.grammar()
    assert (grammar is not None) == forced
    if grammar is not None:
        assert check_grammar(grammar) == ""


def test_a_choice_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="no tool"):
        chosen([WEATHER], "auto", "clock")
    with pytest.raises(ValueError, match="no tools"):
        chosen([], "required", None)


def test_a_template_without_tools_is_told_in_words() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
        },
        {"role": "tool", "content": "rain"},
    ]
    told = introduced(messages, [WEATHER])
    assert told[0]["content"].startswith("Be kind.\n\n")
    assert json.dumps(WEATHER.described()["function"]) in told[0]["content"]
    assert told[2] == {"role": "assistant", "content": f"<tool_call>\n{CALL}\n</tool_call>"}
    assert told[3] == {"role": "user", "content": "<tool_response>\nrain\n</tool_response>"}
    assert introduced(messages[1:2], [CLOCK])[0]["role"] == "system"
    assert introduced(messages[:2], []) == messages[:2]


def test_a_forced_call_that_is_cut_keeps_what_there_is_of_its_arguments() -> None:
    reader = CallReader(chosen([WEATHER, CLOCK], "required", None))
    assert reader.push('{"name": "weather", "arguments": {"city": "Os') == ("", [])
    text, [call] = reader.flush()
    assert (text, call.name, call.arguments) == ("", "weather", '{"city": "Os')
    assert reader.cut
    for whole in (CALL, '{"name": "wea', "no call"):
        reader = CallReader(chosen([WEATHER], "required", None))
        reader.push(whole)
        reader.flush()
        assert not reader.cut
