"""``plait run`` and ``plait chat``."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from plait.cli.bundle_file import check_writable, write_bundle
from plait.errors import ConfigError, PlaitError

if TYPE_CHECKING:
    from plait.client import Answer, Client, Options

Network = Annotated[
    Path | None, typer.Option(help="Network file; by default the last testnet started.")
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
MaxPrice = Annotated[int | None, typer.Option(help="Most microcredits for the whole request.")]
Sort = Annotated[str, typer.Option(help="price, latency, throughput or weighted.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling, in (0, 1].")]
TopK = Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same tokens.")]
Pin = Annotated[
    list[str] | None, typer.Option(help="start:end=PEER keeps those layers on that peer.")
]
Only = Annotated[list[str] | None, typer.Option(help="Use only this peer; repeatable.")]
Ignore = Annotated[list[str] | None, typer.Option(help="Never use this peer; repeatable.")]
Drafts = Annotated[
    bool, typer.Option("--drafts/--no-drafts", help="Guess what follows; never another text.")
]
DraftModel = Annotated[
    str | None, typer.Option("--draft", help="A small local model that guesses, too.")
]
QosClass = Annotated[
    Literal["interactive", "standard", "batch"], typer.Option("--qos", help="How urgent it is.")
]
WireFormat = Annotated[
    Literal["fp32", "bf16", "int8"] | None,
    typer.Option("--wire", help="How activations cross hops; the route chooses if left out."),
]
WaitReplica = Annotated[
    float, typer.Option(min=0.0, help="Seconds to wait for a host when one is lost.")
]
Audit = Annotated[
    bool, typer.Option("--audit/--no-audit", help="Hold the audit lottery over the answers.")
]
MinAudited = Annotated[
    int, typer.Option(min=0, help="Only peers that passed so many audited chunks of yours.")
]
Hedge = Annotated[
    float,
    typer.Option(
        min=0.0, max=1.0, help="Share of prompt tokens that a second pipeline may be asked too."
    ),
]
SubAccount = Annotated[
    str, typer.Option(help="Pay within the limits of this share of your account.")
]

KeepAlive = Annotated[
    int, typer.Option(min=0, help="Seconds to have prompt and answer kept for the next turn.")
]
ReuseOption = Annotated[
    bool, typer.Option("--reuse/--no-reuse", help="Let stages keep prompts, for you alone.")
]


def run(
    model: Annotated[str, typer.Argument(help="A model of the catalogue.")],
    prompt: Annotated[str, typer.Argument(help='The prompt; "-" reads standard input.')],
    max_tokens: MaxTokens = 256,
    max_price: MaxPrice = None,
    sort: Sort = "latency",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template.")] = False,
    pin: Pin = None,
    only: Only = None,
    ignore: Ignore = None,
    drafts: Drafts = True,
    draft: DraftModel = None,
    qos: QosClass = "standard",
    wire: WireFormat = None,
    wait_replica: WaitReplica = 20.0,
    hedge: Hedge = 0.0,
    keep_alive: KeepAlive = 0,
    reuse: ReuseOption = True,
    sub_account: SubAccount = "",
    audit: Audit = True,
    min_audited: MinAudited = 0,
    network: Network = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Write the evidence here, for plait verify.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Generate an answer to one prompt, streamed; then route, speed, cost and receipts.

    Every stage of a pipeline can reconstruct the prompt from what it computes on: use
    --pin and --only, or a private network, for what strangers must not read.
    """
    options = _options(
        max_tokens=max_tokens,
        max_price=max_price,
        sort=sort,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        raw=raw,
        bundle=bundle is not None,
        drafts=drafts,
        qos=qos,
        wire=wire,
        replica_wait_s=wait_replica,
        hedge_share=hedge,
        keep_alive_s=keep_alive,
        reuse=reuse,
        sub_account=sub_account,
        audited_min=min_audited,
        **_peers(pin, only, ignore),
    )
    if bundle is not None:
        check_writable(bundle)
    text = sys.stdin.read() if prompt == "-" else prompt
    with _client(network, draft if drafts else None, audits=audit) as client:
        answer = _stream(client, model, text, options, show=not json_output)
    if bundle is not None and answer.bundle is not None:
        write_bundle(bundle, answer.bundle)
    if json_output:
        from plait.cli.output import emit_json

        emit_json(answer.to_json() | {"bundle": str(bundle) if bundle else None})
        return
    _summarise(answer, bundle)


