"""Pure text work of a worker: prompts in, answers out. Knows neither mlx nor sockets."""
