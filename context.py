"""Messages to token ids, loss masks, and the context manager: what the policy sees before each turn.

Token-in, token-out: what the policy sampled is kept as ids and never decoded and re-encoded; everything else (question, tool
results, error texts) is *untrusted text* and is encoded by a second tokenizer that has no control tokens at all, so a page
that contains `<|im_end|>` or `<tool_call>` yields ordinary pieces of text. Role tags come from the model's own chat
template, once, as constant ids.

The context manager is the transition function of Kimi-Researcher's loop: s_{t+1} = context_manager(s_t, think_t, action_t,
observation_t). Ours are plain functions `manager(trajectory, chat, budget_tokens) -> prompt ids`. Whenever the next prompt
is not a pure extension of the last one, training sees a new segment (the prefix rule, `extend_segments`).

In: a tokenizer, a trajectory. Out: lists of token ids. To try an idea, write a function like `elide` and add it to MANAGERS.

`summarize` lets the policy itself write what to keep. As in SUPO (Lu et al. 2025, arXiv:2510.06727) the notes are an action like
any other: they are trained, under the context that produced them, with the return of the whole trajectory. (CompactionRL,
arXiv:2607.05378, found that notes left out of the loss degenerate to mere brevity.) Moonshot says only that its mechanism lets the
model "retain important information while discarding unnecessary documents".
"""

import json
from dataclasses import dataclass, field

from tokenizers import Tokenizer

from data.task import Task

SYSTEM_PROMPT = (
    "Answer the question. Think inside <think></think>, then call tools or give the answer.\n"
    "Tools: {signatures}.\n"
    'Call: <tool_call>{{"name": "search", "arguments": {{"queries": ["..."]}}}}</tool_call>\n'
    "End: <answer>...</answer>"
)
ELIDED = "old result removed"
NOTES_REQUEST = (
    "Write down what to keep: earlier turns will be removed. The last result comes after that."
)

# Used when a tokenizer brings no chat template of its own (base models): ChatML, as Qwen and SmolLM2 write it.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class Segment:
    """A token sequence that training sees: the exact context of each action in it.

    ids, turn_of, logprobs all have length T. `turn_of[t]` is the index of the turn that sampled token t, or -1 for a token
    the policy did not sample (prompt, observation): those carry no loss. `logprobs[t]` is the sampler's log-prob, 0 elsewhere.
    """

    ids: list[int]
    turn_of: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, ids: list[int], turn: int = -1, logprobs: list[float] | None = None) -> None:
        self.ids.extend(ids)
        self.turn_of.extend([turn] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))


@dataclass
class Turn:
    """One model step."""

    action_ids: list[int]  # as sampled, the end-of-turn token included
    logprobs: list[float]  # of action_ids under the distribution sampled from
    version: int  # policy version that sampled them
    observation_ids: list[int] = field(default_factory=list)  # what followed
    calls: list[dict] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    faults: int = 0  # results that were the environment's failure
    began: float = 0.0  # when its prompt was queued, seconds on the clock that all processes of a machine share
    generate_s: float = 0.0
    tool_s: float = 0.0


@dataclass
class Trajectory:
    """One attempt at one task. Plain data: it can be pickled at any turn boundary and continued elsewhere."""

    task: Task
    key: tuple[
        int, ...
    ]  # (run seed, version, task, index in the group, …): decides its random draws, whoever runs it
    head_ids: list[int] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    status: str = "running"  # answered, format_error, over_context, over_turns, tool_fault
    error: str = ""  # kind of format error
    answer: str | None = None
    memory: dict = field(default_factory=dict)  # the context manager's
    urls: list[str] = field(default_factory=list)  # seen in results or opened