def chat(
    model: Annotated[str, typer.Argument(help="A model of the catalogue.")],
    max_tokens: MaxTokens = 256,
    max_price: MaxPrice = None,
    sort: Sort = "latency",
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    system: Annotated[str, typer.Option(help="Instructions for the whole conversation.")] = "",
    pin: Pin = None,
    only: Only = None,
    ignore: Ignore = None,
    drafts: Drafts = True,
    draft: DraftModel = None,
    qos: QosClass = "standard",
    wire: WireFormat = None,
    wait_replica: WaitReplica = 20.0,
    keep_alive: KeepAlive = 600,
    reuse: ReuseOption = True,
    sub_account: SubAccount = "",
    audit: Audit = True,
    min_audited: MinAudited = 0,
    network: Network = None,
) -> None:
    """Talk with a model. An empty line or Ctrl-D ends; Ctrl-C stops an answer."""
    from plait.ledger.report import printable

    options = _options(
        max_tokens=max_tokens,
        max_price=max_price,
        sort=sort,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        drafts=drafts,
        qos=qos,
        wire=wire,
        replica_wait_s=wait_replica,
        keep_alive_s=keep_alive,
        reuse=reuse,
        sub_account=sub_account,
        audited_min=min_audited,
        **_peers(pin, only, ignore),
    )
    messages = [{"role": "system", "content": system}] if system else []
    with _client(network, draft if drafts else None, audits=audit) as client:
        client.check_model(model)
        while line := _ask():
            messages.append({"role": "user", "content": line})
            try:
                answer = _stream(client, model, messages, options, show=True)
            except KeyboardInterrupt:
                print("\n(stopped)", file=sys.stderr)
                messages.pop()
                continue
            except PlaitError as error:
                if not sys.stdin.isatty():
                    raise
                print(f"error: {printable(str(error))}", file=sys.stderr)
                messages.pop()
                continue
            messages.append({"role": "assistant", "content": answer.text})
            print(f"({_figures(answer)})", file=sys.stderr)


def _ask() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _options(**values: Any) -> "Options":
    from plait.client import Options

    return Options(**values)


def _client(network: Path | None, draft: str | None = None, *, audits: bool = False) -> "Client":
    from plait.client import Client
    from plait.locate import client_dir, network_path

    return Client(network_path(network), account=client_dir(network), audits=audits, draft=draft)


def _stream(
    client: "Client", model: str, prompt: Any, options: "Options", *, show: bool
) -> "Answer":
    from plait.client import Answer

    for item in client.stream(model, prompt, options):
        if isinstance(item, Answer):
            if show:
                print(flush=True)
            return item
        if show:
            print(item.text, end="", flush=True)
    raise AssertionError("a stream ends with its answer")


def _figures(answer: "Answer") -> str:
    speed = f"{1 / answer.tpot_s:.1f} tokens/s" if answer.tpot_s else "one token"
    return (
        f"{answer.completion_tokens} tokens · {speed} · first after {answer.ttft_s:.2f} s · "
        f"{answer.cost_microcredits} microcredits"
    )


def _summarise(answer: "Answer", bundle: Path | None) -> None:
    steps = " → ".join(f"{step.peer[-8:]} [{step.span}]" for step in answer.route)
    print(f"\nroute     {steps}", file=sys.stderr)
    print(f"answer    {_figures(answer)}", file=sys.stderr)
    pending = "" if answer.settled else "; settlement is pending, the stages will try again"
    print(f"receipts  {answer.receipts_verified} verified{pending}", file=sys.stderr)
    if bundle is not None:
        print(f"evidence  {bundle} (check it with: plait verify {bundle})", file=sys.stderr)


def _peers(
    pin: list[str] | None, only: list[str] | None, ignore: list[str] | None
) -> dict[str, Any]:
    from plait.types import PeerId, Span

    pins = []
    for text in pin or []:
        span, equals, peer = text.partition("=")
        try:
            if not equals:
                raise ValueError("there is no =")
            pins.append((Span.parse(span), PeerId(peer)))
        except ValueError as error:
            raise ConfigError(
                f"--pin {text} is not start:end=PEER: {error}", remedy="--pin 0:4=12D3Koo…"
            ) from error
    return {
        "pin": tuple(pins),
        "only": frozenset(PeerId(peer) for peer in only or []),
        "ignore": frozenset(PeerId(peer) for peer in ignore or []),
    }
