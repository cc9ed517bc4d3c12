"""How tokens are drawn, on the wire: ``Sampling`` from and to its message."""

from plait.types import MILLION, Grammar, Sampling
from plait.v1 import session_pb2


def sampling_to_message(sampling: Sampling) -> session_pb2.Sampling:
    """The message of a sampling; a field at its neutral value stays unset."""
    repetition = sampling.repetition_penalty_micros
    message = session_pb2.Sampling(
        temperature_micros=sampling.temperature_micros,
        top_p_micros=sampling.top_p_micros,
        top_k=sampling.top_k,
        seed=sampling.seed,
        end_ids=sampling.end_ids,
        min_p_micros=sampling.min_p_micros,
        presence_penalty_micros=sampling.presence_penalty_micros,
        frequency_penalty_micros=sampling.frequency_penalty_micros,
        repetition_penalty_micros=0 if repetition == MILLION else repetition,
        logit_bias=[
            session_pb2.LogitBias(id=token, micros=micros) for token, micros in sampling.logit_bias
        ],
        top_logprobs=sampling.top_logprobs,
    )
    match sampling.grammar:
        case None:
            pass
        case Grammar("json_schema", text):
            message.grammar.json_schema = text
        case Grammar("regex", text):
            message.grammar.regex = text
        case Grammar("lark", text):
            message.grammar.lark = text
    return message


def sampling_from_message(message: session_pb2.Sampling) -> Sampling:
    """Read a sampling; raises ``ValueError`` for anything out of range."""
    return Sampling(
        temperature_micros=message.temperature_micros,
        top_p_micros=message.top_p_micros,
        top_k=message.top_k,
        seed=message.seed,
        end_ids=tuple(message.end_ids),
        min_p_micros=message.min_p_micros,
        presence_penalty_micros=message.presence_penalty_micros,
        frequency_penalty_micros=message.frequency_penalty_micros,
        repetition_penalty_micros=message.repetition_penalty_micros or MILLION,
        logit_bias=tuple((bias.id, bias.micros) for bias in message.logit_bias),
        top_logprobs=message.top_logprobs,
        grammar=_grammar(message.grammar) if message.HasField("grammar") else None,
    )


def _grammar(message: session_pb2.Grammar) -> Grammar:
    match message.WhichOneof("kind"):
        case "json_schema":
            return Grammar("json_schema", message.json_schema)
        case "regex":
            return Grammar("regex", message.regex)
        case "lark":
            return Grammar("lark", message.lark)
    raise ValueError("a grammar of no known kind")
