"""Define the layouts of arrays on the dp/sp/tp mesh: for each of them a map from logical axes to mesh axes.

This module imports nothing, so that the command line can list the layouts before jax is loaded.
"""

# Logical axis -> mesh axes; an axis that is not named is replicated. Every layout splits the activations in the same
# way. In "fsdp" each chip stores an equal share of the weights, and each block gathers its weights over sp and dp when
# it runs.
ACTIVATIONS = {
    "batch": ("dp",),
    "tokens": ("sp", "tp"),
    "gathered tokens": ("sp",),
    "split heads": ("tp",),
    "exchanged heads": ("tp", "sp"),
}
# In every layout tp, named first, splits heads and MLP and nothing else of the weights, because a block computes on
# that share; sp and dp may split one axis of each weight.
LAYOUTS = {
    "tp": ACTIVATIONS | {"heads": ("tp",), "mlp": ("tp",)},
    "fsdp": ACTIVATIONS | {"heads": ("tp", "sp", "dp"), "mlp": ("tp", "sp", "dp")},
}
