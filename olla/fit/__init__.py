"""Fitting a step into fewer bytes than any order needs. No torch."""
