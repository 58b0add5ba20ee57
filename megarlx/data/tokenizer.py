"""Tokenizers behind one small interface: any tokenizer.json, bytes, or a list of words.

The last two need no file and no download. Each can be written as JSON with a run and read back
from it, so that a run never depends on a file somewhere else.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Engine

EOS = "<eos>"
NO_TEXT = "\ufffd"
RESERVED = re.compile(r"<reserved_(\d+)>")  # how a template writes an id that no text has
# Of SentencePiece: a text's beginning is written as if a space stood there, what follows is not.
FIRST, NEVER = '"prepend_scheme": "first"', '"prepend_scheme": "never"'
# Looked for, in this order, where nothing says which token ends a document.
USUAL_EOS = (
    *("<|endoftext|>", "<eos>", "</s>", "<|end_of_text|>", "<|eos|>", "<|im_end|>", "[SEP]"),
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be read, or text it has no ids for."""


class Tokenizer(ABC):
    """Text to ids and back. `specials` says whether "<eos>" and the like, written out in the text,
    become their ids: never in documents, which could otherwise end themselves in the middle.
    `inside`: other tokens stand before the text, which some tokenizers write differently."""

    kind: ClassVar[str]
    name: str
    vocab_size: int
    eos_id: int
    bos_id: int | None = None  # begins a document, where the tokenizer itself writes one there
    reserved = 0  # ids from vocab_size on that only templates can write; the model has them

    @abstractmethod
    def encode(self, text: str, specials: bool = False, *, inside: bool = False) -> list[int]: ...

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str: ...

    def decode_sampled(self, ids: Sequence[int]) -> str:
        """Of what a model drew: its vocabulary may be the larger one (padded up to a round
        number, say), and an id that has no text becomes U+FFFD."""
        parts: list[str] = []
        for known, run in itertools.groupby(ids, key=lambda i: 0 <= i < self.vocab_size):
            held = list(run)
            parts.append(self.decode(held) if known else NO_TEXT * len(held))
        return (" " if self.kind == "words" else "").join(parts)

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """All that is needed to build this tokenizer again, as JSON values."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    @cached_property
    def fingerprint(self) -> str:
        content = {"kind": self.kind, "definition": self.definition()}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "name": self.name,
            "fingerprint": self.fingerprint,
            "definition": self.definition(),
        }

    def save(self, path: str | Path) -> None:
        text = json.dumps(self.to_json(), ensure_ascii=False, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def begun(self, ids: list[int]) -> list[int]:
        """As they stand at the beginning of a document, whose first token is written once."""
        begins = self.bos_id is not None and ids[:1] != [self.bos_id]
        return [self.bos_id, *ids] if begins else ids  # type: ignore[list-item]

    @property
    def start_id(self) -> int:
        """Stands before the first token of a document: what begins it, or ended the one before."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode_frame(self, text: str, *, inside: bool = False) -> list[int]:
        """Of a template's own text: special and reserved tokens written out become their ids."""
        ids: list[int] = []
        for at, part in enumerate(RESERVED.split(text)):  # every second one is a number
            if at % 2:
                ids.append(self._reserved_id(int(part)))
            elif part:
                ids += self.encode(part, specials=True, inside=inside or at > 0)
        return ids

    def _reserved_id(self, number: int) -> int:
        if number >= self.reserved:
            names = [f"<reserved_{i}>" for i in range(self.reserved)]
            raise TokenizerError(
                f"tokenizer {self.name}: a template writes <reserved_{number}>; the model has "
                f"{', '.join(names) or 'none'}: see data.reserved_tokens"
            )
        return self.vocab_size + number

    def has_frame(self, text: str) -> bool:
        """Whether a template's text writes out a special or a reserved token."""
        return bool(RESERVED.search(text)) or self.has_specials(text)

    @property
    def eos_text(self) -> str:
        """How the end of a document is written out."""
        return EOS

    @property
    def bos_text(self) -> str:
        """How the beginning of a document is written out; "" where nothing stands there."""
        return "" if self.bos_id is None else self.decode([self.bos_id])

    @property
    def special_texts(self) -> tuple[str, ...]:
        """Texts that `specials` makes one id."""
        return (EOS,)

    def has_specials(self, text: str) -> bool:
        """Whether the text writes out a special token."""
        return self.encode(text, specials=True) != self.encode(text)

    def takes_space(self, special: str) -> tuple[bool, bool]:
        """Whether a special token takes the white space before it, and behind it."""
        return False, False

    def _ids(self, ids: Iterable[int]) -> list[int]:
        found = [int(i) for i in ids]
        for i in found:
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(
                    f"tokenizer {self.name}: id {i}; allowed 0 to {self.vocab_size - 1}"
                )
        return found


