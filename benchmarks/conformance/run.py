"""Real clients, unchanged and each in its own environment, against the gateway.

    python benchmarks/conformance/run.py [--url URL | --network FILE] [--model MODEL]
        [--cache DIR] [--only NAME] [--seconds N]

Without --url or --network the upstream is the obedient engine (plait.testing.obedient), as
suites test the API, not a model; with --url any gateway; with --network a gateway of its own
over a real network, such as a testnet's: of random weights, or of the --model that it serves.
Environments are made with pip in the cache folder. Prints JSON; but with --url, also puts what it
found into benchmarks/results/conformance.json and writes CONFORMANCE.md from that. --seconds
bounds each suite.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from report import Excuse, Report, merge, table

from plait.testing.testnets import serving

ROOT = Path(__file__).resolve().parents[2]
SUITES = Path(__file__).resolve().parent / "suites"
MODEL = "tiny-random"
SUITE_NAMES = [
    "openai",
    "openai with plait",
    "anthropic",
    "langchain-tests on chat",
    "langchain-tests on responses",
    "llm",
    "curl",
    "schemathesis",
]
_PYTEST = ["pytest", "pytest-asyncio"]


@dataclass(frozen=True)
class Suite:
    """What is installed and run."""

    name: str
    packages: list[str]
    package: str
    what: str
    options: list[str] = field(default_factory=list)
    excuses: tuple[Excuse, ...] = ()
    """For a network with random weights."""
    only: str = ""
    """The class of a suite that takes long, which is run alone."""
    title: str = ""
    """In the table; the package if empty."""

    @property
    def name_shown(self) -> str:
        """What stands in the table, and after --only."""
        return self.title or self.package


_ASYNC = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
_LANGCHAIN_EXCUSES = (
    Excuse(
        r"::test_json_mode$",
        r"OutputParserException|ValidationError",
        "JSON mode promises JSON; members of certain names are the model's to write",
    ),
    Excuse(
        r"::test_structured_output(_async|_optional_param|_pydantic_2_v1)?(\[|$)",
        r"LengthFinishReasonError|ValidationError|assert False",
        "random weights do not end a text: the limit of 256 tokens cuts the form, "
        "and the answer says so",
    ),
    Excuse(
        r"::test_(tool_calling(_async)?|tool_choice|agent_loop|bind_runnables_as_tools"
        r"|unicode_tool_call_integration)(\[|$)",
        r"assert 0 == 1|assert \[\]|assert False|assert \{|tool call, got 0",
        "random weights call no tool unless they must, with arguments of their own, "
        "or ones that the limit of 256 tokens cuts",
    ),
)


def _langchain(api: str, only: str) -> Suite:
    return Suite(
        "langchain_client",
        ["langchain-openai", "langchain-tests", *_PYTEST],
        "langchain-tests",
        f"langchain's standard integration tests, over the API of {api}",
        _ASYNC,
        excuses=_LANGCHAIN_EXCUSES,
        only=only,
        title=f"langchain-tests on {api}",
    )


PYTESTS = [
    Suite(
        "openai_client",
        ["openai", *_PYTEST],
        "openai",
        "chat, streams, tools, json_schema, logprobs, completions, responses, embeddings, errors",
    ),
    Suite("anthropic_client", ["anthropic", *_PYTEST], "anthropic", "messages, streams, tools"),
    _langchain("chat", "TestChat"),
    _langchain("responses", "TestResponses"),
]


def main() -> int:
    """Run, report, return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--network", type=Path, help="serve this network and ask it")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--only", choices=SUITE_NAMES)
    parser.add_argument("--seconds", type=int, default=600, help="of each suite at most")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/plait/conformance")
    options = parser.parse_args()
    reports = []
    with _gateway(options.url, options.network) as gateway:
        url = gateway.url
        os.environ |= {"BASE_URL": url, "PLAIT_MODEL": options.model}
        for name in SUITE_NAMES:
            if options.only in (None, name):
                print(name, file=sys.stderr, flush=True)
                reports.append(_report_of(name, url, options))
    print(json.dumps([asdict(report) for report in reports]))
    if options.url is None:
        upstream = "network" if options.model == MODEL else "words"
        upstream = "engine" if options.network is None else upstream
        found = merge(ROOT / "benchmarks/results/conformance.json", upstream, reports)
        (ROOT / "CONFORMANCE.md").write_text(table(found, SUITE_NAMES))
    return int(any(report.failed for report in reports))


