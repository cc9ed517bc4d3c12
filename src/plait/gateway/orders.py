"""From a request to jobs: one generation each, with every limit checked before any starts."""

import asyncio
from dataclasses import dataclass, replace

from plait.client import Options
from plait.client.prompt import Prompt, prompt_ids
from plait.errors import ConfigError
from plait.gateway.config import GatewayConfig
from plait.gateway.failure import ApiError, invalid, refused
from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    Generating,
    PlaitFields,
    Provider,
    check_chat,
    check_completion,
    plain_messages,
    prompts_of,
    stops_of,
)
from plait.gateway.shelf import Shelved
from plait.types import PeerId

_SEEDS = 2**63
_TOP_P_MIN = 1e-6
_LONG_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: the ``index``th of its request, the ``choice``th of its prompt.

    ``echo`` goes before its text.
    """

    index: int
    choice: int
    model: Shelved
    prompt: Prompt
    prompt_tokens: int
    options: Options
    stops: tuple[str, ...]
    echo: str = ""


async def chat_jobs(request: ChatRequest, model: Shelved, config: GatewayConfig) -> list[Job]:
    """The jobs of a chat: one per choice. Raises ``ApiError``."""
    check_chat(request)
    prompt = plain_messages(request.messages)
    count = await prompt_tokens(model, prompt, raw=False)
    asked = request.max_completion_tokens or request.max_tokens
    options = _options(
        request, _max_tokens(count, asked, model, config, raw=False), config, raw=False
    )
    stops = stops_of(request)
    return [
        Job(index, index, model, prompt, count, _seeded(options, index), stops)
        for index in range(request.n or 1)
    ]


async def completion_jobs(
    request: CompletionRequest, model: Shelved, config: GatewayConfig
) -> list[Job]:
    """The jobs of a completion: one per prompt and choice. Raises ``ApiError``."""
    check_completion(request)
    choices, prompts = request.n or 1, prompts_of(request)
    if len(prompts) * choices > config.answers_max:
        raise invalid("prompt", f"more than {config.answers_max} answers in one request")
    stops, jobs = stops_of(request), list[Job]()
    for prompt in prompts:
        text = prompt if isinstance(prompt, str) else _text_of(model, prompt)
        count = await prompt_tokens(model, text, raw=True)
        limit = _max_tokens(count, request.max_tokens, model, config, raw=True)
        options = _options(request, limit, config, raw=True)
        echo = text if request.echo else ""
        jobs += [
            Job(
                index=len(jobs) + choice,
                choice=choice,
                model=model,
                prompt=text,
                prompt_tokens=count,
                options=_seeded(options, choice),
                stops=stops,
                echo=echo,
            )
            for choice in range(choices)
        ]
    return jobs


async def prompt_tokens(model: Shelved, prompt: Prompt, *, raw: bool) -> int:
    """How many tokens a prompt has; raises ``ApiError`` where the template refuses it."""
    where = "prompt" if raw else "messages"
    size = len(prompt) if isinstance(prompt, str) else sum(len(m["content"]) for m in prompt)
    try:
        if size < _LONG_CHARACTERS:
            return len(prompt_ids(model.tokenizer, prompt, raw=raw))
        # A long text takes a while, in which other answers must go on.
        return len(await asyncio.to_thread(prompt_ids, model.tokenizer, prompt, raw=raw))
    except ConfigError as error:
        raise invalid(where, str(error)) from error


def routing(options: Options, provider: Provider | None, plait: PlaitFields | None) -> Options:
    """Options with a request's routing fields; raises ``ApiError``."""
    wanted, own = provider or Provider(), plait or PlaitFields()
    for name in ("order", "quantizations", "zdr"):
        if getattr(wanted, name):
            raise refused(f"provider.{name}", f"provider.{name} is not supported")
    if wanted.data_collection == "deny":
        why = "every stage can reconstruct the prompt: use provider.only with peers you trust"
        raise refused("provider.data_collection", why)
    return replace(
        options,
        sort=wanted.sort or "latency",
        only=frozenset(PeerId(peer) for peer in wanted.only or ()),
        ignore=frozenset(PeerId(peer) for peer in wanted.ignore or ()),
        max_price=_max_price(wanted),
        ttft_s=own.ttft_s,
        tpot_s=own.tpot_s,
    )


def _max_price(provider: Provider) -> int | None:
    price = provider.max_price
    if price is None or isinstance(price, int):
        return price
    for name in ("prompt", "completion", "image"):
        if getattr(price, name) is not None:
            why = "only a limit for the whole request can be kept: use max_price.request"
            raise refused(f"provider.max_price.{name}", why)
    return price.request


def _options(request: Generating, max_tokens: int, config: GatewayConfig, *, raw: bool) -> Options:
    temperature = 1.0 if request.temperature is None else request.temperature
    plain = Options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=1.0 if request.top_p is None else max(request.top_p, _TOP_P_MIN),
        top_k=max(request.top_k or 0, 0),
        seed=request.seed,
        raw=raw,
        bundle=config.always_bundle or bool(request.plait and request.plait.bundle),
    )
    return routing(plain, request.provider, request.plait)


def _seeded(options: Options, choice: int) -> Options:
    """Choice k draws with the seed k further on; without a seed each draws a fresh one."""
    if options.seed is None:
        return options
    return replace(options, seed=(options.seed + choice) % _SEEDS)


def _max_tokens(
    prompt_tokens: int, asked: int | None, model: Shelved, config: GatewayConfig, *, raw: bool
) -> int:
    room = model.context_length - prompt_tokens
    if room < 1 or (asked or 1) > room:
        wanted = f" and {asked} are asked for" if asked else ""
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens{wanted}, "
            f"but the context of {model.name} ends at {model.context_length}",
            code="context_length_exceeded",
            param="max_tokens" if room >= 1 else "prompt" if raw else "messages",
        )
    return asked or min(room, config.default_max_tokens)


def _text_of(model: Shelved, ids: list[int]) -> str:
    """The text of token ids, if it has just these ids: the client takes text only."""
    if not all(0 <= token < model.tokenizer.vocabulary_size for token in ids):
        raise invalid("prompt", f"{model.name} has no such token id")
    text = model.tokenizer.decode(ids)
    if model.tokenizer.encode(text) != ids:
        raise refused("prompt", "only token ids that this model's tokenizer makes are supported")
    return text
