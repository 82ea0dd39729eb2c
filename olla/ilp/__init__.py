"""The paper's integer program, for any solver: the exact reference by which every heuristic is judged.

Each form is a function, and a class that holds its ``model``, to be written to a file or given to a solver.
"""

from olla.ilp.address_form import AddressForm, address
from olla.ilp.fit_form import FitForm, fit
from olla.ilp.joint_form import JointForm, joint
from olla.ilp.order_form import OrderForm, order

__all__ = ["AddressForm", "FitForm", "JointForm", "OrderForm", "address", "fit", "joint", "order"]
