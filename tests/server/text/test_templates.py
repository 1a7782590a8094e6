"""Chat templates: the same text as transformers gives, and nothing that a hostile one can do."""

import os
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from ktransformers.server.text.model import TextModel
from ktransformers.server.text.templates import CHATML, FALLBACKS, ChatTemplate, TemplateError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Wetter & <b>mehr</b> \"für\" 'dich'",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Köln", "n": [1, 2.5, None]}},
}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\n\n  there  "}],
    [
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "<think>hm</think>\n\n2"},
        {"role": "user", "content": "漢字 😀 {{ x }} {% raw %}"},
    ],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"temp": 20}'},
        {"role": "assistant", "content": "20."},
        {"role": "user", "content": ""},
    ],
]
# In the manner of Qwen's: namespace, tojson, slices, loop variables, string methods, loop controls,
# generation tags.
RICH = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}{% for tool in tools %}
        {{- tool | tojson }}
        {{- tool | tojson(indent=2) }}
    {%- endfor %}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' and ns.last < 0 %}{% set ns.last = messages|length - 1 - loop.index0 %}{% endif %}
{%- endfor %}
{% for message in messages %}
    {% if loop.index0 > 100 %}{% break %}{% endif %}
    {% if message.content is none %}{% continue %}{% endif %}
{{ bos_token }}{{ message['role'] | upper }}: {% generation %}{{ message.content.split('</think>')[-1].lstrip('\\n') }}{% endgeneration %}

    {%- for call in message.tool_calls or [] %}
{{ call.function.name }}({{ call.function.arguments | tojson }})
        {%- for k, v in call.function.arguments | items %}[{{ k }}={{ v if v is string else v | tojson }}]{% endfor %}
    {%- endfor %}
{% endfor %}
{{ ns.last }}{{ undefined_name }}{{ strftime_now('%Y')[:1] }}{{ dict(a=1)['a'] }}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}
"""  # noqa: E501


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("source", ["default", "rich", *(name for name, _ in FALLBACKS)])
@pytest.mark.parametrize("prompt", [True, False])
def test_like_transformers(
    default_model: TextModel, source: str, conversation: list[dict[str, Any]], prompt: bool
) -> None:
    assert default_model.template is not None
    template = {"default": default_model.template.source, "rich": RICH, **dict(FALLBACKS)}[source]
    renderer = ChatTemplate(template)
    context = {"bos_token": "<s>", "tools": TOOLS, "add_generation_prompt": prompt, "documents": None}
    try:
        ours = renderer.render({**context, "messages": conversation}, 100_000)
    finally:
        renderer.close()
    context.pop("documents")
    ([theirs], _) = render_jinja_template([conversation], chat_template=template, **context)
    assert ours == theirs


# Ways to Python's internals that sandboxes have been left by, and what they must not find.
INJECTIONS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ [].__class__.__base__.__subclasses__()[0] }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ joiner.__init__.__globals__.os }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id') }}",
    "{{ self.__init__.__globals__.__builtins__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('__mro__') }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "{{ ('{0.__class__}'|attr('format'))('') }}",
    "{{ messages.__class__.__init__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.pop() }}",
    "{{ dict.mro() }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ strftime_now.__code__.co_consts }}",
    "{{ tojson.__globals__ }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{{ namespace(__call__=1, __html__=2) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{% extends '/etc/passwd' %}",
    "{% set x = messages|map(attribute='__class__')|list %}{{ x[0].__mro__ }}",
    "{{ messages|sum(attribute='__class__', start='') }}",
    "{{ (messages|groupby('__class__'))[0].grouper.__mro__ }}",
    "{{ config }}{{ request.environ }}{{ get_flashed_messages.__globals__ }}",
]
NESTED = "(" * 5000 + "1" + ")" * 5000
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}xxxxxxxxxxxxxxxxxxxx{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ('a' * 10**8)|length }}{{ 'a' * 10**8 }}",
    "{{ 2 ** (10**10) }}",
    "{{ messages[0].content|int ** (10**9) }}",
    "{{ [0] * 10**10 }}",
    "{{ 'x'|center(10**10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(s='aaaaaaaaaa') %}"
    "{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "{{ " + NESTED + " }}",
    "{{ 'a'.join(range(99999)|map('string')) * 99999 }}",
    "{{ range(99999)|list|tojson(indent=99999) }}",
]
CONTEXT: dict[str, object] = {"messages": [{"role": "user", "content": "12345678901234567890"}]}


@pytest.mark.parametrize("source", INJECTIONS)
def test_no_way_out_of_the_sandbox(source: str) -> None:
    template = ChatTemplate(source)
    try:
        text = template.render(CONTEXT, 10_000)
    except TemplateError as e:
        text = str(e)
    finally:
        template.close()
    for found in ("<class", "<function", "<module", "uid=", "root:", "popen", "__", " at 0x", "builtins"):
        assert found not in text


@pytest.mark.parametrize("source", BOMBS)
def test_bombs_are_stopped(source: str) -> None:
    """The bomb is in the template, lit by one conversation; the model's next conversation is fine."""
    template = ChatTemplate("{% if bomb %}" + source + "{% else %}fine{% endif %}")
    try:
        assert_stopped(template)
        assert template.render(CONTEXT, 10_000) == "fine"
    except TemplateError as e:
        # Constants are folded when the template is compiled: then it never becomes usable, and says so.
        assert "not valid" in str(e) or "takes too long" in str(e)
    finally:
        template.close()