def _report_of(name: str, url: str, options: argparse.Namespace) -> Report:
    by_name = {suite.name_shown: suite for suite in PYTESTS}
    if name in by_name:
        return _run_pytest(by_name[name], options)
    run = {
        "openai with plait": partial(_run_with_openai, network=options.network),
        "llm": _run_llm,
        "curl": _run_curl,
        "schemathesis": partial(_run_schema, network=options.network is not None),
    }[name]
    return run(options.cache, url, options.model, options.seconds)


def _gateway(url: str | None, network: Path | None):
    if url is not None:
        return nullcontext(SimpleNamespace(url=url))
    if network is not None:
        return serving("--no-keys", "--network", str(network))
    return serving(command=(sys.executable, "-m", "plait.testing.obedient"))


def _environment(cache: Path, name: str, packages: list[str]) -> Path:
    folder = (cache / name).absolute()
    if not (folder / ".ready").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q", *packages]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        (folder / ".ready").touch()
    return folder / "bin/python"


def _version(python: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()


def _run_pytest(suite: Suite, options: argparse.Namespace) -> Report:
    python = _environment(options.cache, suite.name, suite.packages)
    report = Report(suite.name_shown, _version(python, suite.package), suite.what)
    command = [str(python), "-m", "pytest", "-q", "-rfEs", "--tb=line", "-c", os.devnull]
    command += ["-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={SUITES}"]
    command += [*suite.options, str(SUITES / f"{suite.name}.py"), "-k", suite.only]
    os.environ["COLUMNS"] = "400"  # or pytest cuts off why a test failed
    output = _bounded(command, options.seconds)
    found = re.search(r"(\d+) passed", output)
    report.passed = int(found[1]) if found else 0
    for line in output.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            where, _, error = line.partition(" - ")
            # The class tells which of the APIs a test was run on.
            test = "::".join(where.split("::")[1:])
            report.fail(test, error, suite.excuses if options.network else ())
        elif skipped := re.match(r"SKIPPED \[(\d+)\] .*?: (.*)", line):
            reason = skipped[2].split(": ")[-1]
            report.skipped[reason] = report.skipped.get(reason, 0) + int(skipped[1])
    if not found:
        report.failed["the suite"] = "it did not end: " + output[-300:]
    return report


def _bounded(command: list[str], seconds: int, cwd: Path | None = None) -> str:
    """Run and give the output, cut off and said so at the time limit."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=cwd, check=False
        )
    except subprocess.TimeoutExpired as error:
        cut = error.stdout.decode(errors="replace") if error.stdout else ""
        return f"{cut}\nended after {seconds} s"
    return done.stdout + done.stderr


_LIBRARY = """
import sys
sys.path.append(sys.argv[1])  # last, so that only what is missing here comes from there
from plait import Client
with Client(sys.argv[2]) as client:
    openai = client.openai()
    model = openai.models.list().data[0].id
    messages = [{"role": "user", "content": "Why?"}]
    answer = openai.chat.completions.create(model=model, messages=messages, max_tokens=4)
    assert answer.usage.completion_tokens == 4
"""


def _run_with_openai(
    cache: Path, url: str, model: str, seconds: int, *, network: Path | None
) -> Report:
    """What of ours uses openai's package: an example, and the client library."""
    python = _environment(cache, "openai_client", ["openai", *_PYTEST])
    what = "examples/chat.py; over a network also Client.openai()"
    report = Report("openai with plait", _version(python, "openai"), what)
    environment = os.environ | {"PLAIT_URL": url}
    runs = {"chat.py": [str(python), str(ROOT / "examples/chat.py"), "Why?"]}
    if network is not None:
        packages = next(python.parents[1].glob("lib/python*/site-packages"))
        library = [sys.executable, "-c", _LIBRARY, str(packages), str(network)]
        runs["Client.openai()"] = library
    for name, command in runs.items():
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=seconds
        )
        report.check(name, done.returncode == 0, done.stderr[-200:])
    return report


