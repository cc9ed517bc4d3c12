"""Real clients, unchanged and each in its own environment, against the gateway.

    python benchmarks/conformance/run.py [--url URL | --network FILE] [--model MODEL]
        [--cache DIR] [--only NAME]

Without --url or --network the upstream is the obedient engine (plait.testing.obedient), as
suites test the API, not a model; with --url any gateway; with --network a gateway of its own
over a real network, such as a testnet's. Environments are made with pip in the cache
folder. Writes CONFORMANCE.md (only with all suites over the engine) and prints JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITES = Path(__file__).resolve().parent / "suites"
MODEL = "tiny-random"
TIMEOUT_S = 600
_PYTEST = ["pytest", "pytest-asyncio"]


@dataclass(frozen=True)
class Suite:
    """What is installed and run; ``excused`` maps tests that need a model to the reason."""

    name: str
    packages: list[str]
    package: str
    what: str
    options: list[str] = field(default_factory=list)
    excused: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """What a suite said."""

    suite: str
    version: str
    what: str
    passed: int = 0
    failed: list[str] = field(default_factory=list)
    excused: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


_ASYNC = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
PYTESTS = [
    Suite(
        "openai_client",
        ["openai", *_PYTEST],
        "openai",
        "chat, streams, tools, json_schema, logprobs, completions, responses, embeddings, errors",
    ),
    Suite("anthropic_client", ["anthropic", *_PYTEST], "anthropic", "messages, streams, tools"),
    Suite(
        "langchain_client",
        ["langchain-openai", "langchain-tests", *_PYTEST],
        "langchain-tests",
        "langchain's standard integration tests, on chat completions and on responses",
        _ASYNC,
    ),
]


def main() -> int:
    """Run, report, return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url")
    parser.add_argument("--network", type=Path, help="serve this network and ask it")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--only")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache/plait/conformance")
    options = parser.parse_args()
    with _gateway(options.url, options.network) as url:
        os.environ |= {"BASE_URL": url, "PLAIT_MODEL": options.model}
        wanted = [suite for suite in PYTESTS if options.only in (None, suite.package)]
        reports = [_run_pytest(suite, options.cache) for suite in wanted]
        for name, run in (("llm", _run_llm), ("curl", _run_curl), ("schemathesis", _run_schema)):
            if options.only in (None, name):
                reports.append(run(options.cache, url, options.model))
    print(json.dumps([asdict(report) for report in reports]))
    if (options.url, options.network, options.only) == (None, None, None):
        (ROOT / "CONFORMANCE.md").write_text(_table(reports))
    return int(any(report.failed for report in reports))


