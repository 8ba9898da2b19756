"""A chat template writes what transformers would; one that misbehaves is stopped, and the next one is served."""

import os
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twofold import chat_template
from twofold.chat_template import ChatTemplate
from twofold.conformance.strategies.checkpoints import CHATML
from twofold.errors import TwofoldError

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
HELLO = [{"role": "user", "content": "hello"}]
TEMPLATES = {  # the ways of writing that the families' templates have between them
    "ChatML": CHATML,
    "a default system prompt": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    ),
    "turns that must alternate": (
        "{%- set system = '' %}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
        "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.first else '') + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}"
    ),
    "tools, a date, a loop that is left": (
        "{{ strftime_now('%Y') }}\n{% if tools %}\n    {%- for tool in tools %}\n{{ tool | tojson(indent=2) }}\n"
        "    {%- endfor %}\n{% endif %}\n{% set ns = namespace(seen=0) %}\n{% for m in messages %}\n"
        "    {%- if ns.seen > 3 %}{% break %}{% endif %}\n    {%- set ns.seen = ns.seen + 1 %}\n"
        "  {{- m | tojson }}{{ m.content | length }}\n{% endfor %}"
    ),
    "what a model wrote, marked": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content | upper }}{% endif %}{% endfor %}{{ undefined_here }}{{ documents is none }}"
    ),
}
CONTENT = st.text(max_size=12) | st.sampled_from(
    ["<b>&amp;'\"", "  spaces  ", "two\nlines", "{{ 7 * 7 }}", "🙂", "a\ud800"]
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT}),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def templates():
    """Ours and theirs, by name."""
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_object=_backend(), **SPECIAL)
    return {name: ChatTemplate(source, SPECIAL) for name, source in TEMPLATES.items()}, theirs


def _backend():
    from tokenizers import Tokenizer, models

    return Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, "<s>"))


@pytest.mark.parametrize("name", TEMPLATES)
@given(messages=MESSAGES, prompt=st.booleans(), tools=st.sampled_from([None, [{"name": "süß", "x": [1, {"y": None}]}]]))
@settings(max_examples=60)
def test_the_text_is_what_transformers_writes(templates, name, messages, prompt, tools):
    ours, theirs = templates
    choices = {"add_generation_prompt": prompt, "tools": tools}
    try:
        expected = theirs.apply_chat_template(messages, chat_template=TEMPLATES[name], tokenize=False, **choices)
    except Exception as error:
        expected = error
    if isinstance(expected, str):
        assert ours[name].render(messages, **choices) == expected
    else:
        with pytest.raises(TwofoldError, match="refuses these messages: roles must alternate"):
            ours[name].render(messages, **choices)


def test_a_template_may_have_variables_of_its_own():
    template = ChatTemplate("{{ 'no' if enable_thinking is false else 'yes' }}")
    assert [template.render(HELLO), template.render(HELLO, enable_thinking=False)] == ["yes", "no"]


MISBEHAVING = {
    "{{ raise_exception('first\n  a system prompt') }}": "refuses these messages: first a system prompt",
    "{% if %}": "not valid Jinja",
    "{{ messages[7].content.x }}": "failed (UndefinedError",
    "{{ 1 / 0 }}": "failed (ZeroDivisionError",
    "{{ messages.append(1) }}": "failed (SecurityError",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "failed (SecurityError",
    "{{ cycler.__init__.__globals__ }}": "failed (SecurityError",
    "{% include '/etc/passwd' %}": "failed",
    "{% for i in range(10 ** 9) %}{% endfor %}": "failed (OverflowError",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "failed (RecursionError",
    "{{ " + "(" * 50_000 + ")" * 50_000 + " }}": "failed (RecursionError",
    "{{ 'a' * 9000000 }}": "wrote 9,000,000 characters",
    "{{ '\x1b[2J' }}{{ raise_exception('\x1b[2J') }}": "refuses these messages:",
}


@pytest.mark.parametrize("source", MISBEHAVING)
def test_a_template_that_misbehaves_is_a_sentence(source):
    with pytest.raises(TwofoldError) as raised:
        ChatTemplate(source).render(HELLO)
    assert MISBEHAVING[source] in str(raised.value)
    assert str(raised.value).isprintable()


HUNGRY = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ '%999999999s' | format('x') }}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
]


@pytest.mark.parametrize("source", HUNGRY)
def test_a_template_that_eats_memory_is_stopped(source):
    """At once, where a process can have a limit of memory; elsewhere when its time is up."""
    says = "it takes too much memory" if sys.platform == "linux" else "too much memory"
    with pytest.raises(TwofoldError, match=says):
        ChatTemplate(source).render(HELLO)


LOOPS = [
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ (messages | length + 6) ** 99999999 % 3 }}",  # one operation: no timer in the same process can stop it
]


@pytest.mark.parametrize("source", LOOPS)
def test_a_template_that_does_not_end_is_stopped_and_the_next_is_served(monkeypatch, source):
    assert chat_template.SECONDS < 5
    monkeypatch.setattr(chat_template, "SECONDS", 0.5)
    template = ChatTemplate("{% if messages[0].content == 'loop' %}" + source + "{% endif %}ok")
    assert template.render(HELLO) == "ok"
    process, before = template._worker.process, os.times().children_user
    with pytest.raises(TwofoldError, match="was stopped"):
        template.render([{"role": "user", "content": "loop"}])
    assert process.poll() is not None, "its process is gone"
    assert os.times().children_user - before < 3, "and computed for no longer than its time"
    assert template.render(HELLO) == "ok"


def test_one_process_serves_a_conversation_and_ends_with_it():
    template = ChatTemplate(CHATML)
    template.render(HELLO)
    process = template._worker.process
    for turn in range(20):
        template.render(HELLO * (2 * turn + 1))
    assert template._worker.process is process
    del template
    assert process.poll() is not None


def test_a_process_that_was_killed_is_replaced():
    template = ChatTemplate(CHATML)
    expected = template.render(HELLO)
    template._worker.process.kill()
    template._worker.process.wait()
    assert template.render(HELLO) == expected


ORPHAN = """
import os
from twofold.chat_template import ChatTemplate
template = ChatTemplate("x")
template.render([{"role": "user", "content": "x"}])
print(template._worker.process.pid, flush=True)
os._exit(1)
"""


def test_the_process_does_not_outlive_one_that_dies():
    """Without a word: nothing is cleaned up, but its end of the pipe closes."""
    done = subprocess.run([sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(200):
        if not _runs(pid):
            return
        time.sleep(0.05)
    raise AssertionError("the process that renders is still there")


def _runs(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "at least one"),
        ("hello", "at least one"),
        (["hello"], "message 0 has no role"),
        ([*HELLO, {"content": "x"}], "message 1 has no role"),
        ([{"role": "user", "content": object()}], "what JSON can say"),
    ],
)
def test_messages_that_are_none_are_named(messages, says):
    with pytest.raises(TwofoldError, match=says):
        ChatTemplate(CHATML).render(messages)
