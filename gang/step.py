"""One step of all members: their rows through one frozen base, each with its own adapter, loss, clipping and rate."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import masking_utils

from gang.graph import GraphedStep
from gang.head import AnswerLoss, Head
from gang.lora import StackedLoRA
from gang.stack import Stack

# transformers takes the capture of a CUDA graph for tracing, and then (5.17) hands attention an explicit mask where it
# gives is_causal otherwise: another kernel, slower, and with cuDNN a wrong gradient. Looking for packed sequences reads
# the positions back to the host in each forward pass; train.py refuses packing, so there are none.
for private, answer in {"is_tracing": False, "find_packed_sequence_indices": None}.items():
    assert callable(getattr(masking_utils, private)), f"transformers.masking_utils.{private} is no more"
    setattr(masking_utils, private, lambda tensor=None, answer=answer, **_: answer)

LENGTHS = 64  # on a GPU, rows are padded to a multiple of this: few shapes, so few CUDA graphs


class Gang:
    """The members' trainers, their stack, and the base model with stacked layers in the place of PEFT's.

    `trainers` are train.py's, built one after another on the same base, which wears nobody's adapter any more.
    """

    def __init__(self, trainers: list, keep: bool | None = None, static: bool | None = None):
        self.trainers = trainers
        first = trainers[0]
        self.peft_model, self.model = first.model, first.model.get_base_model()
        self.bf16 = first.args.bf16
        self.device = self.model.device
        self.dtype = torch.bfloat16 if self.bf16 else self.model.dtype
        self.head = Head(self.model)
        size = sum(layer.in_features * layer.out_features for layer in first.lora_layers.values()) * self.dtype.itemsize
        keep = size < free_memory(self.device) / 3 if keep is None else keep  # the rest is for activations
        self.stacked = {
            name: StackedLoRA(layer.get_base_layer(), self.dtype, keep) for name, layer in first.lora_layers.items()
        }
        self.stack = Stack([dict(trainer.lora_layers) for trainer in trainers], self.stacked, first.args)
        # B is zero, so until the first update every member is the base model, and one evaluation serves all.
        self.untrained = all(not b.any() for _, _, b in self.stack.windows(self.stack.values))
        self.wear(self.stacked)
        self.static = self.device.type == "cuda" if static is None else static
        self.most = most_answers(first) if self.static else 0
        self.graphs: dict[bool, GraphedStep] = {}
        self.capture()

    def capture(self) -> None:
        """On a GPU, let the steps be CUDA graphs; anew whenever the stack has changed its shape."""
        self.graphs = {}
        recomputing = any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
        if self.device.type == "cuda" and not recomputing:
            stack = self.stack
            state = [stack.values, stack.gradients, stack.first, stack.second, stack.updates]
            self.graphs = {u: GraphedStep(partial(self.step, self.most, u), state) for u in (False, True)}

    def wear(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            self.peft_model.set_submodule(name, layer)

    def take_off(self) -> None:
        self.wear({name: layer.weight.layer for name, layer in self.stacked.items()})

    def drop(self, trainer) -> None:
        """Take a member out, its weights back in PEFT's layers and these in the model; the others can go on."""
        index = self.trainers.index(trainer)
        self.stack.drop(index)
        self.wear(trainer.lora_layers)
        self.trainers.pop(index)
        self.capture()

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        windows = {name: layer.a for name, layer in self.stacked.items()}
        for layer in self.stacked.values():
            layer.a = None
        try:
            yield
        finally:
            for name, layer in self.stacked.items():
                layer.a = windows[name]

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [rows, length, d]. Padding is on the right, where a causal model never looks: no mask."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def answers(self, labels: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The positions before each answer token, for labels [N, b, s]: where in the hidden states [N, most],
        the tokens to predict [N, most], and whether the entry is one (a member may have fewer than `most`)."""
        n, b, s = labels.shape
        following = labels.roll(-1, 2)
        following[:, :, -1] = -100
        following = following.reshape(n, b * s)
        order = (following != -100).byte().sort(dim=1, descending=True, stable=True).indices[:, :most]
        targets = following.gather(1, order)
        where = order + torch.arange(n, device=labels.device)[:, None] * (b * s)
        return where, targets.clamp(min=0), targets != -100

    def losses(self, ids: Tensor, labels: Tensor, items: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """For ids, labels [N, b, s] and items [N], by which each member's NLL is divided: the sum of the members'
        losses, and per member [N, 4]: loss, entropy, share of right tokens (means over its tokens), tokens."""
        where, targets, valid = self.answers(labels, most)
        hidden = self.hidden(ids.flatten(0, 1)).flatten(0, 1).index_select(0, where.flatten())
        share = torch.where(valid, 1 / items[:, None], 0.0)
        loss, scores = AnswerLoss.apply(hidden, self.head, targets.flatten(), share.flatten())
        scores = torch.where(valid[..., None], scores.unflatten(0, where.shape), 0.0).sum(1)
        tokens = valid.sum(1)
        means = scores[:, 1:] / tokens.clamp(min=1)[:, None]
        return loss, torch.cat([scores[:, :1] / items[:, None], means, tokens[:, None]], 1)

    def train(self, batches: list[dict], items: list[Tensor], rates: list[float], update: bool) -> Tensor:
        """One micro-batch of each member, and with `update` the optimizer's step. Returns [N, 5]: loss, entropy,
        share of right tokens, tokens, and the gradient's norm before clipping (0 without `update`)."""
        ids, labels = self.together(batches)
        items = torch.stack([torch.as_tensor(n, device=self.device, dtype=torch.float32) for n in items])
        self.untrained &= not (update and any(rates))  # a warm-up's first rate is 0
        rates = torch.tensor(rates).to(self.device, non_blocking=True)
        if not self.model.training:
            self.model.train()
        if self.graphs:
            try:
                return self.graphs[update](ids, labels, items, rates)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                print(f"gang: no CUDA graph, eager steps instead ({str(error).splitlines()[0]})", flush=True)
                self.graphs = {}
        most = self.most if self.static else int((labels[:, :, 1:] != -100).sum((1, 2)).max())
        return self.step(most, update, ids, labels, items, rates)

    def step(self, most: int, update: bool, ids: Tensor, labels: Tensor, items: Tensor, rates: Tensor) -> Tensor:
        loss, means = self.losses(ids, labels, items, most)
        loss.backward()
        norms = self.stack.update(rates) if update else torch.zeros_like(rates)
        return torch.cat([means, norms[:, None]], 1)

    @torch.no_grad()
    def score(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Every member on the same batch: [N, b, 2] sum of NLL and number of right tokens, [b] number of tokens."""
        n = len(self.trainers)
        labels = batch["labels"][None]
        tokens = (labels[:, :, 1:] != -100).sum((0, 2))
        if self.model.training:
            self.model.eval()
        if self.untrained:
            with self.base_alone():
                return self.examples(batch["input_ids"][None], labels).expand(n, -1, -1), tokens
        ids, labels = (x.expand(n, -1, -1) for x in (batch["input_ids"], labels[0]))
        return self.examples(ids, labels), tokens

    def examples(self, ids: Tensor, labels: Tensor) -> Tensor:
        n, b, s = ids.shape
        where, targets, valid = self.answers(labels, int((labels[:, :, 1:] != -100).sum((1, 2)).max()))
        hidden = self.hidden(ids.reshape(n * b, s)).flatten(0, 1).index_select(0, where.flatten())
        _, scores = AnswerLoss.apply(hidden, self.head, targets.flatten(), torch.zeros_like(targets.flatten()))
        scores = torch.where(valid.flatten()[:, None], scores[:, [0, 2]], 0.0)
        return scores.new_zeros(n * b, 2).index_add_(0, where.flatten() // s, scores).unflatten(0, (n, b))

    def together(self, batches: list[dict]) -> tuple[Tensor, Tensor]:
        """The members' input_ids and labels as [N, b, s], padded to the longest."""
        longest = max(batch["input_ids"].shape[1] for batch in batches)
        if self.static:
            longest = math.ceil(longest / LENGTHS) * LENGTHS
        token = self.model.config.get_text_config().pad_token_id
        return tuple(
            torch.stack([pad(batch[key], (0, longest - batch[key].shape[1]), value=fill) for batch in batches])
            for key, fill in (("input_ids", token), ("labels", -100))
        )


def most_answers(trainer) -> int:
    """The most answer tokens that a training batch can have: those of the longest answers together."""
    counts = sorted(sum(label != -100 for label in labels[1:]) for labels in trainer.train_dataset["labels"])
    return math.ceil(sum(counts[-trainer.args.per_device_train_batch_size :]) / LENGTHS) * LENGTHS


def free_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