@contextmanager
def _gateway(url: str | None, network: Path | None):
    if url is not None:
        yield url
        return
    command = [sys.executable, "-m", "plait.testing.obedient"]
    output = {"stdout": subprocess.PIPE}
    if network is not None:
        command = [sys.executable, "-m", "plait", "serve", "--port", "0", "--no-keys"]
        command += ["--network", str(network)]
        output = {"stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **output)
    try:
        yield _address(process.stdout or process.stderr)
    finally:
        process.terminate()
        process.wait()


def _address(output) -> str:
    """The base URL that a gateway prints; its further lines are read and dropped."""
    for line in output:
        if found := re.search(r"http://\S+?/v1", line):
            threading.Thread(target=output.read, daemon=True).start()
            return found[0]
    raise SystemExit("the gateway did not start")


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


def _run_pytest(suite: Suite, cache: Path) -> Report:
    python = _environment(cache, suite.name, suite.packages)
    report = Report(suite.package, _version(python, suite.package), suite.what)
    command = [str(python), "-m", "pytest", "-q", "-rfEs", "--tb=no", "-c", os.devnull]
    command += ["-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={SUITES}"]
    done = subprocess.run(
        [*command, *suite.options, str(SUITES / f"{suite.name}.py")],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    found = re.search(r"(\d+) passed", done.stdout)
    report.passed = int(found[1]) if found else 0
    for line in done.stdout.splitlines():
        if line.startswith(("FAILED", "ERROR")):
            name = line.split(" - ")[0].rpartition("::")[2]
            if name in suite.excused:
                report.excused[name] = suite.excused[name]
            else:
                report.failed.append(name)
        elif skipped := re.match(r"SKIPPED \[(\d+)\] .*?: (.*)", line):
            reason = skipped[2].split(": ")[-1]
            report.skipped[reason] = report.skipped.get(reason, 0) + int(skipped[1])
    if not report.passed and not report.failed:
        report.failed.append("the suite did not run: " + done.stdout[-300:] + done.stderr[-300:])
    return report


def _check(report: Report, name: str, ok: bool) -> None:
    if ok:
        report.passed += 1
    else:
        report.failed.append(name)


def _run_llm(cache: Path, url: str, model: str) -> Report:
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
            timeout=120,
            stdin=subprocess.DEVNULL,
        )
        ok = done.returncode == 0 and bool(done.stdout.strip())
        if name == "schema" and ok:
            ok = _has_number(done.stdout)
        _check(report, name, ok)
    return report


def _has_number(text: str) -> bool:
    try:
        return isinstance(json.loads(text)["n"], int)
    except (ValueError, KeyError, TypeError):
        sys.stderr.write(f"not of the schema: {text!r}\n")
        return False


def _run_curl(cache: Path, url: str, model: str) -> Report:
    version = subprocess.run(["curl", "--version"], capture_output=True, text=True).stdout.split()
    report = Report("curl", version[1] if version else "", "whole, streamed, wrong, and cut off")
    chat = {"model": model, "messages": [{"role": "user", "content": "Why?"}]}

    def curl(path: str, body: object, *more: str) -> str:
        command = ["curl", "-sS", "-N", url + path, "-H", "content-type: application/json", *more]
        data = [] if body is None else ["-d", json.dumps(body)]
        return subprocess.run([*command, *data], capture_output=True, text=True, timeout=60).stdout

    _check(report, "models", model in curl("/models", None))
    _check(report, "chat", '"chat.completion"' in curl("/chat/completions", chat))
    streamed = curl("/chat/completions", chat | {"stream": True})
    _check(report, "stream", streamed.endswith("data: [DONE]\n\n"))
    wrong = curl("/chat/completions", chat | {"n": 99}, "-w", "%{http_code}")
    _check(report, "wrong", wrong.endswith("400"))
    _check(report, "not JSON", '"invalid_json"' in curl("/chat/completions", None, "-d", "{"))
    return report


def _run_schema(cache: Path, url: str, model: str) -> Report:
    python = _environment(cache, "schemathesis", ["schemathesis"])
    what = "our own /openapi.json: no 5xx, no response outside its schema (bounded run)"
    report = Report("schemathesis", _version(python, "schemathesis"), what)
    base = url.removesuffix("/v1")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,"
    command = [str(python.parent / "schemathesis"), "run", f"{base}/openapi.json"]
    command += ["--checks", checks + "response_schema_conformance", "--max-examples", "60"]
    command += ["--phases", "examples,coverage,fuzzing", "--seed", "1", "--no-color"]
    command += ["--generation-database", "none", "--max-failures", "20"]
    # It leaves a folder of its own where it runs.
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, cwd=cache)
    found = re.search(r"(\d+) generated", done.stdout)
    report.passed = int(found[1]) if found else 0
    if done.returncode:
        sys.stderr.write(done.stdout[-6000:])
        names = re.findall(r"^_+ (.*?) _+$", done.stdout, re.MULTILINE)
        report.failed = names or [done.stdout[-500:] + done.stderr[-500:]]
    return report


def _table(reports: list[Report]) -> str:
    lines = [
        "# Conformance",
        "",
        "Clients nobody here wrote, unchanged, each in its own environment, against the gateway.",
        "Made by `python benchmarks/conformance/run.py`; do not edit. The upstream is an engine",
        "that obeys its instructions (`plait.testing.obedient`): the suites test the API, not a",
        "model's wit. For schemathesis the count is of generated requests.",
        "",
        "| Suite | Version | What | Passed | Failed | Skipped by the suite | Excused |",
        "|---|---|---|---|---|---|---|",
    ]
    for report in reports:
        skipped = sum(report.skipped.values())
        lines.append(
            f"| {report.suite} | {report.version} | {report.what} | {report.passed} | "
            f"{len(report.failed)} | {skipped} | {len(report.excused)} |"
        )
    reasons = [
        f"- {report.suite}: {count} × {reason}"
        for report in reports
        for reason, count in sorted(report.skipped.items())
    ]
    failures = [f"- {report.suite}: {name}" for report in reports for name in report.failed]
    excuses = [
        f"- {report.suite}: {name}: {why}"
        for report in reports
        for name, why in report.excused.items()
    ]
    for title, found in (("Failed", failures), ("Excused", excuses), ("Skipped", reasons)):
        if found:
            lines += ["", f"## {title}", "", *found]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
