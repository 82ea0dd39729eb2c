"""Traced calls replaced by others that compute the same bits and need less memory, or by nothing.

A file for each pattern: it finds the calls, and puts others in their place.
"""

from __future__ import annotations

from torch import fx

from olla.capture.rewrite.batch_norm import allocate_gradients_of_batch_norms_once, split_batch_norms
from olla.capture.rewrite.cross_entropy import compute_loss_gradients_by_rows
from olla.capture.rewrite.disjoint_sum import sum_disjoint_parts_in_place
from olla.capture.rewrite.dropout import draw_bytes_for_dropout
from olla.capture.rewrite.embedding_sum import add_embeddings_by_rows
from olla.capture.rewrite.max_pool import keep_bytes_for_max_pools
from olla.capture.rewrite.needless import erase_needless_calls
from olla.capture.rewrite.weight_gradient import slice_weight_gradients

__all__ = ["rewrite"]


def rewrite(module: fx.GraphModule) -> None:
    """Replace what is worth it, in place."""
    erase_needless_calls(module.graph)
    slice_weight_gradients(module.graph)
    compute_loss_gradients_by_rows(module.graph)
    sum_disjoint_parts_in_place(module.graph)
    add_embeddings_by_rows(module.graph)
    draw_bytes_for_dropout(module.graph)
    keep_bytes_for_max_pools(module.graph)
    split_batch_norms(module.graph)
    allocate_gradients_of_batch_norms_once(module.graph)
