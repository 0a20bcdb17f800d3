"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly."""
