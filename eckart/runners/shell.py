"""Some blocks of a model by themselves, to be changed and put back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


class restored:
    """Afterwards every module below is again what it was, whatever was put in its place."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        modules = [m for block in blocks for m in block.modules()]
        self.children = [(parent, name, child) for parent in modules for name, child in parent.named_children()]
        self.biases = [(m, n) for m in modules for n, p in vars(m)["_parameters"].items() if p is None]

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for parent, name, child in self.children:
            setattr(parent, name, child)
        for module, name in self.biases:
            setattr(module, name, None)


def shell(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A module that holds some blocks of a model and nothing else, under their full names."""
    out = nn.Module()
    for name in names:
        parent = out
        *path, last = name.split(".")
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(last, model.get_submodule(name))
    return out
