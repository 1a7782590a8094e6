"""A model that thinks on the real server: the default model, with markers in its vocabulary, and a template
that opens the block."""

from pathlib import Path

import openai
import pytest
import speaking
from organization import ledger, new_tenant, office_of

from ktransformers.engine.weights.gguf import read

BEGIN, END = 3, 4
"""Ids of control tokens that the model was not trained to use in a chat."""
CHAT = {"model": "default", "messages": [{"role": "user", "content": "Count from one to ten."}]}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metadata = read(speaking.default_model()).metadata
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].copy()
    tokens[BEGIN], tokens[END] = "<think>", "</think>"
    types[[BEGIN, END]] = 4
    other = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.chat_template": metadata["tokenizer.chat_template"].replace(
            "<|im_start|>assistant\n' }}", "<|im_start|>assistant\n<think>\n' }}"
        ),
    }
    assert "<think>" in other["tokenizer.chat_template"]
    return speaking.write(tmp_path_factory.mktemp("model") / "thinker.gguf", "llama", other)


def test_reasoning_is_counted_and_comes_apart(start, thinker: Path) -> None:
    server, organization = office_of(start, model=thinker)
    project, headers = new_tenant(organization, "thinkers")
    key = headers["Authorization"].removeprefix("Bearer ")
    client = openai.OpenAI(api_key=key, base_url=f"{server.url}/v1", max_retries=0, timeout=120)
    sums = {"output": 0, "reasoning": 0}

    def count(usage) -> int:
        sums["output"] += usage.completion_tokens
        sums["reasoning"] += usage.completion_tokens_details.reasoning_tokens
        return usage.completion_tokens_details.reasoning_tokens

    # The template has opened the block, and nothing closes it.
    answer = client.chat.completions.create(**CHAT, max_tokens=20, extra_body={"ignore_eos": True})
    message = answer.choices[0].message
    assert message.content == "" and message.reasoning_content.strip()
    assert count(answer.usage) == answer.usage.completion_tokens == 20
    # Closed at once.
    answer = client.chat.completions.create(**CHAT, max_tokens=5, logit_bias={str(END): 100})
    assert not hasattr(answer.choices[0].message, "reasoning_content") and count(answer.usage) == 0
    # Somewhere: plain completions show each token, so that they can be counted here.
    prompt = client.completions.create(model="default", prompt="x", max_tokens=1)
    count(prompt.usage)
    between = 0
    for bias in (6, 9, 12, 15, 18, 21):
        done = client.completions.create(
            model="default", prompt=[504, 3575, BEGIN], max_tokens=40, logprobs=0, seed=bias,
            logit_bias={str(END): bias}, extra_body={"ignore_eos": True},
        )  # fmt: skip
        shown = done.choices[0].logprobs.tokens
        thought = shown.index("</think>") if "</think>" in shown else len(shown)
        assert count(done.usage) == thought, shown
        between += 0 < thought < len(shown)
    assert between, "no answer closed the block in its middle"
    body = CHAT | {"max_tokens": 30, "stream": True, "logit_bias": {str(END): 12}}
    body |= {"stream_options": {"include_usage": True}}
    last = None
    for chunk in client.chat.completions.create(**body):
        last = chunk.usage or last
    count(last)
    used = ledger(organization, project)
    assert (used["output"], used["reasoning"]) == (sums["output"], sums["reasoning"])
    print(f"{sums['reasoning']} of {sums['output']} tokens were reasoning")