class Chat:
    """The constant pieces of a model's chat template as token ids, and the two ways to encode text.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        signatures: one text a tool, shown in the system prompt.
    """

    def __init__(self, tokenizer, signatures: list[str]):
        self.tokenizer = tokenizer
        # The second tokenizer: the same vocabulary without added tokens. `split_special_tokens=True` is not enough, since
        # tags such as <tool_call> are added tokens but not special ones (transformers#29279).
        stripped = json.loads(tokenizer.backend_tokenizer.to_str())
        stripped["added_tokens"], stripped["post_processor"] = [], None
        self.plain = Tokenizer.from_str(json.dumps(stripped))
        self.tags = list(tokenizer.get_added_vocab().items())
        self.control_ids = {id for _, id in self.tags}

        # Render one conversation with sentinels and cut it at them: what stands between is the template's own text.
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
                    "this chat template drops or rewrites a message (it needs system, user and assistant roles)"
                )
            piece, rendered = rendered.split(sentinel, 1)
            pieces.append(piece)
        before_system, before_question, before_action, before_result = pieces
        before_next_action = rendered
        if tokenizer.chat_template and tokenizer.eos_token and tokenizer.eos_token in before_result:
            end_of_turn = tokenizer.eos_token
        else:
            end_of_turn = "<|im_end|>"
        self.end_id = tokenizer.convert_tokens_to_ids(end_of_turn)
        if self.end_id is None or end_of_turn not in before_result:
            raise ValueError(
                "cannot find the token that ends an assistant's turn in this chat template"
            )
        before_result = before_result[
            before_result.index(end_of_turn) + len(end_of_turn) :
        ]  # the policy samples it itself
        system = SYSTEM_PROMPT.format(signatures="; ".join(signatures))
        self.before_question = self.trusted(before_system + system + before_question)
        self.before_action = self.trusted(before_action)
        self.before_result = self.trusted(before_result)
        self.before_next_action = self.trusted(before_next_action)
        self.open_response = self.trusted("<tool_response>")
        self.close_response = self.trusted("</tool_response>")
        self.request_notes = (
            self.before_result + self.trusted(NOTES_REQUEST) + self.before_next_action
        )
        self.before_notes = self.trusted("\nNotes: ")

    def trusted(self, text: str) -> list[int]:
        """Encode text of our own, in which tags are control tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def untrusted(self, text: str) -> list[int]:
        """Encode text from outside: no id of the result is a control token, whatever the text says."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be encoded
        return [
            i
            for i in self.plain.encode(text, add_special_tokens=False).ids
            if i not in self.control_ids
        ]

    def head(self, question: str) -> list[int]:
        """The first prompt: system prompt with tool declarations, question, and the tag that opens the policy's turn."""
        return self.before_question + self.untrusted(question) + self.before_action

    def observation(self, results: list[str], limit_tokens: int) -> list[int]:
        """Ids that follow an action: each tool result in its own tags, then the tag that opens the policy's next turn.

        Args:
            results: tool results in call order.
            limit_tokens: the results together are cut to about this many tokens (on ids, never inside a tag).
        """
        ids = list(self.before_result)
        share = max(1, limit_tokens // max(1, len(results)))
        for result in results:
            ids += self.open_response + self.untrusted(result)[:share] + self.close_response
        return ids + self.before_next_action

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids for the parser and for people, with the tags visible; never encoded again.

        A tag that this tokenizer has as a control token counts only where that token was sampled. Spelled out of plain
        pieces it is text that the policy quotes (from a page, say) and gets a zero-width space, so that the parser does not
        see it. A tokenizer without such a token spells its tags, and then they count.
        """
        text = lambda part: self.tokenizer.decode(
            part, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        whole = text(ids)
        if all(whole.count(tag) == ids.count(id) for tag, id in self.tags if tag in whole):
            return whole
        pieces, plain = [], []
        for id in [*ids, None]:
            if id is not None and id not in self.control_ids:
                plain.append(id)
                continue
            spelled = text(plain)
            for tag, _ in self.tags:
                spelled = spelled.replace(tag, f"{tag[0]}\u200b{tag[1:]}")
            pieces += [spelled, text([id]) if id is not None else ""]
            plain = []
        return "".join(pieces)


def elide_turns(trajectory, chat: Chat, old_turns: int) -> list[int]:
    """The prompt in which the results of the first `old_turns` turns are stubs."""
    stub = chat.observation([ELIDED], 64)
    ids = list(trajectory.head_ids)
    for number, turn in enumerate(trajectory.turns):
        ids += turn.action_ids + (
            stub
            if number < old_turns and len(turn.observation_ids) > len(stub)
            else turn.observation_ids
        )
    return ids


def none(trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """Everything that was ever said; the trajectory dies when the window is full. The baseline."""
    return elide_turns(trajectory, chat, 0)


def elide(trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """Replace the oldest tool results by stubs when the prompt passes its budget.

    It then goes down to half the budget at once, so that the prefix (and its KV cache) changes once in many turns.
    """
    old_turns = trajectory.memory.get("elided_turns", 0)
    ids = elide_turns(trajectory, chat, old_turns)
    if len(ids) > budget_tokens:
        while len(ids) > budget_tokens // 2 and old_turns < len(trajectory.turns) - 1:
            old_turns += 1
            ids = elide_turns(trajectory, chat, old_turns)
        trajectory.memory["elided_turns"] = old_turns
    return ids


def summarize(trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """When the prompt passes its budget the policy writes notes, which then stand for everything before its last turn.

    The request for notes takes the place of the last result, so the prompt that asks is a pure extension of the segment and
    always short enough. The next prompt is: system, question, notes, the last action and its result, whole. So notes never speak
    of a result that is still in front of the policy (it would count it twice), and a result is never lost unread; where the budget has
    no room for the whole of it beside question, notes and action, its end is cut. The next notes are written with the old ones in view,
    and replace them.

    A notes turn is not read for calls or answers, whatever it says (`finish_turn`; nano-rlm's rule, too): a policy that has its answer
    gives it a turn later, and nothing that it writes can be an action or, fed back without control tokens, the end of the question's turn.
    """
    turns, notes_turns = (
        trajectory.turns,
        trajectory.memory.setdefault("notes_turns", []),
    )  # the last one may still be unwritten
    ids, later = list(trajectory.head_ids), turns
    if written := [n for n in notes_turns if n < len(turns)]:
        before, notes, later = turns[written[-1] - 1], turns[written[-1]], turns[written[-1] + 1 :]
        ids = (
            ids[: -len(chat.before_action)]
            + chat.before_notes
            + [i for i in notes.action_ids if i not in chat.control_ids]
            + chat.before_action
        )
        result = before.observation_ids
        if (over := len(ids) + len(before.action_ids) + len(result) - budget_tokens) > 0:
            result = chat.observation(
                before.results, max(16, len(result) - over - 32 * len(before.results))
            )
        ids += before.action_ids + result
    for turn in later[:-1]:
        ids += turn.action_ids + turn.observation_ids
    if not later:  # the first turn, or the first after notes
        return ids
    whole = ids + later[-1].action_ids + later[-1].observation_ids
    if len(whole) > budget_tokens and len(turns) not in notes_turns:
        notes_turns.append(len(turns))
    return ids + later[-1].action_ids + chat.request_notes if len(turns) in notes_turns else whole


# HACK HERE: a new context manager is a function (trajectory, chat, budget_tokens) -> prompt ids; what it wants to remember
# between turns goes into trajectory.memory, which is parked and resumed with the trajectory. memory["notes_turns"] lists the
# turns that it asked notes of: those are free text.
MANAGERS = {"none": none, "elide": elide, "summarize": summarize}


def extend_segments(segments: list[Segment], prompt_ids: list[int]) -> None:
    """The prefix rule: extend the last segment if the new prompt is a pure extension of it, else open a new one."""
    if segments and prompt_ids[: len(segments[-1].ids)] == segments[-1].ids:
        segments[-1].append(prompt_ids[len(segments[-1].ids) :])
    else:
        segments.append(Segment([]))
        segments[-1].append(prompt_ids)
