"""openai-python, unchanged, against BASE_URL."""

import asyncio
import json
import os

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, Field

MODEL = os.environ["PLAIT_MODEL"]
MESSAGES = [{"role": "user", "content": "Is it 21 degrees?"}]
PARAMETERS = {
    "type": "object",
    # Bounded, so that any model ends within the limit of tokens.
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "degrees": {"type": "integer", "minimum": -99, "maximum": 99},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]


class Weather(BaseModel):
    city: str = Field(max_length=12)
    degrees: int = Field(ge=-99, le=99)


@pytest.fixture(scope="module")
def client():
    with OpenAI(base_url=os.environ["BASE_URL"], api_key="none", max_retries=0) as opened:
        yield opened


def test_models(client):
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("none/such")


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=20, n=2)
    assert len(answer.choices) == 2
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0
    assert answer.usage.cost >= 0


def test_chat_stream(client):
    stream = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.completion_tokens > 0


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=3, max_tokens=5
    )
    assert all(len(t.top_logprobs) == 3 for t in answer.choices[0].logprobs.content)


def test_chat_parameters(client):
    client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        temperature=0.5,
        top_p=0.9,
        seed=3,
        stop=["\n\n"],
        presence_penalty=0.5,
        frequency_penalty=0.5,
        logit_bias={"5": -100},
        max_completion_tokens=10,
        user="me",
        metadata={"a": "b"},
    )


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tools(client, choice):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice=choice, max_tokens=200
    )
    call = answer.choices[0].message.tool_calls[0]
    assert isinstance(json.loads(call.function.arguments)["degrees"], int)
    assert answer.choices[0].finish_reason == "tool_calls"
    again = client.chat.completions.create(
        model=MODEL,
        messages=[
            *MESSAGES,
            answer.choices[0].message,
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ],
        tools=TOOLS,
        max_tokens=50,
    )
    assert again.choices[0].finish_reason


def test_tools_stream(client):
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=200
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.name == "weather"


def test_json_schema(client):
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=200
    )
    assert isinstance(answer.choices[0].message.parsed.degrees, int)


def test_what_the_limit_cuts_says_so(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model=MODEL, messages=MESSAGES, response_format=Weather, max_tokens=2
        )
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required", max_tokens=2
    )
    assert answer.choices[0].finish_reason == "length"


def test_json_object(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, response_format={"type": "json_object"}, max_tokens=300
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_completions(client):
    answer = client.completions.create(model=MODEL, prompt=["one", "two"], echo=True, max_tokens=5)
    assert [choice.text[:3] for choice in answer.choices] == ["one", "two"]
    logprobs = (
        client.completions.create(model=MODEL, prompt=[40, 41], logprobs=2, max_tokens=3)
        .choices[0]
        .logprobs
    )
    assert len(logprobs.token_logprobs) == len(logprobs.tokens) > 0


def test_scores_of_a_prompt(client):
    answer = client.completions.create(
        model=MODEL, prompt="The sea is blue.", echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    known = answer.choices[0].logprobs
    assert known.token_logprobs[0] is None
    assert all(value <= 0 for value in known.token_logprobs[1:])
    assert "".join(known.tokens[:-1]) == "The sea is blue."
    assert known.text_offset[:2] == [0, len(known.tokens[0])]


def test_responses(client):
    answer = client.responses.create(model=MODEL, input="Why?", instructions="Be brief.")
    assert answer.output_text
    assert answer.usage.output_tokens > 0


def test_responses_stream(client):
    with client.responses.stream(model=MODEL, input="Why?") as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    # An answer that the limit cuts is incomplete, and the SDK's helper wants complete ones.
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text


def test_responses_tools(client):
    tools = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}]
    answer = client.responses.create(
        model=MODEL, input="Is it 21 degrees?", tools=tools, tool_choice="required"
    )
    call = answer.output[0]
    assert call.type == "function_call"
    with client.responses.stream(
        model=MODEL, input="Is it 21 degrees?", tools=tools, tool_choice="required"
    ) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output[0].name == "weather"
    back = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    client.responses.create(
        model=MODEL,
        input=[{"role": "user", "content": "Is it 21 degrees?"}, call, back],
        tools=tools,
    )


def test_responses_parse(client):
    answer = client.responses.parse(model=MODEL, input="Is it 21?", text_format=Weather)
    assert isinstance(answer.output_parsed.degrees, int)


def test_embeddings(client):
    answer = client.embeddings.create(model=MODEL, input=["a", "b"])
    assert [item.index for item in answer.data] == [0, 1]
    numbers = client.embeddings.create(model=MODEL, input="b", encoding_format="float")
    for one, other in zip(answer.data[1].embedding, numbers.data[0].embedding, strict=True):
        assert one == pytest.approx(other, abs=1e-6)


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="none", messages=MESSAGES)


def test_async_and_leaving_a_stream():
    async def run():
        async with AsyncOpenAI(base_url=os.environ["BASE_URL"], api_key="none") as opened:
            stream = await opened.chat.completions.create(
                model=MODEL, messages=MESSAGES, stream=True
            )
            async for _ in stream:
                break
            await stream.close()
            answers = [
                opened.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=3)
                for _ in range(8)
            ]
            assert all(answer.choices for answer in await asyncio.gather(*answers))

    asyncio.run(run())
