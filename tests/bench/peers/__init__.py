"""Maestrale beside transformers, vLLM and llama.cpp, on one checkpoint and one machine.

environments   each peer in a virtual environment of its own, installed once
engines/       how each engine is started, asked and read
programs/      what runs inside a peer's environment; imports nothing of ours
limits         what the machine can do: memory bandwidth, matrix rate
roofline       the least time that a piece of work can take within those limits
results        every finished measurement, on disk, so that a run can go on
table          all of it as markdown for RESULTS.md
"""
