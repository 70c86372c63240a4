# SPDX-License-Identifier: Apache-2.0
"""A bidirectional LSTM over word numbers, for short texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fedfusion_flwr import computation


class BiLSTM(nn.Module):
    """Word vectors, one bidirectional LSTM, pooling over the words, and a normalized head.

    Parameters
    ----------
    vocabulary_size : int
        Number of words; word 0 is padding, which may only follow the words of a text.
    num_classes : int
        Width of the output.
    embedding, hidden : int
        Width of a word vector, and of the LSTM's state in each direction.
    """

    def __init__(
        self, vocabulary_size: int, num_classes: int, embedding: int = 64, hidden: int = 64
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, embedding, padding_idx=0)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(
            # No bias: the normalization that follows would cancel it.
            nn.Linear(4 * hidden, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, num_classes),
        )
        with torch.no_grad():
            # The default variance of 1 would drown SGD's steps.
            self.embedding.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) of texts (N, L), int64, padded with 0 at their end."""
        lengths = (x != 0).sum(1).clamp_min(1)
        packed = pack_padded_sequence(
            self.embedding(x), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        # As long as the longest text of the batch, and 0 after the end of a text.
        states, _ = pad_packed_sequence(self._states(packed), batch_first=True)
        ended = torch.arange(states.shape[1], device=x.device) >= lengths.unsqueeze(1)
        mean = states.sum(1) / lengths.unsqueeze(1)
        largest = states.masked_fill(ended.unsqueeze(2), -torch.inf).amax(1)
        logits: Tensor = self.head(torch.cat([largest, mean], 1))
        return logits

    def _states(self, packed: PackedSequence) -> PackedSequence:
        """The LSTM's states; in float32 if oneDNN has no LSTM in bfloat16."""
        device = packed.data.device
        autocast = torch.is_autocast_enabled(device.type) and computation.has_bfloat16(device)
        with torch.autocast(device.type, enabled=autocast):
            states: PackedSequence = self.lstm(packed)[0]
        return states
