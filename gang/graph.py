"""A step as one CUDA graph: replaying it costs the host one call instead of the launch of each of its kernels."""

import time
from collections.abc import Callable

import torch
from torch import Tensor


class GraphedStep:
    """`step(*inputs) -> Tensor` without host synchronisation, captured once for each set of input shapes.

    `state` gives the tensors that the step changes; the warm-up that a capture needs leaves them as they were. The
    inputs may lie in the host's pinned memory. `pool` is memory for graphs that never run at the same time; the seconds
    that each capture took are added to `captures`.
    """

    def __init__(self, step: Callable[..., Tensor], state: list[Tensor], pool, captures: list[float]):
        self.step, self.state = step, state
        self.captured: dict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}
        self.pool, self.captures = pool, captures
        self.stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self.captured:
            start = time.monotonic()
            self.captured[shapes] = self.capture(inputs)
            self.captures.append(time.monotonic() - start)
        graph, places, result = self.captured[shapes]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value, non_blocking=True)
        graph.replay()
        return result.clone()

    def capture(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        device = self.state[0].device
        places, before = [value.to(device, copy=True) for value in inputs], [value.clone() for value in self.state]
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            try:
                self.step(*places)  # what libraries set up at their first call cannot be captured
            finally:
                for value, kept in zip(self.state, before, strict=True):
                    value.copy_(kept)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # the graph's own memory comes on top of what the warm-up has left behind
            graph = torch.cuda.CUDAGraph()
            # Other threads copy batches and wait for results meanwhile, which does not concern the capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                result = self.step(*places)
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(self.stream)
        return graph, places, result
