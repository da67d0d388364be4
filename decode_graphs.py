"""The engine's decoding step on a GPU: fixed shapes, each recorded once as a CUDA graph.

A decoding step of a small model launches hundreds of kernels of a few microseconds each, and the
launches take longer than the kernels. A CUDA graph launches all of them at once, if shapes and
addresses are the same each time. So the batch is rounded up to one of a few sizes, and the context
that is read to a multiple of `LENGTH`. The KV cache (engine.SlotCache) is static anyway.

In: the last token of each row. Out: logits. On a CPU the same fixed shapes run without a graph, so
that they can be tested there. To try an idea (a compiled step, say), change `StaticDecoder.run`.
"""

import torch

LENGTH = 128  # the context that is read is a multiple of it
SMALLEST = 8  # rows of the smallest batch; the next ones are twice as large


class StaticDecoder:
    """Runs one new token of the first rows of a cache.

    Args:
        model: whose weights may change, but not their addresses.
        cache: an `engine.SlotCache`, in which a pass of prompts makes the tensors before `step`.
    """

    def __init__(self, model, cache):
        self.model, self.cache = model, cache
        self.most, self.records = cache.columns - 1, model.device.type == "cuda"
        self.graphs: dict[tuple[int, int], tuple] = {}  # (rows, length) -> (graph, its logits)
        self.pool = torch.cuda.graph_pool_handle() if self.records else None
        # Ids, positions, and the columns of the cache that are written: (3, rows, 1).
        self.host = torch.zeros(3, cache.count, 1, dtype=torch.long, pin_memory=self.records)
        self.inputs = self.host.to(model.device)

    def step(self, ids: list[int], positions: list[int]) -> torch.Tensor:
        """Run a token of each of the first rows.

        Args:
            ids: of rows 0, 1, …
            positions: where in its context each stands.

        Returns:
            Logits (len(ids), V), float32. The next step overwrites them.
        """
        rows, length = SMALLEST, -(-(max(positions) + 1) // LENGTH) * LENGTH
        while rows < len(ids):
            rows *= 2
        rows, length = min(rows, self.cache.count), min(length, self.most)
        # A row of padding reads column 0, and writes where nobody reads.
        self.host[:2] = 0
        self.host[2] = self.most
        self.host[:, : len(ids), 0] = torch.tensor([ids, positions, positions])
        self.inputs.copy_(self.host, non_blocking=True)
        if not self.records:
            return self.run(rows, length)[: len(ids)]
        if (rows, length) not in self.graphs:
            self.graphs[rows, length] = self.record(rows, length)
        graph, logits = self.graphs[rows, length]
        graph.replay()
        return logits[: len(ids)]

    @torch.no_grad()
    def run(self, rows: int, length: int) -> torch.Tensor:
        """The step itself, on whatever `inputs` hold: logits (rows, V), float32."""
        ids, positions, targets = self.inputs[:, :rows]  # (rows, 1) each
        return self.cache.run(self.model, slice(0, rows), length, ids, positions, targets)

    def record(self, rows: int, length: int) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        """The graph of a step of this shape, and where it leaves its logits."""
        stream = torch.cuda.Stream()  # not the one in which the engine works
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run(rows, length)  # libraries set themselves up in a first call
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.run(rows, length)
        return graph, logits
