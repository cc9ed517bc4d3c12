"""anthropic's SDK, unchanged, against BASE_URL."""

import os

import anthropic
import pytest

MODEL = os.environ["PLAIT_MODEL"]
MESSAGES = [{"role": "user", "content": "Is it 21 degrees?"}]
TOOLS = [
    {
        "name": "weather",
        "description": "Tell the weather.",
        "input_schema": {
            "type": "object",
            # Bounded, so that any model ends within the limit of tokens.
            "properties": {"degrees": {"type": "integer", "minimum": -99, "maximum": 99}},
            "required": ["degrees"],
            "additionalProperties": False,
        },
    }
]


@pytest.fixture(scope="module")
def client():
    url = os.environ["BASE_URL"].removesuffix("/v1")
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as opened:
        yield opened


def test_message(client):
    answer = client.messages.create(
        model=MODEL, max_tokens=30, messages=MESSAGES, system="Be brief."
    )
    assert answer.content[0].text
    assert answer.usage.output_tokens > 0


def test_stream(client):
    with client.messages.stream(model=MODEL, max_tokens=30, messages=MESSAGES) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == final.content[0].text
    assert final.stop_reason in ("end_turn", "max_tokens")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools(client, choice):
    answer = client.messages.create(
        model=MODEL, max_tokens=200, messages=MESSAGES, tools=TOOLS, tool_choice=choice
    )
    use = answer.content[-1]
    assert answer.stop_reason == "tool_use"
    assert isinstance(use.input["degrees"], int)
    again = client.messages.create(
        model=MODEL,
        max_tokens=50,
        tools=TOOLS,
        messages=[
            *MESSAGES,
            {"role": "assistant", "content": answer.content},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}],
            },
        ],
    )
    assert again.stop_reason


def test_tools_stream(client):
    with client.messages.stream(
        model=MODEL, max_tokens=200, messages=MESSAGES, tools=TOOLS, tool_choice={"type": "any"}
    ) as stream:
        final = stream.get_final_message()
    assert isinstance(final.content[-1].input["degrees"], int)


def test_count_tokens(client):
    assert client.messages.count_tokens(model=MODEL, messages=MESSAGES).input_tokens > 0


def test_errors(client):
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="none", max_tokens=3, messages=MESSAGES)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=MODEL, max_tokens=9_000, messages=MESSAGES)
