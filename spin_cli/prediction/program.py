"""A head and its part of the model as one module of tensors, for `torch.export` and ONNX."""

from __future__ import annotations

import torch
from torch import nn

from spin_cli import backbone
from spin_cli.choices import Pooling, Site
from spin_cli.prediction.predictor import Predictor


class Program(nn.Module):
    """Token ids to class probabilities: what ``predict`` computes between its tokenizer and labels.

    Parameters
    ----------
    predictor : Predictor
        Its model's modules become part of this one.
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        self._predictor = predictor
        self.backbone = predictor.model.model
        head = predictor.head
        self.register_buffer("weight", torch.tensor(head.weight).double())
        self.register_buffer("bias", torch.tensor(head.bias).double())
        if head.hidden is not None:
            self.register_buffer("hidden_weight", torch.tensor(head.hidden[0]).double())
            self.register_buffer("hidden_bias", torch.tensor(head.hidden[1]).double())
        for number, place in enumerate(predictor.places.values()):
            self.register_buffer(f"picked_{number}", torch.tensor(place.picked))
        self.to(predictor.model.device)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Class probabilities.

        Parameters
        ----------
        input_ids : (B, T) int64, special tokens included, padded on the right with any token
        attention_mask : (B, T) int64, 1 for real tokens, at least one a row, 0 for padding

        Returns
        -------
        Tensor, (B, n_classes), float64
        """
        predictor = self._predictor
        numbers = {key: number for number, key in enumerate(predictor.places)}
        pooled: dict[int, torch.Tensor] = {}

        def take(layer: str, site: Site, states: torch.Tensor) -> None:
            for pooling in predictor.wanted[layer, site]:
                number = numbers[layer, site, pooling]
                picked = states.index_select(-1, self.get_buffer(f"picked_{number}"))
                pooled[number] = pool_masked(picked, attention_mask, pooling)

        # What comes after the last wanted vector is traced, and then dropped as unused.
        wanted = predictor.wanted
        backbone.run_states(predictor.model, input_ids, attention_mask, wanted, take, early=False)
        x = torch.cat([pooled[number] for number in range(len(numbers))], 1)
        x = backbone.as_stored(x, predictor.head.storage_dtype).double()
        if predictor.head.hidden is not None:
            hidden = x @ self.get_buffer("hidden_weight").T + self.get_buffer("hidden_bias")
            x = torch.relu(hidden)
        logits = x @ self.get_buffer("weight").T + self.get_buffer("bias")
        if predictor.head.multi_label:
            return torch.sigmoid(logits)
        if predictor.head.outputs == 1:
            return torch.cat([torch.sigmoid(-logits), torch.sigmoid(logits)], 1)
        return torch.softmax(logits, 1)


def pool_masked(states: torch.Tensor, mask: torch.Tensor, pooling: Pooling) -> torch.Tensor:
    """Pool (B, T, n) vectors over the tokens whose *mask* (B, T) is 1: (B, n), float32.

    The same as `spin_cli.pooling.pool`, in operations that do not depend on the lengths.
    """
    x, real = states.float(), mask[..., None] > 0
    count = mask.sum(1, keepdim=True)
    if pooling is Pooling.MEAN:
        return torch.where(real, x, 0.0).sum(1) / count
    if pooling is Pooling.MAX:
        return torch.where(real, x, float("-inf")).amax(1)
    if pooling is Pooling.FIRST:
        return x[:, 0]
    at = (count - 1)[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(1, at)[:, 0]
