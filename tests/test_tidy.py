"""The style guide as a test: layering, purity, sizes, bans, light imports, generated code."""

import ast
import builtins
import filecmp
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import plait

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "plait"
GENERATED = PACKAGE / "v1"

FILE_LINES_MAX = 800
FUNCTION_LINES_MAX = 70

CORE = {
    "types",
    "errors",
    "identity",
    "envelope",
    "network_file",
    "prices_wire",
    "replay_cuts",
    "v1",
}
CORES = CORE | {"router", "ledger"}
ENGINES = CORES | {
    "clock",
    "durable",
    "heap",
    "logs",
    "parent",
    "task_scope",
    "model",
    "compute",
    "net",
    "ledger.service",
}
EVERYTHING = ENGINES | {"node", "client", "gateway", "locate", "testnet", "sim", "cli"}

# What each package may import of plait, besides itself.
ALLOWED = {
    "types": {"errors"},
    "errors": set[str](),
    "identity": {"types", "errors"},
    "envelope": {"types", "errors", "identity", "v1"},
    "prices_wire": {"types", "v1"},
    "replay_cuts": set(),
    "network_file": {"types", "errors", "identity", "envelope", "v1"},
    "clock": set[str](),
    "durable": set[str](),
    "heap": set[str](),
    "logs": set[str](),
    "parent": set[str](),
    "task_scope": set[str](),
    "locate": CORE,
    "router": CORE,
    "ledger": CORE,
    "model": CORES,
    "compute": CORES | {"model"},
    "net": CORES | {"logs", "task_scope"},
    "ledger.service": CORES | {"durable", "logs", "net", "task_scope"},
    "node": ENGINES,
    "client": ENGINES | {"locate"},
    "gateway": ENGINES | {"client"},
    "testing": ENGINES | {"node", "client", "gateway", "testnet"},
    "testnet": ENGINES | {"node", "client"},
    "sim": ENGINES | {"node", "client", "testing"},
    "cli": EVERYTHING | {"", "testing"},
    "__main__": {"cli"},
    "": {"client"},
}

# Parts that take values and return values: no IO, no clock, no randomness, no concurrency.
PURE = (
    "router/*.py",
    "ledger/*.py",
    "net/membership.py",
    "client/driver.py",
    "client/session*.py",
    "node/admission.py",
    "node/faults.py",
    "node/overload.py",
    "node/ports.py",
    "node/replay.py",
    "node/retained.py",
    "node/scheduler.py",
    "compute/drafts.py",
    "compute/pages.py",
    "node/sessions.py",
    "node/stage.py",
    "node/stage_faults.py",
    "node/stage_frames.py",
    "node/stage_state.py",
    "node/wire.py",
    "net/shaping.py",
    "testnet/chaos_plan.py",
    "testnet/chaos_report.py",
    "testnet/layout.py",
    "testnet/nat.py",
    "testnet/shape.py",
    "testnet/wan.py",
)
IMPURE_MODULES = {
    "asyncio",
    "trio",
    "threading",
    "multiprocessing",
    "subprocess",
    "concurrent",
    "signal",
    "selectors",
    "socket",
    "ssl",
    "grpc",
    "libp2p",
    "torch",
    "transformers",
    "time",
    "datetime",
    "random",
    "secrets",
    "uuid",
    "os",
    "platform",
    "pathlib",
    "tempfile",
    "shutil",
    "io",
    "sqlite3",
    "apsw",
    "http",
    "urllib",
    "structlog",
    "logging",
}

BANNED_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
}
BANNED_CALLS = {
    "eval",
    "exec",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "numpy.load",
    "np.load",
}
ORPHAN_TASKS = {"create_task", "ensure_future"}
LOOP_NAMES = {"asyncio", "loop", "get_running_loop", "get_event_loop"}

BANNED_FILE_NAMES = {"utils.py", "helpers.py", "common.py", "manager.py"}
BANNED_PUBLIC_NAMES = {"block", "blocks"}

MACHINE_PATH = re.compile(r"(?<![\w/.}>~-])/(?:root|home|Users|work)/\w")
TEXT_SUFFIXES = {".py", ".proto", ".toml", ".md", ".txt", ".yaml", ".yml", ".json", ""}

HEAVY = ("torch", "libp2p", "transformers", "trio", "grpc", "typer", "rich")
LINKS = ("node", "router", "ledger", "testnet")


def python_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*.py")) if GENERATED not in path.parents]


OURS = [*python_files(PACKAGE), *python_files(ROOT / "tests")]
SOURCES = python_files(PACKAGE)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_file = pytest.mark.parametrize("path", OURS, ids=name_of)
every_source = pytest.mark.parametrize("path", SOURCES, ids=name_of)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes(), str(path))


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of each import, type-checking ones included."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno}: import by the full name"
            # Of `from plait import client` and `from plait.ledger import service`, too.
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def package_of(module: str) -> str:
    """The row of ``ALLOWED`` a full name under ``plait`` belongs to."""
    parts = module.split(".")[1:]
    if parts[:2] == ["ledger", "service"]:
        return "ledger.service"
    return parts[0] if parts and parts[0] in ALLOWED.keys() | CORE else ""


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an expression of names and calls, else as much of its end as there is."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=name):
            return f"{dotted(value)}.{name}"
        case ast.Call(func=function):
            return dotted(function)
    return ""


def calls_of(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call):
            yield node.lineno, dotted(node.func)


def test_every_package_has_its_place_in_the_layering() -> None:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    names -= {"__init__", "__pycache__", "py", "v1"}
    assert names <= ALLOWED.keys(), "give the new package a row in ALLOWED"


