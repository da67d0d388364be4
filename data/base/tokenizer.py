"""The nano tokenizer: a byte-level BPE that cuts a name into the same tokens wherever it stands.

In: texts. Out: a fast tokenizer with ChatML and tool tags. To try an idea, change PIECES, which
says where a token may never reach across.
"""

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.tasks import SHARES, draw_task
from data.world import World, page_html
from support.chat_template import CHATML
from support.html_text import html_to_text

# Words, numbers, the start of an address and everything else are never in one token. A space
# belongs to the lower-case word beside it and never to a name, number or address (" of " in "mayor
# of Belin"), so those are cut alike after a space, a quote, a slash or a bracket. A name is cut
# into its syllables: two tokens, for all names alike.
PIECES = (
    r"https?://| (?=https?://)| ?[a-z]+ (?=[A-Z0-9])| [a-z]+|[a-z]+|[A-Z][a-z]{0,2}|\d{1,3}"
    r"|[^A-Za-z0-9]+?(?= [a-z]|https?://)|[^A-Za-z0-9]+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = [
    f"<{slash}{tag}>"
    for tag in ("think", "tool_call", "tool_response", "answer")
    for slash in ("", "/")
]
# What calls, prompts and results look like besides pages and questions.
CALLS = [
    '{"name": "search", "arguments": {"queries": ["mayor of Kor", "river of Bel"]}}'
    '{"name": "search", "arguments": {"queries": ["mayor',
    '{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "find": "mayor"}}'
    '{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "page": 2}}',
    '{"name": "browse", "arguments": {"url": "http://w1.test/Kor", "links": true}}'
    '{"name": "python", "arguments": {"code": "print(abs(384 - 127))"}}',
    "Answer the question. Think inside then call tools or give the answer.\n Tools Call name "
    "arguments End list of str url page find links code",
    "p1: p2: p3: not found error (page 1 of 3) (page 2 of 4) no results old result removed system "
    "user assistant Let me look. Not sure. Not found.",
]


def train_tokenizer(texts, vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML and tool tags; any text is encoded and decodes to itself.

    Args:
        texts: what the merges are learned from.
        vocabulary: number of tokens in all.
    """
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PIECES), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(TAGS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(TAGS)
    fast.chat_template = CHATML
    return fast


def tokenizer_corpus(seed: int, worlds: int, entities: int) -> Iterator[str]:
    """Pages, questions, calls and every number: what the tokenizer's merges are learned from."""
    rng = random.Random(f"tokenizer-{seed}")
    for number in range(1000):
        yield f"{number} {number} " * 20
    for world_seed in range(100, 100 + worlds):
        world = World(world_seed, entities, "pretrain", style="varied")
        for index in range(entities):
            yield html_to_text(page_html(world, world.entity(index)))
        for _ in range(300):
            family, hops = rng.choice(list(SHARES["pretrain"]))
            task = draw_task(world, family, hops, rng, rng.random() < 0.3)
            address = world.elsewhere(str(rng.random())).url(rng.randrange(entities))
            yield f"{task.question} {address} "
            yield from CALLS
