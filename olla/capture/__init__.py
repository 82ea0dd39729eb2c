"""From a PyTorch program to a dataflow graph."""
