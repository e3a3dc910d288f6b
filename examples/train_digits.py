"""Train a small network on scikit-learn's digits by decorrelated backpropagation, then fuse it.

Three lines differ from plain training: ``decorrelate_model``, ``DecorUpdate`` and ``decor.step()``.
Run: python examples/train_digits.py   (needs scikit-learn; about ten seconds)
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import dbp_kernels as dbp

torch.manual_seed(0)
digits = load_digits()
images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
labels = torch.from_numpy(digits.target)
order = torch.randperm(len(labels))
test, train = order[:450], order[450:]

model = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    *(nn.Flatten(), nn.Linear(256, 10)),
)
dbp.decorrelate_model(model)  # the same weights, and beside each layer's an R, now the identity
optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
decor = dbp.DecorUpdate(model, lr=1e-3, kappa=0.5, sample=0.1)

for epoch in range(1, 6):
    model.train()
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
        decor.step()
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    losses = ", ".join(f"{name}: {loss:.3f}" for name, loss in decor.losses().items())
    print(f"epoch {epoch}: test accuracy {accuracy:.1%}; decorrelation losses {losses}")

with torch.no_grad():
    before = model(images[test])
    plain = dbp.fuse_model(model)  # plain layers that hold A = W R: nothing of dbp is left
    difference = (plain(images[test]) - before).abs().max().item()
print(f"fused: {type(plain[0]).__name__}, outputs differ by at most {difference:.1e}")
