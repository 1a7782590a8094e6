"""The text side of a model's folder in Hugging Face's layout: tokenizer.json and the files beside it.

tokenizer.json runs on the package that it was written for, `tokenizers`, after what must not come from users'
text has been taken out: the control tokens, which only a template may write (special_tokens.py). What it does
to a text takes time linear in it, whatever the file says: its expressions are checked (patterns.py), and
nothing that it puts in place of something else is longer.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeGuard

from tokenizers import Tokenizer as RustTokenizer

from ktransformers.engine.weights.files import FolderError, read_json, read_text
from ktransformers.server.text.patterns import PatternError, check_linear
from ktransformers.server.text.pretokenizers import PRE_TOKENIZERS
from ktransformers.server.text.special_tokens import Matching
from ktransformers.server.text.vocabulary import (
    MAX_TOKENS,
    TokenType,
    Vocabulary,
    VocabularyError,
    check_tokens,
    find_end_ids,
    is_byte_token,
)

_TOKENIZER: Final = "tokenizer.json"
_MAX_TOKENIZER: Final = 96 * 2**20
_MAX_CONFIG: Final = 16 * 2**20
_MAX_TEMPLATE: Final = 2**20
_SPACE: Final = "\u2581"
_MAX_STEPS: Final = 32
"""Steps of a normalizer or pre-tokenizer; each goes over the whole text."""
_MAX_PREFIX: Final = 16
_HIDDEN: Final = (TokenType.CONTROL, TokenType.UNKNOWN)
_KNOWN_PATTERNS: Final = frozenset(p for pre in PRE_TOKENIZERS.values() for p in pre.patterns)

Json = Mapping[str, object]


@dataclass(frozen=True)
class FolderText:
    """What a folder says of text."""

    vocabulary: Vocabulary
    rust: RustTokenizer
    inner: RustTokenizer | None
    """Encodes text that follows a token, where that differs from the beginning of a text."""
    template: str | None
    config: Json
    """config.json."""


def read_folder_text(path: Path) -> FolderText:
    """Raises FolderError, VocabularyError. Blocks for 0.1 to 3 s, by the size of the vocabulary."""
    document = read_json(path, _TOKENIZER, _MAX_TOKENIZER)
    if document is None:
        raise FolderError(f"{path / _TOKENIZER}: missing: the folder holds no tokenizer")
    config = read_json(path, "config.json", _MAX_CONFIG) or {}
    settings = read_json(path, "tokenizer_config.json", _MAX_CONFIG) or {}
    generation = read_json(path, "generation_config.json", _MAX_CONFIG) or {}
    ids = _Ids(document, config, settings, generation)
    vocabulary = ids.vocabulary()
    _check_steps(document)
    try:
        rust = _build(_for_users(document, vocabulary))
        first = _prefix_scheme(document) == "first"
        inner = _build(_inside(_for_users(document, vocabulary))) if first else None
    except FolderError as e:
        raise FolderError(f"{path / _TOKENIZER}: {e}") from None
    return FolderText(vocabulary, rust, inner, _template(path, settings), config)


def _build(document: Json) -> RustTokenizer:
    try:
        return RustTokenizer.from_str(json.dumps(document))
    except Exception as e:
        raise FolderError(f"not a tokenizer: {str(e)[:200]!a}") from None
    except BaseException as e:
        # What a panic of the Rust package becomes; it is no Exception.
        if type(e).__name__ != "PanicException":
            raise
        raise FolderError("not a tokenizer: the package that reads it fails") from None


def _object(value: object, where: str) -> Json:
    if not isinstance(value, dict):
        raise VocabularyError(f"tokenizer.json: {where}: not an object")
    return value


def _kinds(value: object) -> list[Json]:
    """A normalizer, pre-tokenizer, decoder or post-processor, with those of a Sequence one by one."""
    if not isinstance(value, dict):
        return []
    if value.get("type") != "Sequence":
        return [value]
    fields = ("normalizers", "pretokenizers", "decoders", "processors")
    inner: object = next((value[field] for field in fields if field in value), [])
    return [kind for part in inner for kind in _kinds(part)] if isinstance(inner, list) else []


def _prefix_scheme(document: Json) -> str:
    """Where a space is put before text: "never", "first" (only at the very beginning) or "always"."""
    for kind in _kinds(document.get("normalizer")):
        if kind.get("type") == "Prepend":
            return "always"
    for kind in _kinds(document.get("pre_tokenizer")):
        if kind.get("type") == "Metaspace":
            scheme = kind.get("prepend_scheme", "always" if kind.get("add_prefix_space", True) else "never")
            return scheme if isinstance(scheme, str) else "always"
    return "never"


def _check_steps(document: Json) -> None:
    """Raises VocabularyError for a step that may take more than time linear in the text, or make it grow."""
    for field in ("normalizer", "pre_tokenizer"):
        steps = _kinds(document.get(field))
        if len(steps) > _MAX_STEPS:
            raise VocabularyError(f"tokenizer.json: {field}: more than {_MAX_STEPS} steps")
        for step in steps:
            _check_step(step, f"tokenizer.json: {field}: {step.get('type')!a:.40}")


def _check_step(step: Json, where: str) -> None:
    pattern = step.get("pattern")
    shortest = 1
    if isinstance(pattern, dict):
        expression, plain = pattern.get("Regex"), pattern.get("String")
        if isinstance(expression, str) and expression not in _KNOWN_PATTERNS:
            try:
                check_linear(expression)
            except PatternError as e:
                raise VocabularyError(f"{where}: the expression {expression[:80]!a} {e}") from None
        if isinstance(plain, str):
            shortest = len(plain)
            if not plain:
                raise VocabularyError(f"{where}: an empty pattern")
    content = step.get("content")
    if step.get("type") == "Replace" and isinstance(content, str) and len(content) > shortest:
        raise VocabularyError(f"{where}: {content[:40]!a} is longer than what it replaces: not supported")
    prefix = step.get("prepend")
    if isinstance(prefix, str) and len(prefix) > _MAX_PREFIX:
        raise VocabularyError(f"{where}: more than {_MAX_PREFIX} characters")


class _Ids:
    """Tokens by id, and what the files say of them."""

    def __init__(self, document: Json, config: Json, settings: Json, generation: Json) -> None:
        self.document = document
        self.config = config
        self.settings = settings
        self.generation = generation
        self.model = _object(document.get("model"), "model")
        kind = self.model.get("type", "BPE")
        if kind != "BPE":
            raise VocabularyError(f"tokenizer.json: model: {kind!a:.40} is not supported (BPE is)")
        if self.model.get("dropout"):
            raise VocabularyError("tokenizer.json: model: dropout is not supported")
        self.byte_level = any(
            kind.get("type") == "ByteLevel"
            for field in ("pre_tokenizer", "decoder")
            for kind in _kinds(document.get(field))
        )
        self.texts, self.types = self._texts()

    def _texts(self) -> tuple[list[str], list[int]]:
        vocabulary = _object(self.model.get("vocab"), "model: vocab")
        by_id: dict[int, tuple[str, TokenType]] = {}
        for text, number in vocabulary.items():
            kind = TokenType.NORMAL
            if not self.byte_level and is_byte_token(text):
                kind = TokenType.BYTE
            elif text == self.model.get("unk_token"):
                kind = TokenType.UNKNOWN
            if not _is_id(number) or number in by_id:
                raise VocabularyError(f"tokenizer.json: model: vocab: {text[:40]!a} has no id of its own")
            by_id[number] = (text, kind)
        for added in self._added():
            number, content = added.get("id"), added.get("content")
            known = by_id.get(number) if _is_id(number) else None
            if (
                not _is_id(number)
                or not isinstance(content, str)
                or (known and known[0] != content)
                or vocabulary.get(content, number) != number
            ):
                what = f"{str(content)[:40]!a} has no id of its own"
                raise VocabularyError(f"tokenizer.json: added_tokens: {what}")
            kind = TokenType.CONTROL if added.get("special") is True else TokenType.USER_DEFINED
            if known is None or known[1] != TokenType.UNKNOWN:
                by_id[number] = (content, kind)
        if not by_id:
            raise VocabularyError("tokenizer.json: model: vocab: is empty")
        # Embeddings are padded; so is the list, with tokens that nothing writes.
        size = self._rows(max(by_id) + 1)
        unused = TokenType.UNUSED
        texts = [by_id.get(i, (f"[PAD{i}]", unused)) for i in range(size)]
        tokens = [text for text, _ in texts]
        check_tokens(tokens)
        return tokens, [int(kind) for _, kind in texts]

    def _added(self) -> list[Json]:
        added = self.document.get("added_tokens") or []
        if not isinstance(added, list) or len(added) > MAX_TOKENS:
            raise VocabularyError("tokenizer.json: added_tokens: not an array")
        return [_object(token, "added_tokens") for token in added]

    def matching(self) -> dict[str, Matching]:
        """How the control tokens are looked for."""
        found = {}
        for added in self._added():
            content = added.get("content")
            number = added.get("id")
            if not _is_id(number) or not isinstance(content, str):
                continue
            where = f"tokenizer.json: added_tokens: {content[:40]!a}"
            if self.types[number] in _HIDDEN:
                found[content] = self._matching(added, where)
            elif added.get("single_word") is not False:
                # The package looks for it in what lies between control tokens, and would not see those.
                raise VocabularyError(f"{where}: single_word is supported for special tokens only")
        return {content: how for content, how in found.items() if how != Matching()}

    def _matching(self, added: Json, where: str) -> Matching:
        flags = {"lstrip": False, "rstrip": False, "single_word": False}
        flags["normalized"] = added.get("special") is not True
        for name, default in flags.items():
            value = added.get(name, default)
            if not isinstance(value, bool):
                raise VocabularyError(f"{where}: {name}: neither true nor false")
            flags[name] = value
        late = flags.pop("normalized")
        if late and self.document.get("normalizer") is not None:
            # It would be looked for in text of which the normalizer has made something else.
            what = "is not supported beside a normalizer; false is what chat models mean"
            raise VocabularyError(f"{where}: normalized: true {what}")
        return Matching(**flags, late=late)

    def _rows(self, least: int) -> int:
        inner = self.config.get("text_config")
        values = (self.config.get("vocab_size"), inner.get("vocab_size") if isinstance(inner, dict) else None)
        rows = next((v for v in values if v is not None), least)
        if type(rows) is not int or not least <= rows <= MAX_TOKENS:
            what = f"{rows!a:.40} for tokenizer.json's {least} tokens"
            raise VocabularyError(f"config.json: vocab_size: {what}")
        return rows

    def _named(self, name: str) -> int | None:
        """The id of tokenizer_config.json's bos_token, ... ; where that file is missing, config.json's."""
        value = self.settings.get(f"{name}_token")
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            number = None if self.settings else self.config.get(f"{name}_token_id")
            return number if _is_id(number) and number < len(self.texts) else None
        if value not in self.texts:
            raise VocabularyError(f"tokenizer_config.json: {name}_token: {str(value)[:40]!a} is no token")
        return self.texts.index(value)

    def _ends(self) -> set[int]:
        """What config.json and generation_config.json say ends a generation."""
        ends: set[int] = set()
        for where, file in (("config.json", self.config), ("generation_config.json", self.generation)):
            value = file.get("eos_token_id")
            for number in value if isinstance(value, list) else [] if value is None else [value]:
                if not _is_id(number) or number >= len(self.texts):
                    raise VocabularyError(f"{where}: eos_token_id: {number!r:.40} is not the id of a token")
                ends.add(number)
        return ends

    def _around(self, eos: int | None) -> tuple[list[int], list[int]]:
        """Ids that the post-processor puts before and after a text."""
        before: list[int] = []
        after: list[int] = []
        for kind in _kinds(self.document.get("post_processor")):
            if kind.get("type") == "ByteLevel":
                continue
            single = kind.get("single")
            if kind.get("type") != "TemplateProcessing" or not isinstance(single, list):
                what = f"{kind.get('type')!a:.40} is not supported"
                raise VocabularyError(f"tokenizer.json: post_processor: {what}")
            out = before
            for part in single:
                special = part.get("SpecialToken") if isinstance(part, dict) else None
                if not isinstance(special, dict):
                    out = after
                elif special.get("id") in self.texts:
                    out.append(self.texts.index(special["id"]))
        return before, after

    def vocabulary(self) -> Vocabulary:
        bos, eos = self._named("bos"), self._named("eos")
        named = self._ends() | ({eos} if eos is not None else set())
        end_ids = find_end_ids(self.texts, self.types, named)
        for i in end_ids:
            self.types[i] = TokenType.CONTROL
        before, after = self._around(eos)
        if before not in ([], [bos]) or after not in ([], [eos]):
            raise VocabularyError("tokenizer.json: post_processor: writes other tokens than bos and eos")
        return Vocabulary(
            model="gpt2" if self.byte_level else "llama",
            pre="",
            tokens=self.texts,
            types=self.types,
            scores=None,
            merges=[],
            bos_id=bos,
            eos_id=eos,
            eot_id=None,
            unk_id=None,
            pad_id=None,
            add_bos=_flag(self.settings, "add_bos_token", bool(before)),
            add_eos=_flag(self.settings, "add_eos_token", bool(after)),
            add_space_prefix=not self.byte_level and _prefix_scheme(self.document) != "never",
            end_ids=end_ids,
            matching=self.matching(),
        )


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < MAX_TOKENS


def _flag(settings: Json, name: str, default: bool) -> bool:
    value = settings.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise VocabularyError(f"tokenizer_config.json: {name}: neither true nor false")
    return value


def _for_users(document: Json, vocabulary: Vocabulary) -> dict[str, object]:
    """The tokenizer without control tokens and without what is done around a text."""
    hidden = {
        text for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True) if kind in _HIDDEN
    }
    model = dict(_object(document.get("model"), "model"))
    unknown = model.get("unk_token")
    added = _without(document.get("added_tokens"), hidden)
    vocab = {
        text: number
        for text, number in _object(model.get("vocab"), "model: vocab").items()
        if text not in hidden or text == unknown
    }
    # The package numbers added tokens anew, but for those that the model knows.
    model["vocab"] = vocab | {str(token.get("content")): token.get("id") for token in added}
    merges = model.get("merges", [])
    if not isinstance(merges, list):
        raise VocabularyError("tokenizer.json: model: merges: not an array")
    model["merges"] = [merge for merge in merges if _makes(merge) not in hidden]
    return {
        **document,
        "model": model,
        "added_tokens": added,
        "post_processor": None,
        "decoder": None,
        "truncation": None,
        "padding": None,
    }


def _without(added: object, hidden: set[str]) -> list[Json]:
    tokens = added if isinstance(added, list) else []
    return [token for token in tokens if token.get("content") not in hidden]


def _makes(merge: object) -> str:
    """The token that a merge makes: "left right", or [left, right]."""
    if isinstance(merge, list):
        return "".join(str(part) for part in merge)
    return str(merge).replace(" ", "", 1)


def _inside(document: dict[str, object]) -> dict[str, object]:
    """The same for text that does not begin a prompt: Metaspace then puts no space before it."""
    text = json.dumps(document["pre_tokenizer"])
    text = text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return {**document, "pre_tokenizer": json.loads(text)}


def _template(path: Path, settings: Json) -> str | None:
    """The file of its own comes first; of several in tokenizer_config.json the one called "default"."""
    text = read_text(path, "chat_template.jinja", _MAX_TEMPLATE)
    if text is not None:
        return text
    value = settings.get("chat_template")
    if isinstance(value, list):
        named = [t for t in value if isinstance(t, dict) and t.get("name") == "default"]
        value = named[0].get("template") if named else None
    if value is not None and not isinstance(value, str):
        raise VocabularyError("tokenizer_config.json: chat_template: not a string")
    return value
