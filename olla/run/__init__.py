"""From a plan to a running step."""
