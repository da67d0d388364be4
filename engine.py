"""The engine that decodes many trajectories at once."""

import ctypes
import inspect
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

from context import Trajectory

NANO = Path(__file__).resolve().parent / "data" / "nano"
PREFILL_TOKENS = 2048  # of prompts in one pass, padding included
PADDING_TOKENS = 64  # in one pass of prompts: more cost more than another pass does
TRACED_ROWS = 16  # decoding passes of up to so many rows are replayed from a trace: of more rows, Python is a small part


def load_policy(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
    """A causal language model and its tokenizer.

    Args:
        name: "nano" (the shipped base model), a `save_pretrained` folder, a .gguf file, or a hub name.

    Raises:
        ValueError: it cannot be loaded; one line that says why.
    """
    path = NANO if name == "nano" else Path(name)
    try:
        if name.endswith(".gguf"):
            if not path.is_file():
                raise OSError("no such file")
            source, extra = str(path.parent), {"gguf_file": path.name}
        else:
            if path.exists() and not (path / "config.json").is_file():
                raise OSError("the folder has no config.json: give a checkpoint folder")
            source, extra = str(path) if path.exists() else name, {}
            if not path.exists() and (
                name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1
            ):
                raise OSError("no such folder")  # it cannot be a hub name either
        tokenizer = AutoTokenizer.from_pretrained(source, **extra)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa", **extra
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ValueError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0][:200]}"
        ) from None
    if getattr(
        model, "hf_quantizer", None
    ):  # a .gguf file's weights are plain numbers once loaded, and can be saved as such
        model.hf_quantizer = None
        model.config.__dict__.pop("quantization_config", None)
    return model.to(device).eval(), tokenizer


def keep_memory() -> None:
    """Tell glibc to reuse large blocks instead of returning them to the system: 1.2x faster training steps on a CPU."""
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        except OSError:
            pass


# -------------------------------------------------------------------------------------------------------------- engine


class SlotCache(Cache):
    """Keys and values of all rows, preallocated: one (rows, heads, length, size) tensor each a layer.

    A forward pass first says which rows it works on (`rows`, `positions`); `update` then writes the new tokens there and
    returns everything up to `length`. One extra column at the end takes what padding writes.
    """

    def __init__(self, rows: int, length: int):
        self.layers, self.count, self.columns = [], rows, length + 1
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.rows = self.rows_tensor = self.positions = self.length = None

    def update(self, keys, values, layer_idx, *_, **__):
        keys = keys.to(
            values.dtype
        )  # under autocast rotary embedding makes float32 of them, and attention bfloat16 again
        if layer_idx == len(self.keys):  # the first pass shows the shape
            for stored, new in ((self.keys, keys), (self.values, values)):
                stored.append(new.new_zeros(self.count, new.shape[1], self.columns, new.shape[3]))
        all_keys, all_values = self.keys[layer_idx], self.values[layer_idx]
        index = self.rows_tensor[:, None]  # (B, 1)
        all_keys[index, :, self.positions] = keys.transpose(1, 2)  # (B, T, heads, size)
        all_values[index, :, self.positions] = values.transpose(1, 2)
        return all_keys[self.rows, :, : self.length], all_values[
            self.rows, :, : self.length
        ]  # a view if `rows` is a slice

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are always given

    def swap(self, a: int, b: int, length: int) -> None:
        for tensor in self.keys + self.values:
            kept = tensor[a, :, :length].clone()
            tensor[a, :, :length] = tensor[b, :, :length]
            tensor[b, :, :length] = kept

    def copy(self, source: int, target: int, length: int) -> None:
        for tensor in self.keys + self.values:
            tensor[target, :, :length] = tensor[source, :, :length]


