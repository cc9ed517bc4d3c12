"""From a request to jobs: one generation each, with every limit checked before any starts."""

import asyncio
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from plait.client import Options
from plait.compute.grammar import JSON_OBJECT, check_grammar
from plait.errors import ConfigError
from plait.gateway.config import GatewayConfig
from plait.gateway.failure import ApiError, invalid, refused
from plait.gateway.port import Ask
from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    Generating,
    PlaitFields,
    Provider,
    ResponseFormat,
    ToolSpec,
    check_chat,
    check_completion,
    plain_messages,
    stops_of,
    texts_of,
)
from plait.gateway.shelf import Shelved
from plait.gateway.tools import Tool, ToolMode, Tools, chosen, introduced
from plait.types import MILLION, Grammar, PeerId, Sampling

_SEEDS = 2**63
_DRAWN_SEED_BITS = 53
"""Readers of JSON whose numbers are doubles keep a seed of so many bits exactly."""
_TOP_P_MIN = 1e-6
_LONG_CHARACTERS = 16_384


@dataclass(frozen=True, slots=True)
class Job:
    """One generation: the ``index``th of its request, the ``choice``th of its prompt.

    ``echo`` goes before its text, with the prompt's log-probabilities if the options ask
    for them; ``echo_only`` leaves the text out.
    """

    index: int
    choice: int
    model: Shelved
    ask: Ask
    stops: tuple[str, ...] = ()
    tools: Tools = field(default_factory=Tools)
    echo: str = ""
    echo_only: bool = False

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.ask.prompt_ids)

    @property
    def max_tokens(self) -> int:
        """Most tokens of the answer."""
        return self.ask.options.max_tokens


async def chat_jobs(request: ChatRequest, model: Shelved, config: GatewayConfig) -> list[Job]:
    """The jobs of a chat: one per choice. Raises ``ApiError``."""
    check_chat(request)
    tools = _tools(request)
    ids = await chat_ids(model, plain_messages(request.messages), tools.offered)
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = request.max_completion_tokens or request.max_tokens
    limit = max_tokens(len(ids), asked, model, config, "messages", name)
    options = _options(request, limit, config)
    grammar = await _grammar(request, tools)
    top = (request.top_logprobs or 0) if request.logprobs else 0
    sampling = sampling_of(request, model, grammar, top)
    return jobs_of(model, ids, sampling, options, request, stops_of(request), tools)


async def completion_jobs(
    request: CompletionRequest, model: Shelved, config: GatewayConfig
) -> list[Job]:
    """The jobs of a completion: one per prompt and choice. Raises ``ApiError``."""
    check_completion(request)
    prompts = texts_of(request.prompt, "prompt")
    if len(prompts) * (request.n or 1) > config.answers_max:
        raise invalid("prompt", f"more than {config.answers_max} answers in one request")
    sampling = sampling_of(
        request, model, await _checked_own_grammar(request.plait), request.logprobs or 0
    )
    stops, jobs = stops_of(request), list[Job]()
    for prompt in prompts:
        ids = await text_ids(model, prompt, "prompt")
        # A pipeline draws one token at least.
        asked = 1 if request.max_tokens == 0 else request.max_tokens
        limit = max_tokens(len(ids), asked, model, config, "prompt")
        options = _options(request, limit, config)
        made = jobs_of(model, ids, sampling, options, request, stops, first=len(jobs))
        jobs += [_echoing(job, prompt, request) for job in made] if request.echo else made
    return jobs


def jobs_of(
    model: Shelved,
    ids: tuple[int, ...],
    sampling: Sampling,
    options: Options,
    request: Generating,
    stops: tuple[str, ...],
    tools: Tools | None = None,
    *,
    first: int = 0,
) -> list[Job]:
    """One job per choice of a prompt."""
    return [
        Job(
            index=first + choice,
            choice=choice,
            model=model,
            ask=Ask(
                model=model.name,
                prompt_ids=ids,
                sampling=sampling
                if first + choice == 0
                else replace(sampling, seed=_seed(request.seed, choice)),
                options=options,
            ),
            stops=stops,
            tools=tools or Tools(),
        )
        for choice in range(request.n or 1)
    ]


# Prompts ------------------------------------------------------------------------------


