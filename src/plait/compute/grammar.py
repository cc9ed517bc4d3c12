"""Constrained decoding: which ids an answer's grammar allows next.

llguidance (https://github.com/guidance-ai/llguidance) walks the vocabulary's bytes through
the grammar; here are its limits, its errors as ours, and going back. JSON is written as
``json.dumps`` does, with one blank after each colon and comma: a small model that may choose
its white space can go on with it for ever.
"""

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from plait.errors import ConfigError, RemoteProtocolError
from plait.model.tokenizer import Tokenizer
from plait.types import Grammar

if TYPE_CHECKING:
    import llguidance

Allowed = npt.NDArray[np.bool_]

JSON_OBJECT = Grammar("json_schema", '{"type":"object"}')
_JSON_STYLE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}
_FUEL_INITIAL = 1_000_000
_FUEL_STEP = 200_000
_ITEMS_STEP = 50_000
_LEXER_STATES_MAX = 100_000
_GRAMMAR_SIZE_MAX = 200_000


class Vocabulary:
    """The tokens of a model for its grammars, made ready when first needed (0.1 s).

    ``load`` gives the tokenizer; ``size`` is how many logits there are. May be used from
    several threads. Raises ``ConfigError`` where llguidance is not installed.
    """

    def __init__(self, load: Callable[[], Tokenizer], size: int) -> None:
        self._load = load
        self._size = size
        self._lock = threading.Lock()
        self._ready: llguidance.LLTokenizer | None = None

    def matcher(self, grammar: Grammar) -> "Matcher":
        """A matcher at the beginning of an answer; raises ``RemoteProtocolError`` for a
        grammar that makes no sense or is too large."""
        with self._lock:
            if self._ready is None:
                self._ready = _tokens_of(self._load(), self._size)
        return Matcher(self._ready, grammar, self._size)


class Matcher:
    """An answer so far against its grammar."""

    def __init__(self, tokens: "llguidance.LLTokenizer", grammar: Grammar, size: int) -> None:
        import llguidance

        self._size = size
        self._inner = llguidance.LLMatcher(
            tokens, _compiled(grammar), log_level=0, limits=_limits()
        )
        self._check("the grammar cannot be used")

    def allowed(self) -> Allowed:
        """Which ids may come next; raises ``RemoteProtocolError`` if none may."""
        mask = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
        self._check("the grammar allows nothing more")
        bits = np.unpackbits(mask, bitorder="little")[: self._size].astype(bool)
        if not bits.any():
            raise RemoteProtocolError("the grammar allows no token here")
        return bits

    def take(self, ids: Sequence[int]) -> None:
        """Go on by ids; raises ``RemoteProtocolError`` for one that is not allowed."""
        # An end token leaves the matcher where it is: nothing may follow it anyway.
        if ids and not self._inner.consume_tokens(list(ids)):
            self._check("the answer does not follow its grammar")

    def back(self, count: int) -> None:
        """Undo the last ``count`` ids."""
        if count and not self._inner.rollback(count):
            self._check("the answer cannot be taken back")

    def _check(self, what: str) -> None:
        if self._inner.is_error():
            raise RemoteProtocolError(f"{what}: {self._inner.get_error()[:300]}")


def check_grammar(grammar: Grammar) -> str:
    """Why a grammar cannot be used, or an empty text. Raises ``ConfigError`` where
    llguidance is not installed."""
    llguidance = _library()
    try:
        compiled = _compiled(grammar)
    except RemoteProtocolError as error:
        return str(error)
    return str(llguidance.LLMatcher.validate_grammar(compiled, limits=_limits()))


def _compiled(grammar: Grammar) -> str:
    matcher = _library().LLMatcher
    try:
        match grammar.kind:
            case "json_schema":
                return str(matcher.grammar_from_json_schema(grammar.text, overrides=_JSON_STYLE))
            case "regex":
                return str(matcher.grammar_from_regex(grammar.text))
            case "lark":
                return str(matcher.grammar_from_lark(grammar.text))
    except ValueError as error:
        raise RemoteProtocolError(f"the grammar cannot be used: {str(error)[:300]}") from error


def _limits() -> Any:
    return _library().LLParserLimits(
        initial_lexer_fuel=_FUEL_INITIAL,
        step_lexer_fuel=_FUEL_STEP,
        step_max_items=_ITEMS_STEP,
        max_lexer_states=_LEXER_STATES_MAX,
        max_grammar_size=_GRAMMAR_SIZE_MAX,
    )


class _Tokens:
    """A tokenizer as llguidance wants it."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = tokenizer.end_ids[0] if tokenizer.end_ids else size - 1
        raw = [tokenizer.token_bytes(token) for token in range(size)]
        # Ids without bytes (special, or unused) need distinct names that no text has.
        self.tokens = [piece or b"\xff<%d>" % token for token, piece in enumerate(raw)]
        self.special_token_ids = [token for token, piece in enumerate(raw) if not piece]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, begin=False)


def _tokens_of(tokenizer: Tokenizer, size: int) -> Any:
    llguidance = _library()
    wrapper = llguidance.TokenizerWrapper(_Tokens(tokenizer, size))
    ends = list(tokenizer.end_ids) or None
    return llguidance.LLTokenizer(wrapper, n_vocab=size, eos_token=ends)


def _library() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ConfigError(
            "constrained answers need llguidance, which is not installed",
            remedy="pip install 'plait[node]'",
        ) from error
    return llguidance
