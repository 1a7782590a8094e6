"""Text to token ids and back, from the vocabulary of a GGUF file or a tokenizer.json.

Two kinds of vocabulary: byte-level BPE (`tokenizer.ggml.model` "gpt2": words found by a regex, bytes written
as printable characters, ranked merges) and SentencePiece BPE ("llama": the text as a whole, merges by the
score of what they make, bytes for what is not in the vocabulary). Both run on the Rust package `tokenizers`.
"""

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer

from ktransformers.server.text.detokenizer import Detokenizer
from ktransformers.server.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from ktransformers.server.text.special_tokens import MAX_LENGTH, SpecialTokens
from ktransformers.server.text.vocabulary import TokenType, Vocabulary, VocabularyError

_SPACE: Final = "\u2581"
"""What SentencePiece writes for a space."""
_PART: Final = 2**16
"""Characters that are encoded at once while it is not known whether a text fits."""
_HIDDEN: Final = frozenset({TokenType.CONTROL, TokenType.UNKNOWN})


class TooLongError(ValueError):
    """The text has more tokens than the caller allows."""


class Tokenizer:
    """One model's vocabulary. Immutable; all methods may be called from any thread.

    Attributes:
        vocab_size: Number of ids.
        bos_id, eos_id: Beginning and end of sequence, or None.
        add_bos, add_eos: Whether the model wants them around a prompt (see encode_prompt).
        eog_ids: Tokens that end generation.
        special_tokens: The control tokens.
        add_space_prefix: Text that follows no text gets a space that decoding removes (SentencePiece).
        longest: Bytes of text that one token can stand for at most; None when there is no bound.
    """

    def __init__(
        self, vocabulary: Vocabulary, rust: RustTokenizer | None = None, inner: RustTokenizer | None = None
    ) -> None:
        """Raises VocabularyError. Takes 0.1 s for a vocabulary of 49 k tokens, up to 2 s for one of 256 k.

        `rust` encodes plain text; without it, it is made from the vocabulary's merges or scores. `inner`, if
        given, does so for text that follows a token.
        """
        self._tokens = vocabulary.tokens
        self._pieces: dict[int, bytes] = {}
        """Of those that have been drawn, which are few."""
        self._types = vocabulary.types
        self._byte_level = vocabulary.model == "gpt2"
        self.vocab_size = len(vocabulary.tokens)
        self.bos_id = vocabulary.bos_id
        self.eos_id = vocabulary.eos_id
        self.eog_ids = vocabulary.end_ids
        self.longest: int | None = max(map(len, map(str.encode, vocabulary.tokens)))
        self.add_space_prefix = False
        add_bos = False
        if rust is not None:
            self._rust = rust
            self.add_space_prefix = vocabulary.add_space_prefix is True
        elif vocabulary.model == "gpt2":
            pre = _pre_tokenizer(vocabulary.pre)
            add_bos = pre.add_bos
            self._rust = _byte_level_bpe(vocabulary, pre)
        elif vocabulary.model == "llama":
            add_bos = True
            self.add_space_prefix = vocabulary.add_space_prefix is not False
            self._rust = _sentencepiece_bpe(vocabulary, self.add_space_prefix)
        else:
            raise VocabularyError(
                f"tokenizer.ggml.model: {vocabulary.model!r:.40} is not supported (gpt2 and llama are)"
            )
        self._inner = inner or self._rust
        if not self._byte_level and TokenType.BYTE not in vocabulary.types:
            self.longest = None  # a run of unknown characters is one unknown token
        wants_bos = add_bos if vocabulary.add_bos is None else vocabulary.add_bos
        self.add_bos = wants_bos and self.bos_id is not None
        self.add_eos = vocabulary.add_eos is True and self.eos_id is not None
        if rust is None:
            self._rust.add_tokens(
                [
                    AddedToken(text, normalized=False, special=False)
                    for text, kind in zip(vocabulary.tokens, vocabulary.types, strict=True)
                    if kind == TokenType.USER_DEFINED and text
                ]
            )
        self.special_tokens = _special_tokens(vocabulary)
        self._markers = {
            text: i
            for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
            if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> "Tokenizer":
        """From the metadata of a GGUF file (GgufFile.metadata). Raises VocabularyError."""
        return cls(Vocabulary.from_metadata(metadata))

    def encode(self, text: str, special: bool = False, limit: int | None = None) -> list[int]:
        """Ids of `text` alone: no beginning- or end-of-sequence token is added.

        A control token in the text is encoded as the characters it is written with, unless `special`: only
        for text that no client can write. Lone surrogates become U+FFFD; bytes that a vocabulary has no token
        for are dropped or become its unknown token, as it was trained. About 4 MB/s without the GIL. With
        `limit`, TooLongError for text of more tokens, after work in proportion to the limit, not to the text.
        """
        return self.encode_pieces(self.special_tokens.split(text) if special else (text,), limit)

    def encode_prompt(self, text: str, special: bool = False, limit: int | None = None) -> list[int]:
        """As `encode`, with the beginning- and end-of-sequence tokens that the model wants around it."""
        ids = self.encode(text, special, limit)
        if self.add_bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_pieces(self, pieces: Iterable[str | int], limit: int | None = None) -> list[int]:
        """Ids of plain text (special=False) between ids. Text that follows an id is a new beginning."""
        ids: list[int] = []
        rust = self._rust
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                if limit is not None:
                    self._refuse_far_too_long(piece, limit - len(ids))
                ids += self._encode_plain(piece, rust)
            rust = self._inner
            if limit is not None and len(ids) > limit:
                raise TooLongError(f"the text has more than {limit} tokens")
        return ids

    def _encode_plain(self, text: str, rust: RustTokenizer) -> list[int]:
        try:
            # The batch call is the one that releases the GIL.
            batch = rust.encode_batch_fast([without_surrogates(text)], add_special_tokens=False)
        except BaseException as e:
            # What a panic of the Rust package becomes; it is no Exception. Its regexes give up a word of more
            # than ten million characters.
            if type(e).__name__ != "PanicException":
                raise
            raise TooLongError("the text has a word that is too long") from None
        ids: list[int] = batch[0].ids
        return ids

    def refuse_characters(self, count: int, room: int) -> None:
        """Raises TooLongError when no `room` tokens can write `count` characters."""
        if self.longest and count > room * self.longest:
            raise TooLongError("the text is longer than the tokens allowed can write")

    def _refuse_far_too_long(self, text: str, room: int) -> None:
        """Bound the work on text that cannot fit: encoding all of 16 MiB takes seconds and half a gigabyte.

        Encoded in parts, a text has a few more tokens for each seam; an eighth more is beyond doubt too long.
        """
        self.refuse_characters(len(text), room)
        count = 0
        for start in range(0, len(text) if len(text) > _PART else 0, _PART):
            count += len(self._encode_plain(text[start : start + _PART], self._inner))
            if count > room + room // 8 + 64:
                raise TooLongError(f"the text has more than {room} tokens")

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of `ids` from the beginning of a text; bytes that are not UTF-8 become U+FFFD.

        Control tokens are left out unless `special`. IndexError for an id outside the vocabulary.
        """
        detokenizer = Detokenizer(self, special=special)
        return detokenizer.feed(ids) + detokenizer.finish()

    def token_bytes(self, token: int) -> bytes:
        """What one token stands for, for a control token its name. IndexError outside the vocabulary."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._bytes_of(token)
        return piece

    def _bytes_of(self, token: int) -> bytes:
        if token < 0:
            raise IndexError(token)
        text = self._tokens[token]
        kind = self._types[token]
        if kind == TokenType.BYTE:
            return bytes((int(text[3:5], 16),))
        if kind == TokenType.USER_DEFINED or kind in _HIDDEN:
            return text.encode()
        if not self._byte_level:
            return text.replace(_SPACE, " ").encode()
        try:
            return bytes([_BYTE_OF[c] for c in text])
        except KeyError:
            return text.encode()

    def is_control(self, token: int) -> bool:
        """Whether a token has no text of its own (control and unknown). IndexError outside the vocabulary."""
        if token < 0:
            raise IndexError(token)
        return self._types[token] in _HIDDEN

    def token_id(self, text: str) -> int | None:
        """The id of the control token of that name, or None."""
        return self.special_tokens.id_of(text)

    def marker_id(self, text: str) -> int | None:
        """The id of the token of that name that is no ordinary text, a control token or not, or None."""
        return self._markers.get(text)


def _byte_characters() -> dict[str, int]:
    """GPT-2's writing of bytes: what Latin-1 can print for itself, U+0100 and up for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF: Final = _byte_characters()


def without_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone ones replaced by U+FFFD: text that has a UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _pre_tokenizer(name: str) -> PreTokenizer:
    try:
        return PRE_TOKENIZERS[name]
    except KeyError:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise VocabularyError(f"tokenizer.ggml.pre: {name!r:.60} is not known; known are {known}") from None


def _special_tokens(vocabulary: Vocabulary) -> SpecialTokens:
    # Shorter names cannot be told from text, so no template writes them; longer ones exist in no real model.
    control = {
        text: i
        for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True))
        if kind in _HIDDEN and 2 <= len(text) <= MAX_LENGTH
    }
    try:
        return SpecialTokens(control, vocabulary.matching)
    except ValueError as e:
        raise VocabularyError(f"tokenizer.ggml.token_type: {e}") from None


def _ids(vocabulary: Vocabulary, leave_out: frozenset[TokenType]) -> dict[str, int]:
    """Ids by text, of tokens that text may become."""
    ids: dict[str, int] = {}
    for i, (text, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types, strict=True)):
        if kind not in leave_out and text and ids.setdefault(text, i) != i:
            raise VocabularyError(f"tokenizer.ggml.tokens: tokens {ids[text]} and {i} are the same text")
    return ids


def _byte_level_bpe(vocabulary: Vocabulary, pre: PreTokenizer) -> RustTokenizer:
    # Control tokens are left out of the model itself, so that no merge and no whole-word match can produce
    # one.
    ids = _ids(vocabulary, _HIDDEN)
    if not vocabulary.merges:
        raise VocabularyError("tokenizer.ggml.merges: missing")
    merges = []
    for i, merge in enumerate(vocabulary.merges):
        left, space, right = merge.partition(" ")
        if not space or left not in ids or right not in ids:
            raise VocabularyError(f"tokenizer.ggml.merges: merge {i} is not of two tokens: {merge!r:.80}")
        if left + right in ids:
            merges.append((left, right))
    tokenizer = RustTokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _sentencepiece_bpe(vocabulary: Vocabulary, add_space_prefix: bool) -> RustTokenizer:
    ids = _ids(vocabulary, frozenset({TokenType.CONTROL}))
    unknown = None if vocabulary.unk_id is None else vocabulary.tokens[vocabulary.unk_id]
    if unknown:
        ids.setdefault(unknown, vocabulary.unk_id or 0)
    model = models.BPE(
        vocab=ids,
        merges=_merges_by_score(vocabulary),
        unk_token=unknown or None,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = RustTokenizer(model)
    spaces = normalizers.Replace(" ", _SPACE)
    # Applied to each stretch of text between tokens that are not text, so each of them begins with the
    # prefix.
    tokenizer.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if add_space_prefix else spaces
    )
    return tokenizer


def _merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece merges the neighbours that make the best-scored token: so every way to make a token of
    two others
    is a merge, and they rank as the scores of what they make. O(total characters of the vocabulary)."""
    if vocabulary.scores is None:
        raise VocabularyError("tokenizer.ggml.scores: missing")
    tokens = vocabulary.tokens
    text = (TokenType.NORMAL, TokenType.UNUSED, TokenType.UNDEFINED)
    pieces = {tokens[i] for i, kind in enumerate(vocabulary.types) if kind in text}
    merges = []
    for i in np.argsort(-vocabulary.scores, kind="stable").tolist():
        token = tokens[i]
        if len(token) > 1 and vocabulary.types[i] in text:
            for cut in range(1, len(token)):
                left = token[:cut]
                if left in pieces and (right := token[cut:]) in pieces:
                    merges.append((left, right))
    return merges
