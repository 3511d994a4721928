"""The ingress: HTTP, text and journals in front of the heads. Works without torch."""
