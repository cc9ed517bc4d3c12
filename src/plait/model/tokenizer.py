"""Text to token ids and back, from a GGUF file's own metadata, offline.

Byte-level BPE (``gpt2`` in GGUF terms) through the ``tokenizers`` library, without torch
or transformers. Building it takes 0.2 s for 49 000 tokens; reading a cached
``tokenizer.json`` takes 0.15 s, so there is no cache that could go stale.
"""

import codecs
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, NoReturn, Self

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from plait.errors import ConfigError, ModelError
from plait.model.byte_level import to_bytes
from plait.model.gguf_reader import GgufFile
from plait.model.literal import Disguise, disguise, pattern_of
from plait.model.local import LocalModel
from plait.model.manifest import tokenizer_digest

if TYPE_CHECKING:
    import jinja2

_CONTROL, _USER_DEFINED = 3, 4
# Names under which models end an answer, besides the declared end token.
_END_NAMES = frozenset({"<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>"})
_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a tokenizer needs beside its vocabulary and merges."""

    chat_template: str
    begin_id: int | None
    begin_token: str
    end_token: str
    end_ids: tuple[int, ...]


class Tokenizer:
    """Encodes, decodes and formats chats. Use ``load`` or ``from_gguf``."""

    def __init__(self, backend: tokenizers.Tokenizer, facts: Facts) -> None:
        self._backend = backend
        self._facts = facts
        self._added: dict[int, Any] = backend.get_added_tokens_decoder()
        self._special = {
            token: str(one.content) for token, one in self._added.items() if one.special
        }
        self._names = pattern_of(self._special.values())

    @classmethod
    def load(cls, local: LocalModel) -> Self:
        """The tokenizer of a model. Raises ``ModelError`` if the weights file has another
        than the manifest promises, or one of a kind not known."""
        with GgufFile.open(local.weights_path) as gguf:
            if tokenizer_digest(gguf) != local.manifest.tokenizer_sha256:
                raise ModelError(
                    f"the tokenizer in {local.weights_path} is not the manifest's",
                    remedy=f"plait models pull {local.name} --force",
                )
            return cls.from_gguf(gguf)

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Self:
        """Build from metadata. Raises ``ModelError`` for a kind of tokenizer not known."""
        backend = _build(gguf)
        return cls(backend, _facts(gguf, backend))

    @property
    def vocabulary_size(self) -> int:
        """Ids are in ``range(vocabulary_size)``."""
        return int(self._backend.get_vocab_size())

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer, ascending."""
        return self._facts.end_ids

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Ids of a text, with the begin token if the model wants one and ``begin``. Names of
        special tokens in the text become those tokens."""
        first = [self._facts.begin_id] if begin and self._facts.begin_id is not None else []
        return first + self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream()
        return "".join(stream.push(token) for token in ids) + stream.flush()

    def stream(self) -> "TextStream":
        """A decoder for ids that come one by one."""
        return TextStream(self)

    @property
    def template_takes_tools(self) -> bool:
        """Whether the model's own format knows tools and calls of them."""
        return "tools" in self._facts.chat_template

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Ids of a conversation in the model's own format, ready for the answer.

        Each message has ``role`` and ``content``. ``tools``, and ``tool_calls`` of messages,
        are for a template that takes them. Raises ``ConfigError`` if a message has no
        content, if the model has no chat template, or if the template refuses.

        Only the template's own markers become special tokens: their names in the messages and
        tools are read as the text that they are.
        """
        hidden = disguise([messages, tools], self._names)
        if hidden is None:
            return self._encode(self.chat_text(messages, tools))
        return self._encode_apart(self.chat_text(hidden.on(messages), hidden.on(tools)), hidden)

    def chat_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation in the model's own format."""
        for message in messages:
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ConfigError("a chat message needs a role and a content, both texts")
        if not self._facts.chat_template:
            raise ConfigError("this model has no chat template", remedy="give raw text: `raw`")
        return _render(self._facts, [dict(message) for message in messages], tools)

    def token_bytes(self, token: int) -> bytes:
        """The bytes an id stands for; none for a special or unknown id."""
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else str(added.content).encode()
        name = self._backend.id_to_token(token)
        if name is None:
            return b""
        raw = to_bytes(name)
        return name.encode() if raw is None else raw

    def _encode(self, text: str) -> list[int]:
        return list(self._backend.encode(_whole(text), add_special_tokens=False).ids)

    def _encode_apart(self, text: str, hidden: Disguise) -> list[int]:
        """Ids of a text whose special tokens are markers, and what lies between them is text."""
        text, ids, at = _whole(text), list[int](), 0

        def read_to(end: int) -> list[int]:
            part = hidden.off(text[at:end])
            return list(self._plain.encode(part, add_special_tokens=False).ids)

        found = self._backend.encode(text, add_special_tokens=False)
        for token, (start, end) in zip(found.ids, found.offsets, strict=True):
            if token in self._special:
                ids += [*read_to(start), token]
                at = end
        return ids + read_to(len(text))

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, but it knows no special token."""
        plain = tokenizers.Tokenizer(self._backend.model)
        plain.pre_tokenizer = self._backend.pre_tokenizer
        plain.add_tokens([one for one in self._added.values() if not one.special])
        return plain


def _whole(text: str) -> str:
    """The text without lone surrogates: the library would panic on what is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


