"""What the allocator really did."""