async def chat_ids(
    model: Shelved, messages: list[dict[str, Any]], tools: Sequence[Tool] = ()
) -> tuple[int, ...]:
    """The ids of a conversation; raises ``ApiError`` where the template refuses it."""
    if not any(message["content"].strip() for message in messages):
        raise invalid("messages", "the prompt is empty")
    described: list[dict[str, Any]] | None = [tool.described() for tool in tools]
    if not model.tokenizer.template_takes_tools:
        messages, described = introduced(messages, tools), None
    size = sum(len(message["content"]) for message in messages)
    try:
        if size < _LONG_CHARACTERS:
            return tuple(model.tokenizer.chat(messages, described))
        # A long text takes a while, in which other answers must go on.
        return tuple(await asyncio.to_thread(model.tokenizer.chat, messages, described))
    except ConfigError as error:
        raise invalid("messages", str(error)) from error


async def text_ids(model: Shelved, prompt: str | list[int], param: str) -> tuple[int, ...]:
    """The ids of a text without template, or ids as they are; raises ``ApiError``."""
    if isinstance(prompt, list):
        if not all(0 <= token < model.local.manifest.vocabulary_size for token in prompt):
            raise invalid(param, f"{model.name} has no such token id")
        ids = prompt
    elif len(prompt) < _LONG_CHARACTERS:
        ids = model.tokenizer.encode(prompt)
    else:
        ids = await asyncio.to_thread(model.tokenizer.encode, prompt)
    if not ids:
        raise invalid(param, f"{param} is empty")
    return tuple(ids)


def _echoing(job: Job, prompt: str | list[int], request: CompletionRequest) -> Job:
    text = prompt if isinstance(prompt, str) else job.model.tokenizer.decode(prompt)
    options = replace(job.ask.options, score_prompt=request.logprobs is not None)
    ask = replace(job.ask, options=options)
    return replace(job, ask=ask, echo=text, echo_only=request.max_tokens == 0)


def max_tokens(
    prompt_tokens: int,
    asked: int | None,
    model: Shelved,
    config: GatewayConfig,
    where: str,
    name: str = "max_tokens",
) -> int:
    """How long the answer may be; raises ``ApiError`` if it cannot fit the context, which is
    the fault of the prompt (``where``) or of what is asked for (``name``)."""
    room = model.context_length - prompt_tokens
    if room < 1 or (asked or 1) > room:
        wanted = f" and {asked} are asked for" if asked else ""
        raise ApiError(
            400,
            f"the prompt has {prompt_tokens} tokens{wanted}, "
            f"but the context of {model.name} ends at {model.context_length}",
            code="context_length_exceeded",
            param=name if room >= 1 else where,
        )
    return asked or min(room, config.default_max_tokens)


# How tokens are drawn -----------------------------------------------------------------


def sampling_of(
    request: Generating, model: Shelved, grammar: Grammar | None, top_logprobs: int
) -> Sampling:
    """The sampling of a request's first job; raises ``ApiError``."""
    temperature = 1.0 if request.temperature is None else request.temperature
    repetition = 1.0 if request.repetition_penalty is None else request.repetition_penalty
    try:
        return Sampling(
            temperature_micros=_micros(temperature),
            top_p_micros=_micros(1.0 if request.top_p is None else max(request.top_p, _TOP_P_MIN)),
            top_k=max(request.top_k or 0, 0),
            end_ids=model.tokenizer.end_ids,
            min_p_micros=_micros(request.min_p or 0.0),
            presence_penalty_micros=_micros(request.presence_penalty or 0.0),
            frequency_penalty_micros=_micros(request.frequency_penalty or 0.0),
            repetition_penalty_micros=max(1, _micros(repetition)),
            logit_bias=_bias(request.logit_bias, model),
            top_logprobs=top_logprobs,
            grammar=grammar,
            seed=_seed(request.seed, 0),
        )
    except ValueError as error:
        raise invalid(None, str(error)) from error


def _micros(value: float) -> int:
    return round(value * MILLION)


def _bias(biases: dict[str, float] | None, model: Shelved) -> tuple[tuple[int, int], ...]:
    found: dict[int, int] = {}
    for name, bias in (biases or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 10):
            raise invalid("logit_bias", f"{name!r} is not a token id")
        if int(name) >= model.local.manifest.vocabulary_size:
            raise invalid("logit_bias", f"{model.name} has no such token id")
        found[int(name)] = _micros(bias)
    return tuple(sorted(found.items()))


def _seed(seed: int | None, choice: int) -> int:
    """Choice k draws with the seed k further on; without a seed each draws a fresh one."""
    return secrets.randbits(_DRAWN_SEED_BITS) if seed is None else (seed + choice) % _SEEDS


