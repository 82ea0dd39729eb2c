"""The paper's integer program, for any solver: the exact reference by which every heuristic is judged."""

from olla.ilp.address_form import address
from olla.ilp.fit_form import fit
from olla.ilp.joint_form import joint
from olla.ilp.order_form import order

__all__ = ["address", "fit", "joint", "order"]
