"""A model's chat template, read once: the constant texts between messages."""

# A tokenizer without a chat template of its own (a base model's) gets ChatML, as Qwen and SmolLM2
# use.
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template_pieces(tokenizer) -> tuple[list[str], str]:
    """The chat template's own texts, and the token with which an assistant's turn ends.

    One conversation is rendered with sentinels in the place of its messages, and cut at them.

    Returns:
        ([before the system message, before the question, before an action, before a result, before
        the next action], end of turn). The policy samples the end of its turn itself, so the piece
        before a result begins behind it.

    Raises:
        ValueError: the template drops or rewrites a message, or no token ends a turn.
    """
    sentinels = ["SYSTEMTEXT", "QUESTIONTEXT", "ACTIONTEXT", "RESULTTEXT"]
    roles = ["system", "user", "assistant", "user"]
    rendered = tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in zip(roles, sentinels)],
        tokenize=False,
        add_generation_prompt=True,
        chat_template=tokenizer.chat_template or CHATML,
    )
    pieces = []
    for sentinel in sentinels:
        if sentinel not in rendered:
            raise ValueError(
                "this chat template drops or rewrites a message: "
                "it needs the roles system, user and assistant"
            )
        piece, rendered = rendered.split(sentinel, 1)
        pieces.append(piece)
    eos, end_of_turn = tokenizer.eos_token, "<|im_end|>"
    if tokenizer.chat_template and eos and eos in pieces[3]:
        end_of_turn = eos
    known = tokenizer.convert_tokens_to_ids(end_of_turn) is not None
    if not known or end_of_turn not in pieces[3]:
        raise ValueError("cannot find the token that ends an assistant's turn in this template")
    pieces[3] = pieces[3][pieces[3].index(end_of_turn) + len(end_of_turn) :]
    return [*pieces, rendered], end_of_turn
