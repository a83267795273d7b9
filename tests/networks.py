"""Networks of torchvision's with random weights, as safetensors files in fp16."""

import torch
from safetensors.torch import save_file
from torchvision import models


def make_network(name, path, **changes):
    """`changes`: other tensors, or None for those to leave out."""
    torch.manual_seed(0)
    tensors = {name: tensor.half() for name, tensor in getattr(models, name)(weights=None).state_dict().items()}
    save_file({name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}, path)
    return path


def make_squeezenet(path, **changes):
    return make_network("squeezenet1_0", path, **changes)
