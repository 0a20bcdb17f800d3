"""What a model costs in practice: latency, throughput and memory, with what bounds them."""
