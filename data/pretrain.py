r"""The nano base model's recipe: a small Llama that stands in for a pretrained k-series model.

It is pretrained on pages and on transcripts of *explorers of mixed skill* in worlds of its own:
names, worlds and question templates are apart from those of train, dev and test. Like a pretrained
model, it has seen good behaviour among much bad. Which behaviour pays is left to RL.

Stages: (1) a byte-level BPE tokenizer (data/base/tokenizer.py); (2) copy drills: random spans that
come again, facts, visits to addresses of every form (data/base/drills.py; induction heads appear
within a few hundred steps, with the start of data/base/induction.py); (3) transcripts
(data/base/explorers.py), shuffled with these drills and those of sums and plans, with loss on the
explorer's own tokens and on a sample of the others. With `--deep_share` some of them are walks
through the catalogues of deep worlds, too long for the window (data/base/walkers.py), under the
context managers `summarize` and `elide`. A row is a segment.

In: nothing. Out: `data/nano/` (config, safetensors, tokenizer); the second command below goes on
from it to what `data/nano-deep` is. To try an idea, change `Explorer` or the sizes in `Args`.

    python data/pretrain.py    # three minutes on a GPU, an hour and a half on two cores
    python data/pretrain.py --init data/nano --batch_tokens 4096 --deep_share 0.75 \
        --transcripts 3000 --drill_share 0.4 --learning_rate 1e-3 --minutes 40 --out nano-deep
"""

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch, as in train.py
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.hf_argparser import HfArg

from context import Chat
from data.base.drills import Drill, copy_drill, fact_drill, plans, sums, text_drill, visits, walks
from data.base.explorers import Row, write_transcripts, write_visits
from data.base.induction import build_induction
from data.base.tokenizer import tokenizer_corpus, train_tokenizer
from data.base.walkers import write_walks
from data.world import World
from engine import NANO, keep_memory, load_policy
from support.checks import at_least
from support.flags import parse_flags
from tools import signatures

# Shares of the drills while facts are not copied yet, and later, among the transcripts.
EARLY = {"visits": 0.5, "facts": 0.4, "spans": 0.1}
LATE = {"visits": 0.3, "plans": 0.4, "sums": 0.15, "facts": 0.1, "spans": 0.05}
TEXTS = {"visits": visits, "plans": plans, "sums": sums, "walks": walks}


@dataclass
class Args:
    out: str = HfArg(default=str(NANO), help="folder to write the model to")
    seed: int = HfArg(default=0, help="decides worlds, explorers, drills and weights")
    worlds: int = HfArg(default=16, help="number of pretraining worlds")
    entities: int = HfArg(default=300, help="entities in each of them")
    transcripts: int = HfArg(default=20000, help="explorer transcripts to write")
    skilled_share: float = HfArg(default=0.18, help="share of explorers that behave sensibly")
    deep_share: float = HfArg(default=0.0, help="share of rows that are segments of walks")
    deep_skilled_share: float = HfArg(default=0.7, help="share of sensible walkers")
    deep_entities: int = HfArg(default=600, help="entities in each deep world")
    hidden: int = HfArg(default=128, help="width of the model")
    layers: int = HfArg(default=4, help="number of layers")
    heads: int = HfArg(default=4, help="attention heads")
    drill_share: float = HfArg(default=0.4, help="share of drills among the transcripts' batches")
    drill_steps: int = HfArg(default=800, help="optimizer steps on drills alone, at most")
    steps: int = HfArg(default=5600, help="optimizer steps on transcripts")
    batch_tokens: int = HfArg(default=8192, help="tokens in one optimizer step")
    learning_rate: float = HfArg(default=1.2e-3, help="peak; it decays to a thirtieth")
    minutes: float = HfArg(default=0.0, help="decay over this time instead of `steps` (0: off)")
    measure: str = HfArg(default="", help="only measure how this model folder copies addresses")
    init: str = HfArg(default="", help="model folder to go on from, with its tokenizer")


def check_args(args: Args) -> None:
    """Raise a ValueError, one line, for flags that cannot work."""
    at_least(args, 1, "worlds")
    at_least(args, 256, "batch_tokens")  # a row of a drill
    at_least(args, 0, "seed", "skilled_share", "deep_skilled_share", "learning_rate", "minutes")
    at_least(args, 0, "drill_steps", "steps")
    if args.drill_steps + args.steps < 1:
        raise ValueError("--drill_steps and --steps must not both be 0")
    at_least(args, 200 + args.worlds, "transcripts")  # 200 are held out
    if not 0 <= args.deep_share < 1:
        raise ValueError("--deep_share must be at least 0 and below 1")
    if args.deep_share:
        at_least(args, 300, "deep_entities")
    if not (args.init or args.measure):  # the induction circuit needs room (data/base/induction.py)
        at_least(args, 2, "layers")
        at_least(args, 4, "heads")
        if args.hidden % args.heads or args.hidden // args.heads < 12:
            raise ValueError("--hidden must be a multiple of --heads, at least 12 times as large")


