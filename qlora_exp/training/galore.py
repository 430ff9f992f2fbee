"""GaLore's AdamW, without what its package keeps beyond the paper. Imports `galore_torch`."""

from typing import Any

import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector


class Projector(GaLoreProjector):
    """GaLore's projector, with a copy of its `rank` vectors.

    Those of the package are a view of a factor of the SVD: of a float32 gradient the whole factor stays in memory, as
    large as a state of plain AdamW if the weight is square.
    """

    def get_orthogonal_matrix(self, weights: torch.Tensor, rank: int, type: str) -> torch.Tensor:
        """Return the first `rank` singular vectors of a gradient: (columns, rank) or (rank, rows)."""
        vectors: torch.Tensor = super().get_orthogonal_matrix(weights, rank, type)
        return vectors.clone()


def galore_adamw(groups: list[dict[str, Any]], **settings: Any) -> torch.optim.Optimizer:
    """Return GaLore's AdamW for groups of parameters; gradients of groups with a `rank` are projected."""
    torch.serialization.add_safe_globals([Projector])  # checkpoints have them
    optimizer: torch.optim.Optimizer = GaLoreAdamW(groups, no_deprecation_warning=True, **settings)
    for group in optimizer.param_groups:
        for parameter in group["params"] if "rank" in group else ():
            keys = ("update_proj_gap", "scale", "proj_type")
            projector = Projector(group["rank"], **{key: group[key] for key in keys})
            optimizer.state[parameter]["projector"] = projector
    return optimizer
