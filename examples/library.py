"""Ask a network from Python, without a gateway, and keep the evidence.

plait testnet up --model smollm2-135m --detach
python examples/library.py smollm2-135m "Why is the sky blue?"
plait verify answer.json
"""

import sys
from pathlib import Path

from plait import Client
from plait.client import Options
from plait.errors import PlaitError

if len(sys.argv) != 3:
    sys.exit("usage: python examples/library.py MODEL QUESTION")
model, question = sys.argv[1:]
try:
    with Client() as client:
        answer = client.generate(model, question, Options(max_tokens=32, bundle=True))
except PlaitError as error:
    sys.exit(f"{error}\ntry: {error.remedy}" if error.remedy else str(error))
print(answer.text)
for step in answer.route:
    print(f"layers {step.span} at {step.peer}", file=sys.stderr)
print(f"{answer.cost_microcredits} microcredits", file=sys.stderr)
Path("answer.json").write_bytes(answer.bundle or b"")
