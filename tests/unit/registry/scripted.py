"""Modules for torch.jit.script, which reads its classes from a source file. torch is imported with this file only."""

import torch


class Attributes(torch.nn.Module):
    """One attribute of each kind that an archive can hold."""

    as_sparse: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleDict({"a-b": torch.nn.Linear(2, 2)})
        self.names, self.numbers = ["a"], {"x": 1}
        self.floats, self.integers, self.flags, self.tensors = [1.0], [1], [True], [torch.zeros(1)]
        self.device, self.phase = torch.device("cpu"), 1 + 2j
        kinds = (torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64)
        for number, kind in enumerate(kinds):
            self.register_buffer(f"as_{number}", torch.zeros(2, dtype=kind))
        self.register_buffer("as_sparse", torch.eye(2).to_sparse())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        total = x + self.as_sparse.to_dense() + len(self.names) + self.numbers["x"] + self.floats[0] + self.tensors[0]
        for module in self.inner.values():
            total = module(total)
        return total


class Writes(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.save(x, "left-behind")
        return x
