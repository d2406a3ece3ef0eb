"""Effects: processes, sockets and memory readings. What is to be done is decided in ``lifecycle``."""
