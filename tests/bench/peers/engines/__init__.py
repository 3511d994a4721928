"""How each engine is started, asked and read. They share `engine.Engine`."""
