"""Settings of a distillation under which its teacher runs for nothing."""

from lightning_accel.distillation.runtime import Distillation
from lightning_accel.distillation.scheduled import bounds


def conflicts(distillation: Distillation) -> list[str]:
    """Settings that counteract each other, each with its fix."""
    found = []
    if bounds(distillation.alpha)[1] == 0:
        found.append(
            "DistillationModule runs its teacher at each step, and the distillation loss counts nothing: `alpha` is 0. Raise it, "
            "or train the student alone."
        )
    if all(bounds(term.weight)[1] == 0 for term in distillation.terms):
        found.append(
            "DistillationModule runs its teacher at each step, and every loss has `weight` 0. Give one of them a weight, or train "
            "the student alone."
        )
    return found
