"""For people: progress and reports."""
