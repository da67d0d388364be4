"""The engine: it decodes many trajectories together and keeps their KV cache across turns.

A *slot* is a trajectory in flight; a *row* is its memory in the KV cache. A turn costs only its new
tokens, since its row still holds everything before it. A slot whose tools are running costs
nothing, and its place in the next decoding pass is taken by whoever is ready (continuous batching).

In: a policy (any `AutoModelForCausalLM` with full attention) and prompts. Out: token ids as they
were sampled, and their log-probs. Nothing steers decoding: there is no grammar and no retry, only
plain sampling from softmax(logits / T). To try an idea (another sampler, say), change
`Engine.sample`; the trainer's `Policy.forward` must then give the log-probs of the same
distribution.
"""

import copy
import ctypes
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import Cache

from context import Chat, Trajectory
from decode_graphs import StaticDecoder
from support.flags import did_you_mean

NANO = Path(__file__).resolve().parent / "data" / "nano"
PREFILL_TOKENS = 2048  # of prompts in one pass, padding included
GPU_FACTOR = 16  # a GPU runs so many times PREFILL_TOKENS
PIECES_GAP = 1e-3  # between log-probs of one context, read at once or in pieces; float32
PADDING_TOKENS = 64  # of padding in one pass of prompts; more padding costs more than another pass


class WorkerError(RuntimeError):
    """Rollouts cannot go on; the message is one line."""


def check_finite(weights, version: int) -> None:
    """Raises WorkerError if a weight of these tensors is not finite."""
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise WorkerError(f"the weights of version {version} are not all finite: nobody gets them")


def local_models(folder: Path) -> dict[str, str]:
    """The names of nano and of a folder's models, each as it is written for `load_policy`."""
    found = [path for path in folder.glob("*") if (path / "config.json").is_file()]
    return {name: name for name in ["nano", *map(str, found)]}


def load_policy(name: str, device: torch.device | str = "cpu", weights: bool = True):
    """A causal language model and its tokenizer.

    Args:
        name: "nano" (the shipped base model), a `save_pretrained` folder, the folder of a run, a
        .gguf file, or a hub name.
        weights: False where only the tokenizer is needed; an empty module then stands for the
        model.

    Raises:
        ValueError: the model cannot be loaded; one line says why.
    """
    path = NANO if name == "nano" else Path(name)
    settings = {"trust_remote_code": False}
    near = "" if path.exists() else did_you_mean(name, local_models(path.parent), cutoff=0.7)
    if (path / "checkpoint").is_dir():
        path = path / "checkpoint"
    try:
        source = str(path) if path.exists() else name
        if name.endswith(".gguf"):
            if not path.is_file():
                raise OSError("there is no such file")
            source, settings["gguf_file"] = str(path.parent), path.name
        elif path.exists() and not (path / "config.json").is_file():
            raise OSError("the folder has no config.json; give the folder of a checkpoint")
        elif not path.exists() and (
            name.startswith((".", "/", "~", "runs/"))
            or name.count("/") > 1
            or (near and "/" not in name)
        ):
            raise OSError("there is no such folder")  # and a hub name does not look like this
        tokenizer = AutoTokenizer.from_pretrained(source, **settings)
        if not weights:
            return torch.nn.Module(), tokenizer
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, attn_implementation="sdpa", **settings
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:200].rstrip(".") + near
        raise ValueError(f"cannot load the model {name!r}: {reason}") from None
    if getattr(model, "hf_quantizer", None):
        # The weights of a .gguf file are plain numbers once they are loaded, and can be saved as
        # such.
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model.to(device).eval(), tokenizer


def check_full_attention(model, max_context: int) -> None:
    """Refuse a model whose layers see less, or other, than the whole context: its log-probs would
    be wrong.

    Raises:
        ValueError: one line says what is in the way.
    """
    config = model.config.get_text_config()
    uses_window = getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None) if uses_window else None
    default = ["sliding_attention" if window else "full_attention"]
    kinds = set(getattr(config, "layer_types", None) or default)
    others = sorted(kinds - {"full_attention", "sliding_attention"})
    limits = [("{} positions", getattr(config, "max_position_embeddings", None))]
    if "sliding_attention" in kinds:
        limits.append(("a sliding window of {} tokens", window))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past these positions all cached keys would change
        short = rope["original_max_position_embeddings"]
        limits.append(("{} positions before its rotary angles change", short))
    why = [f"it has layers of {', '.join(others)}"] if others else []
    why += [
        f"it has {words.format(limit)}; --max_context {limit} or less would do"
        for words, limit in limits
        if limit and limit < max_context
    ]
    if getattr(config, "attn_logit_softcapping", None):
        why.append("it caps attention scores")
    if why:
        raise ValueError(f"the engine cannot play a {model.config.model_type} model: {why[0]}")


