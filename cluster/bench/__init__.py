"""`maestrale bench`: measuring a server over HTTP, the engine in one process, and one round trip.

`http` needs nothing but the base install. `engine` and `dispatch` need torch and gRPC, not Ray.
"""
