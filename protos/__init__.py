"""The contract between processes, and the code generated from it (`make protos`)."""
