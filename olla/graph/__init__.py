"""The nouns: graph, lifetimes, plan, and the checker of plans. No torch, no solver."""
