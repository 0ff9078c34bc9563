"""Chat templates that are a plain sequence of turns, against Jinja; and those that are not understood."""

from __future__ import annotations

from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from quantforge.tokenizer.chat import Turns

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
PROMPT = "{% if add_generation_prompt %}{{ 'ASSISTANT' }}{% endif %}"
PLAIN = {
    "chatml": "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "default prompt": "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    '{{ \'<|im_start|>system\nBe """kind""".<|im_end|>\n\' }}{% endif %}'
    "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama 3": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = m['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "mistral": "{{ bos_token }}{% if messages[0].role == 'system' %}{% set said = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "{% if m.role == 'user' %}{% if loop.first and said is defined %}{{ '[INST] ' ~ said ~ '\n\n' ~ m.content ~ ' [/INST]' }}"
    "{% else %}{{ '[INST] ' ~ m.content ~ ' [/INST]' }}{% endif %}{% else %}{{ m.content ~ eos_token }}{% endif %}{% endfor %}",
}
OTHER = {
    "numbered": "{% for m in messages %}{{ loop.index ~ m.content }}{% endfor %}" + PROMPT,
    "only the last": "{{ messages[-1].content }}" + PROMPT,
    "tools": PLAIN["chatml"] + "{% if tools %}{{ tools }}{% endif %}",
    "endless": "{% for a in range(10**9) %}{% for b in range(10**9) %}{% endfor %}{% endfor %}",
    "large": "{% set x = messages[0].content %}" + "{% set x = x + x %}" * 60 + "{{ x }}",
    "attributes": "{{ messages.__class__.__mro__ }}",
    "formats": "{{ '%999999999d' % 1 }}",
    "syntax": "{% for m in",
    "recursion": "{{ " + "(" * 400 + "1" + ")" * 400 + " }}",
    "nothing": "",
}


def rendered(template: str, messages: list[dict[str, str]]) -> str:
    def refuse(message: str) -> None:
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    values: dict[str, Any] = {"messages": messages, "add_generation_prompt": True, "raise_exception": refuse, **TOKENS}
    return environment.from_string(template).render(**values)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("system", [False, True])
def test_turns_are_what_jinja_makes(name: str, system: bool) -> None:
    said = [{"role": "system", "content": "Say {{ little }}."}] if system else []
    said += [{"role": r, "content": f"{r} {i}"} for i, r in enumerate(("user", "assistant", "user", "assistant", "user"))]
    turns = Turns.of(PLAIN[name], TOKENS)
    assert turns is not None
    if system and name == "gemma":
        assert turns.system is None and turns.joined is None
    else:
        assert turns.text(said) == rendered(PLAIN[name], said)
    assert turns.default_system == ('Be """kind""".' if name == "default prompt" else None)


@pytest.mark.parametrize("name", OTHER)
def test_what_is_not_understood(name: str) -> None:
    assert Turns.of(OTHER[name], TOKENS) is None
