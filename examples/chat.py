"""Ask a network with OpenAI's own client.

plait serve &
python examples/chat.py "Why is the sky blue?"
"""

import os
import sys

from openai import OpenAI, OpenAIError

question = sys.argv[1] if len(sys.argv) > 1 else "Hello!"
client = OpenAI(
    base_url=os.environ.get("PLAIT_URL", "http://127.0.0.1:4700/v1"),
    api_key=os.environ.get("PLAIT_KEY", "none"),
)
try:
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": question}],
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"provider": {"sort": "price"}},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\n{chunk.usage.completion_tokens} tokens, {chunk.usage.cost} microcredits")
except OpenAIError as error:
    sys.exit(f"{client.base_url}: {error}")
