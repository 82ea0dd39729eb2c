"""The paper's integer program, for any solver: the exact reference by which every heuristic is judged.

The program is that of OLLA (arXiv 2210.12924), in the words of docs/how_it_works.md. Each form is a function, and a
class that holds its ``model``, to be written to a file or given to a solver. ``solver`` and ``time_limit``, in seconds,
are those of :func:`olla.solve.solve`.
"""

from olla.ilp.address_form import AddressForm, address
from olla.ilp.fit_form import FitForm, fit
from olla.ilp.joint_form import JointForm, joint
from olla.ilp.order_form import OrderForm, order

__all__ = ["AddressForm", "FitForm", "JointForm", "OrderForm", "address", "fit", "joint", "order"]
