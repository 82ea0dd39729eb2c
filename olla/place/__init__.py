"""Buffers with lifetimes to addresses: offline dynamic storage allocation."""