class ByteTokenizer(Tokenizer):
    """Ids 0 to 255 are the bytes of UTF-8, 256 ends a document."""

    kind = "bytes"
    name = "bytes"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str, specials: bool = False, *, inside: bool = False) -> list[int]:
        if not specials or EOS not in text:
            return list(text.encode())
        first, *rest = text.split(EOS)
        ids = list(first.encode())
        for part in rest:
            ids += [self.eos_id, *part.encode()]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """What is no valid UTF-8 (a model may sample anything) becomes U+FFFD."""
        parts: list[bytes] = [b""]
        for i in self._ids(ids):
            parts[-1] += bytes([i]) if i < 256 else EOS.encode()
        return parts[0].decode(errors="replace")

    def definition(self) -> dict[str, Any]:
        return {}


class WordTokenizer(Tokenizer):
    """One id a word, words separated by white space: for small synthetic worlds.

    Id 0 ends a document, the words follow in their order. A word that is not in the list is an
    error: in a closed world it is a mistake of whoever wrote the text.
    """

    kind = "words"

    def __init__(self, words: Sequence[str], name: str = "words") -> None:
        self.name = name
        self.words = tuple(words)
        self._id = {word: i for i, word in enumerate((EOS, *self.words))}
        self.vocab_size = len(self.words) + 1
        self.eos_id = 0
        for word in self.words:
            if word.split() != [word] or word == EOS:
                raise TokenizerError(
                    f"tokenizer {name}: word {word!r}; a word has no white space and is not {EOS}"
                )
        if len(self._id) != self.vocab_size:
            twice = sorted({w for w in self.words if self.words.count(w) > 1})
            raise TokenizerError(f"tokenizer {name}: words listed twice: {', '.join(twice)}")

    def encode(self, text: str, specials: bool = False, *, inside: bool = False) -> list[int]:
        words = text.split()
        try:
            ids = [self._id[word] for word in words]
        except KeyError as error:
            raise TokenizerError(
                f"tokenizer {self.name}: {error.args[0]!r} is not among its {len(self.words)} words"
            ) from None
        if not specials and self.eos_id in ids:
            raise TokenizerError(f"tokenizer {self.name}: the text contains {EOS}")
        return ids

    def has_specials(self, text: str) -> bool:
        return EOS in text.split()

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i - 1] if i else EOS for i in self._ids(ids))

    def definition(self) -> dict[str, Any]:
        return {"words": list(self.words)}


class FileTokenizer(Tokenizer):
    """Any tokenizer.json of the tokenizers library."""

    kind = "tokenizers"

    def __init__(self, definition: dict[str, Any], eos: str | None, name: str) -> None:
        self.name = name
        # Special tokens keep their text in both; only `_with_specials` turns them into ids.
        self._plain, self._with_specials = self._engines(definition)
        self._inside = self._plain, self._with_specials
        if FIRST in (text := json.dumps(definition)):
            self._inside = self._engines(json.loads(text.replace(FIRST, NEVER)))
        # Ids may have gaps: what counts is the largest.
        vocabulary = self._plain.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._definition = definition
        self.eos = eos if eos is not None else self._usual_eos(vocabulary)
        if self.eos not in vocabulary:
            raise TokenizerError(f"tokenizer {name}: its eos {self.eos!r} is not in its vocabulary")
        self.eos_id = vocabulary[self.eos]
        self.bos_id = self._own_bos()

    def _engines(self, definition: dict[str, Any]) -> tuple[Engine, Engine]:
        from tokenizers import Tokenizer as Engine

        text = json.dumps(definition)
        try:
            plain, with_specials = Engine.from_str(text), Engine.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(f"tokenizer {self.name}: not a tokenizer.json: {error}") from error
        for engine in (plain, with_specials):
            engine.no_truncation()
            engine.no_padding()
        plain.encode_special_tokens = True
        return plain, with_specials

    def _own_bos(self) -> int | None:
        """What its post-processor puts before a text: Llama 3 and Gemma are nothing without it."""
        text, whole = (self._plain.encode("a", add_special_tokens=told) for told in (False, True))
        return whole.ids[0] if text.ids and whole.ids[0] != text.ids[0] else None

    def _usual_eos(self, vocabulary: dict[str, int]) -> str:
        for token in USUAL_EOS:
            if token in vocabulary:
                return token
        added = [str(t["content"]) for t in self._definition.get("added_tokens") or []]
        raise TokenizerError(
            f"tokenizer {self.name}: which token ends a document is not said, and none of "
            f"{', '.join(USUAL_EOS)} is there; name one (its special tokens: {', '.join(added)})"
        )

    def encode(self, text: str, specials: bool = False, *, inside: bool = False) -> list[int]:
        plain, with_specials = self._inside if inside else (self._plain, self._with_specials)
        engine = with_specials if specials else plain
        return engine.encode(text, add_special_tokens=False).ids

    @property
    def eos_text(self) -> str:
        return self.eos

    @property
    def special_texts(self) -> tuple[str, ...]:
        added = self._definition.get("added_tokens") or []
        return tuple(str(t["content"]) for t in added if t.get("special"))

    def takes_space(self, special: str) -> tuple[bool, bool]:
        return self._spaces.get(special, (False, False))

    @cached_property
    def _spaces(self) -> dict[str, tuple[bool, bool]]:
        added = self._definition.get("added_tokens") or []
        flags = {str(t["content"]): (bool(t.get("lstrip")), bool(t.get("rstrip"))) for t in added}
        return {text: both for text, both in flags.items() if any(both)}

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._plain.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self._plain.decode(self._ids(ids), skip_special_tokens=False)

    def definition(self) -> dict[str, Any]:
        return {"eos": self.eos, "tokenizer": self._definition}


