"""Ollama's Modelfile, as people write it."""

from __future__ import annotations

import pytest

from mlx_router_server.cli.modelfile import ModelfileError, parse_modelfile


def test_every_instruction() -> None:
    said = parse_modelfile(
        '''# a comment
from  ./weights
ADAPTER ./lora
PARAMETER temperature 0.5
PARAMETER num_ctx 4096
PARAMETER stop "<|end|>"
parameter stop User:
PARAMETER use_mmap false
TEMPLATE """{{ .System }}
{{ .Prompt }}"""
SYSTEM """
You are
brief.
"""
SYSTEM You are "very" brief.
LICENSE """one"""
LICENSE two
MESSAGE user Hi there
MESSAGE assistant """Hello
you"""
REQUIRES 0.14
'''
    )
    assert (said.base, said.adapter) == ("./weights", "./lora")
    assert said.parameters == {"temperature": 0.5, "num_ctx": 4096, "stop": ["<|end|>", "User:"], "use_mmap": False}
    assert said.template == "{{ .System }}\n{{ .Prompt }}"
    assert said.system == 'You are "very" brief.'
    assert said.license == ["one", "two"]
    assert said.messages == [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello\nyou"}]
    assert said.ignored == ["REQUIRES"]
    assert "adapter" not in said.body()


def test_a_block_keeps_its_lines() -> None:
    said = parse_modelfile('FROM x\nSYSTEM """\n  a\n\nb\n"""\n')
    assert said.system == "\n  a\n\nb\n"
    assert parse_modelfile('FROM x\nSYSTEM "quoted"').system == "quoted"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no FROM line"),
        ("SYSTEM x", "no FROM line"),
        ("FROM a\nFROM b", "line 2: a second FROM"),
        ("FROM a\nCOLOUR red", "line 2: there is no instruction COLOUR"),
        ("FROM a\n???", "line 2: not an instruction"),
        ("FROM", "line 1: FROM says nothing"),
        ('FROM a\nSYSTEM """x', 'line 2: """ is never closed'),
        ('FROM a\nSYSTEM """x""" y', "text after the closing"),
        ("FROM a\nPARAMETER stop", "has no value"),
        ("FROM a\nMESSAGE robot hi", "role of a MESSAGE"),
        ("FROM a\nDRAFT b", "a draft model is said in the configuration"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(text: str, sentence: str) -> None:
    with pytest.raises(ModelfileError, match=sentence):
        parse_modelfile(text)
