"""Steps of networks in parts beside the same steps of whole ones; started by torchrun in test_sharding.

The arguments are `optimizers` or `families`, and names of timm's optimizers or of its model classes. The first process
prints, for each, a line with the largest difference of a weight or gradient, over what they are.
"""

import copy
import sys

import timm
import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import timm_selfdistill as sd
from timm_selfdistill.train.parallelism import Sharded

LABELS = torch.tensor([1, 2])


def compare_optimizer(name: str, sharded: Sharded) -> float:
    """Return how far the weights of two networks are from one another after four steps, over how far they moved."""
    torch.manual_seed(0)
    start = sd.wrap(timm.create_model("test_resnet", num_classes=5), image_size=32, head="linear")
    images = torch.randn(2, 3, 32, 32)
    ended = []
    for in_parts in (False, True):
        model = copy.deepcopy(start)
        task = sd.SelfDistillationTask(model, verbose=False)
        prepared = (sharded.prepare(task, None) if in_parts else task).train()
        optimizer = create_optimizer_v2(model, opt=name, lr=1e-3, weight_decay=1e-2)
        for _ in range(4):
            prepared(images, LABELS)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append(torch.cat([whole(parameter).flatten() for parameter in model.parameters()]))
    moved = ended[0] - torch.cat([parameter.detach().flatten() for parameter in start.parameters()])
    return float((ended[0] - ended[1]).abs().max() / moved.abs().max())


def compare_family(name: str, sharded: Sharded) -> float:
    """Return how far the gradients of two networks are from one another, over the largest of them."""
    # What is imported there needs the paths that pytest adds.
    from test_timm_families import MEMBERS

    subject = MEMBERS[name]
    bare = subject.create()
    start = subject.wrap(copy.deepcopy(bare))
    gradients = []
    for in_parts in (False, True):
        model = copy.deepcopy(start)
        task = sd.SelfDistillationTask(model, verbose=False)
        prepared = (sharded.prepare(task, None) if in_parts else task).train()
        torch.manual_seed(5)
        prepared(subject.images(bare), LABELS)["loss"].backward()
        gradients.append([None if p.grad is None else whole(p.grad) for p in model.parameters()])
    differences = []
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            differences.append((a - b).abs().max())
    largest = torch.stack([gradient.abs().max() for gradient in gradients[0] if gradient is not None]).max()
    return float(torch.stack(differences).max() / largest)


def whole(tensor: Tensor | nn.Parameter) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


if __name__ == "__main__":
    torch.set_num_threads(1)
    accelerator = Accelerator()
    compare = {"optimizers": compare_optimizer, "families": compare_family}[sys.argv[1]]
    for each in sys.argv[2:]:
        difference = compare(each, Sharded(accelerator))
        accelerator.print(f"{each} {difference}", flush=True)
