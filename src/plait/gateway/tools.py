"""Tools: how a model is told of them, how calls are forced, and how they are read again.

A model whose template knows tools gets them through it. Any other is told in its system
message, in the form that most small models were trained on: a call is a JSON object with
``name`` and ``arguments`` between ``<tool_call>`` and ``</tool_call>``. A forced call is
drawn under a grammar, as that object alone.
"""

import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from plait.types import Grammar

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL_CHARACTERS_MAX = 65_536
_BEGUN = re.compile(r'\{\s*"name":\s*"([^"]+)",\s*"arguments":\s*(.*)', re.DOTALL)

_INTRODUCTION = (
    "You may call functions to help with the user's request. These exist, as JSON, between "
    "<tools> and </tools>:\n<tools>\n{tools}\n</tools>\n\n"
    "To call one, answer with its name and arguments as a JSON object between <tool_call> and "
    "</tool_call>:\n<tool_call>\n"
    '{{"name": "function-name", "arguments": {{"argument": "value"}}}}\n</tool_call>'
)


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; ``parameters`` is the JSON schema of an object."""

    name: str
    description: str
    parameters: dict[str, Any]

    def described(self) -> dict[str, Any]:
        """As templates take it."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": self.parameters}}


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools. ``forced``: the answer is a call, of one of them."""

    offered: tuple[Tool, ...] = ()
    forced: bool = False

    def grammar(self) -> Grammar | None:
        """What a forced call looks like."""
        if not self.forced:
            return None
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.name},
                    "arguments": {"type": "object"} | tool.parameters,
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in self.offered
        ]
        schema = calls[0] if len(calls) == 1 else {"anyOf": calls}
        return Grammar("json_schema", json.dumps(schema))


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model made; ``arguments`` is JSON."""

    id: str
    name: str
    arguments: str


def introduced(messages: Sequence[dict[str, Any]], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template without tools: the system message introduces them, calls and
    their results become text."""
    plain = [_as_text(message) for message in messages]
    if not tools:
        return plain
    described = "\n".join(json.dumps(tool.described()["function"]) for tool in tools)
    text = _INTRODUCTION.format(tools=described)
    if plain and plain[0]["role"] == "system":
        first = plain[0] | {"content": f"{plain[0]['content']}\n\n{text}"}
        return [first, *plain[1:]]
    return [{"role": "system", "content": text}, *plain]


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = [_call_text(call["function"]) for call in message.get("tool_calls", ())]
    parts = [message["content"], *calls] if message["content"] else calls
    if not calls:
        return message
    return {"role": message["role"], "content": "\n".join(parts)}


def _call_text(function: dict[str, Any]) -> str:
    return f"{OPEN}\n{json.dumps(function)}\n{CLOSE}"


class CallReader:
    """Takes calls out of an answer as it comes; what is none stays text."""

    def __init__(self, tools: Tools) -> None:
        self._names = frozenset(tool.name for tool in tools.offered)
        self._forced = tools.forced
        self._held = ""
        self._inside = False
        self.calls: list[ToolCall] = []
        self.cut = False
        """Whether the last call is a forced one that the limit of tokens cut."""

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """The text that may go out, and the calls that are now complete."""
        if not self._names:
            return text, []
        self._held += text
        if self._forced:
            return self._too_long(), []
        out, found = "", list[ToolCall]()
        while (at := self._held.find(CLOSE if self._inside else OPEN)) >= 0:
            mark = CLOSE if self._inside else OPEN
            before, self._held = self._held[:at], self._held[at + len(mark) :]
            self._inside = not self._inside
            if self._inside:
                out += before
                continue
            calls = self._read(before)
            out += "" if calls else OPEN + before + CLOSE
            found += calls
        if self._inside:
            out += self._too_long()
        else:
            kept = len(self._held) - _overlap(self._held, OPEN)
            out, self._held = out + self._held[:kept], self._held[kept:]
        self.calls += found
        return out, found

    def _too_long(self) -> str:
        """What is held, if that cannot become a call any more."""
        if len(self._held) <= _CALL_CHARACTERS_MAX:
            return ""
        held, self._held = self._held, ""
        return held

    def flush(self) -> tuple[str, list[ToolCall]]:
        """What was held back, once the answer is over: a call after all, or text."""
        held, self._held = self._held, ""
        found = self._read(held) if self._forced or self._inside else []
        if self._forced and not found and (begun := _BEGUN.match(held)):
            # As OpenAI has it: the arguments end where the answer did.
            self.cut, found = True, [ToolCall(call_id(), begun[1], begun[2])]
        self.calls += found
        if found:
            return "", found
        return (OPEN + held if self._inside else held), []

    def _read(self, text: str) -> list[ToolCall]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return []
        calls = value if isinstance(value, list) else [value]
        read = [self._call(call) for call in calls]
        return [call for call in read if call is not None] if all(read) else []

    def _call(self, value: Any) -> ToolCall | None:
        if not isinstance(value, dict) or value.get("name") not in self._names:
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):
            return ToolCall(call_id(), value["name"], arguments)
        return ToolCall(call_id(), value["name"], json.dumps(arguments, ensure_ascii=False))


def call_id() -> str:
    """A fresh id of a call."""
    return "call_" + secrets.token_hex(12)


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of ``text`` that begins ``mark``."""
    for length in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:length]):
            return length
    return 0


ToolMode = Literal["none", "auto", "required"]


def chosen(offered: Sequence[Tool], mode: ToolMode, name: str | None) -> Tools:
    """Tools after ``tool_choice``; raises ``ValueError`` if it names none of them."""
    if mode == "none":
        return Tools()
    if name is not None:
        named = tuple(tool for tool in offered if tool.name == name)
        if not named:
            raise ValueError(f"there is no tool {name!r}")
        return Tools(named, forced=True)
    if mode == "required" and not offered:
        raise ValueError("a call is required, and there are no tools")
    return Tools(tuple(offered), forced=mode == "required")
