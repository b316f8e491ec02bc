"""Import torchax 0.0.13 under torch 2.13; delete this file with the first torchax release after 0.0.13.

torch 2.13 removed named tensors and, with them, operator overloads that torchax 0.0.13 still lists in its tables, so
that `import torchax` fails with an AttributeError. google/torchax #102 dropped the names after 0.0.13. Until that is
released, this file adds each missing name as an alias of the operator's first overload. The tables list that overload
too, and treat it in the same way, so that nothing else changes.
"""

import torch

REMOVED_OVERLOADS = {
    "all": ("dimname", "dimname_out"),
    "index_add": ("dimname",),
    "index_copy": ("dimname",),
    "index_copy_": ("dimname",),
    "index_fill": ("Dimname_Scalar", "Dimname_Tensor"),
    "index_fill_": ("Dimname_Scalar", "Dimname_Tensor"),
    "norm": ("names_ScalarOpt_dim", "names_ScalarOpt_dim_dtype", "names_dtype_out", "names_out"),
    "prod": ("dim_Dimname",),
    "std": ("correction_names", "correction_names_out", "names_dim", "names_out"),
    "std_mean": ("correction_names", "names_dim"),
    "unbind": ("Dimname",),
}

for operator, names in REMOVED_OVERLOADS.items():
    packet = getattr(torch.ops.aten, operator)
    first = getattr(packet, packet.overloads()[0])
    for name in names:
        if name not in packet.overloads():
            setattr(packet, name, first)

import torchax  # noqa: E402,F401
