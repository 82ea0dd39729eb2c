"""From a dataflow graph to a schedule: heuristics and lower bounds. No torch."""