# What an answer looks like ------------------------------------------------------------


def _tools(request: ChatRequest) -> Tools:
    offered = [tool_of(spec) for spec in request.tools or ()]
    choice = request.tool_choice
    if isinstance(choice, ToolSpec):
        return tools_of(offered, "auto", choice.function.name)
    return tools_of(offered, choice or "auto")


def tool_of(spec: ToolSpec) -> Tool:
    """A tool as it was described."""
    function = spec.function
    return Tool(function.name, function.description or "", function.parameters or {})


def tools_of(offered: Sequence[Tool], mode: ToolMode, name: str | None = None) -> Tools:
    """Tools after the choice among them; raises ``ApiError``."""
    try:
        return chosen(offered, mode, name)
    except ValueError as error:
        raise invalid("tool_choice", str(error)) from error


def _format_grammar(format_: ResponseFormat | None) -> Grammar | None:
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return JSON_OBJECT
    if format_.json_schema is None or format_.json_schema.schema is None:
        raise invalid("response_format.json_schema", "json_schema needs a schema")
    return schema_grammar(format_.json_schema.schema, "response_format.json_schema")


def schema_grammar(schema: dict[str, Any], param: str) -> Grammar:
    """The grammar of a JSON schema; raises ``ApiError`` if it is too long."""
    return _grammar_of("json_schema", json.dumps(schema), param)


def _own_grammar(plait: PlaitFields | None) -> Grammar | None:
    if plait is None or (plait.regex is None and plait.lark is None):
        return None
    if plait.regex is not None and plait.lark is not None:
        raise invalid("plait.lark", "give either a regex or a lark grammar")
    if plait.regex is not None:
        return _grammar_of("regex", plait.regex, "plait.regex")
    return _grammar_of("lark", plait.lark or "", "plait.lark")


def _grammar_of(kind: Any, text: str, param: str) -> Grammar:
    try:
        return Grammar(kind, text)
    except ValueError as error:
        raise invalid(param, str(error)) from error


async def _grammar(request: ChatRequest, tools: Tools) -> Grammar | None:
    """What the answer must look like; raises ``ApiError``."""
    own, format_ = _own_grammar(request.plait), _format_grammar(request.response_format)
    if own is not None and format_ is not None:
        raise invalid(f"plait.{own.kind}", "give either a response_format or a grammar")
    if (call := tools.grammar()) is not None:
        return await _checked(call, "tools")
    if format_ is not None:
        return await _checked(format_, "response_format")
    return await _checked_own_grammar(request.plait)


async def _checked_own_grammar(plait: PlaitFields | None) -> Grammar | None:
    own = _own_grammar(plait)
    return None if own is None else await _checked(own, f"plait.{own.kind}")


async def _checked(grammar: Grammar, param: str) -> Grammar:
    """The grammar, if it can be used; raises ``ApiError`` naming what is wrong with it."""
    if why := await asyncio.to_thread(check_grammar, grammar):
        raise invalid(param, f"the grammar cannot be used: {why}")
    return grammar


# Routing ------------------------------------------------------------------------------


def options_of(
    limit: int,
    provider: Provider | None,
    plait: PlaitFields | None,
    *,
    bundle: bool = False,
) -> Options:
    """Options of an answer of at most ``limit`` tokens; raises ``ApiError``."""
    wanted, own = provider or Provider(), plait or PlaitFields()
    for name in ("order", "quantizations", "zdr"):
        if getattr(wanted, name):
            raise refused(f"provider.{name}", f"provider.{name} is not supported")
    if wanted.allow_fallbacks is False:
        why = "a stage that fails is replaced: use provider.only to say by whom"
        raise refused("provider.allow_fallbacks", why)
    if wanted.require_parameters:
        why = "unknown fields of a request are ignored, whoever serves it"
        raise refused("provider.require_parameters", why)
    if wanted.data_collection == "deny":
        why = "every stage can reconstruct the prompt: use provider.only with peers you trust"
        raise refused("provider.data_collection", why)
    return Options(
        max_tokens=limit,
        bundle=bundle or own.bundle,
        keep_alive_s=own.keep_alive_s or 0,
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


def _options(request: Generating, limit: int, config: GatewayConfig) -> Options:
    return options_of(limit, request.provider, request.plait, bundle=config.always_bundle)
