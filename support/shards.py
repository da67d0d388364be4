"""A learner that is sharded over the ranks (FSDP2): its tensors whole, and back again.

In: a state dict whose tensors may be shards. Out: the state dict that an unsharded learner has. So
a run may go on with another number of GPUs, sharded or not.
"""

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from support.processes import own_rank


@torch.no_grad()
def gathered(state, known: dict | None = None):
    """A state dict with its sharded tensors whole, in CPU memory. All ranks must call it, and rank
    0 gets the tensors. A device holds one whole tensor at a time. What is not sharded stays.

    Args:
        state: with `keep_vars`, so that tied weights are one tensor, also when they are whole.
        known: the whole tensors so far, by the id of the sharded ones.
    """
    known = {} if known is None else known
    if isinstance(state, dict):
        return {key: gathered(value, known) for key, value in state.items()}
    if not isinstance(state, DTensor):
        return state.detach() if isinstance(state, torch.Tensor) else state
    if id(state) not in known:
        whole = state.full_tensor()
        known[id(state)] = whole.cpu() if own_rank() == 0 else None
    return known[id(state)]


def reshard(model) -> None:
    """Free what a forward pass leaves whole for the backward pass, where none comes."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def load_moments(optimizer, state: dict) -> None:
    """Load an optimizer's `gathered` state; each rank takes its shards of it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, moments in state["state"].items():
        whole = parameters[number]
        for name, value in moments.items():
            if isinstance(whole, DTensor) and value.shape == whole.shape:
                place = whole.device_mesh, whole.placements
                moments[name] = distribute_tensor(value, *place, src_data_rank=None)
    optimizer.load_state_dict(state)
