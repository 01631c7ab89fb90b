"""SafeLoRA: after fine-tuning, updates that do not lie along the direction of alignment are projected onto it."""

from __future__ import annotations

import torch

from safelab.defenses.base import Defense
from safelab.defenses.defaults import default


class SafeLoRA(Defense):
    """For each adapted weight, with ``V = W_safe - W_unaligned`` and ``C = V V^T / ||V||_F``::

        B <- C B   where   cos(C B A, B A) <= tau

    C is the paper's cheap stand-in for the projection ``V (V^T V)^-1 V^T`` and is not scaled as that is: a small V makes
    the projected update small as well. It needs the unaligned model beside the safe one, and no data.

    Source: Hsu et al. 2024, "Safe LoRA: the silver lining" (arXiv 2405.16833), and the authors' code.
    """

    name = "safelora"

    def __init__(self, tau: float = default("safelora", "tau"), unaligned: str = default("safelora", "unaligned")) -> None:
        self.tau, self.unaligned = tau, unaligned

    def after(self, model, tokenizer):
        from safelab.models import load_model

        project_adapter(model, load_model(self.unaligned, device="cpu")[0], self.tau)
        return model


@torch.no_grad()
def project_adapter(model, unaligned, tau: float) -> list[str]:
    """Project the PEFT ``model``'s updates in place; returns the names of the weights that were projected.

    Raises
    ------
    ValueError
        ``unaligned`` has no weight of that name and shape.
    """
    base, projected = model.get_base_model(), []
    for name, module in base.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        safe = module.base_layer.weight
        try:
            other = unaligned.get_submodule(name).weight.to(safe)
            V = safe - other
        except (AttributeError, RuntimeError) as error:
            raise ValueError(f"the unaligned model has no weight {name} like the safe one's: SafeLoRA needs both of one architecture") from error
        if not V.any():  # alignment left this weight alone: there is no direction
            continue
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        new_B = V @ (V.T @ B) / V.norm()
        if torch.cosine_similarity((new_B @ A).flatten(), (B @ A).flatten(), dim=0) <= tau:
            B.copy_(new_B)
            projected.append(name)
    return projected
