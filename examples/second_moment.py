"""``patch_gram`` on its own: the second moment of a convolution's patches, without im2col.

It is the input factor of K-FAC, the Hessian of layer-wise quantisation and, as here, what ZCA
whitening of image patches needs. Run: python examples/second_moment.py   (needs scikit-learn)
"""

import torch
from sklearn.datasets import load_digits

import dbp_kernels as dbp

images = torch.from_numpy(load_digits().images).float().unsqueeze(1) / 16
# Whole patches only: with zero padding the border would be part of the statistics.
S = dbp.patch_gram(images, kernel_size=3)[0]
mean = dbp.patch_mean(images, kernel_size=3)[0]
covariance = S - torch.outer(mean, mean)
print(f"{len(images)} images, patches of {S.shape[0]} pixels")

# The same by im2col, which holds nine copies of every image.
patches = torch.nn.functional.unfold(images, 3).transpose(1, 2).reshape(-1, 9)
unfolded = patches.T @ patches / len(patches)
print(f"largest difference from im2col: {(S - unfolded).abs().max():.1e}")

# ZCA whitening: R = covariance^(-1/2) decorrelates the patches of centred images, all at once.
values, vectors = torch.linalg.eigh(covariance)
R = vectors @ torch.diag(values.rsqrt()) @ vectors.T
white = dbp.decorrelate(images, R, kernel_size=3)  # (N, 9, 6, 6): x = R z at every position
flat = white.transpose(0, 1).reshape(9, -1)
off_diagonal = torch.cov(flat) - torch.eye(9)
print(f"eigenvalues before: {values.min():.4f} to {values.max():.4f}")
print(f"covariance after whitening differs from the identity by {off_diagonal.abs().max():.1e}")

# K-FAC: precondition a convolution's weight gradient with the damped inverse of its input factor.
weight = torch.randn(16, 1, 3, 3, requires_grad=True)
torch.nn.functional.conv2d(images, weight).square().mean().backward()
damped = S + 1e-3 * torch.eye(9)
step = torch.linalg.solve(damped, weight.grad.flatten(1).T).T.view_as(weight)
print(f"gradient norm {weight.grad.norm():.3f}, preconditioned {step.norm():.3f}")
