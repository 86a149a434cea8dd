"""Chat templates of families that think first, write the date, or add a blank: cut as each was tuned to hear it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.render import Renderer

THINKS = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
DATED = (
    "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
    "{{ 'Today: ' + date_string + ' ' + strftime_now('%Y') + '\n' }}"
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"
)
QUESTION = (Turn("instruction", "Why?"),)


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_a_model_that_thinks_first_is_told_not_to(tokenizer: Any) -> None:
    tokenizer.chat_template = THINKS
    said = tokenizer.decode(Renderer(tokenizer, "chat", 2048).prompt_ids(QUESTION, "answer"))
    assert said.endswith("assistant\n<think>\n\n</think>\n\n")


def test_the_prompt_is_the_same_on_every_day(tokenizer: Any) -> None:
    tokenizer.chat_template = DATED
    said = tokenizer.decode(Renderer(tokenizer, "chat", 2048).prompt_ids(QUESTION, "answer"))
    assert said.startswith("Today: 26 Jul 2024 26 July 2024\n")


def test_a_tokenizer_that_adds_a_blank_gets_none_of_the_templates() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(32, 127)] + ["▁", "\n"]
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>",
                                        additional_special_tokens=["[INST]", "[/INST]"])  # fmt: skip
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
    )
    ids = Renderer(tokenizer, "chat", 2048).prompt_ids(QUESTION, "answer")
    whole = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["<s>", "[INST]", "▁", "W", "h", "y"]
    assert tokenizer.convert_ids_to_tokens(whole)[:6] == ["<s>", "[INST]", "▁", "W", "h", "y"]
