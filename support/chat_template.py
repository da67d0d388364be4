"""A model's chat template as constant texts, and the ids of texts.

Only texts of our own may hold control tokens.
"""

import functools
import json
import re

from tokenizers import Tokenizer

# A tokenizer without a chat template of its own (a base model's) gets ChatML, as Qwen and SmolLM2
# use.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # <tool_call>, <|im_end|>, [INST]
OUR_TAGS = "<tool_response></tool_response><tool_call></tool_call><think></think><answer></answer>"
# How a tokenizer is told to put a space in front of a text, and what makes it put none there.
AT_START = [('"prepend_scheme": "first"', '"prepend_scheme": "never"')]
ANYWHERE = [
    (r'"prepend_scheme": "\w+"', '"prepend_scheme": "never"'),
    ('"add_prefix_space": true', '"add_prefix_space": false'),
    (r'"prepend": "[^"]*"', '"prepend": ""'),
]


def render(tokenizer, *messages: tuple[str, str]) -> str:
    """What the chat template makes of (role, text) messages, and the generation prompt.

    Raises:
        ValueError: the template raises, whatever it raises; one line.
    """
    try:
        return tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in messages],
            tokenize=False,
            add_generation_prompt=True,
            chat_template=None if tokenizer.chat_template else CHATML,
        )
    except Exception as error:  # a template is code
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"this chat template cannot be used: {words}") from None


def template_pieces(tokenizer) -> tuple[list[str], str]:
    """The chat template's own texts, and the token with which an assistant's turn ends.

    Conversations are rendered with sentinels in the place of their messages, and cut at them. What
    a template writes in front of an action of the past is not looked at: the policy goes on from
    the generation prompt, in each turn. Where the template refuses or drops a system message, its
    text stands in front of the question.

    Returns:
        ([before the system message, before the question, before an action, before a result, before
        the next action], end of turn). The policy samples the end of its turn itself, so the piece
        before a result begins behind it.

    Raises:
        ValueError: the template drops or rewrites a message, or no token ends a turn.
    """
    system, question, action, result = "SYSTEMTEXT", "QUESTIONTEXT", "ACTIONTEXT", "RESULTTEXT"
    try:
        rendered = render(tokenizer, ("system", system), ("user", question))
    except ValueError:
        rendered = ""
    if system not in rendered:
        rendered = render(tokenizer, ("user", f"{system}\n\n{question}"))
    past = render(tokenizer, ("user", question), ("assistant", action), ("user", result))
    start = re.fullmatch(f"(.*?){system}(.*?){question}(.*)", rendered, re.DOTALL)
    later = re.fullmatch(f".*?{action}(.*?){result}(.*)", past, re.DOTALL)
    if not (start and later):
        raise ValueError(
            "this chat template drops or rewrites a message: it needs the roles user and assistant"
        )
    behind = later[1].lstrip()
    ends = [tag for tag in tokenizer.get_added_vocab() if behind.startswith(tag)]
    if not ends:
        raise ValueError(
            "cannot find the token that ends an assistant's turn in this template: take a model "
            "whose chat template puts a control token there"
        )
    end_of_turn = max(ends, key=len)
    return [*start.groups(), behind.removeprefix(end_of_turn), later[2]], end_of_turn


def plain_tokenizers(tokenizer, *no_space: list[tuple[str, str]]) -> list[Tokenizer]:
    """The same vocabulary without control tokens, once for each of `no_space`. Where these change
    nothing, as for most tokenizers, all are one object: a large vocabulary takes a second to read.

    With `split_special_tokens=True` a tag such as <tool_call> would still become a control token,
    since it is an added token but not a special one (transformers#29279).

    Args:
        no_space: replacements in the tokenizer's description: none, AT_START or ANYWHERE.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    described |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    made, texts = {}, []
    for replacements in no_space:
        text = json.dumps({name: described[name] for name in ("normalizer", "pre_tokenizer")})
        for pattern, replacement in replacements:
            text = re.sub(pattern, replacement, text)
        if text not in made:
            made[text] = Tokenizer.from_str(json.dumps(described | json.loads(text)))
        texts.append(text)
    return [made[text] for text in texts]


class Encoder:
    """Texts to ids. Texts that stand side by side give the ids that they would give as one text.

    A tokenizer cuts a text at its control tokens into *sections*, and some put a space in front of
    the first section (SentencePiece's "first") or of each ("always").

    Args:
        tokenizer: a fast `transformers` tokenizer.
        pieces: the chat template's own texts.

    Raises:
        ValueError: the tokenizer is a slow one.
    """

    def __init__(self, tokenizer, pieces: list[str]):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                "this tokenizer runs in Python only: take a model with a fast one (tokenizer.json)"
            )
        self.tokenizer, vocabulary = tokenizer, tokenizer.get_added_vocab()
        self.cut = functools.lru_cache(self.cut)
        self.control_ids = set(vocabulary.values()) - {tokenizer.unk_token_id}
        readers = plain_tokenizers(tokenizer, [], AT_START, ANYWHERE)
        self.at_start, self.of_section, self.plain = readers
        tags = TAG.findall("".join(pieces) + OUR_TAGS)
        # Tags that are no control tokens here: text from outside could forge them.
        self.spelled = re.compile("|".join({re.escape(t) for t in tags if t not in vocabulary}))

    def encode(self, *texts: str, start: bool = False) -> list[int]:
        """The ids of texts that stand side by side.

        Args:
            texts: ours, from outside, ours, and so on. Only in ours are tags control tokens.
            start: whether the prompt begins here; else text of some kind stands before.
        """
        ids, section, reader = [], "", self.at_start if start else self.plain
        for number, text in enumerate(texts):
            before, control, text = ("", [], self.defused(text)) if number % 2 else self.cut(text)
            if control:
                ids += self.ids_of(section + before, reader) + control
                section, reader = "", self.of_section
            section += text
        return ids + self.ids_of(section, reader)

    def cut(self, text: str) -> tuple[str, list[int], str]:
        """A text of ours up to its first control token, the ids from there to its last one, and the
        text behind that.
        """
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = whole["input_ids"], whole["offset_mapping"]
        at = [n for n, id in enumerate(ids) if id in self.control_ids]
        if not at:
            return "", [], text
        return text[: spans[at[0]][0]], ids[at[0] : at[-1] + 1], text[spans[at[-1]][1] :]

    def ids_of(self, section: str, reader: Tokenizer) -> list[int]:
        ids = reader.encode(section, add_special_tokens=False).ids if section else []
        return [i for i in ids if i not in self.control_ids]

    def defused(self, text: str) -> str:
        """A text from outside with a space in each tag that is no control token here. What counts
        is the text that its ids say: some tokenizers drop or replace characters.
        """
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
        if self.spelled.pattern:
            said = self.plain.decode(self.ids_of(text, self.plain), skip_special_tokens=False)
            if self.spelled.search(said):
                return self.spelled.sub(lambda tag: f"{tag[0][0]} {tag[0][1:]}", said)
        return text
