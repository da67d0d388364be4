"""Chat templates as their makers published them, and small tokenizers of the usual kinds.

Where a published template has a part for tools that are given to it (ours stand in the system
prompt), that part is left out.
"""

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from context import NOTES_REQUEST, SYSTEM_PROMPT
from support.chat_template import CHATML

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# It writes the thoughts of a turn only where they follow the last message that is no tool result.
QWEN3 = r"""{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and not(message.content.startswith(
           '<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content =
                content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n')
                + '\n</think>\n\n' + content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
QWEN3_OFF = "{%- set enable_thinking = false %}" + QWEN3  # how a user of ours turns thoughts off
# The models named Thinking: each turn begins inside a thought.
QWEN3_PREFILLED = QWEN3.replace(
    r"'<|im_start|>assistant\n' }}", r"'<|im_start|>assistant\n<think>\n' }}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}"
    "{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)

SYSTEM_TEXT = SYSTEM_PROMPT.format(signatures="search(queries)")
CHATML_TAGS = ["<|im_start|>", "<|im_end|>"]
TOOL_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
THINK_TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
TEXTS = ["Who is the mayor of Belin, and why?", "a  b", " begins with a space", "so\nor so ", "x"]
# Where a tokenizer puts a space: that of a SentencePiece model as Transformers has it today, the
# one of Llama 2's file, Gemma's (none), and GPT-2's.
SEAMS = ["first", "always", "never", "prepend", "replace", "unigram", "byte-level with a space"]


def small_tokenizer(
    seam: str, tags: list[str], bytes_too: bool = False, **more
) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred pieces with these control tokens.

    Args:
        seam: one of SEAMS, or "byte-level".
        bytes_too: whether characters that it does not know are spelled in bytes, as SentencePiece
            does for Llama and Gemma; else they are the unknown token.
    """
    inner, make = Tokenizer(models.BPE(unk_token="<unk>")), trainers.BpeTrainer
    if seam.startswith("byte-level"):
        has_space = seam.endswith("space")
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_space)
        inner.decoder = decoders.ByteLevel()
    elif seam in ("prepend", "replace"):
        spaces = normalizers.Replace(" ", "▁")
        before = [normalizers.Prepend("▁")] if seam == "prepend" else []
        inner.normalizer = normalizers.Sequence([*before, spaces])
        strip = [decoders.Strip(" ", 1, 0)] if seam == "prepend" else []
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
    else:
        scheme = "first" if seam == "unigram" else seam
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=seam != "never")
        inner.decoder = decoders.Metaspace(prepend_scheme=scheme)
    learning = {"vocab_size": 600, "special_tokens": ["<unk>"], "show_progress": False}
    if seam == "unigram":
        inner.model, make = models.Unigram(), trainers.UnigramTrainer
        learning["unk_token"] = "<unk>"
    if seam.startswith("byte-level"):
        learning["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    corpus = [SYSTEM_TEXT, NOTES_REQUEST, CHATML, *TEXTS, *TOOL_TAGS, *THINK_TAGS] * 3
    inner.train_from_iterator(corpus, make(**learning))
    if bytes_too:
        described = json.loads(inner.to_str())
        vocabulary = described["model"]["vocab"]
        for byte in range(256):
            vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
        described["model"]["byte_fallback"] = True
        inner = Tokenizer.from_str(json.dumps(described))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", **more)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in tags])
    return tokenizer
