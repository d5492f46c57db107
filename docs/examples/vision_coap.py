"""Convolutions: COAP projects both channel axes of a kernel, and the matrices of linear layers.

    python docs/examples/vision_coap.py

`rank_ratio_cnn` and `rank_ratio_matrix` say how many times smaller than the shorter side a rank is.
"""

import torch
from torch import Tensor, nn

from lowrank.optimizers import build, projection_summary, state_bytes


class Network(nn.Module):
    """A convolutional classifier of 32 x 32 images in four classes."""

    def __init__(self):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(m, n, 3, stride=2, padding=1) for m, n in ((3, 64), (64, 64), (64, 128))
        )
        self.mlp = nn.Linear(128 * 16, 128)
        self.head = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (batch, 4)."""
        for convolution in self.convolutions:
            x = torch.relu(convolution(x))
        return self.head(torch.relu(self.mlp(x.flatten(1))))


def stripes(step: int) -> tuple[Tensor, Tensor]:
    """Stripes in four directions under much noise, and their class."""
    generator = torch.Generator().manual_seed(step)
    classes = torch.randint(0, 4, (32,), generator=generator)
    angle = (classes * torch.pi / 4).view(-1, 1, 1)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    waves = torch.sin(0.8 * (x * angle.cos() + y * angle.sin())).unsqueeze(1)
    return waves + 3 * torch.randn(32, 3, 32, 32, generator=generator), classes


torch.manual_seed(0)
model = Network()
optimizer = build("coap_adamw", model, lr=0.003, rank_ratio_cnn=4, rank_ratio_matrix=4)
print(projection_summary(optimizer.param_groups))
losses = []
for step in range(60):
    images, classes = stripes(step)
    loss = nn.functional.cross_entropy(model(images), classes)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
full = 8 * sum(parameter.numel() for parameter in model.parameters())
print(f"optimizer state: {state_bytes(optimizer)} bytes, AdamW's {full}")
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