@every_source
def test_imports_go_one_way(path: Path) -> None:
    module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
    package = package_of(module)
    wrong = [
        f"{name_of(path)}:{line}: {package or 'plait'} must not import {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] == "plait"
        and (other := package_of(name)) != package
        and other not in ALLOWED[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_pure_parts_import_no_io_clock_or_randomness() -> None:
    wrong = []
    for path in (path for pattern in PURE for path in sorted(PACKAGE.glob(pattern))):
        wrong += [
            f"{name_of(path)}:{line}: imports {name}"
            for line, name in imports_of(path)
            if name.split(".")[0] in IMPURE_MODULES
        ]
        wrong += [
            f"{name_of(path)}:{line}: calls {call}()"
            for line, call in calls_of(path)
            if call in {"open", "print", "input"}
        ]
        wrong += [
            f"{name_of(path)}:{node.lineno}: is asynchronous"
            for node in ast.walk(tree_of(path))
            if isinstance(node, ast.AsyncFunctionDef | ast.Await)
        ]
    assert not wrong, "\n".join(wrong)


@every_file
def test_files_and_functions_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES_MAX, f"{name_of(path)} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= FUNCTION_LINES_MAX, f"{name_of(path)}: {node.name} has {lines} lines"


@every_file
def test_nothing_executes_foreign_bytes_or_drops_a_task(path: Path) -> None:
    wrong = [
        f"{name_of(path)}:{line}: imports {name}"
        for line, name in imports_of(path)
        if name.split(".")[0] in BANNED_MODULES
        or (name.startswith("asyncio.") and name.split(".")[-1] in ORPHAN_TASKS)
    ]
    for line, call in calls_of(path):
        owner, _, method = call.rpartition(".")
        if call in BANNED_CALLS or (
            method in ORPHAN_TASKS and owner.split(".")[-1].lstrip("_") in LOOP_NAMES
        ):
            wrong.append(f"{name_of(path)}:{line}: calls {call}()")
    assert not wrong, "\n".join(wrong)


@every_source
def test_names_are_those_of_the_glossary(path: Path) -> None:
    assert path.name not in BANNED_FILE_NAMES
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            assert node.name.lower() not in BANNED_PUBLIC_NAMES, f"{name_of(path)}: {node.name}"


@every_source
def test_modules_and_public_names_are_documented(path: Path) -> None:
    tree = tree_of(path)
    if path.name == "__init__.py" and not tree.body:
        return
    assert ast.get_docstring(tree), f"{name_of(path)} has no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            documented = node.name.startswith("_") or ast.get_docstring(node)
            assert documented, f"{name_of(path)}: {node.name} has no docstring"


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    wrong = []
    for path in project_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if MACHINE_PATH.search(line):
                wrong.append(f"{name_of(path)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def project_files() -> Iterator[Path]:
    """Text files of the project, whether committed yet or not."""
    skipped = {".git", ".venv", ".demo", "build", "dist", "__pycache__", *LINKS}
    for folder, folders, names in os.walk(ROOT):
        below_root = Path(folder) != ROOT
        folders[:] = [
            name
            for name in folders
            if not (name in skipped and not (below_root and name in LINKS))
            and not name.endswith(("_cache", ".egg-info"))
            and name != ".hypothesis"
        ]
        for name in names:
            if name in skipped:  # a worktree's .git, a linked .venv
                continue
            path = Path(folder) / name
            if path.suffix in TEXT_SUFFIXES and not path.is_symlink() and name != ".coverage":
                yield path


@pytest.mark.parametrize("name", LINKS)
def test_the_links_at_the_top_resolve(name: str) -> None:
    link = ROOT / name
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == PACKAGE / name


def test_the_public_names_of_the_package() -> None:
    assert sorted(plait.__all__) == ["Answer", "AsyncClient", "Client", "__version__"]


@pytest.mark.slow
def test_importing_plait_and_its_commands_is_light() -> None:
    script = "import sys, plait, plait.cli; print(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(finished.stdout.split())
    assert "plait.cli" in loaded
    assert not loaded.intersection(HEAVY)


@pytest.mark.slow
def test_the_client_needs_neither_torch_nor_libp2p() -> None:
    script = "import sys, plait; plait.Client, plait.AsyncClient; print(*sys.modules)"
    finished = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    loaded = set(finished.stdout.split())
    assert "plait.client" in loaded
    assert not loaded.intersection({"torch", "libp2p", "transformers", "trio"})


@pytest.mark.slow
def test_the_generated_code_is_fresh(tmp_path: Path) -> None:
    protos = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("proto/plait/v1/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", "proto", *outputs, *protos]
    subprocess.run(command, cwd=ROOT, check=True)
    fresh = tmp_path / "plait" / "v1"
    names = {path.name for path in fresh.iterdir()}
    committed = {path.name for path in GENERATED.iterdir()} - {"__init__.py", "__pycache__"}
    assert names == committed
    _, different, missing = filecmp.cmpfiles(fresh, GENERATED, sorted(names), shallow=False)
    assert not different + missing, "make proto"


def test_the_bans_are_of_things_that_exist() -> None:
    """A misspelt ban bans nothing."""
    assert all(hasattr(builtins, name) for name in BANNED_CALLS if "." not in name)
    assert sys.stdlib_module_names >= {"pickle", "marshal", "shelve", "asyncio"}
    assert MACHINE_PATH.search("in /" + "home/somebody/plait")
    assert not MACHINE_PATH.search("https://example.org/" + "home/page")
