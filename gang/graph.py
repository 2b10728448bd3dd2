"""A step as one CUDA graph: replaying it costs the host one call instead of the launch of each of its kernels."""

from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """`step(*inputs) -> Tensor` without host synchronisation, captured once for each set of input shapes.

    `state` are the tensors that the step changes; the warm-up that a capture needs leaves them as they were.
    """

    def __init__(self, step: Callable[..., Tensor], state: list[Tensor]):
        self.step, self.state = step, state
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool = None  # one memory pool: the graphs never run at the same time

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.captured:
            self.captured[shapes] = self.capture(inputs)
        graph, places, result = self.captured[shapes]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return result.clone()

    def capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        places, before = [value.clone() for value in inputs], [value.clone() for value in self.state]
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self.step(*places)
            torch.cuda.current_stream().wait_stream(side)
        finally:
            for value, kept in zip(self.state, before, strict=True):
                value.copy_(kept)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = self.step(*places)
        self.pool = graph.pool()
        return graph, places, result