def slot_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """Attention of the engine's passes; without a mask (the learner's passes) it is transformers' own.

    Two savings over the stock one, which changes no result: query heads that share a key head are scored as further queries
    of it, where the stock one copies keys and values for each of them, every layer and step; and rows are taken a few at a
    time, each few only up to their own longest context (`bounds`, see `Engine.forward`).
    """
    if attention_mask is None:
        return sdpa_attention_forward(
            module, query, key, value, None, dropout=dropout, scaling=scaling, **kwargs
        )
    B, H, T, D = query.shape
    G = key.shape[1]  # key heads; each serves H / G query heads
    folded = query.reshape(B, G, H // G * T, D)
    mask = (
        attention_mask
        if G == H
        else attention_mask[:, :, None].expand(B, 1, H // G, T, -1).reshape(B, 1, H // G * T, -1)
    )
    parts = [
        F.scaled_dot_product_attention(
            folded[a:b],
            key[a:b, :, :length],
            value[a:b, :, :length],
            attn_mask=mask[a:b, ..., :length],
            scale=scaling,
        )
        for a, b, length in getattr(attention_mask, "bounds", [(0, B, key.shape[2])])
    ]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.reshape(B, H, T, -1).transpose(1, 2).contiguous(), None  # (B, T, H, D)


AttentionInterface.register("slots", slot_attention)
AttentionMaskInterface.register(
    "slots", sdpa_mask
)  # for passes that are not the engine's: as for "sdpa"


class DecodeStep(torch.nn.Module):
    """The model's pass over one token of each of the first B rows, as a function of tensors alone, so that it can be traced.

    A trace replays the same operations on the same weights without the Python between them: 1.5 ms a pass of the nano
    model, which is half of it where few rows are left to decode.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, positions, mask, targets, *tensors):
        cache = SlotCache(0, 0)
        cache.keys, cache.values = tensors[: len(tensors) // 2], tensors[len(tensors) // 2 :]
        cache.rows, cache.rows_tensor = slice(0, ids.shape[0]), torch.arange(ids.shape[0])
        cache.positions, cache.length = targets, mask.shape[-1]
        return self.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits


@dataclass(eq=False)
class Slot:
    """A trajectory in flight, as the engine sees it."""

    trajectory: Trajectory
    cached: list[int] = field(
        default_factory=list
    )  # ids whose keys and values are in its row of the cache
    row: int | None = None  # of the cache; None: it has none (new, or evicted)
    pending: list[int] = field(
        default_factory=list
    )  # ids to run before the next token can be sampled
    ids: list[int] = field(default_factory=list)  # sampled in this turn
    logprobs: list[float] = field(default_factory=list)
    uniforms: np.ndarray | None = None  # random draws of this turn, one a token
    started: float = 0.0
    turn_done: bool = True


class Engine:
    """Decodes many trajectories together.

    `slots` are trajectories in flight; rows of the KV cache are memory, and may be fewer. A trajectory that waits for its
    tools keeps its row until another one that could go on needs it; then the waiting one with the least in its row is
    evicted, and what it had is computed again in its next turn. Rows in the middle of a turn are never taken; if all are,
    a new turn queues.

    Args:
        model: any causal LM of transformers with full attention; its weights may change between calls of `new_weights`.
        end_id: the token that ends a turn.
        slots, max_context, max_new_tokens, temperature, kv_tokens: see RolloutArgs.
        shared_prefix: ids that all prompts begin with (the system prompt): computed once for each version of the weights.

    Raises:
        ValueError: the model's layers are not plain full attention over the cache.
    """

    def __init__(
        self,
        model,
        end_id: int,
        slots: int,
        max_context: int,
        max_new_tokens: int,
        temperature: float,
        shared_prefix: list[int],
        kv_tokens: int = 0,
    ):
        check_full_attention(model, max_context)
        if model._supports_attention_backend:  # else its own attention is as right, only slower
            model.set_attn_implementation("slots")
        self.model, self.end_id, self.temperature = model, end_id, temperature
        self.max_new_tokens, self.max_context = max_new_tokens, max_context
        self.device = model.device
        self.slots: list[Slot | None] = [None] * slots
        count = min(slots, max(1, kv_tokens // max_context)) if kv_tokens else slots
        self.cache = SlotCache(count + 1, max_context)  # the last row holds the shared prefix
        self.users: list[Slot | None] = [
            None
        ] * count  # of each row; one that is no longer in `slots` has left
        self.queue: list[Slot] = []  # turns that have no row yet
        self.shared_prefix, self.prefix_ready, self.version = shared_prefix, False, 0
        self.traced, self.checked = (
            None,
            set(),
        )  # DecodeStep's trace (False: it cannot be traced), batch sizes at which it was right
        self.stats = {
            "decode_s": 0.0,
            "prefill_s": 0.0,
            "idle_s": 0.0,
            "sampled": 0,
            "prefilled": 0,
            "evicted": 0,
        }

    def new_weights(self, version: int) -> None:
        """The model's weights have changed: every cached key and value is void. Call it between turns."""
        self.version, self.prefix_ready = version, False
        self.checked = set()
        for slot in filter(None, self.slots):
            slot.cached = []

    def free_slots(self) -> list[int]:
        return [number for number, slot in enumerate(self.slots) if slot is None]

    def start_turn(self, slot: Slot, prompt: list[int]) -> None:
        """Queue a prompt of a slot that is in `slots`; `step` gives it a row of the cache and runs it."""
        slot.pending, slot.ids, slot.logprobs, slot.turn_done, slot.started = (
            prompt,
            [],
            [],
            False,
            time.perf_counter(),
        )
        slot.uniforms = np.random.default_rng(
            [*slot.trajectory.key, len(slot.trajectory.turns)]
        ).random(self.max_new_tokens)
        self.queue.append(slot)

    def admit(self) -> None:
        """Give queued turns their rows; what a row has of a prompt is not computed again."""
        if self.queue and not self.prefix_ready and self.shared_prefix:
            self.forward([self.shared_prefix], [0], [len(self.users)])
            self.prefix_ready = True
        live, waiting = set(filter(None, self.slots)), []
        for slot in self.queue:
            if slot not in live:
                continue
            if slot.row is None:
                idle = [
                    row for row, user in enumerate(self.users) if user not in live or user.turn_done
                ]
                if not idle:
                    waiting.append(slot)
                    continue
                slot.row = min(
                    idle,
                    key=lambda row: len(self.users[row].cached) if self.users[row] in live else -1,
                )
                evicted, self.users[slot.row] = self.users[slot.row], slot
                if evicted in live:
                    evicted.row, evicted.cached = None, []
                    self.stats["evicted"] += 1
                slot.cached = []
            prompt = slot.pending
            common, shared = (
                common_prefix(slot.cached, prompt),
                common_prefix(self.shared_prefix, prompt),
            )
            if shared > common:
                self.cache.copy(len(self.users), slot.row, shared)
                common = shared
            common = min(common, len(prompt) - 1)  # at least one token must run to give logits
            slot.cached, slot.pending = prompt[:common], prompt[common:]
        self.queue = waiting

    @torch.no_grad()
    def forward(self, chunks: list[list[int]], starts: list[int], rows) -> torch.Tensor:
        """Run new tokens of some rows through the model.

        Args:
            chunks: new ids of each row. starts: position of the first. rows: a slice, or row numbers.

        Returns:
            Logits after each row's last token, (B, V), float32.
        """
        B, T = len(chunks), max(map(len, chunks))
        # Shorter chunks are padded on the left, so that all end in the last column: only there the large matrix of the
        # vocabulary is needed. Padding sees column 0, writes to the extra column, and nobody reads it.
        ids, positions = np.zeros((B, T), dtype=np.int64), np.zeros((B, T), dtype=np.int64)
        targets = np.full((B, T), self.cache.columns - 1)
        for b, (chunk, start) in enumerate(zip(chunks, starts)):
            ids[b, T - len(chunk) :] = chunk
            positions[b, T - len(chunk) :] = targets[b, T - len(chunk) :] = np.arange(
                start, start + len(chunk)
            )
        lengths = positions[:, -1] + 1
        length = int(lengths.max())
        positions = torch.from_numpy(positions).to(self.device)
        cache = self.cache
        cache.rows = rows if isinstance(rows, slice) else torch.tensor(rows, device=self.device)
        cache.rows_tensor = (
            torch.arange(rows.start, rows.stop, device=self.device)
            if isinstance(rows, slice)
            else cache.rows
        )
        cache.positions, cache.length = torch.from_numpy(targets).to(self.device), length
        # (B, 1, T, length), 0 where a token sees and -inf where not: made once, and not from a bool mask in each layer
        mask = torch.zeros(B, 1, T, length, device=self.device).masked_fill_(
            torch.arange(length, device=self.device) > positions[:, None, :, None], -torch.inf
        )
        ids = torch.from_numpy(ids).to(self.device)
        if (
            self.device.type == "cpu"
            and T == 1
            and rows == slice(0, B)
            and B <= TRACED_ROWS
            and cache.keys
            and self.traced is not False
        ):
            return self.replay(ids, positions, mask, cache)[:, -1].float()
        if (
            self.device.type == "cpu" and T == 1
        ):  # memory is what decoding costs on a CPU, kernel launches on a GPU
            mask.bounds = [
                (first, min(B, first + 8), int(lengths[first : first + 8].max()))
                for first in range(0, B, 8)
            ]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1].float()

    def replay(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor, cache: SlotCache
    ) -> torch.Tensor:
        """The traced decoding pass. At each batch size the first pass with new weights also runs eagerly: should the two
        differ (a model whose Python decides something by size), the trace is given up and the eager result counts."""
        inputs = (ids, positions, mask, cache.positions, *cache.keys, *cache.values)
        if self.traced is None:
            level = logging.get_verbosity()
            logging.set_verbosity_error()  # tracing looks at every attribute of the model, and some complain of being unset
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # about Python values that become constants: that is what the check is for
                try:
                    self.traced = torch.jit.trace(DecodeStep(self.model), inputs, check_trace=False)
                except RuntimeError:
                    self.traced = False
            logging.set_verbosity(level)
        if self.traced is not False and len(ids) in self.checked:
            with torch.jit.optimized_execution(
                False
            ):  # no specialising to shapes: they change every step
                return self.traced(*inputs)
        eager = DecodeStep(self.model)(*inputs)
        if self.traced is not False:
            try:
                with torch.jit.optimized_execution(False):
                    right = torch.allclose(self.traced(*inputs), eager, rtol=1e-4, atol=1e-4)
            except RuntimeError:
                right = False
            self.checked.add(len(ids))
            self.traced = self.traced if right else False
        return eager

    def step(self) -> list[Slot]:
        """One token for every slot that is in the middle of a turn; returns the slots whose turn ended."""
        clock = time.perf_counter()
        self.admit()
        busy = [slot for slot in self.slots if slot and not slot.turn_done and slot.row is not None]
        pending = sorted(
            (slot for slot in busy if slot.pending), key=lambda slot: len(slot.pending)
        )
        decoding = [slot for slot in busy if not slot.pending]
        ended = []
        while pending:  # prompts of like length run together, long ones in pieces between which the others go on decoding
            count, padding = 1, 0
            while (
                count < len(pending)
                and (count + 1) * len(pending[count].pending) <= PREFILL_TOKENS
                and (
                    padding
                    + count * (len(pending[count].pending) - len(pending[count - 1].pending))
                    <= PADDING_TOKENS
                )
            ):
                padding += count * (len(pending[count].pending) - len(pending[count - 1].pending))
                count += 1
            batch, pending = sorted(pending[:count], key=lambda slot: slot.row), pending[count:]
            pieces, rows = (
                [slot.pending[:PREFILL_TOKENS] for slot in batch],
                [slot.row for slot in batch],
            )
            side_by_side = rows[-1] - rows[0] < len(rows)  # then they can be read without a copy
            logits = self.forward(
                pieces,
                [len(slot.cached) for slot in batch],
                slice(rows[0], rows[-1] + 1) if side_by_side else rows,
            )
            for slot, piece in zip(batch, pieces):
                self.stats["prefilled"] += len(piece)
                slot.cached, slot.pending = slot.cached + piece, slot.pending[len(piece) :]
            whole = [b for b, slot in enumerate(batch) if not slot.pending]
            if whole:
                ended += self.sample(logits[whole], [batch[b] for b in whole])
        self.stats["prefill_s"] += time.perf_counter() - clock
        if decoding:
            clock = time.perf_counter()
            self.move_to_front(decoding)
            decoding = self.users[: len(decoding)]
            logits = self.forward(
                [[slot.ids[-1]] for slot in decoding],
                [len(slot.cached) for slot in decoding],
                slice(0, len(decoding)),
            )
            for slot in decoding:
                slot.cached.append(slot.ids[-1])
            ended += self.sample(logits, decoding)
            self.stats["decode_s"] += time.perf_counter() - clock
        return ended

    def move_to_front(self, decoding: list[Slot]) -> None:
        """Bring the rows of these slots to the front, where they can be read without a copy: the last ones fill the gaps."""
        rows = sorted(slot.row for slot in decoding)
        gaps = sorted(set(range(len(rows))) - set(rows))
        live = set(filter(None, self.slots))
        for gap, row in zip(gaps, rows[len(rows) - len(gaps) :]):
            there, slot = self.users[gap], self.users[row]
            if there in live:
                self.cache.swap(gap, row, max(len(there.cached), len(slot.cached)))
            else:
                self.cache.copy(row, gap, len(slot.cached))
            self.users[gap], self.users[row], slot.row = slot, there, gap
            if there in live:
                there.row = row

    def sample(self, logits: torch.Tensor, slots: list[Slot]) -> list[Slot]:
        """Draw a token for each slot from softmax(logits / T) by inverting the CDF (torch.multinomial takes ten times as
        long); returns the slots whose turn ended."""
        logprobs = torch.log_softmax(logits / (self.temperature or 1.0), dim=-1)  # (B, V)
        if self.temperature == 0:
            tokens = logits.argmax(-1, keepdim=True)
        else:
            cumulative = logprobs.exp().cumsum(-1)
            u = torch.tensor(
                [slot.uniforms[len(slot.ids)] for slot in slots],
                dtype=torch.float32,
                device=logits.device,
            )[:, None]
            tokens = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True).clamp_(
                max=logits.shape[-1] - 1
            )
        chosen = logprobs.gather(-1, tokens)[:, 0].tolist()
        ended = []
        for slot, token, logprob in zip(slots, tokens[:, 0].tolist(), chosen):
            slot.ids.append(token)
            slot.logprobs.append(logprob)
            self.stats["sampled"] += 1
            if token == self.end_id or len(slot.ids) == self.max_new_tokens:
                slot.turn_done = True
                ended.append(slot)
        return ended


def check_full_attention(model, max_context: int) -> None:
    """Raises ValueError for a model whose layers see less, or other, than the whole context: its numbers would be wrong."""
    config = model.config.get_text_config()
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    kinds = set(
        getattr(config, "layer_types", None)
        or ["sliding_attention" if window else "full_attention"]
    )
    why = ""
    if "sliding_attention" in kinds and window and window < max_context:
        why = f"it has a sliding window of {window} tokens; --max_context {window} or less would do"
    elif kinds - {"full_attention", "sliding_attention"}:
        why = (
            f"it has layers of {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
        )
    elif getattr(config, "attn_logit_softcapping", None):
        why = "it caps attention scores"
    elif "position_ids" not in inspect.signature(model.forward).parameters:
        why = "its positions cannot be given"
    if why:
        raise ValueError(
            f"the engine needs full attention in every layer, and {model.config.model_type} differs: {why}"
        )


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of leading ids that two lists share."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    return next(i for i in range(n) if a[i] != b[i])