def _run_llm(cache: Path, url: str, model: str, seconds: int) -> Report:
    python = _environment(cache, "llm", ["llm"])
    report = Report("llm", _version(python, "llm"), "streamed, whole, system prompt, schema, tools")
    home = cache / "llm-home"
    home.mkdir(exist_ok=True)
    (home / "extra-openai-models.yaml").write_text(
        f"- model_id: plait\n  model_name: {model}\n  api_base: {url}\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )
    environment = os.environ | {"LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}
    # Bounded, so that a model without wit ends within the limit of tokens, too.
    number = {"type": "integer", "minimum": 0, "maximum": 99}
    members = {"properties": {"n": number}, "required": ["n"], "additionalProperties": False}
    schema = json.dumps({"type": "object"} | members)
    runs = {
        "stream": ["-m", "plait", "Why?"],
        "whole": ["-m", "plait", "--no-stream", "Why?"],
        "system": ["-m", "plait", "-s", "Be brief.", "Why?"],
        "schema": ["-m", "plait", "--schema", schema, "Give 21"],
        "tools": ["-m", "plait", "--functions", "def seven() -> int:\n    return 7", "Use seven"],
    }
    for name, arguments in runs.items():
        done = subprocess.run(
            [str(python.parent / "llm"), "prompt", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        ok = done.returncode == 0 and bool(done.stdout.strip())
        if name == "schema" and ok:
            ok = _has_number(done.stdout)
        report.check(name, ok)
    return report


def _has_number(text: str) -> bool:
    try:
        return isinstance(json.loads(text)["n"], int)
    except (ValueError, KeyError, TypeError):
        sys.stderr.write(f"not of the schema: {text!r}\n")
        return False


def _run_curl(cache: Path, url: str, model: str, seconds: int) -> Report:
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout.split()
    report = Report("curl", version[1] if version else "", "whole, streamed, wrong, and cut off")
    chat = {"model": model, "messages": [{"role": "user", "content": "Why?"}]}

    def curl(path: str, body: object, *more: str) -> str:
        command = ["curl", "-sS", "-N", url + path, "-H", "content-type: application/json", *more]
        data = [] if body is None else ["-d", json.dumps(body)]
        return subprocess.run([*command, *data], capture_output=True, text=True, timeout=60).stdout

    report.check("models", model in curl("/models", None))
    report.check("chat", '"chat.completion"' in curl("/chat/completions", chat))
    streamed = curl("/chat/completions", chat | {"stream": True})
    report.check("stream", streamed.endswith("data: [DONE]\n\n"))
    wrong = curl("/chat/completions", chat | {"n": 99}, "-w", "%{http_code}")
    report.check("wrong", wrong.endswith("400"))
    report.check("not JSON", '"invalid_json"' in curl("/chat/completions", None, "-d", "{"))
    return report


def _run_schema(cache: Path, url: str, model: str, seconds: int, *, network: bool) -> Report:
    python = _environment(cache, "schemathesis", ["schemathesis"])
    what = "our own /openapi.json: no 5xx, no response outside its schema (bounded run)"
    report = Report("schemathesis", _version(python, "schemathesis"), what)
    base = url.removesuffix("/v1")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,"
    command = [str(python.parent / "schemathesis"), "run", f"{base}/openapi.json"]
    command += ["--checks", checks + "response_schema_conformance", "--max-examples", "60"]
    command += ["--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"]
    if network:
        # Answers take a while there: it ends by itself in time, and says what it found.
        command += ["--max-time", str(int(0.8 * seconds)), "--request-timeout", "120"]
    command += ["--generation-database", "none", "--max-failures", "20"]
    # It leaves a folder of its own where it runs.
    output = _bounded(command, seconds, cache)
    found = re.search(r"(\d+) generated", output)
    report.passed = int(found[1]) if found else 0
    for name in re.findall(r"^_+ (.*?) _+$", output, re.MULTILINE):
        report.failed[name] = "see the output"
    if report.failed or not found:
        sys.stderr.write(output[-6000:])
    if not found:
        report.failed["the suite"] = output[-300:]
    return report


if __name__ == "__main__":
    sys.exit(main())
