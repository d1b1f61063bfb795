"""What the workers of `tests.forked.spawn` need, imported once for all of them."""

import accelerate
import torch
import torch._dynamo
import torch.distributed.tensor

import distcls.training.run

__all__ = ["accelerate", "distcls", "torch"]
