"""One step of all members: their rows through one frozen base, each with its own adapter, loss, clipping and rate."""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from gang.answers import answers, on_answers, only
from gang.fused import fuse
from gang.graph import GraphedStep
from gang.head import AnswerLoss, Head
from gang.lora import StackedLoRA
from gang.packing import Packing, packed
from gang.stack import Stack
from train import GENERATION

# transformers takes the capture of a CUDA graph for tracing, and then (5.17) hands attention an explicit mask where it
# gives is_causal otherwise: another kernel, slower, and with cuDNN a wrong gradient. Looking for packed sequences reads
# the positions back to the host in each forward pass; train.py refuses packing, so there are none.
for private, answer in {"is_tracing": False, "find_packed_sequence_indices": None}.items():
    assert callable(getattr(masking_utils, private)), f"transformers.masking_utils.{private} is no more"
    setattr(masking_utils, private, lambda tensor=None, answer=answer, **_: answer)

LENGTHS = 64  # on a GPU, rows are padded to a multiple of this: few shapes, so few CUDA graphs
SCORED = 8192  # tokens that go through the base at once in an evaluation, at least


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with modules of its own on the same tensors: what one puts into it is not in the other."""
    shared = [*model.parameters(), *model.buffers()]
    shared += [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    return copy.deepcopy(model, {id(value): value for value in shared})


@dataclass
class Batch:
    """A micro-batch of N members: their rows, and of each answer token where it is predicted in the flattened rows,
    which one it is, and its share of the loss. A member may have fewer than `most`: fillers, with a share of 0.

    Packed, `ids` are a member's tokens one after another, and the rest says where they lie in rows (gang/packing.py).
    All indices count from the member's own first token or place.
    """

    ids: Tensor  # [N, b, s], or packed [N, T]
    where: Tensor  # [N, most]
    targets: Tensor  # [N, most]
    share: Tensor  # [N, most]
    positions: Tensor | None = None  # [N, T]
    token: Tensor | None = None  # [N, b, s]
    padding: Tensor | None = None  # [N, b, s]
    place: Tensor | None = None  # [N, T]
    filler: Tensor | None = None  # [N, T]

    def tensors(self) -> list[Tensor]:
        return [value for field in fields(self) if (value := getattr(self, field.name)) is not None]

    def of(self, members: list[int]) -> "Batch":
        return Batch(*(value[members] for value in self.tensors()))

    def pinned(self) -> "Batch":
        """In memory from which a GPU copies without being waited for."""
        return Batch(*(value.pin_memory() for value in self.tensors()))


def together(
    batches: Sequence[dict[str, Tensor]],
    items: Sequence[float],
    filler: int,
    rows: int | None = None,
    packed: bool = False,
) -> Batch:
    """The members' collated batches as one, on the CPU; `items` are what each one's NLL is divided by.

    On a GPU there are `rows` rows and only a few lengths, so that few CUDA graphs are needed.
    """
    n = len(batches)
    b, s = (max(batch["input_ids"].shape[axis] for batch in batches) for axis in (0, 1))
    answers = [(batch["labels"][:, 1:] != -100).nonzero() for batch in batches]
    lengths = [batch["attention_mask"].sum(1) for batch in batches] if packed else []
    most, longest = max(1, *map(len, answers)), max((int(length.sum()) for length in lengths), default=0)
    if rows:
        b, s, most, longest = rows, rounded(s), rounded(most), rounded(longest) if packed else 0
    where, targets, share = (torch.zeros(n, most, dtype=kind) for kind in (torch.long, torch.long, torch.float))
    ids = torch.full((n, longest) if packed else (n, b, s), filler)
    result = Batch(ids, where, targets, share)
    if packed:
        result.positions, result.place = (torch.zeros(n, longest, dtype=torch.long) for _ in range(2))
        result.filler = torch.ones(n, longest, dtype=torch.bool)
        result.token, result.padding = torch.zeros(n, b, s, dtype=torch.long), torch.ones(n, b, s, dtype=torch.bool)
    for i, (batch, (row, column)) in enumerate(zip(batches, (found.T for found in answers), strict=True)):
        height, width = batch["input_ids"].shape
        if packed:
            first = lengths[i].cumsum(0) - lengths[i]  # the first token of each row
            real = batch["attention_mask"].bool()
            down, along = real.nonzero().T
            count = len(down)
            ids[i, :count] = batch["input_ids"][real]
            result.positions[i, :count], result.place[i, :count] = along, down * s + along
            result.filler[i, :count] = False
            result.token[i, :height] = first[:, None]
            result.token[i, down, along] = torch.arange(count)
            result.padding[i, down, along] = False
            where[i, : len(row)] = first[row] + column
        else:
            ids[i, :height, :width] = batch["input_ids"]
            where[i, : len(row)] = row * s + column
        targets[i, : len(row)] = batch["labels"][row, column + 1]
        share[i, : len(row)] = 1 / items[i]
    return result


def rounded(length: int) -> int:
    """Up to a multiple of LENGTHS, or of a quarter of the next power of two if that is more."""
    multiple = max(LENGTHS, 2 ** math.ceil(math.log2(length)) // 4)
    return math.ceil(length / multiple) * multiple


class Step:
    """The base with stacked layers in the place of its adapted ones, and what the members compute together on it.

    `model` is left as it is; `members` holds, per member, PEFT's LoRA layers by module name, whose weights are copied.
    `keep`: the base's matrices are dequantised once, not in each pass; by default if there is memory for it.
    """

    def __init__(
        self, model: PreTrainedModel, members: list[dict[str, LoraLayer]], training, keep=None, checkpointing=None
    ):
        self.model, self.bf16, self.device = twin(model), training.bf16, model.device
        self.dtype = torch.bfloat16 if self.bf16 else model.dtype
        self.head, self.hidden_layers = Head(self.model), model.config.get_text_config().num_hidden_layers
        linear = {name.removeprefix("base_model.model."): x.get_base_layer() for name, x in members[0].items()}
        size = sum(x.in_features * x.out_features for x in members[0].values()) * self.dtype.itemsize
        keep = size < free_memory(self.device) / 3 if keep is None else keep  # the rest is for activations
        self.layers = {name: StackedLoRA(layer, self.dtype, keep) for name, layer in linear.items()}
        for name, layer in self.layers.items():
            self.model.set_submodule(name, layer)
        fuse(self.model)
        self.last = on_answers(self.model)
        by_name = dict(zip(members[0], self.layers.values(), strict=True))
        self.stack = Stack(members, by_name, training)
        # B is zero, so until the first update every member is the base model, and one evaluation serves all.
        self.untrained = all(not b.any() for _, _, b in self.stack.windows(self.stack.values))
        self.checkpointing = training.gradient_checkpointing if checkpointing is None else checkpointing
        if self.checkpointing:
            enable = self.model.gradient_checkpointing_enable  # its name until transformers 5.18
            enable = getattr(self.model, "activation_checkpointing_enable", enable)
            # Reentrant checkpoints need rows with a gradient, which those of a frozen base lack. Without dropout there
            # is no random state to preserve, and reading a GPU's waits for it.
            own = {"use_reentrant": False, "preserve_rng_state": False}
            enable((training.gradient_checkpointing_kwargs or {}) | own)
        self.graphs: dict[bool, GraphedStep] = {}
        self.captures: list[float] = []  # seconds of each
        self.capture()

    def __len__(self) -> int:
        return len(self.stack.values)

    def capture(self) -> None:
        """On a GPU, let the steps be CUDA graphs; anew whenever the stack has changed its shape."""
        self.graphs = {}
        if self.device.type == "cuda" and not self.checkpointing:
            shared = self.stack.state(), torch.cuda.graph_pool_handle(), self.captures
            self.graphs = {update: GraphedStep(partial(self.step, update), *shared) for update in (False, True)}

    def drop(self, index: int) -> None:
        """Take a member out; the others can go on."""
        self.stack.keep([i for i in range(len(self)) if i != index])
        self.capture()

    def train(self, batch: Batch, rates: Tensor, update: bool) -> Tensor:
        """A micro-batch of each member, and with `update` the optimizer's step at the rates [N]; both on the CPU.

        Returns [N, 4] on the device: loss, entropy, share of right tokens (means over the micro-batch's tokens), and
        the gradient's norm before clipping (0 without `update`). Nothing here waits for the device.
        """
        self.untrained &= not (update and bool(rates.any()))  # a warm-up's first rate is 0
        if not self.model.training:
            self.model.train()
        inputs = [rates, *batch.tensors()]
        if self.graphs:
            try:
                return self.graphs[update](*inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"gang: no CUDA graph, eager steps instead ({str(error).splitlines()[0]})", flush=True)
                self.graphs = {}
        return self.step(update, *(value.to(self.device, non_blocking=True) for value in inputs))

    def step(self, update: bool, rates: Tensor, *inputs: Tensor) -> Tensor:
        batch = Batch(*inputs)
        share, valid = batch.share, batch.share != 0
        with self.laid_out(batch):
            loss, scores = self.answers(batch)
            loss.backward()
        scores = torch.where(valid[..., None], scores.unflatten(0, share.shape), 0.0)
        means = scores[..., 1:].sum(1) / valid.sum(1).clamp(min=1)[:, None]
        losses = (scores[..., 0] * share).sum(1)
        norms = self.stack.update(rates) if update else torch.zeros_like(rates)
        return torch.cat([losses[:, None], means, norms[:, None]], 1)

    @contextmanager
    def laid_out(self, batch: Batch) -> Iterator[None]:
        """Within, the model takes the batch's tokens as they lie, padded or packed, and ends with the answers alone."""
        found = None
        if 2 * batch.where.numel() < batch.ids.numel():
            where = rows_of(batch.where, batch.ids[0].numel())
            found = answers(where.flatten(), batch.share.flatten() == 0, batch.ids.numel())
        packing: AbstractContextManager = nullcontext()
        if batch.token is not None:
            n, b, s = batch.token.shape
            token, place = rows_of(batch.token.flatten(1), batch.ids.shape[1]), rows_of(batch.place, b * s)
            parts = (part.flatten() for part in (token, batch.padding, place, batch.filler))
            packing = packed(self.model, Packing(n * b, *parts))
        with packing, only(self.last, found):
            yield

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """AnswerLoss of the batch. Padding is on the right, where a causal model never looks: no mask."""
        rows = {"input_ids": batch.ids.flatten(0, 1)}
        if batch.positions is not None:
            rows = {"input_ids": batch.ids.reshape(1, -1), "position_ids": batch.positions.reshape(1, -1)}
        with self.autocast():
            hidden = self.model.base_model(**rows, use_cache=False).last_hidden_state.flatten(0, 1)
        hidden = hidden.index_select(0, rows_of(batch.where, batch.ids[0].numel()).flatten())
        return AnswerLoss.apply(hidden, self.head, batch.targets.flatten(), batch.share.flatten())

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        adapters = [layer.a for layer in self.layers.values()]
        for layer in self.layers.values():
            layer.a = None
        try:
            yield
        finally:  # the same tensors, at the addresses that a graph has captured
            for layer, a in zip(self.layers.values(), adapters, strict=True):
                layer.a = a

    @contextmanager
    def base_beside(self) -> Iterator[None]:
        """Within, there is one member more, whose adapter is zero."""
        kept: list[tuple] = [(layer.a, layer.b, layer.scaling) for layer in self.layers.values()]
        for layer, values in zip(self.layers.values(), kept, strict=True):
            layer.a, layer.b, layer.scaling = (torch.cat([value, torch.zeros_like(value[:1])]) for value in values)
        try:
            yield
        finally:  # as above
            for layer, values in zip(self.layers.values(), kept, strict=True):
                layer.a, layer.b, layer.scaling = values

    @torch.no_grad()
    def score(self, tests: list["ScoredRows"]) -> Tensor:
        """Every member on the test rows: [N, examples, 2], the sum of NLL and the number of right tokens."""
        self.model.eval()
        if self.untrained:
            with self.base_alone():
                return torch.cat([self.score_rows(1, rows) for rows in tests], 1).expand(len(self), -1, -1)
        return torch.cat([self.score_rows(len(self), rows) for rows in tests], 1)

    def score_rows(self, n: int, rows: "ScoredRows") -> Tensor:
        batch = Batch(*(value.expand(n, *value.shape[1:]) for value in rows.batch.tensors()))
        with self.laid_out(batch):
            scores = self.answers(batch)[1]
        # Not [:, [0, 2]]: that list would be copied to the device, and the copy waited for.
        sums = torch.segment_reduce(scores[:, ::2].contiguous(), "sum", lengths=rows.tokens.repeat(n), unsafe=True)
        return sums.unflatten(0, (n, -1))

    def generate(self, prompts: dict[str, Tensor], settings) -> tuple[Tensor, Tensor]:
        """Greedy answers to the same prompts, those of the base [b, length] and of every member [N, b, length]."""
        self.model.eval()
        self.model.generation_config = settings
        repeated = {key: value.repeat(len(self) + 1, 1) for key, value in prompts.items()}
        with self.autocast(), self.base_beside():
            answers = self.model.generate(**repeated, **GENERATION).unflatten(0, (len(self) + 1, -1))
        return answers[-1], answers[:-1]


def rows_of(where: Tensor, size: int) -> Tensor:
    """Positions in each member's own rows [N, most] as positions in the rows of all, `size` a member."""
    return where + size * torch.arange(len(where), device=where.device)[:, None]


@dataclass
class ScoredRows:
    """Some test examples as a micro-batch of one member, on the device; how many answer tokens each of them has [e]."""

    batch: Batch
    tokens: Tensor


def rows_to_score(
    examples: list[dict], collate, tokens: int, device: torch.device, packed: bool = False
) -> list[ScoredRows]:
    """The examples, which come sorted by length, in passes of at most so many tokens (or one example)."""
    passes, start = [], 0
    while start < len(examples):
        count = max(1, tokens // len(examples[start]["input_ids"]))
        collated = collate(examples[start : start + count])
        batch = together([collated], [1.0], 0, packed=packed)
        counts = (collated["labels"][:, 1:] != -100).sum(1)
        passes.append(ScoredRows(Batch(*(value.to(device) for value in batch.tensors())), counts.to(device)))
        start += count
    return passes


def free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
