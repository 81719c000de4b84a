"""Full fine-tuning of the same backbone: a plain loop, best epoch on validation rows.

AdamW, linear warm-up over a tenth of the steps, then linear decay to zero; a linear layer on the
mean (encoders) or the last token (decoders) of the last hidden states, every weight trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.scoring import Clock, score
from benchmarks.sets import Rows
from spin_cli import backbone, metrics
from spin_cli.backbone import Backbone
from spin_cli.backbone.discovery import probe_inputs
from spin_cli.choices import Metric
from spin_cli.config import ModelConfig

WARM_UP, DECAY, CLIP = 0.1, 0.01, 1.0
HEAD_RATE = 1e-3
"""Learning rate of the new layer, which starts at zero."""
CHUNK = 50
"""Batches among which texts are sorted by length, so that little is padded."""


@dataclass(frozen=True)
class Recipe:
    """What a run may vary."""

    epochs: int = 3
    rate: float = 5e-5
    batch: int = 32
    max_length: int = 512
    seed: int = 0


class TextClassifier(torch.nn.Module):
    """A backbone with a linear layer on its last hidden states."""

    def __init__(self, base: Backbone, n_classes: int) -> None:
        super().__init__()
        self.base, self.causal, self.pad_id = base.model, base.layout.causal, base.pad_id
        self.device = base.device
        width = int(base.model.config.get_text_config().hidden_size)
        self.output = torch.nn.Linear(width, n_classes, device=base.device)
        torch.nn.init.zeros_(self.output.weight)
        torch.nn.init.zeros_(self.output.bias)

    def forward(self, batch: Sequence[Sequence[int]]) -> torch.Tensor:
        """Logits (n, n_classes) of token ids."""
        lengths = torch.tensor([len(ids) for ids in batch], device=self.device)
        width = int(lengths.max())
        ids = torch.tensor(
            [[*ids, *[self.pad_id] * (width - len(ids))] for ids in batch], device=self.device
        )
        mask = torch.arange(width, device=self.device) < lengths[:, None]
        inputs = probe_inputs(self.base, ids) | {"attention_mask": mask.long()}
        states = self.base(**inputs).last_hidden_state.float()
        if self.causal:
            pooled = states[torch.arange(len(batch), device=self.device), lengths - 1]
        else:
            pooled = (states * mask[:, :, None]).sum(1) / lengths[:, None]
        return self.output(pooled)


def encode(base: Backbone, rows: Rows) -> list[list[int]]:
    return [list(item.ids) for item in backbone.encode(base, [text for text, _ in rows])]


def shuffled(lengths: Sequence[int], batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Row numbers of batches of similar length, in random order."""
    order = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(order), CHUNK * batch):
        part = order[start : start + CHUNK * batch]
        part = part[np.argsort([lengths[i] for i in part], kind="stable")]
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    yield from (batches[i] for i in rng.permutation(len(batches)))


@torch.inference_mode()
def predict(model: TextClassifier, ids: Sequence[Sequence[int]], batch: int = 32) -> np.ndarray:
    """Class probabilities (n, n_classes), batched by length."""
    model.eval()
    order = np.argsort([len(i) for i in ids], kind="stable")
    probs = np.empty((len(ids), model.output.out_features))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        probs[rows] = model([ids[i] for i in rows]).softmax(-1).double().cpu().numpy()
    return probs


def optimiser(model: TextClassifier, recipe: Recipe, steps: int) -> tuple[Any, Any]:
    """AdamW and its schedule; norms and biases are not decayed."""
    inner = [p for p in model.base.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in inner if p.ndim > 1], "weight_decay": DECAY},
        {"params": [p for p in inner if p.ndim <= 1], "weight_decay": 0.0},
        {"params": list(model.output.parameters()), "lr": HEAD_RATE, "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.rate, fused=True)
    warm = max(1, math.ceil(WARM_UP * steps))

    def factor(step: int) -> float:
        return min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))

    return adam, torch.optim.lr_scheduler.LambdaLR(adam, factor)


def fine_tune(
    options: ModelConfig, splits: dict[str, Rows], metric: Metric, recipe: Recipe
) -> dict[str, Any]:
    """Train every weight; codes and probabilities of val and test rows at the best epoch."""
    torch.manual_seed(recipe.seed)
    base = backbone.load(options)
    base.model.requires_grad_(True)
    classes = sorted({label for _, label in splits["train"]})
    model = TextClassifier(base, len(classes))
    ids = {split: encode(base, rows) for split, rows in splits.items()}
    codes = {s: np.array([classes.index(label) for _, label in r]) for s, r in splits.items()}
    lengths, rng = [len(i) for i in ids["train"]], np.random.default_rng(recipe.seed)
    steps = recipe.epochs * math.ceil(len(lengths) / recipe.batch)
    adam, schedule = optimiser(model, recipe, steps)
    clock, history, best = Clock(), [], None
    for epoch in range(1, recipe.epochs + 1):
        train_epoch(model, adam, schedule, ids["train"], codes["train"], recipe.batch, rng)
        val = predict(model, ids["val"])
        here = score(metric, codes["val"], val.argmax(1)), -metrics.log_loss(codes["val"], val)
        history.append({"epoch": epoch, "val": here[0], "log_loss": -here[1]})
        print(f"  epoch {epoch}: val {here[0]:.4f}, {clock.seconds:.0f} s", flush=True)
        if best is None or here > best["rank"]:
            best = {"rank": here, "epoch": epoch, "val": val, "test": predict(model, ids["test"])}
    return {
        "val": (codes["val"], best["val"]),
        "test": (codes["test"], best["test"]),
        "epoch": best["epoch"],
        "history": history,
        "train_seconds": clock.seconds,
        "parameters": sum(p.numel() for p in model.parameters() if p.grad is not None),
    }


def train_epoch(
    model: TextClassifier,
    adam: Any,
    schedule: Any,
    ids: Sequence[Sequence[int]],
    codes: np.ndarray,
    batch: int,
    rng: np.random.Generator,
) -> None:
    model.train()
    for rows in shuffled([len(i) for i in ids], batch, rng):
        target = torch.tensor(codes[rows], device=model.device)
        loss = torch.nn.functional.cross_entropy(model([ids[i] for i in rows]), target)
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        adam.step()
        schedule.step()