def new_model(args: Args, chat: Chat) -> LlamaForCausalLM:
    """A small Llama that starts with an induction circuit."""
    config = LlamaConfig(
        vocab_size=len(chat.tokenizer),
        hidden_size=args.hidden,
        intermediate_size=3 * args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.heads,
        max_position_embeddings=4096,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        eos_token_id=chat.end_id,
        pad_token_id=chat.tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    build_induction(model)
    return model


def batches_of(rows: list[Row], tokens: int, rng: np.random.Generator) -> list[list[Row]]:
    """Rows of like length share a batch of about so many tokens; a rest that fills none is left.

    Raises:
        ValueError: they fill no batch.
    """
    batches, batch = [], []
    for index in np.argsort([len(ids) + rng.random() for ids, _ in rows], kind="stable"):
        batch.append(rows[index])
        if len(batch) * len(rows[index][0]) >= tokens:
            batches.append(batch)
            batch = []
    if not batches:
        raise ValueError(
            f"{len(rows)} transcripts fill no batch: give more --transcripts or fewer "
            "--batch_tokens"
        )
    return batches


def pad(batch: list[Row], rng: np.random.Generator) -> Drill:
    """Right-padded ids and labels (B, T): the explorer's tokens and a tenth of the others."""
    ids = [torch.from_numpy(row_ids).long() for row_ids, _ in batch]
    keep = [torch.from_numpy(mask | (rng.random(len(mask)) < 0.1)) for _, mask in batch]
    labels = [torch.where(kept, row_ids, -100) for kept, row_ids in zip(keep, ids)]
    return pad_sequence(ids, True), pad_sequence(labels, True, -100)


def loss_of(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean cross-entropy, and predictions and targets at the labelled positions (logits are
    computed there only)."""
    ids, labels = ids.to(model.device), labels.to(model.device)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # (B, T-1, D)
    targets = labels[:, 1:]
    keep = targets >= 0
    logits = model.lm_head(hidden[keep])  # (tokens in the loss, V)
    loss = torch.nn.functional.cross_entropy(logits, targets[keep])
    return loss, logits.argmax(-1), targets[keep]


class Lessons:
    """Chooses what the next step learns from: first drills until facts are copied, then
    transcripts with some drills among them."""

    def __init__(self, args: Args, chat: Chat, rows: list[Row]):
        self.args, self.chat = args, chat
        self.rng = np.random.default_rng(args.seed)
        self.batches, self.queue = batches_of(rows, args.batch_tokens, self.rng), []
        self.drill_world = World(100 + args.worlds, 5000, "pretrain", style="varied")
        self.can_copy = bool(args.init)

    def next(self, step: int, done: float, copied: float) -> tuple[str, Drill]:
        """The kind of a lesson and its rows.

        Args:
            step: number of the optimizer step.
            done: share of the training that is over.
            copied: share of facts that are copied now.
        """
        rng, args = self.rng, self.args
        self.can_copy = self.can_copy or copied > 0.9 or step >= args.drill_steps
        if self.can_copy and (done >= 0.9 or rng.random() >= args.drill_share):
            self.queue = self.queue or [self.batches[i] for i in rng.permutation(len(self.batches))]
            return "transcripts", pad(self.queue.pop(), rng)
        size = (args.batch_tokens // 256, 256)
        shares = LATE if self.can_copy else EARLY
        name = str(rng.choice(list(shares), p=list(shares.values())))
        if args.deep_share and self.can_copy and rng.random() < 0.5:
            name = "walks"
        if name == "facts":
            return name, fact_drill(rng, self.chat, *size)
        if name == "spans":
            return name, copy_drill(rng, len(self.chat.tokenizer), *size)
        return name, text_drill(TEXTS[name], rng, self.chat, self.drill_world, *size)


def pretrain(args: Args) -> None:
    torch.manual_seed(args.seed)
    if name := args.measure or args.init:
        model, tokenizer = load_policy(name)
        chat = Chat(tokenizer, signatures())
    else:
        corpus = tokenizer_corpus(args.seed, min(args.worlds, 6), args.entities)
        chat = Chat(train_tokenizer(corpus, 2560), signatures())
        model = new_model(args, chat)
    if args.measure:
        print(addresses_copied(model, chat))
        return
    where = (chat, args.seed, args.worlds)
    about = (args.entities, args.transcripts, args.skilled_share)
    rows = write_transcripts(*where, *about, any_frame=0.5)
    walks, held_out_walks = [], []
    if args.deep_share:
        count = round(len(rows) * args.deep_share / (1 - args.deep_share))
        walks, held_out_walks = write_walks(
            *where, args.deep_entities, count, args.deep_skilled_share
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    prompt = len(chat.before_question)
    tokens = len(chat.tokenizer)
    print(f"{model.num_parameters():,} parameters, {tokens} tokens, prompt {prompt} tokens")
    train(model, args, chat, rows[:-200] + walks, (rows[-200:], held_out_walks))


def train(model, args: Args, chat: Chat, rows: list[Row], held_out: tuple) -> None:
    """Train the model, report now and then, and save it with each report.

    Args:
        rows: what to learn from.
        held_out: transcripts and walks for the reports.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98))
    lessons = Lessons(args, chat, rows)
    total = args.drill_steps + args.steps
    start, tokens, average = time.time(), 0, {}

    def save(step: int) -> None:
        minutes = (time.time() - start) / 60
        line = report(model, chat, *held_out)
        shown = {name: round(value, 3) for name, value in average.items()}
        head = f"step {step} {minutes:.1f} min {tokens / 1e6:.1f}M tokens"
        tqdm.write(f"{head} | {line} | {shown}", file=sys.stdout)
        sys.stdout.flush()
        model.save_pretrained(args.out)
        chat.tokenizer.save_pretrained(args.out)

    progress = tqdm(range(total), desc="pretrain", mininterval=5)
    for step in progress:
        done = (time.time() - start) / 60 / args.minutes if args.minutes else step / total
        if done >= 1:
            break
        decay = 1 / 30 + (1 - 1 / 30) * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * min(1.0, (step + 1) / 100) * decay
        name, (ids, labels) = lessons.next(step, done, average.get("facts copied", 0))
        loss, predicted, targets = loss_of(model, ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens += ids.numel()
        average[name] = 0.95 * average.get(name, loss.item()) + 0.05 * loss.item()
        if name != "transcripts":
            hit = (predicted == targets).float().mean().item()
            average[f"{name} copied"] = 0.9 * average.get(f"{name} copied", hit) + 0.1 * hit
        shown = {name: f"{value:.3f}" for name, value in average.items()}
        progress.set_postfix(shown | {"M tokens": f"{tokens / 1e6:.1f}"})
        if step % 500 == 499 and step < total - 1:
            save(step)
    save(step)


# ------------------------------------------------------------------------------------------- report


Said = tuple[str, str, bool]  # the token before, a token, whether it was the likeliest


def tokens_of(model: LlamaForCausalLM, chat: Chat, row: Row) -> tuple[float, list[Said]]:
    """Loss on the explorer's own tokens, and each of them, given the right ones before it."""
    ids, mask = torch.from_numpy(row[0].astype(np.int64))[None], torch.from_numpy(row[1])[None]
    loss, predicted, targets = loss_of(model, ids, torch.where(mask, ids, -100))
    text = chat.tokenizer.convert_ids_to_tokens(targets.tolist())
    return loss.item(), list(zip(["", *text], text, (predicted == targets).tolist()))


def share(hits: list[bool]) -> str:
    return f"{np.mean(hits):.1%} of {len(hits)}" if hits else "0"


@torch.no_grad()
def addresses_copied(model: LlamaForCausalLM, chat: Chat) -> str:
    """How many of the addresses that sensible explorers open are copied exactly, token for token:
    of the forms in training, and of forms that it has not. The first token of a host decides which
    hit is opened; what is copied once that is given stands in brackets."""
    shares = []
    for style in ("varied", "unseen-hosts"):
        whole, begun, address = [], [], []
        for row in write_visits(chat, style, 200):
            for _, token, hit in tokens_of(model, chat, row)[1]:
                if address and '"' in token:
                    whole.append(all(address))
                    begun.append(all(address[2:]))
                    address = []
                elif address or token.startswith("http"):
                    address.append(hit)
        shares.append(f"{share(whole)} ({share(begun)})")
    return f"addresses copied {shares[0]}, of unseen forms {shares[1]}"


@torch.no_grad()
def report(model: LlamaForCausalLM, chat: Chat, transcripts: list[Row], walks: list[Row]) -> str:
    """How well held-out explorers are predicted, and how well values are copied.

    These are facts out of results into thoughts, addresses out of results into calls, and in the
    walks the next page's address, found names, and whole turns or notes.
    """
    losses, rows = zip(*[tokens_of(model, chat, row) for row in transcripts])
    facts = [hit for row in rows for before, _, hit in row if before == "ĠisĠ"]
    line = f"held-out loss {np.mean(losses):.3f} | fact copied {share(facts)}"
    line += f" | {addresses_copied(model, chat)}"
    if not walks:
        return line
    losses, rows = zip(*[tokens_of(model, chat, row) for row in walks])
    tokens = [said for row in rows for said in row]
    urls = [hit for before, _, hit in tokens if before == "/"]
    names = [hit for before, token, hit in tokens if before.endswith("Ġ") and token[0].isupper()]
    turns, notes, hits, is_turn = [], [], [], False
    for _, token, hit in tokens:
        hits.append(hit)
        is_turn = is_turn or token == "<think>"  # notes are turns without a thought
        if token == "<|im_end|>":
            (turns if is_turn else notes).append(all(hits))
            hits, is_turn = [], False
    return (
        f"{line} | walks: loss {np.mean(losses):.3f}, next page {share(urls)}, "
        f"names {share(names)}, whole turns {share(turns)}, whole notes {share(notes)}"
    )


def main():
    (args,) = parse_flags((Args,), __doc__)
    keep_memory()
    try:
        check_args(args)
        pretrain(args)
    except (OSError, ValueError) as error:
        sys.exit(f"data/pretrain.py: {error}")
    except KeyboardInterrupt:
        sys.exit(f"data/pretrain.py: stopped; {args.out} is as the last report left it")


if __name__ == "__main__":
    main()