def in_bf16(precision: str, on_gpu: bool) -> bool:
    """Whether a model samples by a copy in bfloat16 and learns under autocast (`--precision`)."""
    return on_gpu if precision == "auto" else precision == "bf16"


def keep_memory() -> None:
    """Tell glibc to reuse large blocks of memory: a CPU update is then 1.2 times as fast."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # no other C library has it
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


# --------------------------------------------------------------------------------------------------


class SlotCache(Cache):
    """Keys and values of all rows, preallocated: one tensor (count, heads, most + 1, head size)
    each a layer.

    A forward pass first says which rows it works on and where its new tokens stand (`rows`,
    `targets`). `update` writes the new keys and values there, and returns everything up to
    `length`. The extra column at the end takes what padding writes; nobody reads it.
    """

    def __init__(self, count: int, most: int):
        self.layers, self.count, self.columns = [], count, most + 1
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.rows: slice | torch.Tensor = slice(0, 0)
        self.targets: torch.Tensor | None = None  # (B, T)
        self.length = 0

    def update(self, keys, values, layer_idx, *_, **__):
        """Write keys and values (B, heads, T, head size) of one layer; return those of the whole
        context.
        """
        keys = keys.to(values.dtype)  # under autocast the rotary embedding has made float32 of them
        if layer_idx == len(self.keys):  # the first pass shows the shape
            for stored, new in ((self.keys, keys), (self.values, values)):
                stored.append(new.new_zeros(self.count, new.shape[1], self.columns, new.shape[3]))
        index = torch.arange(self.count, device=keys.device)[self.rows, None]  # (B, 1)
        result = []
        for stored, new in ((self.keys[layer_idx], keys), (self.values[layer_idx], values)):
            stored[index, :, self.targets] = new.transpose(1, 2)  # (B, T, heads, head size)
            # A view, not a copy, where `rows` is a slice.
            result.append(stored[self.rows, :, : self.length])
        return tuple(result)

    def run(self, model, rows, length: int, ids, positions, targets) -> torch.Tensor:
        """Run new tokens of some rows through a model.

        Args:
            rows: a slice of the rows, or a tensor of their numbers.
            length: columns that are read.
            ids, positions, targets: (B, T) each: the tokens, where each stands in its context, and
                the columns that are written.

        Returns:
            Logits after the last column, (B, V), float32.
        """
        self.rows, self.targets, self.length = rows, targets, length
        # (B, 1, T, length): 0 where a token sees and -inf where it does not. It is made once, not
        # in each layer.
        unseen = torch.arange(length, device=ids.device) > positions[:, None, :, None]
        mask = torch.zeros(unseen.shape, dtype=model.dtype, device=ids.device)
        output = model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask.masked_fill_(unseen, -torch.inf),
            past_key_values=self,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in self.keys + self.values:
            tensor[target, :, :length] = tensor[source, :, :length]

    def swap(self, a: int, b: int, length: int) -> None:
        for tensor in self.keys + self.values:
            tensor[[a, b], :, :length] = tensor[[b, a], :, :length]


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading ids that two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])


# --------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Slot:
    """A trajectory in flight, as the engine sees it."""

    trajectory: Trajectory
    row: int | None = None  # of the cache; None where it has none, since it is new or was evicted
    cached: list[int] = field(default_factory=list)  # ids whose keys and values are in its row
    pending: list[int] = field(default_factory=list)  # ids to run before the next token is sampled
    ids: list[int] = field(default_factory=list)  # sampled in this turn
    logprobs: list[float] = field(default_factory=list)  # of `ids`
    uniforms: np.ndarray | None = None  # random draws of this turn, one a token
    began: float = 0.0  # when the prompt of this turn was queued, in seconds
    turn_done: bool = True


class Engine:
    """Decodes many trajectories together.

    Rows of the KV cache are memory, and there may be fewer of them than slots (`kv_tokens`). A
    trajectory that waits for its tools keeps its row until another one needs it. Then the waiting
    trajectory with the least in its row is evicted, and what it had is computed again in its next
    turn. A row in the middle of a turn is never taken; if all are, a new turn waits.

    On a GPU, or with `--precision bf16`, a copy of the model in bfloat16 samples. A GPU decodes by
    the fixed shapes of decode_graphs.py.

    Args:
        model: its weights may change between turns, see `new_weights`.
        chat: its template. `chat.end_id` ends a turn. `chat.before_question` begins all prompts,
            and runs once for each version of the weights.
        args: `RolloutArgs`; slots, kv_tokens, max_context, max_new_tokens and temperature are read.
        version: of the model's weights.

    Raises:
        ValueError: the model lacks tokens or positions, or cannot be played from keys and values of
            its context alone.
    """

    def __init__(self, model, chat: Chat, args, version: int = 0):
        check_full_attention(model, args.max_context)
        known = model.get_input_embeddings().num_embeddings
        if (used := max([chat.end_id, *chat.before_question])) >= known:
            raise ValueError(f"the model knows {known} tokens, its tokenizer more: token {used}")
        self.learner = self.model = model  # `self.model` may become a copy
        self.end_id, self.device = chat.end_id, model.device
        self.temperature, self.max_new_tokens = args.temperature, args.max_new_tokens
        self.slots: list[Slot | None] = [None] * args.slots
        rows = args.slots
        if args.kv_tokens:
            rows = min(rows, max(1, args.kv_tokens // args.max_context))
        self.check_agreement()
        on_gpu = self.device.type == "cuda"
        if in_bf16(args.precision, on_gpu):
            self.model = copy.deepcopy(model)
            for parameter in self.model.parameters():  # rotary angles stay in float32
                parameter.data = parameter.data.to(torch.bfloat16)
        self.cache = SlotCache(rows + 1, args.max_context)  # the last row holds the shared prefix
        self.static = StaticDecoder(self.model, self.cache) if on_gpu else None
        self.most_prefill = PREFILL_TOKENS * (GPU_FACTOR if on_gpu else 1)
        self.users: list[Slot | None] = [None] * rows  # who used each row last; it may have left
        self.queue: list[Slot] = []  # turns that have no row yet
        self.shared_prefix, self.prefix_ready, self.version = chat.before_question, False, version
        self.stats = dict.fromkeys(("decode_s", "prefill_s", "idle_s"), 0.0)
        self.stats |= dict.fromkeys(("sampled", "prefilled", "evicted"), 0)  # tokens, tokens, rows

    @torch.no_grad()
    def check_agreement(self) -> None:
        """Read a few ids in pieces, as the engine does, and at once, as the trainer does.

        Raises:
            ValueError: the model cannot do that, or its log-probs differ.
        """
        self.cache = SlotCache(2, 16)  # for this check alone
        why = "its log-probs depend on whether it reads a context at once or in pieces"
        texts = [range(2, 14), range(5, 12)]
        cuts = [(0, 0), (6, 2), (11, 6), (12, 7)]  # how much of each is read after each piece
        try:
            for starts, ends in zip(cuts, cuts[1:]):
                chunks = [list(text[a:b]) for text, a, b in zip(texts, starts, ends)]
                logits = self.forward(chunks, list(starts), slice(0, 2))  # (2, V)
            gap = 0.0
            for text, logprobs in zip(texts, logits.log_softmax(-1)):
                ids = torch.tensor([text], device=self.device)
                last = ids == text[-1]
                output = self.model(input_ids=ids, use_cache=False, logits_to_keep=last)
                gaps = output.logits.float().log_softmax(-1) - logprobs  # (1, V)
                gap = max(gap, float(gaps.abs().max()))
        except Exception as error:  # all models know these ids, and fail in many ways
            why, gap = " ".join(str(error).split())[:200], torch.inf
        if not gap < PIECES_GAP:
            raise ValueError(
                f"the engine cannot play a {self.model.config.model_type} model: {why}"
            )

    @torch.no_grad()
    def new_weights(self, version: int) -> None:
        """The weights have changed, so cached keys and values are void. Call it between turns."""
        self.version, self.prefix_ready = version, False
        if self.model is not self.learner:
            for ours, theirs in zip(self.model.parameters(), self.learner.parameters()):
                ours.copy_(theirs)
        for slot in filter(None, self.slots):
            slot.cached = []

    def free_places(self) -> list[int]:
        """The places in `slots` that nobody has."""
        return [place for place, slot in enumerate(self.slots) if slot is None]

    def at_boundary(self) -> bool:
        """Whether no slot is in the middle of a turn."""
        return all(slot is None or slot.turn_done for slot in self.slots)

    def start_turn(self, slot: Slot, prompt: list[int]) -> None:
        """Queue a prompt of a slot that is in `slots`; `step` gives it a row of the cache and runs
        it.
        """
        slot.pending, slot.ids, slot.logprobs, slot.turn_done = prompt, [], [], False
        slot.began = time.perf_counter()
        key = [*slot.trajectory.key, len(slot.trajectory.turns)]
        slot.uniforms = np.random.default_rng(key).random(self.max_new_tokens)
        self.queue.append(slot)

    def step(self) -> list[Slot]:
        """One token for every slot that is in the middle of a turn; returns the slots whose turn
        ended.
        """
        clock = time.perf_counter()
        self.admit()
        busy = [slot for slot in self.slots if slot and not slot.turn_done and slot.row is not None]
        decoding = [slot for slot in busy if not slot.pending]
        ended = []
        pending = [slot for slot in busy if slot.pending]
        for batch in batches_of_like_length(pending, self.most_prefill):
            ended += self.prefill(batch)
        self.stats["prefill_s"] += time.perf_counter() - clock
        if decoding:
            clock = time.perf_counter()
            ended += self.decode(decoding)
            self.stats["decode_s"] += time.perf_counter() - clock
        return ended

    def admit(self) -> None:
        """Give queued turns their rows. What a row holds of a prompt is not computed again."""
        if self.queue and not self.prefix_ready and self.shared_prefix:
            self.forward([self.shared_prefix], [0], [len(self.users)])
            self.prefix_ready = True
        live, waiting = set(filter(None, self.slots)), []
        for slot in self.queue:
            if slot not in live:
                continue
            if slot.row is None and not self.find_row(slot, live):
                waiting.append(slot)
                continue
            prompt = slot.pending
            common = common_prefix(slot.cached, prompt)
            shared = common_prefix(self.shared_prefix, prompt)
            if shared > common:
                self.cache.copy(len(self.users), slot.row, shared)
                common = shared
            common = min(common, len(prompt) - 1)  # at least one token must run, to give logits
            slot.cached, slot.pending = prompt[:common], prompt[common:]
        self.queue = waiting

    def find_row(self, slot: Slot, live: set[Slot]) -> bool:
        """Give the slot a row that nobody needs now, if there is one; whoever waits in it for tools
        is evicted.
        """
        idle = [row for row, user in enumerate(self.users) if user not in live or user.turn_done]
        if not idle:
            return False
        kept = {row: len(self.users[row].cached) if self.users[row] in live else -1 for row in idle}
        slot.row, slot.cached = min(idle, key=kept.get), []
        evicted, self.users[slot.row] = self.users[slot.row], slot
        if evicted in live:
            evicted.row, evicted.cached = None, []
            self.stats["evicted"] += 1
        return True

    def prefill(self, batch: list[Slot]) -> list[Slot]:
        """Run pending prompts; those that are complete get their first token. Of a long one
        `most_prefill` tokens are run, so that the others go on decoding.
        """
        batch = sorted(batch, key=lambda slot: slot.row)
        pieces = [slot.pending[: self.most_prefill] for slot in batch]
        starts, rows = [len(slot.cached) for slot in batch], [slot.row for slot in batch]
        if rows[-1] - rows[0] < len(rows):  # side by side: they can be read without a copy
            rows = slice(rows[0], rows[-1] + 1)
        logits = self.forward(pieces, starts, rows)
        for slot, piece in zip(batch, pieces):
            self.stats["prefilled"] += len(piece)
            slot.cached, slot.pending = slot.cached + piece, slot.pending[len(piece) :]
        complete = [b for b, slot in enumerate(batch) if not slot.pending]
        return self.sample(logits[complete], [batch[b] for b in complete]) if complete else []

    def decode(self, decoding: list[Slot]) -> list[Slot]:
        """One more token for slots that have sampled one."""
        self.move_to_front(decoding)
        decoding = self.users[: len(decoding)]
        ids, starts = [slot.ids[-1] for slot in decoding], [len(s.cached) for s in decoding]
        if self.static:
            logits = self.static.step(ids, starts)
        else:
            logits = self.forward([[id] for id in ids], starts, slice(0, len(decoding)))
        for slot in decoding:
            slot.cached.append(slot.ids[-1])
        return self.sample(logits, decoding)

    def move_to_front(self, decoding: list[Slot]) -> None:
        """Bring the rows of these slots to the front, where they can be read without a copy: the
        last ones fill the gaps.
        """
        rows = sorted(slot.row for slot in decoding)
        gaps = sorted(set(range(len(rows))) - set(rows))
        live = set(filter(None, self.slots))
        for gap, row in zip(gaps, rows[len(rows) - len(gaps) :]):
            there, slot = self.users[gap], self.users[row]
            if there in live:
                self.cache.swap(gap, row, max(len(there.cached), len(slot.cached)))
                there.row = row
            else:
                self.cache.copy(row, gap, len(slot.cached))
            self.users[gap], self.users[row], slot.row = slot, there, gap

    @torch.no_grad()
    def forward(self, chunks: list[list[int]], starts: list[int], rows) -> torch.Tensor:
        """Run new tokens of some rows through the model.

        Shorter chunks are padded on the left, so that all of them end in the last column: only
        there the large matrix of the vocabulary is needed. Padding sees column 0 and writes to the
        extra column of the cache.

        Args:
            chunks: new ids of each row.
            starts: position of the first new id of each row.
            rows: a slice of the cache's rows, or a list of their numbers.

        Returns:
            Logits after each row's last token, (B, V), float32.
        """
        B, T = len(chunks), max(map(len, chunks))
        inputs = np.zeros((3, B, T), dtype=np.int64)  # ids, positions, columns that are written
        inputs[2] = self.cache.columns - 1
        for b, (chunk, start) in enumerate(zip(chunks, starts)):
            inputs[0, b, T - len(chunk) :] = chunk
            inputs[1:, b, T - len(chunk) :] = np.arange(start, start + len(chunk))
        length = int(inputs[1, :, -1].max()) + 1
        if not isinstance(rows, slice):
            rows = torch.tensor(rows, device=self.device)
        ids, positions, targets = torch.from_numpy(inputs).to(self.device)
        return self.cache.run(self.model, rows, length, ids, positions, targets)

    def sample(self, logits: torch.Tensor, slots: list[Slot]) -> list[Slot]:
        """Draw a token for each slot from softmax(logits / T); returns the slots whose turn ended.

        The draw inverts the cumulative distribution; torch.multinomial takes ten times as long.

        Args:
            logits: (B, V).
        """
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)  # (B, V)
        if self.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)  # (B, 1)
        else:
            cumulative = logprobs.exp().cumsum(-1)
            draws = [slot.uniforms[len(slot.ids)] for slot in slots]
            u = torch.tensor(draws, dtype=torch.float32, device=logits.device)[:, None]
            # A draw that rounds to 1 would take the last token, however unlikely that is.
            u.clamp_(max=1 - 2**-24)
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
            tokens = tokens.clamp_(max=logits.shape[-1] - 1)
        chosen = logprobs.gather(-1, tokens)[:, 0].tolist()
        for slot, token, logprob in zip(slots, tokens[:, 0].tolist(), chosen):
            slot.ids.append(token)
            slot.logprobs.append(logprob)
            slot.turn_done = token == self.end_id or len(slot.ids) == self.max_new_tokens
        self.stats["sampled"] += len(slots)
        return [slot for slot in slots if slot.turn_done]


def batches_of_like_length(slots: list[Slot], most: int) -> list[list[Slot]]:
    """Slots with pending prompts, in batches of at most so many tokens and with little padding."""
    most_padding = PADDING_TOKENS * most // PREFILL_TOKENS
    batches: list[list[Slot]] = []
    for slot in sorted(slots, key=lambda slot: len(slot.pending)):
        batch = [*batches[-1], slot] if batches else [slot]
        tokens = len(batch) * len(slot.pending)
        padding = tokens - sum(len(other.pending) for other in batch)
        if len(batch) > 1 and tokens <= most and padding <= most_padding:
            batches[-1] = batch
        else:
            batches.append([slot])
    return batches
