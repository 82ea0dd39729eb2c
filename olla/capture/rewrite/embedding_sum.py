"""The gradient of an embedding added to another gradient of its weight, row by row of those that were looked up.

Where a language model's head shares the weight of its embedding, eager PyTorch fills a tensor of the weight's size with
zeros, adds up the gradients of each token in its row, and adds that to the gradient from the head. Rows that were not
looked up are zero: they only turn -0 into +0. So the sums of the others are added to the gradient from the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, ops

from olla.capture.rewrite.calls import changes_between, erase_unused, only_user, value_of

__all__ = ["EMBEDDING_SUM", "EMBEDDING_SUM_OUT", "add_embeddings_by_rows", "bytes_of_tokens"]

aten = ops.aten

_ENOUGH = 4  # times as many rows as tokens, so that it is worth it

_ARGUMENTS = "Tensor other, Tensor gradient, Tensor indices, int padding_idx"
_LIBRARY = torch.library.Library("olla", "FRAGMENT")
_LIBRARY.define(f"embedding_sum({_ARGUMENTS}) -> Tensor")
_LIBRARY.define(f"embedding_sum.out({_ARGUMENTS}, *, Tensor(a!) out) -> Tensor(a!)")
EMBEDDING_SUM = ops.olla.embedding_sum.default
EMBEDDING_SUM_OUT = ops.olla.embedding_sum.out


def add_embeddings_by_rows(graph: fx.Graph) -> None:
    """Replace each sum of the gradient of an embedding and another one, on the CPU."""
    for node in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for embedding in node.all_input_nodes:
            if embedding.target is aten.embedding_dense_backward.default and _is_worth_it(node, embedding):
                (other,) = (term for term in node.all_input_nodes if term is not embedding)
                gradient, indices, _, padding_idx, _ = embedding.args
                with graph.inserting_before(node):
                    whole = graph.call_function(EMBEDDING_SUM, (other, gradient, indices, padding_idx))
                whole.meta = dict(node.meta)
                node.replace_all_uses_with(whole)
                erase_unused(node)
                break


def _is_worth_it(node: fx.Node, embedding: fx.Node) -> bool:
    """Whether the sum is plain, of the layout of its other term, and much larger than what was looked up."""
    _, indices, _, _, is_scaled = embedding.args
    if node.kwargs or is_scaled or len(node.all_input_nodes) != 2 or only_user(embedding) is not node:
        return False
    (other,) = (value_of(term) for term in node.all_input_nodes if term is not embedding)
    made = value_of(node)
    is_alike = (made.shape, made.stride(), made.dtype) == (other.shape, other.stride(), other.dtype)
    is_large = len(made) >= _ENOUGH * value_of(indices).numel()
    return is_alike and is_large and made.device.type == "cpu" and not changes_between(embedding, node)


def bytes_of_tokens(gradient: Tensor, indices: Tensor) -> int:
    """The workspace: sums for tokens, and what becomes of their rows."""
    return 2 * gradient.nbytes + 6 * indices.numel() * torch.int64.itemsize


def _by_rows(other: Tensor, gradient: Tensor, indices: Tensor, padding_idx: int, *, out: Tensor) -> Tensor:
    torch.add(other, 0, out=out)
    tokens = indices.flatten()
    sums = _sums(gradient.reshape(len(tokens), -1), tokens, padding_idx)
    if out.t().is_contiguous():  # as the gradient of a linear layer is
        out.t()[:, tokens] = out.t()[:, tokens].add_(sums.t())
    else:
        out[tokens] = out[tokens].add_(sums)
    return out


def _sums(gradient: Tensor, tokens: Tensor, padding_idx: int) -> Tensor:
    """For each token, the sum over all that are the same, in the order in which PyTorch adds them up."""
    found, order = tokens.sort()
    is_next = torch.zeros_like(tokens)
    torch.ne(found[1:], found[:-1], out=is_next[1:])
    number = torch.empty_like(tokens)  # of each token, among all that are different
    number[order] = is_next.cumsum(0)
    if padding_idx >= 0:
        number[tokens == padding_idx] = len(tokens)
    sums: Tensor = aten.embedding_dense_backward(gradient, number, len(tokens) + 1, len(tokens), False)
    return sums[number]


def _elsewhere(other: Tensor, *others: Any) -> Tensor:
    return _by_rows(other, *others, out=torch.empty_like(other))


_LIBRARY.impl("embedding_sum", _elsewhere, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding_sum.out", _by_rows, "CompositeExplicitAutograd")