class TextStream:
    """Turns ids into text piece by piece and never emits half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that becomes certain with this id, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, usually nothing."""
        return self._utf8.decode(b"", final=True)


def _build(gguf: GgufFile) -> tokenizers.Tokenizer:
    kind = gguf.text("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelError(f"{gguf.path} has a {kind!r} tokenizer; gpt2 (byte-level BPE) exists")
    names = gguf.texts("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.texts("tokenizer.ggml.merges")]
    try:
        model = models.BPE({name: index for index, name in enumerate(names)}, merges)  # type: ignore[arg-type]
    except Exception as error:  # the library raises bare Exception on bad merges
        raise ModelError(f"{gguf.path} has a broken vocabulary: {error}") from error
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _pre_tokenizer(gguf)
    backend.decoder = decoders.ByteLevel()
    special, plain = [], []
    for name, code in zip(names, gguf.integers("tokenizer.ggml.token_type"), strict=False):
        if code == _CONTROL:
            special.append(AddedToken(name, normalized=False, special=True))
        elif code == _USER_DEFINED:
            plain.append(AddedToken(name, normalized=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
    return backend


def _pre_tokenizer(gguf: GgufFile) -> pre_tokenizers.PreTokenizer:
    """Split text as the vocabulary's merges were learned."""
    kind = gguf.text("tokenizer.ggml.pre", "default")
    if kind in ("gpt2", "gpt-2", "default"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        # As the model's own tokenizer does: each digit stands alone before GPT-2's rule.
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    split = {"llama-bpe": _LLAMA3_SPLIT, "llama3": _LLAMA3_SPLIT, "qwen2": _QWEN2_SPLIT}.get(kind)
    if split is None:
        raise ModelError(f"{gguf.path} has pre-tokenizer {kind!r}, which is not known")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _facts(gguf: GgufFile, backend: tokenizers.Tokenizer) -> Facts:
    def name_of(key: str) -> tuple[int | None, str]:
        token = gguf.integer(f"tokenizer.ggml.{key}_token_id", -1)
        return (token, backend.id_to_token(token) or "") if token >= 0 else (None, "")

    begin_id, begin_token = name_of("bos")
    end_id, end_token = name_of("eos")
    turn_id, _ = name_of("eot")
    named = {backend.token_to_id(name) for name in _END_NAMES}
    ends = {token for token in {end_id, turn_id} | named if token is not None}
    return Facts(
        chat_template=gguf.text("tokenizer.chat_template", ""),
        begin_id=begin_id if gguf.flag("tokenizer.ggml.add_bos_token", False) else None,
        begin_token=begin_token,
        end_token=end_token,
        end_ids=tuple(sorted(ends)),
    )


@lru_cache(maxsize=16)
def _template(source: str) -> "jinja2.Template":
    """Compile a chat template in a sandbox; raises ``jinja2.TemplateError``."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    template = environment.from_string(source)
    # Copied at each rendering: from a plain dictionary in a tenth of the time.
    template.globals = dict(template.globals)
    return template


def _render(
    facts: Facts, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> str:
    from jinja2 import TemplateError  # 50 ms that only chats need

    try:
        return _template(facts.chat_template).render(
            messages=messages,
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True,
            bos_token=facts.begin_token,
            eos_token=facts.end_token,
        )
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise ConfigError(f"the model's chat template refuses these messages: {error}") from error


def _refuse(message: str) -> NoReturn:
    raise ConfigError(f"the model's chat template refuses: {message}")
