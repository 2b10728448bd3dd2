"""One step of all members: their rows through one frozen base, each with its own adapter, loss, clipping and rate."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from gang.head import AnswerLoss
from gang.lora import StackedLoRA
from gang.stack import Stack


class Gang:
    """The members' trainers, their stack, and the base model with stacked layers in the place of PEFT's.

    `trainers` are train.py's, built one after another on the same base, which wears nobody's adapter any more.
    """

    def __init__(self, trainers: list, keep: bool = True):
        self.trainers = trainers
        first = trainers[0]
        self.model = first.model.get_base_model()
        self.device = self.model.device
        self.dtype = self.model.dtype
        if first.args.bf16:
            self.dtype = torch.bfloat16
        self.stacked = {
            name: StackedLoRA(layer.get_base_layer(), self.dtype, keep) for name, layer in first.lora_layers.items()
        }
        self.stack = Stack([dict(trainer.lora_layers) for trainer in trainers], self.stacked, first.args)
        # B is zero, so until the first update every member is the base model.
        self.untrained = all(not b.any() for _, _, b in self.stack.windows(self.stack.values))
        self.wear(self.stacked)

    def wear(self, layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            self.trainers[0].model.set_submodule(name, layer)

    def drop(self, trainer) -> None:
        """Take a member out, its weights back in PEFT's layers and these in the model; the others can go on."""
        index = self.trainers.index(trainer)
        self.stack.drop(index)
        self.wear(trainer.lora_layers)
        self.trainers.pop(index)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        windows = {name: layer.a for name, layer in self.stacked.items()}
        for layer in self.stacked.values():
            layer.a = None
        yield
        for name, layer in self.stacked.items():
            layer.a = windows[name]

    def hidden(self, ids: Tensor) -> Tensor:
        """Last hidden states [rows, length, d]. Padding is on the right, where a causal model never looks: no mask."""
        with self.trainers[0].accelerator.autocast():
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

    @property
    def head(self) -> Tensor:
        return self.model.get_output_embeddings().weight

    def train(self, batches: list[dict], items: list[Tensor], rates: list[float], update: bool) -> Tensor:
        """One micro-batch of each member, and with `update` the optimizer's step. Returns [N, 5]: loss, entropy,
        share of right tokens, tokens, and the gradient's norm before clipping (0 without `update`)."""
        ids, labels = self.together(batches)
        most = int((labels[:, :, 1:] != -100).sum((1, 2)).max())
        items = torch.stack([torch.as_tensor(n, device=self.device, dtype=torch.float32) for n in items])
        if not self.model.training:
            self.model.train()
        loss, means = self.losses(ids, labels, items, most)
        loss.backward()
        if update:
            norms = self.stack.update(torch.tensor(rates, device=self.device))
            self.untrained = False
        else:
            norms = torch.zeros(len(rates), device=self.device)
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
        token = self.model.config.get_text_config().pad_token_id
        return tuple(
            torch.stack([pad(batch[key], (0, longest - batch[key].shape[1]), value=fill) for batch in batches])
            for key, fill in (("input_ids", token), ("labels", -100))
        )
