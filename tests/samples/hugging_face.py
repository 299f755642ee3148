"""A user's network family with a Hugging Face model: a small BERT that is made from a configuration.

Nothing is downloaded. Each input is a token of the row. The first of the two layers is random and frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import BertConfig, BertForSequenceClassification

from jobs.train.network.protocol import NetworkSignature, task_loss


@dataclass(kw_only=True, slots=True)
class Parameters:
    epochs: int = 2
    batch_size: int | None = 100
    learning_rate: float = 0.01
    weight_decay: float = 0.0
    dropout: float = 0.0


class RowBert(BertForSequenceClassification):  # type: ignore[no-untyped-call]
    """BERT over the inputs of a row. A missing value is 0."""

    def __init__(self, signature: NetworkSignature, config: BertConfig) -> None:
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.randn(signature.width, config.hidden_size))
        self.offset = torch.nn.Parameter(torch.randn(signature.width, config.hidden_size))
        self.bert.embeddings.word_embeddings.requires_grad_(False)  # tokens are numbers, so it is not used
        self.bert.encoder.layer[0].requires_grad_(False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return outputs [rows, signature.num_outputs]."""
        values = torch.nan_to_num(inputs / 100).unsqueeze(2)
        logits: torch.Tensor = super().forward(inputs_embeds=values * self.scale + self.offset).logits
        return logits


def build(signature: NetworkSignature, parameters: Parameters) -> RowBert:
    """Return the network with its first weights."""
    config = BertConfig(
        vocab_size=1,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=signature.width,
        hidden_dropout_prob=parameters.dropout,
        attention_probs_dropout_prob=parameters.dropout,
    )
    config.num_labels = signature.num_outputs
    return RowBert(signature, config)


loss = task_loss
