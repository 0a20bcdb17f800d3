"""Which parts of a model to slim: what each is worth and costs, and the widths that keep to a budget."""
