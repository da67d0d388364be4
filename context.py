"""What the policy sees before each turn: messages as token ids, and the context manager.

Token-in, token-out: what the policy sampled is kept as ids. It is never decoded and encoded again.
Text from outside (question, tool results, error texts) is *untrusted*. A second tokenizer that has
no control tokens at all encodes it, so a page that contains `<|im_end|>` or `<tool_call>` gives
ordinary pieces of text. Role tags come from the model's own chat template, once, as constant ids.

The context manager is the transition function of Kimi-Researcher's loop: s_{t+1} =
context_manager(s_t, think_t, action_t, observation_t). Ours are plain functions
`manager(trajectory, chat, budget_tokens) -> prompt ids`. Whenever the next prompt is not a pure
extension of the last one, training sees a new segment (the prefix rule, `extend_segments`).

In: a tokenizer, a trajectory. Out: lists of token ids. This file also holds the types that
everything else speaks of: Turn, Segment, Trajectory.
To try an idea, write a function like `elide` and add it to MANAGERS.
"""

from dataclasses import dataclass, field

from data.task import Task
from support.chat_template import Encoder, template_pieces

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


@dataclass
class Segment:
    """A token sequence that training sees: the exact context of each action in it.

    The three lists have one entry a token. `turn_of[t]` is the index of the turn that sampled token
    t. It is -1 for a token that the policy did not sample (prompt, observation); such tokens are
    not in the loss. `logprobs[t]` is the sampler's log-prob of token t, and 0 where the policy did
    not sample it.
    """

    ids: list[int] = field(default_factory=list)
    turn_of: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def append(self, ids: list[int], turn: int = -1, logprobs: list[float] | None = None) -> None:
        self.ids.extend(ids)
        self.turn_of.extend([turn] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))


@dataclass
class Turn:
    """What the policy sampled from one prompt, and what followed."""

    action_ids: list[int]  # as sampled, with the end-of-turn token unless the turn was cut
    logprobs: list[float]  # of action_ids, under the distribution that they were sampled from
    version: int  # of the policy that sampled them
    observation_ids: list[int] = field(default_factory=list)  # what followed
    calls: list[dict] = field(default_factory=list)  # {"name": ..., "arguments": ...} each
    results: list[str] = field(default_factory=list)  # of the calls, in their order
    faults: int = 0  # results that were the environment's failure
    began: float = 0.0  # when its prompt was queued, in seconds of `time.perf_counter`
    generate_s: float = 0.0
    tool_s: float = 0.0


@dataclass
class Trajectory:
    """One attempt at one task. It is plain data: at any turn boundary it can be pickled, and
    another process, with another version of the policy, can go on with it.
    """

    task: Task
    key: tuple[int, ...]  # decides its random draws, whoever plays it; see rollout.new_group
    head_ids: list[int] = field(default_factory=list)  # the first prompt
    turns: list[Turn] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    status: str = "running"  # answered, format_error, over_context, over_turns, tool_fault
    error: str = ""  # the kind of a format error, or what a server said
    answer: str | None = None
    memory: dict = field(default_factory=dict)  # what managers, tools, judge and parser keep
    urls: list[str] = field(default_factory=list)  # that it asked for, or that stood in results
    pages: list[str] = field(default_factory=list)  # addresses that it opened, once for each call


