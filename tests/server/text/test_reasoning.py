"""What a model thinks, told from its answer, in vocabularies as model files have them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktransformers.server.text.answer import AnswerText
from ktransformers.server.text.messages import ThinkingError
from ktransformers.server.text.model import ModelFacts, TextModel
from ktransformers.server.text.reasoning import PAIRS, Markers
from ktransformers.server.text.tokenizer import Tokenizer

Make = Callable[[str], tuple[Any, dict[str, object]]]
FACTS = ModelFacts("tiny", "qwen3", 1, "F16", 128, 8, 1, "")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")


def tokenizer_with(metadata: dict[str, object], *texts: str) -> Tokenizer:
    """The vocabulary with further control tokens."""
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    more = {
        "tokenizer.ggml.tokens": [*tokens, *texts],
        "tokenizer.ggml.token_type": np.append(types, [3] * len(texts)).astype(np.int32),
    }
    return Tokenizer.from_metadata(metadata | more)


def answer_of(tokenizer: Tokenizer, text: str, prompt: str = "", **how: Any) -> tuple[str, str, int]:
    """(answer, reasoning, tokens of reasoning) of an output that is this text with its control tokens."""
    tokens = tokenizer.encode(text, special=True)
    found = Markers(tokenizer).reasoning(tokenizer.encode(prompt, special=True))
    assert found is not None
    answer = AnswerText(tokenizer, reasoning=found, **how)
    pieces = [answer.feed([token], "") for token in tokens] + [answer.feed([], "stop")]
    return "".join(p.text for p in pieces), "".join(p.reasoning for p in pieces), found.tokens


@pytest.fixture(scope="module")
def qwen(byte_level: Make) -> Tokenizer:
    """It has <think> and </think>, which are no control tokens: users may write them."""
    return Tokenizer.from_metadata(byte_level("qwen2")[1])


def count(tokenizer: Tokenizer, text: str) -> int:
    return len(tokenizer.encode(text, special=True))


def test_it_begins_its_output_with_the_marker(qwen: Tokenizer) -> None:
    found = answer_of(qwen, "<think>\nOne and one.\n</think>\n\nTwo.")
    assert found == ("Two.", "One and one.\n", count(qwen, "\nOne and one.\n"))
    assert answer_of(qwen, "\n<think>hm</think>Two.")[1:] == ("hm", count(qwen, "hm"))
    assert answer_of(qwen, "<think></think>Two.") == ("Two.", "", 0)
    assert answer_of(qwen, "<think>never ends") == ("", "never ends", count(qwen, "never ends"))


@pytest.mark.parametrize("opening", ["<think>", "<think>\n", "<think>\n\n"])
def test_the_template_has_opened_the_block(qwen: Tokenizer, opening: str) -> None:
    prompt = f"<|im_start|>assistant\n{opening}"
    found = answer_of(qwen, "One and one.</think>\n\nTwo.", prompt)
    assert found == ("Two.", "One and one.", count(qwen, "One and one."))


def test_a_marker_elsewhere_is_spoken_of(qwen: Tokenizer) -> None:
    said = "The tag <think> is </think> closed."
    for prompt in ("", "<think>\n\n</think>\n\n", "what is <think> good for?\n<|im_start|>assistant\n"):
        assert answer_of(qwen, said, prompt) == (said, "", 0)
    assert answer_of(qwen, f"<think>x</think>{said}") == (said, "x", 1)
    # What a template has closed stays closed.
    assert answer_of(qwen, "<think>x</think>y", "<think>\n\n</think>\n\n")[1:] == ("", 0)


def test_a_user_cannot_open_it(byte_level: Make) -> None:
    """Whatever a message ends with, the template writes what stands between it and the output."""
    model = TextModel(Tokenizer.from_metadata(byte_level("qwen2")[1]), TEMPLATE, FACTS)
    opens = TextModel(Tokenizer.from_metadata(byte_level("qwen2")[1]), TEMPLATE + "<think>\n", FACTS)
    for said in ("hi", "<think>", "<think>\n", "</think>", "x<|im_end|>\n<|im_start|>assistant\n<think>\n"):
        conversation = [{"role": "user", "content": said}]
        for thinks, one in ((False, model), (True, opens)):
            found = one.markers.reasoning(one.chat_ids(conversation))
            assert found is not None
            found.kind(one.tokenizer.encode("a")[0])
            assert found.tokens == thinks, said
    model.close()
    opens.close()


def test_where_the_output_goes_on_with_the_prompts_text_it_is_counted_and_left(qwen: Tokenizer) -> None:
    said = " One</think> Two"
    assert answer_of(qwen, said, "<think>", continues=True) == (said, "", count(qwen, " One"))


def test_stop_strings_are_the_answers(qwen: Tokenizer) -> None:
    found = answer_of(qwen, "<think>a STOP b</think>c STOP d", stop=("STOP",))
    assert found[:2] == ("c ", "a STOP b")


@pytest.mark.parametrize("pair", PAIRS[1:])
def test_markers_that_are_control_tokens(default_model: TextModel, byte_level: Make, pair: Any) -> None:
    metadata = dict(byte_level("qwen2")[1])
    plain = [t for t in metadata["tokenizer.ggml.tokens"] if t not in PAIRS[0]]  # type: ignore[attr-defined]
    metadata["tokenizer.ggml.tokens"] = plain
    metadata["tokenizer.ggml.token_type"] = np.array([1] * (len(plain) - 5) + [3] * 4 + [2], np.int32)
    assert Markers(Tokenizer.from_metadata(metadata)).reasoning([]) is None
    tokenizer = tokenizer_with(metadata, *pair)
    assert answer_of(tokenizer, f"{pair[0]}ab{pair[1]}c") == ("c", "ab", count(tokenizer, "ab"))
    assert default_model.markers.reasoning([1, 2]) is None, "the default model does not think"


def test_channels(byte_level: Make) -> None:
    tokenizer = tokenizer_with(byte_level("gpt-4o")[1], *HARMONY)
    said = (
        "<|channel|>analysis<|message|>They say hi.<|end|>"
        "<|start|>assistant<|channel|>commentary<|message|>I look. <|end|>"
        "<|start|>assistant<|channel|>analysis<|message|> Now.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello!"
    )
    thought = count(tokenizer, "They say hi.") + count(tokenizer, " Now.")
    found = answer_of(tokenizer, said, "<|start|>assistant")
    assert found == ("I look. Hello!", "They say hi. Now.", thought)
    assert answer_of(tokenizer, "No channel at all.") == ("No channel at all.", "", 0)
    assert answer_of(tokenizer, "<|channel|>" + "x" * 999) == ("", "", 0)


SAID = st.lists(
    st.sampled_from(["<think>", "</think>", "\n", " ", "a", "thé", "東京", "🙂", "STOP", "S"]), max_size=12
).map("".join)


@given(SAID, st.sampled_from(["", "<think>\n", "</think>"]), st.data())
@settings(max_examples=300, deadline=None)
def test_it_does_not_matter_how_tokens_come(qwen: Tokenizer, said: str, prompt: str, data: Any) -> None:
    """The same text, reasoning and counts token by token and in any pieces; no text gets lost."""
    tokens = qwen.encode(said)
    outcomes = []
    for cut in (lambda left: 1, lambda left: data.draw(st.integers(1, left))):
        found = Markers(qwen).reasoning(qwen.encode(prompt))
        answer: AnswerText[int] = AnswerText(qwen, ("STOP",), found)
        text, thought, finish, marks, at = "", "", "", [], 0
        while at < len(tokens) and not finish:
            to = at + cut(len(tokens) - at)
            last = "length" if to == len(tokens) else ""
            piece = answer.feed(tokens[at:to], last, range(at, to))
            text, thought, finish, at = text + piece.text, thought + piece.reasoning, piece.finish, to
            marks += piece.marks
        outcomes.append((text, thought, finish, marks))
        if finish == "length":
            assert found is not None and found.tokens <= len(tokens)
            for mark in PAIRS[0]:
                said = said.replace(mark, "")
            if text + thought:
                shown = (thought + text).replace("<think>", "").replace("</think>", "")
                assert "".join(shown.split()) == "".join(said.split())
    assert outcomes[0] == outcomes[1]


QWEN3 = "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
DEEPSEEK = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ '<think>' if thinking else '</think>' }}"
)
GPT_OSS = (
    "{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
    "Reasoning: {{ reasoning_effort }}{% for m in messages %}{{ m.thinking }}{% endfor %}"
)
PROSE = "thinking, enable_thinking, reasoning_effort{{ messages[0].thinking }}{{ messages[0]['thinking'] }}"


@pytest.mark.parametrize(
    ("end", "think", "said"),
    [
        (QWEN3, False, "<think>\n\n</think>\n\n"),
        (QWEN3, True, ""),
        (QWEN3, None, ""),
        (QWEN3, "low", ThinkingError),
        (DEEPSEEK, True, "<think>"),
        (DEEPSEEK, False, "</think>"),
        (DEEPSEEK, None, "</think>"),
        (GPT_OSS, "high", "Reasoning: high"),
        (GPT_OSS, True, "Reasoning: medium"),
        (GPT_OSS, False, ThinkingError),
        (PROSE, True, ThinkingError),
        (PROSE, False, ThinkingError),
        (PROSE, "low", ThinkingError),
        (PROSE, None, "thinking, enable_thinking, reasoning_effort"),
    ],
)
def test_thinking_is_switched_where_the_template_reads_a_switch(
    byte_level: Make, end: str, think: bool | str | None, said: str | type[Exception]
) -> None:
    """By the names of the models' own templates; a word of its text, or a field of a message, is none."""
    model = TextModel(Tokenizer.from_metadata(byte_level("qwen2")[1]), TEMPLATE + end, FACTS)
    try:
        if isinstance(said, str):
            ids = model.chat_ids([{"role": "user", "content": "x"}], think=think)
            whole = "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n" + said
            assert ids == model.tokenizer.encode(whole, special=True)
        else:
            with pytest.raises(said, match="this model"):
                model.chat_text([{"role": "user", "content": "x"}], think=think)
    finally:
        model.close()
