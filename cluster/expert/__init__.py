"""The expert worker: a Ray actor that computes expert FFNs for every head."""
