"""The start of the nano model: its first two layers are an induction circuit.

In: a Llama with random weights. Out: the same model, changed in place.
"""

import torch
from transformers import LlamaForCausalLM


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Random orthonormal columns: (rows, columns)."""
    return torch.linalg.qr(torch.randn(rows, columns))[0]


@torch.no_grad()
def build_induction(model: LlamaForCausalLM) -> None:
    """Start the first two layers as an induction circuit instead of waiting for one.

    See Olsson et al. 2022, arXiv:2209.11895. From random weights copying appears only after
    millions of tokens, more than two cores can spend. So:

    Layer 0, head j looks d = 1, 2, 4, 5 tokens back: from biases alone the rotary score of a query
    at m and a key at n is sum_i A^2 cos(phi_i + (m - n) theta_i), which peaks at m - n = d for
    phi_i = -d theta_i (Llama's rotate_half layout). It writes a projection of the token it sees
    into a subspace of its own, U_j.
    Layer 1, head 0 matches the last two tokens: query (0, 1 back) against key (1, 2 back), and
    copies the token it finds.
    Layer 1, head 1 matches a fact: in "The mayor of Bel in is Kor" the value finds the name's end 2
    back and the relation 5 back; where the fact is asked for, the token before the value finds them
    1 and 4 back.
    The matches use only the slow rotary dimensions, which hardly turn over a few hundred tokens.
    The rest is random, and everything is trained.
    """
    config = model.config
    width, heads = config.hidden_size, config.num_attention_heads
    size = width // heads
    theta = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    # The embeddings are tied, so this is also the scale of the logits.
    model.model.embed_tokens.weight.normal_(0, width**-0.5)
    first, second = model.model.layers[0].self_attn, model.model.layers[1].self_attn
    shared = orthonormal(width, size).T  # (size, width): what of a token is passed on
    subspaces = orthonormal(width, width).view(width, heads, size)  # U_j = subspaces[:, j]
    pairs = torch.arange(6)
    for head, distance in enumerate((1, 2, 4, 5)):
        span = slice(head * size, (head + 1) * size)
        for projection, angle in ((first.k_proj, 0.0), (first.q_proj, distance)):
            bias = torch.zeros(size)
            bias[pairs] = 7.0 * torch.cos(angle * theta[pairs])
            bias[pairs + size // 2] = -7.0 * torch.sin(angle * theta[pairs])
            projection.bias[span] = bias
            projection.weight[span] *= 0.1
        first.v_proj.weight[span] = 0.3 * shared
        first.o_proj.weight[:, span] = 0.7 * subspaces[:, head]
    half = torch.arange(size // 2)[5:]
    slow = torch.cat([half, half + size // 2])
    read = torch.zeros(size, size)
    read[slow] = orthonormal(size, len(slow)).T
    # (size, width) each: reads what a head of layer 0 saw, and what the token itself is
    seen = [read @ subspaces[:, head].T for head in range(4)]
    itself = read @ shared
    for head, (query, key) in enumerate(
        ((itself + seen[0], seen[0] + seen[1]), (seen[0] + seen[2], seen[1] + seen[3]))
    ):
        span = slice(head * size, (head + 1) * size)
        second.q_proj.weight[span], second.k_proj.weight[span] = 1.5 * query, 1.5 * key
        copied = orthonormal(width, size).T
        second.v_proj.weight[span], second.o_proj.weight[:, span] = 0.5 * copied, copied.T