def load_tokenizer(source: str | Path, eos: str | None = None) -> Tokenizer:
    """`bytes`, a tokenizer saved with a run, a tokenizer.json, a folder that holds one, or a text
    file with one word a line (its name ends in .words)."""
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise TokenizerError(
            f"tokenizer '{source}': no such file; allowed are 'bytes', a tokenizer.json or its "
            "folder, a tokenizer saved with a run, and a list of words (NAME.words)"
        )
    if path.suffix == ".words":
        return WordTokenizer(path.read_text(encoding="utf-8").split("\n")[:-1], path.stem)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer {path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise TokenizerError(f"tokenizer {path}: holds a {type(found).__name__}, not an object")
    if "kind" in found and "definition" in found:
        return tokenizer_from_json(found, str(path))
    name = path.parent.name if path.name == "tokenizer.json" else path.stem
    return FileTokenizer(found, eos or _eos_beside(path), name)


def tokenizer_from_json(saved: dict[str, Any], where: str = "saved tokenizer") -> Tokenizer:
    kind, definition = saved.get("kind"), saved.get("definition")
    name = str(saved.get("name"))
    if not isinstance(definition, dict):
        raise TokenizerError(f"{where}: definition is {type(definition).__name__}, not an object")
    tokenizer: Tokenizer
    if kind == "bytes":
        tokenizer = ByteTokenizer()
    elif kind == "words":
        tokenizer = WordTokenizer(_words_of(definition, where), name)
    elif kind == "tokenizers":
        held, eos = definition.get("tokenizer"), definition.get("eos")
        if not isinstance(held, dict) or not isinstance(eos, str):
            raise TokenizerError(f"{where}: its definition has no tokenizer and eos")
        tokenizer = FileTokenizer(held, eos, name)
    else:
        raise TokenizerError(f"{where}: kind is {kind!r}; allowed are bytes, words, tokenizers")
    if saved.get("fingerprint") != tokenizer.fingerprint:
        raise TokenizerError(
            f"{where}: fingerprint is {saved.get('fingerprint')}; its content gives "
            f"{tokenizer.fingerprint}: the file was changed"
        )
    return tokenizer


def _words_of(definition: dict[str, Any], where: str) -> list[str]:
    words = definition.get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise TokenizerError(f"{where}: its words are {words!r:.80}; expected a list of texts")
    return words


def _eos_beside(path: Path) -> str | None:
    """What the tokenizer_config.json in the same folder calls eos_token, if it is there."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"tokenizer {config}: not JSON: {error}") from error
    eos = found.get("eos_token") if isinstance(found, dict) else found
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos is not None and not isinstance(eos, str):
        raise TokenizerError(f"tokenizer {config}: eos_token is {eos!r:.80}; expected a text")
    return eos