class Chat:
    """The constant pieces of a model's chat template as token ids, and the two ways to encode text.

    Args:
        tokenizer: a fast `transformers` tokenizer.
        signatures: one text a tool, shown in the system prompt.

    Raises:
        ValueError: one line says what the template or the tokenizer lacks.
    """

    def __init__(self, tokenizer, signatures: list[str]):
        self.tokenizer = tokenizer
        pieces, end_of_turn = template_pieces(tokenizer)
        system_tag, question_tag, action_tag, result_tag, next_action_tag = pieces
        encoder = Encoder(tokenizer, pieces)
        self.encode, self.plain = encoder.encode, encoder.plain
        self.tags, self.control_ids = list(tokenizer.get_added_vocab().items()), encoder.control_ids

        self.end_id = tokenizer.convert_tokens_to_ids(end_of_turn)
        system = SYSTEM_PROMPT.format(signatures="; ".join(signatures))
        self.around_question = (system_tag + system + question_tag, action_tag)
        self.before_question = self.encode(self.around_question[0], start=True)
        self.before_action = self.trusted(action_tag)
        # A thought that the generation prompt has opened counts as said by the policy.
        self.opened = "".join(action_tag.partition("<think>")[1:])
        self.before_result = self.encode(end_of_turn + result_tag)[1:]  # that end was sampled
        self.before_next_action = self.trusted(next_action_tag)
        self.open_response = self.trusted("<tool_response>")
        self.close_response = self.trusted("</tool_response>")
        request = end_of_turn + result_tag + NOTES_REQUEST + next_action_tag
        self.request_notes = self.encode(request)[1:]
        self.before_notes = self.trusted("\nNotes: ")

    def trusted(self, text: str) -> list[int]:
        """Encode text of our own, in which tags are control tokens."""
        return self.encode(text)

    def untrusted(self, text: str) -> list[int]:
        """Encode text from outside: no id is a control token, whatever the text says."""
        return self.encode("", text)

    def head(self, question: str) -> list[int]:
        """The first prompt: system prompt with tool declarations, question, and the tag that opens
        the policy's turn.
        """
        before, after = self.around_question
        return self.encode(before, question, after, start=True)

    def observation(self, results: list[str], limit_tokens: int) -> list[int]:
        """Ids that follow an action: each tool result in its own tags, then the tag that opens the
        policy's next turn.

        Args:
            results: tool results in call order.
            limit_tokens: the results together are cut to about this many tokens. The cut is made on
                ids, and never inside a tag.
        """
        ids = list(self.before_result)
        share = max(1, limit_tokens // max(1, len(results)))
        for result in results:
            opened = self.encode("<tool_response>", result)[: len(self.open_response) + share]
            ids += opened + self.close_response
        return ids + self.before_next_action

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids for the parser and for people, with the tags visible.

        A tag that this tokenizer has as a control token counts only where that token was sampled.
        Spelled out of plain pieces it is text that the policy quotes, from a page say. Such a tag
        gets a zero-width space, so that the parser does not see it. A tokenizer without such a
        token spells its tags, and then they count.
        """
        whole = self.text_of(ids)
        if all(whole.count(tag) == ids.count(id) for tag, id in self.tags if tag in whole):
            return whole
        text, plain = "", []
        for id in [*ids, None]:
            if id is not None and id not in self.control_ids:
                plain.append(id)
                continue
            spelled = self.text_of(plain)
            for tag, _ in self.tags:
                spelled = spelled.replace(tag, f"{tag[0]}\u200b{tag[1:]}")
            text += spelled + (self.text_of([id]) if id is not None else "")
            plain = []
        return text

    def text_of(self, ids: list[int]) -> str:
        return self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


# ----------------------------------------------------------------------------- context managers


def elide_turns(trajectory: Trajectory, chat: Chat, old_turns: int) -> list[int]:
    """The prompt in which the results of the first `old_turns` turns are stubs."""
    stub = chat.observation([ELIDED], 64)
    ids = list(trajectory.head_ids)
    for number, turn in enumerate(trajectory.turns):
        is_stub = number < old_turns and len(turn.observation_ids) > len(stub)
        ids += turn.action_ids + (stub if is_stub else turn.observation_ids)
    return ids


def none(trajectory: Trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """Everything that was ever said. The trajectory ends when the window is full."""
    return elide_turns(trajectory, chat, 0)


def elide(trajectory: Trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """Replace the oldest tool results by stubs when the prompt passes its budget.

    The prompt then goes down to half the budget at once, so that the prefix, and with it the KV
    cache, changes once in many turns.
    """
    old_turns = trajectory.memory.get("elided_turns", 0)
    ids = elide_turns(trajectory, chat, old_turns)
    if len(ids) > budget_tokens:
        while len(ids) > budget_tokens // 2 and old_turns < len(trajectory.turns) - 1:
            old_turns += 1
            ids = elide_turns(trajectory, chat, old_turns)
        trajectory.memory["elided_turns"] = old_turns
    return ids


def summarize(trajectory: Trajectory, chat: Chat, budget_tokens: int) -> list[int]:
    """When the prompt passes its budget, the policy writes notes that replace all earlier turns.

    The request for notes takes the place of the last result, so the prompt that asks is a pure
    extension of the segment and is always short enough. The next prompt is: system, question,
    notes, the last action, its result. So notes never speak of a result that is still in view (the
    policy would count it twice), and no result is lost unread. Only where the budget has no room
    for the whole result is its end cut. The next notes are written with the old ones in view, and
    replace them.

    A turn of notes is free text: nobody reads calls or answers in it (`rollout.read_turn`). A
    policy that has its answer gives it a turn later. The notes are an action like any other. They
    are trained under the context that produced them, with the return of the whole trajectory, as in
    SUPO (Lu et al. 2025, arXiv:2510.06727). CompactionRL (arXiv:2607.05378) found that notes left
    out of the loss degenerate to mere brevity. Moonshot says only that its mechanism lets the model
    "retain important information while discarding unnecessary documents".
    """
    turns = trajectory.turns
    # The turns that are notes; the last one may still be unwritten.
    notes_turns = trajectory.memory.setdefault("notes_turns", [])
    written = [number for number in notes_turns if number < len(turns)]
    ids, later = list(trajectory.head_ids), turns
    if written:
        ids = prompt_after_notes(trajectory, chat, written[-1], budget_tokens)
        later = turns[written[-1] + 1 :]
    if not later:  # the first turn, or the first one after notes
        return ids
    for turn in later[:-1]:
        ids += turn.action_ids + turn.observation_ids
    whole = ids + later[-1].action_ids + later[-1].observation_ids
    if len(whole) > budget_tokens and len(turns) not in notes_turns:
        notes_turns.append(len(turns))
    if len(turns) in notes_turns:
        return ids + later[-1].action_ids + chat.request_notes
    return whole


def prompt_after_notes(
    trajectory: Trajectory, chat: Chat, notes_turn: int, budget_tokens: int
) -> list[int]:
    """System, question, the notes of turn `notes_turn`, the action before them and its result."""
    before, notes = trajectory.turns[notes_turn - 1], trajectory.turns[notes_turn]
    ids = trajectory.head_ids[: -len(chat.before_action)] + chat.before_notes
    # Without control tokens, so that notes cannot end the question's turn.
    ids += [i for i in notes.action_ids if i not in chat.control_ids] + chat.before_action
    result = before.observation_ids
    over = len(ids) + len(before.action_ids) + len(result) - budget_tokens
    if over > 0:  # cut the result, with some room for the tags around each part of it
        room = max(16, len(result) - over - 32 * len(before.results))
        result = chat.observation(before.results, room)
    return ids + before.action_ids + result


# HACK HERE: a new context manager is a function (trajectory, chat, budget_tokens) -> prompt ids.
# What it wants to remember goes into trajectory.memory as plain data, and travels with it.
# memory["notes_turns"] lists the turns that it asked notes of: those are free text.
MANAGERS = {"none": none, "elide": elide, "summarize": summarize}


def extend_segments(segments: list[Segment], prompt_ids: list[int]) -> None:
    """The prefix rule: extend the last segment if the prompt begins with it, else open another."""
    if segments and prompt_ids[: len(segments[-1].ids)] == segments[-1].ids:
        segments[-1].append(prompt_ids[len(segments[-1].ids) :])
    else:
        segments.append(Segment())
        segments[-1].append(prompt_ids)


def add_turn(trajectory: Trajectory, turn: Turn) -> None:
    """Append what was sampled to the trajectory, and to the segment whose prompt it follows."""
    trajectory.segments[-1].append(turn.action_ids, len(trajectory.turns), turn.logprobs)
    trajectory.turns.append(turn)
