"""The head replica: attention, KV cache, scheduler, sampler; experts through `dispatch`."""
