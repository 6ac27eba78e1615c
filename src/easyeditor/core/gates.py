"""A network that reads a request and says how the gradient of a weight is to be masked and what is to be added. KE.

De Cao et al., EMNLP 2021, arXiv:2104.08164, equations 5 to 7. With h an LSTM's reading of the request, each weight has
layers that give alpha, gamma (d_out,), beta, delta (d_in,) and eta, and its change is

    D = s(eta) (softmax(alpha) beta^T * grad + softmax(gamma) delta^T),    * by element.

The mask is of rank one, so the masked gradient is of low rank as the gradient is: a token's g h^T becomes
(softmax(alpha) * g)(beta * h)^T. No matrix of a weight's size is made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from easyeditor.core.gradients import Factors


class Reader(nn.Module):
    """What an LSTM makes of texts, in both directions: (n, size).

    Args:
        width: Of the embeddings.
        hidden: Of its state in each direction.
        size: Of what it returns.
        generator: Draws its weights.
    """

    def __init__(self, width: int, hidden: int, size: int, generator: torch.Generator) -> None:
        super().__init__()
        with torch.device("meta"):  # elsewhere they would draw from the global generator
            self.lstm = nn.LSTM(width, hidden, bidirectional=True, batch_first=True)
            self.out = nn.Linear(2 * hidden, size)
        _draw(self, hidden**-0.5, generator)

    def forward(self, texts: Sequence[Tensor]) -> Tensor:
        """What is read, from the embeddings of each text, (length, width)."""
        packed = nn.utils.rnn.pack_sequence(list(texts), enforce_sorted=False)
        _, (last, _) = self.lstm(packed)  # (2, n, hidden)
        return self.out(torch.cat([last[0], last[1]], dim=1)).tanh()  # type: ignore[no-any-return]


class Shift(nn.Module):
    """alpha, beta, gamma, delta, eta of one projection, from what was read.

    Args:
        d_out: The projection's outputs.
        d_in: Its inputs.
        size: Of what was read.
        hidden: Of the layer between.
        generator: Draws the weights of that layer; the last one begins at zero.
    """

    def __init__(self, d_out: int, d_in: int, size: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sizes = (d_out, d_in, d_out, d_in, 1)
        with torch.device("meta"):
            self.inner, self.outer = nn.Linear(size, hidden), nn.Linear(hidden, sum(self.sizes))
        _draw(self, size**-0.5, generator)
        for parameter in self.outer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """softmax(alpha), beta, softmax(gamma), delta and s(eta) of each request, (n, ...).

        Before any training s(eta) softmax(alpha) beta^T is -1 everywhere and delta is 0.
        """
        alpha, beta, gamma, delta, eta = self.outer(self.inner(condition).tanh()).split(self.sizes, dim=1)
        scale = 2 * self.sizes[0]
        return alpha.softmax(1), scale * (beta - 1), gamma.softmax(1), scale * delta, eta.sigmoid()


class Editor(nn.Module):
    """The network: factors of gradients and the texts of requests to changes.

    Args:
        width: Of the embeddings.
        shapes: Weight name -> (d_out, d_in), in an order that counts.
        sizes: Of the LSTM's state, of what is read, of the layer before alpha ... eta.
        edit_lr: Where the steps begin.
        seed: Draws its weights.
    """

    def __init__(
        self, width: int, shapes: Mapping[str, tuple[int, int]], sizes: Sequence[int], edit_lr: float, seed: int
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        lstm, size, hidden = sizes
        self.names = list(shapes)
        self.reader = Reader(width, lstm, size, generator)
        self.shifts = nn.ModuleList(Shift(*shapes[name], size, hidden, generator) for name in self.names)
        self.lrs = nn.Parameter(torch.full((len(self.names),), edit_lr))
        self.multiplier = nn.Parameter(torch.ones(()))

    def forward(self, found: Mapping[str, Factors], texts: Sequence[Tensor]) -> dict[str, Factors]:
        """The change of each weight by each request, as factors.

        Args:
            found: Weight name -> the factors of its gradient; their rows name the request.
            texts: The embeddings of each request's text, (length, width).

        Returns:
            Weight name -> factors, those of one request together, in the order of the requests.
        """
        condition, changes = self.reader(texts), {}
        for name, shift, lr in zip(self.names, self.shifts, self.lrs, strict=True):
            alpha, beta, gamma, delta, eta = shift(condition)
            part, step = found[name], lr * eta  # (n, 1)
            rows = part.rows.to(step.device)
            owner = torch.cat([rows, torch.arange(len(texts), device=rows.device)])
            order = owner.argsort(stable=True)
            left = torch.cat([(step * alpha)[rows] * part.gradients.to(step), step * gamma])
            right = torch.cat([beta[rows] * part.inputs.to(step), delta])
            changes[name] = Factors(right[order], left[order], owner[order])
        return changes


def _draw(module: nn.Module, bound: float, generator: torch.Generator) -> None:
    """Give a module without numbers some, uniform between two bounds."""
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