def assert_stopped(template: ChatTemplate) -> None:
    with pytest.raises(TemplateError):
        template.render({**CONTEXT, "bomb": True}, 10_000)


def test_the_process_can_open_nothing(default_model: TextModel) -> None:
    template = ChatTemplate("x")
    try:
        template.render({}, 10)
        worker = template._worker
        assert worker is not None
        pid = worker._process.pid
        with open(f"/proc/{pid}/limits") as limits:
            table = {line[:26].strip(): line[26:].split()[0] for line in limits}
        descriptors = os.listdir(f"/proc/{pid}/fd")
        with open(f"/proc/{pid}/environ") as environ:
            names = {entry.split("=")[0] for entry in environ.read().split("\0") if entry}
    finally:
        template.close()
    assert table["Max file size"] == "0" and table["Max core file size"] == "0"
    assert int(table["Max address space"]) <= 512 * 2**20
    assert int(table["Max open files"]) <= max(map(int, descriptors)) + 1
    assert names <= {"PYTHONPATH", "TZ", "LC_CTYPE"}
    assert not os.path.exists(f"/proc/{pid}")


def test_a_killed_process_is_replaced() -> None:
    template = ChatTemplate("{{ n }}")
    try:
        assert template.render({"n": 1}, 10) == "1"
        assert template._worker is not None
        template._worker._process.kill()
        with pytest.raises(TemplateError, match="crashed"):
            template.render({"n": 2}, 10)
        assert template.render({"n": 3}, 10) == "3"
    finally:
        template.close()


def test_errors_say_what_is_wrong() -> None:
    for source, message in (
        ("{{ raise_exception('Only user roles') }}", "refuses the conversation: Only user roles"),
        ("{{ 1 / 0 }}", r"fails on this conversation \(ZeroDivisionError\)"),
        ("{% if %}", r"not valid \(TemplateSyntaxError\)"),
        ("{{ 'x' * 100 }}", "too much text"),
    ):
        template = ChatTemplate(source)
        for _ in range(2):
            with pytest.raises(TemplateError, match=message):
                template.render({}, 50)
        template.close()


def test_a_rendering_is_quick(default_model: TextModel) -> None:
    template = ChatTemplate(CHATML)
    context = {"messages": [{"role": "user", "content": "Hello"}] * 10, "add_generation_prompt": True}
    try:
        template.render(context, 10_000)
        times = []
        for _ in range(100):
            start = time.perf_counter()
            template.render(context, 10_000)
            times.append(time.perf_counter() - start)
    finally:
        template.close()
    assert sorted(times)[50] < 0.002  # 0.1 ms alone
