"""``torch.compile(model, backend="olla")``: forward and backward of a compiled model, planned together."""
