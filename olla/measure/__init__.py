"""What the allocator really did, and what CUDA's would do."""
