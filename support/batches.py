"""Rows of tokens as padded batches.

In: rows (`train.Row`). Out: micro-batches, tensors, and the check that trainer and sampler agree.
"""

import torch
from accelerate.utils import gather_object
from transformers.modeling_layers import GradientCheckpointingLayer

from support import endings
from support.shards import reshard


def micro_batches(rows: list, micro_tokens: int) -> list[list]:
    """Rows of like length together, at most `micro_tokens` padded tokens each."""
    batches: list[list] = []
    for row in sorted(rows, key=lambda row: len(row.segment.ids)):
        if batches and (len(batches[-1]) + 1) * len(row.segment.ids) <= micro_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def padded(lists: list[list], dtype: torch.dtype, device) -> torch.Tensor:
    """(B, L), filled with zeros on the right."""
    tensors = [torch.tensor(values, dtype=dtype) for values in lists]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True).to(device)


def shared_batches(rows: list, micro_tokens: int) -> list[tuple[list, float]]:
    """(micro-batch, weight 1) of this rank's share of the rows of all ranks: as many rows as the
    others have, and as long ones. Negative control and equal rewards leave some ranks with fewer.

    Every rank gets as many micro-batches, since a pass may be a joint one. Those that a rank lacks
    are the shortest row of all, with weight 0.
    """
    rank, ranks = 0, 1
    if torch.distributed.is_initialized():
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        rows = sorted(gather_object(rows), key=lambda row: len(row.segment.ids))
    shares = [micro_batches(rows[first::ranks], micro_tokens) for first in range(ranks)]
    own = shares[rank]
    lacking = max(map(len, shares)) - len(own)
    return [(batch, 1.0) for batch in own] + [(rows[:1], 0.0)] * lacking


def checkpoint_layers(policy, is_on: bool) -> None:
    """Gradient checkpointing on or off. A layer checkpoints in its training mode; what is in it,
    dropout above all, stays in evaluation mode.
    """
    for module in policy.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = is_on


@torch.no_grad()
def logprob_gaps(policy, rows: list, micro_tokens: int, device) -> list[float]:
    """|trainer - sampler| of the log-probs of the tokens in the loss: rounding errors, unless
    something is wrong.

    Args:
        policy: `train.Policy`.
        rows: made of trajectories that its present weights sampled.
    """
    gaps = []
    for batch, weight in shared_batches(rows, micro_tokens):
        endings.check()
        ids = padded([row.segment.ids for row in batch], torch.long, device)
        in_loss = padded([row.advantages for row in batch], torch.float32, device) != 0
        sampled = padded([row.segment.logprobs for row in batch], torch.float32, device)[in_loss]
        here = (policy(ids, in_loss) - sampled).abs().tolist()
        gaps += here if weight else []
    reshard(policy)
    return gaps
