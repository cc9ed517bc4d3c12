"""Fill in a form: an answer that follows a JSON schema, whatever the model would rather say.

Needs nothing but Python.

    plait serve &
    python examples/extract.py "Ada Lovelace was 36 years old."
"""

import json
import os
import sys
import urllib.error
import urllib.request

URL = os.environ.get("PLAIT_URL", "http://127.0.0.1:4700/v1")
KEY = os.environ.get("PLAIT_KEY", "none")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def call(path: str, body: object = None) -> dict:
    """Ask the gateway."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    try:
        with urllib.request.urlopen(urllib.request.Request(URL + path, data, headers)) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        sys.exit(json.load(error)["error"]["message"])
    except urllib.error.URLError as error:
        sys.exit(f"no gateway at {URL}: {error.reason}")


text = sys.argv[1] if len(sys.argv) > 1 else "Ada Lovelace was 36 years old."
answer = call(
    "/chat/completions",
    {
        "model": call("/models")["data"][0]["id"],
        "messages": [{"role": "user", "content": f"Who is this, and how old? {text}"}],
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
        "temperature": 0,
    },
)
print(json.dumps(json.loads(answer["choices"][0]["message"]["content"])))
