"What would make the host wait for a GPU, counted on a CPU."

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# They hand a number to the host, or make a tensor whose size depends on numbers, or
# draw on the device in a way that looks at the weights first, or copy from the host.
WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::is_nonzero", "aten::multinomial", "aten::unique_dim", "aten::_unique2",
    "aten::repeat_interleave", "aten::lift_fresh",
}


class Waits(TorchDispatchMode):
    "Counts, by name, the operations for which a host has to wait."

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        picked = name in ("aten::index", "aten::index_put", "aten::index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in WAITING or picked:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


def waits(monkeypatch, function, *args, **kwargs) -> Counter:
    "What `function` waits for, where numbers are not `readable`."
    modules = [m for name, m in sys.modules.items() if name.startswith("po_book.")]
    with monkeypatch.context() as patch, Waits() as mode:
        for module in modules:
            if hasattr(module, "readable"):
                patch.setattr(module, "readable", lambda x: False)
        for name in "tolist", "numpy", "cpu":  # on a CPU these pass by the dispatcher
            real = getattr(torch.Tensor, name)

            def counted(x, *args, real=real, name=name, **kwargs):
                mode.found[name] += 1
                return real(x, *args, **kwargs)

            patch.setattr(torch.Tensor, name, counted)
        function(*args, **kwargs)
    return mode.found
