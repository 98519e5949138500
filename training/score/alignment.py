"""The emoji alignment score: does an image show what its caption names?

A linear map takes image features, another one MiniLM name vectors, into one space; both are fitted contrastively
(the softmax over all names of Radford et al. 2021, https://arxiv.org/abs/2103.00020) on real images. The score is
how often the right name among all names comes first. No image is ever scored by a head that was fitted with it,
and no sample by a head that was fitted with the real image of its caption. Half of the training images are softened
copies (damage.py): the score is about what is shown, not about faint noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from score.cache import digest, remember

FOLDS = 5
EPOCHS, BATCH, RATE = 24, 256, 3e-3


class Head(nn.Module):
    """Similarity of image features [N, 1280] to names, with the feature statistics of its training images."""

    def __init__(self, width: int, text_width: int, size: int = 256) -> None:
        super().__init__()
        self.image, self.text, self.dropout = nn.Linear(width, size), nn.Linear(text_width, size), nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))

    def forward(self, features: Tensor, vectors: Tensor) -> Tensor:
        """Similarities [N, names]."""
        scaled = self.dropout((features - self.get_buffer("mean")) / self.get_buffer("spread"))
        images, texts = F.normalize(self.image(scaled), dim=1), F.normalize(self.text(vectors), dim=1)
        return self.scale.exp() * images @ texts.T


def fit(features: Tensor, targets: Tensor, vectors: Tensor, seed: int = 0) -> Head:
    """A head fitted to images whose names are `vectors[targets]`."""
    torch.manual_seed(seed)
    head = Head(features.shape[1], vectors.shape[1])
    head.get_buffer("mean").copy_(features.mean(dim=0))
    head.get_buffer("spread").copy_(features.std(dim=0) + 1e-3)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE, weight_decay=0.01)
    steps = len(features) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(features))[: steps * BATCH].split(BATCH):
            loss = F.cross_entropy(head(features[rows], vectors), targets[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return head.eval().requires_grad_(False)


@dataclass(frozen=True)
class Retrieval:
    """Share of images whose own name comes first, or among the first five, of all names; with standard error."""

    count: int
    top1: float
    top5: float
    top1_error: float


def retrieval(similarities: Tensor, targets: Tensor) -> Retrieval:
    """Retrieval among the columns of `similarities` [N, names]."""
    ranks = rank_of(similarities, targets)
    top1, top5 = ((ranks < k).float().mean().item() for k in (1, 5))
    return Retrieval(len(ranks), top1, top5, (top1 * (1 - top1) / len(ranks)) ** 0.5)


def rank_of(similarities: Tensor, targets: Tensor) -> Tensor:
    """How many names fit better than the right one, per image."""
    own = similarities.gather(1, targets[:, None])
    return (similarities > own).sum(dim=1)


class AlignmentScore:
    """Cross-fitted heads: head k was not fitted with the images of fold k; held-out images are in no head."""

    def __init__(
        self, features: Sequence[Tensor], targets: Tensor, held_out: Tensor, vectors: Tensor, cache: Path
    ) -> None:
        # Centred vectors: all names share one large component, which carries nothing.
        self.vectors = F.normalize(vectors - vectors.mean(dim=0), dim=1)
        self.folds = torch.randint(0, FOLDS, (len(targets),), generator=torch.Generator().manual_seed(0))
        self.folds[held_out] = FOLDS
        self.heads: list[Head] = []
        for fold in range(FOLDS + 1):
            rows = (self.folds != fold) & ~held_out
            versions = torch.cat([version[rows] for version in features])
            self.heads.append(self._head(versions, targets[rows].repeat(len(features)), cache))

    def _head(self, features: Tensor, targets: Tensor, cache: Path) -> Head:
        key = digest(features, targets, self.vectors, f"{EPOCHS} {BATCH} {RATE}")
        state = remember(cache / f"head-{key}.safetensors", lambda: fit(features, targets, self.vectors).state_dict())
        head = Head(features.shape[1], self.vectors.shape[1])
        head.load_state_dict(state)
        return head.eval()

    @torch.no_grad()
    def similarities(self, features: Tensor, folds: Tensor) -> Tensor:
        """Similarities [N, names], each image under the head of its fold."""
        scores = features.new_zeros(len(features), len(self.vectors))
        for fold, head in enumerate(self.heads):
            chosen = folds == fold
            scores[chosen] = head(features[chosen], self.vectors)
        return scores
